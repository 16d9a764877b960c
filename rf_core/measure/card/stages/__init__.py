"""What each process measures: one module a stage, with `run(record, setting)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....config import WAN_SIZE, Grid
from ....stream import latent_size
from ...workload import RANDOM_SIZES
from ..plan import Setting
from ..record import NotRun

_TINY_SIZE = (64, 64)


def workload(setting: Setting) -> dict[str, Any]:
    """Fields of `WorkloadOptions`: what is run, and where.

    NotRun where only the rehearsal makes sense.
    """
    height, width = _TINY_SIZE if setting.rehearsal else WAN_SIZE
    cuda = torch.cuda.is_available()
    if not (cuda or setting.rehearsal):
        raise NotRun("torch sees no CUDA card here; --size tiny rehearses on the CPU")
    return {
        "size": setting.size,
        "height": height,
        "width": width,
        "device": "cuda" if cuda else "cpu",
        "dtype": torch.bfloat16 if cuda else torch.float32,
    }


def grid_of(fields: dict[str, Any]) -> Grid:
    """Tokens of a latent frame of what is run."""
    patch = RANDOM_SIZES[fields["size"]].patch_size
    return Grid.of_latents(*latent_size(fields["height"], fields["width"], patch), patch)


def off(found: Tensor, wanted: Tensor) -> float:
    """Relative norm of the difference, in float64."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm())


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16` and the like."""
    return str(dtype).removeprefix("torch.")
