"""Checkpoints to go on from: torch's distributed checkpoints, of tensors alone.

Written by any number of processes and read by any other. Their index is a pickle, which PyTorch
reads without a guard; here it may name the few classes of an index and nothing else, and a
checkpoint holds no other object: opening one runs no code of its author's.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import metadata as index_classes
from torch.distributed.checkpoint.filesystem import FileSystemReader

from rf_core.writing import WriteError

from .distributed import barrier, rank

_log = logging.getLogger(__name__)
_INDEX = ".metadata"
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": set(dir(index_classes)),
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath"},
}


def save(state: Mapping[str, Any], folder: Path) -> None:
    """Write a nested dictionary of tensors; `folder` is complete once it exists.

    What else bears its name is somebody's, and moved aside. WriteError for a full disk.
    """
    unfinished = folder.with_name(f"{folder.name}.partial")
    if rank() == 0:
        _forget(unfinished)  # of a run that was killed in here, with more processes perhaps
    barrier()
    try:
        with _quiet():
            dcp.save(dict(state), checkpoint_id=unfinished, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:
        _raise_unwritten(folder, unfinished, error)
    if rank() == 0:
        _move_aside(folder)
        unfinished.rename(folder)
    barrier()


def is_whole(folder: Path) -> bool:
    """Whether a folder is a checkpoint, and all of it is there: its index is written last."""
    return not folder.is_symlink() and (folder / _INDEX).is_file()


def delete(folder: Path) -> None:
    """Delete a checkpoint; a kill in here leaves nothing that passes for one."""
    (folder / _INDEX).unlink()
    _forget(folder)


def _raise_unwritten(folder: Path, unfinished: Path, error: dcp.CheckpointException) -> NoReturn:
    # It holds every process' failure, and is no Exception. PyTorch's writer says of a full disk
    # that its position in the file is unexpected.
    failures = [failure for failure, _ in error.failures.values()]
    for failure in failures:
        if not isinstance(failure, OSError) and "inline_container" not in str(failure):
            raise error
    if rank() == 0:
        _forget(unfinished)
    known = [each.strerror for each in failures if isinstance(each, OSError) and each.strerror]
    raise WriteError(
        f"{folder} could not be written ({known[0] if known else 'as on a full disk'}); make room, "
        "and --resume from the checkpoint before"
    ) from error


def _forget(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _move_aside(path: Path) -> None:
    if not os.path.lexists(path):
        return
    places = (path.with_name(f"{path.name}.other{number or ''}") for number in count())
    aside = next(place for place in places if not os.path.lexists(place))
    path.rename(aside)
    _log.warning("%s is no checkpoint of this run and now %s", path, aside.name)


def load(state: dict[str, Any], folder: Path) -> None:
    """Fill the tensors of `state` from a checkpoint; ValueError where it is none."""
    _index(folder)
    with _quiet():
        dcp.load(state, storage_reader=_Reader(folder), no_dist=not dist.is_initialized())


def read_part(folder: Path, part: str) -> dict[str, Tensor]:
    """The tensors under `part`, such as `average`, whole and by name, without a process group."""
    every = _index(folder).state_dict_metadata
    found = {
        name.removeprefix(f"{part}."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in every.items()
        if name.startswith(f"{part}.")
    }
    if not found:
        raise ValueError(f"{folder} holds no {part}")
    with _quiet():
        dcp.load({part: found}, storage_reader=_Reader(folder), no_dist=True)
    return found


def _index(folder: Path) -> index_classes.Metadata:
    if not is_whole(folder):
        raise ValueError(f"{folder} is no checkpoint of a run")
    return _Reader(folder).read_metadata()


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
            if not is_dtype:
                raise ValueError(f"a checkpoint's index names {module}.{name}, which is refused")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> index_classes.Metadata:
        with (Path(self.path) / _INDEX).open("rb") as file:
            found: index_classes.Metadata = _IndexUnpickler(file).load()
        if found.storage_meta is None:
            found.storage_meta = index_classes.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found
