"""The commands that need torch: `python -m rf_core generate | plan | inspect | convert | verify
| bench | profile`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import RawIOBase
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor

from .arguments import argument
from .attention import BACKENDS, attention_backend, check_device, device_kind
from .batch import make, missing, plan_batch
from .config import FPS, WAN_SIZE, CacheConfig, ModelConfig, SamplerConfig
from .decoders.taehv import TAEHVConfig
from .decoders.vae import VAEConfig
from .devices import make_current, preferred_dtype
from .fast.parallel import Process, any_process, process_group
from .generate import attention_of, follow, generate, load, load_sequence_parallel, split_of
from .live.log import read_log
from .live.osc import parse_address
from .measure.baseline import BaselineOptions, compare, format_comparison
from .measure.bench import BenchOptions, bench, format_bench
from .measure.profile import ProfileOptions, format_profile, profile
from .measure.verify import Backend, Comparison, verify_folder
from .measure.workload import DECODERS, RANDOM_SIZES, SIZES
from .memory.footprint import Sizes, TextSizes
from .memory.placement import decoder_config, free_bytes, parse_bytes, text_sizes
from .memory.plan import fit, format_plan
from .options import SNAPSHOT_EVERY, SNAPSHOT_EVERY_CUDA, Files, Options, Plan, plan
from .pace import Progress
from .prompt_files import read_prompt_file, text_lines
from .prompts import (
    PromptTimeline,
    Switch,
    TimelineError,
    clip_notes,
    format_table,
    parse_timeline,
)
from .ranges import MANY, check_numbers, check_writable
from .steer import check_live, check_replay, open_live, open_replay, options_of, replay, run_live
from .stream import Stream
from .weights.checkpoint import convert, describe, read_checkpoint
from .weights.lora import parse_lora_argument
from .writing import write_text

Load = Callable[[Plan], tuple[Stream, dict[str, Tensor]]]
GRAPHS: dict[str, bool | Literal["auto"]] = {"auto": "auto", "on": True, "off": False}
_DEFAULT_DTYPE = (
    "bfloat16 on a card, and for large networks on a CPU that multiplies it, else float32"
)
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
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def run_generate(args: argparse.Namespace) -> int:
    process = Process.of(os.environ)
    args.device = process.own_device(args.device)
    if args.live or args.replay is not None:
        return _run_live(args, process) if args.live else _run_replay(args, process)
    _leave_out(args, "for --live", osc=None, pace=None)
    _leave_out(args, "for --replay", edited=False)
    if args.prompts is not None:
        return _run_batch(args, process)
    if args.parallel is not None:
        return _run_sequence_parallel(args, process)
    if process.world_size > 1:
        raise ValueError(
            f"{process.world_size} processes would make the same video; give --prompts FILE, of "
            "which each makes a share, --parallel context, or start one process"
        )
    return _run_stream(args, plan(_options(args)), load, process)


def _run_live(args: argparse.Namespace, process: Process) -> int:
    kept = {"resume": False, "snapshot_every": None}
    _leave_out(args, "not for --live, whose log makes it again with --replay", **kept)
    _leave_out(args, "for --replay", edited=False)
    _leave_out(args, "not for --live, which makes one video", prompts=None, seeds=1, replay=None)
    _require_one(args, process)
    resolved = plan(replace(_options(args), keeps_text=True))
    check_live(resolved)
    _print_plan(args, resolved)
    setup = open_live(resolved)
    _say("type a prompt and press Enter, or /help; Ctrl-C or /stop ends it and keeps what is made")
    with _stop_on_signal(process) as stopped:
        run_live(
            resolved,
            setup,
            print_line=_say,
            typed=_typed(),
            stopped=stopped,
            rate=None if args.pace == "max" else FPS,
            osc=args.osc,
        )
        return 130 if stopped() else 0


def _run_replay(args: argparse.Namespace, process: Process) -> int:
    held = dict.fromkeys((*_HELD, "chunks", "seconds", "prompt", "timeline", "prompts"))
    _leave_out(args, "not for --replay: the log holds it", seed=0, seeds=1, **held)
    _leave_out(args, "for --live", osc=None, pace=None)
    _leave_out(args, "not for --replay", resume=False, snapshot_every=None)
    _require_one(args, process)
    log = read_log(args.replay)
    timeline = PromptTimeline().append(0, "s", Switch(), log.header.prompt)
    output = args.output or _free_name(Path("outputs"))
    resolved = plan(options_of(log, _run_options(args, timeline, output)))
    check_replay(resolved)
    print(
        f"{args.replay}: {log.num_chunks} chunks, {resolved.width}x{resolved.height}, seed "
        f"{resolved.options.seed}"
    )
    setup = open_replay(resolved, log)
    with _stop_on_signal(process) as stopped:
        whole = replay(
            resolved,
            setup,
            log,
            print_line=_say,
            report=_CountLine(),
            stopped=stopped,
            exact=not args.edited,
        )
    return 0 if whole else 130


def _require_one(args: argparse.Namespace, process: Process) -> None:
    if process.world_size > 1 or args.parallel is not None:
        raise ValueError("a live session, or its replay, is of one process; leave out --parallel")


def _leave_out(args: argparse.Namespace, why: str, **usual: object) -> None:
    """ValueError where an option was given that says nothing here."""
    for name, value in usual.items():
        if getattr(args, name) != value:
            raise ValueError(f"--{name.replace('_', '-')} is {why}; leave it out")


def _say(text: str) -> None:
    """Print a line as one, from any thread."""
    print(f"{text}\n", end="", flush=True)


def _typed() -> RawIOBase | None:
    """Where lines are typed, or piped; None where there is no such place."""
    raw = getattr(getattr(sys.stdin, "buffer", None), "raw", None)
    return raw if isinstance(raw, RawIOBase) else None


def _run_stream(args: argparse.Namespace, resolved: Plan, load: Load, process: Process) -> int:
    _print_plan(args, resolved)
    stream, embeds = load(resolved)
    if (choice := attention_of(resolved, stream.model.config)).is_measured:
        print(choice)
    if resolved.snapshot is not None:
        print(f"resuming after chunk {stream.state.num_chunks}")
    with _stop_on_signal(process) as stopped:
        kept = generate(resolved, stream, embeds, _ProgressLine(), stopped)
    made = stream.state.num_chunks
    if made:
        print(f"{resolved.options.output}: {resolved.clock.seconds(made):.2f} s of video")
    if kept is None:
        return 0
    print(f"stopped; {_resume_note(made, kept)}")
    return 130


def _print_plan(args: argparse.Namespace, resolved: Plan) -> None:
    print(format_table(resolved.prompts, width=shutil.get_terminal_size().columns))
    for note in clip_notes(resolved.prompts):
        print(note)
    length = "without end, Ctrl-C stops"
    if resolved.total is not None:
        length = f"{resolved.total} chunks, {resolved.clock.seconds(resolved.total):.2f} s"
    print(f"{resolved.width}x{resolved.height} at {FPS} images/s, seed {args.seed}, {length}")
    if resolved.choice is not None:
        print(f"model: {resolved.choice}")
    if resolved.fit is not None:
        print(resolved.fit)
    if dtype_note := _dtype_note(args, resolved.options):
        print(dtype_note)


def _resume_note(made: int, kept: int) -> str:
    """Where a run that made so many chunks goes on, and how, if its snapshot holds `kept`."""
    if not made:
        return "nothing was written"
    if not kept:
        return "there is no snapshot: the same command with --resume makes it from its beginning"
    where = "here" if kept == made else f"chunk {kept}"
    return f"the same command with --resume goes on from {where}"


def _dtype_note(args: argparse.Namespace, options: Options) -> str | None:
    """What was chosen for a CPU, where it is news."""
    chosen = args.dtype is None and options.dtype == torch.bfloat16
    if not (chosen and args.device.startswith("cpu")):
        return None
    return (
        "computing in bfloat16, which this CPU multiplies; --dtype float32 is slower and more exact"
    )


def _run_sequence_parallel(args: argparse.Namespace, process: Process) -> int:
    if process.world_size == 1:
        raise ValueError(
            "--parallel shares a stream out over processes; start them with torchrun "
            "--nproc-per-node N -m rf_core generate ..., or leave it out"
        )
    with process_group(args.device):
        resolved = plan(_options(args))
        split = split_of(resolved, process)
        torch.distributed.barrier()  # the first writes only when all have looked
        if process.rank == 0:
            return _run_stream(
                args, resolved, partial(load_sequence_parallel, split=split), process
            )
        stream, embeds = load_sequence_parallel(resolved, split)
        with _stop_on_signal(process) as stopped:
            return 0 if follow(resolved, stream, embeds, stopped) else 130


@contextmanager
def _stop_on_signal(process: Process) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, or SIGTERM sent, to be asked as the run goes on.

    The second one ends the pass at once, as KeyboardInterrupt.
    """
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if (
            stop.is_set() and process.world_size == 1
        ):  # torchrun passes the first one on as a second
            raise KeyboardInterrupt
        stop.set()

    with _signals(on_signal):
        yield stop.is_set if process.world_size == 1 else any_process(stop.is_set)


