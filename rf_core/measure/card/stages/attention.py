"""Every attention backend at the shapes a stream has: how fast, and how far from float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ....attention import BACKENDS, PLAIN, available_backends
from ....config import CacheConfig, Grid, ModelConfig
from ....fast.dispatch import TOLERANCE, choose_attention, measure, stream_shapes
from ....fast.stopwatch import captured, device_seconds
from ....split_attention import TILE, plan_split, processors_of
from ...counts import attention_work
from ...workload import RANDOM_SIZES
from ..plan import Setting
from ..record import Record
from . import grid_of, workload

Shape = tuple[int, ...]


def run(record: Record, setting: Setting) -> None:
    """The shapes of a full window first, as they matter most."""
    fields = workload(setting)
    model, cache, device = RANDOM_SIZES[setting.size], CacheConfig(), fields["device"]
    dtype = fields["dtype"]
    grid = grid_of(fields)
    for q, k in _shapes(model, cache, grid, device):
        for name in (name for name in available_backends() if name != PLAIN):
            found = measure(name, BACKENDS[name], q, k, dtype, device)
            row: dict[str, Any] = {"queries": q[1], "keys": k[1], "backend": name, **vars(found)}
            if found.seconds is not None:
                row["captured_seconds"] = _captured_seconds(name, q, k, dtype, device)
                work = attention_work(model.dim, q[1], k[1])
                row["tflops"] = work.flops / row["captured_seconds"] / 1e12
            record.append("rows", row)
    choice = choose_attention("auto", model, cache, grid, batch=1, dtype=dtype, device=device)
    record.note("chosen", {"name": choice.name, "text": str(choice)})
    record.say(f"chosen: {choice}")
    if (error := choice.errors.get(choice.name)) is not None:
        record.check(f"{choice.name} against float32", error, TOLERANCE)


def _shapes(
    model: ModelConfig, cache: CacheConfig, grid: Grid, device: str
) -> Iterator[tuple[Shape, Shape]]:
    queries, *keys = stream_shapes(model, cache, grid, batch=1)
    yield from ((queries, k) for k in reversed(keys))
    processors = processors_of(torch.device(device))
    split = plan_split(1, queries[1], model.num_heads, processors)
    if split is not None:
        # As many queries as fill whole waves, before a chunk's and behind: if a chunk's take as
        # long as the latter, its last wave is all but empty, and to split its tail pays.
        more = (split.start // TILE * model.num_heads + processors) // model.num_heads * TILE
        yield from (((1, rows, *queries[2:]), keys[-1]) for rows in (split.start, more))


def _captured_seconds(
    name: str,
    queries: Shape,
    keys: Shape,
    dtype: torch.dtype,
    device: str,
) -> float:
    q, k, v = (torch.randn(shape, device=device).to(dtype) for shape in (queries, keys, keys))
    with torch.no_grad():
        return device_seconds(captured(lambda: BACKENDS[name](q, k, v), device), device)
