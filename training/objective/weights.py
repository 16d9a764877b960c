"""Reward weights: how much each sample counts in the loss.

The weight of a sample is exp(beta r) of one score of a reward
(Reward Forcing, arXiv 2512.04678, sec. 3.3; beta = 2 is the paper's temperature 1/2).
Raw exponentials of a score of unit variance leave little of a batch: `effective_samples` says how
much; the fields below normalise them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rf_core.ranges import MANY, check_numbers

from .losses import effective_samples, reward_weights

WEIGHTING = ("beta", "baseline", "unit", "limit", "effective_share", "mean_one")
"""Fields of `WeightConfig` that leave alone which samples there are."""


@dataclass(frozen=True, kw_only=True)
class WeightConfig:
    """From scores to weights; the defaults are the published form, exp(2 r)."""

    beta: float = 2.0
    """Strength; 0 is plain distribution matching."""
    baseline: Literal["none", "batch"] = "none"
    """What is taken off a score first: nothing, as published, or the update's mean."""
    unit: Literal["none", "batch"] = "none"
    """What a score is divided by: nothing, as published, or the update's standard deviation."""
    limit: float | None = None
    """Largest absolute score after that; None for no limit."""
    effective_share: float | None = None
    """Where given, beta is found for every update so that the effective sample size is this share
    of the batch; all samples of an update end at one step, so this normalises step by step."""
    mean_one: bool = False
    """Whether weights are divided by their mean, so that they move no learning rate."""
    best_of: int = 1
    """Where above 1, only the best of so many samples of each prompt counts, and for all of them;
    nothing else here then has an effect."""
    shuffled: bool = False
    """Whether each sample is given its neighbour's weight: a control, in which weights vary as
    much as ever but mean nothing."""

    def __post_init__(self) -> None:
        check_numbers(self, beta=(0, 1000.0), limit=(1e-6, math.inf), best_of=(1, MANY))
        check_numbers(self, effective_share=(1e-6, 1))

    @property
    def depends_on_batch(self) -> bool:
        """Whether a sample's weight depends on the other samples of its update."""
        tied = (self.baseline, self.unit) != ("none", "none") or self.effective_share is not None
        return tied or self.mean_one or self.best_of > 1 or self.shuffled


@dataclass(frozen=True, kw_only=True)
class SampleWeights:
    """The weights of an update's samples, with statistics for the log."""

    weights: Tensor
    """[N]"""
    mean_score: float
    effective_share: float
    """Effective sample size over the batch size, in (0, 1]."""
    quantiles: tuple[float, float, float]
    """Of the weights over their mean: 10 %, 50 % and 90 %."""


def sample_weights(score_N: Tensor, config: WeightConfig, sign: int = 1) -> SampleWeights:
    """Weights of an update's scores; ValueError for a score that is not finite.

    `sign` -1 weights by exp(-beta r).
    """
    if not score_N.isfinite().all():
        raise ValueError(f"the reward gave {score_N.tolist()}; a score must be finite")
    weights = _weights(score_N.double(), config, sign)
    if config.shuffled:
        weights = weights.roll(1)
    relative = weights / weights.mean()
    low, median, high = relative.quantile(weights.new_tensor([0.1, 0.5, 0.9])).tolist()
    return SampleWeights(
        weights=(relative if config.mean_one else weights).float(),
        mean_score=float(score_N.mean()),
        effective_share=float(effective_samples(weights)) / len(score_N),
        quantiles=(low, median, high),
    )


def _weights(reward_N: Tensor, config: WeightConfig, sign: int) -> Tensor:
    if config.best_of > 1:
        groups = sign * reward_N.unflatten(0, (-1, config.best_of))
        best = torch.nn.functional.one_hot(groups.argmax(1), config.best_of)
        return (config.best_of * best).flatten().to(reward_N)
    if config.baseline == "batch":
        reward_N = reward_N - reward_N.mean()
    if config.unit == "batch":
        reward_N = reward_N / reward_N.std(correction=0).clamp_min(1e-6)
    if config.limit is not None:
        reward_N = reward_N.clamp(-config.limit, config.limit)
    if config.effective_share is None:
        return reward_weights(sign * reward_N, config.beta)
    below_best = sign * reward_N - (sign * reward_N).max()
    return reward_weights(below_best, beta_for(below_best, config.effective_share))


def beta_for(reward_N: Tensor, share: float, largest: float = 1e3) -> float:
    """The beta at which the effective sample size is `share` of the batch, by bisection.

    The best reward must be 0. Rewards that are too alike for that share give `largest`.
    """
    low, high = 0.0, largest
    for _ in range(60):
        middle = (low + high) / 2
        found = effective_samples(reward_weights(reward_N, middle)) / len(reward_N)
        low, high = (middle, high) if found > share else (low, middle)
    return (low + high) / 2
