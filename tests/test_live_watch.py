"""What watches a live session sees, when, and how long it keeps its past: the edges of its core."""

from __future__ import annotations

import io
import struct
import threading
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from test_live import FORMAT, encode, latents_by_branch, of_kind, stream_of
from torch import Tensor

from rf_core.live import (
    Applied,
    Branched,
    Command,
    FragmentSequence,
    Limits,
    Outbox,
    Pause,
    Picture,
    Prompt,
    Refused,
    Resume,
    Rewind,
    Session,
    Stop,
    VideoRecorder,
    codec_of,
    history,
)
from rf_core.live.fragments import boxes
from rf_core.live.session import RateLimiter
from rf_core.stream import OnPass
from rf_core.video import VideoFormat, VideoWriter, header_of


def in_chunk(session: Session, script: dict[int, list[Command]]) -> OnPass:
    """Commands that come within chunks, by how many were begun, from 1."""
    begun = iter(range(1, 1000))

    def on_pass(kind: str, number: int) -> None:
        if kind == "denoise" and number == 0:
            for command in script.get(next(begun), []):
                session.submit(command)

    return on_pass


def session_of(stream: Any = None, **options: Any) -> Session:
    return Session(stream or stream_of(), encode, prompt="p0", **options)


# The rate.


def test_a_chunk_begins_when_the_one_before_is_shown_and_what_is_late_is_not_caught_up_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    limiter = RateLimiter(16)
    assert limiter.remaining() == 0
    limiter.chunk_begins()
    now += 0.25
    limiter.chunk_made(12)
    assert limiter.remaining() == 0.5
    now += 0.5
    assert limiter.remaining() == 0
    limiter.chunk_begins()
    now += 3  # four times as long as it is shown
    limiter.chunk_made(12)
    assert limiter.remaining() == 0
    limiter.chunk_begins()
    now += 0.25
    limiter.chunk_made(12)
    assert limiter.remaining() == 0.5
    with pytest.raises(ValueError, match="rate is 0"):
        RateLimiter(0)


def test_a_session_is_no_faster_than_its_rate_and_as_fast_as_it_can_without_one() -> None:
    begun = time.monotonic()
    session_of(stream_of("taehv"), rate=48).run(until=3)  # 9, 12 and 12 images
    assert time.monotonic() - begun >= (9 + 12) / 48
    assert RateLimiter(None).remaining() == 0


def test_commands_are_obeyed_while_it_waits_for_the_rate_and_a_stop_ends_the_wait() -> None:
    session = session_of(stream_of("taehv"), rate=0.01)
    reader = session.outbox.reader()

    def steer() -> None:
        while session.outbox.status.chunk < 1:
            time.sleep(0.01)
        session.submit(Prompt(text="p1"))
        while session.outbox.status.answered < 1:
            time.sleep(0.01)
        session.submit(Stop())

    hand = threading.Thread(target=steer)
    hand.start()
    session.run()  # the next chunk is due in a quarter of an hour
    hand.join()
    applied = of_kind(reader.read(0), Applied)
    assert applied == [Applied(number=1, chunk=1), Applied(number=2, chunk=1)]


def test_a_pause_and_the_wait_for_the_rate_end_with_a_resume_or_not_at_all() -> None:
    session, asked = session_of(rate=1000), []

    def on_idle() -> None:
        asked.append(session.outbox.status.paused)
        session.submit(Resume() if len(asked) == 2 else Pause())

    session.submit(Pause())
    session.run(on_idle=on_idle, until=2)
    assert asked == [True, True] and session.outbox.status.chunk == 2


# A clip to begin with.


def clip_of(chunks: int) -> Tensor:
    stream = stream_of(seed=9)
    made = [stream.step().latents for _ in range(chunks)]
    return torch.cat(made, dim=2)


