"""Live streams on ComfyUI's own server: commands in, events and video out, for a token.

A `Room` is what a running session shows to the outside. Its token goes to the client that queued
the run and to nobody else; without it nothing is taken and nothing is given. The handlers run in
the server's event loop and never wait for the stream, nor it for them.
"""

from __future__ import annotations

import asyncio
import hmac
import io
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from PIL import Image

from ..rf_core.config import FPS
from ..rf_core.live import (
    Command,
    Ended,
    FragmentSequence,
    Inbox,
    Outbox,
    Picture,
    Reader,
    ReaderLagged,
    Status,
    codec_of,
    read_command,
)
from . import host

LARGEST_COMMAND = 1 << 16
"""Bytes of a command: the longest prompt in any script, each letter escaped."""
MAX_WATCHERS = 16
"""Streams of events and of video that one session serves at a time."""
_KEPT = 60.0  # seconds that a session answers after its end
_MAX_ENDED = 4  # sessions that do so at a time, as each keeps its last pictures
_ALIVE = 15.0  # seconds after which a silent stream of events says that it is alive
_LOOK = 1.0  # seconds after which a silent stream sees whether its reader is still there
_SLOWEST = 20.0  # seconds that a reader, or a body, may keep this side waiting
_LATE = 0.25  # seconds that a stream of pictures makes up for, where one came late
_BRIEF = 300  # characters of a prompt that is past, or to come
_QUALITY = 80  # of a JPEG
_BOUNDARY = "picture"


@dataclass(frozen=True, kw_only=True)
class Screen:
    """What a session's video is."""

    width: int
    height: int
    header: bytes
    """Of its MP4."""
    fps: int = FPS
    """Images a second."""


@dataclass(eq=False, kw_only=True)
class Room:
    """A session, seen from outside. It holds neither the stream nor the models."""

    inbox: Inbox
    outbox: Outbox
    screen: Screen
    facts: Callable[[], dict[str, Any]]
    """What the node adds to the status: files, limits, memory."""
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    ended_at: float | None = None
    watchers: int = 0
    seen: bool = False
    """Whether anybody ever watched the video."""
    _encoded: tuple[Picture, asyncio.Future[list[bytes]]] | None = field(default=None, init=False)

    @property
    def end(self) -> Ended | None:
        """How it ended; None while it runs."""
        return self.outbox.end

    async def jpegs(self, picture: Picture) -> list[bytes]:
        """A picture's images, encoded once for all who watch."""
        if self._encoded is None or self._encoded[0] is not picture:
            work = asyncio.to_thread(_jpegs, picture.images)
            self._encoded = picture, asyncio.ensure_future(work)
        return await asyncio.shield(self._encoded[1])

    def status(self) -> dict[str, Any]:
        """What the page shows; see docs/live.md."""
        now, facts = self.outbox.status, self.facts()
        waiting = [{"number": n.number, "command": n.command.as_dict()} for n in self._waiting()]
        return {
            "chunk": now.chunk,
            "seconds": now.images / self.screen.fps,
            "branch": asdict(now.branch),
            "branches": [
                asdict(each) | {"file": facts["files"].get(each.name)} for each in now.branches
            ],
            "paused": now.paused,
            "suspended": now.suspended,
            "prompt": now.prompt,
            "loras": now.loras,
            "decay": now.decay,
            "strength": now.strength,
            "past": [{"chunk": each.chunk} | _brief(each.action.as_dict()) for each in now.past],
            "coming": [
                {"number": each.number, "chunk": each.chunk}
                | _brief({"text": each.prompt.text, "mode": str(each.prompt.mode)})
                for each in now.coming
            ],
            "waiting": waiting,
            "oldest": now.oldest,
            "history_bytes": now.history_bytes,
            "history_limit": facts["history_limit"],
            "memory": facts["memory"],
            "fps": asdict(now.fps),
            "rate": self.screen.fps,
            "chunk_images": now.chunk_images,
            "chunk_seconds": now.chunk_images / self.screen.fps,
            "width": self.screen.width,
            "height": self.screen.height,
            "until": facts["until"],
            "watchers": self.watchers,
            "ended": self.end is not None,
            "why": self.end.why if self.end else None,
        }

    def _waiting(self) -> list[Any]:
        answered = self.outbox.status.answered
        return [each for each in self.inbox.waiting() if each.number > answered]


def _brief(action: dict[str, Any]) -> dict[str, Any]:
    """An action with as much of its prompt as a strip of time shows; sent with each chunk."""
    return action | ({"text": action["text"][:_BRIEF]} if "text" in action else {})


_rooms: dict[str, Room] = {}


@contextmanager
def open_room(room: Room, node_id: str | None) -> Iterator[None]:
    """The room is open, the client that queued the run has its token; it stays a while after."""
    _rooms[room.id] = room
    try:
        announce(room, node_id)
        yield
    finally:
        room.ended_at = time.monotonic()
        host.call_later(_KEPT, _forget_old)
        _forget_old()


