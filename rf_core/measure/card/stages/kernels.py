"""Every fused kernel at the shapes of a stream, against its definition in float64.

Memory that a kernel is to fill holds NaN before, so that what it leaves out is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .... import kernels
from ....config import CacheConfig, Grid, ModelConfig
from ....decoders.vae import VAEConfig
from ....fast.stopwatch import device_seconds
from ....kernels import reference
from ....kernels.availability import multiplies_fp8
from ....kernels.reference import FP8
from ....padding import log_counts
from ....rope import Rope, rope_table
from ...workload import RANDOM_SIZES, prompt_tokens
from ..plan import Setting
from ..record import Record
from . import grid_of, off, workload

# Relative norm: what rounding once gives, twice where a result is made of a stored one.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
# Rounded to bfloat16 first, a number may fall to the next one of fp8.
_FP8_LIMIT = 2e-2
_LAYERS = 4  # of a cache; all thirty would take 10 GB in float64
_VAE_FRAMES = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call of one of `kernels`' functions."""

    name: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    filled: tuple[int, ...] = ()
    """Places of the arguments that it fills."""
    definition: torch.dtype = torch.float64
    """What its definition computes in."""
    limit: float | None = None
    """What the relative norm of its error may be, if not `LIMITS`."""


@torch.no_grad()
def run(record: Record, setting: Setting) -> None:
    """One kernel after another; the table has those that are wrong."""
    fields = workload(setting)
    device, dtype = fields["device"], fields["dtype"]
    for case in cases(setting):
        wanted = _called(reference, case, methodcaller("to", case.definition))
        with _new_memory_is_nan(device):
            found = _called(kernels, case, Tensor.clone)
        error = max(map(off, found, wanted), default=math.inf)
        call = partial(getattr(kernels, case.name), *case.arguments, **case.options)
        seconds = device_seconds(call, device)
        moved = sum(t.nbytes for t in tree_leaves((case.arguments, call())) if _is_tensor(t))
        what = " ".join((case.name, *map(str, case.options)))
        row = {"kernel": what, "error": error, "seconds": seconds, "bytes": moved}
        record.append("rows", row | {"bytes_a_second": moved / seconds})
        record.check(what, error, case.limit or LIMITS[dtype])
        del wanted, found


def cases(setting: Setting) -> Iterator[Case]:
    """Each function once, at the sizes of a full window."""
    fields = workload(setting)
    device, dtype = fields["device"], fields["dtype"]
    model, cache = RANDOM_SIZES[setting.size], CacheConfig()
    draw = _Draws(device, dtype)
    yield from _network_cases(model, cache, grid_of(fields), draw)
    yield from _decoder_cases(fields["height"], fields["width"], draw)