def test_a_clip_is_what_the_first_chunks_are_and_a_rewind_into_it_finds_it_again(
    tmp_path: Path,
) -> None:
    clip, log = clip_of(2), tmp_path / "log.jsonl"
    session = session_of(clip=clip, log=log)
    expected = stream_of()
    for chunk in clip.split(3, dim=2):
        expected.replay(chunk)
    latents = [expected.step().latents for _ in range(2)]
    session.run(until=4)
    assert torch.equal(torch.cat(session.recent_latents, dim=2), torch.cat([clip, *latents], dim=2))
    again = latents_by_branch(log, stream_of(), clip=clip)["main"]
    assert torch.equal(torch.cat(again, dim=2), torch.cat([clip, *latents], dim=2))
    with pytest.raises(ValueError, match="the log's stream has clip"):
        latents_by_branch(log, stream_of())

    back = session_of(clip=clip)
    back.run(in_chunk(back, {1: [Rewind(chunk=1)]}), until=4)
    assert of_kind(back.outbox.reader(from_start=True).read(0), Branched)
    assert torch.equal(torch.cat(back.recent_latents, dim=2), torch.cat([clip, *latents], dim=2))


def test_a_clip_for_a_stream_that_has_begun_is_refused() -> None:
    stream = stream_of()
    stream.step()
    with pytest.raises(ValueError, match="a clip is given, and the stream has begun"):
        session_of(stream, clip=clip_of(1))


# The past, where memory is short.


def test_where_no_snapshot_fits_the_beginning_stays_in_reach() -> None:
    latents = clip_of(1).nbytes
    room = stream_of().snapshot(compact=True).nbytes + 13 * latents
    session = session_of(limits=Limits(every=2, max_bytes=room))
    session.run(in_chunk(session, {10: [Rewind(chunk=0)]}), until=11)
    assert session.outbox.status.oldest == 0
    events = session.outbox.reader(from_start=True).read(0)
    assert of_kind(events, Branched) and not of_kind(events, Refused)
    assert session.outbox.status.history_bytes <= room


