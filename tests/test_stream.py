from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from reference import Reference
from torch import Tensor

from rf_core import kernels
from rf_core import stream as stream_module
from rf_core.config import CacheConfig, SamplerConfig
from rf_core.decoders.vae import VAEState
from rf_core.state import Snapshot, slerp
from rf_core.stream import Stream, chunk_noise

ROOT = Path(__file__).parents[1]


def latents_of(stream: Stream, chunks: int) -> torch.Tensor:
    return torch.cat([stream.step().latents for _ in range(chunks)], dim=2)


def reference_of(stream: Stream, prompt, chunks: int, start=None) -> torch.Tensor:
    config, sampler = stream.cache_config, stream.sampler
    reference = Reference(stream.model.state_dict(), stream.model.config, config, sampler)
    shape = (stream.model.config.in_dim, config.chunk_frames, *stream.latent_size)
    seeds = [stream.state.seed + b for b in range(stream.batch)]
    first = 0 if start is None else start.shape[2] // config.chunk_frames
    draws = [chunk_noise(seeds, first + n, shape, len(sampler.steps)) for n in range(chunks)]
    noise = torch.cat([d[0] for d in draws], 2)
    return reference.stream(noise, [r for d in draws for r in d[1:]], prompt, start)


@pytest.mark.parametrize(
    ("cache", "options"),
    [
        pytest.param(tiny.window(9, 3), {}, id="published window"),
        pytest.param(tiny.window(9, 3), {"batch": 2}, id="batch 2"),
        pytest.param(tiny.window(6, 0), {}, id="no sink"),
        pytest.param(tiny.window(8, 2), {}, id="sink smaller than a chunk"),
        pytest.param(tiny.window(11, 5), {}, id="sink larger than a chunk"),
        pytest.param(tiny.window(7, 1), {}, id="sink of one frame"),
        pytest.param(tiny.window(18, 3), {}, id="window holds the whole clip"),
        pytest.param(tiny.window(5, 2, chunk=1), {}, id="chunks of one frame"),
        pytest.param(tiny.window(9, 2, anchor_frames=1), {}, id="anchor of a part of a chunk"),
        pytest.param(tiny.window(11, 1, anchor_frames=4), {}, id="anchor larger than a chunk"),
        pytest.param(tiny.window(6, 2, chunk=1, anchor_frames=2), {}, id="anchor, chunks of 1"),
        pytest.param(tiny.window(10, 4, chunk=2), {}, id="window not a multiple of sink"),
        pytest.param(tiny.window(9, 3), {"height": 64, "width": 16}, id="tall picture"),
        pytest.param(
            tiny.window(9, 3), {"sampler": SamplerConfig(steps=(1000, 700, 100), shift=3.0)},
            id="three steps, shift 3",
        ),
        pytest.param(tiny.window(9, 3), {"sampler": SamplerConfig(steps=(900,))}, id="one step"),
    ],
)  # fmt: skip
def test_a_stream_equals_a_rollout_that_rebuilds_its_window_for_every_pass(cache, options):
    stream = tiny.stream(cache=cache, **options)
    prompt = tiny.prompt().expand(stream.batch, -1, -1)
    expected = reference_of(stream, prompt, chunks=6)
    torch.testing.assert_close(latents_of(stream, 6), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [3, 1])
def test_a_sink_beside_an_anchor_is_that_of_a_slow_stream_over_many_evictions(chunk):
    cache = tiny.window(9, 2, chunk=chunk, anchor_frames=1, decay=0.9)
    stream = tiny.stream(cache=cache)
    expected = reference_of(stream, tiny.prompt(), chunks=24)
    torch.testing.assert_close(latents_of(stream, 24), expected, atol=2e-5, rtol=1e-4)
    assert stream.state.cache.num_evictions >= 15


@pytest.mark.parametrize("positions", ["window", "absolute"])
@pytest.mark.parametrize("storage", ["exact", "int8"])
def test_an_anchor_alone_is_a_static_sink_to_the_bit(storage, positions):
    options = {"storage": storage, "positions": positions}
    anchored = tiny.stream(cache=tiny.window(9, 0, anchor_frames=3, **options))
    static = tiny.stream(cache=tiny.window(9, 3, decay=1.0, **options))
    for stream in (anchored, static):
        latents_of(stream, 5)
        stream.switch(tiny.prompt(5))
    assert torch.equal(latents_of(anchored, 5), latents_of(static, 5))


