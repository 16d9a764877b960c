"""A camera that a live session looks through: its newest frames as guides, and a record of them.

Frames come from any thread, as JPEG with a number and a time of their sender's clock. They are not
queued: `Camera` holds about a chunk's worth of the newest, and `CameraGuide` makes a chunk's guide
of them. What it took can be kept beside the session's log (`CameraWriter`), and is then taken from
there when the log is replayed (`RecordedCamera`), to the same bits.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import re
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

import torch
from einops import rearrange
from torch import Tensor

from ..config import FPS
from ..decoders.decoder import DecoderState
from ..source import ChunkEncoder, encode_next
from ..video import read_jpeg
from .buffers import CameraMark

_log = logging.getLogger(__name__)
MAX_FRAME_BYTES = 1 << 20
"""Bytes of a camera's frame."""
MAX_FRAME_PIXELS = 1920 * 1200
"""Pixels of a camera's frame; the stream's own size is enough."""
LOST_AFTER = 1.0
"""Seconds without a frame after which a camera is lost, and its last image held."""
MAX_RECORD_BYTES = 4 << 30
"""Bytes of a session's frames that are kept beside its log: an hour at 832x480."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")
_LATEST = 1e15  # milliseconds: of any clock that counts from 1970, or from a page's begin

CameraState = Literal["off", "on", "lost"]
"""Off: the source, or the prompt alone; lost: the last image is held."""


class NotThisCameraError(ValueError):
    """A frame is of a camera that is off, or that another has taken the place of."""


class TooFastError(ValueError):
    """Frames come faster than anybody could use them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CameraFrame:
    """One image of a camera, ready for the encoder."""

    mark: CameraMark
    data: bytes
    """As it came: JPEG."""
    image: Tensor
    """uint8 [H, W, 3], of the stream's size."""


class Frames(Protocol):
    """What a guide is made of."""

    def take(self, count: int) -> Sequence[CameraFrame]:
        """That many frames for the next chunk, some of them maybe the same; or none at all."""


class Camera:
    """The camera of a session, whichever it is: the newest one that was begun. For any thread.

    A camera is begun by its frame number 1 and takes the place of another. `height`, `width` and
    `fps` are the stream's; a frame is scaled to cover it and cropped. `max_frames` are held.
    """

    def __init__(self, *, height: int, width: int, max_frames: int, fps: int = FPS) -> None:
        self._height, self._width, self._fps = height, width, fps
        self._lock = threading.Lock()
        self._name: str | None = None
        self._number = 0
        self._frames: deque[CameraFrame] = deque(maxlen=max_frames)
        self._arrivals: deque[float] = deque(maxlen=2 * fps)
        self._shown_at = 0.0
        self._taken: CameraFrame | None = None
        self._closed = False

    @property
    def state(self) -> CameraState:
        """How it is now."""
        with self._lock:
            if self._name is None:
                return "off"
            return "lost" if time.monotonic() - self._shown_at > LOST_AFTER else "on"

    @property
    def name(self) -> str | None:
        """Of the camera that is on; None where none is."""
        with self._lock:
            return self._name

    def put(self, camera: str, number: int, captured: float, data: bytes) -> None:
        """Show the next frame of a camera, numbered from 1, captured at a time in milliseconds.

        One that a newer frame has overtaken is left out. ValueError, in a sentence, for what is no
        frame, `TooFastError` and `NotThisCameraError` for one that comes in vain.
        """
        _check_frame(camera, number, captured, data)
        with self._lock:
            self._require_due(camera, number)
            self._arrive()
        image = read_jpeg(
            data, width=self._width, height=self._height, most_pixels=MAX_FRAME_PIXELS
        )
        mark = CameraMark(camera=camera, number=number, captured=captured)
        with self._lock:
            self._require_due(camera, number)
            if number == 1:
                self._begin(camera)
            self._number = number
            if not self._frames or self._frames[-1].mark.captured < captured:
                self._frames.append(CameraFrame(mark=mark, data=data, image=image))
                self._shown_at = time.monotonic()

    def _require_due(self, camera: str, number: int) -> None:
        if self._closed:
            raise NotThisCameraError("the session has ended")
        if number > 1 and camera != self._name:
            why = "this camera was turned off" if self._name is None else "another camera is on"
            raise NotThisCameraError(f"{why}; turn it on again to take it from here")
        if 1 < number <= self._number:
            raise ValueError(f"frame {number} comes after frame {self._number}; count on from it")

    def _arrive(self) -> None:
        now = time.monotonic()
        if len(self._arrivals) == self._arrivals.maxlen and now - self._arrivals[0] < 1:
            raise TooFastError(f"frames come too fast; send at most {self._fps} a second")
        self._arrivals.append(now)

    def off(self, camera: str | None = None) -> None:
        """Look through no camera any more; of a name, only where it is that one."""
        with self._lock:
            if camera in (None, self._name):
                self._begin(None)

    def close(self) -> None:
        """Take no more."""
        with self._lock:
            self._begin(None)
            self._closed = True

    def _begin(self, name: str | None) -> None:
        self._name, self._number, self._taken = name, 0, None
        self._frames.clear()

    def take(self, count: int) -> list[CameraFrame]:
        """The newest `count` images at the stream's rate, by capture time: the nearest frame each.

        None is older than the last that was taken before; where nothing has come since, that one is
        held. Empty while the camera is off.
        """
        with self._lock:
            frames, last = list(self._frames), self._taken
            if not frames:
                return []
            self._taken = frames[-1]
        if last is not None:
            frames = [last, *(f for f in frames if f.mark.captured > last.mark.captured)]
        begin = frames[-1].mark.captured - (count - 1) * 1000 / self._fps
        return [_nearest(frames, begin + i * 1000 / self._fps) for i in range(count)]


