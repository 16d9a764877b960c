"""Distillation of adapters: student or critic as LoRA, by peft's layers and names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rf_core.model import WanModel
from rf_core.ranges import LARGEST_WIDTH, MANY, check_numbers
from rf_core.weights.lora import merge_lora

from .draws import seeded_generator

BASE = ".base_layer"  # peft's name for what a layer was before it got its adapter
ADAPTER = ".default"  # and of an adapter that was given no name


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """An adapter's size and place."""

    rank: int = 64
    """Width of the two factors."""
    alpha: float = 64.0
    """The adapter is scaled by alpha / rank."""
    targets: str = r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])"
    """Regular expression of the layers that get one."""

    def __post_init__(self) -> None:
        check_numbers(self, rank=(1, LARGEST_WIDTH), alpha=(1e-6, MANY))


def add_adapters(network: WanModel, config: LoRAConfig) -> None:
    """Put adapters beside the targets, in place; they alone are trained."""
    from peft import LoraConfig, inject_adapter_in_model

    peft_config = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=config.targets)
    try:
        inject_adapter_in_model(peft_config, network)
    except ValueError as error:
        raise ValueError(f"lora.targets {config.targets!r} match no layer: {error}") from None


def renamed_base(network: WanModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A plain network's tensors under the names that peft gives them once adapters are added."""
    held = network.state_dict().keys()
    names = {name.replace(BASE, ""): name for name in held if ".lora_" not in name}
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def adapter_weights(network: WanModel, seed: int) -> dict[str, Tensor]:
    """Initial adapters: A drawn as peft does, B zero; a function of seed and name."""
    weights = {}
    for name, parameter in network.named_parameters():
        if ".lora_A." in name:
            bound = math.sqrt(1 / parameter.shape[1])  # Kaiming with a = sqrt(5)
            uniform = torch.rand(parameter.shape, generator=seeded_generator(seed, "lora", name))
            weights[name] = bound * (2 * uniform - 1)
        elif ".lora_B." in name:
            weights[name] = torch.zeros(parameter.shape)
    return weights


def exported(tensors: Mapping[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """Adapters as ComfyUI's loader, and ours, map them: `diffusion_model.<layer>.lora_A.weight`."""
    result = {}
    for name, tensor in tensors.items():
        if ".lora_" in name:
            result["diffusion_model." + name.replace(ADAPTER, "")] = tensor
            layer = name.partition(".lora_")[0]
            result[f"diffusion_model.{layer}.alpha"] = torch.tensor(config.alpha)
    return result


def merged(
    base: Mapping[str, Tensor], tensors: Mapping[str, Tensor], config: LoRAConfig
) -> dict[str, Tensor]:
    """A network's own tensors with its adapters added, W + alpha / rank B A, in float32."""
    result, _, unmatched = merge_lora(base, exported(tensors, config), strength=1.0)
    assert not unmatched
    return result
