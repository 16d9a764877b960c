"""Chunks with a clean past: how they are cut and seen, and the stages that learn from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from processes import spawn
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from rf_core.config import CacheConfig, Grid, SamplerConfig
from rf_core.kv_cache import KVCache
from rf_core.options import DEMO
from rf_core.scheduler import add_noise, flow_to_x0, sampling_timesteps
from rf_core.weights.checkpoint import load_student, write_checkpoint
from training.__main__ import main
from training.choices import open_clips
from training.data.clips import ExcerptIndices, draw_clip, draw_excerpts, gather_excerpts
from training.data.pairs import Origin, Pairs, PairsConfig, Trajectories, shard_path, write_shard
from training.data.prompts import DataConfig
from training.objective.excerpts import (
    ExcerptConfig,
    ExcerptPrompts,
    Excerpts,
    augment_past,
    excerpt_flow,
    past_kv,
)
from training.run.config import apply_overrides
from training.run.distributed import shard
from training.run.draws import seeded_generator
from training.run.journal import read_journal
from training.run.networks import PlacementConfig, prepare
from training.run.optimise import OptimiserConfig
from training.stages import teacher as stage
from training.stages.consistency import ConsistencyConfig
from training.stages.regression import (
    INIT_PRESETS,
    Batch,
    InitConfig,
    InitTrainer,
    draw_batch,
    draw_steps,
    init_student,
    regression_errors,
)
from training.stages.supervised import SupervisedTrainer
from training.stages.teacher import (
    TEACHER_PRESETS,
    Phase,
    TeacherBatch,
    TeacherConfig,
    TeacherTrainer,
    teacher_errors,
    train_teacher,
)
from training.stages.trajectories import (
    excerpt_conditions,
    fingerprint,
    make_shard,
    sample_trajectories,
    student_levels,
    write_pairs,
)

CPU = torch.device("cpu")
SIZE, F = (4, 6), 3
PLAIN = ExcerptConfig(switch_share=0.0, context_noise=0.0, stale_sink_share=0.0)
GREY = tiny.prompt(77)  # stands for no prompt
PAIRS = PairsConfig(
    kind="excerpts",
    sampler=tiny.TWO_STEPS,
    latents=(tiny.CONFIG.in_dim, 3 * F, *SIZE),
    steps=2,
    clips=6,
    shard=2,
)
MUON = OptimiserConfig(
    rate=1e-2, betas=(0.9, 0.95), clip_norm=1.0, matrix_rate=1e-2, schedule="cosine", warmup=2
)
TEACH = TeacherConfig(
    phases=(
        Phase(until=0.4, kinds=("opening",)),
        Phase(until=1.0, kinds=("excerpt", "excerpt", "whole")),
    ),
    balanced=True,
    optimiser=MUON,
    updates=10,
    batch=4,
    micro_batch=2,
    opening_batch=4,
    ema=0.5,
    ema_from=None,
    tensorboard=False,
)
INIT = InitConfig(
    context="clean",
    first_step_share=0.4,
    optimiser=MUON,
    updates=8,
    batch=4,
    micro_batch=2,
    ema=0.5,
    ema_from=1,
    tensorboard=False,
)


@dataclass(frozen=True)
class Toys:
    """Clips of two kinds, of four chunks or so; a clip says its number and its seed."""

    count: int = 6
    frames: int = 4 * F

    def __len__(self) -> int:
        return self.count

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return tiny.CONFIG.in_dim, self.frames, *SIZE

    @property
    def groups(self) -> tuple[range, range]:
        return range(2), range(2, self.count)

    @property
    def buckets(self) -> dict[tuple[int, int], range]:
        return {SIZE: range(self.count)}

    def latents(self, rows: Sequence[int]) -> Tensor:
        each = [torch.randn(self.shape, generator=seeded_generator("toy", row)) for row in rows]
        return torch.stack(each)

    def captions(self, rows: Sequence[int], seeds: Sequence[int]) -> tuple[list[str], Tensor]:
        texts = [f"{row} {seed % 7}" for row, seed in zip(rows, seeds, strict=True)]
        return texts, torch.cat([tiny.prompt(row) for row in rows])


CLIPS = Toys()


def drawn(count: int, config: ExcerptConfig = PLAIN, rows: Sequence[int] | None = None):
    each = [seeded_generator("draw", place) for place in range(count)]
    groups = (range(len(CLIPS)),)
    return draw_excerpts(CLIPS, rows or range(count), groups, config, each, F)


def some_excerpts(count: int = 4, config: ExcerptConfig = PLAIN) -> tuple[Tensor, Tensor, Excerpts]:
    targets, given = drawn(count, replace(config, switch_share=0.5))
    assert given.excerpts is not None
    seen = augment_past(
        given.excerpts, config, [seeded_generator("past", place) for place in range(count)]
    )
    return targets, given.embeds, seen


def read(model, embeds: Tensor, seen: Excerpts):
    prompts = ExcerptPrompts.from_embeds(model, embeds, seen, torch.float32)
    return prompts, past_kv(model, seen, prompts, dtype=torch.float32)


def test_an_excerpt_sees_exactly_what_a_stream_would():
    model, (targets, embeds, seen) = tiny.model(), some_excerpts()
    seen = replace(seen, before=targets[:, :, F : 2 * F], recached=torch.zeros(4, dtype=torch.bool))
    seen = replace(seen, later_embeds=embeds)
    prompts, past = read(model, embeds, seen)
    cache = KVCache.allocate(
        CacheConfig(),
        num_layers=tiny.CONFIG.num_layers,
        batch=4,
        grid=Grid(height=2, width=3),
        num_heads=tiny.CONFIG.num_heads,
        head_dim=tiny.CONFIG.head_dim,
        dtype=torch.float32,
        device="cpu",
    )
    at, noisy = torch.full((4, 3 * F), 625.0), torch.randn_like(targets)
    flow = excerpt_flow(model, noisy, at, prompts.by_chunk, past, dtype=torch.float32)
    for chunk, found, target in zip(*(x.split(F, 2) for x in (noisy, flow, targets)), strict=True):
        cache.advance()
        torch.testing.assert_close(model(chunk, at[:, :F], prompts.first, cache), found)
        model(target, torch.zeros(4, F), prompts.first, cache)


def test_it_computes_what_the_miniature_s_own_trainers_did():
    """The numbers are theirs, of the revision before their stages became these."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(7, 4, tiny.CONFIG.in_dim, F, *SIZE, generator=generator)
    opening, second, before, later, *noisy = drawn
    targets, noise = torch.cat([opening, second, later], 2), torch.cat(noisy, 2)
    generator.manual_seed(1)
    blurred = [x + 0.1 * torch.randn(x.shape, generator=generator) for x in (opening, before)]
    stale = torch.rand(4, generator=generator) < 0.6
    embeds, changed = (torch.cat([tiny.prompt(i + n) for i in range(4)]) for n in (0, 10))
    seen = Excerpts(
        opening=blurred[0],
        before=blurred[1],
        other_opening=blurred[0].roll(1, 0),  # theirs was the next of the batch
        recached=torch.tensor([True, False, True, False]),
        later_embeds=changed,
        other_embeds=embeds.roll(1, 0),
        sink_mix=torch.rand(4, generator=generator) * stale,
    )
    model, steps = tiny.model(), torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, 1]])
    timesteps = sampling_timesteps(tiny.TWO_STEPS)
    near = {"atol": 0, "rtol": 1e-5}

    batch = Batch(noisy=noise, step_BN=steps, clean=targets, embeds=embeds, excerpts=seen)
    errors = regression_errors(model, batch, timesteps, INIT).mean(0)
    torch.testing.assert_close(errors, torch.tensor([4.686201, 4.287281, 4.471437]), **near)
    taught = TeacherBatch(
        latents=targets,
        noise=noise,
        timestep_BN=timesteps[steps],
        dropped_BN=torch.zeros(4, 3, dtype=torch.bool),
        embeds=embeds,
        excerpts=seen,
    )
    error = teacher_errors(model, taught, GREY).mean()
    torch.testing.assert_close(error, torch.tensor(4.923848), **near)
    config = replace(PAIRS, steps=4, shift=12.0, guidance=2.5)
    points, ends = sample_trajectories(model, noise, embeds, GREY, config, excerpts=seen)
    for found, theirs in (
        (ends, [4.006864, 3.820107, 4.03622]),
        (points[:, 1], [1.125583, 1.149982, 1.126285]),
    ):
        squares = torch.stack([part.square().mean() for part in found.split(F, 2)])
        torch.testing.assert_close(squares, torch.tensor(theirs), **near)


