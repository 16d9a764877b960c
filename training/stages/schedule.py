"""The schedule and window that a student was made for, beside those that a run trains it at.

A student streams well at the timesteps, and through the window, that it was trained at. Its file
says which; a run that is begun from a preset takes them, and one that is told others says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rf_core.config import CacheConfig, SamplerConfig
from rf_core.weights.checkpoint import read_checkpoint

from .recipes import DistilConfig, student_path

WINDOW = ("window_frames", "sink_frames", "chunk_frames")
"""Of the cache, what weights depend on: how its sink is kept is the run's own."""
STEPS = ("steps", "shift")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a student streams."""

    cache: CacheConfig
    sampler: SamplerConfig

    def of_file(self, path: Path) -> Schedule:
        """This one, with the window and the steps that a student's file has in its metadata."""
        found = read_checkpoint(path)  # sizes and metadata: no weight
        window = _fields(found.cache, WINDOW) if "cache" in found.recorded else {}
        steps = _fields(found.sampler, STEPS) if "sampler" in found.recorded else {}
        return Schedule(cache=replace(self.cache, **window), sampler=replace(self.sampler, **steps))

    def differences(self, other: Schedule) -> list[tuple[str, Any, Any]]:
        """Names of what differs, with this one's value and the other's."""
        pairs = [(name, self.cache, other.cache) for name in WINDOW]
        pairs += [(name, self.sampler, other.sampler) for name in STEPS]
        return [
            (f"{'cache' if name in WINDOW else 'sampler'}.{name}", ours, theirs)
            for name, mine, its in pairs
            if (ours := getattr(mine, name)) != (theirs := getattr(its, name))
        ]


def with_schedule_of_student(config: DistilConfig) -> DistilConfig:
    """The run at the steps, and through the window, of the student that it begins with.

    ValueError where the run's latents do not fit them.
    """
    path = student_path(config)
    if not path.exists():  # which is told where the file is wanted
        return config
    schedule = schedule_of(config).of_file(path)
    redmd = replace(config.run.redmd, cache=schedule.cache, sampler=schedule.sampler)
    try:
        return replace(config, run=replace(config.run, redmd=redmd))
    except ValueError as error:
        raise ValueError(
            f"{path} streams through {schedule.cache}, which the run takes from it: {error}"
        ) from None


def schedule_of(config: DistilConfig) -> Schedule:
    """How the student of a distillation streams."""
    return Schedule(cache=config.run.redmd.cache, sampler=config.run.redmd.sampler)


def notes_on_schedule(run: Schedule, path: Path) -> list[str]:
    """What a run does otherwise than the student it begins with, a line each."""
    return [
        f"warning: {path} was made for {name} {theirs}; this run trains it at {ours}, as it is told"
        for name, ours, theirs in run.differences(run.of_file(path))
    ]


def _fields(config: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}
