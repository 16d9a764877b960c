"""Prompts' embeddings: encoded once, kept on disk (`embed_cache`), those alone that are drawn.

Encoding is shared out over processes and continues where it stopped.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rf_core.devices import empty_caches
from rf_core.options import DEMO
from rf_core.text import TextEncoder, UMT5Encoder, load_text_encoder

from ..run.distributed import shard_modules, world_size
from ..run.options import show_progress
from .embed_cache import CachedEmbeds, EmbedCache
from .encoder_key import encoder_key
from .prompts import DataConfig, DataSet, read_prompts

Drawn = Callable[[int], Collection[int]]
"""Of so many prompts, the numbers of those that a run will draw."""


class PromptEmbeds(Protocol):
    """The prompts of a run, encoded."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def embeds(self, numbers: Sequence[int]) -> Tensor:
        """Embeddings of some prompts by their numbers, [B, S, D]."""
        ...


@dataclass(frozen=True)
class MemoryEmbeds:
    """Embeddings that fit into memory, [N, S, D]."""

    tensor: Tensor

    def __len__(self) -> int:
        return len(self.tensor)

    def embeds(self, numbers: Sequence[int]) -> Tensor:
        """Embeddings of some prompts by their numbers, [B, S, D]."""
        return self.tensor[list(numbers)]


def place_encoder(encoder: UMT5Encoder, device: torch.device) -> UMT5Encoder:
    """Move an encoder, or shard it over all processes, which must then encode in step."""
    if world_size() > 1:
        shard_modules(encoder.model, encoder.model.encoder.block, device.type)
    else:
        encoder.model.to(device)
    return encoder


def encoder_path(config: DataConfig) -> str:
    """The text encoder that a config names, or the demo's; ValueError for a missing file."""
    place = config.text_encoder or str(DEMO / "text_encoder.safetensors")
    if Path(place).suffix in (".safetensors", ".pth") and not Path(place).exists():
        raise ValueError(
            f"data.text_encoder is {place}, which is not there; `python -m training.world text` "
            "makes the miniature's, and without the field the demo's is taken"
        )
    return place


def open_prompts(
    config: DataConfig,
    own: DataSet,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    drawn: Drawn = range,
) -> tuple[list[str], PromptEmbeds, Tensor]:
    """Prompts, their embeddings, and that of the negative prompt, [1, S, D].

    Of prompt files, those alone that are `drawn` are encoded. Where the config names no file, they
    are the data set's `own`.
    """
    if not config.prompts:
        prompts = own.training_prompts()[: config.limit]
        encoder = load_text_encoder(encoder_path(config), device=device, dtype=dtype)
        return prompts, _memory_embeds(encoder, prompts), encoder.encode([config.negative])
    prompts = read_prompts(config)
    chosen = [prompts[number] for number in drawn(len(prompts))]
    cache = encoded([config.negative, *chosen], config, folder, device, dtype)
    return prompts, CachedEmbeds(prompts, cache), cache.load(config.negative)[None]


def _memory_embeds(encoder: TextEncoder, prompts: Sequence[str]) -> MemoryEmbeds:
    parts: list[Tensor] = []

    def encode() -> Iterator[tuple[int, str]]:
        for text in prompts:
            parts.append(encoder.encode([text]).cpu())
            yield len(parts), ""

    show_progress(len(prompts), "prompt", encode())
    return MemoryEmbeds(torch.cat(parts))


def open_negative(
    config: DataConfig, folder: Path, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The embedding of the negative prompt alone, [1, S, D]."""
    cache = encoded([config.negative], config, folder, device, dtype)
    return cache.load(config.negative)[None]


def encoded(
    texts: Iterable[str],
    config: DataConfig,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> EmbedCache:
    """The cache in `folder`, or where the config says, with all of the texts in it.

    The encoder is opened only where one is missing, and freed afterwards. A progress bar counts
    all prompts, those of an encoding before among them.
    """
    path = encoder_path(config)
    cache = EmbedCache.open(config.cache or folder, encoder_key(path, dtype))
    wanted = list(dict.fromkeys(texts))
    missing = cache.missing(wanted)
    if missing:
        encoder = place_encoder(load_text_encoder(path, device="cpu", dtype=dtype), device)
        there = len(wanted) - len(missing)
        steps = cache.encode(encoder, missing, config.encode_batch)
        show_progress(len(wanted), "prompt", ((there + done, "") for done in steps))
        del encoder, steps
        gc.collect()  # a sharded one refers to itself
        empty_caches()
    return cache
