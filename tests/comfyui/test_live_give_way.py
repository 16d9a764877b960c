"""A live stream that lets other prompts through, and goes on after them as the same session."""

from __future__ import annotations

import asyncio
import json
from itertools import count
from typing import Any

import pytest

from .live import ENDS, Live, begun, client_of, finished, live_prompt, queued, read_events, video_of
from .live_load import files_of, hashes
from .prompts import Prompt, demo_prompt
from .server import RUN_SECONDS, Server
from .video import images_of

_seeds = count(1)
RED = "a red circle moves left slowly"


def steered(**inputs: Any) -> Prompt:
    """A stream without an end, unless one is given, that gives way, with a node behind it."""
    prompt = live_prompt(**{"give_way": True, "max_seconds": 0.0} | inputs)
    save = {"video": ["live", 1], "filename_prefix": "after", "format": "auto", "codec": "auto"}
    return prompt | {"save": {"class_type": "SaveVideo", "inputs": save}}


async def until(live: Live, found: Any) -> dict[str, Any]:
    """The first status that is so."""
    async with asyncio.timeout(RUN_SECONDS):
        while not found(status := await live.status()):
            await asyncio.sleep(0.02)
    return status


def told(live: Live, kind: str) -> list[dict[str, Any]]:
    """What ComfyUI has told of a kind."""
    return [each["data"] for each in live.heard if each["type"] == kind]


async def success_of(live: Live, prompt_id: str) -> None:
    """Wait until a prompt is done."""
    async with asyncio.timeout(RUN_SECONDS):
        while prompt_id not in [each["prompt_id"] for each in told(live, "execution_success")]:
            await asyncio.sleep(0.05)


async def put_off(live: Live, chunks: int = 30) -> str:
    """Queue another prompt, and wait until the stream has given way to it; the new one's id."""
    async with client_of(live.server) as (http, _, name):
        other = demo_prompt(length=chunks, seed=next(_seeds))
        await queued(http, live.server, other, name)
    await until(live, lambda status: status["suspended"])
    async with asyncio.timeout(RUN_SECONDS):
        while True:
            pending = live.server.get("/queue")["queue_pending"]
            for waiting in (each for each in pending if "live" in each[2]):
                return waiting[1]
            await asyncio.sleep(0.02)


def test_it_lets_another_prompt_through_and_goes_on_as_the_same_session(server: Server) -> None:
    prompt, begun_at = steered(max_seconds=30.0), len(server.log)

    async def drive() -> tuple[Live, list[tuple[str, Any]], str]:
        async with begun(server, prompt) as live:
            events: list[tuple[str, Any]] = []

            async def read() -> None:
                async for event in live.events():
                    events.append(event)

            reading = asyncio.create_task(read())
            await live.until_chunk(2)
            await live.send("lora", name="style", strength=0.5)
            before = (await live.until_chunk(4))["chunk"]
            again = await put_off(live)
            first = told(live, "rf.live")[0]["prompt_id"]
            await success_of(live, first)
            assert not [each for each in told(live, "executed") if each["node"] == "save"]
            assert (await live.send("prompt", text=RED))[0] == 202
            waiting = await live.status()
            assert waiting["suspended"] and waiting["waiting"], waiting
            status = await until(live, lambda status: status["chunk"] >= waiting["chunk"] + 3)
            assert not status["suspended"] and waiting["chunk"] >= before
            assert (status["prompt"], status["loras"]) == (RED, {"style": 0.5})
            hellos = told(live, "rf.live")
            assert [each["prompt_id"] for each in hellos] == [first, again]
            assert len({(each["session"], each["token"]) for each in hellos}) == 1
            assert (await live.send("stop"))[0] == 202
            await success_of(live, again)
            await reading
        return live, events, again

    live, events, again = asyncio.run(drive())
    assert events[-1][0] == "ended" and events[-1][1]["why"] is None
    answers = [(kind, data.get("number")) for kind, data in events if kind != "status"]
    assert [each for each in answers if each[1]] == [
        (kind, number) for number in (1, 2, 3) for kind in ("received", "applied")
    ]
    executed = [each for each in told(live, "executed") if each["prompt_id"] == again]
    assert {each["node"] for each in executed} >= {"live", "save"}
    early, late = (each["output"] for each in told(live, "executed") if each["node"] == "live")
    assert early["suspended"] == [True] and "suspended" not in late
    assert "images" not in early, "the player has them"
    assert "goes on after it" in early["text"][0]
    video = live.server.output / late["images"][0]["subfolder"] / late["images"][0]["filename"]
    assert len(images_of(video)) == events[-1][1]["chunk"] * 12 - 3
    once_more = server.run(prompt)
    (cached,) = [e["data"]["nodes"] for e in once_more.events if e["type"] == "execution_cached"]
    assert "live" in cached, "ComfyUI keeps the session's end, and not where it gave way"
    log = video.with_suffix(".jsonl").relative_to(server.output).as_posix()
    replayed = asyncio.run(finished(server, live_prompt(replay=log)))
    assert hashes(files_of(video)[""]) == hashes(video_of(server, replayed))
    assert not server.tracebacks(begun_at)
    assert server.log.count(live.token) == 0


