"""Video files: an MP4 that grows while it is made, and pictures and clips read as tensors.

Each chunk of images is encoded by a fresh encoder into one closed group of pictures and appended
as one MP4 fragment. Whatever is on disk therefore plays, also after a kill, and a file resumed
after any chunk holds exactly the images of one that was never stopped. Nothing but the chunk at
hand is kept in memory.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .config import FPS
from .orientation import exif_turn, upright
from .ranges import LARGEST_PICTURE
from .writing import WriteError, whole_file

_log = logging.getLogger(__name__)
_BT709 = 1  # the number of BT.709 as matrix, primaries and transfer (ITU-T H.273, tables 2 to 4)
_BT601 = 5
_LIMITED_RANGE = 1  # luma from 16 to 235, what players expect
_CODECS = ("libx264", "libopenh264", "h264_videotoolbox", "h264_mf", "h264_nvenc", "mpeg4")
# A name is one file's: no pattern of many, and nothing in a file names another over a network.
_ONE_FILE = {"pattern_type": "none", "protocol_whitelist": "file"}
_NO_PICTURES = ("tty", "concat")  # FFmpeg "plays" any text, and a list of other files
_JPEG_BEGINS, _JPEG_ENDS = b"\xff\xd8", b"\xff\xd9"
_PAPER = 255  # what shows through a transparent picture: white
# Containers add these to what they report; they are no metadata of ours to copy.
_CONTAINER_KEYS = ("major_brand", "minor_version", "compatible_brands", "encoder")
Fit = Literal["crop", "letterbox"]
"""How a picture of another shape is fitted, never stretched: scaled to cover and cropped to its
centre, or scaled to lie within, with black beside it."""
Clip = Path | IO[bytes]
"""A file, one in memory, or a pipe that is read as it comes."""
RUN = "rf_run"
"""Name under which a video's metadata, and its snapshot's facts, say which run made it."""


@dataclass(frozen=True, kw_only=True)
class VideoFormat:
    """How images become a video stream."""

    width: int
    """Columns of an image, in pixels; even, since colour is stored at half resolution."""
    height: int
    """Rows of an image, in pixels; even."""
    fps: int = FPS
    """Images a second."""
    crf: int = 18
    """Quality of libx264: 0 is lossless, 18 looks lossless, 51 is the worst."""
    codec: str = "libx264"
    """Encoder, by FFmpeg's name. Others than libx264 get a generous bit rate instead of crf."""

    def __post_init__(self) -> None:
        if self.width < 2 or self.height < 2 or self.width % 2 or self.height % 2:
            raise ValueError(
                f"a video of {self.width}x{self.height} pixels cannot be written: width and height "
                "must be even, as colour is stored at half resolution; choose multiples of 16"
            )
        if self.fps < 1:
            raise ValueError(f"fps is {self.fps}; a video needs at least 1 image a second")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf is {self.crf}; it lies between 0 (lossless) and 51 (worst)")
        _check_codec(self.codec)


