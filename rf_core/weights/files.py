"""Weights, wherever they lie: in a file, in shards, behind an index or in a folder.

All tensors that are read come through here; `containers` has the guards.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .containers import CheckpointError as CheckpointError
from .containers import printable, read_file
from .containers import shorten as shorten

SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin")

_SHARD = re.compile(r"^(?P<stem>.+)-\d+-of-(?P<count>\d+)(?P<suffix>\.\w+)$")


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """The tensors of one checkpoint as they lie on disk."""

    path: Path
    """The file or folder asked for."""
    container: str
    """`safetensors` or `torch file`, with the number of shards where there are several."""
    tensors: dict[str, Tensor]
    """Nested dicts become dotted names; what is not a tensor is left out."""
    metadata: dict[str, str]
    """The safetensors header's free text; empty for torch files."""
    sidecar: dict[str, Any]
    """The `config.json` of a folder or index; empty without one."""


def read_weights(path: str | Path) -> WeightFile:
    """Read a file, one of several shards, an index or a folder; CheckpointError if that fails."""
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder; check the path")
    files = _locate(path)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        container, shard, header = read_file(file)
        tensors |= shard
        metadata |= header
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors; give a checkpoint's file")
    shards = f", {len(files)} shards" if len(files) > 1 else ""
    return WeightFile(
        path=path,
        container=container + shards,
        tensors=tensors,
        metadata=metadata,
        sidecar=read_json(files[0].with_name("config.json")) if files != [path] else {},
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty without the file. CheckpointError where it is broken."""
    return parse_json(path, path.read_bytes()) if path.is_file() else {}


def parse_json(path: Path, text: str | bytes) -> dict[str, Any]:
    """A JSON object found in a file; CheckpointError where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: holds JSON that cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds JSON that is no object: {printable(str(text), 40)}")
    return value


def _locate(path: Path) -> list[Path]:
    if path.is_dir():
        return _locate_in_folder(path)
    if path.name.endswith(".index.json"):
        return _indexed(path)
    return _shards(path) if _SHARD.match(path.name) else [path]


def _locate_in_folder(folder: Path) -> list[Path]:
    for pattern in ("*.safetensors.index.json", "*.index.json"):
        if indexes := sorted(folder.glob(pattern)):
            return _indexed(_only(folder, indexes))
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    files = files or sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if not files and (folder / "transformer").is_dir():  # a diffusers pipeline
        return _locate_in_folder(folder / "transformer")
    if files and _SHARD.match(files[0].name) and (shards := _shards(files[0])) == files:
        return shards
    return [_only(folder, files)]


def _only(folder: Path, files: list[Path]) -> Path:
    if not files:
        raise CheckpointError(f"{folder}: holds no checkpoint ({', '.join(SUFFIXES)} or an index)")
    if len(files) > 1:
        names = shorten([file.name for file in files])
        raise CheckpointError(f"{folder}: holds several checkpoints ({names}); name one of them")
    return files[0]


def _indexed(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map, so it is not an index of shards")
    names = sorted({str(name) for name in weight_map.values()})
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index}: names files outside its folder ({shorten(outside)})")
    return _present(index, [index.with_name(name) for name in names])


def _shards(shard: Path) -> list[Path]:
    match = _SHARD.match(shard.name)
    assert match is not None
    stem, count, suffix = match["stem"], match["count"], match["suffix"]
    width = len(count)
    names = [f"{stem}-{i:0{width}}-of-{count}{suffix}" for i in range(1, int(count) + 1)]
    return _present(shard, [shard.with_name(name) for name in names])


def _present(source: Path, files: list[Path]) -> list[Path]:
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{source}: {len(missing)} of its {len(files)} shards are missing "
            f"({shorten(missing)}); download them into the same folder"
        )
    return files
