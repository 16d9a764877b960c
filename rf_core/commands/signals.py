"""Ctrl-C and SIGTERM while a command runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..fast.parallel import Process, any_process


@contextmanager
def stop_on_signal(process: Process) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, or SIGTERM sent, to be asked as the run goes on.

    The second one ends the pass at once, as KeyboardInterrupt.
    """
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        # torchrun passes the first one on as a second.
        if stop.is_set() and process.world_size == 1:
            raise KeyboardInterrupt
        stop.set()

    with handling_signals(on_signal):
        yield stop.is_set if process.world_size == 1 else any_process(stop.is_set)


@contextmanager
def handling_signals(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Within it, Ctrl-C and SIGTERM call a function."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)
