"""A live stream from outside: who is let in, what comes of what is sent, and who sees what."""

from __future__ import annotations

import asyncio
from typing import Any

from .live import begun, live_prompt
from .server import Server


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
