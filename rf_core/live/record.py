"""Where a live stream's images go: to a file for each branch, then to whoever watches.

All of it runs in the thread that delivers them, so that the one that makes chunks never waits for
an encoder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ..video import VideoFormat, VideoWriter
from .buffers import Outbox, Picture
from .transition import Branch


class Recorder(Protocol):
    """Keeps branches, each of them whole."""

    def begin(self, branch: str, parent: str | None, images: int) -> None:
        """A branch, which begins with so many images of its parent's; the one before has ended."""

    def write(self, images: Tensor) -> None:
        """Its next chunk, uint8 [T, H, W, 3] on the CPU; it is overwritten afterwards."""

    def end(self) -> None:
        """The branch is done, or something else is begun."""


@dataclass(frozen=True, kw_only=True)
class Take:
    """A chunk on its way."""

    branch: Branch
    chunk: int
    images: int
    """Images of the session before it."""


class Presenter:
    """Takes chunks as they are delivered."""

    def __init__(self, outbox: Outbox | None = None, recorder: Recorder | None = None) -> None:
        self._outbox, self._recorder = outbox, recorder
        self._expected: deque[Take] = deque()  # the maker appends, the deliverer takes
        self._branch: str | None = None

    def expect(self, take: Take) -> None:
        """Say what the next delivery will be; in the maker's thread."""
        self._expected.append(take)

    def deliver(self, images: Tensor) -> None:
        """Take the images of a chunk, uint8 [1, T, H, W, 3]; they are overwritten afterwards."""
        take = self._expected.popleft()
        if self._recorder is not None:
            self._record(self._recorder, take, images[0])
        self.show(take, images[0])

    def show(self, take: Take, images: Tensor | None) -> None:
        """Hand a chunk to those who watch."""
        if self._outbox is not None:
            copy = None if images is None else images.clone()
            self._outbox.show(Picture(branch=take.branch.name, chunk=take.chunk, images=copy))

    def close(self) -> None:
        """End the branch that is recorded; after the last delivery."""
        if self._recorder is not None and self._branch is not None:
            self._recorder.end()

    def _record(self, recorder: Recorder, take: Take, images: Tensor) -> None:
        branch = take.branch
        if branch.name != self._branch:
            if self._branch is not None:
                recorder.end()
            recorder.begin(branch.name, branch.parent, take.images)
            self._branch = branch.name
        recorder.write(images)


class VideoRecorder:
    """A `Recorder` of MP4 files; each plays to its end at every moment.

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
        self._branch = ""

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
        self.paths[branch], self._branch = path, branch

    def write(self, images: Tensor) -> None:
        """See `Recorder.write`."""
        assert self._writer is not None, "begin() comes first"
        self._writer.write(images)

    def end(self) -> None:
        """See `Recorder.end`."""
        if self._writer is not None:
            self._writer.close()
            self.num_images[self._branch] = self._writer.num_images
