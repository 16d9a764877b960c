"""The reward's own gradient beside distribution matching: what moves the optimum.

A weight on the matching loss scales a direction that is 0 at the teacher's distribution q, and so
leaves the fixed point there. What is wanted is the tilted one (RTDMD, arXiv 2605.26108):

    KL(p || q exp(lambda r) / Z) = KL(p || q) - lambda E_p[r] + log Z
    matching steps down E_t[w_t log(p_t / q_t)](x), with w_t = (sigma / alpha)^2 / (n m)
    less beta r, it rests at E_t[w_t log(p_t / q_t)] = beta r + c: lambda = beta / E_t[w_t] or more

Here n is how many numbers of a sample count, m its mean |x - real|, and alpha = 1 - sigma. So beta
is in units of the matching loss for one of the reward, and not in nats as lambda: the same beta is
more nats for larger samples, and where noise hides what the reward sees: p_t / q_t is 1 there, and
holds nothing back.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Tilt(Protocol):
    """A differentiable reward of a micro-batch."""

    def __call__(self, x0: Tensor, window: int, mask: Tensor | None, /) -> tuple[Tensor, Tensor]:
        """Rewards [B] of a window's clean latents [B, C, F, h, w], and their gradient by these.

        `mask` is true where latents carry gradient, None for all; the gradient is 0 elsewhere.
        """
        ...

    def note(self, matching: Tensor, tilting: Tensor, /) -> None:
        """Note both parts of the loss' gradient by the latents, for the log."""
        ...


def tilted(
    losses_B: Tensor,
    latents: Tensor,
    x0: Tensor,
    window: int,
    mask: Tensor | None,
    beta: float,
    tilt: Tilt,
) -> Tensor:
    """The losses less beta times the rewards of x0, [B], with the gradient of both by `latents`.

    Of the reward its gradient alone joins the graph: what a decoder keeps for it is gone by then.
    """
    (matching,) = torch.autograd.grad(losses_B.sum(), latents, retain_graph=True)
    rewards_B, slopes = tilt(x0, window, mask)
    tilt.note(matching, beta * slopes)
    moved = ((latents - latents.detach()) * slopes).flatten(1).sum(1)
    return losses_B - beta * (rewards_B.to(losses_B) + moved)
