"""What a live stream keeps of its past, so that it can go back: bounded, and the oldest goes first.

The clean latents of every chunk, some kilobytes each, and sparse restore points, whose snapshots
are gigabytes. From a restore point `Stream.replay` goes to any later chunk, with the actions that
took hold in between.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice, takewhile

from torch import Tensor

from ..ranges import MANY, check_counts
from ..state import Snapshot
from ..stream import GUIDE_STRENGTH
from .transition import Action

_COPIED = 2**28  # bytes of a snapshot that `Limits.every` is for


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much of the past is kept."""

    max_bytes: int = 16 * 2**30
    """RAM of latents and snapshots together, in bytes; one snapshot more while it is taken."""
    every: int = 8
    """Chunks from one snapshot to the next, for each 256 MiB that one takes: it has to be copied.
    Going back makes up to as many again, by a pass each."""
    snapshots: int = 32
    """The most that are kept; where there are more, one goes that leaves a small gap for its age,
    so that they lie the denser the nearer they are."""

    def __post_init__(self) -> None:
        check_counts(self, max_bytes=(0, 2**50), every=(1, MANY), snapshots=(2, MANY))


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """The prompt and the LoRAs that chunks are made with; a stream's state has neither."""

    text: str
    """The prompt, or what a blend moves to."""
    loras: tuple[tuple[str, float], ...] = ()
    """Every LoRA's strength."""
    strength: float = GUIDE_STRENGTH
    """The source's, where there is one."""


@dataclass(frozen=True, kw_only=True)
class PastChunk:
    """A chunk that was made."""

    latents: Tensor
    """Clean latents [B, C, F, h, w], float32 on the CPU."""
    images: int
    """How many it decodes to."""


@dataclass(frozen=True, kw_only=True)
class RestorePoint:
    """The stream as it was before a chunk, and before what took hold with it."""

    chunk: int
    snapshot: Snapshot
    images: int
    """Images of the session before it."""
    settings: StreamSettings
    since: int = 0
    """Image of the session that the decoder's stream began with."""


@dataclass(frozen=True, kw_only=True)
class RewindPlan:
    """How to get back to a chunk."""

    point: RestorePoint
    chunks: tuple[PastChunk, ...]
    """Those after the restore point."""
    actions: tuple[tuple[int, Action], ...]
    """Those that took hold since then, each with its chunk, in order."""


class History:
    """The past of one line of chunks."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._points: list[RestorePoint] = []
        self._past_chunks: deque[PastChunk] = deque()  # from the first restore point on
        self._latent_bytes = 0
        self._actions: deque[tuple[int, Action]] = deque()
        self._largest = 0

    @property
    def oldest(self) -> int | None:
        """The first chunk that can be gone back to; None where there is none."""
        return self._points[0].chunk if self._points else None

    @property
    def nbytes(self) -> int:
        """RAM that it takes."""
        return self._latent_bytes + self._snapshot_bytes

    @property
    def _snapshot_bytes(self) -> int:
        return sum(point.snapshot.nbytes for point in self._points)

    def wants_restore_point(self, chunk: int) -> bool:
        """Whether a snapshot is to be taken before this chunk, and would not push out all else."""
        if not self._points:
            return self._largest <= self.limits.max_bytes
        fits = self._largest + self._latent_bytes <= self.limits.max_bytes
        every = self.limits.every * max(1, -(-self._largest // _COPIED))
        return fits and chunk - self._points[-1].chunk >= every

    def latents(self) -> list[Tensor]:
        """The clean latents of the last chunks, as far as they are kept, oldest first."""
        return [past_chunk.latents for past_chunk in self._past_chunks]

    def add_restore_point(self, point: RestorePoint) -> None:
        """Keep a snapshot, where it fits."""
        self._largest = max(self._largest, point.snapshot.nbytes)
        if self._points and self._largest + self._latent_bytes > self.limits.max_bytes:
            return
        self._points.append(point)
        while len(self._points) > self.limits.snapshots:
            del self._points[self._least_missed()]
        self._make_room()

    def add_action(self, chunk: int, action: Action) -> None:
        """Keep what takes hold with the next chunk."""
        if self._points:
            self._actions.append((chunk, action))

    def add_chunk(self, past_chunk: PastChunk) -> None:
        """Keep the next chunk."""
        if self._points:
            self._past_chunks.append(past_chunk)
            self._latent_bytes += past_chunk.latents.nbytes
            self._make_room()

    def plan_rewind(self, chunk: int) -> RewindPlan:
        """How to get to before a chunk, of those from `oldest` to the next one."""
        point = next(each for each in reversed(self._points) if each.chunk <= chunk)
        first = self._points[0].chunk
        return RewindPlan(
            point=point,
            chunks=tuple(islice(self._past_chunks, point.chunk - first, chunk - first)),
            actions=tuple(each for each in self._actions if point.chunk <= each[0] < chunk),
        )

    def truncate(self, chunk: int) -> None:
        """Let go of a chunk, and what followed."""
        first = self._points[0].chunk
        while len(self._past_chunks) > chunk - first:
            self._latent_bytes -= self._past_chunks.pop().latents.nbytes
        self._points = [point for point in self._points if point.chunk <= chunk]
        self._actions = deque(takewhile(lambda each: each[0] < chunk, self._actions))

    def _make_room(self) -> None:
        while self._points and self.nbytes > self.limits.max_bytes:
            if len(self._points) > 2 and self._snapshot_bytes > self._latent_bytes:
                del self._points[self._least_missed()]
                continue
            gone = self._points.pop(0)
            self._forget_before(self._points[0].chunk - gone.chunk if self._points else None)

    def _forget_before(self, chunks: int | None) -> None:
        """So many of the first chunks go, or all of them, with what took hold with them."""
        for _ in range(len(self._past_chunks) if chunks is None else chunks):
            self._latent_bytes -= self._past_chunks.popleft().latents.nbytes
        oldest = self.oldest
        while self._actions and (oldest is None or self._actions[0][0] < oldest):
            self._actions.popleft()

    def _least_missed(self) -> int:
        """The point, neither the first nor the last, that leaves the smallest gap for its age."""
        now = self._points[-1].chunk + self.limits.every

        def missed(at: int) -> float:
            before, point, after = (each.chunk for each in self._points[at - 1 : at + 2])
            return (after - before) / (now - point)

        return min(range(1, len(self._points) - 1), key=missed)
