"""The growing MP4 and the reader of pictures and clips."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import weakref
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from rf_core import orientation, video
from rf_core.video import (
    VideoFormat,
    VideoWriter,
    check_images,
    read_images,
    read_metadata,
    remux,
    to_uint8,
)
from rf_core.writing import WriteError

SIZE = 64
CHUNK = 12
FORMAT = VideoFormat(width=SIZE, height=SIZE)


def make_images(num_images: int, seed: int = 0) -> Tensor:
    """Coloured tiles that change with every image, uint8 [T, SIZE, SIZE, 3]."""
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randint(0, 256, (num_images, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return tiles.repeat_interleave(SIZE // 8, 1).repeat_interleave(SIZE // 8, 2)


def write(path: Path, images: Tensor, chunk: int = CHUNK) -> None:
    with VideoWriter(path, FORMAT) as writer:
        for part in images.split(chunk):
            writer.write(part)


def read(path: Path) -> Tensor:
    return read_images(path, width=SIZE, height=SIZE)[0]


def times_of(path: Path) -> list[Fraction]:
    with av.open(str(path)) as container:
        return [frame.pts * frame.time_base for frame in container.decode(video=0)]


def test_images_written_in_uneven_chunks_are_read_back_in_order(tmp_path: Path) -> None:
    images = make_images(9 + CHUNK + 1)
    with VideoWriter(tmp_path / "a.mp4", FORMAT) as writer:
        for chunk in images.split([9, CHUNK, 1]):
            writer.write(chunk)
    seen = read(tmp_path / "a.mp4")
    errors = torch.cdist(seen.flatten(1), images.permute(0, 3, 1, 2).flatten(1) / 255)
    assert errors.argmin(1).tolist() == list(range(len(images)))
    assert writer.num_images == len(images)


@pytest.mark.parametrize("finish", [False, True])
def test_the_rate_is_constant_across_chunks(tmp_path: Path, finish: bool) -> None:
    path = tmp_path / "a.mp4"
    write(path, make_images(3 * CHUNK))
    if finish:
        remux(path)
    assert times_of(path) == [Fraction(index, FORMAT.fps) for index in range(3 * CHUNK)]


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 30)])
def test_colours_survive_and_are_tagged(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    image = torch.tensor(colour, dtype=torch.uint8).expand(1, SIZE, SIZE, 3)
    write(tmp_path / "a.mp4", image)
    seen = read(tmp_path / "a.mp4").mean((0, 2, 3)) * 255
    assert torch.allclose(seen, torch.tensor(colour).float(), atol=3)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        tags = (context.colorspace, context.color_primaries, context.color_trc)
        assert (*tags, context.color_range) == (1, 1, 1, 1)


def test_each_chunk_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    images = torch.zeros(3 * CHUNK, SIZE, SIZE, 3, dtype=torch.uint8)  # few bytes a chunk
    with VideoWriter(tmp_path / "a.mp4", FORMAT) as writer:
        for number, chunk in enumerate(images.split(CHUNK), start=1):
            writer.write(chunk)
            assert len(read(tmp_path / "a.mp4")) == number * CHUNK


ENDLESS_RUN = """
import sys
import torch
from rf_core.video import VideoFormat, VideoWriter
writer = VideoWriter(sys.argv[1], VideoFormat(width=64, height=64))
while True:
    generator = torch.Generator().manual_seed(writer.num_images)
    writer.write(torch.randint(0, 256, (12, 64, 64, 3), generator=generator, dtype=torch.uint8))
    print(writer.num_images, flush=True)
