"""Fused kernels: the steps between matrix products, which only move memory, in few passes over it.

Every function here is defined by its namesake in `reference`, in plain torch. On a card that Triton
compiles for, with gradients off, its namesake in a `triton_*` module runs instead: one launch, each
value read and written once, arithmetic in float32 with a single rounding at the end. `reference`
rounds after every torch operation; in float32 the two agree to rounding. On a card without Triton
`reference` leaves two of its steps to `kitchen` in half precision, where ComfyUI's package is.

Nothing here waits for the device, reads it or tunes itself, so all may be captured in CUDA graphs
once they have run on the same shapes. Under torch.compile the reference is what is compiled.

Letters: N layers or parts of the keys, B batch, F latent frames, L tokens, W tokens of the context,
S tokens of the sink or prompt, H heads, D channels of a head, C = H * D channels, P pairs of a
head's channels (D / 2); of pictures, C channels, T frames or images, H rows, W columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rope import Rope
from . import reference
from .availability import fused, in_product, multiplies_fp8
from .reference import Rows

__all__ = [
    "add_in_place",
    "affine_after_residual",
    "causal_norm_silu",
    "linear_gelu",
    "merge_parts",
    "modulated_after_residual",
    "modulated_norm",
    "norm_rotate",
    "prompt_attention",
    "quantise_rows",
    "rotate",
    "rotate_context",
    "update_sink",
    "write_keys_values",
]

WIDEST_HEAD = 128  # channels of a head that the prompt's attention keeps a tile of


def modulated_norm(
    x_BLC: Tensor, shift_BF1C: Tensor, scale_BF1C: Tensor, eps: float, *, rows: bool = False
) -> Tensor | Rows:
    """norm(x) * scale + shift, with each frame's own shift and scale -> [B, L, C].

    The norm takes mean and variance off each token; tokens of a frame lie together. All norms here
    give the rows of fp8 that `quantise_rows` would make of them where `rows` asks for it, to the
    bit; on a card that is one that multiplies fp8.
    """
    if not fused(x_BLC, shift_BF1C, scale_BF1C):
        return reference.modulated_norm(x_BLC, shift_BF1C, scale_BF1C, eps, rows=rows)
    from . import triton_norms

    return triton_norms.modulated_norm(x_BLC, shift_BF1C, scale_BF1C, eps, rows=rows)


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
    """x + y * gate (or x + y), and `modulated_norm` of that sum: two of [B, L, C]."""
    given = x_BLC, y_BLC, gate_BF1C, shift_BF1C, scale_BF1C
    if not fused(x_BLC, y_BLC, *_given(gate_BF1C), shift_BF1C, scale_BF1C):
        return reference.modulated_after_residual(*given, eps, rows=rows)
    from . import triton_norms

    return triton_norms.modulated_after_residual(*given, eps, rows=rows)


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
    """x + y * gate (or x + y), and norm(that sum) * weight + bias: two of [B, L, C]."""
    given = x_BLC, y_BLC, gate_BF1C, weight_C, bias_C
    if not fused(x_BLC, y_BLC, *_given(gate_BF1C), weight_C, bias_C):
        return reference.affine_after_residual(*given, eps, rows=rows)
    from . import triton_norms

    return triton_norms.affine_after_residual(*given, eps, rows=rows)


def linear_gelu(x: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """The tanh form of GELU of x @ weight^T + bias, [..., I] -> [..., O].

    On cards in half precision cuBLASLt applies it to the sums before they are rounded. torch's
    function for that is private; on a CPU it makes the other form of GELU, by the error function.
    """
    if not in_product(x, weight_OI, bias_O):
        return reference.linear_gelu(x, weight_OI, bias_O)
    rows, weight_IO = x.flatten(0, -2), weight_OI.t()
    y = torch.ops.aten._addmm_activation(bias_O, rows, weight_IO, use_gelu=True)
    return y.unflatten(0, x.shape[:-1])


def norm_rotate(
    x_BLC: Tensor, weight_C: Tensor, num_heads: int, eps: float, rope: Rope | None = None
) -> Tensor:
    """RMS norm over the full width, then each head rotated by its token's angles -> [B, L, H, D].

    `x` may be a slice of a wider projection. Without `rope` nothing is rotated.
    """
    if not fused(x_BLC, weight_C):
        return reference.norm_rotate(x_BLC, weight_C, num_heads, eps, rope)
    from . import triton_heads

    return triton_heads.norm_rotate(x_BLC, weight_C, num_heads, eps, rope)


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
    """Write a chunk to its slots: the RMS-normed keys as they are and rotated, and the values.

    The slots may be views of a longer window. Rotated keys are the stored, rounded ones rotated.
    """
    slots = (k_slot_BLHD, rotated_slot_BLHD, v_slot_BLHD)
    if not fused(k_BLC, v_BLC, weight_C, *slots):
        reference.write_keys_values(k_BLC, v_BLC, weight_C, eps, rope, *slots)
        return
    from . import triton_heads

    triton_heads.write_keys_values(k_BLC, v_BLC, weight_C, eps, rope, *slots)


def rotate(x_BLHD: Tensor, rope: Rope) -> Tensor:
    """Each head rotated by its token's angles -> [B, L, H, D]; where the norm is another's."""
    if not fused(x_BLHD):
        return reference.rotate(x_BLHD, rope)
    from . import triton_heads

    return triton_heads.rotate(x_BLHD, rope)


def rotate_context(k_NBWHD: Tensor, rope: Rope, rotated_NBWHD: Tensor) -> None:
    """Write the keys of every layer's context, rotated by `rope`'s first W tokens, to `rotated`."""
    if not fused(k_NBWHD, rotated_NBWHD):
        reference.rotate_context(k_NBWHD, rope, rotated_NBWHD)
        return
    from . import triton_heads

    triton_heads.rotate_context(k_NBWHD, rope, rotated_NBWHD)


def update_sink(
    sinks_NBSHD: tuple[Tensor, Tensor],
    evicted_NBSHD: tuple[Tensor, Tensor],
    decay: float,
    exact_2NBSHD: Tensor | None = None,
) -> None:
    """The sink's moving average, in place: keys and values of every layer take up what leaves.

    sink = decay * sink + (1 - decay) * evicted, each product rounded to the sink's dtype, as
    published. With `exact`, the average is kept there in float32 and copied, rounded, to the sink.
    """
    if not fused(*sinks_NBSHD, *evicted_NBSHD):
        reference.update_sink(sinks_NBSHD, evicted_NBSHD, decay, exact_2NBSHD)
        return
    from . import triton_sink

    triton_sink.update_sink(sinks_NBSHD, evicted_NBSHD, decay, exact_2NBSHD)


def merge_parts(parts_BNLHD: Tensor, lse_BNHL: Tensor) -> Tensor:
    """Attention over all keys -> [B, L, H, D], from that over each of N parts of them.

    `lse` is the log of each query's sum of exponentials over a part's keys, in float32.
    """
    if not fused(parts_BNLHD):
        return reference.merge_parts(parts_BNLHD, lse_BNHL)
    from . import triton_attention

    return triton_attention.merge_parts(parts_BNLHD, lse_BNHL)


def counts_keys(*tensors: Tensor) -> bool:
    """Whether `prompt_attention` is fast there: on a CPU, and on a card where its kernel runs.

    Elsewhere a bias keeps torch's attention off its fast kernels.
    """
    return tensors[0].device.type == "cpu" or fused(*tensors)


def prompt_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, bias_BS: Tensor) -> Tensor:
    """Attention to keys of which some count more often than once, or not at all -> [B, L, H, D].

    `bias` is the logarithm of how often: 0 for once, -inf for a key that is not seen. The first key
    is seen. The kernel reads no further than the last that is, as the device alone knows which.
    """
    if not fused(q_BLHD, k_BSHD, v_BSHD) or q_BLHD.shape[3] > WIDEST_HEAD:
        return reference.prompt_attention(q_BLHD, k_BSHD, v_BSHD, bias_BS)
    from . import triton_prompt

    return triton_prompt.prompt_attention(q_BLHD, k_BSHD, v_BSHD, bias_BS)


def quantise_rows(
    x: Tensor, dtype: torch.dtype, *, after_gelu: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows x [..., C] in `dtype`, fp8 or int8, and a float32 scale [..., 1] for each.

    The product of the two is x but for rounding: to 3 bits and the leading one in fp8, to 1/254 of
    the row's largest magnitude in int8. A row with NaN or infinity has a scale that is one. The
    kernel gives the very bits of the definition. With `after_gelu` the rows are those of GELU of x
    in its tanh form, rounded to x's dtype first.
    """
    if not fused(x) or not (dtype == torch.int8 or multiplies_fp8(x.device)):
        return reference.quantise_rows(x, dtype, after_gelu=after_gelu)
    from . import triton_quantise

    return triton_quantise.quantise_rows(x, dtype, after_gelu=after_gelu)


