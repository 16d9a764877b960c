"""The miniature world's exact tracker as a reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .tracker import score


class TrackerReward:
    """The miniature world's tracker as a `Reward`: scores `motion` and `caption`.

    `motion` is the measured speed, in shape sizes a latent frame; `caption` is the
    share of attributes that are right. A video in which nothing is seen has motion 0.
    """

    scores = ("motion", "caption")

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """See `Reward`. Videos come over to the CPU in one copy; scores are there."""
        pairs = zip(videos.cpu(), prompts, strict=True)
        found = [score(video, prompt) for video, prompt in pairs]
        motion = torch.tensor([each["measured_speed"] for each in found]).nan_to_num()
        names = ("colour", "shape", "direction", "speed")
        caption = torch.tensor([[each[name] for name in names] for each in found]).mean(1)
        return {"motion": motion, "caption": caption}
