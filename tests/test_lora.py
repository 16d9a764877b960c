import json
import logging
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

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


def dit(module):
    return f"dit.{module}", "lora_A.my-style v2.weight", "lora_B.my-style v2.weight"


def wan_fun(module):
    return "lora_unet__" + module.replace(".", "_"), "lora_down.weight", "lora_up.weight"


def lycoris(module):
    return "lycoris_" + module.replace(".", "_"), "lora_down.weight", "lora_up.weight"


def onetrainer(module):
    name = "lora_transformer_" + OTHER_NAMES[module].replace(".", "_")
    return name, "lora_down.weight", "lora_up.weight"


def kohya_whole(module):
    name = "lora_unet_diffusion_model_" + module.replace(".", "_")
    return name, "lora_down.weight", "lora_up.weight"


def without_weight(module):
    return f"transformer.{OTHER_NAMES[module]}", "lora_A", "lora_B"


def linear_layer(module):
    name = f"transformer.{OTHER_NAMES[module]}"
    return name, "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"


def model_diffusion_model(module):
    return f"model.diffusion_model.{module}", "lora_down.weight", "lora_up.weight"


STYLES = [
    diffsynth,
    dit,
    wan_fun,
    lycoris,
    onetrainer,
    kohya_whole,
    without_weight,
    linear_layer,
    model_diffusion_model,
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
        "diffusion_model.blocks.0.norm3.w_norm": torch.full((12,), 5.0),
    }
    merged, _, unmatched = merge_lora(tensors, differences, 0.5)
    assert unmatched == []
    changes = {f"{Q}.weight": 1, f"{Q}.bias": 1.5, "blocks.0.modulation": 2}
    for key, change in (changes | {"blocks.0.norm3.weight": 2.5}).items():
        torch.testing.assert_close(merged[key], tensors[key] + change)


@pytest.mark.parametrize("name", ["diff_m", "modulation.diff", "modulation.diff_m"])
def test_a_difference_of_a_blocks_modulation_goes_by_every_name_of_it(name):
    change = {f"diffusion_model.blocks.0.{name}": torch.ones(1, 6, 12)}
    merged, matched, unmatched = merge_lora(model_tensors(), change, 0.5)
    assert (len(matched), unmatched) == (1, [])
    expected = model_tensors()["blocks.0.modulation"] + 0.5
    torch.testing.assert_close(merged["blocks.0.modulation"], expected)


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
    assert "1 of 2 layers; 1 of its 3 tensors match nothing" in caplog.text
    assert "text_encoder.x.lora_A.weight), 1 of them a text encoder's" in caplog.text


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "Flux"),
        ("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight", "LTX"),
        ("lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight", "LTX"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "SD or XL"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "a text encoder"),
    ],
)
def test_an_adapter_without_a_fitting_layer_is_said_to_be_for_its_model(key, kind):
    tensors = {
        key: torch.ones(2, 12),
        key.replace("down", "up").replace("_A", "_B"): torch.ones(12, 2),
    }
    with pytest.raises(CheckpointError, match=f"none of its 2 tensors .* it was made for .*{kind}"):
        merge_lora(model_tensors(), tensors, 1.0)


