"""From latents to scores: the reward a config names, shown what the decoder makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from rf_core.decoders.decoder import Decoder

from ..recipes import RewardConfig
from ..redmd import Anchor
from ..weighing import Judge
from ..world.reward import TrackerReward
from .weights import Reward


def open_judge(
    config: RewardConfig, decoder: Decoder | None, prompts: list[str], device: torch.device
) -> Judge | None:
    """Scores of a run's clean latents; None without a reward. Decodes a sample at a time."""
    if config.kind == "none":
        return None
    reward, shown = _reward(config, device), decoder
    assert shown is not None

    @torch.no_grad()
    def judge(x0: Tensor, numbers: list[int]) -> Tensor:
        parts = [shown.decode(each, None)[0] for each in x0.split(1)]
        texts = [prompts[number] for number in numbers]
        scores = reward(torch.cat(parts), texts)
        if config.score not in scores:
            raise ValueError(
                f"reward.score is {config.score!r}; {config.kind} gives {', '.join(scores)}"
            )
        return scores[config.score].to(device)

    return judge


def _reward(config: RewardConfig, device: torch.device) -> Reward:
    if config.kind == "tracker":
        return TrackerReward()
    if config.kind == "flow":
        from .flow_motion import FlowMotionReward

        return FlowMotionReward()
    assert config.path is not None
    from .videoalign import load_videoalign

    return load_videoalign(config.path, device, torch.bfloat16, published=config.published_frames)


def image_anchor(decoder: Decoder | None) -> Anchor:
    """The last image of some latent frames, encoded as the first frame of a clip."""
    assert decoder is not None

    @torch.no_grad()
    def anchor(frames: Tensor) -> Tensor:
        images, _ = decoder.decode(frames, None)
        return decoder.encode(images[:, -1:])

    return anchor
