"""`inspect` and `convert`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from ..ranges import MANY, check_numbers, check_writable
from ..weights.checkpoint import Checkpoint, convert, describe, read_checkpoint
from .shared import (
    DTYPES,
    add_choice,
    add_family,
    add_lora,
    add_settings,
    cache_fields,
    sampler_fields,
)


def run_inspect(args: argparse.Namespace) -> int:
    """Print what a checkpoint is."""
    check_numbers(args, num_heads=(1, MANY))
    print(describe(_read(args, args.model)))
    return 0


def run_convert(args: argparse.Namespace) -> int:
    """Write a checkpoint anew."""
    check_numbers(args, num_heads=(1, MANY))
    check_writable(args.target)
    source = _read(args, args.source)
    checkpoint = convert(
        args.source,
        args.target,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        submodel=args.submodel,
        num_heads=args.num_heads,
        family=args.family,
        cache=replace(source.cache or source.preset.cache, **cache_fields(args)),
        sampler=replace(source.sampler or source.preset.sampler, **sampler_fields(args)),
        loras=tuple(args.lora),
    )
    print(describe(checkpoint))
    return 0


def _read(args: argparse.Namespace, path: Path) -> Checkpoint:
    return read_checkpoint(
        path, submodel=args.submodel, num_heads=args.num_heads, family=args.family
    )


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Arguments of `inspect`."""
    parser.set_defaults(command=run_inspect)
    parser.add_argument("model", type=Path, help="a checkpoint: file, folder or index")
    add_choice(parser)
    add_family(parser)


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Arguments of `convert`."""
    parser.set_defaults(command=run_convert)
    parser.add_argument("source", type=Path, help="a checkpoint: file, folder or index")
    parser.add_argument("target", type=Path, help="the .safetensors to write")
    parser.add_argument("--dtype", choices=DTYPES, help="by default the source's own")
    add_lora(parser)
    add_choice(parser)
    add_family(parser)
    add_settings(parser)
