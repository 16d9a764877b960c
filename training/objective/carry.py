"""Rollouts that go on in a later update: a rollout's state, sample by sample, on the host.

Each sample is apart, so that a checkpoint can be resumed on any number of processes and with other
micro-batches. The cache is kept to the bit, and not made anew of the latents: what it holds was
written by weights that have changed since.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rf_core.kv_cache import samples_first

from .rollout import RolloutState

CarriedSample = Mapping[str, Tensor]
"""One sample's part of a state: the cache's tensors without their batch axis, `counts`,
`last_latents` [C, F, h, w]."""
_COUNTS, _LATENTS = "counts", "last_latents"


def to_samples(state: RolloutState) -> list[CarriedSample]:
    """Each sample's part of a state between two windows, copied to the host."""
    counts = torch.tensor(state.cache.counts())
    each = {name: samples_first(tensor) for name, tensor in state.cache.tensors().items()}
    each[_LATENTS] = state.last_latents
    return [
        {_COUNTS: counts, **{name: tensor[b].to("cpu", copy=True) for name, tensor in each.items()}}
        for b in range(len(state.last_latents))
    ]


def restore_samples(state: RolloutState, samples: Sequence[CarriedSample]) -> None:
    """Fill an empty state of as many samples; ValueError where they do not fit it."""
    if missing := {_COUNTS, _LATENTS} - samples[0].keys():
        raise ValueError(f"a rollout that goes on lacks {', '.join(sorted(missing))}")
    kinds = [{name: (t.dtype, t.shape) for name, t in each.items()} for each in samples]
    odd = next((name for name in kinds[0] if any(k.get(name) != kinds[0][name] for k in kinds)), "")
    if odd:
        raise ValueError(f"rollouts that go on hold {odd} of different sizes")
    counts, latents = samples[0][_COUNTS].tolist(), [each[_LATENTS] for each in samples]
    tensors = {
        name: torch.stack([each[name] for each in samples], dim=max(0, samples[0][name].ndim - 3))
        for name in samples[0].keys() - {_COUNTS, _LATENTS}
    }
    state.cache.check(tensors, 0)
    _check(state, counts, latents)
    state.cache.load(tensors, counts)
    state.last_latents = torch.stack(latents).to(state.last_latents)


def _check(state: RolloutState, counts: list[int], latents: Sequence[Tensor]) -> None:
    config = state.cache.config
    window, opening = config.window_frames, config.opening_frames
    _, channels, _, *size = state.last_latents.shape
    num_frames, slot, evictions, evicted, gone = counts if _is_counts(counts) else (-1,) * 5
    if config.recache != "chunks" and not gone:  # the opening's may be run again, too
        opening = 0
    if not (0 <= slot <= num_frames <= window and evictions >= 0 and evicted == 0):
        raise ValueError(f"a window of {window} latent frames cannot hold {counts}")
    for each in latents:
        frames = each.shape[1] if each.ndim == 4 else 0
        if each.shape != (channels, frames, *size) or not num_frames - opening <= frames <= window:
            raise ValueError(
                f"the last latents of a rollout that goes on are {list(each.shape)}; "
                f"{num_frames - opening} frames or more of {[channels, *size]} are needed"
            )


def _is_counts(found: object) -> bool:
    return isinstance(found, list) and len(found) == 5 and all(type(n) is int for n in found)
