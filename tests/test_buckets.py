"""Clips of several sizes: which size a video takes, and that an update has samples of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from processes import spawn
from test_consistency import CONFIG
from test_excerpts import CPU, GREY, TEACH, F
from torch import Tensor

from rf_core.decoders.decoder import load_decoder
from rf_core.options import DEMO
from rf_core.video import VideoFormat, VideoWriter, read_images
from training.__main__ import main
from training.choices import open_clips, shape_of_clips
from training.data.clips import draw_bucket
from training.data.embeddings import MemoryEmbeds
from training.data.held_out import Split, groups_among
from training.data.latents import (
    Video,
    VideoClips,
    clip_images,
    latents_path,
    nearest_size,
    read_video_clips,
    write_latents,
)
from training.data.prompts import DataConfig
from training.run.config import apply_overrides
from training.run.distributed import shard
from training.run.draws import seeded_generator
from training.run.journal import read_journal
from training.stages import consistency, supervised, teacher
from training.stages.latents import LatentsConfig
from training.stages.trainer import RunConfig

SIZES = ((4, 6), (4, 6), (6, 4), (4, 6))  # of four videos, two clips each


def shards(folder: Path) -> Path:
    for number, size in enumerate(SIZES):
        generator = seeded_generator("video", number)
        shape = (2, tiny.CONFIG.in_dim, 4 * F, *size)
        clips = torch.randn(shape, generator=generator).half()
        video = Video(name=f"{number}.mp4", prompt=f"a video {number}")
        write_latents(latents_path(folder, number), list(clips), video, "")
    return folder


def toy_clips(folder: Path) -> VideoClips:
    clips, prompts = read_video_clips(shards(folder))
    return VideoClips(clips, prompts, MemoryEmbeds(tiny.prompt(batch=len(prompts))))


def test_a_folder_of_latents_has_a_bucket_for_each_size(tmp_path):
    source = toy_clips(tmp_path)
    assert source.buckets == {(4, 6): [0, 1, 2, 3, 6, 7], (6, 4): [4, 5]}
    assert source.shape == (4, 12, 4, 6)  # of the size that most have
    assert source.latents([4, 5]).shape == (2, 4, 12, 6, 4)


def test_clips_of_several_lengths_or_of_none_are_refused(tmp_path):
    write_latents(latents_path(tmp_path, 0), [], Video(name="a.mp4", prompt="a"), "too short")
    with pytest.raises(ValueError, match="holds no clip: all of its videos were left out"):
        read_video_clips(tmp_path)
    for number, frames in ((1, 9), (2, 12)):
        video = Video(name=f"{number}.mp4", prompt="a")
        write_latents(latents_path(tmp_path, number), [torch.zeros(4, frames, 4, 6)], video, "")
    with pytest.raises(ValueError, match=r"2 kinds.* \(4, 9\), \(4, 12\); they may differ in heig"):
        read_video_clips(tmp_path)


def test_a_size_is_drawn_as_often_as_there_are_clips_of_it(tmp_path):
    source = toy_clips(tmp_path)
    whole = (range(len(source)),)
    drawn = [draw_bucket(source, whole, 0, "teacher", update) for update in range(400)]
    count = Counter(len(groups[0]) for groups in drawn)
    assert count.keys() == {6, 2} and count[6] == pytest.approx(300, abs=35)
    assert drawn == [draw_bucket(source, whole, 0, "teacher", update) for update in range(400)]
    kinds = draw_bucket(source, (range(4), range(4, 8)), 0, "teacher", count_of(drawn, 2))
    assert kinds == [[4, 5]]  # of kinds, those that the size has


def test_sizes_are_drawn_of_the_clips_that_are_drawn_among_alone(tmp_path):
    source = toy_clips(tmp_path)
    trained, held = groups_among((range(8),), Split(range(4), [4, 5, 6, 7])), (range(4, 8),)
    of_trained, of_held = (
        Counter(tuple(*draw_bucket(source, groups, 0, "teacher", n)) for n in range(200))
        for groups in (trained, held)
    )
    assert set(of_trained) == {(0, 1, 2, 3)}  # the other size is held out whole
    assert set(of_held) == {(4, 5), (6, 7)} and of_held[4, 5] == pytest.approx(100, abs=25)


class Reading(VideoClips):
    """Notes which clips are read."""

    def latents(self, rows: Sequence[int]) -> Tensor:
        self.read.update(rows)
        return super().latents(rows)


def held_out_trainers(source: VideoClips) -> list[supervised.SupervisedTrainer]:
    settings = ["validate_every=1", "validation_clips=5", "validation_prompts=0"]
    student, other = tiny.model().requires_grad_(True), tiny.model(seed=1)
    teach, config = apply_overrides(TEACH, settings), apply_overrides(CONFIG, settings)
    return [
        teacher.TeacherTrainer(teach, student, source, GREY, CPU),
        consistency.ConsistencyTrainer(config, student, other, source, GREY, CPU),
    ]


@pytest.mark.parametrize("stage", [0, 1], ids=["teacher", "consistency"])
def test_held_out_clips_of_every_size_are_measured_and_none_is_trained_on(tmp_path, stage):
    toys = toy_clips(tmp_path / "clips")
    source = Reading(toys.clips, toys.prompts, toys.embeds)
    source.read = set()
    run = held_out_trainers(source)[stage]
    held = set(run.split.held_out)
    assert len(held) == 5 and sorted(map(len, run.held_out)) == [1, 4]  # of both sizes
    for _ in range(6):
        run.step()
    assert source.read and not source.read & held
    source.read.clear()
    first, again = (run.validate(None, tmp_path).numbers["validation/loss"] for _ in range(2))
    assert source.read >= held and first == again > 0


def count_of(drawn: list, size: int) -> int:
    return next(update for update, (rows,) in enumerate(drawn) if len(rows) == size)


def batches(source: VideoClips, update: int, samples: range) -> list[Tensor]:
    """The latents of an update's samples, and of the pasts they have, for both stages."""
    first = teacher.draw_batch(source, TEACH, update, 4 * update, samples)
    second = consistency.draw_batch(source, CONFIG, update, samples)
    found = [first.latents, second.latents]
    for each in (first, second):
        if each.excerpts is not None:
            found += [each.excerpts.opening, each.excerpts.before, each.excerpts.other_opening]
    return found