def test_an_adapter_of_the_large_wan_is_named_by_its_width():
    name, down, up = comfyui(Q)
    large = {f"{name}.{down}": torch.ones(4, 5120), f"{name}.{up}": torch.ones(5120, 4)}
    with pytest.raises(CheckpointError, match="it was made for Wan 14B"):
        merge_lora(model_tensors(), large, 1.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora_down.weight": torch.ones(0, 12), "lora_up.weight": torch.ones(12, 0)}, "nothing"),
        ({"lora_down.weight": torch.ones(()), "lora_up.weight": torch.ones(())}, "another shape"),
        ({"lora_down.weight": torch.ones(12), "lora_up.weight": torch.ones(12)}, "another shape"),
        ({"lora_down.weight": torch.ones(4, 12, dtype=torch.int8)}, "whole numbers"),
        ({"lora_down.weight": torch.full((4, 12), torch.nan)}, "NaN"),
        ({"alpha": torch.tensor(torch.inf)}, "alpha"),
        ({"alpha": torch.ones(2)}, "alpha"),
        ({"dora_scale": torch.ones(7)}, "another shape"),
        ({"dora_scale": torch.tensor(1.0)}, "another shape"),
        ({"lora_up.weight": torch.ones(12, 3)}, "another shape"),
        ({"lokr_w1": torch.ones(2, 2)}, "half an adapter"),
        ({"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(5, 6)}, "another shape"),
        ({"hada_t1": torch.ones(2, 2)}, "half an adapter"),
    ],
)
def test_unusable_numbers_and_shapes_end_in_one_sentence(change, said):
    odd = {f"diffusion_model.{Q}.{part}": each for part, each in change.items()}
    with pytest.raises(CheckpointError, match=said) as caught:
        merge_lora(model_tensors(), adapter(comfyui, [Q]) | odd, 1.0)
    assert f"{Q}.weight" in str(caught.value)


PARTS = [
    "lora_down.weight",
    "lora_up.weight",
    "lora_mid.weight",
    "alpha",
    "dora_scale",
    "diff",
    "diff_b",
    "diff_m",
    "lora_B.bias",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "hada_t1",
    "hada_t2",
    "lokr_w1",
    "lokr_w2",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t2",
    "oft_blocks",
    "scalar",
]


@pytest.mark.parametrize("seed", range(20))
def test_no_mixture_of_parts_ends_in_more_than_a_sentence(seed):
    chance = random.Random(seed)
    outcomes = {"merged": 0, "refused": 0}
    for _ in range(50):
        tensors = {}
        module = chance.choice([Q, FFN, PATCH, "blocks.0", "blocks.0.norm3", "blocks.0.modulation"])
        for part in chance.sample(PARTS, chance.randint(1, 3)):
            axes = chance.choice([0, 1, 2, 2, 2, 3, 5])
            shape = [chance.choice([0, 1, 2, 4, 12, 12, 12, 20]) for _ in range(axes)]
            tensors[f"diffusion_model.{module}.{part}"] = torch.ones(shape)
        try:
            merge_lora(model_tensors(), tensors, 0.5)
            outcomes["merged"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
    assert sum(outcomes.values()) == 50 and outcomes["refused"] > 25


@pytest.mark.parametrize(
    "parts",
    [
        {"lora_down.weight": (), "lora_B.bias": (12,)},
        {"diff_b": (12,), "lora_B.bias": (4, 1)},
    ],
)
def test_a_bias_that_does_not_fit_its_pair_is_refused(parts):
    tensors = {f"diffusion_model.{Q}.{part}": torch.ones(shape) for part, shape in parts.items()}
    with pytest.raises(CheckpointError):
        merge_lora(model_tensors(), tensors, 1.0)


def test_a_transposed_adapter_is_not_bent_into_shape():
    tensors = {f"{FFN}.lora_A.weight": torch.ones(2, 12), f"{FFN}.lora_B.weight": torch.ones(20, 2)}
    with pytest.raises(CheckpointError, match="another shape"):
        merge_lora(model_tensors(), tensors, 1.0)


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
    ("tail", "kind"),
    [
        ("oft_blocks", "OFT"),
        ("oft_R.weight", "OFT"),
        ("boft_R", "BOFT"),
        ("a1.weight", "GLoRA"),
        ("ia3_l", "(IA)³"),
        ("lora_E", "AdaLoRA"),
        ("vera_lambda_b", "VeRA"),
        ("scalar", "LyCORIS adapter with a scalar"),
        ("set_weight", "replacement of whole weights"),
    ],
)
def test_adapters_of_another_kind_are_named_and_refused_rather_than_merged_in_part(
    tmp_path, tail, kind
):
    odd = {f"diffusion_model.{Q}.{tail}": torch.ones(1)}
    save_file(odd, tmp_path / "whole.safetensors")
    with pytest.raises(CheckpointError) as caught:
        apply_loras(model_tensors(), [Lora(path=tmp_path / "whole.safetensors")])
    assert "not a plain LoRA" in str(caught.value) and kind in str(caught.value)
    with pytest.raises(CheckpointError, match="in 1 of its 3 layers"):
        merge_lora(model_tensors(), adapter(comfyui) | odd, 1.0)


def test_boft_is_told_from_oft_by_its_four_axes():
    with pytest.raises(CheckpointError, match="BOFT"):
        merge_lora(model_tensors(), {f"{Q}.oft_blocks": torch.ones(2, 3, 4, 4)}, 1.0)


def test_old_diffusers_processors_adapt_the_layers_of_their_attention():
    names = {"to_q": "q", "to_out": "o"}
    weights = {f"blocks.0.self_attn.{ours}.weight": torch.zeros(3, 3) for ours in names.values()}
    tensors = {}
    for theirs in names:
        base = f"transformer.blocks.0.attn1.processor.{theirs}_lora"
        tensors[f"{base}.down.weight"] = torch.ones(1, 3)
        tensors[f"{base}.up.weight"] = torch.ones(3, 1)
    merged, _, unmatched = merge_lora(weights, tensors, 0.5)
    assert unmatched == []
    assert all(torch.equal(each, torch.full((3, 3), 0.5)) for each in merged.values())


def tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loha():
    parts = {
        f"hada_w{i}_{f}": tensor(*((12, 2) if f == "a" else (2, 12)), seed=ord(f) + i)
        for i in (1, 2)
        for f in "ab"
    }
    one, two = (parts[f"hada_w{i}_a"] @ parts[f"hada_w{i}_b"] for i in (1, 2))
    return Q, parts, ALPHA / 2 * one * two


def lokr_whole():
    parts = {"lokr_w1": tensor(3, 2), "lokr_w2": tensor(4, 6, seed=1)}
    expected = torch.zeros(12, 12)
    for i in range(3):
        for j in range(2):
            block = parts["lokr_w1"][i, j] * parts["lokr_w2"]
            expected[4 * i : 4 * i + 4, 6 * j : 6 * j + 6] = block
    return Q, parts, expected  # alpha says nothing without a rank


def lokr_factored():
    whole = {"lokr_w1": tensor(3, 2)}
    parts = whole | {"lokr_w2_a": tensor(4, 2, seed=1), "lokr_w2_b": tensor(2, 6, seed=2)}
    product = parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    return Q, parts, ALPHA / 2 * torch.kron(parts["lokr_w1"], product)


def locon():
    parts = {
        "lora_down.weight": tensor(2, 3, 1, 1, 1),
        "lora_mid.weight": tensor(2, 2, 1, 2, 2, seed=1),
        "lora_up.weight": tensor(12, 2, 1, 1, 1, seed=2),
    }
    x = tensor(1, 3, 1, 4, 4, seed=3)  # three convolutions in a row are the one that is added
    y = nn.functional.conv3d(x, parts["lora_down.weight"])
    y = nn.functional.conv3d(y, parts["lora_mid.weight"])
    return PATCH, parts, (x, nn.functional.conv3d(y, parts["lora_up.weight"]))


def loha_convolved():
    parts = {
        f"hada_w{i}_{f}": tensor(2, 12 if f == "a" else 3, seed=ord(f) + i)
        for i in (1, 2)
        for f in "ab"
    }
    parts |= {f"hada_t{i}": tensor(2, 2, 1, 2, 2, seed=i) for i in (1, 2)}
    expected = torch.ones(12, 3, 1, 2, 2)
    for i in (1, 2):
        a, b, t = (parts[f"hada_{name}"] for name in (f"w{i}_a", f"w{i}_b", f"t{i}"))
        rebuilt = torch.zeros(12, 3, 1, 2, 2)
        for m in range(2):
            for n in range(2):
                rebuilt += a[m].view(-1, 1, 1, 1, 1) * b[n].view(1, -1, 1, 1, 1) * t[m, n]
        expected *= rebuilt
    return PATCH, parts, ALPHA / 2 * expected


@pytest.mark.parametrize("family", [loha, lokr_whole, lokr_factored, loha_convolved])
@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_", "diffusion_model."])
def test_lycoris_families_are_what_their_formula_says(family, prefix):
    module, parts, expected = family()
    name = prefix + (module if prefix.endswith(".") else module.replace(".", "_"))
    tensors = {f"{name}.{part}": each for part, each in parts.items()}
    tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    merged, _, unmatched = merge_lora(model_tensors(), tensors, STRENGTH)
    assert unmatched == []
    weight = model_tensors()[f"{module}.weight"] + STRENGTH * expected
    torch.testing.assert_close(merged[f"{module}.weight"], weight)


def test_a_decomposed_convolution_is_the_three_in_a_row():
    module, parts, (x, expected) = locon()
    tensors = {f"lycoris_{module}.{part}": each for part, each in parts.items()}
    merged, _, _ = merge_lora(model_tensors(), tensors, 1.0)
    added = merged[f"{module}.weight"] - model_tensors()[f"{module}.weight"]
    torch.testing.assert_close(nn.functional.conv3d(x, added), expected)


@pytest.mark.parametrize("length", [(20,), (1, 20), (12, 1), (12,)])
def test_dora_sets_the_length_of_rows_or_columns(length):
    tensors = adapter(comfyui, [FFN])
    sizes = tensor(*length).abs() + 1
    merged, _, _ = merge_lora(
        model_tensors(), tensors | {f"diffusion_model.{FFN}.dora_scale": sizes}, 1.0
    )
    axis = 1 if 12 in length else 0
    torch.testing.assert_close(merged[f"{FFN}.weight"].norm(dim=axis), sizes.flatten())
    plain = expected_weight(FFN, 1.0)
    torch.testing.assert_close(
        nn.functional.normalize(merged[f"{FFN}.weight"], dim=axis),
        nn.functional.normalize(plain, dim=axis),
    )


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


@pytest.mark.parametrize(
    "metadata",
    [
        {"ss_network_alpha": "2", "ss_network_dim": "4"},
        {"lora_alpha": "2.0"},
        {"lora_config": json.dumps({"r": 4, "lora_alpha": 2})},
        {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 2})},
        {"config": json.dumps({"lora_alpha": 1, "use_rslora": True})},
    ],
)
def test_an_alpha_in_the_metadata_alone_acts(tmp_path, metadata):
    save_file(adapter(comfyui, [Q]), tmp_path / "x.safetensors", metadata=metadata)
    merged = apply_loras(model_tensors(), [Lora(path=tmp_path / "x.safetensors")])
    torch.testing.assert_close(merged[f"{Q}.weight"], expected_weight(Q, 2 / RANK))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.float32])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_an_alpha_beside_the_weights_comes_before_the_metadatas(tmp_path, dtype, shape):
    alpha = {f"diffusion_model.{Q}.alpha": torch.full(shape, 2, dtype=dtype)}
    path = tmp_path / "x.safetensors"
    save_file(adapter(comfyui, [Q]) | alpha, path, metadata={"ss_network_alpha": "64"})
    merged = apply_loras(model_tensors(), [Lora(path=path)])
    torch.testing.assert_close(merged[f"{Q}.weight"], expected_weight(Q, 2 / RANK))


