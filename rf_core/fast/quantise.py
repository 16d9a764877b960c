"""Rows in 8 bits, and linear layers that multiply them: an approximation, and off by default.

A row is rounded to 8 bits in units of its own: its largest magnitude becomes the largest number of
the format. Linear layers in fp8 hold one such row for each output channel and make one of each
token as it comes; their weights take half the bytes of bfloat16, and cards that multiply fp8 do so
at up to twice the pace.

Measured with the bundled student against float32, each pass given the same latents: the flow is off
by 5 to 7 %, by 1 to 2 % in bfloat16. As many captions are kept as before, but within a few chunks
it is another video of the same caption. Every kind of layer adds its share and none stands out; see
`quantise_linears` for those that stay.

torchao's row-wise fp8 layers are the same product behind a tensor subclass; their rounding of
tokens is fused by torch.compile or by fbgemm alone, and weights are streamed here (`offload`) by
pointing plain tensors at other memory. comfy-kitchen's fp8 has one scale for a whole tensor.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from ..kernels import quantise_rows
from ..kernels.availability import multiplies_fp8
from ..memory.offload import StreamedLayers
from ..model import WanModel
from ..operations import Linear

FP8 = torch.float8_e4m3fn
KINDS = ("fp8",)
_MULTIPLE = 16  # of channels; what torch._scaled_mm multiplies


def quantise_linears(model: WanModel, kind: str = "fp8") -> None:
    """Replace the linear layers of the network's blocks, in place, one after another.

    What is outside of them stays: embeddings of prompts and timesteps take no time worth saving,
    and the head alone would make the flow wrong by 3 %. LoRAs are merged, and dtype and device
    chosen, before; weights may be streamed after. ValueError where a network cannot be quantised.
    """
    if kind not in KINDS:
        raise ValueError(f"weights of kind {kind!r} are unknown; use one of {', '.join(KINDS)}")
    if isinstance(model.blocks, StreamedLayers):
        raise ValueError(
            "the weights are streamed from host memory already; quantise them before that"
        )
    layers = [
        (parent, name, layer)
        for parent in model.blocks.modules()
        for name, layer in parent.named_children()
        if _is_plain(layer)  # a host's own layers cast, patch and offload by themselves
    ]
    if not layers:
        raise ValueError(
            "there are no plain linear layers in the network's blocks: they are quantised, or a "
            "host's own; load the network with torch.nn's layers"
        )
    while layers:  # each old layer is let go of before the next is made anew
        parent, name, layer = layers.pop()
        setattr(parent, name, Fp8Linear(layer))


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return type(layer) in (nn.Linear, Linear)


class Fp8Linear(nn.Module):
    """A linear layer of fp8 weights that multiplies rows of fp8; for inference alone.

    Results have the input's dtype; float16 is rounded to bfloat16 first on cards.
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

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        assert self.weight.dtype == FP8, "a network is quantised after its dtype is chosen"
        assert not (x.requires_grad and torch.is_grad_enabled()), "fp8 has no gradients"
        rows, scale = quantise_rows(x.flatten(0, -2), FP8)
        multiply = scaled_product if self._is_native(x) else reference_product
        y = multiply(rows, scale, self.weight, self.weight_scale, self.bias, x.dtype)
        return y.unflatten(0, x.shape[:-1])

    def extra_repr(self) -> str:
        """For printing a network."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _is_native(self, x: Tensor) -> bool:
        sizes = self.in_features, self.out_features
        return (
            x.is_cuda
            and x.dtype in (torch.bfloat16, torch.float16)
            and not any(size % _MULTIPLE for size in sizes)
            and multiplies_fp8(x.device)
        )


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
