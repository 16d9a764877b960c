"""The Re-DMD run: critic and generator in turn, averaged weights, checkpoints.

One update of the generator follows `critic_ratio` updates of the critic, as in DMD2 (arXiv
2405.14867). All randomness is a function of the update's number (`run.draws`), so a checkpoint
holds weights, optimisers and that number alone; and, of a run that was stopped within an update,
what the critic has done of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rf_core.ranges import LARGEST_SIDE, MANY, check_each, check_numbers

from ..data.embeddings import PromptEmbeds
from ..data.starts import Starts
from ..objective.redmd import (
    Networks,
    Prompts,
    ReDMDConfig,
    ScoreNoise,
    critic_losses,
    generator_losses,
    num_windows,
    rollout_latents,
)
from ..objective.rollout import RolloutDraws, Start
from ..objective.weights import SampleWeights
from ..run import checkpointing
from ..run.distributed import Stopped, all_reduce_sum, local_micro_batches, world_size
from ..run.draws import Role, draw_rollout, draw_score_noise, draw_size, shuffled_indices
from ..run.ema import WeightAverage
from ..run.optimise import OptimiserConfig, TrainedNetwork
from ..run.reward_weights import LatentReward, RewardWeights
from ..run.signals import StopRequest

_PARTIAL = "critic_steps"  # a checkpoint's losses and norms of an unfinished update
_WIDEST = 30.0
"""Standard deviation of latents from which the student is what broke down; Wan's have about 1."""


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
    buckets: tuple[tuple[int, int], ...] = ()
    """Other rows and columns: an update draws one size for all of its samples, of these and that
    of `latents`. The student's file has the latter's."""
    updates: int = 120
    """Generator updates. The published 600 steps are the critic's: every fifth trains both."""
    critic_ratio: int = 5
    """Critic updates before each of them."""
    micro_batch: int = 1
    """Samples at a time."""
    ema: float = 0.99
    """Decay of the averaged weights, an update."""
    ema_from: int = 40
    """Update at which averaging begins; until then the average is the student itself."""
    seed: int = 0
    """Of everything random."""
    runaway: float = 100.0
    """The run stops when the critic's loss is above this, or anything is not finite."""

    def __post_init__(self) -> None:
        num_windows(self.latents[1], self.redmd)  # refuses what is not whole windows
        counts = ("updates", "critic_ratio", "micro_batch")
        check_numbers(self, **dict.fromkeys(counts, (1, MANY)), ema_from=(0, MANY))
        check_numbers(self, seed=(0, 2**63 - 1), runaway=(1e-6, math.inf))
        check_each(self, latents=(1, LARGEST_SIDE))
        if not all(0 < side <= LARGEST_SIDE for size in self.buckets for side in size):
            raise ValueError(f"buckets are {self.buckets}; give each rows and columns of latents")
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError(
                f"buckets are {self.buckets} beside latents {self.latents}; name each size once"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; give a decay in [0, 1)")

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns that an update's samples may have."""
        _, _, rows, columns = self.latents
        return ((rows, columns), *self.buckets)

    @property
    def windows(self) -> int:
        """Windows of a rollout, each supervised by itself."""
        return num_windows(self.latents[1], self.redmd)

    @property
    def window_frames(self) -> int:
        """Latent frames of a window."""
        return self.latents[1] // self.windows


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an update did."""

    update: int
    generator_loss: float
    critic_loss: float
    """Mean over the critic's updates."""
    generator_norm: float
    """Norm of the generator's gradients, before clipping."""
    critic_norm: float
    """The same of the critic, mean over its updates."""
    rewards: SampleWeights | None
    """Weights of the last update with a reward; None without one."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Means of what the reward is made of."""


def report_numbers(report: Report) -> dict[str, float]:
    """A report as a flat dictionary for the log."""
    values = {k: v for k, v in asdict(report).items() if isinstance(v, float)}
    if report.rewards is not None:
        weighted = report.rewards
        values["reward/mean_score"] = weighted.mean_score
        values["reward/effective_share"] = weighted.effective_share
        for name, value in zip(("p10", "p50", "p90"), weighted.quantiles, strict=True):
            values[f"reward/weight_{name}"] = value
    return values | {f"reward/{name}": value for name, value in report.scores.items()}


@dataclass(frozen=True, kw_only=True)
class _Batch:
    numbers: list[int]
    drawn: tuple[Prompts, RolloutDraws, list[ScoreNoise]]


@dataclass(frozen=True)
class _Step:
    loss: float
    norm: float
    rewards: SampleWeights | None = None


class Trainer:
    """Student, critic and teacher with the state of a run."""

    def __init__(
        self,
        config: RunConfig,
        networks: Networks,
        prompts: PromptEmbeds,
        uncond: Tensor,
        reward: LatentReward | None = None,
        starts: Starts | None = None,
    ) -> None:
        """`networks` are placed and sharded already; `uncond` is [1, S, D] on their device."""
        self.config, self.networks, self.reward = config, networks, reward
        self.prompts, self.uncond, self.starts = prompts, uncond, starts
        self.micro_batches = local_micro_batches(config.redmd.batch, config.micro_batch)
        self.average = WeightAverage(networks.student)
        self.trained: dict[Role, TrainedNetwork] = {
            "generator": TrainedNetwork(networks.student, config.generator),
            "critic": TrainedNetwork(networks.critic, config.critic),
        }
        self.update = 0
        self._critic_steps: list[_Step] = []
        """Those of the update that is not finished yet."""

    @property
    def is_within_update(self) -> bool:
        """Whether the critic has been trained for an update that is not finished yet."""
        return bool(self._critic_steps)

    def step(self, stop: StopRequest | None = None) -> Report:
        """The critic's updates, one of the generator, the average.

        Raises:
            FloatingPointError: something is not finite, or the critic's loss runs away.
            Stopped: as `stop` asked for, between two micro-batches; what the optimisers have done
                is kept, and the next call goes on from there.
        """
        ratio, c, critic = self.config.critic_ratio, self.config, self._critic_steps
        while len(critic) < ratio:
            critic.append(self._train_step("critic", ratio * self.update + len(critic), stop))
        generator = self._train_step("generator", self.update, stop)
        self._critic_steps = []
        self.update += 1
        self.average.update(c.ema if self.update > c.ema_from else 0.0)
        weighted = generator if c.redmd.weigh == "generator" else critic[-1]
        return Report(
            update=self.update - 1,
            generator_loss=generator.loss,
            critic_loss=sum(each.loss for each in critic) / ratio,
            generator_norm=generator.norm,
            critic_norm=sum(each.norm for each in critic) / ratio,
            rewards=weighted.rewards,
            scores={} if self.reward is None else self.reward.take_means(),
        )

    def averaged(self) -> AbstractContextManager[None]:
        """Within it, the student has its averaged weights."""
        return self.average.applied()

    def save(self, folder: Path) -> None:
        """Write a checkpoint; `folder` is complete once it exists.

        FloatingPointError, and nothing is written, where weights are not finite.
        """
        for role, trained in self.trained.items():
            if not trained.is_finite():
                raise FloatingPointError(
                    f"the {role}'s weights are not finite after update {self.update}; lower "
                    f"{role}.rate"
                )
        checkpointing.save(self._state(), folder)

    def load(self, folder: Path) -> None:
        """Resume from what `save` has written, on any number of processes."""
        state = self._state()
        if not checkpointing.holds(folder, _PARTIAL):  # of before runs could be stopped
            del state[_PARTIAL]
        checkpointing.load(state, folder)
        for role, trained in self.trained.items():
            trained.load(state[role])
        self.update = int(state["update"])
        done = state.get(_PARTIAL, torch.zeros(0, 2))
        self._critic_steps = [_Step(*row) for row in done[done.isfinite().all(1)].tolist()]

    def _state(self) -> dict[str, Any]:
        trained = {role: each.state() for role, each in self.trained.items()}
        done = torch.full((self.config.critic_ratio, 2), math.nan, dtype=torch.float64)
        for row, step in zip(done, self._critic_steps, strict=False):
            row[0], row[1] = step.loss, step.norm
        counts = {"update": torch.tensor(self.update), _PARTIAL: done}
        return {"average": self.average.tensors, **counts, **trained}

    def _train_step(self, role: Role, number: int, stop: StopRequest | None) -> _Step:
        losses = generator_losses if role == "generator" else critic_losses
        total, reward_weights = 0.0, self._reward_weights(role, number)
        for samples in self.micro_batches:
            if stop is not None and stop.agreed():
                self.trained[role].clear()
                raise Stopped(stop.number)
            batch = self._batch(role, number, samples)
            weight_fn = reward_weights and reward_weights.for_samples(samples, batch.numbers)
            for loss in losses(self.networks, *batch.drawn, self.config.redmd, weight_fn):
                # FSDP averages over processes, where losses are shares of a sum.
                (loss * world_size()).backward()
                total += float(loss.detach())
        total = all_reduce_sum(total)
        limit = self.config.runaway if role == "critic" else math.inf
        if not total < limit:
            raise FloatingPointError(
                f"the {role}'s loss is {total:.4g} at its update {number}; {self._remedy(role)}"
            )
        trained, c = self.trained[role], self.config
        updates = c.updates * (c.critic_ratio if role == "critic" else 1)
        try:
            norm = trained.step(trained.config.rate_factor(number, updates))
        except FloatingPointError:
            raise FloatingPointError(
                f"the {role}'s gradients are not finite at its update {number}; "
                f"{self._remedy(role)}"
            ) from None
        return _Step(total, norm, reward_weights and reward_weights.log())

    def _remedy(self, role: Role) -> str:
        """Whose rate to lower: of the student first, whose samples are what both networks see."""
        for each in ("generator", "critic"):
            if not self.trained[each].is_finite():
                name = "student" if each == "generator" else each
                return f"the {name}'s weights are not finite: lower {each}.rate"
        spread = self._student_spread()
        if not spread < _WIDEST:
            return f"the student's latents have a spread of {spread:.3g}: lower generator.rate"
        return f"lower {role}.rate"

    @torch.no_grad()
    def _student_spread(self) -> float:
        """Standard deviation of what the student makes of this update's prompts, all processes'."""
        prompts, draws, _ = self._batch("generator", self.update, self.micro_batches[0]).drawn
        windows = rollout_latents(self.networks, prompts, draws, self.config.redmd)
        x0 = torch.cat(list(windows))
        spread = float(x0.float().std())
        return all_reduce_sum(spread) / world_size()

    def _batch(self, role: Role, number: int, samples: range) -> _Batch:
        c, device = self.config, self.uncond.device
        channels, frames, *_ = c.latents
        size = draw_size(c.seed, role, number, c.sizes)
        window = (channels, c.window_frames, *size)
        numbers = shuffled_indices(
            c.seed,
            role,
            number,
            samples,
            c.redmd.batch,
            len(self.prompts),
            copies=c.redmd.weights.best_of,
        )
        score_noises = [
            draw_score_noise(c.seed, role, number, samples, window, c.redmd, index)
            for index in range(c.windows)
        ]
        shape = (channels, frames, *size)
        draws = draw_rollout(c.seed, role, number, samples, shape, c.redmd.sampler)
        if self.starts is None:
            cond = self.prompts.embeds(numbers)
        else:
            numbers, start = self._start(role, number, samples, numbers, size)
            cond, draws = self.starts.embeds(numbers), replace(draws, start=start)
        prompts = Prompts(cond=cond.to(device), uncond=self.uncond)
        drawn = prompts, draws.to(device), [each.to(device) for each in score_noises]
        return _Batch(numbers=numbers, drawn=drawn)

    def _start(
        self, role: Role, number: int, samples: range, numbers: list[int], size: tuple[int, int]
    ) -> tuple[list[int], Start]:
        """The numbers of some samples' prompts, and what they begin with."""
        assert self.starts is not None
        c = self.config
        drawn = self.starts.draw(c.seed, role, number, samples, size, c.redmd.weights.best_of)
        chunk = (c.latents[0], c.redmd.cache.chunk_frames, *size)
        return self.starts.prompts(numbers, drawn), self.starts.start(drawn, chunk)

    def _reward_weights(self, role: Role, number: int) -> RewardWeights | None:
        redmd = self.config.redmd
        if self.reward is None or redmd.weigh != role:
            return None
        reward_weights = RewardWeights(self.reward, redmd, self.config.windows)
        if redmd.weights.depends_on_batch and (len(self.micro_batches), self.config.windows) != (
            1,
            1,
        ):
            with torch.no_grad():
                scores = [self._scores(role, number, samples) for samples in self.micro_batches]
            reward_weights.set_scores(scores)
        return reward_weights

    def _scores(self, role: Role, number: int, samples: range) -> Tensor:
        """Scores [windows, B] of a micro-batch, computed ahead of its losses."""
        batch = self._batch(role, number, samples)
        assert self.reward is not None
        prompts, draws, _ = batch.drawn
        windows = rollout_latents(self.networks, prompts, draws, self.config.redmd)
        return torch.stack([self.reward(x0, batch.numbers) for x0 in windows])
