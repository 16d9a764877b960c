"""Control contexts of the world's clips: whole outlines, masked regions, and nothing at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from rf_core.control import GREY, packed_mask, parts_of
from rf_core.decoders.vae import WanVAE
from rf_core.weights.files import parse_json, read_weights

from ..control_files import controls_path, write_controls
from ..control_videos import ControlVideo, VariantsConfig, variants
from .clips import noted_scene, num_images, shards_of_clips
from .outlines import draw_outlines
from .scenes import Scene, render
from .train_vae import to_wan

LINES = (1.0, 3.0)  # pixels: widths of outlines, as edge filters differ in theirs


def control_videos(
    scene: Scene, frames: int, config: VariantsConfig, rng: np.random.Generator
) -> Iterator[ControlVideo]:
    """The control videos of a clip of so many latent frames: its outlines, and one more."""
    images = num_images(frames)
    drawn = draw_outlines([scene], images, line=rng.uniform(*LINES))[0]
    outlines = rearrange(drawn, "t h w c -> t c h w")
    return variants(render([scene], images)[0], outlines, config, rng)


@torch.no_grad()
def encode_controls(
    vae: WanVAE, videos: Sequence[ControlVideo], batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Inactive and reactive latents [N, C, F, h, w] and masks [N, 64, F, h, w] of control videos.

    What is grey alone is encoded once.
    """
    parts = [parts_of(video.images, video.mask) for video in videos]
    images = [each for pair in parts for each in pair]
    shown = [number for number, each in enumerate(images) if bool((each != GREY).any())]
    latents = _encode(vae, torch.full_like(images[0], GREY)[None]).repeat(len(images), 1, 1, 1, 1)
    for start in range(0, len(shown), batch):
        some = shown[start : start + batch]
        latents[some] = _encode(vae, torch.stack([images[number] for number in some]))
    inactive, reactive = rearrange(latents, "(n two) ... -> two n ...", two=2)
    masks = torch.cat([packed_mask(video.mask, 1) for video in videos])
    return inactive, reactive, masks


def _encode(vae: WanVAE, images: Tensor) -> Tensor:
    return vae.encode(to_wan(images).contiguous(memory_format=torch.channels_last_3d))


def write_controls_of(
    vae: WanVAE, config: VariantsConfig, clips: Path, folder: Path
) -> Iterator[int]:
    """Encode the missing contexts of the clips of a folder; yields how many clips have theirs.

    ValueError where it holds none.
    """
    count = 0
    for path in shards_of_clips(clips):
        file = read_weights(path)
        total, _, frames, *_ = file.tensors["latents"].shape
        note = parse_json(path, file.metadata["clips"])
        rows = range(count, count + total)
        if not controls_path(folder, count).exists():
            videos = [
                video
                for index in range(note["start"], note["start"] + total)
                for video in control_videos(
                    noted_scene(note, index),
                    frames,
                    config,
                    np.random.default_rng([config.seed, note["seed"], index]),
                )
            ]
            of = [row for row in rows for _ in range(2)]
            write_controls(controls_path(folder, count), *encode_controls(vae, videos), of)
        count += total
        yield count
    if not count:
        raise ValueError(f"{clips} holds no clips; run `python -m training.world clips` first")
