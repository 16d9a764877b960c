"""A video file as the guides of a stream, chunk by chunk, and what follows its end."""

from __future__ import annotations

import io
import queue
import struct
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from rf_core.decoders.codec import VAEState
from rf_core.decoders.decoder import TAEHVDecoder, WanDecoder
from rf_core.decoders.taehv import TAEHV, TAEHVConfig
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.source import AtEnd, BatchSource, ClipSource, batch_reader
from rf_core.source_input import CameraReader, SourceOptions, open_reader
from rf_core.video import (
    FITS,
    VideoFormat,
    VideoWriter,
    images_at_rate,
    length_at_rate,
    read_images,
    to_uint8,
)

SIDE = 64
BOTH = pytest.mark.parametrize("kind", ["wan", "taehv"])


class Means:
    """Encodes a latent frame as the mean of its images: one at the start, then four."""

    source_memory_images = 6

    def __init__(self) -> None:
        self.encoded = 0

    def source_images_of(self, latent_frames: int, first: bool) -> int:
        return 4 * latent_frames - 3 * first

    def encode_chunk(self, images: Tensor, state: VAEState | None) -> tuple[Tensor, VAEState]:
        first, self.encoded = (1 if state is None else 4), self.encoded + images.shape[1]
        parts = [images[:, :first], *images[:, first:].split(4, dim=1)]
        means = torch.stack([part.mean(dim=(1, 2, 3, 4)) for part in parts if part.shape[1]], dim=1)
        return means[:, None, :, None, None], VAEState({}, self.encoded)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of some images, each a little lighter than the one before."""
    folder = tmp_path_factory.mktemp("clips")
    for num_images in (5, 9, 22, 24):
        levels = torch.arange(num_images) / 25
        images = levels[None, :, None, None, None].expand(1, -1, 3, SIDE, SIDE)
        with VideoWriter(folder / f"{num_images}.mp4", VideoFormat(width=SIDE, height=SIDE)) as out:
            out.write(to_uint8(images[0]))
    return folder


def source(clips: Path, num_images: int, at_end: AtEnd = "stop") -> ClipSource:
    return ClipSource(clips / f"{num_images}.mp4", Means(), height=SIDE, width=SIDE, at_end=at_end)


def given(clip: ClipSource, frames: int) -> Tensor | None:
    """The next latents, as for the chunks of one stream."""
    return clip.latents(frames, first=clip._encoder.encoded == 0)


def numbers(latents: Tensor | None) -> list[float]:
    """Which image of the clip each latent frame is of, or the mean of which."""
    assert latents is not None
    return [round(mean * 25 * 2) / 2 for mean in latents.flatten().tolist()]


def test_chunks_are_the_clip_encoded_whole(clips: Path) -> None:
    torch.manual_seed(0)
    decoder = WanDecoder(WanVAE(VAEConfig(dim=2, num_res_blocks=1)).eval())
    with torch.no_grad():
        whole = decoder.encode(read_images(clips / "22.mp4", height=SIDE, width=SIDE)[:, :21])
    with ClipSource(clips / "22.mp4", decoder, height=SIDE, width=SIDE) as clip:
        parts = [clip.latents(frames, first=i == 0) for i, frames in enumerate((3, 1, 2))]
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, atol=1e-5, rtol=1e-4)


def test_a_source_that_stops_gives_its_whole_chunks_and_says_what_follows(clips, caplog) -> None:
    clip = source(clips, 22)
    assert numbers(given(clip, 3)) == [0, 2.5, 6.5]
    assert numbers(given(clip, 3)) == [10.5, 14.5, 18.5]
    assert not caplog.messages
    assert given(clip, 3) is None
    assert given(clip, 3) is None
    (said,) = caplog.messages
    assert "22.mp4 ends after 22 images at 16 a second; what fills no chunk is left out" in said


def test_a_source_that_holds_repeats_its_last_image_without_encoding_it_for_ever(clips, caplog):
    clip = source(clips, 22, "hold")
    given(clip, 3), given(clip, 3)
    assert numbers(given(clip, 3)) == [21, 21, 21]
    for _ in range(5):
        held = given(clip, 3)
        assert numbers(held) == [21, 21, 21]
    assert clip._encoder.encoded == 9 + 3 * 12
    (said,) = caplog.messages
    assert said.endswith("its last image is held")


def test_a_held_chunk_of_another_length_is_given_too(clips: Path) -> None:
    clip = source(clips, 9, "hold")
    assert numbers(given(clip, 3)) == [0, 2.5, 6.5]
    assert [numbers(given(clip, frames)) for frames in (3, 3, 1)] == [[8] * 3, [8] * 3, [8]]


def test_a_source_that_loops_begins_again_within_a_chunk(clips: Path, caplog) -> None:
    clip = source(clips, 24, "loop")
    given(clip, 3), given(clip, 3)
    assert numbers(given(clip, 3)) == [(21 + 22 + 23 + 0) / 4, 2.5, 6.5]
    for _ in range(6):
        assert given(clip, 3) is not None
    (said,) = caplog.messages
    assert said.endswith("it begins again")


def test_a_clip_shorter_than_a_chunk_is_refused_unless_it_goes_on(clips: Path) -> None:
    with pytest.raises(ValueError, match="has 5 images at the stream's rate, and its first chunk"):
        given(source(clips, 5), 3)
    assert numbers(given(source(clips, 5, "hold"), 3)) == [0, 2.5, 4]
    assert numbers(given(source(clips, 5, "loop"), 3)) == [0, 2.5, 1.5]


def test_what_is_no_clip_or_no_end_is_refused_before_it_is_read(clips: Path, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"none\.mp4"):
        ClipSource(tmp_path / "none.mp4", Means(), height=SIDE, width=SIDE)
    with pytest.raises(ValueError, match="at_end is 'bounce'; use one of stop, hold, loop"):
        source(clips, 9, "bounce")


def tiny_decoder(kind: str) -> WanDecoder | TAEHVDecoder:
    torch.manual_seed(0)
    if kind == "wan":
        return WanDecoder(WanVAE(VAEConfig(dim=2, num_res_blocks=1)).eval())
    return TAEHVDecoder(TAEHV(TAEHVConfig(encoder_width=16, decoder_widths=(4,) * 4)).eval())


def pictures(count: int) -> Tensor:
    """Images [T, H, W, 3] of which no two are alike."""
    return torch.rand(count, 16, 16, 3, generator=torch.Generator().manual_seed(1))


@BOTH
@torch.no_grad()
def test_an_encoder_forgets_what_is_past_its_memory_and_no_image_sooner(kind: str) -> None:
    decoder = tiny_decoder(kind)
    memory, chunks = decoder.source_memory_images, 40
    whole = pictures(4 * chunks + 1).movedim(-1, 1).unsqueeze(0)

    def latents_after(changed: int) -> Tensor:
        """Those of the last image, where an image so many before it is another."""
        images = whole.clone()
        images[:, 4 * chunks - changed] = 1 - images[:, 4 * chunks - changed]
        first = images[:, :1].expand(-1, decoder.source_images_of(1, first=True), -1, -1, -1)
        _, state = decoder.encode_chunk(first, None)
        return decoder.encode_chunk(images[:, 1:], state)[0][:, :, -1]

    assert torch.equal(latents_after(memory + 4), latents_after(memory + 5))
    assert any(
        not torch.equal(latents_after(n), latents_after(memory + 5))
        for n in range(memory, memory + 4)
    )


@BOTH
@pytest.mark.parametrize("at_end", ["stop", "hold", "loop"])
def test_a_source_that_seeks_goes_on_to_the_bit_as_one_that_never_left(kind, at_end) -> None:
    decoder = tiny_decoder(kind)

    def begun() -> BatchSource:
        return BatchSource(pictures(150), decoder, height=16, width=16, at_end=at_end)

    first, cut = begun(), 9 + 12 * 11  # a cut after so many chunks begins a stream of its own
    expected, starts = (
        {},
        [0, *(9 + 12 * n for n in range(12)), *(cut + 9 + 12 * n for n in range(9))],
    )
    for start in starts:
        expected[start] = first.latents(3, first=start in (0, cut)), first.motion
    for start in (cut, 9, 69, cut + 9, 129, starts[-1], 0, 21):
        source = begun()
        for again in (source, first):
            again.seek(start, since=cut if start >= cut else 0)
            latents, motion = again.latents(3, first=start in (0, cut)), again.motion
            wanted, moved = expected[start]
            assert (latents is None) == (wanted is None), start
            if wanted is not None:
                assert torch.equal(latents, wanted), start
                assert motion == moved, start


@BOTH
@torch.no_grad()
def test_what_is_encoded_decodes_to_its_own_place_in_time(kind: str) -> None:
    decoder, images = tiny_decoder(kind), pictures(21)
    whole, asked = BatchSource(images, decoder, height=16, width=16), []
    encode = decoder.encode_chunk

    def noted(part: Tensor, state: VAEState | None) -> tuple[Tensor, VAEState]:
        asked.append(part[0])
        return encode(part, state)

    decoder.encode_chunk = noted
    for frames in (3, 3):
        whole.latents(frames, first=not asked)
    read, skipped = torch.cat(asked).movedim(1, -1), decoder.source_images_of(1, first=True) - 1
    assert torch.equal(read[:skipped], images[:1].expand(skipped, -1, -1, -1))
    assert torch.equal(read[skipped:], images)  # as many as the latents decode to


@BOTH
def test_a_picture_that_is_held_is_encoded_no_more_once_nothing_else_is_remembered(kind) -> None:
    decoder, encode, asked = tiny_decoder(kind), None, []
    encode = decoder.encode_chunk
    decoder.encode_chunk = lambda part, state: asked.append(0) or encode(part, state)
    still = BatchSource(pictures(1), decoder, height=16, width=16)
    found = [still.latents(3, first=n == 0) for n in range(20)]
    needed = 1 + -(-decoder.source_memory_images // 12) + 2
    assert len(asked) <= needed
    assert all(torch.equal(each, found[-1]) for each in found[needed:])


def written(path: Path, images: Tensor, **options: Any) -> Path:
    """Images [T, H, W, 3] uint8 as a video; `options` are of its stream, and `times` in ms."""
    times = options.pop("times", None)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(options.pop("codec", "libx264"), rate=options.pop("rate", 16))
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = options.pop("pix_fmt", "yuv444p")
        stream.options = {"crf": "0", "preset": "fast", **options}
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, image in enumerate(images.numpy()):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = round(number * 62.5) if times is None else times[number]
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def greys(count: int, height: int = 16, width: int = 16) -> Tensor:
    """Images of which number n is of grey 5 n."""
    levels = (5 * torch.arange(count)).to(torch.uint8)
    return levels[:, None, None, None].expand(-1, height, width, 3).contiguous()


def shown(path: Path, start: int = 0, fps: int = 16, **options: Any) -> list[int]:
    """The numbers of the greys that a file shows."""
    given = {"height": 16, "width": 16, **options}
    return [
        round(float(image.mean()) * 255 / 5)
        for image in images_at_rate(path, fps=fps, start=start, **given)
    ]


def test_a_clip_of_another_rate_is_sought_to_the_very_image(tmp_path: Path) -> None:
    b_frames = {"g": "20", "bf": "3"}
    files = [
        written(tmp_path / "a.mp4", greys(50), **b_frames),
        written(tmp_path / "b.mkv", greys(50), **b_frames),
        written(tmp_path / "c.ts", greys(50), **b_frames),
        written(tmp_path / "d.mp4", greys(50), times=[round(n * 41.7) for n in range(50)]),
        written(tmp_path / "e.mp4", greys(50), times=[40 * n + 1500 * (n > 20) for n in range(50)]),
        written(tmp_path / "f.avi", greys(50), codec="mjpeg", pix_fmt="yuvj444p"),
    ]
    for file in files:
        for fps in (16, 24):
            whole = shown(file, fps=fps)
            assert whole[0] == 0 and whole[-1] == 49, file
            assert length_at_rate(file, fps) == len(whole), file
            for start in (1, 7, 21, len(whole) - 1, len(whole), len(whole) + 30):
                assert shown(file, start, fps) == whole[start:], (file, fps, start)


def test_a_clip_whose_rate_changes_is_shown_by_its_times(tmp_path: Path) -> None:
    times = [0, 60, 120, 620, 640, 700]  # one image stands for half a second
    file = written(tmp_path / "a.mkv", greys(6), times=times)
    assert shown(file) == [0, 1, *[2] * 8, 3, 4, 5]
    assert length_at_rate(file, 16) == 13


def test_ten_bits_odd_sides_and_alpha_are_read(tmp_path: Path) -> None:
    deep = written(tmp_path / "deep.mkv", greys(4), codec="ffv1", pix_fmt="yuv444p10le")
    assert shown(deep) == [0, 1, 2, 3]
    odd = written(tmp_path / "odd.mkv", greys(4, 15, 21), codec="ffv1", pix_fmt="bgr0")
    assert shown(odd) == [0, 1, 2, 3]
    assert shown(odd, fit="letterbox") != [0, 1, 2, 3]
    clear = tmp_path / "clear.mkv"
    with av.open(str(clear), "w") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "bgra"
        image = np.zeros((16, 16, 4), dtype=np.uint8)
        frame = av.VideoFrame.from_ndarray(image, format="bgra")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert [float(each.min()) for each in images_at_rate(clear, height=16, width=16, fps=16)] == [1]


def test_a_portrait_that_is_held_sideways_is_upright(tmp_path: Path) -> None:
    image = torch.zeros(3, 16, 32, 3, dtype=torch.uint8)
    image[:, :, 16:] = 255  # white on its right, which is up once it is turned
    flat = written(tmp_path / "flat.mp4", image)
    turned = tmp_path / "turned.mp4"
    data = bytearray(flat.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: the matrix lies 40 bytes behind
    data[at : at + 36] = struct.pack(">9i", 0, -65536, 0, 65536, 0, 0, 0, 16 * 65536, 2**30)
    turned.write_bytes(data)
    upright = torch.stack(list(images_at_rate(turned, height=32, width=16, fps=16)))
    top, bottom = upright[:, :, :14].mean(), upright[:, :, 18:].mean()
    assert {round(float(top)), round(float(bottom))} == {0, 1}
    again = torch.stack(list(images_at_rate(turned, height=32, width=16, fps=16, start=1)))
    assert torch.equal(again, upright[1:])


def test_a_letterboxed_image_is_whole_with_black_beside_it() -> None:
    wide = torch.ones(16, 32, 3)
    boxed = FITS["letterbox"](wide, 32, 32)
    assert boxed.shape == (3, 32, 32)
    assert boxed[:, 8:24].min() > 0.99 and boxed[:, :8].max() == boxed[:, 24:].max() == 0
    assert FITS["crop"](wide, 32, 32).min() > 0.99


def test_images_in_memory_of_another_shape_are_refused() -> None:
    for shape in ((4, 16, 16), (0, 16, 16, 3), (4, 16, 16, 2)):
        with pytest.raises(ValueError, match=r"they must be \[images, height, width, 3\]"):
            BatchSource(torch.zeros(shape), Means(), height=16, width=16)
    clear = torch.zeros(1, 16, 16, 4)
    seen = batch_reader(clear, height=16, width=16).take(1)
    assert seen.min() == 1
    with pytest.raises(ValueError, match="fit is 'stretch'; use one of crop, letterbox"):
        BatchSource(pictures(3), Means(), height=16, width=16, fit="stretch")


def test_a_file_in_memory_is_read_as_one_on_disk(tmp_path: Path) -> None:
    file = written(tmp_path / "a.mp4", greys(30), g="8")
    memory = io.BytesIO(file.read_bytes())
    assert shown(memory) == shown(file) and shown(memory, 20) == shown(file, 20)


class Camera:
    """Stands for a camera: shows what it is given, at the times of its own clock."""

    def __init__(self) -> None:
        self.waiting: queue.Queue[tuple[int, int] | None] = queue.Queue()
        self.now = 0.0
        self.number = -1

    def __call__(self) -> Iterator[int]:
        while (given := self.waiting.get()) is not None:
            self.number, at = given
            self.now = at / 16 + 1e-4
            yield self.number
            self.waiting.task_done()

    def show(self, numbers: range, every: int = 1) -> None:
        """Show these, each so many sixteenths of a second after the one before."""
        for number in numbers:
            self.waiting.put((number, number * every))
        self.waiting.join()


def camera_reader(camera: Camera) -> CameraReader:
    def image(number: int) -> Tensor:
        return torch.full((3, 2, 2), float(number))

    given = {"fps": 16, "patience": 0.3, "clock": lambda: camera.now}
    return CameraReader("v4l2:/dev/video0", camera, image, **given)


def seen(reader: CameraReader, count: int) -> list[int]:
    return [int(image[0, 0, 0]) for image in reader.take(count)]


def test_of_a_camera_the_newest_images_are_taken_and_none_twice() -> None:
    camera = Camera()
    threading.Thread(target=camera.show, args=(range(30),)).start()
    reader = camera_reader(camera)
    camera.waiting.join()
    assert seen(reader, 9) == list(range(21, 30))
    threading.Thread(target=camera.show, args=(range(30, 42),)).start()
    assert seen(reader, 12) == list(range(30, 42))  # it was waited for


def test_a_camera_that_gives_nothing_holds_its_last_image_and_says_so_and_when_it_is_back(
    caplog,
) -> None:
    camera = Camera()
    threading.Thread(target=camera.show, args=(range(4),)).start()
    reader = camera_reader(camera)
    camera.waiting.join()
    assert seen(reader, 4) == [0, 1, 2, 3]
    assert seen(reader, 3) == seen(reader, 3) == [3, 3, 3]
    assert [each for each in caplog.messages if "its last one is held" in each] == caplog.messages
    assert len(caplog.messages) == 1
    camera.show(range(4, 8))
    assert seen(reader, 4) == [4, 5, 6, 7]
    assert caplog.messages[1:] == ["the camera v4l2:/dev/video0 is back"]
    camera.waiting.put(None)
    assert seen(reader, 2) == [7, 7]


def test_a_slow_camera_shows_an_image_as_long_as_it_stands() -> None:
    camera = Camera()
    threading.Thread(target=camera.show, args=(range(6), 2)).start()
    reader = camera_reader(camera)
    camera.waiting.join()
    assert seen(reader, 6) == [2, 3, 3, 4, 4, 5]


def test_a_camera_that_is_not_there_is_refused_in_a_sentence() -> None:
    options = SourceOptions(place="v4l2:/dev/video-none")
    with pytest.raises(ValueError, match="the camera v4l2:/dev/video-none cannot be read"):
        open_reader(options, height=16, width=16, fps=16)
