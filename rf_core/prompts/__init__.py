"""The prompt timeline: which prompt a stream follows from which chunk on, and how it switches.

One small language, read once and shared by the command line and the nodes. One entry a line:

    # a line that starts with # is a comment; blank lines do not count
    global: film grain, wide shot
    0s: a panda walks
    8s [recache]: it sits down,
        looks up and yawns
    +4s [blend 3 slerp]: snow
    c40 [cut]: a city at night

A time is in seconds (`8s`, `1.5s`, `1:30`), video frames (`96f`) or chunks (`c40`, `40c`); `+`
counts from the time asked for by the entry before, so roundings do not add up. The mode in
brackets is `soft`, `recache` (when none is given), `blend K [lerp|slerp]` or `cut`. The first entry
is at 0, and needs no mode. What `global` says is put in front of every prompt, joined by ", ". A
line indented deeper than the entry above it continues it; any other without a time is an error,
unless the entry has no text of its own: its text then stands in the lines below.

Text in which no line has a time is one prompt at 0, or, with `|` in it, prompts that share the
video in equal parts. FizzNodes' JSON (`"0": "a", "12": "b"`, keys in video frames) is read too.
Runs of white space in a prompt count as one space.

The same timeline as others write it is read where it can mean one thing alone, and refused with the
form meant where it cannot; `reading` says by which rule, `times` and `pairs` say in which forms.

Prompts change at chunk boundaries. `ChunkClock` knows where these lie; `PromptTimeline.resolve`
moves every time to the nearest one, the later of two equally near, and out of a start clip, which
is shown as it is.
"""

from .reading import parse_timeline
from .timeline import (
    ChunkClock,
    Entry,
    Interpolation,
    PromptTimeline,
    ResolvedEntry,
    Switch,
    TimelineError,
    clip_notes,
    format_table,
    table_rows,
)

__all__ = [
    "ChunkClock",
    "Entry",
    "Interpolation",
    "PromptTimeline",
    "ResolvedEntry",
    "Switch",
    "TimelineError",
    "clip_notes",
    "format_table",
    "parse_timeline",
    "table_rows",
]
