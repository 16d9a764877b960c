"""The MODEL as ComfyUI handles models: patches, clones, offloading, dtypes, compilation.

In this process, with ComfyUI's own modules. Every way to run a student is compared with the plain
one over chunks that fill the window and evict from it.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rf_core.memory.live_bytes import fake_tensors, peak_bytes
from rf_core.prompts import ChunkClock, Switch
from rf_core.weights.layouts import to_diffusers

from .conftest import PACK
from .files import DEMO, write_lora
from .video import images_of

STUDENT = DEMO / "student.safetensors"
CHUNKS = 5  # the window holds three: two evictions
PROMPT = "a red circle moves right quickly"


@pytest.fixture
def stream(pack: Any, demo: Any, host: Any) -> Callable[..., Tensor]:
    """Latents of a stream of a MODEL, through the machinery of the sampler."""
    run = importlib.import_module(f"{PACK}.nodes.run")

    def made(model: Any, chunks: int = CHUNKS) -> Tensor:
        result = sampled(pack, request_of(pack, model, PROMPT, length=chunks))
        latents = run.latents_of(result, -1)
        assert latents is not None
        return latents

    return made


def request_of(pack: Any, model: Any, text: str, **changes: Any) -> Any:
    """A run of the sampler without a decoder; `text` is a schedule, or a single prompt."""
    demo, host, prompt, run, types = (
        importlib.import_module(f"{PACK}.nodes.{name}")
        for name in ("demo", "host", "prompt", "run", "types")
    )
    settings = host.settings_of(model)
    timeline = prompt.parse_timeline(text)
    clip = demo.load_clip()
    embeds = {entry.text: prompt.encode(clip, entry.text) for entry in timeline.entries}
    values = {
        "model": model,
        "prompts": types.Timeline(timeline=timeline, embeds=embeds),
        "length": CHUNKS,
        "unit": "chunks",
        "width": 64,
        "height": 64,
        "seed": 3,
        "sampler": settings.sampler,
        "cache": settings.cache,
        "decoder": None,
        "path": None,
        "metadata": {},
        "start_latents": None,
        "snapshot": None,
        "keep_images": 0,
        "keep_latents": -1,
        "reuse_bytes": 1 << 30,
    }
    return run.Request(**values | changes)


def sampled(pack: Any, request: Any) -> Any:
    """The run, made anew."""
    importlib.import_module(f"{PACK}.nodes.reuse").clear()
    return again(request)


def produced(request: Any, keep_state: str, made: Any) -> Any:
    """What Streaming Sampler does with a request; the state it leaves."""
    run = importlib.import_module(f"{PACK}.nodes.run").run
    produce = importlib.import_module(f"{PACK}.nodes.streaming").produce
    return produce(request, keep_state, made, lambda load: run(request, made))


def again(request: Any) -> Any:
    """The run, which may go on from an earlier one."""
    made = importlib.import_module(f"{PACK}.nodes.run").RunResult()
    produced(request, "none", made)
    return made


def test_it_equals_the_engine_without_comfyui(
    demo: Any, stream: Callable[..., Tensor], pack: Any
) -> None:
    from rf_core.stream import Stream
    from rf_core.text import load_text_encoder
    from rf_core.weights.checkpoint import load_student

    model, checkpoint = load_student(STUDENT, device="cpu", dtype=torch.float32)
    encoder = load_text_encoder(
        DEMO / "text_encoder.safetensors", device="cpu", dtype=torch.float32
    )
    embeds = importlib.import_module(f"{PACK}.nodes.prompt").encode(demo.load_clip(), PROMPT)
    torch.testing.assert_close(embeds, encoder.encode([PROMPT]), atol=5e-3, rtol=0)
    engine = Stream(
        model,
        embeds,
        height=64,
        width=64,
        seed=3,
        cache=checkpoint.cache,
        sampler=checkpoint.sampler,
    )
    expected = torch.cat([engine.generate() for _ in range(CHUNKS)], dim=2)
    torch.testing.assert_close(stream(demo.load_model()), expected, atol=1e-4, rtol=1e-4)


def test_a_lora_is_the_same_as_merged_weights(
    demo: Any, host: Any, stream: Callable[..., Tensor], tmp_path: Path
) -> None:
    import comfy.sd
    import comfy.utils

    from rf_core.weights.checkpoint import read_checkpoint, write_checkpoint

    path = tmp_path / "style.safetensors"
    write_lora(STUDENT, path)
    lora = load_file(path)
    plain = demo.load_model()
    patched, _ = comfy.sd.load_lora_for_models(
        plain, None, comfy.utils.load_torch_file(str(path)), 0.7, 0
    )

    found = read_checkpoint(STUDENT)
    merged = {key: tensor.float() for key, tensor in found.tensors.items()}
    for key in [key for key in lora if key.endswith("lora_A.weight")]:
        name = key.removeprefix("diffusion_model.").removesuffix(".lora_A.weight")
        up = lora[key.replace("lora_A", "lora_B")]
        merged[f"{name}.weight"] = merged[f"{name}.weight"] + 0.7 * up @ lora[key]
    by_hand = tmp_path / "merged.safetensors"
    write_checkpoint(by_hand, merged, found.config, found.cache, found.sampler)

    base, with_lora = stream(plain), stream(patched)
    assert (with_lora - base).abs().max() > 0.05
    torch.testing.assert_close(with_lora, stream(host.load_student(by_hand)), atol=2e-3, rtol=1e-3)
    assert torch.equal(stream(plain), base)  # the patch went with its MODEL


def lora_named(tmp_path: Path, naming: Callable[[str], str]) -> dict[str, Tensor]:
    """A LoRA whose keys, `diffusion_model.` taken off, are renamed."""
    path = tmp_path / "style.safetensors"
    write_lora(STUDENT, path)
    return {naming(k.removeprefix("diffusion_model.")): t for k, t in load_file(path).items()}


@pytest.mark.parametrize("prefix", ["", "transformer.", "base_model.model.", "lycoris_"])
@pytest.mark.parametrize("adapter", ["", "default."])
def test_a_lora_works_under_every_prefix_that_comfyui_has_names_for(
    demo: Any, host: Any, tmp_path: Path, prefix: str, adapter: str
) -> None:
    import comfy.sd

    from rf_core.weights.lora import merge_lora

    def naming(key: str) -> str:
        module, _, part = key.partition(".lora_")
        module = module.replace(".", "_") if prefix == "lycoris_" else module
        return f"{prefix}{module}.lora_{part.replace('weight', adapter + 'weight')}"

    lora = lora_named(tmp_path, naming)
    patched, _ = comfy.sd.load_lora_for_models(demo.load_model(), None, lora, 0.7, 0)
    weights = load_file(STUDENT)
    merged, matched, _ = merge_lora(weights, lora, 0.7)
    assert len(matched) == len(lora) and host.idle_loras(patched) == 0
    patched.patch_model()
    for name, tensor in patched.model.diffusion_model.state_dict().items():
        torch.testing.assert_close(tensor.float(), merged[name].float(), atol=2e-2, rtol=1e-2)
    assert len(patched.patches) == len(lora) // 2


@pytest.mark.parametrize("prefix", ["pipe.dit.", "dit.", "someone."])
def test_a_lora_without_effect_is_counted_whatever_else_is_loaded(
    demo: Any, host: Any, tmp_path: Path, prefix: str
) -> None:
    import comfy.sd

    model = demo.load_model()
    for before, idle in (("", 0), (prefix, 1), ("transformer.", 1)):
        lora = lora_named(tmp_path, lambda key, before=before: before + key)
        model, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0)
        assert host.idle_loras(model) == host.idle_loras(model.clone()) == idle


CASES = {
    "kohya": lambda m, p: f"lora_unet_{m.replace('.', '_')}.lora_{p}.weight",
    "wan fun": lambda m, p: f"lora_unet__{m.replace('.', '_')}.lora_{p}.weight",
    "diffsynth": lambda m, p: f"pipe.dit.{m}.lora_{'A' if p == 'down' else 'B'}.default.weight",
    "named": lambda m, p: f"dit.{m}.lora_{'A' if p == 'down' else 'B'}.my-style.weight",
    "diffusers": lambda m, p: (
        f"transformer.{to_diffusers(m)}.lora_{'A' if p == 'down' else 'B'}.weight"
    ),
}
"""Names of LoRA files that ComfyUI's own loaders do not all read."""