class VideoWriter:
    """Writes an MP4 chunk by chunk; after each `write` the file on disk plays to its end.

    The file is created by the first `write`, over one of the same name.

    Args:
        path: the MP4 to write; its folder must exist.
        format: size, rate and quality.
        metadata: names and texts stored in the file, such as `title` and `comment`.
        companions: files that belong to the one of the same name; they go right before it does.

    Raises:
        ValueError: the folder does not exist, or the encoder does not start.
    """

    def __init__(
        self,
        path: str | Path,
        format: VideoFormat,
        metadata: Mapping[str, str] | None = None,
        companions: Sequence[Path] = (),
    ) -> None:
        self._path = Path(path)
        if not self._path.absolute().parent.is_dir():
            raise ValueError(f"{path} cannot be written: its folder does not exist; create it")
        _black_fragment(format)
        self._format = format
        self._metadata = dict(metadata or {})
        self._companions = companions
        self._num_images = 0
        self._file: io.FileIO | None = None

    @classmethod
    def resume(
        cls,
        path: str | Path,
        num_images: int,
        format: VideoFormat,
        metadata: Mapping[str, str] | None = None,
    ) -> VideoWriter:
        """A writer that goes on after the first `num_images` images of an existing file.

        The file may have been cut off by a kill, hold more images (they are dropped), or have
        been through `remux`. It is replaced at once, so a crash in here leaves it as it was.
        `metadata` replaces what the file carries; None keeps it.

        Raises:
            ValueError: no such file, too few images in it, or it has another format.
        """
        writer = cls(path, format)
        _check_continues(writer._path, num_images, format)
        _copy_stream(writer._path, num_images=num_images, fragmented=True, metadata=metadata)
        writer._num_images = num_images
        writer._file = writer._path.open("ab", buffering=0)
        return writer

    @classmethod
    def continuing(
        cls,
        source: str | Path,
        path: str | Path,
        num_images: int,
        format: VideoFormat,
        metadata: Mapping[str, str] | None = None,
    ) -> VideoWriter:
        """A writer of a new file, which begins with the first images of another, not encoded again.

        Raises:
            ValueError: as `resume` does; a copy of `source` is left.
            OSError: it cannot be copied.
        """
        shutil.copyfile(source, path)
        return cls.resume(path, num_images, format, metadata)

    @property
    def num_images(self) -> int:
        """Images in the file so far."""
        return self._num_images

    def write(self, images: Tensor) -> bytes:
        """Append one chunk, uint8 [T, H, W, 3]; when this returns, the file plays to its end.

        Returns:
            bytes: the chunk as it is appended, an MP4 fragment without the file's header.

        Raises:
            ValueError: the images have another size or type than the video.
            WriteError: the disk is full; the file is what it was before.
        """
        expected = (self._format.height, self._format.width, 3)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}; this video takes uint8 "
                f"[T, {expected[0]}, {expected[1]}, 3] (see to_uint8)"
            )
        if not len(images):
            raise ValueError("images holds no image; a chunk has at least 1")
        data = _fragment(images, self._num_images, self._format, self._metadata)
        fragment = data[_header_length(data) :]
        if self._file is None:
            self._begin(data)
        else:
            self._append(fragment)
        self._num_images += len(images)
        return fragment

    def _begin(self, data: bytes) -> None:
        with whole_file(self._path) as part:
            part.write_bytes(data)
            for each in self._companions:
                each.unlink(missing_ok=True)
        self._file = self._path.open("ab", buffering=0)

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        whole, rest = self._file.seek(0, io.SEEK_END), memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise WriteError(
                f"{self._path} could not be written further ({error.strerror}); what was made "
                "before is in it and plays; make room to go on"
            ) from error
        finally:
            if rest:
                self._file.truncate(whole)  # half a fragment would be in the next one's way

    def sync(self) -> None:
        """Wait until all that was written is on the disk, and outlives a power cut.

        Raises:
            WriteError: it is not, and what becomes of it is unknown.
        """
        if self._file is None:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise WriteError(
                f"{self._path} could not be brought to the disk ({error.strerror}); see to the "
                "disk, and go on from what plays"
            ) from error

    def close(self) -> None:
        """Close the file; more than once does no harm."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def remux(path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Rewrite a closed MP4 with its index in front, as editors and web pages like it.

    `metadata` replaces what the file carries; None keeps it.

    The encoded images are copied, not encoded again; `VideoWriter.resume` reads the result too.
    The file is replaced at once when the new one is complete. Takes about a second an hour of
    video.

    Raises:
        ValueError: no such file, or not a video.
    """
    _copy_stream(Path(path), num_images=None, fragmented=False, metadata=metadata)


def read_images(
    path: str | Path, *, width: int, height: int, num_images: int | None = None, last: bool = False
) -> Tensor:
    """A picture or a clip, scaled to cover `width` x `height` pixels and cropped to its centre.

    A photo is turned and mirrored as its EXIF says; what is transparent becomes white.

    Args:
        path: a picture (PNG, JPEG, WebP ...) or a video, in any format FFmpeg reads.
        width: columns wanted.
        height: rows wanted.
        num_images: the most images to take, as they come, whatever the clip's rate; all if None.
        last: take the last images instead of the first.

    Returns:
        Tensor: float32 [1, T, 3, height, width] in [0, 1].

    Raises:
        ValueError: no such file, or no images in it.
    """
    covered = partial(_cover, width=width, height=height)
    if last:  # not all are scaled, unless they are too large to wait for it
        few = (covered(f) if _is_large(f) else f for f in _decode(Path(path)))
        images = [
            image if image.is_floating_point() else covered(image)
            for image in deque(few, maxlen=num_images)
        ]
    else:
        images = list(map(covered, islice(_decode(Path(path)), num_images)))
    if not images:
        raise ValueError(f"{path} holds no images; give a picture or a clip")
    return torch.stack(images).unsqueeze(0)


