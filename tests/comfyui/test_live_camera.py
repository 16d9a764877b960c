"""A camera in a live stream: who may show frames, what a page does, and what comes out of it."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from training.world.scenes import SIZE, Thing, render
from training.world.tracker import track

from .browser import chromium, open_browsers
from .live import Live as Session
from .live import begun, finished, live_prompt
from .server import Server
from .test_live_browser import Live, live, wait_until
from .video import images_of

BROWSER = pytest.mark.skipif(chromium() is None, reason="chromium is not installed")
FPS = 16
LARGEST = 1 << 20
SHOWN = Thing(colour="purple", shape="circle", direction="left", speed=1.0)
"""What the camera sees; in 16 images it goes once around."""


def jpeg(size: tuple[int, int] = (SIZE, SIZE), colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG")
    return file.getvalue()


async def show(
    session: Session,
    data: bytes | None = None,
    frame: object = 1,
    *,
    camera: str = "cam",
    captured: object = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, str]:
    """One frame; the code and what is said."""
    captured = 62.5 * frame if captured is None else captured  # type: ignore[operator]
    query = {"camera": camera, "frame": str(frame), "captured": str(captured)}
    request = session.http.post(
        f"{session.address}/camera",
        params=query,
        data=jpeg() if data is None else data,
        headers=session.headers if headers is None else headers,
    )
    async with request as answer:
        said = await answer.text()  # ComfyUI itself refuses some, without a word
        return answer.status, json.loads(said or "{}").get("error", "")


async def off(session: Session, **query: str) -> int:
    request = session.http.delete(
        f"{session.address}/camera", params=query, headers=session.headers
    )
    async with request as answer:
        return answer.status


def test_frames_are_let_in_as_commands_are_and_what_is_none_is_refused_in_a_sentence(
    server: Server,
) -> None:
    async def drive() -> None:
        async with begun(server, live_prompt()) as session:
            bearer = session.headers
            assert (await session.status())["camera"] == {"state": "off", "name": None}
            assert (await show(session, headers={}))[0] == 403
            assert (await show(session, headers={"Authorization": "Bearer x"}))[0] == 403
            foreign = bearer | {"Host": "10.0.0.5:8188", "Origin": "http://evil.example"}
            assert (await show(session, headers=foreign))[0] == 403
            assert (await show(session, headers=bearer | {"Sec-Fetch-Site": "cross-site"}))[
                0
            ] == 403
            assert (await session.status())["camera"]["state"] == "off"

            assert (await show(session)) == (202, "")
            assert (await session.status())["camera"] == {"state": "on", "name": "cam"}
            huge = jpeg() + b"\0" * LARGEST
            for code, why, given in (
                (413, "at most 1048576 bytes", {"data": huge}),
                (400, "no whole JPEG", {"data": b""}),
                (400, "no whole JPEG", {"data": b"../../etc/passwd"}),
                (400, "no whole JPEG", {"data": jpeg()[:-100]}),
                (400, "pixels", {"data": jpeg((2000, 1500)), "camera": "b", "frame": 1}),
                (202, "", {"frame": 2}),
                (400, "count on", {"frame": 2}),
                (400, "numbered", {"frame": 0}),
                (400, "name the camera", {"frame": "x", "captured": 1}),
                (400, "name the camera", {"frame": 9, "captured": "soon"}),
                (400, "milliseconds", {"frame": 9, "captured": "nan"}),
                (400, "name", {"camera": "a/b"}),
                (409, "another camera is on", {"camera": "b", "frame": 2}),
            ):
                given = {"frame": 2} | given
                answer = await show(session, **given)
                assert answer[0] == code and why in answer[1], (given.keys(), answer)
                assert "\n" not in answer[1] and "/" not in answer[1].replace("a/b", "")
            assert await off(session, camera="b") == 200  # not its own
            assert (await session.status())["camera"]["name"] == "cam"
            assert await off(session) == 200
            code, why = await show(session, frame=20)
            assert code == 409 and "turned off" in why

            codes = [(await show(session, frame=n, camera="fast"))[0] for n in range(1, 60)]
            assert 429 in codes and set(codes) <= {202, 429, 409}
            await session.end()
            code, why = await show(session, frame=1, camera="late")
            assert code == 409 and "ended" in why
        gone = session.address.rsplit("/", 1)[0] + "/absent/camera"
        async with begun(server, live_prompt()) as session:
            async with session.http.post(gone, headers=session.headers) as answer:
                assert answer.status == 404
            await session.end()

    asyncio.run(drive())


def test_frames_guide_what_is_made_and_a_replay_makes_it_again(server: Server) -> None:
    async def drive() -> tuple[Path, dict[str, Any]]:
        prompt = live_prompt(max_seconds=6.0)
        async with begun(server, prompt) as session:
            images = render([(SHOWN,)], FPS)[0]
            assert (await session.send("strength", strength=0.3))[0] == 202

            async def film() -> None:
                for n in range(10**6):
                    image = (images[n % FPS] * 255).byte().permute(1, 2, 0).numpy()
                    file = io.BytesIO()
                    Image.fromarray(image).save(file, "JPEG", quality=90)
                    code, why = await show(session, file.getvalue(), n + 1)
                    if code == 409:
                        return  # it has ended
                    assert code in (202, 429), why
                    await asyncio.sleep(1 / FPS)

            await asyncio.gather(film(), session.ended())
            return session.video, prompt

    video, prompt = asyncio.run(drive())
    log = video.with_suffix(".jsonl")
    record = video.with_name(f"{video.stem.rstrip('_')}_camera.mjpeg")
    assert record.is_file()
    chunks = [json.loads(line) for line in log.read_text().splitlines() if '"made"' in line]
    guided = [each for each in chunks if "camera" in each]
    assert len(guided) >= 3
    tail = torch.from_numpy(images_of(video)[-24:]).permute(0, 3, 1, 2).float() / 255
    seen = track(tail)[0]
    assert (seen.colour, seen.direction) == ("blue", "left")  # the prompt's, and the camera's
    assert seen.speed == pytest.approx(SHOWN.speed, abs=0.2)

    again = prompt | {
        "live": {
            **prompt["live"],
            "inputs": prompt["live"]["inputs"] | {"replay": f"video/{log.name}", "seed": 77},
        }
    }
    heard = asyncio.run(finished(server, again))
    said = json.dumps(heard)
    assert "replayed, the same latents to the bit" in said, said[-2000:]


# In a browser.


def y4m(path: Path, seconds: int = 2, scale: int = 4) -> Path:
    """What the camera sees, for Chromium to play over and over."""
    images = (render([(SHOWN,)], FPS * seconds)[0] * 255).byte().permute(0, 2, 3, 1).numpy()
    with path.open("wb") as file:
        file.write(
            f"YUV4MPEG2 W{SIZE * scale} H{SIZE * scale} F{FPS}:1 Ip A1:1 C420jpeg\n".encode()
        )
        for image in images:
            large = Image.fromarray(image).resize((SIZE * scale, SIZE * scale))
            luma, blue, red = (np.asarray(part) for part in large.convert("YCbCr").split())
            half = [part.reshape(SIZE * scale // 2, 2, -1, 2).mean((1, 3)) for part in (blue, red)]
            file.write(b"FRAME\n" + luma.tobytes())
            file.writelines(part.round().astype(np.uint8).tobytes() for part in half)
    return path


@contextmanager
def cameras(folder: Path, number: int = 1, *flags: str) -> Iterator[list[Any]]:
    """Browsers with a camera that shows the miniature world."""
    clip = y4m(folder / "camera.y4m")
    allowed = flags or ("--use-fake-ui-for-media-stream",)
    fake = "--use-fake-device-for-media-stream", f"--use-file-for-fake-video-capture={clip}"
    with open_browsers(number, *fake, *allowed) as browsers:
        yield browsers


def words(session: Live) -> str:
    return session.view.locator(".rf-eye span").inner_text()


@BROWSER
def test_the_camera_guides_the_picture_and_its_delay_is_told(
    server: Server, tmp_path: Path
) -> None:
    with cameras(tmp_path) as (browser,), live(server, False, browser) as session:
        assert session.status["camera"]["state"] == "off"
        session.click("Camera")
        wait_until(lambda: session.status["camera"]["state"] == "on")
        wait_until(lambda: re.fullmatch(r"camera \d+\.\d s", words(session)))
        assert 0.3 < float(words(session).split()[1]) < 20
        session.look("camera-on", tmp_path)
        begin = session.status["chunk"]
        session.wait_for_chunk(begin + 4)
        session.click("Camera off")
        wait_until(lambda: session.status["camera"]["state"] == "off")
        assert not session.view.locator(".rf-eye").is_visible()
