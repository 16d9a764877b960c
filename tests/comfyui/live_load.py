"""A long live stream under load in a real ComfyUI, and all that must hold afterwards.

    python -m tests.comfyui.live_load 30

Three clients give a command every few seconds for so many minutes: one reads the events, one the
MP4, one the pictures. Then it is stopped, and its log is replayed. Prints what was measured as
JSON; the exit status is 1 where something did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import psutil

from .files import write_models, write_nodes
from .live import Live, begun, finished, live_prompt, video_of
from .server import Server

COLOURS = ("red", "green", "blue", "cyan", "yellow", "magenta")
SHAPES = ("square", "circle")
WAYS = ("up", "down", "left", "right")
SPEEDS = ("slowly", "quickly")
MODES = ("soft", "recache", "blend 3", "blend 2 slerp", "cut")
EVERY = (2.0, 5.0)
"""Seconds between two commands of a client."""
SAMPLED = 10.0
"""Seconds between two looks at the server's memory."""
WARM_UP = 0.5
"""Part of the time after which memory is to be flat: until then, buffers and the past fill."""
STEEPEST = 0.5
"""MB a minute that it may grow then."""
PAST = 12
"""MB of the past that is kept: full within minutes, so that what else grows is seen."""


INPUTS = {"max_seconds": 0.0, "keep_images": 0, "rewind_memory": PAST}


@dataclass
class Load:
    """What the clients have seen."""

    live: Live
    sent: dict[int, tuple[str, float]] = field(default_factory=dict)
    """Command and time of sending, by number."""
    refused_at_once: list[str] = field(default_factory=list)
    events: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)
    fragments: list[float] = field(default_factory=list)
    """When each came."""
    pictures: int = 0
    memory: list[tuple[float, float]] = field(default_factory=list)
    """Seconds, and MB of the server."""
    history: int = 0
    """Bytes of the past, lately."""
    paused: bool = False


