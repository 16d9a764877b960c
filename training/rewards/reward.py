"""Rewards of videos, and of latents through the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rf_core.decoders.decoder import Decoder

from ..objective.redmd import Anchor
from ..run.reward_weights import LatentReward


class Reward(Protocol):
    """Scores finished videos."""

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Scores [B] by name, of videos [B, T, 3, H, W] in [0, 1] and their prompts."""
        ...


def latent_reward(
    reward: Reward,
    name: str,
    score: str,
    decoder: Decoder,
    prompts: list[str],
    device: torch.device,
) -> LatentReward:
    """One score of a reward as a function of clean latents; decodes a sample at a time.

    `name` is the reward's, for messages. The function raises ValueError where the reward has no
    such score.
    """

    @torch.no_grad()
    def score_latents(x0: Tensor, numbers: list[int]) -> Tensor:
        parts = [decoder.decode(each, None)[0] for each in x0.split(1)]
        texts = [prompts[number] for number in numbers]
        scores = reward(torch.cat(parts), texts)
        if score not in scores:
            raise ValueError(f"reward.score is {score!r}; {name} gives {', '.join(scores)}")
        return scores[score].to(device)

    return score_latents


def image_anchor(decoder: Decoder | None) -> Anchor:
    """Decode latent frames, and encode their last image as the first frame of a clip."""
    assert decoder is not None

    @torch.no_grad()
    def anchor(frames: Tensor) -> Tensor:
        images, _ = decoder.decode(frames, None)
        return decoder.encode(images[:, -1:])

    return anchor
