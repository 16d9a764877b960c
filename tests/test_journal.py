"""A run's log, read back: TensorBoard's event files, what Weights & Biases is sent, and memory."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.run.journal import Journal, ShownVideo, read_journal
from training.run.memory import costs, peak_bytes
from training.stages.recipes import miniature
from training.stages.validation import image_row, show

CPU = torch.device("cpu")


def brighter(images: int = 13, height: int = 64, width: int = 64) -> torch.Tensor:
    """A video [T, 3, H, W] whose images are of one grey each, from black to white."""
    greys = torch.linspace(0, 1, images)[:, None, None, None]
    return greys.expand(-1, 3, height, width).contiguous()


def logged(folder: Path, **options: object) -> list[ShownVideo]:
    """A journal of one update and its validation; the videos that it was given."""
    found = show(["a red circle"], folder / "validation" / "update_000001", lambda _: brighter())
    settings: dict = {"tensorboard": False, "wandb": None, **options}
    with Journal(folder, first_update=0, config=miniature(), **settings) as journal:
        journal.write(0, {"loss": 1.5} | costs(0.0, CPU))
        journal.write(0, found.numbers)
        journal.write_videos(0, found.videos)
    return list(found.videos)


def test_a_row_shows_a_video_from_its_first_image_to_its_last():
    row = image_row(brighter())
    assert row.shape == (3, 64, 6 * 64) and row.dtype == torch.uint8
    greys = row[0, 0, ::64].tolist()
    assert greys[0] == 0 and greys[-1] == 255 and greys == sorted(greys)
    assert image_row(brighter(images=2)).shape == (3, 64, 2 * 64)
    assert image_row(brighter(height=480, width=832)).shape == (3, 240, 6 * 416)


def test_tensorboard_has_the_numbers_the_memory_and_the_videos(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (video,) = logged(tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("loss")[0].value == 1.5
    assert events.Scalars("memory/peak_gb")[0].value > 0.05
    assert "validation/motion" in events.Tags()["scalars"]
    (image,) = events.Images("validation/00")
    picture = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert image.step == 0 and np.array_equal(picture.transpose(2, 0, 1), video.row.numpy())


def test_weights_and_biases_is_sent_the_numbers_and_the_files(tmp_path, monkeypatch):
    sent: list[tuple[dict, int]] = []
    run = types.SimpleNamespace(log=lambda what, step: sent.append((what, step)), finish=list)
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **_: run
    wandb.Video = lambda path, caption, format: (Path(path), caption, format)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (video,) = logged(tmp_path, wandb="mine")
    everything = {name: value for what, _ in sent for name, value in what.items()}
    assert everything["validation/00"] == (video.path, "a red circle", "mp4")
    assert everything["memory/peak_gb"] > 0.05 and {step for _, step in sent} == {0}


def test_the_log_has_the_memory_that_the_process_has_held_at_most(tmp_path):
    before = peak_bytes(CPU)
    held = torch.ones(before // 4 // 2)  # half as much again
    logged(tmp_path)
    (line,) = read_journal(tmp_path / "log.jsonl")
    assert line["memory/peak_gb"] * 1e9 >= max(before, held.nbytes)
    assert line["seconds"] > 0 and "validation/motion" in line