def test_a_changed_prompt_shows_another_clip_and_keeps_the_past():
    config = ExcerptConfig(switch_share=0.5)
    targets, given = drawn(60, config, rows=[0] * 60)
    chunks = [CLIPS.latents([row])[0].split(F, 1) for row in range(len(CLIPS))]
    seen, switched, wiped = given.excerpts, 0, 0
    for place in range(60):
        opening, second, later = targets[place].split(F, 1)
        assert torch.equal(opening, chunks[0][0]) and torch.equal(second, chunks[0][1])
        assert torch.equal(seen.opening[place], chunks[0][0])
        at = next(i for i in range(4) if torch.equal(seen.before[place], chunks[0][i]))
        clip, after = next(
            (c, i) for c in range(6) for i in range(4) if torch.equal(later, chunks[c][i])
        )
        said = seen.later_embeds[place]
        asked = next(c for c in range(6) if torch.equal(said, tiny.prompt(c)[0]))
        assert asked == clip and given.prompts[place].split()[0] == "0"
        assert torch.equal(given.embeds[place], tiny.prompt(0)[0])
        assert at in (1, 2) and after >= 1  # no opening follows anything
        if clip == 0 and after == at + 1:
            continue
        switched += 1
        wiped += bool(seen.recached[place])
        strange = [torch.equal(seen.other_opening[place], chunks[c][0]) for c in range(6)]
        assert strange.count(True) == 1
        other = tiny.prompt(strange.index(True))[0]
        assert torch.equal(seen.other_embeds[place], other)
    assert 18 < switched < 42 and 0 < wiped < switched
    straight = drawn(20, PLAIN)[1]
    assert torch.equal(straight.excerpts.later_embeds, straight.embeds)


