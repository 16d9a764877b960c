"""Trains the tiny teacher by flow matching on encoded clips.

One network learns both to denoise whole clips, in which all frames see each other, as Wan does, and
to continue a stream chunk by chunk from a clean past, as the student will. The second is what makes
its trajectories teachable: in a whole clip the first chunk hangs on the noise of all later ones,
which a causal student cannot see, so that its regression falls to a mean (Causal Forcing, arXiv
2602.02214, argues this). Most of the early run sees openings alone (a clip's first frames are a
clip of their own, as the VAE is causal), which cost least and already hold every attribute.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from rf_core.config import NUM_TRAIN_TIMESTEPS, ModelConfig
from rf_core.model import PromptContext, WanModel
from rf_core.scheduler import add_noise, shift_sigma
from rf_core.text import TextEncoder

from .budget import Budget, Every, run
from .clips import Clips, captions
from .excerpts import (
    CHUNK_FRAMES,
    ExcerptConfig,
    Excerpts,
    Past,
    Prompts,
    choose,
    draw_excerpts,
    pasts,
)
from .muon import Muon

TINY_WAN = ModelConfig(
    dim=160, ffn_dim=640, freq_dim=128, text_dim=64, text_len=96, num_heads=4, num_layers=5
)

_log = logging.getLogger(__name__)


Kind = Literal["opening", "excerpt", "whole"]
"""What a step is taught on: first chunks, chunks with their past, or whole clips."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the run."""

    until: float
    """Share of the budget at which it ends; 1 for the last."""
    kinds: tuple[Kind, ...]
    """What the steps see, in turn."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The teacher's sizes and its training."""

    model: ModelConfig = TINY_WAN
    """Sizes of the network."""
    budget: Budget = field(default_factory=lambda: Budget(minutes=45.0))
    """How long to train."""
    phases: tuple[Phase, ...] = (
        Phase(until=0.3, kinds=("opening",)),
        Phase(until=1.0, kinds=("excerpt", "excerpt", "whole")),
    )
    """What is seen over the run."""
    opening_batch: int = 64
    """Openings a step."""
    excerpt_batch: int = 16
    """Excerpts a step, each of three chunks to be learnt."""
    whole_batch: int = 16
    """Whole clips a step."""
    excerpts: ExcerptConfig = field(default_factory=ExcerptConfig)
    """How excerpts are drawn."""
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
    draw = Draw(config, clips)
    for step, spent in run(config.budget, optimisers):
        phase = next(each for each in config.phases if spent < each.until)
        kind = phase.kinds[step % len(phase.kinds)]
        if kind == "excerpt":
            loss = excerpt_loss(training.model, encoder, draw.excerpts(), config, draw.rng)
        else:
            loss = clip_loss(training.model, encoder, *draw.clips(kind), config, draw.rng)
        loss.backward()
        finish_step(training, loss, draw.count, config.ema, optimisers[1], config.clip_norm)
        if step % 100 == 0:
            _log.info("%d %.3f loss %.4f", step, spent, training.loss)
        if checkpoint is not None and due():
            checkpoint(training)
    if checkpoint is not None:
        checkpoint(training)
    return training


def clip_loss(
    model: WanModel,
    encoder: TextEncoder,
    latents: Tensor,
    prompts: Sequence[str],
    config: TeacherConfig,
    rng: np.random.Generator,
) -> Tensor:
    """Flow matching on clips [B, C, F, h, w] whose frames see each other."""
    prompt = model.prompt_context(encoder.encode(prompts))
    return flow_loss(model, latents, _dropped(model, encoder, prompt, config, rng), config.shift)


def excerpt_loss(
    model: WanModel,
    encoder: TextEncoder,
    excerpts: Excerpts,
    config: TeacherConfig,
    rng: np.random.Generator,
) -> Tensor:
    """Flow matching on the three chunks of excerpts, each with its clean past."""
    prompts = Prompts.read(model, encoder, excerpts)
    losses = []
    past_of = pasts(model, excerpts, prompts, config.excerpts)
    prompt_of = (prompts.first, prompts.first, prompts.later)
    for target, past, prompt in zip(excerpts.targets, past_of, prompt_of, strict=True):
        dropped = _dropped(model, encoder, prompt, config, rng)
        losses.append(flow_loss(model, target, dropped, config.shift, past))
    return torch.stack(losses).mean()


def flow_loss(
    model: WanModel, latents: Tensor, prompt: PromptContext, shift: float, past: Past | None = None
) -> Tensor:
    """Flow matching on clean latents [B, C, F, h, w], one timestep a clip (Lipman et al. 2022)."""
    # One draw in each of B equal parts: a batch always covers the whole range.
    batch = len(latents)
    uniform = (torch.randperm(batch) + torch.rand(batch)) / batch
    timestep = shift_sigma(uniform, shift) * NUM_TRAIN_TIMESTEPS
    timestep_BF = timestep[:, None].expand(-1, latents.shape[2])
    noise = torch.randn_like(latents)
    flow = model(add_noise(latents, noise, timestep_BF), timestep_BF, prompt, past)
    return (flow - (noise - latents)).square().mean()


def _dropped(
    model: WanModel,
    encoder: TextEncoder,
    prompt: PromptContext,
    config: TeacherConfig,
    rng: np.random.Generator,
) -> PromptContext:
    """The prompt, empty in a share of the samples."""
    drop = torch.from_numpy(rng.random(len(prompt[0].k_BSHD)) < config.prompt_dropout)
    return choose(drop, model.prompt_context(encoder.encode([""])), prompt)


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


class Draw:
    """Draws batches; of each kind of scene, none comes again before every other has been seen."""

    def __init__(self, config: TeacherConfig, clips: Clips) -> None:
        self.config, self.source = config, clips
        self.rng = np.random.default_rng(config.seed)
        kinds = [[i for i, scene in enumerate(clips.scenes) if len(scene) == n] for n in (1, 2)]
        every = list(range(len(clips.scenes)))
        self._orders = [endless_order(kind or every, self.rng) for kind in kinds]
        self.count = 0
        """Samples of the last batch."""

    def clips(self, kind: Kind) -> tuple[Tensor, list[str]]:
        """Clips [B, C, F, h, w] or their openings, with captions."""
        whole = kind == "whole"
        rows = self._rows(self.config.whole_batch if whole else self.config.opening_batch)
        frames = self.source.latents.shape[2] if whole else CHUNK_FRAMES
        latents = self.source.latents[rows, :, :frames].float()
        return latents, captions([self.source.scenes[row] for row in rows], self.rng)

    def excerpts(self) -> Excerpts:
        """Excerpts, with other scenes for those whose prompt changes."""
        others = self._rows(self.config.excerpt_batch)
        rows = self._rows(self.config.excerpt_batch)
        return draw_excerpts(self.source, rows, others, self.rng, self.config.excerpts)

    def _rows(self, count: int) -> list[int]:
        self.count = count
        double = self.rng.random(count) < self.config.two_things_share
        return [next(self._orders[kind]) for kind in double.astype(int)]


def endless_order(indices: Sequence[int], rng: np.random.Generator) -> Iterator[int]:
    """The indices in random order, each once before any comes again."""
    while True:
        yield from rng.permutation(indices).tolist()
