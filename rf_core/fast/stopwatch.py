"""Time taken on a device: taken when it has done its work, not when it was given it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_FLUSH_BYTES = 256 << 20  # several times the second-level cache of any card
_HEAD_STARTS = (2_000_000, 8_000_000, 32_000_000)  # cycles of a card: 1 to 16 ms


class Stopwatch:
    """Seconds from call to call, the device having done its work.

    Of a CUDA device the work on the caller's current stream: what copies to the host beside it, and
    nobody waits for, is no part of a lap.
    """

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
        wait_for_stream(self._device)
        return time.perf_counter(), time.process_time()


def wait(device: str | torch.device) -> None:
    """Until the device has done all it was given."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def wait_for_stream(device: str | torch.device) -> None:
    """Until what is queued on the caller's current CUDA stream is done; elsewhere as `wait`."""
    if torch.device(device).type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    else:
        wait(device)


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

    Before each call the device writes more than its caches hold, so that the call reads memory. The
    call itself must not wait for the device.
    """
    device = torch.device(device)
    call()
    if device.type != "cuda":
        return seconds_of(call, device, repeats)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        pairs = [_queued_ahead(call, flush) for _ in range(repeats)]
    wait_for_stream(device)
    return statistics.median(begin.elapsed_time(end) / 1e3 for begin, end in pairs)


def _queued_ahead(
    call: Callable[[], Any], flush: torch.Tensor
) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Before and after the call, all of which was queued while the device had other things to do:
    on a slow host a launch takes longer than many a kernel."""
    for cycles in _HEAD_STARTS:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        flush.zero_()
        begin.record()
        call()
        end.record()
        if not begin.query():
            break
    return begin, end


def captured(call: Callable[[], Any], device: str | torch.device) -> Callable[[], Any]:
    """The call as a CUDA graph, replayed; the call itself elsewhere. It must have run once."""
    if torch.device(device).type != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