def test_a_stale_sink_and_context_noise_change_the_past_alone():
    model, (_, embeds, clean) = tiny.model(), some_excerpts()
    plain = read(model, embeds, clean)[1]

    def past(**changes: float):
        seen = some_excerpts(config=replace(PLAIN, **changes))[2]
        return seen, read(model, embeds, seen)[1]

    stale, with_stale = past(stale_sink_share=1.0)
    noisy, with_noise = past(context_noise=0.1)
    assert clean.sink_mix is None and ((stale.sink_mix > 0) & (stale.sink_mix < 1)).all()
    assert torch.equal(stale.before, clean.before) and torch.equal(stale.recached, noisy.recached)
    blur = (noisy.before - clean.before).std()
    assert 0.08 < float(blur) < 0.12
    sink = read(model, embeds, replace(stale, sink_mix=torch.ones(4)))[1].layers[2]
    other = read(model, stale.other_embeds, replace(clean, opening=stale.other_opening))[1].layers[
        1
    ]
    for layer in range(tiny.CONFIG.num_layers):
        for kind in (0, 1):  # keys and values
            first, later = (plain.layers[i][layer][kind] for i in (1, 2))
            assert all(map(torch.equal, with_stale.layers[1][layer][kind], first))
            mixed = with_stale.layers[2][layer][kind]
            assert all(not torch.equal(a, b) for a, b in zip(mixed[:F], later[:F], strict=True))
            assert all(map(torch.equal, mixed[F:], later[F:]))
            assert not torch.equal(with_noise.layers[2][layer][kind][F], later[F])
            for whole, alone in zip(sink[layer][kind][:F], other[layer][kind], strict=True):
                torch.testing.assert_close(whole, alone)


def test_what_an_excerpt_sees_is_its_own_draw_whatever_comes_beside_it():
    config = ExcerptConfig(stale_sink_share=0.5)
    whole, _, seen = some_excerpts(4, config)
    part, _, alone = some_excerpts(2, config)
    assert torch.equal(whole[:2], part)
    for name, tensor in alone.tensors().items():
        assert torch.equal(tensor, seen.tensors()[name][:2]), name


def test_groups_take_turns_and_no_clip_comes_again_before_every_other_of_its_group():
    rows = [draw_clip(CLIPS.groups, 0, "teacher", index) for index in range(16)]
    assert all(row < 2 for row in rows[::2]) and all(row >= 2 for row in rows[1::2])
    for few in (rows[0:4:2], rows[4:8:2], rows[1:9:2], rows[9:16:2]):
        assert len(set(few)) == len(few)
    even = [draw_clip((range(6),), 0, "teacher", index) for index in range(12)]
    assert len(set(even[:6])) == len(set(even[6:])) == 6 and even[:6] != even[6:]


