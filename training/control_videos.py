"""What a control's training sees of a clip: the whole control, and a masked part of it or nothing.

As of the published VACE (arXiv 2503.07598, sec. 3.1): a control alone, which the whole picture is
made by, and a picture that is kept but for a region, which is made by the control or by the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rf_core.control import GREY

_LEAST_SIDE = (5, 16)  # of a masked region: this share of the picture's


class ControlVideo(NamedTuple):
    """What a user would give: a video and a mask."""

    images: Tensor
    """[T, 3, H, W] in [0, 1]."""
    mask: Tensor
    """[T, 1, H, W], 1 where the video is to be made."""


@dataclass(frozen=True, kw_only=True)
class VariantsConfig:
    """What of each clip is controlled. Each has its whole control, and one context more."""

    masked: float = 0.5
    """Share of the others that are the control in a rectangle, with the true clip around it."""
    erased: float = 0.25
    """Share that are a rectangle of grey, to be filled by the prompt alone, in the true clip. What
    is left are whole clips of grey: no control."""
    seed: int = 6
    """Seeds what is drawn."""

    def __post_init__(self) -> None:
        if min(self.masked, self.erased) < 0 or self.masked + self.erased > 1:
            raise ValueError(
                f"masked is {self.masked} and erased {self.erased}; give shares of at most 1 in all"
            )


def variants(
    true: Tensor, control: Tensor, config: VariantsConfig, rng: np.random.Generator
) -> Iterator[ControlVideo]:
    """The control videos of a clip [T, 3, H, W]: its control, and one more."""
    whole = torch.ones_like(control[:, :1])
    yield ControlVideo(control, whole)
    kind, grey = rng.random(), torch.full_like(control, GREY)
    if kind >= config.masked + config.erased:
        yield ControlVideo(grey, whole)
        return
    mask = whole * rectangle(*control.shape[2:], rng)
    inside = control if kind < config.masked else grey
    yield ControlVideo(torch.where(mask > 0, inside, true), mask)


def rectangle(height: int, width: int, rng: np.random.Generator) -> Tensor:
    """A mask of a rectangle anywhere in a picture, [1, 1, H, W]."""
    mask, (part, of) = torch.zeros(1, 1, height, width), _LEAST_SIDE
    tall, wide = (
        int(rng.integers(side * part // of, side, endpoint=True)) for side in (height, width)
    )
    top, left = (
        int(rng.integers(side - size, endpoint=True))
        for side, size in ((height, tall), (width, wide))
    )
    mask[..., top : top + tall, left : left + wide] = 1
    return mask
