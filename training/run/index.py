"""The index of a checkpoint, `.metadata`: which tensors there are, and where their chunks lie.

PyTorch writes it as a pickle, and a pickle is a program. Here none runs: the few instructions that
an index is made of build records of plain data, a class is no more than its name, and nothing is
imported, called or written to. What the records say is checked against the files' real bytes before
a tensor is allocated. Whatever is wrong is one sentence, a ValueError.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from rf_core.weights.containers import printable, read_tensor

INDEX = ".metadata"
_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # as Python 3.13 calls them
}
"""All that an index of tensors names beside their dtypes, seen of torch 2.11 and 2.13."""
_LARGEST, _MOST_AXES = 2**62, 8


def read_index(folder: Path) -> Metadata:
    """A checkpoint's index, of tensors alone, each of which is there; ValueError for any other."""
    try:
        found = _metadata(_records((folder / INDEX).read_bytes()))
        _require_files(folder, found)
    except _DamageError as damage:
        raise ValueError(
            f"{folder} cannot be opened: {damage}; copy it again, or take another checkpoint"
        ) from None
    return found


def read_chunk(folder: Path, index: Metadata, name: str, offsets: torch.Size) -> Tensor:
    """One chunk of a tensor, of the size and dtype its index has; ValueError for any other."""
    entry = index.state_dict_metadata[name]
    place = index.storage_data[MetadataIndex(name, offsets)]
    path = folder / place.relative_path
    found = read_tensor(path, place.offset, place.length)
    sizes = next(chunk.sizes for chunk in entry.chunks if chunk.offsets == offsets)
    if (found.shape, found.dtype) != (sizes, entry.properties.dtype):
        raise ValueError(
            f"{path} holds another tensor than {printable(name)}; copy the checkpoint again, or "
            "take another"
        )
    return found


def narrow_tensor(tensor: Tensor, offsets: torch.Size, sizes: torch.Size) -> Tensor:
    """The part of a tensor that begins at `offsets`, as a view."""
    ends = zip(offsets, sizes, strict=True)
    return tensor[tuple(slice(begin, begin + size) for begin, size in ends)]


class _DamageError(Exception):
    pass


# A pickle's instructions


class _Name(NamedTuple):
    module: str
    name: str


class _Record:
    """What would be made by calling `name`, which is not done; equal to itself alone."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments, self.state = name, arguments, None


def _records(data: bytes) -> object:
    reading = _Reading(data)
    try:
        while (code := reading.byte()) != _STOP:
            _STEPS[code](reading)
        return reading.stack.pop()
    except KeyError:
        raise _DamageError(f"its index has an instruction that none has, {code:#04x}") from None
    except (IndexError, struct.error, UnicodeDecodeError):
        raise _DamageError("its index is damaged or cut short") from None


class _Reading:
    """A stack, as pickle's machine has it; every step needs a byte of the file, so it ends."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return int(value)

    def text(self, length: int) -> str:
        begin, self.at = self.at, self.at + length
        if self.at > len(self.data):
            raise IndexError
        return self.data[begin : self.at].decode()

    def since_mark(self) -> list[Any]:
        at = self.marks.pop()
        found, self.stack[at:] = self.stack[at:], []
        return found

    def last(self, count: int) -> tuple[Any, ...]:
        if count > len(self.stack):
            raise IndexError
        found = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return found


def _push(value: Callable[[_Reading], Any]) -> Callable[[_Reading], None]:
    return lambda reading: reading.stack.append(value(reading))


def _name(reading: _Reading) -> _Name:
    module, name = reading.last(2)
    if type(module) is str and type(name) is str:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _NAMES.get(module, ()):
            return _Name(module, name)
        raise _DamageError(f"its index names {printable(f'{module}.{name}')}, which is refused")
    raise _DamageError("its index names what is no class")


def _record(reading: _Reading) -> _Record:
    name, arguments = reading.last(2)
    if type(name) is not _Name or type(arguments) is not tuple:
        raise _DamageError("its index makes something of what is no class")
    return _Record(name.name, arguments)


