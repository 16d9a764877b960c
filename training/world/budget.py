"""The budget of a run in steps and minutes, and the learning rate scheduled over it.

The miniature world trains on whatever machine is at hand, so a run ends when its steps or its
minutes are spent, whichever comes first, and the cosine falls to its end just then.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of a run; at least one is set."""

    steps: int | None = None
    """Optimiser steps, or None for no limit."""
    minutes: float | None = None
    """Wall-clock minutes, or None for no limit."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises."""

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("a run without --steps and --minutes would never end; give one")
        if min(self.steps or 1, self.minutes or 1) <= 0:
            raise ValueError(f"steps {self.steps} and minutes {self.minutes} must be positive")

    def spent(self, step: int, seconds: float) -> float:
        """The share of the budget that is used up, 1 or more when it is over."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(by_steps, by_time)

    def learning_rate(self, step: int, spent: float) -> float:
        """Factor on the peak rate: a linear rise, then a cosine down to a hundredth."""
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return rise * (0.01 + 0.99 * (1 + math.cos(math.pi * min(spent, 1.0))) / 2)


def run(budget: Budget, optimisers: list[torch.optim.Optimizer]) -> Iterator[tuple[int, float]]:
    """Yield (step, share spent) until the budget is over, with each learning rate set.

    The caller computes gradients in the body of its loop; steps are taken when it comes back.
    """
    peaks = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
    start, step = time.monotonic(), 0
    while (spent := budget.spent(step, time.monotonic() - start)) < 1:
        factor = budget.learning_rate(step, spent)
        for optimiser, rates in zip(optimisers, peaks, strict=True):
            for group, peak in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = peak * factor
        yield step, spent
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        step += 1


class Periodic:
    """A timer that is true once every so many minutes, first after one period."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.period, self.clock = 60 * minutes, clock
        self.last = clock()

    def __call__(self) -> bool:
        """Whether a period has passed since it was last true."""
        if self.clock() - self.last < self.period:
            return False
        self.last = self.clock()
        return True
