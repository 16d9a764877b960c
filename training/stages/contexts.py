"""Control contexts of real videos, once: what `control` learns to follow beside their latents.

Every video of a folder of `latents` has a control video of its name (its depth, poses, edges). Both
are cut as the latents were, and encoded as VACE defines it: the control alone, and a masked region
of it in the true clip. Videos are shared out over processes, and an interrupted run continues.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from rf_core.config import SPATIAL_FACTOR
from rf_core.control import MASK_CHANNELS, context_of
from rf_core.decoders.decoder import Decoder, load_decoder
from rf_core.options import DEMO
from rf_core.weights.files import read_weights

from ..control_files import controls_path, write_controls
from ..control_videos import VariantsConfig, variants
from ..data.latents import cut, shards_of_latents, video_of_shard
from ..run.config import to_json
from ..run.distributed import barrier, broadcast_from_rank_0, process_group, rank, world_size
from ..run.folder import check_recipe, create_run_folder, read_config
from ..run.options import add_config_arguments, config_from_args, print_rank_0, show_progress
from .latents import CHUNK, LatentsConfig


@dataclass(frozen=True, kw_only=True)
class ContextsConfig:
    """Which videos are controlled, by which."""

    recipe = "contexts"

    source: Path = Path("runs/latents")
    """Folder of `latents`; its config says where the videos are, and how they were cut."""
    controls: Path = Path("controls")
    """Folder of control videos, each of the name of the video that it controls."""
    variants: VariantsConfig = field(default_factory=VariantsConfig)
    """What else of each clip is encoded."""


CONTEXTS_PRESETS: Mapping[str, Callable[[], ContextsConfig]] = MappingProxyType(
    {"miniature": ContextsConfig, "wan": ContextsConfig}
)


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """A video's clips among all."""

    start: int
    """The number of its first clip."""
    count: int
    video: Path
    control: Path
    size: tuple[int, int]
    """Height and width in pixels."""


def encode_contexts(config: ContextsConfig, out: Path, device: torch.device) -> Iterator[int]:
    """Write the shards that `out` lacks, yielding how many videos are done.

    Every process calls this together. ValueError where `source` holds no latents, where a video has
    no control, or one that is shorter, and where `out` was begun with another config.
    """
    check_recipe(config, out)
    latents, shards = _latents_config(config), _shards(config)
    paths = [controls_path(out, shard.start) for shard in shards]
    missing = broadcast_from_rank_0([n for n, path in enumerate(paths) if not path.exists()])
    if len(missing) < len(shards) and (before := read_config(ContextsConfig, out)) != config:
        raise ValueError(f"{out} was begun with another config, {before}; choose another folder")
    done = len(shards) - len(missing)
    yield done
    create_run_folder(config, out)
    dtype = getattr(torch, latents.dtype)
    decoder = load_decoder(latents.vae or DEMO / "vae.safetensors", device, dtype, CHUNK)
    for number, place in enumerate(missing[rank() :: world_size()], 1):
        _write(config, latents, shards[place], paths[place], decoder, device)
        yield min(len(shards), done + number * world_size())
    barrier()


@torch.no_grad()
def _write(
    config: ContextsConfig,
    latents: LatentsConfig,
    shard: _Shard,
    path: Path,
    decoder: Decoder,
    device: torch.device,
) -> None:
    (height, width), found = shard.size, []
    options = {"height": height, "width": width, "fps": latents.fps, "frames": latents.frames}
    clips = zip(cut(shard.video, **options), cut(shard.control, **options), strict=False)
    for number, (true, control) in zip(range(shard.count), clips, strict=False):
        rng = np.random.default_rng([config.variants.seed, shard.start + number])
        found += [
            context_of(each.images.to(device), decoder, each.mask.to(device)).cpu()
            for each in variants(true, control, config.variants, rng)
        ]
    if len(found) < 2 * shard.count:
        raise ValueError(
            f"{shard.control} is shorter than {shard.video}, which it controls, of "
            f"{shard.count} clips; give it as many images"
        )
    parts = torch.cat(found)
    channels = (parts.shape[1] - MASK_CHANNELS) // 2
    inactive, reactive, mask = parts.split([channels, channels, MASK_CHANNELS], dim=1)
    numbers = range(shard.start, shard.start + shard.count)
    rows = list(chain.from_iterable([number] * 2 for number in numbers))
    write_controls(path, inactive, reactive, mask, rows)


def _latents_config(config: ContextsConfig) -> LatentsConfig:
    if not shards_of_latents(config.source):
        raise ValueError(
            f"source is {config.source}, which holds no latents; encode the videos that are "
            "controlled with `python -m training latents` first"
        )
    return read_config(LatentsConfig, config.source)


def _shards(config: ContextsConfig) -> list[_Shard]:
    """Of every video that has clips, in the order that clips are numbered in."""
    videos = _latents_config(config).videos
    found = [(video_of_shard(path), path) for path in shards_of_latents(config.source)]
    held = [(name, read_weights(path).tensors["latents"]) for name, path in found]
    held = [(name, latents) for name, latents in held if len(latents)]
    starts = accumulate((len(latents) for _, latents in held), initial=0)
    controls = _controls_of(config.controls, [name for name, _ in held])
    return [
        _Shard(
            start=start,
            count=len(latents),
            video=videos / name,
            control=controls[name],
            size=(latents.shape[3] * SPATIAL_FACTOR, latents.shape[4] * SPATIAL_FACTOR),
        )
        for (name, latents), start in zip(held, starts, strict=False)
    ]


def _controls_of(folder: Path, names: list[str]) -> dict[str, Path]:
    """The control video of each, of its name whatever the suffix."""
    if not folder.is_dir():
        raise ValueError(f"controls is {folder}, which is not a folder")
    there = {p.relative_to(folder).with_suffix(""): p for p in folder.rglob("*") if p.is_file()}
    missing = [name for name in names if Path(name).with_suffix("") not in there]
    if missing:
        raise ValueError(
            f"controls is {folder}, which has no control of {missing[0]}"
            f"{f' and {len(missing) - 1} others' if missing[1:] else ''}; give each of its name"
        )
    return {name: there[Path(name).with_suffix("")] for name in names}


def add_contexts_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `contexts`."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the contexts")
    add_config_arguments(parser, CONTEXTS_PRESETS)


def run_contexts(args: argparse.Namespace) -> int:
    """Encode control contexts of a folder of latents, or those that are missing."""
    config = config_from_args(args, ContextsConfig, CONTEXTS_PRESETS)
    with process_group(args.device) as device:
        print_rank_0(to_json(config))
        total = len(_shards(config))
        steps = ((done, "") for done in encode_contexts(config, args.out, device))
        show_progress(total, "video", steps)
        print_rank_0(f"{args.out}: contexts of {total} videos")
    return 0
