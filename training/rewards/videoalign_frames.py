"""Videos as VideoAlign sees them: a few frames, resized, and cut into Qwen2-VL's patches.

The numbers and their rounding are those of KwaiVGI/VideoAlign's `vision_process.py` for a video
file, and of the image processor that it feeds: pure functions on tensors, without torchvision.
Each stands where a reward would shift with it: the frames taken decide how fast motion looks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

TEMPORAL_PATCH = 2  # Qwen2-VL: frames of a patch; frame counts are rounded to it
MIN_FRAMES, MAX_FRAMES = 4, 768  # `FPS_MIN_FRAMES`, `FPS_MAX_FRAMES`
MIN_PIXELS = 128 * 28 * 28  # `VIDEO_MIN_PIXELS`, of a frame
MAX_RATIO = 200  # of the longer side to the shorter
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # Qwen2-VL's preprocessor_config.json
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def num_frames(total: int, video_fps: float, fps: float) -> int:
    """How many of `total` frames at `video_fps` are taken for `fps` (`smart_nframes`).

    At least 4, where there are so many, at most 768, and even. ValueError below 2 frames.
    """
    if total < TEMPORAL_PATCH:
        raise ValueError(f"the video has {total} frames; a reward needs at least {TEMPORAL_PATCH}")
    most = math.floor(min(MAX_FRAMES, total) / TEMPORAL_PATCH) * TEMPORAL_PATCH
    expected = min(max(total / video_fps * fps, MIN_FRAMES), most)
    return round(expected / TEMPORAL_PATCH) * TEMPORAL_PATCH


def frame_numbers(total: int, video_fps: float, fps: float) -> Tensor:
    """The frames taken [N], int64: evenly from the first to the last, rounded."""
    return torch.linspace(0, total - 1, num_frames(total, video_fps, fps)).round().long()


def frame_size(height: int, width: int, max_pixels: int, factor: int = 28) -> tuple[int, int]:
    """Height and width, in pixels, that frames are resized to (`smart_resize`).

    Multiples of `factor`, the pixels of a merged patch, near the frame's own shape, from 100,352
    pixels to `max_pixels` together. ValueError where a side is over 200 times the other.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(f"the video is {height}x{width}; sides differ at most {MAX_RATIO} times")
    sides = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if math.prod(sides) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        sides = [math.floor(side / shrink / factor) * factor for side in (height, width)]
    elif math.prod(sides) < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / (height * width))
        sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


def sample_frames(videos: Tensor, video_fps: float, fps: float, size: tuple[int, int]) -> Tensor:
    """Frames [B, N, 3, h, w], whole numbers in [0, 255], of videos [B, T, 3, H, W] in [0, 1].

    As from a video file: 8 bits before and after resizing.
    """
    numbers = frame_numbers(videos.shape[1], video_fps, fps)
    frames = videos[:, numbers.to(videos.device)].float()
    return _resized((frames.clamp(0, 1) * 255).round(), size).round().clamp(0, 255)


def sample_frames_as_published(videos: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames [B, N, 3, h, w] in [-255, 255] of videos [B, T, 3, H, W] in [0, 1], N even.

    The published Reward Forcing trainer's mistake, kept for comparison: it takes pixels in [-1, 1]
    times 255 for [0, 255], and all frames, the last one twice where their number is odd.
    """
    frames = (2 * videos.float() - 1) * 255
    if frames.shape[1] % TEMPORAL_PATCH:
        frames = torch.cat([frames, frames[:, -1:]], 1)
    return _resized(frames, size)


def _resized(frames: Tensor, size: tuple[int, int]) -> Tensor:
    flat = rearrange(frames, "b n c h w -> (b n) c h w")
    flat = F.interpolate(flat, size, mode="bicubic", align_corners=False, antialias=True)
    return rearrange(flat, "(b n) c h w -> b n c h w", b=len(frames))


def patches(frames: Tensor, patch: int = 14, merge: int = 2) -> tuple[Tensor, Tensor]:
    """Qwen2-VL's `pixel_values` [P, C] and `grid_thw` [B, 3] of frames [B, N, 3, h, w] in [0, 255].

    A row is a patch of 2 frames of `patch` pixels a side, normalised as CLIP is; rows of the
    `merge` x `merge` patches that become one token stand together. N is even, h and w multiples of
    `patch * merge`.
    """
    channels = {"dtype": torch.float32, "device": frames.device}
    mean, std = (torch.tensor(each, **channels).view(3, 1, 1) for each in (CLIP_MEAN, CLIP_STD))
    values = rearrange(
        (frames / 255 - mean) / std,
        "b (t dt) c (h mh p) (w mw q) -> (b t h w mh mw) (c dt p q)",
        dt=TEMPORAL_PATCH,
        mh=merge,
        mw=merge,
        p=patch,
        q=patch,
    )
    batch, count, _, height, width = frames.shape
    grid = torch.tensor([[count // TEMPORAL_PATCH, height // patch, width // patch]] * batch)
    return values, grid.to(frames.device)
