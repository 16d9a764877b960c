"""Files that are whole once they exist.

A file is written beside its name and takes the name when every byte is on the disk: after a power
cut it is the old one or the new one, never half of it, and what was written before it is there.
Where writing fails (no space, no permission) what stood there stays, nothing half-written is left,
and the error is one sentence. Permissions are what the umask says: some writers (safetensors 0.8)
make files for their owner alone.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


class WriteError(OSError, ValueError):
    """A file that could not be written, whatever library wrote it, in one sentence.

    `errno` is the system's where it is known. A ValueError as well, as it is the user who makes
    room.
    """


@contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """The name to write to; it becomes `path`, in one step, when the block ends without an error.

    WriteError where the file cannot be written; other errors pass. Either way `path` is untouched.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        part.unlink(missing_ok=True)  # of a writer that was killed
        part.touch()
        mode = stat.S_IMODE(part.stat().st_mode)
        yield part
        part.chmod(mode)  # a writer may have put a file of its own there
        with part.open("r+b") as file:
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise _write_error(path, error) from error
    finally:
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Have the names in it on the disk, where the system can: Windows opens no folder."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file, UTF-8, which is the old one until it is the new one."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def _write_error(path: Path, error: Exception) -> WriteError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    failure = WriteError(f"{path} could not be written ({why}); nothing of it was kept")
    failure.errno = error.errno if isinstance(error, OSError) else None
    return failure
