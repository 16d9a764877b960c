"""One update of Re-DMD: the generator's loss on a rollout, and the critic's.

The teacher and the critic are bidirectional networks that see the whole rollout; both judge it at
one noised point a sample. Losses are sums over samples divided by `config.batch`, whatever the size
of a micro-batch: gradients accumulated over micro-batches are those of the full batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rf_core.attention import Attention, sdpa
from rf_core.config import CacheConfig, SamplerConfig
from rf_core.model import WanModel
from rf_core.scheduler import add_noise, flow_to_x0

from .losses import critic_loss, generator_loss, guided, matching_direction, matching_timesteps
from .rewards import Weighed, WeightConfig, weigh
from .rollout import Draws, Rollout, roll_out

Judge = Callable[[Tensor], Tensor]
"""Scores [B] of a rollout's clean latents."""


@dataclass(frozen=True, kw_only=True)
class ReDMDConfig:
    """The distillation's numbers; defaults are the published ones."""

    cache: CacheConfig = field(default_factory=CacheConfig)
    """The window the student streams through."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The student's schedule."""
    weights: WeightConfig = field(default_factory=WeightConfig)
    """From rewards to weights."""
    guidance: float = 3.0
    """The teacher's, as cond + s (cond - uncond)."""
    shift: float = 5.0
    """Flow shift of the timesteps at which scores are compared."""
    bounds: tuple[float, float] = (20.0, 980.0)
    """Those timesteps' range, of 1000."""
    supervised_chunks: int | None = 7
    """How many of a rollout's last chunks carry gradient; None for all."""
    batch: int = 8
    """Samples an update, over all ranks and micro-batches."""

    def __post_init__(self) -> None:
        low, high = self.bounds
        if not 0 < low < high <= 1000:
            raise ValueError(f"bounds are {self.bounds}; give two rising timesteps in (0, 1000]")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; an update needs at least one sample")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A micro-batch's prompts, encoded."""

    cond: Tensor
    """[B, S, D]"""
    uncond: Tensor
    """The empty or negative prompt, [1 or B, S, D]."""


@dataclass(frozen=True, kw_only=True)
class Noising:
    """Where scores are compared: the random part of a judgement."""

    noise: Tensor
    """As the latents, [B, C, F, h, w]."""
    timestep_B: Tensor
    """One a sample, of 1000."""

    def apply(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """The noised latents and their timesteps [B, F]."""
        timestep_BF = self.timestep_B.to(x0)[:, None].expand(-1, x0.shape[2])
        return add_noise(x0, self.noise.to(x0), timestep_BF), timestep_BF


def draw_noising(
    latents: Tensor, config: ReDMDConfig, generator: torch.Generator | None = None
) -> Noising:
    """Noise and timesteps for a batch of latents."""
    return Noising(
        noise=torch.randn(latents.shape, generator=generator),
        timestep_B=matching_timesteps(
            latents.shape[0], config.shift, config.bounds, generator=generator
        ),
    )


@dataclass(frozen=True, kw_only=True)
class GeneratorUpdate:
    """A micro-batch's share of the generator's loss."""

    loss: Tensor
    """A scalar to call backward on."""
    rollout: Rollout
    weighed: Weighed | None
    """None without a reward."""


def generator_update(
    student: WanModel,
    teacher: WanModel,
    critic: WanModel,
    prompts: Prompts,
    draws: Draws,
    noising: Noising,
    config: ReDMDConfig,
    judge: Judge | None = None,
    attention: Attention = sdpa,
) -> GeneratorUpdate:
    """Roll out, compare scores at one noised point, weigh by reward (`judge` None: plain DMD)."""
    rollout = roll_out(
        student,
        prompts.cond,
        draws,
        config.sampler,
        config.cache,
        supervised_chunks=config.supervised_chunks,
        attention=attention,
    )
    x0 = rollout.latents.detach()
    noisy, timestep = noising.apply(x0)
    with torch.no_grad():
        fake = predict_x0(critic, noisy, timestep, prompts.cond, attention)
        real = guided(
            predict_x0(teacher, noisy, timestep, prompts.cond, attention),
            predict_x0(teacher, noisy, timestep, prompts.uncond, attention),
            config.guidance,
        )
    mask = torch.zeros_like(x0, dtype=torch.bool)
    mask[:, :, rollout.supervised] = True
    losses = generator_loss(rollout.latents, matching_direction(x0, fake, real), mask)
    weighed = weigh(judge(x0), config.weights) if judge is not None else None
    if weighed is not None:
        losses = weighed.weights.to(losses) * losses
    return GeneratorUpdate(loss=losses.sum() / config.batch, rollout=rollout, weighed=weighed)


def critic_update(
    student: WanModel,
    critic: WanModel,
    prompts: Prompts,
    draws: Draws,
    noising: Noising,
    config: ReDMDConfig,
    attention: Attention = sdpa,
) -> Tensor:
    """A micro-batch's share of the critic's loss on a fresh rollout, to call backward on."""
    with torch.no_grad():
        x0 = roll_out(
            student,
            prompts.cond,
            draws,
            config.sampler,
            config.cache,
            supervised_chunks=0,
            attention=attention,
        ).latents
    noisy, timestep = noising.apply(x0)
    flow = predict_flow(critic, noisy, timestep, prompts.cond, attention)
    return critic_loss(flow.float(), x0, noising.noise.to(x0)).sum() / config.batch


def predict_flow(
    model: WanModel,
    noisy: Tensor,
    timestep_BF: Tensor,
    prompt_embeds: Tensor,
    attention: Attention = sdpa,
) -> Tensor:
    """A bidirectional network's flow for latents [B, C, F, h, w]."""
    dtype = model.patch_embedding.weight.dtype
    embeds = prompt_embeds.expand(noisy.shape[0], -1, -1).to(dtype)
    return model(noisy.to(dtype), timestep_BF, model.prompt_context(embeds), attention=attention)


def predict_x0(
    model: WanModel,
    noisy: Tensor,
    timestep_BF: Tensor,
    prompt_embeds: Tensor,
    attention: Attention = sdpa,
) -> Tensor:
    """The clean latents that its flow implies."""
    flow = predict_flow(model, noisy, timestep_BF, prompt_embeds, attention)
    return flow_to_x0(flow, noisy, timestep_BF)
