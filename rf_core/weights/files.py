"""Files of tensors, whatever their container: safetensors, torch files, and shards in a folder.

What a file is follows from its first bytes, not from its name, so that a truncated download, an
error page saved under a checkpoint's name or a pickle of arbitrary objects ends in one clear
sentence. Tensors stay memory-mapped where the container allows it; nothing is ever unpickled
without `weights_only`.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin")
AGAIN = "download or copy it again"

_SHARD = re.compile(r"^(?P<stem>.+)-\d+-of-(?P<count>\d+)(?P<suffix>\.\w+)$")
_ZIP = b"PK\x03\x04"
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's pickled magic number
_OTHER_FILES = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GGUF": "a GGUF file, whose quantised weights are not supported",
    b"version https://git-lfs": "a git-lfs pointer; fetch the file itself with `git lfs pull`",
    b"<!DOCTYPE": "a web page, saved in place of the file",
    b"<html": "a web page, saved in place of the file",
    b"\x80": "a Python pickle, which may run code; have it saved as safetensors where it was made",
}


class CheckpointError(ValueError):
    """A file that cannot be used, with the path, what is wrong and what to do about it."""


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
        container, shard, header = _read_file(file)
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
    except ValueError as error:
        raise CheckpointError(f"{path}: holds JSON that cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds JSON that is no object: {str(text)[:40]!r}")
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


def _read_file(path: Path) -> tuple[str, dict[str, Tensor], dict[str, str]]:
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError(f"{path}: is empty; {AGAIN}")
    if head[4:9] == b"\0\0\0\0{":  # a header's length, then the header
        return "safetensors", *_read_safetensors(path)
    if head.startswith(_ZIP) or head.startswith(_LEGACY_TORCH):
        return "torch file", dict(_flatten(_read_torch(path, head.startswith(_ZIP)))), {}
    kind = next((kind for magic, kind in _OTHER_FILES.items() if head.startswith(magic)), None)
    raise CheckpointError(
        f"{path}: is not a checkpoint but {kind}"
        if kind is not None
        else f"{path}: is not a checkpoint (it begins with {head[:8]!r}); give a safetensors or "
        "torch file"
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    promised, size = _safetensors_size(path), path.stat().st_size
    if size != promised:
        what = "truncated" if size < promised else "damaged"
        raise CheckpointError(
            f"{path}: is {what}: it has {size:,} bytes where its header promises {promised:,}; "
            f"{AGAIN}"
        )
    with safe_open(path, framework="pt", device="cpu") as file:  # maps the file, copies nothing
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _safetensors_size(path: Path) -> int:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if 8 + length > path.stat().st_size:
            raise CheckpointError(f"{path}: is truncated within its header; {AGAIN}")
        text = file.read(length)
    try:
        header = json.loads(text)
        ends = [v["data_offsets"][1] for key, v in header.items() if key != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: has a damaged safetensors header; {AGAIN}") from error
    return int(8 + length + max(ends, default=0))


def _read_torch(path: Path, zipped: bool) -> object:
    if zipped and not zipfile.is_zipfile(path):  # the directory stands at a zip file's end
        raise CheckpointError(f"{path}: is a truncated torch file; {AGAIN}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path}: holds a Python object ({found[1] if found else 'of an unknown kind'}) beside "
            "tensors, which may run code and is not unpickled; have it saved as safetensors"
        ) from error
    except (RuntimeError, EOFError, struct.error, IndexError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: is truncated or not a torch checkpoint; {AGAIN}") from error


def _flatten(tree: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree.detach()
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flatten(value, f"{path}.{key}" if path else str(key))


def shorten(names: list[str], limit: int = 4) -> str:
    """The first few names, the rest counted."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
