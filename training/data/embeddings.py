"""Prompts' embeddings: encoded once, kept on disk.

Embeddings lie in shards of safetensors, each of them as long as its prompt; a shard is a function
of its prompts and the encoder, so encoding is shared out over processes and continues where it
stopped.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rf_core.devices import empty_caches
from rf_core.options import DEMO
from rf_core.text import TextEncoder, UMT5Encoder, load_text_encoder
from rf_core.weights.files import read_weights
from rf_core.writing import whole_file

from ..run.distributed import barrier, broadcast_from_rank_0, rank, shard_modules, world_size
from ..run.options import show_progress
from .prompts import DataConfig, DataSet, read_prompts

SHARD_PROMPTS = 256


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


@dataclass(frozen=True)
class CachedEmbeds:
    """Embeddings on disk, read as they are asked for."""

    shards: tuple[Path, ...]
    count: int
    _open: dict[Path, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.count

    def embeds(self, numbers: Sequence[int]) -> Tensor:
        """Embeddings of some prompts by number, [B, S, D], padded with zeros to the longest."""
        return pad_sequence([self._load(number) for number in numbers], batch_first=True)

    def _load(self, number: int) -> Tensor:
        shard, place = divmod(number, SHARD_PROMPTS)
        path = self.shards[shard]
        if path not in self._open:
            self._open[path] = read_weights(path).tensors  # mapped: what is asked for is read
        found = self._open[path].get(str(place))
        if found is None:
            raise ValueError(
                f"{path} lacks the prompt at {place}; delete it, to have it made again"
            )
        return found


def cached_embeds(
    prompts: Sequence[str], encoder_name: str, folder: Path
) -> tuple[CachedEmbeds, list[int]]:
    """The embeddings' places in `folder`, and the numbers of the shards that are missing.

    A shard's name is the hash of its prompts and of `encoder_name`: another encoder, or another
    prompt file, never reads what is not its own.
    """
    paths = []
    for start in range(0, len(prompts), SHARD_PROMPTS):
        key = json.dumps([encoder_name, *prompts[start : start + SHARD_PROMPTS]])
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        paths.append(folder / f"embeds-{digest}.safetensors")
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    return CachedEmbeds(tuple(paths), len(prompts)), broadcast_from_rank_0(missing)


def encode_missing(
    encoder: TextEncoder,
    prompts: Sequence[str],
    cache: CachedEmbeds,
    missing: Sequence[int],
    batch: int,
) -> Iterator[int]:
    """Write the missing shards, shared out over processes; yields how many prompts are encoded.

    Processes stay in step, so that an encoder that is sharded over them works: one without a shard
    left encodes an empty prompt along.
    """
    done = 0
    for first in range(0, len(missing), world_size()):
        numbers = missing[first : first + world_size()]
        mine = numbers[rank() : rank() + 1]
        sizes = [len(_shard(prompts, number)) for number in numbers]
        texts = _shard(prompts, mine[0]) if mine else []
        embeds: list[Tensor] = []
        for start in range(0, SHARD_PROMPTS, batch):
            some = list(texts[start : start + batch])
            if some or world_size() > 1:
                embeds += list(encoder.encode(some or [""]))[: len(some)]
            yield done + sum(min(start + batch, size) for size in sizes)
        if mine:
            _write(cache.shards[mine[0]], embeds)
        done += sum(sizes)
    barrier()


def _shard(prompts: Sequence[str], number: int) -> Sequence[str]:
    return prompts[number * SHARD_PROMPTS :][:SHARD_PROMPTS]


def _write(path: Path, embeds: Sequence[Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {str(place): _trimmed(each).cpu() for place, each in enumerate(embeds)}
    with whole_file(path) as part:
        save_file(tensors, part)


def _trimmed(embeds_SD: Tensor) -> Tensor:
    """Without the zeros at its end; readers pad it again."""
    used = embeds_SD.abs().amax(1).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    return embeds_SD[:length].clone()


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
    config: DataConfig, own: DataSet, folder: Path, device: torch.device, dtype: torch.dtype
) -> tuple[list[str], PromptEmbeds, Tensor]:
    """Prompts, their embeddings, and that of the negative prompt, [1, S, D].

    Where the config names no prompt file, they are the data set's `own`.
    """
    if not config.prompts:
        prompts = own.training_prompts()[: config.limit]
        encoder = load_text_encoder(encoder_path(config), device=device, dtype=dtype)
        return prompts, _memory_embeds(encoder, prompts), encoder.encode([config.negative])
    prompts = read_prompts(config)
    plain, found = open_texts([[config.negative], prompts], config, folder, device, dtype)
    return prompts, found, plain.embeds([0])


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
    (plain,) = open_texts([[config.negative]], config, folder, device, dtype)
    return plain.embeds([0])


def open_texts(
    texts: Sequence[Sequence[str]],
    config: DataConfig,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> list[CachedEmbeds]:
    """The embeddings of several lists of texts, kept in `folder` or where the config says.

    The encoder is opened only where one is missing, and freed afterwards. A progress bar counts
    all prompts, those of an encoding before among them.
    """
    path, folder = encoder_path(config), config.cache or folder
    found = [cached_embeds(each, path, folder) for each in texts]
    if any(missing for _, missing in found):
        encoder = place_encoder(load_text_encoder(path, device="cpu", dtype=dtype), device)
        steps = _encode_all(encoder, texts, found, config.encode_batch)
        show_progress(sum(map(len, texts)), "prompt", ((done, "") for done in steps))
        del encoder, steps
        gc.collect()  # a sharded one refers to itself
        empty_caches()
    return [cache for cache, _ in found]


def _encode_all(
    encoder: TextEncoder,
    texts: Sequence[Sequence[str]],
    found: Sequence[tuple[CachedEmbeds, Sequence[int]]],
    batch: int,
) -> Iterator[int]:
    """Write what is missing of several lists; yields how many of all their texts are there."""
    there = sum(map(len, texts))
    for some, (_, missing) in zip(texts, found, strict=True):
        there -= sum(len(_shard(some, number)) for number in missing)
    yield there
    for some, (cache, missing) in zip(texts, found, strict=True):
        for done in encode_missing(encoder, some, cache, missing, batch):
            yield there + done
        there += sum(len(_shard(some, number)) for number in missing)
