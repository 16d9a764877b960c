"""What the averaged student makes of a few prompts: videos to look at, and their measurements."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rf_core.decoders.decoder import Decoder
from rf_core.stream import Stream
from rf_core.video import VideoFormat, VideoWriter, to_uint8
from rf_core.writing import write_text

from ..measures.metrics import measure
from ..objective.redmd import Networks, ReDMDConfig
from ..run.distributed import rank

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
) -> dict[str, float]:
    """Stream a video of each prompt into `folder`; means of its measurements by name.

    `prompts.json` there has the prompts by the videos' names. Every process streams along, as
    sharded networks need; the first one decodes and writes. `size` is the picture's, in pixels.
    """
    totals: dict[str, float] = {}
    names = [f"{number:02}.mp4" for number in range(len(prompts))]
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        listed = dict(zip(names, prompts, strict=True))
        write_text(folder / PROMPTS, json.dumps(listed, indent=1, ensure_ascii=False) + "\n")
    for number, prompt in enumerate(prompts):
        stream = Stream(
            networks.student,
            embeds[number : number + 1],
            height=size[0],
            width=size[1],
            decoder=decoder if rank() == 0 else None,
            seed=number,
            cache=config.cache,
            sampler=config.sampler,
            attention=networks.attention,
            dtype=networks.dtype,
            device=embeds.device,
        )
        images = [stream.step().images for _ in range(chunks)]
        if rank() == 0:
            video = torch.cat([part[0] for part in images if part is not None])
            _write(folder / names[number], video.cpu(), prompt)
            for name, value in measure(video, len(video) // 2).items():
                totals[name] = totals.get(name, 0.0) + value / len(prompts)
    return {f"validation/{name}": value for name, value in totals.items()}


def _write(path: Path, video: Tensor, prompt: str) -> None:
    form = VideoFormat(width=video.shape[-1], height=video.shape[-2])
    with VideoWriter(path, form, {"title": prompt}) as writer:
        writer.write(to_uint8(video))
