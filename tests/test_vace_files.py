"""Files of a VACE: published layouts, what does not fit, and our own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from test_vace import CHANNELS, DEEP, vace

from rf_core.__main__ import main
from rf_core.config import WAN_1_3B, WAN_14B, VaceConfig
from rf_core.vace import Vace
from rf_core.weights.checkpoint import read_checkpoint
from rf_core.weights.files import CheckpointError
from rf_core.weights.layouts import to_diffusers
from rf_core.weights.vace import (
    VaceFile,
    context_channels,
    describe_vace,
    fit_vace,
    load_vace,
    read_vace,
    save_vace,
)

CPU = {"device": "cpu", "dtype": torch.float32}


def whole(base=DEEP, layers=(0, 2)):
    """A published file's tensors: the VACE's beside its base's."""
    network = vace(base, layers)
    return network, {**tiny.model(base, seed=1).state_dict(), **network.state_dict()}


def same(one, other):
    assert one.config == other.config
    theirs = other.state_dict()
    assert one.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in one.state_dict().items())


def error_of(path, base=DEEP):
    with pytest.raises(CheckpointError) as caught:
        load_vace(path, base, **CPU)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "model."])
def test_an_official_file_gives_its_vace_and_not_its_base(tmp_path, prefix):
    network, tensors = whole()
    path = tmp_path / "vace.safetensors"
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, path)
    found = read_vace(path)
    assert (found.prefix, found.has_base, found.layers) == (prefix, True, None)
    same(load_vace(path, DEEP, **CPU), network)


def test_a_vace_alone_in_a_torch_file_reads(tmp_path):
    network, _ = whole()
    path = tmp_path / "vace.pth"
    torch.save({"model": network.state_dict()}, path)
    same(load_vace(path, DEEP, **CPU), network)


@pytest.mark.parametrize("layers", [(0, 2), (0, 1, 4)])
def test_a_diffusers_folder_in_shards_says_its_layers(tmp_path, layers):
    network, tensors = whole(layers=layers)
    renamed = {to_diffusers(key): tensor.contiguous() for key, tensor in tensors.items()}
    assert "vace_blocks.0.proj_in.weight" in renamed and "proj_out.weight" in renamed
    names, weight_map = sorted(renamed), {}
    for number in range(2):
        file = f"diffusion_pytorch_model-{number + 1:05}-of-00002.safetensors"
        save_file({name: renamed[name] for name in names[number::2]}, tmp_path / file)
        weight_map |= dict.fromkeys(names[number::2], file)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps({"vace_layers": layers}))
    same(load_vace(tmp_path, DEEP, **CPU), network)


def test_our_own_file_keeps_layers_that_are_not_spread_evenly(tmp_path):
    network = vace(DEEP, (0, 1, 4))
    save_vace(tmp_path / "control.safetensors", network, provenance={"minutes": 9})
    same(load_vace(tmp_path / "control.safetensors", DEEP, **CPU), network)


def test_weights_come_in_the_dtype_that_is_asked_for_and_frozen(tmp_path):
    save_vace(tmp_path / "control.safetensors", vace(DEEP))
    found = load_vace(tmp_path / "control.safetensors", DEEP, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    assert not found.training and not any(p.requires_grad for p in found.parameters())


def of_shapes(base, layers):
    """A file of those sizes, its tensors by shape alone."""
    tensors = Vace(base, VaceConfig(layers=layers), device="meta").state_dict()
    return VaceFile(
        path=Path("x"), tensors=tensors, dim=base.dim, ffn_dim=base.ffn_dim, blocks=len(layers),
        in_channels=96, layers=None, base={}, has_base=True, container="safetensors",
        names="Wan", prefix="", provenance={},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("base", "other", "layers"),
    [(WAN_1_3B, WAN_14B, tuple(range(0, 30, 2))), (WAN_14B, WAN_1_3B, tuple(range(0, 40, 5)))],
    ids=["1.3B", "14B"],
)
def test_the_published_sizes_are_known_by_their_widths(base, other, layers):
    file = of_shapes(base, layers)
    assert fit_vace(file, base) == VaceConfig(layers=layers)
    assert "at even distances" in describe_vace(file)
    with pytest.raises(CheckpointError, match="give the VACE of the student's size") as caught:
        fit_vace(file, other)
    assert file.size in str(caught.value) and "Wan 2.1 T2V" in str(caught.value)


def test_what_is_no_vace_of_the_student_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "vace.safetensors"

    def refused(tensors, base=DEEP, metadata=None):
        save_file({key: t.clone() for key, t in tensors.items()}, path, metadata=metadata)
        return error_of(path, base)

    own = vace(DEEP, (0, 2)).state_dict()
    assert "holds no VACE" in refused(tiny.model().state_dict())
    wide = replace(DEEP, dim=96)
    assert "width 48" in refused(own, wide) and "dim 48, not 96" in error_of(path, wide)
    patch = own["vace_patch_embedding.weight"]
    narrow = {**own, "vace_patch_embedding.weight": patch[:, :16].contiguous()}
    assert "reads controls of 16 channels" in refused(narrow)
    short = {key: t for key, t in own.items() if key != "vace_blocks.1.after_proj.bias"}
    assert "vace_blocks.1.after_proj.bias" in refused(short)
    assert "vace_blocks.0.extra.weight" in refused({**own, "vace_blocks.0.extra.weight": patch})
    odd = {**own, "vace_blocks.1.after_proj.bias": patch}
    assert "1 of its shapes" in refused(odd)
    packed = {**own, "vace_blocks.1.after_proj.weight": torch.ones(48, 48, dtype=torch.int8)}
    assert "quantised" in refused(packed)
    nan = {**own, "vace_blocks.1.after_proj.bias": torch.full((48,), float("nan"))}
    assert "NaN" in refused(nan)
    assert "go behind those alone" in refused(own, replace(DEEP, num_layers=1))
    both = {**own, **{f"ema.{key}": t.clone() for key, t in own.items()}}
    assert "several prefixes" in refused(both)
    lora = {
        f"diffusion_model.{key[:-7]}.lora_A.weight": own[key] for key in own if "ffn.0.w" in key
    }
    assert "a LoRA of a VACE" in refused(lora)
    for vace_part in ({"layers": "all"}, {"layers": [0, 0]}, {"layers": [0, 9]}):
        settings = json.dumps({"format": 1, "vace": vace_part})
        assert "layers" in refused(own, metadata={"reward_forcing": settings})
    settings = json.dumps({"format": 1, "model": {"num_heads": 4}})
    assert "num_heads 4, not 2" in refused(own, metadata={"reward_forcing": settings})


def test_a_vace_is_no_student_and_inspect_says_what_it_is(tmp_path, capsys):
    network, tensors = whole()
    path = tmp_path / "control.safetensors"
    save_vace(path, network, provenance={"minutes": 9})
    with pytest.raises(CheckpointError, match="a VACE, which controls a student"):
        read_checkpoint(path)
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "control beside a student" in printed and "layers      0, 2" in printed
    assert "minutes     9" in printed
    official = tmp_path / "official.safetensors"
    save_file(tensors, official)
    assert main(["inspect", str(official)]) == 0
    assert "with its base, which is not used" in capsys.readouterr().out
    assert main(["inspect", str(path), "--family", "longlive"]) != 0


def test_the_control_of_the_published_sizes_has_96_channels():
    assert context_channels(WAN_1_3B) == VaceConfig().in_channels == 96
    assert context_channels(tiny.CONFIG) == CHANNELS
    assert VaceConfig.spread(15, 30).layers == VaceConfig().layers
