from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

from rf_core.config import CacheConfig, SamplerConfig
from rf_core.families import FAMILIES
from rf_core.layers import Block
from rf_core.model import WanModel
from rf_core.scheduler import sampling_timesteps
from rf_core.stream import chunk_noise
from training.objective.rollout import (
    Rollout,
    RolloutDraws,
    Start,
    check_rollouts,
    chunk_sizes,
    random_draws,
    roll_out,
)

CHUNKS = 6  # the window of 9 holds three: three evictions
SIZE = (4, 6)
SAMPLER = SamplerConfig(steps=(1000, 700, 400))


def draws_of(
    seeds: list[int],
    exit_step: int,
    chunks: int = CHUNKS,
    sampler: SamplerConfig = SAMPLER,
    cache: CacheConfig | None = None,
    first: int = 0,
) -> RolloutDraws:
    """What a stream of these seeds draws; its chunk `first` is the first that it generates."""
    cache, each = cache or CacheConfig(), []
    for number in range(chunks):
        frames = cache.chunk_frames if number else cache.first_frames
        shape = (tiny.CONFIG.in_dim, frames, *SIZE)
        drawn = chunk_noise(seeds, number, shape, len(sampler.steps_of(number <= first)))
        unused = [torch.zeros_like(drawn[0])] * (sampler.most_steps - len(drawn))
        each.append([*drawn, *unused])
    noise = torch.cat([chunk[0] for chunk in each], dim=2)
    renoise = torch.stack([torch.cat(step, dim=2) for step in zip(*each, strict=True)][1:])
    return RolloutDraws(noise=noise, renoise=renoise, exit_step=exit_step)


def trainable(seed: int = 0) -> WanModel:
    return tiny.model(seed=seed).requires_grad_(True)


def rolled(model: WanModel, draws: RolloutDraws, cache: CacheConfig, **options: object) -> Rollout:
    batch = draws.noise.shape[0]
    prompt = tiny.prompt().expand(batch, -1, -1)
    (rollout,) = roll_out(model, prompt, draws, SAMPLER, cache, **options)
    return rollout


def gradients(model: WanModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name.replace("_checkpoint_wrapped_module.", ""): p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def loss_of(latents: torch.Tensor) -> torch.Tensor:
    """Some loss in which every element has its own weight."""
    weights = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(9))
    return (latents * weights).sum()


@pytest.mark.parametrize(
    "cache",
    [
        pytest.param(tiny.window(9, 3), id="published window"),
        pytest.param(tiny.window(9, 3, decay=1.0), id="static sink"),
        pytest.param(tiny.window(6, 0), id="no sink"),
    ],
)
def test_a_rollout_to_the_last_step_is_what_a_stream_makes(cache):
    stream = tiny.stream(cache=cache, sampler=SAMPLER, seed=5)
    expected = torch.cat([stream.generate() for _ in range(CHUNKS)], dim=2)
    result = rolled(trainable(), draws_of([5], len(SAMPLER.steps) - 1), cache)
    torch.testing.assert_close(result.latents, expected, atol=2e-5, rtol=1e-4)
    assert result.num_evictions == stream.state.cache.num_evictions > 0


def can_be_rolled_out(name: str) -> bool:
    try:
        check_rollouts(FAMILIES[name].cache, FAMILIES[name].sampler)
    except ValueError:
        return False
    return True


OTHERS = {
    "a longer past": (
        CacheConfig(window_frames=8, sink_frames=2, first_chunk_frames=1),
        SamplerConfig(steps=(1000, 500, 0), clean_timestep=40.0),
    ),
    "absolute and averaged": (tiny.window(9, 3, positions="absolute"), SAMPLER),
    "memories of an averaged sink": (tiny.window(9, 2, memory_rates=(0.5,)), SAMPLER),
}
SINKS = {
    "none": {"sink_frames": 0},
    "static": {"decay": 1.0},
    "EMA 0.999": {"decay": 0.999, "accumulator": "float32"},
    "EMA 0.99": {"decay": 0.99, "accumulator": "float32"},
    "EMA 0.9": {"decay": 0.9, "accumulator": "float32"},
    "EMA 0.5": {"decay": 0.5, "accumulator": "float32"},
    "key norms": {"decay": 0.9, "accumulator": "float32", "keep_key_norms": True},
    "memories": {"sink_frames": 1, "decay": 1.0, "memory_rates": (0.01, 0.1)},
    "static beside EMA": {
        "anchor_frames": 1, "sink_frames": 2, "decay": 0.9, "accumulator": "float32"
    },
}  # fmt: skip
PRESETS = {
    name: (family.cache, family.sampler)
    for name, family in FAMILIES.items()
    if can_be_rolled_out(name)
}