@pytest.mark.parametrize("tokens", range(1, tiny.CONFIG.text_len + 1))
def test_prompts_of_every_length_are_padded_with_zeros(tokens):
    prompt = tiny.prompt(tokens=tokens)
    stream = tiny.stream(prompt_embeds=prompt)
    expected = reference_of(stream, prompt, chunks=1)
    torch.testing.assert_close(latents_of(stream, 1), expected, atol=2e-5, rtol=1e-4)


def test_a_prompt_over_the_limit_or_of_another_width_is_refused():
    with pytest.raises(ValueError, match="at most 10 tokens of width 24"):
        tiny.stream(prompt_embeds=torch.zeros(1, 11, 24))
    with pytest.raises(ValueError, match="at most 10 tokens of width 24"):
        tiny.stream(prompt_embeds=torch.zeros(1, 10, 23))


def test_start_latents_stand_in_front_and_are_remembered():
    start = torch.randn(1, 4, 6, 4, 6, generator=torch.Generator().manual_seed(3))
    stream = tiny.stream(cache=tiny.window(9, 3))
    adopted = torch.cat([chunk.latents for chunk in stream.start_from(start)], 2)
    found = torch.cat([adopted, latents_of(stream, 4)], 2)
    expected = reference_of(stream, tiny.prompt(), chunks=4, start=start)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_start_latents_of_a_broken_chunk_or_another_size_are_refused():
    with pytest.raises(ValueError, match="whole chunks of 3 frames"):
        tiny.stream().start_from(torch.zeros(1, 4, 4, 4, 6))
    with pytest.raises(ValueError, match=r"\(1, 4, 4, 6\)"):
        tiny.stream().start_from(torch.zeros(1, 4, 3, 4, 4))
    stream = tiny.stream()
    stream.step()
    with pytest.raises(ValueError, match="has begun"):
        stream.start_from(torch.zeros(1, 4, 3, 4, 6))


def test_the_first_chunks_do_not_depend_on_how_many_follow():
    short, long = latents_of(tiny.stream(), 2), latents_of(tiny.stream(), 6)
    assert torch.equal(short, long[:, :, : short.shape[2]])


def test_noise_is_a_function_of_seed_and_chunk_alone():
    once = chunk_noise([7], 3, (4, 3, 2, 2), 4)
    again = chunk_noise([6, 7], 3, (4, 3, 2, 2), 4)
    assert all(torch.equal(a[0], b[1]) for a, b in zip(once, again, strict=True))
    for other in (chunk_noise([7], 4, (4, 3, 2, 2), 4), chunk_noise([8], 3, (4, 3, 2, 2), 4)):
        assert not torch.equal(once[0], other[0])
    assert not torch.equal(once[0], once[1])
    assert all(chunk_noise([seed], 0, (1,), 1)[0].isfinite() for seed in (-1, 2**64 - 1, 2**70))


