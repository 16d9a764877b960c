"""Teaches the causal student the teacher's trajectories, chunk by chunk, with the real cache.

Each chunk is seen exactly as in a stream: the cache advances (and evicts into its sink), the chunk
at one of the few sampling timesteps attends to the window, and a clean pass rewrites its slot. The
target is the clip the teacher's trajectory leads to (CausVid, arXiv 2412.07772, sec. 4.2). The
past is the teacher's own clean chunks at first; later part of the batch sees the student's
predictions of them instead, since its own past is what it will have to live with.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rf_core.config import CacheConfig, Grid
from rf_core.kv_cache import KVCache
from rf_core.model import PromptContext, WanModel
from rf_core.scheduler import add_noise, flow_to_x0
from rf_core.text import TextEncoder

from .budget import Budget, Every, run
from .ode_pairs import Pairs
from .train_teacher import Hook, Training, endless_order, finish_step, make_optimisers, training_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The regression."""

    budget: Budget = field(default_factory=lambda: Budget(minutes=15.0))
    """How long to train."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """The window and sink of the streams it will make."""
    batch: int = 16
    """Trajectories a step."""
    renoised_share: float = 0.5
    """Share of chunks that start from the clean clip with fresh noise, as they do between the
    passes of a stream, in place of the trajectory's own state."""
    own_past_from: float = 0.4
    """Share of the run after which part of the batch sees the student's own past."""
    own_past_share: float = 0.5
    """That part."""
    matrix_rate: float = 1e-3
    """Muon's peak learning rate, for the blocks' matrices."""
    other_rate: float = 1e-3
    """AdamW's peak learning rate, for everything else."""
    weight_decay: float = 0.01
    """Of the matrices."""
    clip_norm: float = 1.0
    """Largest norm of AdamW's gradients."""
    ema: float = 0.995
    """Decay of the averaged weights, a step."""
    checkpoint_minutes: float = 5.0
    """Between two calls of the checkpoint hook."""
    seed: int = 0
    """Seeds batches, timesteps and contexts."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Trajectories, with the choices that were drawn for them."""

    states: Tensor
    """States at the sampling timesteps [B, K, C, F, h, w]."""
    clean: Tensor
    """The clips they lead to [B, C, F, h, w]."""
    prompt_embeds: Tensor
    """[B, S, D]."""
    timesteps: Tensor
    """The K sampling timesteps."""
    step: Tensor
    """Which of them each sample of each chunk is at, [chunks, B]."""
    renoised: Tensor
    """Whether it starts from fresh noise there, [chunks, B]."""
    own_past: Tensor
    """Whether each sample's past is the student's own, [B]."""


def train_student(
    config: StudentConfig,
    teacher: WanModel,
    pairs: Pairs,
    encoder: TextEncoder,
    checkpoint: Hook | None = None,
) -> Training:
    """Train a student that begins from `teacher`'s weights, which it takes over."""
    torch.manual_seed(config.seed)
    training = training_of(teacher.requires_grad_(True))
    optimisers = make_optimisers(
        training.model, config.matrix_rate, config.other_rate, config.weight_decay
    )
    due = Every(config.checkpoint_minutes)
    rng = np.random.default_rng(config.seed)
    order = endless_order(len(pairs.clean), rng)
    for step, spent in run(config.budget, optimisers):
        share = config.own_past_share if spent >= config.own_past_from else 0.0
        rows = [next(order) for _ in range(config.batch)]
        batch = draw_batch(pairs, rows, encoder, config, share, rng)
        loss = regression_loss(training.model, batch, config.cache)
        loss.backward()
        finish_step(training, loss, len(rows), config.ema, optimisers[1], config.clip_norm)
        if step % 50 == 0:
            _log.info("%d %.3f loss %.4f", step, spent, training.loss)
        if checkpoint is not None and due():
            checkpoint(training)
    if checkpoint is not None:
        checkpoint(training)
    return training


