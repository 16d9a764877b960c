"""VideoAlign, the learnt reward: visual quality, motion quality and text alignment of a video.

Qwen2-VL-2B reads a few frames of a video and a questionnaire with the prompt in it; a linear head
on the last hidden states gives a score at each of three added tokens (Liu et al., arXiv 2501.13918;
code and weights of KwaiVGI/VideoAlign, MIT). Motion quality is what Re-DMD weights samples by.
`convert` makes a folder of the release, once; `load_videoalign` opens it. transformers and
tokenizers are imported only then; torchvision is never needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rf_core.config import FPS

from .videoalign_files import (
    WEIGHTS,
    VideoAlignConfig,
    read_base_config,
    read_converted,
    require_fit,
)
from .videoalign_files import convert as convert
from .videoalign_frames import frame_size, patches, sample_frames, sample_frames_as_published
from .videoalign_network import Network, set_rotary_frequencies
from .videoalign_text import REWARD_TOKENS, SCORES, VIDEO_TOKEN, chat, load_tokenizer, token_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class VideoAlignReward:
    """A `Reward`: VQ, MQ and TA, normalised by the release's means and stds, and their sum."""

    scores = (*SCORES, "Overall")

    network: Network
    """In eval mode, where it is to run."""
    tokenizer: Tokenizer
    """Of `load_tokenizer`."""
    config: VideoAlignConfig
    """The release's constants."""
    fps: float = FPS
    """Frames a second of the videos scored, of which `config.fps` are looked at."""
    published: bool = False
    """Whether videos are fed as by the published Reward Forcing trainer: pixels scaled to
    [-255, 255] by mistake, and every frame. Scores are then others than VideoAlign's. (`Overall`
    stays the sum, where that trainer takes a mean; it uses MQ alone.)"""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps is {self.fps}; give the videos' frames a second")

    @torch.no_grad()
    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Scores `VQ`, `MQ`, `TA` and `Overall`, their sum, [B] float32 on the network's device.

        Takes videos [B, T, 3, H, W] in [0, 1] and B prompts. ValueError for other shapes, fewer
        than 2 frames, or a prompt that spells one of the judge's own tokens.
        """
        if videos.ndim != 5 or videos.shape[2] != 3 or len(videos) != len(prompts):
            raise ValueError(
                f"videos are {list(videos.shape)} and prompts {len(prompts)}; give [B, T, 3, H, W] "
                "and a prompt for each"
            )
        device = self.network.rm_head.weight.device
        pixel_values, grid = self.vision_inputs(videos.to(device))
        ids, mask = (each.to(device) for each in self.text_inputs(prompts, grid))
        hidden = self.network.hidden(ids, mask, pixel_values, grid)
        at_reward = torch.isin(ids, ids.new_tensor(self.config.reward_token_ids))
        scores = self.normalised(self.network.head(hidden, at_reward).diagonal(dim1=1, dim2=2))
        return {**dict(zip(SCORES, scores.unbind(1), strict=True)), "Overall": scores.sum(1)}

    def vision_inputs(self, videos: Tensor) -> tuple[Tensor, Tensor]:
        """`patches` of videos [B, T, 3, H, W] in [0, 1]."""
        vision = self.network.model.config.vision_config
        patch, merge = vision.patch_size, vision.spatial_merge_size
        size = frame_size(*videos.shape[-2:], self.config.max_pixels, patch * merge)
        if self.published:
            frames = sample_frames_as_published(videos, size)
        else:
            frames = sample_frames(videos, self.fps, self.config.fps, size)
        return patches(frames, patch, merge)

    def text_inputs(self, prompts: Sequence[str], grid: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, L] of prompts and of the videos' places in them."""
        merged = self.network.model.config.vision_config.spatial_merge_size**2
        counts = (grid.prod(1) // merged).tolist()
        texts = [chat(prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
        return token_ids(self.tokenizer, texts)

    def normalised(self, scores: Tensor) -> Tensor:
        """(score - mean) / std of scores [B, 3]."""
        means, stds = scores.new_tensor(self.config.means), scores.new_tensor(self.config.stds)
        return (scores - means) / stds


def load_videoalign(
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    fps: float = FPS,
    published: bool = False,
) -> VideoAlignReward:
    """The reward in a folder that `convert` wrote, frozen, on `device` in `dtype`.

    `fps` and `published` are `VideoAlignReward`'s. ValueError where files are missing, damaged or
    do not belong together.
    """
    file, config = read_converted(folder)
    base = read_base_config(folder, file.tensors)
    tokenizer = load_tokenizer(folder)
    found = tuple(map(tokenizer.token_to_id, REWARD_TOKENS))
    if (
        found != config.reward_token_ids
        or tokenizer.token_to_id(VIDEO_TOKEN) != base.video_token_id
    ):
        raise ValueError(
            f"{folder}: tokenizer.json and {WEIGHTS} differ; convert the release again"
        )
    require_fit(file.path, file.tensors, base)
    with torch.device("meta"):
        network = Network(base)
    placed = {name: tensor.to(device, dtype) for name, tensor in file.tensors.items()}
    network.load_state_dict(placed, strict=True, assign=True)
    set_rotary_frequencies(network, getattr(torch, config.angles))
    network.to(device).eval().requires_grad_(False)
    return VideoAlignReward(
        network=network, tokenizer=tokenizer, config=config, fps=fps, published=published
    )
