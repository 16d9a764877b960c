"""Ctrl-C, and the SIGTERM of a scheduler: a run stops between micro-batches and is saved.

One request is enough: what is under way is finished up to its micro-batch, the run saves itself and
leaves with 128 and the signal's number, as shells have it. Without torchrun a second one ends the
process at once; under torchrun, which passes each signal on and on a terminal doubles it, further
ones are left to it: it kills what has not ended after its grace, 30 seconds.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .distributed import all_reduce_max

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether any process of the run was asked to stop."""

    number = 0
    """Of the signal; 0 for none."""

    def agreed(self) -> int:
        """The signal's number on all processes, 0 for none; they ask together."""
        self.number = all_reduce_max(self.number)
        return self.number


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within it, signals are requests. Only in a main thread; in others none are caught."""
    request, handlers = StopRequest(), {}

    def on_signal(number: int, frame: FrameType | None) -> None:
        if request.number and "RANK" not in os.environ:
            raise KeyboardInterrupt
        request.number = number

    try:
        for number in _SIGNALS:
            handlers[number] = signal.signal(number, on_signal)
    except ValueError:  # not the main thread
        pass
    try:
        yield request
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
