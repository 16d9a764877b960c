"""A live stream from outside: who is let in, what comes of what is sent, and who sees what."""

from __future__ import annotations

import asyncio
import gzip
import importlib
import json
import random
import shutil
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import av
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from rf_core.live import Inbox, Outbox, read_command
from rf_core.live.buffers import Ended

from .conftest import PACK
from .live import Live, begun, client_of, live_prompt
from .prompts import demo_prompt, with_node
from .server import DROPPED, PATIENCE, ROOT, Server
from .video import images_of

LARGEST = 1 << 16
WATCHERS = 16
SLOWEST = 20.0
MALFORMED = 10_000
CONNECTIONS = 4
PIPELINED = 16


async def raw(live: Live, data: bytes) -> bytes:
    """What the server answers to bytes, until it closes or is done with the head and the body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", live.server.port)
    writer.write(data)
    answer = await one_answer(reader)
    writer.close()
    return answer


async def one_answer(reader: asyncio.StreamReader) -> bytes:
    """The next answer on a connection."""
    head = await reader.readuntil(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return head + (await reader.readexactly(int(lengths[0].split(b":")[1])) if lengths else b"")


def request(live: Live, body: bytes, *headers: str, method: str = "POST") -> bytes:
    """A command's request as bytes, with a true length unless a header says another."""
    lines = [f"{method} {live.path}/commands HTTP/1.1", f"Host: 127.0.0.1:{live.server.port}"]
    lines += [f"Authorization: Bearer {live.token}", *headers]
    if not any(each.lower().startswith(("content-length", "transfer")) for each in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def payloads(video: bytes) -> list[bytes]:
    """The images of each fragment, as they are encoded."""
    found, at = [], 0
    while at + 8 <= len(video):
        length, name = struct.unpack_from(">I4s", video, at)
        if name == b"mdat":
            found.append(video[at + 8 : at + length])
        at += length
    return found


def packets(path: Path) -> list[bytes]:
    """Of a video's file."""
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def test_a_command_is_acknowledged_twice_and_in_order_and_a_reader_that_comes_again_misses_nothing(
    server: Server,
) -> None:
    async def drive() -> None:
        async with begun(server, live_prompt()) as live:
            events: list[tuple[str, dict[str, Any]]] = []
            sent: list[int] = []

            async def read(**headers: str) -> None:
                async for event in live.events(**headers):
                    events.append(event)

            reading = asyncio.create_task(read())
            await live.until_chunk(1)
            for do, given in (
                ("prompt", {"text": "a red circle moves left slowly"}),
                ("lora", {"name": "style", "strength": 0.5}),
                ("lora", {"name": "absent", "strength": 0.5}),
                ("decay", {"decay": 0.5}),
                ("schedule", {"chunk": 50, "text": "a green square moves down"}),
                ("move", {"change": 5, "chunk": 60}),
                ("drop", {"change": 5}),
            ):
                code, answer = await live.send(do, **given)
                assert code == 202, answer
                sent.append(answer["number"])
            await live.until_chunk(3)
            reading.cancel()  # the connection breaks here
            place = next(data["id"] for _, data in reversed(events) if "id" in data)
            for do in ("pause", "resume"):
                sent.append((await live.send(do))[1]["number"])
            await live.until_chunk(4)
            reading = asyncio.create_task(read(**{"Last-Event-ID": place}))
            sent.append((await live.send("stop"))[1]["number"])
            await reading
            assert (await live.ended())["type"] == "execution_success"
            assert sent == list(range(1, 11))
            assert events[0][0] == "status"
            received = [data["number"] for kind, data in events if kind == "received"]
            answered = [(k, d["number"]) for k, d in events if k in ("applied", "refused")]
            assert received == [number for _, number in answered] == sent
            assert [number for kind, number in answered if kind == "refused"] == [3]
            assert events[-1][0] == "ended" and events[-1][1]["why"] is None
            assert events[-2][0] == "status" and events[-2][1]["ended"]
            assert [kind async for kind, _ in live.events()] == ["status", "ended"]
            assert (await live.send("pause"))[0] == 409

    asyncio.run(drive())


def test_a_place_that_is_none_is_no_place(server: Server) -> None:
    async def drive() -> None:
        async with begun(server, live_prompt(keep_images=0)) as live:
            for place in ("-1", "x", "9" * 400, "٣", "", "99999"):
                async for kind, _ in live.events(**{"Last-Event-ID": place}):
                    assert kind == "status", place
                    break
            await live.end()

    asyncio.run(drive())


def test_an_intruder_is_told_no_and_sees_nothing(server: Server) -> None:
    async def drive() -> None:
        async with begun(server, live_prompt(max_seconds=0.5, pace="as fast as possible")) as old:
            await old.ended()
        async with begun(server, live_prompt()) as live:
            own, begun_at = f"http://127.0.0.1:{server.port}", len(server.log)
            bearer = live.headers

            async def code(
                path: str = "",
                headers: dict[str, str] | None = None,
                method: str = "GET",
                **more: Any,
            ) -> int:
                url = f"{live.address}{path}"
                async with live.http.request(method, url, headers=headers, **more) as answer:
                    said = await answer.text()
                    assert live.token not in said
                    assert not [h for h in answer.headers if h.startswith("Access-Control")]
                    return answer.status

            paths = ("", "/events", "/video.mp4", "/video.mjpeg")
            wrong = [old.token, live.token[:-1], live.token + "x", live.token.swapcase(), ""]
            wrong += ["\x7f", "😀", "null", "Bearer", "*", " " + live.token + " x"]
            for path in paths:
                assert await code(path) == 403
                for token in wrong:
                    assert await code(path, params={"token": token}) == 403, (path, token)
                    if token.isprintable():  # else aiohttp does not send it
                        assert await code(path, {"Authorization": f"Bearer {token}"}) == 403
            stop = {"data": b'{"do": "stop"}', "method": "POST"}
            assert await code("/commands", **stop) == 403
            assert await code("/commands", old.headers, **stop) == 403
            for token in ("%00", "%ED%A0%80", "%FF", "%F0%9F%98%80", f"x&token={live.token}"):
                answer = await raw(
                    live,
                    f"GET {live.path}?token={token} HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
                )
                assert b" 403 " in answer.split(b"\r\n")[0], token
            odd = f"GET {live.path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ".encode()
            assert b" 403 " in (await raw(live, odd + b"\xff\xfe\xed\xa0\x80\r\n\r\n"))[:20]

            lan = {"Host": "10.0.0.5:8188"}  # where ComfyUI itself lets every page in
            for origin in ("http://evil.example", "null", "*", "http://10.0.0.5:9", "file://"):
                for host in ({}, lan):
                    foreign = bearer | host | {"Origin": origin}
                    for path in paths:
                        assert await code(path, foreign) == 403, origin
                    assert await code("/commands", foreign, **stop) == 403
            assert await code("", bearer | lan | {"Origin": "http://10.0.0.5:8188"}) == 200
            for site in ("cross-site", "same-site", "?"):  # an <img> in another's page says so
                path = f"/video.mjpeg?token={live.token}"
                assert await code(path, {"Sec-Fetch-Site": site}) == 403
            rebound = {"Host": "evil.example", "Origin": "http://evil.example"}
            assert await code("", rebound) == 403
            assert await code("/commands", rebound, **stop) == 403
            assert await code("", bearer | {"Origin": own}) == 200
            proxied = {"Sec-Fetch-Site": "same-origin", "Origin": "https://studio.example"}
            assert await code("", bearer | lan | proxied) == 200

            for name in ("..", "%2e%2e%2f", "%00", "a" * 200, "%F0%9F%98%80", "%FF", "{session}"):
                for path in ("", "/commands", "/video.mp4"):
                    line = f"GET /rf/live/{name}{path} HTTP/1.1\r\nHost: x\r\n"
                    answer = await raw(
                        live, f"{line}Authorization: Bearer {live.token}\r\n\r\n".encode()
                    )
                    assert answer.split(b" ")[1] in (b"404", b"405"), name
            for name in ("video.mp4/../../../../server.log", "video.mp4%2f..", "video", "x"):
                assert await code(f"/{name}", bearer) == 404
            for method in ("PUT", "DELETE", "PATCH", "HEAD"):
                assert await code("/video.mp4", bearer, method) == 405
            assert await code("/commands", None, "OPTIONS") == 200  # says nothing, allows nothing

            silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(200)]
            await live.until_chunk((await live.status())["chunk"] + 1)
            for _, writer in silent:
                writer.close()

            large = b'{"do": "prompt", "text": "' + b"x" * LARGEST + b'"}'
            bomb = gzip.compress(b" " * (64 << 20))
            for body, *headers in (
                (large,),
                (b"", f"Content-Length: {1 << 40}"),
                (bomb, "Content-Encoding: gzip"),
                (b"%x\r\n%s\r\n0\r\n\r\n" % (len(large), large), "Transfer-Encoding: chunked"),
            ):
                answer = await raw(live, request(live, body, *headers))
                assert b" 413 " in answer.split(b"\r\n")[0], (headers, answer[:300])
            chunk = b'{"do": "pause"}'
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(chunk), chunk)
            answer = await raw(live, request(live, body, "Transfer-Encoding: chunked"))
            assert b" 202 " in answer.split(b"\r\n")[0]
            assert (await live.send("resume"))[0] == 202
            await live.until_chunk((await live.status())["chunk"] + 1)
            assert (await live.status())["watchers"] == 0
            assert (await live.end())["type"] == "execution_success"
            said = server.log[begun_at:]
            assert said.count(live.token) == said.count(old.token) == 0
            assert not server.tracebacks(begun_at)
            line = f"GET {live.path}?token={'x' * 100_000} HTTP/1.1\r\nHost: x\r\n\r\n"
            assert b" 400 " in (await raw(live, line.encode()))[:20]
            head = f"GET {live.path} HTTP/1.1\r\nHost: x\r\nX-A: {'x' * 100_000}\r\n\r\n"
            assert b" 400 " in (await raw(live, head.encode()))[:20]  # aiohttp's: with a traceback
            assert server.log.count(live.token) == 0

    asyncio.run(drive())