@pytest.fixture
def loras(pack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's folder of LoRAs."""
    import folder_paths

    listed = ([str(tmp_path)], folder_paths.folder_names_and_paths["loras"][1])
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", listed)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture
def load_lora(pack: Any, loras: Path) -> Callable[..., tuple[Any, str]]:
    """Load RF LoRA: the MODEL and what the node says."""
    node = importlib.import_module(f"{PACK}.nodes.lora").LoadLoRA

    def load(model: Any, name: str, strength: float = 1.0) -> tuple[Any, str]:
        done = node.execute(model=model, lora_name=name, strength_model=strength)
        return done.args[0], done.ui.as_dict()["text"][0]

    return load


@torch.no_grad()  # as ComfyUI runs
def patched_weights(model: Any) -> dict[str, Tensor]:
    """A MODEL's weights with its patches in them."""
    model.patch_model()
    found = {k: t.clone() for k, t in model.model.diffusion_model.state_dict().items()}
    model.unpatch_model()
    return found


def everything() -> dict[str, Tensor]:
    """An adapter of every family that merges, and differences, under ComfyUI's names."""
    torch.manual_seed(0)
    weights = load_file(STUDENT)
    base = "diffusion_model.blocks.0"
    rows, columns = weights["blocks.0.ffn.0.weight"].shape
    width = weights["blocks.0.self_attn.q.weight"].shape[0]
    parts = {
        "self_attn.q.lora_down.weight": (2, width),
        "self_attn.q.lora_up.weight": (width, 2),
        "self_attn.q.dora_scale": (width, 1),
        "self_attn.k.hada_w1_a": (width, 2),
        "self_attn.k.hada_w1_b": (2, width),
        "self_attn.k.hada_w2_a": (width, 2),
        "self_attn.k.hada_w2_b": (2, width),
        "self_attn.v.diff": (width, width),
        "self_attn.v.diff_b": (width,),
        "ffn.0.lokr_w1": (2, 2),
        "ffn.0.lokr_w2_a": (rows // 2, 3),
        "ffn.0.lokr_w2_b": (3, columns // 2),
        "diff_m": (1, 6, width),
        "norm3.diff": (width,),
    }
    made = {f"{base}.{name}": torch.randn(shape) / 8 for name, shape in parts.items()}
    made[f"{base}.self_attn.q.dora_scale"] = made[f"{base}.self_attn.q.dora_scale"].abs() + 0.5
    return made | {f"{base}.ffn.0.alpha": torch.tensor(2.0)}


@pytest.mark.parametrize("case", CASES)
def test_load_rf_lora_knows_every_name_that_the_engine_knows(
    demo: Any, host: Any, loras: Path, load_lora: Callable[..., Any], case: str
) -> None:
    from rf_core.weights.lora import merge_lora

    def naming(key: str) -> str:
        module, part = re.sub(r"\.lora_A", " down", key).replace(".lora_B", " up").split(" ")
        return CASES[case](module, part.removesuffix(".weight"))

    lora = lora_named(loras, naming)
    save_file(lora, loras / "named.safetensors")
    patched, said = load_lora(demo.load_model(), "named.safetensors", 0.7)
    layers = len(lora) // 2
    assert said == f"{layers} of {layers} layers" and host.idle_loras(patched) == 0
    merged, _, _ = merge_lora(patched_weights(demo.load_model()), lora, 0.7)
    for name, tensor in patched_weights(patched).items():
        assert torch.equal(tensor, merged[name].to(tensor.dtype)) or tensor.dtype != torch.float32
        torch.testing.assert_close(tensor.float(), merged[name].float(), atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", ["default", "float16", "float8_e4m3fn"])
def test_load_rf_lora_adds_what_the_engine_merges(
    demo: Any, host: Any, loras: Path, load_lora: Callable[..., Any], dtype: str
) -> None:
    from rf_core.weights.lora import merge_lora

    save_file(everything(), loras / "all.safetensors")
    model = host.load_student(STUDENT, dtype)
    before = {k: t.clone() for k, t in model.model.diffusion_model.state_dict().items()}
    patched, said = load_lora(model, "all.safetensors", -0.5)
    assert said == "6 of 6 layers"
    merged, matched, _ = merge_lora(before, everything(), -0.5)
    assert len(matched) == len(everything()) and len(patched.patches) == 7
    close = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    for name, tensor in patched_weights(patched).items():
        rounding = close.get(tensor.dtype, 0.13)
        expected = merged[name].float()
        torch.testing.assert_close(tensor.float(), expected, atol=rounding / 8, rtol=rounding)
    for name, tensor in model.model.diffusion_model.state_dict().items():
        assert torch.equal(tensor.float(), before[name].float())  # gone with its MODEL


def test_the_parts_of_a_patch_lie_where_comfyui_moves_them(
    demo: Any, loras: Path, load_lora: Callable[..., Any]
) -> None:
    import comfy.model_patcher

    save_file(everything(), loras / "all.safetensors")
    patched, _ = load_lora(demo.load_model(), "all.safetensors", 0.5)
    whole = patched_weights(patched)
    for key in patched.patches:
        weight = patched.model.state_dict()[key].clone()
        moving = comfy.model_patcher.LowVramPatch(key, patched.patches)
        size = moving.memory_required()
        assert size >= sum(t.nbytes for t in patched.patches[key][0][1].weights[1])
        moving.prepare(None, None)
        result = moving(weight.float())
        torch.testing.assert_close(
            result, whole[key.removeprefix("diffusion_model.")].float(), atol=2e-2, rtol=1e-2
        )


def test_loras_add_up_whoever_loads_them_and_make_the_video_of_merged_weights(
    demo: Any,
    host: Any,
    stream: Callable[..., Tensor],
    loras: Path,
    load_lora: Callable[..., Any],
) -> None:
    import comfy.sd
    import comfy.utils

    from rf_core.weights.checkpoint import convert
    from rf_core.weights.lora import Lora

    files = [loras / f"{name}.safetensors" for name in "ab"]
    save_file(everything(), files[0])
    write_lora(STUDENT, files[1])
    plain = demo.load_model()
    first, _ = load_lora(plain, "a.safetensors", 0.7)
    assert first.is_clone(plain)
    ours, _ = load_lora(first, "b.safetensors", 0.3)
    stock, _ = comfy.sd.load_lora_for_models(
        first, None, comfy.utils.load_torch_file(str(files[1])), 0.3, 0
    )
    convert(
        STUDENT,
        loras / "merged.safetensors",
        dtype=torch.float32,
        loras=[Lora(path=files[0], strength=0.7), Lora(path=files[1], strength=0.3)],
    )
    merged = stream(host.load_student(loras / "merged.safetensors"))
    base = stream(plain)
    assert (merged - base).abs().max() > 0.05
    for model in (ours, stock):
        torch.testing.assert_close(stream(model), merged, atol=2e-3, rtol=1e-3)
    assert torch.equal(stream(plain), base)


def test_a_difference_of_a_modulation_acts_for_the_stock_loader_and_goes_with_its_model(
    demo: Any, stream: Callable[..., Tensor]
) -> None:
    import comfy.sd

    plain = demo.load_model()
    weight = plain.model.diffusion_model.blocks[0].modulation
    lora = {"diffusion_model.blocks.0.modulation.diff": torch.full(weight.shape, 0.5)}
    patched, _ = comfy.sd.load_lora_for_models(plain, None, lora, 0.5, 0)
    before = weight.clone()
    base, changed, again = stream(plain, 2), stream(patched, 2), stream(plain, 2)
    assert (changed - base).abs().max() > 0.05 and torch.equal(again, base)
    patched.patch_model()
    patched.load(None, full_load=True)  # as where more memory is free: not twice
    torch.testing.assert_close(plain.model.diffusion_model.blocks[0].modulation, before + 0.25)
    patched.unpatch_model()
    assert torch.equal(plain.model.diffusion_model.blocks[0].modulation, before)


def test_a_lora_file_is_read_again_only_when_it_has_changed(
    demo: Any, host: Any, loras: Path, load_lora: Callable[..., Any], monkeypatch: Any
) -> None:
    read: list[Path] = []
    real = host.read_lora
    monkeypatch.setattr(host, "read_lora", lambda path: read.append(path) or real(path))
    write_lora(STUDENT, loras / "a.safetensors")
    node = importlib.import_module(f"{PACK}.nodes.lora").LoadLoRA
    model, given = demo.load_model(), {"lora_name": "a.safetensors", "strength_model": 1.0}
    before = node.fingerprint_inputs(model=model, **given)
    for strength in (1.0, 0.5):
        load_lora(model, "a.safetensors", strength)
    assert len(read) == 1
    os.utime(loras / "a.safetensors", (1, 1))
    assert node.fingerprint_inputs(model=model, **given) != before
    load_lora(model, "a.safetensors")
    assert len(read) == 2
    idle, said = load_lora(model, "a.safetensors", 0.0)  # whose strength a live stream may raise
    assert host.strengths(idle) == {"a": 0.0} and "strength 0" in said and len(read) == 2
    before, after = patched_weights(model), patched_weights(idle)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_unet_double_blocks_0_img_mod_lin.lora_down.weight": (2, 4)}, "made for Flux"),
        (
            {"diffusion_model.blocks.0.self_attn.q.oft_blocks": (2, 4, 4)},
            "OFT in 1 of its 1 layers",
        ),
        (
            {
                "blocks.0.self_attn.q.lora_A.weight": (2, 5120),
                "blocks.0.self_attn.q.lora_B.weight": (5120, 2),
            },
            "made for Wan 14B",
        ),
        ({"decoder.upsamples.0.weight": (1,)}, "not a LoRA but a VAE"),
    ],
)
def test_a_lora_that_does_not_fit_is_an_error_that_names_what_it_is_for(
    demo: Any,
    loras: Path,
    load_lora: Callable[..., Any],
    tensors: dict[str, tuple[int, ...]],
    said: str,
) -> None:
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, loras / "x.safetensors")
    with pytest.raises(ValueError, match=rf"^x\.safetensors: .*{re.escape(said)}") as found:
        load_lora(demo.load_model(), "x.safetensors")
    assert type(found.value) is ValueError and str(loras) not in str(found.value)


def test_what_is_left_out_of_a_lora_is_said(
    demo: Any, loras: Path, load_lora: Callable[..., Any]
) -> None:
    lora = lora_named(loras, str)
    lora["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.ones(2, 4)
    save_file(lora, loras / "x.safetensors")
    _, said = load_lora(demo.load_model(), "x.safetensors")
    layers = len(lora) // 2
    assert said.startswith(f"{layers} of {layers + 1} layers; 1 of its {len(lora)} tensors")
    assert said.endswith("1 of them a text encoder's")


@pytest.fixture
def asked(pack: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The request that the Streaming Sampler makes of its inputs."""
    sampler = importlib.import_module(f"{PACK}.nodes.sampler")

    class AskedError(Exception):
        pass

    def stop(request: Any, keep_state: str, made: Any, make: Any) -> None:
        raise AskedError(request)

    streaming = importlib.import_module(f"{PACK}.nodes.streaming")
    monkeypatch.setattr(sampler, "produce", stop)
    monkeypatch.setattr(streaming, "_metadata", lambda hidden: {})

    def execute(model: Any, prompt: Any, steps: int = 4) -> Any:
        with pytest.raises(AskedError) as found:
            sampler.StreamingSampler.execute(model, prompt, 64, 64, 2, "chunks", 0, steps)
        return found.value.args[0]

    return execute


def stock(module: str, name: str, method: str, *given: Any) -> Any:
    """The first output of one of ComfyUI's own nodes."""
    node = getattr(importlib.import_module(module), name)
    if hasattr(node, "define_schema"):
        return node.execute(*given).args[0]
    return getattr(node(), method)(*given)[0]


@pytest.mark.parametrize("shift", [3.0, 8.0])
@pytest.mark.parametrize("steps", [4, 6])
def test_the_shift_of_modelsamplingsd3_is_the_streams(
    demo: Any, host: Any, asked: Callable[..., Any], shift: float, steps: int
) -> None:
    from rf_core.scheduler import sampling_timesteps, shift_sigma

    model = demo.load_model()
    text = encoded(demo)
    plain = asked(model, text, steps).sampler
    assert plain.shift == host.settings_of(model).sampler.shift
    patched = stock("comfy_extras.nodes_model_advanced", "ModelSamplingSD3", "patch", model, shift)
    request = asked(patched, text, steps)
    made, before = sampling_timesteps(request.sampler), sampling_timesteps(plain)
    assert (made[1:] - before[1:]).abs().min() > 1
    sigmas = torch.tensor(plain.steps, dtype=torch.float64) / 1000
    torch.testing.assert_close(made, (shift_sigma(sigmas, shift) * 1000).float())
    torch.testing.assert_close(
        made / 1000, patched.get_model_object("model_sampling").sigma(sigmas * 1000).float()
    )


def encoded(demo: Any) -> Any:
    """A prompt as CLIPTextEncode makes it."""
    clip = demo.load_clip()
    return clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))


ADVANCED = "comfy_extras.nodes_model_advanced"
PATCHES = {
    "CFG": [
        (ADVANCED, "RescaleCFG", "patch", 0.7),
        ("comfy_extras.nodes_cfg", "CFGZeroStar", "execute"),
        ("comfy_extras.nodes_tcfg", "TCFG", "execute"),
    ],
    "sampling": [
        (ADVANCED, "ModelSamplingFlux", "patch", 1.15, 0.5, 64, 64),
        (ADVANCED, "ModelNoiseScale", "patch", 2.0),
    ],
    "post_cfg|CFG": [("comfy_extras.nodes_pag", "PerturbedAttentionGuidance", "execute", 3.0)],
    "rope": [("comfy_extras.nodes_rope", "ScaleROPE", "execute", 2.0, 0.0, 1.0, 0.0, 1.0, 0.0)],
    "patches .*calc_cond": [
        ("comfy_extras.nodes_easycache", "EasyCacheNode", "execute", 0.2, 0.1, 0.9, False)
    ],
    "context windows": [
        (
            "comfy_extras.nodes_context_windows",
            "WanContextWindowsManualNode",
            "execute",
            *(81, 30, "standard_static", 1, False, "pyramid", False),
        )
    ],
}


@pytest.mark.parametrize(
    ("named", "node"), [(named, node) for named, nodes in PATCHES.items() for node in nodes]
)
def test_a_stock_patch_without_effect_is_named(
    pack: Any, demo: Any, named: str, node: tuple[Any, ...]
) -> None:
    module, name, method, *given = node
    text = request_of(pack, model := demo.load_model(), PROMPT).prompts
    tell = importlib.import_module(f"{PACK}.nodes.ignored").ignored
    lines = tell(stock(module, name, method, model, *given), text)
    assert all(line.startswith("ignored: ") for line in lines)
    assert len([line for line in lines if re.search(named, line)]) == 1
    assert tell(model, text) == []


def test_what_acts_in_a_stream_is_not_said_to_be_ignored(
    pack: Any, demo: Any, tmp_path: Path
) -> None:
    import comfy.sd

    tell = importlib.import_module(f"{PACK}.nodes.ignored").ignored
    text = request_of(pack, model := demo.load_model(), PROMPT).prompts
    model, _ = comfy.sd.load_lora_for_models(model, None, lora_named(tmp_path, str), 0.7, 0)
    model = stock(ADVANCED, "ModelSamplingSD3", "patch", model, 3.0)
    model = stock(
        "comfy_extras.nodes_torch_compile", "TorchCompileModel", "execute", model, "eager"
    )
    model.model_options["transformer_options"]["optimized_attention_override"] = print
    assert tell(model, text) == []


def test_what_a_prompt_carries_without_effect_is_named(pack: Any, demo: Any) -> None:
    prompt, told = (importlib.import_module(f"{PACK}.nodes.{n}") for n in ("prompt", "ignored"))
    model, plain = demo.load_model(), encoded(demo)
    ranged = stock("nodes", "ConditioningSetTimestepRange", "set_range", plain, 0.2, 1.0)
    whole = stock("nodes", "ConditioningSetTimestepRange", "set_range", plain, 0.0, 1.0)
    guided = stock("comfy_extras.nodes_flux", "FluxGuidance", "execute", plain, 3.5)
    for single in (plain, whole):
        assert told.ignored(model, prompt.timeline_of(single)) == []
    (line,) = told.ignored(model, prompt.timeline_of(ranged))
    assert "ConditioningSetTimestepRange" in line
    timeline = None
    for at, each in enumerate((ranged, guided, plain)):
        given = (each, at, "seconds", "recache", 3, "lerp", timeline)
        timeline = prompt.PromptSwitch.execute(*given).args[0]
    lines = told.ignored(model, timeline)
    assert len(lines) == 2 and "guidance" in lines[1]


def test_a_prompt_past_the_end_is_named_and_the_rest_is_made(
    pack: Any, demo: Any, stream: Callable[..., Tensor]
) -> None:
    run = importlib.import_module(f"{PACK}.nodes.run")
    text = f"0s: {PROMPT}\nc1 [recache]: a blue square moves up\nc3 [cut]: snow\nc9: rain"
    short = request_of(pack, demo.load_model(), text, length=3)
    (snow, rain) = run.prompt_notes(short)
    assert "'snow'" in snow and "'rain'" in rain and "video ends before" in rain
    whole = request_of(pack, demo.load_model(), text, length=10)
    assert run.prompt_notes(whole) == []
    made = [run.latents_of(sampled(pack, each), -1) for each in (short, whole)]
    assert made[0].shape[2] == 9
    torch.testing.assert_close(made[0], made[1][:, :, :9])


@pytest.mark.parametrize("length", [1, 2])
def test_parts_still_share_the_whole_run(pack: Any, demo: Any, length: int) -> None:
    run = importlib.import_module(f"{PACK}.nodes.run")
    request = request_of(pack, demo.load_model(), "a | b", length=length)
    if length == 1:
        with pytest.raises(ValueError, match="parts"):
            run.plan(request)
    else:
        assert [entry.chunk for entry in run.plan(request)[0]] == [0, 1] and not run.prompt_notes(
            request
        )


@pytest.fixture
def folder(pack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of models, of states and of videos."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", kinds(tmp_path))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "out"))
    (tmp_path / "out" / "stream_states").mkdir(parents=True)
    return tmp_path


