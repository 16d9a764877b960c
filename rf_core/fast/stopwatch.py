"""Time taken on a device: taken when it has done its work, not when it was given it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_FLUSH_BYTES = 256 << 20  # several times the second-level cache of any card


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


def device_seconds(call: Callable[[], Any], device: str | torch.device, repeats: int = 9) -> float:
    """The median time a short call takes on the device alone, launches hidden and caches cold.

    Before each call the device writes more than its caches hold, so that the call reads memory.
    """
    device = torch.device(device)
    call()
    if device.type != "cuda":
        return seconds_of(call, device, repeats)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in pairs:
        flush.zero_()
        begin.record(torch.cuda.current_stream(device))
        call()
        end.record(torch.cuda.current_stream(device))
    wait(device)
    return statistics.median(begin.elapsed_time(end) / 1e3 for begin, end in pairs)


def captured(call: Callable[[], Any], device: str | torch.device) -> Callable[[], Any]:
    """The call as a CUDA graph, replayed; the call itself elsewhere. It must have run once."""
    if torch.device(device).type != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
