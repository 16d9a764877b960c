"""Files made of the demo student for tests."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rf_core.config import ModelConfig
from rf_core.model import WanModel
from rf_core.video import VideoFormat, VideoWriter, to_uint8
from rf_core.weights.checkpoint import write_checkpoint
from training.world.scenes import Scene, parse_caption, place, render

DEMO = Path(__file__).parents[2] / "rf_core" / "demo"
LORA = "style.safetensors"
VIDEO = "clip.mp4"
RANK = 2
TARGETS = ("self_attn.q", "self_attn.v", "cross_attn.k", "ffn.0")


def write_models(models: Path) -> None:
    """What the tests' server has in its folder of models."""
    for folder in ("diffusion_models", "loras"):
        (models / folder).mkdir(parents=True)
    student, networks = DEMO / "student.safetensors", models / "diffusion_models"
    shutil.copy2(student, networks / "demo.safetensors")
    shutil.copy2(DEMO / "teacher.safetensors", networks / "teacher.safetensors")
    write_changed(student, networks / "other.safetensors", "blocks.0.modulation", 1.0)
    write_changed(student, networks / "broken.safetensors", "head.head.bias", math.nan)
    write_plain_wan(networks / "wan.safetensors")
    write_lora(student, models / "loras" / LORA)


def write_video(folder: Path) -> None:
    """A clip that Load Video lists: six seconds of what the demo's prompts speak of."""
    folder.mkdir(parents=True, exist_ok=True)
    (seen,) = parse_caption("a green circle moves up quickly")
    (images,) = render([Scene((place(seen, np.random.default_rng(0)),))], 96)
    height, width = images.shape[2:]
    with VideoWriter(folder / VIDEO, VideoFormat(width=width, height=height, fps=16), {}) as writer:
        writer.write(to_uint8(images))


def write_lora(student: Path, path: Path, seed: int = 0) -> None:
    """A LoRA in the names that Wan LoRAs are shared under.

    Random factors for every block, strong enough to be seen.
    """
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


def write_changed(student: Path, path: Path, name: str, addend: float) -> None:
    """The student with something added to one of its tensors."""
    with safe_open(student, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(student)
    tensors[name] = tensors[name] + addend
    save_file(tensors, path, metadata)


def write_plain_wan(path: Path) -> None:
    """A bidirectional Wan of one narrow layer, as ComfyUI's own loader takes it."""
    sizes = ModelConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=1)
    write_checkpoint(path, WanModel(sizes).state_dict(), sizes, None, None)


GIVEN = """
import json


class Given:
    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "give", ("*",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"json": ("STRING", {})}}

    def give(self, **given):
        return (json.loads(given["json"]),)


NODE_CLASS_MAPPINGS = {"TestGiven": Given}
"""


def write_nodes(custom_nodes: Path) -> None:
    """A node of the tests' own that gives any value to any input."""
    custom_nodes.mkdir(parents=True)
    (custom_nodes / "given.py").write_text(GIVEN, encoding="utf-8")