def kinds(path: Path) -> tuple[list[str], set[str]]:
    """A folder as `folder_paths` keeps it."""
    return [str(path)], {".safetensors", ".pt"}


def broken_models(folder: Path) -> list[str]:
    """Names of files that no student can be read from."""
    from safetensors.torch import save_file

    whole = load_file(STUDENT)
    write_lora(STUDENT, folder / "lora.safetensors")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "page.pt").write_bytes(b"<!DOCTYPE html>")
    (folder / "short.safetensors").write_bytes(STUDENT.read_bytes()[:5000])
    save_file({"a": torch.ones(1)}, folder / "other.safetensors")
    save_file({k: t for k, t in whole.items() if "ffn" not in k}, folder / "half.safetensors")
    save_file({**whole, "img_emb.a": torch.ones(1)}, folder / "image.safetensors")
    odd = {k: t[:50] if k == "patch_embedding.weight" else t for k, t in whole.items()}
    save_file(odd, folder / "odd.safetensors")
    twins = {f"{name}.{key}": t.clone() for name in "ab" for key, t in whole.items()}
    save_file(twins, folder / "two.safetensors")
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_no_file_is_refused_with_a_path_or_a_flag_or_a_class_of_ours(
    pack: Any, folder: Path
) -> None:
    loaders, output = (importlib.import_module(f"{PACK}.nodes.{n}") for n in ("loaders", "output"))
    names = broken_models(folder)
    (folder / "out" / "stream_states" / "cut.safetensors").write_bytes(b"1")
    for name in (*names, "cut.safetensors"):
        runs: list[Callable[[], Any]] = [
            lambda name=name: output.LoadState.execute(name=name),  # type: ignore[misc]
        ]
        if name in names:
            runs = [
                lambda name=name: loaders.LoadModel.execute(
                    model_name=name, weight_dtype="default"
                ),  # type: ignore[misc]
                lambda name=name: output.ModelInfo.execute(model_name=name),  # type: ignore[misc]
            ]
        for run in runs:
            with pytest.raises(ValueError, match=re.escape(name)) as found:
                run()
            assert type(found.value) is ValueError
            said = str(found.value)
            assert str(folder) not in said and "--" not in said and "num_heads" not in said