def announce(room: Room, node_id: str | None) -> None:
    """Give the client that queued the prompt which runs the token, and that prompt's id."""
    hello = {"node": node_id, "session": room.id, "token": room.token}
    if not host.send_event("rf.live", hello):
        host.log("the live stream has no client that could steer it; Cancel ends it")


def _forget_old() -> None:
    ended = [(each.ended_at, each.id) for each in list(_rooms.values()) if each.ended_at]
    ended.sort()
    old = [name for at, name in ended if time.monotonic() - at >= _KEPT]
    for name in {*old, *(name for _, name in ended[:-_MAX_ENDED])}:
        _rooms.pop(name, None)


Handler = Callable[[web.Request, Room], Awaitable[web.StreamResponse]]


def register() -> None:
    """Tell ComfyUI's server what it answers to."""
    routes = host.routes()
    if routes is None:
        return
    for path, handler in (
        ("", _status),
        ("/events", _watched(_events)),
        ("/video.mp4", _watched(_mp4)),
        ("/video.mjpeg", _watched(_mjpeg)),
    ):
        routes.get("/rf/live/{session}" + path)(_guarded(handler))
    routes.post("/rf/live/{session}/commands")(_guarded(_command))


class _RefusedError(Exception):
    """With the status code, and a sentence."""


