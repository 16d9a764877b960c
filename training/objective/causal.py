"""A clip through the causal student under autograd: the streaming window as part of the graph.

`KVCache` overwrites memory that is allocated once, which autograd cannot follow. Here the same
window is immutable: the frames of a chunk are appended, evicted frames are averaged into the sink
as the cache does it, and gradients flow back through both.

Letters: B batch, L tokens of a chunk, T tokens of a frame, H heads, D channels of a head, N chunks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rf_core.attention import Attention, sdpa
from rf_core.config import CacheConfig, Grid
from rf_core.kv_cache import update_sink
from rf_core.model import PromptContext, WanModel
from rf_core.rope import Rope, apply_rope, rope_from, rope_table
from rf_core.scheduler import flow_to_x0

FramesKV = tuple[Tensor, ...]
"""Keys, or values, of latent frames in one layer, [B, T, H, D] each."""
LayersKV = tuple[tuple[FramesKV, FramesKV], ...]
"""Keys and values of latent frames in every layer."""


def empty_past(num_layers: int) -> LayersKV:
    """The empty window that the first chunk sees."""
    return (((), ()),) * num_layers


class ChunkKV:
    """Keys and values of one pass over a chunk: those of the past, and its own (`KeyValues`).

    Not a dataclass: FSDP would search it for tensors and give every block a copy.
    """

    def __init__(
        self, past: LayersKV, grid: Grid, opening_frames: int = 0, gone_frames: int = 0
    ) -> None:
        """`past` is the window before the chunk, `grid` that of its frames.

        Its first `opening_frames` stand `gone_frames` before their places in it.
        """
        self.past, self.grid = past, grid
        self.opening_frames, self.gone_frames = opening_frames, gone_frames
        self.own: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, [B, L, H, D] each
        self._rope: Rope | None = None

    @property
    def context_frames(self) -> int:
        """Latent frames of the window that lie before the chunk."""
        return len(self.past[0][0])

    def rope(self, head_dim: int, device: torch.device) -> Rope:
        """The angles of the window before the chunk, made once for all layers."""
        if self._rope is None:
            place = self.grid, head_dim, device
            self._rope = rope_table(self.context_frames, *place)
            if self.gone_frames:
                self._rope = self._rope.clone()
                self._rope.copy_(rope_from(-self.gone_frames, self.opening_frames, *place))
        return self._rope

    def layer(self, index: int) -> LayerKV:
        """The window of one layer."""
        return LayerKV(self, index)

    def extended(self) -> LayersKV:
        """The window with the chunk's own keys and values appended."""
        own = (self.own[layer] for layer in range(len(self.past)))
        tokens = self.grid.frame_tokens
        return tuple(
            ((*keys, *k.split(tokens, dim=1)), (*values, *v.split(tokens, dim=1)))
            for (keys, values), (k, v) in zip(self.past, own, strict=True)
        )


class LayerKV:
    """One layer of a `ChunkKV`."""

    def __init__(self, chunk_kv: ChunkKV, index: int) -> None:
        self.chunk_kv, self.index = chunk_kv, index

    def extend(self, k_BLHD: Tensor, rotated_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor]:
        """The window's rotated keys, and its values, with the chunk's appended; differentiable.

        The first call of a pass stores the chunk's keys and values; a recomputation does not.
        """
        self.chunk_kv.own.setdefault(self.index, (k_BLHD, v_BLHD))
        keys, values = self.chunk_kv.past[self.index]
        if not keys:
            return rotated_BLHD, v_BLHD
        context = torch.cat(keys, dim=1).to(k_BLHD.dtype)
        rope = self.chunk_kv.rope(k_BLHD.shape[-1], k_BLHD.device)
        rotated = torch.cat([apply_rope(context, rope), rotated_BLHD], dim=1)
        return rotated, torch.cat([*(v.to(v_BLHD.dtype) for v in values), v_BLHD], dim=1)


