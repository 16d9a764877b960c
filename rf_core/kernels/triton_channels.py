# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The Wan VAE's sums of a convolution, its bias and a shortcut; channel norm and SiLU of them.

One program a tile of neighbouring positions of one frame, with all their channels; rows and columns
of a picture are one axis. Arguments `x_b`, `x_c`, `x_t`, `x_s` are strides over batch, channels,
frames and positions, in elements. A program reads its tile of a sum before it writes over it.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import MIN_NORM
from .triton_norms import launch_options

_TILE = 4096  # elements of a program where channels lie together, the fastest axis in memory
_RUN = 32  # positions of a program where they do not: whole sectors of memory in 2-byte elements


def causal_norm_silu(
    x_BCTHW: Tensor,
    gamma: Tensor,
    padded_BCTHW: Tensor,
    bias_C: Tensor | None = None,
    residual_BCTHW: Tensor | None = None,
) -> None:
    """As `reference.causal_norm_silu`."""
    channels, frames = x_BCTHW.shape[1:3]
    out = padded_BCTHW[:, :, -frames:]
    assert out.shape == x_BCTHW.shape and gamma.is_contiguous()
    grid, options = _tiles(x_BCTHW)
    with torch.cuda.device_of(x_BCTHW):
        _causal_norm_silu[grid](
            *_summands(x_BCTHW, bias_C, residual_BCTHW),
            *(gamma, out, *_strides(out), math.sqrt(channels)),
            LEAST=MIN_NORM,
            BIASED=bias_C is not None,
            ADD=residual_BCTHW is not None,
            **options,
        )


def add_in_place(x_BCTHW: Tensor, bias_C: Tensor | None, residual_BCTHW: Tensor | None) -> None:
    """As `reference.add_in_place`."""
    grid, options = _tiles(x_BCTHW)
    with torch.cuda.device_of(x_BCTHW):
        _add_in_place[grid](
            *_summands(x_BCTHW, bias_C, residual_BCTHW),
            BIASED=bias_C is not None,
            ADD=residual_BCTHW is not None,
            **options,
        )


def _tiles(x_BCTHW: Tensor) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The grid of programs, and the arguments of each."""
    batch, channels, frames, height, width = x_BCTHW.shape
    block = triton.next_power_of_2(channels)
    positions = max(1, _TILE // block) if x_BCTHW.stride(1) == 1 else _RUN
    options = {"C": channels, "BLOCK": block, "POSITIONS": positions}
    tiles = triton.cdiv(height * width, positions)
    return (tiles, frames, batch), options | launch_options(positions * block)


def _summands(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> tuple[Any, ...]:
    # An argument that is not given is never read; any tensor may stand in for it.
    given = x if residual is None else residual
    assert given.shape == x.shape and (bias is None or bias.is_contiguous())
    pointers = (x, x if bias is None else bias, given)
    return (*pointers, *_strides(x), *_strides(given), x.shape[3] * x.shape[4])


def _strides(x_BCTHW: Tensor) -> tuple[int, int, int, int]:
    assert x_BCTHW.stride(3) == x_BCTHW.shape[4] * x_BCTHW.stride(4), "rows follow each other"
    batch, channel, frame, _, position = x_BCTHW.stride()
    return batch, channel, frame, position


@triton.jit
def _place(num_positions, C: tl.constexpr, BLOCK: tl.constexpr, POSITIONS: tl.constexpr):
    """Where a program's tile lies: batch, channels, frame, positions, and which of them exist."""
    frame, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    return batch, channel, frame, position, (position < num_positions) & (channel < C)


@triton.jit
def _sum(
    x_ptr,
    bias_ptr,
    residual_ptr,
    x_at,
    residual_at,
    channel,
    inside,
    C: tl.constexpr,
    BIASED: tl.constexpr,
    ADD: tl.constexpr,
):
    """x + bias + residual in float32."""
    x = tl.load(x_ptr + x_at, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        x += tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + residual_at, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _causal_norm_silu(
    x_ptr,
    bias_ptr,
    residual_ptr,
    x_b,
    x_c,
    x_t,
    x_s,
    residual_b,
    residual_c,
    residual_t,
    residual_s,
    num_positions,
    gamma_ptr,
    out_ptr,
    out_b,
    out_c,
    out_t,
    out_s,
    root,
    LEAST: tl.constexpr,
    BIASED: tl.constexpr,
    ADD: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    batch, channel, frame, position, inside = _place(num_positions, C, BLOCK, POSITIONS)
    x_at = batch * x_b + channel * x_c + frame * x_t + position * x_s
    at = batch * residual_b + channel * residual_c + frame * residual_t + position * residual_s
    x = _sum(x_ptr, bias_ptr, residual_ptr, x_at, at, channel, inside, C, BIASED, ADD)
    if ADD:
        stored = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + x_at, stored, mask=inside)
        x = stored.to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, 1))
    norm = tl.where(norm < LEAST, LEAST, norm)  # which keeps NaN
    gain = tl.load(gamma_ptr + channel, mask=channel < C, other=0.0).to(tl.float32) * root
    normed = x / norm[:, None] * gain
    at = batch * out_b + channel * out_c + frame * out_t + position * out_s
    out = normed * tl.sigmoid(normed)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_in_place(
    x_ptr,
    bias_ptr,
    residual_ptr,
    x_b,
    x_c,
    x_t,
    x_s,
    residual_b,
    residual_c,
    residual_t,
    residual_s,
    num_positions,
    BIASED: tl.constexpr,
    ADD: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    batch, channel, frame, position, inside = _place(num_positions, C, BLOCK, POSITIONS)
    x_at = batch * x_b + channel * x_c + frame * x_t + position * x_s
    at = batch * residual_b + channel * residual_c + frame * residual_t + position * residual_s
    x = _sum(x_ptr, bias_ptr, residual_ptr, x_at, at, channel, inside, C, BIASED, ADD)
    tl.store(x_ptr + x_at, x.to(x_ptr.dtype.element_ty), mask=inside)