def test_the_token_is_told_to_the_client_that_queued_it_alone_and_stands_nowhere(
    server: Server,
) -> None:
    async def drive() -> None:
        async with (
            client_of(server, "another") as (http, other, _),
            begun(server, live_prompt()) as live,
        ):
            await live.until_chunk(2)
            told = [await text_of(http, path) for path in ("/queue", "/history", "/api/jobs")]
            await live.end()
            told += [await text_of(http, path) for path in ("/queue", "/history", "/api/jobs")]
            told += [server.log, str(live.heard[live.heard.index(hello(live)) + 1 :])]
            heard = []
            with suppress(TimeoutError, asyncio.TimeoutError):
                while True:
                    heard.append(str((await other.receive(timeout=1)).data))
            assert any("status" in each for each in heard), "ComfyUI tells everybody of its queue"
            assert not [each for each in (*told, *heard) if live.token in each]
            assert not [each for each in heard if "rf.live" in each]
            files = [path for path in server.base.rglob("*") if path.is_file()]
            assert live.video in files and live.video.with_suffix(".jsonl") in files
            assert not [path for path in files if live.token.encode() in path.read_bytes()]

    async def text_of(http: aiohttp.ClientSession, path: str) -> str:
        async with http.get(server.address + path) as answer:
            return await answer.text()

    def hello(live: Live) -> dict[str, Any]:
        (one,) = (event for event in live.heard if event["type"] == "rf.live")
        return one

    asyncio.run(drive())