def command(rng: random.Random, load: Load, status: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Anything that a stream can be asked for, where it stands."""
    chunk = status["chunk"]
    text = f"a {rng.choice(COLOURS)} {rng.choice(SHAPES)} moves {rng.choice(WAYS)}"
    text += f" {rng.choice(SPEEDS)}"
    coming = [each["number"] for each in status["coming"]]
    if load.paused:
        return "resume", {}
    do = rng.choices(
        ("prompt", "lora", "decay", "pause", "cut", "rewind", "schedule", "move", "drop"),
        (30, 12, 6, 4, 6, 5, 20, 10, 7),
    )[0]
    if do in ("move", "drop") and not coming:
        do = "schedule"
    return do, {
        "prompt": {"text": text, "mode": rng.choice(MODES)},
        "lora": {"name": "style", "strength": round(rng.uniform(-1, 1), 2)},
        "decay": {"decay": round(rng.uniform(0.5, 1), 2)},
        "pause": {},
        "cut": {"text": text},
        "rewind": {"chunk": max(status["oldest"] or 0, chunk - rng.randint(1, 20))},
        "schedule": {"chunk": chunk + rng.randint(2, 30), "text": text, "mode": rng.choice(MODES)},
        "move": {"change": coming[0] if coming else 0, "chunk": chunk + rng.randint(1, 30)},
        "drop": {"change": coming[-1] if coming else 0},
    }[do]


async def give(load: Load, seed: int, end: float) -> None:
    """One client's commands."""
    rng = random.Random(seed)
    while (left := end - time.monotonic()) > 0:
        await asyncio.sleep(min(left, rng.uniform(*EVERY)))
        do, given = command(rng, load, await load.live.status())
        load.paused = do == "pause"
        began = time.monotonic()
        code, answer = await load.live.send(do, **given)
        if code == 202:
            load.sent[answer["number"]] = do, began
        else:
            load.refused_at_once.append(f"{code} {answer['error']}")


async def listen(load: Load) -> None:
    """The client that reads events."""
    async for kind, data in load.live.events():
        if kind != "status":
            load.events.append((time.monotonic(), kind, data))


async def watch(load: Load, path: Path) -> None:
    """The client that reads the MP4; what it got goes to a file."""
    request = load.live.http.get(f"{load.live.address}/video.mp4?token={load.live.token}")
    async with request as answer:
        with path.open("wb") as file:
            async for name, box in _boxes(answer.content.readexactly):
                file.write(box)
                if name == b"mdat":
                    load.fragments.append(time.monotonic())


async def _boxes(read: Any) -> AsyncIterator[tuple[bytes, bytes]]:
    while True:
        try:
            head = await read(8)
        except asyncio.IncompleteReadError as rest:
            assert not rest.partial, "the video ended within a box"
            return
        length, name = struct.unpack(">I4s", head)
        yield name, head + await read(length - 8)


async def look(load: Load) -> None:
    """The client that reads pictures."""
    request = load.live.http.get(f"{load.live.address}/video.mjpeg?token={load.live.token}")
    async with request as answer:
        async for line in answer.content:
            if line.startswith(b"Content-Length"):
                await answer.content.readexactly(2 + int(line.split()[1]) + 2)
                load.pictures += 1


async def measure(load: Load) -> None:
    """The server's memory."""
    process, began = psutil.Process(load.live.server.process.pid), time.monotonic()
    while True:
        load.memory.append((time.monotonic() - began, process.memory_info().rss / 2**20))
        load.history = (await load.live.status())["history_bytes"]
        await asyncio.sleep(SAMPLED)


async def run(server: Server, minutes: float, seed: int, received: Path) -> Load:
    """The stream and its three clients."""
    async with begun(server, live_prompt(**INPUTS, seed=seed)) as live:
        load = Load(live=live)
        readers = [asyncio.create_task(each) for each in (listen(load), watch(load, received))]
        readers.append(asyncio.create_task(look(load)))
        measuring = asyncio.create_task(measure(load))
        end = time.monotonic() + 60 * minutes
        await asyncio.gather(*(give(load, seed + each, end) for each in range(3)))
        measuring.cancel()
        code, answer = await live.send("stop")
        assert code == 202, (answer, load.events[-1], await live.ended())
        load.sent[answer["number"]] = "stop", time.monotonic()
        await asyncio.gather(*readers)
        assert (await live.ended())["type"] == "execution_success", live.heard[-1]
    return load


def files_of(video: Path) -> dict[str, Path]:
    """Each branch's file, by what its name has besides the first one's, of any of them."""
    first = video.with_name(video.stem.partition("_-")[0].rstrip("_") + "_.mp4")
    others = sorted(first.parent.glob(f"{first.stem}-*.mp4"))
    return {path.stem.removeprefix(first.stem): path for path in (first, *others)}


def hashes(path: Path) -> tuple[str, str, int]:
    """Of a video's packets, of its decoded images, and how many those are."""
    packets, images, count = hashlib.sha256(), hashlib.sha256(), 0
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            packets.update(bytes(packet))
    with av.open(str(path)) as container:
        for image in container.decode(video=0):
            images.update(image.to_ndarray(format="yuv420p").tobytes())
            count += 1
    return packets.hexdigest(), images.hexdigest(), count


def answers(load: Load) -> dict[str, list[float]]:
    """Seconds from sending a command to its answer; those apart that a rewind kept waiting: it
    makes chunks anew, and all that come meanwhile stand behind it.
    """
    answered = {d["number"]: at for at, kind, d in load.events if kind in ("applied", "refused")}
    rewinds = [
        (began, answered[number]) for number, (do, began) in load.sent.items() if do == "rewind"
    ]
    found: dict[str, list[float]] = {"plain": [], "rewinding": []}
    for number, (_, began) in load.sent.items():
        held = any(begin <= began <= end for begin, end in rewinds)
        found["rewinding" if held else "plain"].append(answered[number] - began)
    return found


def first_images(load: Load, log: list[dict[str, Any]]) -> list[float]:
    """Seconds from sending a prompt, a cut or a strength, to the first fragment made under it:
    the one after as many as chunks were made before.
    """
    seen, made = [], 0
    for line in log:
        made += "made" in line
        do, began = load.sent.get(line.get("number"), ("", 0.0))
        if "done" in line and do in ("prompt", "cut", "lora") and made < len(load.fragments):
            seen.append(load.fragments[made] - began)
    return seen


def slope(memory: list[tuple[float, float]]) -> float | None:
    """MB a minute, of the samples after the warm-up; None where there are too few."""
    late = [(at / 60, mb) for at, mb in memory if at >= WARM_UP * memory[-1][0]]
    if len(late) < 3:
        return None
    return round(statistics.linear_regression(*zip(*late, strict=True)).slope, 3)


def faults(load: Load, log: list[dict[str, Any]]) -> Iterator[str]:
    """What did not hold while it ran."""
    kinds = [(kind, data.get("number")) for _, kind, data in load.events]
    received = [number for kind, number in kinds if kind == "received"]
    answered = [number for kind, number in kinds if kind in ("applied", "refused")]
    scheduled = {n for n, (do, _) in load.sent.items() if do == "schedule"}
    firsts = list(dict.fromkeys(answered))  # a coming change may be refused again, when it comes
    if received != sorted(load.sent) or firsts != received:
        yield "an acknowledgement is missing, twice there, or out of order"
    if [n for n in answered if answered.count(n) > 1 and n not in scheduled]:
        yield "a command was answered twice"
    made = sum("made" in line for line in log)
    if made != len(load.fragments):
        yield f"{made} chunks were made, {len(load.fragments)} came to the watcher"
    if (slope(load.memory) or 0.0) > STEEPEST:
        yield f"memory grows by {slope(load.memory)} MB a minute"
    if load.refused_at_once:
        yield f"not taken: {load.refused_at_once[0]}"
    if load.live.server.tracebacks():
        yield "there is a traceback in the server's log"
    if load.live.token in load.live.server.log:
        yield "the token is in the server's log"


async def replayed(server: Server, log: Path, seed: int) -> Path:
    """The first file of the log's replay."""
    name = log.relative_to(server.output).as_posix()
    prompt = live_prompt(**INPUTS, seed=seed, replay=name)
    return video_of(server, await finished(server, prompt))


def summary(minutes: float, seed: int) -> dict[str, Any]:
    """Do all of it."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        write_models(base / "models")
        write_nodes(base / "custom_nodes")
        server = Server(base)
        try:
            return _summary(server, minutes, seed, base / "received.mp4")
        finally:
            server.stop()


def _summary(server: Server, minutes: float, seed: int, received: Path) -> dict[str, Any]:
    load = asyncio.run(run(server, minutes, seed, received))
    files = files_of(load.live.video)
    log_path = files[""].with_suffix(".jsonl")
    log = [json.loads(line) for line in log_path.read_text("ascii").splitlines()]
    wrong = list(faults(load, log))
    began = time.monotonic()
    again = files_of(asyncio.run(replayed(server, log_path, seed)))
    replay_seconds = time.monotonic() - began
    if again.keys() != files.keys():
        wrong.append(f"branches {sorted(files)}, replayed {sorted(again)}")
    images, watched = 0, hashes(received)[2]
    for branch in files.keys() & again.keys():
        first, second = hashes(files[branch]), hashes(again[branch])
        images += first[2]
        if first != second:
            wrong.append(f"branch {branch or 'main'} is another when it is replayed")
    applied = answers(load)
    kinds = [kind for _, kind, _ in load.events]
    return {
        "minutes": minutes,
        "seed": seed,
        "commands": len(load.sent),
        "by kind": _counted(do for do, _ in load.sent.values()),
        "events": _counted(kinds),
        "chunks made": sum("made" in line for line in log),
        "branches": len(files),
        "images in their files": images,
        "images watched as MP4": watched,
        "images watched as JPEG": load.pictures,
        "seconds to applied": _spread(applied["plain"]),
        "seconds to applied, with a rewind before or in it": _spread(applied["rewinding"]),
        "seconds to the first image": _spread(first_images(load, log)),
        "memory MB": [round(mb) for _, mb in load.memory][:: max(1, len(load.memory) // 20)],
        "memory slope MB a minute": slope(load.memory),
        "past MB": round(load.history / 2**20, 1),
        "replay seconds": round(replay_seconds, 1),
        "replay identical": not any("replayed" in each for each in wrong),
        "faults": wrong,
    }


def _counted(names: Any) -> dict[str, int]:
    names = list(names)
    return {name: names.count(name) for name in sorted(set(names))}


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {
        "median": round(statistics.median(values), 3),
        "worst": round(max(values), 3),
        "count": len(values),
    }


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("minutes", type=float)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    told = summary(given.minutes, given.seed)
    print(json.dumps(told, indent=1))  # noqa: T201  # its result
    return 1 if told["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
