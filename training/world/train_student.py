"""Teaches the causal student the teacher's trajectories, chunk by chunk.

The student sees each chunk of an excerpt at one of the few sampling timesteps, with the past it
would see in a stream, and is asked for the chunk that the teacher's trajectory leads to (CausVid,
arXiv 2412.07772, sec. 4.2).

The published regression takes its inputs from the trajectory at every timestep. There, noise tells
what the chunk will be; in a stream it does so at the first timestep only, as fresh noise is added
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

from rf_core.config import CacheConfig, SamplerConfig
from rf_core.model import PromptContext, WanModel
from rf_core.scheduler import add_noise, flow_to_x0, sampling_timesteps
from rf_core.text import TextEncoder

from .budget import Budget, Every, run
from .excerpts import ExcerptConfig, Past, Prompts, pasts
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
    guessed_share: float = 0.5
    """Share of inputs after the first timestep that hold the student's own guess of the chunk,
    made at the timestep before; the others hold the clean chunk."""
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
    """Trajectories of B excerpts, with the choices that were drawn for them."""

    pairs: Pairs
    """The trajectories, in float32."""
    timesteps: Tensor
    """The K sampling timesteps."""
    step: Tensor
    """Which of them each chunk is at, [3, B]."""
    guessed: Tensor
    """Whether its input holds the student's guess, bool [3, B]."""


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
    shape = (len(pairs.noise), len(rows))
    later = rng.integers(1, len(timesteps), size=shape) if len(timesteps) > 1 else 0
    step = np.where(rng.random(shape) < config.first_step_share, 0, later)
    some = Pairs(
        excerpts=pairs.excerpts.rows(rows),
        noise=pairs.noise[:, rows].float(),
        clean=pairs.clean[:, rows].float(),
    )
    guessed = torch.from_numpy(rng.random(shape) < config.guessed_share)
    return Batch(pairs=some, timesteps=timesteps, step=torch.from_numpy(step), guessed=guessed)


def regression_losses(
    model: WanModel, encoder: TextEncoder, batch: Batch, config: StudentConfig
) -> Tensor:
    """Mean squared error of the predicted clean chunks of each kind, [3]."""
    pairs = batch.pairs
    prompts = Prompts.read(model, encoder, pairs.excerpts)
    past_of = pasts(model, pairs.excerpts, prompts, config.excerpts)
    prompt_of = (prompts.first, prompts.first, prompts.later)
    losses = []
    for kind, (past, prompt) in enumerate(zip(past_of, prompt_of, strict=True)):
        noisy, timestep_BF = _noisy_chunk(model, batch, kind, prompt, past)
        x0 = _predict(model, noisy, timestep_BF, prompt, past)
        losses.append((x0 - pairs.clean[kind]).square().mean())
    return torch.stack(losses)


def _predict(
    model: WanModel, noisy: Tensor, timestep_BF: Tensor, prompt: PromptContext, past: Past
) -> Tensor:
    return flow_to_x0(model(noisy, timestep_BF, prompt, past), noisy, timestep_BF)


@torch.no_grad()
def _noisy_chunk(
    model: WanModel, batch: Batch, kind: int, prompt: PromptContext, past: Past
) -> tuple[Tensor, Tensor]:
    """A chunk's input at the timestep drawn for each sample, as a stream would come by it."""
    step, noise, clean = batch.step[kind], batch.pairs.noise[kind], batch.pairs.clean[kind]
    before = (step - 1).clamp_min(0)
    earlier_BF = batch.timesteps[before][:, None].expand(-1, clean.shape[2])
    earlier = add_noise(clean, torch.randn_like(clean), earlier_BF)
    earlier = torch.where(_per_sample(before == 0), noise, earlier)
    guess = _predict(model, earlier, earlier_BF, prompt, past)
    signal = torch.where(_per_sample(batch.guessed[kind]), guess, clean)
    timestep_BF = batch.timesteps[step][:, None].expand(-1, clean.shape[2])
    noisy = add_noise(signal, torch.randn_like(clean), timestep_BF)
    return torch.where(_per_sample(step == 0), noise, noisy), timestep_BF


def _per_sample(choice_B: Tensor) -> Tensor:
    return choice_B[:, None, None, None, None]
