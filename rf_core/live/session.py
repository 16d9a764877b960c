"""A live session: a stream that is steered while it runs.

`run` makes chunks in the caller's thread; a second one delivers their images (`Presenter`).
Commands come in through `inbox` from any thread, events and pictures go out through `outbox`, and
nothing else is shared. Between two chunks, in this order: a snapshot where one is due, the coming
change whose time has come, then every command that waits, in the order they came in.

Every command is acknowledged twice: `Received` with its number, then `Applied` with the chunk it
takes hold at, or `Refused` with the reason. What cannot be done leaves everything as it was.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from ..source import Source
from ..stream import GUIDE_STRENGTH, OnPass, Stream
from .buffers import (
    MAX_COMMANDS,
    Applied,
    Branched,
    Ended,
    Happened,
    Inbox,
    NumberedCommand,
    Outbox,
    Refused,
)
from .commands import Command, Prompt, Rewind, Stop
from .history import Limits
from .log import (
    ActionEntry,
    ChunkEntry,
    EndEntry,
    LogEntry,
    LogHeader,
    LogWriter,
    RewindEntry,
    digest_of,
    facts_of,
    source_of,
)
from .maker import Encode, Maker, SetLora, Speed
from .record import OnAutosave, Presenter, Recorder
from .transition import Action, Branch, ScheduledPrompt, SessionState, transition


class RateLimiter:
    """When the next chunk may begin, where a stream is to be no faster than it is shown."""

    def __init__(self, rate: float | None) -> None:
        if rate is not None and not rate > 0:
            raise ValueError(f"rate is {rate}; give images a second above 0")
        self._rate = rate
        self._due = self._began = 0.0

    def remaining(self) -> float:
        """Seconds until then; 0 where it may."""
        return max(0.0, self._due - time.monotonic())

    def chunk_begins(self) -> None:
        """A chunk is begun."""
        self._began = time.monotonic()

    def chunk_made(self, images: int) -> None:
        """It has so many images. What was late is not caught up with."""
        if self._rate is not None:
            self._due = max(self._due, self._began) + images / self._rate


class _Stopped(Exception):  # noqa: N818  # not an error
    """Raised within a pass to end the session there."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where a session stands, and what the next chunk will do."""

    chunk: int
    """The next one."""
    branch: Branch
    paused: bool
    prompt: str
    loras: dict[str, float]
    decay: float
    strength: float | None
    """The source's; None without one."""
    branches: tuple[Branch, ...]
    """The last of them, in the order they were begun."""
    past: tuple[PastAction, ...]
    """What took hold on the line that is followed, the last of it."""
    coming: tuple[ScheduledPrompt, ...]
    images: int
    """Made on this line."""
    chunk_images: int
    """Of a chunk that follows another."""
    fps: Speed
    oldest: int | None
    """The first chunk that can be gone back to."""
    history_bytes: int
    """RAM that the past takes, of `Limits.max_bytes`."""
    answered: int
    """The last command that was acknowledged as applied or refused; all before it were, too."""
    suspended: bool = False
    """Whether it has let go of its stream, and takes hold of nothing until it has another."""


@dataclass(frozen=True, kw_only=True)
class PastAction:
    """An action, and the chunk that it took hold at."""

    chunk: int
    action: Action


_LISTED = 256  # past actions, and branches, in a status


