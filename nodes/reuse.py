"""What earlier runs have made that a new one may begin with.

A run keeps the latents of its chunks, also of one that was stopped. A later run that differs from
some chunk on, by a prompt or by its length, is given those before it: one pass in place of all
(`Stream.replay`), to the same bits. Their images are in the earlier run's file, if that is still
there. All of it lies in RAM, as much as the node allows; keeping it costs a run nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..rf_core.decoders.decoder import DecoderState
from ..rf_core.prompts import ResolvedEntry
from ..rf_core.state import Snapshot
from . import host
from .join import VIDEO

_LARGE, _SAMPLE = 1 << 26, 1 << 20  # bytes: of tensors above, so many at both ends are hashed


@dataclass(frozen=True, kw_only=True)
class DecoderTail:
    """What spares a run that goes on after all of another's chunks to decode some again."""

    decoder: DecoderState
    """On the CPU."""
    images: tuple[Tensor, ...]
    """The last ones [T, 3, H, W], by chunk."""
    keep_images: int
    """As many as were asked for; -1 is all."""

    @property
    def nbytes(self) -> int:
        """RAM that it takes."""
        return self.decoder.nbytes + sum(each.nbytes for each in self.images)

    def serves(self, keep_images: int) -> bool:
        """Whether there are images enough for another run."""
        return self.keep_images < 0 or 0 <= keep_images <= self.keep_images


@dataclass(frozen=True, kw_only=True)
class RunKey:
    """What the chunks of a run hang on; looked at once, as a state may be large."""

    key: tuple[Any, ...]
    """All of it but the prompts."""
    prompts: tuple[tuple[int, str, str], ...]
    """Each prompt's chunk, how it is gone over to, and its digest."""


@dataclass(frozen=True, kw_only=True)
class CachedRun:
    """The chunks of a run, from its beginning on."""

    run_key: RunKey
    latents: tuple[Tensor, ...]
    """Clean latents [1, C, F, h, w] of each chunk, on the CPU."""
    video: Path | None
    """A file that begins with their images."""
    run: str
    """Which run made that file; another may take its place under the same name."""
    tail: DecoderTail | None
    """None where there was no room for it."""

    def shared(self, run_key: RunKey) -> int:
        """How many of the chunks another run would make just so."""
        mine = self.run_key
        if mine.key != run_key.key:
            return 0
        pairs = zip((*mine.prompts, None), (*run_key.prompts, None), strict=False)
        parted = next((pair for pair in pairs if pair[0] != pair[1]), (None, None))
        chunks = [prompt[0] for prompt in parted if prompt is not None]
        return min([*chunks, len(self.latents)])


_cached: deque[CachedRun] = deque()  # newest first; shared by all runs of the process


def run_key_of(request: Any, prompts: tuple[ResolvedEntry, ...]) -> RunKey | None:
    """What a run's chunks hang on; None where nothing is to be kept or taken."""
    if not request.reuse_bytes:
        return None
    try:
        return RunKey(key=key_of(request), prompts=_prompt_digests(request, prompts))
    except Exception as error:
        host.log(f"no earlier run is gone on from, and this one is not kept: {error}")
        return None


def key_of(request: Any) -> tuple[Any, ...]:
    """Everything that the chunks of a run hang on, but the prompts."""
    return (
        host.identity(request.model),
        request.decoder and host.identity(request.decoder.vae.patcher),
        request.seed,
        (request.width, request.height),
        request.sampler,
        request.cache,
        None if request.snapshot is None else _state_digest(request.snapshot),
        None if request.start_latents is None else _digest(request.start_latents),
        request.source and request.source.key,
        request.previous and (request.previous.run, request.previous.num_images),
    )


def find(run_key: RunKey | None) -> tuple[CachedRun | None, int]:
    """What has most chunks that a run would make again, and how many these are."""
    if run_key is None:
        return None, 0
    shared = [(each.shared(run_key), each) for each in _cached]
    count, best = max(shared, key=lambda pair: pair[0], default=(0, None))
    return (best, count) if count else (None, 0)


def store(run_key: RunKey | None, request: Any, result: Any) -> bool:
    """Keep what a run has made; whether a later run can go on from all of it."""
    if run_key is None or not result.history:
        return False
    try:
        _store(run_key, request, result)
    except Exception as error:  # memory that ran out, or the like
        host.log(f"what was made is not kept for a later run to go on from: {error}")
        return False
    return len(result.history) == result.chunks


def _store(run_key: RunKey, request: Any, result: Any) -> None:
    if any(each.shared(run_key) >= len(result.history) for each in _cached):
        return
    new = CachedRun(
        run_key=run_key,
        latents=tuple(result.history),
        video=request.path,
        run=result.run,
        tail=_tail(request, result),
    )
    for old in [each for each in _cached if new.shared(each.run_key) == len(each.latents)]:
        _cached.remove(old)
    _cached.appendleft(new)
    while num_bytes() > request.reuse_bytes and len(_cached) > 1:
        _cached.pop()


def num_bytes() -> int:
    """RAM that all of it takes; chunks that several runs share count once."""
    latents = {id(each): each.nbytes for cached in _cached for each in cached.latents}
    return sum(latents.values()) + sum(cached.tail.nbytes for cached in _cached if cached.tail)


def _tail(request: Any, result: Any) -> DecoderTail | None:
    decoder, history = result.decoder, sum(each.nbytes for each in result.history)
    if decoder is None or decoder.spent or len(result.history) < result.chunks:
        return None
    size = decoder.nbytes + sum(each.nbytes for each in result.images)
    if history + size > request.reuse_bytes:
        return None
    copy = decoder.to("cpu")
    return DecoderTail(decoder=copy, images=tuple(result.images), keep_images=request.keep_images)


def clear() -> None:
    """Let go of everything."""
    _cached.clear()


def _prompt_digests(
    request: Any, prompts: tuple[ResolvedEntry, ...]
) -> tuple[tuple[int, str, str], ...]:
    embeds = request.prompts.embeds
    return tuple((each.chunk, str(each.switch), _digest(embeds[each.text])) for each in prompts)


def _state_digest(snapshot: Snapshot) -> str:
    facts = {name: fact for name, fact in snapshot.facts.items() if name != VIDEO}
    digest = hashlib.blake2b(json.dumps(facts, default=str, sort_keys=True).encode())
    for name, tensor in sorted(snapshot.tensors.items()):
        digest.update(f"{name} {_digest(tensor)}".encode())
    return digest.hexdigest()


def _digest(tensor: Tensor) -> str:
    """A hash of a tensor; of a large one its ends alone, which differ where it does."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    parts = [flat] if len(flat) <= _LARGE else [flat[:_SAMPLE], flat[-_SAMPLE:]]
    digest = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=16)
    for part in parts:
        digest.update(part.numpy().data)
    return digest.hexdigest()
