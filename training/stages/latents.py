"""Real videos as latents, once: what `teacher` and `consistency` learn from.

Videos are shared out over processes, a shard each; an interrupted run continues with those that are
missing. One that cannot be read, or is too short, leaves a shard without clips and a line in the
log.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

from rf_core.config import WAN_SIZE
from rf_core.decoders.decoder import Decoder, load_decoder
from rf_core.options import DEMO
from rf_core.ranges import LARGEST_SIDE, MANY, check_folder_writable, check_numbers
from rf_core.video import image_size

from ..data.latents import (
    Video,
    check_shard_is_of,
    clip_images,
    cut,
    encode_clips,
    latents_path,
    list_videos,
    nearest_size,
    write_latents,
)
from ..run.config import to_json
from ..run.distributed import (
    barrier,
    broadcast_from_rank_0,
    process_group,
    rank,
    world_size,
)
from ..run.folder import check_recipe, create_run_folder, read_config
from ..run.options import add_config_arguments, config_from_args, print_rank_0, show_progress

_log = logging.getLogger(__name__)
CHUNK = 3  # latent frames encoded at once


@dataclass(frozen=True, kw_only=True)
class LatentsConfig:
    """Which videos, and how they are cut and encoded."""

    recipe = "latents"

    videos: Path = Path("videos")
    """Folder of videos; those of its folders count."""
    captions: Path | None = None
    """CSV with the columns `file` and `prompt`; None for a .txt of its name beside each video."""
    vae: Path | None = None
    """A Wan VAE or TAEHV; None for the bundled demo's."""
    size: tuple[int, int] = (64, 64)
    """Height and width in pixels; videos are scaled to cover them, and cropped."""
    buckets: tuple[tuple[int, int], ...] = ()
    """Other heights and widths: each video takes, of `size` and these, that of which the least of
    it is cropped."""
    fps: int = 16
    """Images a second, whatever a video's own."""
    frames: int = 9
    """Latent frames of a clip."""
    clips_per_video: int | None = None
    """The most clips of a video, from its first on; None for all."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the VAE computes in."""

    def __post_init__(self) -> None:
        check_numbers(self, fps=(1, 1000), frames=(1, MANY), clips_per_video=(1, MANY))
        if not all(0 < side <= LARGEST_SIDE for side in self.size):
            raise ValueError(f"size is {self.size}; give a height and a width in pixels")
        if not all(0 < side <= LARGEST_SIDE for size in self.buckets for side in size):
            raise ValueError(f"buckets are {self.buckets}; give heights and widths in pixels")
        shapes = [Fraction(height, width) for height, width in self.sizes]
        if len(set(shapes)) < len(shapes):
            raise ValueError(
                f"buckets are {self.buckets} and size {self.size}, of which two have one shape: "
                "no video would take the second"
            )

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Heights and widths that a video may take."""
        return (self.size, *self.buckets)

    @property
    def largest_size(self) -> tuple[int, int]:
        """That of them which takes most."""
        return max(self.sizes, key=math.prod)


def wan_latents() -> LatentsConfig:
    """Wan 2.1's own size and length; change the files to where yours are."""
    return LatentsConfig(
        vae=Path("models/Wan2.1_VAE.pth"), size=WAN_SIZE, frames=21, dtype="bfloat16"
    )


LATENTS_PRESETS: Mapping[str, Callable[[], LatentsConfig]] = MappingProxyType(
    {"miniature": LatentsConfig, "wan": wan_latents}
)


def encode_videos(
    config: LatentsConfig, videos: Sequence[Video], out: Path, device: torch.device
) -> Iterator[int]:
    """Write the shards that `out` lacks, yielding how many videos are done.

    Every process calls this together. ValueError where `out` holds shards of others.
    """
    check_recipe(config, out)
    missing = []
    for number, video in enumerate(videos):
        if latents_path(out, number).exists():
            check_shard_is_of(latents_path(out, number), video)
        else:
            missing.append(number)
    missing = broadcast_from_rank_0(missing)  # others may have begun by now
    if len(missing) < len(videos) and (before := read_config(LatentsConfig, out)) != config:
        raise ValueError(f"{out} was begun with another config, {before}; choose another folder")
    yield len(videos) - len(missing)
    create_run_folder(config, out)
    dtype = getattr(torch, config.dtype)
    decoder = load_decoder(config.vae or DEMO / "vae.safetensors", device, dtype, CHUNK)
    for name, size in zip(("size", *["buckets"] * len(config.buckets)), config.sizes, strict=True):
        if any(side % decoder.spatial_factor for side in size):
            raise ValueError(
                f"{name}: {size} is not whole latents; give multiples of {decoder.spatial_factor}"
            )
    for done, number in enumerate(missing[rank() :: world_size()], 1):
        _encode(config, out, number, videos[number], decoder, device)
        yield min(len(videos), len(videos) - len(missing) + done * world_size())
    barrier()


def _encode(
    config: LatentsConfig,
    out: Path,
    number: int,
    video: Video,
    decoder: Decoder,
    device: torch.device,
) -> None:
    path, problem = config.videos / video.name, ""
    try:
        height, width = nearest_size(*image_size(path), config.sizes)
        clips = cut(path, height=height, width=width, fps=config.fps, frames=config.frames)
        latents = encode_clips(islice(clips, config.clips_per_video), decoder, device)
        if not latents:
            problem = f"it is shorter than {clip_images(config.frames)} images at {config.fps} fps"
    except ValueError as error:
        latents, problem = [], str(error)
    if problem:
        _log.warning("%s is left out: %s", video.name, problem)
    write_latents(latents_path(out, number), latents, video, problem)


def add_latents_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `latents`."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the latents")
    add_config_arguments(parser, LATENTS_PRESETS)


def run_latents(args: argparse.Namespace) -> int:
    """Encode a folder of videos, or those that are missing."""
    config = config_from_args(args, LatentsConfig, LATENTS_PRESETS)
    check_folder_writable(args.out)
    with process_group(args.device) as device:
        print_rank_0(to_json(config))
        videos = list_videos(config.videos, config.captions)
        steps = ((done, "") for done in encode_videos(config, videos, args.out, device))
        show_progress(len(videos), "video", steps)
        print_rank_0(f"{args.out}: {len(videos)} videos")
    return 0