@dataclass(frozen=True, kw_only=True)
class Window:
    """An immutable window of keys and values: anchor, sink, then the frames of past chunks."""

    config: CacheConfig
    """Window, anchor, sink and decay, as of `KVCache`."""
    grid: Grid
    """Token grid of a frame."""
    layers: LayersKV
    """Keys and values of its frames, in every layer."""
    gone_frames: int = 0
    """How many have left it."""

    @classmethod
    def empty(cls, config: CacheConfig, num_layers: int, grid: Grid) -> Window:
        """The window before the first chunk."""
        return cls(config=config, grid=grid, layers=empty_past(num_layers))

    @property
    def num_frames(self) -> int:
        """Latent frames in it."""
        return len(self.layers[0][0])

    def evicted(self) -> Window:
        """With room for a chunk: frames that no longer fit are averaged into the sink."""
        overflow = self.num_frames + self.config.chunk_frames - self.config.window_frames
        if overflow <= 0:
            return self
        layers = tuple(
            (self._evict(keys, overflow, keys=True), self._evict(values, overflow, keys=False))
            for keys, values in self.layers
        )
        return replace(self, layers=layers, gone_frames=self.gone_frames + overflow)

    def chunk_kv(self) -> ChunkKV:
        """For a pass over the next chunk; call `evicted` first."""
        opening = self.config.opening_frames if self.config.positions == "absolute" else 0
        return ChunkKV(self.layers, self.grid, opening, self.gone_frames if opening else 0)

    def appended(self, chunk_kv: ChunkKV) -> Window:
        """With the keys and values of a pass at its end."""
        return replace(self, layers=chunk_kv.extended())

    def _evict(self, frames: FramesKV, count: int, *, keys: bool) -> FramesKV:
        c, opening = self.config, self.config.opening_frames
        anchor, sink = frames[: c.anchor_frames], frames[c.anchor_frames : opening]
        gone, rest = frames[opening : opening + count], frames[opening + count :]
        if sink and c.decay < 1:
            held = torch.cat(sink, dim=1)
            # Kept in the accumulator's dtype, and read in that of the keys.
            held = held.float() if c.accumulator == "float32" else held
            tokens = self.grid.frame_tokens
            mixed = update_sink(held, torch.cat(gone, dim=1), c, tokens, keys=keys)
            sink = mixed.split(tokens, dim=1)
        return (*anchor, *sink, *rest)


def check_clip_cache(cache: CacheConfig) -> None:
    """ValueError for what streams keep of their past and `predict_clip` does not."""
    for name in ("first_chunk_frames", "memory_rates", "rebuild"):
        if (value := getattr(cache, name)) != (usual := getattr(CacheConfig(), name)):
            raise ValueError(
                f"cache.{name} is {value!r}, which only rollouts (re_dmd) and streams know; set it "
                f"to {json.dumps(usual)}"
            )


def predict_clip(
    model: WanModel,
    noisy: Tensor,
    timestep_BF: Tensor,
    prompt: PromptContext,
    config: CacheConfig,
    *,
    clean: Tensor | None = None,
    attention: Attention = sdpa,
    dtype: torch.dtype | None = None,
    clean_timestep: float = 0.0,
) -> Tensor:
    """The clean latents the student makes of a clip's noisy chunks, both [B, C, F, h, w].

    Chunks are run in turn, each through the window that a stream would show it. Without `clean`,
    later chunks see the keys and values of these very passes; with it, those of passes at
    `clean_timestep` over `clean`, as a stream leaves them. Gradients pass through either. `dtype`
    is what the network computes in, by default that of its weights. ValueError where F is not whole
    chunks.
    """
    size, frames = config.chunk_frames, noisy.shape[2]
    if frames % size:
        raise ValueError(f"a clip of {frames} latent frames is not whole chunks of {size}")
    dtype = dtype or model.patch_embedding.weight.dtype
    grid = Grid.of_latents(*noisy.shape[-2:], model.config.patch_size)
    window, predictions = Window.empty(config, model.config.num_layers, grid), []
    for start in range(0, frames, size):
        window = window.evicted()
        x, at = noisy[:, :, start : start + size], timestep_BF[:, start : start + size]
        chunk_kv = window.chunk_kv()
        x0 = flow_to_x0(model(x.to(dtype), at, prompt, chunk_kv, attention), x, at)
        if clean is not None and start + size < frames:
            chunk_kv, known = window.chunk_kv(), clean[:, :, start : start + size].to(dtype)
            known_at = torch.full_like(at, clean_timestep)
            unused = model(known, known_at, prompt, chunk_kv, attention)
            # FSDP gathers weights for a backward pass where it enters by the network's output. This
            # one enters by keys and values; the output must be a part of the graph all the same.
            x0 = x0 + 0 * unused.float().mean()
        predictions.append(x0)
        window = window.appended(chunk_kv)
    return torch.cat(predictions, dim=2)


def chunk_errors(x0: Tensor, target: Tensor, chunk_frames: int) -> Tensor:
    """Mean squared error of each chunk, [B, N], of latents [B, C, F, h, w]."""
    return (x0 - target).square().unflatten(2, (-1, chunk_frames)).mean(dim=(1, 3, 4, 5))
