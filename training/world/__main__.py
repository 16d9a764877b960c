"""The miniature world's command line: its data, and what its models show.

`python -m training.world vae | text | clips | controls | evaluate | restyle | follow | release`.
Each stage reads what the ones before left in the output folder, takes a budget in minutes or steps,
writes its result as it goes on, and records how it was made. Between clips and evaluation, the
recipes of `python -m training` make teacher, student and control.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rf_core.arguments import argument
from rf_core.console import forgiving_console
from rf_core.ranges import MANY, check_folder_writable, check_numbers

from ..control_videos import VariantsConfig
from . import stages
from .budget import Budget
from .clips import ClipsConfig
from .evaluate import EulerConfig, EvaluateConfig, format_report
from .follow import FollowConfig, format_rows
from .restyle import RestyleConfig, format_restyle
from .scenes import PLAIN, WORLDS
from .stages import Files
from .train_text import TextTrainConfig
from .train_vae import VAETrainConfig, train_vae

DEMO = Path(__file__).parents[2] / "rf_core" / "demo"


@forgiving_console()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage; 0 when it went well, 1 on an error of the user's."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    args = _parser().parse_args(arguments)
    files = Files(args.out, args.teacher, args.student)
    try:
        _check(args)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        args.out.mkdir(parents=True, exist_ok=True)
        STAGES[args.stage](args, files)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _check(args: argparse.Namespace) -> None:
    counts = dict.fromkeys(("steps", "count", "euler_steps"), (1, MANY))
    check_numbers(args, **counts, threads=(1, 4096), minutes=(0, MANY), seed=(0, 2**63 - 1))
    check_numbers(args, guidance=(-1000.0, 1000.0))
    check_folder_writable(args.out)
    for name in ("teacher", "student", "control"):
        path = getattr(args, name)
        if path is not None and not path.exists():
            raise ValueError(f"{name} is {path}, which is not there")


def run_vae(args: argparse.Namespace, files: Files) -> None:
    """Train the VAE."""
    config = VAETrainConfig(seed=args.seed or 0, world=args.world)
    train_vae(replace(config, budget=_budget(args, config.budget)), files.folder, args.start)


def run_text(args: argparse.Namespace, files: Files) -> None:
    """Train the text encoder."""
    config = TextTrainConfig(seed=args.seed or 0, world=args.world)
    accuracy = stages.make_text(files, replace(config, budget=_budget(args, config.budget)))
    print(f"facts a token tells, read correctly on new captions: {accuracy:.2%}")


def run_clips(args: argparse.Namespace, files: Files) -> None:
    """Encode the training clips."""
    defaults = ClipsConfig(minutes=args.minutes, part=args.part, world=args.world)
    stages.make_clips(files, replace(defaults, num_clips=args.count or defaults.num_clips))


def run_controls(args: argparse.Namespace, files: Files) -> None:
    """Encode the clips' outlines and masked regions, for `python -m training control`."""
    stages.make_controls(files, VariantsConfig())


def run_evaluate(args: argparse.Namespace, files: Files) -> None:
    """Measure what is there, or the demo where nothing has been trained, and print it."""
    measured = files if files.vae.exists() else replace(files, folder=args.demo)
    print(f"measuring the networks in {measured.folder}")
    report = stages.make_report(
        measured, replace(EvaluateConfig(), world=args.world), _euler(args), files.report
    )
    print(format_report(report))
    print(f"\nwritten to {files.report}")


def run_restyle(args: argparse.Namespace, files: Files) -> None:
    """Measure how the student, or the demo's, makes clips anew at each strength, and print it."""
    measured = files if files.vae.exists() else replace(files, folder=args.demo)
    print(f"measuring the networks in {measured.folder}")
    config = RestyleConfig()
    config = replace(config, pairs=args.count or config.pairs)
    print(format_restyle(stages.make_restyle_report(measured, config, files.restyle)))
    print(f"\nwritten to {files.restyle}")


def run_follow(args: argparse.Namespace, files: Files) -> None:
    """Measure how the demo's student follows its control, and print it."""
    config, demo = FollowConfig(), replace(files, folder=args.demo)
    config = replace(config, clips=args.count or config.clips)
    control = args.control or args.demo / "control.safetensors"
    found = stages.make_following(demo, control, config, args.out)
    print(format_rows(found))


def run_release(args: argparse.Namespace, files: Files) -> None:
    """Copy the results to the demo's folder."""
    sizes = stages.release(files, args.demo)
    print(json.dumps(sizes, indent=1))
    print(f"{sum(sizes.values()) / 2**20:.2f} MiB in all")


Stage = Callable[[argparse.Namespace, Files], None]
STAGES: dict[str, Stage] = {
    "vae": run_vae,
    "text": run_text,
    "clips": run_clips,
    "controls": run_controls,
    "evaluate": run_evaluate,
    "restyle": run_restyle,
    "follow": run_follow,
    "release": run_release,
}


def _budget(args: argparse.Namespace, default: Budget) -> Budget:
    if args.steps is None and args.minutes is None:
        return default
    return replace(default, steps=args.steps, minutes=args.minutes)


def _euler(args: argparse.Namespace) -> EulerConfig:
    default = EulerConfig()
    return replace(
        default,
        guidance=default.guidance if args.guidance is None else args.guidance,
        steps=args.euler_steps or default.steps,
    )


@argument
def _part(text: str) -> tuple[int, int]:
    which, slash, parts = text.partition("/")
    if not (slash and which.isdecimal() and parts.isdecimal() and int(which) < int(parts)):
        raise ValueError(f"{text!r} is no part; write it as 0/4, the first of four")
    return int(which), int(parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.world", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, default=Path("runs/world"), help="where results go")
    parser.add_argument(
        "--world", choices=WORLDS, default=PLAIN, help="what scenes hold (default: plain)"
    )
    parser.add_argument("--minutes", type=float, help="wall-clock limit of the stage")
    parser.add_argument("--steps", type=int, help="optimiser steps at most")
    parser.add_argument("--count", type=int, help="clips, or sources of restyle, at most")
    parser.add_argument("--part", type=_part, default=(0, 1), help="i/n: every n-th clip shard")
    parser.add_argument("--seed", type=int, help="seed of the training stages (default 0)")
    parser.add_argument("--start", type=Path, help="VAE to continue from (default: from scratch)")
    parser.add_argument(
        "--teacher", type=Path, help="what is measured or released (default: OUT's)"
    )
    parser.add_argument("--student", type=Path, help="the same of the student")
    parser.add_argument("--control", type=Path, help="what is followed (default: the demo's)")
    parser.add_argument("--guidance", type=float, help="the teacher's guidance")
    parser.add_argument("--euler-steps", type=int, help="the teacher's sampling steps")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--demo", type=Path, default=DEMO, help="the demo's folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
