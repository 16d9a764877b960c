"""Control contexts of the world's clips: whole outlines, masked regions, and nothing at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from rf_core.control import GREY, packed_mask, parts_of
from rf_core.decoders.vae import WanVAE
from rf_core.weights.files import parse_json, read_weights

from ..control_files import controls_path, write_controls
from .clips import num_images, scene_of, shards_of_clips
from .outlines import draw_outlines
from .scenes import SIZE, Scene, render
from .train_vae import to_wan

LINES = (1.0, 3.0)  # pixels: widths of outlines, as edge filters differ in theirs
LEAST_SIDE = 20  # pixels: of a masked region


@dataclass(frozen=True, kw_only=True)
class ControlsConfig:
    """What of each clip is controlled. Each has its whole outlines, and one context more."""

    masked: float = 0.5
    """Share of the others that are outlines in a rectangle, with the true clip around it."""
    erased: float = 0.25
    """Share that are a rectangle of grey, to be filled by the prompt alone, in the true clip. What
    is left are whole clips of grey: no control."""
    seed: int = 6
    """Seeds lines and rectangles."""

    def __post_init__(self) -> None:
        if min(self.masked, self.erased) < 0 or self.masked + self.erased > 1:
            raise ValueError(
                f"masked is {self.masked} and erased {self.erased}; give shares of at most 1 in all"
            )


@dataclass(frozen=True)
class ControlVideo:
    """What a user would give: a video and a mask."""

    images: Tensor
    """[T, 3, H, W] in [0, 1]."""
    mask: Tensor
    """[T, 1, H, W], 1 where the video is to be made."""


def control_videos(
    scene: Scene, frames: int, config: ControlsConfig, rng: np.random.Generator
) -> Iterator[ControlVideo]:
    """The control videos of a clip of so many latent frames: its outlines, and one more."""
    images = num_images(frames)
    outlines = _outlines(scene, images, rng)
    whole = torch.ones(images, 1, SIZE, SIZE)
    yield ControlVideo(outlines, whole)
    kind = rng.random()
    if kind >= config.masked + config.erased:
        yield ControlVideo(torch.full_like(outlines, GREY), whole)
        return
    mask = rectangle(rng).expand(images, -1, -1, -1)
    inside = outlines if kind < config.masked else torch.full_like(outlines, GREY)
    yield ControlVideo(torch.where(mask > 0, inside, render([scene], images)[0]), mask)


def _outlines(scene: Scene, images: int, rng: np.random.Generator) -> Tensor:
    drawn = draw_outlines([scene], images, line=rng.uniform(*LINES))[0]
    return rearrange(drawn, "t h w c -> t c h w")


def rectangle(rng: np.random.Generator) -> Tensor:
    """A mask of a rectangle anywhere in the picture, [1, 1, H, W]."""
    mask = torch.zeros(1, 1, SIZE, SIZE)
    height, width = rng.integers(LEAST_SIDE, SIZE, 2, endpoint=True)
    top, left = (rng.integers(SIZE - side, endpoint=True) for side in (height, width))
    mask[..., top : top + height, left : left + width] = 1
    return mask


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
    vae: WanVAE, config: ControlsConfig, clips: Path, folder: Path
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
                    scene_of(note["seed"], index),
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