def read_jpeg(data: bytes, *, width: int, height: int, most_pixels: int) -> Tensor:
    """The image of a JPEG in memory, uint8 [height, width, 3], scaled and cropped as `read_images`.

    ValueError, in a sentence, for bytes that are no whole JPEG, and for more pixels than that.
    """
    import av

    if not (data.startswith(_JPEG_BEGINS) and data.endswith(_JPEG_ENDS)):
        raise ValueError(f"{len(data)} bytes came that are no whole JPEG; send images as JPEG")
    context = av.CodecContext.create("mjpeg", "r")
    context.thread_count = 1
    context.options = {"err_detect": "explode", "max_pixels": str(most_pixels)}
    try:
        (frame,) = context.decode(av.Packet(data))
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(
            f"a JPEG of {len(data)} bytes cannot be decoded: it is damaged, or has more than "
            f"{most_pixels} pixels; send a smaller image, or a sound one"
        ) from error
    return to_uint8(_cover(pixels_of(frame), width, height))


_SAME_TIME = 1e-3  # seconds; containers round times


def images_at_rate(
    file: str | Clip, *, width: int, height: int, fps: int, fit: Fit = "crop", start: int = 0
) -> Generator[Tensor, None, int]:
    """A video's images as it shows them `fps` times a second, however many it has itself.

    Each is float32 [3, height, width] in [0, 1]; see `Fit`. The first is number `start`, before
    which no more is decoded than has to be; returns how many there are from number 0 on. A pipe is
    read from where it is. ValueError: no such file, or not a video.
    """
    file, shown = _file_of(file), None
    begin, last, count, turn = 0.0, 0.0, start, (0, False)

    def fitted(frame: Any) -> Tensor:
        return FITS[fit](upright(pixels_of(frame), *turn), width, height)

    with closing(_frames(file, start / fps)) as frames:
        for number, frame in enumerate(frames):
            time = number / fps if frame.time is None else frame.time
            if shown is None:
                begin, turn = time, _turn_of(file, frame)
            last, image = time - begin, None
            while shown is not None and count / fps < last - _SAME_TIME:
                image = fitted(shown) if image is None else image
                yield image
                count += 1
            shown = frame
    if shown is None:
        raise ValueError(f"{name_of(file)} holds no images; give a picture or a clip")
    length = _shown_within(last, fps)
    if start < length:
        yield fitted(shown)
    return length


def length_at_rate(path: str | Path, fps: int) -> int:
    """How many images `images_at_rate` gives, as a file tells it: nothing is decoded.

    ValueError: no such file, or not a video.
    """
    with _open(Path(path)) as container:
        unit = container.streams.video[0].time_base  # of a container that is open: it is its memory
        times = [packet.pts for packet in _whole_packets(container) if not packet.is_discard]
    known = [time for time in times if time is not None]
    if len(known) < len(times) or not known:
        return len(times)
    return _shown_within(float((max(known) - min(known)) * unit), fps)


def _shown_within(seconds: float, fps: int) -> int:
    """Images at a rate, of a video whose last image comes so long after its first."""
    count = max(0, int(seconds * fps) - 2)
    while count / fps < seconds - _SAME_TIME:
        count += 1
    return count + 1


def check_images(file: str | Path | io.BytesIO) -> None:
    """See that a picture or clip begins with an image, and say where white replaces transparency.

    Raises:
        ValueError: no such file, or no images in it.
    """
    with closing(_frames(_file_of(file))) as frames:
        first = next(frames, None)
    if first is None:
        raise ValueError(f"{name_of(file)} holds no images; give a picture or a clip")
    if (_alpha(first) != 255).any():
        _log.warning("%s is transparent in parts, which become white", name_of(file))


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of a picture, or of a clip's first image, upright. ValueError as above."""
    with closing(_decode(Path(path))) as images:
        for image in images:
            return image.shape[0], image.shape[1]
    raise ValueError(f"{path} holds no images; give a picture or a clip")


def count_images(path: str | Path, most: int) -> int:
    """How many images a picture or clip holds; it is read up to so many. ValueError as above."""
    with closing(_frames(Path(path))) as frames:
        return sum(1 for _ in islice(frames, most))


def read_metadata(path: str | Path) -> dict[str, str]:
    """The names and texts a video was written with.

    Raises:
        ValueError: no such file, or not a video.
    """
    with _open(Path(path)) as container:
        return {k: v for k, v in container.metadata.items() if k not in _CONTAINER_KEYS}


