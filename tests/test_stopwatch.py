"""Time taken on a card, with a stand-in that notes in what order it is given its work."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rf_core.fast import stopwatch
from rf_core.fast.stopwatch import Stopwatch, device_seconds, wait


class Card:
    """Stands for torch.cuda: notes what it is given; begins after so many cycles of sleep."""

    def __init__(self, slow_host: int = 0) -> None:
        self.given: list[str] = []
        self._slow_host, self._slept = slow_host, 0

    def sleep(self, cycles: int) -> None:
        self._slept = cycles
        self.given.append("sleep")

    def event(self, enable_timing: bool) -> SimpleNamespace:
        return SimpleNamespace(
            record=lambda: self.given.append("event"),
            query=lambda: self._slept < self._slow_host,  # it woke up before all was queued
        )

    def current_stream(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(synchronize=lambda: self.given.append(f"stream of {device}"))

    def synchronize(self, device: torch.device) -> None:
        self.given.append(f"all of {device}")


@pytest.fixture
def card(monkeypatch):
    return install(monkeypatch, Card())


def install(monkeypatch, card: Card) -> Card:
    monkeypatch.setattr(torch.cuda, "_sleep", card.sleep, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", card.event)
    for name in ("current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(card, name))
    return card


def queue(card: Card) -> None:
    flush = SimpleNamespace(zero_=lambda: card.given.append("flush"))
    stopwatch._queued_ahead(lambda: card.given.append("call"), flush)


ONCE = ["sleep", "flush", "event", "call", "event"]


def test_a_call_is_queued_while_the_card_sleeps_and_nothing_is_waited_for(card):
    queue(card)
    assert card.given == ONCE


def test_a_host_that_was_too_slow_to_queue_a_call_is_given_a_longer_start(monkeypatch):
    card = install(monkeypatch, Card(slow_host=stopwatch._HEAD_STARTS[1]))
    queue(card)
    assert card.given == 2 * ONCE


def test_a_call_that_waits_for_the_card_is_tried_only_so_often(monkeypatch):
    card = install(monkeypatch, Card(slow_host=1 << 62))
    queue(card)
    assert card.given == len(stopwatch._HEAD_STARTS) * ONCE


def test_a_lap_waits_for_the_caller_s_stream_alone(card):
    Stopwatch("cuda:0").lap()
    assert card.given == ["stream of cuda:0"] * 2
    wait("cuda:0")
    assert card.given[2:] == ["all of cuda:0"]


def test_off_a_card_a_short_call_is_timed_by_the_wall():
    calls: list[int] = []
    assert device_seconds(lambda: calls.append(0), "cpu", repeats=3) >= 0
    assert len(calls) == 1 + 1 + 3
