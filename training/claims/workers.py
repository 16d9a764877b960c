"""Several items of the plan side by side: a process each, which takes the next as it ends one.

What breaks in one is told and ends no other. When time is out, or a signal comes, each process gets
a SIGTERM, by which training stops between two micro-batches and is saved.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from ..run.distributed import Stopped
from .plan import Item, Setting, slug
from .runs import Runner

GRACE = 30.0
"""Seconds that a process has to save what it does."""
_POLL = 0.2  # seconds between two looks at the clock


@dataclass(frozen=True)
class Outcome:
    """How an item ended: with a result, or with an error in a line; with neither it was stopped."""

    item: Item
    result: dict[str, Any] | None = None
    error: str | None = None


def log_path(setting: Setting, item: Item) -> Path:
    """What an item's process printed and logged."""
    return setting.runs / "logs" / f"{slug(item.name)}.txt"


def run_items(
    items: Sequence[Item],
    done: set[str],
    setting: Setting,
    jobs: int,
    stop: Callable[[], bool],
) -> Iterator[Outcome]:
    """Run items in their order, `jobs` at a time, yielding each as it ends.

    `done` names what is there already. Items that need one which failed are left out. Once `stop`
    says so, what runs is stopped and saved, and nothing else begins.
    """
    waiting, done, busy = list(items), set(done), {}
    idle = [_Worker(setting, jobs) for _ in range(min(jobs, len(items)))]
    every = list(idle)
    try:
        while not stop():
            while idle and (item := _next(waiting, done)) is not None:
                waiting.remove(item)
                worker = idle.pop()
                busy[worker.connection] = worker
                worker.begin(item)
            if not busy:
                return
            for connection in wait(list(busy), _POLL):
                worker = busy.pop(connection)  # type: ignore[call-overload]
                outcome = worker.outcome()
                if not worker.process.is_alive():
                    every.append(worker := _Worker(setting, jobs))
                idle.append(worker)
                done |= {outcome.item.name} if outcome.result is not None else set()
                yield outcome
        for worker in busy.values():
            worker.process.terminate()
        deadline = time.monotonic() + GRACE
        while busy and (ready := wait(list(busy), deadline - time.monotonic())):
            for connection in ready:
                yield busy.pop(connection).outcome(stopped=True)  # type: ignore[call-overload]
    finally:
        for worker in every:
            worker.end()


def _next(waiting: Sequence[Item], done: set[str]) -> Item | None:
    return next((item for item in waiting if item.needs is None or item.needs in done), None)


class _Worker:
    """A process that carries out the items it is sent."""

    def __init__(self, setting: Setting, jobs: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork has no CUDA of its own
        self.connection, theirs = context.Pipe()
        self.setting, self.item = setting, None
        self.process = context.Process(target=_serve, args=(theirs, setting, jobs), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, item: Item) -> None:
        """Send it an item."""
        self.item = item
        self.connection.send(item)

    def outcome(self, *, stopped: bool = False) -> Outcome:
        """How the item ended, or the process did."""
        assert self.item is not None
        try:
            result, error = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            ended = f"its process ended with code {self.process.exitcode}"
            result, error = None, None if stopped else ended
        return Outcome(self.item, result, error)

    def end(self) -> None:
        """End the process, whatever it does."""
        self.connection.close()
        self.process.join(0.5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(connection: Connection, setting: Setting, jobs: int) -> None:
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C on a terminal is the parent's, which asks once
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    runner = Runner(setting)
    while True:
        try:
            item: Item = connection.recv()
        except EOFError:
            return
        connection.send(_logged(runner, item))


def _logged(runner: Runner, item: Item) -> tuple[dict[str, Any] | None, str | None]:
    path = log_path(runner.setting, item)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        form = "%(asctime)s %(message)s"
        logging.basicConfig(stream=log, level=logging.INFO, format=form, force=True)
        try:
            return runner.run(item), None
        except Stopped:
            return None, None
        except Exception as error:
            traceback.print_exc()
            line = str(error).strip().partition("\n")[0]
            return None, f"{type(error).__name__}: {line} ({path})"
