"""Whether tensors are a complete text-to-video Wan; CheckpointError, one sentence, where not."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..config import WAN_1_3B, WAN_14B, ModelConfig
from ..model import WanModel
from . import layouts
from .files import CheckpointError, shorten


def require_text_to_video(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse other kinds of Wan, quantised weights and what is no number."""
    kind = layouts.wan_variant(tensors)
    patch, head = tensors.get("patch_embedding.weight"), tensors.get("head.head.bias")
    if kind is None and patch is not None and head is not None and patch.ndim == 5:
        read, written = patch.shape[1], head.numel() // patch.shape[2:].numel()
        if read > written:
            kind = f"an image-to-video Wan (it reads {read} channels and writes {written})"
    if kind is not None:
        raise CheckpointError(f"{path}: is {kind}; only text-to-video Wan models can stream here")
    expected = _expected_keys(tensors)
    weights = [key for key in tensors if key in expected]
    if (quantised := layouts.quantised(tensors, weights)) is not None:
        raise CheckpointError(
            f"{path}: has quantised weights ({quantised}), which are not supported; use the bf16 "
            "or fp16 file, or plain fp8"
        )
    for key in weights:
        if tensors[key].dtype not in layouts.FLOATS:
            raise CheckpointError(
                f"{path}: {key} is made of {dtype_name(tensors[key].dtype)}, which no weight is; "
                "use the bf16 or fp16 file"
            )


def without_counters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the whole numbers beside weights, which trainers count steps in."""
    expected = _expected_keys(tensors)
    return {k: t for k, t in tensors.items() if k in expected or t.is_floating_point()}


def _expected_keys(tensors: Iterable[str]) -> set[str]:
    # Names depend on the number of layers alone; any width will do, and a file may name millions.
    tiny = ModelConfig(dim=2, ffn_dim=2, freq_dim=2, text_dim=2, num_heads=1, num_layers=1)
    layers = range(count_layers(tensors))
    return {re.sub(r"^blocks\.0", f"blocks.{n}", key) for key in _shapes(tiny) for n in layers}


def require_keys(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a network with a tensor missing or one too many."""
    require_names(path, tensors, _expected_keys(tensors), "plain text-to-video Wan")


def require_names(path: Path, found: Collection[str], expected: Collection[str], kind: str) -> None:
    """Refuse tensors that are not those of a kind of network, by their names."""
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    if missing or unexpected:
        told = [
            f"{len(keys)} {label} ({shorten(keys)})"
            for label, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise CheckpointError(
            f"{path}: is incomplete or no {kind}; of its tensors {' and '.join(told)}: use another "
            "file"
        )


def require_shapes(path: Path, tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Refuse tensors of other shapes than a network of these sizes has."""
    wrong = [
        f"{key} is {list(tensors[key].shape)} instead of {list(shape)}"
        for key, shape in _shapes(config).items()
        if tensors[key].shape != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} of its shapes do not fit {size_name(config)} "
            f"({shorten(wrong)}); the file is damaged or not a plain Wan model"
        )


def require_size(path: Path, config: ModelConfig, expected: ModelConfig) -> None:
    """Refuse a network of other sizes than are needed."""
    found = asdict(config)
    differences = [
        f"{name} {found[name]} instead of {wanted}"
        for name, wanted in asdict(expected).items()
        if found[name] != wanted
    ]
    if differences:
        raise CheckpointError(
            f"{path}: is {size_name(config)} where {size_name(expected)} is needed "
            f"({', '.join(differences)}); give a checkpoint of that size"
        )


def require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """CheckpointError, with the few first names, where a weight is NaN or infinite."""
    bad = [key for key, tensor in tensors.items() if not _is_finite(tensor)]
    if bad:
        dtype = dtype_name(tensors[bad[0]].dtype)
        raise CheckpointError(
            f"{path}: holds NaN or infinite weights in {dtype} in {len(bad)} of its tensors "
            f"({shorten(bad)}); the file is damaged, its training diverged, or it needs bfloat16"
        )


def _is_finite(tensor: Tensor) -> bool:
    # Extremes carry NaN along and take a single pass, 30 times faster than isfinite on every
    # element (bf16, one core); fp8 has no arithmetic of its own.
    low, high = (tensor.float() if tensor.itemsize == 1 else tensor).aminmax()
    return bool(low.isfinite() & high.isfinite())


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    state = WanModel(config, device="meta").state_dict()
    return {key: tensor.shape for key, tensor in state.items()}


def count_layers(keys: Iterable[str]) -> int:
    """Number of blocks, by the names of tensors."""
    return len({key.split(".")[1] for key in keys if key.startswith("blocks.")})


def size_name(config: ModelConfig) -> str:
    """A size's name: `Wan 2.1 T2V 1.3B`, or its width and depth where it has none."""
    for name, preset in (("1.3B", WAN_1_3B), ("14B", WAN_14B)):
        if config == preset:
            return f"Wan 2.1 T2V {name}"
    return f"Wan of width {config.dim} and {config.num_layers} layers"


def dtype_name(dtype: torch.dtype) -> str:
    """Without `torch.`."""
    return str(dtype).removeprefix("torch.")
