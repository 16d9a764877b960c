"""A live session: steered, it makes what a stream does that was called so; its log makes it again.

The stream it is held against is driven directly, chunk by chunk, and never goes back.
RF_FUZZ=N tries N programs of commands.
"""

from __future__ import annotations

import gc
import json
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from rf_core.config import SamplerConfig
from rf_core.decoders.decoder import TAEHVDecoder, WanDecoder
from rf_core.decoders.taehv import TAEHV, TAEHVConfig
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.live import (
    Applied,
    Autosave,
    Branched,
    Command,
    Cut,
    Decay,
    Drop,
    Ended,
    Happened,
    Limits,
    Lora,
    Move,
    Outbox,
    Pause,
    Picture,
    Prompt,
    Received,
    Refused,
    Resume,
    Rewind,
    Schedule,
    Session,
    Stop,
    VideoRecorder,
    read_log,
    replay_log,
)
from rf_core.prompts import Switch
from rf_core.stream import Stream
from rf_core.video import VideoFormat, VideoWriter, read_images, to_uint8

TRIES = int(os.environ.get("RF_FUZZ", "24"))
MODES = ["soft", "recache", "blend 2", "blend 3 slerp", "cut"]


def encode(text: str) -> Tensor:
    """Embeddings of `p7` and the like; anything else is refused."""
    if not text.startswith("p"):
        raise ValueError(f"{text!r} cannot be encoded; write p and a number")
    return tiny.prompt(int(text[1:]))


def decoder_of(name: str | None) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "wan":
            return WanDecoder(WanVAE(VAEConfig(dim=2, num_res_blocks=1)).eval())
        if name == "taehv":
            config = TAEHVConfig(decoder_widths=(4, 4, 4, 4), encoder_width=4)
            return TAEHVDecoder(TAEHV(config).eval())
    return None


def stream_of(decoder: str | None = None, **options: Any) -> Stream:
    channels = tiny.CONFIG.in_dim if decoder is None else 16
    config = replace(tiny.CONFIG, in_dim=channels, out_dim=channels)
    given = {"cache": tiny.window(9, 3), "prompt_embeds": encode("p0"), **options}
    return tiny.stream(model=tiny.model(config), decoder=decoder_of(decoder), **given)


class Loras:
    """Weights that a strength is added to, and taken from, without a rest."""

    def __init__(self, stream: Stream) -> None:
        network = getattr(stream.model, "network", stream.model)  # of one that is controlled
        self.weight = network.blocks[0].ffn[0].weight
        self.before = self.weight.clone()

    def __call__(self, name: str, strength: float) -> None:
        if strength > 5:
            raise ValueError(f"a strength of {strength} is too much for {name}")
        with torch.no_grad():
            self.weight.copy_(self.before * (1 + strength))


Script = dict[int, list[Command]]
"""Commands, by the chunk made, from 1, within which they come; those of 0 are there before."""


class Trial:
    """A session in this thread, given commands as it comes to its chunks."""

    def __init__(
        self,
        script: Script,
        stream: Stream | None = None,
        suspend: Mapping[int, Callable[[], Stream]] | None = None,
        **options: Any,
    ) -> None:
        """Within a chunk of `suspend` it is asked to leave, and goes on with another stream."""
        self.script, self.stream = dict(script), stream or stream_of()
        self.suspend, self.suspended = suspend or {}, 0
        self.loras = Loras(self.stream)
        self.outbox = Outbox(max_pictures=10**4)
        self.reader = self.outbox.reader()
        self.session = Session(
            self.stream,
            options.pop("encode", encode),
            prompt="p0",
            set_lora=lambda *given: self.loras(*given),
            loras={"ink": 0.0},
            outbox=self.outbox,
            **options,
        )
        self.begun = 0

    def run(self, chunks: int, **options: Any) -> list[Any]:
        """Make that many chunks, those that are made again counted, and stop; all events."""
        self.chunks = chunks
        for command in self.script.pop(0, []):
            self.session.submit(command)
        self.session.run(self._on_pass, **options)
        while self.session.suspended:
            assert self.session.outbox.status.suspended
            self.suspended += 1
            stream = self.suspend[self.begun]()
            self.loras = Loras(stream)
            self.session.resume(stream, {"ink": 0.0})
            assert not self.session.outbox.status.suspended
            self.session.run(self._on_pass, **options)
        return self.reader.read(timeout=0)

    def _on_pass(self, kind: str, number: int) -> None:
        """Commands come within a chunk, and wait for its end; the last is stopped half way."""
        if kind == "denoise" and number == 0:
            self.begun += 1
            if self.begun in self.suspend:
                self.session.suspend()
            more = [Stop()] if self.begun > self.chunks else []
            for command in [*self.script.pop(self.begun, []), *more]:
                self.session.submit(command)


