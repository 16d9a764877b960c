"""The linear layers of a block: apart and joined, GELU in the epilogue, and in fp8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .... import kernels
from ....config import CacheConfig, ModelConfig
from ....fast.stopwatch import device_seconds
from ....fp8 import Fp8Linear, reference_product
from ....kernels import reference
from ....kernels.availability import multiplies_fp8
from ...workload import RANDOM_SIZES, WEIGHT_STD
from ..plan import Setting
from ..record import Record
from . import grid_of, off, workload
from .kernels import LIMITS

_CHUNKS_AT_ONCE = (1, 2)


@torch.no_grad()
def run(record: Record, setting: Setting) -> None:
    """Milliseconds and TFLOP/s of each, at the rows of one chunk and of two."""
    fields = workload(setting)
    config = RANDOM_SIZES[setting.size]
    grid = grid_of(fields)
    for chunks in _CHUNKS_AT_ONCE:
        rows = chunks * CacheConfig().chunk_frames * grid.frame_tokens
        x = torch.randn(1, rows, config.dim, device=fields["device"]).to(fields["dtype"])
        _measure(_Timed(record, x), config)


@dataclass(frozen=True)
class _Timed:
    """Notes how long calls on the rows x [1, rows, C] take."""

    record: Record
    x: Tensor

    def __call__(self, what: str, flops: int, call: Callable[[], Any]) -> None:
        seconds = device_seconds(call, self.x.device)
        row = {"what": what, "rows": self.x.shape[1], "seconds": seconds}
        self.record.append("rows", row | {"tflops": flops / seconds / 1e12})

    def check(self, what: str, found: Tensor, wanted: Tensor) -> None:
        where = f"{what}, {self.x.shape[1]} rows"
        self.record.check(where, off(found, wanted), LIMITS[self.x.dtype])


def _measure(timed: _Timed, config: ModelConfig) -> None:
    x, dim, rows = timed.x, config.dim, timed.x.shape[1]
    square, wide = 2 * rows * dim**2, 2 * rows * dim * config.ffn_dim
    qkv = [_linear(dim, dim, x) for _ in range(3)]
    weight, bias = (torch.cat([getattr(f, n) for f in qkv]) for n in ("weight", "bias"))
    timed("q, k, v apart", 3 * square, lambda: [layer(x) for layer in qkv])
    timed("q, k, v joined", 3 * square, lambda: F.linear(x, weight, bias))
    up, down = _linear(dim, config.ffn_dim, x), _linear(config.ffn_dim, dim, x)
    given = (x, up.weight, up.bias)
    timed("up, then GELU", wide, lambda: reference.linear_gelu(*given))
    timed("up, GELU in the epilogue", wide, lambda: kernels.linear_gelu(*given))
    hidden = kernels.linear_gelu(*given)
    timed("down", wide, lambda: down(hidden))
    wanted = reference.linear_gelu(*(tensor.double() for tensor in given))
    timed.check("GELU in the epilogue", hidden, wanted)
    if x.is_cuda and multiplies_fp8(x.device):
        _measure_fp8(timed, qkv, up, square, wide)


def _measure_fp8(
    timed: _Timed, qkv: list[nn.Linear], up: nn.Linear, square: int, wide: int
) -> None:
    x, fast_qkv, fast_up = timed.x, [Fp8Linear(layer) for layer in qkv], Fp8Linear(up)
    timed("q, k, v in fp8", 3 * square, lambda: [layer(x) for layer in fast_qkv])
    timed("up in fp8", wide, lambda: fast_up(x))
    rows, scale = kernels.quantise_rows(x.flatten(0, -2), reference.FP8)
    weights = fast_up.weight, fast_up.weight_scale, fast_up.bias
    wanted = reference_product(rows, scale, *weights, torch.float32)
    timed.check("fp8 product", fast_up(x).flatten(0, -2), wanted)


def _linear(in_dim: int, out_dim: int, like: Tensor) -> nn.Linear:
    layer = nn.Linear(in_dim, out_dim, device=like.device, dtype=like.dtype)
    nn.init.normal_(layer.weight, std=WEIGHT_STD)
    return layer.requires_grad_(False)
