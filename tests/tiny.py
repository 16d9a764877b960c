"""Tiny networks with random weights, and the settings tests stream them with."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from rf_core.config import CacheConfig, ModelConfig, SamplerConfig
from rf_core.model import WanModel
from rf_core.stream import Stream

_Network = TypeVar("_Network", bound=nn.Module)

CONFIG = ModelConfig(
    dim=48,
    ffn_dim=64,
    freq_dim=32,
    text_dim=24,
    text_len=10,
    in_dim=4,
    out_dim=4,
    num_heads=2,
    num_layers=2,
)
TWO_STEPS = SamplerConfig(steps=(1000, 500))


def model(config: ModelConfig = CONFIG, seed: int = 0) -> WanModel:
    """A network whose every part matters: no weight is zero, the head included."""
    return randomise(WanModel(config), seed)


def randomise(network: _Network, seed: int) -> _Network:
    """Frozen, with random weights that keep numbers at about their size."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        scale = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        with torch.no_grad():
            parameter.normal_(std=scale, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return network.eval().requires_grad_(False)


def prompt(seed: int = 0, tokens: int = 10, batch: int = 1) -> torch.Tensor:
    """Random prompt embeddings [batch, tokens, text_dim]."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(batch, tokens, CONFIG.text_dim, generator=generator)


def stream(**options: object) -> Stream:
    """A 32x48 stream without a decoder; `options` replace Stream's arguments."""
    settings: dict = {"height": 32, "width": 48, "sampler": TWO_STEPS, **options}
    network = settings.pop("model", None) or model()
    embeds = settings.pop("prompt_embeds", prompt())
    return Stream(network, embeds, **settings)


def window(frames: int, sink: int, chunk: int = 3, **options: object) -> CacheConfig:
    """A cache of given sizes with a decay that shows after one eviction."""
    settings: dict = {"decay": 0.75, **options}
    return CacheConfig(window_frames=frames, sink_frames=sink, chunk_frames=chunk, **settings)
