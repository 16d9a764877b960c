"""A live session with hands on it, and one made again from its log: `generate --live`, `--replay`.

What is typed is read in a thread of its own and submitted as it comes; another one prints what
happens. The session runs in the caller's. The recording lies at the output, its branches and its
log beside it.
"""

from __future__ import annotations

import glob
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import FPS
from .digests import file_digest
from .fast.graphs import GraphedModel
from .generate import (
    open_networks,
    open_reader,
    open_source,
    open_stream,
    open_text_encoder,
    start_images,
)
from .live.buffers import Picture, ReaderLagged
from .live.commands import Command, Schedule, Stop
from .live.commands import Resume as GoOn
from .live.history import Limits
from .live.lines import (
    LineContext,
    ParsedLine,
    Question,
    describe_event,
    help_lines,
    printable,
    read_line,
    shorten,
)
from .live.log import Log
from .live.maker import Encode, SetLora
from .live.osc import OscServer
from .live.record import VideoRecorder
from .live.replay import ReplayMismatch, replay_log, strengths_of
from .live.session import Session, Status
from .live.transition import MAX_COMING
from .memory.placement import free_bytes
from .model import Network, WanModel
from .options import Files, Options, Plan
from .prompts import Switch
from .source import Source
from .source_input import SourceOptions
from .stream import Stream, start_latents
from .text import encode_prompts
from .weights.checkpoint import read_checkpoint
from .weights.lora import Lora
from .weights.strengths import Strengths, names_of

PrintLine = Callable[[str], None]
"""Shows a line to whoever runs this."""

_LONGEST_LINE = 65_536  # bytes; the longest prompt takes two thirds
_MAX_ENDS = 20  # times that a terminal may end its input; one that is gone does nothing else
_SHARE = 0.5  # of the RAM that is free, at most, for the past


class _Ended(Exception):  # noqa: N818  # not an error
    """Raised within a pass to end a replay there."""


@dataclass(frozen=True, kw_only=True)
class LiveSetup:
    """What a session, or its replay, is made with."""

    stream: Stream
    encode: Encode
    clip: Tensor | None
    """See `Session`."""
    loras: Mapping[str, float]
    """See `Session`."""
    set_lora: SetLora | None
    source: Source | None = None
    """See `Session`; whoever runs it closes it."""

    def named(self) -> dict[str, Any]:
        """What both take by name."""
        return {"set_lora": self.set_lora, "clip": self.clip, "source": self.source}


def log_path(output: Path) -> Path:
    """Where a session's log lies."""
    return output.with_suffix(".jsonl")


def check_live(resolved: Plan) -> None:
    """ValueError where what is planned is no live session, or would write over another's files."""
    options = resolved.options
    if len(resolved.prompts) - 1 > MAX_COMING:
        raise ValueError(
            f"the timeline has {len(resolved.prompts)} prompts; a live session is given at most "
            f"{MAX_COMING + 1} beforehand"
        )
    _check_beside(options, [log_path(options.output)])


def check_replay(resolved: Plan) -> None:
    """ValueError where a replay would write over another's files."""
    _check_beside(resolved.options, [])


def _check_beside(options: Options, others: list[Path]) -> None:
    output = options.output
    pattern = f"{glob.escape(output.stem)}-*{glob.escape(output.suffix)}"
    there = [*(path for path in others if path.exists()), *sorted(output.parent.glob(pattern))]
    if there and not options.overwrite:
        raise ValueError(
            f"{there[0]} exists, where a branch or the log of {output.name} may come to lie; "
            "choose another name, or --overwrite it"
        )


def open_live(resolved: Plan) -> LiveSetup:
    """All that a session needs; the text encoder stays."""
    encoder = open_text_encoder(resolved.options)
    first = resolved.prompts[0].text
    return _open(resolved, first, lambda text: encoder.encode([text]).cpu())


def open_replay(resolved: Plan, log: Log) -> LiveSetup:
    """All that a log asks for; the text encoder is gone when this returns."""
    embeds = encode_prompts(log.texts, partial(open_text_encoder, resolved.options))
    return _open(resolved, log.header.prompt, embeds.__getitem__)


