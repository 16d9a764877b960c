"""A run's log: a line of JSON an update, TensorBoard, Weights & Biases.

Only the first process writes. A resumed run first drops the lines of `log.jsonl` after its
checkpoint, so that the file reads as one uninterrupted run.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rf_core.writing import write_text

from .distributed import rank

_log = logging.getLogger(__name__)
CHANGED, CHECKPOINT = "changed", "checkpoint"


@dataclass(frozen=True, kw_only=True)
class ShownVideo:
    """A video to look at."""

    path: Path
    """Its MP4; the log's name for it is that of the file."""
    prompt: str
    row: Tensor
    """Some of its images side by side, uint8 [3, H, W]: TensorBoard has videos as GIFs alone, made
    by a package that it does not come with."""


class Journal:
    """Writes the numbers of a run; use as a context manager."""

    def __init__(
        self, folder: Path, *, first_update: int, tensorboard: bool, wandb: str | None, config: Any
    ) -> None:
        self.path = folder / "log.jsonl"
        self.active = rank() == 0
        self._board = _tensorboard(folder, first_update) if self.active and tensorboard else None
        self._wandb = _wandb(wandb, folder, config) if self.active and wandb else None
        if self.active:
            _drop_from(self.path, first_update)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def write_changes(self, update: int, changes: Mapping[str, tuple[Any, Any]]) -> None:
        """What is another from an update on: fields of the config with both values."""
        if self.active and changes:
            self._append({"update": update, CHANGED: changes})

    def write_checkpoint(self, update: int, folder: Path) -> None:
        """Which checkpoint was written after an update; one before the first belongs to none."""
        if self.active and update >= 0:
            self._append({"update": update, CHECKPOINT: folder.name})

    def write(self, update: int, values: Mapping[str, float]) -> None:
        """An update's numbers, or more of them."""
        if not self.active:
            return
        self._append({"update": update, **values})
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, update)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=update)

    def write_videos(self, update: int, videos: Sequence[ShownVideo]) -> None:
        """Videos of an update: rows of images in TensorBoard, the files in Weights & Biases."""
        if self._board is not None:
            for each in videos:
                name = f"validation/{each.path.stem}"
                self._board.add_image(name, each.row.numpy(), update)
                self._board.add_text(name, each.prompt, update)
        if self._wandb is not None and videos:
            from wandb import Video

            found = {f"validation/{each.path.stem}": each for each in videos}
            self._wandb.log(
                {
                    name: Video(str(each.path), caption=each.prompt, format="mp4")
                    for name, each in found.items()
                },
                step=update,
            )

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_journal(path: Path) -> list[dict[str, Any]]:
    """What a `log.jsonl` has of each update; a line that a kill cut short is left out.

    An update may have several lines: its numbers, what was validated after it, under `CHECKPOINT`
    the checkpoint that was written after it and, under `CHANGED`, what of the config is another
    from it on.
    """
    by_update: dict[int, dict[str, Any]] = {}
    for line in _lines(path):
        by_update.setdefault(line["update"], {}).update(line)
    return list(by_update.values())


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and isinstance(found.get("update"), int):
            lines.append(found)
        else:
            _log.warning("%s: a line was cut short and is left out", path)
    return lines


def _drop_from(path: Path, update: int) -> None:
    kept = [line for line in _lines(path) if line["update"] < update]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    if path.exists() or text:
        write_text(path, text)


def _tensorboard(folder: Path, first_update: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _log.warning("tensorboard is not installed; its files are left out (pip install it)")
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_update)


def _wandb(project: str, folder: Path, config: Any) -> Any:
    try:
        import wandb
    except ImportError:
        raise ValueError(
            f"output.wandb is {project!r}, but wandb is not installed; pip install wandb"
        ) from None
    # A resumed run has the same id, and continues the same curves.
    known = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    options = {"id": known, "resume": "allow", "config": asdict(config)}
    return wandb.init(project=project, dir=str(folder), **options)
