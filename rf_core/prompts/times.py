"""What a time looks like at the start of a line, in the many ways in which people write one.

A line is scanned from left to right, each step a small pattern that looks once at what it takes, so
the work is linear in the line. It is scanned in its folded form: character for character the same
length, with the digits, quotes, dashes, colons and blanks of every script made those of ASCII.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import get_args

from ..config import FPS
from .timeline import Mode, Unit, shorten

_LONGEST_NUMBER = 40  # in digits; no time needs as many, and longer ones are slow to compute with

_SPELLINGS: tuple[tuple[str, Unit, str], ...] = (
    ("s sec secs second seconds 秒 秒钟 秒鐘 秒間", "s", "1"),
    ("ms msec msecs millisecond milliseconds 毫秒 ミリ秒", "s", "0.001"),
    ("min mins minute minutes 分 分钟 分鐘 分間", "s", "60"),
    ("f fr frame frames 帧 幀 コマ フレーム", "f", "1"),
    ("c chunk chunks 块 塊", "c", "1"),
)
_WORDS = {
    word: (unit, Decimal(scale)) for words, unit, scale in _SPELLINGS for word in words.split()
}

_ALIKE = {
    **dict.fromkeys("“”„‟«»″〝〞〟「」『』", '"'),
    **dict.fromkeys("‘’‚‛‹›′´", "'"),
    **dict.fromkeys("【〔〖", "["),
    **dict.fromkeys("】〕〗", "]"),
    **dict.fromkeys("→⇒➔➜➡⟶⟹", ">"),
    **dict.fromkeys("•◦▪‣●·・", "*"),
    **dict.fromkeys("−", "-"),
    **dict.fromkeys("〜∼", "~"),
    **dict.fromkeys("∶﹕", ":"),
    **dict.fromkeys("、﹐", ","),
    **dict.fromkeys("｜│┃", "|"),
}


def _either(words: str) -> str:
    latin = [word for word in words.split() if word.isascii()]
    other = [word for word in words.split() if not word.isascii()]
    latin, other = (sorted(some, key=len, reverse=True) for some in (latin, other))
    return f"(?:(?:{'|'.join(latin)})(?![a-z])|{'|'.join(other)})"


def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


_DIGITS = r"[0-9]+(?:[.,]+[0-9]+)*"
_UNIT = _either(" ".join(_WORDS))
_BLANK = _pattern(r"\s*")
_ANY_DIGIT = _pattern(r"[^0-9]{0,80}[0-9]")
_BULLET = _pattern(r"(?:[-*>]|\[[ x]?\]|\(?(?:[0-9]{1,3}|[a-z])[.)])(?=\s)")
_BAR = _pattern(r"\|")
_MARKS = _pattern(r"[\"'`*_]{1,4}")
_LABEL = _pattern(
    r"(?:shot|scene|clip|part|segment|beat|act|step|prompt|镜头|鏡頭|场景|場景|片段|分镜|シーン|カット)"
    r"\s?#?(?:[0-9]{1,4}|[一二三四五六七八九十]{1,3})(?![0-9a-z])"
)
_LABEL_END = _pattern(r"[,:.|-]")
_LEAD = _pattern(r"(?:at|from|timestamp|time|t|从|從)(?![a-z])|f(?=[0-9])|@|第")
_LEAD_END = _pattern(r"[:=]")
_OPEN = _pattern(r"[\[({<]")
_CLOSE = _pattern(r"[\])}>]")
_SIGN = _pattern(r"[+-]")
_NAMED = _pattern(r"c(?=\s*[0-9])|(?:frames?|chunks?|seconds?)(?=\s?[0-9])")
_CLOCK = _pattern(rf"[0-9]+(?::{_DIGITS})+(?!\s?[ap]\.?m)")
_NUMBER = _pattern(rf"\.?{_DIGITS}")
_MINUTES = _pattern(
    r"(?:h\s?(?P<minutes>[0-9]{1,2})\s?)?(?:m|mins?|minutes?|分)\s?(?P<seconds>[0-9]{1,2}(?:\.[0-9]{1,3})?)\s?"
    r"(?:(?:s|secs?|seconds?)(?![a-z])|秒)"
)
_KNOWN_UNIT = _pattern(_UNIT)
_UNKNOWN_UNIT = _pattern(r"[a-z]+")
_JOINT = _pattern(r"-{1,3}>?|=>|>|~|\.{2,3}|…|(?:to|until|till|through|thru)(?![a-z])|到|至|から")
_RANGE_ENDS = _pattern(r"[\])}>:|=*_\t-]|$")
_CUE_SETTINGS = _pattern(r"(?:(?:align|line|position|size|vertical|region):\S+\s*)+$")
_MODE = _pattern(r"\[(?P<mode>[^\]]*)\]\s*:")
_UNFINISHED = _pattern(rf"\[\s*(?:{'|'.join(get_args(Mode))})\b")
_SEPARATOR = _pattern(r":{1,2}|={1,2}>|-{1,2}>|>{1,3}|=(?!=)|-{1,3}(?=\s|$)|\||$")
_DECADE = _pattern(r"(?:[12][0-9])?[1-9]0s")
_RATIO = _pattern(":[0-9]")
_OF = _pattern("of(?![a-z])")

_CLOCK_TIME = re.compile(
    r"(?:(?P<hours>[0-9]+):(?P<minute>[0-5]?[0-9])|(?P<minutes>[0-9]+))"
    r":(?P<seconds>[0-5][0-9](?:[.,][0-9]+)?)"
)
_PLAIN_NUMBER = re.compile(r"[0-9]*\.?[0-9]+|[0-9]+,[0-9]{1,2}")  # 1,500 may mean two things

_CLOCK_INSIDE = r"[0-9]{1,3}(?::[0-5][0-9]){1,2}(?![:0-9]|\s?[ap]\.?m)"
_NUMBER_INSIDE = r"[0-9]{1,9}(?:[.,][0-9]{1,3})?"
_INSIDE = rf"(?<![0-9a-z.,:])(?:{_NUMBER_INSIDE}\s?{_UNIT}|{_CLOCK_INSIDE})"
_TIME_INSIDE = _pattern(
    rf"(?<![0-9a-z.,:])(?:(?P<number>{_NUMBER_INSIDE})(?:\s?(?:-|~|to)\s?{_NUMBER_INSIDE})?"
    rf"\s?(?P<unit>{_UNIT})|(?P<named>(?:frames?|chunks?)\s[0-9]{{1,9}})|(?P<clock>{_CLOCK_INSIDE}))"
)
_SECOND = {
    "[": _pattern(rf"[\[(<]\s?(?:{_NUMBER_INSIDE}\s?-\s?)?{_INSIDE}[^\])>]{{0,20}}[\])>]"),
    **{
        mark: _pattern(rf"{_INSIDE}\s?{before}{re.escape(mark)}(?=\s*\S)")
        for mark, before in ((":", ""), ("=", ""), (">", "[-=]{0,2}"), ("-", ""))
    },
    "|": _pattern(r"\|"),
    "": _pattern(rf"(?<=[,;.!?|])\s?{_INSIDE}(?=\s+\S)"),
}
_SECOND_PLAIN = _pattern(
    r"(?<=[,;.!?|])\s?(?!0+(?:\.0+)?\s?[a-z秒])[0-9]{1,3}(?:\.[0-9]{1,3})?\s?"
    r"(?:(?:s|secs?|seconds?|f|frames?)|秒)\s?:(?=\s*[^\s0-9])"
)


def fold(text: str) -> str:
    """`text` at its length, with the look-alikes of ASCII's digits and punctuation made ASCII."""
    return text if text.isascii() else "".join(map(_fold_character, text))


