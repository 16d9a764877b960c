"""Attention whose last, partial wave of blocks is filled; exact up to rounding.

Kernels give every `TILE` queries of a head to a block, and a card runs as many blocks at a time as
it has processors: a wave. 4680 queries of 12 heads are 444 blocks, on 132 processors 3.36 waves,
which take as long as 4. Here the queries that fill whole waves go first; the rest, the tail,
attends to the keys in parts, all at once, so that its wave is as much shorter. Parts are merged by
the logarithms of their sums of exponentials, as in flash-decoding (Dao et al., 2023).

Letters: B batch, N parts, L queries, S keys, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels

LSEAttention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""An attention that also returns the log of each query's sum of exponentials, [B, H, L]."""

TILE = 128  # queries of a block: FlashAttention's and cuDNN's kernels at 128 channels a head
MIN_KEYS = 2048
"""With fewer keys half a wave is not worth joining the results: on an H100 a block takes in 2048 of
them in about 30 us, and what is joined at 480x832 moves for about 15."""

MAX_PARTS = 8  # an eighth of a wave is left of the tail; more parts are more to merge


@dataclass(frozen=True, kw_only=True)
class TailSplit:
    """How the queries and keys of one attention are split."""

    start: int
    """The tail's first query; those before fill whole waves."""
    parts: int
    """Parts of the keys that the tail attends to at once."""


def plan_split(batch: int, queries: int, heads: int, processors: int) -> TailSplit | None:
    """How to fill the last wave; None where every wave is full, or there is no room in the last.

    Less than one wave is left alone too.
    """
    tiles, columns = -(-queries // TILE), batch * heads
    waves = tiles * columns // max(1, processors)
    first = waves * processors // columns
    if not 0 < first < tiles:
        return None
    parts = min(MAX_PARTS, processors // ((tiles - first) * columns))
    return TailSplit(start=first * TILE, parts=parts) if parts > 1 else None


def split_tail(attend: LSEAttention) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`attend` with its tail split where a card gains by it, else as it is."""

    def split_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        split = _worthwhile_split(q_BLHD, k_BSHD, v_BSHD)
        if split is None:
            return attend(q_BLHD, k_BSHD, v_BSHD)[0]
        return attend_split(attend, q_BLHD, k_BSHD, v_BSHD, split)

    return split_attention


def attend_split(
    attend: LSEAttention, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, split: TailSplit
) -> Tensor:
    """What `attend` makes of all, by way of `split` -> [B, L, H, D]; without gradients."""
    first, _ = attend(q_BLHD[:, : split.start], k_BSHD, v_BSHD)
    tail = _attend_in_parts(attend, q_BLHD[:, split.start :], k_BSHD, v_BSHD, split.parts)
    return torch.cat((first, kernels.merge_parts(*tail)), dim=1)


def flash_lse(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's FlashAttention, its CPU form included."""
    aten, given = torch.ops.aten, _heads_first(q_BLHD, k_BSHD, v_BSHD)
    if q_BLHD.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*given)
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(*given)
    return out.transpose(1, 2), lse


def cudnn_lse(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's, by cuDNN."""
    given = _heads_first(q_BLHD, k_BSHD, v_BSHD)
    bias, with_lse = None, True
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*given, bias, with_lse)
    return out.transpose(1, 2), lse.flatten(2)  # it has an axis of one behind the queries'


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def processors_of(device: torch.device) -> int:
    """How many blocks a device runs at a time; 0 where it knows no blocks."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def _worthwhile_split(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> TailSplit | None:
    if k_BSHD.shape[1] < MIN_KEYS:
        return None
    if torch.is_grad_enabled() and q_BLHD.requires_grad:
        return None  # none flows through the logarithms
    batch, queries, heads, _ = q_BLHD.shape
    split = plan_split(batch, queries, heads, processors_of(q_BLHD.device))
    if split is None or not all(_is_seen_in_parts(x, split.parts) for x in (k_BSHD, v_BSHD)):
        return None
    return split


def _is_seen_in_parts(x_BSHD: Tensor, parts: int) -> bool:
    """Whether parts of it are samples of a batch without a copy."""
    batch, keys = x_BSHD.shape[:2]
    return batch == 1 or (x_BSHD.stride(0) == keys * x_BSHD.stride(1) and keys % parts == 0)


def _attend_in_parts(
    attend: LSEAttention, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, parts: int
) -> tuple[Tensor, Tensor]:
    """Results [B, N, L, H, D] and their logarithms [B, N, H, L]; keys left over are a part."""
    batch, keys = k_BSHD.shape[:2]
    even = keys - keys % parts
    # A copy: some kernels take no batch whose samples are the same memory.
    q = q_BLHD[:, None].expand(-1, parts, -1, -1, -1).contiguous().flatten(0, 1)
    k, v = (x[:, :even].unflatten(1, (parts, -1)).flatten(0, 1) for x in (k_BSHD, v_BSHD))
    seen = [x.unflatten(0, (batch, parts)) for x in attend(q, k, v)]
    if even < keys:
        rest = attend(q_BLHD, k_BSHD[:, even:], v_BSHD[:, even:])
        seen = [torch.cat((x, y[:, None]), dim=1) for x, y in zip(seen, rest, strict=True)]
    return seen[0], seen[1]


def _heads_first(*tensors_BLHD: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors_BLHD)
