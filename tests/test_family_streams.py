"""Every family of students, with what its authors' code cannot do: a test behind every yes of the
table in docs/families.md. Caches and schedules are the presets', networks are tiny."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from processes import spawn
from test_graphs import TraceRecorder
from test_live import Trial, driven, encode, latents_by_branch, line_of, of_kind
from torch import Tensor

from rf_core.config import CacheConfig
from rf_core.decoders.decoder import Decoder, WanDecoder
from rf_core.decoders.handoff import Handoff
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.families import FAMILIES
from rf_core.fast.graphs import GraphedModel
from rf_core.fast.parallel import (
    Process,
    SequenceParallelModel,
    SequenceParallelStream,
    Split,
)
from rf_core.fast.quantise import quantise_linears
from rf_core.live import Ended, Lora, Picture, Prompt, Refused, Rewind
from rf_core.model import WanModel
from rf_core.prompts import Switch
from rf_core.rope import THETA, axis_pairs
from rf_core.state import Snapshot
from rf_core.stream import Stream
from rf_core.video import to_uint8

MODES = ["soft", "recache", "blend 2", "cut"]
KEPT = [name for name, family in FAMILIES.items() if family.cache.rebuild == "never"]
REBUILT = [name for name in FAMILIES if name not in KEPT]
ONE_OF_EACH_CACHE = {
    family.cache: name for name, family in FAMILIES.items() if not family.sampler.rolling
}.values()
LAST = 3  # chunks after a change: a blend of two, and its recache
ROUNDING = {"atol": 2e-5, "rtol": 1e-4}

of_every_family = pytest.mark.parametrize("name", FAMILIES)


class Stop(BaseException):
    pass


@lru_cache
def model_of(channels: int) -> WanModel:
    return tiny.model(replace(tiny.CONFIG, in_dim=channels, out_dim=channels))


@lru_cache
def decoder_of() -> Decoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WanDecoder(WanVAE(VAEConfig(dim=2, num_res_blocks=1)).eval())


def stream_of(name: str, cache: dict[str, Any] | None = None, **options: Any) -> Stream:
    """A stream of a family; one that encodes its images has a decoder."""
    config = replace(FAMILIES[name].cache, **(cache or {}))
    if config.rebuild == "reencoded":
        options.setdefault("decoder", decoder_of())
    options.setdefault("model", model_of(16 if options.get("decoder") else 4))
    return tiny.stream(cache=config, sampler=FAMILIES[name].sampler, **options)


def latents_of(stream: Stream, chunks: int) -> Tensor:
    return torch.cat([stream.step().latents for _ in range(chunks)], dim=2)


def chunks_to_fill(cache: CacheConfig) -> int:
    """After so many, frames have left the window."""
    return cache.window_frames // cache.chunk_frames + 2


@lru_cache
def begun(name: str, full: bool) -> Snapshot:
    """A stream before its window is full, or after frames have left it."""
    stream = stream_of(name)
    latents_of(stream, chunks_to_fill(stream.cache_config) if full else 2)
    return stream.snapshot()


def begun_stream(name: str, full: bool = True) -> Stream:
    stream = stream_of(name)
    stream.restore(begun(name, full))
    return stream


def through_a_file(stream: Stream, folder: Path, **options: bool) -> Stream:
    """The stream that goes on from what is saved of another."""
    stream.snapshot(**options).save(folder / "state.safetensors")
    snapshot = Snapshot.load(folder / "state.safetensors")
    return Stream.from_snapshot(stream.model, snapshot, decoder=stream.decoder)


def stopped(stream: Stream, at: int) -> None:
    """Stop a step before its pass of this number."""
    calls = iter(range(at + 1))

    def on_pass(kind: str, number: int) -> None:
        if next(calls) == at:
            raise Stop

    with pytest.raises(Stop):
        stream.generate(on_pass)


def passes_of(stream: Stream) -> int:
    """Of the next chunk."""
    seen: list[str] = []
    stream.fork().generate(lambda kind, number: seen.append(kind))
    return len(seen)


def stopped_everywhere(stream: Stream) -> None:
    """Stop a step before its first pass, then before its second and so on."""
    at = 0
    while at < passes_of(stream):  # what was done is not done again
        stopped(stream, at)
        at += 1


def attended(stream: Stream) -> int:
    """Calls to attention of the next chunk."""
    twin, plain, seen = stream.fork(), stream.attention, []
    twin.attention = lambda *args, **options: (seen.append(1), plain(*args, **options))[1]
    twin.generate()
    return len(seen)


def failing(stream: Stream, at: int) -> None:
    """Let a step fail within a pass: in its call of this number to attention."""
    plain, calls = stream.attention, iter(range(at + 1))

    def attention(*args: Any, **options: Any) -> Tensor:
        if next(calls) == at:
            raise Stop
        return plain(*args, **options)

    stream.attention = attention
    with pytest.raises(Stop):
        stream.generate()
    stream.attention = plain


# Without end.


@of_every_family
def test_a_stream_goes_on_past_its_authors_window_in_constant_memory(name: str) -> None:
    stream = begun_stream(name)
    before, memory = stream.snapshot().nbytes, stream.state.cache.k_NBWHD.data_ptr()
    drawn = len(stream._draws)
    assert latents_of(stream, chunks_to_fill(stream.cache_config)).isfinite().all()
    assert stream.snapshot().nbytes == before
    assert stream.state.cache.k_NBWHD.data_ptr() == memory
    stream.step()
    assert len(stream._draws) <= max(drawn, len(stream.sampler.steps))


@of_every_family
def test_a_stream_goes_on_after_a_hundred_thousand_frames(name: str, tmp_path: Path) -> None:
    snapshot, gone = begun(name, True), 100_000
    frames, chunk = snapshot.facts["frames"], FAMILIES[name].cache.chunk_frames
    late = {"frames": [*frames[:4], gone], "num_chunks": gone // chunk + 99}
    stream = stream_of(name)
    if not frames[2]:
        late["frames"] = frames  # nothing leaves a window that is rebuilt
    stream.restore(replace(snapshot, facts={**snapshot.facts, **late}))
    twin = through_a_file(stream, tmp_path)
    made = latents_of(stream, 2)
    assert made.isfinite().all()
    assert torch.equal(latents_of(twin, 2), made)


@pytest.mark.parametrize("gone", [3, 1025, 100_000])
def test_a_sink_in_its_own_time_is_turned_by_its_distance_exactly(gone: int) -> None:
    cache = stream_of("longlive").state.cache
    cache.advance(12)
    cache.gone_frames = gone
    cache.truncate(9)
    cache.advance(3)
    assert cache.turning is not None
    table, pairs = cache.turning.table, axis_pairs(cache.k_NBWHD.shape[-1])[0]
    for frame in range(12):
        place = frame - gone if frame < 3 else frame
        for pair in range(pairs):
            angle = place * THETA ** (-pair / pairs)
            found = [float(t[frame * cache.frame_tokens, pair]) for t in table[:2]]
            assert found == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-7)


# With the EMA-Sink.


@pytest.mark.parametrize("storage", ["exact", "int8"])
@pytest.mark.parametrize("name", KEPT)
def test_any_cache_that_is_kept_takes_the_ema_sink(name: str, storage: str, tmp_path: Path) -> None:
    sink = {
        "sink_frames": FAMILIES[name].cache.sink_frames or 3,
        "decay": 0.5,
        "accumulator": "float32",
        "keep_key_norms": True,
        "storage": storage,
    }
    model = tiny.model().bfloat16()
    stream = stream_of(name, sink, model=model)
    latents_of(stream, chunks_to_fill(stream.cache_config))
    tokens = sink["sink_frames"] * stream.state.cache.frame_tokens

    def sink_of(stream: Stream) -> Tensor:
        held = stream.state.cache.tensors()
        exact = held["exact_sink" if storage == "exact" else "sink"]
        assert exact.dtype == torch.float32
        return exact[..., :tokens, :, :].clone()

    before = sink_of(stream)
    twin = through_a_file(stream, tmp_path)
    assert torch.equal(sink_of(twin), before)
    assert torch.equal(latents_of(twin, 2), latents_of(stream, 2))
    assert torch.equal(sink_of(twin), sink_of(stream))
    assert not torch.equal(sink_of(stream), before)


@pytest.mark.parametrize("name", REBUILT)
def test_a_window_that_is_made_anew_has_no_sink(name: str) -> None:
    with pytest.raises(ValueError, match="chunk to chunk; set sink_frames and anchor_frames to 0"):
        stream_of(name, {"sink_frames": 3})
    with pytest.raises(ValueError, match="chunk to chunk; set sink_frames and anchor_frames to 0"):
        stream_of(name, {"anchor_frames": 1})


# Changes of prompt, stopped chunks and snapshots.


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("full", [False, True], ids=["young", "full"])
@of_every_family
def test_a_change_of_prompt_acts_and_nothing_that_stops_or_saves_it_changes_it(
    name: str, full: bool, mode: str, tmp_path: Path
) -> None:
    def switched() -> Stream:
        stream = begun_stream(name, full)
        stream.switch(tiny.prompt(5), mode)
        return stream

    expected = latents_of(switched(), LAST)
    assert not torch.equal(expected, latents_of(begun_stream(name, full), LAST))
    assert expected.isfinite().all()

    saved, forked = switched(), switched().fork()
    made = []
    for _ in range(LAST):
        saved = through_a_file(saved, tmp_path)
        made.append(saved.step().latents)
    assert torch.equal(torch.cat(made, dim=2), expected), "saved after each chunk"

    stream, made = switched(), []
    for _ in range(LAST):
        stopped_everywhere(stream)
        made.append(stream.step().latents)
    assert torch.equal(torch.cat(made, dim=2), expected), "stopped before each pass"
    assert torch.equal(latents_of(forked, LAST), expected), "a fork that others left alone"


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["young", "full"])
@of_every_family
def test_a_chunk_that_fails_within_a_pass_is_made_as_if_it_had_not(
    name: str, full: bool, tmp_path: Path
) -> None:
    def switched(stops: bool = True) -> Stream:
        stream = begun_stream(name, full)
        if stops:
            stopped(stream, 0)  # frames have left for a chunk that is not made
        stream.switch(tiny.prompt(5), "recache")
        return stream

    expected = latents_of(switched(stops=False), LAST)
    calls = attended(switched())
    for at in range(0, calls, -(-calls // 9)):
        stream = switched()
        failing(stream, at)
        if at % 2:
            stream = through_a_file(stream, tmp_path)
        assert torch.equal(latents_of(stream, LAST), expected), at


@pytest.mark.parametrize("full", [False, True], ids=["young", "full"])
@of_every_family
def test_a_recache_that_failed_half_way_is_finished_before_a_soft_change(
    name: str, full: bool
) -> None:
    def run(fail: Callable[[Stream], None]) -> Tensor:
        stream = begun_stream(name, full)
        stream.switch(tiny.prompt(5), "recache")
        fail(stream)
        stream.switch(tiny.prompt(6), "soft")
        return latents_of(stream, 2)

    def after_it(stream: Stream) -> None:
        kinds: list[str] = []
        stream.fork().generate(lambda kind, number: kinds.append(kind))
        stopped(stream, kinds.index("denoise"))

    assert torch.equal(run(lambda stream: failing(stream, 0)), run(after_it))


@pytest.mark.parametrize("recache", ["chunks", "joint", "joint_new_sink"])
@pytest.mark.parametrize("positions", ["window", "absolute"])
@pytest.mark.parametrize(("anchor", "decay"), [(0, 1.0), (0, 0.5), (1, 0.5)])
def test_every_recache_goes_with_every_place_of_a_sink_and_its_average(
    recache: str, positions: str, anchor: int, decay: float, tmp_path: Path
) -> None:
    made = []
    for keeps in (False, True):
        sink = {"decay": decay, "recache": recache, "positions": positions}
        cache = tiny.window(9, 3 - anchor, anchor_frames=anchor, **sink)
        stream = tiny.stream(cache=cache)
        for chunk in range(12):
            if chunk in (2, 5, 9):
                stream.switch(tiny.prompt(chunk), "recache")
            if keeps:
                stopped_everywhere(stream)
                stream = through_a_file(stream, tmp_path)
            made.append(stream.generate())
    assert all(map(torch.equal, made[:12], made[12:]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("anchor", [1, 3])
@pytest.mark.parametrize("name", ["longlive", "memrope", "rolling_forcing"])
def test_of_a_static_sink_any_part_may_be_called_its_anchor(
    name: str, anchor: int, mode: str, tmp_path: Path
) -> None:
    parts = {"anchor_frames": anchor, "sink_frames": 3 - anchor}
    made = []
    for cache in ({}, parts):
        stream = stream_of(name, cache)
        for chunks in (2, chunks_to_fill(stream.cache_config)):
            stream.switch(tiny.prompt(chunks), mode)
            made.append(latents_of(stream, chunks))
            stream = through_a_file(stream, tmp_path)
        made.append(latents_of(through_a_file(stream, tmp_path, compact=True), 2))
    assert all(map(torch.equal, made[:3], made[3:]))


def test_a_stream_with_an_anchor_that_rolls_goes_on_from_a_file(tmp_path: Path) -> None:
    parts = {"anchor_frames": 1, "sink_frames": 2, "decay": 0.5}
    stream, plain = stream_of("rolling_forcing", parts), stream_of("rolling_forcing")
    made = [latents_of(each, chunks_to_fill(each.cache_config)) for each in (stream, plain)]
    assert not torch.equal(*made)
    twin = through_a_file(stream, tmp_path)
    stopped_everywhere(twin)
    assert torch.equal(latents_of(twin, 2), latents_of(stream, 2))


@pytest.mark.parametrize("storage", ["exact", "int8"])
def test_an_anchor_survives_stopped_chunks_and_forks(storage: str) -> None:
    options = {"anchor_frames": 1, "decay": 0.5, "storage": storage}
    stream = tiny.stream(cache=tiny.window(9, 2, **options))
    latents_of(stream, 4)

    def anchor_of(stream: Stream) -> Tensor:
        keys, values = stream.state.cache.context(0)
        tokens = stream.state.cache.frame_tokens
        return torch.cat([keys, values])[:, :tokens].clone()

    anchor, twin = anchor_of(stream), stream.fork()
    stopped_everywhere(stream)
    stream.switch(tiny.prompt(5), "recache")  # takes back what left for the stopped chunk
    latents_of(stream, 4)
    assert torch.equal(anchor_of(stream), anchor)
    assert torch.equal(anchor_of(twin), anchor)


@of_every_family
def test_a_compact_snapshot_makes_the_window_anew(name: str, tmp_path: Path) -> None:
    stream = begun_stream(name)
    again = through_a_file(stream, tmp_path, compact=True)
    once_more = through_a_file(again, tmp_path, compact=True)
    caches = [each.state.cache for each in (stream, again, once_more)]
    assert len({(cache.num_frames, cache.gone_frames) for cache in caches}) == 1
    tokens = caches[0].num_frames * caches[0].frame_tokens
    keys = [cache.k_NBWHD[:, :, :tokens] for cache in caches]
    assert torch.equal(keys[1], keys[2])
    if name in REBUILT:
        assert torch.equal(keys[0], keys[1])
    # The first layer's keys hang on the latents alone: but for averages they are the same.
    past = caches[0].config.head_frames * caches[0].frame_tokens
    torch.testing.assert_close(keys[1][0, :, past:], keys[0][0, :, past:], **ROUNDING)
    assert again.generate().isfinite().all()


def test_a_snapshot_of_before_there_were_families_goes_on() -> None:
    stream = begun_stream("reward_forcing")
    stream.switch(tiny.prompt(5), "blend 3")
    stream.step()
    snapshot = stream.snapshot()
    cache, sampler = snapshot.facts["cache"], snapshot.facts["sampler"]
    olds = {"window_frames", "sink_frames", "chunk_frames", "decay", "accumulator", "storage"}
    old = {
        "cache": {name: cache[name] for name in olds},
        "sampler": {name: sampler[name] for name in ("steps", "shift")},
        "frames": snapshot.facts["frames"][:4],
        "blend": snapshot.facts["blend"][:3],
    }
    facts = {key: value for key, value in snapshot.facts.items() if key != "first_due"} | old
    again = Stream.from_snapshot(stream.model, replace(snapshot, facts=facts))
    assert torch.equal(latents_of(again, 5), latents_of(stream, 5))


def damaged(name: str) -> Iterator[tuple[str, Snapshot]]:
    snapshot = begun(name, True)
    tensors, facts, config = snapshot.tensors, snapshot.facts, FAMILIES[name].cache

    def fact(**changed: Any) -> Snapshot:
        return replace(snapshot, facts={**facts, **changed})

    def tensor(which: str, change: Callable[[Tensor], Tensor]) -> Snapshot:
        return replace(snapshot, tensors={**tensors, which: change(tensors[which])})

    def setting(**changed: Any) -> Snapshot:
        return fact(cache={**facts["cache"], **changed})

    counts = facts["frames"]
    yield "a first chunk of a word", fact(first_due="yes")
    yield "frames that left before any came", fact(frames=[*counts[:4], -1])
    yield "more frames gone than were made", fact(frames=[*counts[:4], 10**9])
    yield "a fraction of frames gone", fact(frames=[*counts[:4], 0.5])
    yield "unknown positions", setting(positions="somewhere")
    yield "an unknown recache", setting(recache="twice")
    yield "a first chunk of no frames", setting(first_chunk_frames=0)
    yield "memories of a word", setting(memory_rates="ab")
    yield "a part of an anchor", setting(anchor_frames=0.5)
    latents = torch.zeros(1, 4 if name in KEPT else 16, config.chunk_frames, 4, 6)
    if "in_flight" in tensors:
        yield "a part of a chunk in flight", tensor("in_flight", lambda t: t[:, :, 1:])
        yield "a chunk in flight too few", tensor("in_flight", lambda t: t[:, :, 3:])
        yield "one too many", tensor("in_flight", lambda t: torch.cat([t, t[:, :, :3]], 2))
        yield "another picture's in flight", tensor("in_flight", lambda t: t[..., 1:])
        yield "whole numbers in flight", tensor("in_flight", lambda t: t.int())
    else:
        yield "chunks in flight", replace(snapshot, tensors={**tensors, "in_flight": latents})
    if "last_images" in tensors:
        yield "images of another size", tensor("last_images", lambda t: t[..., 1:])
        yield "more images than are in sight", tensor("last_images", lambda t: torch.cat([t, t], 1))
        yield "no images", tensor("last_images", lambda t: t[:, :0])
    else:
        images = torch.zeros(1, 1, 3, 32, 48)
        yield "images", replace(snapshot, tensors={**tensors, "last_images": images})


@of_every_family
def test_a_snapshot_with_damaged_facts_is_refused_and_changes_nothing(name: str) -> None:
    stream = begun_stream(name)
    twin = stream.fork()
    for what, snapshot in damaged(name):
        with pytest.raises(ValueError) as refusal:
            stream.restore(snapshot)
            pytest.fail(f"{what} is taken")
        assert len(str(refusal.value).splitlines()) == 1, what
    assert torch.equal(latents_of(stream, 2), latents_of(twin, 2))


def test_a_snapshot_with_chunks_in_flight_belongs_to_its_steps_and_its_length() -> None:
    family, ending = FAMILIES["rolling_forcing"], stream_of("rolling_forcing", last_chunk=5)
    latents_of(ending, 4)
    snapshot = ending.snapshot()  # of chunks 4 and 5 in flight
    longer = stream_of("rolling_forcing", last_chunk=9)
    with pytest.raises(ValueError, match="2 chunks in flight, and this stream 4 at its place"):
        longer.restore(snapshot)
    fewer = tiny.stream(cache=family.cache, sampler=replace(family.sampler, steps=(1000, 500)))
    with pytest.raises(ValueError, match="2 chunks in flight, and this stream 1 at its place"):
        fewer.restore(snapshot)
    same = stream_of("rolling_forcing", last_chunk=5)
    same.restore(snapshot)
    assert torch.equal(latents_of(same, 2), latents_of(ending, 2))


def test_a_rolling_stream_refuses_a_snapshot_whose_window_has_no_room() -> None:
    stream = tiny.stream(cache=tiny.window(9, 3))
    latents_of(stream, 2)
    with pytest.raises(ValueError, match="raise it to 21 or give fewer steps"):
        stream_of("rolling_forcing").restore(stream.snapshot())


# Chunks made again of their latents.


@pytest.mark.slow
@of_every_family
def test_a_stream_is_made_again_of_its_latents_and_changes_of_prompt(name: str) -> None:
    full = chunks_to_fill(FAMILIES[name].cache)
    changes = {1: "recache", 3: "blend 2", full: "recache", full + 2: "soft", full + 4: "cut"}

    def run(kept: list[Tensor], chunks: int) -> tuple[list[Tensor], Stream]:
        stream, made = stream_of(name), []
        for chunk in range(chunks):
            if chunk in changes:
                stream.switch(tiny.prompt(chunk), changes[chunk])
            if chunk < len(kept):
                stream.replay(kept[chunk])
            made.append(kept[chunk] if chunk < len(kept) else stream.step().latents)
        return made, stream

    made, _ = run([], full + 8)
    for count in (1, 3, full + 1, full + 5):
        again, stream = run(made[:count], full + 8)
        assert all(map(torch.equal, again, made)), count
    assert torch.equal(stream.step().latents, run([], full + 9)[0][-1])


def test_a_replay_that_is_stopped_leaves_the_chunks_in_flight() -> None:
    stream = begun_stream("rolling_forcing")
    twin = stream.fork()
    kept = twin.step().latents

    def on_pass(kind: str, number: int) -> None:
        if kind == "denoise":
            raise Stop

    with pytest.raises(Stop):
        stream.replay(kept, on_pass)
    stream.replay(kept)
    assert torch.equal(latents_of(stream, 3), latents_of(twin, 3))


@of_every_family
def test_a_start_clip_may_be_given_chunk_by_chunk(name: str) -> None:
    cache = FAMILIES[name].cache
    stream, twin = stream_of(name), stream_of(name)
    clip = torch.randn(1, stream.model.config.in_dim, 2 * cache.chunk_frames, 4, 6)
    stream.start_from(clip)
    for part in clip.split(cache.chunk_frames, dim=2):
        twin.replay(part, is_start=True)
    assert torch.equal(latents_of(stream, 3), latents_of(twin, 3))
    with pytest.raises(ValueError, match="start latents come before the first one"):
        twin.replay(part, is_start=True)


@pytest.mark.parametrize("first_alone", [False, True])
def test_images_that_a_handoff_delivers_are_encoded_again_as_those_that_are_decoded(
    first_alone: bool,
) -> None:
    stream, twin, shown = stream_of("krea"), stream_of("krea"), []
    with Handoff(stream.decoder, shown.append, first_alone=first_alone) as handoff:
        for _ in range(5):
            latents = stream.generate()
            stream.hand_on(latents, handoff)
            torch.testing.assert_close(latents, twin.step().latents, **ROUNDING)
    assert sum(images.shape[1] for images in shown) == 57


# A first chunk of another length.


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.cache.chunk_frames > 1])
def test_a_first_chunk_may_be_shorter_with_clip_decoder_and_cut(name: str, tmp_path: Path) -> None:
    first = {"first_chunk_frames": 1}
    if FAMILIES[name].sampler.rolling:
        with pytest.raises(ValueError, match="give no memory_rates, rebuild or first_chunk_frames"):
            stream_of(name, first)
        return
    stream = stream_of(name, first, decoder=decoder_of())
    images = [stream.step().images.shape[1] for _ in range(3)]
    stream.switch(tiny.prompt(5), "cut")
    stream = through_a_file(stream, tmp_path)
    images += [stream.step().images.shape[1] for _ in range(2)]
    assert images == [1, 12, 12, 1, 12]
    begun = stream_of(name, first, decoder=decoder_of())
    clip = begun.start_from_images(torch.rand(1, 20, 3, 32, 48))
    assert [chunk.images.shape[1] for chunk in clip] == [1, 12]
    again = through_a_file(begun, tmp_path)
    chunks = [each.step() for each in (begun, again)]
    assert torch.equal(*(chunk.latents for chunk in chunks))
    assert torch.equal(*(chunk.images for chunk in chunks))


# What a stream may run on.


@of_every_family
def test_a_batch_is_its_samples_made_alone(name: str) -> None:
    chunks = chunks_to_fill(FAMILIES[name].cache) + 1
    prompts = torch.cat([tiny.prompt(0), tiny.prompt(1)])
    both = latents_of(stream_of(name, batch=2, prompt_embeds=prompts), chunks)
    for sample in range(2):
        alone = stream_of(name, prompt_embeds=tiny.prompt(sample), seed=sample)
        torch.testing.assert_close(
            both[sample : sample + 1], latents_of(alone, chunks), atol=1e-4, rtol=1e-4
        )


@of_every_family
def test_a_cache_of_8_bits_is_close_and_saved_exactly(name: str, tmp_path: Path) -> None:
    exact, stream = begun_stream(name), stream_of(name, {"storage": "int8"})
    chunks = chunks_to_fill(stream.cache_config)
    made = latents_of(stream, chunks)
    near = latents_of(stream_of(name), chunks)
    assert float((made - near).norm() / near.norm()) < 0.05
    for mode in ("recache", "blend 2"):
        stream.switch(tiny.prompt(5), mode)
        twin = through_a_file(stream, tmp_path)
        assert torch.equal(latents_of(twin, LAST), latents_of(stream, LAST))
    assert stream.state.cache.nbytes < exact.state.cache.nbytes


@of_every_family
def test_keys_rotated_in_every_pass_give_the_same_bits(name: str) -> None:
    def run(keep_rotated: bool) -> Tensor:
        stream = stream_of(name, keep_rotated=keep_rotated)
        made = [latents_of(stream, chunks_to_fill(stream.cache_config))]
        stream.switch(tiny.prompt(5), "recache")
        return torch.cat([*made, latents_of(stream, 3)], dim=2)

    assert torch.equal(run(True), run(False))


@pytest.mark.slow
@pytest.mark.parametrize("keep_rotated", [True, False])
@pytest.mark.parametrize(
    ("name", "cache"),
    [
        *((name, {}) for name in ONE_OF_EACH_CACHE),
        ("longlive", {"sink_frames": 2, "anchor_frames": 1, "decay": 0.5}),
    ],
)
def test_recorded_passes_serve_one_stream_after_another(
    name: str, cache: dict[str, Any], keep_rotated: bool
) -> None:
    channels = model_of(4 if name in KEPT else 16).config.in_dim
    network = tiny.model(replace(tiny.CONFIG, in_dim=channels, out_dim=channels))
    graphed = GraphedModel(network, recorder := TraceRecorder())

    def run(model: Any, seed: int) -> Tensor:
        stream = stream_of(name, cache, model=model, seed=seed, keep_rotated=keep_rotated)
        made = [latents_of(stream, chunks_to_fill(stream.cache_config) + 2 * seed)]
        stream.switch(tiny.prompt(5), "recache")
        return torch.cat([*made, latents_of(stream, 2)], dim=2)

    for seed in (0, 1):  # the second on the memory that the first was lent
        assert torch.equal(run(graphed, seed), run(network, seed))
    assert recorder.replayed


@of_every_family
def test_weights_of_8_bits_stream(name: str) -> None:
    channels = 4 if name in KEPT else 16
    network = tiny.model(replace(tiny.CONFIG, in_dim=channels, out_dim=channels))
    quantise_linears(network)
    made, exact = (latents_of(stream_of(name, **o), 3) for o in ({"model": network}, {}))
    assert 0 < float((made - exact).norm() / exact.norm()) < 0.3


@of_every_family
def test_a_strength_changes_between_two_chunks_and_the_last_one_keeps_its_weights(
    name: str, tmp_path: Path
) -> None:
    network = tiny.model(model_of(4 if name in KEPT else 16).config)
    weight = network.blocks[0].ffn[0].weight
    stream, plain = (stream_of(name, model=m) for m in (network, tiny.model(network.config)))
    latents_of(stream, 3), latents_of(plain, 3)
    twin = plain.fork()
    stream.forget_weights()
    weight.mul_(1.5)
    snapshot = plain.snapshot()  # with the clean pass of the old weights
    again = Stream.from_snapshot(network, snapshot, decoder=stream.decoder)
    made = latents_of(stream, 2)
    assert torch.equal(made, latents_of(again, 2))
    assert not torch.equal(made, latents_of(twin, 2))


# Several processes.

SHARED: dict[str, dict[str, Any]] = {name: {} for name in KEPT} | {
    "krea": {"rebuild": "first"},
    "reward_forcing": {"sink_frames": 2, "anchor_frames": 1},  # its own: in `test_parallel`
}
SIX_HEADS = replace(tiny.CONFIG, num_heads=6)


def video_of(stream: Stream) -> Tensor:
    made = [latents_of(stream, chunks_to_fill(stream.cache_config))]
    for mode in ("recache", "blend 2"):
        stream.switch(tiny.prompt(5), mode)
        made.append(latents_of(stream, 2))
    return torch.cat(made, dim=2)


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    for name, cache in SHARED.items():
        whole = stream_of(name, cache, model=tiny.model(SIX_HEADS))
        config, grid = whole.cache_config, whole.state.cache.grid
        split = Split.of(Process(rank=rank, world_size=2), SIX_HEADS, grid, config)
        stream = SequenceParallelStream(
            SequenceParallelModel(tiny.model(SIX_HEADS), split),
            tiny.prompt(),
            height=32,
            width=48,
            cache=config,
            sampler=FAMILIES[name].sampler,
        )
        made = video_of(stream)
        snapshot = stream.snapshot()
        after = latents_of(stream, 1)
        if not rank:
            snapshot.save(folder / f"{name}.safetensors")
            torch.save(torch.cat([made, after], dim=2), folder / f"{name}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_make_the_stream_of_one(tmp_path: Path) -> None:
    spawn(run_rank, (tmp_path,), nprocs=2)
    close = {"atol": 1e-4, "rtol": 1e-3}
    for name, cache in SHARED.items():
        alone = stream_of(name, cache, model=tiny.model(SIX_HEADS))
        expected = torch.cat([video_of(alone), latents_of(alone, 1)], dim=2)
        made = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        torch.testing.assert_close(made, expected, **close)
        again = stream_of(name, cache, model=tiny.model(SIX_HEADS))
        again.restore(Snapshot.load(tmp_path / f"{name}.safetensors"))
        frames = again.cache_config.chunk_frames
        torch.testing.assert_close(latents_of(again, 1), expected[:, :, -frames:], **close)


def test_images_are_encoded_by_one_process_alone() -> None:
    grid = stream_of("krea").state.cache.grid
    with pytest.raises(ValueError, match="stream this model in one process, or set rebuild to"):
        Split.of(Process(rank=0, world_size=2), SIX_HEADS, grid, FAMILIES["krea"].cache)


# Live.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["longlive", "causal_forcing_2step", "krea", "rolling_forcing"])
def test_a_live_session_is_steered_goes_back_and_is_made_again_from_its_log(
    name: str, tmp_path: Path
) -> None:
    def fresh() -> Stream:
        model = tiny.model(model_of(4 if name in KEPT else 16).config)
        return stream_of(name, model=model, prompt_embeds=encode("p0"))

    full = chunks_to_fill(FAMILIES[name].cache)
    script = {
        2: [Prompt(text="p1", mode=Switch.parse("recache"))],
        4: [Lora(name="ink", strength=0.5)],
        full + 1: [Prompt(text="p2", mode=Switch.parse("blend 2"))],
        full + 3: [Rewind(chunk=3, branch="again"), Prompt(text="p5", mode=Switch.parse("cut"))],
        full + 5: [Prompt(text="p1", mode=Switch.parse("soft"))],
    }
    trial = Trial(script, fresh(), log=tmp_path / "log.jsonl")
    events = trial.run(full + 8)
    assert isinstance(events[-1], Ended) and not of_kind(events, Refused)
    shown = {each.chunk: each.images for each in of_kind(events, Picture)}
    chunks = driven(fresh(), line_of(events), events[-1].chunk)
    for chunk in chunks:
        if chunk.images is not None:
            assert torch.equal(shown[chunk.index], to_uint8(chunk.images[0])), chunk.index
    made = latents_by_branch(tmp_path / "log.jsonl", fresh())
    for chunk in chunks[3:]:
        assert torch.equal(made["again"][chunk.index - 3], chunk.latents)


@pytest.mark.parametrize("name", ["causal_forcing_2step", "rolling_forcing", "longlive"])
def test_a_live_clip_is_what_a_stream_starts_from(name: str, tmp_path: Path) -> None:
    def fresh() -> Stream:
        return stream_of(name, prompt_embeds=encode("p0"), model=tiny.model())

    clip = torch.randn(1, 4, 2 * FAMILIES[name].cache.chunk_frames, 4, 6)
    log = tmp_path / "log.jsonl"
    trial = Trial({4: [Rewind(chunk=1, branch="b")]}, fresh(), clip=clip, log=log)
    trial.run(7)
    expected = fresh()
    made = [chunk.latents for chunk in expected.start_from(clip)]
    made += [expected.step().latents for _ in range(3)]
    found = latents_by_branch(log, fresh(), clip=clip)
    assert all(map(torch.equal, found["b"], made[1:]))


def test_a_stream_without_images_to_encode_says_once_what_it_does(caplog: Any) -> None:
    made = latents_of(stream_of("krea", decoder=None, model=model_of(16)), 5)
    assert [each.getMessage()[:22] for each in caplog.records] == ["rebuild is 'reencoded'"]
    assert torch.equal(
        made, latents_of(stream_of("krea", {"rebuild": "first"}, model=model_of(16)), 5)
    )


# The page.


@of_every_family
def test_the_page_says_what_a_preset_does(name: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines()]
    _, sizes, steps, passes, length, source = next(row for row in rows if row[0] == f"`{name}`")
    family, stream = FAMILIES[name], stream_of(name)
    cache, sampler = family.cache, family.sampler
    assert sizes == f"{cache.window_frames} / {cache.sink_frames} / {cache.chunk_frames}"
    first = "" if not sampler.first_steps else f", first {_words(sampler.first_steps)}"
    assert steps == f"{_words(sampler.steps)}{first}"
    counted = []
    for _ in range(3):
        kinds: list[str] = []
        stream.step(lambda kind, number, kinds=kinds: kinds.append(kind))
        counted.append([kinds.count("denoise"), kinds.count("clean")])
    assert counted[1:] == 2 * [list(map(int, passes.split(",")[0].split(" + ")))]
    assert counted[0] == [int(passes.split(", ")[1]), 0]
    assert (int(length), source) == (family.frames, family.source)
    assert family.licence in page


def _words(steps: tuple[int, ...]) -> str:
    return " ".join(map(str, steps))
