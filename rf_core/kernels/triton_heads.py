# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""RMS norm, rotation and cache writes of queries, keys and values.

One program a token, over all its heads: the norm spans them, and a rotation's tables are read once.
Arguments `x_n`, `x_b`, `x_l` are strides over layers, batch and tokens, in elements.

Letters as in the package.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rope import Rope
from .triton_norms import launch_options


def norm_rotate(
    x_BLC: Tensor, weight_C: Tensor, num_heads: int, eps: float, rope: Rope | None = None
) -> Tensor:
    """As `reference.norm_rotate`."""
    batch, tokens, channels = x_BLC.shape
    out = x_BLC.new_empty(batch, tokens, num_heads, channels // num_heads)
    block = triton.next_power_of_2(channels)
    with torch.cuda.device_of(x_BLC):
        _norm_rotate[(tokens, batch)](
            *(x_BLC, weight_C, out, *_tables(rope, tokens, x_BLC)),
            *(*_strides(x_BLC), *_strides(out.flatten(2)), eps),
            C=channels,
            BLOCK=block,
            PAIRS=out.shape[3] // 2,
            ROTATE=rope is not None,
            **launch_options(block),
        )
    return out


def write_keys_values(
    k_BLC: Tensor,
    v_BLC: Tensor,
    weight_C: Tensor,
    eps: float,
    rope: Rope,
    k_slot_BLHD: Tensor,
    rotated_slot_BLHD: Tensor,
    v_slot_BLHD: Tensor,
) -> None:
    """As `reference.write_keys_values`."""
    batch, tokens, channels = k_BLC.shape
    block = triton.next_power_of_2(channels)
    slots = [_rows(slot) for slot in (k_slot_BLHD, rotated_slot_BLHD, v_slot_BLHD)]
    assert all(slot.shape == k_BLC.shape for slot in slots), "a slot has the chunk's size"
    strides = [n for t in (k_BLC, v_BLC, *slots) for n in _strides(t)]
    with torch.cuda.device_of(k_BLC):
        _write_keys_values[(tokens, batch)](
            *(k_BLC, v_BLC, weight_C, *slots, *_tables(rope, tokens, k_BLC), *strides, eps),
            C=channels,
            BLOCK=block,
            PAIRS=k_slot_BLHD.shape[3] // 2,
            **launch_options(block),
        )


def rotate(x_BLHD: Tensor, rope: Rope) -> Tensor:
    """As `reference.rotate`."""
    out = x_BLHD.new_empty(x_BLHD.shape)
    rotate_context(x_BLHD[None], rope, out[None])
    return out


def rotate_context(k_NBWHD: Tensor, rope: Rope, rotated_NBWHD: Tensor) -> None:
    """As `reference.rotate_context`."""
    layers, batch, tokens = k_NBWHD.shape[:3]
    k, rotated = _rows(k_NBWHD), _rows(rotated_NBWHD)
    block = triton.next_power_of_2(k.shape[3])
    with torch.cuda.device_of(k):
        _rotate_context[(tokens, batch, layers)](
            *(k, rotated, *_tables(rope.tokens(0, tokens), tokens, k)),
            *(*_strides(k), *_strides(rotated)),
            C=k.shape[3],
            BLOCK=block,
            PAIRS=k_NBWHD.shape[4] // 2,
            **launch_options(block),
        )


def _rows(x_LHD: Tensor) -> Tensor:
    """[..., L, H, D] as [..., L, C], without a copy."""
    assert x_LHD.stride(-1) == 1 and x_LHD.stride(-2) == x_LHD.shape[-1], "heads lie together"
    return x_LHD.flatten(-2)


def _strides(x_LC: Tensor) -> tuple[int, ...]:
    """Of all axes but the channels, which lie together."""
    assert x_LC.stride(-1) == 1, "a token's channels lie together"
    return x_LC.stride()[:-1]


def _tables(rope: Rope | None, tokens: int, stand_in: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines; without a rotation, tensors that are never read."""
    if rope is None:
        return stand_in, stand_in
    assert rope.cos_LP.shape[0] == tokens, "one row of the table a token"
    assert rope.cos_LP.is_contiguous() and rope.sin_LP.is_contiguous()
    return rope.cos_LP, rope.sin_LP


@triton.jit
def _load_normed(row_ptr, weight_ptr, eps, C: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    x = tl.load(row_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, 0) / C + eps) * weight


@triton.jit
def _rotated(x, cos_ptr, sin_ptr, token, C: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr):
    pair = tl.arange(0, BLOCK // 2)
    at, inside = token * PAIRS + pair % PAIRS, pair < C // 2
    cos = tl.load(cos_ptr + at, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + at, mask=inside, other=0.0)
    real, imaginary = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
    return tl.interleave(real * cos - imaginary * sin, real * sin + imaginary * cos)


@triton.jit
def _store_row(row_ptr, x, C: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    tl.store(row_ptr + channel, x.to(row_ptr.dtype.element_ty), mask=channel < C)


@triton.jit
def _norm_rotate(
    x_ptr,
    weight_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    x_b,
    x_l,
    out_b,
    out_l,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    ROTATE: tl.constexpr,
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    x = _load_normed(x_ptr + batch * x_b + token * x_l, weight_ptr, eps, C, BLOCK)
    if ROTATE:
        x = _rotated(x, cos_ptr, sin_ptr, token, C, BLOCK, PAIRS)
    _store_row(out_ptr + batch * out_b + token * out_l, x, C, BLOCK)


@triton.jit
def _write_keys_values(
    k_ptr,
    v_ptr,
    weight_ptr,
    k_slot_ptr,
    rotated_ptr,
    v_slot_ptr,
    cos_ptr,
    sin_ptr,
    k_b,
    k_l,
    v_b,
    v_l,
    k_slot_b,
    k_slot_l,
    rotated_b,
    rotated_l,
    v_slot_b,
    v_slot_l,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    v = tl.load(v_ptr + batch * v_b + token * v_l + channel, mask=channel < C, other=0.0)
    _store_row(v_slot_ptr + batch * v_slot_b + token * v_slot_l, v, C, BLOCK)
    k = _load_normed(k_ptr + batch * k_b + token * k_l, weight_ptr, eps, C, BLOCK)
    stored = k.to(k_slot_ptr.dtype.element_ty)
    _store_row(k_slot_ptr + batch * k_slot_b + token * k_slot_l, stored, C, BLOCK)
    rotated = _rotated(stored.to(tl.float32), cos_ptr, sin_ptr, token, C, BLOCK, PAIRS)
    _store_row(rotated_ptr + batch * rotated_b + token * rotated_l, rotated, C, BLOCK)


@triton.jit
def _rotate_context(
    k_ptr,
    rotated_ptr,
    cos_ptr,
    sin_ptr,
    k_n,
    k_b,
    k_l,
    rotated_n,
    rotated_b,
    rotated_l,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    layer, channel = tl.program_id(2).to(tl.int64), tl.arange(0, BLOCK)
    row_ptr = k_ptr + layer * k_n + batch * k_b + token * k_l
    k = tl.load(row_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    rotated = _rotated(k, cos_ptr, sin_ptr, token, C, BLOCK, PAIRS)
    _store_row(
        rotated_ptr + layer * rotated_n + batch * rotated_b + token * rotated_l, rotated, C, BLOCK
    )
