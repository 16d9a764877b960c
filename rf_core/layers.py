"""The transformer block of Wan: self-attention, cross-attention to the prompt, feed-forward.

Module and parameter names are Wan's own, so released state dicts load without renaming. Layers
come from an injected namespace (`torch.nn` or ComfyUI's `operations`); attention is a function
handed down with each call.

Letters: B batch, F latent frames, L tokens (F * tokens a frame), S tokens of the window or prompt,
H heads, D channels of a head, C channels of the residual stream.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import kernels
from .attention import Attention
from .config import ModelConfig
from .fp8 import takes_rows
from .fused_linear import fused_linear
from .kernels import reference
from .kernels.reference import FP8, Rows, add_gated
from .kv_cache import InPlaceWindow, LayerWindow
from .operations import is_plain_linear, is_watched
from .rope import Rope


class PromptKV(NamedTuple):
    """Keys and values of one prompt in one layer, each [B, S, H, D]."""

    k_BSHD: Tensor
    v_BSHD: Tensor


class CountedPromptKV(NamedTuple):
    """The same of a prompt whose padding, equal rows all of them, is one key that counts often.

    On a CPU the other ones are not there.
    """

    k_BSHD: Tensor
    v_BSHD: Tensor
    bias_BS: Tensor
    """The logarithm of how often each key counts, float32; see `kernels.prompt_attention`."""


class Modulations(NamedTuple):
    """What a timestep does to a block, each [B, F, 1, C]; scales have their 1 added."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


class Residual(NamedTuple):
    """Tokens before their last sum, x + y * gate, which the norm that reads them makes."""

    x_BLC: Tensor
    y_BLC: Tensor
    gate_BF1C: Tensor


class HeadModulations(NamedTuple):
    """What a timestep does to the head, each [B, F, 1, C]; the scale has its 1 added."""

    shift: Tensor
    scale: Tensor


