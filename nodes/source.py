"""What guides a stream: a clip as ComfyUI hands it on, and where in it a video stands.

A VIDEO is read as it is needed, at the speed that it has; an IMAGE batch has an image for each of
the stream's. A state remembers which clip it was guided by and how far that had come, so that the
same clip goes on there; another one begins at its beginning.
"""

from __future__ import annotations

import hashlib
import io as files
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, get_args

import torch
from comfy_api.latest import InputImpl, io
from torch import Tensor

from ..rf_core.config import TEMPORAL_FACTOR
from ..rf_core.ranges import MANY
from ..rf_core.source import AtEnd, ChunkEncoder, EncodedSource, ImageReader, batch_reader
from ..rf_core.state import Snapshot
from ..rf_core.stream import GUIDE_STRENGTH
from ..rf_core.video import FITS, Fit, check_images, images_at_rate

SOURCE_INPUTS = ("source", "strength", "source_end", "source_fit")
"""Names of a node's inputs for a source, in their order; they came last and stand last, so that
workflows that were saved before keep their values."""
PLACE = "source"
"""Name under which a snapshot's facts say how far its source had come."""
_AT_END, _FIT = (str(get_args(each)[0]) for each in (AtEnd, Fit))
NAME = "the source"
"""What messages call it."""
_READ_AT_ONCE = 1 << 20  # bytes
_SAME = 1e-3  # of an image: times are rounded


