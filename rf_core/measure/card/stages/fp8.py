"""Images a second with the blocks' linear layers in fp8: it must beat bfloat16, or be withdrawn."""

from __future__ import annotations

import torch

from ....kernels.availability import multiplies_fp8
from ..plan import Setting
from ..record import NotRun, Record
from . import workload
from .bench import measure

_CHUNKS = 15


def run(record: Record, setting: Setting) -> None:
    """The network alone."""
    device = workload(setting)["device"]
    if device == "cuda" and not multiplies_fp8(torch.device(device)):
        raise NotRun("this card multiplies no fp8")
    measure(record, setting, chunks=_CHUNKS, weights="fp8", decoder="none")
