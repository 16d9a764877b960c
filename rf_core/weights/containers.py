"""One file of tensors, of whatever container, from whoever made it.

What a file is follows from its first bytes, not from its name: a torch file named `.safetensors`
reads, and an error page under a checkpoint's name says so. Nothing in a file is believed before it
was checked against the file's size; nothing is ever unpickled without `weights_only`. Whatever is
wrong ends in one sentence, a CheckpointError. Tensors stay memory-mapped where the container allows
it.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import pickle
import re
import struct
import threading
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

AGAIN = "download or copy it again"

_ZIP = b"PK\x03\x04"
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's pickled magic number
_OTHER_FILES = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"GGUF": "a GGUF file, whose quantised weights are not supported",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"version https://git-lfs": "a git-lfs pointer; fetch the file itself with `git lfs pull`",
    b"\x80": "a Python pickle, which may run code; have it saved as safetensors where it was made",
}
_MARKUP = re.compile(rb"\s*<(?:!doctype|html|\?xml|head|body)", re.IGNORECASE)

_HEADER_BYTES = 100_000_000  # as many as safetensors itself reads
_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Bytes of a number by its name in a safetensors header."""
_MAX_NUMBERS = 2**62

_MAX_ENTRIES, _DEEPEST = 1_000_000, 64


class CheckpointError(ValueError):
    """A file that cannot be used, with the path, what is wrong and what to do about it."""


class _Inert:
    """Takes the place of a numpy object, which no weight is made of: it is made, and does nothing.

    PyTorch reads no numpy without being told; none of numpy's own code runs either way.
    """

    def __new__(cls, *arguments: object) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def _stand_in(module: str, name: str) -> type[_Inert]:
    return type(name, (_Inert,), {"__module__": module})


