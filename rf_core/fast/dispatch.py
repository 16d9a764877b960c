"""Which attention is fastest here: a short measurement at load, at the shapes a stream has."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor

from ..attention import BACKENDS, EXACT, Attention, available_backends, sdpa
from ..config import CacheConfig, Grid, ModelConfig
from ..measure.stopwatch import seconds_of

logger = logging.getLogger(__name__)

TOLERANCE = 0.02  # of attention over unit normals in half precision; a wrong result is far outside


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The attention a stream is to use."""

    name: str
    """Of a backend."""
    seconds: Mapping[str, float]
    """What one layer's self-attention took with each backend that ran; none where only one can."""

    def __str__(self) -> str:
        others = (f"{name} {1e3 * s:.2f} ms" for name, s in sorted(self.seconds.items()))
        times = f" ({', '.join(others)} a layer)" if self.seconds else ""
        return f"attention {self.name}{times}"


@lru_cache(maxsize=8)
def choose_attention(
    name: str,
    model: ModelConfig,
    cache: CacheConfig,
    grid: Grid,
    *,
    batch: int,
    dtype: torch.dtype,
    device: str | torch.device,
) -> Choice:
    """The backend called `name`, or of `auto` the fastest that differs by rounding alone.

    Only on CUDA is there a choice; a full window is measured.
    """
    if name != "auto":
        return Choice(name=name, seconds={})
    if torch.device(device).type != "cuda" or dtype == torch.float32:
        return Choice(name="sdpa", seconds={})
    candidates = {n: BACKENDS[n] for n in EXACT if n in available_backends()}
    tokens = (n * grid.frame_tokens for n in (cache.chunk_frames, cache.window_frames))
    queries, keys = ((batch, n, model.num_heads, model.head_dim) for n in tokens)
    return fastest(candidates, queries, keys, dtype, device)


@torch.no_grad()
def fastest(
    candidates: Mapping[str, Attention],
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    dtype: torch.dtype,
    device: str | torch.device,
) -> Choice:
    """The fastest candidate for queries [B, L, H, D] and keys [B, S, H, D]; `sdpa` if none runs.

    One that cannot run here, or whose result is not that of `sdpa`, is left out.
    """
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=dtype, device=device)
        for shape in (queries, keys, keys)
    )
    expected = sdpa(q, k, v)
    seconds = {}
    for name, attention in candidates.items():
        found = _result(name, attention, q, k, v)
        if found is not None and torch.allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE):
            seconds[name] = seconds_of(lambda run=attention: run(q, k, v), device)  # type: ignore[misc]
    name = min(seconds, key=lambda name: seconds[name], default="sdpa")
    return Choice(name=name, seconds=MappingProxyType(seconds))


def _result(name: str, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    try:
        return attention(q, k, v)
    except Exception as error:  # no kernel for this card or shape, a package built for other torch
        logger.info("attention %s does not run here: %s", name, error)
        return None
