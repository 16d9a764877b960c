"""The schedule and window that a student was made for, beside those that a run trains it at.

A student streams well at the timesteps, and through the window, that it was trained at. Its file
says which, or else its family does (`rf_core.families`); a run that is begun from a preset takes
them, and one that is told others says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rf_core.config import CacheConfig, SamplerConfig
from rf_core.families import AUTO
from rf_core.weights.checkpoint import Checkpoint, read_checkpoint

from ..run.config import apply_overrides
from .recipes import DistilConfig, student_path

WINDOW = (
    *("window_frames", "anchor_frames", "sink_frames", "chunk_frames", "first_chunk_frames"),
    *("positions", "memory_rates", "recache", "rebuild", "blend_holds"),
)
"""Of the cache, what weights depend on: how its sink is kept is the run's own."""
DECAY = "decay"
"""It is taken as well where a family keeps its sink otherwise than the run."""
STEPS = ("steps", "shift", "first_steps", "clean_timestep", "rolling")
T = TypeVar("T")
Difference = tuple[str, Any, Any]
"""A field's name, and its two values."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a student streams."""

    cache: CacheConfig
    sampler: SamplerConfig

    def of_file(self, path: Path, family: str = AUTO) -> Schedule:
        """This one, with the window and the steps that a student's file has, or its family.

        Of a file that tells neither, and of one that does not stream, this one. ValueError for a
        `family` that is none.
        """
        found = read_checkpoint(path, family=family)  # sizes and metadata: no weight
        window = _fields(found.cache, WINDOW) if _has("cache", found) else {}
        if window and found.preset.cache.decay != self.cache.decay:
            window |= _fields(found.cache, (DECAY,))
        steps = _fields(found.sampler, STEPS) if _has("sampler", found) else {}
        return Schedule(cache=replace(self.cache, **window), sampler=replace(self.sampler, **steps))

    def differences(self, other: Schedule) -> list[Difference]:
        """Names of what differs, with this one's value and the other's."""
        pairs = [(f"cache.{name}", name, self.cache, other.cache) for name in (*WINDOW, DECAY)]
        pairs += [(f"sampler.{name}", name, self.sampler, other.sampler) for name in STEPS]
        return [
            (path, ours, theirs)
            for path, name, mine, its in pairs
            if (ours := getattr(mine, name)) != (theirs := getattr(its, name))
        ]


def with_schedule_of_student(config: DistilConfig, settings: Sequence[str] = ()) -> DistilConfig:
    """The run at the steps, and through the window, of the student that it begins with.

    `settings` are the `--set` of its command line, which come last. Where chunks are of another
    length, teacher and critic see as many frames as before. ValueError where the run cannot have
    what it takes.
    """
    path, own = student_path(config), schedule_of(config)
    if not path.exists():  # which is told where the file is wanted
        return config
    taken = own.of_file(path, config.files.family).differences(own)
    frames = config.run.redmd.window_chunks * own.cache.chunk_frames
    for name, chunk, _ in taken:
        if name == "cache.chunk_frames":
            settings = [f"run.redmd.window_chunks={max(1, frames // chunk)}", *settings]
    return with_taken(config, path, taken, settings, "run.redmd.")


def with_taken(
    config: T, path: Path, taken: Sequence[Difference], settings: Sequence[str], at: str = ""
) -> T:
    """The config with what it takes from a student's file, `at` a path in it, then its settings."""
    values = [f"{at}{name}={json.dumps(value)}" for name, value, _ in taken]
    try:
        return apply_overrides(config, [*values, *settings])
    except ValueError as error:
        window = ", ".join(f"{name} {value}" for name, value, _ in taken)
        raise ValueError(
            f"{path} streams through {window}, which the run takes from it: {error}"
        ) from None


def schedule_of(config: DistilConfig) -> Schedule:
    """How the student of a distillation streams."""
    return Schedule(cache=config.run.redmd.cache, sampler=config.run.redmd.sampler)


def notes_on_taken(
    taken: Sequence[Difference], path: Path, family: str = AUTO, field: str = "files.family"
) -> list[str]:
    """What a run took from its student's file, a line each; from its family, in one.

    `field` is the config's that names the family.
    """
    if not taken:
        return []
    found, lines, preset = read_checkpoint(path, family=family), [], []
    for name, ours, _ in taken:
        if name.partition(".")[0] in found.recorded:
            lines.append(f"{name} is {ours}, as {path} says")
        else:
            preset.append(f"{name} {ours}")
    if preset:
        told = f"{found.preset.title}'s, {found.told.because} ({field})"
        lines.append(f"{path} is {told}, so the run has {', '.join(preset)}")
    return lines


def notes_on_family(path: Path, family: str = AUTO) -> list[str]:
    """What is assumed of a student whose file does not tell its family."""
    found = read_checkpoint(path, family=family)
    if found.family_from != "nothing":
        return []
    return [f"{path} is taken for {found.preset.title}'s, {found.told.because} (files.family)"]


def notes_on_schedule(run: Schedule, path: Path, family: str = AUTO) -> list[str]:
    """What a run does otherwise than the student it begins with, a line each."""
    return [
        f"warning: {path} was made for {name} {theirs}; this run trains it at {ours}, as it is told"
        for name, ours, theirs in run.differences(run.of_file(path, family))
        if name != f"cache.{DECAY}"
    ]


def _has(name: str, found: Checkpoint) -> bool:
    """Whether a file has a cache, or steps, of its own or of a family that is known."""
    is_known = found.family_from not in ("metadata", "nothing")
    return getattr(found, name) is not None and (name in found.recorded or is_known)


def _fields(config: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}