def _build(reading: _Reading) -> None:
    record, state = reading.last(2)
    if type(record) is not _Record:
        raise _DamageError("its index gives something a state that can have none")
    record.state = state
    reading.stack.append(record)


def _append(reading: _Reading, values: Sequence[Any]) -> None:
    if type(target := reading.stack[-1]) is not list:
        raise _DamageError("its index appends to what is no list")
    target.extend(values)


def _set(reading: _Reading, values: Sequence[Any]) -> None:
    target, keys = reading.stack[-1], values[::2]
    if type(target) is not dict or len(values) % 2:
        raise _DamageError("its index sets what it cannot")
    if any(type(key) not in (str, _Record) for key in keys):  # hashes of others may take for ever
        raise _DamageError("its index has keys that are no names")
    target.update(zip(keys, values[1::2], strict=True))


_STOP = ord(".")
_STEPS: dict[int, Callable[[_Reading], Any]] = {
    0x80: _Reading.byte,  # PROTO
    0x95: lambda r: r.number("<Q"),  # FRAME
    ord("("): lambda r: r.marks.append(len(r.stack)),
    0x94: lambda r: r.memo.append(r.stack[-1]),  # MEMOIZE
    ord("h"): _push(lambda r: r.memo[r.byte()]),
    ord("j"): _push(lambda r: r.memo[r.number("<I")]),
    ord("N"): _push(lambda r: None),
    0x88: _push(lambda r: True),
    0x89: _push(lambda r: False),
    ord("K"): _push(_Reading.byte),
    ord("M"): _push(lambda r: r.number("<H")),
    ord("J"): _push(lambda r: r.number("<i")),
    0x8A: _push(lambda r: _long(r)),
    0x8C: _push(lambda r: r.text(r.byte())),
    ord("X"): _push(lambda r: r.text(r.number("<I"))),
    ord(")"): _push(lambda r: ()),
    0x85: _push(lambda r: r.last(1)),
    0x86: _push(lambda r: r.last(2)),
    0x87: _push(lambda r: r.last(3)),
    ord("t"): _push(lambda r: tuple(r.since_mark())),
    ord("]"): _push(lambda r: []),
    ord("a"): lambda r: _append(r, r.last(1)),
    ord("e"): lambda r: _append(r, r.since_mark()),
    ord("}"): _push(lambda r: {}),
    ord("s"): lambda r: _set(r, r.last(2)),
    ord("u"): lambda r: _set(r, r.since_mark()),
    0x93: _push(_name),  # STACK_GLOBAL
    0x81: _push(_record),  # NEWOBJ
    ord("R"): _push(_record),  # REDUCE
    ord("b"): _build,
}


def _long(reading: _Reading) -> int:
    length = reading.byte()
    begin, reading.at = reading.at, reading.at + length
    return int.from_bytes(reading.data[begin : reading.at], "little", signed=True)


# What records say


def _metadata(root: object) -> Metadata:
    about = _fields(root, "Metadata")
    tensors = _mapping(about.get("state_dict_metadata"))
    places = _mapping(about.get("storage_data"))
    chunks = sum(len(_chunks(entry)) for entry in tensors.values())
    if chunks > len(places):  # one list may stand for many
        raise _DamageError("its index promises more parts than it has places for")
    return Metadata(
        state_dict_metadata={_text(name): _tensor(entry) for name, entry in tensors.items()},
        storage_data={_key(key): _place(place) for key, place in places.items()},
    )


def _tensor(entry: object) -> TensorStorageMetadata:
    about = _fields(entry, "TensorStorageMetadata")
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=_dtype(about.get("properties"))),
        size=_size(about.get("size")),
        chunks=[_chunk(each) for each in _chunks(entry)],
    )


def _chunks(entry: object) -> list[Any]:
    chunks = _fields(entry, "TensorStorageMetadata").get("chunks")
    if type(chunks) is not list:
        raise _DamageError("its index has a tensor without parts")
    return chunks


def _dtype(properties: object) -> torch.dtype:
    match properties:
        case _Record(name="TensorProperties", state=(_Name() as named, *_)):
            dtype = getattr(torch, named.name, None)
            if isinstance(dtype, torch.dtype):
                return dtype
    raise _DamageError("its index has a tensor of no dtype")


