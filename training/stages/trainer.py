"""The Re-DMD run: critic and generator in turn, averaged weights, checkpoints.

One update of the generator follows `critic_ratio` updates of the critic, as in DMD2 (arXiv
2405.14867). All randomness is a function of the update's number (`run.draws`), so a checkpoint
holds weights, optimisers and that number alone; of a run that was stopped within an update, what
the critic has done of it; and the caches of rollouts that go on in the next update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rf_core.ranges import LARGEST_SIDE, MANY, check_each, check_numbers

from ..data.embeddings import PromptEmbeds
from ..data.starts import Starts, with_starts
from ..objective.carry import CarriedSample, restore_samples, to_samples
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
from ..objective.rollout import PromptSwitch, RolloutDraws, RolloutState, Start
from ..objective.weights import SampleWeights
from ..run import checkpointing
from ..run.distributed import Stopped, all_reduce_sum, local_micro_batches, world_size
from ..run.draws import (
    Role,
    draw_rollout,
    draw_score_noise,
    draw_size,
    draw_starts,
    draw_windows,
    shuffled_indices,
)
from ..run.ema import AverageConfig, WeightAverage
from ..run.optimise import OptimiserConfig, TrainedNetwork
from ..run.reward_tilt import RewardTilt
from ..run.reward_weights import LatentReward, RewardWeights
from ..run.rollouts import PromptNumbers, RolloutPart, switch_prompts
from ..run.signals import StopRequest

_PARTIAL = "critic_steps"  # a checkpoint's losses and norms of an unfinished update
_CARRIED = "carried"  # and its rollouts that go on, by role and sample
_WIDEST = 30.0
"""Standard deviation of latents from which the student is what broke down; Wan's have about 1."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(AverageConfig):
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
    switch_share: float = 0.0
    """Share of samples whose prompt changes at a border of two windows, drawn for the rollout."""
    random_length: bool = False
    """Whether an update's rollouts are 1 to all of their windows long, as drawn for the update."""
    carry: int = 1
    """Updates of a network through which its rollouts go on, with their cache, before they begin
    anew; each of them makes `latents` more."""
    ema_from: int | None = 40
    """See `AverageConfig`."""
    seed: int = 0
    """Of everything random."""
    runaway: float = 100.0
    """The run stops when the critic's loss is above this, or anything is not finite."""

    def __post_init__(self) -> None:
        super().__post_init__()
        num_windows(self.latents[1], self.redmd)  # refuses what is not whole windows
        counts = ("updates", "critic_ratio", "micro_batch")
        check_numbers(self, **dict.fromkeys(counts, (1, MANY)))
        check_numbers(self, seed=(0, 2**63 - 1), runaway=(1e-6, math.inf))
        check_each(self, latents=(1, LARGEST_SIDE))
        check_numbers(self, switch_share=(0, 1), carry=(1, MANY))
        self._check_lengths()
        self._check_rollouts()
        self._check_buckets()

    def _check_rollouts(self) -> None:
        cache = self.redmd.cache
        if not cache.has_equal_chunks and self.rollout_windows > 1:
            raise ValueError(
                f"redmd.cache.first_chunk_frames is {cache.first_chunk_frames}, and a rollout has "
                f"{self.rollout_windows} windows, of which the first would be another length; set "
                f"it to null, or give latents of one window (and carry=1)"
            )
        if self.switch_share and cache.recache == "joint_new_sink":
            raise ValueError(
                f"switch_share is {self.switch_share}, and redmd.cache.recache joint_new_sink, "
                "which makes a sink for all samples where some keep their prompt; set it to joint"
            )

    def _check_lengths(self) -> None:
        if self.random_length and self.carry > 1:
            raise ValueError(
                f"carry is {self.carry}, and random_length is on; what goes on in the next update "
                "has a length that is known: choose one of them"
            )
        frames = self.redmd.window_chunks * self.redmd.cache.chunk_frames
        longer = f"give latents of twice {frames} frames, or three times and so on"
        if self.random_length and self.windows == 1:
            raise ValueError(f"random_length is on, and a rollout is one window; {longer}")
        if self.switch_share and self.rollout_windows == 1:
            raise ValueError(
                f"switch_share is {self.switch_share}, and a rollout is one window; {longer}, or "
                "carry=2 or more"
            )

    def _check_buckets(self) -> None:
        if not all(0 < side <= LARGEST_SIDE for size in self.buckets for side in size):
            raise ValueError(f"buckets are {self.buckets}; give each rows and columns of latents")
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError(
                f"buckets are {self.buckets} beside latents {self.latents}; name each size once"
            )

    def check_prompts(self, count: int) -> None:
        """ValueError where there is but one prompt, which is to change."""
        if self.switch_share and count == 1:
            raise ValueError(
                f"run.switch_share is {self.switch_share}, and there is one prompt; give more in "
                "data.prompts, or run.switch_share=0"
            )

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns that an update's samples may have."""
        _, _, rows, columns = self.latents
        return ((rows, columns), *self.buckets)

    @property
    def largest_size(self) -> tuple[int, int]:
        """That of them which takes most."""
        return max(self.sizes, key=math.prod)

    @property
    def windows(self) -> int:
        """Windows of an update's rollouts, the most of them, each supervised by itself."""
        return num_windows(self.latents[1], self.redmd)

    @property
    def mean_windows(self) -> float:
        """Windows of an update's rollouts, on average."""
        return (1 + self.windows) / 2 if self.random_length else self.windows

    @property
    def rollout_windows(self) -> int:
        """Windows of a whole rollout, the most of them."""
        return self.windows * self.carry

    def part(self, role: Role, number: int) -> RolloutPart:
        """What the role's update of that number trains on."""
        if self.random_length:
            drawn = draw_windows(self.seed, role, number, self.windows)
            return RolloutPart(rollout=number, first=0, windows=drawn, length=drawn)
        rollout, place = divmod(number, self.carry)
        return RolloutPart(
            rollout=rollout,
            first=place * self.windows,
            windows=self.windows,
            length=self.rollout_windows,
        )

    def size_of(self, role: Role, part: RolloutPart) -> tuple[int, int]:
        """Rows and columns of a rollout, which keeps them where it goes on."""
        return draw_size(self.seed, role, part.rollout, self.sizes)

    @property
    def window_frames(self) -> int:
        """Latent frames of a window."""
        return self.latents[1] // self.windows


