"""From latents to scores: a reward, shown what the decoder makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rf_core.decoders.decoder import Decoder

from ..objective.redmd import Anchor
from ..run.reward_weights import LatentReward


class Reward(Protocol):
    """Judges finished videos."""

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
    """One score of a run's clean latents, by the reward of that name; decodes a sample at a time.

    ValueError, once it judges, where the reward gives no such score.
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
    """The last image of some latent frames, encoded as the first frame of a clip."""
    assert decoder is not None

    @torch.no_grad()
    def anchor(frames: Tensor) -> Tensor:
        images, _ = decoder.decode(frames, None)
        return decoder.encode(images[:, -1:])

    return anchor
