"""Motion as a reward, by optical flow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..measures.metrics import FlowEstimator, LucasKanadeConfig, lucas_kanade, motion_scores

SOFT = LucasKanadeConfig(window=5.0, iterations=2, stiffness=1e-3)
"""A flow whose derivative means something: along random directions it is within a few per cent of
differences, where the exact one's, of six steps at a hundredth of the stiffness, often has the
wrong sign. It reads fast motion low."""


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
        estimate = self.estimate
        if torch.is_grad_enabled() and videos.requires_grad:  # a few images' flow is held at a time
            estimate = partial(checkpoint, estimate, use_reentrant=False)
        found = [motion_scores(video, estimate) for video, _ in zip(videos, prompts, strict=True)]
        return {name: torch.stack([each[name] for each in found]).float() for name in self.scores}


class SoftFlowReward(FlowMotionReward):
    """The same by a smoother flow, which is differentiable.

    Its gradient finds whatever looks like motion, boiling texture too: judge by another measure.
    """

    differentiable = FlowMotionReward.scores

    def __init__(self) -> None:
        super().__init__(partial(lucas_kanade, config=SOFT))