def test_a_prompt_that_is_taken_out_of_the_queue_ends_the_session_and_all_is_whole(
    server: Server,
) -> None:
    async def drive() -> tuple[dict[str, Any], Any]:
        async with begun(server, steered()) as live:
            await live.until_chunk(3)
            await put_off(live)
            number = (await live.send("prompt", text=RED))[1]["number"]
            server.post("/queue", {"clear": True})
            status = await until(live, lambda status: status["ended"])
            assert "no longer in the queue" in status["why"]
            async with live.http.get(f"{live.address}/events", headers=live.headers) as answer:
                events = [event async for event in read_events(answer)]
            assert (await live.send("stop"))[0] == 409
            assert status["waiting"] == [] and number == 1
            assert server.get("/queue")["queue_pending"] == []
            return status, events

    status, _ = asyncio.run(drive())
    video = server.output / "video" / status["branches"][0]["file"]
    assert len(images_of(video)) == status["chunk"] * 12 - 3
    assert json.loads(video.with_suffix(".jsonl").read_text().splitlines()[-1]) == {
        "end": status["chunk"]
    }


def test_two_that_give_way_do_not_chase_each_other(server: Server) -> None:
    async def drive() -> None:
        async with begun(server, steered()) as first:
            await first.until_chunk(2)
            async with begun(server, steered()) as second:
                await second.until_chunk(4)
                assert (await first.status())["suspended"]
                assert not (await second.status())["suspended"]
                await second.end()
            chunk = (await first.status())["chunk"]
            await until(first, lambda status: status["chunk"] >= chunk + 2)
            again = told(first, "rf.live")[-1]["prompt_id"]
            await first.send("stop")
            await success_of(first, again)

    asyncio.run(drive())


def test_two_in_one_prompt_wait_together_and_each_goes_on(server: Server) -> None:
    prompt = steered()
    prompt["two"] = {"class_type": "RFLiveStream", "inputs": prompt["live"]["inputs"] | {"seed": 7}}

    async def drive() -> None:
        async with begun(server, prompt) as live:
            await live.until_chunk(2)
            again = await put_off(live)
            ended: set[str] = set()
            async with asyncio.timeout(RUN_SECONDS):
                while len(ended) < 2:
                    hellos = told(live, "rf.live")
                    assert len({each["node"] for each in hellos}) <= 2
                    for hello in hellos:
                        if hello["prompt_id"] == again and hello["session"] not in ended:
                            one = Live(server=server, http=live.http, hello=hello)
                            await until(one, lambda status: status["chunk"] >= 3)
                            await one.send("stop")
                            ended.add(hello["session"])
                    await asyncio.sleep(0.05)
            await success_of(live, again)
            assert len({each["prompt_id"] for each in told(live, "rf.live")}) == 2
            assert not [each for each in live.heard if each["type"] in ENDS[1:]]

    asyncio.run(drive())


@pytest.mark.parametrize("paused", [False, True])
def test_paused_or_not_it_gives_way_and_comes_back_as_it_was(server: Server, paused: bool) -> None:
    async def drive() -> None:
        async with begun(server, steered()) as live:
            await live.until_chunk(1)
            if paused:
                await live.send("pause")
                await until(live, lambda status: status["paused"])
            again = await put_off(live)
            status = await until(live, lambda status: not status["suspended"])
            assert status["paused"] is paused
            await live.send("stop")
            await success_of(live, again)

    asyncio.run(drive())