def name_of(file: str | Clip) -> str:
    """What a message calls a file."""
    if isinstance(file, (str, Path)):
        return str(file)
    return "the clip" if isinstance(file, io.BytesIO) else "the pipe"


def _file_of(file: str | Clip) -> Clip:
    return Path(file) if isinstance(file, str) else file


def to_uint8(images: Tensor) -> Tensor:
    """Images [..., 3, H, W] in [0, 1], clipped to it, as the nearest bytes [..., H, W, 3]."""
    rounded = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return rearrange(rounded, "... c h w -> ... h w c").contiguous()


def header_of(format: VideoFormat) -> bytes:
    """What stands before the fragments of a video in this format, without metadata."""
    data = _black_fragment(format)
    return data[: _header_length(data)]


def _check_codec(name: str) -> None:
    import av

    if name not in av.codecs_available:
        others = [codec for codec in _CODECS if codec in av.codecs_available]
        raise ValueError(
            f"this build of PyAV has no encoder {name!r}; it has {', '.join(others) or 'none'} of "
            "those that fit an MP4: choose one as codec, or install PyAV from PyPI"
        )


def _fragment(
    images: Tensor, first: int, format: VideoFormat, metadata: Mapping[str, str]
) -> bytes:
    """A whole MP4 of one fragment whose images are numbers `first` and on of their stream."""
    import av

    options = {
        # frag_discont dates the fragment by its packets; skip_trailer leaves it open-ended.
        "movflags": "empty_moov+default_base_moof+frag_discont+skip_trailer+use_metadata_tags",
        "avoid_negative_ts": "make_non_negative",  # the muxer's own choice moves each chunk to 0
        "fragment_index": str(first + 1),  # must grow from fragment to fragment
        "video_track_timescale": str(_timescale(format)),
    }
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options=options) as container:
        container.metadata.update(metadata)
        stream = _add_encoder(container, format)
        for index, image in enumerate(images.cpu().numpy(), start=first):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=_BT709)
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _black_fragment(format: VideoFormat) -> bytes:
    """One image in this format, to see that its encoder starts and how it describes itself."""
    import av

    image = torch.zeros(1, format.height, format.width, 3, dtype=torch.uint8)
    try:
        return _fragment(image, 0, format, {})
    except av.FFmpegError as error:
        raise ValueError(
            f"encoder {format.codec!r} does not start for {format.width}x{format.height}: "
            f"{error.strerror}; choose another codec, such as libx264"
        ) from error


def _add_encoder(container: Any, format: VideoFormat) -> Any:
    # One thread: x264's output depends on their number, and should not on the machine's cores.
    # Past "veryfast", presets cost three times the time for 5 % of the size on 12 images.
    options = {"crf": str(format.crf), "preset": "veryfast", "threads": "1", "sc_threshold": "0"}
    if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        # With them x264 codes equal images differently once in some thousand chunks (docs/log.md).
        options["x264-params"] = "asm=avx2"
    is_x264 = format.codec == "libx264"
    stream = container.add_stream(
        format.codec, rate=format.fps, options=options if is_x264 else None
    )
    stream.width, stream.height, stream.pix_fmt = format.width, format.height, "yuv420p"
    context = stream.codec_context
    context.max_b_frames = 0  # pictures in the order shown: any leading part of the file decodes
    context.color_primaries = context.color_trc = context.colorspace = _BT709
    context.color_range = _LIMITED_RANGE
    if not is_x264:
        context.bit_rate = format.width * format.height * format.fps // 2
    return stream


def _timescale(format: VideoFormat) -> int:
    return format.fps * 1024


def _header_length(data: bytes) -> int:
    """Bytes before the first fragment: ISO/IEC 14496-12 boxes are a length, a name, a body."""
    offset = 0
    while data[offset + 4 : offset + 8] != b"moof":
        offset += int(struct.unpack_from(">I", data, offset)[0])
    return offset


def _address(source: Clip) -> str | IO[bytes]:
    """What FFmpeg opens: of a relative name, such as `take:1.mp4`, it would read a protocol."""
    return str(source.absolute()) if isinstance(source, Path) else source


