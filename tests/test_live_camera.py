"""A camera in a live session: the newest frames, bounded, and the same images from its record."""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from rf_core.live import camera as module
from rf_core.live.buffers import CameraMark
from rf_core.live.camera import (
    Camera,
    CameraFrame,
    CameraGuide,
    CameraUse,
    CameraWriter,
    NotThisCameraError,
    RecordedCamera,
    TooFastError,
    camera_record,
)

SIZE = 32
FPS = 16


def jpeg(level: int, width: int = SIZE, height: int = SIZE) -> bytes:
    """A grey picture."""
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuvj420p"
    encoder.time_base = Fraction(1, FPS)
    encoder.options = {"strict": "-1"}
    image = np.full((height, width, 3), level, dtype=np.uint8)
    frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuvj420p")
    frame.pts = 0
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def camera_of(**options: Any) -> Camera:
    return Camera(height=SIZE, width=SIZE, **{"max_frames": 24, "fps": FPS, **options})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Time that passes when a test says so."""

    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock.monotonic)
    return clock


def show(camera: Camera, clock: Any, count: int, *, name: str = "a", begin: int = 1) -> None:
    """Frames at the stream's rate, each as bright as its number."""
    for number in range(begin, begin + count):
        clock.now += 1 / FPS
        camera.put(name, number, 1000 * number / FPS, jpeg(number))


def numbers(frames: Any) -> list[int]:
    return [frame.mark.number for frame in frames]


def test_a_chunk_takes_the_newest_frames_and_the_next_none_that_is_older(clock: Any) -> None:
    camera = camera_of()
    show(camera, clock, 20)
    assert numbers(camera.take(12)) == list(range(9, 21))
    show(camera, clock, 4, begin=21)
    assert numbers(camera.take(12)) == [20] * 8 + [21, 22, 23, 24]
    show(camera, clock, 40, begin=25)
    assert numbers(camera.take(12)) == list(range(53, 65))


def test_frames_are_never_queued_and_at_most_so_many_are_held(clock: Any) -> None:
    camera = camera_of(max_frames=6)
    show(camera, clock, 100)
    assert numbers(camera.take(12)) == [95] * 7 + [96, 97, 98, 99, 100]


def test_of_a_slow_camera_the_nearest_frame_stands_for_each_image(clock: Any) -> None:
    camera = camera_of()
    for number in range(1, 6):  # 4 a second
        clock.now += 0.25
        camera.put("a", number, 250 * number, jpeg(number))
    assert numbers(camera.take(12)) == [2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5]


def test_a_camera_is_off_then_waited_for_then_on_then_lost_and_comes_back(clock: Any) -> None:
    camera = camera_of()
    assert camera.state == "off" and camera.take(12) == []
    with pytest.raises(ValueError, match="no whole JPEG"):
        camera.put("a", 1, 0.0, b"no image")
    assert camera.state == "waiting" and camera.take(12) == []
    show(camera, clock, 3, begin=2)
    assert camera.state == "on"
    assert set(numbers(camera.take(12))) == {2, 3, 4}
    clock.now += 1.5
    assert camera.state == "lost"
    assert numbers(camera.take(12)) == [4] * 12
    camera.put("a", 5, 5000.0, jpeg(5))
    assert camera.state == "on" and numbers(camera.take(12)) == [5] * 12
    camera.off()
    assert camera.state == "off" and camera.take(12) == []


def test_the_camera_that_was_begun_last_takes_the_place_of_the_one_before(clock: Any) -> None:
    camera = camera_of()
    show(camera, clock, 3, name="a")
    show(camera, clock, 2, name="b")
    assert {frame.mark.camera for frame in camera.take(12)} == {"b"}
    with pytest.raises(NotThisCameraError, match="another camera is on"):
        camera.put("a", 4, 9e3, jpeg(4))
    camera.off("a")  # says who is not on any more
    assert camera.name == "b"
    camera.off("b")
    with pytest.raises(NotThisCameraError, match="was turned off"):
        camera.put("b", 3, 9e3, jpeg(3))
    camera.close()
    with pytest.raises(NotThisCameraError, match="has ended"):
        camera.put("b", 1, 9e3, jpeg(3))


@pytest.mark.parametrize(
    "given, why",
    [
        ({"data": b""}, "no whole JPEG"),
        ({"data": b"/etc/passwd"}, "no whole JPEG"),
        ({"data": jpeg(9)[:-2]}, "no whole JPEG"),
        ({"data": jpeg(9)[:40] + b"\xff\xd9"}, "damaged"),
        ({"data": b"\xff\xd8" + b"\0" * 200 + b"\xff\xd9"}, "damaged"),
        ({"data": jpeg(9, 2000, 1600)}, "more than 2304000 pixels"),
        ({"data": jpeg(9) + b"\0" * (1 << 20)}, "at most 1048576"),
        ({"camera": ""}, "name"),
        ({"camera": "../x"}, "name"),
        ({"camera": "x" * 41}, "name"),
        ({"number": 0}, "from 1"),
        ({"captured": float("nan")}, "milliseconds"),
        ({"captured": -1.0}, "milliseconds"),
        ({"captured": 1e300}, "milliseconds"),
    ],
)
def test_what_is_no_frame_is_refused_in_a_sentence_and_changes_nothing(
    clock: Any, given: dict[str, Any], why: str
) -> None:
    camera = camera_of()
    show(camera, clock, 2)
    sound = {"camera": "a", "number": 3, "captured": 9e3, "data": jpeg(3)}
    with pytest.raises(ValueError, match=why) as refused:
        camera.put(**(sound | given))
    assert "\n" not in str(refused.value)
    assert set(numbers(camera.take(4))) == {1, 2}


def test_frames_that_come_too_fast_are_refused(clock: Any) -> None:
    camera = camera_of()
    for number in range(1, 2 * FPS + 1):
        camera.put("a", number, number, jpeg(1))
    with pytest.raises(TooFastError, match="16 a second"):
        camera.put("a", 2 * FPS + 1, 2 * FPS + 1, jpeg(1))
    clock.now += 1
    camera.put("a", 2 * FPS + 1, 2 * FPS + 1, jpeg(1))


def test_a_frame_that_comes_late_is_refused_and_one_dated_before_is_left_out(clock: Any) -> None:
    camera = camera_of()
    show(camera, clock, 3)
    with pytest.raises(ValueError, match="count on"):
        camera.put("a", 3, 9e3, jpeg(3))
    camera.put("a", 4, 0.0, jpeg(3))
    assert max(numbers(camera.take(12))) == 3


def test_a_frame_of_another_size_is_cropped_to_the_stream_s(clock: Any) -> None:
    camera = camera_of()
    camera.put("a", 1, 0.0, jpeg(200, 2 * SIZE, 3 * SIZE))
    (frame,) = camera.take(1)
    assert frame.image.shape == (SIZE, SIZE, 3)
    assert (frame.image.float() - 200).abs().max() <= 2


def test_many_threads_may_show_frames_at_once() -> None:
    camera = camera_of()

    def send(name: str) -> None:
        for number in range(1, 30):
            try:
                camera.put(name, number, number, jpeg(number))
            except (NotThisCameraError, TooFastError, ValueError):
                pass

    threads = [threading.Thread(target=send, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        frames = camera.take(12)
        assert len({frame.mark.camera for frame in frames}) <= 1
    for thread in threads:
        thread.join()
