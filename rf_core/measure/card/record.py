"""What a stage has found so far: a file of JSON that is whole after every measurement.

No torch here: the runner and the table read these files.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...writing import write_text


class NotRun(Exception):  # noqa: N818  # not an error
    """Raised by a stage that cannot run here, with the reason in a sentence."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Something that is either right or wrong."""

    what: str
    error: float
    """How far off, in the unit that the stage says; not finite where it is no number."""
    limit: float
    """What it may be off by."""

    @property
    def right(self) -> bool:
        """Whether the error is a number within the limit."""
        return self.error <= self.limit


class Record:
    """One stage's findings, written atomically to a file whenever they grow."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {"said": [], "checks": [], "measured": {}}

    def note(self, name: str, value: Any) -> None:
        """A measurement, as JSON can hold it."""
        self._found["measured"][name] = value
        self._write()

    def append(self, name: str, value: Any) -> None:
        """One more measurement of a kind."""
        self.note(name, [*self._found["measured"].get(name, []), value])

    def check(self, what: str, error: float, limit: float) -> bool:
        """Whether something is as it should be."""
        check = Check(what=what, error=error, limit=limit)
        self._found["checks"].append(asdict(check))
        self._write()
        return check.right

    def say(self, text: str) -> None:
        """A line for the table."""
        self._found["said"].append(text)
        self._write()

    def end(self, why: str | None = None) -> None:
        """The stage has ended by itself; `why` it did not run, where it did not."""
        self._found["ended"] = True
        self._found["not_run"] = why
        self._write()

    def fail(self, problem: str) -> None:
        """The stage broke, and ended by itself."""
        self._found["failed"] = problem
        self.end()

    def _write(self) -> None:
        write_json(self._path, self._found)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a whole one; numbers that JSON does not know become text."""
    write_text(path, json.dumps(_plain(value), indent=1, allow_nan=False))


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; nothing where it has not."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found


def checks_of(found: dict[str, Any]) -> list[Check]:
    """The checks of a record that was read."""
    return [Check(**{**c, "error": float(c["error"])}) for c in found.get("checks", [])]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return float(f"{value:.6g}")
    return value
