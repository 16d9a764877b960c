"""Short names for what is in a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLE = 2**20  # bytes, of each end


def file_digest(path: Path) -> str:
    """A short name for what is in a file or folder: sizes, and both ends of every file.

    Of what is not there, such as a hub id, the name itself.
    """
    digest = hashlib.blake2b(digest_size=8)
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    for each in files:
        if not each.is_file():
            return str(path)
        size = each.stat().st_size
        digest.update(f"{each.name if path.is_dir() else ''}/{size}".encode())
        with each.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
