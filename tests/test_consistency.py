"""Causal consistency distillation: its targets, its run, what it leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from processes import spawn
from safetensors.torch import save_file
from test_excerpts import CLIPS, CPU, GREY, MUON, F
from torch import Tensor

from rf_core.scheduler import add_noise, flow_to_x0, integrate
from rf_core.weights.checkpoint import load_student
from training.__main__ import main
from training.objective.excerpts import ExcerptPrompts, excerpt_flow, past_kv
from training.run.config import apply_overrides
from training.run.distributed import shard
from training.run.draws import seeded_generator
from training.run.networks import prepare
from training.stages.consistency import (
    CONSISTENCY_PRESETS,
    ConsistencyBatch,
    ConsistencyConfig,
    ConsistencyTrainer,
    consistency_errors,
    distil_consistency,
    draw_batch,
)

CONFIG = ConsistencyConfig(
    sampler=tiny.TWO_STEPS,
    steps=4,
    guidance=2.0,
    optimiser=MUON,
    updates=8,
    batch=4,
    micro_batch=2,
    ema=0.5,
    ema_from=1,
    tensorboard=False,
)
LAST = len(CONFIG.levels) - 2


def trainer(config: ConsistencyConfig = CONFIG) -> ConsistencyTrainer:
    student = prepare(tiny.model().requires_grad_(True), config.placement, trained=True)
    teacher = tiny.model(seed=1)
    for network in (student, teacher):
        shard(network, "cpu")
    return ConsistencyTrainer(config, student, teacher, CLIPS, GREY, CPU)


def batch_at(*levels: int) -> ConsistencyBatch:
    batch = draw_batch(CLIPS, CONFIG, 0, range(2))
    return replace(batch, level_BN=torch.tensor(levels).expand(2, -1))


def at_level(level: float) -> Tensor:
    return torch.full((2, 3 * F), 1000 * level)


@torch.no_grad()
def flows(model, batch: ConsistencyBatch, x: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """The flow under the prompts, and under none."""
    prompts = ExcerptPrompts.from_embeds(model, batch.embeds, batch.excerpts, torch.float32)
    past = past_kv(model, batch.excerpts, prompts, dtype=torch.float32)
    empty = (model.prompt_context(GREY.expand(2, -1, -1)),) * 3
    cond, uncond = (
        excerpt_flow(model, x, at_level(level), each, past, dtype=torch.float32)
        for each in (prompts.by_chunk, empty)
    )
    return cond, uncond


@pytest.mark.parametrize("place", [0, 1, LAST])
def test_the_target_is_what_the_student_sees_one_step_of_the_teacher_further(place: int) -> None:
    run, batch = trainer(), batch_at(place, place, place)
    student, teacher = run.network, run.teacher
    now, after = CONFIG.levels[place : place + 2]
    noisy = add_noise(batch.latents, batch.noise, at_level(now))

    def guided(x: Tensor, level: float) -> Tensor:
        cond, uncond = flows(teacher, batch, x, level)
        return uncond + 2 * (cond - uncond)

    less, _ = integrate(guided, noisy, [now, after])
    seen = flow_to_x0(flows(student, batch, noisy, now)[0], noisy, at_level(now))
    target = less  # at no noise a point is its own end
    if after:
        target = flow_to_x0(flows(student, batch, less, after)[0], less, at_level(after))
    expected = (seen - target).square().unflatten(2, (3, F)).mean((1, 3, 4, 5))
    found = consistency_errors(student, teacher, batch, GREY, CONFIG)
    torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=1e-4)
    assert (after == 0) == (place == LAST)


def test_each_chunk_is_at_a_level_of_its_own() -> None:
    run, mixed = trainer(), batch_at(0, 1, LAST)
    found = consistency_errors(run.network, run.teacher, mixed, GREY, CONFIG)
    for chunk, level in enumerate((0, 1, LAST)):
        same = consistency_errors(run.network, run.teacher, batch_at(*[level] * 3), GREY, CONFIG)
        torch.testing.assert_close(found[:, chunk], same[:, chunk], atol=1e-5, rtol=1e-4)


def test_gradients_come_through_the_prediction_and_not_through_its_target() -> None:
    run, batch = trainer(), batch_at(0, 1, 1)
    consistency_errors(run.network, run.teacher, batch, GREY, CONFIG).sum().backward()
    found = [p.grad.clone() for p in run.network.parameters()]
    assert all(p.grad is None for p in run.teacher.parameters())
    run.network.zero_grad()
    prompts = ExcerptPrompts.from_embeds(run.network, batch.embeds, batch.excerpts, torch.float32)
    past = past_kv(run.network, batch.excerpts, prompts, dtype=torch.float32)
    levels = torch.tensor(CONFIG.levels)[batch.level_BN].repeat_interleave(F, dim=1)
    noisy = add_noise(batch.latents, batch.noise, 1000 * levels)
    flow = excerpt_flow(
        run.network, noisy, 1000 * levels, prompts.by_chunk, past, dtype=torch.float32
    )
    seen = flow_to_x0(flow, noisy, 1000 * levels)
    with torch.no_grad():  # (x - y)^2 and 2 x (x - y) have one gradient where y is fixed
        errors = consistency_errors(run.network, run.teacher, batch, GREY, CONFIG)
    assert errors.shape == (2, 3)
    target = targets(run, batch)
    (seen - target).square().unflatten(2, (3, F)).mean((1, 3, 4, 5)).sum().backward()
    for gradient, parameter in zip(found, run.network.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-4, rtol=1e-3)


def targets(run: ConsistencyTrainer, batch: ConsistencyBatch) -> Tensor:
    """Each chunk's, of levels before the last, chunk by chunk."""
    parts = []
    for chunk, place in enumerate(batch.level_BN[0].tolist()):
        now, after = CONFIG.levels[place : place + 2]
        noisy = add_noise(batch.latents, batch.noise, at_level(now))
        cond, uncond = flows(run.teacher, batch, noisy, now)
        less = noisy + (after - now) * (uncond + 2 * (cond - uncond))
        ends = flow_to_x0(flows(run.network, batch, less, after)[0], less, at_level(after))
        parts.append(ends.split(F, 2)[chunk])
    return torch.cat(parts, dim=2)


