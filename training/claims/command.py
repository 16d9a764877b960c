"""`python -m training claims`: the study of the claims in the miniature world.

Every run of it does what is missing, in the plan's order, until it is done or time is out; a report
of what is there comes at the end. `--out` holds a few files that are easily carried away: results,
report, pictures. Checkpoints and logs lie in `--runs`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch

from rf_core.attention import check_device
from rf_core.options import DEMO
from rf_core.ranges import MANY, check_folder_writable, check_numbers
from rf_core.writing import write_text

from ..run.distributed import Stopped
from ..run.folder import checkpoints
from ..run.signals import stop_on_signal
from ..world.scenes import PLAIN, WORLDS
from .arms import NAMES, STARTS, STUDIES, chosen_arms
from .exact import run_exact
from .plan import SIZES, Item, Setting, plan, training_operations
from .plots import pictures
from .report import report
from .results import Results, read_results, write_results
from .workers import Outcome, run_items

REPORT = "report.md"


def add_claims_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `claims`."""
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of results, report and pictures")
    add("--exact", action="store_true", help="the account that needs no network, and stop")
    add("--plan", action="store_true", help="print what would be run, what it costs, and stop")
    add("--minutes", type=float, help="stop after so long; the next time goes on (default: none)")
    add("--seeds", type=int, default=1, help="training seeds of every arm")
    add("--study", action="append", choices=STUDIES, help="only these studies")
    add("--arm", action="append", choices=NAMES, metavar="NAME", help="only arms of these names")
    add("--start", action="append", choices=STARTS, metavar="NAME", help="only arms from these")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--jobs", type=int, default=1, help="how many are run side by side")
    add("--networks", type=Path, default=DEMO, help="folder of vae, text_encoder, teacher, student")
    add("--world", choices=WORLDS, default=PLAIN, help="the world that those networks know")
    add("--runs", type=Path, default=Path("runs/claims"), help="folder of checkpoints and logs")
    add("--keep-runs", action="store_true", help="keep checkpoints of what is finished")
    add("--size", choices=SIZES, default="full", help="tiny rehearses all of it in seconds")


def run_claims(args: argparse.Namespace) -> int:
    """Run what is missing and report; or print the plan, or make the exact account.

    0 when nothing is missing or time is out, 1 where something failed. `Stopped` by a signal.
    """
    check_numbers(args, seeds=(1, MANY), jobs=(1, 4096), minutes=(0, MANY))
    if args.exact:
        return _exact(args.out)
    check_device(args.device, torch.float32, "sdpa")
    setting = _setting(args)
    arms = chosen_arms(args.study or (), args.arm or (), args.start or ())
    items = plan(arms, args.seeds)
    results = read_results(setting)
    if args.plan:
        print_plan(items, results, setting, args.jobs)
        return 0
    check_folder_writable(args.out)
    setting.out.mkdir(parents=True, exist_ok=True)
    setting.runs.mkdir(parents=True, exist_ok=True)
    setting.write_prompts()
    deadline = math.inf if args.minutes is None else time.monotonic() + 60 * args.minutes
    with stop_on_signal() as stop:

        def is_over() -> bool:
            return stop.number > 0 or time.monotonic() >= deadline

        failed = _run(items, results, setting, args.jobs, is_over)
        _write_report(setting, results, len(items))
        if stop.number:
            raise Stopped(stop.number, f"{setting.out} is saved; the same command goes on")
    return 1 if failed else 0


def _exact(out: Path) -> int:
    check_folder_writable(out)
    run_exact(out)
    print((out / "exact.md").read_text(encoding="utf-8"))
    return 0


def _setting(args: argparse.Namespace) -> Setting:
    setting = Setting(
        out=args.out,
        runs=args.runs,
        networks=args.networks,
        world=args.world,
        device=args.device,
        size=args.size,
        keep_runs=args.keep_runs,
    )
    files = setting.files
    for path in (files.vae, files.text, files.teacher, files.student):
        if not path.exists():
            raise ValueError(f"--networks is {args.networks}, which has no {path.name}")
    return setting