def latents_by_branch(path: Path, stream: Stream, **options: Any) -> dict[str, list[Tensor]]:
    """What the log makes again: each branch's own chunks."""
    made: dict[str, list[Tensor]] = {}
    replay_log(
        read_log(path),
        stream,
        encode,
        set_lora=Loras(stream),
        on_chunk=lambda branch, chunk, latents: made.setdefault(branch.name, []).append(latents),
        **options,
    )
    return made


def of_kind(events: Sequence[Any], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def line_of(events: Sequence[Any]) -> list[list[Command]]:
    """What took hold with each chunk of the branch that a session ended in."""
    asked, line, coming = {}, [[]], {}

    def take(chunk: int, command: Command) -> None:
        line.extend([] for _ in range(chunk + 1 - len(line)))
        line[chunk].append(command)

    for event in events:
        if isinstance(event, Received):
            asked[event.number] = event.command
        elif isinstance(event, Happened):
            take(event.chunk, coming.pop(event.number))
        elif isinstance(event, Applied):
            command = asked[event.number]
            if isinstance(command, Schedule):
                coming[event.number] = Prompt(text=command.text, mode=command.mode)
            elif isinstance(command, Rewind):
                del line[event.chunk :]
            elif isinstance(command, (Prompt, Lora, Decay, Cut)):
                take(event.chunk, command)
    return line


def driven(stream: Stream, line: list[list[Command]], chunks: int) -> list[Any]:
    """The chunks of a stream that is called so, and never goes back."""
    loras, made, text = Loras(stream), [], "p0"
    for chunk in range(chunks):
        for command in line[chunk] if chunk < len(line) else []:
            if isinstance(command, Lora):
                stream.forget_weights()
                loras(command.name, command.strength)
            elif isinstance(command, Decay):
                stream.set_decay(command.decay)
            elif isinstance(command, Cut):
                text = command.text or text
                stream.switch(encode(text), "cut")
            elif isinstance(command, Prompt):
                text = command.text
                stream.switch(encode(text), command.mode)
        made.append(stream.step())
    return made


def drawn(draw: random.Random, chunks: int) -> Script:
    """Any commands, some of which will be refused."""
    script: Script = {}
    for _ in range(draw.randrange(3, 16)):
        at, text = draw.randrange(chunks), draw.choice(["p1", "p2", "p5", "no"])
        mode = Switch.parse(draw.choice(MODES))
        command = draw.choice(
            [
                Prompt(text=text, mode=mode),
                Prompt(text=text, mode=mode),
                Decay(decay=draw.choice([0.0, 0.5, 1.0])),
                Lora(name=draw.choice(["ink", "ink", "none"]), strength=draw.choice([0.5, 1, 9])),
                Cut(text=draw.choice([None, text])),
                Rewind(chunk=draw.randrange(max(1, at))),
                Rewind(chunk=draw.randrange(max(1, at)), branch=draw.choice(["a", "b"])),
                Schedule(chunk=at + draw.randrange(4), text=text, mode=mode),
                Move(change=draw.randrange(1, 6), chunk=at + draw.randrange(4)),
                Drop(change=draw.randrange(1, 6)),
            ]
        )
        script.setdefault(at, []).append(command)
        if draw.random() < 0.2:
            script[at] += [Pause(), *script[at][-1:], Resume()]
    return script


@pytest.mark.slow
@pytest.mark.parametrize("number", range(TRIES))
def test_any_session_is_a_stream_that_was_driven_so_and_its_log_makes_it_again(
    number: int, tmp_path: Path
) -> None:
    draw = random.Random(number)
    kind, chunks = [None, "taehv", None, "wan"][number % 4], 8 if number % 4 == 3 else 14
    options: dict[str, Any] = {} if kind != "taehv" else {"cache": tiny.window(5, 1, chunk=2)}
    limits = Limits(every=draw.randrange(1, 6), snapshots=draw.randrange(2, 4))
    if draw.random() < 0.25:
        limits = replace(limits, max_bytes=200_000)
    script = drawn(draw, chunks)
    away = {draw.randrange(1, chunks): partial(stream_of, kind, **options) for _ in range(3)}
    trial = Trial(script, stream_of(kind, **options), away, limits=limits,
                  log=tmp_path / "log.jsonl")  # fmt: skip
    events = trial.run(chunks)
    shown = {each.chunk: each.images for each in of_kind(events, Picture)}
    end = events[-1]
    expected = driven(stream_of(kind, **options), line_of(events), end.chunk)
    for chunk in expected:
        if kind is not None:
            assert chunk.images is not None
            assert torch.equal(shown[chunk.index], to_uint8(chunk.images[0])), chunk.index
    made = latents_by_branch(tmp_path / "log.jsonl", stream_of(kind, **options))
    last = {}
    branches = {each.name: each for each in of_kind(events, Branched)}
    for name, latents in made.items():
        begins = branches[name].chunk if name in branches else 0
        last |= {begins + n: each for n, each in enumerate(latents)}
    for chunk in expected:
        assert torch.equal(last[chunk.index], chunk.latents), chunk.index
    assert trial.suspended == len(away)
    answered = [each.number for each in events if isinstance(each, (Applied, Refused))]
    received = [each.number for each in of_kind(events, Received)]
    late = [each.number for each in of_kind(events, Refused) if each.why.startswith("'no'")]
    assert sorted(set(answered)) == received == list(range(1, len(received) + 1))
    assert [n for n in answered if n not in late] == [n for n in received if n not in late]


# What is kept of where it stands.


@pytest.mark.parametrize("stop", ["stop", "interrupt", "suspend"])
def test_it_is_kept_where_it_stands_every_few_chunks_and_at_the_end(stop: str) -> None:
    kept: list[Autosave] = []
    script: Script = {6: [Prompt(text="p1")], 12: [Rewind(chunk=7, branch="b"), Decay(decay=0.5)]}
    trial = Trial(script, stream_of("taehv"), on_autosave=kept.append)

    def on_pass(kind: str, number: int) -> None:
        trial._on_pass(kind, number)
        if stop == "interrupt" and trial.begun == 19:
            raise Interrupted
        if stop == "suspend" and trial.begun == 18:
            trial.session.suspend()

    trial.chunks = 18 if stop == "stop" else 99
    with pytest.raises(Interrupted) if stop == "interrupt" else nullcontext():
        trial.session.run(on_pass)
    if stop == "suspend":
        trial.session.abandon("gone")
    stands = [(each.snapshot.facts["num_chunks"], each.branch) for each in kept]
    assert stands == [(8, "main"), (8, "b"), (13, "b")]
    assert [each.images for each in kept] == [12 * chunk - 3 for chunk, _ in stands]
    twin = stream_of("taehv")
    driven(twin, [[]] * 6 + [[Prompt(text="p1")], [Decay(decay=0.5)]], 13)
    went_on = []
    for snapshot in (kept[-1].snapshot, twin.snapshot(compact=True)):
        stream = stream_of("taehv")
        stream.restore(snapshot)
        went_on.append(stream.step().latents)
    assert torch.equal(*went_on)


# Suspended: another stream goes on with the session.


def suspended(**options: Any) -> Trial:
    """A session that was suspended within its second chunk."""
    trial = Trial({}, options.pop("stream", None), **options)

    def on_pass(kind: str, number: int) -> None:
        if trial.session.outbox.status.chunk == 1:
            trial.session.suspend()

    trial.session.run(on_pass)
    assert trial.session.suspended and trial.session.outbox.status.chunk == 2
    return trial


def test_suspended_it_holds_no_stream_and_takes_commands_for_later() -> None:
    trial = suspended()
    gone = weakref.ref(trial.stream)
    trial.stream = trial.loras = None
    gc.collect()
    assert gone() is None
    assert trial.session.submit(Prompt(text="p3")) == 1
    assert [type(each) for each in trial.reader.read(0)] == [Picture, Picture, Received]
    trial.loras = Loras(stream := stream_of())
    trial.session.resume(stream, {"ink": 0.0})
    trial.session.run(until=3)
    assert trial.reader.read(0)[0] == Applied(number=1, chunk=2)
    twin = driven(stream_of(), [[], [], [Prompt(text="p3")]], 3)
    assert torch.equal(trial.session.recent_latents[2], twin[2].latents)


def test_it_is_suspended_in_a_pause_too_and_then_still_paused() -> None:
    trial = Trial({})
    trial.session.submit(Pause())
    trial.session.run(on_idle=trial.session.suspend)
    assert trial.session.suspended and trial.session.outbox.status.paused
    trial.session.submit(Stop())
    trial.session.resume(stream_of(), {"ink": 0.0})
    assert trial.session.outbox.status.paused
    trial.session.run()
    assert trial.reader.read(0)[-2:] == [Applied(number=2, chunk=0), Ended(chunk=0, why=None)]


def test_a_stop_meanwhile_ends_it_as_soon_as_it_is_resumed() -> None:
    trial = suspended()
    trial.session.submit(Stop())
    trial.session.resume(stream_of(), {"ink": 0.0})
    trial.session.run()
    assert trial.reader.read(0)[-1] == Ended(chunk=2, why=None) and not trial.session.suspended


def test_a_stream_of_another_kind_is_refused_and_the_session_stays_suspended() -> None:
    trial = suspended()
    with pytest.raises(ValueError, match="snapshot's model"):
        trial.session.resume(stream_of("taehv"), {"ink": 0.0})
    assert trial.session.suspended
    trial.session.resume(stream_of(), {"ink": 0.0})
    trial.session.run(until=4)
    assert trial.session.outbox.status.chunk == 4


def test_abandoned_it_is_whole_and_every_command_is_answered(tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "take.mp4", FORMAT)
    trial = suspended(stream=stream_of("taehv"), recorder=recorder, log=tmp_path / "log.jsonl")
    trial.session.submit(Prompt(text="p3"))
    trial.session.abandon("nobody came back")
    *_, refused, end = trial.reader.read(0)
    assert refused.number == 1 and end == Ended(chunk=2, why="nobody came back")
    assert len(images_in(tmp_path / "take.mp4")) == 12 * 2 - 3
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1]) == {"end": 2}
    with pytest.raises(ValueError, match="has ended"):
        trial.session.submit(Stop())


