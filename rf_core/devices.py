"""What a device computes in, which card is the current one, ways to it on which nothing waits."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .config import ModelConfig

MIN_BFLOAT16_DIM = 512
"""Width from which a network is computed in bfloat16 on CPUs that multiply it.

CPU time a chunk in float32 over that in bfloat16, 64x64, one thread of an AMD EPYC (avx512_bf16),
torch 2.13, 2026-11-26: 0.90 at 128, 0.93 at 160 (the demo), 1.06 at 256, 1.22 at 384, 1.27 at 512,
1.35 at 768, 1.43 at 1024, 1.63 at 1536 (the 1.3B: 4.0 and 2.5 s).
"""
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "amx_tile", "bf16")  # the last one Arm's


def make_current(device: str) -> None:
    """What asks for no card in particular takes this one, where it is a card that is there."""
    kind, _, number = device.partition(":")
    if kind == "cuda" and number.isdecimal() and int(number) < torch.cuda.device_count():
        torch.cuda.set_device(int(number))


def preferred_dtype(device: torch.device | str, model: ModelConfig) -> torch.dtype:
    """What a network is computed in where nothing else is asked for.

    bfloat16, in which it is published, on cards and on CPUs that multiply it, float32 elsewhere; a
    small network stays in float32 on every CPU.
    """
    kind = torch.device(device).type
    native = kind == "cpu" and model.dim >= MIN_BFLOAT16_DIM and multiplies_bfloat16()
    return torch.bfloat16 if kind == "cuda" or native else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 and torch the library to use them.

    False where torch cannot tell.
    """
    return torch.backends.mkldnn.is_available() and any(map(cpu_facts().get, _BFLOAT16))


@lru_cache(maxsize=1)
def cpu_facts() -> Mapping[str, Any]:
    """What this CPU is called and can, by torch's names; older ones tell less."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    return {name: getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in _BFLOAT16}


def empty_caches() -> None:
    """Give back what torch keeps for itself of cards' memory and of pinned memory."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        with suppress(AttributeError):  # torch before 2.7 has no way to
            torch._C._host_emptyCache()


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device; a copy from pageable memory would wait for all its other work."""
    if device.type == "cuda" and not host.is_pinned():
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