def test_all_samples_of_an_update_and_their_pasts_are_of_one_size(tmp_path):
    source = toy_clips(tmp_path)
    for stage in (0, 1):
        seen = set()
        for update in range(10):
            parts = [batches(source, update, range(n, n + 2)) for n in (0, 2)]
            sizes = {tuple(part[stage].shape[3:]) for part in parts}
            assert len(sizes) == 1
            seen |= sizes
        assert seen == {(4, 6), (6, 4)}
    for update in range(10):
        every = batches(source, update, range(4))
        assert {tuple(each.shape[3:]) for each in every} <= {(4, 6), (6, 4)}


def consistency_trainer(source: VideoClips) -> consistency.ConsistencyTrainer:
    student, other = tiny.model().requires_grad_(True), tiny.model(seed=1)
    for network in (student, other):
        shard(network, "cpu")
    return consistency.ConsistencyTrainer(CONFIG, student, other, source, GREY, CPU)


def run_rank(rank: int, world: int, folder: Path) -> None:
    """One process: its share of five updates."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world
    )
    torch.set_num_threads(1)
    clips, prompts = read_video_clips(folder / "clips")
    source = VideoClips(clips, prompts, MemoryEmbeds(tiny.prompt(batch=len(prompts))))
    run = consistency_trainer(source)
    numbers = [(each.loss, each.norm) for each in (run.step() for _ in range(5))]
    if rank == 0:
        torch.save(numbers, folder / "numbers.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_from_clips_of_two_sizes_as_one_does(tmp_path):
    source = toy_clips(tmp_path / "clips")
    drawn = [draw_bucket(source, (range(8),), 0, "consistency", n) for n in range(5)]
    assert {len(rows) for (rows,) in drawn} == {2, 6}
    spawn(run_rank, (2, tmp_path), nprocs=2)
    run = consistency_trainer(source)
    for numbers in torch.load(tmp_path / "numbers.pt"):
        report = run.step()
        assert numbers == pytest.approx((report.loss, report.norm), rel=1e-3)


def test_a_video_takes_the_size_for_which_the_least_of_it_is_cropped():
    sizes = ((480, 832), (832, 480), (640, 640))
    found = {
        shape: nearest_size(*shape, sizes)
        for shape in ((1080, 1920), (1920, 1080), (600, 800), (500, 520), (500, 700))
    }
    assert found == {
        (1080, 1920): sizes[0],
        (1920, 1080): sizes[1],
        (600, 800): sizes[0],  # 77 % of it is kept, of a square 75 %
        (500, 520): sizes[2],
        (500, 700): sizes[0],
    }


@pytest.mark.slow
def test_videos_are_encoded_at_the_size_nearest_theirs_and_both_stages_learn(tmp_path, capsys):
    videos, out = tmp_path / "videos", tmp_path / "latents"
    videos.mkdir()
    for name, (height, width) in {"a": (64, 64), "b": (72, 128), "c": (160, 96)}.items():
        form = VideoFormat(width=width, height=height, fps=16)
        with VideoWriter(videos / f"{name}.mp4", form, {}) as writer:
            grey = torch.linspace(0, 250, 33).to(torch.uint8)
            writer.write(grey[:, None, None, None].expand(-1, height, width, 3))
        (videos / f"{name}.txt").write_text(f"{name} of light")
    settings = (f"videos={videos}", "size=[64, 64]", "buckets=[[48, 80], [80, 48]]")
    words = [word for each in settings for word in ("--set", each)]
    assert main(["latents", "--out", str(out), "--device", "cpu", *words]) == 0
    source = open_clips(out, DataConfig(), CPU)
    assert source.buckets == {(6, 10): [1], (8, 8): [0], (10, 6): [2]}
    images = read_images(videos / "b.mp4", width=80, height=48, num_images=clip_images(9))
    whole = load_decoder(DEMO / "vae.safetensors").encode(images)
    torch.testing.assert_close(source.latents([1]), whole, atol=2e-2, rtol=1e-2)

    learn = ("updates=4", "batch=2", "micro_batch=2", "tensorboard=false")
    start = (f"start={DEMO / 'teacher.safetensors'}", "model=null", "opening_batch=2")
    for stage, more in (("teacher", start), ("consistency", ())):
        options = [f"source={out}", *learn, *more]
        words = [word for each in options for word in ("--set", each)]
        run = tmp_path / stage
        assert main([stage, "--out", str(run), "--device", "cpu", *words]) == 0
        assert len(read_journal(run / "log.jsonl")) == 4

    capsys.readouterr()
    pairs = ["ode_pairs", "--out", str(tmp_path / "pairs"), "--device", "cpu"]
    assert main([*pairs, "--set", f"source={out}"]) == 1
    error = capsys.readouterr().err
    assert "holds clips whose latents are 6x10, 8x8, 10x6; trajectories are of one size" in error


@pytest.mark.parametrize("stage", ["teacher", "consistency"])
def test_clips_whose_tokens_are_shared_out_must_be_of_one_area(tmp_path, stage, monkeypatch):
    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("a weight is read")

    for number, size in enumerate(((8, 8), (8, 12))):
        clip = torch.zeros(16, 9, *size).half()
        video = Video(name=f"{number}.mp4", prompt=f"a red circle moves left {number}")
        write_latents(latents_path(tmp_path / "clips", number), [clip], video, "")
    preset = {"teacher": teacher.TEACHER_PRESETS, "consistency": consistency.CONSISTENCY_PRESETS}
    settings = [f"source={tmp_path / 'clips'}", "placement.sequence_over=2"]
    config = apply_overrides(preset[stage]["miniature"](), settings)
    run = {"teacher": teacher.train_teacher, "consistency": consistency.distil_consistency}[stage]
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", refused)
    monkeypatch.setattr("training.choices.encoded", lambda *args: None)
    with pytest.raises(ValueError, match=r"source has latents of 8x8, 8x12.* of one area"):
        next(run(config, tmp_path / "run", CPU))
    assert shape_of_clips(tmp_path / "clips") == (16, 9, 8, 12)  # which estimates count


def test_buckets_that_no_video_or_update_could_take_are_refused():
    with pytest.raises(ValueError, match="two have one shape: no video would take the second"):
        LatentsConfig(size=(480, 832), buckets=((240, 416),))
    with pytest.raises(ValueError, match=r"buckets are .* heights and widths in pixels"):
        LatentsConfig(buckets=((0, 64),))
    with pytest.raises(ValueError, match=r"buckets are .* name each size once"):
        RunConfig(buckets=((60, 104),))
    with pytest.raises(ValueError, match=r"buckets are .* rows and columns of latents"):
        RunConfig(buckets=((0, 8),))
    config = apply_overrides(RunConfig(), ["buckets=[[104, 60]]"])
    assert config.sizes == ((60, 104), (104, 60))
