"""LoRA files, and the weights of a student that they change.

ComfyUI, kohya, PEFT and diffusers name the same adapter differently; `layouts` knows the names and
`lora_merge` the arithmetic. Merging happens in float32, so the result is rounded once, when it is
cast to the dtype the model runs in. The command line and the pack's node read files through here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..config import WAN_1_3B, WAN_14B
from .files import SUFFIXES, CheckpointError, read_weights, shorten
from .layouts import (
    is_lora,
    is_text_encoders,
    lora_model,
    lora_module,
    lora_part,
    lora_targets,
    other_adapter,
    other_model,
)
from .lora_merge import Adapter, change, merge, scale
from .lora_settings import implied

logger = logging.getLogger(__name__)

_WIDTHS = {WAN_1_3B.dim: "Wan 2.1 1.3B", WAN_14B.dim: "Wan 14B", 3072: "Wan 2.2 5B"}


@dataclass(frozen=True, kw_only=True)
class Lora:
    """One adapter to merge."""

    path: Path
    """A file, or a folder as PEFT saves it."""
    strength: float = 1.0
    """Multiplies the adapter; 0 leaves the weights alone, negative values push away from it."""


def parse_lora_argument(text: str) -> Lora:
    """`file` or `file:strength`; colons in the path, as in `C:\\x.safetensors`, are left alone."""
    path, _, number = text.rpartition(":")
    is_drive = len(path) == 1
    if is_drive or not (_is_number(number) or path.lower().endswith(SUFFIXES)):
        path, number = text, "1"
    if not path or not _is_number(number) or not math.isfinite(float(number)):
        raise ValueError(f"--lora {text!r} is not `file:strength`; write it as my.safetensors:0.8")
    return Lora(path=Path(path), strength=float(number))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Where the tensors of a LoRA file belong in a model."""

    adapters: dict[str, Adapter]
    """By the names of the model's tensors."""
    matched: list[str]
    """The file's tensors that are used."""
    unmatched: list[str]
    num_layers: int
    """How many layers the file adapts, those of other models included."""
    num_fitting: int
    """How many of them this model has."""

    def __str__(self) -> str:
        """`50 of 50 layers`, and what is left out."""
        summary = f"{self.num_fitting} of {self.num_layers} layers"
        if not self.unmatched:
            return summary
        texts = sum(map(is_text_encoders, self.unmatched))
        return (
            f"{summary}; {len(self.unmatched)} of its {len(self.matched) + len(self.unmatched)} "
            f"tensors match nothing in this model and are left out ({shorten(self.unmatched)})"
            + f", {texts} of them a text encoder's"
            * bool(texts)
        )


def apply_loras(tensors: Mapping[str, Tensor], loras: Sequence[Lora]) -> dict[str, Tensor]:
    """A student's tensors with adapters merged in order; what they change becomes float32.

    Keys that match nothing are logged as a warning; CheckpointError where none match.
    """
    merged = dict(tensors)
    for lora in loras:
        fit = fit_file(merged, read_lora(lora.path), lora.path)
        merged |= _merged(merged, fit, lora.strength)
        if fit.unmatched:
            logger.warning("%s: %s", lora.path, fit)
    return merged


