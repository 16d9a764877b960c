"""What the averaged network makes of a few prompts: videos to look at, and their measurements.

A validation comes after a checkpoint of the same update, so that whatever fails in it loses
nothing; a run that is resumed there makes up for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from rf_core.attention import Attention, sdpa
from rf_core.config import CacheConfig, SamplerConfig
from rf_core.decoders.decoder import Decoder, load_decoder
from rf_core.model import WanModel
from rf_core.stream import Stream
from rf_core.video import VideoFormat, VideoWriter, to_uint8
from rf_core.writing import write_text

from ..measures.metrics import measure
from ..objective.redmd import Networks, ReDMDConfig
from ..run.distributed import broadcast_from_rank_0, rank
from ..run.error_sums import ErrorSums
from ..run.journal import Journal, ShownVideo, read_journal

NUMBERS = "validation/"
"""What the names of a validation's numbers begin with."""
DECODED_FRAMES = CacheConfig.chunk_frames
"""Latent frames decoded at a time, as a stream does it: a whole clip at once would take 27 GB."""
ROW_IMAGES, ROW_HEIGHT = 6, 240
"""Of the row of images that stands for a video in TensorBoard; the height at most, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What a validation has found, on the first process."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    """By name, which begins with `NUMBERS`."""
    videos: Sequence[ShownVideo] = ()


def is_due(every: int, update: int, updates: int) -> bool:
    """Whether a run of so many updates validates after `update` of them; `every` 0 is never."""
    return bool(every) and (update % every == 0 or update == updates)


def was_validated(out: Path, update: int) -> bool:
    """Whether the log has numbers of a validation after so many updates."""
    found = (line for line in read_journal(out / "log.jsonl") if line["update"] == update - 1)
    return broadcast_from_rank_0(any(name.startswith(NUMBERS) for line in found for name in line))


def validation_folder(out: Path, update: int) -> Path:
    """Where the videos of a validation after so many updates go."""
    return out / "validation" / f"update_{update:06}"


def log_validation(journal: Journal, update: int, found: Validation) -> None:
    """Write a validation after so many updates into the log."""
    journal.write(update - 1, found.numbers)
    journal.write_videos(update - 1, found.videos)


PROMPTS = "prompts.json"
_STRIDE = (math.sqrt(5) - 1) / 2  # the golden section: every step falls into a widest gap


def spread_prompts(count: int, total: int) -> list[int]:
    """Numbers of `count` of `total` prompts, or of all, spread over the list.

    Neighbours in a list are often alike. The first comes first, and more begin with the fewer.
    """
    nearest = round(_STRIDE * total)
    stride = next(step for step in range(nearest, total + 2) if math.gcd(step, total) == 1)
    return [place * stride % total for place in range(min(count, total))]


@torch.no_grad()
def validate(
    networks: Networks,
    config: ReDMDConfig,
    embeds: Tensor,
    prompts: Sequence[str],
    decoder: Decoder,
    chunks: int,
    size: tuple[int, int],
    folder: Path,
) -> Validation:
    """Stream a video of each prompt into `folder`; means of its measurements by name.

    `embeds` is [N, S, D] of the N prompts, `size` the picture's, in pixels.
    """

    def make(number: int) -> Tensor | None:
        return stream_video(
            networks.student,
            embeds[number : number + 1],
            config.cache,
            config.sampler,
            decoder,
            chunks,
            size,
            seed=number,
            attention=networks.attention,
            dtype=networks.dtype,
        )

    return show(prompts, folder, make)


def open_decoder(path: Path, device: torch.device, dtype: torch.dtype) -> Decoder | None:
    """The decoder of a validation's videos, on the first process, which writes them."""
    return load_decoder(path, device, dtype, DECODED_FRAMES) if rank() == 0 else None


def decoded(latents: Tensor, decoder: Decoder | None) -> Tensor | None:
    """The video [T, 3, H, W] of a clip [1, C, F, h, w], where there is a decoder."""
    return None if decoder is None else decoder.decode(latents, None)[0][0]


