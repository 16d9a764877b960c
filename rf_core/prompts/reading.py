"""Text to timeline: is it one, in which form, and what does each line say?

A text is a timeline, and each of its lines is read as an entry or refused, if one of these holds.

1. A line begins as an entry of the language does, with a time and a colon (`8s:`, `8s [cut]:`), or
   with what could stand for that alone: a time of zero that brackets or a mark divide from the
   prompt (`[0s] a`, `0s - a`, `0s | a`) or after which another follows (`0s a, 5s b`), a range in
   brackets or with a colon (`[0:05-0:10] a`, `0-5s: a`) or from zero (`0-5s a`).
2. Two lines, and half of all that are not indented, begin with a time that something divides from
   the prompt (`Shot 1 (3s): a`), zero or not.
3. The first time on each of two lines or more, and half of all, is zero on the first and rises
   from line to line, wherever in the line it stands (`0s a`, `a (0s)`, `0, a`); or every line
   begins with one, and they rise (`5s a`, not all of which are decades as in `80s neon`).

Anything else is one prompt, however many times it mentions: `a clock at 8:15`, `a 5 s countdown`,
`2 seconds of calm`, `1920s street`, `16:9 video`. `0s:` in front makes one prompt of any text.

In a timeline a line is read where its time and the beginning of its prompt are beyond doubt; a time
in words or another script counts, a colon, brackets, a dash, an arrow, `=`, a bar or a tab divide.
The others are refused with the line to write instead: no divider (`0s a`), no unit (`0: a`), a
second entry in the same line. Ranges are read if each ends where the next entry begins, or, counted
in frames or chunks, at the one before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from ..ranges import LONGEST_TIMELINE, MAX_LINES
from .pairs import looks_like_pairs, read_pairs
from .timeline import EXAMPLES, Entry, Places, PromptTimeline, Switch, TimelineError, Unit
from .times import Header, Moment, fold, scan, second_time, time_inside

_GLOBAL = re.compile(r"[\s*_]*global[\s*_]*:(?:\*\*|__)?", re.IGNORECASE)
_COMMENT = re.compile(r"\s*(?:#|(?:```|~~~)\w*\s*$)")  # or the fence around code
_HEADING = re.compile(r"\s*##+\s*")
_RULE = re.compile(r"[\s|:+-]*-[\s|:+-]*")  # under a table's head, or between sections
_FIELD = re.compile(r"\s*(?:prompt|text|description)\s*:", re.IGNORECASE)
_BLOCK_MARKS = ("|", ">", "|-", ">-")  # YAML's, before text on the lines below
_CUE_NUMBER = re.compile(r"\s*[0-9]+\s*")


class _Line(NamedTuple):
    number: int
    text: str
    folded: str
    header: Header | None

    @property
    def column(self) -> int:
        return len(self.folded) - len(self.folded.lstrip()) + 1

    def error(self, problem: str, at: int | None = None) -> TimelineError:
        return TimelineError(problem, self.number, self.column if at is None else at + 1)


def parse_timeline(text: str) -> PromptTimeline:
    """Read a timeline, in any of the forms above; TimelineError says where it is wrong."""
    if len(text) > LONGEST_TIMELINE:
        raise _too_many(len(text), "characters", LONGEST_TIMELINE)
    prefix, lines = _take_global(_lines(text.removeprefix("\ufeff")))
    headings = [line for line in lines if _HEADING.match(line.folded)]
    lines = [_cleared(line) if _COMMENT.match(line.folded) else line for line in lines]
    body, folded = ("\n".join(part) for part in zip(*(line[1:3] for line in lines), strict=True))
    if looks_like_pairs(folded):
        entries = read_pairs(body, folded)
    elif _is_timed(lines):
        entries = _read_timed(lines)
    else:
        _check_headings(headings)
        entries = _read_untimed(body, folded)
    if len(entries) == 1 and (second := second_time(entries[0].text, None)):
        raise entries[0].error(
            f"{second} stands inside the prompt; write each time on a line of its own, or leave "
            "its colon out if this is one prompt"
        )
    return PromptTimeline(entries=tuple(entries), global_prefix=prefix)


def _too_many(count: int, of: str, most: int) -> TimelineError:
    return TimelineError(f"this text has {count} {of}; a timeline has at most {most}", 1, 1)


def _lines(text: str) -> list[_Line]:
    rows = text.splitlines() or [""]
    if len(rows) > MAX_LINES:
        raise _too_many(len(rows), "lines", MAX_LINES)
    folded = map(fold, rows)
    return [
        _Line(number, row, plain, scan(plain))
        for number, (row, plain) in enumerate(zip(rows, folded, strict=True), 1)
    ]


def _cleared(line: _Line) -> _Line:
    return _Line(line.number, "", "", None)


def _take_global(lines: list[_Line]) -> tuple[str, list[_Line]]:
    found = [(at, match) for at, line in enumerate(lines) if (match := _GLOBAL.match(line.folded))]
    if not found:
        return "", lines
    at, match = found[0]
    if len(found) > 1:
        raise lines[found[1][0]].error(
            f"global is given twice, first on line {at + 1}; join the two in one line"
        )
    end = at + 1
    while end < len(lines) and _is_deeper(lines[end], lines[at]) and not _entry(lines[end], None):
        end += 1
    texts = [
        lines[at].text[match.end() :],
        *(line.text for line in lines[at + 1 : end] if not _COMMENT.match(line.folded)),
    ]
    prefix = " ".join(texts)
    if not prefix.strip():
        raise lines[at].error("global has no text; write some or remove the line")
    return prefix, [*lines[:at], *map(_cleared, lines[at:end]), *lines[end:]]


def _is_timed(lines: list[_Line]) -> bool:
    written = [line for line in lines if line.folded.strip()]
    # As `to_text` would write it: a header must not come about, or go, on the way there and back.
    one = " ".join(" ".join(line.folded for line in written).replace("|", " | ").split())
    joined = _Line(1, one, one, scan(one))
    if any(header and _is_certain(header, text) for _, _, text, header in (*written, joined)):
        return True
    outer = [line.header for line in written if line.column <= written[0].column]
    likely = [header for header in outer if header and _is_likely(header)]
    return 2 <= len(likely) >= len(outer) / 2 or _rises(written)


def _is_certain(header: Header, line: str) -> bool:
    if header.of:
        return False
    colon = header.separator == ":" or header.mode_at >= 0
    if header.end:
        closed = header.known and (header.bracketed or colon)
        return closed or (header.from_zero and (colon or (header.known and not header.spoken)))
    if colon and not header.spoken and not header.bracketed:
        return True
    if header.start.clock and header.start.written.count(":") > 2:
        return True
    alone = header.spoken and header.separator == "end"
    if not header.from_zero:
        return False
    prompt = line[header.text_at :].lstrip()
    crowded = not prompt.startswith((",", ".", ";")) and second_time(prompt, header)
    return colon or (header.known and (header.divided or alone or bool(crowded)))


def _is_likely(header: Header) -> bool:
    divided = header.divided or (header.separator == "end" and header.spoken)
    return divided and header.known and not header.of and not header.decade


def _rises(lines: Sequence[_Line]) -> bool:
    found = list[tuple[str, Fraction]]()
    for line in lines:
        moment = line.header.start if line.header else time_inside(line.folded)
        if moment and moment.number is not None and not (line.header and line.header.of):
            found.append(moment.place if moment.known else ("", Fraction(moment.number)))
    if len(found) < 2 or len(found) < len(lines) / 2:
        return False
    rising = all(before[1] < after[1] for before, after in pairwise(found))
    if not rising or len({kind for kind, _ in found}) != 1:
        return False
    begun = [line.header for line in lines if line.header and line.header.known]
    everywhere = len(begun) == len(lines) and not all(header.decade for header in begun)
    return everywhere or not found[0][1]


class _Block(NamedTuple):
    line: _Line
    header: Header
    texts: list[str]


def _read_timed(lines: list[_Line]) -> list[Entry]:
    blocks = list[_Block]()
    for line in _without_ornaments(lines):
        above = blocks[-1] if blocks else None
        if header := _entry(line, above):
            blocks.append(_Block(line, header, [_prompt(line, header)]))
        elif not line.folded.strip():
            continue
        elif above and above.header.spoken and _FIELD.match(line.folded):
            raise line.error(
                f"fields are not read; write '{above.header.start}: a prompt' in one line"
            )
        elif above and (_is_deeper(line, above.line) or _takes(above, line)):
            if fold(above.texts[0]).strip() in _BLOCK_MARKS:
                above.texts[0] = ""
            above.texts.append(line.text)
        else:
            raise _no_entry(line)
    entries = [_read_entry(block) for block in blocks]
    _check_ranges(blocks, entries)
    return entries


def _without_ornaments(lines: list[_Line]) -> list[_Line]:
    """Without subtitles' numbers and a table's head and rule."""
    kept = list(lines)
    for at, line in enumerate(lines):
        below = lines[at + 1].header if at + 1 < len(lines) else None
        if below and below.start.clock and below.end and _CUE_NUMBER.fullmatch(line.folded):
            kept[at] = _cleared(line)
        elif _RULE.fullmatch(line.folded):
            kept[at] = _cleared(line)
            if at and "|" in line.folded and not lines[at - 1].header:
                kept[at - 1] = _cleared(line)
        elif line.folded.strip() == "WEBVTT":
            kept[at] = _cleared(line)
    return kept


def _entry(line: _Line, above: _Block | None) -> Header | None:
    """What `line` begins with, if that begins an entry, be its time right or wrong."""
    header = line.header
    if not header or header.of:
        return None
    colon = header.separator == ":" or header.mode_at >= 0
    if above and _is_deeper(line, above.line) and above.header.separator == ":" and not colon:
        return None  # a continuation that begins with a number
    if colon and not header.spoken:
        return header
    alone = header.separator == "end" and (header.end is not None or header.spoken)
    return header if header.known and (header.divided or alone) else None


def _prompt(line: _Line, header: Header) -> str:
    """What follows the header in its line."""
    text = line.text[header.text_at :]
    if header.quoted:
        time = header.start if header.start.known else "8s"
        raise line.error(f"remove the quotes around this line; write it as '{time}: a prompt'")
    if header.row:
        text = text[: len(fold(text).rstrip().removesuffix("|"))]
    if (header.row and header.separator != "|") or (header.separator == "|" and "|" in fold(text)):
        raise line.error(
            "this row has not two cells, a time and a prompt; write '8s: a prompt' instead"
        )
    plain = header.separator == ":" and not (header.bracketed or header.end or header.spoken)
    if not plain and (second := second_time(text, header)):
        raise line.error(
            f"a second time, {second!r}, stands in this line; write each on a line of its own, as "
            "in '8s: a prompt'",
            header.text_at + fold(text).find(second),
        )
    return text


def _takes(above: _Block, line: _Line) -> bool:
    """Whether `line` is the prompt of an entry that has none beside its time."""
    if fold(above.texts[0]).strip():
        return False
    return not line.header or not line.header.known or line.header.of


def _no_entry(line: _Line) -> TimelineError:
    header = line.header
    moment = header.start if header else time_inside(line.folded)
    if header and not header.known and (header.divided or header.from_zero or header.start.clock):
        return _unknown(line, header.end if header.start.known and header.end else moment)
    if moment and moment.known and not moment.sign and not (header and header.of):
        return line.error(
            f"no colon divides time and prompt here; write it as '{moment}: a prompt', or indent "
            "the line to continue the entry above",
            moment.at,
        )
    return line.error(
        "this line has no time and colon in front; begin it as in '8s [cut]: prompt', or indent "
        "it to continue the entry above"
    )


def _unknown(line: _Line, moment: Moment | None) -> TimelineError:
    assert moment is not None and not moment.known
    return line.error(
        f"{moment.problem}; write {EXAMPLES}, or put '0s:' in front if this is a prompt", moment.at
    )


def _read_entry(block: _Block) -> Entry:
    line, header, texts = block
    if header.mode_at >= 0 and header.mode is None:
        raise line.error(
            "the mode is not closed by a bracket and a colon; write it as in '8s [cut]: prompt'",
            header.mode_at,
        )
    for moment in filter(None, (header.start, header.end)):
        if not moment.known:
            raise _unknown(line, moment)
    switch = Switch()
    if header.mode is not None:
        try:
            switch = Switch.parse(header.mode)
        except ValueError as error:
            raise line.error(str(error), header.mode_at) from error
    return Entry(
        value=header.start.value,
        unit=header.start.unit,
        text=" ".join(texts),
        relative=header.start.sign == "+",
        switch=switch,
        line=line.number,
        column=header.start.at + 1,
    )


def _check_ranges(blocks: Sequence[_Block], entries: Sequence[Entry]) -> None:
    for at, (line, header, _) in enumerate(blocks):
        end = header.end
        if not end:
            continue
        if header.start.sign or end.place[0] != header.start.place[0]:
            raise entries[at].error(f"a range counts from the start, in one unit; write {EXAMPLES}")
        if end.place <= header.start.place:
            raise line.error(f"this range ends at {end}, before it has begun", end.at)
        if at + 1 == len(blocks):
            continue
        after = blocks[at + 1].header.start
        counted = header.start.unit in ("f", "c") and after.unit == header.start.unit
        meets = [end.place, (end.place[0], end.place[1] + 1)] if counted else [end.place]
        if after.sign or after.place not in meets:
            raise entries[at + 1].error(
                f"the range above ends at {end}, but this entry begins at {after}; let them meet, "
                f"or write '{after}: a prompt' and the like without the ends"
            )


def _check_headings(headings: Sequence[_Line]) -> None:
    found = [(line, header) for line in headings if (header := scan(line.folded.lstrip("# ")))]
    if len(found) > 1 and all(header.known and not header.of for _, header in found):
        line, header = found[0]
        raise line.error(
            f"a line that starts with # is a comment; write '{header.start}: a prompt' instead"
        )


def _read_untimed(body: str, folded: str) -> list[Entry]:
    if not body.strip():
        raise TimelineError("there is no prompt; write one, such as '0s: a panda walks'", 1, 1)
    parts = folded.split("|")
    if len(parts) > MAX_LINES:
        raise _too_many(len(parts), "parts", MAX_LINES)
    unit: Unit = "part" if len(parts) > 1 else "s"
    places, offset, entries = Places(folded), 0, list[Entry]()
    for number, part in enumerate(parts):
        line, column = places.of(offset + len(part) - len(part.lstrip()))
        text = body[offset : offset + len(part)].replace("\ufeff", " ")
        value = Decimal(number)
        entries.append(Entry(value=value, unit=unit, text=text, line=line, column=column))
        offset += len(part) + 1
    return entries


def _is_deeper(line: _Line, above: _Line) -> bool:
    return not line.folded.strip() or _depth(line) > _depth(above)


def _depth(line: _Line) -> int:
    wide = line.text.expandtabs()
    return len(wide) - len(wide.lstrip())
