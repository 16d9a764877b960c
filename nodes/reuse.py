"""What earlier runs have made that a new one may begin with.

A run leaves an exact snapshot where each prompt ends, and at its own end. A later run whose chunks
up to there would be the same (model, seed, size, prompts, everything) goes on from it: changing the
end of a timeline, or its length, does not make the beginning again. Snapshots lie in ComfyUI's
temporary folder, the newest few of them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..rf_core.prompts import ResolvedEntry
from ..rf_core.state import Snapshot
from ..rf_core.stream import Stream
from ..rf_core.video import VideoFormat, VideoWriter
from . import host

MOST_BYTES = 8 << 30
"""Disk that kept snapshots may take; the newest is always kept."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The state of a run after some of its chunks."""

    key: str
    """Of everything those chunks hang on."""
    chunks: int
    """Chunks made, counted from where the run began."""
    path: Path
    """The exact snapshot."""
    video: Path | None
    """A file that begins with their images."""
    num_images: int
    latents: tuple[Tensor, ...]
    images: tuple[Tensor, ...]
    keep: tuple[int, int]
    """How many images and latent frames the run kept; -1 is all."""


_kept: deque[Kept] = deque()  # newest first; shared by all runs of the process


def key_of(request: Any, prompts: tuple[ResolvedEntry, ...], chunks: int) -> str:
    """Names everything the first `chunks` of a run hang on."""
    digest = hashlib.blake2b(digest_size=16)
    facts = {
        "model": host.identity(request.model),
        "decoder": request.decoder and host.identity(request.decoder.vae.patcher),
        "seed": request.seed,
        "size": (request.width, request.height),
        "sampler": asdict(request.sampler),
        "cache": asdict(request.cache),
        "prompts": [(p.chunk, str(p.switch)) for p in prompts if p.chunk < chunks],
        "from": request.snapshot and request.snapshot.facts,
    }
    digest.update(json.dumps(facts, default=str).encode())
    tensors: list[Tensor | None] = [
        request.prompts.embeds[p.text] for p in prompts if p.chunk < chunks
    ]
    tensors.append(request.start_latents)
    if request.snapshot is not None:
        tensors.append(request.snapshot.tensors.get("last_latents"))
    for tensor in tensors:
        if tensor is not None:
            digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def find(request: Any, prompts: tuple[ResolvedEntry, ...], total: int) -> Kept | None:
    """The longest part of an earlier run that this one would make again."""
    found: Kept | None = None
    for each in _kept:
        longer = each.chunks < total and (found is None or each.chunks > found.chunks)
        enough = all(
            have < 0 or 0 <= want <= have
            for have, want in zip(each.keep, _keeps(request), strict=True)
        )
        there = each.path.exists() and (each.video is None or each.video.exists())
        if longer and enough and there and each.key == key_of(request, prompts, each.chunks):
            found = each
    return found


def keep(
    request: Any, prompts: tuple[ResolvedEntry, ...], chunks: int, stream: Stream, made: Any
) -> None:
    """Keep where a run stands."""
    key = key_of(request, prompts, chunks)
    if any(each.key == key and each.path.exists() for each in _kept):
        return
    path = host.temp_folder("reward_forcing") / f"{key}.safetensors"
    stream.snapshot().save(path)
    _kept.appendleft(
        Kept(
            key=key,
            chunks=chunks,
            path=path,
            video=request.path,
            num_images=made.num_images,
            latents=tuple(made.latents),
            images=tuple(made.images),
            keep=_keeps(request),
        )
    )
    _forget()


def resume(request: Any, kept: Kept, stream: Stream, made: Any) -> VideoWriter | None:
    """Set a run to where an earlier one stood; returns the writer of its file."""
    stream.restore(Snapshot.load(kept.path))
    made.latents.extend(kept.latents)
    made.images.extend(kept.images)
    made.num_images = kept.num_images
    if kept.video is None:
        return None
    shutil.copyfile(kept.video, request.path)
    format = VideoFormat(width=request.width, height=request.height)
    return VideoWriter.resume(request.path, kept.num_images, format)


def _keeps(request: Any) -> tuple[int, int]:
    return request.keep_images, request.keep_latents


def _forget() -> None:
    total = 0
    for number, each in enumerate(list(_kept)):
        size = each.path.stat().st_size if each.path.exists() else 0
        total += size
        if not size or (number and total > MOST_BYTES):
            each.path.unlink(missing_ok=True)
            _kept.remove(each)
