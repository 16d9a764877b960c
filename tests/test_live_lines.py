"""What is typed to a live session, and what OSC says to it, read by one table."""

from __future__ import annotations

import logging
import random
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pythonosc.osc_bundle_builder import IMMEDIATELY, OscBundleBuilder
from pythonosc.osc_message_builder import OscMessageBuilder

from rf_core.live import (
    Applied,
    Branched,
    Command,
    Cut,
    Decay,
    Drop,
    Ended,
    Lora,
    Move,
    Pause,
    Prompt,
    Received,
    Refused,
    Resume,
    Rewind,
    Schedule,
    Stop,
)
from rf_core.live.lines import (
    LineContext,
    ParsedLine,
    Question,
    describe_event,
    help_lines,
    read_line,
)
from rf_core.live.osc import OscServer, parse_address
from rf_core.prompts import Switch

BLEND = Switch.parse("blend 3")
NOW = LineContext(mode=BLEND, chunk=10)


@pytest.mark.parametrize(
    "line, asked",
    [
        ("a panda walks", Prompt(text="a panda walks", mode=BLEND)),
        ("  a panda: 3/4 view \r", Prompt(text="a panda: 3/4 view", mode=BLEND)),
        ("/prompt /imagine", Prompt(text="/imagine", mode=BLEND)),
        ("/mode blend 2 slerp", Switch.parse("blend 2 slerp")),
        ("/mode", Question.MODE),
        ("/lora my ink 0.6", Lora(name="my ink", strength=0.6)),
        ("/lora ink -1e-1", Lora(name="ink", strength=-0.1)),
        ("/decay 0.9", Decay(decay=0.9)),
        ("/pause", Pause()),
        ("/RESUME", Resume()),
        ("/cut", Cut()),
        ("/cut a city at night", Cut(text="a city at night")),
        ("/rewind 7", Rewind(chunk=7)),
        ("/rewind -4 night", Rewind(chunk=6, branch="night")),
        ("/schedule 20 a red star", Schedule(chunk=20, text="a red star", mode=BLEND)),
        ("/schedule +4   a red star", Schedule(chunk=14, text="a red star", mode=BLEND)),
        ("/move 3 21", Move(change=3, chunk=21)),
        ("/drop 3", Drop(change=3)),
        ("/status", Question.STATUS),
        ("/stop", Stop()),
        ("/help", Question.HELP),
        ("   ", None),
    ],
)
def test_a_line_is_a_prompt_or_what_its_verb_says(line: str, asked: ParsedLine | None) -> None:
    assert read_line(line, NOW) == asked


@pytest.mark.parametrize(
    "line, why",
    [
        ("/", "there is no /; /help"),
        ("/rewnd 3", "there is no /rewnd; did you mean /rewind?"),
        ("/rewind", "write /rewind CHUNK [NAME]"),
        ("/rewind 3 a b", "write /rewind CHUNK [NAME]"),
        ("/rewind night", "give a number such as 12, or -4"),
        ("/rewind -11", "11 chunks back is before the beginning; chunk 10 is next"),
        ("/rewind 3 ../x", "letters, digits"),
        ("/lora 0.6", "write /lora NAME STRENGTH"),
        ("/lora ink strong", "strength is 'strong'; give a number"),
        ("/lora ink nan", "strength is nan"),
        ("/decay 2", "decay is 2.0; give a number from 0 to 1"),
        ("/schedule 20", "write /schedule CHUNK TEXT"),
        ("/mode fast", "use soft, recache, blend K or cut"),
        ("/pause now", "write /pause"),
        ("/drop -1", "change is '-1'"),
        ("/prompt", "write /prompt TEXT"),
        ("a\ud800b", "half a character"),
    ],
)
def test_a_line_that_is_wrong_says_what_to_write(line: str, why: str) -> None:
    with pytest.raises(ValueError) as refused:
        read_line(line, NOW)
    assert why in str(refused.value) and "\n" not in str(refused.value)


