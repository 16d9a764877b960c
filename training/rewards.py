"""Rewards: what a finished sample is worth, and how much it therefore counts.

A reward reads videos and prompts and gives named scores. The weight of a sample is exp(beta r) of
one of them (Reward Forcing, arXiv 2512.04678, sec. 3.3; beta = 2 is the paper's temperature 1/2).
Raw exponentials of a score of unit variance leave little of a batch: `effective_samples` says how
much, and the fields below are what can be done about it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from .losses import effective_samples, reward_weights
from .world.tracker import score


class Reward(Protocol):
    """Judges finished videos."""

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Scores [B] by name, of videos [B, T, 3, H, W] in [0, 1] and their prompts."""
        ...


@dataclass(frozen=True, kw_only=True)
class WeightConfig:
    """From scores to weights."""

    beta: float = 2.0
    """Strength; 0 is plain distribution matching."""
    baseline: Literal["none", "batch"] = "none"
    """What is taken off a score first: nothing, as published, or the batch's mean."""
    unit: Literal["none", "batch"] = "none"
    """What a score is divided by: nothing, as published, or the batch's standard deviation."""
    limit: float | None = None
    """Largest absolute score after that; None for no limit."""
    mean_one: bool = False
    """Whether weights are divided by their mean, so that they move no learning rate."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise ValueError(f"beta is {self.beta}; give a number from 0 (no reward) on")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"limit is {self.limit}; give a positive score, or None for no limit")


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """Weights of a batch, and what a log should say of them."""

    weights: Tensor
    """[B]"""
    mean_score: float
    effective_share: float
    """Effective sample size over the batch size, in (0, 1]."""


def weigh(score_B: Tensor, config: WeightConfig) -> Weighed:
    """Weights of a batch's scores; ValueError for a score that is not finite."""
    if not score_B.isfinite().all():
        raise ValueError(f"the reward gave {score_B.tolist()}; a score must be finite")
    reward = score_B.double()
    if config.baseline == "batch":
        reward = reward - reward.mean()
    if config.unit == "batch":
        reward = reward / reward.std(correction=0).clamp_min(1e-6)
    if config.limit is not None:
        reward = reward.clamp(-config.limit, config.limit)
    weights = reward_weights(reward, config.beta)
    if config.mean_one:
        weights = weights / weights.mean()
    return Weighed(
        weights=weights.float(),
        mean_score=float(score_B.mean()),
        effective_share=float(effective_samples(weights)) / len(score_B),
    )


class TrackerReward:
    """The miniature world's exact judge: `motion` is the measured speed, in sizes a latent frame.

    `caption` is the share of attributes that are right. A video in which nothing is seen moves 0.
    """

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """See `Reward`."""
        found = [score(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]
        motion = torch.tensor([each["measured_speed"] for each in found]).nan_to_num()
        names = ("colour", "shape", "direction", "speed")
        caption = torch.tensor([[each[name] for name in names] for each in found]).mean(1)
        return {"motion": motion, "caption": caption}