"""


@pytest.mark.slow
def test_a_killed_run_plays_to_its_last_finished_chunk_and_resumes_exactly(tmp_path: Path) -> None:
    def chunk(first: int) -> Tensor:
        generator = torch.Generator().manual_seed(first)
        return torch.randint(0, 256, (12, 64, 64, 3), generator=generator, dtype=torch.uint8)

    path, whole = tmp_path / "killed.mp4", tmp_path / "whole.mp4"
    command = [sys.executable, "-c", ENDLESS_RUN, str(path)]
    root = Path(video.__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as run:
        assert run.stdout is not None
        finished = [int(run.stdout.readline()) for _ in range(4)][-1]
        run.kill()
    write(whole, torch.cat([chunk(first) for first in range(0, 72, 12)]))

    seen = read(path)[:finished]
    assert torch.equal(seen, read(whole)[:finished])
    with VideoWriter.resume(path, 36, FORMAT) as writer:
        for first in range(36, 72, 12):
            writer.write(chunk(first))
    assert torch.equal(read(path), read(whole))


def test_a_file_cut_anywhere_gives_every_whole_chunk_unchanged(tmp_path: Path) -> None:
    path, cut = tmp_path / "a.mp4", tmp_path / "cut.mp4"
    with VideoWriter(path, FORMAT) as writer:
        ends = []
        for chunk in make_images(4 * CHUNK).split(CHUNK):
            writer.write(chunk)
            ends.append(path.stat().st_size)
    whole, data = read(path), path.read_bytes()
    for length in range(ends[0], ends[-1], 997):
        cut.write_bytes(data[:length])
        seen = read(cut)
        assert len(seen) >= CHUNK * sum(length >= end for end in ends)
        assert torch.equal(seen, whole[: len(seen)])


@pytest.mark.parametrize("finish", [False, True])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_a_resumed_file_equals_an_undisturbed_one(
    tmp_path: Path, num_chunks: int, finish: bool
) -> None:
    path, whole = tmp_path / "a.mp4", tmp_path / "whole.mp4"
    images = make_images(4 * CHUNK)
    write(whole, images)
    write(path, images[: 3 * CHUNK])
    if finish:
        remux(path)
    start = num_chunks * CHUNK
    with VideoWriter.resume(path, start, FORMAT) as writer:
        assert len(read(path)) == start
        for chunk in images[start:].split(CHUNK):
            writer.write(chunk)
    assert torch.equal(read(path), read(whole))
    assert times_of(path) == times_of(whole)


def test_the_file_does_not_depend_on_how_many_images_follow(tmp_path: Path) -> None:
    images = make_images(3 * CHUNK)
    write(tmp_path / "long.mp4", images)
    write(tmp_path / "short.mp4", images[: 2 * CHUNK])
    short = (tmp_path / "short.mp4").read_bytes()
    assert (tmp_path / "long.mp4").read_bytes()[: len(short)] == short


def test_resuming_keeps_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> int:
        raise OSError("disk full")

    path = tmp_path / "a.mp4"
    write(path, make_images(2 * CHUNK))
    before = path.read_bytes()
    monkeypatch.setattr(video, "_copy_packets", crash)
    with pytest.raises(OSError, match="disk full"):
        VideoWriter.resume(path, CHUNK, FORMAT)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_remuxing_copies_the_images_and_puts_the_index_in_front(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write(path, make_images(3 * CHUNK))
    before = read(path)
    remux(path)
    data = path.read_bytes()
    assert torch.equal(read(path), before)
    assert b"moof" not in data
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 3 * CHUNK
        assert container.duration == 3 * CHUNK * av.time_base // FORMAT.fps


def test_metadata_survives_writing_resuming_and_remuxing(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    metadata = {"title": "a panda, größer", "comment": '{"seed": 1}', "prompt": "snow"}
    with VideoWriter(path, FORMAT, metadata) as writer:
        writer.write(make_images(CHUNK))
    VideoWriter.resume(path, CHUNK, FORMAT).close()
    remux(path)
    with av.open(str(path)) as container:
        assert metadata.items() <= container.metadata.items()


def test_resuming_can_replace_the_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, FORMAT, {"prompt": "old", "gone": "yes"}) as writer:
        writer.write(make_images(CHUNK))
    VideoWriter.resume(path, CHUNK, FORMAT, {"prompt": "new"}).close()
    kept = video.read_metadata(path)
    assert kept["prompt"] == "new" and "gone" not in kept


def test_remuxing_can_replace_the_metadata(tmp_path: Path) -> None:
    path, images = tmp_path / "a.mp4", make_images(CHUNK)
    with VideoWriter(path, FORMAT, {"prompt": "old", "gone": "yes"}) as writer:
        writer.write(images)
    before = read(path)
    remux(path, {"prompt": "new"})
    kept = video.read_metadata(path)
    assert kept["prompt"] == "new" and "gone" not in kept
    assert torch.equal(read(path), before)


def test_resuming_refuses_what_it_cannot_continue(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(ValueError, match="not a file"):
        VideoWriter.resume(path, CHUNK, FORMAT)
    write(path, make_images(CHUNK))
    with pytest.raises(ValueError, match="12 whole images, 24 are needed"):
        VideoWriter.resume(path, 2 * CHUNK, FORMAT)
    with pytest.raises(ValueError, match="another size, rate or encoder"):
        VideoWriter.resume(path, CHUNK, VideoFormat(width=SIZE, height=2 * SIZE))
    with pytest.raises(ValueError, match="another size, rate or encoder"):
        VideoWriter.resume(path, CHUNK, VideoFormat(width=SIZE, height=SIZE, fps=24))
    with pytest.raises(ValueError, match="begin a new file"):
        VideoWriter.resume(path, 0, FORMAT)
    assert len(read(path)) == CHUNK


def test_formats_that_cannot_be_written_are_refused() -> None:
    with pytest.raises(ValueError, match=r"65x64.*even"):
        VideoFormat(width=65, height=64)
    with pytest.raises(ValueError, match="crf is 60"):
        VideoFormat(width=64, height=64, crf=60)
    with pytest.raises(ValueError, match="fps is 0"):
        VideoFormat(width=64, height=64, fps=0)
    with pytest.raises(ValueError, match=r"'h265_imaginary'; it has .*mpeg4"):
        VideoFormat(width=64, height=64, codec="h265_imaginary")


def test_an_encoder_that_does_not_start_is_named_before_the_run(tmp_path: Path) -> None:
    # MPEG-4 stores sizes in 13 bits.
    with pytest.raises(ValueError, match="'mpeg4' does not start for 9000x16"):
        VideoWriter(tmp_path / "a.mp4", VideoFormat(width=9000, height=16, codec="mpeg4"))


def test_another_encoder_writes_and_resumes_too(tmp_path: Path) -> None:
    path, images = tmp_path / "a.mp4", make_images(2 * CHUNK)
    format = VideoFormat(width=SIZE, height=SIZE, codec="mpeg4")
    with VideoWriter(path, format) as writer:
        writer.write(images[:CHUNK])
    with VideoWriter.resume(path, CHUNK, format) as writer:
        writer.write(images[CHUNK:])
    assert (read(path) - images.permute(0, 3, 1, 2) / 255).abs().mean() < 0.06


def test_images_that_do_not_fit_the_video_are_refused(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", FORMAT) as writer:
        with pytest.raises(ValueError, match=r"takes uint8 \[T, 64, 64, 3\]"):
            writer.write(torch.zeros(1, SIZE, SIZE, 3))
        with pytest.raises(ValueError, match=r"\[1, 64, 32, 3\]"):
            writer.write(torch.zeros(1, SIZE, 32, 3, dtype=torch.uint8))
        with pytest.raises(ValueError, match="no image"):
            writer.write(torch.zeros(0, SIZE, SIZE, 3, dtype=torch.uint8))
    assert not (tmp_path / "a.mp4").exists()


def test_a_missing_folder_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder does not exist"):
        VideoWriter(tmp_path / "no" / "a.mp4", FORMAT)


def save_picture(path: Path, image: Tensor, codec: str = "png") -> None:
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream(codec, rate=1)
        stream.height, stream.width = image.shape[:2]
        stream.pix_fmt = "rgb24" if codec == "png" else "yuvj444p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")))
        container.mux(stream.encode(None))


def test_a_picture_of_the_wanted_size_is_read_exactly(tmp_path: Path) -> None:
    image = make_images(1)[0]
    save_picture(tmp_path / "a.png", image)
    seen = read_images(tmp_path / "a.png", width=SIZE, height=SIZE)
    assert seen.shape == (1, 1, 3, SIZE, SIZE)
    assert torch.equal(seen[0, 0], image.permute(2, 0, 1) / 255)
    save_picture(tmp_path / "a.jpg", image, "mjpeg")
    assert (read(tmp_path / "a.jpg") - seen[0]).abs().mean() < 0.05


@pytest.mark.parametrize(("height", "width"), [(64, 128), (128, 64), (33, 70), (100, 41)])
def test_other_shapes_cover_the_picture_and_keep_its_centre(
    tmp_path: Path, height: int, width: int
) -> None:
    rows, columns = torch.linspace(0, 1, height), torch.linspace(0, 1, width)
    ramp = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
    image = torch.cat([ramp, torch.zeros(height, width, 1)], -1)
    save_picture(tmp_path / "a.png", (image * 255).round().to(torch.uint8))
    seen = read_images(tmp_path / "a.png", width=32, height=48)[0, 0]
    scale = max(48 / height, 32 / width)
    assert torch.allclose(seen[:2].mean((1, 2)), torch.tensor([0.5, 0.5]), atol=0.02)
    spans = seen[0, -1, 0] - seen[0, 0, 0], seen[1, 0, -1] - seen[1, 0, 0]
    assert torch.allclose(
        torch.stack(spans), torch.tensor([48 / height / scale, 32 / width / scale]), atol=0.05
    )
    assert seen.min() >= 0 and seen.max() <= 1


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("number", range(1, 9))
def test_a_photo_is_turned_and_mirrored_upright(tmp_path: Path, kind: str, number: int) -> None:
    pil = pytest.importorskip("PIL.Image")
    ops = pytest.importorskip("PIL.ImageOps")
    pixels = torch.zeros(32, 64, 3, dtype=torch.uint8)
    pixels[:16, :32, 0], pixels[:16, 32:, 1], pixels[16:, :32, 2] = 255, 255, 255
    exif = pil.Exif()
    exif[0x0112] = number
    exact = {"jpg": {"quality": 95}, "webp": {"lossless": True}}.get(kind, {})
    photo, path = pil.fromarray(pixels.numpy()), tmp_path / f"a.{kind}"
    photo.save(path, exif=exif, **exact)
    upright = torch.from_numpy(np.array(ops.exif_transpose(pil.open(path)).convert("RGB")))
    height, width = upright.shape[:2]
    seen = read_images(path, width=width, height=height)[0, 0]
    apart = (seen - upright.permute(2, 0, 1) / 255).abs()
    assert apart.mean() < (0.02 if kind == "jpg" else 1e-6)


def test_an_exif_that_is_cut_off_turns_nothing(tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    exif = pil.Exif()
    exif[0x0112] = 6
    pil.new("RGB", (8, 8)).save(tmp_path / "a.png", exif=exif)
    data = (tmp_path / "a.png").read_bytes()
    assert orientation.exif_turn(tmp_path / "a.png") == (-1, False)
    for length in range(12, data.index(b"eXIf") + 20):
        (tmp_path / "a.png").write_bytes(data[:length])
        assert orientation.exif_turn(tmp_path / "a.png") is None


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "tRNS", "GIF", "WEBP", "lossy"])
def test_what_is_transparent_becomes_white_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    pil = pytest.importorskip("PIL.Image")
    pixels = np.zeros((SIZE, SIZE, 4), np.uint8)
    pixels[..., 0], pixels[:32, :, 3], pixels[32:, 32:, 3] = 200, 255, 128
    image, path = pil.fromarray(pixels), tmp_path / "a.png"
    red, half = (200, 0, 0), (227, 127, 127)
    if mode == "P":
        image.quantize(16).save(path)
    elif mode == "LA":
        image.convert("LA").save(path)
        red, half = (60,) * 3, (157,) * 3
    elif mode == "tRNS":  # one colour stands for nothing
        pixels[32:, :, :3] = 7
        pil.fromarray(pixels[..., :3]).save(path, transparency=(7, 7, 7))
        half = (255,) * 3
    elif mode == "GIF":
        image.save(path := tmp_path / "a.gif")
        half = red
    elif mode == "RGBA":
        image.save(path)
    else:
        image.save(path := tmp_path / "a.webp", lossless=mode == "WEBP")
    seen = (read(path)[0] * 255).round()
    for place, colour in (((8, 8), red), ((56, 8), (255,) * 3), ((56, 56), half)):
        assert (seen[:, place[0], place[1]] - torch.tensor(colour)).abs().max() <= 2, place
    check_images(path)
    assert f"{path} is transparent in parts, which become white" in caplog.text


def test_an_opaque_picture_with_alpha_is_read_exactly_and_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pil = pytest.importorskip("PIL.Image")
    image = make_images(1)[0]
    pil.fromarray(image.numpy()).convert("RGBA").save(tmp_path / "a.png")
    assert torch.equal(read(tmp_path / "a.png")[0], image.permute(2, 0, 1) / 255)
    check_images(tmp_path / "a.png")
    assert not caplog.text


def test_an_animated_gif_is_a_clip(tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    frames = [pil.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read(tmp_path / "a.gif").mean((2, 3)).argmax(1).tolist() == [0, 1, 2]


NAMES = ["take:1", "http:x", "file:x", "pipe:", "concat:a|b", "-x", "%03d", "a*?{b}", "a#b&c", "圆"]


@pytest.mark.skipif(sys.platform == "win32", reason="names that Windows does not allow")
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_name_and_no_protocol_or_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    images, path = make_images(2 * CHUNK), Path(f"{name}.mp4")
    write(path, images[:CHUNK])
    with VideoWriter.resume(path, CHUNK, FORMAT) as writer:
        writer.write(images[CHUNK:])
    remux(path, {"title": "t"})
    assert read_metadata(path) == {"title": "t"}
    write(Path("plain.mp4"), images)
    assert torch.equal(read(path), read(Path("plain.mp4")))
    save_picture(tmp_path / "001.png", images[1])  # what %03d would find
    (tmp_path / "001.png").rename(other := tmp_path / "kept")
    save_picture(tmp_path / "one.png", images[0])
    (tmp_path / "one.png").rename(picture := Path(f"{name}.png"))
    other.rename(tmp_path / "001.png")
    assert torch.equal(read(picture)[0], images[0].permute(2, 0, 1) / 255)
    assert not list(tmp_path.glob("*.part"))


def test_the_first_or_last_images_of_a_clip_are_taken(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", make_images(2 * CHUNK))
    whole = read(tmp_path / "a.mp4")
    options = {"width": SIZE, "height": SIZE, "num_images": 9}
    assert torch.equal(read_images(tmp_path / "a.mp4", **options)[0], whole[:9])
    assert torch.equal(read_images(tmp_path / "a.mp4", **options, last=True)[0], whole[-9:])
    options["num_images"] = 25
    assert torch.equal(read_images(tmp_path / "a.mp4", **options)[0], whole)


@pytest.mark.parametrize("last", [False, True])
def test_reading_keeps_no_more_images_than_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    write(tmp_path / "a.mp4", make_images(4 * CHUNK))
    alive: set[int] = set()
    most = 0

    def track(frame: object) -> Tensor:
        nonlocal most
        image = torch.zeros(SIZE, SIZE, 3, dtype=torch.uint8)
        alive.add(id(image))
        weakref.finalize(image, alive.discard, id(image))
        most = max(most, len(alive))
        return image

    monkeypatch.setattr(video, "pixels_of", track)
    read_images(tmp_path / "a.mp4", width=SIZE, height=SIZE, num_images=3, last=last)
    assert most <= 4


def test_files_without_a_picture_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "notes.txt").write_text("a panda walks\n" * 50)
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    write(tmp_path / "a.mp4", make_images(1))
    (tmp_path / "header.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:400])
    (tmp_path / "list.txt").write_text("ffconcat version 1.0\nfile a.mp4\n")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n")
    (tmp_path / "text.png").write_text("a panda walks\n")
    names = ("empty.mp4", "notes.txt", "noise.mp4", "header.mp4", "list.txt", "list.m3u8")
    for name in (*names, "text.png"):
        for read_it in (partial(read_images, width=SIZE, height=SIZE), check_images):
            with pytest.raises(ValueError, match=name):
                read_it(tmp_path / name)
    for name in ("none.mp4", "."):
        with pytest.raises(ValueError, match="not a file"):
            read_images(tmp_path / name, width=SIZE, height=SIZE)


def test_a_file_of_sound_alone_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match=r"a\.wav holds no picture or video"):
        check_images(tmp_path / "a.wav")


@pytest.mark.parametrize("kind", ["a.jpg", "a.png", "a.webp", "p.jpg", "a.bmp", "animated.webp"])
def test_a_damaged_picture_or_one_that_ffmpeg_does_not_read_is_refused_by_name(
    tmp_path: Path, kind: str
) -> None:
    pil = pytest.importorskip("PIL.Image")
    noise = torch.randint(0, 256, (2, SIZE, SIZE, 3), dtype=torch.uint8).numpy()
    first, second = map(pil.fromarray, noise)
    more = {"save_all": True, "append_images": [second]} if kind == "animated.webp" else {}
    more |= {"progressive": True} if kind == "p.jpg" else {}
    first.save(tmp_path / kind, **more)
    if kind != "animated.webp":
        check_images(tmp_path / kind)
        data = (tmp_path / kind).read_bytes()
        (tmp_path / kind).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"{kind} cannot be decoded"):
        check_images(tmp_path / kind)


def test_to_uint8_rounds_to_the_nearest_and_clips() -> None:
    levels = torch.arange(256)
    for dither in (-0.49, 0.0, 0.49):
        images = ((levels + dither) / 255).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
        assert torch.equal(to_uint8(images)[1, :, :, 2].flatten(), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([-1.0, 0.0, 2.0]).reshape(3, 1, 1)).tolist() == [[[0, 0, 255]]]


def test_to_uint8_undoes_reading(tmp_path: Path) -> None:
    image = make_images(1)[0]
    save_picture(tmp_path / "a.png", image)
    assert torch.equal(to_uint8(read(tmp_path / "a.png"))[0], image)


def test_a_disk_that_fails_a_sync_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with VideoWriter(tmp_path / "a.mp4", FORMAT) as writer:
        writer.sync()  # of nothing yet
        writer.write(make_images(CHUNK))
        writer.sync()

        def fails(number: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fsync", fails)
        with pytest.raises(WriteError, match=r"a\.mp4 could not be brought to the disk \(Input"):
            writer.sync()
