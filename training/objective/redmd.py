"""One update of Re-DMD: the generator's losses on a rollout, and the critic's.

The teacher and the critic are bidirectional networks that see a window of the rollout; both score
it at one noised point a sample. A rollout of many windows is supervised a window at a time, as
LongLive does (arXiv 2509.22622), so that cache and sink are trained as they are used. Frames that
were given, of a start image or an anchor, are seen by both and are no part of the generator's loss;
the critic learns windows whole. Losses are sums over samples divided by `config.batch`, whatever
the size of a micro-batch: gradients accumulated over micro-batches and windows are those of the
full batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rf_core.attention import Attention, sdpa
from rf_core.config import CacheConfig, SamplerConfig
from rf_core.model import WanModel
from rf_core.ranges import MANY, check_numbers
from rf_core.scheduler import add_noise, flow_to_x0

from .losses import critic_loss, generator_loss, guided, matching_direction
from .rollout import (
    PromptSwitch,
    Rollout,
    RolloutDraws,
    RolloutState,
    check_rollouts,
    chunk_sizes,
    roll_out,
)
from .tensors import Tensors
from .tilt import Tilt, tilted
from .weights import WeightConfig

WeightFn = Callable[[Tensor, int], Tensor]
"""Weights [B] of a window's clean latents, given the window's number."""
Anchor = Callable[[Tensor], Tensor]
"""The last of some latent frames [B, C, F, h, w] as the first frame of a clip, [B, C, 1, h, w]."""


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
    window_chunks: int = 7
    """Chunks that teacher and critic see at once; a longer rollout is whole windows of them."""
    weigh: Literal["generator", "critic", "none"] = "generator"
    """Which loss the reward weights. The generator's with exp(beta r), as published, leaves the
    fixed point where it is; the critic's with exp(-beta r) moves it to the teacher's distribution
    tilted by exp(beta r). `none` leaves the reward to `gradient_beta`."""
    gradient_beta: float = 0.0
    """What a unit of the reward is worth in the generator's loss: matching less this times the
    reward, both means over samples, with the gradient of the reward itself, through the decoder
    (RTDMD, arXiv 2605.26108). It moves the fixed point, to the teacher's distribution tilted by the
    reward; `objective.tilt` says by how much, and `tilt/share` in the log how hard it pulls. 0 is
    none."""
    batch: int = 8
    """Samples an update, over all ranks and micro-batches."""

    def __post_init__(self) -> None:
        check_rollouts(self.cache, self.sampler)
        check_numbers(self, shift=(0.01, 1000.0), guidance=(0, 1000.0), gradient_beta=(0, MANY))
        check_numbers(self, window_chunks=(1, MANY), batch=(1, MANY))
        low, high = self.bounds
        if not 0 < low < high <= 1000:
            raise ValueError(f"bounds are {self.bounds}; give two rising timesteps in (0, 1000]")
        if self.batch % self.weights.best_of:
            raise ValueError(
                f"batch is {self.batch}; give whole groups of weights.best_of "
                f"{self.weights.best_of}"
            )

    @property
    def reward_sign(self) -> int:
        """Of rewards in the exponent."""
        return 1 if self.weigh == "generator" else -1


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A micro-batch's prompts, encoded."""

    cond: Tensor
    """[B, S, D]"""
    uncond: Tensor
    """The empty or negative prompt, [1 or B, S, D]."""
    switch: PromptSwitch | None = None
    """Where `cond` changes. It does so between windows alone, so that teacher and critic score each
    window under the one prompt it was made under."""

    def of_window(self, window: int) -> Tensor:
        """The prompts [B, S, D] that a window shows."""
        switch = self.switch
        return self.cond if switch is None or window < switch.window else switch.embeds


