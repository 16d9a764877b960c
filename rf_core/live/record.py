"""Where a live stream's images go: to a file for each branch, then to whoever watches.

All of it runs in the thread that delivers them, so that the one that makes chunks never waits for
an encoder.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ..state import Snapshot
from ..video import VideoFormat, VideoWriter, remux
from .buffers import CameraMark, Outbox, Picture
from .transition import Branch

_log = logging.getLogger(__name__)


class Recorder(Protocol):
    """Keeps branches, each of them whole."""

    def begin(self, branch: str, parent: str | None, images: int) -> None:
        """A branch, which begins with so many images of its parent's; the one before has ended."""

    def write(self, images: Tensor) -> bytes | None:
        """Its next chunk, uint8 [T, H, W, 3] on the CPU, which is overwritten afterwards.

        What it is in the recording, for those who watch; None where that is no fragment of a video.
        """

    def end(self) -> None:
        """The branch is done, or something else is begun."""


@dataclass(frozen=True, kw_only=True)
class ChunkInfo:
    """Which chunk it is whose images are to come."""

    branch: Branch
    chunk: int
    images: int
    """Images of the session before it."""
    camera: CameraMark | None = None
    """See `Picture.camera`."""


@dataclass(frozen=True, kw_only=True)
class Autosave:
    """Where a stream stands after a chunk, for who wants to go on from there."""

    snapshot: Snapshot
    """A compact one."""
    branch: str
    images: int
    """Images of the branch that lead to it."""


OnAutosave = Callable[[Autosave], None]
"""Keeps the last one; called by the thread that delivers."""


class Presenter:
    """Takes chunks as they are delivered."""

    def __init__(
        self,
        outbox: Outbox | None = None,
        recorder: Recorder | None = None,
        on_autosave: OnAutosave | None = None,
    ) -> None:
        self._outbox, self._recorder, self._on_autosave = outbox, recorder, on_autosave
        self._autosave: Autosave | None = None  # the maker sets it, the deliverer takes it
        self._expected: deque[ChunkInfo] = deque()  # the maker appends, the deliverer takes
        self._branch: str | None = None

    def expect(self, info: ChunkInfo) -> None:
        """Say what the next delivery will be; in the maker's thread."""
        self._expected.append(info)

    @property
    def autosaves(self) -> bool:
        """Whether anybody keeps where the stream stands."""
        return self._on_autosave is not None

    def autosave(self, autosave: Autosave) -> None:
        """Keep it once the images that lead to it are delivered; the newest alone."""
        self._autosave = autosave

    def deliver(self, images: Tensor) -> None:
        """Take the images of a chunk, uint8 [1, T, H, W, 3]; they are overwritten afterwards."""
        info, fragment = self._expected.popleft(), None
        if self._recorder is not None:
            fragment = self._record(self._recorder, info, images[0])
        self.show(info, images[0], fragment)
        autosave, end = self._autosave, info.images + images.shape[1]
        if autosave and autosave.branch == info.branch.name and autosave.images <= end:
            self._flush_autosave()

    def show(self, info: ChunkInfo, images: Tensor | None, fragment: bytes | None = None) -> None:
        """Hand a chunk to those who watch."""
        if self._outbox is not None:
            copy = None if images is None else images.clone()
            self._outbox.show(
                Picture(
                    branch=info.branch.name,
                    chunk=info.chunk,
                    images=copy,
                    fragment=fragment,
                    camera=info.camera,
                )
            )

    def close(self) -> None:
        """End the branch that is recorded; after the last delivery."""
        try:
            if self._recorder is not None and self._branch is not None:
                self._recorder.end()
        finally:
            self._flush_autosave()

    def _flush_autosave(self) -> None:
        autosave, self._autosave = self._autosave, None  # a newer one may come meanwhile
        if self._on_autosave is not None and autosave is not None:
            self._on_autosave(autosave)

    def _record(self, recorder: Recorder, info: ChunkInfo, images: Tensor) -> bytes | None:
        branch = info.branch
        if branch.name != self._branch:
            if self._branch is not None:
                recorder.end()
            recorder.begin(branch.name, branch.parent, info.images)
            self._branch = branch.name
        return recorder.write(images)


class VideoRecorder:
    """A `Recorder` of MP4 files; each plays to its end at every moment, and has its index in front
    once it is done.

    The first branch goes to `path`, which is made over; the others beside it, as `take-NAME.mp4`
    beside `take.mp4`. What a branch has of its parent is copied, and not encoded again.
    """

    def __init__(
        self, path: Path | str, format: VideoFormat, metadata: Mapping[str, str] | None = None
    ) -> None:
        self._path, self._format, self._metadata = Path(path), format, dict(metadata or {})
        self._writer: VideoWriter | None = None
        self.paths: dict[str, Path] = {}
        """Each branch's file."""
        self.num_images: dict[str, int] = {}
        """Images of each branch that has ended."""

    def begin(self, branch: str, parent: str | None, images: int) -> None:
        """See `Recorder.begin`; ValueError, or OSError, where it cannot be written."""
        path = self._path
        if self.paths:
            path = path.with_name(f"{path.stem}-{branch}{path.suffix}")
        if parent is None or not images:
            self._writer = VideoWriter(path, self._format, self._metadata)
        else:
            self._writer = VideoWriter.continuing(
                self.paths[parent], path, images, self._format, self._metadata
            )
        self.paths[branch] = path

    def write(self, images: Tensor) -> bytes:
        """See `Recorder.write`."""
        assert self._writer is not None, "begin() comes first"
        return self._writer.write(images)

    def end(self) -> None:
        """See `Recorder.end`."""
        if self._writer is None:
            return
        self._writer.close()
        *_, (branch, path) = self.paths.items()
        self.num_images[branch] = self._writer.num_images
        try:
            remux(path)
        except (ValueError, OSError) as error:  # it plays as well
            _log.warning("%s keeps its index in parts: %s", path, error)
