"""Linear layers by oneDNN: the products torch leaves to MKL, which knows AVX-512 of Intel's alone.

On an AMD EPYC one thread makes 105 GFLOP/s of float32 by MKL and 180 to 240 by oneDNN, and GELU
costs next to nothing behind the product.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# The operation takes a list of numbers, which a trace cannot hold but a scripted function can.
_SOURCE = """
def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor], after: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, after, [], "tanh")
"""


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, *, gelu: bool) -> Tensor:
    """See `reference.linear`, and with `gelu` `reference.linear_gelu`."""
    return _scripted().linear(x, weight_OI, bias_O, "gelu" if gelu else "none")


@lru_cache(maxsize=1)
def _scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is kept, no longer developed
        return torch.jit.CompilationUnit(_SOURCE)
