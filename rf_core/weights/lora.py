"""LoRA files merged into a student's weights, for the command line.

ComfyUI, kohya, PEFT and diffusers name the same adapter differently; `layouts` knows the names.
Merging W + strength * alpha / rank * (up @ down) happens in float32, so the result is rounded
once, when it is cast to the dtype the model runs in. Inside ComfyUI its own loaders do this.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import (
    SUFFIXES,
    CheckpointError,
    WeightFile,
    parse_json,
    read_json,
    read_weights,
    shorten,
)
from .layouts import is_lora, lora_module, lora_targets, other_model

logger = logging.getLogger(__name__)

_PARTS = (
    ("down", re.compile(r"\.lora[_.](?:A|down)(?:\.\w+)?\.weight$")),
    ("up", re.compile(r"\.lora[_.](?:B|up)(?:\.\w+)?\.weight$")),
    ("alpha", re.compile(r"\.alpha$")),
    ("diff", re.compile(r"\.diff$")),
    ("diff_b", re.compile(r"\.diff_b$")),
)
# Adapters whose weight is not W + up @ down: merging only the parts known here would be wrong.
_UNSUPPORTED = re.compile(
    r"\.(dora_scale|lora_magnitude_vector|lora_mid|hada_\w+|lokr_\w+|set_weight|reshape_weight"
    r"|w_norm|b_norm)\b|\.lora[_.]\w+(\.\w+)?\.bias$"
)


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


def apply_loras(tensors: Mapping[str, Tensor], loras: Sequence[Lora]) -> dict[str, Tensor]:
    """A student's tensors with adapters merged in order; what they change becomes float32.

    Keys that match nothing are logged as a warning; CheckpointError where none match.
    """
    merged = dict(tensors)
    for lora in loras:
        adapter = read_lora(lora.path)
        try:
            merged, matched, unmatched = merge_lora(merged, adapter, lora.strength)
        except CheckpointError as error:
            raise CheckpointError(f"{lora.path}: {error}") from error
        if unmatched:
            logger.warning(
                "%s: %d of its %d tensors match nothing in this model and are left out (%s)",
                lora.path,
                len(unmatched),
                len(matched) + len(unmatched),
                shorten(unmatched),
            )
    return merged


def read_lora(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a LoRA file or PEFT folder, every alpha the file implies made explicit."""
    file = read_weights(path)
    if not is_lora(file.tensors):
        kind = other_model(file.tensors) or "another kind of model"
        raise CheckpointError(f"{path}: is not a LoRA but {kind}; give an adapter's file")
    tensors = file.tensors
    if any(key.startswith("generator_lora.") for key in tensors):  # beside a critic's
        tensors = _below(tensors, "generator_lora.")
    return _implied_alphas(tensors, _peft_config(file)) | tensors


def merge_lora(
    tensors: Mapping[str, Tensor], lora_tensors: Mapping[str, Tensor], strength: float
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Tensors with one adapter merged, the adapter's keys that were used, and those that were not.

    Tensors the adapter changes come back in float32, the others as they are. CheckpointError where
    nothing matches, shapes disagree, or the adapter is of a kind other than up @ down.
    """
    if refused := [key for key in lora_tensors if _UNSUPPORTED.search(key)]:
        raise CheckpointError(
            f"is not a plain LoRA ({shorten(refused)}); only up @ down and full differences merge"
        )
    adapters, matched, unmatched = _match(tensors, lora_tensors)
    if not matched:
        raise CheckpointError(
            f"none of its {len(unmatched)} tensors match this model ({shorten(unmatched)}); "
            "it was made for another one"
        )
    merged = dict(tensors)
    for key, parts in adapters.items():
        merged[key] = _merge(key, tensors[key], parts, strength)
    return merged, matched, unmatched


def _match(
    tensors: Mapping[str, Tensor], lora_tensors: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], list[str], list[str]]:
    targets = lora_targets(tensors)
    adapters: dict[str, dict[str, Tensor]] = {}
    matched, unmatched = [], []
    for lora_key, tensor in lora_tensors.items():
        module, part = _split(lora_key)
        target = targets.get(lora_module(module))
        if target is not None and part == "diff_b":
            part, target = "diff", target.removesuffix("weight") + "bias"
        if not part or target is None or target not in tensors:
            unmatched.append(lora_key)
            continue
        if part in adapters.setdefault(target, {}):
            raise CheckpointError(f"has two adapters for {target}; split it into two files")
        adapters[target][part] = tensor
        matched.append(lora_key)
    return adapters, matched, unmatched


def _split(lora_key: str) -> tuple[str, str]:
    for part, pattern in _PARTS:
        if match := pattern.search(lora_key):
            return lora_key[: match.start()], part
    return lora_key, ""


def _merge(key: str, weight: Tensor, parts: Mapping[str, Tensor], strength: float) -> Tensor:
    merged = weight.float()
    if "diff" in parts:
        _require_fit(key, weight, "a difference", parts["diff"].shape == weight.shape, parts)
        merged = merged + strength * parts["diff"].float()
    if "down" in parts or "up" in parts:
        merged = merged + strength * _product(key, weight, parts)
    return merged


def _product(key: str, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    if "down" not in parts or "up" not in parts:
        raise CheckpointError(f"has half an adapter for {key} ({', '.join(parts)}); get it again")
    down, up = parts["down"].float().flatten(1), parts["up"].float().flatten(1)
    fits = down.shape == (up.shape[1], weight[0].numel()) and up.shape[0] == weight.shape[0]
    _require_fit(key, weight, "an adapter", fits, parts)
    rank = down.shape[0]
    alpha = float(parts["alpha"]) if "alpha" in parts else rank
    return (alpha / rank) * (up @ down).view(weight.shape)


def _require_fit(
    key: str, weight: Tensor, what: str, fits: bool, parts: Mapping[str, Tensor]
) -> None:
    if not fits:
        shapes = ", ".join(f"{part} {list(t.shape)}" for part, t in parts.items() if t.ndim)
        raise CheckpointError(
            f"holds {what} for {key} of another shape ({shapes}) than the model's "
            f"{list(weight.shape)}; it was made for another size of Wan"
        )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: t for key, t in tensors.items() if key.startswith(prefix)}


def _peft_config(file: WeightFile) -> dict[str, Any]:
    """PEFT keeps alpha beside the weights; diffusers puts the same settings into the metadata."""
    if "lora_adapter_metadata" in file.metadata:
        settings = parse_json(file.path, file.metadata["lora_adapter_metadata"])
        return {key.removeprefix("transformer."): value for key, value in settings.items()}
    if file.path.is_dir():
        return read_json(file.path / "adapter_config.json")
    if file.path.stem == "adapter_model":
        return read_json(file.path.with_name("adapter_config.json"))
    return {}


def _implied_alphas(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    alphas = {}
    for key, tensor in tensors.items():
        module, part = _split(key)
        alpha = _alpha_of(module, config)
        if part == "down" and alpha is not None:
            rank = tensor.shape[0]  # rank-stabilised LoRA divides by its root (arXiv 2312.03732)
            scaled = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
            alphas[f"{module}.alpha"] = torch.tensor(float(scaled))
    return alphas


def _alpha_of(module: str, config: Mapping[str, Any]) -> float | None:
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(alpha)
    return config.get("lora_alpha")