class Session:
    """A stream that is steered while it runs; used once.

    It may be suspended between two chunks, and goes on with another stream of the same kind: for
    those who watch and steer, it is the same session.

    Args:
        stream: between two chunks; the session's alone while it runs.
        encode: a prompt's embeddings, called by `run`'s thread; see `maker.Encode`.
        prompt: the text that the stream follows now.
        set_lora: see `maker.SetLora`.
        loras: every LoRA that can be set, with its strength now.
        recorder: keeps every branch; called by the thread that delivers images.
        log: the file to write what is done to, over one of the same name.
        limits: how much of the past is kept.
        clip: clean latents [1, C, F, h, w] that the first chunks are, of a stream at its beginning.
        rate: images a second that are made at most; None for as many as can be.
        side_stream: whether the decoder has a stream of its own, see `Handoff`.
        max_commands: how many commands may wait for a chunk boundary.
        outbox: where events and pictures go, where another size than usual is wanted.
        source: guides the chunks that are generated; the caller closes it after `run`.
        strength: what the source's guides begin with, see `Stream.generate`.
        motion_strength: what is added where all moves, see `source.strength_at`.
        on_autosave: takes a compact snapshot every few chunks, and at the end.

    Raises:
        ValueError: the stream makes a batch or takes no guides, or LoRAs come without a way to set
            them, or the strength is outside [0, 1].
    """

    def __init__(
        self,
        stream: Stream,
        encode: Encode,
        *,
        prompt: str,
        set_lora: SetLora | None = None,
        loras: Mapping[str, float] | None = None,
        recorder: Recorder | None = None,
        log: Path | str | None = None,
        limits: Limits | None = None,
        clip: Tensor | None = None,
        rate: float | None = None,
        side_stream: bool | None = None,
        max_commands: int = MAX_COMMANDS,
        outbox: Outbox | None = None,
        on_autosave: OnAutosave | None = None,
        source: Source | None = None,
        strength: float = GUIDE_STRENGTH,
        motion_strength: float = 0.0,
    ) -> None:
        self.outbox = outbox or Outbox()
        self.inbox = Inbox(max_commands, received=self.outbox.publish)
        self._presenter = Presenter(self.outbox, recorder, on_autosave)
        self._maker = Maker(
            stream,
            encode,
            prompt=prompt,
            presenter=self._presenter,
            set_lora=set_lora,
            loras=loras,
            limits=limits,
            clip=clip,
            side_stream=side_stream,
            source=source,
            strength=strength,
            motion_strength=motion_strength,
        )
        self._rate_limiter = RateLimiter(rate)
        self._state = SessionState.beginning(self._maker.chunk)
        self._branches = [self._state.branch]
        self._past = [PastAction(chunk=self._maker.chunk, action=Prompt(text=prompt))]
        self._pending: deque[NumberedCommand] = deque()
        self._answered = 0
        settings = self._maker.settings
        self._header = LogHeader(
            stream=facts_of(stream, clip),
            prompt=prompt,
            loras=settings.loras,
            limits=self._maker.history.limits,
            source=None
            if source is None or log is None
            else source_of(source, strength, motion_strength),
        )
        self._log_path = log
        self._log: LogWriter | None = None
        self._leaving = False
        self.suspended = False
        """Whether `run` has returned to be called again, after `resume`."""
        self._publish_status()

    @property
    def recent_latents(self) -> list[Tensor]:
        """Clean latents of the line's last chunks, as far as they are kept; after `run`."""
        return self._maker.history.latents()

    def submit(self, command: Command) -> int:
        """Ask for something, from any thread; its number. ValueError where there is no room."""
        return self.inbox.put(command)

    def suspend(self) -> None:
        """Let `run` return between two chunks, to be called again; from its hooks."""
        self._leaving = True

    def resume(self, stream: Stream, loras: Mapping[str, float] | None = None) -> None:
        """Let a suspended session go on, by `run`, with another stream of the same kind.

        `loras` has the strengths that the stream's network has now. ValueError where the stream is
        of another kind; the session is then as suspended as before.
        """
        self._maker.attach(stream, loras or {})
        self.suspended = self._leaving = False
        self._publish_status()

    def abandon(self, why: str) -> None:
        """End a suspended session that nobody will resume; all that was made is whole."""
        try:
            self._close()
        finally:
            self._say_goodbye(why)

    def run(
        self,
        on_pass: OnPass | None = None,
        on_idle: Callable[[], None] | None = None,
        until: int | None = None,
    ) -> None:
        """Make chunks until a `Stop`, or until there are so many, or it is suspended.

        `on_pass` is called before every pass of the network, and `on_idle` some times a second
        while it is paused; what they raise ends the session. However it ends: what was made is
        delivered, the recording is whole, the stream stands between two chunks (it may be one of
        those before, where it was stopped on its way back to one), every command is answered, and
        `Ended` is the last event.
        """
        why: str | None = None
        try:
            with ExitStack() as ends:
                ends.callback(self._close)
                with self._maker:
                    left = self._run(self._watched(on_pass), on_idle, until)
                if left:
                    self._maker.detach()
                    self.suspended = True
                    self._publish_status()
                    ends.pop_all()
        except BaseException as error:
            why = f"{type(error).__name__}: {error}"
            raise
        finally:
            if not self.suspended:
                self._say_goodbye(why)

    def _run(self, on_pass: OnPass, on_idle: Callable[[], None] | None, until: int | None) -> bool:
        """Whether it was left before its end."""
        if self._log_path is not None and self._log is None:
            self._log = LogWriter(self._log_path, self._header)
        try:
            while self._boundary(on_pass, on_idle) and (until is None or self._state.chunk < until):
                if self._leaving:
                    return True
                self._make(on_pass)
        except _Stopped:
            pass
        return False

    def _watched(self, on_pass: OnPass | None) -> OnPass:
        def watched(kind: str, number: int) -> None:
            if self.inbox.stop_wanted:
                raise _Stopped
            if on_pass is not None:
                on_pass(kind, number)  # type: ignore[arg-type]

        return watched

    def _make(self, on_pass: OnPass) -> None:
        self._rate_limiter.chunk_begins()
        latents = self._maker.make(self._state.branch, on_pass)
        self._rate_limiter.chunk_made(self._maker.last_images)
        self._write(ChunkEntry(chunk=self._state.chunk, digest=digest_of(latents)))
        self._state = self._state.next_chunk()

    def _boundary(self, on_pass: OnPass, on_idle: Callable[[], None] | None) -> bool:
        """What is done between two chunks; whether there is to be another."""
        self._maker.add_restore_point()
        self._let_come()
        self._obey(on_pass)
        while not (self._state.stopped or self._leaving) and (
            self._state.paused or self._rate_limiter.remaining()
        ):
            seconds = None if self._state.paused else self._rate_limiter.remaining()
            self.inbox.wait(on_idle and partial(self._idle, on_idle), seconds)
            self._obey(on_pass)
        return not self._state.stopped

    def _idle(self, on_idle: Callable[[], None]) -> bool:
        on_idle()
        return self._leaving

    def _let_come(self) -> None:
        coming = self._state.due()
        if coming is None:
            return
        self._state = self._state.without(coming.number)
        try:
            self._carry_out(coming.number, coming.prompt)
        except ValueError as error:
            self.outbox.publish(Refused(number=coming.number, why=str(error)))
            return
        self.outbox.publish(Happened(number=coming.number, chunk=coming.chunk))

    def _obey(self, on_pass: OnPass) -> None:
        self._pending.extend(self.inbox.take())
        while self._pending and not self._state.stopped:
            given = self._pending[0]
            answer = self._answer(given, on_pass)
            self._pending.popleft()
            self._answered = given.number
            self.outbox.publish(answer)
        self._publish_status()

    def _answer(self, given: NumberedCommand, on_pass: OnPass) -> Applied | Refused:
        number, command, maker = given.number, given.command, self._maker
        try:
            step = transition(self._state, number, command, maker.history.oldest)
            for coming in step.state.coming:
                if coming.number == number:
                    maker.prepare(coming.prompt.text)
            if isinstance(step.action, Rewind):
                plan = maker.plan_rewind(step.chunk)
            elif step.action is not None:
                self._carry_out(number, step.action)
        except ValueError as error:
            return Refused(number=number, why=str(error))
        if isinstance(step.action, Rewind):
            maker.rewind(plan, on_pass)
            left = replace(self._state.branch, ended=self._state.chunk)
            branch = step.state.branch
            self._branches[-1:] = [left, branch]
            self._past = [each for each in self._past if each.chunk < step.chunk]
            self._write(RewindEntry(number=number, chunk=step.chunk, branch=branch.name))
            self.outbox.publish(Branched(name=branch.name, parent=branch.parent, chunk=step.chunk))
        self._state = step.state
        return Applied(number=number, chunk=step.chunk)

    def _carry_out(self, number: int, action: Action) -> None:
        done = self._maker.apply(action)
        self._past.append(PastAction(chunk=self._state.chunk, action=done))
        self._write(ActionEntry(number=number, chunk=self._state.chunk, action=done))

    def _write(self, entry: LogEntry) -> None:
        if self._log is not None:
            self._log.write(entry)

    def _close(self) -> None:
        """End the recording, and then the log."""
        try:
            self._presenter.close()
        finally:
            self._end_log()

    def _end_log(self) -> None:
        if self._log is not None:
            with self._log:
                self._log.write(EndEntry(chunk=self._state.chunk))

    def _publish_status(self) -> None:
        if self.suspended:
            self.outbox.status = replace(
                self.outbox.status, suspended=True, answered=self._answered
            )
            return
        maker, state = self._maker, self._state
        del self._past[:-_LISTED]
        self.outbox.status = Status(
            chunk=state.chunk,
            branch=state.branch,
            paused=state.paused,
            prompt=maker.settings.text,
            loras=dict(maker.settings.loras),
            decay=maker.decay,
            strength=maker.strength,
            branches=tuple(self._branches[-_LISTED:]),
            past=tuple(self._past),
            coming=state.coming,
            images=maker.images,
            chunk_images=maker.chunk_images,
            fps=maker.speed,
            oldest=maker.history.oldest,
            history_bytes=maker.history.nbytes,
            answered=self._answered,
        )

    def _say_goodbye(self, why: str | None) -> None:
        """Answer what was not: a stop is applied, the rest comes too late."""
        chunk = self._state.chunk if self.suspended else self._maker.chunk
        for given in (*self._pending, *self.inbox.close()):
            stops = isinstance(given.command, Stop) and why is None
            number = given.number
            late = "the session has ended before it could take hold"
            self._answered = number
            self.outbox.publish(
                Applied(number=number, chunk=chunk) if stops else Refused(number=number, why=late)
            )
        self._publish_status()
        self.outbox.publish(Ended(chunk=chunk, why=why))
        self.outbox.close()
