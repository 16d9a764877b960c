"""What is printed never decides whether a video is made.

A console may lack a prompt's characters, and whoever reads it may be gone: what it lacks is written
as an escape, and once it takes no more, no more is written.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO


@contextmanager
def forgiving_console() -> Iterator[None]:
    """Within, printing to stdout or stderr raises nothing; there need not be any."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        out, err = (_Forgiving(each or nowhere) for each in (sys.stdout, sys.stderr))
        with redirect_stdout(out), redirect_stderr(err):
            yield
            out.flush()


def exit_process(code: int) -> NoReturn:
    """End the process with a command's `code`.

    Under torchrun without the interpreter's teardown: threads of gloo have been seen to abort in it
    (SIGABRT), and torchrun then calls a run a failure that was finished.
    """
    if "RANK" not in os.environ:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


class _Forgiving:
    """A text stream that takes whatever it is given."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeError:
            encoding = self._stream.encoding
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):
            self._lose()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._lose()

    def _lose(self) -> None:
        """Nobody reads any more; what Python still holds for them would fail at its end."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
