"""The student's rollout under autograd, with the very cache that inference streams through.

Chunk by chunk (Self Forcing, arXiv 2506.08009): denoise without gradient down to the exit step,
take that one step with gradient, then write the cache slot by a clean pass without gradient. What
a chunk sees of its past is a copy that nothing writes to, so a recomputed forward reads the same,
and no gradient leaks from a chunk into the ones before it. Window, evictions and the EMA-Sink are
`KVCache`'s own: a rollout longer than the window trains the sink as it will be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rf_core.attention import Attention, sdpa
from rf_core.config import CacheConfig, Grid, SamplerConfig
from rf_core.kv_cache import KeyValues, KVCache
from rf_core.layers import PromptKV
from rf_core.model import PromptContext, WanModel
from rf_core.scheduler import add_noise, flow_to_x0, sampling_timesteps


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What a rollout made."""

    latents: Tensor
    """Clean latents [B, C, F, h, w]; gradients flow into the supervised chunks."""
    supervised: slice
    """Latent frames with gradient."""
    timestep: float
    """The exit step's: how noised the input of that last pass was."""
    num_evictions: int
    """How often the window gave frames to the sink."""


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random part of a rollout; the same draws give the same rollout."""

    noise: Tensor
    """What chunks start from, [B, C, F, h, w], F whole chunks."""
    renoise: Tensor
    """What goes back in between passes, [steps - 1, B, C, F, h, w]."""
    exit_step: int
    """The pass that ends every chunk, from 0; shared by all chunks, samples and ranks."""


def draw(
    shape: tuple[int, ...], sampler: SamplerConfig, generator: torch.Generator | None = None
) -> Draws:
    """Noise for latents of `shape` [B, C, F, h, w] and a uniform exit step.

    Seed the generator per rank, then share the exit step over ranks.
    """
    steps = len(sampler.steps)
    return Draws(
        noise=torch.randn(shape, generator=generator),
        renoise=torch.randn((steps - 1, *shape), generator=generator),
        exit_step=int(torch.randint(steps, (), generator=generator)),
    )


def roll_out(
    model: WanModel,
    prompt_embeds: Tensor,
    draws: Draws,
    sampler: SamplerConfig,
    cache_config: CacheConfig,
    *,
    supervised_chunks: int | None = None,
    attention: Attention = sdpa,
) -> Rollout:
    """Stream as many chunks as there is noise; the last `supervised_chunks` of them with gradient.

    `prompt_embeds` is [B, S, D]. All chunks are supervised by default. ValueError where the noise
    is not whole chunks.
    """
    chunk = cache_config.chunk_frames
    parts = draws.noise.split(chunk, dim=2)
    if parts[-1].shape[2] != chunk:
        raise ValueError(
            f"noise of {draws.noise.shape[2]} latent frames is not whole chunks of {chunk}"
        )
    count = len(parts) if supervised_chunks is None else min(supervised_chunks, len(parts))
    first = len(parts) - count
    timesteps = sampling_timesteps(sampler).tolist()[: draws.exit_step + 1]
    cache = _cache(model, draws.noise, cache_config)
    prompt = model.prompt_context(prompt_embeds)
    still = detached(prompt)
    latents = []
    for index, (noise, renoise) in enumerate(
        zip(parts, draws.renoise.split(chunk, dim=3), strict=True)
    ):
        cache.advance()
        with torch.no_grad():
            x = _approach(model, noise, renoise, timesteps, still, cache, attention)
        if index < first:
            with torch.no_grad():
                x0 = _guess(model, x, timesteps[-1], still, cache, attention)
        else:
            x0 = _guess(model, x, timesteps[-1], prompt, cache.snapshot(), attention)
        latents.append(x0)
        with torch.no_grad():
            _flow(model, x0.detach(), 0.0, still, cache, attention)
    return Rollout(
        latents=torch.cat(latents, dim=2),
        supervised=slice(first * chunk, len(parts) * chunk),
        timestep=timesteps[-1],
        num_evictions=cache.num_evictions,
    )


def detached(prompt: PromptContext) -> PromptContext:
    """The same prompt, through which no gradient goes."""
    return tuple(PromptKV(kv.k_BSHD.detach(), kv.v_BSHD.detach()) for kv in prompt)


def _approach(
    model: WanModel,
    noise: Tensor,
    renoise: Tensor,
    timesteps: Sequence[float],
    prompt: PromptContext,
    cache: KeyValues,
    attention: Attention,
) -> Tensor:
    """The input of the last of `timesteps`' passes."""
    x = noise
    for step, timestep in enumerate(timesteps[:-1]):
        x0 = _guess(model, x, timestep, prompt, cache, attention)
        x = add_noise(x0, renoise[step], _everywhere(x0, timesteps[step + 1]))
    return x


def _guess(
    model: WanModel,
    x: Tensor,
    timestep: float,
    prompt: PromptContext,
    cache: KeyValues,
    attention: Attention,
) -> Tensor:
    flow = _flow(model, x, timestep, prompt, cache, attention)
    return flow_to_x0(flow, x, _everywhere(x, timestep))


def _flow(
    model: WanModel,
    x: Tensor,
    timestep: float,
    prompt: PromptContext,
    cache: KeyValues,
    attention: Attention,
) -> Tensor:
    dtype = model.patch_embedding.weight.dtype
    return model(x.to(dtype), _everywhere(x, timestep), prompt, cache, attention)


def _everywhere(x: Tensor, timestep: float) -> Tensor:
    return x.new_full((x.shape[0], x.shape[2]), timestep)


def _cache(model: WanModel, noise: Tensor, config: CacheConfig) -> KVCache:
    sizes = model.config
    return KVCache.allocate(
        config,
        num_layers=sizes.num_layers,
        batch=noise.shape[0],
        frame_tokens=Grid.of_latents(*noise.shape[-2:], sizes.patch_size).frame_tokens,
        num_heads=sizes.num_heads,
        head_dim=sizes.head_dim,
        dtype=model.patch_embedding.weight.dtype,
        device=noise.device,
    )
