import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rf_core.weights.files import CheckpointError
from rf_core.weights.lora import Lora, apply_loras, merge_lora, parse_lora_argument, read_lora

RANK, ALPHA, STRENGTH = 4, 2.0, 0.7
Q, FFN, PATCH = "blocks.0.self_attn.q", "blocks.1.ffn.2", "patch_embedding"
OTHER_NAMES = {Q: "blocks.0.attn1.to_q", FFN: "blocks.1.ffn.net.2", PATCH: PATCH}


def model_tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {
        f"{Q}.weight": (12, 12),
        f"{Q}.bias": (12,),
        f"{FFN}.weight": (12, 20),
        f"{FFN}.bias": (12,),
        f"{PATCH}.weight": (12, 3, 1, 2, 2),
        "blocks.0.modulation": (1, 6, 12),
        "blocks.0.norm3.weight": (12,),
    }
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def pair(module, seed=1):
    """The down [rank, in] and up [out, rank] matrices of one module, convolutions included."""
    generator = torch.Generator().manual_seed(seed)
    rows, *columns = model_tensors()[f"{module}.weight"].shape
    down = torch.randn(RANK, *columns, generator=generator)
    return down, torch.randn(rows, RANK, *([1] * (len(columns) - 1)), generator=generator)


def expected_weight(module, scale):
    """The reference: one output channel at a time."""
    weight, (down, up) = model_tensors()[f"{module}.weight"].clone(), pair(module)
    for row in range(len(weight)):
        for r in range(RANK):
            weight[row] += scale * up[row, r].squeeze() * down[r]
    return weight


def comfyui(module):
    return f"diffusion_model.{module}", "lora_down.weight", "lora_up.weight"


def kohya(module):
    return "lora_unet_" + module.replace(".", "_"), "lora_down.weight", "lora_up.weight"


def kohya_diffusers(module):
    return kohya(OTHER_NAMES[module])


def peft(module):
    return f"base_model.model.{module}", "lora_A.weight", "lora_B.weight"


def peft_named(module):
    return f"base_model.model.model.{module}", "lora_A.default.weight", "lora_B.default.weight"


def fsdp_peft(module):
    return f"model._fsdp_wrapped_module.{module}", "lora_A.weight", "lora_B.weight"


def diffusers(module):
    return f"transformer.{OTHER_NAMES[module]}", "lora_A.weight", "lora_B.weight"


def diffusers_with_wan_names(module):
    return f"transformer.{module}", "lora_A.weight", "lora_B.weight"


def old_diffusers(module):
    return f"transformer.{OTHER_NAMES[module]}", "lora.down.weight", "lora.up.weight"


def bare(module):
    return module, "lora_A.weight", "lora_B.weight"


def diffsynth(module):
    return f"pipe.dit.{module}", "lora_A.default.weight", "lora_B.default.weight"


STYLES = [
    diffsynth,
    comfyui,
    kohya,
    kohya_diffusers,
    peft,
    peft_named,
    fsdp_peft,
    diffusers,
    diffusers_with_wan_names,
    old_diffusers,
    bare,
]


def adapter(style, modules=(Q, FFN, PATCH)):
    tensors = {}
    for module in modules:
        name, down, up = style(module)
        tensors[f"{name}.{down}"], tensors[f"{name}.{up}"] = pair(module)
    return tensors


@pytest.mark.parametrize("style", STYLES)
def test_every_key_style_merges_into_the_same_weights(style):
    merged, matched, unmatched = merge_lora(model_tensors(), adapter(style), STRENGTH)
    assert (len(matched), unmatched) == (6, [])
    for module in (Q, FFN, PATCH):
        torch.testing.assert_close(merged[f"{module}.weight"], expected_weight(module, STRENGTH))


def test_alpha_over_rank_scales_the_adapter():
    tensors = adapter(comfyui, [Q]) | {f"diffusion_model.{Q}.alpha": torch.tensor(ALPHA)}
    merged, matched, _ = merge_lora(model_tensors(), tensors, STRENGTH)
    assert len(matched) == 3
    scale = STRENGTH * ALPHA / RANK
    torch.testing.assert_close(merged[f"{Q}.weight"], expected_weight(Q, scale))


