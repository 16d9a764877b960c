"""Which card is the current one, and ways to it on which nothing waits."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def make_current(device: str) -> None:
    """What asks for no card in particular takes this one, where it is a card that is there."""
    kind, _, number = device.partition(":")
    if kind == "cuda" and number.isdecimal() and int(number) < torch.cuda.device_count():
        torch.cuda.set_device(int(number))


@lru_cache(maxsize=1)
def cpu_facts() -> dict[str, Any]:
    """What this machine's CPU is and can, by torch's names; nothing where torch cannot tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)
    return dict(capabilities())


def empty_caches() -> None:
    """Give back what torch keeps for itself of cards' memory and of pinned memory."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        with suppress(AttributeError):  # torch before 2.7 has no way to
            torch._C._host_emptyCache()


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device; a copy from pageable memory would wait for all its other work."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
