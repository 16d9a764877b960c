"""Files and folders that bear a number: `update_000100`, `pairs-000003.safetensors`.

People copy them beside the originals, as `update_000100_backup` or `update_000100 (copy)`. What
does not bear a name exactly as it is written here is somebody else's: it is not read, counted or
deleted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path


def numbered(folder: Path, name: Callable[[int], str]) -> list[tuple[int, Path]]:
    """What a folder holds under the names that `name` gives to numbers, by number.

    Empty for a folder that is not there.
    """
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        # A name may hold digits elsewhere, too.
        numbers = {int(digits) for digits in re.findall("[0-9]+", path.name)}
        found += [(number, path) for number in numbers if name(number) == path.name]
    return sorted(found)
