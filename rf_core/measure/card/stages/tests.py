"""The tests that need a card, by pytest."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec

from ..plan import Setting
from ..record import NotRun, Record
from ..runner import ROOT
from . import workload

FILES = (
    "test_dispatch",
    "test_fast_paths",
    "test_graphs",
    "test_handoff",
    "test_kernels",
    "test_model",
    "test_offload",
    "test_order",
    "test_plan",
    "test_quantise",
    "test_split_attention",
)
"""Named one by one: others import PyAV, which stops pytest where it is not installed."""
_REHEARSED = ("test_dispatch",)
_WORKERS, _SECONDS = 12, 50
_RESULT = re.compile(r"\b(PASSED|FAILED|SKIPPED|ERROR)\b(?=.*%\]|\s+tests/)")


def run(record: Record, setting: Setting) -> None:
    """How many passed, and which failed."""
    workload(setting)  # they need a card too
    if find_spec("pytest") is None:
        raise NotRun("the package pytest is not installed")
    files = [f"tests/{name}.py" for name in (_REHEARSED if setting.rehearsal else FILES)]
    if not all((ROOT / file).is_file() for file in files):
        raise NotRun("there are no tests in this installation; run it from a checkout")
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", *files]
    if find_spec("xdist") is not None and not setting.rehearsal:
        command += ["-n", str(_WORKERS)]
    if find_spec("pytest_timeout") is not None:
        command += ["--timeout", str(_SECONDS)]
    counts: Counter[str] = Counter()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="")
            if line.startswith(("FAILED ", "ERROR ")):  # pytest's summary
                record.append("failures", line.strip())
            elif (result := _RESULT.search(line)) is not None:
                counts[result[0].lower()] += 1
                record.note("counts", dict(counts))  # a test a line: kept if the time runs out
    record.say(", ".join(f"{number} {what}" for what, number in counts.items()) or "no test ran")
    record.check("pytest's exit code", process.returncode, 0)
