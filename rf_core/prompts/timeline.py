"""Prompts in time: when a chunk starts, how a prompt is switched to, and where each one falls."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor, isfinite
from typing import Any, Literal, get_args

from ..config import FPS, TEMPORAL_FACTOR, CacheConfig

Mode = Literal["soft", "recache", "blend", "cut"]
Interpolation = Literal["lerp", "slerp"]
Unit = Literal["s", "f", "c", "part"]

_LATEST = 10**9  # in any unit: years of video, and numbers that stay cheap to compute with
_NAMED = 40  # columns of a prompt that a sentence names
# How a time is written, for messages.
EXAMPLES = "seconds as 8s or 0:08, video frames as 96f, chunks as c40"


class TimelineError(ValueError):
    """A timeline that cannot be followed: the problem and its remedy, at a line and column."""

    def __init__(self, problem: str, line: int, column: int) -> None:
        super().__init__(problem, line, column)
        self.problem = problem
        self.line = line
        """Counted from 1. An appended entry counts as the line below the last entry."""
        self.column = column
        """Counted from 1, in characters; a tab is one."""

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}: {self.problem}"


class Places:
    """Line and column, both from 1, of offsets in a text that are asked for in rising order."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at, self._line, self._begin = 0, 1, 0

    def of(self, at: int) -> tuple[int, int]:
        """Where the character at offset `at` stands."""
        self._line += self._text.count("\n", self._at, at)
        begin = self._text.rfind("\n", self._at, at) + 1
        self._at, self._begin = at, begin or self._begin
        return self._line, at - self._begin + 1


@dataclass(frozen=True, kw_only=True)
class ChunkClock:
    """Where chunks lie in time, in images: a pure function of the chunk's size and the cuts.

    A latent frame decodes to `TEMPORAL_FACTOR` images, but the first one after a fresh start to a
    single image, so chunk 0 and every chunk that is cut to are three images shorter, and shorter
    still where a first chunk has fewer latent frames.
    """

    chunk_frames: int = CacheConfig.chunk_frames
    """Latent frames of a chunk."""
    first_chunk_frames: int | None = None
    """Those of a chunk that starts afresh; None for as many."""
    cuts: tuple[int, ...] = ()
    """Chunks that start afresh, rising, from 1 on."""
    fresh: bool = True
    """Whether chunk 0 starts afresh; it does not where a run goes on from another's state."""
    clip_chunks: int = 0
    """Chunks of the start clip, which is shown as it is: a prompt changes after it."""
    fps: int = FPS
    """Images a second."""

    @classmethod
    def of(cls, cache: CacheConfig, **fields: Any) -> ChunkClock:
        """The clock of a stream through that cache; `fields` are the clock's others."""
        first = cache.first_chunk_frames
        return cls(chunk_frames=cache.chunk_frames, first_chunk_frames=first, **fields)

    def __post_init__(self) -> None:
        if self.chunk_frames < 1:
            raise ValueError(f"chunk_frames is {self.chunk_frames}; a chunk has at least 1 frame")
        if not 1 <= self._first_frames <= self.chunk_frames:
            raise ValueError(
                f"first_chunk_frames is {self.first_chunk_frames}; a first chunk has 1 to "
                f"{self.chunk_frames} frames"
            )
        first = max(1, self.clip_chunks)
        if list(self.cuts) != sorted(set(self.cuts)) or (self.cuts and self.cuts[0] < first):
            raise ValueError(
                f"cuts are {self.cuts}; give chunks from {first} on, each once, rising"
            )

    def images_before(self, chunk: int) -> int:
        """The first image of `chunk`: how many images the chunks before it hold."""
        frames = self.frames_before(chunk)
        return frames * TEMPORAL_FACTOR - self._begun_before(chunk) * (TEMPORAL_FACTOR - 1)

    def frames_before(self, chunk: int) -> int:
        """Latent frames of the chunks before `chunk`."""
        shorter = self.chunk_frames - self._first_frames
        return chunk * self.chunk_frames - self._begun_before(chunk) * shorter

    @property
    def _first_frames(self) -> int:
        return self.chunk_frames if self.first_chunk_frames is None else self.first_chunk_frames

    def _begun_before(self, chunk: int) -> int:
        return bisect_left(self.cuts, chunk) + (self.fresh and chunk > 0)

    def begun_with(self, chunk: int) -> int:
        """The image that the decoder's stream of `chunk` begins with: 0, or the last cut's."""
        cuts = [cut for cut in self.cuts if cut <= chunk]
        return self.images_before(cuts[-1]) if cuts else 0

    def images_of(self, chunk: int) -> int:
        """Images that `chunk` decodes to."""
        return self.images_before(chunk + 1) - self.images_before(chunk)

    def seconds(self, chunk: int) -> float:
        """When `chunk` starts; for a chunk count, how long the video is."""
        return self.images_before(chunk) / self.fps

    def chunk_at_image(self, image: int) -> int:
        """The chunk that holds `image`, counted from 0."""
        return bisect_right(range(image), image, key=lambda chunk: self.images_before(chunk + 1))

    def nearest_chunk(self, images: Fraction) -> int:
        """The chunk whose start is nearest to a time in images; the later one in a tie."""
        chunk = self.chunk_at_image(floor(images))
        start, end = self.images_before(chunk), self.images_before(chunk + 1)
        return chunk if images - start < end - images else chunk + 1

    def num_chunks(self, length: float, unit: Literal["s", "f", "c"]) -> int:
        """The fewest chunks that make at least `length` `unit`s of video.

        ValueError unless the length is positive, and holds the start clip.
        """
        name = {"s": "seconds", "f": "frames", "c": "chunks"}[unit]
        if not (isfinite(length) and length > 0):
            raise ValueError(f"{name} is {length}; a length of video is a positive number")
        chunks = ceil(length)
        if unit != "c":
            images = ceil(Fraction(length) * (self.fps if unit == "s" else 1))
            chunks = self.chunk_at_image(images - 1) + 1
        if chunks < self.clip_chunks:
            raise ValueError(
                f"a length of {length:g} {name}, and the start clip alone lasts {self.clip_chunks} "
                f"chunks, {self.seconds(self.clip_chunks):g} s; ask for more, or start with less"
            )
        return chunks

    def with_cuts(self, *chunks: int) -> ChunkClock:
        """The clock with `chunks` cut to as well."""
        return replace(self, cuts=tuple(sorted({*self.cuts, *chunks})))