def test_all_families_can_be_rolled_out_but_those_that_keep_no_cache_or_roll():
    assert FAMILIES.keys() - PRESETS.keys() == {"krea", "rolling_forcing"}


@pytest.mark.parametrize("name", [*PRESETS, *OTHERS])
def test_a_rollout_is_the_stream_of_any_family_across_evictions(name):
    cache, sampler = (PRESETS | OTHERS)[name]
    chunks = cache.window_frames // cache.chunk_frames + 3
    stream = tiny.stream(cache=cache, sampler=sampler, seed=5)
    expected = torch.cat([stream.generate() for _ in range(chunks)], dim=2)
    draws = draws_of([5], sampler.most_steps - 1, chunks, sampler, cache)
    (result,) = roll_out(trainable(), tiny.prompt(), draws, sampler, cache)
    assert result.num_evictions == stream.state.cache.num_evictions > 0
    torch.testing.assert_close(result.latents, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SINKS)
def test_every_sink_is_trained_over_evictions_as_it_streams(name, dtype):
    cache, model = CacheConfig(**SINKS[name]), trainable().to(dtype)
    stream = tiny.stream(model=tiny.model().to(dtype), cache=cache, sampler=SAMPLER, seed=5)
    expected = torch.cat([stream.generate() for _ in range(CHUNKS)], dim=2)
    result = rolled(model, draws_of([5], len(SAMPLER.steps) - 1), cache)
    near = {"atol": 2e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    torch.testing.assert_close(result.latents, expected, **near)
    assert result.num_evictions == stream.state.cache.num_evictions == 3
    found = gradients(model, loss_of(result.latents))
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


@pytest.mark.parametrize("name", SINKS)
def test_every_sink_is_trained_in_windows_that_are_one_rollout(name):
    cache, model, draws = CacheConfig(**SINKS[name]), trainable(), draws_of([5], 1)
    whole = rolled(model, draws, cache)
    windows = list(roll_out(model, tiny.prompt(), draws, SAMPLER, cache, window_chunks=2))
    assert torch.equal(torch.cat([each.latents for each in windows], dim=2), whole.latents)
    assert [each.num_evictions for each in windows] == [0, 1, 3]


@pytest.mark.parametrize("name", ["causal_forcing_2step", "longlive", "a longer past"])
def test_a_rollout_from_a_given_chunk_is_a_stream_of_any_family_from_it(name):
    cache, sampler = (PRESETS | OTHERS)[name]
    chunks = cache.window_frames // cache.chunk_frames + 2
    stream = tiny.stream(cache=cache, sampler=sampler, seed=5)
    generator = torch.Generator().manual_seed(3)
    given = torch.randn(1, tiny.CONFIG.in_dim, cache.first_frames, *SIZE, generator=generator)
    stream.start_from(given)
    expected = torch.cat([given, *(stream.generate() for _ in range(1, chunks))], dim=2)
    draws = draws_of([5], sampler.most_steps - 1, chunks, sampler, cache, first=1)
    draws = replace(draws, start=Start(latents=given))
    (result,) = roll_out(trainable(), tiny.prompt(), draws, sampler, cache)
    torch.testing.assert_close(result.latents, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["causal_forcing_2step", "causal_forcing_1step"])
def test_a_chunk_with_fewer_steps_than_the_exit_ends_with_its_last(name):
    cache, sampler = PRESETS[name]
    last = [
        roll_out(trainable(), tiny.prompt(), draws, sampler, cache, window_chunks=1)
        for exit_step in range(sampler.most_steps)
        for draws in [draws_of([5], exit_step, 2, sampler, cache)]
    ]
    first, second = zip(*([window.timestep for window in each] for each in last), strict=True)
    own = [sampling_timesteps(sampler, is_first=is_first).tolist() for is_first in (True, False)]
    assert list(first) == own[0]
    assert list(second) == own[1] + own[1][-1:] * (sampler.most_steps - len(own[1]))


def test_draws_reach_every_step_of_the_longer_schedule():
    sampler = FAMILIES["causal_forcing_1step"].sampler
    generator = torch.Generator().manual_seed(0)
    drawn = [random_draws((1, 4, 3, *SIZE), sampler, generator) for _ in range(40)]
    assert {each.exit_step for each in drawn} == {0, 1, 2, 3}
    assert drawn[0].renoise.shape[0] == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("krea", "cache.rebuild is 'reencoded', and rollouts keep their cache .* set it to never"),
        ("rolling_forcing", "sampler.rolling is on, and rollouts denoise one .* set it to false"),
    ],
)
def test_what_a_rollout_cannot_do_is_refused_by_its_field(name, said):
    with pytest.raises(ValueError, match=said):
        check_rollouts(FAMILIES[name].cache, FAMILIES[name].sampler)


