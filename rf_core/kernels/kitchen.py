"""Two steps by comfy-kitchen's CUDA kernels, where Triton is not: Windows, cards before Ampere.

ComfyUI brings the package. Each step is rounded once. Unmeasured.

Letters as in the package.
"""

from __future__ import annotations

from comfy_kitchen import adaln, apply_rope1
from torch import Tensor


def modulated_norm(x_BFTC: Tensor, shift_BF1C: Tensor, scale_BF1C: Tensor, eps: float) -> Tensor:
    """norm(x) * scale + shift, each frame with its own; T tokens of a frame -> [B, F, T, C]."""
    # The package adds 1 to the scale; ours has it already.
    return adaln(x_BFTC, scale_BF1C - 1, shift_BF1C, eps)


def rotate(x_BLHD: Tensor, matrix_LP22: Tensor) -> Tensor:
    """x with each pair of channels times its token's matrix (`Rope.matrix_LP22`)."""
    if not x_BLHD.numel():  # the first chunk's context, which the package does not take
        return x_BLHD
    return apply_rope1(x_BLHD, matrix_LP22[None, :, None])
