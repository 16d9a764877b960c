"""What a command does to the state of a live session: a pure function, called between two chunks.

One command at a time, as what it asks for may fail (a text that is not encoded, a LoRA that is not
there): the state before it then stays.
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
    Strength,
)

Action = Prompt | Lora | Decay | Strength | Cut | Rewind
"""What is then done to the stream."""

MAX_COMING = 256
"""Changes of prompt that may be scheduled."""
MAX_BRANCHES = 1000
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
class ScheduledPrompt:
    """A change of prompt that is scheduled."""

    number: int
    """Of the command that scheduled it."""
    chunk: int
    prompt: Prompt


@dataclass(frozen=True, kw_only=True)
class SessionState:
    """Where a session stands between two chunks."""

    chunk: int
    """The next one."""
    branch: Branch
    paused: bool = False
    stopped: bool = False
    coming: tuple[ScheduledPrompt, ...] = ()
    """By chunk; one for each."""
    names: frozenset[str] = frozenset({MAIN})
    """Of branches, taken ones, in lower case."""

    @classmethod
    def beginning(cls, chunk: int) -> SessionState:
        """Of a session whose stream has so many chunks already."""
        return cls(chunk=chunk, branch=Branch(name=MAIN, begins=chunk))

    def next_chunk(self) -> SessionState:
        """The same a chunk later."""
        return replace(self, chunk=self.chunk + 1)

    def due(self) -> ScheduledPrompt | None:
        """The change whose time has come."""
        return next((each for each in self.coming if each.chunk == self.chunk), None)

    def without(self, number: int) -> SessionState:
        """The same without a coming change; ValueError where there is none of this number."""
        rest = tuple(each for each in self.coming if each.number != number)
        if len(rest) == len(self.coming):
            raise ValueError(f"no change {number} is coming; it has come, or was dropped")
        return replace(self, coming=rest)

    def with_scheduled(self, new: ScheduledPrompt) -> SessionState:
        """The same with one more; ValueError where it cannot come."""
        if new.chunk <= self.chunk:
            raise ValueError(
                f"chunk {new.chunk} is too early; the first to schedule for is {self.chunk + 1}"
            )
        if other := next((each for each in self.coming if each.chunk == new.chunk), None):
            raise ValueError(
                f"change {other.number} comes at chunk {new.chunk} already; move or drop it first"
            )
        if len(self.coming) >= MAX_COMING:
            raise ValueError(f"{MAX_COMING} changes are coming already; drop one first")
        ordered = sorted((*self.coming, new), key=lambda each: each.chunk)
        return replace(self, coming=tuple(ordered))


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a command comes to."""

    state: SessionState
    """Once it is done."""
    chunk: int
    """That it takes hold at."""
    action: Action | None = None
    """What is to be done to the stream for it."""


def transition(state: SessionState, number: int, command: Command, oldest: int | None) -> Step:
    """What a command of this number comes to; ValueError, in a sentence, where it is refused.

    `oldest` is the first chunk that can be gone back to; None where there is none.
    """
    here = Step(state=state, chunk=state.chunk)
    if isinstance(command, (Prompt, Lora, Decay, Strength, Cut)):
        return replace(here, action=command)
    if isinstance(command, (Pause, Resume)):
        return replace(here, state=replace(state, paused=isinstance(command, Pause)))
    if isinstance(command, Stop):
        return replace(here, state=replace(state, stopped=True))
    if isinstance(command, Rewind):
        state = _rewound(state, command, oldest)
        return Step(state=state, chunk=command.chunk, action=command)
    if isinstance(command, Schedule):
        prompt = Prompt(text=command.text, mode=command.mode)
        new = ScheduledPrompt(number=number, chunk=command.chunk, prompt=prompt)
        return Step(state=state.with_scheduled(new), chunk=command.chunk)
    if isinstance(command, Drop):
        return replace(here, state=state.without(command.change))
    assert isinstance(command, Move)
    rest = state.without(command.change)
    moved = next(each for each in state.coming if each.number == command.change)
    state = rest.with_scheduled(replace(moved, chunk=command.chunk))
    return Step(state=state, chunk=command.chunk)


def _rewound(state: SessionState, command: Rewind, oldest: int | None) -> SessionState:
    if command.chunk > state.chunk:
        raise ValueError(f"chunk {command.chunk} is not made; the next one is {state.chunk}")
    if oldest is None or command.chunk < oldest:
        reach = "nothing is kept of it" if oldest is None else f"it is kept from chunk {oldest} on"
        raise ValueError(f"the stream cannot go back to chunk {command.chunk}: {reach}")
    if len(state.names) >= MAX_BRANCHES:
        raise ValueError(f"there are {MAX_BRANCHES} branches; begin another session")
    name = command.branch or _free_name(state.names)
    if name.lower() in state.names:
        raise ValueError(f"a branch {name} is there already; name another")
    return replace(
        state,
        chunk=command.chunk,
        branch=branch_of(state.branch, state.chunk, name, command.chunk),
        names=state.names | {name.lower()},
    )


def branch_of(old: Branch, chunk: int, name: str, begins: int) -> Branch:
    """The branch that leaves another, which stands at `chunk`; one without chunks is no parent."""
    parent = old.parent if chunk == old.begins else old.name
    return Branch(name=name, parent=parent, begins=begins)


def _free_name(names: frozenset[str]) -> str:
    numbers = range(2, len(names) + 3)
    return next(name for n in numbers if (name := f"branch-{n}") not in names)