def _check_frame(camera: str, number: int, captured: float, data: bytes) -> None:
    if not _NAME.fullmatch(camera):
        raise ValueError("a camera's name has 1 to 40 letters, digits, - and _")
    if number < 1:
        raise ValueError(f"frame is {number}; frames are numbered from 1")
    if not (math.isfinite(captured) and 0 <= captured <= _LATEST):
        raise ValueError(f"captured is {captured}; give the frame's time in milliseconds")
    if len(data) > MAX_FRAME_BYTES:
        raise ValueError(f"the frame has {len(data)} bytes; give at most {MAX_FRAME_BYTES}")


def _nearest(frames: Sequence[CameraFrame], captured: float) -> CameraFrame:
    after = bisect_left(frames, captured, key=lambda frame: frame.mark.captured)
    near = frames[max(after - 1, 0) : after + 1]
    return min(near, key=lambda frame: abs(frame.mark.captured - captured))


class CameraGuide:
    """Guides for a stream's chunks, of a camera that may come and go. Used by one thread.

    As a `Source`, but there need not be anything to see, and it always shows what is now.
    """

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._state: DecoderState | None = None
        self.used: tuple[CameraFrame, ...] = ()
        """What the last guide was made of; none where there was none."""

    @torch.no_grad()
    def latents(self, encoder: ChunkEncoder, frames: int, *, first: bool) -> Tensor | None:
        """Clean latents [1, C, F, h, w] for the next chunk; None while nothing is seen.

        `first` as of a `Source`. Where a camera comes into a video that has begun, its first image
        is taken to have stood before.
        """
        step = encoder.source_images_of(1, first=False)
        self.used = tuple(self._frames.take(step * frames - (step - 1 if first else 0)))
        if not self.used:
            self.forget()
            return None
        shown = torch.stack([frame.image for frame in self.used])
        images = rearrange(shown, "t h w c -> t c h w").contiguous().float() / 255
        if first:
            self.forget()
        elif self._state is None:
            _, self._state = encode_next(encoder, images[:1], None)
        latents, self._state = encode_next(encoder, images, self._state)
        return latents

    def forget(self) -> None:
        """Let the next chunk follow nothing: the stream went elsewhere."""
        self._state = None

    def leave_device(self) -> None:
        """Keep what the next chunk follows in the host's memory."""
        if self._state is not None:
            self._state = self._state.to("cpu")


@dataclass(frozen=True, kw_only=True)
class CameraUse:
    """What a chunk took of a camera, as its log says it."""

    frames: tuple[int, ...]
    """Of each image its frame's place in the record, from 0; none where no more were kept."""
    sizes: tuple[int, ...] = ()
    """Bytes of each frame that the chunk is the first to use, in their order in the record."""
    digest: str = ""
    """Of these bytes."""


def camera_record(log: Path | str) -> Path:
    """Where the camera frames that a session used lie: `take_camera.mjpeg` beside `take.jsonl`."""
    path = Path(log)
    return path.with_name(f"{path.stem.rstrip('_')}_camera.mjpeg")


