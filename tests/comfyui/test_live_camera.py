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

from training.world.scenes import COLOURS, SIZE, Scene, Thing, render
from training.world.tracker import detect

from .browser import chromium, open_browsers
from .live import Live as Session
from .live import begun, finished, live_prompt
from .server import Server
from .test_live_browser import Live, live, wait_until
from .video import images_of

BROWSER = pytest.mark.skipif(chromium() is None, reason="chromium is not installed")
FPS = 16
CHUNK = 12  # images
LARGEST = 1 << 20
NEAR = 5.0
"""Pixels; a shape that goes its own way is 22 off, in the median."""
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
            images = render([Scene((SHOWN,))], FPS)[0]
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
    assert distance(video, "blue", 4) < NEAR  # the prompt's colour, at the camera's places

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


def distance(video: Path, colour: str, chunks: int) -> float:
    """Pixels, in the median, from a shape of the last chunks to what the camera showed for it."""
    record = video.with_name(f"{video.stem.rstrip('_')}_camera.mjpeg")
    lines = video.with_suffix(".jsonl").read_text().splitlines()
    made = [each for line in lines if "made" in (each := json.loads(line))]
    images, shown = detect(video_of_file(video)), detect(video_of_file(record))
    ends = [9 + CHUNK * each["made"] for each in made]  # of a line that never went back
    found = []
    for end, each in list(zip(ends, made, strict=True))[-chunks:]:
        frames = each["camera"]["frames"]
        there = images[end - len(frames) : end]
        if len(there.area) == len(frames):  # of a video that is being written
            seen = there.centre[:, COLOURS.index(colour)]
            wanted = shown.centre[frames, COLOURS.index(SHOWN.colour)]
            found.append(((seen - wanted + SIZE / 2) % SIZE - SIZE / 2).norm(dim=1))
    return float(torch.cat(found).median())


def video_of_file(path: Path) -> torch.Tensor:
    return torch.from_numpy(images_of(path)).permute(0, 3, 1, 2).float() / 255


def y4m(path: Path, seconds: int = 2, scale: int = 4) -> Path:
    """What the camera sees, for Chromium to play over and over."""
    images = (render([Scene((SHOWN,))], FPS * seconds)[0] * 255).byte().permute(0, 2, 3, 1).numpy()
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


def eye(session: Live) -> Any:
    """The camera's button."""
    return session.view.locator(".rf-eye button")


def words(session: Live) -> str:
    return eye(session).inner_text()


def turn_on(session: Live) -> None:
    eye(session).click()
    wait_until(lambda: re.fullmatch(r"camera \d+\.\d s", words(session)))


def video_of(session: Live) -> Path:
    """The file that is being written."""
    (name,) = (each["file"] for each in session.status["branches"])
    return session.server.output / "video" / name


@BROWSER
def test_what_comes_out_moves_as_the_camera_shows_and_its_delay_is_told(
    server: Server, tmp_path: Path
) -> None:
    with cameras(tmp_path) as (browser,), live(server, False, browser) as session:
        assert session.status["camera"]["state"] == "off" and words(session) == "Camera"
        turn_on(session)
        assert session.status["camera"]["state"] == "on"
        assert 0.3 < float(words(session).split()[1]) < 20
        kept = session.kept
        strength = json.dumps({"do": "strength", "strength": 0.3})
        path = f"/rf/live/{kept['session']}/commands?token={kept['token']}"
        session.page.evaluate(
            "([path, body]) => fetch(path, {method: 'POST', body})", [path, strength]
        )
        wait_until(lambda: session.status["strength"] == 0.3)
        session.wait_for_chunk(session.status["chunk"] + 5)
        session.look("camera-on", tmp_path)
        assert distance(video_of(session), "red", 4) < NEAR
        eye(session).click()
        wait_until(lambda: session.status["camera"]["state"] == "off")
        wait_until(lambda: words(session) == "Camera")
        session.wait_for_chunk(session.status["chunk"] + 1)
        assert session.status["camera"]["state"] == "off"


HOLD = """
(held) => {
  window.fetched ??= window.fetch;
  const late = (path, given) =>
    String(path).includes("/camera?") ? Promise.reject(new TypeError()) : fetched(path, given);
  window.fetch = held ? late : window.fetched;
}
"""
"""Frames no longer reach the server, or do again."""


