"""The two buffers between a live stream and the rest: commands go in, events and pictures come out.

Nothing else is shared. Both are bounded, and nobody waits in them for somebody slow: a full inbox
refuses, and the outbox lets go of its oldest pictures. An acknowledgement is never left out: a
reader so far behind that one is gone gets `ReaderLagged`, and begins anew with the status.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, takewhile
from operator import itemgetter
from typing import Any

from torch import Tensor

from .commands import Command, Stop

MAX_COMMANDS = 256
"""Commands that may wait for the next chunk boundary."""
MAX_EVENTS = 4096
"""Events that are kept for readers."""
MAX_PICTURES = 3
"""Chunks whose pictures are kept for readers."""
_LOOKS = 4  # times a second that a pause asks whether it is interrupted, where anybody wants it to


@dataclass(frozen=True, kw_only=True)
class NumberedCommand:
    """A command with the number it is known by, from 1."""

    number: int
    command: Command


@dataclass(frozen=True, kw_only=True)
class Received:
    """A command has come in; one of `Applied` and `Refused` follows."""

    number: int
    command: Command


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A command is done."""

    number: int
    chunk: int
    """That it takes hold at."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A command is not done; of a coming change, also when its time comes."""

    number: int
    why: str


@dataclass(frozen=True, kw_only=True)
class Happened:
    """A coming change has come."""

    number: int
    """Of the command that scheduled it."""
    chunk: int


@dataclass(frozen=True, kw_only=True)
class Branched:
    """The stream went back and goes on in a branch."""

    name: str
    parent: str | None
    chunk: int


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The last event."""

    chunk: int
    """The first that is not made."""
    why: str | None
    """The error that ended it; None where it was stopped, or is done."""


Event = Received | Applied | Refused | Happened | Branched | Ended


@dataclass(frozen=True, kw_only=True)
class CameraMark:
    """Which frame of a camera it is."""

    camera: str
    """Its name, which whoever sends its frames gave it."""
    number: int
    """From 1."""
    captured: float
    """When it was captured, in milliseconds of the clock of whoever sends it."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A chunk as it is shown."""

    branch: str
    chunk: int
    images: Tensor | None
    """uint8 [T, H, W, 3] on the CPU; None of a stream without a decoder."""
    fragment: bytes | None = None
    """The same as it stands in the recording, for `fragments.Stream`; None without one."""
    camera: CameraMark | None = None
    """The frame that its last image was made of; None where no camera guided it."""


