"""Reward weights of the samples of one update.

A weight may depend on all samples of an update (their mean, the best of them), but samples come in
micro-batches on many processes. With a single micro-batch a process, scores are gathered as they
are computed. Otherwise all are computed first, by rollouts without gradient, and looked up when
the same rollouts are repeated under autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..objective.redmd import ReDMDConfig, WeightFn
from ..objective.weights import SampleWeights, sample_weights
from .distributed import all_gather, share_number


class LatentReward(Protocol):
    """What samples are weighted by, or moved by where it is differentiable."""

    def __call__(self, x0: Tensor, numbers: list[int], /) -> Tensor:
        """Scores [B] of clean latents and the numbers of their prompts."""
        ...

    def gradients(
        self, x0: Tensor, numbers: list[int], mask: Tensor | None, /
    ) -> tuple[Tensor, Tensor]:
        """The same scores, and their gradient by the latents where `mask` is true, 0 elsewhere."""
        ...

    def take_means(self) -> dict[str, float]:
        """What it is made of, by name: means since the last call, over all processes."""
        ...


class RewardWeights:
    """Scores and weights of an update, for each window of the rollout."""

    def __init__(
        self,
        reward: LatentReward,
        config: ReDMDConfig,
        windows: int,
        sequence_over: int | None = None,
    ) -> None:
        self.reward, self.config, self.sequence_over = reward, config, sequence_over
        self.scores: list[list[Tensor]] = [[] for _ in range(windows)]
        self.precomputed: list[SampleWeights] | None = None

    def set_scores(self, scores: Sequence[Tensor]) -> None:
        """Set all scores of this process before any loss: [windows, B] for each micro-batch."""
        self.scores = [[row] for row in torch.cat(list(scores), dim=1)]
        self.precomputed = self._window_weights()

    def for_samples(self, samples: range, numbers: Sequence[list[int]]) -> WeightFn:
        """The weights of a micro-batch, whose prompts have those numbers in each window."""

        def weight_fn(x0: Tensor, window: int) -> Tensor:
            if self.precomputed is not None:
                return self.precomputed[window].weights[list(samples)]
            scores = self.reward(x0, numbers[window])
            self.scores[window].append(scores)
            if not self.config.weights.depends_on_batch:
                return self._sample_weights(scores).weights
            start = share_number(self.sequence_over) * len(samples)
            every = self._sample_weights(all_gather(scores, self.sequence_over)).weights
            return every[start : start + len(samples)]

        return weight_fn

    def log(self) -> SampleWeights:
        """The weights to log: those of the last window."""
        return (self.precomputed or self._window_weights())[-1]

    def _window_weights(self) -> list[SampleWeights]:
        rows = [all_gather(torch.cat(row), self.sequence_over) for row in self.scores]
        return [self._sample_weights(row) for row in rows]

    def _sample_weights(self, scores: Tensor) -> SampleWeights:
        return sample_weights(scores, self.config.weights, self.config.reward_sign)