def malformed(rng: random.Random) -> Iterator[bytes]:
    """Bodies of which none is a command."""
    sound: list[dict[str, Any]] = [
        {"do": "prompt", "text": "snow", "mode": "blend 3"},
        {"do": "lora", "name": "style", "strength": 0.5},
        {"do": "decay", "decay": 0.5},
        {"do": "strength", "strength": 0.5},
        {"do": "rewind", "chunk": 0, "branch": "b"},
        {"do": "schedule", "chunk": 9, "text": "rain"},
        {"do": "move", "change": 1, "chunk": 9},
        {"do": "drop", "change": 1},
        {"do": "pause"},
        {"do": "stop"},
    ]
    values = [None, True, [], {}, -1, 1e999, -1e999, float("nan"), 1e-320, 10**400, "", "\0"]
    values += ["\ud800", "x" * 11_000, "../../x", "<script>", [[[]]], {"do": "stop"}, 0.5, "stop"]
    nested = [b"[" * 20_000, b'{"do":' * 9_000, b"[" * 500 + b"]" * 500]
    plain = [b"", b"null", b"NaN", b"-Infinity", b"stop", b"do=stop", b'"stop"', b"\xef\xbb\xbf{}"]
    plain += [json.dumps(each).encode("utf-16") for each in ([], {"do": "x"})]
    while True:
        command = dict(rng.choice(sound))
        kind = rng.randrange(7)
        if kind == 0:
            body = rng.randbytes(rng.randrange(200))
        elif kind == 1:
            body = json.dumps(command).encode()
            body = body[: rng.randrange(len(body))]
        elif kind == 2:
            command[rng.choice(list(command))] = rng.choice(values)
            body = json.dumps(command).encode()
        elif kind == 3:
            command[rng.choice(["Do", "token", "__class__", "do ", "path", ""])] = rng.choice(
                values
            )
            body = json.dumps(command).encode()
        elif kind == 4:
            data = bytearray(json.dumps(command).encode())
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            body = bytes(data)
        else:
            body = rng.choice(nested if kind == 5 and rng.random() < 0.02 else plain)
        if not _is_command(body):
            yield body


