"""The losses of Re-DMD, as pure functions of tensors.

Distribution matching (DMD, arXiv 2311.18828) moves a generated sample x0 along the difference of
two scores at the same noised point: the critic's, which has learnt the student's distribution, and
the teacher's. Re-DMD (Reward Forcing, arXiv 2512.04678, sec. 3.3) weights each sample by its
reward. The critic learns by flow matching on the student's samples.

Latents are [B, C, F, h, w] in any order of the last four; a mask of their shape is true where the
loss counts. Every loss is [B]: weight, then average.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rf_core.config import NUM_TRAIN_TIMESTEPS
from rf_core.scheduler import shift_sigma


def guided(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Guidance as the published trainer writes it: cond + s (cond - uncond), so 0 is none."""
    return cond + scale * (cond - uncond)


def matching_direction(x0: Tensor, fake_x0: Tensor, real_x0: Tensor) -> Tensor:
    """The direction to step against, (fake - real) / mean |x0 - real| of each sample.

    `fake_x0` and `real_x0` are the clean samples that critic and teacher predict from the same
    noised x0. Where it is undefined it is 0.
    """
    distance = (x0 - real_x0).abs().flatten(1).mean(1)
    direction = (fake_x0 - real_x0) / distance.view(-1, *[1] * (x0.ndim - 1))
    return direction.nan_to_num().detach()


def generator_loss(x0: Tensor, direction: Tensor, mask: Tensor | None = None) -> Tensor:
    """Half the mean square to a target one step along the direction, [B].

    Its gradient is the direction, over the number of elements that count.
    """
    error = (x0 - (x0 - direction).detach()).square()
    return 0.5 * _mean(error, mask)


def critic_loss(
    flow: Tensor, generated: Tensor, noise: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Flow matching on generated samples: mean square of flow - (noise - generated), [B]."""
    return _mean((flow - (noise - generated)).square(), mask)


def reward_weights(reward_B: Tensor, beta: float) -> Tensor:
    """exp(beta r): how much a sample counts; beta = 0 is plain DMD."""
    return (beta * reward_B).exp()


def effective_samples(weights_B: Tensor) -> Tensor:
    """How many equal samples weigh as much: (sum w)^2 / sum w^2, a scalar from 1 to B."""
    return weights_B.sum().square() / weights_B.square().sum()


def matching_timesteps(
    batch: int,
    shift: float,
    bounds: tuple[float, float],
    generator: torch.Generator | None = None,
) -> Tensor:
    """One timestep a sample, [B]: uniform in [0, 1000), shifted, kept within `bounds`."""
    uniform = torch.rand(batch, generator=generator)
    return (shift_sigma(uniform, shift) * NUM_TRAIN_TIMESTEPS).clamp(*bounds)


def _mean(error: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return error.flatten(1).mean(1)
    counted = mask.expand_as(error).flatten(1).to(error.dtype)
    return (error.flatten(1) * counted).sum(1) / counted.sum(1)