@lru_cache(maxsize=1 << 16)
def _fold_character(character: str) -> str:
    if character in _ALIKE:
        return _ALIKE[character]
    if "\uff01" <= character <= "\uff5e":  # the full-width forms of ASCII
        return chr(ord(character) - 0xFEE0)
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    # Marks without width, such as a byte order mark in the middle, hide what stands behind them.
    return {"Pd": "-", "Zs": " ", "Cf": " "}.get(category, character)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A time as it was found in a line."""

    written: str
    """What stands there."""
    at: int
    """Where in the line, from 0."""
    number: Decimal | None
    """How many units, or None for what is not a number."""
    word: str
    """The unit's word in small letters; empty for none, or for what is not a time."""
    sign: str = ""
    """`+`, `-` or nothing."""
    clock: bool = False
    """Whether it is written as hours, minutes and seconds."""

    @property
    def known(self) -> bool:
        """Whether number and unit are both known."""
        return self.number is not None and self.word in _WORDS

    @property
    def unit(self) -> Unit:
        """The unit of a known moment."""
        return _WORDS[self.word][0]

    @property
    def value(self) -> Decimal:
        """A known moment in its `unit`s."""
        assert self.number is not None
        scale = _WORDS[self.word][1]
        value = self.number if scale == 1 else self.number * scale
        return -value if self.sign == "-" else value

    @property
    def place(self) -> tuple[str, Fraction]:
        """What a known moment counts on, images or chunks, and how many of them."""
        value = Fraction(self.value)
        if self.unit == "c":
            return "chunks", value
        return "images", value * (FPS if self.unit == "s" else 1)

    @property
    def problem(self) -> str:
        """Why a moment is not known."""
        shown = repr(shorten(self.written, 40))
        if self.number is None:
            return f"{shown} is not a time"
        return f"{shown} has {f'the unknown unit {self.word!r}' if self.word else 'no unit'}"

    def __str__(self) -> str:
        """A known moment as the language writes it."""
        digits = f"{self.value:f}"
        digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
        return self.sign.strip("-") + (f"c{digits}" if self.unit == "c" else digits + self.unit)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a line begins with, up to the prompt."""

    start: Moment
    end: Moment | None
    """Where a range ends."""
    row: bool
    """Whether a bar comes first, as in a table's row."""
    quoted: bool
    """Whether a quote opens in front of the time and does not end before the prompt."""
    spoken: bool
    """Whether words come first: `Shot 1`, `At`."""
    bracketed: bool
    """Whether the time stands in brackets of its own."""
    mode: str | None
    mode_at: int
    """Where the mode's brackets hold it, or open without an end; -1 for no mode."""
    separator: str
    """What divides time and prompt: one of `:=>-|`, a tab, `end` of the line, or nothing."""
    of: bool
    """Whether `of` follows: 2 seconds of calm are no time."""
    text_at: int

    @property
    def known(self) -> bool:
        """Whether all its times are known."""
        return self.start.known and (self.end is None or self.end.known)

    @property
    def from_zero(self) -> bool:
        """Whether it is at 0, in whatever unit."""
        return self.start.number == 0

    @property
    def divided(self) -> bool:
        """Whether it is clear where the prompt begins."""
        return self.bracketed or self.separator not in ("", "end") or self.mode_at >= 0

    @property
    def decade(self) -> bool:
        """Whether the time may as well be a decade, such as 1920s or 80s."""
        return _DECADE.fullmatch(self.start.written) is not None