def made_pairs(out: Path, maker: str = "teacher") -> PairsConfig:
    """Trajectories of a tiny teacher's excerpts."""
    out.mkdir()
    begin, origin = excerpt_conditions(CLIPS, PAIRS), Origin(teacher=maker, clips=len(CLIPS))
    for number in range(PAIRS.clips // PAIRS.shard):
        made = make_shard(tiny.model(seed=1), begin, GREY, PAIRS, number)
        write_shard(shard_path(out, number), made, PAIRS, number, origin)
    return PAIRS


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Pairs:
    out = tmp_path_factory.mktemp("excerpts") / "pairs"
    made_pairs(out)
    return Pairs.open(out)


def test_trajectories_of_excerpts_lead_from_their_noise_to_their_chunks(pairs):
    rows = pairs.rows(range(6))
    assert rows.points.shape == (6, 2, 4, 9, *SIZE) and rows.clean.shape == (6, 4, 9, *SIZE)
    assert pairs.origin == Origin(teacher="teacher", clips=6) and len(set(rows.numbers)) == 6
    model, drawn = (
        tiny.model(seed=1),
        [seeded_generator(0, "ode_pairs", i, "past") for i in range(6)],
    )
    seen = augment_past(rows.excerpts, PAIRS.excerpts, drawn)
    noise = rows.points[:, 0].float()
    points, end = sample_trajectories(model, noise, rows.embeds, GREY, PAIRS, excerpts=seen)
    near = {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(points, rows.points.float(), **near)
    torch.testing.assert_close(end, rows.clean.float(), **near)
    plain = sample_trajectories(
        model, noise, rows.embeds, GREY, replace(PAIRS, guidance=1.0), excerpts=seen
    )
    assert not torch.allclose(plain[1], end, atol=0.1)
    # The same walk, written out for the second chunk, which sees the opening under guidance too.
    prompts, past = read(model, rows.embeds, seen)
    empty, levels = model.prompt_context(GREY.expand(6, -1, -1)), student_levels(PAIRS.sampler)
    x, at = noise, torch.ones(6, 9)
    bent = PAIRS.shift * 0.5 / (1 + (PAIRS.shift - 1) * 0.5)  # the grid has 1, this and 0
    for level, after in pairwise(sorted({*levels, 1.0, bent, 0.0}, reverse=True)):
        cond, uncond = (
            excerpt_flow(model, x, 1000 * level * at, each, past, dtype=torch.float32)
            for each in (prompts.by_chunk, (empty,) * 3)
        )
        x = x + (after - level) * (uncond + PAIRS.guidance * (cond - uncond))
    torch.testing.assert_close(end, x, atol=1e-4, rtol=1e-4)


def test_a_shard_of_excerpts_depends_on_neither_batch_nor_process(pairs):
    config = replace(PAIRS, batch=2)
    again = make_shard(tiny.model(seed=1), excerpt_conditions(CLIPS, config), GREY, config, 1)
    rows = pairs.rows([2, 3])
    assert again.prompts == rows.prompts and again.numbers == rows.numbers
    torch.testing.assert_close(again.clean, rows.clean, atol=2e-3, rtol=2e-3)
    assert torch.equal(again.excerpts.before, rows.excerpts.before)
    assert rows.excerpts.before.dtype == torch.float16


def test_the_regression_on_excerpts_equals_one_written_out(pairs):
    model, timesteps = tiny.model(), sampling_timesteps(PAIRS.sampler)
    batch = draw_batch(pairs, INIT, 0, range(4))
    prompts, past = read(model, batch.embeds, batch.excerpts)
    errors = regression_errors(model, batch, timesteps, INIT)
    assert batch.step_BN.shape == errors.shape == (4, 3)
    assert batch.step_BN.unique().tolist() == [0, 1]
    for step, timestep in enumerate(timesteps):
        at = torch.full((4, 9), float(timestep))
        flow = excerpt_flow(model, batch.noisy, at, prompts.by_chunk, past, dtype=torch.float32)
        each = (flow_to_x0(flow, batch.noisy, at) - batch.clean).square()
        expected = torch.stack([part.mean((1, 2, 3, 4)) for part in each.split(F, 2)], dim=1)
        here = batch.step_BN == step
        torch.testing.assert_close(errors[here], expected[here])


def test_the_first_timestep_is_drawn_as_often_as_asked():
    def share(asked: float | None, steps: int = 4) -> float:
        sampler = SamplerConfig(steps=SamplerConfig().steps[:steps])
        found = draw_steps(0, 0, range(400), 3, sampler, asked)
        assert found.min() >= 0 and found.max() <= steps - 1
        return float((found == 0).float().mean())

    assert share(None) == pytest.approx(0.25, abs=0.05)
    assert share(0.4) == pytest.approx(0.4, abs=0.05)
    assert share(1.0) == 1 and share(0.0) == 0 and share(0.4, steps=1) == 1


def test_the_first_chunk_is_shown_at_its_own_timesteps_and_the_others_at_theirs():
    sampler = SamplerConfig(steps=(1000, 500), first_steps=(1000, 750, 250))
    assert student_levels(sampler) == [
        each for each in student_levels(SamplerConfig()) if each in student_levels(sampler)
    ]
    assert len(student_levels(sampler)) == 4  # each once, high to low
    for asked in (None, 0.4):
        found = draw_steps(0, 0, range(200), 3, sampler, asked)
        assert set(found[:, 0].tolist()) == {0, 1, 3} and set(found[:, 1:].unique().tolist()) == {
            0,
            2,
        }


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        (SamplerConfig(steps=(1000, 0)), "sampler.steps end at 0, .* leave it out"),
        (SamplerConfig(first_steps=(1000, 0)), "sampler.first_steps end at 0"),
        (SamplerConfig(rolling=True), "sampler.rolling is on, .* set it to false"),
        (SamplerConfig(clean_timestep=20), "sampler.clean_timestep is 20, .* set it to 0"),
    ],
)
def test_steps_that_trajectories_of_excerpts_cannot_teach_are_refused_by_name(sampler, said):
    with pytest.raises(ValueError, match=said):
        PairsConfig(kind="excerpts", latents=(4, 9, 4, 6), sampler=sampler)
    with pytest.raises(ValueError, match=said):
        ConsistencyConfig(sampler=sampler)


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        (
            {"rebuild": "first", "sink_frames": 0},
            "cache.rebuild is 'first', .* set it to \"never\"",
        ),
        ({"memory_rates": (0.1,)}, r"cache.memory_rates is \(0.1,\), .* set it to \[\]"),
        ({"first_chunk_frames": 1}, "cache.first_chunk_frames is 1, .* set it to null"),
    ],
)
def test_a_past_that_clips_are_not_run_through_is_refused_by_name(cache, said):
    for kind in (InitConfig, ConsistencyConfig):
        with pytest.raises(ValueError, match=said):
            kind(cache=CacheConfig(**cache))


