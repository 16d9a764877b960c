"""The most memory that a run has held, as counted by the card or by the system."""

from __future__ import annotations

import sys
import time

import torch

from rf_core.memory.plan import GB

from .distributed import all_reduce_max


def reset_peak(device: torch.device) -> None:
    """Count anew on a card; a process' resident peak cannot be taken back."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Bytes held at most: of a card, what torch has allocated there; else the process' resident
    memory, 0 where the system does not count it (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def costs(began: float, device: torch.device) -> dict[str, float]:
    """What an update has taken, for the log: seconds since `began`, and the run's peak so far on
    the process that holds most. Every process calls this together."""
    peak = all_reduce_max(peak_bytes(device)) / GB
    return {"seconds": time.perf_counter() - began} | ({"memory/peak_gb": peak} if peak else {})
