"""Sources of guides: images from without as the latents that a stream's chunks are guided by.

Image n of a source guides image n of the video: where the stream goes back, its source seeks. The
images are read as they are needed and encoded as one stream, which begins afresh where the
decoder's does, so that memory does not grow with the source.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from .config import FPS, TEMPORAL_FACTOR
from .decoders.decoder import DecoderState
from .digests import file_digest
from .video import FITS, Fit, check_images, images_at_rate

if TYPE_CHECKING:
    from .stream import Stream

_log = logging.getLogger(__name__)

AtEnd = Literal["stop", "hold", "loop"]
"""What a source does at its end: give nothing more, go on with its last image, or begin again. A
single picture is held."""
_SAID: dict[AtEnd, str] = {
    "stop": "what fills no chunk is left out, and no guide follows",
    "hold": "its last image is held",
    "loop": "it begins again",
}


class Source(Protocol):
    """What a stream asks of what it is guided by, a chunk at a time."""

    @property
    def motion(self) -> float:
        """How much moves in the images of the last latents; see `motion_of`."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What a log says of it, as JSON: of equal facts the latents are equal."""

    def latents(self, frames: int, *, first: bool) -> Tensor | None:
        """Clean latents [1, C, F, h, w] of the next so many frames; None where it has ended.

        `first` where the chunk begins a decoder's stream (`Stream.decodes_afresh`): encoding
        begins afresh there too, and the first frame is one image.
        """

    def seek(self, images: int, since: int = 0) -> None:
        """Let the next chunk begin with the video's image number `images`.

        `since` is the image that the decoder's stream began with: 0, or that of the last cut. What
        follows is the same to the bit as if all before had been read. A camera does nothing.
        """

    def close(self) -> None:
        """Let go of what is read."""


class ChunkEncoder(Protocol):
    """What a source asks of a decoder: its twin, from images to latents."""

    @property
    def source_memory_images(self) -> int:
        """Images after which nothing of what was before them is left in a state."""

    def source_images_of(self, latent_frames: int, first: bool) -> int:
        """How many images the frames are encoded from; `first` where they begin a stream."""

    def encode_chunk(
        self, images: Tensor, state: DecoderState | None
    ) -> tuple[Tensor, DecoderState]:
        """The stream's next images [B, T, 3, H, W] in [0, 1] -> latents, and the state after."""


ImagesFrom = Callable[[int], Generator[Tensor, None, int]]
"""Images [3, H, W] in [0, 1] from a number on; returns how many there are, from number 0 on."""


class Reader(Protocol):
    """Images in turn."""

    name: str
    """What messages call them."""
    can_seek: bool
    """Whether they can be read again, and from any of them on."""
    held: int
    """How many images in a row, the last ones, were the held one again."""
    length: int | None
    """Images that there are; None until the end is met."""

    def take(self, count: int) -> Tensor | None:
        """The next so many images [T, 3, H, W]; None where fewer are left, and from then on."""

    def seek(self, image: int) -> None:
        """Go on with this image."""

    def close(self) -> None:
        """Let go of what is read."""


class ImageReader:
    """Images from any of them on, and what follows their end; see `Reader`.

    `name` and `counted` are what messages call them. ValueError for an `at_end` that there is not.
    """

    def __init__(
        self,
        name: str,
        images_from: ImagesFrom,
        at_end: AtEnd = "stop",
        counted: str = "images",
        *,
        can_seek: bool = True,
    ) -> None:
        check_at_end(at_end)
        self.can_seek = can_seek
        self.name, self.at_end, self._images_from = name, at_end, images_from
        self._counted = counted
        self.held = 0
        self.length: int | None = None
        self._images = self._read(0)

    def take(self, count: int) -> Tensor | None:
        """See `Reader`."""
        images = list(islice(self._images, count))
        return torch.stack(images) if len(images) == count else None

    def seek(self, image: int) -> None:
        """See `Reader`; counted as they are given: what is held or looped counts on."""
        self._images.close()
        self.held, self._images = 0, self._read(image)

    def close(self) -> None:
        """Let go of what is read."""
        self._images.close()

    def _read(self, start: int) -> Generator[Tensor, None, None]:
        last = yield from self._read_once(start)
        assert self.length is not None
        if self.at_end == "hold" or self.length == 1:
            if last is None:
                with closing(self._images_from(self.length - 1)) as images:
                    last = next(images)
            while True:
                self.held += 1
                yield last
        while self.at_end == "loop":
            start = max(0, start - self.length) % self.length
            yield from self._read_once(start)
            start = 0

    def _read_once(self, start: int) -> Generator[Tensor, None, Tensor | None]:
        """Up to the end; the last image of those that were given."""
        last, images = None, self._images_from(start)
        with closing(images):
            while True:
                try:
                    last = next(images)
                except StopIteration as end:
                    self._tell(end.value)
                    return last
                yield last

    def _tell(self, length: int) -> None:
        if self.length is None:
            follows = _SAID["hold" if length == 1 else self.at_end]
            _log.warning("%s ends after %d %s; %s", self.name, length, self._counted, follows)
        self.length = length


