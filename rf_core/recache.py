"""A recache: what of the window runs again under a new prompt (LongLive, arXiv 2509.22622).

The clean latents after the sink run once more, chunk by chunk; the sink is kept. Streams and the
trainer's rollouts both follow this one rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from .kv_cache import KVCache

CleanPass = Callable[[Tensor], None]
"""A pass over clean latents [B, C, F, h, w] that writes the cache's slot."""
OnPart = Callable[[int], None]
"""Called before each of them with its number; what it raises ends them."""


def recache(
    cache: KVCache, last_latents: Tensor, clean_pass: CleanPass, on_part: OnPart | None = None
) -> None:
    """Write the window after the sink anew, from the clean latents it was made of.

    `last_latents` [B, C, F, h, w] end with the window's last frame and reach back to its sink at
    least. Nothing happens where the sink is all there is.
    """
    counts = cache.num_frames, cache.slot_frames
    again = cache.num_frames - cache.config.sink_frames
    if again <= 0:
        return
    cache.truncate(cache.config.sink_frames)
    parts = chunks_from_end(last_latents[:, :, -again:], cache.config.chunk_frames)
    try:
        rerun(cache, parts, clean_pass, on_part)
    finally:
        cache.num_frames, cache.slot_frames = counts


def rerun(
    cache: KVCache, parts: Iterable[Tensor], clean_pass: CleanPass, on_part: OnPart | None = None
) -> None:
    """Append clean latents [B, C, F, h, w] to the window, a part at a time."""
    for number, part in enumerate(parts):
        if on_part is not None:
            on_part(number)
        cache.advance(part.shape[2])
        clean_pass(part)


def chunks_from_end(latents: Tensor, frames: int) -> list[Tensor]:
    """Latents [B, C, F, h, w] in chunks; the last is whole, the first what the sink left of its."""
    whole, head = divmod(latents.shape[2], frames)
    return list(latents.split([head] * (head > 0) + [frames] * whole, dim=2))
