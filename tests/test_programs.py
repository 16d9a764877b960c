"""Random programs: whatever is called in whatever order, a stream is what `slow_stream` says.

RF_FUZZ=N tries N programs on every kind of cache, RF_FUZZ_SEED the programs of another seed. A
program that fails is printed as lines, made as short as it can be and still fail; give them to
`run` to see it again.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import pytest
import tiny
import torch
from slow_stream import SlowStream, padded
from torch import Tensor

from rf_core.attention import Attention, sdpa
from rf_core.config import CacheConfig, ModelConfig
from rf_core.decoders.decoder import Decoder, TAEHVDecoder, WanDecoder
from rf_core.decoders.taehv import TAEHV, TAEHVConfig
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.model import WanModel
from rf_core.state import Snapshot
from rf_core.stream import Chunk, OnPass, Stream

pytestmark = pytest.mark.slow

TRIES = int(os.environ.get("RF_FUZZ", "8"))
SEED = int(os.environ.get("RF_FUZZ_SEED", "1"))
ROUNDING = 1e-5
MAX_STREAMS = 3
SHRINKING_RUNS = 300


class Stop(BaseException):
    pass


class Failure(Exception):  # noqa: N818  # of a test
    pass


@lru_cache
def model_of(config: ModelConfig, dtype: torch.dtype) -> WanModel:
    return tiny.model(config).to(dtype)


@lru_cache
def decoder_of(name: str) -> Decoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "wan":
            return WanDecoder(WanVAE(VAEConfig(dim=2, num_res_blocks=1)).eval())
        return TAEHVDecoder(TAEHV(TAEHVConfig(decoder_widths=(4, 4, 4, 4), encoder_width=4)).eval())


def prompt_of(number: int, batch: int) -> Tensor:
    """Every third is short, every fourth one for each of a batch."""
    tokens = 2 + number if number % 3 == 2 else tiny.CONFIG.text_len
    return tiny.prompt(number, tokens=tokens, batch=1 if number % 4 else batch)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of cache, and what else a stream is made of."""

    cache: CacheConfig = field(default_factory=lambda: tiny.window(9, 3))
    dtype: torch.dtype = torch.float32
    keep_rotated: bool = True
    batch: int = 1
    seed: int = 0
    decoder: str | None = None

    def fast(self, attention: Attention) -> Stream:
        own = {"keep_rotated": self.keep_rotated, "attention": attention}
        return tiny.stream(prompt_embeds=prompt_of(0, self.batch), **self.both, **own)

    def slow(self) -> SlowStream:
        sizes = {"height": 32, "width": 48, "sampler": tiny.TWO_STEPS}
        return SlowStream(prompt_embeds=prompt_of(0, self.batch), **self.both, **sizes)

    @property
    def both(self) -> dict[str, Any]:
        channels = tiny.CONFIG.in_dim if self.decoder is None else 16
        config = replace(tiny.CONFIG, in_dim=channels, out_dim=channels)
        return {
            "model": model_of(config, self.dtype),
            "decoder": None if self.decoder is None else decoder_of(self.decoder),
            "cache": self.cache,
            "batch": self.batch,
            "seed": self.seed,
        }


BF16 = torch.bfloat16
KINDS = {
    "published": Kind(),
    "no sink": Kind(cache=tiny.window(7, 0)),
    "window of one chunk": Kind(cache=tiny.window(3, 0)),
    "sink and chunk alone": Kind(cache=tiny.window(6, 3)),
    "sink smaller than a chunk": Kind(cache=tiny.window(8, 2), seed=-5),
    "sink larger than a chunk": Kind(cache=tiny.window(11, 5), seed=2**63),
    "chunks of one frame": Kind(cache=tiny.window(5, 2, chunk=1)),
    "a batch of two": Kind(cache=tiny.window(8, 3, chunk=2), batch=2),
    "static sink": Kind(cache=tiny.window(9, 3, decay=1.0)),
    "key norms": Kind(cache=tiny.window(9, 3, keep_key_norms=True)),
    "rotated in every pass": Kind(cache=tiny.window(10, 4, chunk=2), keep_rotated=False),
    "bfloat16": Kind(dtype=BF16),
    "float32 sink": Kind(
        cache=tiny.window(10, 3, accumulator="float32", keep_key_norms=True), dtype=BF16
    ),
    "anchor": Kind(cache=tiny.window(9, 2, anchor_frames=1)),
    "anchor in chunks of one frame": Kind(
        cache=tiny.window(6, 1, chunk=1, anchor_frames=2, accumulator="float32"), dtype=BF16
    ),
    "int8 with an anchor": Kind(cache=tiny.window(9, 2, storage="int8", anchor_frames=1)),
    "int8": Kind(cache=tiny.window(9, 3, storage="int8")),
    "int8 with a float32 sink": Kind(
        cache=tiny.window(8, 2, storage="int8", accumulator="float32"), dtype=BF16
    ),
    "Wan VAE": Kind(decoder="wan"),
    "TAEHV": Kind(cache=tiny.window(5, 1, chunk=2), decoder="taehv"),
}