def test_differences_are_added_to_weights_biases_and_bare_parameters():
    tensors = model_tensors()
    differences = {
        f"diffusion_model.{Q}.diff": torch.full((12, 12), 2.0),
        f"diffusion_model.{Q}.diff_b": torch.full((12,), 3.0),
        "diffusion_model.blocks.0.modulation.diff": torch.full((1, 6, 12), 4.0),
        "diffusion_model.blocks.0.norm3.diff": torch.full((12,), 5.0),
    }
    merged, _, unmatched = merge_lora(tensors, differences, 0.5)
    assert unmatched == []
    changes = {f"{Q}.weight": 1, f"{Q}.bias": 1.5, "blocks.0.modulation": 2}
    for key, change in (changes | {"blocks.0.norm3.weight": 2.5}).items():
        torch.testing.assert_close(merged[key], tensors[key] + change)


def test_only_what_the_adapter_touches_changes_and_the_input_does_not():
    tensors = {key: t.to(torch.bfloat16) for key, t in model_tensors().items()}
    before = {key: t.clone() for key, t in tensors.items()}
    merged, _, _ = merge_lora(tensors, adapter(comfyui, [Q]), STRENGTH)
    assert merged[f"{Q}.weight"].dtype == torch.float32
    for key in tensors:
        assert torch.equal(tensors[key], before[key])
        assert (merged[key] is tensors[key]) == (key != f"{Q}.weight")


def test_keys_that_match_nothing_are_reported_beside_those_that_do():
    tensors = adapter(comfyui, [Q]) | {"text_encoder.x.lora_A.weight": torch.ones(1)}
    _, matched, unmatched = merge_lora(model_tensors(), tensors, STRENGTH)
    assert len(matched) == 2
    assert unmatched == ["text_encoder.x.lora_A.weight"]


def test_unmatched_keys_are_logged_when_some_match(tmp_path, caplog):
    extra = {"text_encoder.x.lora_A.weight": torch.ones(1)}
    save_file(adapter(comfyui, [Q]) | extra, tmp_path / "x.safetensors")
    with caplog.at_level(logging.WARNING):
        apply_loras(model_tensors(), [Lora(path=tmp_path / "x.safetensors")])
    assert "1 of its 3 tensors match nothing" in caplog.text
    assert "text_encoder.x.lora_A.weight" in caplog.text


