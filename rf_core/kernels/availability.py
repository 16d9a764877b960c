"""Which kernels can take a call: Triton's, comfy-kitchen's, or the reference alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..devices import cpu_facts

logger = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
_MIN_CAPABILITY = (8, 0)  # bfloat16 arithmetic (Ampere)
_MIN_FOR_FP8 = (8, 9)  # products of fp8 (Ada)
_MIN_FOR_ONEDNN = 1 << 21  # multiplications; its start, some 10 us, is as long as MKL takes there
_UNFUSED = ContextVar("unfused", default=False)


@contextmanager
def unfused() -> Iterator[None]:
    """Inside, every step runs by its definition: for comparing kernels with it on one card.

    Of this thread alone; what a CUDA graph has recorded stays as it was.
    """
    before = _UNFUSED.set(True)
    try:
        yield
    finally:
        _UNFUSED.reset(before)


def fused(*tensors: Tensor) -> bool:
    """Whether the kernels run on these tensors: on one capable card, of one dtype, without grad."""
    first = tensors[0]
    return (
        first.is_cuda
        and first.dtype in DTYPES
        and _may_differ()
        and _alike(*tensors)
        and triton_runs_on(first.device)
    )


def in_product(*tensors: Tensor) -> bool:
    """Whether a product of these may have steps within: as `fused`, in half precision alone."""
    first = tensors[0]
    return first.is_cuda and first.dtype in HALF and _may_differ() and _alike(*tensors)


def in_kitchen(x: Tensor) -> bool:
    """Whether comfy-kitchen's kernels run on it, which take half precision."""
    return x.dtype in HALF and _may_differ() and kitchen_runs_on(x.device)


def in_onednn(x: Tensor, weight_OI: Tensor, *, joined: int = 1) -> bool:
    """Whether oneDNN makes this product: in float32 on a CPU with AVX-512, where it is large.

    Or, `joined`, that of as many such weights one behind the other.
    """
    return (
        type(x) is Tensor  # others, such as those that stand for memory, are torch's
        and x.device.type == "cpu"
        and x.dtype == weight_OI.dtype == torch.float32
        and x.numel() * weight_OI.shape[0] * joined >= _MIN_FOR_ONEDNN
        and _may_differ()
        and onednn_multiplies()
    )


def gains_from_fusing(weight_OI: Tensor) -> bool:
    """Whether products of a weight may be too small for oneDNN, and it is faster than MKL."""
    return (
        weight_OI.device.type == "cpu"
        and weight_OI.dtype == torch.float32
        and weight_OI.numel() < _MIN_FOR_ONEDNN
        and onednn_multiplies()
    )


def _alike(first: Tensor, *others: Tensor) -> bool:
    return all(t.dtype == first.dtype and t.device == first.device for t in others)


def _may_differ() -> bool:
    """Whether a call may be taken from its definition: nothing records it, nobody compares."""
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return not recorded and not _UNFUSED.get()


@lru_cache(maxsize=16)
def triton_runs_on(device: torch.device) -> bool:
    """Whether the kernels of this package run on a device; one warning where not."""
    problem = _problem_on(device)
    if problem is not None:
        logger.warning("no Triton kernels on %s, which costs speed alone: %s", device, problem)
    return problem is None


@lru_cache(maxsize=16)
def kitchen_runs_on(device: torch.device) -> bool:
    """Whether comfy-kitchen stands in on a device: a CUDA card without Triton, as on Windows."""
    installed = find_spec("comfy_kitchen") is not None and torch.cuda.is_available()
    if device.type != "cuda" or not installed or triton_runs_on(device):
        return False
    import comfy_kitchen

    backend = comfy_kitchen.list_backends().get("cuda", {})
    ready = backend.get("available", False) and not backend.get("disabled", False)
    return ready and {"adaln", "apply_rope1"} <= set(backend.get("capabilities", ()))


@lru_cache(maxsize=1)
def onednn_multiplies() -> bool:
    """Whether oneDNN's products are faster than MKL's, which uses AVX-512 of Intel's CPUs alone."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    capability = torch.backends.cpu.get_cpu_capability()
    return there and capability == "AVX512" and "AMD" in str(cpu_facts().get("cpu_name"))


@lru_cache(maxsize=16)
def multiplies_fp8(device: torch.device) -> bool:
    """Whether rows of fp8 are multiplied on a card; one warning where not."""
    problem = _fp8_problem_on(device)
    if problem is not None:
        logger.warning(
            "no products of fp8 on %s: weights take less memory, but products are slower than in "
            "bfloat16: %s",
            *(device, problem),
        )
    return problem is None


def _fp8_problem_on(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_FOR_FP8:
        return f"its compute capability is {capability}; products of fp8 need {_MIN_FOR_FP8}"
    try:
        _multiply_one(device)
    except RuntimeError as error:  # torch before 2.7 has them for Hopper alone
        return f"torch does not multiply them here ({error})"
    return None


def _multiply_one(device: torch.device) -> None:
    from .reference import FP8

    eye, one = torch.eye(16, device=device).to(FP8), torch.ones(16, 1, device=device)
    torch._scaled_mm(eye, eye.t(), one, one.t(), out_dtype=torch.bfloat16, use_fast_accum=True)


def _problem_on(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        return f"its compute capability is {capability}; they need {_MIN_CAPABILITY}"
    try:
        _compile_one(device)
    except Exception as error:  # a missing C compiler, an unknown card: many types, one remedy
        return f"triton does not compile here ({error})"
    return None


def _compile_one(device: torch.device) -> None:
    from . import triton_norms

    x = torch.zeros(1, 1, 16, device=device)
    triton_norms.modulated_norm(x, x[:, None], x[:, None], eps=1e-6)