def _open(source: Clip) -> Any:
    import av

    if isinstance(source, io.BytesIO):
        source.seek(0)
    elif isinstance(source, Path) and not source.is_file():
        raise ValueError(f"{source} is not a file; check the path")
    try:
        container = av.open(_address(source), options=_ONE_FILE)
    except av.FFmpegError as error:
        raise ValueError(
            f"{name_of(source)} is not a picture or video FFmpeg can read: {error.strerror}"
        ) from error
    streams = container.streams.video
    # A codec that FFmpeg lacks leaves no context.
    unknown = not streams or streams[0].codec_context is None
    if unknown or container.format.name in _NO_PICTURES:
        container.close()
        what = "holds no picture or video; give an image file or a clip"
        raise ValueError(f"{name_of(source)} {what}")
    return container


def _check_continues(path: Path, num_images: int, format: VideoFormat) -> None:
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}; to go on after no image, begin a new file")
    with _open(io.BytesIO(_black_fragment(format))) as ours, _open(path) as theirs:
        # The decoder's configuration holds size, rate and coding tools. It is stored once, at the
        # front, so appended images decode only under the same one.
        same = (
            ours.streams.video[0].codec_context.extradata
            == theirs.streams.video[0].codec_context.extradata
        )
    if not same:
        raise ValueError(
            f"{path} was written with another size, rate or encoder than {format}; resume with "
            "the settings it was begun with, or write to a new file"
        )


