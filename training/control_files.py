"""Control contexts of clips as files: what a data set writes, and training reads.

A context is what VACE reads of a video: latents of its kept (inactive) part and of the part that is
to be made (reactive), and the mask (VACE, arXiv 2503.07598, sec. 3.2). A clip may have several: its
outlines, a masked region of it, or nothing at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rf_core.numbered import numbered
from rf_core.writing import whole_file

TENSORS = ("inactive", "reactive", "mask", "row")


def controls_path(folder: Path, start: int) -> Path:
    """The shard of the contexts of clips from number `start` on."""
    return folder / _shard_name(start)


def _shard_name(start: int) -> str:
    return f"controls-{start:06}.safetensors"


def shards_of_controls(folder: Path) -> list[Path]:
    """The shards that a folder holds."""
    return [path for _, path in numbered(folder, _shard_name)]


def write_controls(
    path: Path, inactive: Tensor, reactive: Tensor, mask: Tensor, rows: Sequence[int]
) -> None:
    """Write N contexts, whole or not at all.

    Latents [N, C, F, h, w], the mask packed as [N, 64, F, h, w] of 0 and 1; `rows` are the numbers
    of the clips that they control.
    """
    tensors = {
        "inactive": inactive.half(),
        "reactive": reactive.half(),
        "mask": mask.to(torch.uint8),
        "row": torch.tensor(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
