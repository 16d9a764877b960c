"""A camera in a live session: the newest frames, bounded, and the same images from its record."""

from __future__ import annotations

import random
import threading
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from test_live import decoder_of, encode, stream_of

from rf_core.__main__ import main
from rf_core.generate import load
from rf_core.live import (
    Outbox,
    Picture,
    Rewind,
    Session,
    Strength,
    VideoRecorder,
    read_log,
    replay_log,
)
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
from rf_core.options import Options, plan
from rf_core.prompts import PromptTimeline, Switch
from rf_core.source import BatchSource
from rf_core.stream import GUIDE_STRENGTH
from rf_core.video import read_images, read_jpeg

SIZE = 32
WIDTH, HEIGHT = 48, 32  # of the tiny stream
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


def test_a_camera_is_off_then_on_then_lost_and_comes_back(clock: Any) -> None:
    camera = camera_of()
    assert camera.state == "off" and camera.take(12) == []
    with pytest.raises(ValueError, match="no whole JPEG"):
        camera.put("a", 1, 0.0, b"no image")
    assert camera.state == "off" and camera.take(12) == []
    show(camera, clock, 4)
    assert camera.state == "on"
    assert set(numbers(camera.take(12))) == {1, 2, 3, 4}
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
    camera.put(**sound)


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
            with suppress(ValueError):
                camera.put(name, number, number, jpeg(number))

    threads = [threading.Thread(target=send, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        frames = camera.take(12)
        assert len({frame.mark.camera for frame in frames}) <= 1
    for thread in threads:
        thread.join()


# A session.


class Scene:
    """A session with a camera: `script[n]` is done right before the nth chunk looks, from 1."""

    def __init__(self, script: dict[int, Any], **options: Any) -> None:
        outbox = Outbox(max_pictures=100)
        self.session = Session(stream_of("wan"), encode, prompt="p0", outbox=outbox, **options)
        self.script, self.chunks, self.number = script, 0, 0
        self.reader = self.session.outbox.reader()
        assert self.session.camera is not None
        self.camera, self.take = self.session.camera, self.session.camera.take
        self.camera.take = self._take  # type: ignore[method-assign]

    def _take(self, count: int) -> list[CameraFrame]:
        self.chunks += 1
        self.script.get(self.chunks, lambda scene: None)(self)
        return self.take(count)

    def show(self, level: int, frames: int = 12) -> None:
        """Frames at the stream's rate, the first of this brightness, and then brighter."""
        for n in range(frames):
            self.number += 1
            at = 1000 * self.number / FPS
            self.camera._arrivals.clear()  # they come at once here
            self.camera.put("cam", self.number, at, jpeg(level + n, WIDTH, HEIGHT))

    def run(self, chunks: int) -> list[Any]:
        """The events, and the pictures."""
        self.session.run(until=chunks)
        return self.reader.read(0)


def replayed(log: Path, **options: Any) -> list[torch.Tensor]:
    made: list[torch.Tensor] = []
    replay_log(
        read_log(log),
        stream_of("wan"),
        encode,
        on_chunk=lambda branch, chunk, latents: made.append(latents),
        **options,
    )
    return made


def test_without_a_frame_the_prompt_alone_goes_on_and_then_the_camera_guides() -> None:
    plain, seen = Scene({}), Scene({3: lambda scene: scene.show(60)})
    plain.run(4)
    shown = [each for each in seen.run(4) if isinstance(each, Picture)]
    ours, theirs = seen.session.recent_latents, plain.session.recent_latents
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert not torch.equal(ours[2], theirs[2])
    assert [each.camera and each.camera.number for each in shown] == [None, None, 12, 12]
    assert plain.session.outbox.status.strength is None
    assert seen.session.outbox.status.strength == GUIDE_STRENGTH


def test_at_a_strength_of_0_the_stream_is_what_the_camera_shows() -> None:
    script = {1: lambda scene: scene.show(60, 9), 2: lambda scene: scene.show(100)}
    scene = Scene(script, strength=0.0)
    scene.run(2)
    size = {"width": WIDTH, "height": HEIGHT, "most_pixels": 10**6}
    levels = [*range(60, 69), *range(100, 112)]
    images = torch.stack([read_jpeg(jpeg(n, WIDTH, HEIGHT), **size) for n in levels])
    video = images.permute(0, 3, 1, 2).contiguous().float().unsqueeze(0) / 255
    with torch.no_grad():
        whole, _ = decoder_of("wan").encode_chunk(video, None)
    assert torch.equal(torch.cat(scene.session.recent_latents, dim=2), whole)


def test_a_camera_that_is_lost_holds_and_one_that_is_off_leaves_the_prompt_alone() -> None:
    script = {1: lambda scene: scene.show(60, 9), 3: lambda scene: scene.camera.off()}
    shown = [each.camera for each in Scene(script).run(4) if isinstance(each, Picture)]
    assert [mark and mark.number for mark in shown] == [9, 9, None, None]


def test_a_camera_takes_the_place_of_a_source_which_goes_on_at_its_own_time_afterwards() -> None:
    clip = torch.rand(64, HEIGHT, WIDTH, 3)

    def source() -> BatchSource:
        return BatchSource(clip, decoder_of("wan"), height=HEIGHT, width=WIDTH)

    script = {2: lambda scene: scene.show(60), 3: lambda scene: scene.camera.off()}
    alone, both = (Scene(each, source=source(), strength=0.0) for each in ({}, script))
    alone.run(4)
    both.run(4)
    ours, theirs = both.session.recent_latents, alone.session.recent_latents
    same = [torch.equal(one, other) for one, other in zip(ours, theirs, strict=True)]
    assert same == [True, False, True, True]


def test_a_log_makes_the_same_again_of_the_frames_beside_it(tmp_path: Path) -> None:
    log = tmp_path / "take_00001_.jsonl"
    script = {
        3: lambda scene: scene.show(60),
        4: lambda scene: scene.session.submit(Strength(strength=0.3)),
        5: lambda scene: scene.show(120, 5),
        6: lambda scene: scene.session.submit(Rewind(chunk=3, branch="b")),
        7: lambda scene: scene.show(30, 20),
        9: lambda scene: scene.camera.off(),
    }
    scene = Scene(script, log=log, strength=0.8)
    scene.run(7)
    record = tmp_path / "take_00001_camera.mjpeg"
    assert {each.name for each in tmp_path.iterdir()} == {log.name, record.name}
    again = replayed(log)
    assert len(again) == scene.chunks == 10
    assert torch.equal(again[-1], scene.session.recent_latents[-1])
    with av.open(str(record)) as container:  # players play it
        frames = sum(1 for _ in container.decode(video=0))
    used = [use for each in read_log(log).entries if (use := getattr(each, "camera", None))]
    assert frames == sum(len(use.sizes) for use in used) == 1 + max(max(use.frames) for use in used)
    assert frames < sum(len(use.frames) for use in used)  # what is held is kept once


def test_a_session_that_gives_way_is_replayed_as_one_that_did_not(tmp_path: Path) -> None:
    log = tmp_path / "take.jsonl"
    script = {
        1: lambda scene: scene.show(60, 9),
        2: lambda scene: (scene.show(90), scene.session.suspend()),
        3: lambda scene: scene.show(120),
    }
    scene = Scene(script, log=log)
    scene.run(4)
    assert scene.session.suspended
    scene.session.resume(stream_of("wan"))
    scene.run(4)
    assert scene.camera.state == "off"
    again = replayed(log)
    assert len(again) == 4 and torch.equal(again[-1], scene.session.recent_latents[-1])


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda path: path.unlink(), "is not there; put it beside the log"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "does not hold the camera frames"),
        (lambda path: path.write_bytes(b"\0" + path.read_bytes()[1:]), "does not hold"),
    ],
)
def test_a_record_that_is_gone_or_another_is_said_in_a_sentence(
    tmp_path: Path, change: Any, why: str
) -> None:
    log = tmp_path / "take.jsonl"
    Scene({1: lambda scene: scene.show(60)}, log=log).run(2)
    change(camera_record(log))
    with pytest.raises(ValueError, match=why) as refused:
        replayed(log)
    assert "\n" not in str(refused.value)


