"""What `inspect` says of an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_lora import Q, comfyui, diffusers, kohya, kohya_diffusers, peft

from rf_core.__main__ import main
from rf_core.config import WAN_1_3B, WAN_14B
from rf_core.options import DEMO
from rf_core.weights.checkpoint import read_checkpoint

DEMO_DIM = read_checkpoint(DEMO / "student.safetensors").config.dim


def tensors_of(style, width: int, rank: int = 4, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """An adapter of one layer by the names of a style; `more` are parts beside its pair."""
    name, down, up = style(Q)
    pair = {f"{name}.{down}": torch.ones(rank, width), f"{name}.{up}": torch.ones(width, rank)}
    return pair | {f"{name}.{part}": tensor for part, tensor in more.items()}


def rows(path: Path, capsys) -> dict[str, str]:
    """What `inspect` prints, by label."""
    assert main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {label: value.strip() for label, _, value in (line.partition("  ") for line in lines)}


@pytest.mark.parametrize("style", [comfyui, kohya, kohya_diffusers, diffusers, peft])
@pytest.mark.parametrize(
    "width, base",
    [
        (WAN_1_3B.dim, "Wan 2.1 T2V 1.3B"),
        (WAN_14B.dim, "Wan 2.1 T2V 14B"),
        (DEMO_DIM, "the bundled demo"),
    ],
)
def test_an_adapter_is_said_to_be_one_with_its_rank_and_the_sizes_it_fits(
    style, width, base, tmp_path, capsys
):
    path = tmp_path / "style.safetensors"
    save_file(tensors_of(style, width, alpha=torch.tensor(2.0)), path, {"author": "somebody"})
    found = rows(path, capsys)
    assert found["layout"] == "safetensors, an adapter (LoRA)"
    assert (found["rank"], found["alpha"], found["layers"]) == ("4", "2", "1")
    assert found["fits"] == f"{base} (1 of 1 layers)"
    assert found["author"] == "somebody"


def test_a_folder_of_pefts_tells_its_alpha(tmp_path, capsys):
    save_file(tensors_of(peft, DEMO_DIM, rank=8), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 16}')
    found = rows(tmp_path, capsys)
    assert (found["rank"], found["alpha"]) == ("8", "16")
    assert found["fits"].startswith("the bundled demo")


def test_the_fields_of_a_note_are_rows_that_end_in_their_line(tmp_path, capsys):
    note = {"command": "python -m training re_dmd", "updates": 7, "config": {"x": "y" * 500}}
    metadata = {"rf_provenance": json.dumps(note), "two\nlines": "a\nb"}
    save_file(tensors_of(comfyui, DEMO_DIM), tmp_path / "lora.safetensors", metadata)
    found = rows(tmp_path / "lora.safetensors", capsys)
    assert found["rf_provenance.command"] == "python -m training re_dmd"
    assert found["rf_provenance.updates"] == "7"
    assert len(found["rf_provenance.config"]) < 200
    assert found[r"'two\nlines'"] == r"'a\nb'"


@pytest.mark.parametrize(
    "tensors, kind, said",
    [
        (tensors_of(comfyui, 3072), "LoRA", "it was made for Wan 2.2 5B"),
        (tensors_of(comfyui, 96), "LoRA", "it was made for another size of Wan"),
        ({"lora_unet_mid_block_a.lora_down.weight": torch.ones(4, 8)}, "LoRA", "made for SD or XL"),
        ({f"diffusion_model.{Q}.oft_blocks": torch.ones(2, 3, 3)}, "OFT", "not a plain LoRA but"),
        (tensors_of(comfyui, DEMO_DIM, dora_scale=torch.ones(7)), "DoRA, LoRA", "another"),
    ],
)
def test_an_adapter_of_no_size_known_here_is_still_described(tensors, kind, said, tmp_path, capsys):
    save_file(tensors, tmp_path / "lora.safetensors")
    found = rows(tmp_path / "lora.safetensors", capsys)
    assert found["layout"] == f"safetensors, an adapter ({kind})"
    assert found["fits"].startswith("none of Wan 2.1 T2V 1.3B, Wan 2.1 T2V 14B, the bundled demo: ")
    assert said in found["fits"]


def test_what_is_no_adapter_that_can_be_read_ends_in_one_sentence(tmp_path, capsys):
    path = tmp_path / "lora.safetensors"
    save_file(tensors_of(comfyui, DEMO_DIM), path)
    whole = path.read_bytes()
    broken = json.dumps({"alpha_pattern": {"(a+)+$": 1}, "lora_alpha": 4})
    for write in (
        lambda: path.write_bytes(whole[: len(whole) // 2]),
        lambda: path.write_bytes(b"no tensors"),
        lambda: save_file(tensors_of(peft, 8), path, {"lora_adapter_metadata": broken}),
        lambda: save_file(tensors_of(peft, 8), path, {"lora_adapter_metadata": "[]"}),
    ):
        write()
        assert main(["inspect", str(path)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {path}: ") and error.count("\n") == 1
    path.write_bytes(whole)
    assert main(["inspect", str(path), "--submodel", "generator"]) == 1
    assert "--submodel is for checkpoints, and this is an adapter" in capsys.readouterr().err
