"""Every attention backend at the shapes a stream has: how fast, and how far from float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ....attention import BACKENDS, available_backends
from ....config import CacheConfig, Grid, ModelConfig
from ....fast.dispatch import LIMIT, choose_attention, measure
from ....stream import latent_size
from ...counts import attention_work
from ...stopwatch import captured, seconds_of
from ...workload import RANDOM_SIZES
from ..plan import Setting
from ..record import Record
from . import workload

# Around the 36.56 tiles of 128 rows that a chunk of 480x832 is: if 4680 rows take as long as 5632,
# a wave of processors is all but empty, and the split of attention's tail pays.
_TILE_ROWS = 128
_TILES = (33, 44)


def run(record: Record, setting: Setting) -> None:
    """The shapes of a full window first, as they matter most."""
    fields = workload(setting)
    model, cache, device = RANDOM_SIZES[setting.size], CacheConfig(), fields["device"]
    dtype = fields["dtype"]
    grid = Grid.of_latents(
        *latent_size(fields["height"], fields["width"], model.patch_size), model.patch_size
    )
    for queries, keys in _shapes(model, cache, grid):
        for name in available_backends():
            q, k = ((1, n, model.num_heads, model.head_dim) for n in (queries, keys))
            found = measure(name, BACKENDS[name], q, k, dtype, device)
            row: dict[str, Any] = {"queries": queries, "keys": keys, "backend": name}
            row |= vars(found)
            if found.seconds is not None:
                row["captured_seconds"] = _captured_seconds(name, q, k, dtype, device)
                work = attention_work(model.dim, queries, keys)
                row["tflops"] = work.flops / row["captured_seconds"] / 1e12
            record.append("rows", row)
    choice = choose_attention("auto", model, cache, grid, batch=1, dtype=dtype, device=device)
    record.note("chosen", {"name": choice.name, "text": str(choice)})
    record.say(f"chosen: {choice}")
    if (error := choice.errors.get(choice.name)) is not None:
        record.check(f"{choice.name} against float32", error, LIMIT)


def _shapes(model: ModelConfig, cache: CacheConfig, grid: Grid) -> Iterator[tuple[int, int]]:
    chunk, window = (n * grid.frame_tokens for n in (cache.chunk_frames, cache.window_frames))
    yield chunk, window
    yield chunk, model.text_len
    yield from ((chunk, keys) for keys in range(chunk, window, chunk))
    if chunk > _TILE_ROWS * _TILES[0]:
        yield from ((_TILE_ROWS * tiles, window) for tiles in _TILES)


def _captured_seconds(
    name: str,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
) -> float:
    q, k, v = (torch.randn(shape, device=device).to(dtype) for shape in (queries, keys, keys))
    with torch.no_grad():
        return seconds_of(captured(lambda: BACKENDS[name](q, k, v), device), device)
