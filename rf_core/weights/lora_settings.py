"""How a LoRA file was made, where its tensors do not say it: alphas beside them or in metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import CheckpointError, WeightFile, parse_json, read_json
from .layouts import lora_module, lora_part

_ADAPTER_SETTINGS = "lora_adapter_metadata"
_MOVED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of PEFT's that change the base model, so that a file does not fit the original's.
"""
_RANKS = ("down", "hada_w1_b", "lokr_w1", "lokr_w1_b", "lokr_w2_b")
"""Parts of which one stands for each adapter; all but a whole factor tell its rank."""


def implied(file: WeightFile, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file's settings say and its tensors do not: alphas, the scale of whole LoKr factors.

    `tensors` are those of the adapter in the file. CheckpointError where settings are unusable.
    """
    settings = _settings(file)
    _require_original(file, settings)
    explicit = {lora_part(key)[0] for key in tensors if lora_part(key)[1] == "alpha"}
    found = {}
    for key, tensor in tensors.items():
        module, part = lora_part(key)
        if part not in _RANKS or module in explicit:
            continue
        alpha = _setting(file.path, settings, "alpha", module)
        if alpha is None:
            continue
        if part == "lokr_w1":
            rank = _setting(file.path, settings, "r", module)
            if rank and not any(f"{module}.lokr_w2_{f}" in tensors for f in "ab"):
                found[key] = tensor.float() * (alpha / rank)
            continue
        rank = tensor.shape[0] if tensor.ndim else 0
        # Rank-stabilised LoRA divides by the rank's root (arXiv 2312.03732).
        scaled = alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha
        found[f"{module}.alpha"] = torch.tensor(scaled)
    return found


def _settings(file: WeightFile) -> dict[str, Any]:
    """How an adapter was made, as PEFT names it; PEFT keeps it beside the weights.

    diffusers and others put it into the metadata as JSON, kohya as `ss_network_alpha`.
    """
    if _ADAPTER_SETTINGS in file.metadata:
        return _of_network(parse_json(file.path, file.metadata[_ADAPTER_SETTINGS]))
    folder = file.path if file.path.is_dir() else file.path.parent
    named = file.path.is_dir() or file.path.stem == "adapter_model"
    if named and (beside := read_json(folder / "adapter_config.json")):
        return beside
    for text in file.metadata.values():
        if "lora_alpha" in (settings := _of_network(_json(text))):
            return settings
    return _plain_settings(file.metadata)


def _plain_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Kohya's trainers write an alpha beside each pair, and a hash of all of them.

    Their converter to other names multiplies the alpha into the pair but leaves both entries as
    they were: with a hash, a file without alphas has been scaled.
    """
    settings: dict[str, Any] = {}
    names = ["lora_alpha", "network_alpha", "networkAlpha", "alpha"]
    if "sshs_model_hash" not in metadata:
        names.append("ss_network_alpha")
    for name in names:
        if name in metadata and metadata[name] not in ("", "None", "0", "0.0"):  # kohya's for rank
            settings["lora_alpha"] = metadata[name]
    settings["use_rslora"] = metadata.get("use_rslora", "").lower() in ("true", "1")
    return settings


def _of_network(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("transformer."): value for key, value in settings.items()}


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _require_original(file: WeightFile, settings: Mapping[str, Any]) -> None:
    start = str(settings.get("init_lora_weights", "")).lower()
    if start.startswith(_MOVED_BASES):
        raise CheckpointError(
            f"{file.path}: was trained from {start}, which changes the base model, so it does not "
            "fit the original; have it converted to a plain LoRA where it was made"
        )


def _setting(path: Path, settings: Mapping[str, Any], name: str, module: str) -> float | None:
    """A module's alpha or rank `r`: by its name in the file's list, or else the file's."""
    patterns = settings.get("rank_pattern" if name == "r" else "alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: lists alphas as {patterns!r}, which names no layers")
    default = settings.get("lora_alpha", settings.get("alpha")) if name == "alpha" else None
    value = settings.get("r") if name == "r" else default
    for pattern, own in patterns.items():
        if _is_named(path, module, pattern):
            value = own
            break
    try:
        number = None if value is None else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if number is not None and not math.isfinite(number):
        raise CheckpointError(f"{path}: has an alpha or rank {value!r}, which is no number")
    return number


def _is_named(path: Path, module: str, pattern: str) -> bool:
    """Whether PEFT's pattern, an expression that ends a module's name, names a module.

    Files hold names of layers there; an expression of any other kind is refused, as it might run
    for ever.
    """
    name = pattern.replace("\\.", ".").removeprefix("^").removesuffix("$")
    if not name.replace(".", "").replace("_", "").replace("-", "").isalnum():
        raise CheckpointError(
            f"{path}: gives alphas by the expression {pattern!r}, which is not read; write the "
            "layers' names in its place"
        )
    if pattern.startswith("^"):
        return name in (module, lora_module(module))
    return module == name or module.endswith(f".{name}")