def _guarded(handler: Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """The handler for those alone that come from this server's pages, or none, with the token."""

    async def guarded(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request, _room_of(request))
        except _RefusedError as refused:
            code, why = refused.args
            return web.json_response({"error": why}, status=code)

    return guarded


def _room_of(request: web.Request) -> Room:
    if not _of_this_server(request):
        raise _RefusedError(403, "this comes from another site's page; open ComfyUI's own")
    room = _rooms.get(request.match_info["session"])
    if room is None:
        raise _RefusedError(404, "there is no such live stream, or it has ended")
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = request.query.get("token", "")
    if not hmac.compare_digest(given.encode("utf-8", "replace"), room.token.encode()):
        raise _RefusedError(403, "the token is not this live stream's; it is in its watch link")
    return room


def _of_this_server(request: web.Request) -> bool:
    """Whether a page of this server asks, or what is no page.

    A browser says so itself where the connection is one that it trusts, also behind a proxy that
    changes the host; on others it names the origin.
    """
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = request.headers.get("Origin")
    with suppress(ValueError):
        return origin is None or urlsplit(origin).netloc.lower() == request.host.lower()
    return False


async def _status(request: web.Request, room: Room) -> web.StreamResponse:
    return web.json_response(room.status())


async def _command(request: web.Request, room: Room) -> web.StreamResponse:
    try:
        command = _read(await asyncio.wait_for(_body(request), _SLOWEST))
    except asyncio.TimeoutError:
        raise _RefusedError(408, f"the command did not come within {_SLOWEST:g} s") from None
    try:
        return web.json_response({"number": room.inbox.put(command)}, status=202)
    except ValueError as error:
        raise _RefusedError(409, str(error)) from error


async def _body(request: web.Request) -> bytes:
    data = b""
    if (request.content_length or 0) <= LARGEST_COMMAND:
        async for part in request.content.iter_any():
            data += part
            if len(data) > LARGEST_COMMAND:
                break
        else:
            return data
    raise _RefusedError(413, f"a command has at most {LARGEST_COMMAND} bytes")


def _read(data: bytes) -> Command:
    try:
        given = json.loads(data)
    except (ValueError, RecursionError):
        raise _RefusedError(400, 'give a command in JSON, such as {"do": "pause"}') from None
    try:
        return read_command(given)
    except ValueError as error:
        raise _RefusedError(400, str(error)) from error


class _Watcher:
    """A stream of bytes to one client; ConnectionError once that has left, or reads too slowly."""

    def __init__(self, request: web.Request, room: Room) -> None:
        self.request, self.room = request, room
        self.response = web.StreamResponse()

    async def begin(self, kind: str, **headers: str) -> None:
        """Say what comes."""
        headers |= {"Content-Type": kind, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        self.response.headers.update(headers)
        await self.response.prepare(self.request)

    async def write(self, data: bytes) -> None:
        """Send something; little more than it waits here for who does not read."""
        try:
            await asyncio.wait_for(self.response.write(data), _SLOWEST)
        except asyncio.TimeoutError:
            if self.request.transport is not None:
                self.request.transport.abort()
            raise ConnectionResetError("the reader is too slow") from None

    async def news(self, reader: Reader) -> AsyncIterator[list[tuple[int, Any]] | None]:
        """What a reader is given, in turn, with its place; None for a silence.

        [] where only the status may be new. A reader that was too slow goes on with what is there.
        """
        loop, news, outbox = asyncio.get_running_loop(), asyncio.Event(), self.room.outbox

        def callback() -> None:
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(news.set)

        with outbox.subscribe(callback):
            while True:
                news.clear()
                closed = outbox.closed
                try:
                    yield reader.read_placed(0)
                except ReaderLagged:
                    reader = outbox.reader()
                    yield []
                if closed:
                    return
                while not await self._rings(news):
                    yield None

    async def _rings(self, news: asyncio.Event) -> bool:
        """Whether there is news before a silence is long. Nobody writes in one, so it is here that
        a client is missed.
        """
        end = time.monotonic() + _ALIVE
        while time.monotonic() < end:
            if self.request.transport is None or self.request.transport.is_closing():
                raise ConnectionResetError("the reader has left")
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(news.wait(), _LOOK)
                return True
        return False


def _watched(watch: Callable[[_Watcher], Awaitable[None]]) -> Handler:
    """A handler that streams, for so many at a time."""

    async def watched(request: web.Request, room: Room) -> web.StreamResponse:
        if request.method != "GET":  # aiohttp lets HEAD in, which would stay
            raise _RefusedError(405, "a stream is watched by GET")
        if room.watchers >= MAX_WATCHERS:
            raise _RefusedError(429, f"{MAX_WATCHERS} watch this live stream; close one first")
        watcher = _Watcher(request, room)
        room.watchers += 1
        try:
            with suppress(ConnectionError):  # whoever watched has left
                await watch(watcher)
            return watcher.response
        finally:
            room.watchers -= 1

    return watched


async def _events(watcher: _Watcher) -> None:
    room, last = watcher.room, watcher.request.headers.get("Last-Event-ID", "")
    after = int(last) if re.fullmatch(r"[0-9]{1,15}", last) else None
    reader = room.outbox.reader(after=after)  # before the status, so that nothing is between
    await watcher.begin("text/event-stream")
    last = await _publish_status(watcher, (None, False))
    async with aclosing(watcher.news(reader)) as news:
        async for items in news:
            if items is None:
                await watcher.write(b": alive\n\n")
            for place, item in items or ():
                if not isinstance(item, (Picture, Ended)):
                    kind = type(item).__name__.lower()
                    await watcher.write(_event(kind, _plain(item), place))
            last = await _publish_status(watcher, last)
    if room.end is not None:  # said last, also to who comes later or has missed it
        await watcher.write(_event("ended", _plain(room.end)))


async def _publish_status(
    watcher: _Watcher, last: tuple[Status | None, bool]
) -> tuple[Status | None, bool]:
    """Send the status where it is another than was sent last, or the session has ended since."""
    now: tuple[Status, bool] = watcher.room.outbox.status, watcher.room.end is not None
    if now[0] is not last[0] or now[1] is not last[1]:
        await watcher.write(_event("status", watcher.room.status()))
    return now


def _event(kind: str, data: dict[str, Any], place: int | None = None) -> bytes:
    """With its place, a client that comes again goes on after it."""
    head = "" if place is None else f"id: {place}\n"
    return f"{head}event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


def _plain(event: Any) -> dict[str, Any]:
    values = {each.name: getattr(event, each.name) for each in fields(event)}
    return {k: v.as_dict() if isinstance(v, Command) else v for k, v in values.items()}


async def _pictures(watcher: _Watcher) -> AsyncIterator[Picture]:
    """From the newest on; where the reader is slow, some are left out."""
    reader = watcher.room.outbox.reader(latest=True)
    async with aclosing(watcher.news(reader)) as news:
        async for items in news:
            for _, item in items or ():
                if isinstance(item, Picture):
                    yield item


async def _mp4(watcher: _Watcher) -> None:
    watcher.room.seen = True
    header = watcher.room.screen.header
    codec, sequence = codec_of(header), FragmentSequence()
    await watcher.begin("video/mp4", **({"X-RF-Codec": codec} if codec else {}))
    await watcher.write(header)
    async with aclosing(_pictures(watcher)) as pictures:
        async for picture in pictures:
            if picture.fragment is not None:
                await watcher.write(sequence.add(picture.fragment))


async def _mjpeg(watcher: _Watcher) -> None:
    watcher.room.seen = True
    await watcher.begin(f"multipart/x-mixed-replace; boundary={_BOUNDARY}")
    due = time.monotonic()
    async with aclosing(_pictures(watcher)) as pictures:
        async for picture in pictures:
            if picture.images is None:
                continue
            for part in await watcher.room.jpegs(picture):
                due = max(due, time.monotonic() - _LATE)
                await watcher.write(part)
                due += 1 / watcher.room.screen.fps
                await asyncio.sleep(due - time.monotonic())


def _jpegs(images: Any) -> list[bytes]:
    parts = []
    for image in images.numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=_QUALITY)
        data = file.getvalue()
        head = f"--{_BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
        parts.append(head.encode() + data + b"\r\n")
    return parts
