"""The flow-matching schedule as pure functions.

A noisy sample is x = (1 - sigma) x0 + sigma noise with sigma = t / 1000, and the network predicts
the flow noise - x0 (Wan 2.1; Lipman et al. 2022). `shift` bends the steps toward noise:
sigma' = shift sigma / (1 + (shift - 1) sigma) (Esser et al. 2024, eq. 23).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .config import NUM_TRAIN_TIMESTEPS, SamplerConfig

_SAME_LEVEL = 1e-6  # of a grid and of a schedule: one is rounded to float32


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Bend noise levels in [0, 1] toward 1; any shape."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sampling_timesteps(config: SamplerConfig, *, is_first: bool = False) -> Tensor:
    """The warped denoising timesteps, [steps] in float32, high to low; `is_first` of the first.

    They are entries of the training table, as students learn them: rounding shows in their
    embedding.
    """
    return _table_entries(config.steps_of(is_first), config.shift)


def all_timesteps(config: SamplerConfig) -> Tensor:
    """Those of every chunk, first or later, each once, [steps] in float32, high to low."""
    return _table_entries(config.all_steps, config.shift)


def _table_entries(steps: Sequence[int], shift: float) -> Tensor:
    table = torch.cat([training_sigmas(shift), torch.zeros(1)])
    return table[[NUM_TRAIN_TIMESTEPS - step for step in steps]] * NUM_TRAIN_TIMESTEPS


def noise_timestep(timestep: float, shift: float) -> float:
    """The timestep whose noise a sample has at `timestep`: itself but for 0.

    Students of Self Forcing's line look noise up in the training table, which has none for 0.
    """
    return timestep or float(training_sigmas(shift)[-1]) * NUM_TRAIN_TIMESTEPS


def entered_at(
    strength: float, config: SamplerConfig, *, is_first: bool = False
) -> tuple[list[float], list[float]]:
    """Where a guide enters the schedule: the timesteps left, and those of their noise.

    Both high to low, in [0, 1000], as `denoise` takes them; the first noise level is the guide's.
    It is sigma' = shift sigma / (1 + (shift - 1) sigma) of sigma = strength steps[0] / 1000: the
    steps' own warp, so that a step s is entered at strength s / steps[0] (a step of 0 as one of 1,
    whose noise it has). Between two steps the first pass is at the level asked for, and the lower
    steps follow. 1 is the whole schedule, 0 no pass (SDEdit, Meng et al., arXiv 2108.01073).
    ValueError for a strength outside [0, 1].
    """
    check_strength(strength)
    timesteps = sampling_timesteps(config, is_first=is_first).tolist()
    levels = [noise_timestep(each, config.shift) for each in timesteps]
    if strength == 0:
        return [], []
    steps = [max(step, 1) / NUM_TRAIN_TIMESTEPS for step in config.steps_of(is_first)]
    wanted = strength * steps[0]
    above = sum(step > wanted + _SAME_LEVEL for step in steps)
    if above < len(steps) and wanted - steps[above] <= _SAME_LEVEL:
        return timesteps[above:], levels[above:]
    sigma = shift_sigma(torch.tensor(wanted, dtype=torch.float64), config.shift)
    entry = sigma.item() * NUM_TRAIN_TIMESTEPS
    return [entry, *timesteps[above:]], [entry, *levels[above:]]


def check_strength(strength: float) -> None:
    """ValueError unless a guide's strength is in [0, 1]."""
    if not 0 <= strength <= 1:
        raise ValueError(
            f"strength is {strength}; give a number from 0, the guide as it is, to 1, text alone"
        )


def euler_levels(steps: int, shift: float, through: Sequence[float] = ()) -> list[float]:
    """Noise levels from 1 to 0: `steps` + 1 of a shifted grid, and those of `through`.

    A level of `through` takes the place of its equal, which rounding may have set apart.
    """
    wanted = torch.tensor(through, dtype=torch.float64)
    grid = shift_sigma(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)
    equal = (grid[:, None] - wanted).abs() <= _SAME_LEVEL
    return torch.cat([grid[~equal.any(dim=1)], wanted]).sort(descending=True).values.tolist()


def integrate(
    flow: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    levels: Sequence[float],
    kept: Sequence[float] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Follow `flow(x, level)` from noise down `levels` by Euler steps; the last level is 0.

    Returns the end, and where it was at each of `kept`, which are levels.
    """
    x, points = noise, {}
    for level, after in pairwise(levels):
        if level in kept:
            points[level] = x
        x = x + (after - level) * flow(x, level)
    return x, [points[level] for level in kept]


def training_sigmas(shift: float) -> Tensor:
    """The 1000 training noise levels, [1000] in float32, from 1 downward."""
    sigma = torch.linspace(1, 0, NUM_TRAIN_TIMESTEPS + 1)[:-1]
    return shift_sigma(sigma, shift)


def training_weights(timesteps: Tensor) -> Tensor:
    """Wan's loss weight per timestep: a bell around t = 500, of mean one over the table [1000]."""
    bell = torch.exp(-2 * ((timesteps - NUM_TRAIN_TIMESTEPS / 2) / NUM_TRAIN_TIMESTEPS) ** 2)
    lifted = bell - bell.min()
    return lifted * (NUM_TRAIN_TIMESTEPS / lifted.sum())


def sigma_of(timestep_BF: Tensor) -> Tensor:
    """Noise level per frame, ready to multiply [B, C, F, h, w]."""
    return timestep_BF[:, None, :, None, None] / NUM_TRAIN_TIMESTEPS


def add_noise(x0: Tensor, noise: Tensor, timestep_BF: Tensor) -> Tensor:
    """The noisy sample at each frame's timestep; x0 and noise are [B, C, F, h, w]."""
    sigma = sigma_of(timestep_BF)
    return ((1 - sigma) * x0 + sigma * noise).to(x0.dtype)


def flow_to_x0(flow: Tensor, noisy: Tensor, timestep_BF: Tensor) -> Tensor:
    """The clean sample a predicted flow implies, x0 = x - sigma flow, in the sample's dtype."""
    wide = torch.promote_types(noisy.dtype, torch.float32)
    return (noisy.to(wide) - sigma_of(timestep_BF) * flow.to(wide)).to(noisy.dtype)


def x0_to_flow(x0: Tensor, noisy: Tensor, timestep_BF: Tensor) -> Tensor:
    """The flow that leads from `noisy` to `x0`: (x - x0) / sigma. Sigma must not be 0."""
    wide = torch.promote_types(noisy.dtype, torch.float32)
    return ((noisy.to(wide) - x0.to(wide)) / sigma_of(timestep_BF)).to(noisy.dtype)