# Two streams at once: what is known of the prompt when weights change.


def test_a_strength_takes_hold_wholly_with_the_next_chunk() -> None:
    """The chunk before is remembered as it was made, whether or not a snapshot came between."""

    def run(settle: bool) -> Tensor:
        stream = stream_of()
        loras = Loras(stream)
        stream.step()
        if settle:
            stream.snapshot()
        stream.forget_weights()
        loras("ink", 0.5)
        return stream.step().latents

    assert torch.equal(run(True), run(False))


def test_what_was_computed_of_the_prompt_is_computed_anew_of_new_weights() -> None:
    def run(before: bool) -> Tensor:
        stream = stream_of()
        weight = stream.model.blocks[0].cross_attn.k.weight
        if not before:
            stream.forget_weights()
        with torch.no_grad():
            weight.mul_(2)
        if before:
            stream = Stream(
                stream.model, encode("p0"), height=32, width=48, sampler=tiny.TWO_STEPS,
                cache=tiny.window(9, 3),
            )  # fmt: skip
        return stream.step().latents

    assert torch.equal(run(True), run(False))


# The two threads, and how it ends.


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


class Interrupted(BaseException):
    pass


def test_a_pause_holds_without_work_and_a_command_is_obeyed_in_it() -> None:
    trial = Trial({2: [Pause()]})
    thread = threading.Thread(target=lambda: trial.run(4))
    thread.start()
    found: list[Any] = []
    while not of_kind(found, Applied):
        found += trial.reader.read(timeout=5)
    begun, used = trial.begun, time.process_time()
    time.sleep(0.3)
    used = time.process_time() - used
    assert trial.begun == begun == 2 and used < 0.1, used
    trial.session.submit(Prompt(text="p3"))
    found = []
    while not of_kind(found, Applied):
        found += trial.reader.read(timeout=5)
    assert of_kind(found, Applied)[0].chunk == 2 and not of_kind(found, Picture)
    assert trial.outbox.status.prompt == "p3" and trial.outbox.status.paused
    trial.session.submit(Resume())
    thread.join(timeout=20)
    assert trial.begun == 5 and not thread.is_alive()


