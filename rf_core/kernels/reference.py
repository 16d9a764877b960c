"""What every fused kernel computes, in plain torch: the definition, and what runs without Triton.

Its modulated norm and its rotation are comfy-kitchen's where that stands in, its linear layer
oneDNN's where that is faster (`availability`).

In bfloat16 and float16 torch rounds after each operation here, the kernels once at the end; in
float32 both agree to rounding.

Letters as in the package.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rope import Rope, apply_rope
from .availability import in_kitchen, in_onednn

MIN_NORM = 1e-12  # where F.normalize stops dividing
FP8 = torch.float8_e4m3fn
LARGEST = MappingProxyType({FP8: torch.finfo(FP8).max, torch.int8: 127.0})
MIN_SCALE = torch.finfo(torch.float32).tiny  # a row of zeros is counted in this


class Rows(NamedTuple):
    """Tokens in fp8, as `quantise_rows` makes them."""

    values: Tensor
    """[..., C] in fp8."""
    scale: Tensor
    """What each row is counted in, [..., 1], float32."""
    dtype: torch.dtype
    """What they were rounded from."""


def modulated_norm(
    x_BLC: Tensor, shift_BF1C: Tensor, scale_BF1C: Tensor, eps: float, *, rows: bool = False
) -> Tensor | Rows:
    """norm(x) * scale + shift -> [B, L, C], or that as rows of fp8."""
    if in_kitchen(x_BLC):
        from . import kitchen

        x_BFTC = _by_frame(x_BLC, shift_BF1C)
        made = kitchen.modulated_norm(x_BFTC, shift_BF1C, scale_BF1C, eps).flatten(1, 2)
    else:
        normed = F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=eps)
        made = modulate(normed, shift_BF1C, scale_BF1C)
    return _in_fp8(made) if rows else made


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
    """x + y * gate, and its modulated norm, two of [B, L, C]."""
    residual = add_gated(x_BLC, y_BLC, gate_BF1C)
    return residual, modulated_norm(residual, shift_BF1C, scale_BF1C, eps, rows=rows)


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
    """x + y * gate, and its norm times weight plus bias, two of [B, L, C]."""
    residual = add_gated(x_BLC, y_BLC, gate_BF1C)
    made = F.layer_norm(residual, weight_C.shape, weight_C, bias_C, eps)
    return residual, _in_fp8(made) if rows else made


def modulate(x_BLC: Tensor, shift_BF1C: Tensor, scale_BF1C: Tensor) -> Tensor:
    """x * scale + shift, with each frame's own shift and scale."""
    x_BFTC = _by_frame(x_BLC, shift_BF1C)
    return torch.addcmul(shift_BF1C, x_BFTC, scale_BF1C).flatten(1, 2)


def add_gated(x_BLC: Tensor, y_BLC: Tensor, gate_BF1C: Tensor | None) -> Tensor:
    """x + y * gate, with each frame's own gate; without one x + y."""
    if gate_BF1C is None:
        return x_BLC + y_BLC
    x_BFTC, y_BFTC = _by_frame(x_BLC, gate_BF1C), _by_frame(y_BLC, gate_BF1C)
    return torch.addcmul(x_BFTC, y_BFTC, gate_BF1C).flatten(1, 2)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x @ weight^T + bias, [..., I] -> [..., O]."""
    if not in_onednn(x, weight_OI):
        return F.linear(x, weight_OI, bias_O)
    from . import onednn

    return onednn.linear(x, weight_OI, bias_O, gelu=False)


def linear_gelu(x: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """GELU(x @ weight^T + bias)."""
    if not in_onednn(x, weight_OI):
        return gelu(F.linear(x, weight_OI, bias_O))
    from . import onednn

    return onednn.linear(x, weight_OI, bias_O, gelu=True)


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU, x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
        return F.gelu(x, approximate="tanh")
    # The same as x sigmoid(2 u), and twice as fast there: torch's tanh is slow on CPUs.
    inner = (x * x).mul_(0.044715).add_(1).mul_(x)
    return inner.mul_(2 * math.sqrt(2 / math.pi)).sigmoid_().mul_(x)


def norm_rotate(
    x_BLC: Tensor, weight_C: Tensor, num_heads: int, eps: float, rope: Rope | None = None
) -> Tensor:
    """RMS norm over C, then rotation -> [B, L, H, D]."""
    normed = rms_norm(x_BLC, weight_C, eps).view(*x_BLC.shape[:2], num_heads, -1)
    return normed if rope is None else rotate(normed, rope)


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
    """The normed keys to their slot, the same rotated to theirs, the values to theirs."""
    num_heads = k_slot_BLHD.shape[2]
    k_slot_BLHD.copy_(norm_rotate(k_BLC, weight_C, num_heads, eps))
    rotated_slot_BLHD.copy_(rotate(k_slot_BLHD, rope))
    v_slot_BLHD.copy_(v_BLC.view(v_slot_BLHD.shape))


def rms_norm(x_BLC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over C."""
    if x_BLC.device.type != "cpu" or x_BLC.dtype != torch.float32 or torch.is_grad_enabled():
        return F.rms_norm(x_BLC, weight_C.shape, weight_C, eps)
    # There torch's own is a chain of six operations, the first of them a slow power.
    length = torch.linalg.vector_norm(x_BLC, dim=2, keepdim=True)
    power = torch.addcmul(length.new_full((), eps), length, length, value=1 / x_BLC.shape[2])
    return power.rsqrt_().mul(weight_C).mul_(x_BLC)


