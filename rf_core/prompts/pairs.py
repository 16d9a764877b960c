"""Timelines in the manner of JSON: FizzNodes' and Deforum's pairs, and lists of objects.

    "0": "a panda walks",
    "96": "it sits down"

Keys are video frames, or times with a unit (`"5s"`). The braces, and a comma at the end, may be
there or not; quotes may be single or typographic, and a key in braces bare, as in Python. In a
list, or one after the other, objects are read that give a prompt and its time:

    [{"frame": 0, "prompt": "a panda walks"}, {"time": "5s", "prompt": "it sits down"}]

A list of prompts alone has no times, and what else JSON can say is no timeline: both are refused.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal

from ..ranges import MAX_LINES
from .timeline import EXAMPLES, Entry, Places, TimelineError, Unit, shorten
from .times import Moment, fold, scan

_UNITS_OF_FIELDS: dict[str, Unit | None] = {
    **dict.fromkeys(("frame", "frames"), "f"),
    **dict.fromkeys(("chunk", "chunks"), "c"),
    **dict.fromkeys(("seconds", "sec", "start_seconds", "time_seconds"), "s"),
    **dict.fromkeys(("time", "at", "start", "timestamp", "t"), None),
}
_PROMPT_FIELDS = ("prompt", "text")

# All but the strings are looked for in folded text, whose quotes are ' and ".
_FIELD = "|".join((*_UNITS_OF_FIELDS, *_PROMPT_FIELDS))
_TIME = r"[+-]?[0-9.:]{1,20}\s?[a-z秒]{0,7}"
_MAP = re.compile(
    rf"""\s*(?:
        \{{\s*(?:["'}}] | {_TIME}\s*: | (?:{_FIELD})\s*: | \Z)
      | (?:"\s?{_TIME}\s?" | '\s?{_TIME}\s?')\s*(?:[:=]|->)
      | [0-9]{{1,9}}\s*:\s*["']
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_NAMED_MAP = re.compile(
    r"""\s*(?:(?:const|let|var)\s)?(?:"[a-z_]{1,30}"|'[a-z_]{1,30}'|[a-z_]{1,30})\s*[:=]\s*(?=\{\s*(?:["']|[0-9]+\s*:))""",
    re.IGNORECASE,
)
# ComfyUI takes braces for choices, and writes what they hold without them.
_WITHOUT_BRACES = re.compile(rf"\s*(?:\[\s*)?[\"'](?:{_FIELD})[\"']\s*:", re.IGNORECASE)
_LIST = re.compile(
    r"""\s*\[\s*(?:
        (?:"[^"]*" | '[^']*')\s*(?:, | \]\s*\Z)
      | [\[(]\s*["']?[0-9.]+[a-z]{0,7}["']?\s*,
      | \{\s*(?:"[^"\n]{0,40}" | '[^'\n]{0,40}' | \w{1,20})\s*:
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_OBJECT = re.compile(r"\s*(?:\[\s*)?\{\s*[\"']?(?!\d)\w{1,20}[\"']?\s*:")
_BLANKS = re.compile(r"\s*")
_COMMA = re.compile(r"\s*,\s*")
_COLON = re.compile(r"\s*:\s*")
_BARE_KEY = re.compile(rf"{_TIME}(?=\s*:)|\w{{1,20}}", re.IGNORECASE)
_BARE_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_FRAME = re.compile(r"\s*-?[0-9]+\s*")
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_STRING_BEFORE = {
    (quote, after): re.compile(rf"{quote}(?:\\.|[^\\])*?{quote}(?=\s*(?:[{after}]|\Z))", re.DOTALL)
    for quote in ('"', "'")
    for after in (":", r",}\]")
}
_ESCAPE = re.compile(r"\\(.)|\"", re.DOTALL)

_PAIRS = (
    'this is not read as JSON; write "12": "prompt" pairs, each but the last with a comma behind it'
)
_OBJECTS = (
    'this is not read as a list of entries; write {"frame": 12, "prompt": "a prompt"} or '
    '{"time": "8s", "prompt": "a prompt"} for each'
)


def looks_like_pairs(folded: str) -> bool:
    """Whether a folded text begins as JSON does, or what passes for it."""
    return any(pattern.match(folded) for pattern in (_MAP, _NAMED_MAP, _WITHOUT_BRACES, _LIST))


def read_pairs(text: str, folded: str) -> list[Entry]:
    """Read what `looks_like_pairs`; TimelineError says where it is wrong."""
    reader = _Reader(text, folded)
    if _NAMED_MAP.match(folded):
        raise reader.error(reader.skip(0), "write the pairs alone, without a name in front")
    if _WITHOUT_BRACES.match(folded):
        raise reader.error(
            reader.skip(0),
            "the braces around these entries are missing, which ComfyUI takes for choices; write "
            "each as '8s: a prompt' on a line of its own",
        )
    if _LIST.match(folded) and not _OBJECT.match(folded):
        raise reader.error(
            reader.skip(0),
            "a list like this has no times; write 'a | b' for prompts that share the video in "
            'equal parts, or {"time": "8s", "prompt": "a prompt"} for each',
        )
    if _LIST.match(folded) or _names_a_field(folded):
        return reader.objects()
    return reader.pairs()


def _names_a_field(folded: str) -> bool:
    return re.match(rf"\s*\{{\s*[\"']?(?:{_FIELD})[\"']?\s*:", folded, re.IGNORECASE) is not None


class _Reader:
    def __init__(self, text: str, folded: str) -> None:
        self.text = text
        self.folded = folded
        self.end = len(folded.rstrip())
        self.places = Places(folded)
        self.entries = 0

    def error(self, at: int, problem: str) -> TimelineError:
        return TimelineError(problem, *self.places.of(at))

    def skip(self, at: int, pattern: re.Pattern[str] = _BLANKS) -> int:
        """Behind `pattern` where it is found at `at`, else `at`."""
        found = pattern.match(self.folded, at, self.end)
        return found.end() if found else at

    def pairs(self) -> list[Entry]:
        at, entries = self.skip(0), list[Entry]()
        braced = self.folded.startswith("{", at)
        bare = self.folded[at] not in "\"'"
        if braced:
            if self.folded[self.end - 1] != "}":
                raise self.error(self.end, "the JSON's { is never closed; add }")
            self.end -= 1
            at = self.skip(at + 1)
        while at < self.end:
            start = at
            key, at = self._key(start, _PAIRS, bare=bare)
            prompt, at = self._string(at, r",}\]", start, _PAIRS)
            after = self.skip(at, _COMMA)
            if after == at and self.skip(at) < self.end:
                raise self.error(start, _PAIRS)
            at = self.skip(after)
            entries.append(self._entry(key, prompt, start))
        if not entries:
            raise TimelineError("there is no prompt; write one, such as '0s: a panda walks'", 1, 1)
        return entries

    def objects(self) -> list[Entry]:
        at, entries = self.skip(0), list[Entry]()
        if self.folded.startswith("[", at):
            if self.folded[self.end - 1] != "]":
                raise self.error(self.end, "the list's [ is never closed; add ]")
            self.end -= 1
            at = self.skip(at + 1)
        while at < self.end:
            start = at
            fields, at = self._object(start)
            entries.append(self._entry_of(fields, start))
            at = self.skip(self.skip(at, _COMMA))
        return entries

    def _object(self, start: int) -> tuple[dict[str, str | Decimal], int]:
        if not self.folded.startswith("{", start):
            raise self.error(start, _OBJECTS)
        at, fields = self.skip(start + 1), dict[str, str | Decimal]()
        while not self.folded.startswith("}", at):
            key, at = self._key(at, _OBJECTS, bare=True)
            number = _BARE_NUMBER.match(self.folded, at, self.end)
            value: str | Decimal
            if number:
                value, at = Decimal(number[0]), number.end()
            else:
                value, at = self._string(at, r",}\]", start, _OBJECTS)
            if fields.setdefault(key.lower(), value) is not value:
                raise self.error(start, f"{shorten(key, 40)!r} is given twice; remove one")
            after = self.skip(at, _COMMA)
            if after == at and not self.folded.startswith("}", self.skip(at)):
                raise self.error(start, _OBJECTS)
            at = self.skip(after)
        return fields, at + 1

    def _key(self, start: int, problem: str, *, bare: bool) -> tuple[str, int]:
        found = _BARE_KEY.match(self.folded, start, self.end) if bare else None
        if found:
            key, at = found[0], found.end()
        else:
            key, at = self._string(start, ":", start, problem)
        after = self.skip(at, _COLON)
        if after == at:
            raise self.error(start, problem)
        return key, after

    def _string(self, at: int, after: str, start: int, problem: str) -> tuple[str, int]:
        """The string at `at`, which a character of `after` must follow if its quotes are no JSON.

        Errors point at `start`.
        """
        quote = self.folded[at : at + 1]
        strict = self.text[at : at + 1] == '"'
        if strict:
            found = _JSON_STRING.match(self.text, at, self.end)
        else:
            # A typographic quote may be closed by any of its kind, a plain one by itself alone.
            text = self.text if self.text[at : at + 1] == "'" else self.folded
            pattern = _STRING_BEFORE.get((quote, after))
            found = pattern.match(text, at, self.end) if pattern else None
        if not found:
            raise self.error(start, problem)
        inside = self.text[at + 1 : found.end() - 1]
        if not strict:
            inside = _ESCAPE.sub(lambda escape: _json_escape(escape[1]), inside)
        try:
            return json.loads(f'"{inside}"', strict=False), found.end()
        except json.JSONDecodeError as error:
            raise self.error(start, f"{error.msg} in this JSON pair; correct it") from error

    def _entry(self, key: str, prompt: str, start: int) -> Entry:
        if _FRAME.fullmatch(key):
            return self._at(Decimal(key), "f", prompt, start)
        moment = _moment(key)
        if not moment:
            raise self.error(
                start,
                f'the key {shorten(key, 40)!r} is not a video frame; write a number such as "12"',
            )
        return self._at(moment.value, moment.unit, prompt, start, relative=moment.sign == "+")

    def _entry_of(self, fields: dict[str, str | Decimal], start: int) -> Entry:
        times = [name for name in fields if name in _UNITS_OF_FIELDS]
        prompts = [name for name in fields if name in _PROMPT_FIELDS]
        others = sorted(set(fields) - set(times) - set(prompts))
        if others or len(times) != 1 or len(prompts) != 1:
            found = (
                f"{shorten(others[0], 40)!r} has no meaning here" if others else "one is missing"
            )
            raise self.error(start, f"an entry has a time and a prompt, and {found}; {_OBJECTS}")
        time, prompt, unit = fields[times[0]], str(fields[prompts[0]]), _UNITS_OF_FIELDS[times[0]]
        if unit and (isinstance(time, Decimal) or _BARE_NUMBER.fullmatch(time)):
            return self._at(Decimal(time), unit, prompt, start)
        moment = _moment(str(time))
        if not moment:
            raise self.error(start, f"{shorten(str(time), 40)!r} is no time; write {EXAMPLES}")
        return self._at(moment.value, moment.unit, prompt, start, relative=moment.sign == "+")

    def _at(
        self, value: Decimal, unit: Unit, prompt: str, start: int, *, relative: bool = False
    ) -> Entry:
        self.entries += 1
        if self.entries > MAX_LINES:
            raise self.error(start, f"a timeline has at most {MAX_LINES} entries")
        line, column = self.places.of(start)
        return Entry(
            value=value, unit=unit, text=prompt, relative=relative, line=line, column=column
        )


def _json_escape(escaped: str | None) -> str:
    if escaped is None or escaped == '"':
        return '\\"'
    return escaped if escaped == "'" else f"\\{escaped}"


def _moment(time: str) -> Moment | None:
    """The time that a string says, and nothing else."""
    header = scan(fold(time))
    alone = header and header.separator == "end" and not (header.end or header.spoken)
    return header.start if header and alone and header.known else None
