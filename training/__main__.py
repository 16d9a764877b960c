"""The trainer's command line: `python -m training verify FOLDER`; recipes come here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rf_core.attention import check_device
from rf_core.verify import Backend, Comparison, verify_folder

from .verify import KINDS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it went well, 1 on an error of the user's."""
    args = _parser().parse_args(arguments)
    try:
        return args.command(args)
    except (ValueError, OSError) as error:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    verify = commands.add_parser("verify", help="compare the losses with recorded outputs")
    verify.set_defaults(command=run_verify)
    verify.add_argument("folder", type=Path, help="folder of golden safetensors files")
    verify.add_argument("--device", default="cpu")
    verify.add_argument("--dtype", choices=DTYPES, default="float32")
    return parser


if __name__ == "__main__":
    sys.exit(main())