@pytest.mark.parametrize(
    "text",
    [
        "0s: a\n\n0s: b",
        "0s: a\n\n0.28s: b",
        "0s: a\n9s [fade]: b",
        "",
        "0s: a\nc1: b\n1f: c",
        "global: x\n0s: a\nglobal: y",
    ],
)
def test_a_schedule_is_refused_by_its_own_line(pack: Any, demo: Any, text: str) -> None:
    schedule = importlib.import_module(f"{PACK}.nodes.prompt").PromptSchedule
    with pytest.raises(ValueError) as found:
        schedule.execute(clip=demo.load_clip(), text=text)
    assert type(found.value) is ValueError
    said = str(found.value)
    assert "column" not in said and not re.search(r"line \d", said)
    if text:
        assert said.startswith(f"in the line {text.splitlines()[-1]!r}: ")
    assert schedule.validate_inputs(text=text) in (True, said)


def test_a_schedule_in_one_long_line_is_shown_from_where_it_is_wrong(pack: Any, demo: Any) -> None:
    schedule = importlib.import_module(f"{PACK}.nodes.prompt").PromptSchedule
    text = ", ".join(f'"{24 * n}": "{"a panda walks " * 3}"' for n in range(99)) + ', "x": "b"'
    with pytest.raises(ValueError) as found:
        schedule.execute(clip=demo.load_clip(), text=text)
    assert str(found.value).startswith("in the line '\"x\": \"b\"': the key 'x' is not a video")


@pytest.mark.parametrize("text", ["0s a panda\n5s it sits", '["a", "b"]', "0-5s: a\n6-9s: b"])
def test_a_schedule_that_is_nearly_one_is_refused_before_it_runs(pack: Any, text: str) -> None:
    schedule = importlib.import_module(f"{PACK}.nodes.prompt").PromptSchedule
    assert re.search(r"write (it as )?'", str(schedule.validate_inputs(text=text)))


def test_switches_that_meet_are_named_by_number_and_time_alone(pack: Any, demo: Any) -> None:
    switch = importlib.import_module(f"{PACK}.nodes.prompt").PromptSwitch
    first = switch.execute(encoded(demo), 0, "seconds", "recache", 3, "lerp").args[0]
    with pytest.raises(ValueError, match="Prompt Switch number 2") as found:
        switch.execute(encoded(demo), 0, "seconds", "recache", 3, "lerp", first)
    assert not re.search(r"line \d|column", str(found.value))
    timeline = first.timeline.append(Decimal("0.28"), "s", Switch(), "b")
    with pytest.raises(ValueError) as collided:  # found where the sampler resolves it
        timeline.resolve(ChunkClock(), 4)
    words = importlib.import_module(f"{PACK}.nodes.border").node_message
    assert "(line" in str(collided.value) and "(line" not in words(collided.value)


def test_facts_name_a_file_as_its_list_does(pack: Any, folder: Path) -> None:
    output = importlib.import_module(f"{PACK}.nodes.output")
    shutil.copy2(STUDENT, folder / "mine.safetensors")
    (text,) = output.ModelInfo.execute(model_name="mine.safetensors").args
    (row,) = [line for line in text.splitlines() if line.startswith("file ")]
    assert row.split() == ["file", "mine.safetensors"] and str(folder) not in text


def test_a_file_that_does_not_say_it_is_causal_is_doubted_by_name_alone(
    pack: Any, host: Any, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    from rf_core.config import ModelConfig
    from rf_core.model import WanModel

    doubtful = importlib.import_module(f"{PACK}.nodes.ignored").doubtful
    sizes = ModelConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=1)
    weights = {k: torch.zeros_like(t) for k, t in WanModel(sizes).state_dict().items()}
    for name, doubts in (
        ("wan2.1_t2v_1.3B", 1),
        ("rewardforcing", 0),
        ("Reward-Forcing-T2V-1.3B", 0),
        ("my_reward_forcing_fp8", 0),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_file(weights, path)
        lines = doubtful(host.load_student(path).clone(), None)
        assert len(lines) == doubts and all(path.name in line for line in lines)


def test_a_student_of_another_project_streams_by_its_family_and_says_so(
    pack: Any, host: Any, tmp_path: Path
) -> None:
    from rf_core.config import ModelConfig
    from rf_core.families import FAMILIES
    from rf_core.model import WanModel

    doubtful = importlib.import_module(f"{PACK}.nodes.ignored").doubtful
    sizes = ModelConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=1)
    weights = {f"model.{k}": torch.zeros_like(t) for k, t in WanModel(sizes).state_dict().items()}
    path = tmp_path / "self_forcing_dmd.pt"
    torch.save({"generator_ema": weights}, path)
    for chosen, family in (("auto", "self_forcing"), ("longlive", "longlive"), ("krea", "krea")):
        settings = host.settings_of(host.load_student(path, family=chosen))
        preset = FAMILIES[family]
        assert asdict(settings.cache) == asdict(preset.cache)
        assert asdict(settings.sampler) == asdict(preset.sampler)
        assert settings.family.fps == preset.fps
    named, licence = doubtful(host.load_student(path), None)
    assert "self_forcing_dmd.pt is streamed as Self-Forcing, by its file's name" in named
    assert "non-commercial" in licence


def test_a_vae_of_another_student_is_doubted(pack: Any, demo: Any, host: Any) -> None:
    doubtful = importlib.import_module(f"{PACK}.nodes.ignored").doubtful
    model, plain = demo.load_model(), host.load_student(STUDENT)
    own, other = demo.load_vae(), random_taehv()
    assert doubtful(model, own) == doubtful(plain, other) == doubtful(model, None) == []
    for crossed in (doubtful(model, other), doubtful(plain, own)):
        assert len(crossed) == 1 and "VAE belongs to another" in crossed[0]


def test_clones_share_weights(demo: Any) -> None:
    model = demo.load_model()
    clone = model.clone()
    weights = [
        each.model.diffusion_model.blocks[0].ffn[0].weight.data_ptr() for each in (model, clone)
    ]
    assert weights[0] == weights[1] and clone.model_options.keys() == model.model_options.keys()


@pytest.mark.parametrize("budget", [0, 2_000_000])
def test_partly_offloaded_weights_change_nothing(
    demo: Any, stream: Callable[..., Tensor], budget: int
) -> None:
    import comfy.model_management

    plain, offloaded = demo.load_model(), demo.load_model()
    expected = stream(plain)
    offloaded.load(torch.device("cpu"), lowvram_model_memory=budget or 1)
    assert any(getattr(module, "comfy_cast_weights", False) for module in offloaded.model.modules())
    torch.testing.assert_close(stream(offloaded), expected, atol=1e-4, rtol=1e-4)
    comfy.model_management.unload_all_models()


def test_fp8_weights_stay_close(host: Any, demo: Any, stream: Callable[..., Tensor]) -> None:
    exact = stream(demo.load_model())
    model = host.load_student(STUDENT, "float8_e4m3fn", latent_format=demo._latents())
    kept = model.model.diffusion_model.blocks[0].ffn[0].weight
    assert kept.dtype == torch.float8_e4m3fn
    rough = stream(model)
    assert rough.isfinite().all()
    assert (rough - exact)[:, :, :3].square().mean().sqrt() < 0.5 * exact.std()


def test_a_compiled_model_gives_the_same_over_evictions(
    demo: Any, stream: Callable[..., Tensor]
) -> None:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = demo.load_model()
    expected = stream(model)
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="aot_eager")
    torch.testing.assert_close(stream(compiled), expected, atol=2e-3, rtol=1e-3)


def test_attention_goes_through_comfyui(demo: Any, stream: Callable[..., Tensor]) -> None:
    model, calls = demo.load_model(), []

    def counting(original: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[1].shape[1])
        return original(*args, **kwargs)

    watched = model.clone()
    watched.model_options["transformer_options"]["optimized_attention_override"] = counting
    expected = stream(model, chunks=1)
    assert torch.equal(stream(watched, chunks=1), expected)
    sizes = model.model.diffusion_model.config
    assert len(calls) == 2 * sizes.num_layers * 4  # self and cross, in every step
    assert set(calls[1::2]) == {sizes.text_len}  # an override sees prompts as they are padded