def _is_command(body: bytes) -> bool:
    try:
        read_command(json.loads(body))
    except (ValueError, RecursionError):
        return False
    return True


def test_ten_thousand_malformed_commands_are_refused_and_leave_the_picture_as_it_is(
    server: Server,
) -> None:
    async def drive() -> tuple[Path, float]:
        async with begun(server, live_prompt(seed=17)) as live:
            bodies = malformed(random.Random(17))
            shares = [[next(bodies) for _ in range(MALFORMED // CONNECTIONS)] for _ in range(4)]
            await live.until_chunk(1)
            before, began = await live.status(), time.monotonic()
            await asyncio.gather(*(send(live, share) for share in shares))
            seconds = time.monotonic() - began
            while (after := await live.status())["chunk"] < before["chunk"] + 2:  # they go on, too
                assert time.monotonic() - began < PATIENCE, "no chunk is made meanwhile"
                await asyncio.gather(*(send(live, share[:100]) for share in shares))
            for name in ("prompt", "loras", "decay", "past", "coming", "waiting", "branches"):
                assert after[name] == before[name], name
            assert (await live.send("pause"))[1]["number"] == 1, "none was taken"
            assert (await live.end())["type"] == "execution_success"
            return live.video, seconds

    async def send(live: Live, bodies: list[bytes]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", live.server.port)
        for begin in range(0, len(bodies), PIPELINED):
            some = bodies[begin : begin + PIPELINED]
            writer.write(b"".join(request(live, body) for body in some))
            for body in some:
                head, _, answer = (await one_answer(reader)).partition(b"\r\n\r\n")
                assert b" 400 " in head.split(b"\r\n")[0], (body[:200], head[:200])
                assert json.loads(answer)["error"]
        writer.close()

    begun_at = len(server.log)
    fuzzed, seconds = asyncio.run(drive())
    assert seconds < PATIENCE, "it takes some seconds; what is refused must stay cheap"
    images = images_of(fuzzed)
    plain = live_prompt(seed=17, max_seconds=len(images) / 16, pace="as fast as possible")
    (shown,) = server.run(plain).output("live")["images"]
    quiet = images_of(server.output / shown["subfolder"] / shown["filename"])
    assert np.array_equal(images, quiet[: len(images)])
    assert not server.tracebacks(begun_at)


def test_two_watchers_get_the_very_packets_that_are_recorded(server: Server) -> None:
    async def drive() -> None:
        async with begun(server, live_prompt()) as live:

            async def watch(kind: str = "mp4") -> bytes:
                url = f"{live.address}/video.{kind}?token={live.token}"
                async with live.http.get(url) as answer:
                    assert answer.status == 200
                    if kind == "mp4":
                        assert answer.headers["X-RF-Codec"].startswith("avc1.")
                    return await answer.read()

            watchers = [asyncio.create_task(watch()) for _ in range(2)]
            pictures = [asyncio.create_task(watch("mjpeg")) for _ in range(2)]
            await live.until_chunk(3)
            watchers.append(asyncio.create_task(watch()))
            await live.until_chunk(6)
            assert (await live.status())["watchers"] == 4 + 1
            await live.end()
            first, second, late = [payloads(await each) for each in watchers]
            assert first == second and len(first) >= 6
            assert 3 <= len(late) < len(first) and late == first[-len(late) :]
            assert b"".join(first) == b"".join(packets(live.video))
            a, b = [(await each).split(b"--picture\r\n") for each in pictures]
            assert len(set(a) & set(b)) >= min(len(a), len(b)) - 12 > 12

    asyncio.run(drive())


def test_ffmpeg_reads_the_video_and_the_pictures_while_they_are_made(server: Server) -> None:
    def decoded(url: str, format: str | None) -> list[np.ndarray]:
        with av.open(url, format=format, timeout=PATIENCE) as container:
            images = []
            for image in container.decode(video=0):
                images.append(image.to_ndarray(format="rgb24"))
                if len(images) == 30:
                    return images
        raise AssertionError("the video ended")

    async def drive() -> None:
        async with begun(server, live_prompt()) as live:
            for kind, format in (("mp4", None), ("mjpeg", "mpjpeg")):
                url = f"{live.address}/video.{kind}?token={live.token}"
                images = await asyncio.to_thread(decoded, url, format)
                assert {image.shape for image in images} == {(64, 64, 3)}
                assert not np.array_equal(images[0], images[-1])
            with pytest.raises(av.error.HTTPForbiddenError):
                await asyncio.to_thread(av.open, f"{live.address}/video.mp4?token=x")
            old = f"GET {live.path}/video.mp4?token={live.token} HTTP/1.0\r\n\r\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(old.encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"chunked" not in head.lower()
            assert (await reader.readexactly(8))[4:] == b"ftyp"
            writer.close()
            await live.end()

    asyncio.run(drive())


def test_who_watches_and_leaves_in_a_pause_is_missed_and_who_comes_too_many_is_told(
    server: Server,
) -> None:
    async def drive() -> None:
        async with begun(server, live_prompt()) as live:
            await live.until_chunk(1)
            await live.send("pause")
            while not (await live.status())["paused"]:
                await asyncio.sleep(0.1)
            kinds = ["events", "video.mp4", "video.mjpeg"] * WATCHERS
            answers = [
                await live.http.get(f"{live.address}/{kind}", headers=live.headers)
                for kind in kinds[:WATCHERS]
            ]
            assert {each.status for each in answers} == {200}
            async with live.http.get(f"{live.address}/events", headers=live.headers) as answer:
                assert answer.status == 429 and "close one" in (await answer.json())["error"]
            for each in answers:
                each.close()
            end = time.monotonic() + PATIENCE
            while (status := await live.status())["watchers"] and time.monotonic() < end:
                await asyncio.sleep(0.2)
            assert status["watchers"] == 0 and status["paused"]
            await live.end()

    asyncio.run(drive())


def test_who_does_not_read_and_who_does_not_send_is_let_go_and_harms_nobody(
    server: Server,
) -> None:
    async def drive() -> None:
        async with begun(server, live_prompt(keep_images=0)) as live:
            lying = asyncio.create_task(raw(live, request(live, b"{", "Content-Length: 2")))
            with socket.socket() as stuck:
                stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                stuck.connect(("127.0.0.1", server.port))
                line = f"GET {live.path}/events?token={live.token} HTTP/1.1\r\nHost: x\r\n\r\n"
                stuck.sendall(line.encode())
                for _ in range(100):  # the status tells what was asked for: it grows to megabytes
                    assert (await live.send("prompt", text="a " * 4500, mode="soft"))[0] == 202
                    await asyncio.sleep(0.02)
                assert (await live.status())["watchers"] == 1
                began, first = time.monotonic(), (await live.status())["chunk"]
                while (status := await live.status())["watchers"]:
                    assert time.monotonic() - began < SLOWEST + PATIENCE
                    await asyncio.sleep(0.5)
                assert status["chunk"] - first >= 5, "it went on"
            assert b" 408 " in (await lying).split(b"\r\n")[0]
            assert (await live.end())["type"] == "execution_success"

    asyncio.run(drive())


def test_the_server_ends_at_once_with_streams_open_and_what_was_made_plays(
    tmp_path: Path, server: Server
) -> None:
    from .files import write_models

    write_models(tmp_path / "models")
    own = Server(tmp_path)

    async def drive() -> Path:
        async with begun(own, live_prompt()) as live:
            answers = [
                await live.http.get(f"{live.address}/{kind}", headers=live.headers)
                for kind in ("events", "video.mp4", "video.mjpeg")
            ]
            await live.until_chunk(3)
            await asyncio.to_thread(own.interrupt)
            for each in answers:
                each.close()
            live.done.set()
            (video,) = own.output.rglob("*.mp4")
            return video

    assert len(images_of(asyncio.run(drive()))) >= 9 + 12
    assert not [each for each in own.tracebacks() if DROPPED not in each]


def test_of_a_server_that_is_killed_the_video_plays_and_its_state_goes_on(
    tmp_path: Path, server: Server
) -> None:
    from .files import write_models

    write_models(tmp_path / "models")
    own = Server(tmp_path)

    async def drive() -> None:
        async with begun(own, live_prompt()) as live:
            await live.until_chunk(10)
            own.process.kill()
            await asyncio.to_thread(own.process.wait, timeout=PATIENCE)
            live.done.set()

    asyncio.run(drive())
    (video,) = own.output.rglob("*.mp4")
    before = images_of(video)
    assert len(before) >= 12 * 9 - 3
    (state,) = (own.output / "stream_states").iterdir()
    assert state.name == f"{video.stem}.safetensors"
    again = Server(tmp_path)
    try:
        prompt = demo_prompt(state=["kept", 0], join=True)
        prompt = with_node(prompt, "kept", "RFLoadState", name=state.name)
        shown = again.run(prompt).output("stream")["images"][0]
    finally:
        again.stop()
    whole = images_of(own.output / shown["subfolder"] / shown["filename"])
    assert len(whole) == 12 * (8 + 2) - 3, "the state is that after 8 chunks"
    assert np.array_equal(whole[: 12 * 8 - 3], before[: 12 * 8 - 3])


def test_where_comfyui_is_told_to_let_every_page_in_the_live_stream_does_not(
    server: Server, tmp_path: Path
) -> None:
    from .files import write_models

    write_models(tmp_path / "models")
    own = Server(tmp_path, "--enable-cors-header", "*", "--listen", "127.0.0.1")

    async def drive() -> None:
        async with begun(own, live_prompt()) as live:
            for foreign in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
                headers = live.headers | foreign
                async with live.http.get(f"{own.address}/queue", headers=headers) as answer:
                    assert answer.status == 200  # or nothing is tried here
                async with live.http.get(live.address, headers=headers) as answer:
                    assert answer.status == 403
                url = f"{live.address}/commands"
                async with live.http.post(url, data='{"do": "stop"}', headers=headers) as answer:
                    assert answer.status == 403
            assert (await live.end())["type"] == "execution_success"

    try:
        asyncio.run(drive())
    finally:
        own.stop()


def test_who_missed_events_is_told_the_end_all_the_same(
    pack: Any, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    live_http = importlib.import_module(f"{PACK}.nodes.live_http")
    live = importlib.import_module(f"{PACK}.rf_core.live.buffers")
    commands = importlib.import_module(f"{PACK}.rf_core.live.commands")
    monkeypatch.setattr(live_http.Room, "status", lambda room: {})
    outbox = live.Outbox(max_events=2)
    outbox.status = object()
    inbox = live.Inbox(received=outbox.publish)
    screen = live_http.Screen(width=64, height=64, header=b"")
    room = live_http.Room(inbox=inbox, outbox=outbox, screen=screen, facts=dict)
    app, url = web.Application(), f"/rf/live/{room.id}/events?token={room.token}"
    routes = web.RouteTableDef()
    monkeypatch.setattr(host, "routes", lambda: routes)
    live_http.register()
    app.add_routes(routes)

    async def drive() -> None:
        async with TestClient(TestServer(app)) as client:
            with live_http.open_room(room, None):
                for _ in range(5):
                    inbox.put(commands.read_command({"do": "pause"}))
                outbox.publish(live.Ended(chunk=1, why=None))
                outbox.close()
            for last, told in (("0", "status ended"), ("3", "status received ended")):
                async with client.get(url, headers={"Last-Event-ID": last}) as answer:
                    lines = (await answer.text()).splitlines()
                kinds = [line.split()[1] for line in lines if line.startswith("event:")]
                assert " ".join(kinds) == told

    asyncio.run(drive())


def test_an_ended_session_answers_for_a_while_and_then_nothing_is_left_of_it(
    pack: Any, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    live_http = importlib.import_module(f"{PACK}.nodes.live_http")
    live = importlib.import_module(f"{PACK}.rf_core.live.buffers")

    def room() -> Any:
        screen = live_http.Screen(width=64, height=64, header=b"")
        return live_http.Room(inbox=live.Inbox(), outbox=live.Outbox(), screen=screen, facts=dict)

    async def drive() -> None:
        here = SimpleNamespace(loop=asyncio.get_running_loop(), client_id=None, sockets={})
        monkeypatch.setattr(host, "_server", lambda: here)
        monkeypatch.setattr(live_http, "_KEPT", 0.3)
        one = room()
        name, outbox = one.id, weakref.ref(one.outbox)
        with live_http.open_room(one, None):
            assert name in live_http._rooms and one.token not in repr(live_http._rooms)
        assert name in live_http._rooms
        del one
        await asyncio.sleep(0.5)
        assert name not in live_http._rooms and outbox() is None
        many = [room() for _ in range(9)]
        for each in many:
            with live_http.open_room(each, None):
                pass
        assert list(live_http._rooms) == [each.id for each in many[-4:]]
        with pytest.raises(ZeroDivisionError), live_http.open_room(room(), None):
            raise ZeroDivisionError
        await asyncio.sleep(0.5)
        assert not live_http._rooms

    asyncio.run(drive())


def test_the_last_event_is_kept_and_a_place_is_where_a_reader_goes_on() -> None:
    outbox = Outbox(max_events=3)
    inbox = Inbox(received=outbox.publish)
    numbers = [inbox.put(read_command({"do": "pause"})) for _ in range(3)]
    placed = outbox.reader(from_start=True).read_placed(0)
    assert [item.number for _, item in placed] == numbers
    later = outbox.reader(after=placed[0][0]).read(0)
    assert [item.number for item in later] == numbers[1:]
    assert outbox.reader(after=10**9).read(0) == [] and outbox.end is None
    outbox.publish(Ended(chunk=1, why=None))
    assert outbox.end == Ended(chunk=1, why=None)


def documented(kind: str) -> list[str]:
    """The lines of docs/live.md that stand in blocks of a kind."""
    text = (ROOT / "docs" / "live.md").read_text(encoding="utf-8")
    return [block.split("```")[0] for block in text.split(f"```{kind}\n")[1:]]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_documented_lines_start_steer_watch_and_stop_it(server: Server, tmp_path: Path) -> None:
    (lines,) = documented("sh")
    (tmp_path / "workflow_api.json").write_text(json.dumps(live_prompt()), encoding="utf-8")
    lines = lines.replace("http://127.0.0.1:8188", server.address)
    lines = lines.replace(
        "python docs/live_client.py", f"{sys.executable} {ROOT}/docs/live_client.py"
    )
    assert "curl" in lines and str(ROOT) in lines and server.address in lines
    chunks = "$(grep -ao moof live.mp4 | wc -l)"
    while_ = f"until [ {chunks} -ge 3 ]; do sleep 0.2; done"
    script = f"set -eu\n{lines.replace('# a while', while_)}\nwait\n"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '{"number": 1}' in done.stdout and "event: applied" in done.stdout
    assert "event: ended" in done.stdout
    assert len(images_of(tmp_path / "live.mp4")) >= 24


def test_the_client_queues_takes_lines_and_says_what_became_of_them(
    server: Server, tmp_path: Path
) -> None:
    workflow = tmp_path / "workflow_api.json"
    workflow.write_text(json.dumps(live_prompt()), encoding="utf-8")
    lines = [
        '{"do": "lora", "name": "style", "strength": 0.5}',
        "a red circle moves left slowly",
        '{"do": "nothing"}',
        '{"do": "prompt"',
        '{"do": "stop"}',
    ]
    command = [sys.executable, str(ROOT / "docs" / "live_client.py"), str(workflow)]
    done = subprocess.run(
        [*command, "--server", server.address],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert any(each.startswith("applied 1 ") for each in said)
    assert any(each.startswith("applied 2 ") for each in said)
    assert len([each for each in said if each.startswith("not taken: ")]) == 2
    assert said[-1].startswith("ended")
