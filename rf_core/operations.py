"""The layers a network is built of where no host brings its own: torch's, but for the linear ones.

The module itself is what `WanModel` takes as `operations`.
"""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn
from torch.nn import Conv3d, LayerNorm, RMSNorm

from .kernels.reference import linear

__all__ = ["Conv3d", "LayerNorm", "Linear", "RMSNorm", "is_plain_linear", "is_watched"]


class Linear(nn.Linear):
    """torch's, whose product is made by whatever is fastest here."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return linear(x, self.weight, self.bias)


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is torch's own or ours, whose weights may be read: a host's may cast or patch."""
    return type(layer) in (nn.Linear, Linear)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody has hooks on a module, for which it must be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