def test_that_its_record_is_gone_is_said_when_a_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "take.jsonl"
    Scene({1: lambda scene: scene.show(60)}, log=log).run(1)
    camera_record(log).unlink()
    with pytest.raises(ValueError, match="is not there; put it beside the log"):
        read_log(log)


def test_a_log_that_names_frames_it_does_not_have_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "take.jsonl"
    Scene({1: lambda scene: scene.show(60)}, log=log).run(1)
    for old, new, why in (
        ('"frames": [', '"frames": [99, ', "not in"),
        ('"frames": [0, ', '"frames": [', "camera images"),
        ('"sizes": [', '"sizes": [-1, ', "none that counts"),
        ('"sizes": [', '"sizes": [9999999, ', "too large"),
        ('"digest": "', '"digest": 5, "x": "', "other fields"),
    ):
        edited = tmp_path / "edited.jsonl"
        edited.write_text(log.read_text().replace(old, new, 1))
        camera_record(edited).write_bytes(camera_record(log).read_bytes())
        with pytest.raises(ValueError, match=why):
            replayed(edited)


def test_a_record_is_bounded_and_a_session_goes_on_without(tmp_path: Path) -> None:
    frame = CameraFrame(
        mark=CameraMark(camera="a", number=1, captured=0), data=jpeg(1), image=torch.zeros(1)
    )
    other = CameraFrame(mark=frame.mark, data=jpeg(2), image=frame.image)
    writer = CameraWriter(tmp_path / "a.mjpeg", max_bytes=len(jpeg(1)) + 5)
    assert writer.write([frame, frame]).frames == (0, 0)
    assert writer.write([frame, other]) == CameraUse(frames=())
    assert writer.write([frame]) == CameraUse(frames=())
    writer.close()
    assert (tmp_path / "a.mjpeg").read_bytes() == frame.data
    with pytest.raises(ValueError, match="was full before"):
        RecordedCamera(tmp_path / "a.mjpeg", height=8, width=8).expect(CameraUse(frames=()))
    nowhere = CameraWriter(tmp_path / "absent" / "a.mjpeg")
    assert nowhere.write([frame]) == CameraUse(frames=())


