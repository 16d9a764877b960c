"""OSC, as artists' desks speak it: each message is one of `lines`' verbs with its words apart.

    /prompt "snow" "blend 3"    /mode "cut"    /lora/ink 0.6    /decay 0.9    /strength 0.4
    /pause    /resume    /cut "rain"    /rewind 12 "night"    /schedule 20 "fog"    /move 3 24
    /drop 3    /stop

A button sends 1 when it is pressed, 0 when it is let go: of what takes no words, a 0 does nothing.
Times in bundles are not waited for. python-osc reads the messages (`pip install python-osc`).

Anybody who reaches the port is obeyed, so it is of this machine alone unless another address is
given. Whatever comes, nothing leaves the thread but sound commands: how many wait is bounded by the
inbox, and what is refused is logged, once a second at most.
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from ..prompts import Switch
from .commands import Command
from .lines import LineContext, Question, printable, read_words

_log = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"
_BUNDLE, _HEAD = b"#bundle\0", 16  # its name, and where its messages begin: after a time
_DEEPEST = 8  # bundles in bundles; python-osc follows any number, and sizes below 0 for ever
_TAGS = frozenset("ifsdhTF")
_MAX_WORDS = 8
_LARGEST = 65_536  # bytes of a datagram
_LOOKS = 0.25  # seconds until the thread sees that it is to end
_BARE = frozenset({"pause", "resume", "stop", "cut"})


class OscServer:
    """Takes commands over UDP while it is entered, in a thread of its own.

    Args:
        submit: takes a command; ValueError where there is no room for it.
        port: UDP port; 0 for any that is free (`port` tells it).
        host: address to listen on.
        chunk: the next chunk, from which `-4` is counted.

    Raises:
        ValueError: python-osc is not there, or the address cannot be listened on.
    """

    def __init__(
        self,
        submit: Callable[[Command], int],
        port: int,
        host: str = LOOPBACK,
        chunk: Callable[[], int] = lambda: 0,
    ) -> None:
        try:
            from pythonosc.osc_message import OscMessage
        except ModuleNotFoundError:
            raise ValueError("OSC needs the package python-osc; pip install python-osc") from None
        self._read_message: Callable[[bytes], Any] = OscMessage
        self._submit, self._chunk, self._mode = submit, chunk, Switch()
        self._socket = _listening(host, port)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="osc", daemon=True)
        self._told_at, self._untold = 0.0, 0
        self.host, self.port = self._socket.getsockname()[:2]

    def __enter__(self) -> OscServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._socket.close()

    def _listen(self) -> None:
        while not self._ended.is_set():
            try:
                data = self._socket.recv(_LARGEST)
            except OSError:  # nothing came, or a datagram of ours was not taken by its receiver
                continue
            self.take(data)

    def take(self, datagram: bytes) -> None:
        """Obey a datagram, whatever is in it."""
        try:
            for message in _messages(datagram):
                self._obey(self._read_message(message))
        except Exception as error:  # from anybody, through a parser that is not ours
            self._refuse(error)

    def _obey(self, message: Any) -> None:
        name, *path = message.address.strip("/").split("/")
        given = list(message.params)
        pressed = name.lower() in _BARE and [type(each) is str for each in given] == [False]
        if pressed and not given.pop():
            return
        words = [*path, *map(_word, given)]
        asked = read_words(name, words, LineContext(mode=self._mode, chunk=self._chunk()))
        if isinstance(asked, Switch):
            self._mode = asked
        elif not isinstance(asked, Question):
            self._submit(asked)

    def _refuse(self, error: Exception) -> None:
        now = time.monotonic()
        if now - self._told_at < 1:
            self._untold += 1
            return
        more = f" (and {self._untold} before it)" if self._untold else ""
        why = str(error) if isinstance(error, ValueError) else "it is no OSC"
        _log.warning("an OSC message is refused: %s%s", printable(why[:200]), more)
        self._told_at, self._untold = now, 0


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `PORT` or `HOST:PORT`; ValueError for anything else."""
    host, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdigit() or not 0 <= int(port[:9]) < 65_536:
        raise ValueError(f"--osc is {text!r}; give a port such as 9000, or 0.0.0.0:9000")
    return host.strip("[]") or LOOPBACK, int(port[:9])


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][0]
        listening = socket.socket(family, socket.SOCK_DGRAM)
        listening.settimeout(_LOOKS)
    except OSError as error:
        raise _unheard(host, port, error) from error
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise _unheard(host, port, error) from error
    return listening


def _unheard(host: str, port: int, error: OSError) -> ValueError:
    why = error.strerror or error
    return ValueError(f"OSC cannot listen on {host}:{port} ({why}); give another port or address")


def _messages(data: bytes, depth: int = 0) -> Iterator[bytes]:
    """The messages of a datagram, bundles taken apart; ValueError where it holds something else."""
    if data.startswith(_BUNDLE) and depth < _DEEPEST:
        at = _HEAD
        while at < len(data):
            (size,) = struct.unpack_from(">i", data, at)
            at += 4
            if not 0 < size <= len(data) - at:
                raise ValueError("it is a bundle cut off")
            yield from _messages(data[at : at + size], depth + 1)
            at += size
        return
    tags = data[_padded(data.find(b"\0")) :].split(b"\0", 1)[0].decode("ascii", "replace")
    if not data.startswith(b"/") or not _TAGS.issuperset(tags[1:]) or len(tags) > 1 + _MAX_WORDS:
        raise ValueError("it is no OSC message of texts and numbers")
    yield data


def _padded(end: int) -> int:
    """Where what follows a text begins, whose zero is at `end`."""
    return end + 4 - end % 4


def _word(given: object) -> str:
    if isinstance(given, (bool, int)):
        return str(int(given))
    return f"{given:.7g}" if isinstance(given, float) else str(given)  # as exact as OSC's floats