def source_inputs(ended: str) -> list[Any]:
    """The inputs for a source; `ended` says what follows its end where it stops."""
    return [
        io.MultiType.Input(
            "source",
            types=[io.Image, io.Video],
            optional=True,
            tooltip="A clip that the video follows, image by image. A VIDEO is read as it is "
            "needed and keeps its speed; of an IMAGE batch each image is one of the video's, 16 a "
            "second. Needs a VAE.",
        ),
        io.Float.Input(
            "strength",
            default=GUIDE_STRENGTH,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            tooltip="How much of the source is made anew: 0 is the source itself, 1 the prompt "
            f"alone. At {GUIDE_STRENGTH} the motion stays, colours and shapes follow the prompt.",
        ),
        io.Combo.Input(
            "source_end",
            options=list(get_args(AtEnd)),
            default=_AT_END,
            optional=True,
            advanced=True,
            tooltip=f"Where the source ends: stop: {ended}. hold: its last image stays. loop: it "
            "begins again.",
        ),
        io.Combo.Input(
            "source_fit",
            options=list(get_args(Fit)),
            default=_FIT,
            optional=True,
            advanced=True,
            tooltip="A source of another shape. crop: it covers the picture, what is beyond is cut "
            "off. letterbox: all of it is seen, with black beside it.",
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a stream stands in its source."""

    images: int = 0
    """The next image."""
    since: int = 0
    """The one that the decoder's stream began with."""

    def after(self, images: int, since: int) -> Place:
        """So many images on; `since` is the last cut on the way, counted from here, or 0."""
        begun = self.images + since if since else self.since
        return Place(images=self.images + images, since=begun)


@dataclass(frozen=True)
class Footage:
    """An IMAGE [T, H, W, C] or a VIDEO, and what it shows."""

    given: Any

    @cached_property
    def digest(self) -> str:
        """A hash of all of it."""
        found = hashlib.blake2b(digest_size=16)
        for part in _content(self.given):
            found.update(part)
        return found.hexdigest()

    def reader(self, height: int, width: int, fps: int, at_end: AtEnd, fit: Fit) -> ImageReader:
        """Its images in turn; ValueError, in a sentence, where it has none, or of another form."""
        size = {"height": height, "width": width}
        if torch.is_tensor(self.given):
            return batch_reader(self.given, **size, at_end=at_end, fit=fit)
        if isinstance(self.given, InputImpl.VideoFromComponents):
            parts = self.given.get_components()
            batch_reader(parts.images, **size, at_end=at_end, fit=fit)  # which checks them
            show = partial(FITS[fit], **size)
            shown = partial(_batch_at_rate, parts.images, float(parts.frame_rate), fps, show)
            return ImageReader(NAME, shown, at_end)
        file = self.given.get_stream_source()
        try:
            check_images(file)
        except ValueError as error:
            raise ValueError(str(error).replace(str(file), NAME)) from error
        read = partial(images_at_rate, file, **size, fps=fps, fit=fit)
        return ImageReader(NAME, partial(_trimmed, read, *_window(self.given, fps)), at_end)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What is connected as a source, and how it is taken."""

    footage: Footage
    strength: float
    at_end: AtEnd
    fit: Fit
    place: Place = Place()
    """Where a run begins in it."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Of equal keys the guides are equal, and act alike."""
        return self.footage.digest, self.strength, self.at_end, self.fit, self.place

    def placed(self, snapshot: Snapshot | None) -> Clip:
        """The same at the place where a snapshot left it; at its beginning where it did not.

        ValueError where the snapshot says nonsense of it.
        """
        place = place_in(snapshot, PLACE, lambda: self.footage.digest)
        return self if place is None else replace(self, place=place)

    def open(self, height: int, width: int, fps: int) -> PlacedSource:
        """Its images as guides, once an encoder is attached."""

        def opened(encoder: ChunkEncoder) -> EncodedSource:
            reader = self.footage.reader(height, width, fps, self.at_end, self.fit)
            return EncodedSource(reader, encoder, facts)

        def facts() -> dict[str, Any]:
            how = {"at_end": self.at_end, "fit": self.fit, "fps": fps}
            return {"digest": self.footage.digest, **how, "begins": self.place.images}

        return PlacedSource(opened, self.place)

    def noted(self, snapshot: Snapshot, place: Place) -> Snapshot:
        """The snapshot, which now says how far this source had come."""
        return with_place(snapshot, PLACE, self.footage.digest, place)


def clip_of(source: Any, strength: float, source_end: AtEnd, source_fit: Fit) -> Clip | None:
    """What a node's inputs for a source say; None without one."""
    if source is None:
        return None
    footage = Footage(source)
    return Clip(footage=footage, strength=strength, at_end=source_end, fit=source_fit)


def idle_inputs(strength: float, source_end: AtEnd, source_fit: Fit) -> list[str]:
    """What was set of a source where none is connected, a line for each."""
    given = {"strength": strength, "source_end": source_end, "source_fit": source_fit}
    usual = {"strength": GUIDE_STRENGTH, "source_end": _AT_END, "source_fit": _FIT}
    changed = [name for name, value in given.items() if value != usual[name]]
    return [f"ignored: {name}, as no source is connected" for name in changed]


def place_notes(clip: Clip, snapshot: Snapshot | None, fps: int) -> list[str]:
    """Where in the source a run begins that goes on from a state."""
    if clip.place.images:
        return [f"the source goes on at {clip.place.images / fps:.2f} s, where the state left it"]
    if snapshot is not None and PLACE in snapshot.facts:
        return ["note: another source than the state's, from its beginning on"]
    return []


class PlacedSource:
    """A `Source` whose first image is one in its midst, and whose encoder may change.

    Numbers of images that it is given are counted from there.
    """

    def __init__(self, opened: Callable[[ChunkEncoder], EncodedSource], place: Place) -> None:
        self._opened, self._begin = opened, place
        self._source: EncodedSource | None = None
        self._at = place.images
        self._begun: list[int] = []  # images that a decoder's stream began with
        self.ended_at: int | None = None
        """The image from which on there was no guide."""

    def attach(self, encoder: ChunkEncoder) -> None:
        """Go on, to the bit, with an encoder; before the first latents, and after `close`."""
        self._source = self._opened(encoder)
        if self._at:
            self._source.seek(self._at, self._since(self._at))

    @property
    def motion(self) -> float:
        """See `Source`."""
        return self._attached.motion

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `Source`."""
        return self._attached.facts

    def latents(self, frames: int, *, first: bool) -> Tensor | None:
        """See `Source`."""
        latents = self._attached.latents(frames, first=first)
        if latents is None and self.ended_at is None:
            self.ended_at = self._at
        if first:
            self._begun.append(self._at)
        self._at += TEMPORAL_FACTOR * frames - (TEMPORAL_FACTOR - 1 if first else 0)
        return latents

    def seek(self, images: int, since: int = 0) -> None:
        """See `Source`."""
        self._at = self._begin.images + images
        begun = self._begin.images + since if since else self._since(self._at)
        self._attached.seek(self._at, begun)
        self._begun = [*(each for each in self._begun if each < self._at), begun]

    def place_after(self, images: int) -> Place:
        """Where the stream stands after so many images."""
        at = self._begin.images + images
        return Place(images=at, since=self._since(at))

    def close(self) -> None:
        """See `Source`."""
        if self._source is not None:
            self._source.close()
        self._source = None

    @property
    def _attached(self) -> EncodedSource:
        assert self._source is not None, "an encoder is attached"
        return self._source

    def _since(self, image: int) -> int:
        return max((each for each in self._begun if each < image), default=self._begin.since)


def with_place(snapshot: Snapshot, name: str, digest: str, place: Place) -> Snapshot:
    """The snapshot, whose facts say by a name how far what has a digest had come."""
    note = {"digest": digest, "images": place.images, "since": place.since}
    return replace(snapshot, facts=snapshot.facts | {name: note})


def place_in(snapshot: Snapshot | None, name: str, digest: Callable[[], str]) -> Place | None:
    """How far what has a digest had come, as `with_place` noted; None where it was another, or
    nothing. `digest` is asked for where there is a note alone, as it reads all of a file.
    ValueError for nonsense."""
    note = None if snapshot is None else snapshot.facts.get(name)
    if note is None:
        return None
    kinds = {"digest": str, "images": int, "since": int}
    known = isinstance(note, dict) and all(type(note.get(k)) is kind for k, kind in kinds.items())
    if not known or not 0 <= note["since"] <= note["images"] <= MANY:
        raise ValueError("what the state says of its source is damaged; load another state")
    if note["digest"] != digest():
        return None
    return Place(images=note["images"], since=note["since"])


def _content(given: Any) -> Iterator[Any]:
    """All that a clip shows, in parts to be hashed."""
    if isinstance(given, InputImpl.VideoFromComponents):
        parts = given.get_components()
        yield str(parts.frame_rate).encode()
        given = parts.images
    if torch.is_tensor(given):
        yield f"{given.dtype} {list(given.shape)}".encode()
        for image in given:
            yield image.detach().cpu().contiguous().view(torch.uint8).numpy()
        return
    yield str(given.get_active_trim_window()).encode()
    file = given.get_stream_source()
    if isinstance(file, files.BytesIO):
        yield file.getbuffer()
        return
    with Path(file).open("rb") as content:
        while part := content.read(_READ_AT_ONCE):
            yield part


def _window(video: Any, fps: int) -> tuple[int, int | None]:
    """The first of its file's images that a VIDEO shows, and how many it shows; None for all."""
    start, duration = video.get_active_trim_window()
    first, end = (_image_at(seconds, fps) for seconds in (start, start + duration))
    return first, end - first if duration else None


def _image_at(seconds: float, fps: float) -> int:
    """The first image at that time or after, where images are so many a second."""
    return math.ceil(seconds * fps - _SAME)


def _trimmed(
    read: Callable[..., Generator[Tensor, None, int]], first: int, most: int | None, start: int
) -> Generator[Tensor, None, int]:
    """The images of a file from its `first` on, `most` at most; of these from `start` on."""
    if most is not None and start >= most:
        return most
    with closing(read(start=first + start)) as images:
        for number in count(start):
            if number == most:
                return most
            try:
                image = next(images)
            except StopIteration as end:
                return _length(end.value - first)
            yield image
    raise AssertionError("it counts without end")


def _length(images: int) -> int:
    if images < 1:
        raise ValueError("the source is cut to begin after its last image; let it begin earlier")
    return images


def _batch_at_rate(
    images: Tensor, rate: float, fps: int, show: Callable[..., Tensor], start: int
) -> Generator[Tensor, None, int]:
    """Images [T, H, W, 3] that are `rate` a second, as they are seen `fps` times a second."""
    total = 1 + _image_at((len(images) - 1) / rate, fps)
    for number in range(start, total):
        yield show(images[min(len(images) - 1, int(number * rate / fps + _SAME))].float())
    return total
