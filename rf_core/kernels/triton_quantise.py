# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Rows rounded to 8 bits in one pass: the largest magnitude is found while the row is held.

One program a tile of rows, held in two pieces, so that few lanes idle: as many channels as the
largest power of two that fits, and the rest. Letters as in the package.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import LARGEST, MIN_SCALE
from .triton_norms import launch_options, peak_bits, units

_TILE = 1024  # elements of a program's first piece, where a row has fewer
_PER_THREAD = 32  # of them: most rows are a warp's own, and are reduced without memory


def quantise_rows(
    x: Tensor, dtype: torch.dtype, *, after_gelu: bool = False
) -> tuple[Tensor, Tensor]:
    """As `reference.quantise_rows`, without GELU bit for bit."""
    x_RC = x.contiguous().flatten(0, -2)
    values = x.new_empty(x.shape, dtype=dtype)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    num_rows, channels = x_RC.shape
    pieces = tile_sizes(channels)
    with torch.cuda.device_of(x):
        _quantise_rows[(triton.cdiv(num_rows, pieces["ROWS"]),)](
            *(x_RC, values, scale, num_rows, 1 / LARGEST[dtype], MIN_SCALE),
            **pieces,
            ROUND=not dtype.is_floating_point,
            GELU=after_gelu,
            **launch_options(pieces["ROWS"] * pieces["HEAD"], _PER_THREAD),
        )
    return values, scale


def tile_sizes(channels: int) -> dict[str, int]:
    """A row's channels, and a program's: of its pieces, the second of which may be none."""
    head = 1 << channels.bit_length() - 1
    rest = channels - head
    tail = triton.next_power_of_2(rest) if rest else 0
    return {"C": channels, "HEAD": head, "TAIL": tail, "ROWS": max(1, _TILE // head)}


@triton.jit
def _quantise_rows(
    x_ptr,
    values_ptr,
    scale_ptr,
    num_rows,
    inverse_largest,
    least_unit,
    C: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    ROUND: tl.constexpr,
    GELU: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    here = row < num_rows
    head = tl.arange(0, HEAD)[None, :]
    x = _load(x_ptr + row * C + head, here, GELU)
    peak = peak_bits(x, 1)
    if TAIL:
        tail = HEAD + tl.arange(0, TAIL)[None, :]
        rest = _load(x_ptr + row * C + tail, here & (tail < C), GELU)
        peak = tl.maximum(peak, peak_bits(rest, 1))
    unit, inverse = units(peak, inverse_largest, least_unit)
    tl.store(scale_ptr + row, unit, mask=here)
    _store(values_ptr + row * C + head, x * inverse, here, ROUND)
    if TAIL:
        _store(values_ptr + row * C + tail, rest * inverse, here & (tail < C), ROUND)


@triton.jit
def _load(x_ptr, inside, GELU: tl.constexpr):
    x = tl.load(x_ptr, mask=inside, other=0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    if GELU:  # x sigmoid(2 u), as in `reference.gelu`; the factors are by 2 sqrt(2 / pi) log2(e)
        root = tl.rsqrt(1.0 + tl.exp2(x * (-2.302208198 + -0.1029432396 * (x * x))))
        x = x * root * root  # in 3 instructions, where a division is 8
        x = x.to(dtype).to(tl.float32)
    return x


@triton.jit
def _store(values_ptr, values, inside, ROUND: tl.constexpr):
    if ROUND:
        # Between 2^23 and 2^24 float32 holds whole numbers alone: adding 1.5 * 2^23 rounds to them.
        values = (values + 12582912.0) - 12582912.0
    tl.store(values_ptr, values.to(values_ptr.dtype.element_ty), mask=inside)
