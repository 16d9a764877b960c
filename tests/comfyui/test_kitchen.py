"""Steps by comfy-kitchen, which ComfyUI brings: here its own definitions of them, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import tiny
import torch
from torch import Tensor

from rf_core import kernels
from rf_core.config import Grid
from rf_core.kernels import availability, kitchen, reference
from rf_core.rope import Rope, rope_table

T = TypeVar("T")
BATCH, FRAMES, TOKENS, HEADS, HEAD_DIM, EPS = 2, 3, 6, 2, 12, 1e-6


@pytest.fixture(autouse=True)
def standing_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a card without Triton."""
    rope_table.cache_clear()
    monkeypatch.setattr(availability, "kitchen_runs_on", lambda device: True)
    yield
    rope_table.cache_clear()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def table() -> Rope:
    grid = Grid(height=1, width=TOKENS // FRAMES)
    return rope_table(2 * FRAMES, grid, HEAD_DIM).tokens(TOKENS, 2 * TOKENS)


def by_kitchen(monkeypatch: pytest.MonkeyPatch, run: Callable[[], T]) -> tuple[T, T]:
    """What `run` gives in float32 by comfy-kitchen, and by torch."""
    made = []
    for stands_in in (True, False):
        monkeypatch.setattr(reference, "in_kitchen", lambda x, answer=stands_in: answer)
        made.append(run())
    return made[0], made[1]


@torch.no_grad()
def test_a_norm_after_a_residual_is_the_reference_s(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (random(BATCH, TOKENS, HEADS * HEAD_DIM, seed=seed) for seed in (0, 1))
    shift, scale, gate = random(BATCH, FRAMES, 6, HEADS * HEAD_DIM).split(1, dim=2)[:3]
    for gated in (gate, None):
        given = (x, y, gated, shift, scale, EPS)
        ours, wanted = by_kitchen(
            monkeypatch, lambda given=given: kernels.modulated_after_residual(*given)
        )
        torch.testing.assert_close(ours, wanted)


@torch.no_grad()
def test_queries_keys_and_context_are_rotated_as_the_reference_rotates_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, weight = random(BATCH, TOKENS, HEADS * HEAD_DIM), random(HEADS * HEAD_DIM, seed=1)
    for rope in (table(), None):
        given = (x, weight, HEADS, EPS, rope)
        ours, wanted = by_kitchen(monkeypatch, lambda given=given: kernels.norm_rotate(*given))
        torch.testing.assert_close(ours, wanted)

    def written() -> list[Tensor]:
        slots = [torch.zeros(BATCH, TOKENS, HEADS, HEAD_DIM) for _ in range(3)]
        kernels.write_keys_values(x, x + 1, weight, EPS, table(), *slots)
        context = torch.zeros(2, BATCH, TOKENS - 2, HEADS, HEAD_DIM)
        kernels.rotate_context(random(*context.shape), table(), context)
        return [*slots, context]

    torch.testing.assert_close(*by_kitchen(monkeypatch, written))


def test_a_stream_in_half_precision_goes_through_it_and_stays_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = {"adaln": 0, "apply_rope1": 0}

    def counted(name: str, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*given: Tensor) -> Tensor:
            calls[name] += 1
            return op(*given)

        return run

    for name in calls:
        monkeypatch.setattr(kitchen, name, counted(name, getattr(kitchen, name)))

    def latents() -> Tensor:
        stream = tiny.stream(model=tiny.model().bfloat16(), cache=tiny.window(6, 3))
        return torch.cat([stream.generate() for _ in range(4)], dim=2)

    here = latents()
    assert all(calls.values())
    before = dict(calls)
    monkeypatch.setattr(availability, "kitchen_runs_on", lambda device: False)
    plain = latents()
    assert calls == before
    assert (here - plain).norm() < 0.02 * plain.norm()