def rotate(x_BLHD: Tensor, rope: Rope) -> Tensor:
    """Each head rotated by its token's angles."""
    if rope.matrix_LP22 is None or not in_kitchen(x_BLHD):
        return apply_rope(x_BLHD, rope)
    from . import kitchen

    return kitchen.rotate(x_BLHD, rope.matrix_LP22)


def rotate_context(k_NBWHD: Tensor, rope: Rope, rotated_NBWHD: Tensor) -> None:
    """Every layer's keys rotated by the first W tokens' angles."""
    head = rope.tokens(0, k_NBWHD.shape[2])
    for k_BWHD, rotated_BWHD in zip(k_NBWHD, rotated_NBWHD, strict=True):
        rotated_BWHD.copy_(rotate(k_BWHD, head))


def update_sink(
    sinks_NBSHD: tuple[Tensor, Tensor],
    evicted_NBSHD: tuple[Tensor, Tensor],
    decay: float,
    exact_2NBSHD: Tensor | None = None,
) -> None:
    """decay * sink + (1 - decay) * evicted, in place, for keys and for values."""
    averages_NBSHD = sinks_NBSHD if exact_2NBSHD is None else exact_2NBSHD
    for sinks, leaving, averages in zip(sinks_NBSHD, evicted_NBSHD, averages_NBSHD, strict=True):
        for sink, evicted, average in zip(sinks, leaving, averages, strict=True):
            average.copy_(decay * average + (1 - decay) * evicted.to(average.dtype))
            sink.copy_(average)


def merge_parts(parts_BNLHD: Tensor, lse_BNHL: Tensor) -> Tensor:
    """The parts' mean, weighted by their sums of exponentials, in float32 -> [B, L, H, D]."""
    weights_BNLH1 = lse_BNHL.softmax(1).transpose(2, 3)[..., None]
    return (parts_BNLHD * weights_BNLH1).sum(1).to(parts_BNLHD)


def prompt_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, bias_BS: Tensor) -> Tensor:
    """softmax(q k / sqrt(D) + bias) v -> [B, L, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    bias = bias_BS[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def quantise_rows(
    x: Tensor, dtype: torch.dtype, *, after_gelu: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows x [..., C], or GELU of them, in 8 bits and their scales [..., 1]."""
    if after_gelu:
        x = gelu(x)
    largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True, dtype=torch.float32)
    scale = (largest * (1 / LARGEST[dtype])).clamp_min(MIN_SCALE)
    # Divided once a row. No row's largest comes out over `LARGEST` by more than rounding takes off.
    rows = x * scale.reciprocal()
    return (rows.round() if dtype == torch.int8 else rows).to(dtype), scale


def causal_norm_silu(
    x_BCTHW: Tensor,
    gamma: Tensor,
    padded_BCTHW: Tensor,
    bias_C: Tensor | None = None,
    residual_BCTHW: Tensor | None = None,
) -> None:
    """SiLU of the channel norm of x + bias + residual, to the last frames of `padded`."""
    if residual_BCTHW is not None:
        add_in_place(x_BCTHW, bias_C, residual_BCTHW)
    elif bias_C is not None:
        x_BCTHW = x_BCTHW + bias_C.view(-1, 1, 1, 1)
    padded_BCTHW[:, :, -x_BCTHW.shape[2] :] = F.silu(channel_norm(x_BCTHW, gamma))


def add_in_place(x_BCTHW: Tensor, bias_C: Tensor | None, residual_BCTHW: Tensor | None) -> None:
    """x + bias + residual, to x."""
    if bias_C is not None:
        x_BCTHW += bias_C.view(-1, 1, 1, 1)
    if residual_BCTHW is not None:
        x_BCTHW += residual_BCTHW


def channel_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """x [B, C, ...] with each position's channels scaled to unit mean square, times `gamma`."""
    gain = gamma.to(x) * math.sqrt(x.shape[1])
    planes = x.device.type == "cpu" and x.dtype == torch.float32 and x.stride(1) > 1
    if not planes:
        return F.normalize(x, dim=1, eps=MIN_NORM) * gain
    # F.normalize walks each position's channels one by one; a sum over planes is vectorised.
    power = x.square().sum(dim=1, keepdim=True)
    return x * power.clamp_min(MIN_NORM**2).rsqrt() * gain


def _in_fp8(x: Tensor) -> Rows:
    return Rows(*quantise_rows(x, FP8), x.dtype)


def _by_frame(x_BLC: Tensor, each_BF1C: Tensor) -> Tensor:
    return x_BLC.reshape(x_BLC.shape[0], each_BF1C.shape[1], -1, x_BLC.shape[2])
