"""Files of prompts, as editors and spreadsheets save them: read in one place, without torch.

Text has a prompt a line; blank lines and those with # in front hold none. CSV and TSV have a
header, and the prompts below `prompt` in it; JSON lines have them in a field of that name. A row
is counted as a spreadsheet or an editor counts it, from 1, header and blank lines included.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMN = "prompt"
_SEPARATORS = {".csv": (",", ";", "\t"), ".tsv": ("\t", ",", ";")}  # the likeliest first
_NOWHERE = "\x1f"  # separates nothing: the only column takes the whole line
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
_SHOWN = 5  # rows named in a sentence


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """What a file of prompts holds."""

    path: Path
    unit: str
    """What its numbers count: `line` or `row`."""
    prompts: dict[int, str]
    """Prompts by line or row, from 1; white space counts as one space."""
    empty: tuple[int, ...]
    """Rows of a table, or JSON lines, whose prompt is empty."""

    @property
    def left_out(self) -> str | None:
        """What was dropped, and why; None where nothing was."""
        if not self.empty:
            return None
        count = len(self.prompts) + len(self.empty)
        shown = ", ".join(map(str, self.empty[:_SHOWN]))
        more = f" and {len(self.empty) - _SHOWN} more" if len(self.empty) > _SHOWN else ""
        one = len(self.empty) == 1
        return (
            f"{self.path}: {len(self.empty)} of {count} {self.unit}s {'has' if one else 'have'} no "
            f"prompt and {'is' if one else 'are'} left out "
            f"({self.unit if one else self.unit + 's'} {shown}{more})"
        )


def read_prompt_file(path: Path, column: str = COLUMN) -> PromptFile:
    """The prompts of a text file (.txt or no suffix), a .csv, a .tsv or a .jsonl.

    A prompt that stands twice is two. ValueError, one sentence that names the row, for a file that
    is not what its name says or holds no prompt.
    """
    suffix = path.suffix.lower()
    unit = "row" if suffix in _SEPARATORS else "line"
    prompts: dict[int, str] = {}
    empty: list[int] = []
    for number, value in _values(path, suffix, column):
        prompt = _prompt(value, f"{path}, {unit} {number}")
        if prompt:
            prompts[number] = prompt
        else:
            empty.append(number)
    if not prompts:
        rest = f"all {len(empty)} {unit}s are empty" if empty else "write one a line"
        raise ValueError(f"{path} holds no prompts; {rest}")
    return PromptFile(path=path, unit=unit, prompts=prompts, empty=tuple(empty))


def text_lines(path: Path, holds: str = "file of prompts") -> Iterator[str]:
    """The lines of a file in UTF-8, with or without a mark, or as spreadsheets' "Unicode text".

    `holds` says what it should be. ValueError where there is no file, or one of another kind.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a {holds}")
    try:
        with path.open("rb") as raw:
            marked = raw.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff")
            # Translates all ends of lines; splits at none but those, as editors do.
            for line in io.TextIOWrapper(raw, "utf-16" if marked else "utf-8"):
                if "\0" in line:
                    raise UnicodeError
                yield line.replace("\ufeff", "")  # it also stands where files were joined
    except FileNotFoundError:
        raise ValueError(f"there is no {holds} at {path}; check the path") from None
    except UnicodeError:
        raise ValueError(f"{path} is not a text file in UTF-8; save it as one") from None


def _values(path: Path, suffix: str, column: str) -> Iterator[tuple[int, Any]]:
    lines = text_lines(path)
    if suffix in _SEPARATORS:
        return _cells(path, lines, suffix, column)
    if suffix == ".jsonl":
        return _fields(path, lines, column)
    if suffix not in (".txt", ""):
        raise ValueError(
            f"{path} is no file of prompts: save it as .txt with a prompt a line, or as .csv, .tsv "
            f"or .jsonl with the column {column!r}"
        )
    texts = ((number, line.strip()) for number, line in enumerate(lines, 1))
    return ((number, text) for number, text in texts if text and not text.startswith("#"))


def _prompt(value: Any, at: str) -> str:
    """A cell or field as a prompt; empty where there is none."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{at}: the prompt is {json.dumps(value)[:40]}, which is no text")
    prompt = " ".join((value or "").split())
    if "\0" in prompt or re.search("[\ud800-\udfff]", prompt):
        raise ValueError(f"{at}: the prompt has a character that is no text")
    return prompt


def _cells(
    path: Path, lines: Iterator[str], suffix: str, column: str
) -> Iterator[tuple[int, str | None]]:
    first = next(lines, "")
    separators = _SEPARATORS[suffix]
    headers = {each: _header(path, first, each) for each in separators}
    wanted = _plain(column)
    found = [each for each in separators if wanted in map(_plain, headers[each])]
    if not found:
        longest = max(headers.values(), key=lambda cells: len(cells))
        raise ValueError(
            f"{path}, row 1: no column {column!r}; it has {', '.join(longest)[:80] or 'none'}; "
            f"write {column!r} over the prompts, or name their column (data.column in training)"
        )
    separator, header = found[0], [_plain(cell) for cell in headers[found[0]]]
    if header.count(wanted) > 1:
        raise ValueError(f"{path}, row 1: {header.count(wanted)} columns are called {column!r}")
    if len(header) == 1 and separator != "\t":
        separator = _NOWHERE
    place, width = header.index(wanted), len(header)
    for number, row in enumerate(_rows(path, lines, separator, 2), 2):
        if any(cell.strip() for cell in row[width:]):
            raise ValueError(
                f"{path}, row {number}: {len(row)} cells below a header of {width}; put a prompt "
                "that holds the separator in quotes"
            )
        if any(cell.strip() for cell in row):
            yield number, row[place] if place < len(row) else None


def _header(path: Path, line: str, separator: str) -> Sequence[str]:
    return next(_rows(path, iter([line]), separator, 1), [])


def _plain(name: str) -> str:
    return name.strip().casefold()


def _rows(path: Path, lines: Iterator[str], separator: str, first: int) -> Iterator[Sequence[str]]:
    """The cells of each row; `first` is the number of the first one."""
    if separator == "\t":  # where a quote is a character, but for cells that a spreadsheet quoted
        yield from ([*map(_unquoted, line.rstrip("\n").split("\t"))] for line in lines)
        return
    rows = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=True)
    for number in range(first, 2**63):
        try:
            row = next(rows, None)
        except csv.Error:
            raise ValueError(
                f"{path}, row {number}: a quotation mark opens a cell that does not end at the "
                'next one; quote the cell, and write each " in it twice'
            ) from None
        if row is None:
            return
        yield row


def _unquoted(cell: str) -> str:
    quoted = _QUOTED.fullmatch(cell.strip())
    return quoted[1].replace('""', '"') if quoted else cell


def _fields(path: Path, lines: Iterator[str], column: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = {_plain(name): value for name, value in json.loads(line).items()}
            yield number, fields[_plain(column)]
        except (ValueError, KeyError, AttributeError, RecursionError):
            raise ValueError(
                f"{path}, line {number}: not a JSON object with the field {column!r}"
            ) from None
