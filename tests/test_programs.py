"""Random programs: whatever is called in whatever order, a stream is what `slow_stream` says.

RF_FUZZ=N tries N programs on every kind of cache, RF_FUZZ_SEED the programs of another seed. A
program that fails is printed as lines, made as short as it can be and still fail; give them to
`run` to see it again.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch
from slow_stream import SlowStream
from torch import Tensor

from rf_core.config import CacheConfig
from rf_core.state import Snapshot
from rf_core.stream import Stream

TRIES = int(os.environ.get("RF_FUZZ", "12"))
SEED = int(os.environ.get("RF_FUZZ_SEED", "0")) or random.SystemRandom().randrange(10**6)
MOST_STREAMS = 3
SHRINKING_RUNS = 300

AWAITING = {"changed after a stop", "changed twice", "settled in a recache"}
"""What programs leave out until the engine can do it; the names of `Trial.awaited` and of verbs."""


class Stop(BaseException):
    pass


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of cache, and what else a stream is made of."""

    cache: CacheConfig = field(default_factory=lambda: tiny.window(9, 3))
    bfloat16: bool = False
    keep_turned: bool = True
    batch: int = 1
    seed: int = 0

    def fast(self, prompt: Tensor) -> Stream:
        return tiny.stream(prompt_embeds=prompt, keep_turned=self.keep_turned, **self._both())

    def slow(self, prompt: Tensor) -> SlowStream:
        options = {"height": 32, "width": 48, "sampler": tiny.TWO_STEPS, **self._both()}
        return SlowStream(options.pop("model"), prompt, **options)

    def _both(self) -> dict[str, Any]:
        model = tiny.model().bfloat16() if self.bfloat16 else tiny.model()
        return {"model": model, "cache": self.cache, "batch": self.batch, "seed": self.seed}


KINDS = {
    "published": Kind(),
    "no sink": Kind(cache=tiny.window(7, 0)),
    "window of one chunk": Kind(cache=tiny.window(3, 0)),
    "sink and chunk alone": Kind(cache=tiny.window(6, 3)),
    "sink smaller than a chunk": Kind(cache=tiny.window(8, 2)),
    "sink larger than a chunk": Kind(cache=tiny.window(11, 5)),
    "chunks of one frame": Kind(cache=tiny.window(5, 2, chunk=1)),
    "chunks of two frames": Kind(cache=tiny.window(8, 3, chunk=2), batch=2),
    "static sink": Kind(cache=tiny.window(9, 3, decay=1.0)),
    "key norms": Kind(cache=tiny.window(9, 3, keep_key_norms=True)),
    "turned in every pass": Kind(keep_turned=False),
    "bfloat16": Kind(bfloat16=True),
    "float32 sink": Kind(
        cache=tiny.window(10, 3, accumulator="float32", keep_key_norms=True), bfloat16=True
    ),
    "int8": Kind(cache=tiny.window(9, 3, storage="int8")),
    "int8 with a float32 sink": Kind(
        cache=tiny.window(8, 2, storage="int8", accumulator="float32"), bfloat16=True
    ),
}


@dataclass
class Pair:
    """A stream and what it is held against."""

    fast: Stream
    slow: SlowStream
    stopped: bool = False
    switches: int = 0

    def fork(self) -> Pair:
        return Pair(self.fast.fork(), self.slow.fork(), self.stopped, self.switches)