def prompt_draws(config: RunConfig) -> dict[Role, int]:
    """How many prompts each network's updates draw at most, all of the run's."""
    c, each = config, config.redmd.batch // config.redmd.weights.best_of
    each *= 2 if c.switch_share else 1
    return {role: -(-count // c.carry) * each for role, count in _updates(c).items()}


def drawn_prompts(config: RunConfig, num_prompts: int, start_share: float = 0.0) -> list[int]:
    """The numbers of the prompts that a run draws, of so many, each once; rewards see no others.

    A `start_share` of the rollouts begins from images, whose captions are not of these prompts.
    """
    c, samples, copies = config, range(config.redmd.batch), config.redmd.weights.best_of
    found: dict[int, None] = {}
    for role, count in _updates(config).items():
        for number in range(count):
            part = config.part(role, number)
            begun = None
            if start_share:
                begun = draw_starts(c.seed, role, part.rollout, samples, start_share, 1, copies)
            drawn = prompt_numbers(config, role, part, samples, num_prompts, begun)
            each = (*drawn.before, *drawn.after)
            found |= dict.fromkeys(prompt for prompt in each if prompt < num_prompts)
    return list(found)


def prompt_numbers(
    config: RunConfig,
    role: Role,
    part: RolloutPart,
    samples: Sequence[int],
    num_prompts: int,
    drawn_starts: Sequence[int | None] | None = None,
) -> PromptNumbers:
    """The prompts of some samples of a part of a rollout, by their numbers.

    `drawn_starts` says which of them begin from which image, and so under its caption; to what
    prompts change is the same with it and without.
    """
    c, copies = config, config.redmd.weights.best_of
    numbers = shuffled_indices(
        c.seed, role, part.rollout, samples, c.redmd.batch, num_prompts, copies=copies
    )
    begun = None if drawn_starts is None else with_starts(numbers, drawn_starts, num_prompts)
    return switch_prompts(
        c.seed, role, part, samples, numbers, num_prompts, c.switch_share, copies, begun
    )


def _updates(config: RunConfig) -> dict[Role, int]:
    return {"generator": config.updates, "critic": config.updates * config.critic_ratio}


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
    tilt: Mapping[str, float] = field(default_factory=dict)
    """How the reward's gradient compares with matching's (`RewardTilt.log`); empty without one."""


def report_numbers(report: Report) -> dict[str, float]:
    """A report as a flat dictionary for the log."""
    values = {k: v for k, v in asdict(report).items() if isinstance(v, float)}
    if report.rewards is not None:
        weighted = report.rewards
        values["reward/mean_score"] = weighted.mean_score
        values["reward/effective_share"] = weighted.effective_share
        for name, value in zip(("p10", "p50", "p90"), weighted.quantiles, strict=True):
            values[f"reward/weight_{name}"] = value
    values |= {f"tilt/{name}": value for name, value in report.tilt.items()}
    return values | {f"reward/{name}": value for name, value in report.scores.items()}


@dataclass(frozen=True, kw_only=True)
class _Batch:
    numbers: list[list[int]]
    """Of the prompts of each window."""
    drawn: tuple[Prompts, RolloutDraws, list[ScoreNoise]]
    state: RolloutState | None
    """A copy of where its rollouts stand; None where they do not go on in another update."""


@dataclass(frozen=True)
class _Step:
    loss: float
    norm: float
    rewards: SampleWeights | None = None
    tilt: Mapping[str, float] = field(default_factory=dict)


class Trainer:
    """Student, critic and teacher with the state of a run."""

    def __init__(
        self,
        config: RunConfig,
        networks: Networks,
        prompts: PromptEmbeds,
        uncond: Tensor,
        reward: LatentReward | None = None,
        sequence_over: int | None = None,
        starts: Starts | None = None,
    ) -> None:
        """`networks` are placed and sharded already; `uncond` is [1, S, D] on their device.

        `sequence_over` is how many processes have the same samples: those that share a sample's
        tokens. ValueError where the batch cannot be shared out, or a single prompt is to change.
        """
        config.check_prompts(len(prompts))
        self.config, self.networks, self.reward = config, networks, reward
        self.prompts, self.uncond, self.sequence_over = prompts, uncond, sequence_over
        self.starts = starts
        batches = config.redmd.batch, config.micro_batch
        self.micro_batches = local_micro_batches(*batches, sequence_over)
        self.average = WeightAverage(networks.student)
        self.trained: dict[Role, TrainedNetwork] = {
            "generator": TrainedNetwork(networks.student, config.generator),
            "critic": TrainedNetwork(networks.critic, config.critic),
        }
        self.update = 0
        self._critic_steps: list[_Step] = []
        """Those of the update that is not finished yet."""
        self._carried: dict[Role, dict[int, CarriedSample]] = {"generator": {}, "critic": {}}
        """Rollouts that go on in the role's next update, by sample."""

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
        self.average.update(c.decay(self.update, c.redmd.batch))
        self.update += 1
        weighted = generator if c.redmd.weigh == "generator" else critic[-1]
        return Report(
            update=self.update - 1,
            generator_loss=generator.loss,
            critic_loss=sum(each.loss for each in critic) / ratio,
            generator_norm=generator.norm,
            critic_norm=sum(each.norm for each in critic) / ratio,
            rewards=weighted.rewards,
            scores={} if self.reward is None else self.reward.take_means(),
            tilt=generator.tilt,
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
        state.pop(_CARRIED, None)
        if not checkpointing.holds(folder, _PARTIAL):  # of before runs could be stopped
            del state[_PARTIAL]
        checkpointing.load(state, folder)
        for role, trained in self.trained.items():
            trained.load(state[role])
        self.update = int(state["update"])
        done = state.get(_PARTIAL, torch.zeros(0, 2))
        self._critic_steps = [_Step(*row) for row in done[done.isfinite().all(1)].tolist()]
        ratio = self.config.critic_ratio
        self._load_carried("generator", self.update, folder)
        self._load_carried("critic", ratio * self.update + len(self._critic_steps), folder)

    def _load_carried(self, role: Role, number: int, folder: Path) -> None:
        part, c, device = self.config.part(role, number), self.config, self.uncond.device
        self._carried[role] = {}
        for samples in self.micro_batches if part.first else []:
            for sample in samples:
                found = checkpointing.read_part(folder, f"{_CARRIED}.{role}.{sample}")
                self._carried[role][sample] = found
            shape = (len(samples), *c.latents[:2], *c.size_of(role, part))
            try:
                self._state_of(role, part, samples, torch.empty(shape).to(device))
            except ValueError as error:
                raise ValueError(f"{folder} cannot be resumed from: {error}") from None

    def _state(self) -> dict[str, Any]:
        trained = {role: each.state() for role, each in self.trained.items()}
        done = torch.full((self.config.critic_ratio, 2), math.nan, dtype=torch.float64)
        for row, step in zip(done, self._critic_steps, strict=False):
            row[0], row[1] = step.loss, step.norm
        counts = {"update": torch.tensor(self.update), _PARTIAL: done}
        carried = {
            role: {str(sample): dict(tensors) for sample, tensors in each.items()}
            for role, each in self._carried.items()
            if each
        }
        going_on = {_CARRIED: carried} if carried else {}
        return {"average": self.average.tensors, **going_on, **counts, **trained}

    def _train_step(self, role: Role, number: int, stop: StopRequest | None) -> _Step:
        total, reward_weights = 0.0, self._reward_weights(role, number)
        tilt = self._tilt(role)
        goes_on, carried = not self.config.part(role, number).is_last, {}
        for samples in self.micro_batches:
            if stop is not None and stop.agreed():
                self.trained[role].clear()
                raise Stopped(stop.number)
            batch = self._batch(role, number, samples)
            weight_fn = reward_weights and reward_weights.for_samples(samples, batch.numbers)
            given = self.networks, *batch.drawn, self.config.redmd, weight_fn, batch.state
            samples_tilt = tilt and tilt.for_samples(batch.numbers)
            for loss in (
                generator_losses(*given, samples_tilt)
                if role == "generator"
                else critic_losses(*given)
            ):
                # FSDP averages over processes, where losses are shares of a sum; processes that
                # share a sample's tokens have the same loss, and each its part of the gradient.
                (loss * world_size()).backward()
                total += float(loss.detach())
            if goes_on and batch.state is not None:
                carried |= dict(zip(samples, to_samples(batch.state), strict=True))
        total = all_reduce_sum(total) / (self.sequence_over or 1)
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
        self._carried[role] = carried
        return _Step(
            total, norm, reward_weights and reward_weights.log(), tilt.log() if tilt else {}
        )

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
        batch = self._batch("generator", self.update, self.micro_batches[0])
        x0 = torch.cat(list(self._rollout_latents(batch)))
        spread = float(x0.float().std())
        return all_reduce_sum(spread) / world_size()

    def _batch(self, role: Role, number: int, samples: range) -> _Batch:
        c, device, part = self.config, self.uncond.device, self.config.part(role, number)
        size = c.size_of(role, part)
        starts = self._drawn_starts(role, part, samples, size)
        numbers = prompt_numbers(c, role, part, samples, len(self.prompts), starts)
        window = (c.latents[0], c.window_frames, *size)
        score_noises = [
            draw_score_noise(c.seed, role, number, samples, window, c.redmd, index)
            for index in range(part.windows)
        ]
        shape = (c.latents[0], c.window_frames * part.windows, *size)
        draws = draw_rollout(c.seed, role, number, samples, shape, c.redmd.sampler)
        if starts is not None and not part.first:
            draws = replace(draws, start=self._start(starts, size))
        draws = draws.to(device)
        drawn = self._prompts(numbers), draws, [each.to(device) for each in score_noises]
        state = self._state_of(role, part, samples, draws.noise) if c.carry > 1 else None
        return _Batch(numbers=numbers.of_windows, drawn=drawn, state=state)

    def _drawn_starts(
        self, role: Role, part: RolloutPart, samples: range, size: tuple[int, int]
    ) -> list[int | None] | None:
        """The images that some samples' rollout begins from, by number; None where none may."""
        if self.starts is None:
            return None
        c = self.config
        copies = c.redmd.weights.best_of
        return self.starts.draw(c.seed, role, part.rollout, samples, size, copies)

    def _start(self, drawn: list[int | None], size: tuple[int, int]) -> Start:
        assert self.starts is not None
        c = self.config
        return self.starts.start(drawn, (c.latents[0], c.redmd.cache.first_frames, *size))

    def _prompts(self, numbers: PromptNumbers) -> Prompts:
        device, switch = self.uncond.device, None
        if numbers.border < numbers.windows:
            pairs = zip(numbers.before, numbers.after, strict=True)
            switch = PromptSwitch(
                window=numbers.border,
                embeds=self._embeds(numbers.after),
                samples=torch.tensor([old != new for old, new in pairs]),
            ).to(device)
        cond = self._embeds(numbers.before).to(device)
        return Prompts(cond=cond, uncond=self.uncond, switch=switch)

    def _embeds(self, numbers: Sequence[int]) -> Tensor:
        return (self.prompts if self.starts is None else self.starts).embeds(numbers)

    def _state_of(
        self, role: Role, part: RolloutPart, samples: range, latents: Tensor
    ) -> RolloutState:
        """Where rollouts stand that go on through several updates."""
        n = self.networks
        state = RolloutState.begin(n.student, latents, self.config.redmd.cache, n.dtype)
        if part.first:
            restore_samples(state, [self._carried[role][sample] for sample in samples])
        return state

    def _rollout_latents(self, batch: _Batch) -> Iterator[Tensor]:
        prompts, draws, _ = batch.drawn
        return rollout_latents(self.networks, prompts, draws, self.config.redmd, batch.state)

    def _reward_weights(self, role: Role, number: int) -> RewardWeights | None:
        redmd = self.config.redmd
        if self.reward is None or redmd.weigh != role:
            return None
        windows = self.config.part(role, number).windows
        reward_weights = RewardWeights(self.reward, redmd, windows, self.sequence_over)
        if redmd.weights.depends_on_batch and (len(self.micro_batches), windows) != (1, 1):
            with torch.no_grad():
                scores = [self._scores(role, number, samples) for samples in self.micro_batches]
            reward_weights.set_scores(scores)
        return reward_weights

    def _tilt(self, role: Role) -> RewardTilt | None:
        if self.reward is None or role == "critic" or not self.config.redmd.gradient_beta:
            return None
        return RewardTilt(self.reward)

    def _scores(self, role: Role, number: int, samples: range) -> Tensor:
        """Scores [windows, B] of a micro-batch, computed ahead of its losses."""
        batch = self._batch(role, number, samples)
        assert self.reward is not None
        windows = zip(self._rollout_latents(batch), batch.numbers, strict=True)
        return torch.stack([self.reward(x0, numbers) for x0, numbers in windows])
