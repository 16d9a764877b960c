"""How fast things move, as the exact tracker would say it, but differentiable by the pixels.

A pixel belongs to a thing as far as it is brighter than any backdrop and no grey of a wall, and to
the palette colour of the nearest hue; both are soft. A colour's place in an image is the circular
mean of its pixels on the torus, its velocity the slope of the path through a few images. What a
reward could win without motion counts as little as nothing: images in which the colour is not one
compact thing of about its usual area, and runs whose path is no straight line.

What is left to win is motion that a caption does not ask for, as in another direction, and halos
too faint for the tracker: latents that climb its gradient freely, by a fifth of their norm, gain
two to four times what `training.world.tracker` then finds. Judge by that, and by optical flow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .scenes import COLOURS, IMAGES_PER_FRAME, LIT, PALETTE, SHAPE_SIZE, SIZE

RUN = 5  # images of a path through which a slope is taken
_LIT, _LIT_WIDTH = LIT + 0.03, 0.06  # brightness of things, and over how much it counts
_SATURATED, _SATURATED_WIDTH = 0.4, 0.04  # saturation between a wall's grey and a thing's colour
_LEAK = 0.25  # most that a pixel of a bright backdrop is taken for a thing; what stays is no thing
_HUE = 40.0  # how sharply the nearest of two hues is told, by their cosines
_AREA, _AREA_WIDTH = 30.0, 6.0  # pixels from which a thing is seen
_WHOLE, _WHOLE_WIDTH = 0.8, 0.04  # share of its usual area from which it is not half hidden
_COMPACT, _COMPACT_WIDTH = 0.7, 0.03  # length of the mean direction; 0.85 for the largest square
_STRAIGHT = 0.7  # pixels that a path of a run strays from its line until it counts e times less
_UNSEEN = 0.05  # runs in place of those that are not there: what is never seen does not move


def soft_speed(video: Tensor, caption: str) -> Tensor:
    """The mean speed of a caption's things in a video [T, 3, SIZE, SIZE] in [0, 1], a scalar.

    In shape sizes a latent frame, and differentiable. Colours that are named are looked for; a
    thing whose colour is open is taken for whatever other colours show. A thing that is not seen
    has speed 0. ValueError for another shape of video, or one of fewer than `RUN` images.
    """
    if video.ndim != 4 or video.shape[1:] != (3, SIZE, SIZE) or len(video) < RUN:
        raise ValueError(
            f"video has shape {list(video.shape)}; soft_speed reads [T, 3, {SIZE}, {SIZE}] of "
            f"{RUN} images or more"
        )
    covers = soft_covers(video)
    speeds_C, weights_C = _speeds(covers)
    words = caption.lower().replace(".", " ").split()
    things = 1 + words.count("and")
    named = [colour in words for colour in COLOURS]
    is_named = torch.tensor(named, device=video.device)
    other = weights_C.where(~is_named, 0.0)
    open_speed = (other * speeds_C).sum() / (other.sum() + _UNSEEN)
    return (speeds_C[is_named].sum() + max(0, things - sum(named)) * open_speed) / things


def soft_covers(video: Tensor) -> Tensor:
    """How much of each pixel each palette colour covers: [T, 3, H, W] to [T, C, H, W] in [0, 1]."""
    video = video.float()
    bright, least = video.amax(dim=1, keepdim=True), video.amin(dim=1, keepdim=True)
    saturation = (bright - least) / bright.clamp_min(_LIT / 2)
    is_thing = _above(bright, _LIT, _LIT_WIDTH) * _above(saturation, _SATURATED, _SATURATED_WIDTH)
    palette = video.new_tensor([PALETTE[name] for name in COLOURS])
    hues = F.normalize(palette - palette.amin(dim=1, keepdim=True), dim=1)
    chroma = F.normalize(video - least, dim=1, eps=1e-3)
    nearest = (_HUE * torch.einsum("tdhw,cd->tchw", chroma, hues)).softmax(dim=1)
    covers = is_thing * nearest
    still = covers.detach().median(dim=0).values.clamp_max(_LEAK)
    return (covers - still).clamp_min(0)


def _speeds(covers: Tensor) -> tuple[Tensor, Tensor]:
    """Each colour's mean speed [C], and in how many runs it is seen [C]."""
    area = covers.sum(dim=(2, 3))  # [T, C]
    usual = area.detach().quantile(0.9, dim=0)
    seen = _above(area, _AREA, _AREA_WIDTH) * _above(area / (usual + 1), _WHOLE, _WHOLE_WIDTH)
    path, length = _path(covers, area)  # [T, C, 2]
    seen = seen * _above(length, _COMPACT, _COMPACT_WIDTH).prod(dim=2)
    runs = path.unfold(0, RUN, 1)  # [N, C, 2, RUN]
    at = torch.arange(RUN, device=covers.device) - (RUN - 1) / 2
    slope = (runs * at).sum(dim=3) / at.square().sum()
    strayed = runs - runs.mean(dim=3, keepdim=True) - slope[..., None] * at
    straight = (-strayed.square().sum(dim=2).mean(dim=2) / _STRAIGHT**2).exp()
    weight = straight * seen.unfold(0, RUN, 1).prod(dim=2)  # [N, C]
    speed = (slope.square().sum(dim=2) + 1e-4).sqrt() * (IMAGES_PER_FRAME / SHAPE_SIZE)
    total = weight.sum(dim=0)
    return (weight * speed).sum(dim=0) / (total + _UNSEEN), total


def _path(covers: Tensor, area: Tensor) -> tuple[Tensor, Tensor]:
    """Each colour's unwrapped path (x, y) in pixels and the length of its mean direction, [T, C, 2]
    each."""
    angle = (torch.arange(SIZE, device=covers.device) + 0.5) * (2 * math.pi / SIZE)
    along = torch.stack([covers.sum(dim=2), covers.sum(dim=3)], dim=2) / (area + 1)[..., None, None]
    cos, sin = (along * angle.cos()).sum(dim=3), (along * angle.sin()).sum(dim=3)
    across = sin[1:] * cos[:-1] - cos[1:] * sin[:-1]
    ahead = cos[1:] * cos[:-1] + sin[1:] * sin[:-1] + 1e-8
    steps = torch.atan2(across, ahead) * (SIZE / (2 * math.pi))
    path = F.pad(steps.cumsum(dim=0), (0, 0, 0, 0, 1, 0))
    return path, (cos.square() + sin.square() + 1e-8).sqrt()


def _above(value: Tensor, limit: float, width: float) -> Tensor:
    return ((value - limit) / width).sigmoid()


class SoftSpeedReward:
    """`soft_speed` as a `Reward` with a gradient: the score `motion`."""

    scores = ("motion",)
    differentiable = scores

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Scores [B] of videos [B, T, 3, SIZE, SIZE] in [0, 1]; see `Reward`."""
        found = [soft_speed(video, text) for video, text in zip(videos, prompts, strict=True)]
        return {"motion": torch.stack(found)}
