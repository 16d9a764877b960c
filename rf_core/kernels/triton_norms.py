# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Layer norms of the residual stream, alone or with the residual that comes before them.

One program a token, which it keeps in registers. The norm sees the residual as it is stored,
rounded; all else stays in float32 until it is written. Arguments `x_b`, `x_l`, `x_f` are strides
over batch, tokens and frames, in elements.

Letters as in the package. No module of kernels postpones its annotations: the interpreter of Triton
3.1 knows `tl.constexpr` as an object alone, not by its name.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import FP8, LARGEST, MIN_SCALE, Rows

_PER_THREAD = 64  # channels: a warp holds a token of up to 2048, and no reduction waits for others


def modulated_norm(
    x_BLC: Tensor, shift_BF1C: Tensor, scale_BF1C: Tensor, eps: float, *, rows: bool = False
) -> Tensor | Rows:
    """As `reference.modulated_norm`."""
    return _launch(x_BLC, None, None, scale_BF1C, shift_BF1C, eps, rows)[1]


def modulated_after_residual(
    x_BLC: Tensor,
    y_BLC: Tensor,
    gate_BF1C: Tensor | None,
    shift_BF1C: Tensor,
    scale_BF1C: Tensor,
    eps: float,
    *,
    rows: bool = False,
) -> tuple[Tensor, Tensor | Rows]:
    """As `reference.modulated_after_residual`."""
    return _launch(x_BLC, y_BLC, gate_BF1C, scale_BF1C, shift_BF1C, eps, rows)


def affine_after_residual(
    x_BLC: Tensor,
    y_BLC: Tensor,
    gate_BF1C: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    eps: float,
    *,
    rows: bool = False,
) -> tuple[Tensor, Tensor | Rows]:
    """As `reference.affine_after_residual`."""
    weight, bias = weight_C[None, None, None], bias_C[None, None, None]
    return _launch(x_BLC, y_BLC, gate_BF1C, weight, bias, eps, rows)


def launch_options(elements: int, per_thread: int = 16) -> dict[str, Any]:
    """How a program over that many elements runs, which are shared out to its threads.

    Products are rounded before they are added, as between torch's operations and in the
    interpreter that tests these kernels; memory alone limits them, so nothing is lost by it.
    """
    return {"num_warps": max(1, min(16, elements // (32 * per_thread))), "enable_fp_fusion": False}


def _launch(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    rows: bool,
) -> tuple[Tensor, Tensor | Rows]:
    """The sum, which without `y` is x, and its norm."""
    batch, tokens, channels = x.shape
    block = triton.next_power_of_2(channels)
    residual = x if y is None else x.new_empty(x.shape)
    out = x.new_empty(x.shape, dtype=FP8 if rows else x.dtype)
    # An argument that is not given is never read or written; any tensor may stand in for it.
    given_y, given_gate = x if y is None else y, scale if gate is None else gate
    unit = x.new_empty((batch, tokens, 1), dtype=torch.float32) if rows else out
    strides = [*_row_strides(x), *_row_strides(given_y)]
    frames = [n for t in (given_gate, scale, shift) for n in _frame_strides(t, batch, tokens)]
    with torch.cuda.device_of(x):
        _norm[(tokens, batch)](
            *(x, given_y, given_gate, scale, shift, residual, out, unit),
            *(*strides, *frames, tokens, eps, 1 / LARGEST[FP8], MIN_SCALE),
            C=channels,
            BLOCK=block,
            ADD=y is not None,
            GATED=gate is not None,
            ROWS=rows,
            **launch_options(block, _PER_THREAD),
        )
    return residual, Rows(out, unit, x.dtype) if rows else out


def _row_strides(x_BLC: Tensor) -> tuple[int, int]:
    assert x_BLC.stride(2) == 1, "a token's channels lie together"
    return x_BLC.stride(0), x_BLC.stride(1)


def _frame_strides(x_BF1C: Tensor, batch: int, tokens: int) -> tuple[int, int, int]:
    """Strides over batch and frames, and the tokens of a frame."""
    assert x_BF1C.stride(3) == 1, "a frame's channels lie together"
    frames = x_BF1C.shape[1]
    assert tokens % frames == 0, "every frame has as many tokens"
    expanded = x_BF1C.expand(batch, -1, -1, -1)
    return expanded.stride(0), expanded.stride(1), tokens // frames


@triton.jit
def peak_bits(x, AXIS: tl.constexpr):
    """The bits of rows' largest magnitude, which is NaN where one of them is.

    Without their sign floats follow each other as their bits do, and NaN comes last.
    """
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS, keep_dims=True)


@triton.jit
def units(peak, inverse_largest, least_unit):
    """What rows are counted in so that their peak is the largest number, and its inverse."""
    unit = peak.to(tl.float32, bitcast=True) * inverse_largest
    unit = tl.where(unit < least_unit, least_unit, unit)  # which keeps NaN
    return unit, tl.div_rn(1.0, unit)


@triton.jit
def _norm(
    x_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    out_ptr,
    unit_ptr,
    x_b,
    x_l,
    y_b,
    y_l,
    gate_b,
    gate_f,
    gate_tokens,
    scale_b,
    scale_f,
    scale_tokens,
    shift_b,
    shift_f,
    shift_tokens,
    tokens,
    eps,
    inverse_largest,
    least_unit,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    row = (batch * tokens + token) * C + channel
    x = tl.load(x_ptr + batch * x_b + token * x_l + channel, mask=inside, other=0.0)
    x = x.to(tl.float32)
    if ADD:
        y = tl.load(y_ptr + batch * y_b + token * y_l + channel, mask=inside, other=0.0)
        y = y.to(tl.float32)
        if GATED:
            at = batch * gate_b + token // gate_tokens * gate_f + channel
            y *= tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
        stored = (x + y).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row, stored, mask=inside)
        x = stored.to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, 0) / C, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
    at = batch * scale_b + token // scale_tokens * scale_f + channel
    scale = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
    at = batch * shift_b + token // shift_tokens * shift_f + channel
    shift = tl.load(shift_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = normed * scale + shift
    if ROWS:
        stored = out.to(x_ptr.dtype.element_ty).to(tl.float32)
        unit, inverse = units(peak_bits(stored, 0), inverse_largest, least_unit)
        out = stored * inverse
        tl.store(unit_ptr + batch * tokens + token + tl.arange(0, 1), unit)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=inside)