def regression_loss(model: WanModel, batch: Batch, config: CacheConfig) -> Tensor:
    """Mean squared error of the predicted clean chunks, over a whole rollout.

    Gradients stay within a chunk: the past enters through snapshots of the cache.
    """
    prompt = model.prompt_context(batch.prompt_embeds)
    with torch.no_grad():
        frozen = tuple(type(kv)(kv.k_BSHD.detach(), kv.v_BSHD.detach()) for kv in prompt)
    cache = new_cache(model, batch.clean, config)
    losses = []
    for index, clean in enumerate(batch.clean.split(config.chunk_frames, dim=2)):
        cache.advance(clean.shape[2])
        frames = slice(index * config.chunk_frames, index * config.chunk_frames + clean.shape[2])
        noisy, timestep_BF = _noisy_chunk(batch, index, frames)
        x0 = predict(model, noisy, timestep_BF, prompt, cache)
        losses.append((x0 - clean).square().mean())
        past = _past_chunk(model, batch, frames, frozen, cache)
        with torch.no_grad():
            model(past, past.new_zeros(past.shape[0], past.shape[2]), frozen, cache)
    return torch.stack(losses).mean()


def predict(
    model: WanModel, noisy: Tensor, timestep_BF: Tensor, prompt: PromptContext, cache: KVCache
) -> Tensor:
    """The clean chunk [B, C, F, h, w] predicted in the open slot of `cache`; gradients pass."""
    flow = model(noisy, timestep_BF, prompt, cache.snapshot())
    return flow_to_x0(flow, noisy, timestep_BF)


def new_cache(model: WanModel, latents: Tensor, config: CacheConfig) -> KVCache:
    """An empty cache for latents [B, C, F, h, w]."""
    sizes = model.config
    return KVCache.allocate(
        config,
        num_layers=sizes.num_layers,
        batch=latents.shape[0],
        frame_tokens=Grid.of_latents(*latents.shape[-2:], sizes.patch_size).frame_tokens,
        num_heads=sizes.num_heads,
        head_dim=sizes.head_dim,
        dtype=latents.dtype,
        device=latents.device,
    )


def _noisy_chunk(batch: Batch, index: int, frames: slice) -> tuple[Tensor, Tensor]:
    step = batch.step[index]
    noisy, clean = batch.states[torch.arange(len(step)), step, :, frames], batch.clean[:, :, frames]
    timestep_BF = batch.timesteps[step][:, None].expand(-1, noisy.shape[2])
    fresh = add_noise(clean, torch.randn_like(clean), timestep_BF)
    return torch.where(batch.renoised[index, :, None, None, None, None], fresh, noisy), timestep_BF


@torch.no_grad()
def _past_chunk(
    model: WanModel, batch: Batch, frames: slice, prompt: PromptContext, cache: KVCache
) -> Tensor:
    """What later chunks see of this one: the teacher's clean latents or the student's guess.

    The guess is made from the trajectory's last kept state, so that it still leads on to the
    teacher's next chunk, but with the student's own mistakes in it.
    """
    clean = batch.clean[:, :, frames]
    own = batch.own_past
    if not own.any():
        return clean
    noisy = batch.states[:, -1, :, frames]
    timestep_BF = batch.timesteps[-1].expand(noisy.shape[0], noisy.shape[2])
    guess = flow_to_x0(model(noisy, timestep_BF, prompt, cache), noisy, timestep_BF)
    return torch.where(own[:, None, None, None, None], guess, clean)


def draw_batch(
    pairs: Pairs,
    rows: list[int],
    encoder: TextEncoder,
    config: StudentConfig,
    own_share: float,
    rng: np.random.Generator,
) -> Batch:
    """Some trajectories with a timestep for each chunk; `own_share` of them see their own past."""
    chunks = -(-pairs.clean.shape[2] // config.cache.chunk_frames)
    step = rng.integers(len(pairs.timesteps), size=(chunks, len(rows)))
    # At the first timestep all is noise: only the trajectory knows what it leads to.
    renoised = (rng.random(step.shape) < config.renoised_share) & (step > 0)
    return Batch(
        states=pairs.states[rows].float(),
        clean=pairs.clean[rows].float(),
        prompt_embeds=encoder.encode([pairs.captions[row] for row in rows]),
        timesteps=torch.tensor(pairs.timesteps),
        step=torch.from_numpy(step),
        renoised=torch.from_numpy(renoised),
        own_past=torch.from_numpy(rng.random(len(rows)) < own_share),
    )
