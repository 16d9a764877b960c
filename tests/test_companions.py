"""The VAE and the text encoder that a student's file names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from rf_core.__main__ import main
from rf_core.companions import TEXT_ENCODER, VAE, companion_of, companions_of
from rf_core.config import CacheConfig
from rf_core.options import DEMO, Files, files_of_model
from rf_core.weights.checkpoint import CheckpointError, convert, read_checkpoint, write_checkpoint
from rf_core.weights.files import read_weights

DEMO_VAE, DEMO_TEXT = DEMO / "vae.safetensors", DEMO / "text_encoder.safetensors"


def student(path: Path, companions: dict[str, object] | None) -> Path:
    weights = tiny.model().state_dict()
    write_checkpoint(
        path, weights, tiny.CONFIG, CacheConfig(), tiny.TWO_STEPS, companions=companions
    )
    return path


def as_published(path: Path) -> Path:
    """A VAE without latents of its own, and so with Wan's."""
    save_file(read_weights(DEMO_VAE).tensors, path)
    return path


def test_a_student_of_the_miniature_finds_the_demos_files(tmp_path):
    path = student(tmp_path / "a.safetensors", companions_of(DEMO_VAE, DEMO_TEXT))
    assert files_of_model(path, None, None) == (Files().vae, Files().text_encoder)
    other = tmp_path / "other.pth"
    assert files_of_model(path, other, None) == (other, Files().text_encoder)


def test_files_are_known_by_what_is_in_them(tmp_path):
    vae = read_weights(DEMO_VAE)
    save_file({k: t.half() for k, t in vae.tensors.items()}, tmp_path / "x", vae.metadata)
    text = read_weights(DEMO_TEXT)
    save_file({k: t.bfloat16() for k, t in text.tensors.items()}, tmp_path / "y", text.metadata)
    for kind, own, copy in ((VAE, DEMO_VAE, "x"), (TEXT_ENCODER, DEMO_TEXT, "y")):
        assert (
            companion_of(kind, own).fingerprint == companion_of(kind, tmp_path / copy).fingerprint
        )
    published = companion_of(VAE, as_published(tmp_path / "z.safetensors"))
    assert published.fingerprint != companion_of(VAE, DEMO_VAE).fingerprint
    assert companion_of(TEXT_ENCODER, "google/umt5-xxl").name == "umt5-xxl"


@pytest.mark.parametrize("recorded", [False, True])
def test_a_student_of_other_files_needs_them_named(recorded, tmp_path, capsys):
    wan = as_published(tmp_path / "Wan2.1_VAE.safetensors")
    companions = companions_of(wan, "google/umt5-xxl") if recorded else None
    path = student(tmp_path / "a.safetensors", companions)
    command = ["generate", "--model", str(path), "--prompt", "x", "--chunks", "1"]
    assert main([*command, "--output", str(tmp_path / "x.mp4")]) == 1
    said = capsys.readouterr().err
    assert "needs its --vae and --text-encoder" in said
    assert ("Wan2.1_VAE.safetensors and umt5-xxl" in said) == recorded


def test_a_vae_of_other_latents_is_refused_before_weights_are_read(tmp_path, capsys):
    path = student(tmp_path / "a.safetensors", companions_of(DEMO_VAE, DEMO_TEXT))
    wan = as_published(tmp_path / "Wan2.1_VAE.safetensors")
    command = ["generate", "--model", str(path), "--prompt", "x", "--chunks", "1"]
    more = ["--vae", str(wan), "--output", str(tmp_path / "x.mp4")]
    assert main([*command, *more]) == 1
    said = capsys.readouterr().err
    assert "trained for the latents of vae.safetensors" in said and str(wan) in said
    assert said.count("\n") == 1


def test_conversion_and_the_table_keep_them(tmp_path, capsys):
    path = student(tmp_path / "a.safetensors", companions_of(DEMO_VAE, DEMO_TEXT))
    after = convert(path, tmp_path / "b.safetensors", dtype=torch.float16)
    assert after.companions == read_checkpoint(path).companions != {}
    assert main(["inspect", str(path)]) == 0
    assert "text encoder  text_encoder.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize("written", [[1], {"vae": "x"}, {"vae": {"name": 1, "fingerprint": None}}])
def test_unusable_companions_are_refused(written, tmp_path):
    path = student(tmp_path / "a.safetensors", None)
    file = read_weights(path)
    settings = json.loads(file.metadata["reward_forcing"]) | {"companions": written}
    metadata = file.metadata | {"reward_forcing": json.dumps(settings)}
    save_file(dict(file.tensors), tmp_path / "b.safetensors", metadata)
    with pytest.raises(CheckpointError, match="companions"):
        read_checkpoint(tmp_path / "b.safetensors")
