"""Rolling Forcing's sampler (arXiv 2509.25161): several chunks are denoised together.

With S steps, S chunks are in flight, the oldest at its last step and the newest at its first; each
pass takes all of them one step further, so that a chunk is done with every pass but the first ones.
They see each other, the opening (anchor and sink) right before them, and the last clean chunks. The
clean pass of a chunk sees the past without it. So it lies beside what attention sees, which is
`window_frames - opening_frames` in either pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import CacheConfig, SamplerConfig
from .kv_cache import KVCache, LayerWindow
from .rope import apply_rope
from .scheduler import add_noise, flow_to_x0

Draw = Callable[[int, int], Tensor]
"""Noise [B, C, F, h, w] of a chunk by its number: draw 0 begins it, the others go back in."""


def check_rolling(cache: CacheConfig, sampler: SamplerConfig) -> None:
    """ValueError where the chunks in flight are more than attention sees."""
    opening = cache.opening_frames
    flight = opening + len(sampler.steps) * cache.chunk_frames
    seen = cache.window_frames - opening
    if flight > seen:
        raise ValueError(
            f"{len(sampler.steps)} chunks of {cache.chunk_frames} frames are denoised together "
            f"beside a sink of {opening}, and a window_frames of {cache.window_frames} "
            f"leaves {seen} for both; raise it to {flight + opening} or give fewer steps"
        )
    if sampler.first_steps:
        raise ValueError(
            f"first_steps are {sampler.first_steps}; chunks denoised together (rolling) are all at "
            "steps of one schedule: leave them out"
        )
    if cache.memory_rates or cache.rebuild != "never" or cache.first_chunk_frames:
        raise ValueError(
            "chunks denoised together (rolling) go with a sink alone: give no memory_rates, "
            "rebuild or first_chunk_frames"
        )


def roll(
    predict: Callable[[Tensor, tuple[float, ...]], Tensor],
    flight: Sequence[Tensor],
    draw: Draw,
    timesteps: Sequence[float],
    room: Callable[[int], bool],
    on_pass: Callable[[int], None],
    on_prediction: Callable[[int, Tensor], None],
) -> tuple[Tensor, list[Tensor]]:
    """The oldest chunk, clean, and those in flight behind it, each [B, C, F, h, w].

    `predict(x, timesteps)` gives the flow of chunks one behind the other, a timestep each. `room`
    says whether there is to be a chunk of that number, counted from the oldest.
    """
    chunks, last = list(flight), len(timesteps) - 1
    for number, done in enumerate(range(last if chunks else 0, len(timesteps))):
        if room(len(chunks)):
            chunks.append(draw(len(chunks), 0))
        on_pass(number)
        at = tuple(timesteps[done - place] for place in range(len(chunks)))
        x = torch.cat(chunks, dim=2)
        at_BF = _by_frame(x, at)
        clean = flow_to_x0(predict(x, at), x, at_BF).chunk(len(chunks), dim=2)
        on_prediction(number, clean[0])
        for place, x0 in enumerate(clean):
            step = done - place + 1
            chunks[place] = x0
            if step <= last:
                to_BF = _by_frame(x0, (timesteps[step],))
                chunks[place] = add_noise(x0, draw(place, step), to_BF)
    return chunks[0], chunks[1:]


def _by_frame(x: Tensor, timesteps: Sequence[float]) -> Tensor:
    """Each chunk's timestep for its frames, [B, F]."""
    frames = x.shape[2] // len(timesteps)
    each = x.new_tensor(timesteps, dtype=torch.float32).repeat_interleave(frames)
    return each.expand(x.shape[0], -1)


@dataclass(frozen=True)
class JointContext:
    """What chunks in flight see of a cache: its opening, and the last frames before its slot."""

    cache: KVCache
    frames: int
    """In flight."""

    @property
    def context_frames(self) -> int:
        """See `KeyValues`."""
        config = self.cache.config
        room = config.window_frames - config.opening_frames - self.frames
        past = self.cache.context_frames
        return min(room, past) if past else 0

    def layer(self, index: int) -> LayerWindow:
        """See `KeyValues`."""
        return _JointWindow(self, *self.cache.context(index))


class _JointWindow:
    """One layer of it, which is rotated when it is read and never written to."""

    def __init__(self, seen: JointContext, k_BWHD: Tensor, v_BWHD: Tensor) -> None:
        self._seen, self._kept = seen, (k_BWHD, v_BWHD)

    def extend(self, k_BLHD: Tensor, rotated_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor]:
        cache, frames = self._seen.cache, self._seen.context_frames
        opening, tokens = (n * cache.frame_tokens for n in (cache.config.opening_frames, frames))
        if not tokens:
            return rotated_BLHD, v_BLHD
        begin = self._kept[0].shape[1] - (tokens - opening)
        k, v = (torch.cat([kept[:, :opening], kept[:, begin:]], dim=1) for kept in self._kept)
        rotated = apply_rope(k, cache.table.tokens(0, tokens))
        return torch.cat([rotated, rotated_BLHD], dim=1), torch.cat([v, v_BLHD], dim=1)


@dataclass(frozen=True)
class CleanContext:
    """What a clean pass sees of a cache, and writes to: all but the opening, once that is apart."""

    cache: KVCache

    @property
    def context_frames(self) -> int:
        """See `KeyValues`."""
        return self.cache.context_frames

    def layer(self, index: int) -> LayerWindow:
        """See `KeyValues`."""
        config, cache = self.cache.config, self.cache
        beyond = cache.num_frames - (config.window_frames - config.opening_frames)
        return _CleanWindow(cache.layer(index), max(0, beyond) * cache.frame_tokens)


class _CleanWindow:
    def __init__(self, whole: LayerWindow, beyond: int) -> None:
        self._whole, self._beyond = whole, beyond

    def extend(self, k_BLHD: Tensor, rotated_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor]:
        rotated, v = self._whole.extend(k_BLHD, rotated_BLHD, v_BLHD)
        return rotated[:, self._beyond :], v[:, self._beyond :]
