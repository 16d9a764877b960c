# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Attention to a prompt: few keys, of which the last may count for all of the padding.

One program a head and a tile of tokens. Its keys are the first `seen` ones, a number that it reads
off the biases, so that prompts of any length lie in the same memory and are served by one recorded
launch. Products of half precision, sums and the softmax in float32; float32 throughout in float32.
Arguments `x_b`, `x_l`, `x_h` are strides over batch, tokens and heads, in elements.

Letters as in the package.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def prompt_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, bias_BS: Tensor) -> Tensor:
    """As `reference.prompt_attention`."""
    batch, tokens, heads, head_dim = q_BLHD.shape
    num_keys = k_BSHD.shape[1]
    assert bias_BS.dtype == torch.float32 and bias_BS.is_contiguous(), "a bias a key, in a row"
    assert bias_BS.shape == k_BSHD.shape[:2] == v_BSHD.shape[:2]
    out = q_BLHD.new_empty(q_BLHD.shape)
    sizes = tile_sizes(q_BLHD.dtype)
    strides = [n for t in (q_BLHD, k_BSHD, v_BSHD, out) for n in _strides(t)]
    with torch.cuda.device_of(q_BLHD):
        _prompt_attention[(triton.cdiv(tokens, sizes["ROWS"]), heads, batch)](
            *(q_BLHD, k_BSHD, v_BSHD, bias_BS, out, *strides, tokens, num_keys, head_dim**-0.5),
            MAX_KEYS=triton.next_power_of_2(num_keys),
            D=head_dim,
            BLOCK=max(16, triton.next_power_of_2(head_dim)),
            **sizes,
        )
    return out


def tile_sizes(dtype: torch.dtype) -> dict[str, Any]:
    """Tokens and keys that a program multiplies at once, and how it runs.

    What moves is queries and results, and keys once a tile: two tiles of 128 tokens fit into the
    registers and the shared memory of a processor, so that one is read while the other multiplies.
    """
    options = {"num_warps": 8, "enable_fp_fusion": True}
    if dtype == torch.float32:
        return {"ROWS": 16, "KEYS": 16, "num_stages": 1, **options}
    return {"ROWS": 128, "KEYS": 32, "num_stages": 2, "maxnreg": 128, **options}


def _strides(x_BLHD: Tensor) -> tuple[int, ...]:
    assert x_BLHD.stride(3) == 1, "a head's channels lie together"
    return x_BLHD.stride()[:3]


@triton.jit
def _prompt_attention(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    out_ptr,
    q_b,
    q_l,
    q_h,
    k_b,
    k_l,
    k_h,
    v_b,
    v_l,
    v_h,
    out_b,
    out_l,
    out_h,
    tokens,
    num_keys,
    scale,
    MAX_KEYS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (channel < D)[None, :]
    q_at = q_ptr + batch * q_b + head * q_h + token[:, None] * q_l + channel[None, :]
    q = tl.load(q_at, mask=inside, other=0.0)
    bias_ptr += batch * num_keys
    k_ptr += batch * k_b + head * k_h
    v_ptr += batch * v_b + head * v_h

    every = tl.arange(0, MAX_KEYS)
    biases = tl.load(bias_ptr + every, mask=every < num_keys, other=float("-inf"))
    seen = tl.max(tl.where(biases > float("-inf"), every + 1, 0), 0)

    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, seen, KEYS):
        key = start + tl.arange(0, KEYS)
        bias = tl.load(bias_ptr + key, mask=key < seen, other=float("-inf"))
        there = (key < seen)[:, None] & (channel < D)[None, :]
        k = tl.load(k_ptr + key[:, None] * k_l + channel[None, :], mask=there, other=0.0)
        v = tl.load(v_ptr + key[:, None] * v_l + channel[None, :], mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None, :]
        new = tl.maximum(largest, tl.max(scores, 1))
        share, kept = tl.exp(scores - new[:, None]), tl.exp(largest - new)
        total = total * kept + tl.sum(share, 1)
        summed = summed * kept[:, None]
        summed += tl.dot(share.to(v.dtype), v, input_precision="ieee")
        largest = new
    out = (summed / total[:, None]).to(out_ptr.dtype.element_ty)
    out_at = out_ptr + batch * out_b + head * out_h + token[:, None] * out_l + channel[None, :]
    tl.store(out_at, out, mask=inside)
