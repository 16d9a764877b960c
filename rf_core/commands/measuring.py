"""`plan`, `verify`, `bench` and `profile`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ..attention import attention_backend, check_device, device_kind
from ..config import WAN_SIZE, ModelConfig
from ..decoders.taehv import TAEHVConfig
from ..decoders.vae import VAEConfig
from ..devices import make_current, preferred_dtype
from ..families import AUTO
from ..measure.baseline import BaselineOptions, compare, format_comparison
from ..measure.bench import BenchOptions, bench, format_bench
from ..measure.control import compare_control, format_control
from ..measure.families import RoundsOptions, compare_families, format_families
from ..measure.profile import ProfileOptions, format_profile, profile
from ..measure.verify import Backend, Comparison, verify_folder
from ..measure.workload import DECODERS, RANDOM_SIZES, SIZES
from ..memory.footprint import Sizes, TextSizes
from ..memory.placement import decoder_config, free_bytes, parse_bytes, text_sizes
from ..memory.plan import fit, format_plan
from ..options import Files
from ..ranges import MANY, check_numbers, check_writable
from ..stream import NO_CONTROL
from ..weights.checkpoint import read_checkpoint
from ..writing import write_text
from .shared import (
    DEFAULT_DTYPE,
    DTYPES,
    GRAPHS,
    add_backend,
    add_cache,
    add_family,
    add_weights,
    cache_fields,
    dtype_of,
    family_fields,
)


def run_plan(args: argparse.Namespace) -> int:
    """Print what memory a stream takes and how it fits."""
    device_kind(args.device)
    if args.available is None:
        check_device(args.device, "auto", "auto")
    named = _named_sizes(args.size, args.decoder)
    dtype = DTYPES[args.dtype] if args.dtype else preferred_dtype(args.device, named["model"])
    sizes = Sizes(
        **named,
        height=args.height,
        width=args.width,
        **family_fields(args),
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


def run_verify(args: argparse.Namespace) -> int:
    """Compare with recorded outputs; 1 where one disagrees."""
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
    """Measure time and memory a chunk, alone or against the published code."""
    _check_json(args)
    races = {"--baseline": args.baseline is not None, "--families": args.families}
    if sum((races | {"--control": args.control}).values()) > 1:
        raise ValueError(
            "each is a race of its own; give one of --baseline and --families, or --control"
        )
    if args.baseline is not None:
        return _run_baseline(args)
    if args.families:
        return _run_families(args)
    if args.control:
        return _run_control(args)
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


def _run_families(args: argparse.Namespace) -> int:
    if args.compile or args.decoder not in (None, "none"):
        raise ValueError("--families compares the network alone; leave out --compile and --decoder")
    if cache_fields(args) or args.family != AUTO:
        raise ValueError(
            "--families compares each family's own settings; leave out --family and those of the "
            "cache"
        )
    fields = _workload_fields(args) | {"decoder": "none", "graphs": _graphs(args)}
    race = RoundsOptions(rounds=args.rounds, **_chunks(args), **fields)
    result = compare_families(race)
    print(format_families(result))
    _write_json(args.json, result)
    return 0


def _run_control(args: argparse.Namespace) -> int:
    if args.compile or args.decoder not in (None, "none"):
        raise ValueError("--control compares the network alone; leave out --compile and --decoder")
    fields = _workload_fields(args) | {"decoder": "none", "graphs": _graphs(args)}
    if fields["sampler"].rolling:
        raise ValueError(f"--control streams a chunk at a time; {NO_CONTROL}")
    result = compare_control(RoundsOptions(rounds=args.rounds, **_chunks(args), **fields))
    print(format_control(result))
    _write_json(args.json, result)
    return 0


def _chunks(args: argparse.Namespace) -> dict[str, Any]:
    return {} if args.chunks is None else {"chunks": args.chunks}


def run_profile(args: argparse.Namespace) -> int:
    """Print where a chunk's time goes."""
    _check_json(args)
    fields = _workload_fields(args)
    result = profile(ProfileOptions(chunks=args.chunks, trace=args.trace, **fields))
    print(format_profile(result))
    _write_json(args.json, result)
    return 0


def _workload_fields(args: argparse.Namespace) -> dict[str, Any]:
    check_device(args.device, dtype_of(args), args.attention)
    make_current(args.device)
    dtype = dtype_of(args)
    if dtype == "auto":
        dtype = preferred_dtype(args.device, _model_sizes(args.size))
    names = ("size", "height", "width", "device", "attention", "decoder", "vae", "weights")
    return {
        **{name: getattr(args, name) for name in (*names, "text_encoder", "tokenizer")},
        "dtype": dtype,
        **family_fields(args),
    }


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


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Arguments of `plan`."""
    parser.set_defaults(command=run_plan)
    height, width = WAN_SIZE
    add = parser.add_argument
    add("--size", choices=SIZES, default="1.3b", help="default: 1.3b")
    add("--width", type=int, default=width, help=f"picture width in pixels (default: {width})")
    add("--height", type=int, default=height, help=f"picture height in pixels (default: {height})")
    add("--batch", type=int, default=1, help="videos at once")
    add("--decoder", choices=("none", "wan", "taehv"), default="wan", help="default: wan")
    add("--dtype", choices=DTYPES, help=f"default: {DEFAULT_DTYPE}")
    add("--weight-bytes", type=int, metavar="N", help="of a linear layer's weight: 1 is fp8")
    add(
        "--graphs", choices=GRAPHS, default="auto", help="recorded passes (default: where they fit)"
    )
    add("--device", default="cuda", help="whose paths are counted (default: cuda)")
    add("--available", metavar="SIZE", help="such as 16GB; default: what is free on the device")
    add_cache(parser)
    add_family(parser)


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Arguments of `verify`."""
    parser.set_defaults(command=run_verify)
    parser.add_argument("folder", type=Path, help="folder of golden safetensors files")
    add_backend(parser, dtype="float32")


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bench`."""
    parser.set_defaults(command=run_bench)
    add = parser.add_argument
    in_turn = "12 a round with --baseline, --families or --control"
    add("--chunks", type=int, help=f"chunks to stream (default: 500; {in_turn})")
    add(
        "--graphs", choices=GRAPHS, default="auto", help="recorded passes (default: where possible)"
    )
    add("--compile", action="store_true", help="compile the blocks with torch.compile")
    add("--baseline", type=Path, metavar="FOLDER", help="a checkout of the published code to race")
    add("--families", action="store_true", help="stream as each family does, in turn")
    add("--control", action="store_true", help="stream without and with a control, in turn")
    add("--rounds", type=int, default=3, help="rollouts of what is run in turn")
    _add_workload(parser)


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Arguments of `profile`."""
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
    add_weights(parser)
    add("--json", type=Path, metavar="FILE", help="write the measurements here too")
    add_cache(parser)
    add_family(parser)
    add_backend(parser, dtype=None)
