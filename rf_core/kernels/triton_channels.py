# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The Wan VAE's channel norm and SiLU, written behind the past frames a causal convolution reads.

One program a tile of neighbouring positions of one frame, with all their channels; rows and columns
of a picture are one axis. Arguments `x_b`, `x_c`, `x_t`, `x_s` are strides over batch, channels,
frames and positions, in elements.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import LEAST_NORM
from .triton_norms import launch_options

_TILE = 4096  # elements of a program where channels lie together, the fastest axis in memory
_RUN = 32  # positions of a program where they do not: whole sectors of memory in 2-byte elements


def causal_norm_silu(x_BCTHW: Tensor, gamma: Tensor, padded_BCTHW: Tensor) -> None:
    """As `reference.causal_norm_silu`."""
    batch, channels, frames, height, width = x_BCTHW.shape
    out = padded_BCTHW[:, :, -frames:]
    assert out.shape == x_BCTHW.shape and gamma.is_contiguous()
    block = triton.next_power_of_2(channels)
    positions = max(1, _TILE // block) if x_BCTHW.stride(1) == 1 else _RUN
    tiles = triton.cdiv(height * width, positions)
    with torch.cuda.device_of(x_BCTHW):
        _causal_norm_silu[(tiles, frames, batch)](
            *(x_BCTHW, gamma, out, *_strides(x_BCTHW), *_strides(out)),
            *(height * width, math.sqrt(channels)),
            LEAST=LEAST_NORM,
            C=channels,
            BLOCK=block,
            POSITIONS=positions,
            **launch_options(positions * block),
        )


def _strides(x_BCTHW: Tensor) -> tuple[int, int, int, int]:
    assert x_BCTHW.stride(3) == x_BCTHW.shape[4] * x_BCTHW.stride(4), "rows follow each other"
    batch, channel, frame, _, position = x_BCTHW.stride()
    return batch, channel, frame, position


@triton.jit
def _causal_norm_silu(
    x_ptr,
    gamma_ptr,
    out_ptr,
    x_b,
    x_c,
    x_t,
    x_s,
    out_b,
    out_c,
    out_t,
    out_s,
    num_positions,
    root,
    LEAST: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    frame, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    inside = (position < num_positions) & (channel < C)
    at = batch * x_b + frame * x_t + position * x_s + channel * x_c
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, 1))
    norm = tl.where(norm < LEAST, LEAST, norm)  # which keeps NaN
    gain = tl.load(gamma_ptr + channel, mask=channel < C, other=0.0).to(tl.float32) * root
    normed = x / norm[:, None] * gain
    at = batch * out_b + frame * out_t + position * out_s + channel * out_c
    out = normed * tl.sigmoid(normed)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
