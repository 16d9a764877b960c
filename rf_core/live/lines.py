"""What is typed to a live session, and what it says in return: text on both sides.

A line that begins with `/` is a command, `/rewind 12`; any other is a prompt. A verb with its words
already apart, as OSC sends them, is read by the same table, so every hand speaks one language.
Nothing here acts: a line comes to a `Command`, to another mode for the prompts that follow, or to a
question that whoever reads the lines answers. What is wrong with a line is a ValueError, in a
sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum

from ..prompts import Switch
from .buffers import Applied, Branched, Ended, Event, Happened, Received, Refused
from .commands import (
    Command,
    Cut,
    Decay,
    Drop,
    Lora,
    Move,
    Pause,
    Prompt,
    Resume,
    Rewind,
    Schedule,
    Stop,
    Strength,
    switch_of,
)

_CHUNK = re.compile(r"([+-]?)([0-9]{1,12})")
_LONGEST_SHOWN = 60  # characters of a prompt in an answer


class Question(Enum):
    """What is answered by whoever reads the lines; the session is not asked."""

    HELP = "help"
    MODE = "mode"
    STATUS = "status"


ParsedLine = Command | Switch | Question
"""What a line comes to; a `Switch` is the mode of the prompts that follow."""


@dataclass(frozen=True, kw_only=True)
class LineContext:
    """What a line is read with."""

    mode: Switch
    """Of a prompt that names none."""
    chunk: int
    """The next one; what `-4` and `+4` count from."""


@dataclass(frozen=True, kw_only=True)
class _Verb:
    usage: str
    about: str
    split: Callable[[str], list[str]]
    """The words of what follows it in a line."""
    least: int
    most: int
    read: Callable[[Sequence[str], LineContext], ParsedLine]


def read_line(line: str, now: LineContext) -> ParsedLine | None:
    """What a typed line asks for; None of a blank one."""
    line = line.strip()
    if not line:
        return None
    if not line.startswith("/"):
        return read_words("prompt", [line], now)
    name, _, rest = line[1:].partition(" ")
    return read_words(name, _verb(name).split(rest.strip()), now)


def read_words(name: str, words: Sequence[str], now: LineContext) -> ParsedLine:
    """What a verb with its words asks for."""
    verb = _verb(name)
    if not verb.least <= len(words) <= verb.most:
        raise ValueError(f"write {_usage(name.lower(), verb)}")
    return verb.read(words, now)


def help_lines() -> list[str]:
    """What can be typed."""
    width = max(len(_usage(name, verb)) for name, verb in _VERBS.items())
    lines = [f"  {_usage(name, verb):{width}}  {verb.about}" for name, verb in _VERBS.items()]
    return [
        "a line is a prompt, from the next chunk on; one that begins with / is a command:",
        *lines,
        "a CHUNK is a number as it is told, or so many from now: -4 is 4 back, +4 is 4 ahead",
    ]


def describe_event(event: Event) -> str:
    """A line for an event."""
    if isinstance(event, Received):
        return f"[{event.number}] received: {describe_command(event.command)}"
    if isinstance(event, Applied):
        return f"[{event.number}] applied at chunk {event.chunk}"
    if isinstance(event, Refused):
        return f"[{event.number}] refused: {printable(event.why)}"
    if isinstance(event, Happened):
        return f"[{event.number}] comes now, at chunk {event.chunk}"
    if isinstance(event, Branched):
        return f"branch {event.name} begins at chunk {event.chunk}"
    assert isinstance(event, Ended)
    return f"ended at chunk {event.chunk}" + (f": {printable(event.why)}" if event.why else "")


def describe_command(command: Command) -> str:
    """A command in a few words, such as `prompt [blend 3] snow`."""
    given = command.as_dict()
    mode = [f"[{given.pop('mode')}]"] if "mode" in given else []
    text = [shorten(given.pop("text"))] if "text" in given else []
    name = given.pop("do")
    return " ".join([name, *(printable(f"{each}") for each in given.values()), *mode, *text])


def shorten(text: str) -> str:
    """As much of a prompt as a line has room for."""
    short = text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."
    return printable(short)


def printable(text: str) -> str:
    """A text without what a terminal would obey."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _verb(name: str) -> _Verb:
    verb = _VERBS.get(name.lower())
    if verb is None:
        near = get_close_matches(name.lower()[:20], _VERBS, n=1)
        meant = f"did you mean /{near[0]}? " if near else ""
        raise ValueError(f"there is no /{printable(name[:20])}; {meant}/help says what there is")
    return verb


