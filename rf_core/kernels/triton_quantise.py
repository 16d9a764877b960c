# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Rows rounded to 8 bits in one pass: the largest magnitude is found while the row is held.

One program a tile of rows. Letters as in the package.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import LARGEST, MIN_SCALE
from .triton_norms import in_units, launch_options

_TILE = 2048  # elements of a program, where a row has fewer


def quantise_rows(
    x: Tensor, dtype: torch.dtype, *, after_gelu: bool = False
) -> tuple[Tensor, Tensor]:
    """As `reference.quantise_rows`, without GELU bit for bit."""
    x_RC = x.contiguous().flatten(0, -2)
    values = x.new_empty(x.shape, dtype=dtype)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    num_rows, channels = x_RC.shape
    block = triton.next_power_of_2(channels)
    rows = max(1, _TILE // block)
    with torch.cuda.device_of(x):
        _quantise_rows[(triton.cdiv(num_rows, rows),)](
            *(x_RC, values, scale, num_rows, LARGEST[dtype], MIN_SCALE),
            C=channels,
            BLOCK=block,
            ROWS=rows,
            ROUND=not dtype.is_floating_point,
            GELU=after_gelu,
            **launch_options(rows * block),
        )
    return values, scale


@triton.jit
def _quantise_rows(
    x_ptr,
    values_ptr,
    scale_ptr,
    num_rows,
    largest,
    least_unit,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ROUND: tl.constexpr,
    GELU: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    at, inside = row * C + channel, (row < num_rows) & (channel < C)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if GELU:  # x sigmoid(2 u), as in `reference.gelu`
        inner = x * (1.0 + 0.044715 * x * x)
        x = x / (1.0 + tl.exp(-1.5957691216057308 * inner))  # twice the root of 2 / pi
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    values, unit = in_units(x, largest, least_unit, 1)
    tl.store(scale_ptr + row, unit, mask=row < num_rows)
    if ROUND:
        # Between 2^23 and 2^24 float32 holds whole numbers alone: adding 1.5 * 2^23 rounds to them.
        values = (values + 12582912.0) - 12582912.0
    tl.store(values_ptr + at, values.to(values_ptr.dtype.element_ty), mask=inside)
