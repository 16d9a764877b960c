"""Time taken on a device: taken when it has done its work, not when it was given it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class Stopwatch:
    """Seconds from call to call, the device having done its work."""

    def __init__(self, device: str | torch.device) -> None:
        self._device = torch.device(device)
        self._began = self._now()

    def lap(self) -> float:
        """Seconds by the wall since the last lap, or since the start."""
        return self.laps()[0]

    def laps(self) -> tuple[float, float]:
        """The same, and the CPU time of all threads, which other processes do not lengthen."""
        (wall, cpu), self._began = self._began, self._now()
        return self._began[0] - wall, self._began[1] - cpu

    def _now(self) -> tuple[float, float]:
        wait(self._device)
        return time.perf_counter(), time.process_time()


def wait(device: str | torch.device) -> None:
    """Until the device has done all it was given."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def seconds_of(call: Callable[[], Any], device: str | torch.device, repeats: int = 5) -> float:
    """The least time a call takes, after a first one that is not counted."""
    call()
    watch, seconds = Stopwatch(device), []
    for _ in range(repeats):
        call()
        seconds.append(watch.lap())
    return min(seconds)
