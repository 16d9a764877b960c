"""What every recipe's command line has: where its config comes from, and what it runs on."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from rf_core.attention import check_device
from rf_core.prompt_files import text_lines

from .config import changed, from_json

T = TypeVar("T")


def add_config_arguments(
    parser: argparse.ArgumentParser, presets: Mapping[str, Callable[[], Any]]
) -> None:
    """`--preset`, the first of them by default, `--config`, `--set` and `--device`."""
    first = next(iter(presets))
    parser.add_argument("--preset", choices=presets, default=first, help="where to begin")
    parser.add_argument("--config", type=Path, help="a config.json, in place of a preset")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cpu or cuda")


def config_of(args: argparse.Namespace, kind: type[T], presets: Mapping[str, Callable[[], T]]) -> T:
    """The config that a command line names, with its changes."""
    check_device(args.device, torch.float32, "sdpa")
    if args.config is not None:
        config = from_json(kind, "".join(text_lines(args.config, "config")))
    else:
        config = presets[args.preset]()
    return changed(config, args.set)
