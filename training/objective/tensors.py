"""Dataclasses of tensors that move to a device together."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch

T = TypeVar("T", bound="Tensors")


class Tensors:
    """Base of such a dataclass. Fields with a `to` method are moved, others are kept."""

    def to(self: T, device: torch.device) -> T:
        """The same on another device."""
        moved = {name: each.to(device) for name, each in vars(self).items() if hasattr(each, "to")}
        return replace(self, **moved)  # type: ignore[type-var]