class Inbox:
    """Commands on their way to the stream, from any thread."""

    def __init__(
        self,
        most: int = MAX_COMMANDS,
        received: Callable[[Received], None] = lambda event: None,
    ) -> None:
        self._most, self._received = most, received
        self._changed = threading.Condition()
        self._waiting: deque[NumberedCommand] = deque()
        self._count = 0
        self._closed = False
        self.stop_wanted = False
        """Whether a `Stop` has come in."""

    def put(self, command: Command) -> int:
        """The command's number; ValueError where the inbox is full, or the session has ended."""
        with self._changed:
            if self._closed:
                raise ValueError("the session has ended; begin another")
            if len(self._waiting) >= self._most and not isinstance(command, Stop):
                raise ValueError(
                    f"{self._most} commands wait for the next chunk already; send it again later"
                )
            if isinstance(command, Stop) and self.stop_wanted:
                raise ValueError("the session is being stopped already")
            self._count += 1
            self._received(Received(number=self._count, command=command))
            self._waiting.append(NumberedCommand(number=self._count, command=command))
            self.stop_wanted |= isinstance(command, Stop)
            self._changed.notify_all()
            return self._count

    def take(self) -> list[NumberedCommand]:
        """All that wait, in order; each is given once."""
        with self._changed:
            taken, self._waiting = list(self._waiting), deque()
            return taken

    def waiting(self) -> list[NumberedCommand]:
        """What waits, left where it is."""
        with self._changed:
            return list(self._waiting)

    def wait(self, on_idle: Callable[[], bool] | None = None, seconds: float | None = None) -> None:
        """Sleep until a command waits, so long at most.

        `on_idle` is called some times a second, and ends it where it gives True.
        """
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return
            looks = [each for each in (left, on_idle and 1 / _LOOKS) if each is not None]
            with self._changed:
                timeout = min(looks, default=None)
                if self._changed.wait_for(lambda: self._waiting or self._closed, timeout):
                    return
            if on_idle is not None and on_idle():
                return

    def close(self) -> list[NumberedCommand]:
        """Take no more; what still waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        return self.take()


class ReaderLagged(Exception):  # noqa: N818  # what a reader is, not what went wrong
    """A reader let events pass that are no longer kept; it begins anew with `Outbox.reader`."""


class Outbox:
    """Events and pictures on their way from the stream, to any number of readers."""

    def __init__(self, max_events: int = MAX_EVENTS, max_pictures: int = MAX_PICTURES) -> None:
        self._changed = threading.Condition()
        self._events: deque[tuple[int, Event]] = deque(maxlen=max_events)
        self._pictures: deque[tuple[int, Picture]] = deque(maxlen=max_pictures)
        self._count = 0
        self._gone = 0  # where events are kept from
        self._closed = False
        self._status: Any = None
        self._subscribers: list[Callable[[], None]] = []

    @property
    def status(self) -> Any:
        """The last `Status` that was set."""
        with self._changed:
            return self._status

    @status.setter
    def status(self, status: Any) -> None:
        with self._changed:
            self._status = status
            self._notify()

    def publish(self, event: Event) -> None:
        """Hand an event to the readers."""
        with self._changed:
            if len(self._events) == self._events.maxlen:
                self._gone = self._events[0][0] + 1
            self._add(self._events, event)

    def show(self, picture: Picture) -> None:
        """Hand a chunk to the readers; the oldest goes where there are too many."""
        with self._changed:
            self._add(self._pictures, picture)

    def _add(self, line: deque[tuple[int, Any]], item: Event | Picture) -> None:
        line.append((self._count, item))
        self._count += 1
        self._changed.notify_all()
        self._notify()

    def _notify(self) -> None:
        for callback in self._subscribers:
            callback()

    @property
    def closed(self) -> bool:
        """Whether nothing comes any more."""
        with self._changed:
            return self._closed

    @property
    def end(self) -> Ended | None:
        """The last event, once it has come."""
        with self._changed:
            last = self._events[-1][1] if self._events else None
            return last if isinstance(last, Ended) else None

    def close(self) -> None:
        """Nothing comes any more; readers read what is there."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._notify()

    def reader(
        self, from_start: bool = False, latest: bool = False, after: int | None = None
    ) -> Reader:
        """Somebody who reads what comes from now on, or from the session's beginning.

        With `latest` the newest picture is read first; with `after`, a place that another reader
        came to, what follows it.
        """
        with self._changed:
            begin = self._pictures[-1][0] if latest and self._pictures else self._count
            if after is not None:
                begin = min(max(after + 1, 0), self._count)
            return Reader(self, 0 if from_start else begin)

    @contextmanager
    def subscribe(self, callback: Callable[[], None]) -> Iterator[None]:
        """Let `callback` be called whenever there may be news, for readers that cannot wait.

        It is called by the thread that brings them, and must return at once.
        """
        with self._changed:
            self._subscribers.append(callback)
        try:
            yield
        finally:
            with self._changed:
                self._subscribers.remove(callback)

    def _read(self, cursor: int, timeout: float | None) -> tuple[list[tuple[int, Any]], int]:
        with self._changed:
            self._changed.wait_for(lambda: self._count > cursor or self._closed, timeout)
            if cursor < self._gone:
                raise ReaderLagged("events have passed that are no longer kept; begin anew")
            new = chain(_since(self._events, cursor), _since(self._pictures, cursor))
            return sorted(new, key=itemgetter(0)), self._count


class Reader:
    """One reader's place in an `Outbox`; used by one thread."""

    def __init__(self, outbox: Outbox, cursor: int) -> None:
        self._outbox, self._cursor = outbox, cursor

    def read(self, timeout: float | None = None) -> list[Event | Picture]:
        """What has come since, in order; waits for something, so many seconds at most.

        Empty where nothing came, or where nothing will. Raises `ReaderLagged`.
        """
        return [item for _, item in self.read_placed(timeout)]

    def read_placed(self, timeout: float | None = None) -> list[tuple[int, Event | Picture]]:
        """The same, each with its place: see `Outbox.reader`."""
        found, self._cursor = self._outbox._read(self._cursor, timeout)
        return found


def _since(line: deque[tuple[int, Any]], cursor: int) -> Iterable[tuple[int, Any]]:
    return takewhile(lambda each: each[0] >= cursor, reversed(line))
