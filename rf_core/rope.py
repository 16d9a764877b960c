"""Rotary positions over time, height and width.

Wan splits each head's channels in three and turns every part by one axis' position, pairs of
neighbouring channels at a time. Positions are relative to the attention window, so a table of
`window_frames` frames serves a stream of any length.

Letters: B batch, L tokens, H heads, D channels of a head, P pairs (D / 2).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from .config import Grid

THETA = 10000.0  # Wan 2.1


class Rope(NamedTuple):
    """Cosines and sines of every token's angles, each [L, P] in float32."""

    cos_LP: Tensor
    sin_LP: Tensor

    def tokens(self, start: int, stop: int) -> Rope:
        """The part of the table for tokens `start` to `stop`."""
        return Rope(self.cos_LP[start:stop], self.sin_LP[start:stop])


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Pairs of channels turned by time, height and width."""
    pairs, third = head_dim // 2, head_dim // 6
    return pairs - 2 * third, third, third


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def rope_table(frames: int, grid: Grid, head_dim: int, device: torch.device | str = "cpu") -> Rope:
    """Angles for `frames` latent frames from position 0, tokens in frame, row, column order.

    Computed once, in float64 on the CPU (not every device has it), and kept in float32: in bf16,
    positions collapse from 256 on.
    """
    sizes = (frames, grid.height, grid.width)
    patterns = ("f p -> f h w p", "h p -> f h w p", "w p -> f h w p")
    axes = dict(zip("fhw", sizes, strict=True))
    angles = [
        repeat(_axis_angles(size, pairs), pattern, **axes)
        for size, pairs, pattern in zip(sizes, axis_pairs(head_dim), patterns, strict=True)
    ]
    angles_LP = rearrange(torch.cat(angles, dim=-1), "f h w p -> (f h w) p")
    return Rope(angles_LP.cos().float().to(device), angles_LP.sin().float().to(device))


def apply_rope(x_BLHD: Tensor, rope: Rope) -> Tensor:
    """Turn `x` by its tokens' angles; arithmetic in float32, result in the input's dtype."""
    real, imaginary = rearrange(x_BLHD.float(), "b l h (p two) -> two b l h p", two=2)
    cos, sin = rope.cos_LP[:, None], rope.sin_LP[:, None]
    turned = (real * cos - imaginary * sin, real * sin + imaginary * cos)
    return torch.stack(turned, dim=-1).flatten(-2).to(x_BLHD.dtype)


def _axis_angles(size: int, pairs: int) -> Tensor:
    exponents = torch.arange(pairs, dtype=torch.float64) / pairs
    positions = torch.arange(size, dtype=torch.float64)
    return torch.outer(positions, THETA**-exponents)
