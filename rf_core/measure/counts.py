"""The work of a stream counted from its sizes: floating-point operations and bytes.

A multiply-add counts as two operations, and only products count (linear layers, attention, the
patches): the rest is bound by memory. Bytes are what must move where every step reads its input
and its weights and writes its output once, in the given element size, the steps between products
being those of `rf_core.kernels`. What a chunk takes beyond that is ours to save. All is per sample;
a batch multiplies everything but the weights' bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import CacheConfig, Grid, ModelConfig, SamplerConfig
from ..decoders.codec import FastPaths
from ..decoders.taehv import TAEHV
from ..decoders.vae import VAEState, WanVAE

SELF_PRODUCTS = "self-attention products"
CROSS_PRODUCTS = "cross-attention products"
SELF_LINEARS = "linears: self q k v o"
CROSS_LINEARS = "linears: cross q o"
FEED_FORWARD = "linears: feed-forward"
OTHER_LINEARS = "linears: time, patch, head"
NORMS = "norms, modulation, residuals"
HEADS = "q k v: norm, rotation, cache"
ELEMENTWISE = "GELU by itself, sums"
EVICTION = "cache: eviction, rotation"


@dataclass(frozen=True)
class Work:
    """What one step takes."""

    flops: int = 0
    """Floating-point operations; a multiply-add is two."""
    bytes: int = 0
    """Bytes read and written at the least."""

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: int) -> Work:
        """The same step `count` times."""
        return Work(self.flops * count, self.bytes * count)


def total(parts: Mapping[str, Work]) -> Work:
    """All parts together."""
    return sum(parts.values(), Work())


@dataclass(frozen=True)
class Passes:
    """Passes of the network that are alike."""

    count: int
    frames: int
    """Latent frames that one runs over."""
    context_frames: int
    """Those before them that attention sees."""


def chunk_passes(cache: CacheConfig, sampler: SamplerConfig) -> list[Passes]:
    """All passes of a chunk of the steady state: those that denoise, then what fills the cache."""
    chunk, steps = cache.chunk_frames, len(sampler.steps)
    context = cache.window_frames - chunk
    if sampler.rolling:  # the opening lies beside what attention sees
        seen, flight = cache.window_frames - cache.opening_frames, steps * chunk
        return [Passes(1, flight, seen - flight), Passes(1, chunk, seen - chunk)]
    if cache.rebuild == "never":
        return [Passes(steps + 1, chunk, context)]
    begins = range(0, context, chunk)
    rebuilt = [Passes(1, min(chunk, context - begin), begin) for begin in begins]
    return [Passes(steps, chunk, context), *rebuilt]


def largest_pass(cache: CacheConfig, sampler: SamplerConfig) -> int:
    """The most latent frames that a pass runs over, a joint recache's among them."""
    recached = cache.window_frames if cache.recache != "chunks" else 0
    return max(recached, *(each.frames for each in chunk_passes(cache, sampler)))


def pass_work(
    model: ModelConfig,
    cache: CacheConfig,
    grid: Grid,
    element_bytes: int = 2,
    context_frames: int | None = None,
    prompt_keys: int | None = None,
    frames: int | None = None,
) -> dict[str, Work]:
    """One pass of the network over so many latent frames, by default a chunk, by kind.

    `context_frames` is what attention sees before them, by default all the window can hold; of the
    prompt's keys, `prompt_keys` are computed with, by default all: of one without padding.
    """
    frames = cache.chunk_frames if frames is None else frames
    if context_frames is None:
        context_frames = cache.window_frames - frames
    keys = model.text_len if prompt_keys is None else prompt_keys
    tokens = frames * grid.frame_tokens
    window = context_frames * grid.frame_tokens + tokens
    block = {
        SELF_PRODUCTS: attention_work(model.dim, tokens, window, element_bytes),
        CROSS_PRODUCTS: attention_work(model.dim, tokens, keys, element_bytes),
        SELF_LINEARS: _linear(model.dim, model.dim, tokens, element_bytes).times(4),
        CROSS_LINEARS: _linear(model.dim, model.dim, tokens, element_bytes).times(2),
        FEED_FORWARD: _linear(model.dim, model.ffn_dim, tokens, element_bytes)
        + _linear(model.ffn_dim, model.dim, tokens, element_bytes),
        **_memory_bound(model, tokens, element_bytes),
    }
    parts = {kind: work.times(model.num_layers) for kind, work in block.items()}
    # The first norm finds its sum made, which spares two rows; the head's has the last to make.
    parts[NORMS] += Work(bytes=(4 - 2) * tokens * model.dim * element_bytes)
    return parts | {OTHER_LINEARS: _ends(model, frames, tokens, element_bytes)}


