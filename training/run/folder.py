"""A run's folder: its config, its checkpoints, and whether a run can be resumed in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rf_core.numbered import numbered
from rf_core.weights.files import read_json
from rf_core.writing import write_text

from .checkpointing import delete, is_complete
from .config import RECIPE, difference, differences, from_json, recipe_to_json
from .distributed import barrier, broadcast_from_rank_0, rank

T = TypeVar("T")
CONFIG, STUDENT, LORA = "config.json", "student.safetensors", "lora.safetensors"
TEACHER, CONTROL = "teacher.safetensors", "control.safetensors"


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints of a run's folder, by update."""
    return [(update, path) for update, path in numbered(out, _name) if is_complete(path)]


def checkpoint_path(out: Path, update: int) -> Path:
    """Where the checkpoint of an update goes."""
    return out / _name(update)


def is_saved(out: Path, update: int) -> bool:
    """Whether there is a checkpoint of an update, as the first process sees it."""
    return broadcast_from_rank_0(is_complete(checkpoint_path(out, update)))


def _name(update: int) -> str:
    return f"update_{update:06}"


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on."""

    checkpoint: Path
    changes: Mapping[str, tuple[Any, Any]]
    """Fields of the config that are others from here on, with both values."""


def checkpoint_to_resume(config: Any, out: Path, resume: bool) -> Resumed | None:
    """The newest checkpoint in `out`, or None where the run starts from the beginning.

    ValueError where the folder belongs to another recipe, where it holds a run and `resume` is
    False, where the config differs in more than `config.may_change`, and where it holds weights
    but no checkpoint: they would be taken for those of the new run.
    """
    check_recipe(config, out)
    saved, weights = broadcast_from_rank_0((checkpoints(out), saved_weights(out)))
    if not saved and weights:
        raise ValueError(
            f"{out} holds {weights[0]} and no checkpoint, so its run cannot be "
            "resumed; move it away, or choose another folder"
        )
    if not saved:
        return None
    if not resume:
        raise ValueError(
            f"{out} holds a run at update {saved[-1][0]}; --resume it or choose another"
        )
    before = read_config(type(config), out)
    mismatch = difference(before, config, config.may_change)
    if mismatch is not None:
        raise ValueError(
            f"{mismatch}, where {out} holds the other run; choose another folder, or --resume "
            "without --preset and --config to go on with its own. What may change: "
            f"{', '.join(config.may_change)}"
        )
    return Resumed(saved[-1][1], differences(before, config))


def check_recipe(config: Any, out: Path) -> None:
    """ValueError where the folder holds the config of another recipe: it belongs to one run."""
    if (out / CONFIG).exists():
        try:
            read_config(type(config), out)
        except ValueError as error:
            raise ValueError(
                f"{out} belongs to a run that is none of {config.recipe}; choose another folder "
                f"({error})"
            ) from None


def read_config(kind: type[T], out: Path) -> T:
    """The config that a run was started with; a ValueError names its file."""
    path = out / CONFIG
    try:
        return from_json(kind, path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def recipe_of(out: Path) -> str:
    """The recipe of a folder's run; ValueError where there is none.

    Folders of before they named it are known by a field.
    """
    path = out / CONFIG
    if not path.exists():
        raise ValueError(f"{out} holds no run, as it has no {CONFIG}; name a run's folder")
    fields = read_json(path)
    known = {"run": "re_dmd", "pairs": "ode_init", "phases": "teacher", "stored": "ode_pairs"}
    found = [fields.get(RECIPE), *(known[name] for name in known if name in fields)]
    if not any(found):
        raise ValueError(f"{path} is the config of no recipe")
    return next(each for each in found if each)


def create_run_folder(config: Any, out: Path) -> None:
    """Create the folder and write the config, after every process has checked what was there."""
    barrier()
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / CONFIG, recipe_to_json(config) + "\n")


def delete_old_checkpoints(out: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    if rank() == 0:
        for _, old in checkpoints(out)[:-keep]:
            delete(old)


def saved_weights(out: Path) -> list[str]:
    """Names of the weight files in a run's folder."""
    return [name for name in (TEACHER, STUDENT, LORA, CONTROL) if (out / name).exists()]


@contextmanager
def name_last_checkpoint_on_error(out: Path, update: int) -> Iterator[None]:
    """Add the last good checkpoint to the message of a run that diverges in an update.

    Good is one that a whole update followed: a checkpoint's own weights may be what broke the
    next. Losses, weights and gradients that are not finite become a FloatingPointError; other
    errors pass through.
    """
    try:
        yield
    except FloatingPointError as error:
        good = [path for at, path in checkpoints(out) if at < update]
        where = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint is good"
        raise FloatingPointError(f"{error}; {where}") from None