def _network_cases(
    model: ModelConfig, cache: CacheConfig, grid: Grid, draw: _Draws
) -> Iterator[Case]:
    dim, heads, frames = model.dim, model.num_heads, cache.chunk_frames
    tokens, eps = frames * grid.frame_tokens, model.eps
    context = (cache.window_frames - frames) * grid.frame_tokens
    rope = rope_table(cache.window_frames, grid, model.head_dim, draw.device)
    here = rope.tokens(context, context + tokens)
    x, y = draw(1, tokens, dim), draw(1, tokens, dim)
    shift, scale, gate = (draw(1, frames, 1, dim) for _ in range(3))
    weight, bias = draw(dim), draw(dim)
    windows = [draw(_LAYERS, 1, context + tokens, heads, model.head_dim) for _ in range(3)]
    slots = tuple(window[0, :, context:] for window in windows)
    before = tuple(window[:, :, :context] for window in windows)
    sink = cache.sink_frames * grid.frame_tokens
    sinks, leaving = (tuple(w[:, :, a : a + sink] for w in windows[:2]) for a in (0, sink))
    yield Case(name="modulated_norm", arguments=(x, shift, scale, eps))
    yield Case(name="modulated_after_residual", arguments=(x, y, gate, shift, scale, eps))
    yield Case(name="affine_after_residual", arguments=(x, y, gate, weight, bias, eps))
    yield Case(name="norm_rotate", arguments=(x, weight, heads, eps, here))
    keys_values = (x, y, weight, eps, here, *slots)
    yield Case(name="write_keys_values", arguments=keys_values, filled=(5, 6, 7))
    yield Case(name="rotate", arguments=(slots[0], here))
    yield Case(name="rotate_context", arguments=(before[0], rope, before[1]), filled=(2,))
    yield Case(name="update_sink", arguments=(sinks, leaving, cache.decay))
    parts = draw(1, 2, tokens // 8, heads, model.head_dim)
    yield Case(name="merge_parts", arguments=(parts, draw(1, 2, heads, tokens // 8).float()))
    weight_OI = draw(model.ffn_dim, dim) * dim**-0.5
    yield Case(name="linear_gelu", arguments=(x, weight_OI, draw(model.ffn_dim)))
    yield Case(name="quantise_rows", arguments=(x, torch.int8), definition=torch.float32)
    prompt = draw(2, 1, model.text_len, heads, model.head_dim)
    last_B = torch.tensor([prompt_tokens(model)], device=x.device)
    bias_BS = log_counts(last_B, model.text_len, model.text_len)
    queries = x.view(1, tokens, heads, model.head_dim)
    yield Case(name="prompt_attention", arguments=(queries, *prompt, bias_BS))
    if x.is_cuda and multiplies_fp8(x.device):
        rounded: dict[str, Any] = {"definition": torch.float32, "limit": _FP8_LIMIT}
        rows = {"rows": True}
        after = (x, y, gate, shift, scale, eps)
        yield Case(name="modulated_norm", arguments=(x, shift, scale, eps), options=rows, **rounded)
        yield Case(name="modulated_after_residual", arguments=after, options=rows, **rounded)
        hidden = draw(1, tokens, model.ffn_dim)
        gelu = {"after_gelu": True}
        yield Case(name="quantise_rows", arguments=(hidden, FP8), options=gelu, **rounded)


def _decoder_cases(height: int, width: int, draw: _Draws) -> Iterator[Case]:
    channels = VAEConfig().dim if height > 64 else 8
    clip, shortcut = (
        draw(1, channels, _VAE_FRAMES, height, width).contiguous(
            memory_format=torch.channels_last_3d
        )
        for _ in range(2)
    )
    padded = torch.zeros_like(torch.cat([clip[:, :, :2], clip], dim=2))
    gamma, bias = draw(channels, 1, 1, 1), draw(channels)
    normed = (clip, gamma, padded[:, :, 2:], bias, shortcut)
    yield Case(name="causal_norm_silu", arguments=normed, filled=(2,))
    yield Case(name="add_in_place", arguments=(clip, bias, shortcut))


class _Draws:
    """Random tensors, ever the same."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self._dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        made = torch.randn(shape, generator=self._generator, device=self.device)
        return made.to(self._dtype)


def _called(where: Any, case: Case, copy: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What the call returns, and what it has filled or changed, in float64."""

    def own(value: Any) -> Any:
        return copy(value) if _is_tensor(value) else value

    given: list[Any] = [
        argument if isinstance(argument, Rope) else tree_map(own, argument)
        for argument in case.arguments
    ]
    for place in case.filled:
        given[place].fill_(math.nan)
    result = getattr(where, case.name)(*given, **case.options)
    made = result if result is not None else [given[i] for i in case.filled] or given[0]
    found = [leaf.double() for leaf in tree_leaves(made) if _is_tensor(leaf)]
    if "rows" in case.options or case.name == "quantise_rows":
        *rest, values, scale = found
        return [*rest, values * scale]
    return found


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@contextmanager
def _new_memory_is_nan(device: str) -> Iterator[None]:
    """What is allocated inside holds NaN until it is written."""
    if device != "cuda":  # there the definitions run, which allocate by results
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
