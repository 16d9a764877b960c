"""The border of a node: what comes in is what its schema says, and the engine's errors become its
own, in names that the node shows, without paths or flags.

ComfyUI prints an error's class in front of its text, with the file it comes from unless it is
Python's own.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

from ..rf_core.prompts import TimelineError
from ..rf_core.prompts.timeline import shorten
from . import host
from .inputs import checked

_FLAGS = (
    (
        r"give it with --lora .*",
        "choose the model it is for here, and this file in Load RF LoRA behind it",
    ),
    (r"give it as num_heads", "take a file that does"),
    (r"say which is the student", "take a file of the student alone"),
    (r"check the path", "press R to read the folder again"),
    (r" \(line \d+\)|, first on line \d+", ""),  # whose text the node shows, without numbers
)
_SHOWN = 100  # columns of a line that is wrong


def checked_execute(execute: Callable[..., Any]) -> Callable[..., Any]:
    """A node's `execute` whose inputs are checked, and whose ValueErrors are in words of nodes."""
    signature = inspect.signature(execute)

    @functools.wraps(execute)
    def executed(node: type[io.ComfyNode], *given: Any, **named: Any) -> Any:
        _, *inputs = signature.bind(node, *given, **named).arguments.items()
        try:
            return execute(node, **checked(node, dict(inputs)))
        except ValueError as error:
            raise ValueError(node_message(error, str(dict(inputs).get("text", "")))) from error

    return executed


def node_message(error: ValueError, text: str = "") -> str:
    """What an error says, for someone who sees a node; `text` is the schedule it may be about."""
    if isinstance(error, TimelineError):
        lines, problem = text.splitlines(), _plain(error.problem)
        line = lines[error.line - 1] if error.line <= len(lines) else ""
        if len(line) > _SHOWN:  # a schedule in one line, such as JSON: from where it is wrong
            line = shorten(line[error.column - 1 :], _SHOWN)
        return f"in the line {line.strip()!r}: {problem}" if line.strip() else problem
    return _plain(str(error))


def _plain(text: str) -> str:
    for folder in host.folders():
        text = text.replace(folder, "")
    for pattern, instead in _FLAGS:
        text = re.sub(pattern, instead, text)
    return text
