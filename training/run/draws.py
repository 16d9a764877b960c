"""Everything random in a run, as a function of (seed, role, update, sample) alone.

No generator is kept between updates, so there is no random state to save. A resumed run draws what
the uninterrupted run would have drawn, on any number of processes. The exit step is a function of
(seed, role, update): the same for all samples on all ranks, without communication.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch

from rf_core.config import SamplerConfig

from ..objective.losses import matching_timesteps
from ..objective.redmd import ReDMDConfig, ScoreNoise
from ..objective.rollout import RolloutDraws

Role = Literal["generator", "critic"]
"""Which network is updated; each has rollouts of its own."""


def seeded_generator(*key: object) -> torch.Generator:
    """A CPU generator, seeded by a hash of the key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def draw_rollout(
    seed: int,
    role: Role,
    update: int,
    samples: Sequence[int],
    shape: tuple[int, ...],
    sampler: SamplerConfig,
) -> RolloutDraws:
    """Random draws of the rollouts of some samples; `shape` is one sample's, [C, F, h, w]."""
    steps = len(sampler.steps)
    each = [
        torch.randn(
            (steps, *shape), generator=seeded_generator(seed, role, update, sample, "rollout")
        )
        for sample in samples
    ]
    noise, *renoise = torch.stack(each, dim=1)
    exits = seeded_generator(seed, role, update, "exit")
    return RolloutDraws(
        noise=noise,
        renoise=torch.stack(renoise) if renoise else noise.new_empty((0, *noise.shape)),
        exit_step=int(torch.randint(steps, (), generator=exits)),
    )


def draw_score_noise(
    seed: int,
    role: Role,
    update: int,
    samples: Sequence[int],
    shape: tuple[int, ...],
    config: ReDMDConfig,
    window: int = 0,
) -> ScoreNoise:
    """Noise and timesteps at which scores of a window are compared; `shape` is [C, F, h, w]."""
    noises, timesteps = [], []
    for sample in samples:
        generator = seeded_generator(seed, role, update, sample, "noising", window)
        noises.append(torch.randn(shape, generator=generator))
        timesteps.append(matching_timesteps(1, config.shift, config.bounds, generator))
    return ScoreNoise(noise=torch.stack(noises), timestep_B=torch.cat(timesteps))


def draw_windows(seed: int, role: Role, update: int, most: int) -> int:
    """Windows of an update's rollouts, uniform from 1 to `most`; for all samples alike."""
    generator = seeded_generator(seed, role, update, "windows")
    return 1 + int(torch.randint(most, (), generator=generator))


def draw_border(seed: int, role: Role, rollout: int, windows: int) -> int:
    """The window of a rollout with which prompts change, uniform from 1 to `windows` - 1.

    For all samples alike, so that processes which share a network recache together.
    """
    generator = seeded_generator(seed, role, rollout, "border")
    return 1 + int(torch.randint(windows - 1, (), generator=generator))


def switched_indices(
    seed: int,
    role: Role,
    rollout: int,
    samples: Sequence[int],
    numbers: Sequence[int],
    num_prompts: int,
    share: float,
    copies: int = 1,
) -> list[int]:
    """The prompts after the border, as their numbers: another one for a `share` of samples.

    `numbers` are the prompts before it; `copies` neighbouring samples change alike.
    """
    after = []
    for sample, number in zip(samples, numbers, strict=True):
        generator = seeded_generator(seed, role, rollout, sample // copies, "switch")
        changes = float(torch.rand((), generator=generator)) < share
        further = 1 + int(torch.randint(num_prompts - 1, (), generator=generator))
        after.append((number + further) % num_prompts if changes else number)
    return after


def draw_size(
    seed: int, role: Role, rollout: int, sizes: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """The size of all samples of a rollout, on all processes; each is as likely."""
    generator = seeded_generator(seed, role, rollout, "bucket")
    return sizes[int(torch.randint(len(sizes), (), generator=generator))]


def draw_starts(
    seed: int,
    role: Role,
    rollout: int,
    samples: Sequence[int],
    share: float,
    num_starts: int,
    copies: int = 1,
) -> list[int | None]:
    """The start image of each of those samples, as its number; None for one made of noise alone.

    Each begins so with probability `share`; `copies` neighbouring samples begin alike.
    """
    found = []
    for sample in samples:
        generator = seeded_generator(seed, role, rollout, sample // copies, "start")
        is_started = float(torch.rand((), generator=generator)) < share
        number = int(torch.randint(num_starts, (), generator=generator))
        found.append(number if is_started else None)
    return found


def shuffled_indices(
    seed: int,
    role: str,
    update: int,
    samples: Sequence[int],
    batch: int,
    num_prompts: int,
    copies: int = 1,
) -> list[int]:
    """The prompt of each of those samples, as its number: shuffled anew every epoch.

    `copies` neighbouring samples share a prompt.
    """
    numbers = []
    for sample in samples:
        epoch, place = divmod((update * batch + sample) // copies, num_prompts)
        numbers.append(int(_order(seed, role, epoch, num_prompts)[place]))
    return numbers


def first_indices(seed: int, role: str, count: int, num_prompts: int) -> list[int]:
    """The numbers of the first `count` prompts that `shuffled_indices` gives, each once.

    In the order in which they come: those of a longer run begin with those of a shorter one.
    """
    return _order(seed, role, 0, num_prompts)[:count].tolist()


@lru_cache(maxsize=4)  # of a million prompts it takes a while, and samples share it
def _order(seed: int, role: str, epoch: int, num_prompts: int) -> torch.Tensor:
    return torch.randperm(num_prompts, generator=seeded_generator(seed, role, epoch, "order"))
