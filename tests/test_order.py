"""A stream whose calls come in any order, and snapshots that anybody may have made.

Each fault that was found has its test here; `test_programs` draws orders at random.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

from rf_core import kv_cache
from rf_core.decoders.decoder import TAEHVDecoder, WanDecoder
from rf_core.decoders.taehv import TAEHV, TAEHVConfig
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.state import FORMAT, METADATA_KEY, Snapshot
from rf_core.stream import Stream

CACHES = {
    "published": tiny.window(9, 3),
    "float32 accumulator": tiny.window(9, 3, accumulator="float32"),
    "8 bits": tiny.window(9, 3, storage="int8"),
    "no sink": tiny.window(6, 0),
    "static sink": tiny.window(9, 3, decay=1.0),
    "sink no multiple of the chunk": tiny.window(9, 2),
}


class Stop(BaseException):
    pass


def latents_of(stream: Stream, chunks: int) -> Tensor:
    return torch.cat([stream.step().latents for _ in range(chunks)], dim=2)


def stopped(stream: Stream, at: int) -> None:
    """Stop a step before its pass of this number."""
    calls = iter(range(at + 1))

    def on_pass(kind: str, number: int) -> None:
        if next(calls) == at:
            raise Stop

    with pytest.raises(Stop):
        stream.step(on_pass)


def wan() -> WanDecoder:
    torch.manual_seed(0)
    return WanDecoder(WanVAE(VAEConfig(dim=2, num_res_blocks=1)).eval())


def taehv() -> TAEHVDecoder:
    torch.manual_seed(0)
    config = TAEHVConfig(decoder_widths=(4, 4, 4, 4), encoder_width=4)
    return TAEHVDecoder(TAEHV(config).eval())


def with_decoder(decoder: Any, **options: Any) -> Stream:
    config = replace(tiny.CONFIG, in_dim=16, out_dim=16)
    return tiny.stream(model=tiny.model(config), decoder=decoder, **options)


# Changes of prompt between two steps.


@pytest.mark.parametrize("later", ["soft", "recache", "blend 2", "cut"])
@pytest.mark.parametrize("first", ["soft", "recache", "blend 2", "cut"])
def test_a_snapshot_between_two_changes_of_prompt_changes_no_future(first: str, later: str) -> None:
    def run(snapshots: bool) -> Tensor:
        stream = tiny.stream(cache=tiny.window(9, 3))
        latents_of(stream, 4)
        stream.switch(tiny.prompt(1), first)
        if snapshots:
            stream.snapshot()
        stream.switch(tiny.prompt(2), later)
        return latents_of(stream, 3)

    assert torch.equal(run(True), run(False))


def test_soft_after_recache_leaves_the_window_as_it_was_made() -> None:
    both, soft = tiny.stream(), tiny.stream()
    for stream in (both, soft):
        latents_of(stream, 4)
    both.switch(tiny.prompt(1), "recache")
    both.switch(tiny.prompt(2), "soft")
    soft.switch(tiny.prompt(2), "soft")
    assert torch.equal(latents_of(both, 3), latents_of(soft, 3))


@pytest.mark.parametrize("keep", ["the stream", "a snapshot"])
def test_a_recache_that_was_stopped_half_way_is_finished_before_a_soft_change(keep: str) -> None:
    def run(stop: int) -> Tensor:
        stream = tiny.stream()
        latents_of(stream, 4)
        stream.switch(tiny.prompt(1), "recache")
        stopped(stream, stop)
        if keep == "a snapshot":
            stream = Stream.from_snapshot(stream.model, stream.snapshot())
        stream.switch(tiny.prompt(2), "soft")
        return latents_of(stream, 3)

    assert torch.equal(run(1), run(2))  # of its two passes one is done, or both are


def test_a_recache_stopped_before_its_first_pass_is_given_up_for_a_soft_change() -> None:
    once, never = tiny.stream(), tiny.stream()
    for stream in (once, never):
        latents_of(stream, 4)
    once.switch(tiny.prompt(1), "recache")
    stopped(once, 0)
    for stream in (once, never):
        stream.switch(tiny.prompt(2), "soft")
    assert torch.equal(latents_of(once, 3), latents_of(never, 3))


# Changes of the sink's decay.


@pytest.mark.parametrize("name", CACHES)
def test_a_decay_set_before_anything_leaves_the_window_is_that_of_a_stream_made_with_it(
    name: str,
) -> None:
    later, always = tiny.stream(cache=CACHES[name]), replace(CACHES[name], decay=0.5)
    later.step()
    later.set_decay(0.5)
    expected = latents_of(tiny.stream(cache=always), 6)
    assert torch.equal(latents_of(later, 5), expected[:, :, 3:])


@pytest.mark.parametrize("before, after", [(1.0, 0.5), (0.5, 1.0)])
@pytest.mark.parametrize("keep", ["the stream", "a snapshot"])
def test_a_decay_after_a_stopped_chunk_leaves_its_eviction_to_be_undone(
    before: float, after: float, keep: str
) -> None:
    def run(stops: bool) -> Tensor:
        stream = tiny.stream(cache=tiny.window(9, 3, decay=before))
        latents_of(stream, 5)
        if stops:
            stopped(stream, 2)
        stream.set_decay(after)
        if keep == "a snapshot":
            stream = Stream.from_snapshot(stream.model, stream.snapshot())
        stream.switch(tiny.prompt(1), "recache")
        return latents_of(stream, 3)

    assert torch.equal(run(True), run(False))


def test_a_restored_decay_takes_no_other_memory() -> None:
    stream = tiny.stream(cache=tiny.window(9, 3))
    latents_of(stream, 5)
    snapshot, cache = stream.snapshot(), stream.state.cache
    expected = latents_of(stream, 3)
    stream.set_decay(0.5)
    latents_of(stream, 2)
    stream.restore(snapshot)
    assert stream.state.cache is cache
    assert torch.equal(latents_of(stream, 3), expected)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_a_decay_that_is_no_fraction_changes_nothing(decay: float) -> None:
    stream = tiny.stream()
    with pytest.raises(ValueError, match="between 0 and 1"):
        stream.set_decay(decay)
    assert stream.state.decay_due is None


# A chunk that is not made.


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["the stream", "a fork", "a snapshot", "a file"])
@pytest.mark.parametrize("name", CACHES)
def test_a_stopped_chunk_may_be_followed_by_a_recache(name: str, keep: str, tmp_path: Path) -> None:
    def run(stops: bool) -> Tensor:
        stream = tiny.stream(cache=CACHES[name])
        latents_of(stream, 5)
        if stops:
            stopped(stream, 2)  # the window has been moved, and a pass written to it
            if keep == "a fork":
                stream = stream.fork()
            elif keep != "the stream":
                snapshot = stream.snapshot()
                if keep == "a file":
                    snapshot.save(tmp_path / "state.safetensors")
                    snapshot = Snapshot.load(tmp_path / "state.safetensors")
                stream = Stream.from_snapshot(stream.model, snapshot)
        stream.switch(tiny.prompt(1), "recache")
        return latents_of(stream, 3)

    assert torch.equal(run(True), run(False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize(("room", "kind"), [(0, "cuda"), (float("inf"), "cpu")])
def test_on_a_card_the_sink_is_held_where_there_is_room_and_put_back(
    monkeypatch, room: float, kind: str
) -> None:
    monkeypatch.setattr(kv_cache, "ROOM", room)

    def run(stops: bool) -> Tensor:
        stream = tiny.stream(model=tiny.model().to("cuda"), cache=tiny.window(9, 3), batch=2)
        latents_of(stream, 5)
        if stops:
            stopped(stream, 2)
            held = stream.state.cache.sink_backup
            assert held is not None and {t.device.type for t in held.tensors.values()} == {kind}
            assert all(t.is_pinned() for t in held.tensors.values() if kind == "cpu")
        stream.switch(tiny.prompt(1), "recache")
        return latents_of(stream, 3)

    assert torch.equal(run(True), run(False))


@pytest.mark.parametrize(("free", "roomy"), [(7, False), (8, True)])
def test_a_card_s_sink_is_held_beside_it_only_in_plenty_of_room(monkeypatch, free, roomy) -> None:
    sink = SimpleNamespace(device=torch.device("cuda:1"), nbytes=2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 100))
    assert kv_cache._have_room_beside({"k": sink}) == roomy
    assert kv_cache._have_room_beside({"k": torch.zeros(2)}) and kv_cache._have_room_beside({})


def test_a_blend_starts_where_the_last_chunk_that_was_made_stood() -> None:
    def run(stops: bool) -> Tensor:
        stream = tiny.stream()
        latents_of(stream, 2)
        stream.switch(tiny.prompt(1), "blend 3")
        stream.step()
        if stops:
            stopped(stream, 2)
        stream.switch(tiny.prompt(2), "blend 2")
        return latents_of(stream, 3)

    assert torch.equal(run(True), run(False))


# What is called in the midst of a chunk.


@pytest.mark.parametrize(
    "call", ["switch", "snapshot", "restore", "fork", "step", "finish_clean_pass", "replay"]
)
def test_what_is_called_within_a_chunk_is_refused_and_changes_nothing(call: str) -> None:
    stream = tiny.stream()
    latents = stream.step().latents
    snapshot, twin = stream.snapshot(), stream.fork()
    calls: dict[str, Callable[[], Any]] = {
        "switch": lambda: stream.switch(tiny.prompt(1)),
        "snapshot": stream.snapshot,
        "restore": lambda: stream.restore(snapshot),
        "fork": stream.fork,
        "step": stream.step,
        "finish_clean_pass": stream.finish_clean_pass,
        "replay": lambda: stream.replay(latents),
    }

    def on_pass(kind: str, number: int) -> None:
        with pytest.raises(RuntimeError, match="in the middle of a chunk"):
            calls[call]()

    assert torch.equal(stream.step(on_pass).latents, twin.step().latents)
    assert torch.equal(latents_of(stream, 2), latents_of(twin, 2))


def test_another_thread_is_refused_too() -> None:
    stream, refused = tiny.stream(), []

    def switch() -> None:
        try:
            stream.switch(tiny.prompt(1))
        except RuntimeError as error:
            refused.append(error)

    def on_pass(kind: str, number: int) -> None:
        thread = threading.Thread(target=switch)
        thread.start()
        thread.join()

    stream.step(on_pass)
    assert len(refused) == 2
    stream.switch(tiny.prompt(1))


# What callers do with tensors that they gave or got.


def test_latents_that_were_handed_out_are_the_caller_s() -> None:
    stream = tiny.stream()
    twin = stream.fork()
    stream.step().latents.zero_(), twin.step()
    assert torch.equal(stream.step().latents, twin.step().latents)


def test_latents_and_prompts_that_were_given_are_copied() -> None:
    embeds, latents = tiny.prompt(), torch.randn(1, 4, 3, 4, 6)
    changed, left = tiny.stream(prompt_embeds=embeds), tiny.stream()
    for stream in (changed, left):
        stream.start_from(latents)
    latents.zero_(), embeds.zero_()
    assert torch.equal(changed.step().latents, left.step().latents)
    embeds = tiny.prompt(1)
    for stream in (changed, left):
        stream.switch(embeds, "blend 2")
    embeds.zero_()
    assert torch.equal(latents_of(changed, 2), latents_of(left, 2))


# Chunks made again of their latents.


@pytest.mark.parametrize("name", CACHES)
def test_a_stream_is_made_again_of_its_latents_and_changes_of_prompt(name: str) -> None:
    changes = {2: "recache", 4: "blend 2", 7: "soft", 9: "cut"}

    def run(kept: list[Tensor]) -> tuple[list[Tensor], Stream]:
        stream, made = tiny.stream(cache=CACHES[name]), []
        for chunk in range(11):
            if chunk in changes:
                stream.switch(tiny.prompt(chunk), changes[chunk])
            if chunk < len(kept):
                stream.replay(kept[chunk])
            made.append(kept[chunk] if chunk < len(kept) else stream.step().latents)
        return made, stream

    made, stream = run([])
    for count in (3, 5, 11):
        again, twin = run(made[:count])
        assert all(map(torch.equal, again, made))
        assert torch.equal(stream.fork().step().latents, twin.step().latents)


def test_replay_decodes_or_leaves_that_to_the_caller() -> None:
    made, again = with_decoder(taehv()), with_decoder(taehv())
    chunks = [made.step() for _ in range(3)]
    assert torch.equal(again.replay(chunks[0].latents).images, chunks[0].images)
    chunk = again.replay(chunks[1].latents, decode=False)
    assert (chunk.index, chunk.images) == (1, None)
    assert torch.equal(again.decode(chunk.latents), chunks[1].images)
    assert torch.equal(again.replay(chunks[2].latents).images, chunks[2].images)
    with pytest.raises(ValueError, match=r"latents are \[1, 16, 2, 4, 6\]; a chunk is"):
        again.replay(chunks[2].latents[:, :, :2])


# Snapshots.


def broken(snapshot: Snapshot) -> dict[str, Snapshot]:
    """Snapshots that are not to be taken, by what is wrong with them."""
    tensors, facts = snapshot.tensors, snapshot.facts

    def fact(**changed: Any) -> Snapshot:
        return replace(snapshot, facts={**facts, **changed})

    def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Snapshot:
        return replace(snapshot, tensors={**tensors, name: change(tensors[name])})

    found = {
        "another model": fact(fingerprint="0" * 16),
        "another size": fact(height=64),
        "seed of a word": fact(seed="one"),
        "chunks below 0": fact(num_chunks=-1),
        "chunks true": fact(num_chunks=True),
        "frames of a longer window": fact(frames=[99, 3, 0, 0]),
        "frames of fractions": fact(frames=[1.5, 0, 0, 0]),
        "two frames": fact(frames=[1, 2]),
        "room that nobody made": fact(frames=[6, 0, 1, 3]),
        "cache of a word": fact(cache="large"),
        "cache of 10^9 frames": fact(cache={**facts["cache"], "window_frames": 10**9}),
        "unknown blend": fact(blend=[3, 0, "cubic"]),
        "decay of a word": fact(decay_due="slow"),
        "decay above 1": fact(decay_due=1.5),
        "blend without prompts": fact(blend=[3, 0, "lerp"]),
        "blend past its end": fact(blend=[3, 4, "lerp"]),
        "decoder that saw nothing": fact(decoder_frames=-1),
        "a prompt that broadcasts": tensor("prompt_embeds", lambda t: t[..., :1]),
        "a prompt without tokens": tensor("prompt_embeds", lambda t: t[:, :0]),
        "latents of another picture": tensor("last_latents", lambda t: t[..., 1:]),
        "latents that broadcast": tensor("last_latents", lambda t: t[:, :1]),
        "latents of half a window": tensor("last_latents", lambda t: t[:, :, 1:]),
        "more latents than a sink": tensor("first_latents", lambda t: torch.cat([t, t], 2)),
        "a stranger": replace(snapshot, tensors={**tensors, "extra": torch.zeros(1)}),
    }
    if not snapshot.compact:
        found |= {
            "keys that broadcast": tensor("cache.k", lambda t: t[:, :, :, :1]),
            "keys of one token": tensor("cache.k", lambda t: t[:, :, :1]),
            "keys of whole numbers": tensor("cache.k", lambda t: t.to(torch.int8)),
            "values of one axis": tensor("cache.v", lambda t: t.flatten()),
            "cache of 1000 frames": fact(cache={**facts["cache"], "window_frames": 1000}),
        }
    for name in facts.keys() - {"decoder", "decay_due", "first_due", "format"}:
        found[f"without {name}"] = replace(
            snapshot, facts={key: value for key, value in facts.items() if key != name}
        )
    for name in tensors:
        found[f"without {name}"] = replace(
            snapshot, tensors={key: value for key, value in tensors.items() if key != name}
        )
    return found


def test_a_snapshot_that_is_refused_changes_nothing() -> None:
    stream = tiny.stream()
    latents_of(stream, 4)
    snapshot = stream.snapshot()
    latents_of(stream, 1)
    twin = stream.fork()
    for name, each in broken(snapshot).items():
        taken = {
            "restore": stream.restore,
            "from_snapshot": partial(Stream.from_snapshot, stream.model),
        }
        taken.pop({"another size": "from_snapshot", "without sampler": "restore"}.get(name), None)
        for how, take in taken.items():
            assert refusal_of(take, each), f"{how} takes a snapshot with {name}"
    assert torch.equal(latents_of(stream, 3), latents_of(twin, 3))


def test_so_does_a_compact_one() -> None:
    stream = tiny.stream()
    latents_of(stream, 4)
    snapshot = stream.snapshot(compact=True)
    twin = stream.fork()
    harmless = {"without sampler", "room that nobody made"}
    for name, each in broken(snapshot).items():
        if name not in harmless:
            assert refusal_of(stream.restore, each), f"a snapshot with {name} is taken"
    assert torch.equal(latents_of(stream, 3), latents_of(twin, 3))


def refusal_of(take: Callable[[Snapshot], Any], snapshot: Snapshot) -> bool:
    """Whether it is refused in a sentence."""
    try:
        take(snapshot)
    except ValueError as error:
        return len(str(error).splitlines()) == 1
    return False


@pytest.mark.parametrize("header", ["[]", "3", "null", '"x"', "{}", '{"format": []}', "[" * 9000])
def test_a_file_whose_facts_are_none_is_refused_in_a_sentence(header: str, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={METADATA_KEY: header})
    with pytest.raises(ValueError, match="snapshot"):
        Snapshot.load(path)


def test_a_small_file_that_promises_a_large_tensor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    size = 10**12
    header = {
        "__metadata__": {METADATA_KEY: json.dumps({"format": FORMAT})},
        "cache.k": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]},
    }
    data = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data)
    with pytest.raises(ValueError, match="cannot be read as a snapshot"):
        Snapshot.load(path)


@pytest.mark.parametrize("evictions", [0, 3])
@pytest.mark.parametrize("ways", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_float32_sink_goes_from_one_precision_to_the_other(
    ways: tuple[torch.dtype, torch.dtype], evictions: int
) -> None:
    here, there = ways
    cache = tiny.window(9, 3, accumulator="float32")
    stream = tiny.stream(model=tiny.model().to(here), cache=cache)
    latents_of(stream, 3 + evictions)
    snapshot = stream.snapshot()
    again = Stream.from_snapshot(tiny.model().to(there), snapshot)
    found, tokens = again.state.cache, 3 * stream.state.cache.frame_tokens
    mine = stream.state.cache
    exact = [c.exact_sink if c.exact_sink is not None else None for c in (mine, found)]
    sinks = [c.k_NBWHD[:, :, :tokens].float() for c in (mine, found)]
    if evictions:
        kept = [sink if e is None else e[0] for e, sink in zip(exact, sinks, strict=True)]
        assert torch.equal(*kept)  # the accumulator itself
    else:
        assert torch.equal(*(sink.bfloat16() for sink in sinks))
    again.step()


def test_a_compact_snapshot_is_as_exact_as_its_chunks_where_nothing_has_left() -> None:
    for window, sink in ((9, 4), (10, 2), (12, 5)):
        stream = tiny.stream(cache=tiny.window(window, sink))
        latents_of(stream, 3)
        again = Stream.from_snapshot(stream.model, stream.snapshot(compact=True))
        assert torch.equal(latents_of(again, 1), latents_of(stream, 1))


def test_a_decoder_of_another_kind_does_not_take_over_the_past(caplog: Any) -> None:
    stream = with_decoder(wan())
    for _ in range(4):
        stream.step()
    snapshot = stream.snapshot()
    same = Stream.from_snapshot(stream.model, snapshot, decoder=wan())
    assert torch.equal(same.step().images, stream.fork().step().images)
    assert not caplog.records
    other = Stream.from_snapshot(stream.model, snapshot, decoder=taehv())
    assert "decoded by wan; taehv goes on from its last" in caplog.text
    chunk = other.step()
    assert chunk.images.shape[1] == 12
    assert torch.equal(chunk.latents, stream.step().latents)
    blind = Stream.from_snapshot(stream.model, snapshot)
    assert blind.step().images is None
    sees = Stream.from_snapshot(stream.model, blind.snapshot(), decoder=wan())
    assert sees.step().images.shape[1] == 12  # it is not the stream's first


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(("chunks", "sink"), [(0, 3), (1, 3), (1, 5), (2, 5), (1, 2)])
def test_a_decoder_that_joins_a_stream_later_gives_as_many_images_as_its_place_has(
    chunks: int, sink: int, compact: bool
) -> None:
    stream = with_decoder(None, cache=tiny.window(12, sink))
    for _ in range(chunks):
        stream.step()
    again = Stream.from_snapshot(stream.model, stream.snapshot(compact=compact), decoder=taehv())
    assert [again.step().images.shape[1] for _ in range(2)] == [12 if chunks else 9, 12]


def test_a_snapshot_goes_on_in_another_precision() -> None:
    stream = tiny.stream()
    stream.step()
    again = Stream.from_snapshot(tiny.model().bfloat16(), stream.snapshot())
    torch.testing.assert_close(again.step().latents, stream.step().latents, atol=0.2, rtol=0)
