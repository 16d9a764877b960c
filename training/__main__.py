"""The trainer's command line: `python -m training re_dmd | verify`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rf_core.attention import check_device
from rf_core.generate import DEMO
from rf_core.verify import Backend, Comparison, verify_folder

from .config import changed, to_json
from .recipes import MiniatureConfig, distil
from .verify import KINDS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it went well, 1 on an error of the user's."""
    args = _parser().parse_args(arguments)
    try:
        return args.command(args)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run_verify(args: argparse.Namespace) -> int:
    """Compare the losses with recorded outputs of the published code."""
    check_device(args.device, DTYPES[args.dtype], "sdpa")
    backend = Backend(device=args.device, dtype=DTYPES[args.dtype])
    failures = 0
    for result in verify_folder(args.folder, backend, KINDS):
        failures += isinstance(result, Comparison) and not result.agrees
        print(result if isinstance(result, Comparison) else f"     {result}")
    print("all agree" if not failures else f"{failures} outputs disagree")
    return 1 if failures else 0


def run_redmd(args: argparse.Namespace) -> int:
    """Distil the miniature world's student."""
    config = changed(MiniatureConfig(), args.set)
    print(to_json(config), flush=True)
    for report in distil(config, args.world, args.out, args.resume):
        print(
            ", ".join(f"{name} {_told(value)}" for name, value in vars(report).items()), flush=True
        )
    print(f"{args.out}: the averaged student is student.safetensors")
    return 0


def _told(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    verify = commands.add_parser("verify", help="compare the losses with recorded outputs")
    verify.set_defaults(command=run_verify)
    verify.add_argument("folder", type=Path, help="folder of golden safetensors files")
    verify.add_argument("--device", default="cpu")
    verify.add_argument("--dtype", choices=DTYPES, default="float32")
    redmd = commands.add_parser("re_dmd", help="distil the miniature world's student")
    redmd.set_defaults(command=run_redmd)
    redmd.add_argument("--out", type=Path, required=True, help="where checkpoints go")
    redmd.add_argument(
        "--world", type=Path, default=DEMO, help="folder of the networks to begin with"
    )
    redmd.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    redmd.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    return parser


if __name__ == "__main__":
    sys.exit(main())
