"""What a command does to the course of a live stream: a pure function, called between two chunks.

One command at a time, as what it asks for may fail (a text that is not encoded, a LoRA that is not
there): the course before it then stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
)

Action = Prompt | Lora | Decay | Cut | Rewind
"""What is then done to the stream."""

MOST_COMING = 256
"""Changes of prompt that may be scheduled."""
MOST_BRANCHES = 1000
"""Branches of one session, each of which is a file."""
MAIN = "main"
"""The branch that a session begins with."""


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A line of chunks, those of its parent before it included."""

    name: str
    parent: str | None = None
    begins: int
    """Its first chunk of its own."""
    ended: int | None = None
    """Chunks of its line when it was left; None of the one that is followed."""


@dataclass(frozen=True, kw_only=True)
class Coming:
    """A change of prompt that is scheduled."""

    number: int
    """Of the command that scheduled it."""
    chunk: int
    prompt: Prompt


@dataclass(frozen=True, kw_only=True)
class Course:
    """Where a session stands between two chunks."""

    chunk: int
    """The next one."""
    branch: Branch
    paused: bool = False
    stopped: bool = False
    coming: tuple[Coming, ...] = ()
    """By chunk; one for each."""
    names: frozenset[str] = frozenset({MAIN})
    """Of branches, taken ones, in lower case."""

    @classmethod
    def beginning(cls, chunk: int) -> Course:
        """Of a session whose stream has so many chunks already."""
        return cls(chunk=chunk, branch=Branch(name=MAIN, begins=chunk))

    def made(self) -> Course:
        """The same a chunk later."""
        return replace(self, chunk=self.chunk + 1)

    def due(self) -> Coming | None:
        """The change whose time has come."""
        return next((each for each in self.coming if each.chunk == self.chunk), None)

    def without(self, number: int) -> Course:
        """The same without a coming change; ValueError where there is none of this number."""
        rest = tuple(each for each in self.coming if each.number != number)
        if len(rest) == len(self.coming):
            raise ValueError(f"no change {number} is coming; it has come, or was dropped")
        return replace(self, coming=rest)

    def with_coming(self, new: Coming) -> Course:
        """The same with one more; ValueError where it cannot come."""
        if new.chunk <= self.chunk:
            raise ValueError(
                f"chunk {new.chunk} is too early; the first to schedule for is {self.chunk + 1}"
            )
        if other := next((each for each in self.coming if each.chunk == new.chunk), None):
            raise ValueError(
                f"change {other.number} comes at chunk {new.chunk} already; move or drop it first"
            )
        if len(self.coming) >= MOST_COMING:
            raise ValueError(f"{MOST_COMING} changes are coming already; drop one first")
        ordered = sorted((*self.coming, new), key=lambda each: each.chunk)
        return replace(self, coming=tuple(ordered))


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a command comes to."""

    course: Course
    """Once it is done."""
    chunk: int
    """That it takes hold at."""
    action: Action | None = None
    """What is to be done to the stream for it."""


def transition(course: Course, number: int, command: Command, oldest: int | None) -> Step:
    """What a command of this number comes to; ValueError, in a sentence, where it is refused.

    `oldest` is the first chunk that can be gone back to; None where there is none.
    """
    here = Step(course=course, chunk=course.chunk)
    if isinstance(command, (Prompt, Lora, Decay, Cut)):
        return replace(here, action=command)
    if isinstance(command, (Pause, Resume)):
        return replace(here, course=replace(course, paused=isinstance(command, Pause)))
    if isinstance(command, Stop):
        return replace(here, course=replace(course, stopped=True))
    if isinstance(command, Rewind):
        course = _rewound(course, command, oldest)
        return Step(course=course, chunk=command.chunk, action=command)
    if isinstance(command, Schedule):
        prompt = Prompt(text=command.text, mode=command.mode)
        new = Coming(number=number, chunk=command.chunk, prompt=prompt)
        return Step(course=course.with_coming(new), chunk=command.chunk)
    if isinstance(command, Drop):
        return replace(here, course=course.without(command.change))
    assert isinstance(command, Move)
    rest = course.without(command.change)
    moved = next(each for each in course.coming if each.number == command.change)
    course = rest.with_coming(replace(moved, chunk=command.chunk))
    return Step(course=course, chunk=command.chunk)


def _rewound(course: Course, command: Rewind, oldest: int | None) -> Course:
    if command.chunk > course.chunk:
        raise ValueError(f"chunk {command.chunk} is not made; the next one is {course.chunk}")
    if oldest is None or command.chunk < oldest:
        reach = "nothing is kept of it" if oldest is None else f"it is kept from chunk {oldest} on"
        raise ValueError(f"the stream cannot go back to chunk {command.chunk}: {reach}")
    if len(course.names) >= MOST_BRANCHES:
        raise ValueError(f"there are {MOST_BRANCHES} branches; begin another session")
    name = command.branch or _free_name(course.names)
    if name.lower() in course.names:
        raise ValueError(f"a branch {name} is there already; name another")
    return replace(
        course,
        chunk=command.chunk,
        branch=branch_of(course.branch, course.chunk, name, command.chunk),
        names=course.names | {name.lower()},
    )


def branch_of(old: Branch, chunk: int, name: str, begins: int) -> Branch:
    """The branch that leaves another, which stands at `chunk`; one without chunks is no parent."""
    parent = old.parent if chunk == old.begins else old.name
    return Branch(name=name, parent=parent, begins=begins)


def _free_name(names: frozenset[str]) -> str:
    numbers = range(2, len(names) + 3)
    return next(name for n in numbers if (name := f"branch-{n}") not in names)