def chunk_work(
    model: ModelConfig,
    cache: CacheConfig,
    sampler: SamplerConfig,
    grid: Grid,
    element_bytes: int = 2,
    prompt_keys: int | None = None,
) -> dict[str, Work]:
    """A chunk of the steady state, by kind: all its passes, and one eviction.

    A context that a pass copies for itself, as rolling ones do, is not counted.
    """
    parts: dict[str, Work] = {}
    for each in chunk_passes(cache, sampler):
        one = pass_work(
            model, cache, grid, element_bytes, each.context_frames, prompt_keys, each.frames
        )
        for kind, work in one.items():
            parts[kind] = parts.get(kind, Work()) + work.times(each.count)
    return parts | {EVICTION: _eviction(model, cache, grid, element_bytes)}


def cache_bytes(
    model: ModelConfig,
    cache: CacheConfig,
    grid: Grid,
    element_bytes: int = 2,
    keep_rotated: bool = True,
) -> int:
    """Bytes of a window's keys and values in every layer, and of the rotated keys.

    Without `keep_rotated`, those of one layer at a time.
    """
    if cache.storage == "int8":
        return int8_cache_bytes(model, cache, grid, element_bytes)
    layers = model.num_layers * (3 if keep_rotated else 2) + (not keep_rotated)
    frames = layers * cache.window_frames
    if cache.accumulator == "float32" and element_bytes < 4:
        frames += 2 * model.num_layers * cache.head_frames * 4 // element_bytes
    return frames * grid.frame_tokens * model.dim * element_bytes


def int8_cache_bytes(
    model: ModelConfig, cache: CacheConfig, grid: Grid, element_bytes: int = 2
) -> int:
    """The same where all but the head is kept in int8, and one layer's window unpacked."""
    kept, head = cache.window_frames - cache.head_frames, cache.head_frames
    head_bytes = 4 if cache.accumulator == "float32" else element_bytes
    row = kept * (model.dim + 4 * model.num_heads) + head * model.dim * head_bytes
    scratch = 3 * cache.window_frames * model.dim * element_bytes
    return (2 * model.num_layers * row + scratch) * grid.frame_tokens


def stream_bytes(
    model: ModelConfig,
    cache: CacheConfig,
    sampler: SamplerConfig,
    grid: Grid,
    element_bytes: int = 2,
) -> int:
    """About what a stream takes beside its weights and decoder, at no cost.

    For hosts that ask before every run; `rf_core.memory.footprint` counts it, in seconds.
    """
    prompt = 2 * model.num_layers * model.text_len * model.dim
    tokens = largest_pass(cache, sampler) * grid.frame_tokens
    # The feed-forward layer and its GELU; the residual stream, norms, queries and what attends.
    pass_ = tokens * (2 * model.ffn_dim + 8 * model.dim) * element_bytes
    # Where no kernel does it, a layer's context is turned in float32, in some four copies.
    context = (cache.window_frames - cache.chunk_frames) * grid.frame_tokens
    turning = 4 * context * model.dim * 4
    held = cache_bytes(model, cache, grid, element_bytes) + prompt * element_bytes
    return held + max(pass_, turning)


def num_parameters(model: ModelConfig) -> int:
    """Parameters of the network."""
    dim = model.dim
    attention = 4 * _parameters(dim, dim) + 2 * dim  # q k v o and the norms of q and k
    ffn = _parameters(dim, model.ffn_dim) + _parameters(model.ffn_dim, dim)
    block = 2 * attention + ffn + 2 * dim + 6 * dim  # norm3 and the modulation
    text = _parameters(model.text_dim, dim) + _parameters(dim, dim)
    time = _parameters(model.freq_dim, dim) + _parameters(dim, dim) + _parameters(dim, 6 * dim)
    rows, columns = model.patch_size[1:]
    patch = _parameters(model.in_dim * rows * columns, dim)
    head = _parameters(dim, model.out_dim * rows * columns) + 2 * dim
    return model.num_layers * block + text + time + patch + head