def _run(
    items: Sequence[Item],
    results: Results,
    setting: Setting,
    jobs: int,
    is_over: Callable[[], bool],
) -> list[Outcome]:
    """Run what is missing, and keep each result as it comes, beside those that another command has
    added since; what failed."""
    missing = [item for item in items if not is_there(item, results, setting)]
    done = {item.name for item in items if item not in missing}
    failed = []
    print(f"{len(missing)} of {len(items)} to run", flush=True)
    for outcome in run_items(missing, done, setting, jobs, is_over):
        if outcome.result is not None:
            results |= read_results(setting) | {outcome.item.name: outcome.result}
            write_results(setting, results)
            said = f"done in {outcome.result['seconds']:.0f} s"
        elif outcome.error is not None:
            failed.append(outcome)
            said = f"failed: {outcome.error}"
        else:
            said = "stopped; goes on the next time"
        print(f"{outcome.item.name}: {said}", flush=True)
    return failed


def is_there(item: Item, results: Results, setting: Setting) -> bool:
    """Whether nothing of an item is left to do: a start's file may have been deleted since."""
    made = item.kind != "make" or setting.start_path(STARTS[item.start or ""]).exists()
    return item.name in results and made


def _write_report(setting: Setting, results: Results, planned: int) -> None:
    write_text(setting.out / REPORT, report(results, planned))
    names = []
    for name, picture in pictures(results).items():
        picture.save(setting.out / name)
        names.append(name)
    size = sum(path.stat().st_size for path in setting.out.iterdir()) / 1e6
    print(f"{setting.out}: {', '.join([REPORT, *names])}; {size:.1f} MB in all", flush=True)


def print_plan(items: Sequence[Item], results: Results, setting: Setting, jobs: int) -> None:
    """A line an item, and what all of it takes: counted, and measured where something has run."""
    print(f"{'':>3} {'what':<66} {'training':>9}  {'there':<14} decides")
    for number, item in enumerate(items):
        count = training_operations(item, setting) / 1e12
        cost = f"{count:.1f} T" if count else "-"
        there = _progress(item, results, setting)
        print(f"{number:>3} {item.name:<66} {cost:>9}  {there:<14} {item.decides}")
    print("training: counted operations, a multiply-add as two, in 10^12; judging comes on top")
    print(_measured(items, results, setting, jobs))


def _progress(item: Item, results: Results, setting: Setting) -> str:
    if is_there(item, results, setting):
        return f"{results[item.name]['seconds']:.0f} s"
    if item.arm is None:
        return ""
    found = checkpoints(setting.folder(item.name))
    updates = setting.arm_config(item.arm, item.seed).run.updates
    return f"{found[-1][0]} of {updates}" if found else ""


def _measured(items: Sequence[Item], results: Results, setting: Setting, jobs: int) -> str:
    seconds = _seconds_by_study(results)
    missing = [item for item in items if not is_there(item, results, setting)]
    known = [seconds[key] for item in missing if (key := (item.study, item.kind)) in seconds]
    updates = [r["seconds_an_update"] for r in results.values() if "seconds_an_update" in r]
    if not known:
        return f"{len(missing)} to run; none has run here yet, so that no time is known"
    each = f", {fmean(updates):.2f} s an update" if updates else ""
    return (
        f"{len(missing)} to run; measured by what has run{each}: {sum(known) / 60 / jobs:.0f} "
        f"minutes for {len(known)} of them, {jobs} at a time"
    )


def _seconds_by_study(results: Results) -> Mapping[tuple[str, str], float]:
    found: dict[tuple[str, str], list[float]] = {}
    for result in results.values():
        found.setdefault((result["study"], result["kind"]), []).append(result["seconds"])
    return {key: fmean(each) for key, each in found.items()}
