"""A prompt's padding: counted instead of computed.

Wan's prompts are padded with rows of zeros, which the network attends to. In a layer these have one
key and one value, so a softmax over n keys and c equal ones is a softmax over n + 1, the score of
the last raised by log(c). The sums are the same and are added up in another order: exact but for
rounding. Training computes every row, as it was published.

Letters: B batch, S rows of a prompt, D channels of the text encoder.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.availability import fused

PARTS = 8
"""Of the longest prompt, in which others are cut off: so many sizes of a pass are recorded."""


def counted_rows(embeds_BSD: Tensor) -> tuple[Tensor, Tensor] | None:
    """The rows of a padded prompt to make keys of, and the logarithm of how often each counts.

    Two tensors, [B, rows, D] and float32 [B, rows]. None where all rows count once or no attention
    knows counts: on a card without the fused kernels, masks are slower than padding.
    """
    if embeds_BSD.device.type == "cpu":
        return _cut(embeds_BSD)
    if not fused(embeds_BSD):
        return None
    # Where the rows lie is fixed, for recorded passes, and how many are real is not waited for.
    rows = embeds_BSD.shape[1]
    return embeds_BSD, log_counts(num_real(embeds_BSD).clamp(max=rows - 1), rows, rows)


def num_real(embeds_BSD: Tensor) -> Tensor:
    """Rows of each prompt [B] up to the last that is not zero."""
    places_S = torch.arange(1, embeds_BSD.shape[1] + 1, device=embeds_BSD.device)
    return ((embeds_BSD != 0).any(2) * places_S).amax(1)


def log_counts(last_B: Tensor, rows: int, text_len: int) -> Tensor:
    """The first of `rows` keys count once, the one at `last` for the rest of `text_len`: [B, rows].

    Those behind it do not count.
    """
    places_S, last_B1 = torch.arange(rows, device=last_B.device), last_B[:, None]
    count_BS = torch.where(places_S == last_B1, text_len - last_B1, places_S < last_B1)
    return count_BS.float().log()


def _cut(embeds_BSD: Tensor) -> tuple[Tensor, Tensor] | None:
    """Every prompt of a batch cut off at the same row: what else it has of padding counts once."""
    batch, text_len = embeds_BSD.shape[:2]
    part = -(-text_len // PARTS)
    rows = (int(num_real(embeds_BSD).max()) // part + 1) * part
    if rows >= text_len:
        return None
    return embeds_BSD[:, :rows], log_counts(torch.full((batch,), rows - 1), rows, text_len)
