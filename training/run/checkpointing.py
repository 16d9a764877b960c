"""Checkpoints to resume from: torch's distributed checkpoints, of tensors alone.

Written by any number of processes and read by any other. PyTorch would unpickle the index, and
what else a checkpoint holds beside tensors, without a guard; here `index` reads the one, and there
is nothing else: opening a checkpoint runs no code of its author's.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future
from torch.utils._pytree import tree_leaves

from rf_core.memory.plan import GB
from rf_core.writing import WriteError

from .distributed import barrier, broadcast_from_rank_0, rank
from .index import INDEX, narrow_tensor, read_chunk, read_index

_log = logging.getLogger(__name__)


def save(state: Mapping[str, Any], folder: Path) -> None:
    """Write a nested dictionary of tensors; `folder` is complete once it exists.

    A checkpoint of that name is replaced; anything else is renamed, not deleted. WriteError for a
    full disk.
    """
    unfinished = folder.with_name(f"{folder.name}.partial")
    if rank() == 0:
        _delete_folder(unfinished)  # of a run that was killed in here, with more processes perhaps
    _require_room(folder, sum(map(_nbytes, tree_leaves(dict(state)))))
    try:
        with _without_warnings():
            dcp.save(dict(state), checkpoint_id=unfinished, no_dist=not dist.is_initialized())
    except BaseException as error:
        if rank() == 0:
            _delete_folder(unfinished)
        if isinstance(error, dcp.CheckpointException):
            _raise_write_error(folder, error)
        raise
    if rank() == 0:
        before = folder.with_name(f"{folder.name}.before")
        if is_complete(folder):
            _delete_folder(before)
            folder.rename(before)
        _move_aside(folder)
        unfinished.rename(folder)
        _delete_folder(before)
    barrier()


def is_complete(folder: Path) -> bool:
    """Whether a folder is a complete checkpoint; its index is written last."""
    return not folder.is_symlink() and (folder / INDEX).is_file()


def delete(folder: Path) -> None:
    """Delete a checkpoint. If this is interrupted, what is left is not taken for a checkpoint."""
    (folder / INDEX).unlink()
    _delete_folder(folder)


def _require_room(folder: Path, needed: int) -> None:
    free = broadcast_from_rank_0(shutil.disk_usage(folder.parent).free)
    if free < needed:
        raise WriteError(
            f"{folder} takes {needed / GB:.2f} GB, and {free / GB:.2f} GB are free; make room, and "
            "--resume from the checkpoint before"
        )


def _nbytes(value: Any) -> int:
    return value.numel() * value.itemsize if isinstance(value, Tensor) else 0


def _raise_write_error(folder: Path, error: dcp.CheckpointException) -> NoReturn:
    # The error holds every process' failure and is no Exception. On a full disk, PyTorch's writer
    # reports an unexpected position in the file.
    failures = [failure for failure, _ in error.failures.values()]
    for failure in failures:
        if not isinstance(failure, OSError) and "inline_container" not in str(failure):
            raise error
    known = [each.strerror for each in failures if isinstance(each, OSError) and each.strerror]
    raise WriteError(
        f"{folder} could not be written ({known[0] if known else 'as on a full disk'}); make room, "
        "and --resume from the checkpoint before"
    ) from error


def _delete_folder(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _move_aside(path: Path) -> None:
    if not os.path.lexists(path):
        return
    places = (path.with_name(f"{path.name}.other{number or ''}") for number in count())
    aside = next(place for place in places if not os.path.lexists(place))
    path.rename(aside)
    _log.warning("%s is no checkpoint of this run and now %s", path, aside.name)


def holds(folder: Path, name: str) -> bool:
    """Whether a checkpoint has a tensor of that name; ValueError where it is none."""
    return name in _index(folder).state_dict_metadata


def load(state: dict[str, Any], folder: Path) -> None:
    """Fill the tensors of `state` from a checkpoint; ValueError where it does not fit."""
    reader = _Reader(folder, _index(folder))
    try:
        with _without_warnings():
            dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:  # every process' failure, and no Exception
        failures = [failure for failure, _ in error.failures.values()]
        if not all(isinstance(each, ValueError | RuntimeError) for each in failures):
            raise
        raise ValueError(f"{folder} cannot be resumed from: {failures[0]}") from error


def read_part(folder: Path, part: str) -> dict[str, Tensor]:
    """The full tensors under `part`, such as `average`, by name; needs no process group."""
    index = _index(folder)
    found = {
        name.removeprefix(f"{part}."): _read_whole(folder, index, name)
        for name in index.state_dict_metadata
        if name.startswith(f"{part}.")
    }
    if not found:
        raise ValueError(f"{folder} holds no {part}")
    return found


def _index(folder: Path) -> Metadata:
    if not is_complete(folder):
        raise ValueError(f"{folder} is no checkpoint of a run")
    return read_index(folder)


def _read_whole(folder: Path, index: Metadata, name: str) -> Tensor:
    entry = index.state_dict_metadata[name]
    whole = torch.empty(entry.size, dtype=entry.properties.dtype)
    for chunk in entry.chunks:
        part = read_chunk(folder, index, name, chunk.offsets)
        narrow_tensor(whole, chunk.offsets, chunk.sizes).copy_(part)
    return whole


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _Reader(FileSystemReader):
    """PyTorch's reader, without its own ways of opening what a file holds."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = replace(index, storage_meta=StorageMeta(load_id=self.load_id))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            name, offset = item.storage_index.fqn, item.storage_index.offset
            chunk = read_chunk(Path(self.path), self._index, name, offset)
            target = planner.resolve_tensor(item).detach()
            target.copy_(narrow_tensor(chunk, item.storage_offsets, item.lengths))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done