class _Scanner:
    def __init__(self, line: str) -> None:
        self.line = line
        self.at = 0
        self.taken = 0
        self.blank = ""
        self._skip()

    def _skip(self) -> None:
        found = _BLANK.match(self.line, self.at)
        assert found is not None, "the pattern may be empty"
        self.blank, self.at = found[0], found.end()

    def take(self, pattern: re.Pattern[str]) -> str | None:
        """What `pattern` finds here; blanks behind it are skipped."""
        found = pattern.match(self.line, self.at)
        if not found:
            return None
        self.at = self.taken = found.end()
        self._skip()
        return found[0]


def scan(line: str) -> Header | None:
    """What a folded line begins with, where that is a time of any form."""
    if not _ANY_DIGIT.match(line):
        return None
    scanner = _Scanner(line)
    while scanner.take(_BULLET):
        pass
    bar = scanner.take(_BAR)
    marks = scanner.take(_MARKS)
    spoken, marks_end = _take_label(scanner)
    bracket = scanner.take(_OPEN)
    if scanner.take(_LEAD):
        spoken = True
        scanner.take(_LEAD_END)
    bracket = bracket or scanner.take(_OPEN)
    start, end = _take_range(scanner)
    if not start:
        return None
    closed = bool(bracket and scanner.take(_CLOSE))
    if marks and not marks_end:
        marks_end = scanner.take(_MARKS)
    of = bool(_OF.match(line, scanner.at))
    ratio = not (end or start).word and _RATIO.match(line, scanner.at)  # 2.39:1
    undivided = bool(ratio) or (bracket is not None and not closed)
    mode, mode_at, separator = (None, -1, "") if undivided else _take_separator(scanner)
    if marks and not marks_end:
        marks_end = scanner.take(_MARKS)
    return Header(
        start=start,
        end=end,
        row=bar is not None,
        quoted=bool(marks and not marks_end),
        spoken=spoken,
        bracketed=closed,
        mode=mode,
        mode_at=mode_at,
        separator=separator,
        of=of,
        text_at=scanner.taken,
    )


