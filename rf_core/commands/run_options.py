"""The `Options` of a run from the arguments of `generate`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ..options import Files, Options, files_of_model, model_path
from ..prompt_files import text_lines
from ..prompts import PromptTimeline, Switch, TimelineError, parse_timeline
from ..source_input import SourceOptions
from .shared import GRAPHS, cache_fields, dtype_of, sampler_fields


def single_options(args: argparse.Namespace) -> Options:
    """Of one video."""
    if args.seeds != 1:
        raise ValueError("--seeds is for --prompts; give a single video its --seed")
    return run_options(args, _timeline(args), args.output or free_name(Path("outputs")))


def batch_options(args: argparse.Namespace) -> Options:
    """Of the videos of a prompt file, into a folder."""
    if args.parallel is not None:
        raise ValueError("with --prompts each process makes its own videos; leave out --parallel")
    if args.source is not None and not SourceOptions(place=args.source).is_file:
        raise ValueError("videos of a prompt file are guided by a file; name one with --source")
    if args.prompt is not None or args.timeline is not None:
        raise ValueError("--prompts says what the videos show; leave out --prompt and --timeline")
    if args.output is None:
        raise ValueError("videos of a prompt file need a folder; give --output FOLDER")
    return run_options(args, PromptTimeline(), args.output)


def run_options(args: argparse.Namespace, timeline: PromptTimeline, output: Path) -> Options:
    """Of a video that shows a timeline, or of each of a batch."""
    return Options(
        timeline=timeline,
        output=output,
        files=_files(args),
        chunks=args.chunks,
        seconds=args.seconds,
        height=args.height,
        width=args.width,
        seed=args.seed,
        cache=cache_fields(args),
        sampler=sampler_fields(args),
        start=args.start,
        source=_source(args),
        device=args.device,
        dtype=dtype_of(args),
        attention=args.attention,
        graphs=GRAPHS[args.graphs] if args.parallel is None else False,
        weights=args.weights,
        compile=args.compile,
        **_memory_fields(args),
        crf=args.crf,
        snapshot_every=args.snapshot_every,
        resume=args.resume,
        overwrite=args.overwrite,
    )


def _memory_fields(args: argparse.Namespace) -> dict[str, Any]:
    """What is given on the command line; on a card the planner chooses the rest."""
    plans = args.device.startswith("cuda") and args.parallel is None
    if args.parallel is not None and args.offload is not None:
        raise ValueError("--parallel keeps weights on the cards; leave out --offload")
    offload = args.offload or ("auto" if plans else "none")
    group_frames = args.group_frames
    if group_frames is None and plans:
        group_frames = "auto"
    return {
        "group_frames": group_frames,
        "offload": offload,
        "text_offload": "stream" if offload == "stream" else "none",
    }


def _source(args: argparse.Namespace) -> SourceOptions | None:
    if args.source is None:
        why = "for --source"
        leave_out(args, why, strength=None, motion_strength=None, source_end=None, source_fit=None)
        return None
    given = {
        "strength": args.strength,
        "motion_strength": args.motion_strength,
        "at_end": args.source_end,
        "fit": args.source_fit,
    }
    return SourceOptions(
        place=args.source, **{name: value for name, value in given.items() if value is not None}
    )


def _timeline(args: argparse.Namespace) -> PromptTimeline:
    if (args.prompt is None) == (args.timeline is None):
        raise ValueError("give either --prompt TEXT or --timeline FILE, or else --prompts FILE")
    if args.prompt is not None:
        if not args.prompt.strip():
            raise ValueError("the prompt is empty; say what the video shows")
        if re.search("[\ud800-\udfff]", args.prompt):  # how Python keeps bytes it cannot read
            raise ValueError("the prompt has a character that is no text; type it in UTF-8")
        return PromptTimeline().append(0, "s", Switch(), args.prompt)
    text = "".join(text_lines(args.timeline, "timeline"))
    try:
        return parse_timeline(text)
    except TimelineError as error:
        raise ValueError(f"{args.timeline}: {error}") from error


def _files(args: argparse.Namespace) -> Files:
    model = model_path(args.model)
    if model == Files().model:
        names = ("vae", "text_encoder", "tokenizer", "submodel", "num_heads", "family")
        given = {name: getattr(args, name) for name in names}
        return Files(loras=tuple(args.lora), **{k: v for k, v in given.items() if v is not None})
    vae, text_encoder = files_of_model(model, args.vae, args.text_encoder, args.submodel)
    return Files(
        model=model,
        submodel=args.submodel,
        num_heads=args.num_heads,
        family=args.family,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=args.tokenizer,
        loras=tuple(args.lora),
    )


def free_name(folder: Path) -> Path:
    """The next `stream-N.mp4` of a folder, which is made where it is not there."""
    folder.mkdir(exist_ok=True)
    number = 1
    while (path := folder / f"stream-{number:04d}.mp4").exists():
        number += 1
    return path


def leave_out(args: argparse.Namespace, why: str, **usual: object) -> None:
    """ValueError where an option was given that says nothing here."""
    for name, value in usual.items():
        if getattr(args, name) != value:
            raise ValueError(f"--{name.replace('_', '-')} is {why}; leave it out")