@torch.no_grad()
def stream_video(
    student: WanModel,
    embeds: Tensor,
    cache: CacheConfig,
    sampler: SamplerConfig,
    decoder: Decoder | None,
    chunks: int,
    size: tuple[int, int],
    *,
    seed: int,
    attention: Attention = sdpa,
    dtype: torch.dtype | None = None,
) -> Tensor | None:
    """A video [T, 3, H, W] in [0, 1] of a prompt [1, S, D], in so many chunks.

    Every process streams along, as sharded networks need; the first one decodes, others have None.
    """
    stream = Stream(
        student,
        embeds,
        height=size[0],
        width=size[1],
        decoder=decoder if rank() == 0 else None,
        seed=seed,
        cache=cache,
        sampler=sampler,
        attention=attention,
        dtype=dtype,
        device=embeds.device,
    )
    images = [stream.step().images for _ in range(chunks)]
    if rank() != 0:
        return None
    return torch.cat([part[0] for part in images if part is not None])


def show(prompts: Sequence[str], folder: Path, make: Callable[[int], Tensor | None]) -> Validation:
    """Write and measure a video of each prompt; `make` gives that of its number, on all processes.

    `prompts.json` beside them has the prompts by the videos' names.
    Videos are [T, 3, H, W] in [0, 1] on the first process; others may give None.
    """
    totals: dict[str, float] = {}
    shown = []
    paths = [folder / f"{number:02}.mp4" for number in range(len(prompts))]
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        listed = {path.name: prompt for path, prompt in zip(paths, prompts, strict=True)}
        write_text(folder / PROMPTS, json.dumps(listed, indent=1, ensure_ascii=False) + "\n")
    for number, (path, prompt) in enumerate(zip(paths, prompts, strict=True)):
        video = make(number)
        if rank() != 0:
            continue
        assert video is not None
        _write(path, video.cpu(), prompt)
        shown.append(ShownVideo(path=path, prompt=prompt, row=image_row(video)))
        for name, value in measure(video, len(video) // 2).items():
            totals[name] = totals.get(name, 0.0) + value / len(prompts)
    return Validation(
        numbers={f"{NUMBERS}{name}": value for name, value in totals.items()}, videos=shown
    )


def held_out_loss(
    errors: Callable[[Sequence[int], range], tuple[Tensor, Tensor]],
    names: Sequence[str],
    parts: Sequence[Sequence[int]],
    micro_batch: int,
) -> dict[str, float]:
    """The mean error of all clips, and by name; `parts` are their rows by size.

    `errors` gives those of some samples of a part, [B, N], with the index of each in `names`. Every
    process measures all: few they are, and so sharded networks stay in step whatever their number.
    """
    sums = ErrorSums(names)
    for held in parts:
        for start in range(0, len(held), micro_batch):
            sums.add(*errors(held, range(start, min(len(held), start + micro_batch))))
    mean, by_name = sums.means()
    each = {f"{NUMBERS}loss/{name}": value for name, value in by_name.items()}
    return {f"{NUMBERS}loss": mean, **each}


def image_row(video: Tensor) -> Tensor:
    """Some of the images of a video [T, 3, H, W] in [0, 1], from first to last, side by side:
    uint8 [3, h, N w], scaled down where they are large."""
    count = min(ROW_IMAGES, len(video))
    images = video[torch.linspace(0, len(video) - 1, count).round().long()].float().cpu()
    height, width = images.shape[2:]
    if height > ROW_HEIGHT:
        size = (ROW_HEIGHT, round(width * ROW_HEIGHT / height))
        images = F.interpolate(images, size, mode="area")
    return rearrange(to_uint8(images), "n h w c -> c h (n w)")


def _write(path: Path, video: Tensor, prompt: str) -> None:
    form = VideoFormat(width=video.shape[-1], height=video.shape[-2])
    with VideoWriter(path, form, {"title": prompt}) as writer:
        writer.write(to_uint8(video))
