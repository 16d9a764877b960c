"""Names of files that arrive at a node, none of which leads out of ComfyUI's folders.

A linked name was checked by nobody before a run, and one in a state is somebody else's. What is no
name on one system is none on any, so that a workflow does the same everywhere.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

MAX_BYTES = 255
"""What file systems allow."""
ROOM = 55
"""Of them, what a name that is asked for leaves to a number and an ending."""
NOT_IN_NAMES = frozenset('/\\<>:"|?*')
"""What one system or another does not allow in a file's name."""
DEVICES = frozenset(
    ["con", "prn", "aux", "nul", "conin$", "conout$"]
    + [f"{port}{number}" for port in ("com", "lpt") for number in "0123456789¹²³"]
)
"""What Windows takes for a device, whatever ending follows."""


def is_name(name: str, room: int = 0) -> bool:
    """Whether a text is the name of a file or folder, which leaves so many bytes to an ending."""
    if not name.isprintable() or set(name) & NOT_IN_NAMES:  # the former also: what has no bytes
        return False
    device = name.partition(".")[0].rstrip().casefold() in DEVICES
    fits = len(name.encode()) + room <= MAX_BYTES
    return bool(name.strip(". ")) and fits and not device


def plain(name: str, asked: str, room: int = 0) -> str:
    """The name of a file without folders; ValueError, which names the input `asked`, otherwise."""
    if not is_name(name, room):
        raise ValueError(
            f"{asked} {printable(name)} is no file name; give a short one without folders or any "
            f"of {' '.join(sorted(NOT_IN_NAMES))}, such as 'beach'"
        )
    return name


def place(name: str, asked: str, room: int = 0) -> PurePosixPath:
    """A file within a folder, such as `video/beach`; ValueError for any that may lie elsewhere."""
    path = PurePosixPath(name)
    if not path.parts or not all(is_name(part, room) for part in path.parts):
        raise ValueError(
            f"{asked} {printable(name)} is no place within the folder; give a short one, folders "
            "with / and without .. in it, such as 'video/beach'"
        )
    return path


def inside(folder: Path, name: PurePosixPath | str, asked: str) -> Path:
    """The path of a file in a folder; ValueError where a link on the way leads out of it."""
    path = folder / name
    if not leads_inside(folder, path):
        raise ValueError(
            f"{asked} {printable(str(name))} leads out of its folder, by a link that lies there: "
            "put the file or folder itself in its place"
        )
    return path


def leads_inside(folder: Path, path: Path) -> bool:
    """Whether a path, all links followed, lies in a folder."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return False


def printable(given: object) -> str:
    """What was given, as a sentence quotes it."""
    text = repr(given) if isinstance(given, str | int | float) else f"a {type(given).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}…"
