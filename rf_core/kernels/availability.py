"""Whether the Triton kernels can take a call, or the reference must."""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)  # bfloat16 arithmetic (Ampere)


def fused(*tensors: Tensor) -> bool:
    """Whether the kernels run on these tensors: on one capable card, of one dtype, without grad."""
    first = tensors[0]
    return (
        first.is_cuda
        and first.dtype in DTYPES
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(t.dtype == first.dtype and t.device == first.device for t in tensors)
        and _triton_runs_on(first.device)
    )


@lru_cache(maxsize=16)
def _triton_runs_on(device: torch.device) -> bool:
    problem = _problem_on(device)
    if problem is not None:
        logger.warning("no fused kernels on %s, which costs speed alone: %s", device, problem)
    return problem is None


def _problem_on(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"its compute capability is {capability}; they need {_LEAST_CAPABILITY}"
    try:
        _compile_one(device)
    except Exception as error:  # a missing C compiler, an unknown card: many types, one remedy
        return f"triton does not compile here ({error})"
    return None


def _compile_one(device: torch.device) -> None:
    from . import triton_norms

    x = torch.zeros(1, 1, 16, device=device)
    triton_norms.modulated_norm(x, x[:, None], x[:, None], eps=1e-6)