def causal_norm_silu(
    x_BCTHW: Tensor,
    gamma: Tensor,
    padded_BCTHW: Tensor,
    bias_C: Tensor | None = None,
    residual_BCTHW: Tensor | None = None,
) -> None:
    """SiLU(RMS norm of x over its channels), written behind the past frames `padded` begins with.

    The norm is of x + bias + residual, as far as they are given. With `residual` that sum is
    written over x, and it is the stored, rounded sum that is normed.

    `padded` has x's shape but for its frames, of which the last T are written; `gamma` is the
    norm's gain, [C, 1, 1, 1]. Contiguous or channels-last, each of them.
    """
    summands = (*_given(bias_C), *_given(residual_BCTHW))
    if not fused(x_BCTHW, gamma, padded_BCTHW, *summands):
        reference.causal_norm_silu(x_BCTHW, gamma, padded_BCTHW, bias_C, residual_BCTHW)
        return
    from . import triton_channels

    triton_channels.causal_norm_silu(x_BCTHW, gamma, padded_BCTHW, bias_C, residual_BCTHW)


def add_in_place(x_BCTHW: Tensor, bias_C: Tensor | None, residual_BCTHW: Tensor | None) -> None:
    """x + bias + residual, as far as they are given, written over x."""
    if not fused(x_BCTHW, *_given(bias_C), *_given(residual_BCTHW)):
        reference.add_in_place(x_BCTHW, bias_C, residual_BCTHW)
        return
    from . import triton_channels

    triton_channels.add_in_place(x_BCTHW, bias_C, residual_BCTHW)


def _given(tensor: Tensor | None) -> tuple[Tensor, ...]:
    return () if tensor is None else (tensor,)