def any_kind(draw: random.Random) -> Kind:
    """One that is drawn."""
    chunk, sink, anchor = draw.randrange(1, 4), draw.randrange(6), draw.choice([0, 0, 1, 3])
    return Kind(
        cache=CacheConfig(
            window_frames=anchor + sink + chunk + draw.randrange(8),
            sink_frames=sink,
            anchor_frames=anchor,
            chunk_frames=chunk,
            decay=draw.choice([0.0, 0.5, 0.75, 0.999, 1.0]),
            accumulator=draw.choice(["reference", "float32"]),
            keep_key_norms=draw.random() < 0.5,
            storage=draw.choice(["exact", "int8"]),
        ),
        dtype=draw.choice([torch.float32, BF16]),
        keep_rotated=draw.random() < 0.5,
        batch=draw.choice([1, 1, 2]),
        seed=draw.randrange(-(2**64), 2**64),
    )


@dataclass
class Pair:
    """A stream and what it is held against."""

    fast: Stream
    slow: SlowStream
    same_images: bool = True
    """Whether the decoder's past is known; of a compact snapshot it is not."""

    def fork(self) -> Pair:
        return replace(self, fast=self.fast.fork(), slow=self.slow.fork())

    def take(self, fast: Stream, other: Pair) -> None:
        """Go on from where the other one was."""
        self.__dict__.update(other.__dict__, fast=fast, slow=other.slow.fork())