class Trial:
    """A program under way. Every verb of it is a method: `do_step` and so on."""

    def __init__(self, kind: Kind) -> None:
        self.kind, self.saved = kind, []
        self.pairs = [Pair(kind.fast(tiny.prompt(0)), kind.slow(tiny.prompt(0)))]

    def run(self, line: str) -> None:
        """One line: the number of a stream, a verb, and what the verb takes."""
        number, verb, *rest = line.split(maxsplit=2)
        pair = self.pairs[int(number) % len(self.pairs)]
        if not self.awaited(pair, verb):
            getattr(self, f"do_{verb}")(pair, *rest)
            same("the prompt", pair.fast.state.prompt_embeds, pair.slow.state.prompt)
            assert pair.fast.state.num_chunks == pair.slow.state.num_chunks, "number of chunks"

    def finish(self) -> None:
        for pair in self.pairs:
            self.do_step(pair)
            self.do_step(pair)

    def awaited(self, pair: Pair, verb: str) -> bool:
        names = {verb}
        if verb == "switch" and pair.stopped:
            names.add("changed after a stop")
        if verb == "switch" and pair.switches:
            names.add("changed twice")
        if verb in ("settle", "snapshot") and pair.slow.state.recache_begun:
            names.add("settled in a recache")
        return bool(names & AWAITING)

    def do_step(self, pair: Pair) -> None:
        chunk = pair.fast.step()
        assert chunk.index == pair.slow.state.num_chunks, "the chunk's index"
        same("latents", chunk.latents, pair.slow.step())
        self.check_window(pair)
        pair.stopped, pair.switches = False, 0

    def do_switch(self, pair: Pair, rest: str) -> None:
        prompt, how = rest.split(maxsplit=1)
        embeds = tiny.prompt(int(prompt))
        pair.fast.switch(embeds, how)
        pair.slow.switch(embeds, how)
        pair.switches += 1

    def do_stop(self, pair: Pair, rest: str) -> None:
        """Stop the step before its pass of this number, or after all of them, as a guess."""
        seen: list[tuple[str, int]] = []

        def on_pass(kind: str, number: int) -> None:
            seen.append((kind, number))
            if len(seen) > int(rest):
                raise Stop

        def on_guess(number: int, x0: Tensor) -> None:
            if number + 1 == len(tiny.TWO_STEPS.steps):
                raise Stop

        with pytest.raises(Stop):
            pair.fast.step(on_pass, on_guess)
        pair.slow.abort(in_recache=seen[-1] != ("clean", 0))
        pair.stopped = True

    def do_settle(self, pair: Pair) -> None:
        pair.fast.settle()

    def do_fork(self, pair: Pair) -> None:
        self.pairs = [*self.pairs, pair.fork()][-MOST_STREAMS:]

    def do_snapshot(self, pair: Pair) -> None:
        snapshot = pair.fast.snapshot()
        facts = json.loads(json.dumps(snapshot.facts))
        kept = Pair(pair.fast, pair.slow.fork(), pair.stopped, pair.switches)
        self.saved.append((Snapshot(tensors=snapshot.tensors, facts=facts), kept))

    def do_restore(self, pair: Pair, rest: str) -> None:
        """The stream goes on from a snapshot of any stream."""
        if self.saved:
            snapshot, kept = self.saved[int(rest) % len(self.saved)]
            pair.fast.restore(snapshot)
            self.take(pair, kept)

    def do_load(self, pair: Pair, rest: str) -> None:
        """The same in a stream of its own."""
        if self.saved:
            snapshot, kept = self.saved[int(rest) % len(self.saved)]
            model, keep_turned = pair.fast.model, self.kind.keep_turned
            pair.fast = Stream.from_snapshot(model, snapshot, keep_turned=keep_turned)
            self.take(pair, kept)

    def take(self, pair: Pair, kept: Pair) -> None:
        pair.slow, pair.stopped, pair.switches = kept.slow.fork(), kept.stopped, kept.switches

    def check_window(self, pair: Pair) -> None:
        twin = pair.fast.fork()
        twin.settle()
        cache = twin.state.cache
        cache.truncate(cache.num_frames)
        found = cache.snapshot()
        keys, values = pair.slow.window()
        same("the window's keys", found.turned_NBWHD, keys)
        same("the window's values", found.v_NBWHD, values)


def same(what: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise AssertionError(f"{what} are {list(found.shape)}, not {list(expected.shape)}")
    if not torch.equal(found, expected):
        raise AssertionError(f"{what} differ by up to {(found - expected).abs().max():.2g}")


def lines_of(draw: random.Random, length: int) -> list[str]:
    """A program."""
    verbs: dict[str, tuple[int, Callable[[], str]]] = {
        "step": (10, lambda: ""),
        "switch": (7, lambda: f"{draw.randrange(1, 9)} {switch_of(draw)}"),
        "stop": (4, lambda: f"{draw.randrange(6)}"),
        "settle": (1, lambda: ""),
        "fork": (2, lambda: ""),
        "snapshot": (2, lambda: ""),
        "restore": (2, lambda: f"{draw.randrange(5)}"),
        "load": (1, lambda: f"{draw.randrange(5)}"),
    }
    weights = [weight for weight, _ in verbs.values()]
    made = []
    for verb in draw.choices(list(verbs), weights, k=length):
        made.append(f"{draw.randrange(MOST_STREAMS)} {verb} {verbs[verb][1]()}".strip())
    return made


def switch_of(draw: random.Random) -> str:
    blend = f"blend {draw.randrange(1, 4)} {draw.choice(['lerp', 'slerp'])}"
    return draw.choice(["soft", "recache", "recache", "cut", blend, blend])


def run(kind: Kind, lines: list[str]) -> None:
    """The program; AssertionError says where the stream is not what it should be."""
    trial, line = Trial(kind), ""
    try:
        for line in lines:
            trial.run(line)
        line = "two steps of every stream"
        trial.finish()
    except Exception as error:
        raise AssertionError(f"{line}: {error or type(error).__name__}") from error


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


@pytest.mark.parametrize("name", KINDS)
def test_a_stream_is_what_the_slow_one_says_after_any_program(name: str) -> None:
    for number in range(TRIES):
        draw = random.Random(f"{name} {SEED} {number}")
        lines = lines_of(draw, draw.randrange(3, 25))
        if fault_of(KINDS[name], lines) is not None:
            lines = shortest(KINDS[name], lines)
            pytest.fail(
                f"{name}, RF_FUZZ_SEED={SEED}, program {number}:\n  "
                + "\n  ".join(lines)
                + f"\n{fault_of(KINDS[name], lines)}",
                pytrace=False,
            )
