"""A small LoRA for the demo student, in the names that Wan LoRAs are shared under."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK = 2
TARGETS = ("self_attn.q", "self_attn.v", "cross_attn.k", "ffn.0")


def write_lora(student: Path, path: Path, seed: int = 0) -> None:
    """Random factors for every block, strong enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, weight in load_file(student).items():
        name, _, kind = key.rpartition(".")
        if kind == "weight" and name.endswith(TARGETS):
            rows, columns = weight.shape
            base = f"diffusion_model.{name}"
            tensors[f"{base}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) / 8
            tensors[f"{base}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) / 8
    save_file(tensors, path)