def _open(resolved: Plan, first: str, encode: Encode) -> LiveSetup:
    embeds = {first: encode(first)}
    reader = open_reader(resolved)
    model, decoder = open_networks(resolved)
    embeds[resolved.prompts[0].text] = embeds[first]  # of a log, with white space of its own
    stream = open_stream(resolved, model, decoder, embeds)
    loras = names_of(resolved.options.files.loras)
    return LiveSetup(
        stream=stream,
        encode=encode,
        clip=None if resolved.options.start is None else _clip(resolved, stream),
        loras={name: lora.strength for name, lora in loras.items()},
        set_lora=_set_lora(resolved.options, model, loras) if loras else None,
        source=open_source(resolved, decoder, reader),
    )


def _clip(resolved: Plan, stream: Stream) -> Tensor:
    assert stream.decoder is not None
    images = start_images(resolved)
    return start_latents(images, stream.decoder, stream.cache_config)


def _set_lora(options: Options, model: Network, loras: Mapping[str, Lora]) -> SetLora:
    held = {"fp8": options.weights == "fp8", "streamed": options.offload == "stream"}
    why = [name for name, so in held.items() if so]
    if why:
        return partial(_refuse_strength, why[0])
    files = options.files
    checkpoint = read_checkpoint(
        files.model, submodel=files.submodel, num_heads=files.num_heads, family=files.family
    )
    network = model.network if isinstance(model, GraphedModel) else model
    assert isinstance(network, WanModel), "a live session is of one process"
    return Strengths(network, checkpoint.merged(), loras)


def _refuse_strength(why: str, name: str, strength: float) -> None:
    remedy = {"fp8": "leave out --weights fp8", "streamed": "give --offload none"}[why]
    raise ValueError(
        f"the strength of {name} is merged into {why} weights and stays what it is; {remedy} to "
        "change it live"
    )


def run_live(
    resolved: Plan,
    setup: LiveSetup,
    *,
    print_line: PrintLine,
    typed: RawIOBase | None,
    stopped: Callable[[], bool] = lambda: False,
    rate: float | None = FPS,
    osc: tuple[str, int] | None = None,
) -> None:
    """Run a session until its end, or until `stopped`.

    `typed` is where lines are read from, and `osc` the host and port to listen on for messages;
    None for neither. OSError and ValueError where the recording or OSC cannot be.
    """
    output, recorder = resolved.options.output, _recorder(resolved)
    session = Session(
        setup.stream,
        setup.encode,
        prompt=resolved.prompts[0].text,
        loras=setup.loras,
        recorder=recorder,
        log=log_path(output),
        limits=_limits(),
        rate=rate,
        **_strengths(resolved),
        **setup.named(),
    )
    for later in resolved.prompts[1:]:
        session.submit(Schedule(chunk=later.chunk, text=later.text, mode=later.switch))
    fps = resolved.family.fps
    hand = _Terminal(session, print_line, typed, stopped, alone=osc is None, fps=fps)
    try:
        with _listening(session, osc) as server, hand:
            if server is not None:
                print_line(f"OSC on {server.host}:{server.port}")
            session.run(hand.on_pass, hand.on_idle, resolved.total)
    finally:
        if setup.source is not None:
            setup.source.close()
        _print_files(recorder, print_line, resolved.family.fps)
        if log_path(output).exists() and recorder.paths:
            print_line(f"{log_path(output)}: its log, of which --replay makes it again")


def _strengths(resolved: Plan) -> dict[str, Any]:
    source = resolved.options.source
    if source is None:
        return {}
    return {"strength": source.strength, "motion_strength": source.motion_strength}


def _listening(
    session: Session, osc: tuple[str, int] | None
) -> AbstractContextManager[OscServer | None]:
    if osc is None:
        return nullcontext()
    host, port = osc
    return OscServer(session.submit, port, host, lambda: session.outbox.status.chunk)


def _recorder(resolved: Plan) -> VideoRecorder:
    begun = replace(resolved, prompts=resolved.prompts[:1])  # the log has what follows
    return VideoRecorder(resolved.options.output, resolved.format, begun.metadata)


def _print_files(recorder: VideoRecorder, print_line: PrintLine, fps: int) -> None:
    for branch, path in recorder.paths.items():
        print_line(f"{path}: {recorder.num_images.get(branch, 0) / fps:.2f} s of video")


def _limits() -> Limits:
    try:
        most = int(free_bytes("cpu") * _SHARE)
    except ValueError:  # this system does not tell
        return Limits()
    return Limits(max_bytes=min(most, Limits.max_bytes))


