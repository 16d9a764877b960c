"""`generate --live` and `generate --replay`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from io import RawIOBase
from pathlib import Path

from ..arguments import argument
from ..fast.parallel import Process
from ..live.log import read_log
from ..live.osc import parse_address
from ..options import plan
from ..prompts import PromptTimeline, Switch
from ..source_input import PIPE
from ..steer import check_live, check_replay, open_live, open_replay, options_of, replay, run_live
from .printing import CountLine, print_line, print_plan
from .run_options import free_name, leave_out, run_options, single_options
from .signals import stop_on_signal

# What a live session's log holds, beside its prompts, its length and its seed.
_HELD = (
    "width",
    "height",
    "dtype",
    "window",
    "sink",
    "decay",
    "cache",
    "accumulator",
    "steps",
    "shift",
)
_TYPED = "type a prompt and press Enter, or /help; Ctrl-C or /stop ends it and keeps what is made"
_PIPED = (
    "the video comes through the pipe, so no line is read; Ctrl-C ends it and keeps what is made"
)
_SOURCE = ("strength", "motion_strength", "source_end", "source_fit")


def run_live_session(args: argparse.Namespace, process: Process) -> int:
    """`--live`: steered from this terminal."""
    kept = {"resume": False, "snapshot_every": None}
    leave_out(args, "not for --live, whose log makes it again with --replay", **kept)
    leave_out(args, "for --replay", edited=False)
    leave_out(args, "not for --live, which makes one video", prompts=None, seeds=1, replay=None)
    _require_one(args, process)
    resolved = plan(replace(single_options(args), keeps_text=True))
    check_live(resolved)
    print_plan(args, resolved)
    setup = open_live(resolved)
    print_line(_PIPED if args.source == PIPE else _TYPED)
    with stop_on_signal(process) as stopped:
        run_live(
            resolved,
            setup,
            print_line=print_line,
            typed=None if args.source == PIPE else _typed(),
            stopped=stopped,
            rate=None if args.pace == "max" else resolved.family.fps,
            osc=args.osc,
        )
        return 130 if stopped() else 0


def run_replay(args: argparse.Namespace, process: Process) -> int:
    """`--replay`: the videos of a session again."""
    leave_out(args, "not for --replay: the log holds it", **dict.fromkeys(_SOURCE))
    held = dict.fromkeys((*_HELD, "chunks", "seconds", "prompt", "timeline", "prompts"))
    leave_out(args, "not for --replay: the log holds it", seed=0, seeds=1, **held)
    leave_out(args, "for --live", osc=None, pace=None)
    leave_out(args, "not for --replay", resume=False, snapshot_every=None)
    _require_one(args, process)
    log = read_log(args.replay)
    timeline = PromptTimeline().append(0, "s", Switch(), log.header.prompt)
    output = args.output or free_name(Path("outputs"))
    resolved = plan(options_of(log, run_options(args, timeline, output)))
    check_replay(resolved)
    print(
        f"{args.replay}: {log.num_chunks} chunks, {resolved.width}x{resolved.height}, seed "
        f"{resolved.options.seed}"
    )
    setup = open_replay(resolved, log)
    with stop_on_signal(process) as stopped:
        whole = replay(
            resolved,
            setup,
            log,
            print_line=print_line,
            report=CountLine(),
            stopped=stopped,
            exact=not args.edited,
        )
    return 0 if whole else 130


def _require_one(args: argparse.Namespace, process: Process) -> None:
    if process.world_size > 1 or args.parallel is not None:
        raise ValueError("a live session, or its replay, is of one process; leave out --parallel")


def _typed() -> RawIOBase | None:
    """Where lines are typed, or piped; None where there is no such place."""
    raw = getattr(getattr(sys.stdin, "buffer", None), "raw", None)
    return raw if isinstance(raw, RawIOBase) else None


LIVE = """With --live, a line that is typed, or comes through a pipe, is a prompt from the next
chunk on; /help lists what else can be asked for. A length counts the chunks of the line that is
followed; that the input ends does not end it. The text encoder stays in memory for prompts to come:
11 GB for Wan's own, on a card or, where they do not fit, in the host's, at about half a second a
prompt. Branches lie beside the output as NAME-BRANCH.mp4, the log as NAME.jsonl. --replay makes all
videos again, to the bit; give it the same weights, --family, --lora, --start, --source and
--crf."""


def add_live(group: argparse._ArgumentGroup) -> None:
    """Arguments of a live session and its replay."""
    add = group.add_argument
    add("--live", action="store_true", help="steer it while it is made, from this terminal")
    pace = "real: no faster than it plays, max: as fast as it can (default: real)"
    add("--pace", choices=("real", "max"), help=pace)
    osc = "take OSC messages there as well; of this machine alone unless a host is given"
    add("--osc", type=argument(parse_address), metavar="[HOST:]PORT", help=osc)
    add("--replay", type=Path, metavar="LOG", help="make a live session's videos again")
    add("--edited", action="store_true", help="of a log that was changed by hand: another video")
