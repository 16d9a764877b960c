"""Training clips: scenes of the world, encoded once by the trained VAE and kept as latents.

Scene i of a seed is the same on every machine. Shards are written one by one, so an
interrupted run continues where it stopped, and one with a time limit keeps what it has.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from rf_core.config import TEMPORAL_FACTOR
from rf_core.decoders.vae import WanVAE
from rf_core.numbered import numbered
from rf_core.text import TextEncoder
from rf_core.weights.files import parse_json, read_weights
from rf_core.writing import whole_file

from .scenes import PLAIN, WORLDS, Scene, caption, colour_caption, render, sample_scene
from .train_vae import from_wan, to_wan


@dataclass(frozen=True, kw_only=True)
class ClipsConfig:
    """How many clips, how long, and from which seed."""

    num_clips: int = 4096
    """Clips at most."""
    minutes: float | None = None
    """Wall-clock minutes after which no further shard is begun; None for no limit."""
    frames: int = 15
    """Latent frames of a clip."""
    shard_clips: int = 128
    """Clips in a file."""
    part: tuple[int, int] = (0, 1)
    """(i, n): make every n-th shard from the i-th on. Convolutions of this size scale with
    processes rather than threads."""
    world: str = PLAIN
    """Of `scenes.WORLDS`."""
    seed: int = 1
    """Clip i shows the scene drawn from (seed, i)."""


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Encoded clips and the scenes they show."""

    latents: Tensor
    """Normalised latents [N, C, F, h, w], float16."""
    scenes: list[Scene]
    """The scene of each clip, from which captions and true speeds are derived."""


def num_images(frames: int) -> int:
    """Images of a clip of latent frames: the first stands for one, every other for four."""
    return TEMPORAL_FACTOR * (frames - 1) + 1


def scene_of(seed: int, index: int, world: str = PLAIN) -> Scene:
    """Scene `index` of a data set."""
    return sample_scene(np.random.default_rng([seed, index]), WORLDS[world])


def noted_scene(note: Mapping[str, Any], index: int) -> Scene:
    """The scene of a clip, by its shard's note; notes without a world are of the plain one."""
    return scene_of(note["seed"], index, note.get("world", PLAIN))


@torch.no_grad()
def encode_scenes(vae: WanVAE, scenes: list[Scene], frames: int, batch: int = 2) -> Tensor:
    """Normalised latents [N, C, F, h, w] of scenes, float32."""
    parts = []
    for start in range(0, len(scenes), batch):
        video = to_wan(render(scenes[start : start + batch], num_images(frames)))
        video = video.to(next(vae.parameters()).device)
        parts.append(vae.encode(video.contiguous(memory_format=torch.channels_last_3d)))
    return torch.cat(parts)


@torch.no_grad()
def decode_latents(vae: WanVAE, latents: Tensor, batch: int = 2) -> Tensor:
    """Images [N, T, 3, H, W] in [0, 1] of latents [N, C, F, h, w]."""
    return torch.cat([from_wan(vae.decode(part.float())) for part in latents.split(batch)])


def to_channels_last(vae: WanVAE) -> WanVAE:
    """The same VAE with its kernels in the order CPUs convolve fastest in."""
    for weight in vae.parameters():
        if weight.ndim == 5:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return vae


def write_clips(vae: WanVAE, config: ClipsConfig, folder: Path) -> Iterator[int]:
    """Encode the missing shards into `folder`; yields the number of clips there are so far."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    which, parts = config.part
    shards = range(0, config.num_clips, config.shard_clips)[which::parts]
    for start in shards:
        path = folder / _shard_name(start)
        stop = min(start + config.shard_clips, config.num_clips)
        if not path.exists():
            if config.minutes is not None and time.monotonic() - started > 60 * config.minutes:
                return
            _write_shard(vae, config, path, range(start, stop))
        yield stop


def _write_shard(vae: WanVAE, config: ClipsConfig, path: Path, indices: range) -> None:
    scenes = [scene_of(config.seed, index, config.world) for index in indices]
    latents = encode_scenes(vae, scenes, config.frames)
    note = {"seed": config.seed, "start": indices.start, "world": config.world}
    metadata = {"clips": json.dumps(note)}
    write_atomically(path, {"latents": latents.half()}, metadata)


def _shard_name(start: int) -> str:
    return f"clips-{start:06}.safetensors"


def write_atomically(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file in full or not at all."""
    with whole_file(path) as part:
        save_file({name: t.contiguous() for name, t in tensors.items()}, part, metadata)


def shards_of_clips(folder: Path) -> list[Path]:
    """The shards of encoded clips that a folder holds."""
    return [path for _, path in numbered(folder, _shard_name)]


def read_clips(folder: Path) -> Clips:
    """Every shard of `folder`; ValueError where there is none."""
    paths = shards_of_clips(folder)
    if not paths:
        raise ValueError(f"{folder} holds no clips; run `python -m training.world clips` first")
    latents, scenes = [], []
    for path in paths:
        file = read_weights(path)
        latents.append(file.tensors["latents"])
        note = parse_json(path, file.metadata["clips"])
        indices = range(note["start"], note["start"] + len(latents[-1]))
        scenes += [noted_scene(note, index) for index in indices]
    return Clips(latents=torch.cat(latents), scenes=scenes)


def captions(scenes: list[Scene], rng: np.random.Generator | None = None) -> list[str]:
    """One caption a scene; `rng` picks among the phrasings."""
    return [caption(scene, rng) for scene in scenes]


@dataclass(frozen=True)
class CaptionedClips:
    """Encoded clips as a `ClipSource`. Captions are phrased and encoded anew at every call.

    Groups are clips of one thing and clips of two.
    """

    clips: Clips
    encoder: TextEncoder
    colours_alone: float = 0.0
    """Share of captions that name colours and no more, for clips that are shown in outline."""

    def __len__(self) -> int:
        return len(self.clips.scenes)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a clip's latents: channels, frames, rows, columns."""
        _, channels, frames, rows, columns = self.clips.latents.shape
        return channels, frames, rows, columns

    @cached_property
    def groups(self) -> list[list[int]]:
        """Rows by the number of things they show."""
        counts = [len(scene.things) for scene in self.clips.scenes]
        return [[row for row, n in enumerate(counts) if n == kind] for kind in sorted(set(counts))]

    @property
    def origins(self) -> Sequence[int]:
        """Each clip is a video of its own."""
        return range(len(self))

    @property
    def buckets(self) -> dict[tuple[int, int], Sequence[int]]:
        """Rows by the size of their latents, which all share."""
        _, _, rows, columns = self.shape
        return {(rows, columns): range(len(self))}

    def latents(self, rows: Sequence[int]) -> Tensor:
        """Some clips, [N, C, F, h, w] in float32."""
        return self.clips.latents[list(rows)].float()

    def captions(self, rows: Sequence[int], seeds: Sequence[int]) -> tuple[list[str], Tensor]:
        """Captions, and the same encoded [N, S, D]; seeds choose the words."""
        texts = [
            self._caption(self.clips.scenes[row], np.random.default_rng(seed))
            for row, seed in zip(rows, seeds, strict=True)
        ]
        return texts, self.encoder.encode(texts).cpu()

    def _caption(self, scene: Scene, rng: np.random.Generator) -> str:
        if self.colours_alone and rng.random() < self.colours_alone:
            return colour_caption(scene)
        return caption(scene, rng)
