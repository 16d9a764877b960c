"""The tests that need a card, by pytest."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

from ..plan import Setting
from ..record import NotRun, Record
from ..runner import ROOT

FILES = (
    "test_dispatch",
    "test_forms",
    "test_graphs",
    "test_handoff",
    "test_kernels",
    "test_model",
    "test_offload",
    "test_plan",
    "test_quantise",
    "test_split_attention",
)
"""Named one by one: others import PyAV, which stops pytest where it is not installed."""
_REHEARSED = ("test_dispatch",)
_WORKERS, _SECONDS = 12, 50


def run(record: Record, setting: Setting) -> None:
    """What pytest says in its last line, and its failures."""
    if find_spec("pytest") is None:
        raise NotRun("the package pytest is not installed")
    files = [f"tests/{name}.py" for name in (_REHEARSED if setting.rehearsal else FILES)]
    if not all((ROOT / file).is_file() for file in files):
        raise NotRun("there are no tests in this installation; run it from a checkout")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    if find_spec("xdist") is not None and not setting.rehearsal:
        command += ["-n", str(_WORKERS)]
    if find_spec("pytest_timeout") is not None:
        command += ["--timeout", str(_SECONDS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    record.note("failures", [line for line in lines if line.startswith(("FAILED", "ERROR"))])
    record.say(lines[-1] if lines else "pytest printed nothing")
    record.check("pytest's exit code", done.returncode, 0)
