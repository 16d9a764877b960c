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
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from PIL import Image

from ..rf_core.config import FPS
from ..rf_core.live import (
    Behind,
    Command,
    Ended,
    Inbox,
    Outbox,
    Picture,
    Reel,
    codec_of,
    read_command,
)
from . import host

LARGEST_COMMAND = 1 << 16
"""Bytes of a command: the longest prompt, each of its characters escaped."""
MOST_WATCHERS = 16
"""Streams of events and of video that one session serves at a time."""
_KEPT = 60.0  # seconds that a session answers after its end
_ALIVE = 15.0  # seconds after which a silent stream of events says that it is alive
_QUALITY = 80  # of a JPEG
_BOUNDARY = "picture"


@dataclass(frozen=True, kw_only=True)
class Screen:
    """What a session's video is."""

    width: int
    height: int
    header: bytes
    """Of its MP4."""


@dataclass(eq=False, kw_only=True)
class Room:
    """A session, seen from outside. It holds neither the stream nor the models."""

    inbox: Inbox
    outbox: Outbox
    screen: Screen
    facts: Callable[[], dict[str, Any]]
    """What the node adds to the status: files, limits, memory."""
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    ended_at: float | None = None
    end: Ended | None = None
    watchers: int = 0

    def status(self) -> dict[str, Any]:
        """What the page shows; see docs/live.md."""
        now, facts = self.outbox.status, self.facts()
        waiting = [{"number": n.number, "command": n.command.as_dict()} for n in self._waiting()]
        return {
            "chunk": now.chunk,
            "seconds": now.images / FPS,
            "branch": asdict(now.branch),
            "branches": [
                asdict(each) | {"file": facts["files"].get(each.name)} for each in now.branches
            ],
            "paused": now.paused,
            "prompt": now.prompt,
            "loras": now.loras,
            "decay": now.decay,
            "past": [{"chunk": each.chunk} | each.action.as_dict() for each in now.past],
            "coming": [
                {"number": each.number, "chunk": each.chunk}
                | {"text": each.prompt.text, "mode": str(each.prompt.mode)}
                for each in now.coming
            ],
            "waiting": waiting,
            "oldest": now.oldest,
            "history_bytes": now.history_bytes,
            "history_limit": facts["history_limit"],
            "memory": facts["memory"],
            "fps": asdict(now.fps),
            "rate": FPS,
            "chunk_images": now.chunk_images,
            "chunk_seconds": now.chunk_images / FPS,
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


_rooms: dict[str, Room] = {}


@contextmanager
def opened(room: Room, node_id: str | None) -> Iterator[None]:
    """The room is open, the client that queued the run has its token; it stays a while after."""
    _forget_old()
    _rooms[room.id] = room
    told = host.tell_client("rf.live", {"node": node_id, "session": room.id, "token": room.token})
    if not told:
        host.log("the live stream has no client that could steer it; Cancel ends it")
    try:
        yield
    finally:
        room.ended_at = time.monotonic()


def _forget_old() -> None:
    now = time.monotonic()
    for room in list(_rooms.values()):
        if room.ended_at is not None and now - room.ended_at > _KEPT:
            _rooms.pop(room.id, None)


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
    origin = request.headers.get("Origin")
    site = request.headers.get("Sec-Fetch-Site", "none")
    if site == "cross-site" or (origin and not _same_host(origin, request.host)):
        raise _RefusedError(403, "this comes from another site's page; open ComfyUI's own")
    _forget_old()
    room = _rooms.get(request.match_info["session"])
    if room is None:
        raise _RefusedError(404, "there is no such live stream, or it has ended")
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = request.query.get("token", "")
    if not hmac.compare_digest(given.encode("utf-8", "replace"), room.token.encode()):
        raise _RefusedError(403, "the token is not this live stream's; it is in its watch link")
    return room


def _same_host(origin: str, host_header: str) -> bool:
    with suppress(ValueError):
        return urlsplit(origin).netloc.lower() == host_header.lower()
    return False


async def _status(request: web.Request, room: Room) -> web.StreamResponse:
    return web.json_response(room.status())


async def _command(request: web.Request, room: Room) -> web.StreamResponse:
    command = _read(await _body(request))
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


def _watched(handler: Handler) -> Handler:
    """The handler, for so many at a time."""

    async def watched(request: web.Request, room: Room) -> web.StreamResponse:
        if room.watchers >= MOST_WATCHERS:
            raise _RefusedError(429, f"{MOST_WATCHERS} watch this live stream; close one first")
        room.watchers += 1
        try:
            with suppress(ConnectionError):  # whoever watched has left
                return await handler(request, room)
            return web.Response()
        finally:
            room.watchers -= 1

    return watched


async def _news(room: Room, latest: bool = False) -> AsyncIterator[list[Any] | None]:
    """What comes from now on, in turn; [] where only the status may be new, None for a silence.

    `latest` begins with the newest chunk. A reader that was too slow goes on with what is there.
    """
    loop, news = asyncio.get_running_loop(), asyncio.Event()

    def ring() -> None:
        with suppress(RuntimeError):  # the server has ended
            loop.call_soon_threadsafe(news.set)

    reader = room.outbox.reader(latest=latest)
    with room.outbox.bell(ring):
        while True:
            news.clear()
            closed = room.outbox.closed
            try:
                yield reader.read(0)
            except Behind:
                reader = room.outbox.reader()
                yield []
            if closed:
                return
            try:
                await asyncio.wait_for(news.wait(), _ALIVE)
            except TimeoutError:
                yield None


async def _events(request: web.Request, room: Room) -> web.StreamResponse:
    response = await _begin(request, "text/event-stream")
    await response.write(_event("status", room.status()))
    seen = room.outbox.status
    async for items in _news(room):
        if items is None:
            await response.write(b": alive\n\n")
            continue
        for item in items:
            if not isinstance(item, Picture):
                await response.write(_event(type(item).__name__.lower(), _plain(item)))
        if room.outbox.status is not seen:
            seen = room.outbox.status
            await response.write(_event("status", room.status()))
    return response


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


def _plain(event: Any) -> dict[str, Any]:
    values = {each.name: getattr(event, each.name) for each in fields(event)}
    return {k: v.as_dict() if isinstance(v, Command) else v for k, v in values.items()}


async def _mp4(request: web.Request, room: Room) -> web.StreamResponse:
    codec = codec_of(room.screen.header)
    response = await _begin(request, "video/mp4", **({"X-RF-Codec": codec} if codec else {}))
    await response.write(room.screen.header)
    reel = Reel()
    async for items in _news(room, latest=True):
        for item in items or ():
            if isinstance(item, Picture) and item.fragment is not None:
                await response.write(reel.add(item.fragment))
    return response


async def _mjpeg(request: web.Request, room: Room) -> web.StreamResponse:
    response = await _begin(request, f"multipart/x-mixed-replace; boundary={_BOUNDARY}")
    due = 0.0
    async for items in _news(room, latest=True):
        for item in items or ():
            if not isinstance(item, Picture) or item.images is None:
                continue
            for part in await asyncio.to_thread(_jpegs, item.images):
                due = max(due, time.monotonic())
                await response.write(part)
                due += 1 / FPS
                await asyncio.sleep(due - time.monotonic())
    return response


def _jpegs(images: Any) -> list[bytes]:
    parts = []
    for image in images.numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=_QUALITY)
        data = file.getvalue()
        head = f"--{_BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
        parts.append(head.encode() + data + b"\r\n")
    return parts


async def _begin(request: web.Request, kind: str, **headers: str) -> web.StreamResponse:
    headers |= {"Content-Type": kind, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    return response