@dataclass(frozen=True, kw_only=True)
class Switch:
    """How a stream goes over to a new prompt. `str` gives it as the language writes it."""

    mode: Mode = "recache"
    """`soft`: cross-attention alone. `recache`: the window is rewritten too. `blend`: the
    embedding moves over in steps, then one recache; a switch that comes before it is done starts
    from where the embedding then stands. `cut`: everything starts afresh."""
    blend_chunks: int = 0
    """Chunks a blend takes, the last being fully the new prompt; 0 for the other modes."""
    interpolation: Interpolation = "lerp"
    """How a blend moves between embeddings."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"unknown mode {self.mode!r}; use soft, recache, blend K or cut")
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(f"unknown interpolation {self.interpolation!r}; use lerp or slerp")
        if self.mode == "blend" and self.blend_chunks < 1:
            raise ValueError(
                f"a blend over {self.blend_chunks} chunks; it takes at least 1, as in blend 3"
            )
        if self.mode != "blend" and (self.blend_chunks or self.interpolation != "lerp"):
            raise ValueError(f"{self.mode} takes neither chunks nor interpolation; only blend does")

    @classmethod
    def parse(cls, text: str) -> Switch:
        """Read what stands between the brackets, such as `blend 3 slerp`; ValueError if wrong."""
        mode, *rest = text.lower().split() or [""]
        if mode != "blend":
            if mode in get_args(Mode) and rest:
                raise ValueError(f"{mode} stands alone; remove {' '.join(rest)!r}")
            return cls(mode=mode)  # type: ignore[arg-type]  # checked on construction
        if len(rest) not in (1, 2) or not re.fullmatch("[0-9]{1,9}", rest[0]):
            raise ValueError(f"{text.strip()!r} is no blend; write blend 3 or blend 3 slerp")
        interpolation = rest[1] if len(rest) == 2 else "lerp"
        return cls(mode="blend", blend_chunks=int(rest[0]), interpolation=interpolation)  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.mode != "blend":
            return self.mode
        ending = "" if self.interpolation == "lerp" else f" {self.interpolation}"
        return f"blend {self.blend_chunks}{ending}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One prompt and its time as written; TimelineError where either is impossible."""

    value: Decimal
    """When, in `unit`s."""
    unit: Unit
    """`s` seconds, `f` video frames, `c` chunks, `part` the parts of equal length before it."""
    text: str
    """The prompt without the global prefix; brought on one line."""
    relative: bool = False
    """Whether `value` counts from the entry before."""
    switch: Switch = Switch()
    """How the stream goes over to it."""
    line: int = field(default=1, compare=False)
    """Line it was read from, from 1."""
    column: int = field(default=1, compare=False)
    """Column its time stands in, from 1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", " ".join(self.text.split()))
        if self.unit not in get_args(Unit):
            raise self.error(f"unknown unit {self.unit!r}; write {EXAMPLES}")
        if not self.value.is_finite() or abs(self.value) > _LATEST:
            raise self.error(f"a time of {self.value:.4g} is out of reach; stay below {_LATEST}")
        if self.value < 0:
            raise self.error(f"{self.time} is negative; times count from 0, the video's start")
        if self.unit != "s" and self.value % 1:
            raise self.error(f"{self.time} is not a whole number; only seconds have decimals")
        if not self.text:
            raise self.error(f"the entry at {self.time} has no prompt; write one after its time")

    @property
    def time(self) -> str:
        """The time as the language writes it, such as `+4s`."""
        if self.unit == "part":
            return f"part {int(self.value) + 1}"
        digits = _digits(self.value)
        time = f"c{digits}" if self.unit == "c" else f"{digits}{self.unit}"
        return f"+{time}" if self.relative else time

    def error(self, problem: str) -> TimelineError:
        """A TimelineError that points at this entry."""
        return TimelineError(problem, self.line, self.column)


@dataclass(frozen=True, kw_only=True)
class ResolvedEntry:
    """One prompt with the chunk it starts at."""

    chunk: int
    """First chunk that follows the prompt."""
    seconds: float
    """When that chunk starts."""
    requested_seconds: float
    """When the timeline asked for it."""
    switch: Switch
    """How the stream goes over to it; without meaning for the first entry."""
    text: str
    """The prompt with the global prefix in front."""
    delayed: bool = False
    """Whether it was asked for within the start clip, and begins after it."""
    instead_of: tuple[ResolvedEntry, ...] = ()
    """Changes within the start clip that are never seen, as this one came after them."""


@dataclass(frozen=True, kw_only=True)
class PromptTimeline:
    """Prompts in time. Empty it is the seed of a chain of `append`s; TimelineError if unordered."""

    entries: tuple[Entry, ...] = ()
    """The first at 0, times rising; all of them parts, or none."""
    global_prefix: str = ""
    """Put in front of every prompt, joined by ", "; brought on one line."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "global_prefix", " ".join(self.global_prefix.split()))
        if self.entries:
            _check_first(self.entries[0])
        _check_rising(self.entries)

    def append(
        self,
        at: float | Decimal,
        unit: Literal["s", "f", "c"],
        switch: Switch,
        text: str,
        *,
        relative: bool = False,
    ) -> PromptTimeline:
        """The timeline with one more entry, checked as if it had been written on the next line."""
        line = self.entries[-1].line + 1 if self.entries else 1
        entry = Entry(
            value=Decimal(str(at)),
            unit=unit,
            text=text,
            relative=relative,
            switch=switch,
            line=line,
        )
        return replace(self, entries=(*self.entries, entry))

    def resolve(
        self, clock: ChunkClock, total_chunks: int | None = None
    ) -> tuple[ResolvedEntry, ...]:
        """Each entry with its chunk, every cut moving what follows.

        `clock` may hold cuts of its own, made outside the timeline, and a start clip. A clip is
        there already, so of the changes that fall within it the last one acts, in its own mode, at
        the chunk after it (`clip_notes` says so). TimelineError where two entries meet in one
        chunk, fall back in time, or lie outside a run of `total_chunks`, which equal parts must
        know; ValueError for an empty timeline or run.
        """
        if not self.entries:
            raise ValueError("the timeline is empty; give it a prompt at 0s")
        if total_chunks is not None and total_chunks < 1:
            raise ValueError(f"total_chunks is {total_chunks}; a run has at least 1 chunk")
        chunk, images, resolved = 0, Fraction(0), list[ResolvedEntry]()
        uncut = clock  # without what the entry before does
        for number, entry in enumerate(self.entries):
            previous = chunk
            chunk, images = self._locate(entry, clock, chunk, images, total_chunks)
            if number and chunk <= previous:
                raise _collision(entry, self.entries[number - 1], previous, clock)
            acts = max(chunk, clock.clip_chunks) if number else 0
            if total_chunks is not None and acts >= total_chunks:
                raise _past_end(entry, acts, total_chunks, clock)
            instead_of: tuple[ResolvedEntry, ...] = ()
            if resolved and acts == resolved[-1].chunk:
                unseen, clock = resolved.pop(), uncut
                instead_of = (*unseen.instead_of, replace(unseen, instead_of=()))
            uncut = clock
            if number and entry.switch.mode == "cut":
                clock = clock.with_cuts(acts)
            resolved.append(
                ResolvedEntry(
                    chunk=acts,
                    seconds=clock.seconds(acts),
                    requested_seconds=float(images / clock.fps),
                    switch=entry.switch,
                    text=", ".join(filter(None, (self.global_prefix, entry.text))),
                    delayed=acts > chunk,
                    instead_of=instead_of,
                )
            )
        return tuple(resolved)

    def num_chunks(self, length: float, unit: Literal["s", "f", "c"], clock: ChunkClock) -> int:
        """See `ChunkClock.num_chunks`; the timeline's own cuts are counted."""
        if self.entries and self.entries[-1].unit != "part":
            cuts = [entry.chunk for entry in self.resolve(clock) if entry.switch.mode == "cut"]
            clock = clock.with_cuts(*cuts)
        return clock.num_chunks(length, unit)

    def to_text(self) -> str:
        """The timeline in its language; `parse_timeline` reads an equal one back.

        It refuses one alone, that of a single prompt which itself says something like `, 8s:`.
        """
        lines = [f"global: {self.global_prefix}"] if self.global_prefix else []
        if self.entries and self.entries[0].unit == "part":
            return "\n".join([*lines, " | ".join(entry.text for entry in self.entries)])
        for entry in self.entries:
            mode = "" if entry.switch == Switch() else f" [{entry.switch}]"
            lines.append(f"{entry.time}{mode}: {entry.text}")
        return "\n".join(lines)

    def _locate(
        self, entry: Entry, clock: ChunkClock, chunk: int, images: Fraction, total: int | None
    ) -> tuple[int, Fraction]:
        value = Fraction(entry.value)
        if entry.unit == "part":
            if total is None:
                raise entry.error("equal parts need the video's length; set one, or write times")
            parts = len(self.entries)
            if total < parts:
                raise entry.error(
                    f"{parts} equal parts do not fit a run of {total} chunks; a prompt lasts at "
                    "least one, so make the run longer"
                )
            share = value / parts
            return floor(share * total + Fraction(1, 2)), share * clock.images_before(total)
        if entry.unit == "c":
            start = int(value) + (chunk if entry.relative else 0)
            return start, Fraction(clock.images_before(start))
        time = value * (clock.fps if entry.unit == "s" else 1) + (images if entry.relative else 0)
        return clock.nearest_chunk(time), time


