"""Rotary positions over time, height and width.

Wan splits each head's channels in three and rotates every part by one axis' position, pairs of
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
    """Every token's angles as cosines and sines, [L, P] in float32, and as unit numbers."""

    cos_LP: Tensor
    sin_LP: Tensor
    unit_LP: Tensor | None
    """cos + i sin, complex64; on the CPU alone."""
    matrix_LP22: Tensor | None = None
    """[[cos, -sin], [sin, cos]] in float32, where comfy-kitchen rotates (`kernels.kitchen`)."""

    def clone(self) -> Rope:
        """An independent copy."""
        return Rope(*(None if part is None else part.clone() for part in self))  # type: ignore[arg-type]

    def copy_(self, other: Rope) -> None:
        """Take over another's first tokens' angles, as many as it has, in place."""
        for mine, new in zip(self, other, strict=True):
            if mine is not None and new is not None:
                mine[: len(new)] = new

    def tokens(self, start: int, stop: int) -> Rope:
        """The part of the table for tokens `start` to `stop`."""
        return Rope(*(None if part is None else part[start:stop] for part in self))  # type: ignore[arg-type]


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Pairs of channels rotated by time, height and width."""
    pairs, third = head_dim // 2, head_dim // 6
    return pairs - 2 * third, third, third


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def rope_table(frames: int, grid: Grid, head_dim: int, device: torch.device | str = "cpu") -> Rope:
    """Angles for `frames` latent frames from position 0, tokens in frame, row, column order.

    Computed once, in float64 on the CPU (not every device has it), and kept in float32: in bf16,
    positions collapse from 256 on.
    """
    return rope_from(0, frames, grid, head_dim, device)


def rope_from(
    first: int, frames: int, grid: Grid, head_dim: int, device: torch.device | str = "cpu"
) -> Rope:
    """The same from any position in time, before 0 too, made anew."""
    sizes = (frames, grid.height, grid.width)
    patterns = ("f p -> f h w p", "h p -> f h w p", "w p -> f h w p")
    from .kernels.availability import kitchen_runs_on  # which imports this module

    axes = dict(zip("fhw", sizes, strict=True))
    angles = [
        repeat(_axis_angles(start, size, pairs), pattern, **axes)
        for start, size, pairs, pattern in zip(
            (first, 0, 0), sizes, axis_pairs(head_dim), patterns, strict=True
        )
    ]
    angles_LP = rearrange(torch.cat(angles, dim=-1), "f h w p -> (f h w) p")
    cos, sin = angles_LP.cos().float(), angles_LP.sin().float()
    unit = torch.complex(cos, sin) if torch.device(device).type == "cpu" else None
    matrix = None
    if not torch.compiler.is_compiling() and kitchen_runs_on(torch.device(device)):
        rows = (torch.stack(row, dim=-1) for row in ((cos, -sin), (sin, cos)))
        matrix = torch.stack(tuple(rows), dim=-2).to(device)
    return Rope(cos.to(device), sin.to(device), unit, matrix)


def apply_rope(x_BLHD: Tensor, rope: Rope) -> Tensor:
    """Turn `x` by its tokens' angles; arithmetic in float32, result in the input's dtype."""
    pairs = x_BLHD.float().unflatten(-1, (-1, 2))
    # On the CPU products are vectorised, and strided halves are not; a compiler knows these alone.
    if rope.unit_LP is not None and not torch.compiler.is_compiling():
        rotated = torch.view_as_complex(pairs) * rope.unit_LP.unsqueeze(1)
        return torch.view_as_real(rotated).flatten(-2).to(x_BLHD.dtype)
    (real, imaginary), (cos, sin) = pairs.unbind(-1), (part[:, None] for part in rope[:2])
    halves = (real * cos - imaginary * sin, real * sin + imaginary * cos)
    return torch.stack(halves, dim=-1).flatten(-2).to(x_BLHD.dtype)


def _axis_angles(start: int, size: int, pairs: int) -> Tensor:
    exponents = torch.arange(pairs, dtype=torch.float64) / pairs
    positions = torch.arange(start, start + size, dtype=torch.float64)
    return torch.outer(positions, THETA**-exponents)
