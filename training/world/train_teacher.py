"""Trains the tiny bidirectional teacher by flow matching on encoded clips.

The network is Wan's, without a cache: all frames see each other. Most of the run sees short clips
(a clip's first frames are a clip of their own, as the VAE is causal), which cost less and already
hold every attribute; the last part sees whole ones.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from rf_core.config import NUM_TRAIN_TIMESTEPS, ModelConfig
from rf_core.model import WanModel
from rf_core.scheduler import add_noise, shift_sigma
from rf_core.text import TextEncoder

from .budget import Budget, Every, run
from .clips import Clips, captions
from .muon import Muon

TINY_WAN = ModelConfig(
    dim=160, ffn_dim=640, freq_dim=128, text_dim=64, text_len=96, num_heads=4, num_layers=5
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the run with clips of one length."""

    until: float
    """Share of the budget at which it ends; 1 for the last."""
    frames: int
    """Latent frames of a clip."""
    batch: int
    """Clips a step."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The teacher's sizes and its training."""

    model: ModelConfig = TINY_WAN
    """Sizes of the network."""
    budget: Budget = field(default_factory=lambda: Budget(minutes=45.0))
    """How long to train."""
    phases: tuple[Phase, ...] = (
        Phase(until=0.2, frames=3, batch=48),
        Phase(until=0.55, frames=6, batch=32),
        Phase(until=1.0, frames=15, batch=16),
    )
    """Clip lengths over the run."""
    two_things_share: float = 0.5
    """Share of clips that show two things, the slower ones to learn; the world has 0.3."""
    matrix_rate: float = 1.5e-2
    """Muon's peak learning rate, for the blocks' matrices."""
    other_rate: float = 6e-3
    """AdamW's peak learning rate, for everything else."""
    weight_decay: float = 0.01
    """Of the matrices."""
    clip_norm: float = 1.0
    """Largest norm of AdamW's gradients."""
    shift: float = 5.0
    """Flow shift of the training timesteps."""
    prompt_dropout: float = 0.1
    """Share of prompts replaced by the empty one, for guidance."""
    ema: float = 0.999
    """Decay of the averaged weights, a step."""
    checkpoint_minutes: float = 5.0
    """Between two calls of the checkpoint hook."""
    seed: int = 0
    """Seeds weights, batches, timesteps and noise."""


@dataclass
class Training:
    """What a run changes as it goes."""

    model: WanModel
    """The weights being trained."""
    average: WanModel
    """Their exponential moving average."""
    steps: int = 0
    """Optimiser steps taken."""
    samples: int = 0
    """Clips seen, with repetition."""
    loss: float = math.nan
    """Flow-matching loss, averaged over the last hundred steps or so."""


Hook = Callable[[Training], None]


def train_teacher(
    config: TeacherConfig,
    clips: Clips,
    encoder: TextEncoder,
    checkpoint: Hook | None = None,
    start: WanModel | None = None,
) -> Training:
    """Train a teacher on clips, anew or from the weights of `start`, which it takes over.

    `checkpoint` is called every few minutes and once at the end.
    """
    torch.manual_seed(config.seed)
    model = start.requires_grad_(True) if start else new_model(config.model, config.seed)
    training = training_of(model)
    optimisers = make_optimisers(
        training.model, config.matrix_rate, config.other_rate, config.weight_decay
    )
    due = Every(config.checkpoint_minutes)
    batches = _batches(config, clips)
    for step, spent in run(config.budget, optimisers):
        phase = next(each for each in config.phases if spent < each.until)
        latents, prompts = batches(phase)
        loss = flow_loss(training.model, latents, encoder.encode(prompts), config.shift)
        loss.backward()
        finish_step(training, loss, len(prompts), config.ema, optimisers[1], config.clip_norm)
        if step % 100 == 0:
            _log.info("%d %.3f loss %.4f", step, spent, training.loss)
        if checkpoint is not None and due():
            checkpoint(training)
    if checkpoint is not None:
        checkpoint(training)
    return training


def flow_loss(model: WanModel, latents: Tensor, prompt_embeds: Tensor, shift: float) -> Tensor:
    """Flow matching on clean latents [B, C, F, h, w], one timestep a clip (Lipman et al. 2022)."""
    # One draw in each of B equal parts: a batch always covers the whole range.
    batch = len(latents)
    uniform = (torch.randperm(batch) + torch.rand(batch)) / batch
    timestep = shift_sigma(uniform, shift) * NUM_TRAIN_TIMESTEPS
    timestep_BF = timestep[:, None].expand(-1, latents.shape[2])
    noise = torch.randn_like(latents)
    flow = model(
        add_noise(latents, noise, timestep_BF), timestep_BF, model.prompt_context(prompt_embeds)
    )
    return (flow - (noise - latents)).square().mean()


def new_model(config: ModelConfig, seed: int) -> WanModel:
    """A freshly drawn network."""
    model = WanModel(config)
    model.initialise(torch.Generator().manual_seed(seed))
    # Wan's small text embedding is meant for thousands of inputs; at 64 it would drown the prompt.
    for layer in (model.text_embedding[0], model.text_embedding[2]):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)  # type: ignore[union-attr]
    return model


def training_of(model: WanModel) -> Training:
    """A training that begins from `model`."""
    return Training(model=model, average=deepcopy(model).requires_grad_(False))


def make_optimisers(
    model: WanModel, matrix_rate: float, other_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest, in this order."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inside = name.startswith("blocks.") and parameter.ndim == 2
        (matrices if inside else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [Muon(matrices, lr=matrix_rate, weight_decay=weight_decay), adam]


@torch.no_grad()
def finish_step(
    training: Training,
    loss: Tensor,
    samples: int,
    ema: float,
    clipped: torch.optim.Optimizer,
    clip_norm: float,
) -> None:
    """Clip the gradients of `clipped`, update the average and the counts."""
    nn.utils.clip_grad_norm_(clipped.param_groups[0]["params"], clip_norm)
    decay = min(ema, (1 + training.steps) / (10 + training.steps))
    torch._foreach_lerp_(
        list(training.average.parameters()), list(training.model.parameters()), 1 - decay
    )
    training.steps += 1
    training.samples += samples
    value = loss.item()
    training.loss = value if math.isnan(training.loss) else 0.98 * training.loss + 0.02 * value


def _batches(config: TeacherConfig, clips: Clips) -> Callable[[Phase], tuple[Tensor, list[str]]]:
    """Draws batches; of each kind, no clip comes again before every other has been seen."""
    rng = np.random.default_rng(config.seed)
    kinds = [[i for i, scene in enumerate(clips.scenes) if len(scene) == n] for n in (1, 2)]
    orders = [endless_order(kind or list(range(len(clips.scenes))), rng) for kind in kinds]

    def draw(phase: Phase) -> tuple[Tensor, list[str]]:
        double = rng.random(phase.batch) < config.two_things_share
        indices = [next(orders[kind]) for kind in double.astype(int)]
        prompts = captions([clips.scenes[index] for index in indices], rng)
        dropped = rng.random(phase.batch) < config.prompt_dropout
        prompts = ["" if drop else text for drop, text in zip(dropped, prompts, strict=True)]
        return clips.latents[indices, :, : phase.frames].float(), prompts

    return draw


def endless_order(indices: Sequence[int], rng: np.random.Generator) -> Iterator[int]:
    """The indices in random order, each once before any comes again."""
    while True:
        yield from rng.permutation(indices).tolist()