_NUMPY: list[Any] = [
    *(
        _stand_in(f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")  # as numpy 1 and 2 call it
        for name in ("scalar", "_reconstruct")
    ),
    *(_stand_in("numpy", name) for name in ("dtype", "ndarray", "bool", "bool_")),
    *(
        _stand_in("numpy", f"{kind}{bits}")
        for kind, sizes in (
            ("float", (16, 32, 64)),
            ("int", (8, 16, 32, 64)),
            ("uint", (8, 16, 32, 64)),
        )
        for bits in sizes
    ),
]
"""Numbers, arrays and types of numpy's, as losses and counters beside weights are."""
_COUNTS = re.compile(rb"\nbytearray\n")
"""The one thing that PyTorch makes, and fills, of a count alone: a line may ask for all memory."""
_allowing = threading.Lock()  # what is allowed is allowed in the whole process


def read_file(path: Path) -> tuple[str, dict[str, Tensor], dict[str, str]]:
    """Container, tensors by name and metadata of a file; CheckpointError for any other.

    Nested dicts of a torch file become dotted names; what is not a tensor is left out.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError(f"{path}: is empty; {AGAIN}")
    if head[4:9] == b"\0\0\0\0{":  # a header's length, then the header
        return "safetensors", *_read_safetensors(path)
    if head.startswith(_ZIP) or head.startswith(_LEGACY_TORCH):
        return "torch file", _named(path, _read_torch(path, head.startswith(_ZIP))), {}
    raise CheckpointError(f"{path}: is not a checkpoint {_what_else(head)}")


def _what_else(head: bytes) -> str:
    if _MARKUP.match(head):
        return "but a web page, saved in place of the file"
    for magic, kind in _OTHER_FILES.items():
        if head.startswith(magic):
            return f"but {kind}"
    return f"(it begins with {head[:8]!r}); give a safetensors or torch file"


# safetensors


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    header, data_bytes = _header(path)
    metadata = header.pop("__metadata__", {})
    if fault := _fault_of_metadata(metadata) or _fault_of_layout(header, data_bytes):
        raise CheckpointError(f"{path}: has a damaged safetensors header ({fault}); {AGAIN}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:  # maps it, copies nothing
            return {key: file.get_tensor(key) for key in header}, metadata
    except Exception as error:  # whatever this version of safetensors finds, beside or beyond that
        raise CheckpointError(f"{path}: is a damaged safetensors file ({_line(error)})") from error


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A header's JSON, and how many bytes follow it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if 8 + length > size:
            raise CheckpointError(f"{path}: is truncated within its header; {AGAIN}")
        text = file.read(min(length, _HEADER_BYTES))
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: has a damaged safetensors header ({_line(error)}); {AGAIN}"
        ) from error
    _require_promised(path, header, 8 + length)
    return header, size - 8 - length


def _require_promised(path: Path, header: Mapping[str, Any], start: int) -> None:
    """That the file is as long as its header has it, which tells a broken download from damage."""
    ends = [
        entry["data_offsets"][1]
        for key, entry in header.items()
        if key != "__metadata__" and _fault_of(entry) is None
    ]
    size, promised = path.stat().st_size, start + max(ends, default=0)
    if size != promised and len(ends) == len(header) - ("__metadata__" in header):
        what = "truncated" if size < promised else "damaged"
        raise CheckpointError(
            f"{path}: is {what}: it has {size:,} bytes where its header promises {promised:,}; "
            f"{AGAIN}"
        )


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it names something twice")
    return found


def _fault_of_metadata(metadata: object) -> str | None:
    if not isinstance(metadata, dict):
        return "its metadata is no object"
    odd = [key for key, value in metadata.items() if not isinstance(value, str)]
    return f"its metadata {printable(odd[0])} is no text" if odd else None


def _fault_of_layout(header: Mapping[str, Any], data_bytes: int) -> str | None:
    """That tensors lie one behind the other and fill the file, each as large as its shape."""
    for key, entry in header.items():
        if fault := _fault_of(entry):
            return f"{printable(key)} {fault}"
    spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    edges = [(0, 0), *spans, (data_bytes, data_bytes)]
    if any(this[1] != following[0] for this, following in pairwise(edges)):
        return "its tensors overlap or leave gaps"
    return None


def _fault_of(entry: object) -> str | None:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            if dtype not in _BYTES:
                return f"has numbers of a kind that is not known here, {printable(dtype)}"
            if not all(type(each) is int and each >= 0 for each in (*shape, begin, end)):
                return f"has a shape or place that is none, {printable(str(entry))}"
            if math.prod(size for size in shape if size) > _MAX_NUMBERS:
                return "has a shape beyond any memory"
            if math.prod(shape) * _BYTES[dtype] != end - begin:
                return f"of shape {printable(str(shape))} in {dtype} has {end - begin} bytes"
            return None
    return "is no description of a tensor"


# torch files


def _read_torch(path: Path, zipped: bool) -> object:
    with path.open("rb") as file:
        _require_honest(path, file, zipped)
    try:
        with _allowing, torch.serialization.safe_globals(_NUMPY), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols and sparse tensors
            if path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
            with path.open("rb") as file:  # of the path PyTorch would read the suffix
                return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damage takes PyTorch's reader anywhere
        raise _unread(path, error) from error


def read_tensor(path: Path, begin: int, length: int) -> Tensor:
    """The one tensor in a part of a file that is a torch file by itself."""
    with path.open("rb") as file:
        file.seek(begin)
        part = io.BytesIO(file.read(length))
    _require_honest(path, part, zipped=True)
    part.seek(0)
    try:
        tensor = torch.load(part, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _unread(path, error) from error
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{path}: holds a {type(tensor).__name__} where a tensor is needed")
    if fault := _fault_of_tensor(tensor) or _fault_of_sizes([tensor], length):
        raise CheckpointError(f"{path}: holds a tensor {fault}")
    return tensor.detach()


def _unread(path: Path, error: Exception) -> CheckpointError:
    found = re.search(r"GLOBAL (\S+)", str(error))
    if not isinstance(error, pickle.UnpicklingError) or found is None:
        return CheckpointError(
            f"{path}: is truncated or not a torch checkpoint ({_line(error)}); {AGAIN}"
        )
    return _python_object(path, found[1])


def _python_object(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: holds a Python object ({printable(name)}) beside tensors, which may run code "
        "and is not unpickled; have it saved as safetensors"
    )


def _require_honest(path: Path, file: IO[bytes], zipped: bool) -> None:
    """That a torch file is one, and promises no more than it has."""
    if zipped:
        program = _program(path, file)
        counts = _COUNTS.search(program)
    else:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            counts = _COUNTS.search(whole)
    if counts:
        raise _python_object(path, "bytearray")


def _program(path: Path, file: IO[bytes]) -> bytes:
    """The pickle of a zipped torch file."""
    try:
        if not zipfile.is_zipfile(file):  # the directory stands at a zip file's end
            raise CheckpointError(f"{path}: is a truncated torch file; {AGAIN}")
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            _require_records(path, records, file.seek(0, io.SEEK_END))
            programs = [archive.read(record) for record in records if _last(record) == "data.pkl"]
    except CheckpointError:
        raise
    except Exception as error:  # zipfile's own, and those of names that cannot be decoded
        raise CheckpointError(
            f"{path}: is a damaged torch file ({_line(error)}); {AGAIN}"
        ) from error
    return b"\n".join(programs)


def _require_records(path: Path, records: Sequence[zipfile.ZipInfo], size: int) -> None:
    inside = {_last(record) for record in records}
    if "data.pkl" not in inside:
        raise CheckpointError(f"{path}: is a zip archive and no torch file; unpack it")
    if "constants.pkl" in inside:
        raise CheckpointError(
            f"{path}: is a TorchScript program, which may run code; give its weights alone"
        )
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise CheckpointError(f"{path}: is compressed, which no torch file is; have it saved again")
    if (promised := sum(record.file_size for record in records)) > size:
        raise CheckpointError(
            f"{path}: is damaged: it has {size:,} bytes and promises {promised:,} within; {AGAIN}"
        )


def _last(record: zipfile.ZipInfo) -> str:
    return record.filename.rpartition("/")[2]


def _named(path: Path, tree: object) -> dict[str, Tensor]:
    if not isinstance(tree, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(tree).__name__} where weights by name are needed; give the "
            "file of a state dict"
        )
    found: dict[str, Tensor] = {}
    for key, tensor in _flatten(path, tree):
        if key in found:
            raise CheckpointError(f"{path}: holds {printable(key)} twice; have it saved again")
        if fault := _fault_of_tensor(tensor):
            raise CheckpointError(f"{path}: holds {printable(key)} {fault}")
        found[key] = tensor.detach()
    if fault := _fault_of_sizes(found.values(), path.stat().st_size):
        raise CheckpointError(f"{path}: holds tensors {fault}")
    return found


def _flatten(path: Path, tree: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    """Without recursion, as a dict may hold itself."""
    waiting, entries = [("", 0, iter(tree.items()))], 0
    while waiting:
        prefix, depth, items = waiting[-1]
        entry = next(items, None)
        if entry is None:
            waiting.pop()
            continue
        (key, value), entries = entry, entries + 1
        if entries > _MAX_ENTRIES or depth > _DEEPEST:
            raise CheckpointError(f"{path}: holds dicts within dicts without end; {AGAIN}")
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            waiting.append((f"{name}.", depth + 1, iter(value.items())))


def _fault_of_tensor(tensor: Tensor) -> str | None:
    """What keeps a tensor of a torch file from being plain numbers that are there."""
    if tensor.device.type == "meta":
        return "without its numbers; have it saved again"
    if tensor.is_quantized:
        return "in PyTorch's quantised form; use the bf16 or fp16 file"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return "as a sparse or nested tensor; have it saved as a plain one"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"as a {type(tensor).__name__}; have it saved as a plain tensor"
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        return f"of shape {list(tensor.shape)} with fewer numbers than that; have it saved again"
    return None


def _fault_of_sizes(tensors: Iterable[Tensor], size: int) -> str | None:
    """That memory was asked for which no number of the file fills."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    if (held := sum(storages.values())) > size:
        return f"of {held:,} bytes where the file has {size:,}; {AGAIN}"
    return None


# text


def shorten(names: list[str], limit: int = 4) -> str:
    """The first few names, the rest counted."""
    rest = len(names) - limit
    return ", ".join(map(printable, names[:limit])) + (f" and {rest} more" if rest > 0 else "")


def printable(name: str, limit: int = 120) -> str:
    """A name out of a file, fit to stand in one line."""
    name = name if len(name) <= limit else f"{name[:limit]}…"
    return name if name.isprintable() else ascii(name)


def _line(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0].partition(". ")[0]
    return printable(first.removesuffix(".") or type(error).__name__)