def require_record(path: Path) -> None:
    """ValueError where there is no such record."""
    if not path.is_file():
        raise ValueError(
            f"the log's camera frames are to be in {path}, and it is not there; put it beside the "
            "log"
        )


class CameraWriter:
    """Keeps the frames that chunks use, one after another, each once: a file that players play.

    It is made, over one of the same name, with the first frame. What finds no room, in `max_bytes`
    or on the disk, is left out and the rest too; the session goes on.
    """

    def __init__(self, path: Path | str, max_bytes: int = MAX_RECORD_BYTES) -> None:
        self._path, self._left = Path(path), max_bytes
        self._file: io.BufferedWriter | None = None
        self._count = 0
        self._places: dict[CameraFrame, int] = {}  # of the last chunk's, which the next may use
        self._full = False

    def write(self, used: Sequence[CameraFrame]) -> CameraUse:
        """Keep what a chunk used."""
        new = [frame for frame in dict.fromkeys(used) if frame not in self._places]
        data = b"".join(frame.data for frame in new)
        if not (self._full or self._append(data)):
            self._full = True
            _log.warning("%s is full: a replay cannot go on from here", self._path)
        if self._full:
            return CameraUse(frames=())
        places = self._places | {frame: self._count + n for n, frame in enumerate(new)}
        self._count += len(new)
        self._places = {frame: places[frame] for frame in used}
        return CameraUse(
            frames=tuple(places[frame] for frame in used),
            sizes=tuple(len(frame.data) for frame in new),
            digest=_digest(data),
        )

    def _append(self, data: bytes) -> bool:
        """Whether there was room."""
        self._left -= len(data)
        if self._left < 0:
            return False
        try:
            if self._file is None:
                self._file = self._path.open("wb")
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            _log.warning("%s: %s", self._path, error)
            return False
        return True

    def close(self) -> None:
        """Close the file; more than once does no harm."""
        if self._file is not None:
            self._file.close()


class RecordedCamera:
    """A camera that shows once more what a log's chunks used; `expect` each of them, in order.

    `height` and `width` are the stream's. Use it in a `with`.
    """

    def __init__(self, path: Path | str, *, height: int, width: int) -> None:
        self._path, self._height, self._width = Path(path), height, width
        self._file: io.BufferedReader | None = None
        self._count = 0
        self._known: dict[int, CameraFrame] = {}
        self._next: tuple[CameraFrame, ...] = ()

    def expect(self, use: CameraUse | None) -> None:
        """Say what the next chunk used; ValueError, in a sentence, where it is not there."""
        self._next = ()
        if use is None:
            return
        if not use.frames:
            raise ValueError(
                f"{self._path} was full before this chunk: its camera frames are not kept; cut the "
                "log off before it"
            )
        for data in self._read(use):
            image = read_jpeg(
                data, width=self._width, height=self._height, most_pixels=MAX_FRAME_PIXELS
            )
            mark = CameraMark(camera="log", number=self._count + 1, captured=0)
            self._known[self._count] = CameraFrame(mark=mark, data=data, image=image)
            self._count += 1
        if not all(place in self._known for place in use.frames):
            raise ValueError(
                f"the log names a camera frame that is not in {self._path}; take the log as it was"
            )
        self._next = tuple(self._known[place] for place in use.frames)
        self._known = {place: self._known[place] for place in use.frames}

    def take(self, count: int) -> tuple[CameraFrame, ...]:
        """See `Frames.take`."""
        if self._next and len(self._next) != count:
            raise ValueError(
                f"the log has a chunk of {len(self._next)} camera images, and here it takes "
                f"{count}; replay it with the kind of VAE that it was made with"
            )
        return self._next

    def _read(self, use: CameraUse) -> list[bytes]:
        if self._file is None:
            require_record(self._path)
            self._file = self._path.open("rb")
        data = self._file.read(sum(use.sizes))
        if len(data) < sum(use.sizes) or _digest(data) != use.digest:
            raise ValueError(
                f"{self._path} does not hold the camera frames that the log was made with; put "
                "the file of that session beside it"
            )
        ends = [0]
        for size in use.sizes:
            ends.append(ends[-1] + size)
        return [data[begin:end] for begin, end in pairwise(ends)]

    def __enter__(self) -> RecordedCamera:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
