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

from .kernels import counts_keys


def counted_rows(embeds_BSD: Tensor) -> tuple[Tensor, Tensor] | None:
    """The rows of a padded prompt to make keys of, and the logarithm of how often each counts.

    Two tensors, [B, rows, D] and float32 [B, rows]; None where no attention knows counts. On a CPU
    rows end with the first of padding of the longest prompt; zeros of a shorter one count once.
    """
    if not counts_keys(embeds_BSD):
        return None
    rows = text_len = embeds_BSD.shape[1]
    last_B = num_real(embeds_BSD).clamp(max=text_len - 1)
    # A card is not asked how many they are: nobody waits, and recorded passes have fixed sizes.
    if embeds_BSD.device.type == "cpu":
        last_B = last_B.amax().expand_as(last_B)
        rows = int(last_B[0]) + 1
    return embeds_BSD[:, :rows], log_counts(last_B, rows, text_len)


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