class Trial:
    """A program under way. Every verb of it is a method: `do_step` and so on."""

    def __init__(self, kind: Kind) -> None:
        self.kind, self.saved = kind, []
        self.calls_left: int | None = None
        self.pairs = [Pair(kind.fast(self.attention), kind.slow())]

    def run(self, line: str) -> None:
        """One line: the number of a stream, a verb, and what the verb takes."""
        number, verb, *given = line.split()
        pair = self.pairs[int(number) % len(self.pairs)]
        getattr(self, f"do_{verb}")(pair, *given)
        found, expected = pair.fast.state, pair.slow.state
        prompts = found.prompt_embeds, expected.prompt
        same("prompts", *(padded(embeds, tiny.CONFIG.text_len) for embeds in prompts))
        assert found.num_chunks == expected.num_chunks, "the number of chunks is wrong"

    def finish(self) -> None:
        """What every stream does next, and what it then remembers."""
        for pair in self.pairs:
            self.do_step(pair)
            self.do_step(pair)
            self.check_window(pair)
            if self.kind.decoder is not None:
                whole, parts = pair.slow.whole_images()
                # Some pixels of a random VAE stand on a knife's edge; a lost past shows in all.
                assert (whole - parts).abs().mean() < 1e-3, "a whole clip decodes differently"

    def do_step(self, pair: Pair, *, on_pass: OnPass | None = None) -> None:
        chunk = pair.fast.step(on_pass)
        same("latents", chunk.latents, pair.slow.step())
        self.check(pair, chunk)

    def do_replay(self, pair: Pair, number: str) -> None:
        """A chunk that is given: any, or for number 0 what the step would make."""
        latents = self.latents(pair, int(number))
        if number == "0":
            latents = pair.slow.fork().step()
        pair.slow.replay(latents.clone())
        chunk = pair.fast.replay(latents)
        same("replayed latents", chunk.latents, latents)
        self.check(pair, chunk, latents)

    def do_start(self, pair: Pair, number: str) -> None:
        chunks = 1 + int(number) % 3
        parts = [self.latents(pair, int(number) + n) for n in range(chunks)]
        if pair.slow.state.num_chunks:
            with raising(ValueError):
                pair.fast.start_from(torch.cat(parts, dim=2))
            return
        given = torch.cat(parts, dim=2)
        made = pair.fast.start_from(given)
        for chunk, part in zip(made, parts, strict=True):
            same("start latents", chunk.latents, part)
            pair.slow.replay(part)
        self.check(pair, made[-1], given)

    def do_switch(self, pair: Pair, number: str, *how: str) -> None:
        embeds = prompt_of(int(number), self.kind.batch)
        pair.slow.switch(embeds, " ".join(how))
        pair.fast.switch(embeds, " ".join(how))
        write_to(embeds)
        pair.same_images |= how[0] == "cut"

    def do_decay(self, pair: Pair, decay: str) -> None:
        pair.slow.set_decay(float(decay))
        pair.fast.set_decay(float(decay))

    def do_stop(self, pair: Pair, at: str) -> None:
        """Stop the step before its pass of this number, or else as the last guess is shown."""
        seen: list[tuple[str, int]] = []

        def on_pass(kind: str, number: int) -> None:
            seen.append((kind, number))
            if len(seen) > int(at):
                raise Stop

        def on_prediction(number: int, x0: Tensor) -> None:
            if number + 1 == len(tiny.TWO_STEPS.steps):
                raise Stop

        with raising(Stop):
            pair.fast.step(on_pass, on_prediction)
        began = any(kind == "denoise" for kind, _ in seen)
        pair.slow.abort(in_recache=seen[-1] != ("clean", 0), began=began)

    def do_fail(self, pair: Pair, calls: str) -> None:
        """A step that fails within a pass, when attention was called so often."""
        if pair.slow.state.recache_due:
            pair.fast.finish_clean_pass()  # so that any pass is one of the recache
        self.calls_left = int(calls)
        seen: list[str] = []
        try:
            self.do_step(pair, on_pass=lambda kind, number: seen.append(kind))
        except Failure:
            pair.slow.abort(in_recache=True, began="denoise" in seen)
        finally:
            self.calls_left = None

    def do_interfere(self, pair: Pair, number: str, *how: str) -> None:
        """A step, during which somebody else changes the prompt: refused."""

        def on_pass(kind: str, at: int) -> None:
            with raising(RuntimeError):
                pair.fast.switch(prompt_of(int(number), self.kind.batch), " ".join(how))

        self.do_step(pair, on_pass=on_pass)

    def do_refuse(self, pair: Pair, what: str, which: str, *how: str) -> None:
        """What cannot be done changes nothing."""
        fast = pair.fast
        with raising(ValueError):
            if what == "prompts":
                given = {
                    "count": tiny.prompt(3, batch=3),
                    "width": tiny.prompt(3)[..., 1:],
                    "length": tiny.prompt(3, tokens=tiny.CONFIG.text_len + 1),
                }
                fast.switch(given[which], " ".join(how))
            elif what == "latents":
                given = self.latents(pair, 1)
                fast.replay(given[:, :, :0] if which == "none" else given[..., 1:])
            else:
                fast.restore(self.damaged(pair, which))

    def do_settle(self, pair: Pair) -> None:
        pair.fast.finish_clean_pass()

    def do_fork(self, pair: Pair) -> None:
        self.pairs = [*self.pairs, pair.fork()][-MAX_STREAMS:]

    def do_snapshot(self, pair: Pair) -> None:
        kept = replace(pair, slow=pair.slow.fork())
        self.saved.append((through_json(pair.fast.snapshot()), kept))

    def do_compact(self, pair: Pair) -> None:
        """A compact snapshot goes on in one way, and as an exact one where nothing is lost.

        Up to rounding: its window is made again chunk by chunk, where a recache makes all at once.
        """
        snapshot = through_json(pair.fast.snapshot(compact=True))
        made = [self.loaded(snapshot).step().latents for _ in range(2)]
        same("latents after a compact snapshot", *made)
        if pair.slow.untouched:
            expected = pair.slow.fork().step()
            torch.testing.assert_close(made[0], expected, rtol=0, atol=ROUNDING)
            if torch.equal(made[0], expected):
                kept = replace(pair, slow=pair.slow.fork(), same_images=False)
                self.saved.append((snapshot, kept))

    def do_restore(self, pair: Pair, number: str) -> None:
        """The stream goes on from a snapshot of any stream."""
        if self.saved:
            snapshot, kept = self.saved[int(number) % len(self.saved)]
            pair.fast.restore(snapshot)
            pair.take(pair.fast, kept)

    def do_reload(self, pair: Pair, where: str) -> None:
        """It goes on in a stream of its own, or in one that had another window, or decay."""
        snapshot = through_json(pair.fast.snapshot())
        if where == "new":
            pair.fast = self.loaded(snapshot)
            return
        other = tiny.window(4, 1) if where == "other" else self.kind.cache
        pair.fast = replace(self.kind, cache=other).fast(self.attention)
        pair.fast.set_decay(0.25)
        for _ in range(4):
            pair.fast.step()
        pair.fast.restore(snapshot)

    def check(self, pair: Pair, chunk: Chunk, *given: Tensor) -> None:
        """The number and the images of a chunk; all that others hold is then written to."""
        assert chunk.index == pair.slow.state.num_chunks - 1, "the chunk's index is wrong"
        if self.kind.decoder is not None:
            assert chunk.images is not None, "there are no images"
            if pair.same_images:
                same("images", chunk.images, pair.slow.images())
            given += (chunk.images,)
        write_to(chunk.latents, *given)

    def check_window(self, pair: Pair) -> None:
        pair.fast.finish_clean_pass()
        cache = pair.fast.state.cache
        cache.truncate(cache.num_frames)
        found = cache.snapshot()
        keys, values = pair.slow.window()
        same("the window's keys", found.rotated_NBWHD, keys)
        same("the window's values", found.v_NBWHD, values)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.calls_left is not None:
            self.calls_left -= 1
            if self.calls_left < 0:
                self.calls_left = None
                raise Failure
        return sdpa(q, k, v)

    def loaded(self, snapshot: Snapshot) -> Stream:
        given = self.kind.both
        own = {"keep_rotated": self.kind.keep_rotated, "attention": self.attention}
        return Stream.from_snapshot(given["model"], snapshot, decoder=given["decoder"], **own)

    def latents(self, pair: Pair, number: int) -> Tensor:
        channels, frames = pair.fast.model.config.in_dim, self.kind.cache.chunk_frames
        generator = torch.Generator().manual_seed(number)
        return torch.randn(self.kind.batch, channels, frames, 4, 6, generator=generator)

    def damaged(self, pair: Pair, how: str) -> Snapshot:
        """A snapshot of now that is not to be taken."""
        whole = pair.fast.fork().snapshot()
        tensors, facts = dict(whole.tensors), dict(whole.facts)
        if how == "foreign":
            facts["fingerprint"] = "0" * 16
        elif how == "facts":
            del facts["num_chunks"]
        elif how == "missing":
            del tensors["cache.v"]
        elif how == "short":
            tensors["cache.v"] = tensors["cache.v"][:, :, :1]
        else:
            tensors["prompt_embeds"] = tensors["prompt_embeds"][..., 1:]
        return Snapshot(tensors=tensors, facts=facts)


