"""A recache: what of the window runs again under a new prompt (LongLive, arXiv 2509.22622).

The clean latents after the sink run once more, chunk by chunk; the sink is kept. LongLive's own
form runs them in one pass, and the sink with them while nothing has left the window; a second form
of it runs the whole window, whose first frames are the sink from then on (`CacheConfig.recache`).
Streams and the trainer's rollouts both follow this one rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from .kv_cache import KVCache

CleanPass = Callable[[Tensor], None]
"""A pass over clean latents [B, C, F, h, w] that writes the cache's slot."""
OnPart = Callable[[int], None]
"""Called before each of them with its number; what it raises ends them."""


def begins_at(cache: KVCache) -> int:
    """The latent frame of the window from which on a recache runs it again."""
    kind = cache.config.recache
    whole = kind == "joint_new_sink" or (kind == "joint" and not cache.has_moved)
    return 0 if whole else cache.fixed_frames


def recache(
    cache: KVCache, last_latents: Tensor, clean_pass: CleanPass, on_part: OnPart | None = None
) -> None:
    """Write the window anew, from the clean latents it was made of.

    `last_latents` [B, C, F, h, w] end with the window's last frame and reach back to `begins_at`
    at least. Nothing happens where that is the window's end.
    """
    counts = cache.num_frames, cache.slot_frames
    begin, is_joint = begins_at(cache), cache.config.recache != "chunks"
    if cache.num_frames <= begin:
        return
    latents = last_latents[:, :, begin - cache.num_frames :]
    cache.truncate(begin)
    parts = [latents] if is_joint else chunks_from_end(latents, cache.config.chunk_frames)
    try:
        rerun(cache, parts, clean_pass, on_part)
    finally:
        cache.num_frames, cache.slot_frames = counts
    if is_joint and begin == 0:
        cache.start_anew()


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
