"""Damaged files, made at random from a good one: bytes, headers, pickles and JSON.

RF_FUZZ=N tries N damaged files of each kind, RF_FUZZ_SEED another seed.
"""

from __future__ import annotations

import io
import json
import os
import pickletools
import random
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from rf_core.weights.files import CheckpointError

TRIES = int(os.environ.get("RF_FUZZ", "60"))
SEED = int(os.environ.get("RF_FUZZ_SEED", "1"))
ODD = (
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**12,
    10**30,
    0.5,
    "",
    "x",
    "F64",
    "I8",
    [],
    {},
    [[]],
)
"""Values in place of others."""


def fuzz(name: str, files: dict[str, bytes], read: Callable[[Path], object], folder: Path) -> None:
    """Damaged copies of `files` through a reader, of which the project's own errors may come."""
    seed, ends = f"{name} {SEED}", Counter()
    test = os.environ["PYTEST_CURRENT_TEST"].partition(" ")[0]
    print(f"\nRF_FUZZ={TRIES} RF_FUZZ_SEED={SEED} pytest {test} -s")
    random_ = random.Random(seed)
    names = sorted(files)
    for number in range(TRIES * len(names)):
        file = names[number % len(names)]
        path = folder / file
        path.write_bytes(damaged(files[file], random_))
        try:
            read(path)
            ends["read"] += 1
        except ValueError as error:
            message = str(error)
            assert type(error) in (CheckpointError, ValueError), repr(error)
            assert "\n" not in message and len(message) < 2000, message
            ends["refused"] += 1
        except Exception as error:
            kept = folder / f"failed-{file}"
            kept.write_bytes(path.read_bytes())
            raise AssertionError(f"{kept} (try {number}, seed {SEED}): {error!r}") from error
        path.write_bytes(files[file])
    print(f"{name}: {dict(ends)} of {sum(ends.values())}")


def damaged(data: bytes, random_: random.Random) -> bytes:
    """A file with one or a few faults, of a safetensors, torch or JSON file."""
    for _ in range(random_.choice((1, 1, 1, 2, 5))):
        data = random_.choice(_KINDS)(data, random_)
    return data


def _flipped(data: bytes, random_: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random_.choice((1, 1, 4, 32))):
        if changed:
            changed[random_.randrange(len(changed))] = random_.randrange(256)
    return bytes(changed)


def _flipped_early(data: bytes, random_: random.Random) -> bytes:
    part = min(len(data), random_.choice((9, 64, 2000, 20_000)))
    return _flipped(data[:part], random_) + data[part:]


def _flipped_late(data: bytes, random_: random.Random) -> bytes:
    part = max(0, len(data) - random_.choice((9, 64, 2000)))
    return data[:part] + _flipped(data[part:], random_)


def _cut(data: bytes, random_: random.Random) -> bytes:
    return data[: random_.randrange(len(data) + 1)]


def _spliced(data: bytes, random_: random.Random) -> bytes:
    start, stop, at = (random_.randrange(len(data) + 1) for _ in range(3))
    piece = data[min(start, stop) : max(start, stop)][:4000]
    return data[:at] + piece + data[at + random_.choice((0, len(piece))) :]


def _changed_header(data: bytes, random_: random.Random) -> bytes:
    """Of a safetensors file: another value somewhere in its JSON, the length put right."""
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
    except (ValueError, struct.error, RecursionError):
        return _changed_json(data, random_)
    text = json.dumps(_changed(header, random_)).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _changed_json(data: bytes, random_: random.Random) -> bytes:
    try:
        return json.dumps(_changed(json.loads(data), random_)).encode()
    except (ValueError, RecursionError):
        return _flipped_early(data, random_)


def _changed(value: object, random_: random.Random) -> object:
    if not isinstance(value, (dict, list, str)) or not value or random_.random() < 0.05:
        return random_.choice(ODD)
    if isinstance(value, str):
        try:  # settings lie in headers as JSON within JSON
            return json.dumps(_changed(json.loads(value), random_))
        except ValueError:
            return random_.choice((*ODD, value + "x", value[1:]))
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, what = random_.choice(keys), random_.random()
    changed = value.copy()
    if what < 0.1:
        del changed[key]  # type: ignore[arg-type]
    elif what < 0.2 and isinstance(changed, dict):
        changed[str(random_.choice(ODD))] = changed.pop(key)  # type: ignore[arg-type]
    else:
        other = value[random_.choice(keys)]  # type: ignore[index]
        changed[key] = other if what < 0.35 else _changed(value[key], random_)  # type: ignore[index]
    return changed


def _changed_pickle(data: bytes, random_: random.Random) -> bytes:
    """Of a torch file: its pickle with an operation dropped, doubled, swapped or altered."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = {info.filename: archive.read(info) for info in archive.infolist()}
        name = next(name for name in files if name.endswith("data.pkl"))
        files[name] = _other_operations(files[name], random_)
    except Exception:
        bare = data.startswith(b"\x80\x04")  # the index of a checkpoint
        return _other_operations(data, random_) if bare else _flipped_early(data, random_)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for each, content in files.items():
            archive.writestr(each, content)
    return made.getvalue()


def _other_operations(pickled: bytes, random_: random.Random) -> bytes:
    try:
        places = [at for _, _, at in pickletools.genops(pickled)] + [len(pickled)]
    except ValueError:  # there is other damage already
        return _flipped_early(pickled, random_)
    pieces = [pickled[a:b] for a, b in pairwise(places)]
    at, other = (random_.randrange(len(pieces)) for _ in range(2))
    what = random_.randrange(5)
    if what == 0:
        del pieces[at]
    elif what == 1:
        pieces.insert(at, pieces[other])
    elif what == 2:
        pieces[at], pieces[other] = pieces[other], pieces[at]
    elif what == 3:
        pieces[at] = _flipped(pieces[at], random_)
    else:
        pieces[at] = random_.choice(
            (b"N", b"}", b"]", b")", b"K\x07", b"J\xff\xff\xff\x7f", b"Q", b"R")
        )
    return b"".join(pieces)


_KINDS = (
    _flipped,
    _flipped_early,
    _flipped_late,
    _cut,
    _spliced,
    _changed_header,
    _changed_header,
    _changed_pickle,
    _changed_pickle,
)
