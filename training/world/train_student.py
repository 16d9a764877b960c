"""Teaches the causal student the teacher's trajectories, chunk by chunk.

The student sees each chunk of an excerpt where the teacher's trajectory passes one of the few
sampling timesteps, with the past it would see in a stream, and is asked for the chunk that the
trajectory leads to (CausVid, arXiv 2412.07772, sec. 4.2).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rf_core.config import CacheConfig, SamplerConfig
from rf_core.model import WanModel
from rf_core.scheduler import flow_to_x0, sampling_timesteps
from rf_core.text import TextEncoder

from .budget import Budget, Every, run
from .excerpts import ExcerptConfig, Excerpts, Prompts, pasts
from .ode_pairs import Pairs
from .train_teacher import Hook, Training, endless_order, finish_step, make_optimisers, training_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The regression."""

    budget: Budget = field(default_factory=lambda: Budget(minutes=15.0, warmup_steps=20))
    """How long to train."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """The window and sink of the streams it will make; excerpts fit the default."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The few-step schedule of those streams."""
    excerpts: ExcerptConfig = field(default_factory=ExcerptConfig)
    """How the past is shown."""
    batch: int = 16
    """Excerpts a step, of three chunks each."""
    first_step_share: float = 0.4
    """Share of inputs at the first timestep, the hardest; the others share the rest evenly."""
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
    """Trajectories of B excerpts, each of the three chunks at a timestep of its own."""

    excerpts: Excerpts
    noisy: Tensor
    """Where each chunk's trajectory is, [3, B, C, F, h, w]."""
    timestep: Tensor
    """When that is, [3, B]."""
    clean: Tensor
    """Where it leads, [3, B, C, F, h, w]."""


def train_student(
    config: StudentConfig,
    start: WanModel,
    pairs: Pairs,
    encoder: TextEncoder,
    checkpoint: Hook | None = None,
) -> Training:
    """Train a student from the weights of `start` (the teacher), which it takes over."""
    torch.manual_seed(config.seed)
    training = training_of(start.requires_grad_(True))
    optimisers = make_optimisers(
        training.model, config.matrix_rate, config.other_rate, config.weight_decay
    )
    due = Every(config.checkpoint_minutes)
    rng = np.random.default_rng(config.seed)
    order = endless_order(range(len(pairs.excerpts)), rng)
    for step, spent in run(config.budget, optimisers):
        batch = draw_batch(pairs, [next(order) for _ in range(config.batch)], config, rng)
        losses = regression_losses(training.model, encoder, batch, config)
        loss = losses.mean()
        loss.backward()
        finish_step(training, loss, config.batch, config.ema, optimisers[1], config.clip_norm)
        if step % 50 == 0:
            each = " ".join(f"{value:.4f}" for value in losses.tolist())
            _log.info("%d %.3f loss %.4f (%s)", step, spent, training.loss, each)
        if checkpoint is not None and due():
            checkpoint(training)
    if checkpoint is not None:
        checkpoint(training)
    return training


def draw_batch(
    pairs: Pairs, rows: list[int], config: StudentConfig, rng: np.random.Generator
) -> Batch:
    """Some trajectories, with a timestep for each chunk."""
    timesteps = sampling_timesteps(config.sampler)
    shape = (len(pairs.clean), len(rows))
    later = rng.integers(1, len(timesteps), size=shape) if len(timesteps) > 1 else 0
    step = torch.from_numpy(np.where(rng.random(shape) < config.first_step_share, 0, later))
    kinds = torch.arange(len(pairs.clean))[:, None]
    return Batch(
        excerpts=pairs.excerpts.rows(rows),
        noisy=pairs.points[step, kinds, torch.tensor(rows)].float(),
        timestep=timesteps[step],
        clean=pairs.clean[:, rows].float(),
    )


def regression_losses(
    model: WanModel, encoder: TextEncoder, batch: Batch, config: StudentConfig
) -> Tensor:
    """Mean squared error of the predicted clean chunks of each kind, [3]."""
    prompts = Prompts.read(model, encoder, batch.excerpts)
    past_of = pasts(model, batch.excerpts, prompts, config.excerpts)
    prompt_of = (prompts.first, prompts.first, prompts.later)
    losses = []
    for kind, (past, prompt) in enumerate(zip(past_of, prompt_of, strict=True)):
        noisy = batch.noisy[kind]
        timestep_BF = batch.timestep[kind][:, None].expand(-1, noisy.shape[2])
        x0 = flow_to_x0(model(noisy, timestep_BF, prompt, past), noisy, timestep_BF)
        losses.append((x0 - batch.clean[kind]).square().mean())
    return torch.stack(losses)
