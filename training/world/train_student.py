"""Teaches the causal student the teacher's trajectories, chunk by chunk, with the real cache.

Each chunk is seen exactly as in a stream: the cache advances (and evicts into its sink), the chunk
at one of the few sampling timesteps attends to the window, and a clean pass rewrites its slot. The
target is the clip the teacher's trajectory leads to (CausVid, arXiv 2412.07772, sec. 4.2).

The published regression takes its inputs from the trajectory at every timestep. There, noise tells
what the clip will be; in a stream it does so at the first timestep only, as fresh noise is added
before every other. Taught both, the student read the future out of fresh noise: at timestep 937 its
error was twice that from pure noise. So here only the first timestep sees the trajectory's noise,
and the others see the clean chunk, or the student's own guess of it, under fresh noise.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rf_core.config import CacheConfig, Grid, SamplerConfig
from rf_core.kv_cache import KVCache
from rf_core.layers import PromptKV
from rf_core.model import PromptContext, WanModel
from rf_core.scheduler import add_noise, flow_to_x0, sampling_timesteps
from rf_core.text import TextEncoder

from .budget import Budget, Every, run
from .ode_pairs import Pairs
from .train_teacher import Hook, Training, endless_order, finish_step, make_optimisers, training_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The regression."""

    budget: Budget = field(default_factory=lambda: Budget(minutes=15.0, warmup_steps=20))
    """How long to train."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """The window and sink of the streams it will make."""
    batch: int = 16
    """Trajectories a step."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The few-step schedule of the streams it will make."""
    openings: int = 32
    """Single chunks a step, from which it learns how a video begins."""
    first_step_share: float = 0.4
    """Share of inputs at the first timestep, the hardest; the others share the rest evenly."""
    guessed_share: float = 0.5
    """Share of inputs after the first timestep that hold the student's own guess of the chunk,
    made at the timestep before; the others hold the clean chunk."""
    own_past_from: float = 0.3
    """Share of the run after which chunks predicted at the last timestep become the past of the
    next ones, in place of the teacher's."""
    matrix_rate: float = 4e-3
    """Muon's peak learning rate, for the blocks' matrices."""
    other_rate: float = 1.5e-3
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

    noise: Tensor
    """Where they begin [B, C, F, h, w]."""
    clean: Tensor
    """The clips they lead to [B, C, F, h, w]."""
    prompt_embeds: Tensor
    """[B, S, D]."""
    timesteps: Tensor
    """The K sampling timesteps."""
    step: Tensor
    """Which of them each sample of each chunk is at, [chunks, B]."""
    guessed: Tensor
    """Whether its input holds the student's guess, [chunks, B]."""


def train_student(
    config: StudentConfig,
    teacher: WanModel,
    clips: Pairs,
    openings: Pairs,
    encoder: TextEncoder,
    checkpoint: Hook | None = None,
) -> Training:
    """Train a student that begins from `teacher`'s weights, which it takes over.

    `clips` are trajectories of several chunks, `openings` of a single one.
    """
    torch.manual_seed(config.seed)
    training = training_of(teacher.requires_grad_(True))
    optimisers = make_optimisers(
        training.model, config.matrix_rate, config.other_rate, config.weight_decay
    )
    due = Every(config.checkpoint_minutes)
    rng = np.random.default_rng(config.seed)
    draws = [
        (pairs, count, endless_order(range(len(pairs.clean)), rng))
        for pairs, count in ((clips, config.batch), (openings, config.openings))
    ]
    for step, spent in run(config.budget, optimisers):
        own_past = spent >= config.own_past_from
        losses = []
        for pairs, count, order in draws:
            rows = [next(order) for _ in range(count)]
            batch = draw_batch(pairs, rows, encoder, config, rng)
            losses.append(regression_loss(training.model, batch, config.cache, own_past))
            losses[-1].backward()
        total = torch.stack(losses).mean().detach()
        finish_step(training, total, config.batch, config.ema, optimisers[1], config.clip_norm)
        if step % 50 == 0:
            clip, opening = (loss.item() for loss in losses)
            _log.info("%d %.3f loss %.4f %.4f %.4f", step, spent, training.loss, clip, opening)
        if checkpoint is not None and due():
            checkpoint(training)
    if checkpoint is not None:
        checkpoint(training)
    return training


def regression_loss(
    model: WanModel, batch: Batch, config: CacheConfig, own_past: bool = False
) -> Tensor:
    """Mean squared error of the predicted clean chunks, over a whole rollout.

    Of a clip of several chunks the first is only the past of the others. Gradients stay within a
    chunk: the past enters through snapshots of the cache.
    """
    prompt = model.prompt_context(batch.prompt_embeds)
    frozen = tuple(PromptKV(kv.k_BSHD.detach(), kv.v_BSHD.detach()) for kv in prompt)
    cache = new_cache(model, batch.clean, config)
    chunks = batch.clean.split(config.chunk_frames, dim=2)
    losses = []
    for index, clean in enumerate(chunks):
        cache.advance(clean.shape[2])
        past = clean
        if index or len(chunks) == 1:
            noisy, timestep_BF = _noisy_chunk(model, batch, index, clean, frozen, cache)
            x0 = predict(model, noisy, timestep_BF, prompt, cache)
            losses.append((x0 - clean).square().mean())
            if own_past:
                last = batch.step[index] == len(batch.timesteps) - 1
                past = torch.where(_per_sample(last), x0.detach(), clean)
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


@torch.no_grad()
def _noisy_chunk(
    model: WanModel,
    batch: Batch,
    index: int,
    clean: Tensor,
    prompt: PromptContext,
    cache: KVCache,
) -> tuple[Tensor, Tensor]:
    """A chunk's input at the timestep drawn for each sample, as a stream would come by it."""
    step, frames = batch.step[index], clean.shape[2]
    noise = batch.noise[:, :, index * frames : (index + 1) * frames]
    before = (step - 1).clamp_min(0)
    earlier_BF = batch.timesteps[before][:, None].expand(-1, frames)
    earlier = add_noise(clean, torch.randn_like(clean), earlier_BF)
    earlier = torch.where(_per_sample(before == 0), noise, earlier)
    guess = flow_to_x0(model(earlier, earlier_BF, prompt, cache), earlier, earlier_BF)
    signal = torch.where(_per_sample(batch.guessed[index]), guess, clean)
    timestep_BF = batch.timesteps[step][:, None].expand(-1, frames)
    noisy = add_noise(signal, torch.randn_like(clean), timestep_BF)
    return torch.where(_per_sample(step == 0), noise, noisy), timestep_BF


def _per_sample(choice_B: Tensor) -> Tensor:
    return choice_B[:, None, None, None, None]


def draw_batch(
    pairs: Pairs,
    rows: list[int],
    encoder: TextEncoder,
    config: StudentConfig,
    rng: np.random.Generator,
) -> Batch:
    """Some trajectories, with a timestep for each chunk."""
    chunks = -(-pairs.clean.shape[2] // config.cache.chunk_frames)
    timesteps = sampling_timesteps(config.sampler)
    shape = (chunks, len(rows))
    later = rng.integers(1, len(timesteps), size=shape) if len(timesteps) > 1 else 0
    step = np.where(rng.random(shape) < config.first_step_share, 0, later)
    return Batch(
        noise=pairs.noise[rows].float(),
        clean=pairs.clean[rows].float(),
        prompt_embeds=encoder.encode([pairs.captions[row] for row in rows]),
        timesteps=timesteps,
        step=torch.from_numpy(step),
        guessed=torch.from_numpy(rng.random(shape) < config.guessed_share),
    )
