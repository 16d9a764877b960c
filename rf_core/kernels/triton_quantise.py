# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Rows rounded to 8 bits in one pass: the largest magnitude is found while the row is held.

One program a row. Letters as in the package.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import LARGEST, LEAST_SCALE
from .triton_norms import launch_options


def quantise_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `reference.quantise_rows`, bit for bit."""
    x_RC = x.contiguous().flatten(0, -2)
    values, scale = x.new_empty(x.shape, dtype=dtype), x.new_empty(*x.shape[:-1], 1).float()
    channels = x_RC.shape[1]
    block = triton.next_power_of_2(channels)
    with torch.cuda.device_of(x):
        _quantise_rows[(x_RC.shape[0],)](
            *(x_RC, values, scale, LARGEST[dtype], LEAST_SCALE),
            C=channels,
            BLOCK=block,
            ROUND=not dtype.is_floating_point,
            **launch_options(block),
        )
    return values, scale


@triton.jit
def _quantise_rows(
    x_ptr,
    values_ptr,
    scale_ptr,
    largest,
    least_scale,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND: tl.constexpr,
):
    row, channel = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * C + channel, mask=channel < C, other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(x), 0)
    peak = tl.where(tl.sum((x != x).to(tl.int32), 0) > 0, float("nan"), peak)
    scale = tl.div_rn(peak, largest)
    scale = tl.where(scale < least_scale, least_scale, scale)  # which keeps NaN
    tl.store(scale_ptr + row, scale)
    values = tl.div_rn(x, scale)
    if ROUND:
        # Between 2^23 and 2^24 float32 holds whole numbers alone: adding 1.5 * 2^23 rounds to them.
        values = (values + 12582912.0) - 12582912.0
    tl.store(
        values_ptr + row * C + channel, values.to(values_ptr.dtype.element_ty), mask=channel < C
    )
