"""A run's folder: its config, its checkpoints, and whether a run can be resumed in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rf_core.numbered import numbered
from rf_core.writing import write_text

from .checkpointing import delete, is_complete
from .config import difference, from_json, to_json
from .distributed import barrier, broadcast_from_rank_0, rank

T = TypeVar("T")
CONFIG, STUDENT, LORA = "config.json", "student.safetensors", "lora.safetensors"
TEACHER = "teacher.safetensors"


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints of a run's folder, by update."""
    return [(update, path) for update, path in numbered(out, _name) if is_complete(path)]


def checkpoint_path(out: Path, update: int) -> Path:
    """Where the checkpoint of an update goes."""
    return out / _name(update)


def _name(update: int) -> str:
    return f"update_{update:06}"


def checkpoint_to_resume(config: Any, out: Path, resume: bool) -> Path | None:
    """The newest checkpoint in `out`, or None where the run starts from the beginning.

    ValueError where the folder holds a run and `resume` is False or the config differs, and where
    it holds weights but no checkpoint: they would be taken for those of the new run.
    """
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
    mismatch = difference(before, config)
    if mismatch is not None:
        raise ValueError(
            f"{out} was begun with another config: {mismatch}; "
            f"--resume it with --config {out / CONFIG}"
        )
    return saved[-1][1]


def read_config(kind: type[T], out: Path) -> T:
    """The config that a run was started with; a ValueError names its file."""
    path = out / CONFIG
    try:
        return from_json(kind, path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def create_run_folder(config: Any, out: Path) -> None:
    """Create the folder and write the config, after every process has checked what was there."""
    barrier()
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / CONFIG, to_json(config) + "\n")


def delete_old_checkpoints(out: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    if rank() == 0:
        for _, old in checkpoints(out)[:-keep]:
            delete(old)


def saved_weights(out: Path) -> list[str]:
    """Names of the weight files in a run's folder."""
    return [name for name in (TEACHER, STUDENT, LORA) if (out / name).exists()]


@contextmanager
def name_last_checkpoint_on_error(out: Path) -> Iterator[None]:
    """Add the last good checkpoint to the message of a run that diverges.

    Losses and gradients that are not finite become a FloatingPointError; others pass through.
    """
    try:
        yield
    except (FloatingPointError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "non-finite" not in str(error):
            raise
        good = checkpoints(out)
        where = f"the last good checkpoint is {good[-1][1]}" if good else "there is no checkpoint"
        raise FloatingPointError(f"{error}; {where}") from None
