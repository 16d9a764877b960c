# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The EMA-Sink's step, in place: keys and values of all layers in one launch.

One program a token and layer. Arguments `x_n`, `x_b`, `x_l` are strides over layers, batch and
tokens, in elements.

Letters as in the package.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_norms import launch_options


def update_sink(
    sinks_NBSHD: tuple[Tensor, Tensor],
    evicted_NBSHD: tuple[Tensor, Tensor],
    decay: float,
    exact_2NBSHD: Tensor | None = None,
) -> None:
    """As `reference.update_sink`, bit for bit."""
    k_sink = sinks_NBSHD[0]
    layers, batch, tokens, heads, head_dim = k_sink.shape
    channels = heads * head_dim
    block = triton.next_power_of_2(channels)
    # One that is not given is never read.
    exact_k, exact_v = sinks_NBSHD if exact_2NBSHD is None else exact_2NBSHD
    pairs = sinks_NBSHD, evicted_NBSHD, (exact_k, exact_v)
    strides = [stride for pair in pairs for stride in _shared_strides(pair)]
    with torch.cuda.device_of(k_sink):
        _update_sink[(tokens, batch, layers)](
            *(*sinks_NBSHD, *evicted_NBSHD, exact_k, exact_v, *strides, decay, 1 - decay),
            C=channels,
            BLOCK=block,
            EXACT=exact_2NBSHD is not None,
            **launch_options(block),
        )


def _shared_strides(pair_NBSHD: tuple[Tensor, Tensor]) -> tuple[int, ...]:
    k, v = pair_NBSHD
    assert k.shape == v.shape and k.stride() == v.stride(), "keys and values lie alike"
    assert k.stride(4) == 1 and k.stride(3) == k.shape[4], "heads lie together"
    return k.stride()[:3]


@triton.jit
def _update_sink_row(
    sink_ptr,
    evicted_ptr,
    exact_ptr,
    kept,
    taken,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    average_ptr = exact_ptr if EXACT else sink_ptr
    dtype = average_ptr.dtype.element_ty
    old = tl.load(average_ptr + channel, mask=inside, other=0.0).to(tl.float32) * kept
    new = tl.load(evicted_ptr + channel, mask=inside, other=0.0).to(tl.float32) * taken
    average = (old.to(dtype).to(tl.float32) + new.to(dtype).to(tl.float32)).to(dtype)
    if EXACT:
        tl.store(exact_ptr + channel, average, mask=inside)
    tl.store(sink_ptr + channel, average.to(sink_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _update_sink(
    k_sink_ptr,
    v_sink_ptr,
    k_evicted_ptr,
    v_evicted_ptr,
    k_exact_ptr,
    v_exact_ptr,
    sink_n,
    sink_b,
    sink_l,
    evicted_n,
    evicted_b,
    evicted_l,
    exact_n,
    exact_b,
    exact_l,
    kept,
    taken,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    layer = tl.program_id(2).to(tl.int64)
    sink = layer * sink_n + batch * sink_b + token * sink_l
    evicted = layer * evicted_n + batch * evicted_b + token * evicted_l
    exact = layer * exact_n + batch * exact_b + token * exact_l
    k_at, v_at = k_sink_ptr + sink, v_sink_ptr + sink
    k_from, v_from = k_evicted_ptr + evicted, v_evicted_ptr + evicted
    _update_sink_row(k_at, k_from, k_exact_ptr + exact, kept, taken, C, BLOCK, EXACT)
    _update_sink_row(v_at, v_from, v_exact_ptr + exact, kept, taken, C, BLOCK, EXACT)
