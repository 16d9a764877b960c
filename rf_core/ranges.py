"""Numbers and places that are asked for, checked before anything is loaded or made."""

from __future__ import annotations

import os
from pathlib import Path

MANY = 10**9
"""More of anything than a run comes to: what is above it is a slip, or overflows."""
LARGEST_SIDE = 16384
"""Pixels of a picture's side: the most that libx264 encodes."""
LARGEST_PICTURE = 2**26
"""Pixels of a picture to start from: 8192 squared, where some bytes may promise any number."""
LARGEST_WINDOW = 1024
"""Latent frames attention sees: as many positions in time as Wan 2.1's rotary table has."""
LARGEST_WIDTH, MAX_LAYERS, LONGEST_TEXT, MAX_STEPS = 2**17, 1000, 4096, 1000
"""Channels, blocks, a prompt's tokens and a schedule's steps: far above any network's; what is
above that in a file is damage, and would be allocated."""
STRONGEST_CONTROL = 10.0
"""A control's strength lies between 0 and this; 1 is as its network was trained."""
LONGEST_TIMELINE = 300_000
"""Characters of a timeline's text: some 370 prompts of 800, which no model reads to the end."""
MAX_LINES = 3000
"""Lines, or entries, of a timeline, each of which takes some 30 us to read; a server waits."""


def check_numbers(asked: object, **ranges: tuple[float, float]) -> None:
    """ValueError unless each of these attributes is in its range, both ends included.

    None, or a word such as `auto`, asks for no number; nan is in no range.
    """
    for name, (least, most) in ranges.items():
        value = getattr(asked, name)
        if isinstance(value, (int, float)) and not least <= value <= most:
            raise ValueError(f"{name} is {value}; give a number from {least} to {most}")


def check_counts(asked: object, **ranges: tuple[int, int]) -> None:
    """The same of attributes that are whole numbers, whatever a file has in their place."""
    for name in ranges:
        if type(value := getattr(asked, name)) is not int:
            raise ValueError(f"{name} is {value!r}; give a whole number")
    check_numbers(asked, **ranges)


def check_each(asked: object, **ranges: tuple[float, float]) -> None:
    """The same of attributes that are lists of numbers: of every one in them."""
    for name, (least, most) in ranges.items():
        values = getattr(asked, name)
        if not all(least <= value <= most for value in values):
            raise ValueError(f"{name} are {values}; give each a number from {least} to {most}")


def check_writable(path: Path) -> None:
    """ValueError unless a file of this name can be written; nothing is left, or changed, there.

    It is tried: what permissions say is not the whole of it, and a name may be too long.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"the output's folder {path.parent} does not exist; create it first")
    trial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file")
        if path.exists():
            path.open("r+b").close()
        trial.open("wb").close()
        trial.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}; name another") from None


def check_folder_writable(folder: Path) -> None:
    """The same for a folder of files, which may still be to be made."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is a file; name a folder")
    try:
        check_writable(there / "config.json")
    except ValueError as error:
        raise ValueError(f"nothing can be made in {folder}: {error}") from None