def test_gradients_reach_every_weight_and_the_past(pairs):
    model, batch = tiny.model().requires_grad_(True), draw_batch(pairs, INIT, 0, range(2))
    seen = replace(batch.excerpts, before=batch.excerpts.before.requires_grad_(True))
    timesteps = sampling_timesteps(PAIRS.sampler)
    regression_errors(model, replace(batch, excerpts=seen), timesteps, INIT).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert seen.before.grad is not None and seen.before.grad.abs().sum() > 0


def student(pairs: Pairs, config: InitConfig = INIT) -> InitTrainer:
    network = prepare(tiny.model().requires_grad_(True), config.placement, trained=True)
    shard(network, "cpu", getattr(torch, config.placement.dtype))
    return InitTrainer(replace(config, pairs=pairs.shards[0].parent), network, pairs, CPU)


def teacher(config: TeacherConfig = TEACH, source: Toys = CLIPS) -> TeacherTrainer:
    network = prepare(tiny.model().requires_grad_(True), config.placement, trained=True)
    shard(network, "cpu", getattr(torch, config.placement.dtype))
    return TeacherTrainer(config, network, source, GREY, CPU)


def test_the_student_learns_excerpts(pairs):
    run = student(pairs, replace(INIT, updates=16))
    losses = [run.step().loss for _ in range(16)]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_the_teacher_learns_each_kind_and_tells_their_losses_apart():
    config = replace(TEACH, updates=40, optimiser=replace(MUON, rate=2e-2, matrix_rate=2e-2))
    run = teacher(config)
    kinds = [config.kind_at(update) for update in range(40)]
    assert kinds[:16] == ["opening"] * 16 and kinds[18:21] == ["excerpt", "excerpt", "whole"]
    before = {kind: measured(run, kind) for kind in ("opening", "excerpt", "whole")}
    reports = [run.step() for _ in range(40)]
    assert set(reports[0].losses) == {"opening"} and set(reports[20].losses) == {"whole"}
    assert set(reports[18].losses) == {"opening", "second", "later"}
    for kind, error in before.items():
        assert measured(run, kind) < 0.9 * error, kind


@torch.no_grad()
def measured(run: TeacherTrainer, kind: str) -> float:
    phases = (Phase(until=1.0, kinds=(kind,)),)
    config = replace(run.config, phases=phases, batch=8, opening_batch=8)
    batch = stage.draw_batch(CLIPS, config, 0, 0, range(8))
    return float(teacher_errors(run.network, batch, GREY).mean())


def test_the_teacher_s_error_is_that_of_the_flow_and_dropped_prompts_are_left_out():
    model, (targets, embeds, seen) = tiny.model(), some_excerpts()
    noise, timestep_BN = torch.randn_like(targets), 1000 * torch.rand(4, 3)
    dropped = torch.zeros(4, 3, dtype=torch.bool)
    dropped[1, 2] = True
    batch = TeacherBatch(
        latents=targets,
        noise=noise,
        timestep_BN=timestep_BN,
        dropped_BN=dropped,
        embeds=embeds,
        excerpts=seen,
    )
    found, kept = (
        teacher_errors(model, each, GREY)
        for each in (batch, replace(batch, dropped_BN=torch.zeros_like(dropped)))
    )
    at = timestep_BN.repeat_interleave(F, dim=1)
    noisy = add_noise(targets, noise, at)
    prompts, past = read(model, embeds, seen)
    flow = excerpt_flow(model, noisy, at, prompts.by_chunk, past, dtype=torch.float32)
    parts = (flow - (noise - targets)).square().split(F, 2)
    torch.testing.assert_close(kept, torch.stack([p.mean((1, 2, 3, 4)) for p in parts], dim=1))
    assert torch.equal(found[~dropped], kept[~dropped]) and not torch.equal(found, kept)
    empty = (model.prompt_context(GREY.expand(4, -1, -1)),) * 3  # the past keeps its prompts
    flow = excerpt_flow(model, noisy, at, empty, past, dtype=torch.float32)
    expected = (flow - (noise - targets))[1, :, 2 * F :].square().mean()
    torch.testing.assert_close(found[1, 2], expected)
    whole = replace(batch, excerpts=None, timestep_BN=timestep_BN[:, :1], dropped_BN=dropped[:, :1])
    at = timestep_BN[:, :1].expand(-1, 9)
    flow = model(add_noise(targets, noise, at), at, model.prompt_context(embeds))
    expected = (flow - (noise - targets)).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(teacher_errors(model, whole, GREY)[:, 0], expected)