@dataclass(frozen=True, kw_only=True)
class ScoreNoise(Tensors):
    """Random noise and timesteps at which the scores of critic and teacher are compared."""

    noise: Tensor
    """As the latents, [B, C, F, h, w]."""
    timestep_B: Tensor
    """One a sample, of 1000."""

    def apply(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """The noised latents and their timesteps [B, F]."""
        timestep_BF = self.timestep_B[:, None].expand(-1, x0.shape[2])
        return add_noise(x0, self.noise, timestep_BF), timestep_BF


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The three networks of the distillation, and how they are run."""

    student: WanModel
    teacher: WanModel
    critic: WanModel
    anchor: Anchor | None = None
    """Re-encodes the first frame of later windows; None leaves it as it is."""
    attention: Attention = sdpa
    dtype: torch.dtype | None = None
    """The dtype they compute in; None for that of their weights."""

    def predict_flow(
        self, network: WanModel, noisy: Tensor, timestep_BF: Tensor, prompt_embeds: Tensor
    ) -> Tensor:
        """A bidirectional network's flow for latents [B, C, F, h, w]."""
        dtype = self.dtype or network.patch_embedding.weight.dtype
        prompt = network.prompt_context(prompt_embeds.expand(len(noisy), -1, -1).to(dtype))
        return network(noisy.to(dtype), timestep_BF, prompt, attention=self.attention)

    def predict_x0(
        self, network: WanModel, noisy: Tensor, timestep_BF: Tensor, prompt_embeds: Tensor
    ) -> Tensor:
        """The clean latents that its flow implies."""
        flow = self.predict_flow(network, noisy, timestep_BF, prompt_embeds)
        return flow_to_x0(flow, noisy, timestep_BF)


def generator_losses(
    networks: Networks,
    prompts: Prompts,
    draws: RolloutDraws,
    score_noises: Sequence[ScoreNoise],
    config: ReDMDConfig,
    weight_fn: WeightFn | None = None,
    state: RolloutState | None = None,
    tilt: Tilt | None = None,
) -> Iterator[Tensor]:
    """A scalar loss a window, each to be called backward on before the next is asked for.

    Rolls out, compares scores at one noised point a sample, and weights samples by `weight_fn`.
    `score_noises` has one entry a window; `weight_fn` None is plain distribution matching. With a
    `state` the rollout goes on from there, and leaves it where it ends. Of `tilt`,
    `config.gradient_beta` times its reward is taken off.
    """
    n = networks
    windows = _windows(n, prompts, draws, config, state, supervised=True)
    for index, (rollout, score_noise) in enumerate(zip(windows, score_noises, strict=True)):
        x0, mask = _anchored(rollout, n.anchor)
        noisy, timestep = score_noise.apply(x0)
        with torch.no_grad():
            cond = prompts.of_window(index)
            fake = n.predict_x0(n.critic, noisy, timestep, cond)
            real = guided(
                n.predict_x0(n.teacher, noisy, timestep, cond),
                n.predict_x0(n.teacher, noisy, timestep, prompts.uncond),
                config.guidance,
            )
        direction = matching_direction(x0, fake, real)
        losses = generator_loss(rollout.latents, direction, mask)
        if weight_fn is not None:
            losses = weight_fn(x0, index).to(losses) * losses
        if tilt is not None:
            beta = config.gradient_beta
            losses = tilted(losses, rollout.latents, x0, index, mask, beta, tilt)
        yield losses.sum() / (config.batch * len(score_noises))


def critic_losses(
    networks: Networks,
    prompts: Prompts,
    draws: RolloutDraws,
    score_noises: Sequence[ScoreNoise],
    config: ReDMDConfig,
    weight_fn: WeightFn | None = None,
    state: RolloutState | None = None,
) -> Iterator[Tensor]:
    """As `generator_losses`, of the critic on a rollout without gradient."""
    n = networks
    windows = _windows(n, prompts, draws, config, state, supervised=False)
    for index, (rollout, score_noise) in enumerate(zip(windows, score_noises, strict=True)):
        x0, _ = _anchored(rollout, n.anchor)
        noisy, timestep = score_noise.apply(x0)
        flow = n.predict_flow(n.critic, noisy, timestep, prompts.of_window(index))
        losses = critic_loss(flow.float(), x0, score_noise.noise)
        if weight_fn is not None:
            losses = weight_fn(x0, index).to(losses) * losses
        yield losses.sum() / (config.batch * len(score_noises))


def rollout_latents(
    networks: Networks,
    prompts: Prompts,
    draws: RolloutDraws,
    config: ReDMDConfig,
    state: RolloutState | None = None,
) -> Iterator[Tensor]:
    """The clean latents of each window of a rollout, as a reward scores them; no gradient."""
    for rollout in _windows(networks, prompts, draws, config, state, supervised=False):
        yield _anchored(rollout, networks.anchor)[0]


def num_windows(frames: int, config: ReDMDConfig) -> int:
    """Windows of a rollout of so many latent frames; ValueError where they are not whole."""
    cache, chunks = config.cache, len(chunk_sizes(frames, config.cache))
    begun = "" if cache.has_equal_chunks else f" after a first one of {cache.first_frames}"
    if not chunks or (chunks > config.window_chunks and chunks % config.window_chunks):
        raise ValueError(
            f"latents have {frames} frames; give whole chunks of {cache.chunk_frames}{begun}, at "
            f"most {config.window_chunks} of them or whole windows of {config.window_chunks}"
        )
    return max(1, chunks // config.window_chunks)


def _windows(
    networks: Networks,
    prompts: Prompts,
    draws: RolloutDraws,
    config: ReDMDConfig,
    state: RolloutState | None,
    *,
    supervised: bool,
) -> Iterator[Rollout]:
    windows = num_windows(draws.noise.shape[2], config)
    return roll_out(
        networks.student,
        prompts.cond,
        draws,
        config.sampler,
        config.cache,
        window_chunks=config.window_chunks if windows > 1 else None,
        supervised=supervised,
        attention=networks.attention,
        dtype=networks.dtype,
        switch=prompts.switch,
        state=state,
    )


@torch.no_grad()
def _anchored(rollout: Rollout, anchor: Anchor | None) -> tuple[Tensor, Tensor | None]:
    """A window's latents with an anchored first frame, and the mask of where the loss counts."""
    x0, given_BF = rollout.latents.detach(), rollout.given_BF
    if anchor is None or not rollout.past.shape[2]:
        return x0, None if given_BF is None else ~given_BF[:, None, :, None, None]
    seen = torch.cat([rollout.past, x0[:, :, :1]], dim=2)
    mask = torch.ones_like(x0, dtype=torch.bool)
    mask[:, :, 0] = False
    return torch.cat([anchor(seen).to(x0), x0[:, :, 1:]], dim=2), mask