def test_a_stop_within_a_pause_ends_it() -> None:
    trial = Trial({1: [Pause()]})
    events = trial.run(9, on_idle=lambda: trial.session.submit(Stop()))
    assert [each.number for each in of_kind(events, Applied)] == [1, 2]
    assert events[-1] == Ended(chunk=1, why=None)


def test_an_interrupt_is_seen_in_a_pause_too() -> None:
    def idle() -> None:
        raise Interrupted

    trial = Trial({1: [Pause()]})
    with pytest.raises(Interrupted):
        trial.run(9, on_idle=idle)
    assert trial.reader.read()[-1].why.startswith("Interrupted")


@pytest.mark.parametrize("at", range(4))
def test_an_interrupt_in_any_pass_leaves_a_stream_that_goes_on_as_if_there_were_none(
    at: int, tmp_path: Path
) -> None:
    calls = iter(range(100))

    def on_pass(kind: str, number: int) -> None:
        if next(calls) == 8 + at:
            raise Interrupted

    stream = stream_of("taehv", cache=tiny.window(5, 1, chunk=2))
    session = Session(stream, encode, prompt="p0", log=tmp_path / "log.jsonl")
    reader, number = session.outbox.reader(), session.submit(Prompt(text="p1"))
    with pytest.raises(Interrupted):
        session.run(on_pass)
    events = reader.read()
    assert Applied(number=number, chunk=0) in events
    assert events[-1].chunk == stream.state.num_chunks == events[-2].chunk + 1
    log = read_log(tmp_path / "log.jsonl")
    assert log.entries[-1].chunk == stream.state.num_chunks  # type: ignore[union-attr]
    again = stream_of("taehv", cache=tiny.window(5, 1, chunk=2))
    again.switch(encode("p1"))
    for _ in range(stream.state.num_chunks):
        again.step()
    found, expected = stream.step(), again.step()
    assert torch.equal(found.latents, expected.latents)
    assert torch.equal(found.images, expected.images)


