"""The layers a network is built of where no host brings its own: torch's, but for the linear ones.

The module itself is what `WanModel` takes as `operations`.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import Conv3d, LayerNorm, RMSNorm

from .kernels.reference import linear

__all__ = ["Conv3d", "LayerNorm", "Linear", "RMSNorm"]


class Linear(nn.Linear):
    """torch's, whose product is made by whatever is fastest here."""

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """[..., in] -> [..., out], or GELU (tanh) of it."""
        return linear(x, self.weight, self.bias, gelu=gelu)
