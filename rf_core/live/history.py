"""What a live stream keeps of its past, so that it can go back: bounded, and the oldest goes first.

The clean latents of every chunk, some kilobytes each, beside snapshots that are gigabytes and
sparse. From a snapshot `Stream.replay` goes to any later chunk, under what took hold on the way.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice, takewhile

from torch import Tensor

from ..ranges import MANY, check_counts
from ..state import Snapshot
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
class Force:
    """What chunks are made under, besides the stream's own state."""

    text: str
    """The prompt, or what a blend moves to."""
    loras: tuple[tuple[str, float], ...] = ()
    """Every LoRA's strength."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A chunk that was made."""

    latents: Tensor
    """Clean latents [B, C, F, h, w], float32 on the CPU."""
    images: int
    """How many it decodes to."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """The stream as it was before a chunk, and before what took hold with it."""

    chunk: int
    snapshot: Snapshot
    images: int
    """Images of the session before it."""
    force: Force


@dataclass(frozen=True, kw_only=True)
class Way:
    """How to get back to a chunk."""

    mark: Mark
    chunks: tuple[Kept, ...]
    """Those from the mark on."""
    acts: tuple[tuple[int, Action], ...]
    """What took hold on the way, with its chunk, in order."""


class History:
    """The past of one line of chunks."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._marks: list[Mark] = []
        self._kept: deque[Kept] = deque()  # from the first mark on
        self._latent_bytes = 0
        self._acts: deque[tuple[int, Action]] = deque()
        self._largest = 0

    @property
    def oldest(self) -> int | None:
        """The first chunk that can be gone back to; None where there is none."""
        return self._marks[0].chunk if self._marks else None

    @property
    def nbytes(self) -> int:
        """RAM that it takes."""
        return self._latent_bytes + self._snapshot_bytes

    @property
    def _snapshot_bytes(self) -> int:
        return sum(mark.snapshot.nbytes for mark in self._marks)

    def wants_mark(self, chunk: int) -> bool:
        """Whether a snapshot is to be taken before this chunk, and would not push out all else."""
        if not self._marks:
            return self._largest <= self.limits.max_bytes
        fits = self._largest + self._latent_bytes <= self.limits.max_bytes
        every = self.limits.every * max(1, -(-self._largest // _COPIED))
        return fits and chunk - self._marks[-1].chunk >= every

    def latents(self) -> list[Tensor]:
        """The clean latents of the last chunks, as far as they are kept, oldest first."""
        return [kept.latents for kept in self._kept]

    def mark(self, mark: Mark) -> None:
        """Keep a snapshot, where it fits."""
        self._largest = max(self._largest, mark.snapshot.nbytes)
        if self._marks and self._largest + self._latent_bytes > self.limits.max_bytes:
            return
        self._marks.append(mark)
        while len(self._marks) > self.limits.snapshots:
            del self._marks[self._least_missed()]
        self._make_room()

    def act(self, chunk: int, action: Action) -> None:
        """Keep what takes hold with the next chunk."""
        if self._marks:
            self._acts.append((chunk, action))

    def add(self, kept: Kept) -> None:
        """Keep the next chunk."""
        if self._marks:
            self._kept.append(kept)
            self._latent_bytes += kept.latents.nbytes
            self._make_room()

    def way_to(self, chunk: int) -> Way:
        """How to get to before a chunk, of those from `oldest` to the next one."""
        mark = next(each for each in reversed(self._marks) if each.chunk <= chunk)
        first = self._marks[0].chunk
        return Way(
            mark=mark,
            chunks=tuple(islice(self._kept, mark.chunk - first, chunk - first)),
            acts=tuple(act for act in self._acts if mark.chunk <= act[0] < chunk),
        )

    def go_back(self, chunk: int) -> None:
        """Let go of a chunk, and what followed."""
        first = self._marks[0].chunk
        while len(self._kept) > chunk - first:
            self._latent_bytes -= self._kept.pop().latents.nbytes
        self._marks = [mark for mark in self._marks if mark.chunk <= chunk]
        self._acts = deque(takewhile(lambda act: act[0] < chunk, self._acts))

    def _make_room(self) -> None:
        while self._marks and self.nbytes > self.limits.max_bytes:
            if len(self._marks) > 2 and self._snapshot_bytes > self._latent_bytes:
                del self._marks[self._least_missed()]
                continue
            gone = self._marks.pop(0)
            self._forget_before(self._marks[0].chunk - gone.chunk if self._marks else None)

    def _forget_before(self, chunks: int | None) -> None:
        """So many of the first chunks go, or all of them, with what took hold with them."""
        for _ in range(len(self._kept) if chunks is None else chunks):
            self._latent_bytes -= self._kept.popleft().latents.nbytes
        oldest = self.oldest
        while self._acts and (oldest is None or self._acts[0][0] < oldest):
            self._acts.popleft()

    def _least_missed(self) -> int:
        """The mark, neither the first nor the last, that leaves the smallest gap for its age."""
        now = self._marks[-1].chunk + self.limits.every

        def missed(at: int) -> float:
            before, mark, after = (each.chunk for each in self._marks[at - 1 : at + 2])
            return (after - before) / (now - mark)

        return min(range(1, len(self._marks) - 1), key=missed)
