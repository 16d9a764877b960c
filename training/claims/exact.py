"""Why a weight on the matching loss cannot shift its optimum, and what can: one exact dimension.

The teacher q is a mixture of a slow mode and a fast one, and the reward is speed itself, so the
tilted teacher q exp(beta r) is such a mixture too. Nothing is learnt but the student: it is
particles, which may go anywhere (capacity without limit), or one Gaussian (too little of it). The
scores of critic and teacher at every noise level are closed forms, expectations over noise are
quadrature, all in float64. The critic has always converged.

An update is the trainer's: each sample steps against fake - real, averaged over noise levels; the
trainer's division by mean |x - real| is left out, as a sample is but one number here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from types import MappingProxyType
from typing import Any

import numpy as np

from rf_core.writing import write_text

Array = np.ndarray[Any, np.dtype[np.float64]]

BETA = 2.0
"""The published strength of the weights, exp(2 r), and so of the tilt, in nats a unit of speed."""
LEVELS = (0.05, 0.1)
"""Noise levels sigma at which scores are compared."""
RATE = 1.0
EVERY = 20
"""Updates between two measurements."""
PARTICLES = 64
BEST_OF = 2
_NODES, _NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(5)
_NODE_WEIGHTS = _NODE_WEIGHTS / _NODE_WEIGHTS.sum()
_GRID = np.linspace(-2.0, 4.0, 801)


@dataclass(frozen=True)
class Mixture:
    """Gaussians of given weights, means and standard deviations, [K] each; of 0, points."""

    weights: Array
    means: Array
    stds: Array

    @property
    def mean(self) -> float:
        """Of what is drawn from it."""
        return float(self.weights @ self.means)

    def noised(self, sigma: float) -> Mixture:
        """The distribution of (1 - sigma) x + sigma noise."""
        stds = np.hypot((1 - sigma) * self.stds, sigma)
        return Mixture(self.weights, (1 - sigma) * self.means, stds)

    def tilted(self, beta: float) -> Mixture:
        """In proportion to its density times exp(beta x)."""
        variances = self.stds**2
        weights = self.weights * np.exp(beta * (self.means - _largest(self.means, beta)))
        weights = weights * np.exp(beta**2 * variances / 2)
        return Mixture(weights / weights.sum(), self.means + beta * variances, self.stds)

    def density(self, x: Array) -> Array:
        """At points of any shape."""
        return self._parts(x)[0].sum(-1)

    def score(self, x: Array) -> Array:
        """The derivative of the log density."""
        parts, z = self._parts(x)
        return -(parts * z / self.stds).sum(-1) / np.maximum(parts.sum(-1), 1e-300)

    def _parts(self, x: Array) -> tuple[Array, Array]:
        z = (x[..., None] - self.means) / self.stds
        return self.weights / self.stds / np.sqrt(2 * np.pi) * np.exp(-(z**2) / 2), z


def _largest(means: Array, beta: float) -> float:
    return float(means.max() if beta > 0 else means.min())


TEACHER = Mixture(np.array([0.5, 0.5]), np.array([0.3, 1.0]), np.array([0.15, 0.15]))
TILTED = TEACHER.tilted(BETA)
START = (0.35, 0.1)
"""Mean and standard deviation of a student that has lost the fast mode."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training."""

    weights: Callable[[Array, np.random.Generator], Array] = lambda x, rng: np.ones_like(x)
    """Of sorted samples, and a mean of 1."""
    critic_beta: float = 0.0
    """The critic has learnt the samples weighted by exp(critic_beta x)."""
    reward_beta: float = 0.0
    """Nats a unit of reward, of the reward's own gradient."""


def _exponential(x: Array, rng: np.random.Generator) -> Array:
    weights = np.exp(BETA * (x - x.max()))
    return np.asarray(weights / weights.mean())


def _shuffled(x: Array, rng: np.random.Generator) -> Array:
    return rng.permutation(_exponential(x, rng))


def _best_of(x: Array, rng: np.random.Generator) -> Array:
    """How often a sample is the best of `BEST_OF`, times as many."""
    return np.asarray(BEST_OF * _quantiles(len(x)) ** (BEST_OF - 1))


def _quantiles(count: int) -> Array:
    return np.asarray((np.arange(count) + 0.5) / count)


ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        "DMD": Arm(),
        "weights exp(beta r)": Arm(weights=_exponential),
        "shuffled weights": Arm(weights=_shuffled),
        f"best of {BEST_OF}": Arm(weights=_best_of),
        "tilted critic": Arm(critic_beta=-BETA),
        "minus beta gradient": Arm(reward_beta=BETA),
    }
)


def direction(x: Array, fake: Mixture, real: Mixture, levels: Sequence[float] = LEVELS) -> Array:
    """fake - real at samples [N], the clean predictions at noised points, averaged over noise."""
    found = np.zeros_like(x)
    for sigma in levels:
        noisy = (1 - sigma) * x[:, None] + sigma * _NODES
        apart = fake.noised(sigma).score(noisy) - real.noised(sigma).score(noisy)
        found += sigma**2 / (1 - sigma) * (apart @ _NODE_WEIGHTS)
    return found / len(levels)


def worth(beta: float, levels: Sequence[float] = LEVELS) -> float:
    """beta nats in units of the matching loss: times (sigma / alpha)^2, averaged over levels.

    Exact at small noise; at more, matching holds less back, and the tilt is larger than beta.
    """
    return beta * float(np.mean([(sigma / (1 - sigma)) ** 2 for sigma in levels]))


