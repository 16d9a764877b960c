"""The bundled demo, judged from its pixels by the miniature world's exact tracker."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open

from rf_core.__main__ import main
from rf_core.options import DEMO
from rf_core.weights.checkpoint import read_checkpoint
from training.world.scenes import parse_caption
from training.world.tracker import score

FILES = ("student", "teacher", "vae", "text_encoder", "control")


def images_of(path: Path) -> torch.Tensor:
    """Images [T, 3, H, W] in [0, 1]."""
    with av.open(str(path)) as file:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> torch.Tensor:
    """What `make demo` streams."""
    output = tmp_path_factory.mktemp("demo") / "demo.mp4"
    timeline = str(DEMO / "timeline.txt")
    command = ["generate", "--timeline", timeline, "--seconds", "10", "--output", str(output)]
    assert main([*command, "--device", "cpu"]) == 0
    return images_of(output)


@pytest.mark.slow
def test_make_demo_streams_ten_seconds(video):
    assert video.shape[1:] == (3, 64, 64)
    assert 160 <= len(video) < 172


def test_the_demo_shows_its_first_prompt_and_then_its_second(video):
    first, second = parse_timeline_prompts()
    before, after = score(video[:81], first), score(video[-48:], second)
    for attribute in ("colour", "shape", "direction", "speed"):
        assert before[attribute], (attribute, before)
        assert after[attribute], (attribute, after)


def parse_timeline_prompts() -> list[str]:
    from rf_core.prompts import parse_timeline

    entries = parse_timeline((DEMO / "timeline.txt").read_text(encoding="utf-8")).entries
    assert all(len(parse_caption(entry.text)) == 1 for entry in entries)
    return [entry.text for entry in entries]


def test_the_demo_is_small_and_says_how_it_was_made():
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 16e6
    for name in FILES:
        with safe_open(DEMO / f"{name}.safetensors", "pt") as file:
            metadata = file.metadata()
        settings = json.loads(metadata.get("reward_forcing", "{}"))
        provenance = settings.get("provenance") or json.loads(metadata["provenance"])
        assert provenance["command"].startswith("python -m training")
        assert "seed" in provenance["config"]


def test_the_demo_student_is_marked_causal_and_knows_its_size():
    student = read_checkpoint(DEMO / "student.safetensors")
    assert student.causal and student.size == (64, 64)
    assert (student.cache.window_frames, student.cache.sink_frames) == (9, 3)
    assert student.sampler.steps == (1000, 750, 500, 250)
    assert not read_checkpoint(DEMO / "teacher.safetensors").causal