def test_chunks_are_counted_with_a_first_one_of_another_length():
    cache = CacheConfig(first_chunk_frames=1)
    assert chunk_sizes(7, cache) == [1, 3, 3] and chunk_sizes(6, cache) == []
    assert chunk_sizes(6, cache, begins=False) == [3, 3]
    assert chunk_sizes(21, FAMILIES["causal_forcing_frame"].cache) == [1] * 21


@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_the_gradient_is_that_of_each_exit_pass_with_its_past_held_fixed(exit_step):
    cache, model, draws = tiny.window(9, 3), trainable(), draws_of([5], exit_step)
    loss = loss_of(rolled(model, draws, cache).latents)
    whole = gradients(model, loss)
    parts: dict[str, torch.Tensor] = {}
    for chunk in range(CHUNKS):  # the last chunk's part alone, of rollouts that end there
        shorter = RolloutDraws(
            noise=draws.noise[:, :, : 3 * (chunk + 1)],
            renoise=draws.renoise[:, :, :, : 3 * (chunk + 1)],
            exit_step=exit_step,
        )
        latents = rolled(model, shorter, cache).latents
        held = torch.cat([latents[:, :, :-3].detach(), latents[:, :, -3:]], dim=2)
        padding = latents.new_zeros(1, tiny.CONFIG.in_dim, 3 * CHUNKS, *SIZE)
        padding[:, :, : held.shape[2]] = held
        for name, gradient in gradients(model, loss_of(padding)).items():
            parts[name] = parts.get(name, 0) + gradient
    assert parts.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-4, rtol=1e-3)


def test_recomputing_the_blocks_changes_no_gradient_across_evictions():
    cache, draws = tiny.window(9, 3), draws_of([5, 6], 1)
    plain, recomputing = trainable(), trainable()
    apply_activation_checkpointing(recomputing, check_fn=lambda layer: isinstance(layer, Block))
    results = [rolled(model, draws, cache) for model in (plain, recomputing)]
    assert torch.equal(results[0].latents, results[1].latents) and results[0].num_evictions == 3
    first, second = (
        gradients(model, loss_of(result.latents))
        for model, result in zip((plain, recomputing), results, strict=True)
    )
    assert first.keys() == second.keys() and len(first) == len(list(plain.parameters()))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("window_chunks", [1, 2, 3])
def test_windows_are_the_same_rollout_with_the_gradient_a_window_at_a_time(window_chunks):
    model, cache, draws = trainable(), tiny.window(9, 3), draws_of([5], 1)
    whole = rolled(model, draws, cache)
    weights = torch.randn(whole.latents.shape[1:], generator=torch.Generator().manual_seed(9))
    expected = gradients(model, loss_of(whole.latents))
    model.zero_grad()
    made, start = [], 0
    for window in roll_out(
        model, tiny.prompt(), draws, SAMPLER, cache, window_chunks=window_chunks
    ):
        stop = start + window.latents.shape[2]
        (window.latents * weights[:, start:stop]).sum().backward()
        past = torch.cat(made, dim=2)[:, :, -3:] if made else window.past
        assert torch.equal(window.past, past) and past.shape[2] == (3 if made else 0)
        made.append(window.latents.detach())
        start = stop
    assert torch.equal(torch.cat(made, dim=2), whole.latents)
    assert window.num_evictions == whole.num_evictions == 3
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-3)


def test_a_rollout_that_is_not_supervised_is_the_same_without_gradient():
    model, cache, draws = trainable(), tiny.window(9, 3), draws_of([5], 1)
    still = rolled(model, draws, cache, supervised=False).latents
    assert not still.requires_grad
    torch.testing.assert_close(still, rolled(model, draws, cache).latents)


