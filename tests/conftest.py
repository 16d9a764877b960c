"""One thread for every test: sums are then added in one order, here and in child processes.

By the environment, as torch's own setting holds for the thread that sets it: in another, whose
first operation is a product, MKL takes every core.
"""

import gc
import os
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton, which reads this once
    os.environ.setdefault("TRITON_INTERPRET", "1")


# A shell has what it starts in the background ignore interrupts, and so would every child here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None]:
    """The names of what failed come last: whoever keeps the end of a log alone has them."""
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # a worker of xdist
        return
    for kind in ("failed", "error"):
        for report in reporter.stats.get(kind, ()):
            reporter.write_line(f"{kind}: {report.nodeid}")


@pytest.fixture(scope="module", autouse=True)
def imported_is_no_garbage() -> None:
    """What earlier modules have imported is not searched again: torch alone is 500,000 objects, and
    every run of a command collects garbage once its text encoder is let go of."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def write_mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes a module `mine` for a test alone: one that another test imported is forgotten."""

    def write(source: str) -> None:
        (tmp_path / "mine.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "mine", raising=False)

    return write


def pytest_unconfigure() -> None:
    """So that nothing is said to leak at the end."""
    gc.unfreeze()
