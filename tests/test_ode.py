"""The two stages before Re-DMD: the teacher's trajectories, and the regression on them."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from processes import spawn
from reference import Reference
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import training.__main__ as training
from rf_core.attention import sdpa
from rf_core.config import CacheConfig, Grid, SamplerConfig
from rf_core.kv_cache import KVCache
from rf_core.options import DEMO
from rf_core.rope import apply_rope, rope_table
from rf_core.scheduler import euler_levels, flow_to_x0, integrate, sampling_timesteps
from rf_core.stream import Stream
from rf_core.weights.checkpoint import load_student, write_checkpoint
from rf_core.weights.files import read_json
from training.data.embeddings import MemoryEmbeds
from training.data.pairs import Origin, Pairs, PairsConfig, Trajectories, shard_path, write_shard
from training.data.prompts import DataConfig
from training.objective.causal import Window, predict_clip
from training.run.config import apply_overrides
from training.run.distributed import shard
from training.run.journal import read_journal
from training.run.networks import PlacementConfig, prepare
from training.stages.regression import (
    INIT_PRESETS,
    Batch,
    InitConfig,
    InitTrainer,
    add_init_arguments,
    draw_batch,
    init_student,
    regression_errors,
    run_init,
    select_steps,
)
from training.stages.trainer import OptimiserConfig
from training.stages.trajectories import (
    PAIRS_PRESETS,
    add_pairs_arguments,
    levels_of,
    make_shard,
    prompt_conditions,
    run_pairs,
    sample_trajectories,
    student_levels,
    write_pairs,
)

CPU = torch.device("cpu")
FRAMES, SIZE = 12, (4, 6)
GRID = Grid(height=2, width=3)  # of a latent frame of that size
TOKENS = GRID.frame_tokens
PAIRS = PairsConfig(
    sampler=tiny.TWO_STEPS,
    latents=(tiny.CONFIG.in_dim, FRAMES, *SIZE),
    clips=6,
    shard=2,
    stored="float16",
)
MAKER = Origin(teacher="teacher")
INIT = InitConfig(
    cache=tiny.window(6, 2, decay=0.9),
    optimiser=OptimiserConfig(rate=1e-3, betas=(0.9, 0.999)),
    updates=4,
    batch=4,
    micro_batch=2,
    ema=0.5,
    ema_from=1,
    tensorboard=False,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of made-up trajectories, with prompts of unequal length."""
    out = tmp_path / "pairs"
    out.mkdir()
    for number in range(PAIRS.clips // PAIRS.shard):
        write_shard(shard_path(out, number), trajectories(number), PAIRS, number, MAKER)
    return out


def trajectories(seed: int) -> Trajectories:
    generator = torch.Generator().manual_seed(seed)
    shape = (PAIRS.shard, len(PAIRS.sampler.steps) + 1, *PAIRS.latents)
    *points, clean = torch.randn(shape, generator=generator).half().unbind(1)
    return Trajectories(
        points=torch.stack(points, dim=1),
        clean=clean,
        embeds=tiny.prompt(seed, tokens=4 + seed, batch=PAIRS.shard),
        prompts=[f"{seed} {place}" for place in range(PAIRS.shard)],
        numbers=[PAIRS.shard * seed + place for place in range(PAIRS.shard)],
    )


def trainer(folder: Path, config: InitConfig = INIT) -> InitTrainer:
    student = prepare(tiny.model().requires_grad_(True), config.placement, trained=True)
    shard(student, "cpu", getattr(torch, config.placement.dtype))
    return InitTrainer(replace(config, pairs=folder), student, Pairs.open(folder), CPU)


def weights(run: InitTrainer) -> list[Tensor]:
    return [p.detach().clone() for p in (*run.network.parameters(), *run.average.tensors.values())]


def clip(seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps a frame that differ between chunks, clean latents, embeddings."""
    generator = torch.Generator().manual_seed(seed)
    noisy, clean = torch.randn(2, batch, tiny.CONFIG.in_dim, FRAMES, *SIZE, generator=generator)
    timestep_BN = 1000 * torch.rand(batch, FRAMES // 3, generator=generator)
    return noisy, timestep_BN.repeat_interleave(3, dim=1), clean, tiny.prompt(batch=batch)


def test_the_student_s_timesteps_are_levels_of_the_teacher_s_grid_and_none_is_doubled():
    config = PairsConfig()
    published, plain = levels_of(config), levels_of(replace(config, shift=5.0))
    wanted = student_levels(config.sampler)
    assert torch.equal(
        (torch.tensor(wanted).double() * 1000).float(), sampling_timesteps(config.sampler)
    )
    assert len(plain) == 49 and [plain[step] for step in (0, 12, 24, 36)] == wanted
    assert len(published) == 52 and set(wanted) < set(published)
    for levels in (published, plain):
        assert levels[0] == 1 and levels[-1] == 0 and levels == sorted(set(levels), reverse=True)
    assert published[1] == pytest.approx(8 * (47 / 48) / (1 + 7 * (47 / 48)))


def test_points_lie_on_the_trajectory_where_the_student_will_be():
    noise, x0 = torch.randn(2, 3, 4, 6, *SIZE, generator=torch.Generator().manual_seed(0)).double()
    levels, kept = levels_of(PAIRS), student_levels(PAIRS.sampler)
    end, points = integrate(lambda x, level: noise - x0, noise, levels, kept)
    torch.testing.assert_close(end, x0)
    for point, level in zip(points, kept, strict=True):
        torch.testing.assert_close(point, (1 - level) * x0 + level * noise)
    curved, _ = integrate(lambda x, level: x, noise, levels_of(replace(PAIRS, steps=2000)), kept)
    torch.testing.assert_close(curved, noise * torch.e**-1, rtol=3e-3, atol=0)


def test_a_trajectory_through_given_levels_is_the_same_walk_with_more_steps():
    assert euler_levels(2, 1.0) == [1.0, 0.5, 0.0]
    assert euler_levels(2, 1.0, [0.5, 0.75]) == [1.0, 0.75, 0.5, 0.0]
    model, noise = tiny.model(), clip()[0][:, :, :3]
    prompt = model.prompt_context(tiny.prompt(batch=2))

    def flow(x: Tensor, level: float) -> Tensor:
        return model(x, torch.full((2, 3), 1000 * level), prompt)

    end, (middle,) = integrate(flow, noise, euler_levels(2, 1.0), [0.5])
    half = noise - 0.5 * flow(noise, 1.0)
    torch.testing.assert_close(middle, half)
    torch.testing.assert_close(end, half - 0.5 * flow(half, 0.5))


def test_guidance_is_the_unconditional_flow_plus_s_times_the_difference():
    teacher, noise = tiny.model(seed=1), clip()[0][:, :, :3]
    config = replace(PAIRS, steps=2, shift=1.0, guidance=3.0, sampler=SamplerConfig(shift=1.0))
    cond, uncond = tiny.prompt(1, batch=2), tiny.prompt(9)
    points, end = sample_trajectories(teacher, noise, cond, uncond, config)

    def flow(x: Tensor, level: float, embeds: Tensor) -> Tensor:
        at = torch.full((2, 3), 1000 * level)
        return teacher(x, at, teacher.prompt_context(embeds))

    x, passed = noise, []
    for level in (1.0, 0.75, 0.5, 0.25):  # the grid has 1 and 0.5, the student adds the others
        passed.append(x)
        plain = flow(x, level, uncond.expand(2, -1, -1))
        x = x - 0.25 * (plain + 3 * (flow(x, level, cond) - plain))
    torch.testing.assert_close(end, x)
    torch.testing.assert_close(points, torch.stack(passed, dim=1))
    unguided = sample_trajectories(teacher, noise, cond, uncond, replace(config, guidance=1.0))[1]
    without = sample_trajectories(teacher, noise, cond, 0 * uncond, replace(config, guidance=1.0))[
        1
    ]
    assert torch.equal(unguided, without) and not torch.allclose(unguided, end)


def test_a_shard_does_not_depend_on_the_batch_nor_on_the_other_shards():
    teacher, embeds = tiny.model(seed=1), MemoryEmbeds(tiny.prompt(batch=3))
    config = replace(PAIRS, steps=2, latents=(4, 3, *SIZE))
    made = [
        make_shard(
            teacher, prompt_conditions(["a", "b", "c"], embeds, each), tiny.prompt(9), each, number
        )
        for each, number in (
            (config, 1),
            (replace(config, batch=2), 1),
            (config, 0),
            (replace(config, seed=1), 1),
        )
    ]
    one, batched, first, seeded = made
    assert one.prompts == batched.prompts and one.clean.dtype == torch.float16
    torch.testing.assert_close(one.clean, batched.clean, atol=2e-3, rtol=2e-3)
    assert torch.equal(one.points[:, 0], batched.points[:, 0])  # the noise
    for other in (first, seeded):
        assert not torch.equal(one.points[:, 0], other.points[:, 0])
    assert len({*first.numbers, one.numbers[0]}) == 3  # every prompt, before one comes again


def test_latents_that_overflow_are_not_stored():
    teacher = tiny.model(seed=1)
    teacher.head.head.bias.fill_(1e6)
    config = replace(PAIRS, steps=2, latents=(4, 3, *SIZE))
    begin = prompt_conditions(["a"], MemoryEmbeds(tiny.prompt()), config)
    arguments = (teacher, begin, tiny.prompt(9))
    with pytest.raises(FloatingPointError, match=r"not finite in float16.* set stored=bfloat16"):
        make_shard(*arguments, config, 0)
    assert make_shard(*arguments, replace(config, stored="bfloat16"), 0).clean.isfinite().all()


def test_trajectories_are_read_as_they_were_stored(folder):
    pairs = Pairs.open(folder)
    rows, made = pairs.rows([5, 0]), (trajectories(2), trajectories(0))
    assert len(pairs) == 6 and pairs.config == PAIRS
    assert rows.prompts == ["2 1", "0 0"] and rows.numbers == [5, 0]
    for name in ("points", "clean"):
        expected = torch.stack([getattr(made[0], name)[1], getattr(made[1], name)[0]])
        assert torch.equal(getattr(rows, name), expected)
    assert rows.embeds.shape[1] == 6 and torch.equal(rows.embeds[1, :4], made[1].embeds[0])
    assert not rows.embeds[1, 4:].any()


def test_a_copy_of_a_shard_is_no_shard(folder):
    whole = Pairs.open(folder)
    for name in ("pairs-000000 (copy)", "pairs-000000_backup", "pairs-1", "pairs-0000001"):
        shutil.copy(whole.shards[0], folder / f"{name}.safetensors")
    assert Pairs.open(folder).shards == whole.shards


def test_a_half_written_shard_is_never_taken_for_one(tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise OSError("killed")

    monkeypatch.setattr("pathlib.Path.replace", killed)
    monkeypatch.setattr(
        "pathlib.Path.unlink", lambda *_, **__: None
    )  # who is killed tidies nothing
    with pytest.raises(OSError, match="killed"):
        write_shard(shard_path(tmp_path, 0), trajectories(0), PAIRS, 0, MAKER)
    assert list(tmp_path.iterdir())  # something was written
    with pytest.raises(ValueError, match="holds no trajectories; make some"):
        Pairs.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"guidance": 3.0}, "guidance is 6.0 there and 3.0 here"),
        ({"sampler": SamplerConfig()}, r"sampler.steps is \[1000, 500\] there and \[1000, 750"),
        ({"placement": PlacementConfig(dtype="float32")}, "teacher's weights are"),
        ({"clips": 7}, "clips is 7; give whole shards of 2, such as 8"),
        ({"steps": 0}, "steps is 0; give a number from 1"),
        ({"shift": 0.0}, "shift is 0.0; give a number from 0.01"),
        ({"teacher": Path("nowhere.safetensors")}, "teacher is nowhere.safetensors, which is not"),
        ({"data": DataConfig(prompts=(Path("none.txt"),))}, "data.prompts names none.txt"),
    ],
)
def test_pairs_of_another_config_and_impossible_ones_are_refused_by_name(folder, change, said):
    with pytest.raises(ValueError, match=said):
        next(write_pairs(replace(PAIRS, **change), folder, CPU))


def masked_pass(model, noisy, timestep_BF, embeds):
    """One pass over the whole clip, in which no token sees a later chunk."""
    chunk_of = torch.arange(FRAMES * TOKENS) // (3 * TOKENS)
    mask = chunk_of[:, None] >= chunk_of[None, :]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[1] != len(mask):
            return sdpa(q, k, v)
        scores = torch.einsum("blhd,bshd->bhls", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~mask, -torch.inf)
        return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v)

    flow = model(noisy, timestep_BF, model.prompt_context(embeds), attention=attention)
    return flow_to_x0(flow, noisy, timestep_BF)


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def test_in_a_window_as_long_as_the_clip_it_is_one_masked_pass_gradients_included():
    model, (noisy, timestep_BF, clean, embeds) = tiny.model().requires_grad_(True), clip()
    noisy.requires_grad_()
    config = replace(INIT, cache=tiny.window(FRAMES, 3))
    steps = timestep_BF[:, ::3].argsort(dim=1)  # every chunk another one of four timesteps
    table = torch.tensor([900.0, 700.0, 400.0, 100.0])
    timestep_BF = table[steps].repeat_interleave(3, dim=1)
    batch = Batch(noisy=noisy, step_BN=steps, clean=clean, embeds=embeds)
    errors = regression_errors(model, batch, table, config)
    x0 = masked_pass(model, noisy, timestep_BF, embeds)
    expected = [(x0 - clean)[:, :, i : i + 3].square().mean((1, 2, 3, 4)) for i in (0, 3, 6, 9)]
    torch.testing.assert_close(errors, torch.stack(expected, dim=1), atol=1e-5, rtol=1e-5)
    every = [noisy, *model.parameters()]
    for found, wanted in zip(
        gradients(errors.mean(), *every),
        gradients((x0 - clean).square().mean(), *every),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)


CACHES = {
    "no sink": tiny.window(6, 0),
    "averaged": tiny.window(9, 3, decay=0.9),
    "static": tiny.window(6, 3, decay=1.0),
    "short sink": tiny.window(6, 2, decay=0.9),
    "long sink": tiny.window(9, 4, decay=0.9),
    "part of a chunk leaves": tiny.window(8, 3, decay=0.9),
    "its own time": tiny.window(6, 3, decay=0.9, positions="absolute"),
    "a frame at a time": tiny.window(4, 2, chunk=1, decay=0.9, positions="absolute"),
    "beside an anchor": tiny.window(6, 2, decay=0.9, anchor_frames=1, accumulator="float32"),
    "beside an anchor, their own time": tiny.window(
        7, 1, decay=0.9, anchor_frames=2, positions="absolute"
    ),
    "lengths kept": tiny.window(6, 3, decay=0.9, keep_key_norms=True),
    "exact": tiny.window(6, 3, decay=0.9, accumulator="float32"),
    "exact, lengths kept": tiny.window(6, 3, decay=0.9, accumulator="float32", keep_key_norms=True),
}


def new_cache(config: CacheConfig, dtype: torch.dtype, batch: int = 2) -> KVCache:
    sizes = tiny.CONFIG
    return KVCache.allocate(
        config,
        num_layers=sizes.num_layers,
        batch=batch,
        grid=GRID,
        num_heads=sizes.num_heads,
        head_dim=sizes.head_dim,
        dtype=dtype,
        device="cpu",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CACHES.values(), ids=CACHES)
@torch.no_grad()
def test_each_chunk_reads_to_the_bit_what_the_streaming_cache_would_hold(config, dtype):
    model, (noisy, timestep_BF, _, embeds) = tiny.model().to(dtype), clip()
    prompt, cache = model.prompt_context(embeds.to(dtype)), new_cache(config, dtype)
    window, size = Window.empty(config, tiny.CONFIG.num_layers, GRID), config.chunk_frames
    for x, at in zip(noisy.to(dtype).split(size, 2), timestep_BF.split(size, 1), strict=True):
        cache.advance()
        model(x, at, prompt, cache)
        window = window.evicted()
        chunk_kv = window.chunk_kv()
        model(x, at, prompt, chunk_kv)
        assert chunk_kv.context_frames == cache.context_frames
        held = cache.num_frames * TOKENS
        for layer in range(tiny.CONFIG.num_layers):
            k, v = chunk_kv.own[layer]
            rope = rope_table(9, GRID, tiny.CONFIG.head_dim).tokens(held - size * TOKENS, held)
            rotated, v = chunk_kv.layer(layer).extend(k, apply_rope(k, rope), v)
            assert torch.equal(rotated, cache.rotated_NBWHD[layer, :, :held])
            assert torch.equal(v, cache.v_NBWHD[layer, :, :held])
        window = window.appended(chunk_kv)
    assert cache.num_evictions > 0


@pytest.mark.parametrize("context", ["noisy", "clean"])
def test_values_and_gradients_are_those_of_the_slow_reference_across_evictions(context):
    config = tiny.window(6, 2, decay=0.75)
    model, (noisy, timestep_BF, clean, embeds) = tiny.model().requires_grad_(True), clip()
    given = clean if context == "clean" else None
    prompt = model.prompt_context(embeds)
    x0 = predict_clip(model, noisy, timestep_BF, prompt, config, clean=given)
    plain = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    slow, parts = Reference(plain, tiny.CONFIG, config, tiny.TWO_STEPS), []
    chunks = zip(noisy.split(3, 2), timestep_BF.split(3, 1), clean.split(3, 2), strict=True)
    for x, at, known in chunks:
        slow.advance(3)
        flow = slow.flow(x, at, embeds, keep=given is None)
        parts.append(x - at[:, None, :, None, None] / 1000 * flow)
        if given is not None:
            slow.flow(known, torch.zeros_like(at), embeds, keep=True)
    expected = torch.cat(parts, dim=2)
    torch.testing.assert_close(x0, expected, atol=1e-4, rtol=1e-4)
    found = torch.autograd.grad((x0 - clean).square().mean(), list(model.parameters()))
    wanted = torch.autograd.grad((expected - clean).square().mean(), list(plain.values()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_a_chunk_s_error_reaches_the_earlier_chunks_it_saw_and_no_others():
    model, (noisy, timestep_BF, clean, embeds) = tiny.model(), clip()
    prompt = model.prompt_context(embeds)

    def felt(config: CacheConfig, given: Tensor | None, asked: Tensor) -> list[bool]:
        x0 = predict_clip(model, noisy, timestep_BF, prompt, config, clean=given)
        (grad,) = torch.autograd.grad(x0[:, :, 6:9].square().sum(), asked)
        return [bool(part.any()) for part in grad.split(3, 2)]

    noisy.requires_grad_(), clean.requires_grad_()
    wide, narrow = tiny.window(FRAMES, 3), tiny.window(3, 0)
    assert felt(wide, None, noisy) == [True, True, True, False]
    assert felt(narrow, None, noisy) == [False, False, True, False]
    assert felt(wide, clean, noisy) == [False, False, True, False]
    assert felt(wide, clean, clean) == [True, True, False, False]
    # The first chunk has left the window, and lives on in the sink alone.
    assert felt(tiny.window(3, 0), clean, clean) == [False] * 4
    assert felt(tiny.window(4, 1, decay=0.9), clean, clean) == [True, True, False, False]


@pytest.mark.parametrize("context", ["noisy", "clean"])
def test_recomputed_blocks_leave_gradients_as_they_are(context):
    noisy, timestep_BF, clean, embeds = clip()
    found = []
    for placement in (PlacementConfig(), PlacementConfig(checkpointing=True)):
        model = prepare(tiny.model().requires_grad_(True), placement, trained=True)
        x0 = predict_clip(
            model,
            noisy,
            timestep_BF,
            model.prompt_context(embeds),
            tiny.window(6, 2, decay=0.75),
            clean=clean if context == "clean" else None,
        )
        loss = (x0 - clean).square().mean()
        found.append(gradients(loss, *model.parameters()))
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


def test_every_chunk_is_shown_at_a_timestep_of_its_own_whoever_draws_it(folder):
    pairs = Pairs.open(folder)
    batches = [draw_batch(pairs, INIT, update, range(4)) for update in range(6)]
    half = draw_batch(pairs, INIT, 2, [2, 3])
    for name in ("noisy", "step_BN", "clean"):
        assert torch.equal(getattr(half, name), getattr(batches[2], name)[2:])
    steps = torch.stack([batch.step_BN for batch in batches])
    assert steps.unique().tolist() == [0, 1] and not (steps == steps[..., :1]).all()
    assert not torch.equal(steps[0], steps[1])
    shown = torch.cat([batch.clean for batch in batches])
    for epoch in shown.split(6):  # every clip once, then again in another order
        assert len({each.numpy().tobytes() for each in epoch}) == 6
    assert not torch.equal(shown[:6], shown[6:12])
    points = torch.randn(2, 3, 4, 6, 1, 1)
    mixed = select_steps(points, torch.tensor([[2, 0], [1, 1]]), 3)
    assert torch.equal(mixed[0, :, :3], points[0, 2, :, :3])
    assert torch.equal(mixed[0, :, 3:], points[0, 0, :, 3:])
    assert torch.equal(mixed[1], points[1, 1])


@pytest.mark.parametrize("context", ["noisy", "clean"])
def test_micro_batches_change_nothing_but_rounding(folder, context):
    runs = [
        trainer(folder, replace(INIT, context=context, micro_batch=size))
        for size in (1, INIT.batch)
    ]
    one, whole = ([run.step() for _ in range(2)] for run in runs)
    for first, second in zip(one, whole, strict=True):
        assert first.loss == pytest.approx(second.loss, rel=1e-5)
        assert first.norm == pytest.approx(second.norm, rel=1e-3)
        assert first.losses == pytest.approx(second.losses, rel=1e-4)


def test_a_report_tells_the_loss_at_each_timestep(folder):
    run = trainer(folder)
    batch = draw_batch(run.pairs, INIT, 0, range(4))
    with torch.no_grad():
        errors = regression_errors(run.network, batch, run.timesteps, INIT)
    report = run.step()
    assert report.loss == pytest.approx(float(errors.mean()), rel=1e-5)
    for number, name in enumerate(("1000", "833")):
        expected = float(errors[batch.step_BN == number].mean())
        assert report.losses[f"t{name}"] == pytest.approx(expected, rel=1e-5)
        assert report.numbers()[f"loss/t{name}"] == report.losses[f"t{name}"]


def test_the_student_learns_the_trajectories(folder):
    run = trainer(folder, replace(INIT, optimiser=OptimiserConfig(rate=1e-2, betas=(0.9, 0.99))))
    losses = [run.step().loss for _ in range(12)]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_a_resumed_regression_goes_on_bit_for_bit(folder, tmp_path):
    whole, first, second = (trainer(folder) for _ in range(3))
    reports = [whole.step() for _ in range(4)]
    first.step(), first.step()
    first.save(tmp_path / "at2")
    second.load(tmp_path / "at2")
    assert [second.step() for _ in range(2)] == reports[2:]
    assert all(map(torch.equal, weights(second), weights(whole)))
    write_shard(shard_path(folder, 3), trajectories(3), PAIRS, 3, MAKER)
    with pytest.raises(ValueError, match=r"trained on 6 clips; there are 8 now"):
        trainer(folder).load(tmp_path / "at2")


def test_a_regression_that_breaks_down_says_so(folder):
    run = trainer(folder)
    with torch.no_grad():
        run.network.head.head.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"loss is nan at update 0; lower optimiser\.rate"):
        run.step()


def test_impossible_regressions_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"have 12 latent frames; set cache\.chunk_frames, now 5"):
        trainer(folder, replace(INIT, cache=tiny.window(10, 0, chunk=5)))
    with pytest.raises(ValueError, match="12 latent frames is not whole chunks of 5"):
        predict_clip(tiny.model(), *clip()[:2], (), tiny.window(10, 0, chunk=5))
    with pytest.raises(ValueError, match="batch of 4 cannot be shared out in micro-batches of 3"):
        trainer(folder, replace(INIT, micro_batch=3))
    with pytest.raises(ValueError, match="updates is 0; give a number from 1"):
        replace(INIT, updates=0)
    with pytest.raises(ValueError, match="ema is 1"):
        replace(INIT, ema=1.0)
    with pytest.raises(ValueError, match=r"start is nowhere\.safetensors, which is not there"):
        next(init_student(replace(INIT, start=Path("nowhere.safetensors")), tmp_path, CPU))
    with pytest.raises(ValueError, match="holds no trajectories"):
        next(init_student(replace(INIT, pairs=tmp_path / "none"), tmp_path, CPU))
    write_shard(shard_path(folder, 3), trajectories(3), replace(PAIRS, seed=5), 3, MAKER)
    with pytest.raises(ValueError, match=r"pairs-000003.*: seed is 5 there and 0 here"):
        Pairs.open(folder)


def test_presets_are_the_published_numbers_and_survive_json():
    for preset in (*PAIRS_PRESETS.values(), *INIT_PRESETS.values()):
        assert apply_overrides(preset(), []) == preset()
    pairs, init = PAIRS_PRESETS["wan"](), INIT_PRESETS["wan"]()
    assert (pairs.steps, pairs.shift, pairs.guidance, pairs.clips) == (48, 8.0, 6.0, 16000)
    assert pairs.latents == (16, 21, 60, 104) and init.optimiser.rate == 2e-6
    assert init.context == "noisy" and init.cache == CacheConfig()


TEACHER = replace(tiny.CONFIG, in_dim=16, out_dim=16, text_dim=64, text_len=96)  # the demo's text
SHARED = replace(PAIRS, latents=(16, 3, *SIZE), steps=2, clips=3, shard=1)
SMALL = replace(INIT, batch=2, micro_batch=1)
RECOMPUTED = PlacementConfig(checkpointing=True)
CASES = {
    "noisy": SMALL,
    "clean": replace(SMALL, context="clean", placement=RECOMPUTED),
    "bfloat16": replace(SMALL, placement=replace(RECOMPUTED, dtype="bfloat16")),
}


def shared(here: Path) -> PairsConfig:
    """A few trajectories of a tiny teacher, whose prompts the demo's encoder reads."""
    prompts = here / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("a red square\na blue circle\na green square\n")
    return replace(
        SHARED,
        teacher=here / "teacher.safetensors",
        data=DataConfig(prompts=(prompts,), cache=here / "embeds"),
    )


def run_rank(rank: int, world: int, folder: Path) -> None:
    """One process: its share of some trajectories, and of the regressions of `CASES`."""
    torch.set_num_threads(1)
    meet = f"file://{folder.parent / 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    counts = list(write_pairs(shared(folder.parent), folder.parent / "shared", CPU))
    results = {}
    for case, config in CASES.items():
        run = trainer(folder, config)
        report = run.step()
        if case == "noisy":
            run.save(folder.parent / "at1")
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole = get_model_state_dict(run.network, options=options)
        results[case] = ((report.loss, report.norm), whole)
    if rank == 0:
        torch.save((counts, results), folder.parent / "results.pt")
    dist.barrier()  # none goes while another may still be at work with it
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_one_goes_on_from_their_checkpoint(folder):
    here = folder.parent
    write_checkpoint(
        here / "teacher.safetensors", tiny.model(TEACHER).state_dict(), TEACHER, None, None
    )
    config = shared(here)
    list(write_pairs(config, here / "alone", CPU))
    spawn(run_rank, (2, folder), nprocs=2)
    counts, results = torch.load(here / "results.pt", weights_only=True)

    assert counts == [0, 2, 3]  # in the last round the second process runs along
    assert list(write_pairs(config, here / "shared", CPU)) == [3]
    both, alone = (Pairs.open(here / name).rows(range(3)) for name in ("shared", "alone"))
    moved = (here / "teacher.safetensors").rename(here / "moved.safetensors")
    longer = replace(config, clips=4, batch=2, teacher=moved)
    assert list(write_pairs(longer, here / "alone", CPU)) == [3, 4]
    assert both.prompts == alone.prompts and len(set(both.prompts)) == 3
    torch.testing.assert_close(both.points, alone.points, atol=2e-3, rtol=2e-3)

    for case, setting in CASES.items():
        run = trainer(folder, replace(setting, placement=PlacementConfig()))
        report = run.step()
        found, others = results[case]
        exact = case != "bfloat16"
        assert found == pytest.approx((report.loss, report.norm), rel=1e-4 if exact else 0.1), case
        assert exact or found[0] != report.loss
        for name, weight in run.network.state_dict().items():
            near = {"atol": 3e-4, "rtol": 1e-2} if exact else {"atol": 5e-3, "rtol": 0.1}
            torch.testing.assert_close(others[name], weight, **near)
        if case == "noisy":
            resumed = trainer(folder, setting)
            resumed.load(here / "at1")
            assert resumed.update == 1
            assert resumed.step().loss == pytest.approx(run.step().loss, rel=1e-3)


def called(add, run, *words: object) -> int:
    parser = argparse.ArgumentParser()
    add(parser)
    return run(parser.parse_args([*map(str, words), "--device", "cpu"]))


def test_the_miniature_goes_from_trajectories_to_a_student_that_streams(tmp_path, capsys):
    def settings(*words: str) -> list[str]:
        return [part for word in words for part in ("--set", word)]

    pairs, out, prompts = tmp_path / "pairs", tmp_path / "init", tmp_path / "prompts.txt"
    prompts.write_text("a red square\na blue circle moves left\n")
    small = settings("clips=4", "shard=2", "batch=2", "steps=2", "latents=[16, 6, 8, 8]")
    small += settings("kind=clips", "source=null")
    small += settings(f"data.prompts={json.dumps([str(prompts)])}")
    assert called(add_pairs_arguments, run_pairs, "--out", pairs, *small) == 0
    assert '"guidance": 2.0' in capsys.readouterr().out
    before = {path: path.read_bytes() for path in pairs.glob("pairs-*")}
    shard_path(pairs, 1).unlink()  # as after a kill
    assert called(add_pairs_arguments, run_pairs, "--out", pairs, *small) == 0
    assert {path: path.read_bytes() for path in pairs.glob("pairs-*")} == before and len(
        before
    ) == 2
    with pytest.raises(ValueError, match=r"guidance is 2\.0 there and 3\.0 here"):
        called(add_pairs_arguments, run_pairs, "--out", pairs, *small, "--set", "guidance=3")

    short = ["--pairs", pairs, *settings("updates=2", "batch=2", "micro_batch=1", "context=noisy")]
    short += settings("checkpoint_every=1", "keep=1", "tensorboard=false", "ema_from=0")
    short += settings("cache.window_frames=3", "cache.sink_frames=0")  # the first chunk leaves
    assert called(add_init_arguments, run_init, "--out", out, *short) == 0
    assert [path.name for path in out.glob("update_*")] == ["update_000002"]
    assert [line["update"] for line in read_journal(out / "log.jsonl")] == [0, 1]
    with pytest.raises(ValueError, match="holds a run at update 2; --resume it"):
        called(add_init_arguments, run_init, "--out", out, *short)
    other = [*short, "--resume", "--set", "seed=3"]
    with pytest.raises(ValueError, match=r"seed is 0 there and 3 here.*What may change: updates"):
        called(add_init_arguments, run_init, "--out", out, *other)

    config = apply_overrides(
        replace(INIT_PRESETS["miniature"](), pairs=pairs), [w for w in short[2:] if w != "--set"]
    )
    begun = init_student(config, tmp_path / "cut", CPU)
    next(begun)
    begun.close()
    assert [r.update for r in init_student(config, tmp_path / "cut", CPU, resume=True)] == [1]
    whole, found = load_student(out / "student.safetensors", device="cpu", dtype=torch.float32)
    cut, _ = load_student(
        tmp_path / "cut" / "student.safetensors", device="cpu", dtype=torch.float32
    )
    assert all(map(torch.equal, whole.state_dict().values(), cut.state_dict().values()))

    assert found.causal and found.size == (64, 64) and found.cache == config.cache
    assert found.sampler == SamplerConfig() and found.provenance["updates"] == 2
    assert found.provenance["pairs"]["config"]["steps"] == 2
    start, _ = load_student(DEMO / "teacher.safetensors", device="cpu", dtype=torch.float32)
    change = whole.blocks[0].ffn[0].weight - start.blocks[0].ffn[0].weight
    assert 0 < change.abs().max() < 1e-2
    embeds = Pairs.open(pairs).rows([0]).embeds
    stream = Stream(whole, embeds, height=64, width=64, cache=found.cache, sampler=found.sampler)
    assert stream.step().latents.isfinite().all()

    again = tmp_path / "again.safetensors"
    assert training.main(["export", str(out), str(again), "--dtype", "float32"]) == 0
    exported, settings_of = load_student(again, device="cpu", dtype=torch.float32)
    assert all(map(torch.equal, whole.state_dict().values(), exported.state_dict().values()))
    for name in ("cache", "sampler", "size", "provenance"):
        assert getattr(settings_of, name) == getattr(found, name), name
    trained = ["export", str(out), str(again), "--weights", "student", "--dtype", "float32"]
    assert training.main(trained) == 0
    (out / "config.json").write_text(  # of before a folder named its recipe
        json.dumps({k: v for k, v in read_json(out / "config.json").items() if k != "recipe"})
    )
    assert training.main(trained) == 0
    capsys.readouterr()
    for folder, more, named in (
        (pairs, [], "holds trajectories; ode_init makes a student of them"),
        (out, ["--adapter"], "is a run of ode_init, which trains no adapter"),
        (prompts.parent, [], "holds no run"),
    ):
        assert training.main(["export", str(folder), str(again), *more]) == 1
        assert named in capsys.readouterr().err
    (out / "student.safetensors").unlink()
    assert training.main(["export", str(out), str(again)]) == 1
    assert "--resume the run" in capsys.readouterr().err

    taught = settings(
        "updates=1", "batch=2", "micro_batch=2", "tensorboard=false", "balanced=false"
    )
    taught += settings(f"source={pairs}", "model=null", f"start={DEMO / 'teacher.safetensors'}")
    taught += settings('phases=[{"until": 1.0, "kinds": ["whole"]}]', "chunk_frames=2")
    teacher = tmp_path / "teacher"
    assert training.main(["teacher", "--out", str(teacher), "--device", "cpu", *taught]) == 0
    assert training.main(["export", str(teacher), str(again), "--dtype", "float32"]) == 0
    exported, settings_of = load_student(again, device="cpu", dtype=torch.float32)
    own, _ = load_student(teacher / "teacher.safetensors", device="cpu", dtype=torch.float32)
    assert not settings_of.causal and settings_of.cache is None
    assert all(map(torch.equal, own.state_dict().values(), exported.state_dict().values()))
