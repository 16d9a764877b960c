"""Linear layers that read the same rows, as one product: where oneDNN takes no less.

Its start is worth it from a certain size on (`kernels.availability`), which q, k and v of a narrow
network have only together. Each layer keeps its parameters and their names; they lie one behind the
other in memory, where the joint product reads them. Whoever moves one of them, casts it or puts
another in its place parts them, and then the layers run one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .kernels import reference
from .kernels.availability import gains_from_fusing, in_onednn
from .kernels.reference import Rows
from .operations import is_plain_linear, is_watched


def fuse_projections(*layers: nn.Module) -> None:
    """Lay out the layers' weights one behind the other, and their biases; no value changes.

    Nothing happens where no product of theirs would be joint.
    """
    plain = [layer for layer in layers if is_plain_linear(layer) and layer.bias is not None]
    if len(plain) < len(layers) or not all(gains_from_fusing(layer.weight) for layer in plain):
        return
    for parts in ([layer.weight for layer in plain], [layer.bias for layer in plain]):
        joint = torch.cat([part.detach() for part in parts])
        for part, place in zip(parts, joint.split([len(part) for part in parts]), strict=True):
            part.data = place


def fused_linear(x: Tensor | Rows, *layers: nn.Module) -> tuple[Tensor, ...] | None:
    """What each layer makes of x, [..., I] -> [..., O] each, views of one product.

    None where there is none: the weights do not lie together, or who multiplies gains nothing.
    """
    plain = [layer for layer in layers if is_plain_linear(layer) and not is_watched(layer)]
    if len(plain) < len(layers) or not isinstance(x, Tensor):
        return None
    if not in_onednn(x, plain[0].weight, joined=len(plain)):
        return None
    weight_OI = _joint([layer.weight for layer in plain])
    bias_O = _joint([layer.bias for layer in plain])
    if weight_OI is None or bias_O is None:
        return None
    return reference.linear(x, weight_OI, bias_O).chunk(len(plain), dim=-1)


def _joint(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Tensors of one shape as one, where they lie one behind the other in the first's memory."""
    plain = [part for part in parts if type(part) is nn.Parameter]  # others need not have memory
    if len(plain) < len(parts):
        return None
    first, end = plain[0], plain[0].data_ptr()
    for part in plain:
        if (
            part.data_ptr() != end
            or part.shape != first.shape
            or part.dtype != first.dtype
            or not part.is_contiguous()
        ):
            return None
        end += part.nbytes
    memory = first.untyped_storage()
    if end > memory.data_ptr() + memory.nbytes():  # neighbours by chance
        return None
    return first.as_strided((len(plain) * first.shape[0], *first.shape[1:]), first.stride())