def test_a_run_with_another_ending_goes_on_from_the_shared_beginning(
    pack: Any, demo: Any, tmp_path: Path
) -> None:
    decoders = importlib.import_module(f"{PACK}.nodes.decoders")
    model, vae = demo.load_model(), demo.load_vae()

    def request(ending: str, name: str) -> Any:
        return request_of(
            pack,
            model,
            f"0s: {PROMPT}\nc3: {ending}",
            decoder=decoders.decoder_of(vae, model.model.latent_format),
            path=tmp_path / name,
            keep_images=-1,
        )

    afresh = sampled(pack, request("a green circle moves up", "afresh.mp4"))
    sampled(pack, request("a blue square moves down", "before.mp4"))
    second = again(request("a green circle moves up", "again.mp4"))
    assert (afresh.reused, second.reused) == (0, 3)
    assert all(map(torch.equal, afresh.latents, second.latents))
    assert all(map(torch.equal, afresh.images, second.images))
    assert len(afresh.images) == len(second.images) == CHUNKS
    assert np.array_equal(images_of(tmp_path / "afresh.mp4"), images_of(tmp_path / "again.mp4"))


@pytest.fixture
def video(pack: Any, demo: Any, tmp_path: Path) -> Callable[..., Any]:
    """Requests of one model for a video and all it carries."""
    decoders = importlib.import_module(f"{PACK}.nodes.decoders")
    model, vae = demo.load_model(), demo.load_vae()

    def request(text: str, name: str, **changes: Any) -> Any:
        decoder = decoders.decoder_of(vae, model.model.latent_format)
        values = {"decoder": decoder, "path": tmp_path / name, "keep_images": -1}
        return request_of(pack, model, text, **values | changes)

    return request


def same(first: Any, second: Any, request: Any, other: Any) -> bool:
    """Whether two runs made the same latents, images and files, to the bit."""
    pairs = [(first.latents, second.latents), (first.images, second.images)]
    tensors = all(torch.equal(torch.cat(list(a), -4), torch.cat(list(b), -4)) for a, b in pairs)
    return tensors and np.array_equal(images_of(request.path), images_of(other.path))


def stop_at(host: Any, monkeypatch: pytest.MonkeyPatch, place: int | str) -> None:
    """Press Cancel once: before a pass of that number, in one's layers, de- or encoding."""
    import comfy.model_management as manage

    decoders = importlib.import_module(f"{PACK}.nodes.decoders")
    kind, number = (place, 2) if isinstance(place, str) else ("pass", place)
    kind, _, at = kind.partition(" ")
    number, asked, counts = int(at or number), [], iter(range(1000))
    owner, name = {
        "pass": (host.Progress, "on_pass"),
        "layer": (host.ComfyNetwork, "__call__"),
        "decode": (host, "count_cache_layers"),
        "encode": (decoders.StockWanDecoder, "_encode_frame"),
    }[kind]
    plain = getattr(owner, name)

    def stopping(*given: Any, **named: Any) -> Any:
        if next(counts) == number and not asked:
            asked.append(True)
            manage.interrupt_current_processing(True)
        return plain(*given, **named)

    monkeypatch.setattr(owner, name, stopping)


SWITCHED = f"0s: {PROMPT}\nc2 [{{}}]: a blue square moves up"
STOPS = [  # the window is full after three chunks
    *((PROMPT, each, chunks) for each, chunks in ((1, 0), (4, 1), (14, 3), (15, 3), (17, 3))),
    *((PROMPT, f"layer {number}", chunks) for number, chunks in ((2, 0), (15, 3), (19, 4))),
    *((PROMPT, f"decode {number}", number + 1) for number in (0, 2, 3)),
    *((SWITCHED.format("blend 2"), each, chunks) for each, chunks in ((12, 2), (17, 3), (21, 4))),
    *((SWITCHED.format("recache"), each, chunks) for each, chunks in ((9, 2), (11, 2), (16, 3))),
    *((SWITCHED.format("cut"), each, chunks) for each, chunks in ((10, 2), (16, 3))),
]


@pytest.mark.parametrize(("text", "place", "chunks"), STOPS)
def test_a_run_stopped_anywhere_is_gone_on_from_as_if_it_had_not_been(
    pack: Any,
    host: Any,
    video: Callable[..., Any],
    text: str,
    place: int | str,
    chunks: int,
) -> None:
    whole, part, rest = (video(text, f"{name}.mp4") for name in ("whole", "part", "rest"))
    expected = sampled(pack, whole)
    importlib.import_module(f"{PACK}.nodes.reuse").clear()
    stopped = stopped_run(pack, host, part, place)
    assert (stopped.chunks, stopped.resumable) == (chunks, chunks > 0)
    if chunks:
        assert len(images_of(part.path)) == stopped.num_images
    second = again(rest)
    assert second.reused == chunks
    assert same(expected, second, whole, rest)


def stopped_run(pack: Any, host: Any, request: Any, place: int | str) -> Any:
    """What a run made until it was stopped."""
    run = importlib.import_module(f"{PACK}.nodes.run")
    made = run.RunResult()
    with (
        pytest.MonkeyPatch.context() as patched,
        host.loaded(request.model, [request.decoder.vae.patcher], 0),
    ):
        stop_at(host, patched, place)
        with pytest.raises(host.Interrupted):
            run.run(request, made)
    return made


@pytest.fixture
def clip(pack: Any, demo: Any) -> Tensor:
    """Latents of three chunks, which the window holds."""
    made = sampled(pack, request_of(pack, demo.load_model(), "a green circle moves up", length=3))
    return torch.cat(list(made.latents), dim=2)


@pytest.mark.parametrize("mode", ["soft", "recache", "blend 2", "cut"])
def test_a_change_within_a_start_clip_acts_after_it_and_runs_are_gone_on_from_alike(
    pack: Any, host: Any, video: Callable[..., Any], clip: Tensor, mode: str
) -> None:
    reuse, run = (importlib.import_module(f"{PACK}.nodes.{name}") for name in ("reuse", "run"))
    names = iter(range(100))

    def request(change: str, length: int = 6) -> Any:
        text = f"0s: {PROMPT}\n{change}"
        return video(text, f"{next(names)}.mp4", length=length, start_latents=clip)

    plain = sampled(pack, whole := request(""))
    expected = sampled(pack, after := request(f"c3 [{mode}]: a blue square moves up"))
    assert (plain.num_images, run.prompt_notes(after)) == (69, [])
    assert expected.num_images == len(images_of(after.path)) == (66 if mode == "cut" else 69)
    assert np.array_equal(images_of(after.path)[:33], images_of(whole.path)[:33])
    within = [f"c1 [{mode}]: a blue square moves up", f"c2 [{mode}]: a blue square moves up"]
    within.append(f"c1 [cut]: snow\n{within[1]}")
    for change in within:
        reuse.clear()
        (*_, note) = run.prompt_notes(request(change))
        assert note.startswith("note: 'a blue square moves up', asked for at ")
        assert again(request(change, length=4)).reused == 0
        second = again(longer := request(change))
        assert second.reused == 4
        assert same(expected, second, after, longer)
        reuse.clear()
        assert stopped_run(pack, host, request(change), 2).chunks == 3
        second = again(rest := request(change))
        assert second.reused == 3
        assert same(expected, second, after, rest)
    poisoned = again(other := request("c1 [cut]: snow"))
    assert same(sampled(pack, afresh := request("c1 [cut]: snow")), poisoned, afresh, other)


def test_a_video_shorter_than_its_start_clip_is_refused(
    video: Callable[..., Any], pack: Any, clip: Tensor
) -> None:
    run = importlib.import_module(f"{PACK}.nodes.run")
    with pytest.raises(ValueError, match="the start clip alone lasts 3 chunks"):
        run.plan(video(PROMPT, "a.mp4", length=2, start_latents=clip))
    all_of_it = video(f"0s: {PROMPT}\nc1: snow\nc2: rain", "a.mp4", length=3, start_latents=clip)
    assert [line[:14] for line in run.prompt_notes(all_of_it)] == [
        "ignored: 'snow",
        "ignored: 'rain",
    ]


@pytest.mark.parametrize("mode", ["soft", "recache", "blend 2", "cut"])
def test_the_chunk_that_was_stopped_may_be_given_another_prompt(
    pack: Any, host: Any, video: Callable[..., Any], mode: str
) -> None:
    for change, reused in ((3, 3), (2, 2)):
        text = f"0s: {PROMPT}\nc{change} [{mode}]: snow"
        whole, rest = (video(text, f"{name}-{change}.mp4") for name in ("whole", "rest"))
        expected = sampled(pack, whole)
        importlib.import_module(f"{PACK}.nodes.reuse").clear()
        assert stopped_run(pack, host, video(PROMPT, "part.mp4"), 15).chunks == 3
        second = again(rest)
        assert second.reused == reused
        assert same(expected, second, whole, rest)


