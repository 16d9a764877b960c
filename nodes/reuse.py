"""What earlier runs have made that a new one may begin with.

A run leaves an exact snapshot where each prompt ends, at its own end, and where it is stopped. A
later run whose chunks up to there would be the same (model, seed, size, prompts, everything) goes
on from it: changing the end of a timeline, or its length, or Cancel, does not make the beginning
again. Snapshots lie in ComfyUI's temporary folder, the newest few of them. All of it is a favour:
what fails here costs no run.
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
from .join import VIDEO, made_by

MOST_BYTES = 8 << 30
"""Disk that kept snapshots may take; the newest is always kept."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The state of a run after some of its chunks."""

    key: str
    """Of everything those chunks hang on."""
    chunks: int
    """Chunks made, counted from where the run began."""
    begun: bool
    """Whether the run had begun the next chunk: the key then holds that one's prompt, too."""
    path: Path
    """The exact snapshot."""
    video: Path | None
    """A file that begins with their images."""
    run: str
    """Which run made that file; another may take its place under the same name."""
    num_images: int
    latents: tuple[Tensor, ...]
    images: tuple[Tensor, ...]
    keep: tuple[int, int]
    """How many images and latent frames the run kept; -1 is all."""


_kept: deque[Kept] = deque()  # newest first; shared by all runs of the process


def key_of(request: Any, prompts: tuple[ResolvedEntry, ...], chunks: int, begun: bool) -> str:
    """Names everything the first `chunks` of a run hang on, and with `begun` the next one."""
    digest = hashlib.blake2b(digest_size=16)
    seen = [prompt for prompt in prompts if prompt.chunk < chunks + begun]
    facts = {
        "chunks": chunks,
        "model": host.identity(request.model),
        "decoder": request.decoder and host.identity(request.decoder.vae.patcher),
        "seed": request.seed,
        "size": (request.width, request.height),
        "sampler": asdict(request.sampler),
        "cache": asdict(request.cache),
        "prompts": [(prompt.chunk, str(prompt.switch)) for prompt in seen],
        "from": request.snapshot and {**request.snapshot.facts, VIDEO: None},
        "head": request.head and (request.head.run, request.head.num_images),
    }
    digest.update(json.dumps(facts, default=str).encode())
    tensors: list[Tensor | None] = [request.prompts.embeds[prompt.text] for prompt in seen]
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
        if longer and each.key == key_of(request, prompts, each.chunks, each.begun):
            found = each if _serves(each, request) else found
    return found


def _serves(kept: Kept, request: Any) -> bool:
    enough = all(
        have < 0 or 0 <= want <= have for have, want in zip(kept.keep, _keeps(request), strict=True)
    )
    return enough and kept.path.exists() and (kept.video is None or made_by(kept.run, kept.video))


def keep(
    request: Any, prompts: tuple[ResolvedEntry, ...], stream: Stream, made: Any, begun: bool = False
) -> bool:
    """Keep where a run stands, all its images handed on; whether a later run can go on from there.

    `begun` says that the next chunk was begun, and stopped.
    """
    if not made.chunks or stream.state.num_chunks != made.before + made.chunks:
        return False  # the stream is further than the file
    keys = [key_of(request, prompts, made.chunks, each) for each in (False, begun)]
    if any(each.key in keys and _serves(each, request) for each in _kept):
        return True
    try:
        with host.held_interrupt():
            _keep(request, keys[-1], begun, stream, made)
    except Exception as error:  # a full disk, or memory that ran out
        host.log(f"what was made is not kept for a later run to go on from: {error}")
        return False
    return True


def _keep(request: Any, key: str, begun: bool, stream: Stream, made: Any) -> None:
    path = host.temp_folder("reward_forcing") / f"{key}.safetensors"
    forget(key)
    stream.snapshot().save(path)
    _kept.appendleft(
        Kept(
            key=key,
            chunks=made.chunks,
            begun=begun,
            path=path,
            video=request.path,
            run=made.run,
            num_images=made.num_images,
            latents=tuple(made.latents),
            images=tuple(made.images),
            keep=_keeps(request),
        )
    )
    _forget_oldest()


def resume(
    request: Any, kept: Kept, stream: Stream, made: Any, metadata: dict[str, str]
) -> VideoWriter | None:
    """Set a run to where an earlier one stood; returns the writer of its file."""
    stream.restore(Snapshot.load(kept.path))
    writer = None
    if kept.video is not None:
        writer = continued(request, kept.video, kept.num_images, metadata)
    made.latents.extend(kept.latents)
    made.images.extend(kept.images)
    made.num_images = kept.num_images
    made.chunks = made.reused = kept.chunks
    return writer


def continued(request: Any, video: Path, num_images: int, metadata: dict[str, str]) -> VideoWriter:
    """The writer of a run's file, which begins with the first images of another."""
    shutil.copyfile(video, request.path)
    format = VideoFormat(width=request.width, height=request.height)
    return VideoWriter.resume(request.path, num_images, format, metadata)


def forget(key: str) -> None:
    """Let go of what is kept under a key."""
    for each in [each for each in _kept if each.key == key]:
        _kept.remove(each)
        each.path.unlink(missing_ok=True)


def _keeps(request: Any) -> tuple[int, int]:
    return request.keep_images, request.keep_latents


def _forget_oldest() -> None:
    total = 0
    for number, each in enumerate(list(_kept)):
        size = each.path.stat().st_size if each.path.exists() else 0
        total += size
        if not size or (number and total > MOST_BYTES):
            forget(each.key)
