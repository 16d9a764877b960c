"""The gradient of a reward in one update of the generator, and how it compares with matching's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .distributed import all_reduce_sum
from .reward_weights import LatentReward

_NAMES = ("matching_norm", "norm", "share")


class RewardTilt:
    """Sums over an update's samples and windows, for the log."""

    def __init__(self, reward: LatentReward) -> None:
        self.reward = reward
        self._sums, self._count = torch.zeros(len(_NAMES), dtype=torch.float64), 0

    def for_samples(self, numbers: Sequence[list[int]]) -> _Samples:
        """The `Tilt` of a micro-batch, whose prompts have those numbers in each window."""
        return _Samples(self, numbers)

    def note(self, matching: Tensor, tilting: Tensor) -> None:
        """See `Tilt.note`."""
        pull, push = (each.flatten(1).double().norm(dim=1).cpu() for each in (matching, tilting))
        share = push / (pull + push).clamp_min(1e-30)
        self._sums += torch.stack([each.sum() for each in (pull, push, share)])
        self._count += len(pull)

    def log(self) -> dict[str, float]:
        """Means over samples of every process: of the gradients by the latents, the norm of each
        part, and the reward's share of both norms, in [0, 1]."""
        count = max(1.0, all_reduce_sum(float(self._count)))
        sums = map(float, self._sums)
        return {name: all_reduce_sum(each) / count for name, each in zip(_NAMES, sums, strict=True)}


class _Samples:
    def __init__(self, whole: RewardTilt, numbers: Sequence[list[int]]) -> None:
        self.whole, self.numbers, self.note = whole, numbers, whole.note

    def __call__(self, x0: Tensor, window: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        scores, slopes = self.whole.reward.gradients(x0, self.numbers[window], mask)
        if not (scores.isfinite().all() and slopes.isfinite().all()):
            raise ValueError(
                f"the reward gave {scores.tolist()}, or a gradient that is not finite; both must be"
            )
        return scores, slopes