class _Terminal:
    """Reads what is typed, and prints what happens, while it is entered."""

    def __init__(
        self,
        session: Session,
        print_line: PrintLine,
        typed: RawIOBase | None,
        stopped: Callable[[], bool],
        *,
        alone: bool,
        fps: int,
    ) -> None:
        self._session, self._print_line, self._typed, self._stopped = (
            session,
            print_line,
            typed,
            stopped,
        )
        self._alone, self._silent, self._fps = alone, typed is None, fps
        self._mode = Switch()
        self._printer = threading.Thread(target=self._print_events, name="teller", daemon=True)

    def __enter__(self) -> None:
        self._printer.start()
        if self._typed is not None:  # which may wait for a line for ever: nobody waits for it
            threading.Thread(target=self._read, name="typed", daemon=True).start()

    def __exit__(self, *failure: object) -> None:
        self._session.outbox.close()
        self._printer.join()

    def on_pass(self, kind: str, number: int) -> None:
        """See `Session.run`."""
        if self._stopped() and not self._session.inbox.stop_wanted:
            with suppress(ValueError):  # somebody else was first
                self._session.submit(Stop())

    def on_idle(self) -> None:
        """See `Session.run`."""
        self.on_pass("idle", 0)
        if self._silent and self._alone and self._session.outbox.status.paused:
            self._print_line("the input has ended and nothing else can resume it, so it goes on")
            self._session.submit(GoOn())

    def _read(self) -> None:
        assert self._typed is not None
        for line in read_lines(self._typed, self._print_line):
            self._take(line)
        self._silent = True

    def _take(self, line: str) -> None:
        now = LineContext(mode=self._mode, chunk=self._status.chunk)
        try:
            asked = read_line(line, now)
            if asked is not None:
                self._do(asked)
        except ValueError as error:
            self._print_line(f"not taken: {printable(str(error))}")

    def _do(self, asked: ParsedLine) -> None:
        if isinstance(asked, Command):
            self._session.submit(asked)
        elif isinstance(asked, Switch):
            self._mode = asked
            self._print_line(f"the prompts that follow come in mode {asked}")
        else:
            for line in self._answer(asked):
                self._print_line(line)

    def _answer(self, question: Question) -> list[str]:
        if question is Question.HELP:
            return help_lines()
        if question is Question.MODE:
            return [f"the prompts that follow come in mode {self._mode}"]
        return status_lines(self._status, self._mode, self._fps)

    @property
    def _status(self) -> Status:
        return self._session.outbox.status

    def _print_events(self) -> None:
        reader = self._session.outbox.reader(from_start=True)
        while True:
            try:
                news = reader.read()
            except ReaderLagged:
                reader = self._session.outbox.reader()
                self._print_line(
                    "more has happened than could be told; /status says where it stands"
                )
                continue
            if not news:
                return
            for event in news:
                if not isinstance(event, Picture):
                    self._print_line(describe_event(event))


def status_lines(status: Status, mode: Switch, fps: int = FPS) -> list[str]:
    """Where a session stands, in lines; of a video of so many images a second."""
    loras = [f"{printable(name)} {strength:g}" for name, strength in status.loras.items()]
    speed = status.fps
    named = {"network": speed.network, "decode": speed.decode, "both": speed.total}
    speeds = [f"{name} {rate:.1f} images/s" for name, rate in named.items() if rate]
    past = "nowhere" if status.oldest is None else f"to chunk {status.oldest}"
    return [
        f"chunk {status.chunk} is next, {status.images / fps:.2f} s, branch {status.branch.name}"
        + (", paused" if status.paused else ""),
        f"prompt: {shorten(status.prompt)}",
        f"mode of the prompts that follow: {mode}; decay {status.decay:g}"
        + ("" if status.strength is None else f"; strength {status.strength:g}"),
        *([f"LoRAs: {', '.join(loras)}"] if loras else []),
        *(
            f"to come: [{each.number}] at chunk {each.chunk} [{each.prompt.mode}] "
            f"{shorten(each.prompt.text)}"
            for each in status.coming
        ),
        f"can go back {past}; the past takes {status.history_bytes / 1e6:.1f} MB",
        *([", ".join(speeds)] if speeds else []),
    ]


