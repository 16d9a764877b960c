"""What can be asked of a live stream, and the JSON it is asked in.

A command is an object such as `{"do": "prompt", "text": "snow", "mode": "blend 3"}`: the name, and
the fields of its class. Whatever else comes is refused in one sentence (ValueError), so that what
reaches the stream is always sound.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

from ..prompts import Switch
from ..ranges import MANY

LONGEST_TEXT = 10_000
"""Characters of a prompt: more than any text encoder reads."""
LONGEST_NAME = 200
"""Characters of a LoRA's name."""
STRONGEST = 100.0
"""A LoRA's strength lies between this and its negative, as ComfyUI's loaders have it."""
_LONGEST_MODE = 40
_BRANCH = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")  # becomes part of a file's name


class Command:
    """One of those below."""

    do: ClassVar[str]
    """Its name in JSON."""

    def as_dict(self) -> dict[str, Any]:
        """What `read_command` reads as an equal one."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        plain = {n: str(v) if isinstance(v, Switch) else v for n, v in given.items()}
        return {"do": self.do} | {n: v for n, v in plain.items() if v is not None}


@dataclass(frozen=True, kw_only=True)
class Prompt(Command):
    """Another prompt, from the next chunk on."""

    do: ClassVar[str] = "prompt"
    text: str
    mode: Switch = field(default_factory=Switch)

    def __post_init__(self) -> None:
        _check_text("text", self.text, LONGEST_TEXT)
        _check_switch(self)


@dataclass(frozen=True, kw_only=True)
class Lora(Command):
    """Another strength of a LoRA that is there, from the next chunk on."""

    do: ClassVar[str] = "lora"
    name: str
    strength: float

    def __post_init__(self) -> None:
        _check_text("name", self.name, LONGEST_NAME)
        _check_number("strength", self.strength, -STRONGEST, STRONGEST)


@dataclass(frozen=True, kw_only=True)
class Decay(Command):
    """Another decay of the sink; see `Stream.set_decay`."""

    do: ClassVar[str] = "decay"
    decay: float

    def __post_init__(self) -> None:
        _check_number("decay", self.decay, 0, 1)


@dataclass(frozen=True, kw_only=True)
class Strength(Command):
    """Another strength for the source, from the next chunk on; see `Stream.generate`."""

    do: ClassVar[str] = "strength"
    strength: float

    def __post_init__(self) -> None:
        _check_number("strength", self.strength, 0, 1)


@dataclass(frozen=True, kw_only=True)
class Pause(Command):
    """Make no further chunk until `Resume`; commands are still obeyed."""

    do: ClassVar[str] = "pause"


@dataclass(frozen=True, kw_only=True)
class Resume(Command):
    """Go on after `Pause`."""

    do: ClassVar[str] = "resume"


@dataclass(frozen=True, kw_only=True)
class Cut(Command):
    """Begin afresh with the next chunk: with this text, or the prompt in force."""

    do: ClassVar[str] = "cut"
    text: str | None = None

    def __post_init__(self) -> None:
        if self.text is not None:
            _check_text("text", self.text, LONGEST_TEXT)


@dataclass(frozen=True, kw_only=True)
class Rewind(Command):
    """Go back to before a chunk was made, and what took hold with it; go on in a new branch."""

    do: ClassVar[str] = "rewind"
    chunk: int
    branch: str | None = None
    """The new branch's name; by default it is given one."""

    def __post_init__(self) -> None:
        _check_count("chunk", self.chunk)
        named = isinstance(self.branch, str) and _BRANCH.fullmatch(self.branch)
        if self.branch is not None and not named:
            raise ValueError(
                f"branch is {_shown(self.branch)}; give 1 to 40 letters, digits, - and _"
            )


