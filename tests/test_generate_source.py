"""`generate --source`: clips, a picture, a pipe and a camera, and what is refused of them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import wave
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from test_generate import arguments, assert_same_images, comment_of, images_of, stop_here, weights

from rf_core.__main__ import main
from rf_core.fast.parallel import Process
from rf_core.generate import split_of
from rf_core.options import Files, Options, _sizes_of, plan
from rf_core.prompts import PromptTimeline, Switch
from rf_core.source_input import SourceOptions
from rf_core.video import VideoFormat, VideoWriter, read_images, to_uint8

__all__ = ["weights"]
SIZE = {"height": 32, "width": 48}
PROMPT = ("--prompt", "x")


def clip(path: Path, images: int = 45) -> Path:
    """A clip of noise that moves, in the tests' size."""
    noise = torch.rand(images, 3, 4, 6, generator=torch.Generator().manual_seed(5))
    large = torch.nn.functional.interpolate(noise, (32, 48), mode="bilinear")
    with VideoWriter(path, VideoFormat(**SIZE)) as writer:
        writer.write(to_uint8(large))
    return path


def made(weights: Path, output: Path, *more: str) -> np.ndarray:
    assert main(arguments(weights, output, *more)) == 0
    return images_of(output)


def refusal(weights: Path, output: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(arguments(weights, output, *PROMPT, "--chunks", "2", *more)) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said and not output.exists()
    return said


def test_a_video_is_as_long_as_its_source_and_records_it(weights, tmp_path, capsys) -> None:
    source = clip(tmp_path / "clip.mp4")
    images = made(weights, tmp_path / "a.mp4", *PROMPT, "--source", str(source))
    assert len(images) == 9 + 12 * 3
    assert "source: clip.mp4, strength 0.4, 2.81 s" in capsys.readouterr().out
    record = comment_of(tmp_path / "a.mp4")["source"]
    assert (record["file"], record["strength"], record["at_end"]) == ("clip.mp4", 0.4, "stop")


def test_at_strength_1_it_is_the_prompts_own_video_and_below_it_is_not(weights, tmp_path) -> None:
    given = (*PROMPT, "--chunks", "3")
    source = ("--source", str(clip(tmp_path / "clip.mp4")))
    alone = made(weights, tmp_path / "a.mp4", *given)
    assert_same_images(made(weights, tmp_path / "b.mp4", *given, *source, "--strength", "1"), alone)
    guided = made(weights, tmp_path / "c.mp4", *given, *source, "--strength", "0.5")
    assert not np.array_equal(guided, alone)
    moved = ("--strength", "0.5", "--motion-strength", "-0.3")
    assert not np.array_equal(made(weights, tmp_path / "d.mp4", *given, *source, *moved), guided)


def test_stopped_with_cuts_and_a_start_clip_it_resumes_to_the_same_images(
    weights, tmp_path, monkeypatch
) -> None:
    timeline = tmp_path / "t.txt"
    timeline.write_text("0s: x\nc2 [cut]: y\nc4: z\n")
    more = ("--timeline", str(timeline), "--chunks", "6", "--snapshot-every", "1")
    start = clip(tmp_path / "start.mp4", images=9)
    source = ("--source", str(clip(tmp_path / "clip.mp4")), "--source-end", "loop")
    more = (*more, *source, "--start", str(start))
    whole, output = made(weights, tmp_path / "whole.mp4", *more), tmp_path / "a.mp4"
    for chunk in (2, 4):
        again = ("--resume",) if output.exists() else ()
        assert stop_here(monkeypatch, weights, output, signal.SIGINT, chunk, *more, *again) == 130
    assert main(arguments(weights, output, *more, "--resume")) == 0
    assert_same_images(images_of(output), whole)


def test_a_resumed_run_keeps_its_source_and_strength(
    weights, tmp_path, monkeypatch, capsys
) -> None:
    output, source = tmp_path / "a.mp4", clip(tmp_path / "clip.mp4")
    more = (*PROMPT, "--chunks", "3", "--snapshot-every", "1")
    guided = (*more, "--source", str(source))
    assert stop_here(monkeypatch, weights, output, signal.SIGINT, 1, *guided) == 130
    for other in (more, (*guided, "--strength", "0.5")):
        assert main(arguments(weights, output, *other, "--resume")) == 1
        assert "was begun with source" in capsys.readouterr().err
    clip(source, images=44)  # another file of that name
    assert main(arguments(weights, output, *guided, "--resume")) == 1
    assert "was begun with source" in capsys.readouterr().err


def test_a_source_shorter_than_asked_ends_the_video_and_that_is_told_at_the_start(
    weights, tmp_path, capsys
) -> None:
    source = clip(tmp_path / "clip.mp4", images=25)
    given = (*PROMPT, "--chunks", "3", "--source", str(source))
    assert len(made(weights, tmp_path / "a.mp4", *given)) == 9 + 12
    assert "the video ends with it; with --source-end hold or loop" in capsys.readouterr().out
    assert len(made(weights, tmp_path / "b.mp4", *given, "--source-end", "hold")) == 9 + 12 * 2
    assert "ends with it" not in capsys.readouterr().out


def test_equal_parts_share_the_length_of_a_source(weights, tmp_path) -> None:
    source = clip(tmp_path / "clip.mp4")
    timeline = tmp_path / "t.txt"
    timeline.write_text("a cat | a dog", encoding="utf-8")
    given = ("--timeline", str(timeline), "--source", str(source))
    made(weights, tmp_path / "a.mp4", *given)
    prompts = comment_of(tmp_path / "a.mp4")["prompts"]
    assert [each[0] for each in prompts] == [0, 2]


def test_a_pipe_that_ends_ends_the_video(weights, tmp_path, monkeypatch) -> None:
    piped(monkeypatch, clip(tmp_path / "clip.mp4", images=25).read_bytes())
    given = (*PROMPT, "--chunks", "3", "--source", "-")
    assert len(made(weights, tmp_path / "a.mp4", *given)) == 9 + 12


def test_a_picture_is_held(weights, tmp_path) -> None:
    picture = torch.rand(1, 3, 32, 48)
    frame = av.VideoFrame.from_ndarray(to_uint8(picture)[0].numpy(), format="rgb24")
    frame.to_image().save(tmp_path / "a.png")
    given = (*PROMPT, "--chunks", "3", "--source", str(tmp_path / "a.png"))
    images = made(weights, tmp_path / "a.mp4", *given, "--strength", "0")
    assert len(images) == 33


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Let bytes come through the standard input, which is a pipe."""
    reader, writer = os.pipe()

    def write() -> None:
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(content)

    threading.Thread(target=write, daemon=True).start()
    monkeypatch.setattr(sys, "stdin", os.fdopen(reader, encoding="utf-8"))


def test_a_pipe_guides_as_the_file_does_that_comes_through_it(
    weights, tmp_path, monkeypatch, capsys
) -> None:
    source, given = clip(tmp_path / "clip.mp4"), (*PROMPT, "--chunks", "3")
    whole = made(weights, tmp_path / "a.mp4", *given, "--source", str(source))
    piped(monkeypatch, source.read_bytes())
    output = tmp_path / "b.mp4"
    assert_same_images(made(weights, output, *given, "--source", "-"), whole)
    assert main(arguments(weights, output, *given, "--source", "-", "--resume")) == 1
    assert "the source - cannot be read again" in capsys.readouterr().err
    piped(monkeypatch, b"no video at all")
    said = refusal(weights, tmp_path / "c.mp4", capsys, "--source", "-")
    assert "the pipe is not a picture or video FFmpeg can read" in said


def test_test_pictures_stand_for_a_camera(weights, tmp_path) -> None:
    camera = "lavfi:testsrc=size=48x32:rate=30,realtime"
    images = made(weights, tmp_path / "a.mp4", *PROMPT, "--chunks", "2", "--source", camera)
    assert len(images) == 9 + 12
    assert comment_of(tmp_path / "a.mp4")["source"]["file"] == camera


def test_the_videos_of_a_prompt_file_are_guided_by_one_source(weights, tmp_path, capsys) -> None:
    prompts, source = tmp_path / "p.txt", clip(tmp_path / "clip.mp4")
    prompts.write_text("x\ny\n")
    given = ("--prompts", str(prompts), "--chunks", "2")
    folder = tmp_path / "videos"
    assert main(arguments(weights, folder, *given, "--source", str(source))) == 0
    first, second = (images_of(each) for each in sorted(folder.glob("*.mp4")))
    assert len(first) == 21 and not np.array_equal(first, second)
    assert main(arguments(weights, tmp_path / "more", *given, "--source", "-")) == 1
    assert "videos of a prompt file are guided by a file" in capsys.readouterr().err


def sound(path: Path) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(1600))
    return path


def without_frames(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=16)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        container.start_encoding()
    return path


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (lambda place: place / "none.mp4", "none.mp4 is not a file; check the path"),
        (lambda place: sound(place / "a.wav"), "a.wav holds no picture or video"),
        (lambda place: without_frames(place / "a.mkv"), "a.mkv"),
        (lambda place: place, "is not a file"),
    ],
)
def test_what_is_no_clip_is_refused_before_weights_are_read(
    source, said: str, weights, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("rf_core.generate.load_student", None)
    place = tmp_path / "sources"
    place.mkdir()
    told = refusal(weights, tmp_path / "a.mp4", capsys, "--source", str(source(place)))
    assert said in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--strength", "nan"], "strength is nan; give a number from 0"),
        (["--strength", "-1"], "strength is -1.0; give a number from 0"),
        (["--strength", "2"], "strength is 2.0; give a number from 0"),
        (["--motion-strength", "2"], "motion_strength is 2.0; give a number from -1 to 1"),
    ],
)
def test_a_strength_that_cannot_be_is_refused(more, said, weights, tmp_path, capsys) -> None:
    source = ("--source", str(clip(tmp_path / "clip.mp4", images=9)))
    assert said in refusal(weights, tmp_path / "a.mp4", capsys, *source, *more)


def test_what_says_nothing_without_a_source_is_refused(weights, tmp_path, capsys) -> None:
    said = refusal(weights, tmp_path / "a.mp4", capsys, "--strength", "0.5")
    assert "--strength is for --source; leave it out" in said


def test_a_clip_too_short_for_a_chunk_is_refused_before_weights_are_read(
    weights, tmp_path, capsys
) -> None:
    source = ("--source", str(clip(tmp_path / "clip.mp4", images=8)))
    assert main(arguments(weights, tmp_path / "a.mp4", *PROMPT, *source)) == 1
    said = capsys.readouterr().err
    assert "the source has 8 images at 16 a second, and 9 are needed for its first chunk" in said


def test_a_camera_is_not_looped() -> None:
    with pytest.raises(ValueError, match="cannot begin again; leave out --source-end loop"):
        SourceOptions(place="v4l2:/dev/video0", at_end="loop")
    assert SourceOptions(place="C:/clips/a.mp4").is_file
    assert not SourceOptions(place="dshow:video=A Camera").is_file


def test_a_letterboxed_source_has_black_beside_it(weights, tmp_path) -> None:
    wide = tmp_path / "wide.mp4"
    with VideoWriter(wide, VideoFormat(height=32, width=96)) as writer:
        writer.write(torch.full((9, 32, 96, 3), 255, dtype=torch.uint8))
    fitted = read_images(wide, **SIZE)
    assert fitted.min() > 0.9
    given = (*PROMPT, "--source", str(wide), "--strength", "0")
    crop = made(weights, tmp_path / "a.mp4", *given)
    boxed = made(weights, tmp_path / "b.mp4", *given, "--source-fit", "letterbox")
    assert not np.array_equal(crop, boxed)


def test_a_live_session_with_a_source_is_made_again_with_its_file_alone(
    weights, tmp_path, monkeypatch, capsys
) -> None:
    output, source = tmp_path / "take.mp4", clip(tmp_path / "clip.mp4")
    given = ("--live", "--pace", "max", "--chunks", "4", "--source-end", "loop")
    piped(monkeypatch, b"/strength 0.2\n/status\n")
    assert main(arguments(weights, output, *PROMPT, *given, "--source", str(source))) == 0
    told = capsys.readouterr().out
    assert "received: strength 0.2" in told and "; strength 0." in told
    log = ("--replay", str(output.with_suffix(".jsonl")))
    (tmp_path / "again").mkdir()
    again = tmp_path / "again" / "take.mp4"
    assert main(arguments(weights, again, *log, "--source", str(source))) == 0
    assert again.read_bytes() == output.read_bytes()
    other, last = clip(tmp_path / "other.mp4", images=44), tmp_path / "again" / "b.mp4"
    capsys.readouterr()
    for more, said in [
        ((), "the log's session was guided by clip.mp4; give that file with --source"),
        (("--source", str(other)), "other.mp4 is another file than clip.mp4, which guided"),
        (("--source", "-"), "the log's session was guided by clip.mp4; give that file"),
        (("--source", str(source), "--strength", "0.5"), "--strength is not for --replay"),
    ]:
        assert main(arguments(weights, last, *log, *more)) == 1
        assert said in capsys.readouterr().err
    assert not last.exists()


def test_a_live_session_of_a_pipe_reads_no_lines_and_is_not_made_again(
    weights, tmp_path, monkeypatch, capsys
) -> None:
    output, source = tmp_path / "take.mp4", clip(tmp_path / "clip.mp4")
    piped(monkeypatch, source.read_bytes())
    given = ("--live", "--pace", "max", "--chunks", "2", "--source", "-")
    assert main(arguments(weights, output, *PROMPT, *given)) == 0
    assert "so no line is read" in capsys.readouterr().out
    log = ("--replay", str(output.with_suffix(".jsonl")))
    assert main(arguments(weights, tmp_path / "b.mp4", *log)) == 1
    assert "was guided by -, of which nothing is kept" in capsys.readouterr().err


def test_the_plan_counts_what_encoding_takes_and_several_processes_take_no_source(
    weights, tmp_path
) -> None:
    source = SourceOptions(place=str(clip(tmp_path / "clip.mp4")))
    files = Files(
        model=weights / "student.safetensors",
        vae=weights / "vae.safetensors",
        text_encoder=str(weights / "text.safetensors"),
    )
    timeline = PromptTimeline().append(0, "s", Switch(), "x")
    options = Options(timeline=timeline, output=tmp_path / "a.mp4", files=files, source=source)
    resolved = plan(options)
    assert resolved.total == 4 and _sizes_of(resolved).encodes
    assert not _sizes_of(plan(replace(options, source=None, chunks=1))).encodes
    with pytest.raises(ValueError, match="of its prompt alone; leave out --source"):
        split_of(resolved, Process(rank=0, world_size=2))
    with pytest.raises(ValueError, match="a rolling sampler takes no guide"):
        plan(replace(options, sampler={"rolling": True}))
