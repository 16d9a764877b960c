"""Results of the claims: one file, and the statistics of what is in it.

Intervals are 95 % bootstraps over training seeds and prompts together; differences are paired: the
same seed, prompt and noise in both arms. With one seed they are over prompts alone, and say nothing
of what another seed would give.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rf_core.weights.files import read_json
from rf_core.writing import write_text

from .arms import ARMS, Arm
from .plan import Setting, reference_name, result_name

Result = Mapping[str, Any]
Results = dict[str, Result]
Row = Callable[[Result], Sequence[float | None]]
"""A measure of every video of a result."""
RESAMPLES = 2000
_FILE = "results.json"
_ABOUT = "about"  # its key beside the results: the setting they are of


def read_results(setting: Setting) -> Results:
    """What is there, by name; ValueError where it is of another setting."""
    path = setting.out / _FILE
    if not path.exists():
        return {}
    found = read_json(path)
    about, mine = found.pop(_ABOUT), _about(setting)
    if about != mine:
        raise ValueError(
            f"{path} holds results of {about}, and this is {mine}; choose another --out"
        )
    return found


def write_results(setting: Setting, results: Results) -> None:
    """Replace the file."""
    write_text(setting.out / _FILE, json.dumps({_ABOUT: _about(setting), **results}))


def _about(setting: Setting) -> dict[str, str]:
    return {"size": setting.size, "world": setting.world, "networks": setting.networks.name}


def results_of(results: Results, arm: Arm) -> list[Result]:
    """An arm's results, one a seed."""
    seeds = range(len(results))
    return [results[name] for seed in seeds if (name := result_name(arm, seed)) in results]


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval."""

    mean: float
    low: float
    high: float

    @property
    def is_null(self) -> bool:
        """Whether zero is within."""
        return self.low <= 0 <= self.high

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def signed(self) -> str:
        """As a difference; of a null, the size from which an effect is excluded."""
        text = f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
        return f"{text} < {max(abs(self.low), abs(self.high)):.3f}" if self.is_null else text


def estimate(values_SN: np.ndarray) -> Estimate:
    """Mean over seeds and prompts, where they are numbers, with its interval."""
    rng, (seeds, prompts) = np.random.default_rng(0), values_SN.shape
    rows = rng.integers(seeds, size=(RESAMPLES, seeds, 1))
    columns = rng.integers(prompts, size=(RESAMPLES, 1, prompts))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of resamples that hold no number
        means = np.nanmean(values_SN[rows, columns], axis=(1, 2))
        low, high = np.nanquantile(means, (0.025, 0.975))
        return Estimate(float(np.nanmean(values_SN)), float(low), float(high))


def level(results: Sequence[Result], row: Row) -> Estimate:
    """A measure of an arm, over its seeds."""
    return estimate(_values([row(result) for result in results]))


def difference(results: Results, arm: Arm, row: Row) -> Estimate | None:
    """A measure less that of the arm it is compared with, seed by seed; None without any pair."""
    if arm.against is None:
        return None
    base = {r["seed"]: r for r in results_of(results, base_of(arm))}
    both = [(r, base[r["seed"]]) for r in results_of(results, arm) if r["seed"] in base]
    if not both or not row(both[0][0]):
        return None
    return estimate(_values([row(r) for r, _ in both]) - _values([row(b) for _, b in both]))


def base_of(arm: Arm) -> Arm:
    """The arm that one is compared with."""
    return next(
        each
        for each in ARMS.values()
        if (each.study, each.start, each.name) == (arm.study, arm.start, arm.against)
    )


def reference(results: Results, study: str, what: str) -> Result | None:
    """What arms of a study stand beside."""
    return results.get(reference_name(study, what))


def _values(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    return np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=float)