def _copy_stream(
    path: Path,
    *,
    num_images: int | None,
    fragmented: bool,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Copy the first `num_images` encoded images (all if None) into a new file in its place.

    `metadata` replaces the file's own.
    """
    import av

    with whole_file(path) as part:
        with _open(path) as source:
            stream = source.streams.video[0]
            layout = "frag_keyframe+empty_moov+default_base_moof" if fragmented else "faststart"
            options = {
                "movflags": layout + "+use_metadata_tags",
                "video_track_timescale": str(stream.time_base.denominator),
            }
            with av.open(_address(part), "w", format="mp4", options=options) as target:
                kept = source.metadata if metadata is None else metadata
                target.metadata.update({k: v for k, v in kept.items() if k not in _CONTAINER_KEYS})
                copied = _copy_packets(source, target, num_images)
        if copied < (num_images or 1):
            raise ValueError(f"{path} holds {copied} whole images, {num_images or 1} are needed")


def _copy_packets(source: Any, target: Any, num_images: int | None) -> int:
    stream = source.streams.video[0]
    out = target.add_stream_from_template(stream, opaque=True)
    copied = 0
    for packet in islice(_whole_packets(source), num_images):
        packet.stream = out
        target.mux(packet)
        copied += 1
    return copied


def _whole_packets(container: Any) -> Iterator[Any]:
    """The encoded images of a file, up to where it was cut off."""
    import av

    try:
        for packet in container.demux(video=0):
            if packet.is_corrupt:
                return
            if packet.size:  # the last one is empty: it tells a decoder to flush
                yield packet
    except av.FFmpegError:
        return


def _decode(path: Path) -> Generator[Tensor, None, None]:
    """The images of a file, uint8 [H, W, 3], upright."""
    turn = 0, False
    for number, frame in enumerate(_frames(path)):
        if number == 0:
            turn = _turn_of(path, frame)
        yield upright(pixels_of(frame), *turn)


def _turn_of(file: Clip, first: Any) -> tuple[int, bool]:
    """How the images of a file are turned and mirrored by `upright`."""
    told = exif_turn(file) if isinstance(file, Path) else None
    return told or (round(first.rotation / 90), False)


def _frames(file: Clip, skip: float = 0.0) -> Generator[Any, None, None]:
    """The frames of a file; after the first, some may be left out that are shown before `skip`
    seconds from it, but the last of them."""
    with _open(file) as container:
        decoder = container.streams.video[0].codec_context
        _require_size(file, decoder)
        if decoder.name == "mjpeg":
            decoder.options = {"err_detect": "explode"}  # or what is cut off becomes grey
        frames: Iterator[Any] = _decoded(file, container)
        first = next(frames, None)
        if first is None:
            return
        yield first
        if skip and _seek(container, first.time, skip):
            frames = _decoded(file, container)
            near = next(frames, None)
            if near is None or near.time is None or near.time > first.time + skip + _SAME_TIME:
                frames = islice(_frames(file), 1, None)
            else:
                yield near
        yield from frames


def _seek(container: Any, begin: float | None, skip: float) -> bool:
    """Whether a container is now at a picture to decode from, before `skip` seconds from a time."""
    import av

    stream = container.streams.video[0]
    if begin is None or stream.time_base is None:
        return False
    try:
        container.seek(int((begin + skip) / stream.time_base), stream=stream)
    except av.FFmpegError:
        return False
    return True


def _decoded(file: Clip, container: Any) -> Generator[Any, None, None]:
    import av

    decoder = container.streams.video[0].codec_context
    try:
        for packet in chain(_whole_packets(container), [None]):
            for frame in decoder.decode(packet):
                _require_size(file, frame)
                yield frame
    except av.FFmpegError as error:
        raise ValueError(
            f"{name_of(file)} cannot be decoded: it is damaged, or of a kind that FFmpeg does not "
            "read, such as an animated WebP; save it as PNG or MP4"
        ) from error


def frames_of_device(format: str, name: str) -> Generator[Any, None, None]:
    """The frames of a device that FFmpeg reads, as they come; see `pixels_of`.

    ValueError where it cannot be opened, or fails.
    """
    import av

    try:
        with av.open(name, format=format) as container:
            yield from container.decode(video=0)
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise ValueError(f"{format}:{name} cannot be read ({error}); check its name") from error


def _require_size(file: Clip, picture: Any) -> None:
    """Of a frame, or of a decoder before its first, which may not know its size."""
    if (picture.width or 0) * (picture.height or 0) > LARGEST_PICTURE:
        raise ValueError(
            f"{name_of(file)} is {picture.width}x{picture.height}; a picture that is read has at "
            f"most {LARGEST_PICTURE:,} pixels: make it smaller"
        )


def pixels_of(frame: Any) -> Tensor:
    """A decoded frame as uint8 [H, W, 3], on white where it is transparent."""
    image = _rgb(frame, "rgb24")
    alpha = _alpha(frame)
    if (alpha == 255).all():
        return image
    shown = _rgb(frame, "rgba")[..., :3].float() * alpha + _PAPER * (255 - alpha)
    return (shown / 255).round().to(torch.uint8)


def _is_large(image: Tensor) -> bool:
    return image.shape[0] * image.shape[1] > LARGEST_PICTURE // 4


def _alpha(frame: Any) -> Tensor:
    """How opaque each pixel is, [H, W, 1] from 0 to 255; [1, 1, 1] where all are."""
    own = frame.format
    if own.has_palette or any(part.is_alpha for part in own.components):
        return _rgb(frame, "rgba")[..., 3:].float()
    return torch.full((1, 1, 1), 255.0)


def _rgb(frame: Any, format: str) -> Tensor:
    # RGB has no matrix; PyAV 14 minds the frame's own only where another target is named.
    return torch.from_numpy(frame.to_ndarray(format=format, dst_colorspace=_BT601))


def _planes(image: Tensor) -> Tensor:
    planes = rearrange(image, "h w c -> 1 c h w").float()
    return planes if image.is_floating_point() else planes / 255


def _cover(image: Tensor, width: int, height: int) -> Tensor:
    """[H, W, 3] -> float32 [3, height, width]: scaled until both sides fit, then cropped."""
    pixels = _planes(image)
    scale = max(Fraction(height, image.shape[0]), Fraction(width, image.shape[1]))
    size = (round(image.shape[0] * scale), round(image.shape[1] * scale))
    if size[0] * size[1] > LARGEST_PICTURE:
        raise ValueError(
            f"a picture of {image.shape[1]}x{image.shape[0]} is too narrow to cover "
            f"{width}x{height}; crop it first"
        )
    if size != tuple(image.shape[:2]):
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[0, :, top : top + height, left : left + width]


def letterbox(image: Tensor, width: int, height: int, beside: float = 0.0) -> Tensor:
    """[H, W, 3], uint8 or float32 in [0, 1] -> float32 [3, height, width]: scaled to lie within it,
    black or another grey beside it."""
    pixels = _planes(image)
    scale = min(Fraction(height, image.shape[0]), Fraction(width, image.shape[1]))
    size = [max(1, round(side * scale)) for side in image.shape[:2]]
    if size != list(image.shape[:2]):
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    room = pixels.new_full((pixels.shape[1], height, width), beside)
    room[:, top : top + size[0], left : left + size[1]] = pixels[0]
    return room


FITS: dict[Fit, Callable[[Tensor, int, int], Tensor]] = {"crop": _cover, "letterbox": letterbox}
"""An image [H, W, 3], uint8 or float32 in [0, 1], a width and a height -> float32 [3, H, W]."""
