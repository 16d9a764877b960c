"""What may be asked of a live stream, what it comes to, and the buffers it goes through."""

from __future__ import annotations

import json
import random
import threading
from typing import Any

import pytest

from rf_core.live import (
    Applied,
    Command,
    Cut,
    Decay,
    Drop,
    Inbox,
    Lora,
    Move,
    Outbox,
    Pause,
    Picture,
    Prompt,
    ReaderLagged,
    Received,
    Resume,
    Rewind,
    Schedule,
    Stop,
    read_command,
)
from rf_core.live.transition import MAX_COMING, SessionState, transition
from rf_core.prompts import Switch

COMMANDS: list[Command] = [
    Prompt(text="snow"),
    Prompt(text="snow\nand 雪", mode=Switch.parse("blend 3 slerp")),
    Lora(name="ink", strength=-0.5),
    Decay(decay=1),
    Pause(),
    Resume(),
    Cut(),
    Cut(text="rain"),
    Rewind(chunk=3),
    Rewind(chunk=3, branch="night-2"),
    Schedule(chunk=40, text="fog", mode=Switch.parse("cut")),
    Move(change=3, chunk=41),
    Drop(change=3),
    Stop(),
]
STRANGE: list[Any] = [
    None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**400, -(10**9) - 1, "", " ", "\0",
    "\ud800", "a" * 20_000, "../../etc/passwd", [], [[[]]], {}, {"do": "stop"}, b"bytes", (),
    "soft 3", "blend", "blend 0", "blend 9999999999", "cut", object(), {1}, "snow", 3, 0.5,
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_read_from_its_json_is_the_same(command: Command) -> None:
    assert read_command(json.loads(json.dumps(command.as_dict()))) == command


def test_ten_thousand_malformed_commands_are_refused_in_a_sentence_or_sound() -> None:
    draw, refused = random.Random(0), 0
    names = ["do", "text", "mode", "name", "strength", "decay", "chunk", "branch", "change", "x", 7]
    kinds = [command.do for command in COMMANDS]
    for _ in range(10_000):
        given: Any = draw.choice(COMMANDS).as_dict()
        for _ in range(draw.randrange(4)):
            given[draw.choice(names)] = draw.choice([*STRANGE, *kinds])
        if draw.random() < 0.1:
            given.pop(draw.choice(list(given)))
        if draw.random() < 0.05:
            given = draw.choice(STRANGE)
        try:
            command = read_command(given)
        except ValueError as error:
            refused += 1
            assert 10 < len(str(error)) < 400 and "\n" not in str(error), given
        else:
            assert read_command(json.loads(json.dumps(command.as_dict()))) == command
    assert 4000 < refused < 10_000


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "", ".", "..", "x" * 41, "-x", "a\n"])
def test_a_branch_has_no_name_that_leaves_its_folder(name: str) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        Rewind(chunk=0, branch=name)


# What a command comes to.


def at(chunk: int, *commands: Command, oldest: int | None = 0) -> SessionState:
    """A course on which these commands were given, the first with number 1."""
    state = SessionState.beginning(0)
    for _ in range(chunk):
        state = state.next_chunk()
    for number, command in enumerate(commands, start=1):
        state = transition(state, number, command, oldest).state
    return state


def test_a_coming_change_comes_once_at_the_chunk_it_was_moved_to() -> None:
    state = at(5, Schedule(chunk=7, text="fog"), Move(change=1, chunk=6))
    assert state.due() is None
    state = state.next_chunk()
    assert (due := state.due()) is not None and (due.number, due.prompt.text) == (1, "fog")
    assert state.without(1).due() is None


def test_coming_changes_lie_in_order_and_one_that_is_dropped_is_gone() -> None:
    state = at(0, Schedule(chunk=9, text="a"), Schedule(chunk=4, text="b"), Drop(change=1))
    assert [each.number for each in state.coming] == [2]
    state = at(0, *(Schedule(chunk=chunk, text="a") for chunk in (9, 4, 6)))
    assert [each.chunk for each in state.coming] == [4, 6, 9]


