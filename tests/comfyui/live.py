"""A live stream on a running server, driven as a program drives it."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp

from .files import LORA
from .prompts import Prompt
from .server import RUN_SECONDS, Server

ENDS = ("execution_success", "execution_error", "execution_interrupted")
TEXT = "a blue square moves up quickly"
Event = tuple[str, dict[str, Any]]
_seeds = count(1000)  # ComfyUI does not run a prompt again that it has run


def live_prompt(**inputs: Any) -> Prompt:
    """The demo, live, with a LoRA that has no strength yet."""
    values: dict[str, Any] = {
        "model": ["styled", 0],
        "clip": ["demo", 1],
        "vae": ["demo", 2],
        "text": TEXT,
        "width": 64,
        "height": 64,
        "seed": next(_seeds),
        "steps": 4,
        "max_seconds": 120.0,
        "pace": "real time",
    }
    lora = {"model": ["demo", 0], "lora_name": LORA, "strength_model": 0.0}
    return {
        "demo": {"class_type": "RFLoadDemo", "inputs": {}},
        "styled": {"class_type": "RFLoadLoRA", "inputs": lora},
        "live": {"class_type": "RFLiveStream", "inputs": values | inputs},
    }


@dataclass
class Live:
    """A live stream that runs."""

    server: Server
    http: aiohttp.ClientSession
    hello: dict[str, Any]
    """What the client that queued it was told."""
    heard: list[dict[str, Any]] = field(default_factory=list)
    """What ComfyUI has told that client since."""
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def path(self) -> str:
        """Where it is on the server."""
        return f"/rf/live/{self.hello['session']}"

    @property
    def address(self) -> str:
        """Where it is."""
        return self.server.address + self.path

    @property
    def token(self) -> str:
        """What opens it."""
        return self.hello["token"]

    @property
    def headers(self) -> dict[str, str]:
        """The token, as a header."""
        return {"Authorization": f"Bearer {self.token}"}

    async def send(self, do: str, **given: Any) -> tuple[int, dict[str, Any]]:
        """A command; the code and the answer."""
        command = {"do": do} | given
        request = self.http.post(f"{self.address}/commands", json=command, headers=self.headers)
        async with request as answer:
            return answer.status, await answer.json()

    async def status(self) -> dict[str, Any]:
        """Its status."""
        async with self.http.get(self.address, headers=self.headers) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()

    async def until_chunk(self, chunk: int) -> dict[str, Any]:
        """The status, once so many chunks are made."""
        async with asyncio.timeout(RUN_SECONDS):
            while (status := await self.status())["chunk"] < chunk:
                await asyncio.sleep(0.1)
        return status

    async def events(self, **headers: str) -> AsyncIterator[Event]:
        """Its events, from now on; with their place, where they have one."""
        request = self.http.get(f"{self.address}/events", headers=self.headers | headers)
        async with request as answer:
            assert answer.status == 200, await answer.text()
            async for event in read_events(answer):
                yield event

    async def end(self) -> Any:
        """Stop it, and wait until the prompt is done; the last event of that."""
        code, answer = await self.send("stop")
        assert code == 202, answer
        return await self.ended()

    async def ended(self) -> dict[str, Any]:
        """Wait until the prompt is done; the event that said so."""
        async with asyncio.timeout(RUN_SECONDS):
            await self.done.wait()
        return next(event for event in self.heard if event["type"] in ENDS)

    @property
    def video(self) -> Path:
        """The file that the node shows."""
        return video_of(self.server, self.heard)


def video_of(server: Server, heard: list[dict[str, Any]]) -> Path:
    """The file that the node shows, of what ComfyUI has told."""
    outputs = [event["data"] for event in heard if event["type"] == "executed"]
    (image,) = next(each["output"]["images"] for each in outputs if each["node"] == "live")
    return server.output / image["subfolder"] / image["filename"]


async def queued(http: aiohttp.ClientSession, server: Server, prompt: Prompt, client: str) -> None:
    """Queue a prompt."""
    body = {"prompt": prompt, "client_id": client}
    async with http.post(f"{server.address}/prompt", json=body) as answer:
        assert answer.status == 200, await answer.text()


async def read_events(answer: aiohttp.ClientResponse) -> AsyncIterator[Event]:
    """Server-sent events, each with its data, and its place as `id`."""
    kind, data, place = "message", "", ""
    async for line in answer.content:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            data = value
        elif name == "id":
            place = value
        elif not name and data:
            yield kind, json.loads(data) | ({"id": place} if place else {})
            kind, data, place = "message", "", ""


@asynccontextmanager
async def client_of(
    server: Server, name: str | None = None
) -> AsyncIterator[tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse, str]]:
    """A client, its websocket and its name."""
    name = name or uuid.uuid4().hex
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(timeout=timeout, connector=connector, read_bufsize=1 << 22) as http,
        http.ws_connect(f"{server.address}/ws?clientId={name}", max_msg_size=0) as socket,
    ):
        yield http, socket, name


async def finished(server: Server, prompt: Prompt) -> list[dict[str, Any]]:
    """Queue a prompt and wait for it, however long; what ComfyUI has told."""
    async with client_of(server) as (http, socket, name):
        await queued(http, server, prompt, name)
        heard: list[dict[str, Any]] = []
        async for message in socket:
            if message.type == aiohttp.WSMsgType.TEXT:
                heard.append(json.loads(message.data))
                if heard[-1]["type"] in ENDS:
                    break
        assert heard[-1]["type"] == "execution_success", heard[-1]
        return heard


@asynccontextmanager
async def begun(server: Server, prompt: Prompt, client: str | None = None) -> AsyncIterator[Live]:
    """The live stream of a prompt that is queued; cancelled where it goes on at the end."""
    async with client_of(server, client) as (http, socket, name):
        await queued(http, server, prompt, name)
        heard: list[dict[str, Any]] = []
        async with asyncio.timeout(RUN_SECONDS):
            async for message in socket:
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                heard.append(json.loads(message.data))
                assert heard[-1]["type"] not in ENDS, heard[-1]
                if heard[-1]["type"] == "rf.live":
                    break
        live = Live(server=server, http=http, hello=heard[-1]["data"], heard=heard)

        async def hear() -> None:
            async for message in socket:
                if message.type == aiohttp.WSMsgType.TEXT:
                    heard.append(json.loads(message.data))
                    if heard[-1]["type"] in ENDS:
                        live.done.set()

        hearing = asyncio.create_task(hear())
        try:
            yield live
        finally:
            if not live.done.is_set():
                async with http.post(f"{server.address}/interrupt"):
                    await live.ended()
            hearing.cancel()