def test_any_line_is_read_or_refused_in_a_sentence() -> None:
    draw, read = random.Random(0), 0
    words = ["/rewind", "/lora", "/mode", "/schedule", "-4", "+9", "9" * 5000, "ink", "0.5", "nan",
             "blend", "3", "\x1b[2J", "雪", "\0", "/", "", "/\ud800", "[cut]"]  # fmt: skip
    for _ in range(3000):
        line = " ".join(draw.choices(words, k=draw.randrange(6)))
        try:
            read_line(line, NOW)
            read += 1
        except ValueError as error:
            assert 5 < len(str(error)) < 400 and "\n" not in str(error) and "\x1b" not in str(error)
    assert 500 < read < 2500


def test_the_help_names_every_verb_and_fits_a_terminal() -> None:
    lines = help_lines()
    assert all(len(line) <= 100 for line in lines)
    assert {"/prompt", "/mode", "/lora", "/rewind", "/stop"} <= {
        w for x in lines for w in x.split()
    }


def test_nothing_that_is_told_can_move_a_terminals_cursor() -> None:
    command = Prompt(text="a\x1b[2J\r\nb" + "x" * 200)
    events = [
        Received(number=1, command=command),
        Applied(number=1, chunk=4),
        Refused(number=2, why="no \x07bell"),
        Branched(name="night", parent="main", chunk=2),
        Ended(chunk=3, why="OSError: \x1b"),
    ]
    lines = [describe_event(event) for event in events]
    assert all(line.isprintable() and len(line) < 120 for line in lines)
    assert lines[1] == "[1] applied at chunk 4" and "a\\x1b[2J\\r\\nbxx" in lines[0]


# OSC.


def message(address: str, *words: Any) -> bytes:
    builder = OscMessageBuilder(address=address)
    for word in words:
        builder.add_arg(word)
    return builder.build().dgram


def bundle(*parts: bytes) -> bytes:
    head = b"#bundle\0" + struct.pack(">Q", 1)
    return head + b"".join(struct.pack(">i", len(part)) + part for part in parts)


@contextmanager
def listening(**options: Any) -> Iterator[tuple[OscServer, list[Command]]]:
    taken: list[Command] = []

    def submit(command: Command) -> int:
        taken.append(command)
        return len(taken)

    with OscServer(submit, 0, **options) as server:
        yield server, taken


@pytest.mark.parametrize(
    "sent, commands",
    [
        ([message("/prompt", "snow")], [Prompt(text="snow")]),
        ([message("/prompt", "snow", "blend 3")], [Prompt(text="snow", mode=BLEND)]),
        (
            [message("/mode", "blend 3"), message("/prompt", "snow")],
            [Prompt(text="snow", mode=BLEND)],
        ),
        ([message("/lora/ink", 0.6)], [Lora(name="ink", strength=0.6)]),
        ([message("/lora", "my ink", 1)], [Lora(name="my ink", strength=1.0)]),
        ([message("/decay", 0.9)], [Decay(decay=0.9)]),
        ([message("/pause"), message("/resume", 1), message("/stop", True)],
         [Pause(), Resume(), Stop()]),
        ([message("/pause", 0), message("/cut", 0.0), message("/stop", False)], []),
        ([message("/cut"), message("/cut", "rain")], [Cut(), Cut(text="rain")]),
        ([message("/rewind", 3.0), message("/rewind", "-4", "night")],
         [Rewind(chunk=3), Rewind(chunk=6, branch="night")]),
        ([message("/schedule", 20, "fog", "cut")],
         [Schedule(chunk=20, text="fog", mode=Switch.parse("cut"))]),
        ([bundle(message("/pause"), bundle(message("/cut")))], [Pause(), Cut()]),
        ([message("/status"), message("/help"), message("/mode")], []),
    ],
)  # fmt: skip
def test_a_message_is_what_the_line_of_its_words_is(
    sent: list[bytes], commands: list[Command]
) -> None:
    with listening(chunk=lambda: 10) as (server, taken):
        for datagram in sent:
            server.take(datagram)
    assert taken == commands


