"""The bundled demo as ComfyUI's own MODEL, CLIP and VAE.

Its VAE has Wan's architecture with one block a level and statistics of its own; ComfyUI builds Wan
VAEs with two. So each level gets a block that does nothing: its last convolution is zero. The
statistics travel in the MODEL's latent format, as Wan's do. Its text encoder is a small UMT5 over
bytes, run by ComfyUI's T5.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..rf_core import text
from ..rf_core.decoders import vae_files
from ..rf_core.weights.files import read_weights
from . import host

DEMO = Path(__file__).parents[1] / "rf_core" / "demo"
STUDENT, TEXT_ENCODER, VAE = (
    DEMO / f"{name}.safetensors" for name in ("student", "text_encoder", "vae")
)
CONTROL = DEMO / "control.safetensors"
"""The control network for the student."""


def load_model() -> Any:
    """The demo student as a MODEL."""
    return host.load_student(STUDENT, latent_format=_latents())


def load_vae() -> Any:
    """The demo's VAE as a VAE."""
    weights = with_idle_blocks(vae_files.vae_state_dict(read_weights(VAE).tensors))
    return host.build_vae(weights, _latents())


def load_clip() -> Any:
    """The demo's text encoder as a CLIP."""
    about = json.loads(read_weights(TEXT_ENCODER).metadata[text.METADATA_KEY])
    return host.build_clip(read_weights(TEXT_ENCODER).tensors, about["umt5"], about["text_len"])


def with_idle_blocks(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a Wan VAE with one residual block a level as those of one with two."""
    result = {}
    for part, kept in (("encoder.downsamples", 1), ("decoder.upsamples", 2)):
        for key, tensor in weights.items():
            match = re.fullmatch(rf"{re.escape(part)}\.(\d+)\.(.*)", key)
            if not match:
                continue
            level, place = divmod(int(match[1]), kept + 1)  # blocks, then the resampling
            width = kept + 2
            moved = level * width + place + (place == kept)
            result[f"{part}.{moved}.{match[2]}"] = tensor
        last = [key for key in result if key.startswith(part)]
        for level in range(len({int(key.split(".")[2]) // (kept + 2) for key in last})):
            index = level * (kept + 2) + kept
            before = f"{part}.{index - 1}.residual"
            for name in ("0.gamma", "2.weight", "2.bias", "3.gamma", "6.weight", "6.bias"):
                result[f"{part}.{index}.residual.{name}"] = _idle(result, before, name)
    return {**{k: t for k, t in weights.items() if "samples." not in k}, **result}


def _idle(weights: dict[str, Tensor], before: str, name: str) -> Tensor:
    # The block before ends at the level's width; its second half has the shapes of the first.
    twin = {"0.gamma": "3.gamma", "2.weight": "6.weight", "2.bias": "6.bias"}.get(name, name)
    return torch.zeros_like(weights[f"{before}.{twin}"])


def _latents() -> Any:
    metadata = read_weights(VAE).metadata
    scales = vae_files.normalisation_of(metadata)
    rgb = torch.tensor(json.loads(metadata["latent_rgb"]))
    return host.latent_format(
        scales["latent_mean"], scales["latent_std"], rgb[:, :-1].T.tolist(), rgb[:, -1].tolist()
    )
