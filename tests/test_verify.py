from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from einops import rearrange
from reference import Reference
from safetensors import safe_open
from safetensors.torch import save_file

from rf_core.__main__ import main
from rf_core.config import CacheConfig, SamplerConfig
from rf_core.measure.verify import Backend, Comparison, verify_folder

GOLDEN = Path(__file__).parent / "parity" / "golden"


def test_verify_passes_on_the_golden_files(capsys):
    assert main(["verify", str(GOLDEN), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "all agree" in out and "redmd_losses" in out and out.count("ok ") >= 12


def test_verify_fails_on_a_changed_file_and_names_the_output(tmp_path, capsys):
    with safe_open(GOLDEN / "teacher_forward.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["flow"][0, 0, 0, 0, 0] += 1e-3
    save_file(tensors, tmp_path / "changed.safetensors", metadata=metadata)
    assert main(["verify", str(tmp_path), "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "FAIL changed.safetensors flow" in out and "1 outputs disagree" in out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_verify_holds_half_precision_to_its_rounding(dtype):
    with torch.no_grad():
        results = [*verify_folder(GOLDEN, Backend(dtype=dtype))]
    found = [r for r in results if isinstance(r, Comparison)]
    assert all(r.agrees for r in found)
    assert max(r.relative_error for r in found) > 1e-4


@pytest.mark.parametrize(
    ("batch", "start", "window", "sink", "steps", "shift"),
    [
        (2, 3, 9, 3, (1000, 600, 300), 3.0),
        (1, 6, 12, 3, (900,), 8.0),
        (1, 0, -1, 3, (1000, 500), 5.0),
    ],
)
def test_verify_takes_every_size_from_the_file(tmp_path, batch, start, window, sink, steps, shift):
    config, model = tiny.CONFIG, tiny.model()
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    frames, chunk = 12, (4, 3, 6, 4)
    noise = draw(batch, 4, frames, 6, 4)
    renoise = [draw(batch, *chunk) for _ in range(frames // 3 * (len(steps) - 1))]
    prompt = draw(batch, 7, config.text_dim)
    first = draw(batch, 4, start, 6, 4) if start else None
    cache = CacheConfig(
        window_frames=frames if window == -1 else window, sink_frames=sink, decay=0.9
    )
    reference = Reference(
        model.state_dict(), config, cache, SamplerConfig(steps=steps, shift=shift)
    )
    latents = reference.stream(noise, renoise, prompt, first)
    layer = reference.frames[1]
    tensors = {
        **{f"weights.{name}": tensor for name, tensor in model.state_dict().items()},
        "noise": rearrange(noise, "b c f h w -> b f c h w"),
        "prompt_embeds": prompt,
        "latents": rearrange(latents, "b c f h w -> b f c h w"),
        "cache.1.k": torch.cat([k for k, _ in layer], dim=1),
        "cache.1.v": torch.cat([v for _, v in layer], dim=1),
        "renoise": torch.stack([rearrange(r, "b c f h w -> b f c h w") for r in renoise])
        if renoise
        else torch.zeros(0, batch, 3, 4, 6, 4),
    }
    if first is not None:
        tensors["initial_latent"] = rearrange(first, "b c f h w -> b f c h w")
    sizes = (
        "text_len",
        "in_dim",
        "dim",
        "ffn_dim",
        "freq_dim",
        "text_dim",
        "num_heads",
        "num_layers",
    )
    facts = {
        **{name: getattr(config, name) for name in sizes},
        "local_attn_size": window,
        "sink_size": sink,
        "num_frame_per_block": 3,
        "denoising_step_list": steps,
        "shift": shift,
        "alpha": 0.9,
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        tmp_path / "stream.safetensors",
        metadata={"kind": "student_stream", "config": json.dumps(facts)},
    )
    with torch.no_grad():
        results = [*verify_folder(tmp_path, Backend())]
    assert {r.output for r in results} == {"latents", "cache.1.k", "cache.1.v"}
    assert all(r.agrees for r in results), results


def test_a_folder_without_golden_files_or_with_a_broken_one_is_refused(tmp_path, capsys):
    assert main(["verify", str(tmp_path / "none"), "--device", "cpu"]) == 1
    assert "is not a folder" in capsys.readouterr().err
    assert main(["verify", str(tmp_path), "--device", "cpu"]) == 1
    assert "holds no file of the kinds" in capsys.readouterr().err
    (tmp_path / "cut.safetensors").write_bytes((GOLDEN / "vae.safetensors").read_bytes()[:5000])
    assert main(["verify", str(tmp_path), "--device", "cpu"]) == 1
    assert "is truncated" in capsys.readouterr().err
