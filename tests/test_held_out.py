"""Validation of the stages with targets: clips that are never trained on, and videos."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from test_consistency import CONFIG as CONSISTENCY
from test_excerpts import CPU, GREY, TEACH, Toys
from torch import Tensor

from rf_core.options import DEMO
from rf_core.video import count_images, read_metadata
from training.__main__ import main
from training.data.held_out import split_clips
from training.data.latents import Video, latents_path, write_latents
from training.data.pairs import Origin, Pairs, PairsConfig, Trajectories, shard_path, write_shard
from training.data.random_clips import RandomClips
from training.run.config import apply_overrides
from training.run.draws import seeded_generator
from training.run.folder import checkpoints
from training.run.journal import read_journal
from training.stages import supervised
from training.stages.consistency import (
    CONSISTENCY_PRESETS,
    ConsistencyTrainer,
    distil_consistency,
)
from training.stages.regression import INIT_PRESETS, InitConfig, draw_batch, init_student
from training.stages.teacher import TEACHER_PRESETS, TeacherTrainer, train_teacher

ROOT = Path(__file__).parent.parent
SHAPE = (16, 9, 8, 8)


@dataclass(frozen=True)
class Watched(Toys):
    """Toys, two of each video, that note which are read."""

    count: int = 12
    read: set[int] = field(default_factory=set)

    @property
    def origins(self) -> list[int]:
        return [row // 2 for row in range(self.count)]

    def latents(self, rows: Sequence[int]) -> Tensor:
        self.read.update(rows)
        return super().latents(rows)


def test_what_clips_are_cut_from_is_held_out_whole_and_the_same_in_every_run():
    source = Watched()
    split = split_clips(source, 3)
    held = {source.origins[row] for row in split.held_out}
    assert len(split.held_out) == 3 and len(held) == 2  # as different ones as there can be
    assert held.isdisjoint(source.origins[row] for row in split.trained)
    assert len(split.trained) == 8 and split == split_clips(Watched(), 3)
    assert split.shown(2) == split.held_out[:2]


def test_without_held_out_clips_everything_is_trained_on_and_any_may_be_shown():
    split = split_clips(Watched(), 0)
    assert list(split.trained) == list(range(12)) and not split.held_out
    assert len(set(split.shown(4))) == 4


def test_holding_out_all_there_is_is_refused():
    with pytest.raises(ValueError, match=r"validation_clips is 11.*none is left to train on"):
        split_clips(Watched(), 11)


def teacher(source: Watched) -> TeacherTrainer:
    config = apply_overrides(TEACH, ["validate_every=1", "validation_clips=3"])
    return TeacherTrainer(config, tiny.model().requires_grad_(True), source, GREY, CPU)


def consistency(source: Watched) -> ConsistencyTrainer:
    config = apply_overrides(CONSISTENCY, ["validate_every=1", "validation_clips=3"])
    student = tiny.model().requires_grad_(True)
    return ConsistencyTrainer(config, student, tiny.model(seed=1), source, GREY, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("make", [teacher, consistency])
def test_held_out_clips_are_measured_and_never_trained_on(make):
    source = Watched()
    run = make(source)
    held = set(run.split.held_out)
    for _ in range(6):
        run.step()
    origins = {source.origins[row] for row in source.read}
    assert origins.isdisjoint(source.origins[row] for row in held) and len(origins) == 4
    source.read.clear()
    with torch.no_grad():
        first, _ = run.held_out_errors(run.split.held_out, range(3))
        again, which = run.held_out_errors(run.split.held_out, range(3))
    assert source.read == held and torch.equal(first, again)
    assert which.shape == first.shape and len(first) == 3


def write_clips(folder: Path, count: int = 6) -> list[str]:
    """A folder of encoded videos; the setting that names it."""
    for number in range(count):
        clip = torch.randn(SHAPE, generator=seeded_generator("clip", number)).half()
        video = Video(name=f"{number}.mp4", prompt=f"a red circle moves left {number}")
        write_latents(latents_path(folder, number), [clip], video, "")
    return [f"source={folder}"]


def write_pairs(folder: Path) -> list[str]:
    """A folder of trajectories of whole clips; the setting that names it."""
    config = PairsConfig(latents=SHAPE, clips=6, shard=2)
    folder.mkdir()
    for number in range(3):
        drawn = seeded_generator("pairs", number)
        *points, clean = torch.randn(5, 2, *SHAPE, generator=drawn).half().unbind()
        trajectories = Trajectories(
            points=torch.stack(points, dim=1),
            clean=clean,
            embeds=torch.randn(2, 8, 64, generator=drawn),
            prompts=[f"prompt {2 * number + place}" for place in range(2)],
            numbers=[2 * number + place for place in range(2)],
        )
        path = shard_path(folder, number)
        write_shard(path, trajectories, config, number, Origin(teacher="teacher"))
    return [f"pairs={folder}"]


def test_trajectories_that_are_held_out_are_never_drawn(tmp_path):
    write_pairs(tmp_path / "pairs")
    pairs = Pairs.open(tmp_path / "pairs")
    split = split_clips(pairs, 2)
    samples = range(4 * len(split.trained))
    every, held = pairs.rows(range(6)).clean, pairs.rows(split.held_out).clean.float()
    drawn = draw_batch(pairs, InitConfig(batch=len(samples)), 0, samples, split.trained).clean
    assert len(split.trained) == 4 and len(drawn.unique(dim=0)) == 4
    assert not any(torch.equal(a, b) for a in drawn for b in held)
    assert len(torch.cat([drawn, held]).unique(dim=0)) == len(every)


@dataclass(frozen=True)
class Stage:
    """A recipe, how it is run, and what it reads."""

    preset: Callable[[], Any]
    run: Callable[..., Any]
    write: Callable[[Path], list[str]]
    settings: tuple[str, ...]
    images: int
    """Of a video of one chunk, or of a clip."""


START = f"start={DEMO / 'teacher.safetensors'}"
STAGES = {
    "teacher": Stage(
        TEACHER_PRESETS["miniature"],
        train_teacher,
        write_clips,
        (START, "model=null", "opening_batch=2", "validation_steps=2"),
        33,
    ),
    "ode_init": Stage(
        INIT_PRESETS["miniature"], init_student, write_pairs, ("validation_chunks=1",), 9
    ),
    "consistency": Stage(
        CONSISTENCY_PRESETS["miniature"],
        distil_consistency,
        write_clips,
        ("validation_chunks=1", "steps=2"),
        9,
    ),
}
SHORT = ("updates=2", "batch=2", "micro_batch=2", "checkpoint_every=50", "validate_every=1")
SHORT += ("validation_prompts=2", "validation_clips=3")


def of(stage: Stage, folder: Path, *more: str) -> Any:
    settings = [*stage.write(folder / "data"), *stage.settings, *SHORT, *more]
    return apply_overrides(stage.preset(), settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_every_stage_validates_after_a_checkpoint_and_makes_up_for_what_failed(
    name, tmp_path, monkeypatch
):
    stage, out = STAGES[name], tmp_path / "run"
    config = of(stage, tmp_path)

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("while decoding")

    with monkeypatch.context() as patch:
        patch.setattr(supervised, "show", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            next(stage.run(config, out, CPU))
    assert [update for update, _ in checkpoints(out)] == [1]
    assert not (out / "validation").exists()
    assert [report.update for report in stage.run(config, out, CPU, resume=True)] == [1]
    lines = read_journal(out / "log.jsonl")
    assert len(lines) == 2
    for line in lines:
        assert line["validation/loss"] > 0 and line["validation/motion"] > 0
        assert line["memory/peak_gb"] > 0
    for video in ("update_000001/00.mp4", "update_000001/01.mp4", "update_000002/01.mp4"):
        path = out / "validation" / video
        assert count_images(path, 100) == stage.images and read_metadata(path)["title"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [each.step for each in events.Images("validation/01")] == [0, 1]


@pytest.mark.slow
def test_validation_changes_nothing_of_what_is_trained(tmp_path):
    stage = STAGES["consistency"]
    plain = ("validation_clips=0", "tensorboard=false")
    shown = of(stage, tmp_path, *plain)
    none = apply_overrides(shown, ["validate_every=0"])
    reports = [
        list(stage.run(config, tmp_path / name, CPU))
        for name, config in (("shown", shown), ("none", none))
    ]
    assert reports[0] == reports[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("vae=nowhere.pth", "vae is nowhere.pth, which is not there"),
        ("validation_clips=6", "none is left to train on"),
        ("validate_every=0", "validation_clips is 3 and validate_every is 0"),
    ],
)
def test_what_cannot_be_validated_is_refused_before_anything_is_made(
    setting, said, tmp_path, capsys
):
    stage = STAGES["consistency"]
    settings = [*stage.write(tmp_path / "data"), *stage.settings, *SHORT, setting]
    words = [word for each in settings for word in ("--set", each)]
    out = tmp_path / "run"
    assert main(["consistency", "--out", str(out), "--device", "cpu", *words]) == 1
    assert said in capsys.readouterr().err and not out.exists()


def test_the_demo_s_vae_is_not_taken_for_clips_of_another_world():
    config = INIT_PRESETS["miniature"]()
    supervised.check_validation(config, RandomClips(SHAPE, (4, 8)))

    class Several(RandomClips):
        buckets: ClassVar = {(8, 12): range(40), (8, 8): range(40, 64)}

    supervised.check_validation(config, Several((16, 9, 8, 12), (4, 8)))  # the demo's among them
    with pytest.raises(ValueError, match=r"vae is not given, and .* of 480x832; name the VAE"):
        supervised.check_validation(config, RandomClips((16, 9, 60, 104), (4, 8)))


@pytest.mark.slow
def test_two_processes_find_the_held_out_loss_that_one_finds(tmp_path):
    stage = STAGES["teacher"]
    config = of(stage, tmp_path, "updates=1", "tensorboard=false")
    list(stage.run(config, tmp_path / "one", CPU))
    words = [
        word
        for each in [f"source={tmp_path / 'data'}", *stage.settings, *SHORT]
        for word in ("--set", each)
    ]
    more = ["--set", "updates=1", "--set", "tensorboard=false", "--set", "micro_batch=1"]
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
            ),
            *("-m", "training", "teacher", "--device", "cpu"),
            *("--out", str(tmp_path / "two"), *words, *more),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (one,), (two,) = (read_journal(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert two["validation/loss"] == pytest.approx(one["validation/loss"], rel=1e-3)
    assert (tmp_path / "two" / "validation" / "update_000001" / "01.mp4").exists()
