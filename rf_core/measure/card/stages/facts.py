"""What the card and its software are, and what the card does in a second at best."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from ...machine import machine
from ...profile import rates
from ..plan import Setting
from ..record import Record
from . import workload

_PACKAGES = ("av", "flash_attn", "flash_attn_interface", "peft", "pytest", "sageattention")


def run(record: Record, setting: Setting) -> None:
    """Versions first, then a copy of 1 GiB and a product of 8192 cubed."""
    fields = workload(setting)
    device = fields["device"]
    record.note("machine", machine(device))
    record.note("installed", [name for name in _PACKAGES if find_spec(name) is not None])
    if device == "cuda":
        record.note("card", _card(device))
    rate = rates(device, fields["dtype"])
    record.note("rates", vars(rate))
    record.note("machine", machine(device))  # again: its clocks, right after the work
    record.say(f"{rate.flops / 1e12:.4g} TFLOP/s of a product, {rate.bytes / 1e12:.3g} TB/s copied")


def _card(device: str) -> dict[str, Any]:
    seen = torch.cuda.get_device_properties(device)
    return {
        "name": seen.name,
        "capability": f"{seen.major}.{seen.minor}",
        "processors": seen.multi_processor_count,
        "memory_bytes": seen.total_memory,
        "free_bytes": torch.cuda.mem_get_info(device)[0],
    }
