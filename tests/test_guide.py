"""A source's latents steer a stream: they enter the schedule where the strength says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
from reference import Reference
from torch import Tensor

from rf_core.config import SamplerConfig
from rf_core.families import FAMILIES
from rf_core.scheduler import entered_at, sampling_timesteps
from rf_core.state import Snapshot
from rf_core.stream import Stream, chunk_noise

FOUR_STEPS = SamplerConfig()
BETWEEN = 0.6  # of four steps, between the second and the third: three passes
CHUNKS = 5  # of a window of three: two after frames have left it


class Stop(BaseException):
    pass


def source(chunk: int, frames: int = 3, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(100 + chunk)
    return torch.randn(batch, 4, frames, 4, 6, generator=generator)


def stream_of(**options: Any) -> Stream:
    return tiny.stream(**{"cache": tiny.window(9, 3), "sampler": FOUR_STEPS, **options})


def guided(stream: Stream, chunks: int = CHUNKS, strength: float = BETWEEN) -> Tensor:
    """The next chunks, guided by the source at their places."""
    made = []
    for _ in range(chunks):
        guide = source(stream.state.num_chunks, stream.next_frames, stream.batch)
        made.append(stream.step(guide=guide, strength=strength).latents)
    return torch.cat(made, dim=2)


def plain(stream: Stream, chunks: int) -> Tensor:
    return torch.cat([stream.step().latents for _ in range(chunks)], dim=2)


def passes_at(strength: float, sampler: SamplerConfig = FOUR_STEPS) -> list[int]:
    stream, passes = stream_of(sampler=sampler), []

    def on_pass(kind: str, number: int) -> None:
        passes.append(number)

    stream.step(on_pass, guide=source(0), strength=strength)
    return passes


@pytest.mark.parametrize("shift", [5.0, 8.0, 1.0])
def test_every_step_is_entered_at_its_share_of_the_first(shift: float) -> None:
    sampler = SamplerConfig(steps=(900, 600, 300, 7, 0), shift=shift)
    timesteps = sampling_timesteps(sampler).tolist()
    for number, step in enumerate(sampler.steps[:-1]):
        entered, levels = entered_at(step / 900, sampler)
        assert entered == timesteps[number:]
        assert levels[0] == entered[0]
    last, levels = entered_at(1 / 900, sampler)
    assert last == [0.0]
    assert levels[0] > 0


def test_between_two_steps_the_noise_level_is_the_one_asked_for() -> None:
    entered, levels = entered_at(0.6, FOUR_STEPS)
    assert entered[0] == pytest.approx(1000 * 5 * 0.6 / (1 + 4 * 0.6))
    assert entered[1:] == sampling_timesteps(FOUR_STEPS).tolist()[2:]
    assert levels == entered


@pytest.mark.parametrize(
    "sampler",
    [FOUR_STEPS, SamplerConfig(steps=(900, 600, 0)), SamplerConfig(steps=(1000,), shift=8.0)],
)
def test_more_strength_is_never_less_noise_nor_fewer_passes(sampler: SamplerConfig) -> None:
    entries = [entered_at(number / 3000, sampler) for number in range(1, 3001)]
    noise = [levels[0] for _, levels in entries]
    assert noise == sorted(noise)
    assert [len(timesteps) for timesteps, _ in entries] == sorted(len(t) for t, _ in entries)
    assert all(levels == sorted(levels, reverse=True) for _, levels in entries)
    assert noise[-1] == sampling_timesteps(sampler)[0]
    assert noise[0] < 10


def test_a_guided_stream_equals_a_rollout_that_rebuilds_its_window_for_every_pass() -> None:
    stream = stream_of()
    config, shape = stream.cache_config, (4, 3, 4, 6)
    reference = Reference(stream.model.state_dict(), stream.model.config, config, FOUR_STEPS)
    made = []
    for chunk in range(CHUNKS):
        draws = chunk_noise([stream.state.seed], chunk, shape, 4)
        sigmas = [5 * u / (1 + 4 * u) for u in (BETWEEN, 0.5, 0.25)]
        reference.advance(3)
        x0 = source(chunk)
        for sigma, noise in zip(sigmas, draws[:3], strict=True):
            x = (1 - sigma) * x0 + sigma * noise
            at = torch.full((1, 3), sigma * 1000)
            x0 = x - sigma * reference.flow(x, at, tiny.prompt())
        reference.flow(x0, torch.zeros(1, 3), tiny.prompt(), keep=True)
        made.append(x0)
    torch.testing.assert_close(guided(stream), torch.cat(made, dim=2), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in FAMILIES if not FAMILIES[name].sampler.rolling])
def test_strength_1_is_text_alone_to_the_bit(name: str) -> None:
    family = FAMILIES[name]
    options = {"cache": family.cache, "sampler": family.sampler}
    text = plain(stream_of(**options), 3)
    assert torch.equal(guided(stream_of(**options), 3, strength=1), text)


def test_strength_0_is_the_source_without_a_pass_as_a_given_chunk() -> None:
    stream, given = stream_of(), stream_of()
    assert torch.equal(guided(stream, 2, strength=0), torch.cat([source(0), source(1)], dim=2))
    assert passes_at(0) == []
    for chunk in range(2):
        given.replay(source(chunk))
    assert torch.equal(plain(stream, 2), plain(given, 2))


@pytest.mark.parametrize(
    ("strength", "passes"), [(1, 4), (0.9, 4), (0.75, 3), (BETWEEN, 3), (0.25, 1), (0.01, 1)]
)
def test_passes_are_told_of_that_are_run(strength: float, passes: int) -> None:
    assert passes_at(strength) == list(range(passes))


def test_the_less_strength_the_nearer_to_the_source() -> None:
    distances = [
        (guided(stream_of(), 1, strength=each) - source(0)).norm() for each in (0.001, 0.25, 0.75)
    ]
    assert distances == sorted(distances)
    assert distances[0] < 0.1 * source(0).norm()


def test_a_strength_is_taken_where_none_is_named_and_the_guide_is_left_alone() -> None:
    guide = source(0)
    made = stream_of().step(guide=guide).latents
    assert not torch.equal(made, stream_of().step().latents)
    assert torch.equal(guide, source(0))


def test_after_a_guided_chunk_a_stream_goes_on_by_text() -> None:
    stream = stream_of()
    made = guided(stream, 1)
    given = stream_of()
    given.replay(made)
    assert torch.equal(plain(stream, 2), plain(given, 2))


def test_guided_chunks_are_made_again_of_their_latents_with_the_same_bits_after() -> None:
    stream, again = stream_of(), stream_of()
    for part in guided(stream).split(3, dim=2):
        again.replay(part)
    assert torch.equal(guided(stream, 2), guided(again, 2))


def test_a_batch_equals_its_samples_made_alone() -> None:
    pair = guided(stream_of(batch=2), 3)
    for sample in range(2):
        alone = stream_of(seed=sample)
        made = [
            alone.step(guide=source(n, batch=2)[sample : sample + 1], strength=BETWEEN).latents
            for n in range(3)
        ]
        torch.testing.assert_close(pair[sample], torch.cat(made, dim=2)[0], atol=2e-5, rtol=1e-4)


def test_a_first_chunk_of_other_length_and_steps_is_entered_in_its_own_schedule() -> None:
    sampler = SamplerConfig(steps=(1000, 500), first_steps=(1000, 750, 500, 250))
    cache = tiny.window(9, 3, first_chunk_frames=2)
    stream, passes = stream_of(sampler=sampler, cache=cache), []
    for strength in (0.75, 0.75):
        guide = source(0, stream.next_frames)
        stream.step(lambda *told: passes.append(told), guide=guide, strength=strength)
    assert passes == [
        *(("denoise", number) for number in range(3)),
        ("clean", 0),
        *(("denoise", number) for number in range(2)),
    ]


def test_frame_by_frame_a_guide_is_one_frame() -> None:
    stream = stream_of(cache=tiny.window(5, 2, chunk=1))
    assert guided(stream, 7).shape[2] == 7


@pytest.mark.parametrize("rebuild", ["never", "first"])
@pytest.mark.parametrize("compact", [False, True])
def test_a_restored_stream_goes_on_with_its_source(tmp_path, rebuild: str, compact: bool) -> None:
    stream = stream_of(cache=tiny.window(9, 3 if rebuild == "never" else 0, rebuild=rebuild))
    guided(stream, 2)
    stream.snapshot(compact=compact).save(tmp_path / "state.safetensors")
    snapshot = Snapshot.load(tmp_path / "state.safetensors")
    restored = Stream.from_snapshot(stream.model, snapshot)
    exact = {"atol": 2e-5, "rtol": 1e-4} if compact else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(guided(restored, 3), guided(stream, 3), **exact)


@pytest.mark.parametrize("stop_at", range(4))
def test_a_chunk_stopped_in_any_pass_is_made_again_alike(stop_at: int) -> None:
    def run(stop: int | None) -> Tensor:
        stream, calls = stream_of(), iter(range(1000))
        guided(stream, 3)

        def on_pass(kind: str, number: int) -> None:
            if next(calls) == stop:
                raise Stop

        if stop is not None:
            with pytest.raises(Stop):
                stream.step(on_pass, guide=source(3), strength=BETWEEN)
        return guided(stream, 2)

    assert torch.equal(run(stop_at), run(None))


def test_a_strength_that_moves_leaves_nothing_behind() -> None:
    stream = stream_of()
    plain(stream, 2)
    held = len(stream._times)
    for number in range(1, 10):
        guided(stream, 1, strength=number / 11)
    assert len(stream._times) == held


@pytest.mark.parametrize("strength", [-0.01, 1.01, math.nan, math.inf])
def test_a_strength_outside_its_range_is_refused_before_anything_changes(strength: float) -> None:
    stream = stream_of()
    for guide in (source(0), None):
        with pytest.raises(ValueError, match=f"strength is {strength}; give a number from 0"):
            stream.step(guide=guide, strength=strength)
    assert torch.equal(plain(stream, 1), plain(stream_of(), 1))


@pytest.mark.parametrize("shape", [(1, 4, 2, 4, 6), (2, 4, 3, 4, 6), (1, 4, 3, 6, 4), (4, 3, 4, 6)])
@pytest.mark.parametrize("strength", [0, BETWEEN, 1])
def test_a_guide_of_another_shape_is_refused(shape: tuple[int, ...], strength: float) -> None:
    with pytest.raises(ValueError, match=r"the guide's latents are \[.*a chunk is \[1, 4, 3, 4, 6"):
        stream_of().step(guide=torch.zeros(shape), strength=strength)


def test_a_rolling_sampler_takes_no_guide() -> None:
    (family,) = (each for each in FAMILIES.values() if each.sampler.rolling)
    stream = stream_of(cache=family.cache, sampler=family.sampler)
    with pytest.raises(ValueError, match="a rolling sampler takes no guide"):
        stream.step(guide=source(0))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_guide_that_is_not_finite_is_refused_and_the_stream_stands(wrong: float) -> None:
    stream, guide = stream_of(), source(0)
    guide[0, 0, 1, 2, 3] = wrong
    with pytest.raises(ValueError, match="the guide's latents hold numbers that are not finite"):
        stream.step(guide=guide)
    assert torch.equal(stream.step().latents, stream_of().step().latents)