def test_snapshots_are_the_rarer_the_more_there_is_to_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(history, "_COPIED", stream_of().snapshot().nbytes)
    gaps = []
    for factor in (1, 3):
        monkeypatch.setattr(history, "_COPIED", history._COPIED // factor)
        session = session_of(limits=Limits(every=2))
        session.run(until=26)
        points = [point.chunk for point in session._maker.history._points]
        gaps.append(points[-1] - points[-2])
    assert gaps[0] < gaps[1] and gaps[1] >= 6


# Those who watch.


def test_a_bell_rings_for_all_that_is_news_and_no_more_once_it_is_hung_up() -> None:
    outbox, rung = Outbox(), []
    with outbox.subscribe(lambda: rung.append(1)):
        outbox.publish(Applied(number=1, chunk=0))
        outbox.show(Picture(branch="main", chunk=0, images=None))
        outbox.status = "new"
        outbox.close()
    outbox.publish(Applied(number=2, chunk=0))
    assert len(rung) == 4 and outbox.closed


def test_who_comes_late_is_shown_the_newest_chunk_at_once() -> None:
    outbox = Outbox()
    assert outbox.reader(latest=True).read(0) == []
    for chunk in range(5):
        outbox.show(Picture(branch="main", chunk=chunk, images=None))
    outbox.publish(Applied(number=1, chunk=5))
    new = outbox.reader(latest=True).read(0)
    assert [type(each) for each in new] == [Picture, Applied] and new[0].chunk == 4
    assert outbox.reader().read(0) == []


def decoded(data: bytes) -> tuple[np.ndarray[Any, Any], list[int]]:
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    return np.stack([f.to_ndarray(format="rgb24") for f in frames]), [f.pts for f in frames]


def test_a_reader_who_comes_late_and_misses_some_sees_a_whole_video_of_what_it_got(
    tmp_path: Path,
) -> None:
    images = [torch.randint(0, 256, (n, 32, 48, 3), dtype=torch.uint8) for n in (9, 12, 12, 12)]
    with VideoWriter(tmp_path / "take.mp4", FORMAT, {"workflow": "secret"}) as writer:
        fragments = [writer.write(each) for each in images]
    header = header_of(FORMAT)
    assert (tmp_path / "take.mp4").read_bytes().endswith(b"".join(fragments))
    assert b"secret" not in header and codec_of(header) == "avc1.f4000a"
    reel, seen = FragmentSequence(header_of(FORMAT)), [2, 1, 3, 0, 3]
    shown, dates = decoded(header + b"".join(reel.add(fragments[n]) for n in seen))
    whole, _ = decoded((tmp_path / "take.mp4").read_bytes())
    begins = [0, 9, 21, 33, 45]
    assert np.array_equal(shown, np.concatenate([whole[begins[n] : begins[n + 1]] for n in seen]))
    assert dates == list(range(0, 1024 * len(dates), 1024))


def test_what_is_said_of_images_lies_between_the_fragments_and_plays_as_before(
    tmp_path: Path,
) -> None:
    images = [torch.randint(0, 256, (n, 32, 48, 3), dtype=torch.uint8) for n in (9, 12)]
    with VideoWriter(tmp_path / "take.mp4", FORMAT) as writer:
        fragments = [writer.write(each) for each in images]
    header = header_of(FORMAT)
    reel = FragmentSequence(header)
    video = header + reel.add(fragments[0], b'{"frame": 7}') + reel.add(fragments[1], b"{}")
    shown, dates = decoded(video)
    whole, _ = decoded((tmp_path / "take.mp4").read_bytes())
    assert np.array_equal(shown, whole) and dates == list(range(0, 1024 * len(dates), 1024))
    said = [at for name, at in boxes(video) if name == b"emsg"]
    assert [struct.unpack_from(">IQ", video, at + 4) for at in said] == [
        (16384, 8 * 1024),  # the last image of each
        (16384, 20 * 1024),
    ]
    assert b'{"frame": 7}' in video


def test_what_is_no_video_in_h264_has_no_name_that_a_browser_is_asked_for() -> None:
    format = VideoFormat(width=48, height=32, codec="mpeg4")
    assert codec_of(header_of(format)) is None


def test_pictures_carry_what_is_in_the_file(tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "take.mp4", FORMAT)
    session = session_of(stream_of("taehv"), recorder=recorder)
    reader = session.outbox.reader()
    session.run(until=3)
    pictures = of_kind(reader.read(0), Picture)
    header = header_of(FORMAT)
    reel = FragmentSequence(header)
    shown, _ = decoded(header + b"".join(reel.add(each.fragment) for each in pictures))
    whole, _ = decoded((tmp_path / "take.mp4").read_bytes())
    assert len(pictures) == 3 and np.array_equal(shown, whole)


# What is told.


def test_the_status_tells_what_took_hold_on_the_line_that_is_followed() -> None:
    session = session_of()
    script = {1: [Prompt(text="p1")], 3: [Rewind(chunk=1, branch="b"), Prompt(text="p2")]}
    session.run(in_chunk(session, script), until=3)
    status = session.outbox.status
    assert [(each.chunk, each.action.text) for each in status.past] == [(0, "p0"), (1, "p2")]
    assert (status.chunk, status.chunk_images) == (3, 12)


def test_the_status_tells_where_each_branch_that_was_left_ended() -> None:
    session = session_of()
    script = {4: [Rewind(chunk=1, branch="b")], 6: [Rewind(chunk=1, branch="c")]}
    session.run(in_chunk(session, script), until=5)
    status = session.outbox.status
    spans = [(each.name, each.begins, each.ended) for each in status.branches]
    assert spans == [("main", 0, 4), ("b", 1, 3), ("c", 1, None)]
    assert status.branch == status.branches[-1]


def test_speeds_leave_out_the_wait_for_the_rate() -> None:
    session = session_of(stream_of("taehv"), rate=24)
    session.run(until=4)
    fps = session.outbox.status.fps
    assert fps.network > 24 and fps.decode > 24 and 24 < fps.total < min(fps.network, fps.decode)