def test_a_session_without_a_camera_leaves_no_file(tmp_path: Path) -> None:
    Scene({}, log=tmp_path / "take.jsonl").run(1)
    assert [each.name for each in tmp_path.iterdir()] == ["take.jsonl"]


def test_a_stream_without_a_decoder_has_no_camera() -> None:
    assert Session(stream_of(None), encode, prompt="p0").camera is None


def test_a_stream_that_is_shown_faster_looks_as_often() -> None:
    scene = Scene({}, fps=24)
    for number in range(1, 41):
        scene.camera.put("a", number, 1000 * number / 24, jpeg(1))
    assert numbers(scene.take(12)) == list(range(29, 41))


def test_once_a_session_has_ended_its_camera_takes_nothing() -> None:
    scene = Scene({})
    scene.run(1)
    with pytest.raises(NotThisCameraError, match="has ended"):
        scene.camera.put("a", 1, 0.0, jpeg(1))


def test_of_taehv_the_first_image_is_read_four_times_as_of_a_clip() -> None:
    guide, decoder = CameraGuide(Still()), decoder_of("taehv")
    first = guide.latents(decoder, 3, first=True)
    assert first is not None and first.shape[2] == 3 and len(guide.used) == 9
    second = guide.latents(decoder, 3, first=False)
    assert second is not None and second.shape[2] == 3 and len(guide.used) == 12
    guide.forget()
    late = guide.latents(decoder, 3, first=False)
    assert late is not None and late.shape == second.shape


class Still:
    """A camera before a wall."""

    def take(self, count: int) -> list[CameraFrame]:
        image = torch.full((32, 32, 3), 90, dtype=torch.uint8)
        return [
            CameraFrame(mark=CameraMark(camera="a", number=1, captured=0), data=b"", image=image)
        ] * count


def test_damaged_images_are_refused_in_a_sentence_or_shown(clock: Any) -> None:
    rng, sound, camera = random.Random(7), jpeg(90), camera_of()
    for number in range(1, 501):
        clock.now += 1
        data = bytearray(sound)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(2, len(data) - 2)] = rng.randrange(256)
        try:
            camera.put("a", number, number, bytes(data))
        except ValueError as refused:
            assert "\n" not in str(refused)
            camera.put("a", number, number, sound)


@pytest.mark.slow
def test_the_command_line_replays_a_session_that_saw_a_camera(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "a blue square moves left"
    timeline = PromptTimeline().append(0, "s", Switch(), prompt)
    output = tmp_path / "take.mp4"
    resolved = plan(Options(timeline=timeline, output=output, seconds=3))
    stream, embeds = load(resolved)
    recorder = VideoRecorder(output, resolved.format)
    log = tmp_path / "take.jsonl"
    session = Session(
        stream, embeds.__getitem__, prompt=prompt, recorder=recorder, log=log, strength=0.3
    )
    assert session.camera is not None
    for number in range(1, 13):
        session.camera.put("a", number, 60 * number, jpeg(10 * number, 64, 64))
    session.run(until=3)
    again = tmp_path / "again.mp4"
    assert main(["generate", "--replay", str(log), "--output", str(again)]) == 0
    assert torch.equal(*(read_images(each, width=64, height=64) for each in (output, again)))
    camera_record(log).unlink()
    assert main(["generate", "--replay", str(log), "--output", str(tmp_path / "third.mp4")]) != 0
    assert "is not there; put it beside the log" in capsys.readouterr().err
