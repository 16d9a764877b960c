"""Outlines of the miniature world's clips, as control videos: white lines on black.

An outline tells where a thing is, its shape and how it moves; what colour it is, the prompt says
(`scenes.colour_caption`). Outlines are drawn from the scene, as exact as its clips; an edge filter
over the clips finds about the same, as `sobel` does, and so may a user's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .scenes import SIZE, Scene, Thing, Wall, distance_outside

LINE = 2.0  # pixels: width of a line at half its brightness, as an edge filter leaves it


def draw_outlines(
    scenes: Sequence[Scene], num_images: int, start_image: int = 0, line: float = LINE
) -> Tensor:
    """Outlines of images `start_image` to `start_image + num_images` of each scene.

    Returns float32 [B, T, SIZE, SIZE, 3] in [0, 1]. A line is `line` pixels wide, half of it on
    either side of an edge; a thing hides the lines of those that are drawn before it, and a wall,
    which has none, those of all.
    """
    time = torch.arange(start_image, start_image + num_images, dtype=torch.float64)
    drawn = torch.zeros(len(scenes), num_images, SIZE, SIZE)
    for video, scene in zip(drawn, scenes, strict=True):
        for thing in scene.things:
            outside = _distance(thing, scene.wall, time)
            own = ((line + 1) / 2 - outside.abs()).clamp(0, 1)
            hidden = (0.5 - outside).clamp(0, 1)
            torch.maximum(video * (1 - hidden), own, out=video)
        if scene.wall is not None:
            video *= 1 - scene.wall.draw()
    return drawn[..., None].expand(-1, -1, -1, -1, 3).contiguous()


def _distance(thing: Thing, wall: Wall | None, time: Tensor) -> Tensor:
    """Signed distance of every pixel from a thing's edge on the torus, [T, H, W]; inside < 0."""
    centre, pixel = thing.centres(time, wall), torch.arange(SIZE) + 0.5
    dx, dy = (((pixel - at[:, None] + SIZE / 2) % SIZE - SIZE / 2).float() for at in centre.T)
    return distance_outside(thing.shape, dx[:, None, :], dy[:, :, None], thing.size)


def sobel(video: Tensor) -> Tensor:
    """Edges of a video [T, H, W, 3] in [0, 1] as an edge filter finds them, of the same shape.

    The largest gradient of the three channels (Sobel and Feldman 1968), as bright as the strongest
    of its image; the picture wraps around.
    """
    channels = rearrange(video.float(), "t h w c -> (t c) 1 h w")
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    wrapped = F.pad(channels, (1, 1, 1, 1), mode="circular")
    along = F.conv2d(wrapped, torch.stack([kernel, kernel.T])[:, None])
    strength = rearrange(along.norm(dim=1), "(t c) h w -> t c h w", c=3).amax(dim=1)
    strength = strength / strength.amax(dim=(1, 2), keepdim=True).clamp_min(1e-3)
    return strength[..., None].expand(-1, -1, -1, 3).contiguous()
