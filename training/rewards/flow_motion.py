"""Motion as a reward, by optical flow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..measures.metrics import FlowEstimator, lucas_kanade, motion


class FlowMotionReward:
    """Motion as a `Reward`: scores `motion` and `mean_motion`, in pixels an image.

    They grow with speed alone, camera shake and flashing included, and with the picture's size:
    normalise them by the batch (`baseline`, `unit` of `training.objective.weights.WeightConfig`).
    """

    scores = ("motion", "mean_motion")

    def __init__(self, estimate: FlowEstimator = lucas_kanade) -> None:
        self.estimate = estimate

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Scores [B], float32 on the CPU, of videos [B, T, 3, H, W] in [0, 1]; see `Reward`."""
        found = [motion(video, self.estimate) for video, _ in zip(videos, prompts, strict=True)]
        return {name: torch.tensor([each[name] for each in found]) for name in self.scores}
