"""What a command line names as a source: a video file, a pipe, or a camera.

A file is read from anywhere; a pipe once, from its beginning to its end; of a camera the newest
images alone are taken, so that it is never behind.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .digests import file_digest
from .ranges import check_numbers
from .scheduler import check_strength
from .source import AtEnd, ImageReader, Reader, check_at_end, check_fit, clip_reader
from .stream import GUIDE_STRENGTH
from .video import (
    FITS,
    Fit,
    check_images,
    frames_of_device,
    images_at_rate,
    length_at_rate,
    pixels_of,
)

_log = logging.getLogger(__name__)
PIPE = "-"
"""Names the standard input."""
DEVICES = ("v4l2", "avfoundation", "dshow", "lavfi")
"""FFmpeg's devices that can be named: cameras of Linux, macOS and Windows, and test pictures."""
_DEVICE = re.compile(rf"({'|'.join(DEVICES)}):(.+)")
_KEPT = 64  # images of a camera that are there to be taken: more than any chunk has
_PATIENCE = 5.0  # seconds without an image after which a camera counts as gone


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """A source, and what is made of it."""

    place: str
    """A video file; `-` for the standard input; `v4l2:/dev/video0` and the like for a camera."""
    strength: float = GUIDE_STRENGTH
    """What its guides begin with, see `Stream.generate`."""
    motion_strength: float = 0.0
    """What is added where all moves, see `strength_at`."""
    at_end: AtEnd = "stop"
    fit: Fit = "crop"

    def __post_init__(self) -> None:
        check_strength(self.strength)
        check_numbers(self, motion_strength=(-1, 1))
        check_at_end(self.at_end)
        check_fit(self.fit)
        if self.at_end == "loop" and not self.is_file:
            raise ValueError("a pipe or a camera cannot begin again; leave out --source-end loop")

    @property
    def path(self) -> Path | None:
        """The file; None for a pipe or a camera."""
        return Path(self.place) if self.is_file else None

    @property
    def is_file(self) -> bool:
        """Whether it can be read again, and from anywhere."""
        return self.place != PIPE and _DEVICE.fullmatch(self.place) is None

    @property
    def name(self) -> str:
        """What a record calls it."""
        return self.place if self.path is None else self.path.name

    def check(self) -> None:
        """ValueError where it is a file that holds no images."""
        if self.path is not None:
            check_images(self.path)

    def length(self, fps: int) -> int | None:
        """Images at so many a second; None of a pipe or camera, and where it goes on at its end."""
        if self.path is None:
            return None
        length = length_at_rate(self.path, fps)
        return None if self.at_end != "stop" or length == 1 else length

    def facts(self) -> dict[str, Any]:
        """What `Source.facts` are of it."""
        digest = None if self.path is None else file_digest(self.path)
        return {"file": self.name, "digest": digest, "at_end": self.at_end, "fit": self.fit}

    def record(self) -> dict[str, Any]:
        """What made a video, as JSON."""
        given = {"strength": self.strength, "motion_strength": self.motion_strength}
        return {**self.facts(), **given}


def open_reader(options: SourceOptions, *, height: int, width: int, fps: int) -> Reader:
    """The images that are asked for, in a stream's size and rate.

    Of a pipe and a camera the first is waited for. ValueError where there is none.
    """
    device = _DEVICE.fullmatch(options.place)
    if device is not None:
        fitted = partial(_fitted, fit=options.fit, width=width, height=height)
        frames = partial(frames_of_device, device[1], device[2])
        return CameraReader(options.place, frames, fitted, fps=fps)
    how: dict[str, Any] = {"height": height, "width": width, "fps": fps, "fit": options.fit}
    if options.path is not None:
        return clip_reader(options.path, at_end=options.at_end, **how)
    return pipe_reader(sys.stdin.buffer, at_end=options.at_end, **how)


def pipe_reader(
    pipe: IO[bytes], *, at_end: AtEnd, height: int, width: int, fps: int, fit: Fit
) -> ImageReader:
    """The images of a video that comes through a pipe, in any container that can be read so."""
    images = images_at_rate(pipe, width=width, height=height, fps=fps, fit=fit)
    first = next(images)

    def images_from(start: int) -> Generator[Tensor, None, int]:
        yield first
        return (yield from images)

    return ImageReader("the pipe", images_from, at_end, f"images at {fps} a second", can_seek=False)


class CameraReader:
    """A camera's newest images, `fps` a second; the others are dropped, and none is given twice.

    A camera that is slower shows an image for as long as it does. One that gives nothing for some
    seconds holds its last image, and goes on when it is back; the log says both. It is read in a
    thread of its own, by `frames`, whose images `fitted` makes float32 [3, H, W] in [0, 1].
    ValueError where it gives no image at all.
    """

    can_seek = False
    held = 0
    length: int | None = None

    def __init__(
        self,
        name: str,
        frames: Callable[[], Iterator[Any]],
        fitted: Callable[[Any], Tensor],
        *,
        fps: int,
        patience: float = _PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self._frames, self._fitted = name, frames, fitted
        self._fps, self._patience, self._clock = fps, patience, clock
        self._newest: deque[Any] = deque(maxlen=_KEPT)
        self._shown = self._taken = 0  # images that time has had so far, and up to which were given
        self._come, self._ended, self._gone = threading.Condition(), False, False
        self._why = "it gives no images"
        threading.Thread(target=self._read, name="camera", daemon=True).start()
        with self._come:
            self._come.wait_for(lambda: self._newest or self._ended, timeout=4 * patience)
        if not self._newest:
            self._ended = True
            raise ValueError(f"the camera {name} cannot be read: {self._why}")

    def take(self, count: int) -> Tensor:
        """The newest so many images [T, 3, H, W] of those that were not given; waits for them."""
        with self._come:
            there = self._come.wait_for(
                lambda: self._shown - self._taken >= count or self._ended, timeout=self._patience
            )
            self._tell(gone=not there or self._ended)
            images = list(self._newest)[-min(count, max(1, self._shown - self._taken)) :]
            self._taken = self._shown
        lacking = count - len(images)
        return torch.stack([self._fitted(image) for image in [*images, *[images[-1]] * lacking]])

    def seek(self, image: int) -> None:
        """Nothing: it shows what is now."""

    def close(self) -> None:
        """Let go of the camera."""
        self._ended = True

    def _tell(self, *, gone: bool) -> None:
        if gone and not self._gone:
            _log.warning("the camera %s gives no images; its last one is held", self.name)
        if self._gone and not gone:
            _log.warning("the camera %s is back", self.name)
        self._gone = gone

    def _read(self) -> None:
        try:
            with closing(self._frames()) as frames:  # type: ignore[type-var]
                begin = self._clock()
                for image in frames:
                    if self._ended:
                        break
                    self._add(image, 1 + int((self._clock() - begin) * self._fps))
        except ValueError as error:
            self._why = str(error)
        with self._come:
            self._ended = True
            self._come.notify_all()

    def _add(self, image: Any, shown: int) -> None:
        """An image that is the one now, when time has had so many."""
        with self._come:
            missed = min(shown - self._shown - 1, _KEPT)
            if missed > 0 and self._newest:
                self._newest.extend([self._newest[-1]] * missed)
            if shown > self._shown:
                self._newest.append(image)
            else:
                self._newest[-1] = image
            self._shown = shown
            self._come.notify_all()


def _fitted(frame: Any, *, fit: Fit, width: int, height: int) -> Tensor:
    return FITS[fit](pixels_of(frame), width, height)