class Projections(nn.Module):
    """The weights of an attention layer; q and k are RMS-normed over the full width."""

    def __init__(self, config: ModelConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = operations.Linear(config.dim, config.dim, **factory)
        self.k = operations.Linear(config.dim, config.dim, **factory)
        self.v = operations.Linear(config.dim, config.dim, **factory)
        self.o = operations.Linear(config.dim, config.dim, **factory)
        self.norm_q = operations.RMSNorm(config.dim, eps=config.eps, **factory)
        self.norm_k = operations.RMSNorm(config.dim, eps=config.eps, **factory)

    def queries(self, x_BLC: Tensor | Rows, rope: Rope | None = None) -> Tensor:
        """[B, L, C] -> [B, L, H, D], rotated where places are given."""
        return self._normed_heads(self.norm_q, self.q(x_BLC), rope)

    def keys_values(self, x_BLC: Tensor | Rows) -> tuple[Tensor, Tensor]:
        """[B, L, C] -> two of [B, L, H, D]"""
        return self._normed_heads(self.norm_k, self.k(x_BLC)), self._heads(self.v(x_BLC))

    def output(self, x_BLHD: Tensor) -> Tensor:
        """[B, L, H, D] -> [B, L, C]"""
        return self.o(x_BLHD.flatten(2))

    def _normed_heads(self, norm: Any, x_BLC: Tensor, rope: Rope | None = None) -> Tensor:
        if is_plain(norm):
            return kernels.norm_rotate(x_BLC, norm.weight, self.num_heads, norm.eps, rope)
        heads = self._heads(norm(x_BLC))
        return heads if rope is None else kernels.rotate(heads, rope)

    def _heads(self, x_BLC: Tensor) -> Tensor:
        return x_BLC.reshape(*x_BLC.shape[:2], self.num_heads, -1)


class SelfAttention(Projections):
    """Attention among latent tokens: over the cache's window, or over all of them without one."""

    def forward(
        self, x_BLC: Tensor | Rows, rope: Rope, window: LayerWindow | None, attention: Attention
    ) -> Tensor:
        """`rope` holds the places of these tokens."""
        q, k, v = self._projected(x_BLC, rope)
        k, v = self._in_window(k, v, rope, window)
        return self.output(attention(q, k, v))

    def extend_window(
        self, x_BLC: Tensor | Rows, rope: Rope, window: LayerWindow | None
    ) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of the window with these tokens in it, [B, tokens, H, D] each."""
        return self._in_window(self.k(x_BLC), self.v(x_BLC), rope, window)

    def _projected(self, x_BLC: Tensor | Rows, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, L, H, D]; keys and values before all else, [B, L, C] each."""
        joint = fused_linear(x_BLC, self.q, self.k, self.v)
        if joint is None:
            return self.queries(x_BLC, rope), self.k(x_BLC), self.v(x_BLC)
        q, k, v = joint
        return self._normed_heads(self.norm_q, q, rope), k, v

    def _in_window(
        self, k_BLC: Tensor, v_BLC: Tensor, rope: Rope, window: LayerWindow | None
    ) -> tuple[Tensor, Tensor]:
        norm = self.norm_k
        if isinstance(window, InPlaceWindow) and is_plain(norm):
            assert not k_BLC.requires_grad, "under autograd pass cache.snapshot() to the model"
            kernels.write_keys_values(k_BLC, v_BLC, norm.weight, norm.eps, rope, *window.slots)
            return window.read()
        k, v = self._normed_heads(norm, k_BLC), self._heads(v_BLC)
        rotated = kernels.rotate(k, rope)
        return (rotated, v) if window is None else window.extend(k, rotated, v)


class CrossAttention(Projections):
    """Attention from latent tokens to the prompt."""

    def forward(
        self, x_BLC: Tensor | Rows, prompt: PromptKV | CountedPromptKV, attention: Attention
    ) -> Tensor:
        """`attention` knows no counts, and gets the keys where all of them are to be computed."""
        q_BLHD, k_BSHD = self.queries(x_BLC), prompt.k_BSHD
        if isinstance(prompt, CountedPromptKV) and kernels.counts_keys(q_BLHD, k_BSHD):
            return self.output(kernels.prompt_attention(q_BLHD, *prompt))
        return self.output(attention(q_BLHD, k_BSHD, prompt.v_BSHD))


class Block(nn.Module):
    """One transformer block, modulated per latent frame by the timestep."""

    def __init__(self, config: ModelConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        dim, self.eps = config.dim, config.eps
        self.self_attn = SelfAttention(config, operations, **factory)
        self.norm3 = operations.LayerNorm(dim, eps=self.eps, **factory)
        self.cross_attn = CrossAttention(config, operations, **factory)
        self.ffn = nn.Sequential(
            operations.Linear(dim, config.ffn_dim, **factory),
            GELU(),
            operations.Linear(config.ffn_dim, dim, **factory),
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, dim, **factory))

    def prompt_kv(self, text_BSC: Tensor) -> PromptKV:
        """This layer's cross-attention keys and values of an embedded prompt."""
        return PromptKV(*self.cross_attn.keys_values(text_BSC))

    def modulations(self, time_BF6C: Tensor) -> Modulations:
        """What a timestep does to this block: for those who call again with the same one."""
        return self._modulations(time_BF6C)

    def forward(
        self,
        x_BLC: Tensor | Residual,
        time: Tensor | Modulations,
        prompt: PromptKV | CountedPromptKV,
        rope: Rope,
        window: LayerWindow | None,
        attention: Attention,
    ) -> Tensor | Residual:
        """`time` is [B, F, 6, C], or what `modulations` makes of it."""
        m = time if isinstance(time, Modulations) else self._modulations(time)
        x, h = self._first_norm(x_BLC, m)
        x, h = self._normed(x, self.self_attn(h, rope, window, attention), m.gate1)
        y = self.cross_attn(h, prompt, attention)
        second = m.shift2, m.scale2, self.eps
        x, h = kernels.modulated_after_residual(x, y, None, *second, rows=takes_rows(self.ffn[0]))
        last = Residual(x, self._fed_forward(h), m.gate2)
        # Whoever recomputes blocks keeps what goes between them: that is to be one tensor.
        return add_gated(*last) if torch.is_grad_enabled() else last

    def write_cache(
        self, x_BLC: Tensor | Residual, time: Tensor | Modulations, rope: Rope, window: LayerWindow
    ) -> None:
        """Leave this block's keys and values in the window, and go no further."""
        m = time if isinstance(time, Modulations) else self._modulations(time)
        _, h = self._first_norm(x_BLC, m)
        self.self_attn.extend_window(h, rope, window)

    def _first_norm(self, x_BLC: Tensor | Residual, m: Modulations) -> tuple[Tensor, Tensor | Rows]:
        attn = self.self_attn
        rows = takes_rows(attn.q) and takes_rows(attn.k) and takes_rows(attn.v)
        return summed_and_normed(x_BLC, m.shift1, m.scale1, self.eps, rows=rows)

    def _normed(
        self, x_BLC: Tensor, y_BLC: Tensor, gate_BF1C: Tensor
    ) -> tuple[Tensor, Tensor | Rows]:
        """The gated sum, and what the cross-attention reads of it."""
        norm = self.norm3
        if is_plain(norm):
            given = x_BLC, y_BLC, gate_BF1C, norm.weight, norm.bias, norm.eps
            return kernels.affine_after_residual(*given, rows=takes_rows(self.cross_attn.q))
        x = add_gated(x_BLC, y_BLC, gate_BF1C)
        return x, norm(x)

    def _fed_forward(self, x_BLC: Tensor | Rows) -> Tensor:
        up, gelu, down = self.ffn
        if any(map(is_watched, (self.ffn, up, gelu))):
            return self.ffn(x_BLC)
        if takes_rows(down):
            h = up(x_BLC)
            return down(Rows(*kernels.quantise_rows(h, FP8, after_gelu=True), h.dtype))
        if is_plain_linear(up) and isinstance(x_BLC, Tensor):
            return down(kernels.linear_gelu(x_BLC, up.weight, up.bias))
        return self.ffn(x_BLC)

    def _modulations(self, time_BF6C: Tensor) -> Modulations:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations(self.modulation, time_BF6C)
        return Modulations(shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2)


class GELU(nn.Module):
    """The tanh form of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return reference.gelu(x)


class Head(nn.Module):
    """The last norm and projection to patches, [B, L, C] -> [B, L, patch channels]."""

    def __init__(self, config: ModelConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        frames, rows, columns = config.patch_size
        patch_channels = frames * rows * columns * config.out_dim
        self.eps = config.eps
        self.head = operations.Linear(config.dim, patch_channels, **factory)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim, **factory))

    def modulations(self, time_BFC: Tensor) -> HeadModulations:
        """What a timestep does to the head."""
        shift, scale = modulations(self.modulation, time_BFC[:, :, None])
        return HeadModulations(shift, 1 + scale)

    def forward(self, x_BLC: Tensor | Residual, time: HeadModulations) -> Tensor:
        _, h = summed_and_normed(x_BLC, time.shift, time.scale, self.eps)
        return self.head(h)


def hinted(x_BLC: Any, hint_BLC: Tensor | None) -> Any:
    """Tokens, or a `Residual`, with a hint added where there is one."""
    if hint_BLC is None:
        return x_BLC
    if isinstance(x_BLC, Residual):
        return x_BLC._replace(x_BLC=x_BLC.x_BLC + hint_BLC)
    return x_BLC + hint_BLC


def summed(x_BLC: Tensor | Residual) -> Tensor:
    """Tokens, their last sum made."""
    return add_gated(*x_BLC) if isinstance(x_BLC, Residual) else x_BLC


def summed_and_normed(
    x_BLC: Tensor | Residual,
    shift_BF1C: Tensor,
    scale_BF1C: Tensor,
    eps: float,
    *,
    rows: bool = False,
) -> tuple[Tensor, Tensor | Rows]:
    """The tokens, their last sum made, and the modulated norm of them: two of [B, L, C]."""
    if isinstance(x_BLC, Residual):
        return kernels.modulated_after_residual(*x_BLC, shift_BF1C, scale_BF1C, eps, rows=rows)
    return x_BLC, kernels.modulated_norm(x_BLC, shift_BF1C, scale_BF1C, eps, rows=rows)


def modulations(learned_1NC: Tensor, time_BFNC: Tensor) -> tuple[Tensor, ...]:
    """The N modulation vectors of each frame, [B, F, 1, C] each, ready for tokens of a frame."""
    return (learned_1NC.to(time_BFNC)[:, None] + time_BFNC).split(1, dim=2)


def is_plain(norm: nn.Module) -> bool:
    """Whether a norm is torch's own, whose weights may be read: a host's may cast or patch them."""
    return type(norm) in (nn.LayerNorm, nn.RMSNorm)
