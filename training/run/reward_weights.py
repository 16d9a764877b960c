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

from ..objective.redmd import ReDMDConfig, WeightFn
from ..objective.weights import SampleWeights, sample_weights
from .distributed import all_gather, rank

LatentReward = Callable[[Tensor, list[int]], Tensor]
"""Scores [B] of clean latents and the numbers of their prompts."""


class RewardWeights:
    """Scores and weights of an update, a window at a time."""

    def __init__(self, reward: LatentReward, config: ReDMDConfig, windows: int) -> None:
        self.reward, self.config = reward, config
        self.scores: list[list[Tensor]] = [[] for _ in range(windows)]
        self.precomputed: list[SampleWeights] | None = None

    def set_scores(self, scores: Sequence[Tensor]) -> None:
        """Take all of this process' scores, [windows, B] a micro-batch, before any is weighed."""
        self.scores = [[row] for row in torch.cat(list(scores), dim=1)]
        self.precomputed = self._window_weights()

    def of(self, samples: range, numbers: list[int]) -> WeightFn:
        """Weights of a micro-batch of the update."""

        def weight_fn(x0: Tensor, window: int) -> Tensor:
            if self.precomputed is not None:
                return self.precomputed[window].weights[list(samples)]
            scores = self.reward(x0, numbers)
            self.scores[window].append(scores)
            if not self.config.weights.depends_on_batch:
                return self._sample_weights(scores).weights
            start = rank() * len(samples)
            return self._sample_weights(all_gather(scores)).weights[start : start + len(samples)]

        return weight_fn

    def log(self) -> SampleWeights:
        """The update's weights; of a rollout of many windows, the last one's."""
        return (self.precomputed or self._window_weights())[-1]

    def _window_weights(self) -> list[SampleWeights]:
        return [self._sample_weights(all_gather(torch.cat(row))) for row in self.scores]

    def _sample_weights(self, scores: Tensor) -> SampleWeights:
        return sample_weights(scores, self.config.weights, self.config.reward_sign)
