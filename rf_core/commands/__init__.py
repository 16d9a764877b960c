"""The commands that need torch: `python -m rf_core generate | plan | inspect | convert | verify
| bench | profile`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

import torch

from .checkpoints import add_convert, add_inspect
from .generate import add_generate
from .measuring import add_bench, add_plan, add_profile, add_verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it went well, 1 on an error of the user's, 130 when stopped."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise  # of a CPU's memory there is no error of its own
        note = str(error).partition(". ")[0]
        print(f"error: {note}; python -m rf_core plan says what fits", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"error: this needs the package {error.name}; pip install it", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="reward-forcing", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_generate(commands.add_parser("generate", help="stream a video to an MP4"))
    add_plan(commands.add_parser("plan", help="say what memory a stream takes and how it fits"))
    add_inspect(commands.add_parser("inspect", help="say what a checkpoint or an adapter is"))
    add_convert(commands.add_parser("convert", help="write a checkpoint as safetensors"))
    add_verify(commands.add_parser("verify", help="compare with recorded outputs"))
    add_bench(commands.add_parser("bench", help="measure time and memory per chunk"))
    add_profile(commands.add_parser("profile", help="say where a chunk's time goes"))
    commands.add_parser("card", help="measure everything on a card: a table in nine minutes")
    return parser