@contextmanager
def _signals(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Within it, Ctrl-C and SIGTERM call a function."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)


def _run_batch(args: argparse.Namespace, process: Process) -> int:
    options, given = _batch_options(args), read_prompt_file(args.prompts)
    batch = plan_batch(options, given.prompts, args.seeds)
    todo = missing(batch, process)
    who = f"process {process.rank} of {process.world_size}: " if process.world_size > 1 else ""
    done = len(batch.videos[process.rank :: process.world_size]) - len(todo)
    print(f"{who}{len(todo)} videos to make, {done} are there", flush=True)
    left_out = given.left_out if process.rank == 0 else None
    for line in (left_out, batch.base.fit, _dtype_note(args, batch.base.options)):
        if line:
            print(f"{who}{line}", flush=True)
    with _signals(signal.default_int_handler):
        for number, path in enumerate(make(batch, todo, process), 1):
            print(f"{who}{number}/{len(todo)} {path}", flush=True)
    return 0


def run_plan(args: argparse.Namespace) -> int:
    device_kind(args.device)
    if args.available is None:
        check_device(args.device, "auto", "auto")
    named = _named_sizes(args.size, args.decoder)
    dtype = DTYPES[args.dtype] if args.dtype else preferred_dtype(args.device, named["model"])
    sizes = Sizes(
        **named,
        height=args.height,
        width=args.width,
        cache=CacheConfig(**_cache_fields(args)),
        batch=args.batch,
        dtype=dtype,
        device=torch.device(args.device).type,
        linear_bytes=args.weight_bytes,
        graphs=args.graphs != "off",
    )
    free = free_bytes(args.device) if args.available is None else parse_bytes(args.available)
    print(format_plan(sizes, fit(sizes, free, must_record=args.graphs == "on")))
    return 0


def _named_sizes(size: str, decoder: str) -> dict[str, Any]:
    decoders = {"none": None, "wan": VAEConfig(), "taehv": TAEHVConfig()}
    model = _model_sizes(size)
    if size != "demo":
        return {"model": model, "decoder": decoders[decoder], "text": TextSizes()}
    files = Files()
    return {
        "model": model,
        "decoder": decoder_config(files.vae) if decoder == "wan" else decoders[decoder],
        "text": text_sizes(files.text_encoder),
    }


def _model_sizes(size: str) -> ModelConfig:
    return read_checkpoint(Files().model).config if size == "demo" else RANDOM_SIZES[size]


def run_inspect(args: argparse.Namespace) -> int:
    check_numbers(args, num_heads=(1, MANY))
    print(describe(read_checkpoint(args.model, submodel=args.submodel, num_heads=args.num_heads)))
    return 0


def run_convert(args: argparse.Namespace) -> int:
    check_numbers(args, num_heads=(1, MANY))
    check_writable(args.target)
    source = read_checkpoint(args.source, submodel=args.submodel, num_heads=args.num_heads)
    checkpoint = convert(
        args.source,
        args.target,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        submodel=args.submodel,
        num_heads=args.num_heads,
        cache=replace(source.cache or CacheConfig(), **_cache_fields(args)),
        sampler=replace(source.sampler or SamplerConfig(), **_sampler_fields(args)),
        loras=tuple(args.lora),
    )
    print(describe(checkpoint))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    torch.backends.cudnn.allow_tf32 = False  # records are float32 in earnest
    name = "sdpa" if args.attention == "auto" else args.attention  # what records were made with
    check_device(args.device, DTYPES[args.dtype], name)
    make_current(args.device)
    backend = Backend(
        device=args.device, dtype=DTYPES[args.dtype], attention=attention_backend(name)
    )
    failures = 0
    with torch.no_grad():
        for result in verify_folder(args.folder, backend):
            if isinstance(result, Comparison):
                failures += not result.agrees
                print(result)
            else:
                print(f"     {result}")
    print("all agree" if not failures else f"{failures} outputs disagree")
    return 1 if failures else 0


def run_bench(args: argparse.Namespace) -> int:
    _check_json(args)
    if args.baseline is not None:
        return _run_baseline(args)
    fields = {**_chunks(args), **_workload_fields(args)}
    result = bench(BenchOptions(compile=args.compile, graphs=_graphs(args), **fields))
    print(format_bench(result))
    _write_json(args.json, result)
    return 0


def _run_baseline(args: argparse.Namespace) -> int:
    if args.compile or args.decoder not in (None, "none"):
        raise ValueError("--baseline compares the network alone; leave out --compile and --decoder")
    fields = _workload_fields(args) | {"decoder": "none", "graphs": _graphs(args)}
    race = BaselineOptions(folder=args.baseline, rounds=args.rounds, **_chunks(args), **fields)
    result = compare(race)
    print(format_comparison(result))
    _write_json(args.json, result)
    return 0 if result["agrees"] else 1


def _chunks(args: argparse.Namespace) -> dict[str, Any]:
    return {} if args.chunks is None else {"chunks": args.chunks}


def run_profile(args: argparse.Namespace) -> int:
    _check_json(args)
    fields = _workload_fields(args)
    result = profile(ProfileOptions(chunks=args.chunks, trace=args.trace, **fields))
    print(format_profile(result))
    _write_json(args.json, result)
    return 0


def _workload_fields(args: argparse.Namespace) -> dict[str, Any]:
    check_device(args.device, _dtype(args), args.attention)
    make_current(args.device)
    dtype = _dtype(args)
    if dtype == "auto":
        dtype = preferred_dtype(args.device, _model_sizes(args.size))
    names = ("size", "height", "width", "device", "attention", "decoder", "vae", "weights")
    return {
        **{name: getattr(args, name) for name in (*names, "text_encoder", "tokenizer")},
        "dtype": dtype,
        "cache": CacheConfig(**_cache_fields(args)),
    }


def _dtype(args: argparse.Namespace) -> torch.dtype | Literal["auto"]:
    return DTYPES[args.dtype] if args.dtype else "auto"


def _graphs(args: argparse.Namespace) -> bool:
    possible = args.device.startswith(("cuda", "cpu")) and not args.compile
    return args.graphs == "on" or (args.graphs == "auto" and possible)


def _check_json(args: argparse.Namespace) -> None:
    check_numbers(args, chunks=(1, MANY))
    if args.json is not None:
        check_writable(args.json)


def _write_json(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        write_text(path, json.dumps(result, indent=2))


class _ProgressLine:
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


class _CountLine:
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


def _options(args: argparse.Namespace) -> Options:
    if args.seeds != 1:
        raise ValueError("--seeds is for --prompts; give a single video its --seed")
    return _run_options(args, _timeline(args), args.output or _free_name(Path("outputs")))


def _batch_options(args: argparse.Namespace) -> Options:
    if args.parallel is not None:
        raise ValueError("with --prompts each process makes its own videos; leave out --parallel")
    if args.prompt is not None or args.timeline is not None:
        raise ValueError("--prompts says what the videos show; leave out --prompt and --timeline")
    if args.output is None:
        raise ValueError("videos of a prompt file need a folder; give --output FOLDER")
    return _run_options(args, PromptTimeline(), args.output)


def _run_options(args: argparse.Namespace, timeline: PromptTimeline, output: Path) -> Options:
    return Options(
        timeline=timeline,
        output=output,
        files=_files(args),
        chunks=args.chunks,
        seconds=args.seconds,
        height=args.height,
        width=args.width,
        seed=args.seed,
        cache=_cache_fields(args),
        sampler=_sampler_fields(args),
        start=args.start,
        device=args.device,
        dtype=_dtype(args),
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
    if args.model == "demo":
        names = ("vae", "text_encoder", "tokenizer", "submodel", "num_heads")
        given = {name: getattr(args, name) for name in names}
        return Files(loras=tuple(args.lora), **{k: v for k, v in given.items() if v is not None})
    if args.vae is None or args.text_encoder is None:
        raise ValueError(
            f"--model {args.model} needs its --vae and --text-encoder as well "
            "(README, 'With the official checkpoint', says where to get them)"
        )
    return Files(
        model=Path(args.model),
        submodel=args.submodel,
        num_heads=args.num_heads,
        vae=args.vae,
        text_encoder=args.text_encoder,
        tokenizer=args.tokenizer,
        loras=tuple(args.lora),
    )


def _free_name(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    number = 1
    while (path := folder / f"stream-{number:04d}.mp4").exists():
        number += 1
    return path


def _cache_fields(args: argparse.Namespace) -> dict[str, Any]:
    fields = {
        "window_frames": args.window,
        "sink_frames": args.sink,
        "decay": args.decay,
        "accumulator": args.accumulator,
        "storage": args.cache,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _sampler_fields(args: argparse.Namespace) -> dict[str, Any]:
    fields = {"steps": args.steps, "shift": args.shift}
    return {name: value for name, value in fields.items() if value is not None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="reward-forcing", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="stream a video to an MP4"))
    _add_plan(commands.add_parser("plan", help="say what memory a stream takes and how it fits"))
    _add_inspect(commands.add_parser("inspect", help="say what a checkpoint is"))
    _add_convert(commands.add_parser("convert", help="write a checkpoint as safetensors"))
    _add_verify(commands.add_parser("verify", help="compare with recorded outputs"))
    _add_bench(commands.add_parser("bench", help="measure time and memory per chunk"))
    _add_profile(commands.add_parser("profile", help="say where a chunk's time goes"))
    commands.add_parser("card", help="measure everything on a card: a table in nine minutes")
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
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
    _add_live(parser.add_argument_group("live", _LIVE))
    weights = parser.add_argument_group("weights")
    add = weights.add_argument
    add("--model", default="demo", metavar="FILE", help="student (default: the bundled demo)")
    add("--vae", type=Path, metavar="FILE", help="Wan VAE or TAEHV")
    add("--text-encoder", metavar="PLACE", help="UMT5: a file, a folder or a hub id")
    add("--tokenizer", metavar="PLACE", help="its tokenizer, where the encoder has none")
    _add_lora(weights)
    _add_choice(weights)
    _add_settings(parser.add_argument_group("the past and the steps (default: the model's own)"))
    machine = parser.add_argument_group("machine")
    _add_backend(machine, dtype=None)
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
    _add_weights(machine)
    add("--offload", choices=("auto", "none", "stream"), help="stream weights from host memory")
    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, metavar="PATH", help="the MP4 (default: a new name in outputs/)")
    add("--crf", type=int, default=18, metavar="N", help="quality: 0 lossless, 51 worst")
    every = f"in chunks; 0 for never (default: {SNAPSHOT_EVERY}, on a card {SNAPSHOT_EVERY_CUDA})"
    add("--snapshot-every", type=int, metavar="N", help=every)
    add("--resume", action="store_true", help="go on with an output that was stopped")
    add("--overwrite", action="store_true", help="replace an output that is there")


_LIVE = """With --live, a line that is typed, or comes through a pipe, is a prompt from the next
chunk on; /help lists what else can be asked for. A length counts the chunks of the line that is
followed; that the input ends does not end it. The text encoder stays in memory for prompts to come:
11 GB for Wan's own, on a card or, where they do not fit, in the host's, at about half a second a
prompt. Branches lie beside the output as NAME-BRANCH.mp4, the log as NAME.jsonl. --replay makes all
videos again, to the bit; give it the same weights, --lora, --start and --crf."""


def _add_live(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--live", action="store_true", help="steer it while it is made, from this terminal")
    pace = "real: no faster than it plays, max: as fast as it can (default: real)"
    add("--pace", choices=("real", "max"), help=pace)
    osc = "take OSC messages there as well; of this machine alone unless a host is given"
    add("--osc", type=argument(parse_address), metavar="[HOST:]PORT", help=osc)
    add("--replay", type=Path, metavar="LOG", help="make a live session's videos again")
    add("--edited", action="store_true", help="of a log that was changed by hand: another video")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=run_plan)
    height, width = WAN_SIZE
    add = parser.add_argument
    add("--size", choices=SIZES, default="1.3b", help="default: 1.3b")
    add("--width", type=int, default=width, help=f"picture width in pixels (default: {width})")
    add("--height", type=int, default=height, help=f"picture height in pixels (default: {height})")
    add("--batch", type=int, default=1, help="videos at once")
    add("--decoder", choices=("none", "wan", "taehv"), default="wan", help="default: wan")
    add("--dtype", choices=DTYPES, help=f"default: {_DEFAULT_DTYPE}")
    add("--weight-bytes", type=int, metavar="N", help="of a linear layer's weight: 1 is fp8")
    add(
        "--graphs", choices=GRAPHS, default="auto", help="recorded passes (default: where they fit)"
    )
    add("--device", default="cuda", help="whose paths are counted (default: cuda)")
    add("--available", metavar="SIZE", help="such as 16GB; default: what is free on the device")
    _add_cache(parser)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=run_inspect)
    parser.add_argument("model", type=Path, help="a checkpoint: file, folder or index")
    _add_choice(parser)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=run_convert)
    parser.add_argument("source", type=Path, help="a checkpoint: file, folder or index")
    parser.add_argument("target", type=Path, help="the .safetensors to write")
    parser.add_argument("--dtype", choices=DTYPES, help="by default the source's own")
    _add_lora(parser)
    _add_choice(parser)
    _add_settings(parser)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=run_verify)
    parser.add_argument("folder", type=Path, help="folder of golden safetensors files")
    _add_backend(parser, dtype="float32")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=run_bench)
    add = parser.add_argument
    add("--chunks", type=int, help="chunks to stream (default: 500; 12 a round with --baseline)")
    add(
        "--graphs", choices=GRAPHS, default="auto", help="recorded passes (default: where possible)"
    )
    add("--compile", action="store_true", help="compile the blocks with torch.compile")
    add("--baseline", type=Path, metavar="FOLDER", help="a checkout of the published code to race")
    add("--rounds", type=int, default=3, help="rollouts of the race")
    _add_workload(parser)


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=run_profile)
    add = parser.add_argument
    add("--chunks", type=int, default=5, help="chunks to time, after the window has filled")
    default = Path("outputs") / "trace.json"
    add("--trace", type=Path, default=default, metavar="FILE", help=f"default: {default}")
    _add_workload(parser)


