"""Steps by comfy-kitchen's CUDA kernels, where Triton is not: Windows, cards before Ampere.

ComfyUI brings the package. It knows two of the steps, a modulated norm and a rotation, each rounded
once; the others are `reference`'s. Unmeasured.

Letters as in the package.
"""

from __future__ import annotations

from comfy_kitchen import adaln, apply_rope1
from torch import Tensor

from ..rope import Rope
from . import reference


def modulated_norm(x_BLC: Tensor, shift_BF1C: Tensor, scale_BF1C: Tensor, eps: float) -> Tensor:
    """As `reference.modulated_norm`."""
    x_BFTC = reference.by_frame(x_BLC, shift_BF1C)
    # The package adds 1 to the scale; ours has it already.
    return adaln(x_BFTC, scale_BF1C - 1, shift_BF1C, eps).flatten(1, 2)


def modulated_after_residual(
    x_BLC: Tensor,
    y_BLC: Tensor,
    gate_BF1C: Tensor | None,
    shift_BF1C: Tensor,
    scale_BF1C: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As `reference.modulated_after_residual`."""
    residual = reference.add_gated(x_BLC, y_BLC, gate_BF1C)
    return residual, modulated_norm(residual, shift_BF1C, scale_BF1C, eps)


def norm_rotate(
    x_BLC: Tensor, weight_C: Tensor, num_heads: int, eps: float, rope: Rope | None = None
) -> Tensor:
    """As `reference.norm_rotate`."""
    normed = reference.norm_rotate(x_BLC, weight_C, num_heads, eps)
    return normed if rope is None else _turned(normed, rope)


def write_keys_values(
    k_BLC: Tensor,
    v_BLC: Tensor,
    weight_C: Tensor,
    eps: float,
    rope: Rope,
    k_slot_BLHD: Tensor,
    turned_slot_BLHD: Tensor,
    v_slot_BLHD: Tensor,
) -> None:
    """As `reference.write_keys_values`."""
    keys = norm_rotate(k_BLC, weight_C, k_slot_BLHD.shape[2], eps)
    k_slot_BLHD.copy_(keys)
    turned_slot_BLHD.copy_(_turned(keys, rope))
    v_slot_BLHD.copy_(v_BLC.view(v_slot_BLHD.shape))


def rotate_context(k_NBWHD: Tensor, rope: Rope, turned_NBWHD: Tensor) -> None:
    """As `reference.rotate_context`."""
    if not k_NBWHD.numel():  # the first chunk's, which the package does not take
        return
    head = rope.tokens(0, k_NBWHD.shape[2])
    for k_BWHD, turned_BWHD in zip(k_NBWHD, turned_NBWHD, strict=True):
        turned_BWHD.copy_(_turned(k_BWHD, head))


def _turned(x_BLHD: Tensor, rope: Rope) -> Tensor:
    assert rope.matrix_LP22 is not None, "rope_table makes them where this module is used"
    return apply_rope1(x_BLHD, rope.matrix_LP22[None, :, None])
