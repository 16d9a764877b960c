"""One thread for every test: sums are then added in one order, here and in child processes."""

import os
from collections.abc import Generator

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton, which reads this once
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)


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