def clip_notes(resolved: Sequence[ResolvedEntry]) -> list[str]:
    """What became of the prompts that were asked for within the start clip, a line for each."""
    lines = []
    for entry in resolved:
        begins = f"{entry.seconds:g} s, after the start clip"
        lines += [
            f"ignored: {_asked(unseen)}: {shorten(entry.text, _NAMED)!r} begins at {begins}"
            for unseen in entry.instead_of
        ]
        if entry.delayed:
            lines.append(f"note: {_asked(entry)}, begins at {begins}")
    return lines


def _asked(entry: ResolvedEntry) -> str:
    return f"{shorten(entry.text, _NAMED)!r}, asked for at {entry.requested_seconds:g} s"


def table_rows(resolved: Sequence[ResolvedEntry]) -> list[tuple[str, str, str, str, str]]:
    """The resolved timeline as rows of text, the first of them the columns' names."""
    rows = [("chunk", "seconds", "starts", "mode", "prompt")]
    for entry in resolved:
        mode = str(entry.switch) if entry.chunk else "start"
        starts = _clock_text(entry.seconds)
        rows.append((str(entry.chunk), f"{entry.seconds:.2f}", starts, mode, entry.text))
    return rows


def format_table(resolved: Sequence[ResolvedEntry], width: int = 100) -> str:
    """The resolved timeline as aligned text for a terminal, prompts cut to fit `width` columns."""
    rows = table_rows(resolved)
    sizes = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    room = max(width - sum(sizes) - 2 * len(sizes), 10)
    lines = []
    for chunk, seconds, starts, mode, prompt in rows:
        numbers = f"{chunk:>{sizes[0]}}  {seconds:>{sizes[1]}}  {starts:>{sizes[2]}}"
        lines.append(f"{numbers}  {mode:<{sizes[3]}}  {shorten(prompt, room)}")
    return "\n".join(lines)


