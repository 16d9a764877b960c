"""Choice by name: the reward, the clips of a folder, a data set and a metric.

The one module that imports both the general code and its implementations, the miniature world
among them. Data, evaluation and rewards depend on Protocols alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

from rf_core.text import load_text_encoder

from .data.clips import ClipSource
from .data.embeddings import encoder_path
from .data.pairs import Pairs, shards_of
from .data.prompts import DataConfig, DataSet
from .evaluation.metric import PromptMetric
from .rewards.flow_motion import FlowMotionReward
from .rewards.reward import Reward
from .rewards.videoalign import load_videoalign
from .world.captions import Captions
from .world.clips import CaptionedClips, read_clips, shards_of_clips
from .world.metric import TrackerMetric
from .world.reward import TrackerReward

DATA_SET: DataSet = Captions()
"""Gives the prompts where there is no prompt file: the bundled demo's."""
CLIPS = Path("runs/world/clips")
"""The folder that `python -m training.world clips` writes."""
METRIC: PromptMetric = TrackerMetric()
"""Measures whether videos match their prompts, for prompts that it can parse."""

SCORES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "tracker": ("motion", "caption"),
        "flow": ("motion", "mean_motion"),
        "videoalign": ("MQ", "VQ", "TA", "Overall"),
    }
)
"""What each kind of reward gives."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The reward that weights samples."""

    kind: Literal["none", "tracker", "flow", "videoalign"] = "none"
    """`none` is plain distribution matching; `tracker` knows the miniature world alone."""
    score: str = "motion"
    """Which of the reward's scores counts; `SCORES` lists them."""
    path: Path | None = None
    """Folder of a converted VideoAlign."""
    published_frames: bool = False
    """Whether VideoAlign is shown frames as the published trainer does, every frame and scaled
    wrongly, rather than as it was trained."""

    def __post_init__(self) -> None:
        if self.kind != "none" and self.score not in SCORES[self.kind]:
            raise ValueError(
                f"reward.score is {self.score!r}; {self.kind} gives {', '.join(SCORES[self.kind])}"
            )
        if self.kind == "videoalign" and self.path is None:
            raise ValueError("reward.kind is videoalign; give reward.path, a converted folder")


def open_reward(config: RewardConfig, device: torch.device) -> Reward | None:
    """The reward that a config names; None where it names none."""
    if config.kind == "none":
        return None
    if config.kind == "tracker":
        return TrackerReward()
    if config.kind == "flow":
        return FlowMotionReward()
    assert config.kind == "videoalign" and config.path is not None, config
    return load_videoalign(config.path, device, torch.bfloat16, published=config.published_frames)


def open_clips(folder: Path, data: DataConfig, device: torch.device) -> ClipSource:
    """The clips of a folder: the miniature world's, or the ends of trajectories of whole clips.

    ValueError for a folder that holds neither.
    """
    if shards_of_clips(folder):
        encoder = load_text_encoder(encoder_path(data), device=device, dtype=torch.float32)
        return CaptionedClips(read_clips(folder), encoder)
    if not shards_of(folder):
        raise ValueError(
            f"{folder} holds no clips; make some with `python -m training.world clips`, after "
            "`python -m training.world vae` and `text` or with copies of the demo's files, or give "
            "whole clips of `python -m training ode_pairs`"
        )
    pairs = Pairs.open(folder)
    if pairs.config.kind != "clips":
        raise ValueError(f"{folder} holds trajectories of excerpts; give those of whole clips")
    return pairs