def test_an_adapter_of_which_nothing_matches_is_refused_with_its_keys(tmp_path):
    save_file({"unet.down.0.lora_A.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as caught:
        apply_loras(model_tensors(), [Lora(path=tmp_path / "x.safetensors")])
    assert str(tmp_path) in str(caught.value)
    assert "none of its 1 tensors match this model (unet.down.0.lora_A.weight)" in str(caught.value)


def test_another_models_shapes_are_refused_with_key_and_shapes():
    name, down, up = comfyui(Q)
    tensors = {f"{name}.{down}": torch.ones(4, 50), f"{name}.{up}": torch.ones(50, 4)}
    with pytest.raises(CheckpointError) as caught:
        merge_lora(model_tensors(), tensors, 1.0)
    assert f"{Q}.weight" in str(caught.value)
    assert "(down [4, 50], up [50, 4]) than the model's [12, 12]" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"diff \[3\]\) than the model's \[12\]"):
        merge_lora(model_tensors(), {f"{Q}.diff_b": torch.ones(3)}, 1.0)


@pytest.mark.parametrize(
    "key",
    [
        "diffusion_model.blocks.0.self_attn.q.dora_scale",
        "base_model.model.blocks.0.self_attn.q.lora_magnitude_vector.default.weight",
        "lora_unet_blocks_0_self_attn_q.hada_w1_a",
        "lora_unet_blocks_0_self_attn_q.lokr_w1",
        "lora_unet_blocks_0_self_attn_q.lora_mid.weight",
        "blocks.0.self_attn.q.lora_B.bias",
    ],
)
def test_adapters_of_another_kind_are_refused_rather_than_merged_in_part(key):
    with pytest.raises(CheckpointError, match="not a plain LoRA"):
        merge_lora(model_tensors(), adapter(comfyui) | {key: torch.ones(1)}, 1.0)


def test_half_an_adapter_and_two_for_one_weight_are_refused():
    tensors = adapter(comfyui, [Q])
    with pytest.raises(CheckpointError, match="half an adapter"):
        merge_lora(model_tensors(), dict(list(tensors.items())[:1]), 1.0)
    with pytest.raises(CheckpointError, match="two adapters"):
        merge_lora(model_tensors(), tensors | adapter(kohya, [Q]), 1.0)


@pytest.mark.parametrize("as_folder", [True, False])
def test_pefts_alpha_comes_from_the_config_beside_the_adapter(tmp_path, as_folder):
    save_file(adapter(peft, [Q, FFN]), tmp_path / "adapter_model.safetensors")
    settings = {"r": RANK, "lora_alpha": ALPHA, "alpha_pattern": {"ffn.2": 3.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    path = tmp_path if as_folder else tmp_path / "adapter_model.safetensors"
    merged = apply_loras(model_tensors(), [Lora(path=path)])
    torch.testing.assert_close(merged[f"{Q}.weight"], expected_weight(Q, ALPHA / RANK))
    torch.testing.assert_close(merged[f"{FFN}.weight"], expected_weight(FFN, 3.0 / RANK))


def test_rank_stabilised_adapters_divide_by_the_root_of_the_rank(tmp_path):
    save_file(adapter(peft, [Q]), tmp_path / "adapter_model.safetensors")
    settings = {"lora_alpha": ALPHA, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    merged = apply_loras(model_tensors(), [Lora(path=tmp_path)])
    torch.testing.assert_close(merged[f"{Q}.weight"], expected_weight(Q, ALPHA / RANK**0.5))


def test_diffusers_alpha_comes_from_the_metadata(tmp_path):
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": ALPHA})}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(adapter(diffusers, [Q]), path, metadata=metadata)
    merged = apply_loras(model_tensors(), [Lora(path=path, strength=STRENGTH)])
    torch.testing.assert_close(merged[f"{Q}.weight"], expected_weight(Q, STRENGTH * ALPHA / RANK))


def test_a_trainers_bundle_gives_the_generators_adapter(tmp_path):
    other = {key: torch.ones(t.shape) for key, t in adapter(peft).items()}
    torch.save({"generator_lora": adapter(peft), "critic_lora": other}, tmp_path / "lora.pt")
    merged = apply_loras(model_tensors(), [Lora(path=tmp_path / "lora.pt")])
    torch.testing.assert_close(merged[f"{Q}.weight"], expected_weight(Q, 1.0))


def test_several_adapters_add_up(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(adapter(kohya, [Q]), path)
    loras = [Lora(path=path, strength=0.5), Lora(path=path, strength=-0.2)]
    merged = apply_loras(model_tensors(), loras)
    torch.testing.assert_close(merged[f"{Q}.weight"], expected_weight(Q, 0.3))


def test_a_model_is_not_taken_for_a_lora(tmp_path):
    save_file({"decoder.upsamples.0.weight": torch.ones(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="is not a LoRA but a VAE"):
        read_lora(tmp_path / "vae.safetensors")
    save_file(model_tensors(), tmp_path / "wan.safetensors")
    with pytest.raises(CheckpointError, match="is not a LoRA"):
        read_lora(tmp_path / "wan.safetensors")


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("dir/a.safetensors:-1", "dir/a.safetensors", -1.0),
        ("folder:0.5", "folder", 0.5),
        (r"C:\loras\x.safetensors", r"C:\loras\x.safetensors", 1.0),
        (r"C:\loras\x.safetensors:0.8", r"C:\loras\x.safetensors", 0.8),
        ("C:/x.safetensors:1e-1", "C:/x.safetensors", 0.1),
        ("odd:name.pt", "odd:name.pt", 1.0),
        ("C:1", "C:1", 1.0),
    ],
)
def test_lora_arguments_survive_drive_letters(text, path, strength):
    assert parse_lora_argument(text) == Lora(path=Path(path), strength=strength)


@pytest.mark.parametrize("text", ["", "a.safetensors:", "a.safetensors:strong", "a.pt:nan"])
def test_lora_arguments_without_a_usable_strength_are_refused(text):
    with pytest.raises(ValueError, match="write it as"):
        parse_lora_argument(text)
