"""An exponential moving average (EMA) of the trained weights, kept as plain tensors.

Under FSDP2 they are sharded as the weights are, so the average costs a share of them on each
process, and a checkpoint saves and reshards it like any other state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .distributed import reshard


class WeightAverage:
    """The average of a network's trainable parameters, which begins as a copy of them."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.tensors = {name: p.detach().clone() for name, p in trainable(network)}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """average <- decay * average + (1 - decay) * weights."""
        for name, parameter in trainable(self.network):
            self.tensors[name].lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the network has the average for weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        reshard(self.network)  # after a forward without a backward the root's are gathered still
        for name, parameter in trainable(self.network):
            held = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(held)
        reshard(self.network)


def trainable(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are trained, by name."""
    return ((name, p) for name, p in network.named_parameters() if p.requires_grad)
