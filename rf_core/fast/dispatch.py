"""Which attention is fastest here: a short measurement at load, at the shapes a stream has.

PyTorch's own choice is no reference: on some cards it is the very kernel to be checked. So each
backend is compared with `reference_attention`, for some of the queries.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..attention import BACKENDS, EXACT, PLAIN, Attention, available_backends
from ..config import CacheConfig, Grid, ModelConfig
from .stopwatch import seconds_of

logger = logging.getLogger(__name__)

TOLERANCE = 1e-2
"""Relative error that is rounding still. Half precision makes 0.2 to 0.3 % of unit normals; one key
of 4680 that is left out makes 1.5 %."""
ROWS = 256  # queries that are checked


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The attention a stream is to use."""

    name: str
    """Of a backend."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What one layer's self-attention over a full window took with each backend that is right."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Their relative errors, each in its worst head and at the worst of a stream's shapes."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Why each of the others is not used."""

    @property
    def is_measured(self) -> bool:
        """Whether there is more to tell than a name."""
        return bool(self.seconds or self.left_out)

    def plain(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {n: dict(x) if isinstance(x, Mapping) else x for n, x in vars(self).items()}

    def __str__(self) -> str:
        notes = []
        if self.name in self.errors:
            notes.append(f"error {_percent(self.errors[self.name])}")
        if self.seconds:
            times = sorted(self.seconds.items(), key=lambda item: item[1])
            notes.append("ms a layer: " + ", ".join(f"{name} {1e3 * s:.2f}" for name, s in times))
        if self.left_out:
            reasons = (f"{name} {reason}" for name, reason in self.left_out.items())
            notes.append("left out: " + ", ".join(reasons))
        return f"attention {self.name}" + (f" ({'; '.join(notes)})" if notes else "")


@dataclass(frozen=True)
class Measured:
    """What one attention does at one shape."""

    seconds: float | None
    """The least that a call took."""
    error: float | None
    """The relative norm of what differs from attention written out, in the worst head."""
    problem: str | None
    """Why there is no error: it did not run, or its result is none."""


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

    Only on CUDA is there a choice. What is asked for by name is measured, and used in any case.
    """
    if torch.device(device).type != "cuda" or dtype == torch.float32:
        return Choice(name="sdpa" if name == "auto" else name)
    queries, *keys = stream_shapes(model, cache, grid, batch)
    if name != "auto":
        asked = _measured({name: BACKENDS[name]}, queries, keys, dtype, device)
        return _choice(name, asked, {n: m.problem for n, m in asked.items() if m.problem})
    candidates = {n: BACKENDS[n] for n in EXACT if n in available_backends()}
    return fastest(candidates, queries, keys, dtype, device)


def stream_shapes(
    model: ModelConfig, cache: CacheConfig, grid: Grid, batch: int
) -> tuple[tuple[int, ...], ...]:
    """A chunk's queries [B, L, H, D]; then all keys they meet [B, S, H, D], a full window's last.

    The first keys are a prompt's; the next ones a growing window's.
    """
    growing = range(cache.chunk_frames, cache.window_frames, cache.chunk_frames)
    frames = (cache.chunk_frames, *growing, cache.window_frames)
    chunk, *windows = (n * grid.frame_tokens for n in frames)
    tokens = (chunk, model.text_len, *windows)
    return tuple((batch, n, model.num_heads, model.head_dim) for n in tokens)


@torch.no_grad()
def fastest(
    candidates: Mapping[str, Attention],
    queries: tuple[int, ...],
    keys: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    device: str | torch.device,
) -> Choice:
    """The fastest candidate for queries [B, L, H, D] at the last of the keys [B, S, H, D].

    One that does not run, or is wrong, at any of the keys is left out. Where none is left it is
    PyTorch's plain mathematics, with a warning.
    """
    every = _measured(candidates, queries, keys, dtype, device)
    left_out = {name: why for name, m in every.items() if (why := _objection(m)) is not None}
    right = {name: m for name, m in every.items() if name not in left_out}
    if not right:
        reasons = ", ".join(map(" ".join, left_out.items()))
        logger.warning("attention is plain mathematics, which is slow and large: %s", reasons)
    name = min(right, key=lambda name: right[name].seconds or 0.0, default=PLAIN)
    return _choice(name, right, left_out)


@torch.no_grad()
def measure(
    name: str,
    attention: Attention,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    dtype: torch.dtype,
    device: str | torch.device,
) -> Measured:
    """What the attention called `name` does with queries [B, L, H, D] and keys [B, S, H, D]."""
    return _Case.of(queries, keys, dtype, device).measured(name, attention)


def sampled_rows(num_queries: int) -> Tensor:
    """Which queries are checked: the first and the last, where tiles end, and some in between."""
    edge = min(ROWS // 4, num_queries)
    between = torch.linspace(0, num_queries - 1, ROWS - 2 * edge).long()
    last = torch.arange(num_queries - edge, num_queries)
    return torch.cat((torch.arange(edge), between, last)).unique()


def reference_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    """Attention as it is defined, head by head, in float64, which no setting rounds."""
    heads = zip(*(x.unbind(2) for x in (q_BLHD, k_BSHD, v_BSHD)), strict=True)
    return torch.stack([_of_a_head(*(x.double() for x in head)) for head in heads], dim=2)


def _of_a_head(q_BLD: Tensor, k_BSD: Tensor, v_BSD: Tensor) -> Tensor:
    return torch.softmax(q_BLD @ k_BSD.mT / q_BLD.shape[-1] ** 0.5, dim=-1) @ v_BSD


@dataclass(frozen=True)
class _Case:
    """Queries, keys and values, and what comes of some of the queries."""

    q_BLHD: Tensor
    k_BSHD: Tensor
    v_BSHD: Tensor
    rows_R: Tensor
    expected_BRHD: Tensor

    @classmethod
    def of(
        cls,
        queries: tuple[int, ...],
        keys: tuple[int, ...],
        dtype: torch.dtype,
        device: str | torch.device,
    ) -> _Case:
        generator = torch.Generator(device).manual_seed(0)
        q, k, v = (
            torch.randn(shape, generator=generator, dtype=dtype, device=device)
            for shape in (queries, keys, keys)
        )
        rows = sampled_rows(queries[1]).to(device)
        return cls(q, k, v, rows, reference_attention(q[:, rows], k, v))

    def measured(self, name: str, attention: Attention) -> Measured:
        def call() -> Tensor:
            return attention(self.q_BLHD, self.k_BSHD, self.v_BSHD)

        try:
            found = call()
            if found.shape != self.q_BLHD.shape or not found.isfinite().all():
                return Measured(None, None, "is not finite")
            return Measured(seconds_of(call, found.device), self._error_of(found), None)
        except Exception as error:  # no kernel for this card or shape, a package for other torch
            logger.info("attention %s does not run here: %s", name, error)
            return Measured(None, None, f"did not run: {_first_line(error)}")

    def _error_of(self, found_BLHD: Tensor) -> float:
        difference = found_BLHD[:, self.rows_R].double() - self.expected_BRHD
        wrong, whole = (x.norm(dim=(1, 3)) for x in (difference, self.expected_BRHD))
        return float((wrong / whole).max())


def _measured(
    candidates: Mapping[str, Attention],
    queries: tuple[int, ...],
    keys: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    device: str | torch.device,
) -> dict[str, Measured]:
    """Seconds at the last of the keys; the largest error and the first problem at any of them."""
    found: dict[str, list[Measured]] = {name: [] for name in candidates}
    for shape in keys:
        case = _Case.of(queries, shape, dtype, device)
        for name, attention in candidates.items():
            found[name].append(case.measured(name, attention))
    return {name: _worst(each) for name, each in found.items()}


def _worst(each: Sequence[Measured]) -> Measured:
    errors = [m.error for m in each if m.error is not None]
    problem = next((m.problem for m in each if m.problem is not None), None)
    return Measured(each[-1].seconds, max(errors, default=None), problem)


def _objection(measured: Measured) -> str | None:
    if measured.problem is not None:
        return measured.problem.partition(":")[0]
    assert measured.error is not None
    return None if measured.error <= TOLERANCE else f"is wrong by {_percent(measured.error)}"


def _choice(name: str, used: Mapping[str, Measured], left_out: Mapping[str, str]) -> Choice:
    seconds = {name: m.seconds for name, m in used.items() if m.seconds is not None}
    errors = {name: m.error for name, m in used.items() if m.error is not None}
    return Choice(
        name=name,
        seconds=MappingProxyType(seconds),
        errors=MappingProxyType(errors),
        left_out=MappingProxyType(dict(left_out)),
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:100]
