"""What the averaged student makes of a few prompts: videos to look at, and their measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rf_core.decoders.decoder import Decoder
from rf_core.stream import Stream
from rf_core.video import VideoFormat, VideoWriter, to_uint8

from ..measures.metrics import measure
from ..objective.redmd import Networks, ReDMDConfig
from ..run.distributed import rank


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

    Every process streams along, as sharded networks need; the first one decodes and writes.
    `size` is the picture's, in pixels.
    """
    totals: dict[str, float] = {}
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
            _write(folder / f"{number:02}.mp4", video.cpu(), prompt)
            for name, value in measure(video, len(video) // 2).items():
                totals[name] = totals.get(name, 0.0) + value / len(prompts)
    return {f"validation/{name}": value for name, value in totals.items()}


def _write(path: Path, video: Tensor, prompt: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    form = VideoFormat(width=video.shape[-1], height=video.shape[-2])
    with VideoWriter(path, form, {"title": prompt}) as writer:
        writer.write(to_uint8(video))
