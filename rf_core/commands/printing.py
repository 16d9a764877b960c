"""What a run prints of itself."""

from __future__ import annotations

import argparse
import shutil
import sys

import torch

from ..families import DEFAULT
from ..options import Options, Plan
from ..pace import Progress
from ..prompts import clip_notes, format_table
from ..weights.recognise import Told


def print_line(text: str) -> None:
    """Print a line as one, from any thread."""
    print(f"{text}\n", end="", flush=True)


def print_plan(args: argparse.Namespace, resolved: Plan) -> None:
    """What is going to be made: the prompts, size, length, and what was chosen."""
    print(format_table(resolved.prompts, width=shutil.get_terminal_size().columns))
    for line in clip_notes(resolved.prompts):
        print(line)
    length = "without end, Ctrl-C stops"
    if resolved.total is not None:
        length = f"{resolved.total} chunks, {resolved.clock.seconds(resolved.total):.2f} s"
    size = f"{resolved.width}x{resolved.height} at {resolved.family.fps} images/s"
    print(f"{size}, seed {args.seed}, {length}")
    for line in source_lines(resolved):
        print(line)
    if resolved.choice is not None:
        print(f"model: {resolved.choice}")
    for line in family_lines(resolved.told):
        print(line)
    if resolved.fit is not None:
        print(resolved.fit)
    if note := dtype_note(args, resolved.options):
        print(note)


def source_lines(resolved: Plan) -> list[str]:
    """What guides the video, and where it ends a video that was to be longer."""
    source, images = resolved.options.source, resolved.source_images
    if source is None:
        return []
    line = f"source: {source.name}, strength {source.strength:g}"
    if images is None:
        return [line]
    line += f", {images / resolved.family.fps:.2f} s"
    if not resolved.cut_short:
        return [line]
    return [line, "the video ends with it; with --source-end hold or loop it goes on"]


def family_lines(told: Told) -> list[str]:
    """Whose student the model is, where that is news, and its licence where that forbids a use."""
    family = told.preset
    lines = [f"family: {told}"] if told.source != "metadata" or told.family != DEFAULT else []
    return lines + ([f"licence: {family.licence}"] if family.is_restricted else [])


def dtype_note(args: argparse.Namespace, options: Options) -> str | None:
    """What was chosen for a CPU, where it is news."""
    chosen = args.dtype is None and options.dtype == torch.bfloat16
    if not (chosen and args.device.startswith("cpu")):
        return None
    return (
        "computing in bfloat16, which this CPU multiplies; --dtype float32 is slower and more exact"
    )


class ProgressLine:
    """One line that is rewritten on a terminal, a line a chunk elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()

    def __call__(self, progress: Progress) -> None:
        text = str(progress)
        if not self._terminal:
            print(text, flush=True)
            return
        columns = shutil.get_terminal_size().columns - 1
        last = progress.chunks == progress.total
        line = f"{_bar(progress)} {text}"[:columns].ljust(columns)
        print(f"\r{line}", end="\n" if last else "", flush=True)


class CountLine:
    """How many chunks are made again: a line that is rewritten on a terminal, else one each."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()

    def __call__(self, done: int, total: int) -> None:
        start, end = ("\r", "\n" * (done == total)) if self._terminal else ("", "\n")
        print(f"{start}chunk {done}/{total}", end=end, flush=True)


def _bar(progress: Progress, width: int = 20) -> str:
    if progress.total is None:
        return "[endless]"
    done = width * progress.chunks // progress.total
    return f"[{'#' * done}{'.' * (width - done)}]"