def read_lines(typed: RawIOBase, print_line: PrintLine) -> Iterator[str]:
    """Lines as they are typed, or come through a pipe, until its end.

    Read without a buffer of Python's, which could not be closed while a thread waits in it. A
    terminal's end of input (Ctrl-D) ends nothing, for more can be typed.
    """
    held, ends, dropping = b"", 0, False
    while ends < _MAX_ENDS:
        try:
            data = typed.read(4096)
        except (OSError, ValueError):
            return
        if data:
            ends = 0
            *lines, held = (held + data).split(b"\n")
            if dropping and lines:
                lines, dropping = lines[1:], False
            yield from (line.decode("utf-8", "replace") for line in lines)
            if len(held) > _LONGEST_LINE or dropping:
                held, dropping = b"", True
        elif typed.isatty():
            ends += 1
            print_line("this ends nothing; /stop, or Ctrl-C, ends the session")
        else:
            break
    if held:
        yield held.decode("utf-8", "replace")


def replay(
    resolved: Plan,
    setup: LiveSetup,
    log: Log,
    *,
    print_line: PrintLine,
    report: Callable[[int, int], None] = lambda done, total: None,
    stopped: Callable[[], bool] = lambda: False,
    exact: bool = True,
) -> bool:
    """Make a session's videos again; whether to its end. `report` gets chunks made and to make.

    ValueError as `replay_log`.
    """
    recorder, total, done = _recorder(resolved), log.num_chunks, 0

    def on_pass(kind: str, number: int) -> None:
        if stopped():
            raise _Ended

    def on_chunk(*made: object) -> None:
        nonlocal done
        done += 1
        report(done, total)

    try:
        replay_log(
            log,
            setup.stream,
            setup.encode,
            recorder=recorder,
            on_chunk=on_chunk,
            on_pass=on_pass,
            exact=exact,
            **setup.named(),
        )
    except _Ended:
        return False
    except ReplayMismatch as error:
        raise ValueError(f"{error}; --edited makes the video that it asks for now") from error
    finally:
        if setup.source is not None:
            setup.source.close()
        _print_files(recorder, print_line, resolved.family.fps)
    return True


def options_of(log: Log, options: Options) -> Options:
    """A run's options with all that a log holds; ValueError where a stream cannot be made so."""
    facts, (cache, sampler) = log.header.stream, log.configs
    if facts.get("chunk") != 0:
        raise ValueError(
            "the log begins within a video, which the command line cannot replay; take one of "
            "generate --live"
        )
    dtype = getattr(torch, str(facts.get("dtype")).removeprefix("torch."), None)
    return replace(
        options,
        **{name: facts[name] for name in ("width", "height", "seed")},
        cache=vars(cache),
        sampler=vars(sampler),
        dtype=dtype if isinstance(dtype, torch.dtype) else options.dtype,
        files=_with_strengths(options.files, log.header.loras),
        source=_source_of(log, options.source),
    )


def _source_of(log: Log, given: SourceOptions | None) -> SourceOptions | None:
    """The session's source, from the file that is given; ValueError where it is another."""
    held = log.header.source
    if held is None:
        if given is not None:
            raise ValueError("the log's session had no source; leave out --source")
        return None
    name = printable(str(held.get("file"))[:200])
    if held.get("digest") is None:
        raise ValueError(
            f"the log's session was guided by {name}, of which nothing is kept, so it is not made "
            "again; --edited without a source cannot stand for it either"
        )
    if given is None or given.path is None:
        raise ValueError(f"the log's session was guided by {name}; give that file with --source")
    given.check()
    if file_digest(given.path) != held["digest"]:
        raise ValueError(
            f"{given.path} is another file than {name}, which guided the log's session; give that "
            "one with --source"
        )
    settings: dict[str, Any] = {field: held[field] for field in ("at_end", "fit")}
    return SourceOptions(place=given.place, **settings | strengths_of(log))


def _with_strengths(files: Files, loras: tuple[tuple[str, float], ...]) -> Files:
    given = names_of(files.loras)
    if given.keys() != dict(loras).keys():
        wanted, there = (", ".join(each) or "none" for each in (dict(loras), given))
        raise ValueError(
            f"the log's LoRAs are {printable(wanted)}, given are {there}; give the same files with "
            "--lora FILE, the log holds their strengths"
        )
    return replace(files, loras=tuple(replace(given[n], strength=s) for n, s in loras))
