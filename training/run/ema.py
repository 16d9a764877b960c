"""An exponential moving average (EMA) of the trained weights, kept as plain tensors.

Under FSDP2 they are sharded as the weights are, so the average costs a share of them on each
process, and a checkpoint saves and reshards it like any other state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from rf_core.ranges import MANY, check_numbers

from .distributed import reshard


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """How long the average of a run remembers: by `ema` or by `ema_half_life`, of which one counts.

    Decay a half-life as in EDM (Karras et al., arXiv 2206.00364).
    """

    ema: float | None = 0.99
    """Decay of the averaged weights, an update; null where `ema_half_life` is given."""
    ema_half_life: float | None = None
    """Samples after which half of the average is newer: the same memory at another batch size.
    Null for `ema`."""
    ema_from: int | None = None
    """Update at which averaging begins; until then the average is the network itself. None to
    begin at once with a short memory that grows: update n decays by (1 + n) / (10 + n) at most."""

    def __post_init__(self) -> None:
        check_numbers(self, ema_from=(0, MANY), ema_half_life=(1e-6, MANY))
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; give a decay in [0, 1)")
        if (self.ema is None) == (self.ema_half_life is None):
            raise ValueError(
                f"ema is {self.ema} and ema_half_life is {self.ema_half_life}, and one of the two "
                "counts; set the other to null"
            )

    def decay(self, update: int, samples: int) -> float:
        """Of the average, at an update of so many samples; 0 makes it the network itself."""
        if self.ema_half_life is None:
            assert self.ema is not None
            decay = self.ema
        else:
            decay = 0.5 ** (samples / self.ema_half_life)
        if self.ema_from is None:
            return min(decay, (1 + update) / (10 + update))
        return decay if update >= self.ema_from else 0.0


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