class Particles:
    """A student that can be any distribution: sorted samples, each its own parameter."""

    updates = 1200
    """After which it no longer changes."""

    def __init__(self) -> None:
        self.samples = START[0] + START[1] * _normal(PARTICLES)

    @property
    def distribution(self) -> Mixture:
        """Of the samples."""
        return _points(self.samples, np.ones(PARTICLES))

    def tilted(self, beta: float) -> Mixture:
        """The samples weighted by exp(beta x)."""
        return _points(self.samples, np.exp(beta * (self.samples - self.samples.mean())))

    def step(self, gradient: Array) -> None:
        """Against the gradient [N] of each sample's loss."""
        self.samples = np.sort(self.samples - RATE * gradient)


class Gaussian:
    """A student that can be a Gaussian alone: a mean and a standard deviation."""

    updates = 1000
    """After which it no longer changes."""

    def __init__(self) -> None:
        self.mean, self.std = START
        self._z = _normal(PARTICLES)

    @property
    def samples(self) -> Array:
        """At even quantiles."""
        return np.asarray(self.mean + self.std * self._z)

    @property
    def distribution(self) -> Mixture:
        """The Gaussian itself."""
        return Mixture(np.ones(1), np.array([self.mean]), np.array([self.std]))

    def tilted(self, beta: float) -> Mixture:
        """The Gaussian weighted by exp(beta x)."""
        return self.distribution.tilted(beta)

    def step(self, gradient: Array) -> None:
        """Against the gradient [N] of each sample's loss."""
        self.mean -= RATE * float(gradient.mean())
        self.std -= RATE * float((gradient * self._z).mean())


def _normal(count: int) -> Array:
    normal = NormalDist()
    return np.array([normal.inv_cdf(u) for u in _quantiles(count)])


def _points(at: Array, weights: Array) -> Mixture:
    return Mixture(weights / weights.sum(), at, np.zeros_like(at))


STUDENTS: Mapping[str, type[Particles] | type[Gaussian]] = MappingProxyType(
    {"unlimited": Particles, "one Gaussian": Gaussian}
)


def divergence(p: Mixture, q: Mixture, sigma: float = LEVELS[0]) -> float:
    """KL(p || q) in nats, both noised by sigma, by quadrature."""
    density, other = p.noised(sigma).density(_GRID), q.noised(sigma).density(_GRID)
    ratio = np.log(np.maximum(density, 1e-300)) - np.log(np.maximum(other, 1e-300))
    return float(np.trapezoid(density * ratio, _GRID))


def train(
    student: Particles | Gaussian,
    arm: Arm,
    levels: Sequence[float] = LEVELS,
) -> list[dict[str, float]]:
    """Train in place; what the student is before the first update and after every so many."""
    rng, curve = np.random.default_rng(0), []
    for update in range(student.updates + 1):
        if update % EVERY == 0:
            curve.append({"update": update, **measured(student)})
        fake = student.tilted(arm.critic_beta) if arm.critic_beta else student.distribution
        samples = student.samples
        gradient = arm.weights(samples, rng) * direction(samples, fake, TEACHER, levels)
        student.step(gradient - worth(arm.reward_beta, levels))
    return curve


def measured(student: Particles | Gaussian) -> dict[str, float]:
    """Mean speed, and how far the student is from the teacher and from the tilted one, in nats."""
    p = student.distribution
    return {
        "mean_speed": p.mean,
        "kl_to_teacher": divergence(p, TEACHER),
        "kl_to_tilted": divergence(p, TILTED),
    }


def residual(arm: Arm, at: Mixture, sigma: float) -> float:
    """How far an arm's update is from 0 where the student's distribution is exactly `at`.

    The largest step of samples at its even quantiles, at one noise level, over the step that the
    reward's gradient makes: 0 at a fixed point.
    """
    cumulative = np.cumsum(at.density(_GRID))
    samples = np.interp(_quantiles(PARTICLES), cumulative / cumulative[-1], _GRID)
    fake, alone = at.tilted(arm.critic_beta), worth(BETA, [sigma])
    found = arm.weights(samples, np.random.default_rng(0)) * direction(
        samples, fake, TEACHER, [sigma]
    )
    return float(np.abs(found - worth(arm.reward_beta, [sigma])).max() / alone)


def account() -> dict[str, Any]:
    """Every arm with both students, and the gradient's tilt by the noise at which scores are
    compared."""
    curves = {
        capacity: {name: train(student(), arm) for name, arm in ARMS.items()}
        for capacity, student in STUDENTS.items()
    }
    gradient, noise = ARMS["minus beta gradient"], {}
    for levels in ((0.05,), (0.05, 0.1), (0.05, 0.1, 0.2), (0.05, 0.1, 0.2, 0.4)):
        student = Particles()
        noise[f"up to {levels[-1]}"] = train(student, gradient, levels)[-1]
    residuals = {
        name: {
            "at the teacher": residual(arm, TEACHER, 0.01),
            "at the tilted teacher": residual(arm, TILTED, 0.01),
        }
        for name, arm in ARMS.items()
    }
    return {
        "beta": BETA,
        "levels": list(LEVELS),
        "teacher": {"mean_speed": TEACHER.mean, "kl_to_tilted": divergence(TEACHER, TILTED)},
        "tilted": {"mean_speed": TILTED.mean, "kl_to_teacher": divergence(TILTED, TEACHER)},
        "residuals": residuals,
        "curves": curves,
        "gradient_by_noise": noise,
    }


def run_exact(out: Path) -> dict[str, Any]:
    """The account, also written to `out` as exact.json, exact.md and exact.svg."""
    from .exact_plot import plot, table

    out.mkdir(parents=True, exist_ok=True)
    found = account()
    write_text(out / "exact.json", json.dumps(found, indent=1) + "\n")
    write_text(out / "exact.md", table(found))
    write_text(out / "exact.svg", plot(found))
    return found