def test_losses_are_told_by_the_student_s_steps() -> None:
    run = trainer()
    assert run.names == ["t1000", "t833"]
    assert [round(1000 * level) for level in CONFIG.levels] == [1000, 938, 833, 625, 0]
    assert run._names_of_levels.tolist() == [0, 0, 1, 1]
    report = run.step()
    assert set(report.losses) <= set(run.names) and report.loss > 0


def test_a_student_of_its_teacher_s_weights_learns_to_agree_with_itself() -> None:
    run = trainer(replace(CONFIG, updates=24))
    losses = [run.step().loss for _ in range(24)]
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, first, second = (trainer() for _ in range(3))
    reports = [whole.step() for _ in range(4)]
    for _ in range(2):
        first.step()
    first.save(tmp_path / "at2")
    second.load(tmp_path / "at2")
    assert [second.step() for _ in range(2)] == reports[2:]


def run_rank(rank: int, world: int, folder: Path) -> None:
    """One process: its share of two updates."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world
    )
    run = trainer()
    numbers = [(each.loss, each.norm) for each in (run.step(), run.step())]
    if rank == 0:
        torch.save(numbers, folder / "numbers.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_distil_as_one_does(tmp_path: Path) -> None:
    spawn(run_rank, (2, tmp_path), nprocs=2)
    run = trainer()
    for numbers in torch.load(tmp_path / "numbers.pt"):
        report = run.step()
        assert numbers == pytest.approx((report.loss, report.norm), rel=1e-3)


def test_presets_survive_json_and_a_cache_of_other_chunks_is_refused() -> None:
    for preset in CONSISTENCY_PRESETS.values():
        assert apply_overrides(preset(), []) == preset()
    wide = replace(CONFIG, cache=tiny.window(12, 3))
    with pytest.raises(ValueError, match=r"cache.window_frames is 12; set it to 9"):
        next(distil_consistency(wide, Path("nowhere"), CPU))
    with pytest.raises(ValueError, match="steps is 0"):
        replace(CONFIG, steps=0)


@pytest.mark.slow
def test_clips_become_a_student_that_streams_without_trajectories(tmp_path: Path, capsys) -> None:
    latents = torch.randn(4, 16, 9, 8, 8, generator=seeded_generator("clips")).half()
    clips, out = tmp_path / "clips", tmp_path / "run"
    clips.mkdir()
    note = json.dumps({"seed": 1, "start": 0})
    save_file({"latents": latents}, clips / "clips-000000.safetensors", {"clips": note})
    short = ("tensorboard=false", "batch=2", "micro_batch=2", "updates=2", "checkpoint_every=1")
    words = [word for each in (f"source={clips}", *short) for word in ("--set", each)]
    assert main(["consistency", "--out", str(out), "--device", "cpu", *words]) == 0
    _, found = load_student(out / "student.safetensors", device="cpu", dtype=torch.float32)
    assert found.causal and found.sampler is not None and found.size == (64, 64)
    assert found.provenance["clips"] == 4 and set(found.provenance["made_from"]) == {
        "start",
        "teacher",
    }
    assert main(["consistency", "--out", str(out), "--resume", "--set", "updates=3"]) == 0
    capsys.readouterr()
    assert main(["consistency", "--out", str(out), "--resume", "--set", "teacher=none"]) == 1
    assert "teacher is none, which is not there" in capsys.readouterr().err
