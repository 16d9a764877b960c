"""What a run says: lines on the console while it goes on, and its pace on the node at its end."""

from __future__ import annotations

import time

from ..rf_core.pace import Progress, rate
from . import host

LINE_SECONDS = 5.0
"""Least time between two lines on the console."""


class Report:
    """Sums the pace of a run's chunks; `text` gives it when the run has ended."""

    def __init__(self) -> None:
        self._began = self._said = time.perf_counter()
        self._images = self._network_images = 0
        self._network = self._decode = self._seconds = 0.0

    def chunk(self, progress: Progress) -> None:
        """A chunk is handed on."""
        self._images += progress.chunk_images
        if progress.network_seconds:  # neither given, nor on a card still being made
            self._network_images += progress.chunk_images
        self._network += progress.network_seconds
        self._decode += progress.decode_seconds
        now = time.perf_counter()
        if now - self._said >= LINE_SECONDS:
            host.log(str(progress))
            self._said = now

    def end(self) -> None:
        """The file, if there is one, is complete."""
        self._seconds = time.perf_counter() - self._began

    def text(self, decoded: bool) -> str:
        """Images a second of each part; without decoding only of the network and of all."""
        parts = [f"network {rate(self._network_images, self._network)}"]
        if decoded:
            parts.append(f"decode {rate(self._images, self._decode)}")
        return ", ".join([*parts, f"end to end {rate(self._images, self._seconds)}"])
