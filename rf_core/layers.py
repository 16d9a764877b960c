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
from .kernels.reference import add_gated, gelu_tanh
from .kv_cache import LayerWindow, WrittenWindow
from .operations import Linear
from .rope import Rope


class PromptKV(NamedTuple):
    """Keys and values of one prompt in one layer, each [B, S, H, D]."""

    k_BSHD: Tensor
    v_BSHD: Tensor


class Modulations(NamedTuple):
    """What a timestep does to a block, each [B, F, 1, C]; scales have their 1 added."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


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

    def queries(self, x_BLC: Tensor, rope: Rope | None = None) -> Tensor:
        """[B, L, C] -> [B, L, H, D], turned where places are given."""
        return self._normed_heads(self.norm_q, self.q(x_BLC), rope)

    def keys_values(self, x_BLC: Tensor) -> tuple[Tensor, Tensor]:
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
        self, x_BLC: Tensor, rope: Rope, window: LayerWindow | None, attention: Attention
    ) -> Tensor:
        """`rope` holds the places of these tokens."""
        q, (turned, v) = self.queries(x_BLC, rope), self.seen(x_BLC, rope, window)
        return self.output(attention(q, turned, v))

    def seen(self, x_BLC: Tensor, rope: Rope, window: LayerWindow | None) -> tuple[Tensor, Tensor]:
        """Turned keys and values of the window with these tokens in it, [B, tokens, H, D] each."""
        if isinstance(window, WrittenWindow) and is_plain(self.norm_k):
            return self._written(x_BLC, rope, window)
        k, v = self.keys_values(x_BLC)
        turned = kernels.rotate(k, rope)
        return (turned, v) if window is None else window.extend(k, turned, v)

    def _written(self, x_BLC: Tensor, rope: Rope, window: WrittenWindow) -> tuple[Tensor, Tensor]:
        k, v, norm = self.k(x_BLC), self.v(x_BLC), self.norm_k
        assert not k.requires_grad, "under autograd pass cache.snapshot() to the model"
        kernels.write_keys_values(k, v, norm.weight, norm.eps, rope, *window.slots)
        return window.read()


class CrossAttention(Projections):
    """Attention from latent tokens to the prompt."""

    def forward(self, x_BLC: Tensor, prompt: PromptKV, attention: Attention) -> Tensor:
        return self.output(attention(self.queries(x_BLC), prompt.k_BSHD, prompt.v_BSHD))


class Block(nn.Module):
    """One transformer block, modulated per latent frame by the timestep."""

    def __init__(self, config: ModelConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        dim, self.eps = config.dim, config.eps
        self.self_attn = SelfAttention(config, operations, **factory)
        self.norm3 = operations.LayerNorm(dim, eps=self.eps, **factory)
        self.cross_attn = CrossAttention(config, operations, **factory)
        self.ffn = FeedForward(
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
        x_BLC: Tensor,
        time: Tensor | Modulations,
        prompt: PromptKV,
        rope: Rope,
        window: LayerWindow | None,
        attention: Attention,
    ) -> Tensor:
        """`time` is [B, F, 6, C], or what `modulations` makes of it."""
        m = time if isinstance(time, Modulations) else self._modulations(time)
        h = kernels.modulated_norm(x_BLC, m.shift1, m.scale1, self.eps)
        x, h = self._normed(x_BLC, self.self_attn(h, rope, window, attention), m.gate1)
        y = self.cross_attn(h, prompt, attention)
        x, h = kernels.modulated_after_residual(x, y, None, m.shift2, m.scale2, self.eps)
        return add_gated(x, self.ffn(h), m.gate2)

    def remember(
        self, x_BLC: Tensor, time: Tensor | Modulations, rope: Rope, window: LayerWindow
    ) -> None:
        """Leave this block's keys and values in the window, and go no further."""
        m = time if isinstance(time, Modulations) else self._modulations(time)
        h = kernels.modulated_norm(x_BLC, m.shift1, m.scale1, self.eps)
        self.self_attn.seen(h, rope, window)

    def _normed(self, x_BLC: Tensor, y_BLC: Tensor, gate_BF1C: Tensor) -> tuple[Tensor, Tensor]:
        """The gated sum, and what the cross-attention reads of it."""
        norm = self.norm3
        if is_plain(norm):
            weights = norm.weight, norm.bias
            return kernels.affine_after_residual(x_BLC, y_BLC, gate_BF1C, *weights, norm.eps)
        x = add_gated(x_BLC, y_BLC, gate_BF1C)
        return x, norm(x)

    def _modulations(self, time_BF6C: Tensor) -> Modulations:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations(self.modulation, time_BF6C)
        return Modulations(shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2)


class FeedForward(nn.Sequential):
    """Linear, GELU, linear; the first two in one step where the layer is ours."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]"""
        first, _, last = self
        if type(first) is Linear:
            return last(first(x, gelu=True))
        return super().forward(x)  # type: ignore[no-untyped-call]


class GELU(nn.Module):
    """The tanh form of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu_tanh(x)


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

    def forward(self, x_BLC: Tensor, time: HeadModulations) -> Tensor:
        return self.head(kernels.modulated_norm(x_BLC, time.shift, time.scale, self.eps))


def modulations(learned_1NC: Tensor, time_BFNC: Tensor) -> tuple[Tensor, ...]:
    """The N modulation vectors of each frame, [B, F, 1, C] each, ready for tokens of a frame."""
    return (learned_1NC.to(time_BFNC)[:, None] + time_BFNC).split(1, dim=2)


def is_plain(norm: nn.Module) -> bool:
    """Whether a norm is torch's own, whose weights may be read: a host's may cast or patch them."""
    return type(norm) in (nn.LayerNorm, nn.RMSNorm)