def test_a_batch_is_the_sum_of_its_samples():
    model, cache = trainable(), tiny.window(9, 3)
    whole = gradients(model, loss_of(rolled(model, draws_of([5, 6], 1), cache).latents))
    for name, gradient in gradients(
        model,
        sum(loss_of(rolled(model, draws_of([seed], 1), cache).latents) for seed in (5, 6)),
    ).items():
        torch.testing.assert_close(gradient, whole[name], atol=1e-4, rtol=1e-3)


def given_chunk(seed: int, frames: int = 3, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tiny.CONFIG.in_dim, frames, *SIZE, generator=generator)


@pytest.mark.parametrize("chunk", [3, 1])
def test_a_rollout_from_a_start_image_is_what_a_stream_makes_of_it(chunk):
    cache, start = tiny.window(9, 3, chunk=chunk), given_chunk(1, chunk)
    stream = tiny.stream(cache=cache, sampler=SAMPLER, seed=5)
    stream.start_from(start)
    rest = [stream.generate() for _ in range(1, 18 // chunk)]
    shape = (tiny.CONFIG.in_dim, chunk, *SIZE)
    each = [chunk_noise([5], n, shape, len(SAMPLER.steps)) for n in range(18 // chunk)]
    draws = RolloutDraws(
        noise=torch.cat([drawn[0] for drawn in each], dim=2),
        renoise=torch.stack([torch.cat(s, dim=2) for s in zip(*each, strict=True)][1:]),
        exit_step=len(SAMPLER.steps) - 1,
        start=Start(latents=start),
    )
    result = rolled(trainable(), draws, cache)
    expected = torch.cat([start, *rest], dim=2)
    torch.testing.assert_close(result.latents, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(result.latents[:, :, :chunk], start)
    assert result.given_BF.tolist() == [[True] * chunk + [False] * (18 - chunk)]
    assert result.num_evictions == stream.state.cache.num_evictions > 0


def test_samples_of_a_batch_begin_from_an_image_or_from_noise_each_as_if_alone():
    model, cache, draws = trainable(), tiny.window(9, 3), draws_of([5, 6], 1)
    start = given_chunk(1, batch=2)
    mixed = replace(draws, start=Start(latents=start, given_B=torch.tensor([False, True])))
    both = rolled(model, mixed, cache)
    noise = rolled(model, draws, cache)
    every = rolled(model, replace(draws, start=Start(latents=start)), cache)
    assert torch.equal(both.latents[0], noise.latents[0]) and noise.given_BF is None
    torch.testing.assert_close(both.latents[1], every.latents[1])
    assert both.given_BF.sum(1).tolist() == [0, 3]
    found = gradients(model, loss_of(both.latents[1:]))
    expected = gradients(model, loss_of(every.latents[1:]))
    for name, gradient in expected.items():  # what was made in place of the image moves nothing
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


def test_only_the_window_that_begins_a_rollout_has_given_frames():
    draws = replace(draws_of([5], 1), start=Start(latents=given_chunk(1)))
    windows = roll_out(
        trainable(), tiny.prompt(), draws, SAMPLER, tiny.window(9, 3), window_chunks=2
    )
    first, *later = windows
    assert first.given_BF.tolist() == [[True] * 3 + [False] * 3]
    assert [each.given_BF for each in later] == [None, None]


def test_a_start_that_is_no_chunk_of_the_rollout_is_refused():
    draws = replace(draws_of([5], 1), start=Start(latents=given_chunk(1, frames=2)))
    with pytest.raises(ValueError, match=r"start latents are \[1, 4, 2, 4, 6\]; a chunk"):
        rolled(trainable(), draws, tiny.window(9, 3))


def test_draws_are_a_function_of_their_generator_and_exit_anywhere():
    shape = (1, 4, 3, *SIZE)
    first, second = (
        random_draws(shape, SAMPLER, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first.noise, second.noise) and torch.equal(first.renoise, second.renoise)
    generator = torch.Generator().manual_seed(0)
    assert {random_draws(shape, SAMPLER, generator).exit_step for _ in range(40)} == {0, 1, 2}


def test_noise_that_is_not_whole_chunks_is_refused():
    draws = random_draws((1, 4, 7, *SIZE), SAMPLER)
    with pytest.raises(ValueError, match="7 latent frames is not whole windows"):
        rolled(trainable(), draws, tiny.window(9, 3))