def test_a_run_that_was_stopped_twice_is_gone_on_from_where_it_came_last(
    pack: Any, host: Any, video: Callable[..., Any]
) -> None:
    whole, *parts = (video(PROMPT, f"{name}.mp4") for name in ("whole", "a", "b", "c", "d"))
    expected = sampled(pack, whole)
    importlib.import_module(f"{PACK}.nodes.reuse").clear()
    stopped_run(pack, host, parts[0], 7)
    second = stopped_run(pack, host, parts[1], 12)  # from its own first pass
    assert (second.reused, second.chunks) == (1, 3)
    third = stopped_run(pack, host, parts[2], 0)  # at once
    assert (third.reused, third.chunks, third.resumable) == (3, 1, True)
    last = again(parts[3])
    assert last.reused == 3 and same(expected, last, whole, parts[3])


def test_what_runs_keep_is_bounded_and_counted(
    pack: Any, host: Any, video: Callable[..., Any]
) -> None:
    reuse, streaming = (
        importlib.import_module(f"{PACK}.nodes.{n}") for n in ("reuse", "streaming")
    )
    whole = video

    def latents(text: str, name: str, **changes: Any) -> Any:
        return whole(text, name, **{"decoder": None, "path": None, "keep_images": 0} | changes)

    first = sampled(pack, latents(PROMPT, "first.mp4"))
    chunk = first.history[0].nbytes
    assert reuse.num_bytes() == CHUNKS * chunk
    longer = again(latents(PROMPT, "longer.mp4", length=CHUNKS + 1))
    assert longer.reused == CHUNKS and reuse.num_bytes() == (CHUNKS + 1) * chunk
    branch = again(latents(f"0s: {PROMPT}\nc3: snow", "branch.mp4"))
    assert branch.reused == 3
    assert reuse.num_bytes() == (CHUNKS + 1 + CHUNKS - 3) * chunk  # of which three are shared
    again(small := latents(PROMPT, "small.mp4", seed=4, reuse_bytes=2 * chunk))
    assert reuse.num_bytes() == 2 * chunk  # the beginning of this one, and no older run
    assert "MB kept for later runs" in streaming.summary(small, first)
    assert again(latents(PROMPT, "more.mp4", seed=4)).reused == 2
    held = reuse.num_bytes()
    none = again(latents(PROMPT, "none.mp4", seed=4, reuse_bytes=0))
    assert (none.reused, none.history, reuse.num_bytes()) == (0, [], held)
    stopped = stopped_run(pack, host, whole(PROMPT, "a.mp4", seed=5, reuse_bytes=chunk), 12)
    assert stopped.chunks == 2 and not stopped.resumable
    for keep_images in (0, 21):
        sampled(pack, whole(PROMPT, "b.mp4", length=2, keep_images=keep_images))
        tail = reuse._cached[0].tail
        assert reuse.num_bytes() == 2 * chunk + tail.nbytes
        assert tail.nbytes == tail.decoder.nbytes + keep_images * 3 * 64 * 64 * 4
        sampled(pack, whole(PROMPT, "c.mp4", length=2, reuse_bytes=2 * chunk + tail.nbytes - 1))
        assert reuse._cached[0].tail is None and reuse.num_bytes() == 2 * chunk