def decoder_work(codec: WanVAE | TAEHV, latents_shape: tuple[int, ...]) -> Work:
    """Decoding one chunk [B, C, F, h, w] of a stream that has begun.

    Counted by running a weightless copy: operations with doubling folded into its convolution, as
    cards and CPUs do, bytes of every layer's input, output and weights as it is defined.
    """
    from torch.utils.flop_counter import FlopCounterMode  # which imports triton: slow

    dtype = next(codec.parameters()).dtype
    fake_codec = type(codec)(codec.config, device="meta", dtype=dtype)  # type: ignore[arg-type]
    latents = torch.empty(latents_shape, device="meta", dtype=dtype)
    with torch.no_grad():
        fake_codec.fast_paths = FastPaths(fold_doubling=True)
        _, state = fake_codec.decode_chunk(latents, None)
        with FlopCounterMode(display=False) as counter:
            fake_codec.decode_chunk(latents, state.fork())
        fake_codec.fast_paths = FastPaths()  # in which hooks see every layer
        moved = _bytes_moved(fake_codec, latents, state)
    return Work(counter.get_total_flops(), moved)


def _bytes_moved(codec: WanVAE | TAEHV, latents: Tensor, state: VAEState) -> int:
    moved = 0

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal moved
        tensors = [*inputs, output, *module.parameters(recurse=False)]
        moved += sum(t.nbytes for t in tensors if isinstance(t, Tensor))

    leaves = (module for module in codec.modules() if not any(module.children()))
    hooks = [leaf.register_forward_hook(count) for leaf in leaves]
    codec.decode_chunk(latents, state)
    for hook in hooks:
        hook.remove()
    return moved


def _parameters(in_dim: int, out_dim: int) -> int:
    return in_dim * out_dim + out_dim


def _linear(in_dim: int, out_dim: int, rows: int, element_bytes: int) -> Work:
    moved = _parameters(in_dim, out_dim) + rows * (in_dim + out_dim)
    return Work(2 * rows * in_dim * out_dim, moved * element_bytes)


def attention_work(dim: int, queries: int, keys: int, element_bytes: int = 2) -> Work:
    """The products of one layer's attention, over all heads."""
    return Work(4 * queries * keys * dim, 2 * (queries + keys) * dim * element_bytes)


def _memory_bound(model: ModelConfig, tokens: int, element_bytes: int) -> dict[str, Work]:
    # Counted in rows of `dim` elements, read or written, by the steps of `rf_core.kernels`.
    norms = 3 * 4  # three residuals, each with the norm after it
    heads = 2 + 5 + 2  # q; k and v to their three slots; the cross-attention's q
    row = tokens * model.dim * element_bytes
    return {
        NORMS: Work(bytes=norms * row),
        HEADS: Work(bytes=heads * row),
        ELEMENTWISE: Work(),
    }


def _ends(model: ModelConfig, frames: int, tokens: int, element_bytes: int) -> Work:
    dim, (rows, columns) = model.dim, model.patch_size[1:]
    layers = (
        (model.in_dim * rows * columns, dim, tokens),
        (dim, model.out_dim * rows * columns, tokens),
        (model.freq_dim, dim, frames),
        (dim, dim, frames),
        (dim, 6 * dim, frames),
    )
    return sum((_linear(*layer, element_bytes) for layer in layers), Work())


def _eviction(model: ModelConfig, cache: CacheConfig, grid: Grid, element_bytes: int) -> Work:
    rotated = cache.window_frames - cache.chunk_frames
    kept = rotated - cache.head_frames  # they move up
    sink, memories = (cache.sink_frames if cache.decay < 1 else 0), len(cache.memory_rates)
    absorbed = 2 * (sink + memories) + (cache.chunk_frames if sink or memories else 0)
    if cache.rebuild != "never":  # nothing stays to move; each part's context is rotated
        kept, rotated = 0, rotated + sum(range(0, rotated, cache.chunk_frames))
    frames = 2 * (absorbed + 2 * kept) + 2 * rotated
    rows = model.num_layers * frames * grid.frame_tokens
    return Work(bytes=rows * model.dim * element_bytes)