def test_what_waits_when_it_ends_is_refused_and_nothing_more_is_taken() -> None:
    trial = Trial({3: [Prompt(text="p1"), Rewind(chunk=0)], 4: [Stop(), Prompt(text="p2")]})
    events = trial.run(9)
    assert Refused(number=4, why="the session has ended before it could take hold") in events
    assert Applied(number=3, chunk=0) in events and trial.outbox.status.answered == 4
    with pytest.raises(ValueError, match="has ended"):
        trial.session.submit(Pause())


class Full:
    """A recorder whose disk is full after some chunks."""

    def __init__(self, chunks: int) -> None:
        self.left, self.ended = chunks, 0

    def begin(self, branch: str, parent: str | None, images: int) -> None:
        pass

    def write(self, images: Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError("no space left")

    def end(self) -> None:
        self.ended += 1


def test_a_recorder_that_fails_ends_the_session_and_its_thread() -> None:
    recorder, before = Full(2), threads()
    trial = Trial({}, stream_of("taehv"), recorder=recorder)
    with pytest.raises(OSError, match="no space"):
        trial.run(50)
    assert trial.begun < 10 and recorder.ended == 1
    assert threads() == before
    assert trial.reader.read()[-1].why == "OSError: no space left"


def test_an_encoder_that_breaks_ends_the_session_and_answers_the_command() -> None:
    def breaks(text: str) -> Tensor:
        raise RuntimeError("out of memory")

    before = threads()
    trial = Trial({2: [Prompt(text="p1"), Pause()]}, stream_of("taehv"), encode=breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        trial.run(9)
    events = trial.reader.read()
    assert [each.number for each in of_kind(events, Refused)] == [1, 2]
    assert threads() == before and isinstance(events[-1], Ended)
    assert {each.chunk for each in of_kind(events, Picture)} == {0, 1}


def test_a_coming_prompt_is_refused_at_once_where_it_cannot_be_encoded() -> None:
    events = Trial({1: [Schedule(chunk=5, text="no")]}).run(6)
    assert of_kind(events, Refused)[0].number == 1 and not of_kind(events, Happened)


def test_commands_of_three_clients_are_each_answered_once_in_order() -> None:
    stream = stream_of()
    session = Session(stream, encode, prompt="p0", limits=Limits(every=4))
    reader, seen = session.outbox.reader(), []
    thread = threading.Thread(target=session.run)
    thread.start()

    def client(number: int) -> None:
        draw = random.Random(number)
        for _ in range(30):
            session.submit(Prompt(text=f"p{draw.randrange(5)}", mode=Switch(mode="soft")))
            if draw.random() < 0.2:
                session.submit(Rewind(chunk=0))
            time.sleep(0.002)

    clients = [threading.Thread(target=client, args=(n,)) for n in range(3)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    last = session.submit(Prompt(text="p0", mode=Switch(mode="soft")))
    while session.outbox.status.answered < last:  # a stop would come before those that wait
        assert thread.is_alive()
        time.sleep(0.01)
    session.submit(Stop())
    thread.join(timeout=30)
    while found := reader.read():
        seen += found
    received = [each.number for each in of_kind(seen, Received)]
    answered = [each.number for each in seen if isinstance(each, (Applied, Refused))]
    assert received == answered == list(range(1, len(received) + 1))
    assert not of_kind(seen, Refused) and not thread.is_alive()


@pytest.mark.slow
def test_memory_is_flat_over_two_thousand_chunks_that_nobody_reads(tmp_path: Path) -> None:
    config = replace(tiny.CONFIG, num_layers=1)
    stream = tiny.stream(
        model=tiny.model(config), cache=tiny.window(3, 1, chunk=1), height=16, width=16,
        sampler=SamplerConfig(steps=(1000,)), prompt_embeds=encode("p0"),
    )  # fmt: skip
    limits, held = Limits(max_bytes=40_000, every=50), []
    session = Session(stream, encode, prompt="p0", limits=limits, log=tmp_path / "log.jsonl",
                      outbox=Outbox(max_events=100))  # fmt: skip
    draw = random.Random(0)

    def on_pass(kind: str, number: int) -> None:
        chunk = stream.state.num_chunks
        if kind == "denoise" and chunk % 5 == 0:
            session.submit(Prompt(text=f"p{draw.randrange(40)}", mode=Switch(mode="soft")))
        if kind == "denoise" and chunk % 400 == 399:
            maker = session._maker
            history = maker.history
            held.append((len(history._past_chunks), len(history._actions), len(maker._encoded)))
            held[-1] += (session.outbox.status.history_bytes <= limits.max_bytes,)

    session.run(on_pass, until=2000)
    assert len(held) == 5 and all(each[3] for each in held)
    assert max(each[0] for each in held) <= 2 * min(each[0] for each in held[1:]) > 20
    assert max(each[1] for each in held) < 100 and held[-1][2] <= 16
    oldest = session.outbox.status.oldest
    assert oldest is not None and 1500 < oldest <= 2000
    assert len(session.outbox._events) == 100


# The past.


INK = Lora(name="ink", strength=1)


@pytest.mark.parametrize("every", [1, 2, 100])
@pytest.mark.parametrize(
    "script",
    [
        {2: [Prompt(text="p1")], 4: [Rewind(chunk=2)], 6: [Rewind(chunk=3)]},
        {2: [Prompt(text="p1")], 4: [Rewind(chunk=2), Cut()], 6: [Rewind(chunk=4), Cut()]},
        {2: [INK], 4: [Rewind(chunk=2)], 5: [INK], 6: [Rewind(chunk=4)]},
        {2: [Prompt(text="p1"), Pause(), Rewind(chunk=2), Resume()], 5: [Rewind(chunk=4)]},
    ],
    ids=["a prompt", "a cut to the prompt in force", "a strength", "within a pause"],
)  # fmt: skip
def test_going_back_leaves_nothing_of_the_branch_that_is_left(
    script: Script, every: int, tmp_path: Path
) -> None:
    trial = Trial(script, limits=Limits(every=every), log=tmp_path / "log.jsonl")
    events = trial.run(8)
    expected = driven(stream_of(), line_of(events), events[-1].chunk)
    last = latents_by_branch(tmp_path / "log.jsonl", stream_of())[
        of_kind(events, Branched)[-1].name
    ]
    assert not of_kind(events, Refused) and len(last) >= 2
    for latents, chunk in zip(reversed(last), reversed(expected), strict=False):
        assert torch.equal(latents, chunk.latents), chunk.index


def test_how_far_back_it_reaches_is_said_and_refused_beyond(tmp_path: Path) -> None:
    limits = Limits(every=2, snapshots=2, max_bytes=stream_of().snapshot().nbytes * 23 // 20)
    trial = Trial({11: [Rewind(chunk=0), Rewind(chunk=10)]}, limits=limits)
    events = trial.run(14)
    refused = of_kind(events, Refused)[0]
    assert "kept from chunk" in refused.why
    assert Branched(name="branch-2", parent="main", chunk=10) in events
    assert trial.outbox.status.history_bytes <= limits.max_bytes


def test_snapshots_lie_the_denser_the_nearer_and_the_beginning_stays_in_reach() -> None:
    session = Session(stream_of(), encode, prompt="p0", limits=Limits(every=2, snapshots=5))
    session.run(until=60)
    points = [point.chunk for point in session._maker.history._points]
    gaps = [after - before for before, after in pairwise(points)]
    assert points[0] == 0 and len(points) == 5 and points[-1] >= 58
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] <= 4


def test_a_history_too_small_for_a_snapshot_keeps_nothing_and_says_so() -> None:
    trial = Trial({4: [Rewind(chunk=2)]}, limits=Limits(max_bytes=1000))
    events = trial.run(6)
    assert "nothing is kept of it" in of_kind(events, Refused)[0].why


def test_the_beginning_costs_no_snapshot_of_an_empty_window() -> None:
    stream = stream_of()
    session = Session(stream, encode, prompt="p0")
    session.run(until=1)
    whole = stream_of().snapshot().nbytes
    assert session.outbox.status.history_bytes < whole / 4


def test_a_rewind_that_is_stopped_leaves_a_stream_between_two_chunks_of_its_past() -> None:
    trial = Trial({11: [Cut(text="p1")], 12: [Rewind(chunk=11)]}, limits=Limits(every=100))
    stream, calls = trial.stream, iter(range(100))

    def on_pass(kind: str, number: int) -> None:
        trial._on_pass(kind, number)
        if trial.begun == 12 and kind == "clean" and next(calls) == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        trial.chunks = 99
        trial.session.run(on_pass)
    chunk = stream.state.num_chunks
    assert 0 < chunk < 11 and trial.reader.read()[-1].chunk == chunk
    assert trial.outbox.status.prompt == "p0"
    expected = stream_of()
    for _ in range(chunk):
        expected.step()
    assert torch.equal(stream.step().latents, expected.step().latents)


# The log.


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    script: Script = {
        1: [Prompt(text="p1"), Lora(name="ink", strength=0.5)],
        3: [Rewind(chunk=1), Decay(decay=0.5), Cut()],
        4: [Rewind(chunk=2, branch="b")],
    }
    Trial(script, log=path).run(5)
    return path


def test_a_log_cut_off_anywhere_is_its_whole_lines_or_a_sentence(log: Path, tmp_path: Path) -> None:
    whole, data, part = read_log(log), log.read_bytes(), tmp_path / "part.jsonl"
    lines = [at for at, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(0, len(data), 3):
        part.write_bytes(data[:cut])
        ended = sum(at < cut for at in lines)
        if ended:
            assert read_log(part).entries == whole.entries[: ended - 1]
        else:
            with pytest.raises(ValueError, match="no whole line"):
                read_log(part)


def test_a_damaged_log_is_refused_in_a_sentence_or_sound(log: Path, tmp_path: Path) -> None:
    data, part, draw, refused = log.read_bytes(), tmp_path / "part.jsonl", random.Random(0), 0
    for _ in range(1500):
        changed = bytearray(data)
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(changed))
            changed[at : at + draw.randrange(3)] = draw.choice(
                [b"", b"-", b"9", b"[", b"null", b"\xff", b"\n", b'"', bytes([draw.randrange(256)])]
            )
        part.write_bytes(changed)
        try:
            read_log(part)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 600
    assert refused > 700


@pytest.mark.parametrize(
    "line",
    [
        "[" * 50_000,
        "{}",
        '{"made": 99, "mark": ""}',
        '{"made": 5, "mark": 3}',
        '{"number": 9, "back": 99, "branch": "c"}',
        '{"number": 9, "back": 0, "branch": "B"}',
        '{"number": 9, "back": 0, "branch": "../c"}',
        '{"number": 9, "chunk": 4, "done": {"do": "stop"}}',
        '{"number": 9, "chunk": 4, "done": {"do": "decay", "decay": NaN}}',
        '{"number": ' + "9" * 5000 + ', "chunk": 4, "done": {"do": "decay", "decay": 1}}',
        '{"end": true}',
        "x" * 300_000,
    ],
    ids=lambda line: line[:40],
)
def test_a_line_that_no_session_writes_is_named(line: str, log: Path) -> None:
    count = len(log.read_text().splitlines())
    with log.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=f"line {count + 1} of"):
        read_log(log)


def test_a_log_that_was_edited_differs_and_makes_another_video_where_that_is_wanted(
    log: Path,
) -> None:
    latents = latents_by_branch(log, stream_of())
    log.write_text(log.read_text().replace('"p1"', '"p2"'))
    with pytest.raises(ValueError, match="chunk 1 is not what it was"):
        latents_by_branch(log, stream_of())
    other = latents_by_branch(log, stream_of(), exact=False)
    assert torch.equal(other["main"][0], latents["main"][0])
    assert not torch.equal(other["main"][1], latents["main"][1])
    assert {name: len(each) for name, each in other.items()} == {"main": 3, "branch-2": 1, "b": 1}


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"cache": tiny.window(9, 2)}, {"width": 64}, {"decoder": "taehv"}],
    ids=str,
)
def test_a_log_of_another_stream_is_refused(other: dict[str, Any], log: Path) -> None:
    with pytest.raises(ValueError, match="replay it with what it was made with"):
        replay_log(read_log(log), stream_of(**other), encode, set_lora=lambda name, strength: None)