def _usage(name: str, verb: _Verb) -> str:
    return f"/{name} {verb.usage}".rstrip()


def _prompt(words: Sequence[str], now: LineContext) -> ParsedLine:
    return Prompt(text=words[0], mode=switch_of(words[1]) if len(words) > 1 else now.mode)


def _mode(words: Sequence[str], now: LineContext) -> ParsedLine:
    return switch_of(words[0]) if words else Question.MODE


def _lora(words: Sequence[str], now: LineContext) -> ParsedLine:
    return Lora(name=words[0], strength=_number("strength", words[1]))


def _rewind(words: Sequence[str], now: LineContext) -> ParsedLine:
    branch = words[1] if len(words) > 1 else None
    return Rewind(chunk=_chunk(words[0], now), branch=branch)


def _schedule(words: Sequence[str], now: LineContext) -> ParsedLine:
    mode = switch_of(words[2]) if len(words) > 2 else now.mode
    return Schedule(chunk=_chunk(words[0], now), text=words[1], mode=mode)


def _move(words: Sequence[str], now: LineContext) -> ParsedLine:
    return Move(change=_whole("change", words[0]), chunk=_chunk(words[1], now))


def _chunk(word: str, now: LineContext) -> int:
    match = _CHUNK.fullmatch(word)
    if not match:
        raise ValueError(f"chunk is {word[:20]!r}; give a number such as 12, or -4 for 4 back")
    sign, digits = match[1], int(match[2])
    if sign == "-" and digits > now.chunk:
        raise ValueError(f"{digits} chunks back is before the beginning; chunk {now.chunk} is next")
    return digits if not sign else now.chunk + (digits if sign == "+" else -digits)


def _whole(name: str, word: str) -> int:
    if not re.fullmatch("[0-9]{1,12}", word):
        raise ValueError(f"{name} is {word[:20]!r}; give its number, as it was told")
    return int(word)


def _number(name: str, word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"{name} is {word[:20]!r}; give a number such as 0.6") from None


def _whole_line(rest: str) -> list[str]:
    return [rest] if rest else []


def _first_word(rest: str) -> list[str]:
    return rest.split(None, 1)


def _last_word(rest: str) -> list[str]:
    return rest.rsplit(None, 1)


def _of(
    usage: str,
    about: str,
    read: Callable[[Sequence[str], LineContext], ParsedLine],
    split: Callable[[str], list[str]] = str.split,
    more: int = 0,
) -> _Verb:
    """A verb whose words are those of its usage, and so `more` where they come apart."""
    words = usage.split()
    least = sum(not word.startswith("[") for word in words)
    most = len(words) + more
    return _Verb(usage=usage, about=about, split=split, least=least, most=most, read=read)


_VERBS = {
    "prompt": _of("TEXT", "as a line without /", _prompt, _whole_line, more=1),
    "mode": _of(
        "[MODE]", "of the prompts that follow: soft, recache, blend 3, cut", _mode, _whole_line
    ),
    "cut": _of(
        "[TEXT]",
        "begin afresh, with this prompt or the one in force",
        lambda words, now: Cut(text=words[0] if words else None),
        _whole_line,
    ),
    "lora": _of("NAME STRENGTH", "set a LoRA's strength", _lora, _last_word),
    "decay": _of(
        "X",
        "what the sink keeps of itself, 0 to 1",
        lambda words, now: Decay(decay=_number("decay", words[0])),
    ),
    "strength": _of(
        "X",
        "how far the prompt goes from the source: 0 to 1",
        lambda words, now: Strength(strength=_number("strength", words[0])),
    ),
    "pause": _of("", "make no further chunk; commands are obeyed", lambda words, now: Pause()),
    "resume": _of("", "go on", lambda words, now: Resume()),
    "rewind": _of("CHUNK [NAME]", "go back to before it, and on in a branch", _rewind),
    "schedule": _of("CHUNK TEXT", "a prompt that is to come", _schedule, _first_word, more=1),
    "move": _of("NUMBER CHUNK", "let what is to come, come at another chunk", _move),
    "drop": _of(
        "NUMBER",
        "let what is to come, not come",
        lambda words, now: Drop(change=_whole("change", words[0])),
    ),
    "status": _of("", "where it stands", lambda words, now: Question.STATUS),
    "stop": _of("", "end, and keep what is made", lambda words, now: Stop()),
    "help": _of("", "this", lambda words, now: Question.HELP),
}