def read_lora(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a LoRA file or PEFT folder, every alpha the file implies made explicit."""
    file = read_weights(path)
    tensors = file.tensors
    if any(key.startswith("generator_lora.") for key in tensors):  # beside a critic's
        tensors = _below(tensors, "generator_lora.")
    if not is_lora(tensors):
        kind = other_model(tensors) or "another kind of model"
        raise CheckpointError(f"{path}: is not a LoRA but {kind}; give an adapter's file")
    return tensors | implied(file, tensors)


def fit_file(tensors: Mapping[str, Tensor], adapter: Mapping[str, Tensor], path: Path) -> Fit:
    """`fit_lora`, with the file's path in front of its errors."""
    try:
        return fit_lora(tensors, adapter)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def merge_lora(
    tensors: Mapping[str, Tensor], lora_tensors: Mapping[str, Tensor], strength: float
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Tensors with one adapter merged, the adapter's keys that were used, and those that were not.

    Tensors the adapter changes come back in float32, the others as they are. CheckpointError as in
    `fit_lora`.
    """
    fit = fit_lora(tensors, lora_tensors)
    return dict(tensors) | _merged(tensors, fit, strength), fit.matched, fit.unmatched


def fit_lora(tensors: Mapping[str, Tensor], lora_tensors: Mapping[str, Tensor]) -> Fit:
    """Where an adapter's tensors belong among a model's, of which the shapes alone are read.

    CheckpointError where nothing matches, shapes disagree, a number is unusable, or the adapter is
    of a kind that is not added to weights.
    """
    _require_mergeable(lora_tensors)
    targets = lora_targets(tensors)
    found: dict[str, dict[str, Tensor]] = {}
    layers, fitting, matched, unmatched = set(), set(), [], []
    for key, tensor in lora_tensors.items():
        module, part = lora_part(key)
        name = lora_module(module)
        if part == "diff_m":
            name, part = name.removesuffix(".modulation") + ".modulation", "diff"
        target = targets.get(name)
        layers.add(name)
        bias = part in ("diff_b", "up_bias")
        if not part or target is None or (bias and _bias(target) not in tensors):
            unmatched.append(key)
            continue
        if part in found.setdefault(target, {}):
            raise CheckpointError(f"has two adapters for {target}; split it into two files")
        found[target][part] = tensor
        fitting.add(target)
        matched.append(key)
    if not matched:
        made_for = lora_model(lora_tensors) or "another one"
        raise CheckpointError(
            f"none of its {len(unmatched)} tensors match this model ({shorten(unmatched)}); "
            f"it was made for {made_for}"
        )
    adapters: dict[str, Adapter] = {}
    for target, parts in found.items():
        adapters |= _adapters(target, parts)
    for key, adapter in adapters.items():
        _require_fit(key, tensors[key], adapter)
    return Fit(
        adapters=adapters,
        matched=matched,
        unmatched=unmatched,
        num_layers=len(fitting) + len(layers - {n for n in layers if targets.get(n) in fitting}),
        num_fitting=len(fitting),
    )


def _merged(tensors: Mapping[str, Tensor], fit: Fit, strength: float) -> dict[str, Tensor]:
    return {key: merge(tensors[key], each, strength) for key, each in fit.adapters.items()}


def _require_mergeable(lora_tensors: Mapping[str, Tensor]) -> None:
    others = {key: found for key in lora_tensors if (found := other_adapter(key))[1]}
    if not others:
        return
    (first, (_, kind)), *_ = others.items()
    if kind == "OFT" and lora_tensors[first].ndim == 4:  # LyCORIS names both alike
        kind = "BOFT"
    layers = {module for module, _ in others.values()}
    count = len(layers | {lora_part(key)[0] for key in lora_tensors.keys() - others.keys()})
    raise CheckpointError(
        f"is not a plain LoRA but {kind} in {len(layers)} of its {count} layers "
        f"({shorten(list(others))}); LoRA, DoRA, LoHa, LoKr and full differences merge exactly, so "
        "have it saved as one of these"
    )


def _bias(target: str) -> str:
    return target.removesuffix("weight") + "bias"


def _adapters(target: str, parts: dict[str, Tensor]) -> dict[str, Adapter]:
    """Of a weight, and of the bias beside it."""
    alpha = _number(target, parts.pop("alpha")) if "alpha" in parts else None
    for part, tensor in parts.items():
        _require_sound(target, part, tensor)
    bias = parts.pop("diff_b", None)
    if "up_bias" in parts:
        if bias is not None:
            raise CheckpointError(f"has two adapters for {_bias(target)}; split it into two files")
        rank = parts["down"].shape[0] if "down" in parts and parts["down"].ndim else 1
        bias = scale(alpha, rank) * parts.pop("up_bias").float()
    made = {} if bias is None else {_bias(target): Adapter(parts={"diff": bias})}
    return made | ({target: Adapter(parts=parts, alpha=alpha)} if parts else {})


def _number(target: str, alpha: Tensor) -> float:
    if alpha.numel() != 1 or not alpha.float().isfinite().all():
        raise CheckpointError(
            f"holds an alpha for {target} that is no number ({_shown(alpha)}); get it again"
        )
    return float(alpha)


def _require_sound(target: str, part: str, tensor: Tensor) -> None:
    fault = None
    if not tensor.is_floating_point():
        fault = f"whole numbers ({tensor.dtype}), quantised in a way that is not supported"
    elif tensor.numel() == 0:
        fault = f"nothing (its shape is {list(tensor.shape)})"
    elif not all(each.isfinite() for each in _ordered(tensor).aminmax()):
        fault = "NaN or infinite numbers"
    if fault is not None:
        raise CheckpointError(f"holds {fault} as {part} of {target}; get it again")


def _ordered(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.itemsize == 1 else tensor  # fp8 has no arithmetic of its own


def _require_fit(key: str, weight: Tensor, adapter: Adapter) -> None:
    """On shapes alone: a tensor without memory stands for each."""
    shapes = {name: part.to("meta") for name, part in adapter.parts.items()}
    try:
        change(weight.to("meta"), Adapter(parts=shapes, alpha=adapter.alpha))
    except KeyError as missing:
        raise CheckpointError(
            f"has half an adapter for {key} ({', '.join(shapes)}, without {missing.args[0]}); get "
            "it again"
        ) from missing
    except (RuntimeError, IndexError, ValueError) as error:
        what = "a difference" if "diff" in shapes else "an adapter"
        printable = ", ".join(f"{name} {list(part.shape)}" for name, part in shapes.items())
        raise CheckpointError(
            f"holds {what} for {key} of another shape ({printable}) than the model's "
            f"{list(weight.shape)}; it was made for {_size_of(key, shapes)}"
        ) from error


def _size_of(key: str, shapes: Mapping[str, Tensor]) -> str:
    """The released model whose width an adapter has."""
    widths = [size for shape in shapes.values() for size in shape.shape]
    named = [name for width, name in _WIDTHS.items() if width in widths]
    return named[0] if named and "attn" in key else "another size of Wan"


def _shown(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)}" if tensor.numel() != 1 else str(tensor.item())


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: t for key, t in tensors.items() if key.startswith(prefix)}
