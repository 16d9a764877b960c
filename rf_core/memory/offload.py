"""Layers whose weights stay in host memory and are copied to the device ahead of their turn.

A stack of layers that is too large for a device runs with two layers' worth of memory there: while
one computes, the next is on its way. What is computed, and in which order, does not change, so
results are those of resident weights bit for bit; only time is added, and only where copying a
layer takes longer than computing one.

`accelerate` moves weights in hooks without copying ahead, FSDP2's CPU offloading does copy ahead
but turns weights into distributed tensors and wants a process group; hence these few lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NoReturn, Protocol

import torch
from torch import Tensor, nn

NUM_SLOTS = 2  # layers on the device: one that computes, one that arrives
_ALIGNMENT = 512  # bytes; as torch's allocators align, so that kernels choose as they would


class Slots(Protocol):
    """Device memory for a few layers, each filled again and again."""

    @property
    def buffers(self) -> Sequence[Tensor]:
        """The memory of each slot, uint8."""

    def load(self, slot: int, source: Tensor) -> None:
        """Begin to copy host bytes into a slot, once the work before its release is done."""

    def wait(self, slot: int) -> None:
        """Let work that is given from now on see what was loaded."""

    def release(self, slot: int) -> None:
        """Say that work given from now on does not read the slot."""


class PlainSlots:
    """Slots that are copied at once: for devices that do one thing after another."""

    def __init__(self, size: int, device: torch.device | str, number: int = NUM_SLOTS) -> None:
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(number)]

    def load(self, slot: int, source: Tensor) -> None:
        """See `Slots.load`."""
        self.buffers[slot][: source.numel()].copy_(source)

    def wait(self, slot: int) -> None:
        """Nothing to wait for."""

    def release(self, slot: int) -> None:
        """Nothing runs behind."""


class CudaSlots:
    """Slots that a second CUDA stream copies into while the first computes."""

    def __init__(self, size: int, device: torch.device | str, number: int = NUM_SLOTS) -> None:
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(number)]
        self._device = torch.device(device)
        self._copies = torch.cuda.Stream(self._device)
        for buffer in self.buffers:  # the last copy is waited for by nobody
            buffer.record_stream(self._copies)
        self._loaded = [torch.cuda.Event() for _ in self.buffers]
        self._free = [torch.cuda.Event() for _ in self.buffers]
        for slot in range(number):
            self.release(slot)

    def load(self, slot: int, source: Tensor) -> None:
        """See `Slots.load`; `source` is pinned, or the copy holds up the host."""
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._free[slot])
            self.buffers[slot][: source.numel()].copy_(source, non_blocking=True)
            self._loaded[slot].record(self._copies)

    def wait(self, slot: int) -> None:
        """See `Slots.wait`."""
        torch.cuda.current_stream(self._device).wait_event(self._loaded[slot])

    def release(self, slot: int) -> None:
        """See `Slots.release`."""
        self._free[slot].record(torch.cuda.current_stream(self._device))


class StreamedLayers(nn.ModuleList):
    """Layers to iterate over; each has its weights on the device during its turn alone.

    Go through them with `for`, one after another, and use a layer before asking for the next.
    Between turns their weights are host tensors, to be read and never written.
    """

    def __init__(self, layers: Sequence[nn.Module], slots: Slots, *, pin: bool) -> None:
        super().__init__(layers)
        self._slots = slots
        self._hosts = [_pack(layer, pin) for layer in layers]
        self._held: list[int | None] = [None] * len(slots.buffers)

    def __iter__(self) -> Iterator[nn.Module]:
        for index, layer in enumerate(self.children()):
            slot = self._fetch(index)
            self._fetch((index + 1) % len(self), keep=slot)
            self._slots.wait(slot)
            _point(layer, self._slots.buffers[slot])
            try:
                yield layer
            finally:
                _point(layer, self._hosts[index])
                self._slots.release(slot)

    def __getitem__(self, index: object) -> NoReturn:
        raise TypeError(f"layer {index} is on the host but in its turn; go through layers with for")

    def _fetch(self, index: int, keep: int | None = None) -> int:
        if index in self._held:
            return self._held.index(index)
        slot = next(slot for slot in range(len(self._held)) if slot != keep)
        self._held[slot] = index
        self._slots.load(slot, self._hosts[index])
        return slot


def stream_layers(parent: nn.Module, name: str, device: torch.device | str) -> None:
    """Put a network on a device but for its child `name`, a ModuleList, which is streamed there.

    The network is `parent`; what lies outside of it stays where it is.
    """
    layers = list(getattr(parent, name))
    setattr(parent, name, nn.ModuleList())
    parent.to(device)
    cuda = torch.device(device).type == "cuda"
    slots = (CudaSlots if cuda else PlainSlots)(max(map(packed_bytes, layers)), device)
    setattr(parent, name, StreamedLayers(layers, slots, pin=cuda))


def packed_bytes(layer: nn.Module) -> int:
    """Bytes of a layer's weights, one behind another."""
    return sum(_padded(tensor) for tensor in _tensors(layer))


def _tensors(layer: nn.Module) -> list[Tensor]:
    return [*layer.parameters(), *layer.buffers()]


def _padded(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _pack(layer: nn.Module, pin: bool) -> Tensor:
    """Move a layer's weights into one host buffer, so that one copy fetches them all."""
    host = torch.empty(packed_bytes(layer), dtype=torch.uint8, pin_memory=pin)
    for tensor, place in zip(_tensors(layer), _places(layer, host), strict=True):
        place.copy_(tensor.detach())
    _point(layer, host)
    return host


def _point(layer: nn.Module, buffer: Tensor) -> None:
    """Make the buffer's bytes the layer's weights."""
    for tensor, place in zip(_tensors(layer), _places(layer, buffer), strict=True):
        tensor.data = place


def _places(layer: nn.Module, buffer: Tensor) -> list[Tensor]:
    places, start = [], 0
    for tensor in _tensors(layer):
        flat = buffer[start : start + tensor.nbytes].view(tensor.dtype)
        places.append(flat.view(tensor.shape))
        start += _padded(tensor)
    return places
