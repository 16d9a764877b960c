"""Attention behind one signature, with the backends a machine may have.

An `Attention` takes queries, keys and values of shape [B, L, H, D] (keys and values may be longer
than the queries) and returns [B, L, H, D]. Nothing is masked: a streaming window holds only what
may be seen, and the bidirectional network sees everything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .split_attention import cudnn_lse, flash_lse, split_tail

_log = logging.getLogger(__name__)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    """PyTorch's scaled dot product attention, by the kernel that it prefers; runs everywhere."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def forced(backend: SDPBackend) -> Attention:
    """`sdpa` by one of PyTorch's own kernels and no other; RuntimeError where that cannot run."""

    def forced_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q_BLHD, k_BSHD, v_BSHD)

    return forced_attention


def flash2(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    """FlashAttention 2 (package `flash-attn`): CUDA, fp16 or bf16."""
    from flash_attn import flash_attn_func

    return flash_attn_func(q_BLHD, k_BSHD, v_BSHD)


def flash3(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    """FlashAttention 3 (module `flash_attn_interface`): Hopper, fp16 or bf16."""
    from flash_attn_interface import flash_attn_func

    result = flash_attn_func(q_BLHD, k_BSHD, v_BSHD)
    return result[0] if isinstance(result, tuple) else result


def sage(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    """SageAttention (package `sageattention`): CUDA, 8-bit products, an approximation."""
    from sageattention import sageattn

    return sageattn(q_BLHD, k_BSHD, v_BSHD, tensor_layout="NHD")


BACKENDS: Mapping[str, Attention] = MappingProxyType(
    {
        "sdpa": sdpa,
        "cudnn": forced(SDPBackend.CUDNN_ATTENTION),
        "cudnn-split": split_tail(cudnn_lse),
        "flash": forced(SDPBackend.FLASH_ATTENTION),
        "flash-split": split_tail(flash_lse),
        "efficient": forced(SDPBackend.EFFICIENT_ATTENTION),
        "math": forced(SDPBackend.MATH),
        "flash2": flash2,
        "flash3": flash3,
        "sage": sage,
    }
)
EXACT = (
    *("sdpa", "cudnn", "cudnn-split", "flash", "flash-split", "efficient"),
    *("flash2", "flash3"),
)
"""Backends that differ by rounding alone: among them `auto` chooses."""
PLAIN = "math"
"""What runs everywhere and is right everywhere, in much time and memory."""
_PACKAGES = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "sage": "sageattention"}


def available_backends() -> tuple[str, ...]:
    """Names of the backends whose package is installed here."""
    return tuple(n for n in BACKENDS if n not in _PACKAGES or find_spec(_PACKAGES[n]) is not None)


def attention_backend(name: str) -> Attention:
    """The backend called `name`; ValueError when unknown or not installed."""
    if name not in BACKENDS:
        raise ValueError(f"attention {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if name not in available_backends():
        raise ValueError(
            f"attention {name!r} needs the package {_PACKAGES[name]}, which is not installed; "
            f"install it or choose one of {', '.join(available_backends())}"
        )
    return BACKENDS[name]


def check_device(device: str, dtype: torch.dtype | Literal["auto"], attention: str) -> None:
    """ValueError unless this PyTorch can compute there, with that attention, in that dtype.

    `auto`, which is still to be chosen (`devices.preferred_dtype`), is half precision on a card.
    """
    if attention != "auto":
        attention_backend(attention)
    kind = device_kind(device)
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {device} is asked for, but this PyTorch sees no CUDA card; "
            "use cpu, or install a CUDA build of torch"
        )
    cards = torch.cuda.device_count()
    if kind == "cuda" and (torch.device(device).index or 0) >= cards:
        raise ValueError(f"there is no {device}: cards are numbered from 0, and this has {cards}")
    if attention not in ("sdpa", PLAIN, "auto") and (kind != "cuda" or dtype == torch.float32):
        raise ValueError(f"attention {attention} runs on cuda in bfloat16 or float16; use sdpa")
    if kind == "mps":
        _log.warning("nothing here was ever run on mps; if it fails, use --device cpu")


def device_kind(device: str) -> str:
    """cpu, cuda, or mps where this machine has it; ValueError for what nothing here runs on."""
    mps = torch.backends.mps.is_available()
    known = "cpu, cuda, cuda:1 or mps" if mps else "cpu, cuda or cuda:1"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"device {device!r} is unknown; use {known}") from None
    if kind == "mps" and not mps:
        raise ValueError(f"device {device} is asked for, but this machine has none; use {known}")
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"nothing here was written for device {device}; use {known}")
    return kind
