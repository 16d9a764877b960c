"""The weights of one update, which belong to all of its samples together.

A weight may depend on every sample of an update (its mean, its best), while samples come in
micro-batches on many processes. Where an update is a single micro-batch a process, scores are
exchanged as they come; otherwise they are all found first, by rollouts without gradient, and
looked up as the same rollouts come again under autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..objective.redmd import ReDMDConfig, Weigher
from ..objective.weights import Weighed, weigh
from .distributed import gathered, rank

Judge = Callable[[Tensor, list[int]], Tensor]
"""Scores [B] of clean latents and the numbers of their prompts."""


class Weighing:
    """Scores and weights of an update, a window at a time."""

    def __init__(self, judge: Judge, config: ReDMDConfig, windows: int) -> None:
        self.judge, self.config = judge, config
        self.scores: list[list[Tensor]] = [[] for _ in range(windows)]
        self.ahead: list[Weighed] | None = None

    def know(self, scores: Sequence[Tensor]) -> None:
        """Take all of this process' scores, [windows, B] a micro-batch, before any is weighed."""
        self.scores = [[row] for row in torch.cat(list(scores), dim=1)]
        self.ahead = self._weighed()

    def of(self, samples: range, numbers: list[int]) -> Weigher:
        """Weights of a micro-batch of the update."""

        def weigher(x0: Tensor, window: int) -> Tensor:
            if self.ahead is not None:
                return self.ahead[window].weights[list(samples)]
            scores = self.judge(x0, numbers)
            self.scores[window].append(scores)
            if not self.config.weights.of_batch:
                return self._weigh(scores).weights
            start = rank() * len(samples)
            return self._weigh(gathered(scores)).weights[start : start + len(samples)]

        return weigher

    def log(self) -> Weighed:
        """The update's weights; of a rollout of many windows, the last one's."""
        return (self.ahead or self._weighed())[-1]

    def _weighed(self) -> list[Weighed]:
        return [self._weigh(gathered(torch.cat(row))) for row in self.scores]

    def _weigh(self, scores: Tensor) -> Weighed:
        return weigh(scores, self.config.weights, self.config.reward_sign)
