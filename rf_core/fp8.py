"""Linear layers that multiply rows of 8 bits.

A row is rounded to 8 bits in units of its own: its largest magnitude becomes the largest number of
the format. A layer holds one such row for each output channel and multiplies one for each token;
its weights take half the bytes of bfloat16, and cards that multiply fp8 do so at up to twice the
pace. Between layers rows travel as `Rows`: a norm or GELU can make them in the pass over memory
that makes the numbers, and q, k and v read the same ones.

torchao's row-wise fp8 layers are the same product behind a tensor subclass; their rounding of
tokens is fused by torch.compile or by fbgemm alone, and weights are streamed here (`offload`) by
pointing plain tensors at other memory. comfy-kitchen's fp8 has one scale for a whole tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .kernels import quantise_rows
from .kernels.availability import HALF, multiplies_fp8
from .kernels.reference import FP8, Rows

_MULTIPLE = 16  # of channels; what torch._scaled_mm multiplies


class Fp8Linear(nn.Module):
    """A linear layer of fp8 weights that multiplies rows of fp8; for inference alone.

    It makes the rows unless they come as `Rows`, made once for several layers or by the step
    before. Results have the input's dtype; float16 is rounded to bfloat16 first on cards.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        if layer.weight.requires_grad:
            raise ValueError(
                "the weights are being trained, and fp8 has no gradients; freeze them first"
            )
        weight_OI, scale_O1 = quantise_rows(layer.weight, FP8)
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.weight_scale = nn.Parameter(scale_O1, requires_grad=False)
        self.bias = layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor | Rows) -> Tensor:
        """[..., in] -> [..., out]"""
        assert self.weight.dtype == FP8, "a network is quantised after its dtype is chosen"
        rows = x if isinstance(x, Rows) else Rows(*quantise_rows(x, FP8), x.dtype)
        values, scale = (part.flatten(0, -2) for part in (rows.values, rows.scale))
        assert not (values.requires_grad and torch.is_grad_enabled()), "fp8 has no gradients"
        multiply = scaled_product if self._is_native(values.device, x.dtype) else reference_product
        y = multiply(values, scale, self.weight, self.weight_scale, self.bias, x.dtype)
        return y.unflatten(0, rows.values.shape[:-1])

    def extra_repr(self) -> str:
        """For printing a network."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _is_native(self, device: torch.device, dtype: torch.dtype) -> bool:
        sizes = self.in_features, self.out_features
        return (
            device.type == "cuda"
            and dtype in HALF
            and not any(size % _MULTIPLE for size in sizes)
            and multiplies_fp8(device)
        )


def takes_rows(layer: nn.Module) -> bool:
    """Whether a layer is an fp8 one, on a device whose kernels make rows for it."""
    return type(layer) is Fp8Linear and _rounds(layer.weight.device)


def _rounds(device: torch.device) -> bool:
    return device.type != "cuda" or multiplies_fp8(device)


def scaled_product(
    rows_LI: Tensor,
    scale_L1: Tensor,
    weight_OI: Tensor,
    weight_scale_O1: Tensor,
    bias_O: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As `reference_product`, in one kernel that multiplies fp8 [L, O]."""
    made = torch.bfloat16 if dtype == torch.float16 else dtype  # there is none that makes float16
    return torch._scaled_mm(
        rows_LI,
        weight_OI.t(),
        scale_a=scale_L1,
        scale_b=weight_scale_O1.t(),
        bias=None if bias_O is None else bias_O.to(made),
        out_dtype=made,
        use_fast_accum=True,  # without it Hopper adds in float32 every 128 products, at less pace
    ).to(dtype)


def reference_product(
    rows_LI: Tensor,
    scale_L1: Tensor,
    weight_OI: Tensor,
    weight_scale_O1: Tensor,
    bias_O: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """(rows * scale) @ (weight * its scale)^T + bias, summed in float32 -> [L, O]."""
    y = rows_LI.float() @ weight_OI.float().t()
    y.mul_(scale_L1).mul_(weight_scale_O1.t())  # in place, as y is large
    return (y if bias_O is None else y.add_(bias_O)).to(dtype)