def test_an_update_s_timesteps_cover_the_range_in_every_part():
    config = replace(TEACH, shift=1.0, batch=8, phases=(Phase(until=1.0, kinds=("excerpt",)),))
    batch = stage.draw_batch(CLIPS, config, 3, 24, range(8))
    for part in (batch.timestep_BN / 125).floor().unbind(1):
        assert sorted(part.tolist()) == list(range(8))
    half = stage.draw_batch(CLIPS, config, 3, 24, [2, 3])
    for name in ("latents", "noise", "timestep_BN", "dropped_BN", "embeds"):
        assert torch.equal(getattr(half, name), getattr(batch, name)[2:4]), name


def weights(run: SupervisedTrainer) -> list[Tensor]:
    return [p.detach().clone() for p in (*run.network.parameters(), *run.average.tensors.values())]


@pytest.mark.parametrize("optimiser", [MUON, OptimiserConfig(rate=1e-3)], ids=["muon", "adamw"])
@pytest.mark.parametrize("made", [teacher, student])
def test_a_resumed_run_goes_on_bit_for_bit(made, optimiser, pairs, tmp_path):
    arguments = (pairs,) if made is student else ()
    config = replace(INIT if made is student else TEACH, optimiser=optimiser, updates=6)
    whole, first, second = (made(*arguments, config) for _ in range(3))
    reports = [whole.step() for _ in range(6)]
    for _ in range(3):
        first.step()
    first.save(tmp_path / "at3")
    second.load(tmp_path / "at3")
    assert [second.step() for _ in range(3)] == reports[3:]
    assert all(map(torch.equal, weights(second), weights(whole)))
    if made is teacher:
        with pytest.raises(ValueError, match="trained on 6 clips; there are 7 now"):
            teacher(config, Toys(count=7)).load(tmp_path / "at3")


@pytest.mark.parametrize("made", [teacher, student])
def test_micro_batches_change_nothing_but_rounding(made, pairs):
    arguments = (pairs,) if made is student else ()
    config = replace(INIT if made is student else TEACH, updates=5)
    one, whole = (made(*arguments, replace(config, micro_batch=size)) for size in (1, 64))
    for _ in range(5):
        first, second = one.step(), whole.step()
        assert first.loss == pytest.approx(second.loss, rel=1e-3)
        assert first.losses == pytest.approx(second.losses, rel=1e-3)


RECOMPUTED = PlacementConfig(checkpointing=True)
CASES = {
    "muon": TEACH,
    "adamw": replace(TEACH, optimiser=OptimiserConfig(rate=1e-3), placement=RECOMPUTED),
    "bfloat16": replace(TEACH, placement=PlacementConfig(dtype="bfloat16", checkpointing=True)),
}
EXCERPT = (Phase(until=1.0, kinds=("excerpt",)),)


