"""Runs the stages one after another, each a process that is ended at its cap. No torch here.

What a stage found is in `card.json` within a second, so nothing is lost when the runner is killed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from ...writing import write_text
from .plan import DEADLINE, SIZES, Setting, Stage, chosen
from .record import read_json, write_json
from .table import format_card, stage_verdict

ROOT = Path(__file__).parents[3]  # where `python -m rf_core` finds the package
_POLL = 0.2  # seconds between two looks at a stage


def main(arguments: Sequence[str]) -> int:
    """Measure; 0 when every stage ended by itself, 1 when one did not, 130 when stopped."""
    args = _parser().parse_args(arguments)
    try:
        stages = chosen(args.only)
        setting = _setting(args)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(stages, setting, args.out, deadline=args.deadline)
    finally:
        signal.signal(signal.SIGTERM, before)


def run(stages: Sequence[Stage], setting: Setting, out: Path, *, deadline: float) -> int:
    """Run the stages into a folder: `card.json`, `table.txt` and what they printed, `log.txt`."""
    began, by_themselves, status = time.monotonic(), True, 0
    card: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "size": setting.size,
        "published": setting.published is not None,
        "stages": {},
    }
    write_json(out / "card.json", card)
    with tempfile.TemporaryDirectory() as folder, (out / "log.txt").open("wb") as log:
        for stage in stages:
            left = deadline - (time.monotonic() - began)
            found: dict[str, Any] = {"late": True}
            try:
                if left > 0:
                    found = _run_stage(stage, setting, Path(folder), log, left, card, out)
            except KeyboardInterrupt:
                status = 130
                break
            card["stages"][stage.name] = found
            by_themselves &= found.get("ended", False)
            write_json(out / "card.json", card)
            print(f"{stage.name:<16} {stage_verdict(found)}", flush=True)
    card["seconds"] = time.monotonic() - began
    write_json(out / "card.json", card)
    table = format_card(card, [stage.name for stage in stages])
    write_text(out / "table.txt", table + "\n")
    print(f"\n{table}", flush=True)
    return status or (0 if by_themselves else 1)


def _run_stage(
    stage: Stage,
    setting: Setting,
    folder: Path,
    log: IO[bytes],
    left: float,
    card: dict[str, Any],
    out: Path,
) -> dict[str, Any]:
    """What the stage found, and how it ended; `card` is kept up to date on the way."""
    record, began, limit = folder / f"{stage.name}.json", time.monotonic(), min(stage.cap, left)
    log.write(f"== {stage.name}\n".encode())
    log.flush()
    process = subprocess.Popen(
        _command(stage, setting, record),
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, **stage.environment},
        start_new_session=True,
    )
    seen = 0.0
    try:
        while process.poll() is None and time.monotonic() - began < limit:
            time.sleep(_POLL)
            if record.exists() and record.stat().st_mtime != seen:
                seen = record.stat().st_mtime
                card["stages"][stage.name] = read_json(record)
                write_json(out / "card.json", card)
    finally:
        killed = _end(process)
    found = {**read_json(record), "seconds": time.monotonic() - began}
    if killed:
        found["killed_after"] = limit
    elif not found.get("ended"):
        found |= {"ended": True, "failed": f"its process ended with code {process.returncode}"}
    return found


def _command(stage: Stage, setting: Setting, record: Path) -> list[str]:
    command = [sys.executable, "-m", "rf_core.measure.card", stage.module or stage.name]
    command += [str(record), "--size", setting.size]
    if setting.published is not None:
        command += ["--published", str(setting.published)]
    return command


def _end(process: subprocess.Popen[bytes]) -> bool:
    """End the stage's process and all it has started; whether it had to be."""
    running = process.poll() is None
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):  # also when it has ended: what it started may go on
            os.killpg(process.pid, signal.SIGKILL)
    elif running:
        command = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
        subprocess.run(command, capture_output=True, check=False)
    process.wait()
    return running


def _setting(args: argparse.Namespace) -> Setting:
    published = None if args.published is None else args.published.resolve()
    if published is not None and not published.is_dir():
        raise ValueError(f"there is no folder {args.published}; --published names a checkout")
    return Setting(size=args.size, published=published)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rf_core card",
        description="Measure everything on a card: is it right, how fast is each part, what holds "
        "it back. Takes nine minutes at most.",
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder for card.json, table.txt and log.txt")
    add("--only", metavar="A,B", help="these stages alone")
    add("--deadline", type=float, default=DEADLINE, metavar="S", help="no stage starts after it")
    add("--size", choices=SIZES, default=SIZES[0], help="tiny rehearses on a CPU")
    add("--published", type=Path, metavar="DIR", help="a checkout of the published code to race")
    return parser
