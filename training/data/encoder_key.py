"""What a text encoder's embeddings are kept under: a key of its weights, wherever they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

_PIECE = 2**20  # bytes read of each part of a file that is looked at


def encoder_key(place: str, dtype: torch.dtype) -> str:
    """A short key of the encoder at `place`, a file, a folder or a hub id, computing in `dtype`.

    Of each file its size and three pieces count, at its start, middle and end: weights that have
    been trained anew differ in all, and whole files take minutes to read. A hub id is its own key.
    """
    digest, path = hashlib.sha256(str(dtype).encode()), Path(place)
    if not path.exists():
        digest.update(place.encode())
        return digest.hexdigest()[:16]
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        name = "" if file == path else file.relative_to(path).as_posix()
        size = file.stat().st_size
        digest.update(f"{name} {size}".encode())
        with file.open("rb") as opened:
            for start in (0, size // 2, max(0, size - _PIECE)):
                opened.seek(start)
                digest.update(opened.read(_PIECE))
    return digest.hexdigest()[:16]