def run_rank(rank: int, world: int, folder: Path) -> None:
    """One process: its share of an update on excerpts, of each case, and of the student's."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world
    )
    results = {}
    for case, config in CASES.items():
        run = teacher(replace(config, phases=EXCERPT))
        reports = [run.step() for _ in range(1 if case == "bfloat16" else 2)]
        if case == "muon":
            run.save(folder / "at2")
        whole = get_model_state_dict(
            run.network, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        results[case] = ([(each.loss, each.norm) for each in reports], whole)
    learnt = student(Pairs.open(folder / "pairs")).step()
    results["student"] = ([(learnt.loss, learnt.norm)], {})
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_teach_what_one_does_and_one_goes_on_from_their_checkpoint(tmp_path):
    made_pairs(tmp_path / "pairs")
    spawn(run_rank, (2, tmp_path), nprocs=2)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for case, config in CASES.items():
        run = teacher(replace(config, phases=EXCERPT, placement=PlacementConfig()))
        found, others = results[case]
        exact = case != "bfloat16"
        for numbers in found:
            report = run.step()
            expected = pytest.approx((report.loss, report.norm), rel=1e-3 if exact else 0.1)
            assert numbers == expected, case
        assert exact or found[0][0] != report.loss
        for name, weight in run.network.state_dict().items():
            near = {"atol": 1e-3, "rtol": 1e-2} if exact else {"atol": 2e-2, "rtol": 0.1}
            torch.testing.assert_close(others[name], weight, **near)
        if case == "muon":
            resumed = teacher(replace(config, phases=EXCERPT))
            resumed.load(tmp_path / "at2")
            assert resumed.update == 2
            assert resumed.step().loss == pytest.approx(run.step().loss, rel=1e-3)
    report = student(Pairs.open(tmp_path / "pairs")).step()
    assert results["student"][0][0] == pytest.approx((report.loss, report.norm), rel=1e-3)


def whole_clips(out: Path, config: PairsConfig) -> Path:
    """Trajectories of whole clips, as `ode_pairs` leaves them."""
    out.mkdir()
    for number in range(config.clips // config.shard):
        latents = CLIPS.latents([number, number + 1])[:, :, : config.latents[1]]
        points = torch.stack([latents] * 2, dim=1)
        made = Trajectories(
            points=points.half(),
            clean=points[:, 0].half(),
            embeds=torch.cat([tiny.prompt(number, tokens=4 + number)] * 2),
            prompts=["a", "b"],
            numbers=[0, 1],
        )
        write_shard(shard_path(out, number), made, config, number, Origin(teacher="teacher"))
    return out


WHOLE = replace(PAIRS, kind="clips", latents=(tiny.CONFIG.in_dim, 4 * F, *SIZE), clips=4)


def test_trajectories_of_whole_clips_are_clips_to_cut_from(tmp_path):
    source = open_clips(whole_clips(tmp_path / "pairs", WHOLE), DataConfig(), CPU)
    assert len(source) == 4 and source.shape == WHOLE.latents and list(source.groups) == [range(4)]
    texts, embeds = source.captions([3, 0], [0, 0])
    assert texts == ["b", "a"] and embeds.shape[1] == 5 and not embeds[1, 4:].any()
    assert torch.equal(source.latents([1]), CLIPS.latents([1]).half().float())
    cut = ExcerptIndices(
        clip=0, before=1, switch_clip=3, later=3, switched=True, recached=False, sink_clip=1
    )
    targets, given = gather_excerpts(source, [cut], [[0, 0, 0]], F)
    assert torch.equal(targets[0, :, 2 * F :], CLIPS.latents([2]).half().float()[0, :, 3 * F :])
    assert given.excerpts.later_embeds.shape[1] == 5
    run = TeacherTrainer(
        replace(TEACH, balanced=False), tiny.model().requires_grad_(True), source, GREY, CPU
    )
    assert all(torch.tensor(run.step().loss).isfinite() for _ in range(7))


def test_folders_and_clips_that_do_not_fit_are_refused(tmp_path, pairs):
    def refused(config, said):
        with pytest.raises(ValueError, match=said):
            next(train_teacher(config, tmp_path / "run", CPU))

    weights = tmp_path / "start.safetensors"
    write_checkpoint(weights, tiny.model().state_dict(), tiny.CONFIG, None, None)
    clips = whole_clips(tmp_path / "clips", WHOLE)
    short = replace(WHOLE, latents=(tiny.CONFIG.in_dim, 2 * F, *SIZE))
    fitting = replace(TEACH, start=weights, source=clips)
    refused(replace(fitting, source=tmp_path), r"holds no clips; make some with .*world clips")
    folder = pairs.shards[0].parent
    refused(replace(fitting, source=folder), "trajectories of excerpts; give those of whole clips")
    source = whole_clips(tmp_path / "short", short)
    refused(replace(fitting, source=source), "6 latent frames; an excerpt is cut from 9 or more")
    refused(replace(fitting, start=None), "neither start nor model is given")
    refused(replace(fitting, start=tmp_path / "no"), "which is not there")
    refused(
        replace(fitting, model=replace(tiny.CONFIG, dim=96)), "of other sizes than model; set model"
    )
    thin = replace(tiny.CONFIG, in_dim=8)
    refused(replace(fitting, start=None, model=thin), "latents of 4 channels; the network reads 8")
    named = DataConfig(prompts=(weights,))
    refused(replace(fitting, data=named), "clips have prompts of their own; set data.prompts=")
    refused(replace(fitting, batch=3), "batch of 3 cannot be shared out")

    def pairs_refused(said, **changes):
        config = replace(PAIRS, teacher=weights, source=clips, **changes)
        with pytest.raises(ValueError, match=said):
            next(write_pairs(config, tmp_path / "made", CPU))

    pairs_refused("holds clips of .*: channels, rows and columns", latents=(4, 9, 8, 8))
    pairs_refused("an excerpt is cut from 18 or more", latents=(4, 18, *SIZE))
    pairs_refused("set data.prompts=", data=named)
    with pytest.raises(ValueError, match="give source, a folder of clips"):
        next(write_pairs(replace(PAIRS, teacher=weights), tmp_path / "made", CPU))
    with pytest.raises(ValueError, match="frames; excerpts are 3 chunks"):
        replace(PAIRS, latents=(4, 8, *SIZE))
    other = made_pairs(tmp_path / "other", maker=fingerprint(weights))
    with pytest.raises(ValueError, match=r"source holds 6 clips there and 4 here"):
        next(write_pairs(replace(other, teacher=weights, source=clips), tmp_path / "other", CPU))

    with pytest.raises(ValueError, match="reads 16 channels; the trajectories have 4"):
        next(init_student(replace(INIT, pairs=folder), tmp_path / "run", CPU))
    with pytest.raises(ValueError, match=r"whose past is clean; set context=clean"):
        student(pairs, replace(INIT, context="noisy"))
    with pytest.raises(ValueError, match=r"cache.window_frames is 12; set it to 9"):
        student(pairs, replace(INIT, cache=tiny.window(12, 3)))
    with pytest.raises(ValueError, match=r"cache.sink_frames is 2; set it to 3"):
        student(pairs, replace(INIT, cache=tiny.window(9, 2)))
    with pytest.raises(ValueError, match=r"cache.anchor_frames is 1; set it to 0"):
        student(pairs, replace(INIT, cache=tiny.window(9, 3, anchor_frames=1)))
    with pytest.raises(ValueError, match="give shares that rise to 1"):
        replace(TEACH, phases=())
    with pytest.raises(ValueError, match="a phase has no kinds"):
        replace(TEACH, phases=(Phase(until=1.0, kinds=()),))


def test_presets_survive_json_and_are_the_demo_s_numbers():
    for preset in TEACHER_PRESETS.values():
        assert apply_overrides(preset(), []) == preset()
    made = load_student(DEMO / "teacher.safetensors", device="cpu", dtype=torch.float32)[1]
    told, ours = made.provenance["config"], TEACHER_PRESETS["miniature"]()
    assert ours.model == made.config and ours.updates == made.provenance["steps"]
    assert ours.optimiser.matrix_rate == told["matrix_rate"]
    assert ours.optimiser.rate == told["other_rate"] and ours.shift == told["shift"]
    assert (ours.batch, ours.opening_batch) == (told["whole_batch"], told["opening_batch"])
    made = load_student(DEMO / "student.safetensors", device="cpu", dtype=torch.float32)[1]
    told, init = made.provenance["config"], INIT_PRESETS["miniature"]()
    assert init.updates == made.provenance["steps"] and init.ema == told["ema"]
    assert init.optimiser.matrix_rate == told["matrix_rate"] and init.batch == told["batch"]
    assert init.first_step_share == told["first_step_share"]


def test_the_miniature_goes_from_clips_to_a_student(tmp_path, capsys):
    latents = torch.randn(4, 16, 9, 8, 8, generator=seeded_generator("clips")).half()
    clips, runs = tmp_path / "clips", {name: tmp_path / name for name in ("t", "p", "i")}
    clips.mkdir()
    note = json.dumps({"seed": 1, "start": 0})
    save_file({"latents": latents}, clips / "clips-000000.safetensors", {"clips": note})

    def called(command: str, *settings: object) -> int:
        words = [word for each in settings for word in ("--set", str(each))]
        out = {"teacher": "t", "ode_pairs": "p", "ode_init": "i"}[command]
        more = ["--pairs", str(runs["p"])] if command == "ode_init" else []
        return main([command, "--out", str(runs[out]), "--device", "cpu", *more, *words])

    short = ("tensorboard=false", "batch=2", "micro_batch=2", "updates=4", "checkpoint_every=2")
    small = ("model.dim=32", "model.ffn_dim=32", "model.num_layers=2")
    teach = (f"source={clips}", *short, "opening_batch=2", *small)
    assert called("teacher", *teach) == 0
    assert called("teacher", *teach) == 1 and "--resume it" in capsys.readouterr().err
    lines = read_journal(runs["t"] / "log.jsonl")
    assert [line["update"] for line in lines] == [0, 1, 2, 3] and "loss/whole" in lines[2]
    assert [line.get("checkpoint") for line in lines] == [
        *(None, "update_000002"),
        *(None, "update_000004"),
    ]
    weights = runs["t"] / "teacher.safetensors"
    _, found = load_student(weights, device="cpu", dtype=torch.float32)
    assert not found.causal and found.size == (64, 64) and found.provenance["updates"] == 4
    assert found.provenance["clips"] == 4

    cut = (f"source={clips}", f"teacher={weights}", "clips=4", "shard=2", "steps=2")
    assert called("ode_pairs", *cut) == 0
    before = {path: path.read_bytes() for path in runs["p"].glob("pairs-*")}
    shard_path(runs["p"], 1).unlink()  # as after a kill
    assert called("ode_pairs", *cut) == 0
    assert {path: path.read_bytes() for path in runs["p"].glob("pairs-*")} == before
    assert called("ode_init", f"start={weights}", *short) == 0
    network, found = load_student(
        runs["i"] / "student.safetensors", device="cpu", dtype=torch.float32
    )
    assert found.causal and found.sampler == SamplerConfig() and found.cache == CacheConfig()
    assert all(p.isfinite().all() for p in network.parameters())
    assert called("ode_pairs", *cut, f"teacher={tmp_path / 'none'}") == 1