def test_memory_that_runs_out_leaves_what_can_be_gone_on_from(
    pack: Any, host: Any, video: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, part, rest = (video(PROMPT, f"{name}.mp4") for name in ("whole", "part", "rest"))
    expected = sampled(pack, whole)
    plain, passes = host.ComfyNetwork.__call__, iter(range(1000))

    def failing(*given: Any, **named: Any) -> Tensor:
        if next(passes) == 17:
            raise torch.OutOfMemoryError("no more")
        return plain(*given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(host.ComfyNetwork, "__call__", failing)
        with pytest.raises(RuntimeError, match=r"memory ran out.*part\.mp4"):
            sampled(pack, part)
    second = again(rest)
    assert second.reused == 3 and same(expected, second, whole, rest)


@pytest.mark.parametrize("failing", ["update_sink", "shift_tokens", "rotate_context"])
def test_memory_that_runs_out_while_the_window_moves_costs_what_was_not_made(
    pack: Any, host: Any, video: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    cache = importlib.import_module(f"{PACK}.rf_core.kv_cache")
    owner = cache if failing == "shift_tokens" else cache.kernels
    whole, part, rest = (video(PROMPT, f"{name}.mp4") for name in ("whole", "part", "rest"))
    expected = sampled(pack, whole)
    plain, calls = getattr(owner, failing), iter(range(1000))
    last = {"update_sink": 1, "shift_tokens": 3, "rotate_context": 4}[failing]

    def out(*given: Any, **named: Any) -> Any:
        if next(calls) == last:
            raise torch.OutOfMemoryError("no more")
        return plain(*given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(owner, failing, out)
        with pytest.raises(RuntimeError, match="memory ran out"):
            sampled(pack, part)
    second = again(rest)
    assert second.reused == 4
    assert same(expected, second, whole, rest)


def test_a_file_that_now_holds_another_video_is_not_gone_on_from(
    pack: Any, video: Callable[..., Any]
) -> None:
    whole, first = video(PROMPT, "whole.mp4"), video(PROMPT, "video.mp4", length=2)
    expected = sampled(pack, whole)
    sampled(pack, first)
    first.path.unlink()
    again(video(PROMPT, "video.mp4", length=2, seed=4))  # under the same name
    rest = video(PROMPT, "rest.mp4")
    assert again(rest).reused == 2  # whose images are decoded again
    longer = again(video(PROMPT, "longer.mp4", length=6))
    assert longer.reused == CHUNKS
    assert np.array_equal(images_of(whole.path), images_of(rest.path))
    assert len(expected.images) == CHUNKS


def test_a_file_that_is_shorter_than_it_was_is_made_anew(
    pack: Any, host: Any, video: Callable[..., Any]
) -> None:
    from rf_core.video import remux

    join, reuse = (importlib.import_module(f"{PACK}.nodes.{name}") for name in ("join", "reuse"))
    whole, first, rest = (video(PROMPT, f"{name}.mp4") for name in ("whole", "first", "rest"))
    expected = sampled(pack, whole)
    reuse.clear()
    stopped = stopped_run(pack, host, first, 12)
    short = video(PROMPT, "short.mp4", length=1)
    again(short)
    remux(short.path, {join.RUN: stopped.run})
    short.path.replace(first.path)
    second = again(rest)
    assert second.reused == 2 and same(expected, second, whole, rest)


@pytest.mark.parametrize(
    ("room", "cut", "keep_images"),
    [
        *((250_000, cut, keep) for cut, keep in ((None, 0), (None, 40), (3, 13))),
        (1 << 30, 14, 40),
    ],
)
def test_as_few_images_are_decoded_again_as_the_rest_of_a_long_video_needs(
    pack: Any, host: Any, video: Callable[..., Any], room: int, cut: int | None, keep_images: int
) -> None:
    text = PROMPT if cut is None else f"0s: {PROMPT}\nc{cut} [cut]: snow"
    few = {"keep_images": keep_images, "keep_latents": 0, "reuse_bytes": room}
    whole, part, rest = (
        video(text, f"{name}.mp4", length=length, **few)
        for name, length in (("whole", 18), ("part", 17), ("rest", 18))
    )
    expected = sampled(pack, whole)
    sampled(pack, part)
    decoded, plain = [], type(rest.decoder).decode

    def counting(decoder: Any, latents: Tensor, state: Any) -> Any:
        decoded.append(latents.shape[2] // 3)
        return plain(decoder, latents, state)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(rest.decoder), "decode", counting)
        second = again(rest)
    assert second.reused == 17 and second.num_images == expected.num_images
    assert np.array_equal(images_of(whole.path), images_of(rest.path))
    run = importlib.import_module(f"{PACK}.nodes.run")
    found, wanted = (run.images_of(made, keep_images) for made in (second, expected))
    assert (found is None and wanted is None) or torch.equal(found, wanted)
    back = 1 - (-rest.decoder.memory_frames // 3)
    if room == 1 << 30:
        assert len(decoded) == 1
    elif keep_images == 0:
        first = max(17 - back, 0 if cut is None else cut)
        assert len(decoded) == 18 - first


@pytest.mark.parametrize("room", [250_000, 1 << 30])
def test_a_cut_right_after_what_is_taken_over_begins_a_clip_of_its_own(
    pack: Any, video: Callable[..., Any], room: int
) -> None:
    cut = f"0s: {PROMPT}\nc3 [cut]: snow"
    whole, rest = (video(cut, f"{name}.mp4", reuse_bytes=room) for name in ("whole", "rest"))
    expected = sampled(pack, whole)
    sampled(pack, video(PROMPT, "part.mp4", length=3, reuse_bytes=room))
    second = again(rest)
    assert second.reused == 3 and same(expected, second, whole, rest)


@pytest.mark.parametrize("room", [250_000, 1 << 30])
def test_a_run_that_is_taken_over_whole_leaves_the_same_state(
    pack: Any, video: Callable[..., Any], room: int
) -> None:
    run = importlib.import_module(f"{PACK}.nodes.run")
    importlib.import_module(f"{PACK}.nodes.reuse").clear()
    states, files = [], [video(PROMPT, f"{name}.mp4", reuse_bytes=room) for name in "ab"]
    for request in files:
        made = run.RunResult()
        states.append(produced(request, "exact", made))
    assert made.reused == CHUNKS
    assert np.array_equal(*(images_of(request.path) for request in files))
    first, second = (state.tensors for state in states)
    assert first.keys() == second.keys() and states[0].facts == states[1].facts
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_kept_is_of_the_very_same_patches_wrappers_and_options(
    demo: Any, host: Any, video: Callable[..., Any], pack: Any
) -> None:
    reuse = importlib.import_module(f"{PACK}.nodes.reuse")
    first = sampled(pack, plain := video(PROMPT, "plain.mp4", length=1))
    assert again(video(PROMPT, "b.mp4", length=1)).reused == len(first.history) == 1

    def keys(model: Any) -> Any:
        return reuse.key_of(replace(plain, model=model))

    def changed(change: Callable[[Any], None]) -> Any:
        model = plain.model.clone()
        change(model)
        return keys(model)

    def wrapper(run: Any, *given: Any, **named: Any) -> Any:
        return run(*given, **named)

    def option(value: Any) -> Callable[[Any], None]:
        return lambda model: model.model_options["transformer_options"].update(strength=value)

    weight = next(iter(plain.model.model.state_dict()))
    found = [
        keys(plain.model),
        changed(option(1.0)),
        changed(option(0.5)),
        changed(option([0.5])),
        changed(lambda model: model.model_options.update(sampler_cfg_function=wrapper)),
        changed(lambda model: model.add_object_patch("model_sampling", object())),
        changed(lambda model: model.add_wrapper_with_key("diffusion_model", "a", wrapper)),
        changed(lambda model: model.add_wrapper_with_key("diffusion_model", "a", lambda r: r)),
        changed(lambda model: model.set_model_patch(wrapper, "attn1_patch")),
        changed(lambda model: model.add_patches({weight: (torch.ones(1),)}, 0.5)),
        keys(demo.load_model()),
        reuse.key_of(replace(plain, keep_images=1, seed=plain.seed + 1)),
        reuse.key_of(replace(plain, start_latents=torch.zeros(1, 16, 3, 8, 8))),
        reuse.key_of(replace(plain, start_latents=torch.ones(1, 16, 3, 8, 8))),
    ]
    for number, key in enumerate(found):
        assert [key == other for other in found] == [number == n for n in range(len(found))]
    assert keys(plain.model.clone()) == found[0]
    assert changed(option(0.5)) == found[2]
    assert changed(lambda m: m.set_model_patch(wrapper, "attn1_patch")) == found[8]


def test_a_run_from_an_exact_state_is_not_taken_for_one_from_its_compact_form(
    video: Callable[..., Any], pack: Any
) -> None:
    run = importlib.import_module(f"{PACK}.nodes.run")
    states = [
        produced(video(PROMPT, f"{kind}.mp4"), kind, run.RunResult())
        for kind in ("exact", "compact")
    ]
    for state in states:
        whole = video(PROMPT, "whole.mp4", snapshot=state, length=2)
        assert again(whole).reused == 0
        assert again(video(PROMPT, "again.mp4", snapshot=state, length=3)).reused == 2
    through_a_file = replace(
        states[0], tensors={k: t.clone() for k, t in states[0].tensors.items()}
    )
    assert again(video(PROMPT, "d.mp4", snapshot=through_a_file, length=4)).reused == 3


@pytest.mark.parametrize(
    "name", ["../beside.mp4", "a/../../beside.mp4", "{}/beside.mp4", "C:beside.mp4", "a\\b.mp4", ""]
)
def test_a_state_names_no_file_outside_the_output_folder(
    host: Any, folder: Path, name: str
) -> None:
    (folder / "beside.mp4").write_bytes(b"")
    (folder / "out" / "a").mkdir()
    for inside in ("b.mp4", "a/c.mp4"):
        (folder / "out" / inside).write_bytes(b"")
        assert host.output_named(inside) == folder / "out" / inside
    assert host.output_named(name.format(folder)) is None


@pytest.mark.parametrize(
    "said", [None, "x.mp4", {}, {"file": 1, "run": "a", "images": 3}, {"file": "x", "images": 0}]
)
def test_a_state_that_says_nonsense_of_its_video_is_refused(pack: Any, said: Any) -> None:
    from rf_core.state import Snapshot

    join = importlib.import_module(f"{PACK}.nodes.join")
    with pytest.raises(ValueError, match="does not say which video"):
        join.previous_video(Snapshot(tensors={}, facts={} if said is None else {"video": said}))


def test_a_video_that_was_cut_since_is_not_joined(pack: Any, video: Callable[..., Any]) -> None:
    join = importlib.import_module(f"{PACK}.nodes.join")
    first = video(PROMPT, "first.mp4", length=1)
    made = sampled(pack, first)
    previous = join.PreviousVideo(path=first.path, run=made.run, num_images=21)
    rest = video(PROMPT, "rest.mp4", previous=previous)
    with pytest.raises(ValueError, match=r"^join is on, and first\.mp4 cannot"):
        sampled(pack, rest)
    assert not rest.path.exists() and len(images_of(first.path)) == 9


def test_out_of_memory_keeps_the_file_and_says_what_to_lower(
    pack: Any, demo: Any, host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    decoders = importlib.import_module(f"{PACK}.nodes.decoders")
    model, vae, passes = demo.load_model(), demo.load_vae(), []
    plain = host.ComfyNetwork.__call__

    def failing(*args: Any, **named: Any) -> Tensor:
        passes.append(1)
        if len(passes) > 2 * 5 + 1:  # in the third chunk
            raise torch.OutOfMemoryError("no more")
        return plain(*args, **named)

    monkeypatch.setattr(host.ComfyNetwork, "__call__", failing)
    decoder = decoders.decoder_of(vae, model.model.latent_format)
    request = request_of(pack, model, PROMPT, decoder=decoder, path=tmp_path / "part.mp4")
    with pytest.raises(RuntimeError, match=r"64x64.*window \(9 frames\).*part\.mp4"):
        sampled(pack, request)
    assert len(images_of(tmp_path / "part.mp4")) == 9 + 12


def test_memory_counts_the_cache(host: Any, demo: Any) -> None:
    inside = host.student_of(demo.load_model())
    from rf_core.config import CacheConfig, SamplerConfig

    steps = SamplerConfig()
    small = inside.stream_memory(1, (8, 8), CacheConfig(), steps)
    wide = inside.stream_memory(1, (16, 16), CacheConfig(), steps)
    long = inside.stream_memory(1, (8, 8), CacheConfig(window_frames=21), steps)
    joint = inside.stream_memory(1, (8, 8), CacheConfig(recache="joint"), steps)
    cache = 2 * 5 * 9 * 16 * 160 * 4
    assert small > cache and 2 * small < wide < 4 * small and long > small + cache
    assert joint > small


def test_on_cards_it_computes_in_bfloat16_as_published(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as manage

    for name in ("should_use_fp16", "should_use_bf16"):
        monkeypatch.setattr(manage, name, lambda *_, **__: True)
    choices = host.StreamingWan.supported_inference_dtypes
    for stored in (torch.float32, torch.bfloat16):
        chosen = manage.unet_dtype(supported_dtypes=choices, weight_dtype=stored)
        assert chosen == torch.bfloat16


def test_on_a_cpu_that_multiplies_bfloat16_large_networks_compute_in_it(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.cli_args

    devices = importlib.import_module(f"{PACK}.rf_core.devices")
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda: True)

    def computes(weight_dtype: str = "default") -> tuple[torch.dtype, torch.dtype]:
        inside = host.load_student(STUDENT, weight_dtype).model
        return inside.diffusion_model.dtype, inside.get_dtype_inference()

    assert computes() == (torch.float32, torch.float32)  # the demo is small
    assert computes("bfloat16") == (torch.bfloat16, torch.float32)
    monkeypatch.setattr(devices, "MIN_BFLOAT16_DIM", 160)
    assert computes() == computes("bfloat16") == (torch.bfloat16, torch.bfloat16)
    assert computes("float16") == (torch.float16, torch.float32)
    monkeypatch.setattr(comfy.cli_args.args, "fp32_unet", True)
    assert computes() == (torch.float32, torch.float32)


def test_a_student_streams_in_bfloat16_on_such_a_cpu(
    host: Any, demo: Any, stream: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = stream(demo.load_model(), 2)
    devices = importlib.import_module(f"{PACK}.rf_core.devices")
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(devices, "MIN_BFLOAT16_DIM", 160)
    model = demo.load_model()
    assert model.model.get_dtype_inference() == torch.bfloat16
    made = stream(model, 2)
    assert made.isfinite().all() and 0 < (made - plain).norm() < 0.5 * plain.norm()


def test_a_broken_checkpoint_is_refused(host: Any, tmp_path: Path) -> None:
    from rf_core.weights.checkpoint import read_checkpoint, write_checkpoint

    found = read_checkpoint(STUDENT)
    found.tensors["head.head.weight"][0, 0] = torch.nan
    path = tmp_path / "broken.safetensors"
    write_checkpoint(path, found.tensors, found.config, found.cache, found.sampler)
    with pytest.raises(ValueError, match=r"^broken\.safetensors: .* in 1 .*head\.head\.weight"):
        host.load_student(path)


def test_a_model_that_is_no_student_is_refused(host: Any) -> None:
    class Other:
        model = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="Load RF Model"):
        host.student_of(Other())


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 1, 3, 1, 1]])
def test_stock_decoders_take_one_latent_frame_at_a_time(
    pack: Any, demo: Any, sizes: list[int]
) -> None:
    decoders = importlib.import_module(f"{PACK}.nodes.decoders")
    format = demo.load_model().model.latent_format
    for vae in (demo.load_vae(), random_wan(), random_taehv()):
        latents = torch.randn(1, 16, sum(sizes), 4, 4)
        decoder, parts = decoders.decoder_of(vae, format), []
        whole, state = decoder.decode(latents, None)[0], None
        for part in latents.split(sizes, dim=2):
            first = state is None
            images, state = decoder.decode(part, state)
            assert images.shape[1] == decoder.images_of(part.shape[2], first)
            parts.append(images)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_stock_decoders_stream_to_the_very_images_of_a_whole_decode(
    pack: Any, demo: Any, chunks: int
) -> None:
    decoders = importlib.import_module(f"{PACK}.nodes.decoders")
    format, taehv = demo.load_model().model.latent_format, random_taehv()
    for vae in (demo.load_vae(), taehv):
        latents = torch.randn(1, 16, 3 * chunks, 8, 8)
        whole = vae.decode(format.process_out(latents))[0]
        decoder, state, parts = decoders.decoder_of(vae, format), None, []
        for part in latents.split(3, dim=2):
            images, state = decoder.decode(part, state)
            parts.append(images[0])
        streamed = torch.cat(parts).movedim(1, -1)
        torch.testing.assert_close(streamed, whole.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", [[6], [1] * 6, [2, 1, 3], [1, 4, 1]])
@torch.no_grad()
def test_stock_decoders_encode_a_stream_of_images_to_the_latents_of_a_whole_encode(
    pack: Any, demo: Any, sizes: list[int]
) -> None:
    decoders = importlib.import_module(f"{PACK}.nodes.decoders")
    format = demo.load_model().model.latent_format
    for vae in (demo.load_vae(), random_wan(), random_taehv()):
        decoder = decoders.decoder_of(vae, format)
        counts = [decoder.source_images_of(each, i == 0) for i, each in enumerate(sizes)]
        images = torch.rand(1, sum(counts), 3, 64, 64)
        state, parts = None, []
        for part in images.split(counts, dim=1):
            kept = state and state.fork()
            latents, state = decoder.encode_chunk(part, state)
            if kept:
                assert torch.equal(decoder.encode_chunk(part, kept)[0], latents)
            parts.append(latents.cpu())
        streamed = torch.cat(parts, dim=2)
        assert streamed.shape == (1, 16, sum(sizes), 8, 8)
        assert state.num_frames == sum(counts)
        assert torch.equal(streamed, decoder.encode_chunk(images, None)[0].cpu())
        torch.testing.assert_close(streamed, decoder.encode(images).cpu(), atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match=r"5 images do not make.*a multiple of 4"):
            decoder.encode_chunk(images[:, :5], state)
        _, decoded = decoder.decode(streamed, None)
        with pytest.raises(ValueError, match="is decoded, not encoded"):
            decoder.encode_chunk(images[:, :4], decoded)


@pytest.mark.parametrize(("name", "images"), [("comfy-wan", 109), ("comfy-taehv", 30)])
def test_a_source_that_a_stock_decoder_encodes_seeks_to_the_bit(
    pack: Any, demo: Any, name: str, images: int
) -> None:
    decoders, source = (
        importlib.import_module(f"{PACK}.{part}") for part in ("nodes.decoders", "rf_core.source")
    )
    vae = random_wan() if name == "comfy-wan" else random_taehv()
    decoder = decoders.decoder_of(vae, demo.load_model().model.latent_format)
    assert decoder.source_memory_images == images
    clip = torch.rand(9 + 12 * 12, 16, 16, 3)
    whole, sought = (source.BatchSource(clip, decoder, height=16, width=16) for _ in range(2))
    expected = [whole.latents(3, first=chunk == 0) for chunk in range(13)]
    sought.seek(9 + 12 * 11)
    assert torch.equal(sought.latents(3, first=False), expected[12])
    sought.seek(9)
    assert torch.equal(sought.latents(3, first=False), expected[1])


@pytest.mark.parametrize(("name", "memory"), [("comfy-wan", 38), ("comfy-taehv", 8)])
def test_nothing_is_left_of_what_was_before_a_stock_decoder_s_memory(
    pack: Any, demo: Any, name: str, memory: int
) -> None:
    decoders = importlib.import_module(f"{PACK}.nodes.decoders")
    vae = random_wan() if name == "comfy-wan" else random_taehv()
    decoder = decoders.decoder_of(vae, demo.load_model().model.latent_format)
    assert (decoder.kind, decoder.memory_frames) == (name, memory)
    chunks = memory // 3 + 1
    # The Wan decoder cuts a stream's first chunk, which then rounds otherwise: one chunk more.
    parts = torch.randn(1, 16, 3 * (chunks + 4), 4, 4).split(3, dim=2)

    def after(chunks: int) -> dict[str, torch.Tensor]:
        state = None
        for part in parts[-chunks:]:
            _, state = decoder.decode(part, state)
        return state.tensors

    whole, enough, short = after(chunks + 4), after(chunks + 1), after(chunks - 1)
    assert all(torch.equal(enough[key], whole[key]) for key in whole)
    assert not all(torch.equal(short[key], whole[key]) for key in whole)


def random_wan() -> Any:
    import comfy.sd

    torch.manual_seed(0)
    wan = importlib.import_module(f"{PACK}.rf_core.decoders.vae")
    vae = wan.WanVAE(wan.VAEConfig(dim=8))
    return comfy.sd.VAE(sd=vae.state_dict())


def random_taehv(dtype: torch.dtype = torch.float32) -> Any:
    import comfy.sd
    from comfy.taesd.taehv import TAEHV

    torch.manual_seed(0)
    shapes = {key: tensor.shape for key, tensor in TAEHV(16).state_dict().items()}
    fan_in = {key: max(shape[1:].numel(), 1) for key, shape in shapes.items()}
    weights = {key: torch.randn(shape) / fan_in[key] ** 0.5 for key, shape in shapes.items()}
    return comfy.sd.VAE(sd={key: weight.half().to(dtype) for key, weight in weights.items()})


def test_taew2_1_which_comfyui_scales_for_another_model_gets_normalised_latents(
    pack: Any, demo: Any
) -> None:
    decoders = importlib.import_module(f"{PACK}.nodes.decoders")
    format, plain = demo.load_model().model.latent_format, random_taehv()
    decoder = decoders.decoder_of(random_taehv(torch.float16), format)
    latents = torch.randn(1, 16, 3, 8, 8)
    images, _ = decoder.decode(latents, None)
    torch.testing.assert_close(
        images[0].movedim(1, -1), plain.decode(latents)[0].float(), atol=1e-2, rtol=1e-2
    )
    clip = torch.rand(1, 12, 3, 64, 64)
    expected = plain.encode(clip[0].movedim(1, -1)).float()
    torch.testing.assert_close(decoder.encode(clip), expected, atol=1e-2, rtol=1e-2)


def test_a_vae_of_another_kind_is_refused_by_name(pack: Any, demo: Any) -> None:
    decoders = importlib.import_module(f"{PACK}.nodes.decoders")

    class Other:
        first_stage_model = torch.nn.Linear(1, 1)
        latent_dim, latent_channels = 2, 4

    with pytest.raises(ValueError, match=r"images and 4 latent.*wan_2\.1_vae") as found:
        decoders.decoder_of(Other(), demo.load_model().model.latent_format)
    assert "Linear" not in str(found.value)


def fake_decoder(monkeypatch: pytest.MonkeyPatch, name: str, place: str) -> Any:
    """A decoder of the published sizes, whose tensors are counted and not there."""
    import comfy.latent_formats
    import comfy.model_management
    from comfy.ldm.wan.vae import WanVAE
    from comfy.taesd.taehv import TAEHV

    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: 1e12)
    wan = {"dim": 96, "z_dim": 16, "temperal_downsample": [False, True, True]}
    codec = WanVAE(**wan) if "Wan" in name else TAEHV(latent_channels=16)
    codec = codec.to(place, torch.bfloat16).requires_grad_(False)
    vae = SimpleNamespace(
        first_stage_model=codec,
        device=torch.device(place),
        vae_dtype=torch.bfloat16,
        process_input=lambda images: images,
        process_output=lambda images: images,
    )
    decoders = importlib.import_module(f"{PACK}.nodes.decoders")
    return getattr(decoders, name)(vae, comfy.latent_formats.Wan21())


@pytest.mark.parametrize("name", ["StockWanDecoder", "StockTAEHVDecoder"])
@pytest.mark.parametrize("size", [(480, 832), (256, 256)])
def test_what_decoding_is_said_to_take_is_what_its_tensors_take(
    pack: Any, monkeypatch: pytest.MonkeyPatch, name: str, size: tuple[int, int]
) -> None:
    with fake_tensors("cuda") as place:
        decoder = fake_decoder(monkeypatch, name, place)
        latents = torch.empty(1, 16, 3, *(side // 8 for side in size), device=place)

        def three_chunks() -> None:
            state = None
            for _ in range(3):
                _, state = decoder.decode(latents, state)

        counted = peak_bytes(three_chunks, place)
    assert decoder.decode_bytes(*size, 3) == pytest.approx(counted, rel=0.1)
