"""A network with its optimiser: its steps, what a checkpoint keeps of it, and how it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from rf_core.model import WanModel
from rf_core.ranges import MANY, check_numbers

from .distributed import clip_gradients, reshard

_TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True)


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """AdamW; defaults are the published ones of Re-DMD."""

    rate: float
    """Learning rate."""
    betas: tuple[float, float] = (0.0, 0.999)
    """Decay of the two moments."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    clip_norm: float = 10.0
    """Largest norm of the gradients."""

    def __post_init__(self) -> None:
        check_numbers(self, rate=(0, 1000.0), clip_norm=(0, MANY), weight_decay=(0, 1000.0))
        if not (self.rate and self.clip_norm):
            raise ValueError(f"rate {self.rate} and clip_norm {self.clip_norm} must be positive")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; give two decays in [0, 1)")


class Trained:
    """The parameters of a network that require gradients, and their AdamW."""

    def __init__(self, network: WanModel, config: OptimiserConfig) -> None:
        self.network, self.clip_norm = network, config.clip_norm
        self.optimiser = torch.optim.AdamW(
            [p for p in network.parameters() if p.requires_grad],
            lr=config.rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )

    def descend(self) -> float:
        """One step down the gradients, which are then let go; returns their norm before clipping.

        RuntimeError for a gradient that is not finite.
        """
        norm = clip_gradients(self.network, self.clip_norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        reshard(self.network)
        return norm

    def state(self) -> dict[str, Any]:
        """Weights and moments as nested dictionaries of tensors; rates are the config's."""
        model, optimiser = get_state_dict(self.network, self.optimiser, options=_TRAINED_ONLY)
        return {"model": model, "moments": optimiser["state"]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        _, live = get_state_dict(self.network, self.optimiser, options=_TRAINED_ONLY)
        set_state_dict(
            self.network,
            self.optimiser,
            model_state_dict=state["model"],
            optim_state_dict=live | {"state": state["moments"]},
            options=_TRAINED_ONLY,
        )