def time_inside(line: str) -> Moment | None:
    """The first time with a unit anywhere in a folded line, of a range the start."""
    found = _TIME_INSIDE.search(line)
    if not found:
        return None
    written = f"{found['number']}{found['unit']}" if found["number"] else found[0]
    moment = _take_moment(_Scanner(written))
    return replace(moment, at=found.start()) if moment else None


def second_time(prompt: str, header: Header | None) -> str | None:
    """A time inside `prompt` that stands there as the one of its `header` does.

    None stands for the language's own form, in which a time counts behind a stop or a bar alone.
    """
    pattern = _SECOND_PLAIN
    if header:
        pattern = _SECOND.get("[" if header.bracketed else header.separator, _SECOND[":"])
    found = pattern.search(fold(prompt))
    return found[0].strip() if found else None


def _take_label(scanner: _Scanner) -> tuple[bool, str | None]:
    """Whether there is one, and the marks that close behind it."""
    if not scanner.take(_LABEL):
        return False, None
    marks = scanner.take(_MARKS)
    scanner.take(_LABEL_END)
    return True, scanner.take(_MARKS) or marks


def _take_range(scanner: _Scanner) -> tuple[Moment | None, Moment | None]:
    start = _take_moment(scanner)
    here = scanner.at, scanner.taken, scanner.blank
    if not start or not scanner.take(_JOINT):
        return start, None
    end = None if scanner.line.startswith(("+", "-"), scanner.at) else _take_moment(scanner)
    if end and _CUE_SETTINGS.match(scanner.line, scanner.at):
        scanner.at = scanner.taken = len(scanner.line)
    if not end or not (end.word or _RANGE_ENDS.match(scanner.line, scanner.at)):
        scanner.at, scanner.taken, scanner.blank = here
        return start, None
    if not start.word and start.number is not None and end.known:
        start = replace(start, word=end.word)
    elif not end.word and end.number is not None and start.known:
        end = replace(end, word=start.word)
    return start, end


def _take_moment(scanner: _Scanner) -> Moment | None:
    begin, clock = scanner.at, None
    sign = scanner.take(_SIGN) or ""
    named = scanner.take(_NAMED)
    if not named:
        clock = scanner.take(_CLOCK)
    if clock:
        number, word = _clock_seconds(clock), "s"
    elif digits := scanner.take(_NUMBER):
        number = _plain(digits)
        number, word = (number, named.lower()) if named else _take_unit(scanner, number)
    else:
        scanner.at = begin
        return None
    written = scanner.line[begin : scanner.at].rstrip()
    return Moment(written=written, at=begin, number=number, word=word, sign=sign, clock=bool(clock))


def _take_unit(scanner: _Scanner, number: Decimal | None) -> tuple[Decimal | None, str]:
    minutes = _MINUTES.match(scanner.line, scanner.at)
    if minutes and number is not None:
        scanner.take(_MINUTES)
        if minutes["minutes"]:
            number = number * 60 + Decimal(minutes["minutes"])
        return number * 60 + Decimal(minutes["seconds"]), "s"
    known = scanner.take(_KNOWN_UNIT)
    if not known and not scanner.blank:
        known = scanner.take(_UNKNOWN_UNIT)
    return number, (known or "").lower()


def _take_separator(scanner: _Scanner) -> tuple[str | None, int, str]:
    """The mode, where it is, and what divides the time from the prompt."""
    begin, tab = scanner.at, "\t" in scanner.blank
    if mode := _MODE.match(scanner.line, begin):
        scanner.take(_MODE)
        return mode["mode"], mode.start("mode"), ":"
    if _UNFINISHED.match(scanner.line, begin):
        return None, begin, ""
    found = scanner.take(_SEPARATOR)
    if found is None:
        return None, -1, "\t" if tab else ""
    return None, -1, found[-1:] or "end"


def _plain(digits: str) -> Decimal | None:
    if len(digits) > _LONGEST_NUMBER or not _PLAIN_NUMBER.fullmatch(digits):
        return None
    return Decimal(digits.replace(",", "."))


def _clock_seconds(clock: str) -> Decimal | None:
    found = _CLOCK_TIME.fullmatch(clock) if len(clock) <= _LONGEST_NUMBER else None
    if not found:
        return None
    minutes = Decimal(found["minutes"] or 60 * int(found["hours"]) + int(found["minute"]))
    return minutes * 60 + Decimal(found["seconds"].replace(",", "."))
