"""How a run goes on: where each chunk's time went, and the line that is printed of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from .config import FPS


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands after a chunk."""

    chunks: int
    """Chunks made, those before a resume included."""
    total: int | None
    """Chunks of the run; None when endless."""
    images: int
    """Images in the file."""
    chunk_images: int
    """Images of the last chunk."""
    network_seconds: float
    """Time the network took for the last chunk; 0 where it was given."""
    decode_seconds: float
    """Time decoding and writing took for the last chunk."""
    fps: float
    """Images a second since the run began."""
    seconds_left: float | None
    """Time left at that pace; None when endless."""
    rate: int = FPS
    """Images that a second of the video has."""

    def __str__(self) -> str:
        """One line for a console."""
        total = "" if self.total is None else f"/{self.total}"
        text = (
            f"chunk {self.chunks}{total}, {self.images / self.rate:.2f} s, "
            f"network {rate(self.chunk_images, self.network_seconds)}, "
            f"decode {rate(self.chunk_images, self.decode_seconds)}, "
            f"all {self.fps:.1f} fps"
        )
        return text if self.seconds_left is None else f"{text}, {self.seconds_left:.0f} s left"


def rate(images: int, seconds: float) -> str:
    """Images a second in words; `idle` where nothing took time."""
    return f"{images / seconds:.1f} fps" if seconds else "idle"


class Pace:
    """Where the time goes, chunk by chunk."""

    def __init__(
        self,
        total: int | None,
        chunks: int,
        device: torch.device | str,
        *,
        passes: Sequence[int] = (),
        rate: int = FPS,
    ) -> None:
        """`passes` are the network's for each chunk from here to the end, where they differ."""
        self._passes, self._rate = list(accumulate(passes)), rate
        self._total, self._chunks, self._device = total, chunks, torch.device(device)
        self._began = self._marked = time.perf_counter()
        self._images = 0
        self._network_seconds = 0.0
        self._marks: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def network_begins(self) -> None:
        """The chunk's latents are asked for."""
        self._marked = time.perf_counter()
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(torch.cuda.current_stream(self._device))
            self._marks.append((begin, end))

    def network_ends(self) -> None:
        """The chunk's latents are made, or on a card on their way: nothing waits for them here."""
        if self._device.type != "cuda":
            self._network_seconds = time.perf_counter() - self._marked
            return
        self._marks[-1][1].record(torch.cuda.current_stream(self._device))
        while self._marks and self._marks[0][1].query():
            begin, end = self._marks.popleft()
            self._network_seconds = begin.elapsed_time(end) / 1e3

    def chunk_done(self, chunks: int, images: int, images_in_file: int) -> Progress:
        """The chunk is handed on. On a card the network's time is that of an earlier chunk."""
        now = time.perf_counter()
        decode_seconds = max(0.0, now - self._marked - self._network_seconds)
        self._marked, self._images = now, self._images + images
        left = None
        if self._total is not None:
            left = self._left(self._total, chunks) * (now - self._began)
        network_seconds = self._network_seconds
        if self._device.type != "cuda":
            self._network_seconds = 0.0
        return Progress(
            chunks=chunks,
            total=self._total,
            images=images_in_file,
            chunk_images=images,
            network_seconds=network_seconds,
            decode_seconds=decode_seconds,
            fps=self._images / (now - self._began),
            seconds_left=left,
            rate=self._rate,
        )

    def _left(self, total: int, chunks: int) -> float:
        """What is left of the run, as a multiple of what is done."""
        made = chunks - self._chunks
        if not self._passes:
            return (total - chunks) / made
        done = self._passes[made - 1]
        return (self._passes[-1] - done) / done
