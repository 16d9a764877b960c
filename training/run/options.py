"""Command-line options of every recipe: its config, its folder, its device; and its output."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from rf_core.attention import check_device
from rf_core.prompt_files import text_lines

from .config import apply_overrides, from_json
from .distributed import rank
from .folder import CONFIG, check_recipe, read_config

T = TypeVar("T")


def add_config_arguments(
    parser: argparse.ArgumentParser, presets: Mapping[str, Callable[[], Any]]
) -> None:
    """`--preset`, the first of them by default, `--config`, `--set` and `--device`."""
    first = next(iter(presets))
    where = f"where the config begins (default: {first}, or the run that is resumed)"
    parser.add_argument("--preset", choices=presets, help=where)
    parser.add_argument("--config", type=Path, help="a config.json, in place of a preset")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cpu or cuda")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """`--out`, `--resume` and `--dry-run`."""
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="resume from the newest checkpoint")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="one update on random tensors: its memory and seconds; nothing is written",
    )


def config_from_args(
    args: argparse.Namespace, kind: type[T], presets: Mapping[str, Callable[[], T]]
) -> T:
    """The config of a command line: its preset or file, with the `--set` overrides.

    A run that is resumed begins with its own where neither is given.
    """
    check_device(args.device, torch.float32, "sdpa")
    if args.config is not None:
        config = from_json(kind, "".join(text_lines(args.config, "config")))
    elif begins_with_preset(args):
        config = presets[args.preset or next(iter(presets))]()
    else:
        config = read_config(kind, args.out)
    if hasattr(args, "out"):
        check_recipe(config, args.out)
    return apply_overrides(config, args.set)


def begins_with_preset(args: argparse.Namespace) -> bool:
    """Whether a command line's config is a preset with its `--set`, and no file."""
    begun = getattr(args, "resume", False) and (args.out / CONFIG).exists()
    return args.config is None and (args.preset is not None or not begun)


def print_rank_0(text: str) -> None:
    """Print, in the first process alone."""
    if rank() == 0:
        print(text, flush=True)  # noqa: T201


def show_progress(total: int, unit: str, steps: Iterable[tuple[int, str]]) -> None:
    """A progress bar over steps: how much of `total` is done, and a line to print or none."""
    with tqdm(total=total, unit=unit, disable=rank() != 0) as bar:
        for done, line in steps:
            bar.update(done - bar.n)
            if line and rank() == 0:
                bar.write(line)


def format_numbers(numbers: Mapping[str, object]) -> str:
    """Numbers with their names, as one line."""
    values = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in numbers.values())
    return ", ".join(f"{name} {value}" for name, value in zip(numbers, values, strict=True))