def _check_first(entry: Entry) -> None:
    if entry.relative:
        raise entry.error(f"{entry.time} has no entry before it; let the first entry be at 0s")
    if entry.value:
        raise entry.error(f"the first entry is at {entry.time}; put a prompt at 0s before it")
    if entry.switch != Switch():
        raise entry.error(
            f"the first entry has nothing to switch from; remove its [{entry.switch}]"
        )


def _check_rising(entries: Sequence[Entry]) -> None:
    latest: dict[str, Fraction] = {}  # in images or chunks or parts, which only a clock compares
    for entry in entries:
        scale = "images" if entry.unit in ("s", "f") else entry.unit
        value = Fraction(entry.value) * (FPS if entry.unit == "s" else 1)
        if ("part" in latest) != (entry.unit == "part") and latest:
            raise entry.error("equal parts take no times; write a time for every prompt instead")
        if entry.relative and not entry.value:
            raise entry.error(f"{entry.time} adds nothing; times rise from entry to entry")
        if not entry.relative and value <= latest.get(scale, -1):
            raise entry.error(
                f"{entry.time} does not come after the entries before it; put them in order"
            )
        latest[scale] = value + (latest.get(scale, Fraction(0)) if entry.relative else 0)


def _collision(entry: Entry, before: Entry, chunk: int, clock: ChunkClock) -> TimelineError:
    return entry.error(
        f"{entry.time} is not a chunk later than {before.time} (line {before.line}), which starts "
        f"chunk {chunk}; a prompt lasts at least one chunk, so move it to "
        f"{clock.seconds(chunk + 1):g}s or later"
    )


def _past_end(entry: Entry, chunk: int, total_chunks: int, clock: ChunkClock) -> TimelineError:
    where = "is" if chunk > clock.clip_chunks else "acts after the start clip, at"
    return entry.error(
        f"{entry.time} {where} chunk {chunk}, but the run ends after {total_chunks} chunks "
        f"({clock.seconds(total_chunks):g} s); move the entry up or make the run longer"
    )


def _digits(value: Decimal) -> str:
    digits = f"{value:f}"
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def _clock_text(seconds: float) -> str:
    minutes, hundredths = divmod(round(seconds * 100), 6000)
    return f"{minutes}:{hundredths / 100:05.2f}"


def shorten(text: str, width: int) -> str:
    """`text` cut to fit `width` columns of a terminal, with an ellipsis where it was cut."""
    if sum(map(_columns, text)) <= width:
        return text
    kept, room = "", width - 1
    for character in text:
        room -= _columns(character)
        if room < 0:
            break
        kept += character
    return f"{kept.rstrip()}…"


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