@pytest.mark.parametrize("shape", [(16, 3, 60, 104), (4, 3, 2, 2), (1, 16), (1, 3, 5), (2, 1, 4)])
def test_noise_is_what_one_draw_of_all_of_it_gives(shape: tuple[int, ...]) -> None:
    digest = hashlib.blake2b(b"7/3", digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    at_once = torch.randn((4, *shape), generator=generator)
    assert torch.equal(torch.cat(chunk_noise([7], 3, shape, 4)), at_once)


def test_noise_for_later_passes_is_drawn_when_the_pass_before_is_on_its_way(monkeypatch) -> None:
    events, draws = [], stream_module.noise_draws

    def watched(*given: Any, **how: Any) -> Iterator[Tensor]:
        for draw in draws(*given, **how):
            events.append("draw")
            yield draw

    monkeypatch.setattr(stream_module, "noise_draws", watched)
    stream = tiny.stream()
    predict = stream._predict
    monkeypatch.setattr(stream, "_predict", lambda *x: (events.append("pass"), predict(*x))[1])
    stream.generate()
    assert events == ["draw", "pass"] * len(stream.sampler.steps)


def test_a_batch_equals_its_samples_made_alone():
    prompts = torch.cat([tiny.prompt(0), tiny.prompt(1)])
    both = latents_of(tiny.stream(prompt_embeds=prompts, batch=2, seed=5), 4)
    for b in range(2):
        alone = latents_of(tiny.stream(prompt_embeds=prompts[b : b + 1], seed=5 + b), 4)
        torch.testing.assert_close(both[b : b + 1], alone, atol=2e-5, rtol=1e-4)


def test_a_picture_size_that_does_not_fit_names_the_nearest_that_does():
    with pytest.raises(ValueError, match="nearest is 48x32"):
        tiny.stream(height=30, width=50)


def test_a_fork_leaves_its_parent_untouched():
    expected = latents_of(tiny.stream(), 6)
    parent = tiny.stream()
    head = latents_of(parent, 3)
    fork = parent.fork()
    fork.switch(tiny.prompt(9), "cut")
    other = latents_of(fork, 3)
    found = torch.cat([head, latents_of(parent, 3)], 2)
    assert torch.equal(found, expected)
    assert not torch.equal(other, expected[:, :, 9:])


def test_a_fork_of_a_fork_goes_on_like_its_parent():
    parent = tiny.stream()
    latents_of(parent, 4)
    twin = parent.fork().fork()
    assert torch.equal(latents_of(parent, 3), latents_of(twin, 3))


@pytest.mark.slow
@pytest.mark.parametrize("accumulator", ["reference", "float32"])
def test_a_stream_restored_in_a_fresh_process_goes_on_bit_for_bit(tmp_path, accumulator):
    cache = tiny.window(9, 3, accumulator=accumulator)
    stream = tiny.stream(cache=cache, model=tiny.model().bfloat16(), seed=11)
    latents_of(stream, 4)
    stream.switch(tiny.prompt(1), "blend 3 slerp")
    stream.step()
    stream.snapshot().save(tmp_path / "s.safetensors")
    expected = latents_of(stream, 4)
    script = """
import sys, torch, tiny
from rf_core.state import Snapshot
from rf_core.stream import Stream
folder = sys.argv[1]
snapshot = Snapshot.load(folder + "/s.safetensors")
stream = Stream.from_snapshot(tiny.model().bfloat16(), snapshot)
torch.save(torch.cat([stream.step().latents for _ in range(4)], 2), folder + "/out.pt")
"""
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    subprocess.run(command, check=True, env=paths, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), expected)


def test_a_snapshot_is_not_touched_by_the_stream_that_made_it():
    stream = tiny.stream()
    latents_of(stream, 4)
    snapshot = stream.snapshot()
    expected = latents_of(stream, 3)
    stream.restore(snapshot)
    assert torch.equal(latents_of(stream, 3), expected)


def test_a_compact_snapshot_is_small_and_near(tmp_path):
    stream = tiny.stream(cache=CacheConfig())
    latents_of(stream, 8)
    exact, compact = stream.snapshot(), stream.snapshot(compact=True)
    assert compact.compact and not exact.compact
    assert compact.nbytes < exact.nbytes / 5
    expected = stream.step().latents
    compact.save(tmp_path / "c.safetensors")
    again = Stream.from_snapshot(stream.model, Snapshot.load(tmp_path / "c.safetensors"))
    found = again.step().latents
    error = (found - expected).norm() / expected.norm()
    # The window is exact but for the sink, whose average over 6 evictions is lost.
    assert 0 < error < 0.05


def test_a_compact_snapshot_before_any_eviction_is_exact_to_rounding():
    stream = tiny.stream(cache=CacheConfig())
    latents_of(stream, 3)
    again = Stream.from_snapshot(stream.model, stream.snapshot(compact=True))
    torch.testing.assert_close(
        again.state.cache.k_NBWHD, stream.state.cache.k_NBWHD, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("chunks", "sink"), [(1, 1), (1, 2), (2, 2), (6, 2), (6, 3)])
def test_of_a_compact_snapshot_the_decoder_s_past_is_made_in_whole_chunks(chunks, sink):
    parts = []

    class Sizes:
        spatial_factor, kind = 8, "sizes"

        def decode(self, latents, state):
            parts.append(latents.shape[2])
            done = 0 if state is None else state.num_frames
            return latents, VAEState({}, done + latents.shape[2])

    stream = tiny.stream(cache=tiny.window(9, sink), decoder=Sizes())
    for _ in range(chunks):
        stream.step()
    parts.clear()
    again = Stream.from_snapshot(stream.model, stream.snapshot(compact=True), decoder=Sizes())
    assert min(parts[0], 3) == 3 and set(parts[1:]) <= {3} and parts[0] < 6
    assert again.state.decoder.num_frames == sum(parts)