def clip_reader(
    file: str | Path | io.BytesIO,
    *,
    height: int,
    width: int,
    at_end: AtEnd = "stop",
    fit: Fit = "crop",
    fps: int = FPS,
) -> ImageReader:
    """A video file, or one in memory, shown `fps` times a second whatever its own rate.

    `height` and `width` are the picture's, in pixels. ValueError: no such file, or no images in it.
    """
    check_fit(fit)
    check_images(file)
    read = partial(images_at_rate, file, width=width, height=height, fps=fps, fit=fit)
    name = "the clip" if isinstance(file, io.BytesIO) else str(file)
    return ImageReader(name, lambda start: read(start=start), at_end, f"images at {fps} a second")


def batch_reader(
    images: Tensor, *, height: int, width: int, at_end: AtEnd = "stop", fit: Fit = "crop"
) -> ImageReader:
    """Images [T, H, W, 3 or 4] in [0, 1] that are in memory, one for each image of the video.

    What a fourth channel says is transparent becomes white. ValueError for another shape.
    """
    check_fit(fit)
    if images.ndim != 4 or images.shape[3] not in (3, 4) or 0 in images.shape:
        raise ValueError(
            f"the source images are {list(images.shape)}; they must be [images, height, width, 3]"
        )

    def images_from(start: int) -> Generator[Tensor, None, int]:
        for image in images[start:]:
            yield FITS[fit](on_white(image.cpu()), width, height)
        return len(images)

    return ImageReader("the source", images_from, at_end)


def check_at_end(at_end: str) -> None:
    """ValueError unless it is one of `AtEnd`."""
    if at_end not in get_args(AtEnd):
        raise ValueError(f"at_end is {at_end!r}; use one of {', '.join(get_args(AtEnd))}")


def check_fit(fit: str) -> None:
    """ValueError unless it is one of `Fit`."""
    if fit not in get_args(Fit):
        raise ValueError(f"fit is {fit!r}; use one of {', '.join(get_args(Fit))}")


def on_white(image: Tensor) -> Tensor:
    """An image [H, W, 3 or 4] in [0, 1] as float32 [H, W, 3], white where it is transparent."""
    colours, alpha = image[..., :3].float(), image[..., 3:].float()
    return colours * alpha + (1 - alpha) if alpha.shape[-1] else colours


def encode_next(
    encoder: ChunkEncoder, images: Tensor, state: DecoderState | None
) -> tuple[Tensor, DecoderState]:
    """Latents [1, C, F, h, w] of a stream's next images [T, 3, H, W], and the state after.

    The first frame of a stream is of its first image: TAEHV, whose frames are all of as many
    images, reads that as often.
    """
    if state is None:
        repeats = encoder.source_images_of(1, first=True) - 1
        images = torch.cat([images[:1].expand(repeats, -1, -1, -1), images])
    return encoder.encode_chunk(images.unsqueeze(0), state)


