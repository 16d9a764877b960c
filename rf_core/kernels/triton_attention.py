# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Attention over parts of the keys, merged into attention over all of them.

One program a token, over all its heads. Arguments `parts_b`, `lse_h` and the like are strides over
batch, parts, tokens and heads, in elements.

Letters as in the package.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_norms import launch_options


def merge_parts(parts_BNLHD: Tensor, lse_BNHL: Tensor) -> Tensor:
    """As `reference.merge_parts`."""
    batch, parts, tokens, heads, head_dim = parts_BNLHD.shape
    assert parts_BNLHD.stride(4) == 1, "a head's channels lie together"
    out = parts_BNLHD.new_empty(batch, tokens, heads, head_dim)
    rows, columns = triton.next_power_of_2(heads), triton.next_power_of_2(head_dim)
    with torch.cuda.device_of(parts_BNLHD):
        _merge_parts[(tokens, batch)](
            *(parts_BNLHD, lse_BNHL, out),
            *(*parts_BNLHD.stride()[:4], *lse_BNHL.stride(), *out.stride()[:2]),
            N=parts,
            H=heads,
            D=head_dim,
            ROWS=rows,
            COLUMNS=columns,
            **launch_options(rows * columns),
        )
    return out


@triton.jit
def _merge_parts(
    parts_ptr,
    lse_ptr,
    out_ptr,
    parts_b,
    parts_n,
    parts_l,
    parts_h,
    lse_b,
    lse_n,
    lse_h,
    lse_l,
    out_b,
    out_l,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = tl.arange(0, ROWS)[:, None].to(tl.int64)
    channel = tl.arange(0, COLUMNS)[None, :]
    inside = (head < H) & (channel < D)
    parts_at = parts_ptr + batch * parts_b + token * parts_l + head * parts_h + channel
    lse_at = lse_ptr + batch * lse_b + head * lse_h + token * lse_l

    largest = tl.load(lse_at, mask=head < H, other=0.0)
    for n in tl.static_range(1, N):
        largest = tl.maximum(largest, tl.load(lse_at + n * lse_n, mask=head < H, other=0.0))
    total = tl.zeros([ROWS, 1], tl.float32)
    merged = tl.zeros([ROWS, COLUMNS], tl.float32)
    for n in tl.static_range(N):
        weight = tl.exp(tl.load(lse_at + n * lse_n, mask=head < H, other=0.0) - largest)
        part = tl.load(parts_at + n * parts_n, mask=inside, other=0.0).to(tl.float32)
        total += weight
        merged += weight * part
    out_at = out_ptr + batch * out_b + token * out_l + head * D + channel
    tl.store(out_at, (merged / total).to(out_ptr.dtype.element_ty), mask=inside)
