"""`generate`: a video, a batch of them, or one stream shared out over processes."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from ..arguments import argument
from ..batch import make, missing, plan_batch
from ..fast.parallel import Process, process_group
from ..generate import (
    attention_of,
    follow,
    generate,
    load,
    load_sequence_parallel,
    open_reader,
    split_of,
)
from ..options import SNAPSHOT_EVERY, SNAPSHOT_EVERY_CUDA, Plan, plan
from ..prompt_files import read_prompt_file
from ..source import AtEnd
from ..stream import GUIDE_STRENGTH, Stream
from ..video import Fit
from .control import CONTROL, add_control
from .live import LIVE, add_live, run_live_session, run_replay
from .printing import ProgressLine, dtype_note, family_lines, print_plan
from .run_options import batch_options, leave_out, single_options
from .shared import (
    GRAPHS,
    add_backend,
    add_choice,
    add_family,
    add_lora,
    add_settings,
    add_weights,
    is_whole,
)
from .signals import handling_signals, stop_on_signal

Load = Callable[[Plan], tuple[Stream, dict[str, Tensor]]]


def run_generate(args: argparse.Namespace) -> int:
    """A video, a batch, one stream over processes, a live session or its replay."""
    process = Process.of(os.environ)
    args.device = process.own_device(args.device)
    if args.live or args.replay is not None:
        return run_live_session(args, process) if args.live else run_replay(args, process)
    leave_out(args, "for --live", osc=None, pace=None)
    leave_out(args, "for --replay", edited=False)
    if args.prompts is not None:
        return _run_batch(args, process)
    if args.parallel is not None:
        return _run_sequence_parallel(args, process)
    if process.world_size > 1:
        raise ValueError(
            f"{process.world_size} processes would make the same video; give --prompts FILE, of "
            "which each makes a share, --parallel context, or start one process"
        )
    return _run_stream(args, plan(single_options(args)), load, process)


def _run_stream(args: argparse.Namespace, resolved: Plan, load: Load, process: Process) -> int:
    print_plan(args, resolved)
    reader = open_reader(resolved)
    stream, embeds = load(resolved)
    if (choice := attention_of(resolved, stream.model.config)).is_measured:
        print(choice)
    if resolved.snapshot is not None:
        print(f"resuming after chunk {stream.state.num_chunks}")
    with stop_on_signal(process) as stopped:
        kept = generate(resolved, stream, embeds, ProgressLine(), stopped, reader)
    made = stream.state.num_chunks
    if made:
        print(f"{resolved.options.output}: {resolved.clock.seconds(made):.2f} s of video")
    if kept is None:
        return 0
    print(f"stopped; {_resume_note(made, kept)}")
    return 130


def _resume_note(made: int, kept: int) -> str:
    """Where a run that made so many chunks goes on, and how, if its snapshot holds `kept`."""
    if not made:
        return "nothing was written"
    if not kept:
        return "there is no snapshot: the same command with --resume makes it from its beginning"
    where = "here" if kept == made else f"chunk {kept}"
    return f"the same command with --resume goes on from {where}"


def _run_sequence_parallel(args: argparse.Namespace, process: Process) -> int:
    if process.world_size == 1:
        raise ValueError(
            "--parallel shares a stream out over processes; start them with torchrun "
            "--nproc-per-node N -m rf_core generate ..., or leave it out"
        )
    with process_group(args.device):
        resolved = plan(single_options(args))
        split = split_of(resolved, process)
        torch.distributed.barrier()  # the first writes only when all have looked
        if process.rank == 0:
            return _run_stream(
                args, resolved, partial(load_sequence_parallel, split=split), process
            )
        stream, embeds = load_sequence_parallel(resolved, split)
        with stop_on_signal(process) as stopped:
            return 0 if follow(resolved, stream, embeds, stopped) else 130


def _run_batch(args: argparse.Namespace, process: Process) -> int:
    options, given = batch_options(args), read_prompt_file(args.prompts)
    batch = plan_batch(options, given.prompts, args.seeds)
    todo = missing(batch, process)
    who = f"process {process.rank} of {process.world_size}: " if process.world_size > 1 else ""
    done = len(batch.videos[process.rank :: process.world_size]) - len(todo)
    print(f"{who}{len(todo)} videos to make, {done} are there", flush=True)
    left_out = given.left_out if process.rank == 0 else None
    notes = (batch.base.fit, dtype_note(args, batch.base.options))
    for line in (left_out, *family_lines(batch.base.told), *notes):
        if line:
            print(f"{who}{line}", flush=True)
    with handling_signals(signal.default_int_handler):
        for number, path in enumerate(make(batch, todo, process), 1):
            print(f"{who}{number}/{len(todo)} {path}", flush=True)
    return 0


SOURCE = """With --source, a video is made anew by the prompt: image n of the source guides image n
of the video. Without a length it is as long as the source. A source is a video file, one image
(which is held), - for a video that comes through a pipe, or a camera: v4l2:/dev/video0 (Linux),
avfoundation:0 (macOS), dshow:video=NAME (Windows), of which the newest images are taken."""


def add_source(group: argparse._ArgumentGroup) -> None:
    """Arguments of a source."""
    add = group.add_argument
    add("--source", metavar="PLACE", help="a video file, - for a pipe, or a camera")
    strength = f"0, the source as it is, to 1, the prompt alone (default: {GUIDE_STRENGTH:g})"
    add("--strength", type=float, metavar="X", help=strength)
    motion = "added to it where all moves, as -0.2: less noise for what moves fast (default: 0)"
    add("--motion-strength", type=float, metavar="X", help=motion)
    end = "at its end: the video ends, its last image stays, or it begins again (default: stop)"
    add("--source-end", choices=get_args(AtEnd), help=end)
    fit = "of another shape: cut its edges, or put black beside it (default: crop)"
    add("--source-fit", choices=get_args(Fit), help=fit)


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Arguments of `generate`."""
    parser.set_defaults(command=run_generate)
    add = parser.add_argument_group("what the video shows").add_argument
    add("--prompt", metavar="TEXT", help="one prompt for the whole video")
    add("--timeline", type=Path, metavar="FILE", help="prompts in time, as '8s [cut]: a city'")
    add("--prompts", type=Path, metavar="FILE", help="TXT, CSV, TSV, JSONL: a video of each")
    add("--seeds", type=int, default=1, metavar="N", help="videos of each line of --prompts")
    add("--seconds", type=float, metavar="S", help="length; without it, on until Ctrl-C")
    add("--chunks", type=int, metavar="N", help="length in chunks")
    start = "a picture or clip to begin with; transparent parts become white (experimental)"
    add("--start", type=Path, metavar="FILE", help=start)
    add("--width", type=int, metavar="PIXELS", help="default: the model's own")
    add("--height", type=int, metavar="PIXELS", help="default: the model's own")
    add("--seed", type=int, default=0, metavar="N", help="the same seed gives the same video")
    add_source(parser.add_argument_group("a source that guides it", SOURCE))
    add_control(parser.add_argument_group("control", CONTROL))
    add_live(parser.add_argument_group("live", LIVE))
    weights = parser.add_argument_group("weights")
    add = weights.add_argument
    add("--model", default="demo", metavar="FILE", help="student (default: the bundled demo)")
    add("--vae", type=Path, metavar="FILE", help="Wan VAE or TAEHV")
    add("--text-encoder", metavar="PLACE", help="UMT5: a file, a folder or a hub id")
    add("--tokenizer", metavar="PLACE", help="its tokenizer, where the encoder has none")
    add_lora(weights)
    add_choice(weights)
    add_family(weights)
    add_settings(parser.add_argument_group("the past and the steps (default: the model's own)"))
    machine = parser.add_argument_group("machine")
    add_backend(machine, dtype=None)
    machine.add_argument(
        "--parallel", choices=("context",), help="one stream over the processes of torchrun"
    )
    add = machine.add_argument
    add(
        "--group-frames", type=_group_frames, metavar="N|auto", help="latent frames decoded at once"
    )
    add(
        "--graphs", choices=GRAPHS, default="auto", help="recorded passes (default: where possible)"
    )
    add("--compile", action="store_true", help="compile the blocks with torch.compile")
    add_weights(machine)
    add("--offload", choices=("auto", "none", "stream"), help="stream weights from host memory")
    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, metavar="PATH", help="the MP4 (default: a new name in outputs/)")
    add("--crf", type=int, default=18, metavar="N", help="quality: 0 lossless, 51 worst")
    every = f"in chunks; 0 for never (default: {SNAPSHOT_EVERY}, on a card {SNAPSHOT_EVERY_CUDA})"
    add("--snapshot-every", type=int, metavar="N", help=every)
    add("--resume", action="store_true", help="go on with an output that was stopped")
    add("--overwrite", action="store_true", help="replace an output that is there")


@argument
def _group_frames(text: str) -> int | str:
    if text != "auto" and not is_whole(text):
        raise ValueError(f"group_frames is {text!r}; give a whole number of frames, or auto")
    return text if text == "auto" else int(text)
