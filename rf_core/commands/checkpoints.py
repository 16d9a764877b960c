"""`inspect` and `convert`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..config import WAN_1_3B, WAN_14B
from ..families import AUTO
from ..model import WanModel
from ..options import Files
from ..ranges import MANY, check_numbers, check_writable
from ..weights.checkpoint import Checkpoint, convert, describe, read_checkpoint
from ..weights.checks import size_name
from ..weights.files import CheckpointError
from ..weights.lora_facts import describe_lora, is_adapter
from ..weights.vace import describe_vace, is_vace, read_vace
from .run_options import leave_out
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
    """Print what a checkpoint, an adapter or a VACE is."""
    check_numbers(args, num_heads=(1, MANY))
    try:
        print(describe(_read(args, args.model)))
        return 0
    except CheckpointError:
        kind = "an adapter" if is_adapter(args.model) else "a VACE"
        if kind == "a VACE" and not is_vace(args.model):
            raise
    given = {"submodel": None, "num_heads": None, "family": AUTO}
    leave_out(args, f"for checkpoints, and this is {kind}", **given)
    if kind == "a VACE":
        print(describe_vace(read_vace(args.model)))
    else:
        print(describe_lora(args.model, _bases()))
    return 0


def _bases() -> dict[str, dict[str, Tensor]]:
    """Tensors, without memory, of the models that an adapter may belong to."""
    configs = {size_name(config): config for config in (WAN_1_3B, WAN_14B)}
    configs["the bundled demo"] = read_checkpoint(Files().model).config
    return {name: WanModel(c, device="meta").state_dict() for name, c in configs.items()}


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
    what = "a checkpoint, an adapter or a VACE: file, folder or index"
    parser.add_argument("model", type=Path, help=what)
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
