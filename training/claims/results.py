"""Results of the claims: one file, and the statistics of what is in it.

Intervals are 95 % by Student's t of prompts and of training seeds together: each adds the variance
of its own means, which counts what is left twice and so is rather too wide. Differences are paired:
the same seed, prompt and noise in both arms. With one seed an interval is over prompts alone, and
says nothing of what another seed would give.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rf_core.weights.files import read_json
from rf_core.writing import write_text

from ..world.metric import mean_of_known
from .arms import ARMS, BESIDE, Arm
from .plan import Setting, reference_name, result_name

Result = Mapping[str, Any]
Results = dict[str, Result]
Row = Callable[[Result], Sequence[float | None]]
"""A measure of every video of a result; None or nan where there is no number."""
_STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
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
    return {"size": setting.size, "world": setting.world, "networks": setting.networks_digest}


@cache
def code_digest() -> str:
    """A short name for the code that makes results, kept with each."""
    digest, root = hashlib.blake2b(digest_size=4), Path(__file__).parents[2]
    for path in sorted(
        each for name in ("rf_core", "training") for each in (root / name).rglob("*.py")
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()


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
    seeds: int = 1

    @property
    def is_null(self) -> bool:
        """Whether zero is within, or there is no number."""
        return not (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return ""
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def signed(self) -> str:
        """As a difference; of a null over several seeds, what size of effect it excludes, but where
        no video differs: then there may be none of those that would."""
        if math.isnan(self.mean):
            return ""
        text = f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
        if not self.is_null or self.seeds < 2 or self.low == self.high:
            return text
        return f"{text} < {math.ceil(1000 * max(-self.low, self.high)) / 1000:.3f}"


def estimate(values_SN: np.ndarray) -> Estimate:
    """Mean over seeds and prompts, where they are numbers, with its interval."""
    mean = float(mean_of_known(values_SN))
    half = math.hypot(*(_half(mean_of_known(values_SN, axis)) for axis in (0, 1)))
    return Estimate(mean, mean - half, mean + half, len(values_SN))


def _half(means: np.ndarray) -> float:
    """Half an interval of the mean of means; 0 of a single one."""
    known = means[np.isfinite(means)]
    if len(known) < 2:
        return 0.0
    freedom = len(known) - 1
    quantile = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96 + 2.5 / freedom
    return float(quantile * known.std(ddof=1) / math.sqrt(len(known)))


def level(results: Sequence[Result], row: Row) -> Estimate:
    """A measure of an arm, over its seeds."""
    return estimate(np.array([row(result) for result in results], dtype=float))


def difference(results: Results, arm: Arm, row: Row) -> Estimate | None:
    """A measure less that of the arm it is compared with, seed by seed; None without any pair."""
    if arm.against is None:
        return None
    base = {r["seed"]: r for r in results_of(results, base_of(arm))}
    return _paired(
        [(r, base[r["seed"]]) for r in results_of(results, arm) if r["seed"] in base], row
    )


def change(results: Results, arm: Arm, row: Row) -> Estimate | None:
    """A measure less that of what the arm began as; None where that was not measured."""
    before = reference(results, BESIDE.get(arm.study, arm.study), arm.start)
    return _paired([(r, before) for r in results_of(results, arm) if before is not None], row)


def _paired(both: Sequence[tuple[Result, Result]], row: Row) -> Estimate | None:
    pairs = [(row(result), row(beside)) for result, beside in both]
    if not pairs or not all(pairs[0]):
        return None
    mine, theirs = np.array(pairs, dtype=float).swapaxes(0, 1)
    return estimate(mine - theirs)


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