def test_a_snapshot_of_another_model_or_size_is_refused():
    stream = tiny.stream()
    stream.step()
    snapshot = stream.snapshot()
    with pytest.raises(ValueError, match="model weights"):
        tiny.stream(model=tiny.model(seed=1)).restore(snapshot)
    with pytest.raises(ValueError, match="height is 32, this stream's is 48"):
        tiny.stream(height=48).restore(snapshot)
    narrow = tiny.CONFIG.__class__(**{**vars(tiny.CONFIG), "num_layers": 1})
    with pytest.raises(ValueError, match="model sizes"):
        tiny.stream(model=tiny.model(narrow)).restore(snapshot)


def test_files_that_are_no_snapshot_are_refused_in_a_sentence(tmp_path):
    stream = tiny.stream()
    stream.step()
    whole = tmp_path / "whole.safetensors"
    stream.snapshot().save(whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    for path, message in (
        (tmp_path / "none.safetensors", "there is no snapshot"),
        (cut, "cut short"),
        (ROOT / "tests/parity/golden/redmd_losses.safetensors", "not a stream snapshot"),
    ):
        with pytest.raises(ValueError, match=message):
            Snapshot.load(path)


@pytest.mark.slow
@pytest.mark.parametrize("keep_rotated", [True, False])
def test_compiled_blocks_stream_the_same_over_evictions_and_switches(keep_rotated):
    options = {"cache": tiny.window(9, 3), "keep_rotated": keep_rotated}
    plain, compiled = tiny.stream(**options), tiny.stream(**options)
    torch._dynamo.reset()
    for block in compiled.model.blocks:
        block.compile(backend="aot_eager")
    for index in range(8):
        for stream in (plain, compiled):
            if index in (2, 5):
                stream.switch(tiny.prompt(index), "recache" if index == 2 else "cut")
        made = [stream.step().latents for stream in (plain, compiled)]
        torch.testing.assert_close(*made, atol=2e-4, rtol=1e-4)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("stop_at", range(9))
def test_a_stream_stopped_in_any_pass_goes_on_as_if_it_had_not(stop_at):
    def run(stop: int | None) -> torch.Tensor:
        stream, calls = tiny.stream(), iter(range(1000))
        latents_of(stream, 3)
        stream.switch(tiny.prompt(2), "recache")

        def on_pass(kind, number):
            if next(calls) == stop:
                raise Stop

        out = []
        while len(out) < 2:
            try:
                out.append(stream.step(on_pass).latents)
            except Stop:
                stop = None
        return torch.cat(out, 2)

    assert torch.equal(run(stop_at), run(None))


@pytest.mark.parametrize("switch", ["soft", "blend 2", "cut"])
def test_a_chunk_of_a_blend_that_was_not_made_leaves_no_prompt_behind(switch):
    def run(stopped: bool) -> torch.Tensor:
        stream = tiny.stream(cache=tiny.window(9, 3))
        latents_of(stream, 1)
        stream.switch(tiny.prompt(2), "blend 3")
        latents_of(stream, 1)
        if stopped:
            before_the_chunk(stream)
        stream.switch(tiny.prompt(3), switch)
        return latents_of(stream, 2)

    assert torch.equal(run(True), run(False))


@pytest.mark.parametrize("failing", ["update_sink", "rotate_context"])
def test_a_window_that_failed_while_it_moved_is_whole_or_refused(monkeypatch, failing):
    def out(*given, **named):
        raise torch.OutOfMemoryError("no more")

    stream = tiny.stream(cache=tiny.window(9, 3))
    latents_of(stream, 3)
    kept, twin = stream.snapshot(), stream.fork()
    with monkeypatch.context() as patched:
        patched.setattr(kernels, failing, out)
        with pytest.raises(torch.OutOfMemoryError):
            stream.step()
    if failing == "update_sink":
        for use in (stream.step, stream.snapshot):
            with pytest.raises(ValueError, match="snapshot, or begin anew"):
                use()
        stream.restore(kept)
    assert torch.equal(latents_of(stream, 2), latents_of(twin, 2))


def test_a_stop_takes_effect_before_the_next_pass():
    stream, passes = tiny.stream(), []

    def on_pass(kind, number):
        passes.append((kind, number))
        if len(passes) == 2:
            raise Stop

    with pytest.raises(Stop):
        stream.step(on_pass)
    assert passes == [("denoise", 0), ("denoise", 1)]
    assert stream.state.num_chunks == 0


def test_a_chunk_is_handed_on_before_its_clean_pass():
    stream, passes = tiny.stream(), []
    stream.step(lambda kind, number: passes.append(kind))
    assert passes == ["denoise", "denoise"]
    stream.step(lambda kind, number: passes.append(kind))
    assert passes == ["denoise", "denoise", "clean", "denoise", "denoise"]


@pytest.mark.parametrize("switch", [None, "soft", "recache", "blend 2", "cut"])
@pytest.mark.parametrize("chunks", [1, 4])
def test_when_the_clean_pass_is_run_changes_nothing(chunks, switch):
    lazy, eager = tiny.stream(), tiny.stream()
    made = []
    for stream, finish_clean_pass in ((lazy, lambda: None), (eager, eager.finish_clean_pass)):
        latents = []
        for index in range(chunks + 3):
            if index == chunks and switch is not None:
                stream.switch(tiny.prompt(5), switch)
            latents.append(stream.step().latents)
            finish_clean_pass()
        made.append(torch.cat(latents, 2))
    assert torch.equal(*made)


def test_a_clean_pass_ends_at_the_last_layers_keys_and_values():
    stream = tiny.stream()
    stream.generate()
    whole = stream.fork()
    layers = []
    for index, block in enumerate(stream.model.blocks):
        block.ffn.register_forward_hook(lambda *_, index=index: layers.append(index))
    stream.finish_clean_pass()
    assert layers == [0]  # of two
    x, (_, context) = whole.state.pending_clean_pass.latents, whole._context
    with torch.no_grad():
        whole.model(x, torch.zeros(1, 3), context, whole.state.cache)
    assert torch.equal(stream.state.cache.k_NBWHD, whole.state.cache.k_NBWHD)
    assert torch.equal(stream.state.cache.v_NBWHD, whole.state.cache.v_NBWHD)


def cache_of(stream: Stream) -> tuple[torch.Tensor, ...]:
    cache, tokens = stream.state.cache, stream.state.cache.frame_tokens
    sink = cache.config.sink_frames * tokens
    stop = cache.num_frames * tokens
    return cache.k_NBWHD[:, :, :sink].clone(), cache.k_NBWHD[:, :, sink:stop].clone()


def before_the_chunk(stream: Stream) -> Stream:
    """Run what a step does before its first denoising pass, then stop."""

    def on_pass(kind, number):
        if kind == "denoise":
            raise Stop

    with pytest.raises(Stop):
        stream.step(on_pass)
    stream.state.cache.truncate(stream.state.cache.context_frames)
    return stream


def young() -> Stream:
    """Two chunks made: the window has room, so nothing is evicted by the next."""
    stream = tiny.stream(cache=tiny.window(9, 3))
    latents_of(stream, 2)
    return stream


def test_soft_changes_the_cross_attention_and_leaves_the_cache_alone():
    plain, soft = before_the_chunk(young()), young()
    soft.switch(tiny.prompt(5), "soft")
    soft = before_the_chunk(soft)
    assert all(map(torch.equal, cache_of(plain), cache_of(soft)))
    assert not torch.equal(plain.step().latents, soft.step().latents)
    prompts = [stream._context[1][0].k_BSHD for stream in (plain, soft)]
    assert not torch.equal(*prompts)


def test_recache_rewrites_the_window_under_the_new_prompt_and_keeps_the_sink():
    plain, recached = before_the_chunk(young()), young()
    recached.switch(tiny.prompt(5), "recache")
    recached = before_the_chunk(recached)
    sink, rest = cache_of(recached)
    assert torch.equal(sink, cache_of(plain)[0])
    assert not torch.allclose(rest, cache_of(plain)[1])
    # The first layer's keys depend on the latents alone; later layers have read the prompt.
    torch.testing.assert_close(rest[0], cache_of(plain)[1][0])

    weights, config = recached.model.state_dict(), recached.model.config
    reference = Reference(weights, config, recached.cache_config, recached.sampler)
    reference.frames = [
        [(k, v) for k, v in zip(k_layer.split(6, 1), v_layer.split(6, 1), strict=True)]
        for k_layer, v_layer in zip(
            sink, recached.state.cache.v_NBWHD[:, :, : sink.shape[2]], strict=True
        )
    ]
    reference.flow(recached.state.last_latents, torch.zeros(1, 3), tiny.prompt(5), keep=True)
    expected = torch.cat([frame[0] for frame in reference.frames[-1][3:]], 1)
    torch.testing.assert_close(rest[-1], expected, atol=2e-5, rtol=1e-4)


def test_recache_runs_the_last_two_chunks_in_a_full_window():
    stream, passes = tiny.stream(), []
    latents_of(stream, 5)
    stream.switch(tiny.prompt(5))
    stream.step(lambda kind, number: passes.append((kind, number)))
    assert passes == [("clean", 0), ("clean", 1), ("denoise", 0), ("denoise", 1)]


def test_recache_to_the_same_prompt_changes_nothing_but_rounding():
    plain, recached = tiny.stream(), tiny.stream()
    latents_of(plain, 3), latents_of(recached, 3)
    recached.switch(tiny.prompt(0), "recache")
    torch.testing.assert_close(recached.step().latents, plain.step().latents, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("interpolation", ["lerp", "slerp"])
def test_blend_moves_the_prompt_over_k_chunks_then_recaches_once(interpolation):
    stream, old, new = tiny.stream(), tiny.prompt(0), tiny.prompt(5)
    latents_of(stream, 3)
    stream.switch(new, f"blend 3 {interpolation}")
    seen, passes = [], []
    for _ in range(5):
        kinds: list[str] = []
        stream.step(lambda kind, number, kinds=kinds: kinds.append(kind))
        seen.append(stream.state.prompt_embeds)
        passes.append(kinds.count("clean"))
    mix = slerp if interpolation == "slerp" else torch.lerp
    for embeds, weight in zip(seen[:2], (1 / 3, 2 / 3), strict=True):
        torch.testing.assert_close(embeds, mix(old, new, weight))
    assert all(torch.equal(embeds, new) for embeds in seen[2:])
    assert passes == [1, 1, 1, 2, 1]


def test_a_switch_during_a_blend_starts_from_where_the_prompt_then_stands():
    stream = tiny.stream()
    stream.step()
    stream.switch(tiny.prompt(5), "blend 4")
    stream.step()
    between = stream.state.prompt_embeds
    stream.switch(tiny.prompt(6), "blend 2")
    stream.step()
    torch.testing.assert_close(stream.state.prompt_embeds, torch.lerp(between, tiny.prompt(6), 0.5))


def test_guesses_are_shown_after_every_step_and_change_nothing():
    guesses = []
    watched = tiny.stream()
    chunk = watched.step(on_prediction=lambda number, x0: guesses.append((number, x0.clone())))
    assert [number for number, _ in guesses] == list(range(len(watched.sampler.steps)))
    assert torch.equal(guesses[-1][1], chunk.latents)
    assert torch.equal(chunk.latents, tiny.stream().step().latents)


def test_cut_starts_afresh_and_keeps_the_clock():
    stream = tiny.stream()
    latents_of(stream, 4)
    stream.switch(tiny.prompt(5), "cut")
    chunk = stream.step()
    fresh = tiny.stream(prompt_embeds=tiny.prompt(5))
    fresh.state.num_chunks = 4
    assert chunk.index == 4
    assert torch.equal(chunk.latents, fresh.step().latents)
    assert stream.state.cache.num_frames == 3


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="soft, recache, blend K or cut"):
        tiny.stream().switch(tiny.prompt(), "fade")


def test_slerp_keeps_length_and_falls_back_to_lerp_where_vectors_are_parallel():
    a = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    b = torch.tensor([[0.0, 1.0], [4.0, 0.0], [0.0, 6.0]])
    middle = slerp(a, b, 0.5)
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [3.0, 0.0], [0.0, 3.0]])
    torch.testing.assert_close(middle, expected)


def test_memory_of_a_stream_does_not_grow_with_its_length():
    stream = tiny.stream()
    latents_of(stream, 4)
    pointer = stream.state.cache.k_NBWHD.data_ptr()
    before = stream.snapshot().nbytes
    latents_of(stream, 12)
    assert stream.snapshot().nbytes == before
    assert stream.state.cache.k_NBWHD.data_ptr() == pointer
