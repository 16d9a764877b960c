"""Arguments that several commands take, and what they say as fields of a config."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from typing import Any, Literal

import torch

from ..arguments import argument
from ..attention import BACKENDS
from ..families import AUTO, DEFAULT, FAMILIES
from ..weights.lora import parse_lora_argument

GRAPHS: dict[str, bool | Literal["auto"]] = {"auto": "auto", "on": True, "off": False}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPE = (
    "bfloat16 on a card, and for large networks on a CPU that multiplies it, else float32"
)


def dtype_of(args: argparse.Namespace) -> torch.dtype | Literal["auto"]:
    """What is computed in; `auto` where nothing was asked for."""
    return DTYPES[args.dtype] if args.dtype else "auto"


def cache_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `CacheConfig` that were given."""
    fields = {
        "window_frames": args.window,
        "sink_frames": args.sink,
        "anchor_frames": args.anchor,
        "decay": args.decay,
        "accumulator": args.accumulator,
        "storage": args.cache,
    }
    return {name: value for name, value in fields.items() if value is not None}


def family_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Cache and sampler of a family that was given, of ours by default, with what was given."""
    family = FAMILIES[DEFAULT if args.family == AUTO else args.family]
    cache = replace(family.cache, **cache_fields(args))
    return {"cache": cache, "sampler": family.sampler}


def sampler_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `SamplerConfig` that were given."""
    fields = {"steps": args.steps, "shift": args.shift}
    return {name: value for name, value in fields.items() if value is not None}


def add_weights(parser: argparse._ActionsContainer) -> None:
    """`--weights`."""
    text = "fp8 halves the blocks' weights: an approximation"
    parser.add_argument("--weights", choices=("exact", "fp8"), default="exact", help=text)


def add_lora(parser: argparse._ActionsContainer) -> None:
    """`--lora`, any number of times."""
    parser.add_argument(
        "--lora",
        type=argument(parse_lora_argument),
        action="append",
        default=[],
        metavar="FILE:STRENGTH",
        help="an adapter to merge; may be given more than once",
    )


def add_choice(parser: argparse._ActionsContainer) -> None:
    """Which network of a file."""
    add = parser.add_argument
    add("--submodel", metavar="NAME", help="network of a bundle (default: generator_ema)")
    add("--num-heads", type=int, metavar="N", help="attention heads, where none are recorded")


def add_family(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Whose student it is."""
    names = (AUTO, *FAMILIES)
    text = f"whose student it is, and so how it streams: {', '.join(names)} (default: auto)"
    parser.add_argument("--family", choices=names, default=AUTO, metavar="NAME", help=text)


def add_settings(parser: argparse._ActionsContainer) -> None:
    """The cache and the steps."""
    add_cache(parser)
    add = parser.add_argument
    add("--steps", type=_steps, metavar="T,T,..", help="denoising steps, as 1000,750,500,250")
    add("--shift", type=float, metavar="X", help="flow shift that warps the steps")


def add_cache(parser: argparse._ActionsContainer) -> None:
    """The window, the sink and how they are held."""
    add = parser.add_argument
    add("--window", type=int, metavar="FRAMES", help="latent frames attention sees")
    add("--sink", type=int, metavar="FRAMES", help="latent frames of the sink; 0 for none")
    add("--anchor", type=int, metavar="FRAMES", help="first latent frames kept before the sink")
    add("--decay", type=float, metavar="ALPHA", help="what the sink keeps of itself; 1 is static")
    add("--cache", choices=("exact", "int8"), help="int8 halves its memory: an approximation")
    add("--accumulator", choices=("reference", "float32"), help="how the sink's average rounds")


def add_backend(parser: argparse._ActionsContainer, dtype: str | None) -> None:
    """Device, precision and attention; `dtype` is the default, None for `auto`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--device", default=device, help=f"default: {device}")
    default = dtype or DEFAULT_DTYPE
    add("--dtype", choices=DTYPES, default=dtype, help=f"computing precision (default: {default})")
    names = ("auto", *BACKENDS)
    add("--attention", choices=names, default="auto", help="default: auto, the fastest exact one")


@argument
def _steps(text: str) -> tuple[int, ...]:
    steps = text.split(",")
    if not all(map(is_whole, steps)):
        raise ValueError(
            f"steps are {text!r}; give whole numbers with commas between, as 1000,750,500,250"
        )
    return tuple(map(int, steps))


def is_whole(text: str) -> bool:
    """Whether a text is a whole number."""
    return re.fullmatch(r"\s*[-+]?\d{1,99}\s*", text) is not None