def test_a_log_is_whole_up_to_the_chunk_that_is_being_made(tmp_path: Path) -> None:
    path, seen = tmp_path / "log.jsonl", []

    def on_pass(kind: str, number: int) -> None:
        seen.append(len(read_log(path).entries))

    Session(stream_of(), encode, prompt="p0", log=path).run(on_pass, until=3)
    assert seen == [0, 0, 1, 1, 1, 2, 2, 2]
    assert json.loads(path.read_text().splitlines()[-1]) == {"end": 3}


# The recording.

FORMAT = VideoFormat(width=48, height=32, crf=0)


def images_in(path: Path) -> Tensor:
    return to_uint8(read_images(path, width=48, height=32)[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wan", "taehv"])
def test_every_branch_is_a_whole_file_and_a_replay_writes_the_same_bytes(
    kind: str, tmp_path: Path
) -> None:
    script: Script = {
        2: [Prompt(text="p1")],
        4: [Rewind(chunk=2, branch="a"), Rewind(chunk=1, branch="night"), Prompt(text="p2")],
        6: [Cut(text="p3")],
        8: [Rewind(chunk=4), Decay(decay=0.0)],
    }
    recorder = VideoRecorder(tmp_path / "take.mp4", FORMAT)
    trial = Trial(script, stream_of(kind), recorder=recorder, log=tmp_path / "log.jsonl",
                  limits=Limits(every=3))  # fmt: skip
    events = trial.run(10)
    assert {name: path.name for name, path in recorder.paths.items()} == {
        "main": "take.mp4", "night": "take-night.mp4", "branch-2": "take-branch-2.mp4",
    }  # fmt: skip
    per_chunk: dict[str, dict[int, Tensor]] = {"main": {}, "night": {}, "branch-2": {}}
    for picture in of_kind(events, Picture):
        per_chunk[picture.branch][picture.chunk] = picture.images
    for name, parent in (("night", "main"), ("branch-2", "night")):
        begins = min(per_chunk[name])
        per_chunk[name] |= {c: t for c, t in per_chunk[parent].items() if c < begins}
    for name, chunks in per_chunk.items():
        with VideoWriter(tmp_path / "whole.mp4", FORMAT) as writer:
            for number in range(len(chunks)):
                writer.write(chunks[number])
        expected = images_in(tmp_path / "whole.mp4")
        assert torch.equal(images_in(recorder.paths[name]), expected), name
    (tmp_path / "again").mkdir()
    again = VideoRecorder(tmp_path / "again" / "take.mp4", FORMAT)
    latents_by_branch(tmp_path / "log.jsonl", stream_of(kind), recorder=again)
    for name, path in recorder.paths.items():
        assert path.read_bytes() == again.paths[name].read_bytes(), name


def test_a_session_ends_with_its_recording_whole_wherever_it_is_stopped(tmp_path: Path) -> None:
    for at in range(6):
        calls = iter(range(100))

        def on_pass(kind: str, number: int, at: int = at, calls: Any = calls) -> None:
            if next(calls) == at + 5:
                raise Interrupted

        stream = stream_of("taehv")
        recorder = VideoRecorder(tmp_path / f"take{at}.mp4", FORMAT)
        with pytest.raises(Interrupted):
            Session(stream, encode, prompt="p0", recorder=recorder).run(on_pass)
        chunks = stream.state.num_chunks
        assert chunks and len(images_in(tmp_path / f"take{at}.mp4")) == 12 * chunks - 3