@BROWSER
def test_a_camera_that_is_dropped_is_held_and_said_and_goes_on_when_it_is_back(
    server: Server, tmp_path: Path
) -> None:
    with cameras(tmp_path) as (browser,), live(server, False, browser) as session:
        turn_on(session)
        session.page.evaluate(HOLD, True)
        wait_until(lambda: words(session) == "camera lost: its last image is held")
        session.look("camera-lost", tmp_path)
        assert session.status["camera"]["state"] == "lost"
        chunk = session.status["chunk"]
        session.wait_for_chunk(chunk + 3)
        session.page.evaluate(HOLD, False)
        wait_until(lambda: re.fullmatch(r"camera \d+\.\d s", words(session)))
        assert session.status["camera"]["state"] == "on"


@BROWSER
def test_the_page_that_turned_its_camera_on_last_has_it_and_the_other_is_told(
    server: Server, tmp_path: Path
) -> None:
    with cameras(tmp_path) as (browser,), live(server, False, browser) as session:
        turn_on(session)
        kept = session.kept
        other = browser.new_page()
        page = f"{server.address}/extensions/ComfyUI-RewardForcing/live.html"
        other.goto(f"{page}#session={kept['session']}&token={kept['token']}")
        second = Live(server, other)
        wait_until(lambda: words(second) == "another page's camera")
        mine = session.status["camera"]["name"]
        turn_on(second)
        wait_until(lambda: words(session) == "another page's camera")
        assert "another camera is on" in session.view.locator(".rf-popover").inner_text()
        assert session.status["camera"]["name"] != mine
        second.look("camera-second", tmp_path)
        other.close()  # as a page that crashes: nobody turned it off
        wait_until(lambda: words(session) == "camera lost: its last image is held")
        session.view.locator(".rf-popover .rf-main").click()
        turn_on(session)


@BROWSER
def test_a_page_that_is_loaded_again_turns_its_camera_on_again(
    server: Server, tmp_path: Path
) -> None:
    with cameras(tmp_path) as (browser,), live(server, False, browser) as session:
        kept = session.kept
        page = browser.new_page()
        link = f"{server.address}/extensions/ComfyUI-RewardForcing/live.html"
        page.goto(f"{link}#session={kept['session']}&token={kept['token']}")
        alone = Live(server, page)
        turn_on(alone)
        page.reload()
        wait_until(lambda: words(alone) == "camera lost: its last image is held")
        turn_on(alone)
        page.close()


@BROWSER
@pytest.mark.parametrize(
    "flags, script, why",
    [
        (["--deny-permission-prompts"], None, "The camera is not allowed."),
        (
            [],
            "Object.defineProperty(navigator, 'mediaDevices', {value: undefined})",
            "https or localhost",
        ),
    ],
)
def test_where_there_is_no_camera_a_sentence_says_why_and_the_stream_goes_on(
    server: Server, tmp_path: Path, flags: list[str], script: str | None, why: str
) -> None:
    with cameras(tmp_path, 1, *flags) as (browser,):
        if script is not None:
            browser.add_init_script(script)
        with live(server, False, browser) as session:
            eye(session).click()
            form = session.view.locator(".rf-popover")
            wait_until(lambda: form.is_visible() and why in form.inner_text())
            session.look("camera-refused", tmp_path)
            form.locator(".rf-main").click()
            assert words(session) == "Camera"
            assert session.status["camera"]["state"] == "off"
            session.wait_for_pictures()


@BROWSER
def test_the_camera_ends_with_the_session(server: Server, tmp_path: Path) -> None:
    with cameras(tmp_path) as (browser,), live(server, False, browser) as session:
        session.page.evaluate(
            """() => {
              const {mediaDevices} = navigator, {getUserMedia} = mediaDevices;
              mediaDevices.getUserMedia = async (given) =>
                (window.given = await getUserMedia.call(mediaDevices, given));
            }"""
        )
        turn_on(session)
        ended = "() => window.given.getTracks().every(({readyState}) => readyState === 'ended')"
        assert not session.page.evaluate(ended)
        session.stop()
        wait_until(lambda: session.page.evaluate(ended))
