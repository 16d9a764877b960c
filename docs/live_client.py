"""Start a live stream in a running ComfyUI, steer it with lines, and print what becomes of them.

    python docs/live_client.py workflow_api.json --server http://127.0.0.1:8188

The workflow is one that ComfyUI saved by Export (API), with a Live Stream node. A line is a prompt,
or a command in JSON, such as {"do": "rewind", "chunk": 12}; the next one is sent when it has been
answered. `--start` prints what a shell needs to steer the stream itself, and leaves it running.

Needs Python 3.10 and aiohttp: the Python that ComfyUI runs in has both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import threading
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

ENDS = ("execution_success", "execution_error", "execution_interrupted")
Answers = dict[int, asyncio.Event]


async def start(http: aiohttp.ClientSession, server: str, workflow: Any) -> tuple[str, str]:
    """Queue the workflow; the live stream's address and its token, once it begins."""
    client = uuid.uuid4().hex  # who queues it, and nobody else, is told the token
    async with http.ws_connect(f"{server}/ws?clientId={client}", max_msg_size=0) as socket:
        queued = {"prompt": workflow, "client_id": client}
        async with http.post(f"{server}/prompt", json=queued) as answer:
            if answer.status != 200:
                raise SystemExit(f"ComfyUI did not take the workflow: {await answer.text()}")
            prompt = (await answer.json())["prompt_id"]
        async for message in socket:
            if message.type != aiohttp.WSMsgType.TEXT:
                continue
            told = json.loads(message.data)
            if told["type"] == "rf.live":
                return f"{server}/rf/live/{told['data']['session']}", told["data"]["token"]
            if told["type"] in ENDS and told["data"].get("prompt_id") == prompt:
                why = told["data"].get("exception_message", "no Live Stream ran")
                raise SystemExit(f"{why}; ComfyUI does not run a workflow twice: change its seed")
    raise SystemExit("ComfyUI has closed the connection")


async def events(
    http: aiohttp.ClientSession, live: str, headers: dict[str, str]
) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """What happens to the stream, to its end; a connection that breaks is made again."""
    place = ""
    while True:
        again = {"Last-Event-ID": place} if place else {}
        try:
            async with http.get(f"{live}/events", headers=headers | again) as answer:
                if answer.status != 200:
                    return
                kind = data = ""
                async for line in answer.content:
                    name, _, value = line.decode().rstrip("\n").partition(": ")
                    kind = value if name == "event" else kind
                    data = value if name == "data" else data
                    place = value if name == "id" else place
                    if not name and data:
                        yield kind, json.loads(data)
                        if kind == "ended":
                            return
                        kind = data = ""
        except aiohttp.ClientError:
            await asyncio.sleep(1)


async def follow(
    http: aiohttp.ClientSession, live: str, headers: dict[str, str], answers: Answers
) -> None:
    """Print what happens."""
    async for kind, data in events(http, live, headers):
        number = data.get("number")
        if kind in ("applied", "happened"):
            print(f"{kind} {number} at chunk {data['chunk']}", flush=True)
        elif kind == "refused":
            print(f"refused {number}: {data['why']}", flush=True)
        elif kind == "branched":
            print(f"branch {data['name']} begins at chunk {data['chunk']}", flush=True)
        elif kind == "ended":
            print(
                f"ended before chunk {data['chunk']}{': ' * bool(data['why'])}{data['why'] or ''}"
            )
        if kind in ("applied", "refused"):
            answers.setdefault(number, asyncio.Event()).set()


async def steer(
    http: aiohttp.ClientSession, live: str, headers: dict[str, str], answers: Answers
) -> None:
    """Send what is typed, a line at a time."""
    async for line in typed():
        body = line if line.startswith("{") else json.dumps({"do": "prompt", "text": line})
        async with http.post(f"{live}/commands", data=body.encode(), headers=headers) as answer:
            said = await answer.json()
        if answer.status != 202:
            print(f"not taken: {said['error']}", flush=True)
            continue
        await answers.setdefault(said["number"], asyncio.Event()).wait()


async def typed() -> AsyncIterator[str]:
    """Lines of standard input."""
    loop, lines = asyncio.get_running_loop(), asyncio.Queue[str]()

    def read() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(lines.put_nowait, line)

    threading.Thread(target=read, daemon=True).start()
    while True:
        if line := (await lines.get()).strip():
            yield line


async def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workflow", type=Path)
    parser.add_argument("--server", default="http://127.0.0.1:8188")
    parser.add_argument("--start", action="store_true", help="print LIVE and TOKEN, and leave")
    given = parser.parse_args()
    workflow = json.loads(given.workflow.read_text(encoding="utf-8"))
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, read_bufsize=1 << 24) as http:
        live, token = await start(http, given.server.rstrip("/"), workflow)
        if given.start:
            print(f"LIVE={shlex.quote(live)} TOKEN={shlex.quote(token)}")
            return
        print(f"watch {live}/video.mp4?token={token}", flush=True)
        headers, answers = {"Authorization": f"Bearer {token}"}, Answers()
        steering = asyncio.create_task(steer(http, live, headers, answers))
        await follow(http, live, headers, answers)
        steering.cancel()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        print("left; the stream goes on", file=sys.stderr)
