"""What arrives at a node's inputs, checked against its schema when it runs.

ComfyUI does so before a run, but only for what is set on the node: of a linked input it sees the
type, and often not even that, as many nodes say that they give anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from comfy_api.latest import io

from ..rf_core.config import CacheConfig
from .names import printable
from .types import RFSink, RFState, RFTimeline, State, Timeline

_MANY = 8  # options that a sentence lists


def _is_conditioning(value: Any) -> bool:
    pairs = isinstance(value, list | tuple) and bool(value)
    return pairs and all(
        isinstance(each, list | tuple)
        and len(each) == 2
        and torch.is_tensor(each[0])
        and isinstance(each[1], dict)
        for each in value
    )


_SOCKETS: dict[str, Callable[[Any], bool]] = {
    io.Model.io_type: lambda value: hasattr(value, "model_options"),
    io.Clip.io_type: lambda value: hasattr(value, "tokenize"),
    io.Vae.io_type: lambda value: hasattr(value, "first_stage_model"),
    io.Conditioning.io_type: _is_conditioning,
    io.Latent.io_type: lambda value: (
        isinstance(value, dict) and torch.is_tensor(value.get("samples"))
    ),
    io.Image.io_type: lambda value: torch.is_tensor(value) and value.ndim == 4,
    io.Video.io_type: lambda value: hasattr(value, "get_components"),
    RFTimeline.io_type: lambda value: isinstance(value, Timeline),
    RFSink.io_type: lambda value: isinstance(value, CacheConfig),
    RFState.io_type: lambda value: isinstance(value, State),
}
"""What can be told of what arrives at a socket, so that others' objects that act alike pass."""


def checked(node: type[io.ComfyNode], given: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a node, numbers as its schema has them; ValueError names one that is amiss."""
    asked = {each.id: each for each in node.define_schema().inputs}
    return {name: _checked(asked[name], value) for name, value in given.items()}


def set_on_node(**given: Any) -> dict[str, Any]:
    """Of what ComfyUI has a node validate, what is known; a linked input is None."""
    return {name: value for name, value in given.items() if value is not None}


def _checked(asked: Any, value: Any) -> Any:
    if isinstance(asked, io.Combo.Input):
        return _option(asked, value)
    if isinstance(asked, io.Int.Input | io.Float.Input):
        return _number(asked, value)
    if isinstance(asked, io.Boolean.Input):
        return bool(_require(asked, value, isinstance(value, Real), "true or false"))
    if isinstance(asked, io.String.Input):
        return _require(asked, value, isinstance(value, str), "text")
    if value is None and asked.optional:
        return None
    kinds = asked.get_io_type().split(",")
    fits = any(_SOCKETS[kind](value) for kind in kinds)
    return _require(asked, value, fits, f"a {' or '.join(kinds)}")


def _option(asked: io.Combo.Input, value: Any) -> Any:
    # Not `in`: an array would be compared number by number.
    known = isinstance(value, str) and value in asked.options
    few = 0 < len(asked.options) <= _MANY
    listed = ", ".join(map(repr, asked.options)) if few else "its list; press R to read it again"
    return _require(asked, value, known, f"one of {listed}")


def _number(asked: io.Int.Input | io.Float.Input, value: Any) -> int | float:
    whole = isinstance(asked, io.Int.Input)
    fits = isinstance(value, Real) and asked.min <= value <= asked.max  # nan is in no range
    if whole and fits:
        fits = int(value) == value
    kind = "a whole number" if whole else "a number"
    _require(asked, value, fits, f"{kind} from {asked.min} to {asked.max}")
    return int(value) if whole else float(value)


def _require(asked: Any, value: Any, fits: bool, wanted: str) -> Any:
    if not fits:
        given = "is empty" if value is None else f"is {printable(value)}"
        raise ValueError(f"{asked.id} {given}; give {wanted}")
    return value
