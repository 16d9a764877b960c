"""Everything random in a run, as a function of (seed, role, update, sample) alone.

No generator is kept between updates, so there is no random state to save. A resumed run draws what
the uninterrupted run would have drawn, on any number of processes. The exit step is a function of
(seed, role, update): the same for all samples on all ranks, without communication.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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


def draw_size(
    seed: int, role: Role, update: int, sizes: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """The size of all samples of an update, on all processes; each is as likely."""
    generator = seeded_generator(seed, role, update, "bucket")
    return sizes[int(torch.randint(len(sizes), (), generator=generator))]


def draw_starts(
    seed: int,
    role: Role,
    update: int,
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
        generator = seeded_generator(seed, role, update, sample // copies, "start")
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
        order = torch.randperm(num_prompts, generator=seeded_generator(seed, role, epoch, "order"))
        numbers.append(int(order[place]))
    return numbers
