"""Which card is the current one, and ways to it on which nothing waits."""

from __future__ import annotations

import torch
from torch import Tensor


def make_current(device: str) -> None:
    """What asks for no card in particular takes this one, where it is a card that is there."""
    index = torch.device(device).index if device.startswith("cuda") else None
    if index is not None and index < torch.cuda.device_count():
        torch.cuda.set_device(index)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device; a copy from pageable memory would wait for all its other work."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