@pytest.mark.parametrize("alpha", ["None", "0", ""])
def test_kohyas_alpha_of_nothing_is_the_rank(tmp_path, alpha):
    path = tmp_path / "x.safetensors"
    save_file(adapter(comfyui, [Q]), path, metadata={"ss_network_alpha": alpha})
    merged = apply_loras(model_tensors(), [Lora(path=path)])
    torch.testing.assert_close(merged[f"{Q}.weight"], expected_weight(Q, 1.0))


def test_an_alpha_that_a_converter_has_multiplied_in_does_not_act_again(tmp_path):
    metadata = {"ss_network_alpha": "2", "ss_network_dim": "4", "sshs_model_hash": "0" * 64}
    save_file(adapter(comfyui, [Q]), tmp_path / "x.safetensors", metadata=metadata)
    merged = apply_loras(model_tensors(), [Lora(path=tmp_path / "x.safetensors")])
    torch.testing.assert_close(merged[f"{Q}.weight"], expected_weight(Q, 1.0))


@pytest.mark.parametrize("pattern", ["(", "(a+)+$", "(.*)*b", "[", "ffn.*", "q|k", ""])
def test_an_alpha_pattern_that_is_more_than_a_name_is_refused_at_once(tmp_path, pattern):
    name = "a" * 60
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 1), f"{name}.lora_B.weight": torch.ones(1, 1)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    settings = {"lora_alpha": 2, "alpha_pattern": {pattern: 3.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="by the expression"):
        read_lora(tmp_path)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": "much"},
        {"lora_alpha": [2]},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 2, "alpha_pattern": ["q"]},
        {"lora_alpha": 2, "alpha_pattern": {"q": None, Q: {}}},
        {"lora_alpha": 2, "init_lora_weights": "pissa_niter_16"},
    ],
)
def test_unusable_settings_are_refused_with_the_file(tmp_path, settings):
    save_file(adapter(peft, [FFN, Q]), tmp_path / "adapter_model.safetensors")
    if settings["lora_alpha"] == 2 and "q" in settings.get("alpha_pattern", {}):
        settings["alpha_pattern"] = {Q: {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        read_lora(tmp_path)


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