@pytest.mark.parametrize(
    "command, why",
    [
        (Schedule(chunk=5, text="x"), "too early; the first to schedule for is 6"),
        (Schedule(chunk=9, text="x"), "change 1 comes at chunk 9 already"),
        (Move(change=1, chunk=5), "too early"),
        (Move(change=7, chunk=9), "no change 7 is coming"),
        (Drop(change=7), "no change 7 is coming"),
        (Rewind(chunk=6), "chunk 6 is not made; the next one is 5"),
        (Rewind(chunk=1), "kept from chunk 2 on"),
        (Rewind(chunk=3, branch="Main"), "a branch Main is there already"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(command: Command, why: str) -> None:
    state = at(5, Schedule(chunk=9, text="fog"))
    with pytest.raises(ValueError, match=why):
        transition(state, 2, command, oldest=2)


def test_no_more_changes_may_come_than_are_kept() -> None:
    state = at(0, *(Schedule(chunk=n, text="x") for n in range(1, MAX_COMING + 1)))
    with pytest.raises(ValueError, match="drop one first"):
        transition(state, 999, Schedule(chunk=999, text="x"), 0)


def test_a_branch_without_a_chunk_of_its_own_is_no_parent() -> None:
    state = at(5, Rewind(chunk=3, branch="a"), Rewind(chunk=2, branch="b"))
    assert (state.branch.name, state.branch.parent, state.chunk) == ("b", "main", 2)
    state = transition(state.next_chunk(), 3, Rewind(chunk=2), 0).state
    assert (state.branch.name, state.branch.parent) == ("branch-2", "b")


# The buffers.


def test_a_full_inbox_refuses_but_a_stop_comes_in_once() -> None:
    inbox = Inbox(most=2)
    assert [inbox.put(Pause()), inbox.put(Pause())] == [1, 2]
    with pytest.raises(ValueError, match="2 commands wait"):
        inbox.put(Pause())
    assert inbox.put(Stop()) == 3
    with pytest.raises(ValueError, match="stopped already"):
        inbox.put(Stop())
    assert [each.number for each in inbox.take()] == [1, 2, 3]
    assert inbox.take() == []


def test_commands_of_many_threads_are_taken_once_in_the_order_of_their_numbers() -> None:
    said: list[Received] = []
    inbox, taken = Inbox(most=10**6, received=said.append), []

    def ask() -> None:
        for _ in range(200):
            inbox.put(Pause())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        taken += inbox.take()
    taken += inbox.close()
    assert [each.number for each in taken] == list(range(1, 1601)) == [e.number for e in said]
    with pytest.raises(ValueError, match="has ended"):
        inbox.put(Pause())


def test_two_readers_see_every_event_and_the_newest_pictures_in_order() -> None:
    outbox = Outbox(max_pictures=2)
    readers = [outbox.reader(), outbox.reader()]
    for chunk in range(4):
        outbox.publish(Applied(number=chunk, chunk=chunk))
        outbox.show(Picture(branch="main", chunk=chunk, images=None))
    late = outbox.reader()
    for reader in readers:
        found = [(type(each).__name__[0], each.chunk) for each in reader.read()]  # type: ignore[union-attr]
        assert found == [("A", 0), ("A", 1), ("A", 2), ("P", 2), ("A", 3), ("P", 3)]
        assert reader.read(timeout=0) == []
    assert late.read(timeout=0) == []
    outbox.close()
    assert late.read() == []


def test_a_reader_that_events_were_lost_to_is_told_and_only_then() -> None:
    outbox = Outbox(max_events=3)
    reader, slow = outbox.reader(), outbox.reader()
    for number in range(3):
        outbox.publish(Applied(number=number, chunk=0))
    assert len(reader.read()) == 3
    outbox.publish(Applied(number=3, chunk=0))
    assert [each.number for each in reader.read()] == [3]  # type: ignore[union-attr]
    with pytest.raises(ReaderLagged):
        slow.read()