def test_a_bundle_of_python_osc_arrives_over_udp() -> None:
    builder = OscBundleBuilder(IMMEDIATELY)
    for text in ("snow", "rain"):
        part = OscMessageBuilder(address="/prompt")
        part.add_arg(text)
        builder.add_content(part.build())
    arrived = threading.Event()
    taken: list[Command] = []

    def submit(command: Command) -> int:
        taken.append(command)
        arrived.set() if len(taken) == 2 else None
        return len(taken)

    with OscServer(submit, 0) as server, socket.socket(type=socket.SOCK_DGRAM) as sender:
        assert server.host == "127.0.0.1"
        sender.sendto(builder.build().dgram, (server.host, server.port))
        assert arrived.wait(5)
    assert taken == [Prompt(text="snow"), Prompt(text="rain")]


HOSTILE = [
    b"", b"\0", b"/", b"/\0\0\0", b"/prompt", b"#bundle\0", b"#bundle\0" + b"\0" * 8 + b"\xff" * 9,
    bundle(b"")[:-4] + struct.pack(">i", -4) + message("/pause"),  # for ever, in python-osc
    b"/a\0\0," + b"[" * 60_000, b"/a\0\0,zzz\0\0\0\0", b"/a\0\0," + b"i" * 60_000 + b"\0" * 2000,
    b"/prompt\0,b\0\0" + struct.pack(">i", -8), b"/prompt\0,s\0\0\xff\xfe\0\0",
    message("/prompt", "\x1b[2J"), message("/pause/1"), message("/"), message("///"),
    message("/lora/ink", float("nan")), message("/decay", 10**9), message("/rewind", 2**40),
]  # fmt: skip


def test_no_datagram_raises_or_takes_long_and_what_is_refused_is_told_now_and_then(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    nested = message("/pause")
    for _ in range(3000):
        nested = bundle(nested)
    draw, good = random.Random(0), message("/prompt", "snow", "blend 3")
    mutated = []
    for _ in range(2000):
        data = bytearray(good if draw.random() < 0.5 else bundle(good, good))
        for _ in range(draw.randrange(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        mutated.append(bytes(data[: draw.randrange(1, len(data) + 1)]))
    with listening() as (server, _), caplog.at_level(logging.WARNING):
        for datagram in [*HOSTILE, nested[-60_000:], nested[:60_000], *mutated]:
            server.take(datagram)
    records = [record.getMessage() for record in caplog.records]
    assert 1 <= len(records) <= 20 and all(line.isprintable() for line in records)
    assert "Traceback" not in capfd.readouterr().err


def test_a_full_inbox_is_told_and_not_raised(caplog: pytest.LogCaptureFixture) -> None:
    def submit(command: Command) -> int:
        raise ValueError("256 commands wait for the next chunk already; send it again later")

    with OscServer(submit, 0) as server, caplog.at_level(logging.WARNING):
        server.take(message("/pause"))
    assert "256 commands wait" in caplog.text


def test_a_port_that_is_taken_or_an_address_that_is_none_is_a_sentence() -> None:
    with listening() as (server, _), pytest.raises(ValueError, match="give another port"):
        OscServer(lambda command: 0, server.port)
    with pytest.raises(ValueError, match=r"OSC cannot listen on no\.such\.host\.invalid:9000"):
        OscServer(lambda command: 0, 9000, "no.such.host.invalid")


def test_without_python_osc_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pythonosc.osc_message", None)
    with pytest.raises(ValueError, match="pip install python-osc"):
        OscServer(lambda command: 0, 0)


def test_an_address_is_a_port_or_a_host_and_a_port() -> None:
    assert parse_address("9000") == ("127.0.0.1", 9000)
    assert parse_address("0.0.0.0:9000") == ("0.0.0.0", 9000)
    assert parse_address("[::1]:9000") == ("::1", 9000)
    for wrong in ("", "x", "70000", "-1", "host:", "\uff19\uff10"):
        with pytest.raises(ValueError, match="give a port such as 9000"):
            parse_address(wrong)