def _add_workload(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--size", choices=SIZES, default="tiny", help="demo, or a size with random weights")
    add("--width", type=int, default=64, help="picture width in pixels")
    add("--height", type=int, default=64, help="picture height in pixels")
    add("--decoder", choices=DECODERS, help="default: wan for the demo, none for the others")
    add("--vae", type=Path, metavar="FILE", help="a decoder's weights in place of random ones")
    add("--text-encoder", metavar="PLACE", help="UMT5 for the random sizes: file, folder, hub id")
    add("--tokenizer", metavar="PLACE", help="its tokenizer, where the encoder has none")
    _add_weights(parser)
    add("--json", type=Path, metavar="FILE", help="write the measurements here too")
    _add_cache(parser)
    _add_backend(parser, dtype=None)


def _add_weights(parser: argparse._ActionsContainer) -> None:
    text = "fp8 halves the blocks' weights: an approximation"
    parser.add_argument("--weights", choices=("exact", "fp8"), default="exact", help=text)


def _add_lora(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--lora",
        type=argument(parse_lora_argument),
        action="append",
        default=[],
        metavar="FILE:STRENGTH",
        help="an adapter to merge; may be given more than once",
    )


def _add_choice(parser: argparse._ActionsContainer) -> None:
    add = parser.add_argument
    add("--submodel", metavar="NAME", help="network of a bundle (default: generator_ema)")
    add("--num-heads", type=int, metavar="N", help="attention heads, where none are recorded")


def _add_settings(parser: argparse._ActionsContainer) -> None:
    _add_cache(parser)
    add = parser.add_argument
    add("--steps", type=_steps, metavar="T,T,..", help="denoising steps, as 1000,750,500,250")
    add("--shift", type=float, metavar="X", help="flow shift that warps the steps")


def _add_cache(parser: argparse._ActionsContainer) -> None:
    add = parser.add_argument
    add("--window", type=int, metavar="FRAMES", help="latent frames attention sees")
    add("--sink", type=int, metavar="FRAMES", help="latent frames of the sink; 0 for none")
    add("--decay", type=float, metavar="ALPHA", help="what the sink keeps of itself; 1 is static")
    add("--cache", choices=("exact", "int8"), help="int8 halves its memory: an approximation")
    add("--accumulator", choices=("reference", "float32"), help="how the sink's average rounds")


def _add_backend(parser: argparse._ActionsContainer, dtype: str | None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--device", default=device, help=f"default: {device}")
    default = dtype or _DEFAULT_DTYPE
    add("--dtype", choices=DTYPES, default=dtype, help=f"computing precision (default: {default})")
    names = ("auto", *BACKENDS)
    add("--attention", choices=names, default="auto", help="default: auto, the fastest exact one")


@argument
def _group_frames(text: str) -> int | str:
    if text != "auto" and not _is_whole(text):
        raise ValueError(f"group_frames is {text!r}; give a whole number of frames, or auto")
    return text if text == "auto" else int(text)


@argument
def _steps(text: str) -> tuple[int, ...]:
    steps = text.split(",")
    if not all(map(_is_whole, steps)):
        raise ValueError(
            f"steps are {text!r}; give whole numbers with commas between, as 1000,750,500,250"
        )
    return tuple(map(int, steps))


def _is_whole(text: str) -> bool:
    return re.fullmatch(r"\s*[-+]?\d{1,99}\s*", text) is not None