def write_to(*tensors: Tensor) -> None:
    """As their owners may."""
    for tensor in tensors:
        tensor.zero_()


@contextmanager
def raising(error: type[BaseException]) -> Iterator[None]:
    """As `pytest.raises`, whose own failure is no AssertionError."""
    try:
        yield
    except error:
        return
    raise AssertionError(f"no {error.__name__} was raised")


def through_json(snapshot: Snapshot) -> Snapshot:
    return Snapshot(tensors=snapshot.tensors, facts=json.loads(json.dumps(snapshot.facts)))


def same(what: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise AssertionError(f"{what} are {list(found.shape)}, not {list(expected.shape)}")
    if not torch.equal(found, expected):
        raise AssertionError(f"{what} differ by up to {(found - expected).abs().max():.2g}")


def lines_of(draw: random.Random, length: int) -> list[str]:
    """A program of half the verbs: what is rare among all of them is then often together."""
    verbs: dict[str, tuple[int, Callable[[], str]]] = {
        "step": (8, lambda: ""),
        "switch": (8, lambda: switch_of(draw)),
        "decay": (3, lambda: draw.choice(["0", "0.5", "0.9", "1"])),
        "stop": (4, lambda: f"{draw.randrange(6)}"),
        "fork": (2, lambda: ""),
        "snapshot": (2, lambda: ""),
        "restore": (2, lambda: f"{draw.randrange(5)}"),
        "replay": (2, lambda: f"{draw.randrange(5)}"),
        "reload": (4, lambda: draw.choice(["new", "other", "decay"])),
        "compact": (2, lambda: ""),
        "settle": (1, lambda: ""),
        "fail": (1, lambda: f"{draw.randrange(8)}"),
        "interfere": (1, lambda: switch_of(draw)),
        "refuse": (2, lambda: refusal_of(draw)),
    }
    taken = ["step", *draw.sample(list(verbs), len(verbs) // 2)]
    streams = draw.randrange(1, MAX_STREAMS + 1)
    made = ["0 step"] * draw.randrange(5)
    if draw.random() < 0.15:
        made = [f"0 switch {switch_of(draw)}", f"0 stop {draw.randrange(3)}"][draw.randrange(3) :]
        made.append(f"0 start {draw.randrange(9)}")
    for verb in draw.choices(taken, [verbs[verb][0] for verb in taken], k=length):
        stream = draw.randrange(streams)
        made.append(f"{stream} {verb} {verbs[verb][1]()}".strip())
        while verb in ("switch", "stop") and draw.random() < 0.4:  # what is one after the other
            verb = draw.choice(["switch", "stop"])
            made.append(f"{stream} {verb} {verbs[verb][1]()}")
    return made


def switch_of(draw: random.Random) -> str:
    blend = f"blend {draw.randrange(1, 5)} {draw.choice(['lerp', 'slerp'])}"
    how = draw.choice(["soft", "soft", "recache", "recache", "cut", blend, blend])
    return f"{draw.randrange(10)} {how}"


def refusal_of(draw: random.Random) -> str:
    how = switch_of(draw).split(maxsplit=1)[1]
    return draw.choice(
        [
            f"prompts {draw.choice(['count', 'width', 'length'])} {how}",
            f"latents {draw.choice(['none', 'size'])}",
            f"snapshots {draw.choice(['foreign', 'facts', 'missing', 'short', 'prompt'])}",
        ]
    )


def run(kind: Kind, lines: list[str]) -> None:
    """The program; AssertionError says where the stream is not what it should be."""
    trial, line = Trial(kind), ""
    try:
        for line in lines:
            trial.run(line)
        line = "two steps of every stream"
        trial.finish()
    except Exception as error:
        raise AssertionError(f"{line}: {type(error).__name__}: {error}") from error


def fault_of(kind: Kind, lines: list[str]) -> AssertionError | None:
    try:
        run(kind, lines)
    except AssertionError as error:
        return error
    return None


def shortest(kind: Kind, lines: list[str]) -> list[str]:
    """A program that fails, without the lines it fails without."""
    runs = iter(range(SHRINKING_RUNS))
    size = len(lines)
    while size:
        at = 0
        while at < len(lines) and next(runs, None) is not None:
            fewer = lines[:at] + lines[at + size :]
            if fault_of(kind, fewer) is not None:
                lines = fewer
            else:
                at += size
        size //= 2
    return lines


SHORT = {
    "a recache given up": "0 step / 0 step / 0 switch 4 recache / 0 switch 3 soft",
    "the same, saved in between": (
        "0 step / 0 step / 0 switch 4 recache / 0 reload new / 0 switch 3 soft"
    ),
    "a recache stopped half way and given up": (
        "0 step / 0 step / 0 step / 0 switch 4 recache / 0 stop 1 / 0 switch 3 soft"
    ),
    "the same, saved in between and begun anew": (
        "0 step / 0 step / 0 step / 0 switch 4 recache / 0 stop 1 / 0 reload new"
        " / 0 switch 3 recache"
    ),
    "a recache that failed within a pass and is given up": (
        "0 step / 0 step / 0 step / 0 switch 4 recache / 0 fail 0 / 0 switch 3 soft"
    ),
    "a recache stopped half way, another, and both given up": (
        "0 step / 0 step / 0 step / 0 switch 4 recache / 0 stop 1 / 0 switch 2 recache"
        " / 0 switch 3 soft"
    ),
    "a blend saved half way": "0 step / 0 switch 4 blend 3 / 0 step / 0 reload new / 0 step",
    "a decay after a stopped step that let frames leave": (
        "0 step / 0 step / 0 step / 0 step / 0 stop 9 / 0 decay 1 / 0 step / 0 step"
    ),
    "the same, and a recache that takes the eviction back": (
        "0 step / 0 step / 0 step / 0 step / 0 stop 9 / 0 decay 1 / 0 reload new"
        " / 0 switch 4 recache / 0 step / 0 step"
    ),
    "a static sink that is fed again": (
        "0 decay 1 / 0 step / 0 step / 0 step / 0 step / 0 step / 0 reload other / 0 decay 0.5"
        " / 0 step / 0 step"
    ),
    "a recache before a blend": "0 step / 0 step / 0 switch 4 recache / 0 switch 3 blend 2",
    "a recache after a stopped step that let frames leave": (
        "0 step / 0 step / 0 step / 0 step / 0 stop 9 / 0 switch 4 recache / 0 step"
    ),
    "a stop within a blend, then another": (
        "0 step / 0 switch 4 blend 3 / 0 step / 0 stop 1 / 0 switch 3 blend 2 slerp / 0 reload new"
    ),
    "a blend to a shorter prompt": (
        "0 step / 0 switch 5 blend 2 / 0 step / 0 switch 1 blend 3 slerp / 0 step"
    ),
    "a cut within a blend": "0 step / 0 switch 4 blend 3 / 0 step / 0 switch 3 cut / 0 step",
    "a blend from a cut": "0 step / 0 step / 0 switch 4 cut / 0 switch 3 blend 2 / 0 reload new",
    "a start after a stop": "0 stop 1 / 0 start 2 / 0 step",
    "a start within a blend": "0 switch 4 blend 3 / 0 start 1 / 0 step",
    "compact snapshots of a young window": "0 compact / 0 step / 0 compact / 0 step / 0 compact",
    "refused prompts": (
        "0 step / 0 refuse prompts width cut / 0 refuse prompts length recache"
        " / 0 refuse prompts width blend 2 / 0 refuse prompts count soft"
    ),
    "refused snapshots": (
        "0 step / 0 step / 0 refuse snapshots missing / 0 refuse snapshots short"
        " / 0 refuse snapshots prompt / 0 refuse snapshots facts / 0 refuse snapshots foreign"
    ),
    "its own chunks replayed": "0 replay 0 / 0 replay 0 / 0 switch 4 recache / 0 replay 0 / 0 step",
}


def hold(name: str, kind_of: Callable[[random.Random], Kind], tries: int) -> None:
    """Try programs; the first that fails is shown."""
    for number in range(tries):
        draw = random.Random(f"{name} {SEED} {number}")
        kind = kind_of(draw)
        lines = lines_of(draw, draw.randrange(1, 20))
        if fault_of(kind, lines) is not None:
            lines = shortest(kind, lines)
            program = "".join(f"    {line}\n" for line in lines)
            where = f"program {number} of {name}, RF_FUZZ_SEED={SEED}"
            pytest.fail(f"{where}\n{kind}\n{program}{fault_of(kind, lines)}", pytrace=False)


@pytest.mark.parametrize("program", SHORT)
@pytest.mark.parametrize(
    "name", ["published", "sink smaller than a chunk", "int8 with a float32 sink", "a batch of two"]
)
def test_a_stream_is_what_the_slow_one_says_after_hard_programs(name: str, program: str) -> None:
    run(KINDS[name], SHORT[program].split(" / "))


@pytest.mark.parametrize("name", KINDS)
def test_a_stream_is_what_the_slow_one_says_after_any_program(name: str) -> None:
    hold(name, lambda draw: KINDS[name], TRIES)


def test_so_is_a_stream_of_any_other_kind() -> None:
    hold("any kind", any_kind, 4 * TRIES)
