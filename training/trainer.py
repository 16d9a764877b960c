"""The Re-DMD run: critic and generator in turn, averaged weights, checkpoints to go on from.

One update of the generator follows `critic_ratio` updates of the critic, as in DMD2 (arXiv
2405.14867). What is random is a function of the update's number (`draws`), so a checkpoint holds
weights, optimisers and that number, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from rf_core.model import WanModel

from .distributed import clip_gradients, my_samples, rank, shard, summed, world_size
from .draws import Role, noising_draws, prompt_numbers, rollout_draws
from .redmd import Prompts, ReDMDConfig, critic_update, generator_update

Judge = Callable[[Tensor, list[int]], Tensor]
"""Scores [B] of clean latents and the `numbers` of their prompts."""


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """AdamW; defaults are the published ones."""

    rate: float
    """Learning rate."""
    betas: tuple[float, float] = (0.0, 0.999)
    """Decay of the two moments."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    clip_norm: float = 10.0
    """Largest norm of the gradients."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run; defaults are the published ones."""

    redmd: ReDMDConfig = field(default_factory=ReDMDConfig)
    """Rollouts, scores and weights."""
    generator: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(rate=2e-6))
    """Of the student."""
    critic: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(rate=4e-7))
    """Of the critic."""
    latents: tuple[int, int, int, int] = (16, 21, 60, 104)
    """One sample: channels, frames, rows, columns."""
    updates: int = 600
    """Generator updates."""
    critic_ratio: int = 5
    """Critic updates before each of them."""
    micro_batch: int = 1
    """Samples at a time."""
    ema: float = 0.99
    """Decay of the averaged weights, an update."""
    ema_from: int = 200
    """Update at which averaging begins; until then the average is the student itself."""
    seed: int = 0
    """Of everything random."""
    runaway: float = 100.0
    """The run stops when the critic's loss is above this, or anything is not finite."""

    def __post_init__(self) -> None:
        frames, chunk = self.latents[1], self.redmd.cache.chunk_frames
        if frames % chunk:
            raise ValueError(f"latents have {frames} frames; give whole chunks of {chunk}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; give a decay in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an update did."""

    update: int
    generator_loss: float
    critic_loss: float
    """Mean over the critic's updates."""
    generator_norm: float
    """Of its gradients, before clipping."""
    mean_score: float | None
    effective_share: float | None
    """Mean over micro-batches."""


class Trainer:
    """Student, critic and teacher with all that a run changes."""

    def __init__(
        self,
        config: RunConfig,
        student: WanModel,
        teacher: WanModel,
        critic: WanModel,
        prompt_embeds: Tensor,
        uncond: Tensor,
        judge: Judge | None = None,
    ) -> None:
        """`prompt_embeds` are all prompts, [N, S, D]; `uncond` is [1, S, D]."""
        self.config, self.judge = config, judge
        device = prompt_embeds.device.type
        self.average = shard(deepcopy(student).requires_grad_(False), device)
        self.student = shard(student.requires_grad_(True), device)
        self.critic = shard(critic.requires_grad_(True), device)
        self.teacher = shard(teacher.requires_grad_(False), device)
        self.micro_batches = my_samples(config.redmd.batch, config.micro_batch)
        self.prompt_embeds, self.uncond = prompt_embeds, uncond
        self.generator_optimiser = _adamw(self.student, config.generator)
        self.critic_optimiser = _adamw(self.critic, config.critic)
        self.update = 0

    def step(self) -> Report:
        """The critic's updates, one of the generator, the average. FloatingPointError on a NaN."""
        ratio = self.config.critic_ratio
        critic_losses = [self._critic_step(ratio * self.update + i) for i in range(ratio)]
        report = self._generator_step(sum(critic_losses) / max(ratio, 1))
        self.update += 1
        self._average()
        return report

    def save(self, folder: Path) -> None:
        """Write everything to go on from; `folder` is complete once it exists."""
        unfinished = folder.with_name(f"{folder.name}.partial")
        dcp.save(self._state(), checkpoint_id=unfinished, no_dist=not dist.is_initialized())
        if rank() == 0:
            unfinished.rename(folder)
        if dist.is_initialized():
            dist.barrier()

    def load(self, folder: Path) -> None:
        """Go on from what `save` has written."""
        if not folder.is_dir():
            raise ValueError(f"{folder} is no checkpoint of a run")
        state = self._state()
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
        for network, optimiser, name in self._trained():
            set_state_dict(
                network,
                optimiser,
                model_state_dict=state[name]["model"],
                optim_state_dict=state[name]["optimiser"],
            )
        set_model_state_dict(self.average, state["average"])
        self.update = int(state["update"])

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"average": get_model_state_dict(self.average)}
        state["update"] = torch.tensor(self.update)
        for network, optimiser, name in self._trained():
            model, moments = get_state_dict(network, optimiser)
            state[name] = {"model": model, "optimiser": moments}
        return state

    def _trained(self) -> list[tuple[WanModel, torch.optim.Optimizer, str]]:
        return [
            (self.student, self.generator_optimiser, "student"),
            (self.critic, self.critic_optimiser, "critic"),
        ]

    def _critic_step(self, number: int) -> float:
        total = 0.0
        for samples in self.micro_batches:
            _, prompts, draws, noising = self._batch("critic", number, samples)
            loss = critic_update(
                self.student, self.critic, prompts, draws, noising, self.config.redmd
            )
            self._backward(loss)
            total += float(loss.detach())
        total = summed(total)
        if not total < self.config.runaway:
            raise FloatingPointError(
                f"the critic's loss is {total:.4g} at its update {number}; lower critic.rate"
            )
        _descend(self.critic, self.critic_optimiser, self.config.critic.clip_norm)
        return total

    def _generator_step(self, critic_loss: float) -> Report:
        total, scores, shares = 0.0, [], []
        for samples in self.micro_batches:
            numbers, prompts, draws, noising = self._batch("generator", self.update, samples)
            judge = self.judge and partial(self.judge, numbers=numbers)
            update = generator_update(
                self.student,
                self.teacher,
                self.critic,
                prompts,
                draws,
                noising,
                self.config.redmd,
                judge,
            )
            self._backward(update.loss)
            total += float(update.loss.detach())
            if update.weighed is not None:
                scores.append(update.weighed.mean_score)
                shares.append(update.weighed.effective_share)
        total = summed(total)
        if not math.isfinite(total):
            raise FloatingPointError(f"the generator's loss is {total} at update {self.update}")
        norm = _descend(self.student, self.generator_optimiser, self.config.generator.clip_norm)
        return Report(
            update=self.update,
            generator_loss=total,
            critic_loss=critic_loss,
            generator_norm=norm,
            mean_score=_mean(scores),
            effective_share=_mean(shares),
        )

    def _backward(self, loss: Tensor) -> None:
        (loss * world_size()).backward()  # FSDP averages over processes; losses are shares of a sum

    def _batch(self, role: Role, update: int, samples: range) -> tuple[list[int], Any, Any, Any]:
        c = self.config
        count = len(self.prompt_embeds)
        numbers = prompt_numbers(c.seed, role, update, samples, c.redmd.batch, count)
        prompts = Prompts(cond=self.prompt_embeds[numbers], uncond=self.uncond)
        draws = rollout_draws(c.seed, role, update, samples, c.latents, c.redmd.sampler)
        noising = noising_draws(c.seed, role, update, samples, c.latents, c.redmd)
        return numbers, prompts, draws, noising

    @torch.no_grad()
    def _average(self) -> None:
        decay = self.config.ema if self.update > self.config.ema_from else 0.0
        pairs = zip(self.average.parameters(), self.student.parameters(), strict=True)
        for average, current in pairs:
            average.lerp_(current.detach(), 1 - decay)


def _adamw(network: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        network.parameters(),
        lr=config.rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )


def _descend(network: nn.Module, optimiser: torch.optim.Optimizer, clip_norm: float) -> float:
    norm = clip_gradients(network, clip_norm)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norm


def _mean(values: list[float]) -> float | None:
    return summed(sum(values)) / world_size() / len(values) if values else None