def _chunk(chunk: object) -> ChunkStorageMetadata:
    about = _fields(chunk, "ChunkStorageMetadata")
    return ChunkStorageMetadata(
        offsets=_size(about.get("offsets")), sizes=_size(about.get("sizes"))
    )


def _key(key: object) -> MetadataIndex:
    about = _fields(key, "MetadataIndex")
    return MetadataIndex(_text(about.get("fqn")), _size(about.get("offset")))


def _place(place: object) -> _StorageInfo:
    about = _fields(place, "_StorageInfo")
    if about.get("transform_descriptors"):
        raise _DamageError("its index has a file in a form that the trainer does not write")
    name = _text(about.get("relative_path"))
    if Path(name).name != name or "\\" in name or not name.isprintable():
        raise _DamageError(f"its index names a file outside its folder, {printable(name)}")
    return _StorageInfo(name, _number(about.get("offset")), _number(about.get("length")))


def _fields(record: object, name: str) -> Mapping[Any, Any]:
    if type(record) is not _Record or record.name != name or type(record.state) is not dict:
        raise _DamageError(f"its index has no {name} where there is one")
    return record.state


def _mapping(value: object) -> Mapping[Any, Any]:
    if type(value) is not dict:
        raise _DamageError("its index has no entries by name")
    return value


def _text(value: object) -> str:
    if type(value) is not str:
        raise _DamageError("its index has a name that is none")
    return value


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise _DamageError("its index has a size or place that is none")
    return value


def _size(value: object) -> torch.Size:
    match value:
        case _Record(name="Size", arguments=(tuple(numbers),)) if len(numbers) <= _MOST_AXES:
            size = torch.Size(map(_number, numbers))
            _number(math.prod(max(each, 1) for each in size))
            return size
    raise _DamageError("its index has a size or place that is none")


# What files hold


def _require_files(folder: Path, index: Metadata) -> None:
    """That every tensor is whole, and that the files have as many bytes as it promises."""
    used = 0
    files = _sizes(folder, {place.relative_path for place in index.storage_data.values()})
    for name, tensor in index.state_dict_metadata.items():
        if not _tiled(tensor):
            raise _DamageError(f"its index has {printable(name)} with parts missing")
        for chunk in tensor.chunks:
            place = index.storage_data.get(MetadataIndex(name, chunk.offsets))
            needed = math.prod(chunk.sizes) * tensor.properties.dtype.itemsize
            if place is None or place.length < needed:
                raise _DamageError(f"its index promises more of {printable(name)} than there is")
            if place.offset + place.length > files[place.relative_path]:
                raise _DamageError(f"{place.relative_path} is cut short")
            used += place.length
    if used > sum(files.values()):
        raise _DamageError("its index promises more than its files hold")


def _sizes(folder: Path, names: set[str]) -> dict[str, int]:
    for name in sorted(names):
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise _DamageError(f"its file {name} is missing")
    return {name: (folder / name).stat().st_size for name in names}


def _tiled(tensor: TensorStorageMetadata) -> bool:
    """Whether chunks lie one behind the other along one axis, as processes share a tensor out."""
    size, chunks = tensor.size, tensor.chunks
    if any(len(c.offsets) != len(size) or len(c.sizes) != len(size) for c in chunks):
        return False
    chunks = sorted((c for c in chunks if 0 not in c.sizes), key=lambda chunk: chunk.offsets)
    if 0 in size or not size:
        return len(chunks) == (0 if size else 1)
    apart = {axis for chunk in chunks for axis, offset in enumerate(chunk.offsets) if offset}
    axis = min(apart, default=0)
    begins = [chunk.offsets[axis] for chunk in chunks]
    ends = [chunk.offsets[axis] + chunk.sizes[axis] for chunk in chunks]
    across = {(*chunk.sizes[:axis], *chunk.sizes[axis + 1 :]) for chunk in chunks}
    return (
        apart <= {axis}
        and across == {(*size[:axis], *size[axis + 1 :])}
        and [*begins, size[axis]] == [0, *ends]
    )
