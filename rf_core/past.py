"""What a stream keeps of its chunks to run them again: clean latents, and their control.

Where chunks are made with a control, its context and strength lie behind the latents as further
channels (`Control.framed`): whatever cuts a past by frames, cuts both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import CacheConfig
from .vace import Control, no_control


def kept_of(
    first: Tensor | None, last: Tensor | None, new: Tensor, config: CacheConfig
) -> tuple[Tensor | None, Tensor | None]:
    """What is kept of a stream's beginning and of its end once a chunk was made.

    Of its latents, or whatever else is by frames [B, C, F, h, w].
    """
    held = 0 if first is None else first.shape[2]
    to_first = min(config.kept_first - held, new.shape[2])
    if to_first:
        first = append(first, new[:, :, :to_first])
    if to_first < new.shape[2]:
        last = append(last, new[:, :, to_first:])[:, :, -config.kept_last :]
    return first, last


def append(old: Tensor | None, new: Tensor, dim: int = 2) -> Tensor:
    """One behind the other; a copy where there is no other."""
    return new.clone() if old is None else torch.cat([old, new], dim=dim)


def joined(first: Tensor | None, last: Tensor | None, frames: int) -> Tensor | None:
    """The last so many latent frames of one after the other; None for no frame."""
    held = [each for each in (first, last) if each is not None]
    return torch.cat(held, dim=2)[:, :, -frames:] if held and frames > 0 else None


def framed(control: Control | None, latents: Tensor, channels: int) -> Tensor:
    """The control of latents [B, C, F, h, w] as it is kept: [B, `channels` + 1, F, h, w].

    Of a chunk without one that of `no_control`, at strength 0.
    """
    if control is None:
        control = Control(context=no_control(latents, channels), strength=0.0)
    return control.framed().to(latents.device).expand(latents.shape[0], -1, -1, -1, -1)


def with_control(latents: Tensor | None, control: Tensor | None) -> Tensor | None:
    """Latents with their control behind them, where both are there."""
    if latents is None or control is None:
        return latents
    return torch.cat([latents, control], dim=1)


def parted(past: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Latents of so many channels, and the control behind them where there is one."""
    if past.shape[1] == channels:
        return past, None
    return past[:, :channels], past[:, channels:]


def split_at(past: Tensor, frames: int) -> tuple[Tensor | None, Tensor | None]:
    """The first so many frames, and those after them; None for no frame."""
    first, last = past[:, :, :frames], past[:, :, frames:]
    return first if first.shape[2] else None, last if last.shape[2] else None
