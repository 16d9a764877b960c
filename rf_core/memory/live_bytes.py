"""How much memory an eager computation needs, counted without needing it.

`live_bytes` runs code and follows every tensor it makes until the tensor is gone; `fake_tensors`
gives tensors that have shapes and no memory, so that the largest network is counted anywhere in a
second. The count is of tensors alone. It does not see what a kernel takes inside itself (the
workspaces of cuDNN and oneDNN), what an allocator rounds up or cannot join, nor a CUDA context.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(run: Callable[[], object], device: torch.device | str) -> int:
    """The most bytes that tensors made by `run()` on a kind of device take at once.

    What `run` returns counts for as long as it lives; what was there before does not.
    """
    with torch.no_grad(), _StandIns(), _LiveBytes(device) as live:
        run()
    return live.peak


@contextmanager
def fake_tensors(device: torch.device | str) -> Iterator[str]:
    """Tensors made inside, on the device this yields, take no memory; use them inside too.

    Those that stand for a CPU's say that they are on the CPU, so that code branches as it does
    there. All others are on `meta`, where code takes the paths of a card without fused kernels.
    """
    cpu = torch.device(device).type == "cpu"
    answers = _Answers()  # type: ignore[no-untyped-call]
    with FakeTensorMode(allow_non_fake_inputs=True) if cpu else nullcontext(), answers:
        yield "cpu" if cpu else "meta"


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *shape: Any) -> Tensor:
    padding, stride, dilation, groups = shape
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0, 0, 0], groups)


def _number(fake: Tensor) -> float:
    return 0.5 if fake.is_floating_point() else 0


_ON_FAKE_TENSORS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.mkldnn_convolution.default: _convolution,
    torch.ops.aten._local_scalar_dense.default: _number,
}
"""What runs on fake tensors in place of operations that ask for real numbers, which may be any."""


class _Answers(TorchDispatchMode):
    """Gives code that asks for a number, such as whether all are finite, one that may be any."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _stood_in(func, args)(*args, **(kwargs or {}))


class _LiveBytes(TorchDispatchMode):
    """Counts storages from the operation that makes them until they are freed."""

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kind = torch.device(device).type
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = _stood_in(func, args)(*args, **(kwargs or {}))
        given = {_key(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            if tensor.device.type == self._kind and _key(tensor) not in given:
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._storages:
            return
        size = storage.nbytes()
        self._storages[key] = weakref.ref(storage, partial(self._free, key, size))
        self._now += size
        self.peak = max(self.peak, self._now)

    def _free(self, key: int, size: int, _: object) -> None:
        del self._storages[key]
        self._now -= size


class _StandIns(TorchFunctionMode):
    """Attention on `meta` as fused kernels do it; torch would pick the form no card runs there."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and args[0].device.type == "meta":
            return _fused_attention(args[0])
        return func(*args, **(kwargs or {}))


def _fused_attention(query: Tensor) -> Tensor:
    # A result and a number a query, as fused kernels make, in place of all products written out.
    result = torch.empty_like(query)
    query.new_empty(query.shape[:-1], dtype=torch.float32)
    return result


def _stood_in(func: Any, args: Any) -> Any:
    if func in _ON_FAKE_TENSORS and (isinstance(args[0], FakeTensor) or args[0].is_meta):
        return _ON_FAKE_TENSORS[func]
    return func


def _tensors(tree: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
