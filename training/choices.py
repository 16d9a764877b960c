"""What is chosen by name: the reward, and the data set and metric where a run names none.

The one place that knows both the general code and what is plugged into it, the miniature world
included. Below it, data, evaluation and rewards know their Protocols alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from .data.prompts import DataSet
from .evaluation.metric import PromptMetric
from .rewards.flow_motion import FlowMotionReward
from .rewards.judges import Reward
from .rewards.videoalign import load_videoalign
from .world.captions import Captions
from .world.metric import TrackerMetric
from .world.reward import TrackerReward

DATA_SET: DataSet = Captions()
"""Whose prompts are shown where no prompt file is given: the bundled demo's."""
METRIC: PromptMetric = TrackerMetric()
"""What measures whether videos keep the prompts it can read."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What weighs samples."""

    kind: Literal["none", "tracker", "flow", "videoalign"] = "none"
    """`none` is plain distribution matching; `tracker` knows the miniature world alone."""
    score: str = "motion"
    """Which of the reward's scores counts: tracker motion, caption; flow motion, mean_motion;
    videoalign MQ, VQ, TA, Overall."""
    path: Path | None = None
    """Folder of a converted VideoAlign."""
    published_frames: bool = False
    """Whether VideoAlign is shown frames as the published trainer does, every frame and scaled
    wrongly, rather than as it was trained."""


def open_reward(config: RewardConfig, device: torch.device) -> Reward | None:
    """The reward that a config names; None where it names none."""
    if config.kind == "none":
        return None
    if config.kind == "tracker":
        return TrackerReward()
    if config.kind == "flow":
        return FlowMotionReward()
    assert config.path is not None
    return load_videoalign(config.path, device, torch.bfloat16, published=config.published_frames)