class EncodedSource:
    """The images of a reader as a `Source`, encoded as they are asked for; see there.

    Where a stream begins with its first image, TAEHV reads that four times: its latents are then
    those of the images that they decode to, as of the Wan VAE. Close it, or use it in a `with`.
    """

    def __init__(
        self, reader: Reader, encoder: ChunkEncoder, facts: Callable[[], Mapping[str, Any]]
    ) -> None:
        self.reader, self._encoder = reader, encoder
        self._step = encoder.source_images_of(1, first=False)
        self._begun, self._facts = False, facts
        self.motion = 0.0
        """See `Source`."""
        self._state: DecoderState | None = None
        self._encoded = 0  # images of the stream that the state is of
        self._before: Tensor | None = None
        self._steady: Tensor | None = None

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `Source`; what is encoded is read for its digest."""
        return self._facts()

    @torch.no_grad()
    def latents(self, frames: int, *, first: bool) -> Tensor | None:
        """See `Source`. ValueError where a source that stops has no images for a first chunk."""
        if first:
            self._begin_afresh()
        needed = self._step * frames - (self._step - 1 if first else 0)
        images = self.reader.take(needed)
        if images is None:
            self._require_begun(needed)
            return None
        if not (first or self._encoded):  # the decoder's stream began before there was a source
            self._encode(images[:1])
        shown = images if self._before is None else torch.cat([self._before, images])
        self.motion, self._before, self._begun = motion_of(shown), images[-1:], True
        return self._encode(images)

    @torch.no_grad()
    def seek(self, images: int, since: int = 0) -> None:
        """See `Source`: as many images are encoded again as the encoder remembers.

        A pipe and a camera go on with what comes next.
        """
        if not self.reader.can_seek:
            return
        self._begin_afresh()
        self._begun = images > 0
        remembered = -(-self._encoder.source_memory_images // self._step)
        groups = min(remembered, (images - since) // self._step)
        begin = images - groups * self._step
        if images > since:
            self._encode_from(max(begin - 1, since), 1)
        self.reader.seek(begin)
        for _ in range(groups):
            self._encode_from(None, self._step)

    def _encode_from(self, image: int | None, count: int) -> None:
        """Encode so many images, from one on or where the reader is, unless it has ended."""
        if image is not None:
            self.reader.seek(image)
        if (images := self.reader.take(count)) is not None:
            self._encode(images)
            self._before = images[-1:]

    def close(self) -> None:
        """Let go of what is read."""
        self.reader.close()

    def __enter__(self) -> EncodedSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _begin_afresh(self) -> None:
        self._state, self._encoded, self._before, self._steady = None, 0, None, None

    def _encode(self, images: Tensor) -> Tensor:
        """Latents of the next images [T, 3, H, W]; one that is held for ever is encoded no more."""
        memory, count = self._encoder.source_memory_images, len(images)
        steady = min(self._encoded, self.reader.held - count) >= memory
        last = self._steady
        if steady and last is not None and last.shape[2] * self._step == count:
            return last
        latents, self._state = encode_next(self._encoder, images, self._state)
        self._encoded += count
        self._steady = latents if steady else None
        return latents

    def _require_begun(self, needed: int) -> None:
        if not self._begun:
            raise ValueError(
                f"{self.reader.name} has {self.reader.length} images at the stream's rate, and its "
                f"first chunk takes {needed}; give a longer clip, or let it hold or loop at its end"
            )


class ClipSource(EncodedSource):
    """A video file as a source; see `clip_reader`."""

    def __init__(
        self,
        file: str | Path | io.BytesIO,
        encoder: ChunkEncoder,
        *,
        height: int,
        width: int,
        at_end: AtEnd = "stop",
        fit: Fit = "crop",
        fps: int = FPS,
    ) -> None:
        reader = clip_reader(file, height=height, width=width, at_end=at_end, fit=fit, fps=fps)
        how = {"at_end": at_end, "fit": fit, "fps": fps}
        name = (
            file.name
            if isinstance(file, Path)
            else Path(file).name
            if isinstance(file, str)
            else None
        )
        super().__init__(
            reader, encoder, lambda: {"file": name, "digest": _digest_of_file(file), **how}
        )


class BatchSource(EncodedSource):
    """Images in memory as a source; see `batch_reader`."""

    def __init__(
        self,
        images: Tensor,
        encoder: ChunkEncoder,
        *,
        height: int,
        width: int,
        at_end: AtEnd = "stop",
        fit: Fit = "crop",
    ) -> None:
        reader = batch_reader(images, height=height, width=width, at_end=at_end, fit=fit)
        how = {"at_end": at_end, "fit": fit}
        super().__init__(reader, encoder, lambda: {"digest": _digest_of(images), **how})


class Guides:
    """A source kept in step with one video, whose chunks it guides.

    `motion_strength` is `strength_at`'s.
    """

    def __init__(self, source: Source, motion_strength: float = 0.0) -> None:
        self.source, self._motion_strength = source, motion_strength
        self._at = 0  # the video's image that the source is at

    def next(self, stream: Stream, images: int, since: int = 0) -> Tensor | None:
        """Clean latents [1, C, F, h, w] for the stream's next chunk; None where there are none.

        The chunk begins with the video's image number `images`; `since` is as in `Source.seek`.
        """
        if self._at != images:
            self.source.seek(images, since)
        frames, first = stream.next_frames, stream.decodes_afresh
        latents = self.source.latents(frames, first=first)
        self._at = images + TEMPORAL_FACTOR * frames - (TEMPORAL_FACTOR - 1 if first else 0)
        return latents

    def strength(self, strength: float) -> float:
        """What the last guide is to begin with, where a still source has that strength."""
        return strength_at(strength, self._motion_strength, self.source.motion)


def _digest_of_file(file: str | Path | io.BytesIO) -> str:
    if isinstance(file, io.BytesIO):
        return hashlib.blake2b(file.getbuffer(), digest_size=8).hexdigest()
    return file_digest(Path(file))


def _digest_of(images: Tensor) -> str:
    data = images.cpu().contiguous().numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=8).hexdigest()


MOTION_SCALE = 0.1
"""`motion_of` from which all moves: a tenth of the way from black to white, from image to image."""


def motion_of(images: Tensor) -> float:
    """The largest difference between an image and the one before, of images [T, 3, H, W].

    The root of the mean squared difference of their values in [0, 1], as StreamDiffusionV2 measures
    it of latents (arXiv 2511.07399, section 4.1); 0 of one image.
    """
    steps = images.diff(dim=0).square().mean(dim=(1, 2, 3)).sqrt()
    return float(steps.max()) if len(steps) else 0.0


def strength_at(strength: float, motion_strength: float, motion: float) -> float:
    """The strength of a chunk whose source moves so much: `strength` of a still one.

    `motion_strength` is added where all moves, and in proportion where less does: below 0, what
    moves fast gets less noise (arXiv 2511.07399, section 4.1; without its smoothing in time, so
    that a chunk's strength depends on its own images alone).
    """
    return min(1.0, max(0.0, strength + motion_strength * min(1.0, motion / MOTION_SCALE)))
