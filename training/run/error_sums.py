"""Errors summed by name: of kinds of chunk, or of timesteps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .distributed import all_gather


class ErrorSums:
    """Sums and counts of errors under each of some names, of this process."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.sums = torch.zeros(2, len(names), dtype=torch.float64)

    def add(self, errors: Tensor, which: Tensor) -> None:
        """Add errors [B, N], by the index of each in `names`."""
        values, places = errors.detach().double().cpu().flatten(), which.cpu().flatten()
        self.sums[0].index_add_(0, places, values)
        self.sums[1].index_add_(0, places, torch.ones_like(values))

    def means(self) -> tuple[float, dict[str, float]]:
        """The mean error over all processes, and by name, where there are some."""
        sums = all_gather(self.sums[None]).sum(dim=0)
        each = zip(self.names, *sums.tolist(), strict=True)
        by_name = {name: total / count for name, total, count in each if count}
        return float(sums[0].sum() / sums[1].sum()), by_name
