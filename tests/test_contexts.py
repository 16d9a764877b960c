"""Control videos beside a folder of videos: encoded once, and learnt from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange

from rf_core.control import context_of
from rf_core.decoders.decoder import load_decoder
from rf_core.options import DEMO
from rf_core.video import VideoFormat, VideoWriter, images_at_rate
from rf_core.weights.vace import read_vace
from training.__main__ import main
from training.choices import open_clips
from training.control_videos import VariantsConfig, variants
from training.data.controls import read_controls
from training.data.latents import clip_images
from training.data.prompts import DataConfig
from training.world.clips import scene_of
from training.world.outlines import draw_outlines
from training.world.scenes import SIZE, render

CPU = torch.device("cpu")
FRAMES = 3
IMAGES = clip_images(FRAMES)
TEXT = f"data.text_encoder={DEMO / 'text_encoder.safetensors'}"


def write(path: Path, images: torch.Tensor) -> None:
    """A video of images [T, H, W, 3] in [0, 1]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, VideoFormat(width=SIZE, height=SIZE, fps=16), {}) as writer:
        writer.write((255 * images).round().to(torch.uint8))


def words(command: str, out: Path, *settings: str) -> list[str]:
    return [command, "--out", str(out), *(w for each in settings for w in ("--set", each))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two videos with captions, of two clips and of one, their outlines and their latents."""
    folder = tmp_path_factory.mktemp("videos")
    for number, clips in ((0, 2), (1, 1)):
        scene, images = scene_of(9, number), clips * IMAGES
        write(
            folder / f"videos/{number}.mp4",
            rearrange(render([scene], images)[0], "t c h w -> t h w c"),
        )
        write(folder / f"edges/{number}.mkv", draw_outlines([scene], images)[0])
        (folder / f"videos/{number}.txt").write_text("a red shape moves")
    latents = words("latents", folder / "latents", f"videos={folder / 'videos'}", "frames=3")
    assert main(latents) == 0
    assert main(contexts(folder)) == 0
    return folder


def contexts(folder: Path, *settings: str) -> list[str]:
    given = (f"source={folder / 'latents'}", f"controls={folder / 'edges'}", *settings)
    return words("contexts", folder / "contexts", *given)


def test_each_clip_has_its_control_and_a_variant_as_a_stream_would_encode_them(folder):
    clips = open_clips(folder / "latents", DataConfig(text_encoder=TEXT.split("=")[1]), CPU)
    found = read_controls(folder / "contexts", clips)
    assert {row: len(places) for row, places in found.places.items()} == {0: 2, 1: 2, 2: 2}
    edges = torch.stack(
        list(images_at_rate(folder / "edges/0.mkv", width=SIZE, height=SIZE, fps=16))
    )
    decoder = load_decoder(DEMO / "vae.safetensors", CPU, torch.float32, 3)
    expected = context_of(edges[IMAGES:], decoder)[0]  # of the video's second clip
    drawn = found.of([1] * 6, [torch.Generator().manual_seed(seed) for seed in range(6)])
    nearest = min(float((each - expected).abs().max()) for each in drawn)
    assert nearest < 0.01  # float16


def test_a_vace_is_trained_of_them(folder, tmp_path):
    small = ("updates=1", "batch=2", "micro_batch=2", "tensorboard=false", "validate_every=0")
    given = (f"source={folder / 'latents'}", f"controls={folder / 'contexts'}", TEXT, *small)
    assert main(words("control", tmp_path / "run", *given, "frames=3")) == 0
    assert read_vace(tmp_path / "run/control.safetensors").in_channels == 96


def test_what_is_there_is_not_made_again_and_another_config_is_refused(folder, capsys):
    before = {p: p.stat().st_mtime_ns for p in (folder / "contexts").glob("*.safetensors")}
    assert len(before) == 2 and main(contexts(folder)) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert main(contexts(folder, "variants.seed=1")) == 1
    assert "was begun with another config" in capsys.readouterr().err


def test_a_video_without_a_control_or_with_a_short_one_is_named(folder, tmp_path, capsys):
    def said(*settings: str) -> str:
        given = (f"source={folder / 'latents'}", *settings)
        assert main(words("contexts", tmp_path / "out", *given)) == 1
        return capsys.readouterr().err

    few = tmp_path / "few"
    write(few / "0.mp4", torch.zeros(IMAGES, SIZE, SIZE, 3))
    assert "has no control of 1.mp4; give each of its name" in said(f"controls={few}")
    write(few / "1.mp4", torch.zeros(IMAGES, SIZE, SIZE, 3))
    assert "0.mp4 is shorter than" in said(f"controls={few}")
    assert "controls is nowhere, which is not a folder" in said("controls=nowhere")
    assert main(words("contexts", tmp_path / "out", f"source={tmp_path}")) == 1
    assert "holds no latents; encode the videos" in capsys.readouterr().err


def test_variants_keep_the_true_clip_around_their_rectangle():
    config = VariantsConfig(masked=1, erased=0)
    true, control = torch.rand(2, 3, 24, 40), torch.rand(2, 3, 24, 40)
    whole, other = variants(true, control, config, np.random.default_rng(0))
    assert torch.equal(whole.images, control) and whole.mask.min() == 1
    kept = (other.mask == 0).expand(-1, 3, -1, -1)
    assert torch.equal(other.images[kept], true[kept]) and kept.any()
    assert torch.equal(other.images[~kept], control[~kept]) and (~kept).any()