@dataclass(frozen=True, kw_only=True)
class Schedule(Command):
    """Another prompt from a later chunk on: a coming change, known by this command's number."""

    do: ClassVar[str] = "schedule"
    chunk: int
    text: str
    mode: Switch = field(default_factory=Switch)

    def __post_init__(self) -> None:
        _check_count("chunk", self.chunk)
        _check_text("text", self.text, LONGEST_TEXT)
        _check_switch(self)


@dataclass(frozen=True, kw_only=True)
class Move(Command):
    """Let a coming change come at another chunk."""

    do: ClassVar[str] = "move"
    change: int
    """The number of the command that scheduled it."""
    chunk: int

    def __post_init__(self) -> None:
        _check_count("change", self.change)
        _check_count("chunk", self.chunk)


@dataclass(frozen=True, kw_only=True)
class Drop(Command):
    """Let a coming change not come."""

    do: ClassVar[str] = "drop"
    change: int
    """The number of the command that scheduled it."""

    def __post_init__(self) -> None:
        _check_count("change", self.change)


@dataclass(frozen=True, kw_only=True)
class Stop(Command):
    """End within one pass and keep what is finished."""

    do: ClassVar[str] = "stop"


KINDS: dict[str, type[Command]] = {
    kind.do: kind
    for kind in (
        *(Prompt, Lora, Decay, Strength, Pause, Resume, Cut, Rewind, Schedule, Move, Drop, Stop),
    )
}


def read_command(given: object) -> Command:
    """The command of what JSON gave; ValueError, in one sentence, for whatever is none."""
    if not isinstance(given, Mapping):
        raise ValueError(f'a command is {_shown(given)}; give an object such as {{"do": "pause"}}')
    do = given.get("do")
    kind = KINDS.get(do) if isinstance(do, str) else None
    if kind is None:
        raise ValueError(f"do is {_shown(do)}; give one of {', '.join(KINDS)}")
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    for name in given:
        if name != "do" and name not in known:
            raise ValueError(f"{do} has {_shown(name)}; it takes {', '.join(known) or 'nothing'}")
    for name, each in known.items():
        if name not in given and each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"{do} has no {name}; give it one")
    values = {name: given[name] for name in known if name in given}
    if "mode" in values:
        values["mode"] = switch_of(values["mode"])
    return kind(**values)


def switch_of(mode: object) -> Switch:
    """The mode that somebody wrote; ValueError, in a sentence, where it is none."""
    if not isinstance(mode, str) or len(mode) > _LONGEST_MODE:
        raise ValueError(f"mode is {_shown(mode)}; give a word, such as soft or blend 3")
    return Switch.parse(mode)


def _check_switch(command: Prompt | Schedule) -> None:
    if not isinstance(command.mode, Switch):
        raise ValueError(f"mode is {_shown(command.mode)}; give a Switch")


def _check_text(name: str, text: object, longest: int) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} is {_shown(text)}; give a text that is not empty")
    if len(text) > longest:
        raise ValueError(f"{name} has {len(text)} characters; give at most {longest}")
    if any(0xD800 <= ord(each) < 0xE000 or each == "\0" for each in text):
        raise ValueError(f"{name} holds half a character or a zero; give plain text")


def _check_number(name: str, number: object, least: float, most: float) -> None:
    if type(number) not in (int, float) or not least <= number <= most:  # type: ignore[operator]
        raise ValueError(f"{name} is {_shown(number)}; give a number from {least:g} to {most:g}")


def _check_count(name: str, count: object) -> None:
    if type(count) is not int or not 0 <= count <= MANY:
        raise ValueError(f"{name} is {_shown(count)}; give a whole number from 0 to {MANY}")


def _shown(value: object) -> str:
    """What somebody gave, for a sentence, whatever it is."""
    if isinstance(value, str):
        return ascii(value[:40])
    if isinstance(value, (bool, float)) or value is None:
        return str(value)
    if isinstance(value, int):
        return str(value) if abs(value) <= MANY**2 else "a huge number"
    return f"a {type(value).__name__}"
