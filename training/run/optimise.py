"""A network with its optimisers: a step, and their state in checkpoints."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from rf_core.model import WanModel
from rf_core.ranges import MANY, check_numbers

from ..muon import Muon
from .distributed import all_reduce_max, clip_gradients, reshard
from .ema import trainable
from .momentless import MomentlessAdamW

SMALLEST_RATE = 1e-12
"""Of a learning rate: what is below it trains nothing that float32 weights can hold."""
RATES = ("rate", "matrix_rate", "clip_norm")
"""Fields of `OptimiserConfig` that may be others when a run is resumed."""
_BLOCKS = re.compile(r"(vace\.vace_)?blocks\.")
_TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True)


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """AdamW, and Muon for matrices where asked; defaults are the published ones of Re-DMD."""

    rate: float
    """Learning rate."""
    betas: tuple[float, float] = (0.0, 0.999)
    """Decay of the two moments; where the first is 0, as published, that moment is not kept."""
    weight_decay: float = 0.01
    """Decoupled weight decay; with Muon, of its matrices alone."""
    clip_norm: float = 10.0
    """Largest norm of AdamW's gradients; Muon's steps have no length of their own."""
    matrix_rate: float | None = None
    """Muon's learning rate, for the blocks' matrices; None for AdamW alone."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Schedule of the rates over the run: `cosine` decays them to a hundredth."""
    warmup: int = 0
    """Updates of linear warm-up."""

    def __post_init__(self) -> None:
        rates = ("rate", "matrix_rate")
        check_numbers(self, **dict.fromkeys(rates, (SMALLEST_RATE, 1000.0)), warmup=(0, MANY))
        check_numbers(self, clip_norm=(1e-9, MANY), weight_decay=(0, 1000.0))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; give two decays in [0, 1)")

    def is_muons(self, name: str, parameter: Tensor) -> bool:
        """Whether Muon steps a parameter of that name: blocks' matrices, where it is asked for."""
        muon = self.matrix_rate is not None
        return muon and bool(_BLOCKS.match(name)) and parameter.ndim == 2

    def num_moments(self, name: str, parameter: Tensor) -> int:
        """How many tensors of a parameter's own size its optimiser keeps."""
        return 1 if self.betas[0] == 0 or self.is_muons(name, parameter) else 2

    def rate_factor(self, update: int, updates: int) -> float:
        """Factor on the learning rates at `update` of a run of `updates`."""
        rise = min(1.0, (update + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "constant":
            return rise
        return rise * (0.01 + 0.99 * (1 + math.cos(math.pi * min(update / updates, 1.0))) / 2)


class TrainedNetwork:
    """The parameters of a network that require gradients, and their optimisers."""

    def __init__(self, network: WanModel, config: OptimiserConfig) -> None:
        self.network, self.config = network, config
        named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        muon = config.matrix_rate is not None
        matrices = [p for name, p in named if config.is_muons(name, p)]
        chosen = {id(each) for each in matrices}
        self.others = [p for _, p in named if id(p) not in chosen]
        decay = 0.0 if muon else config.weight_decay
        self.optimisers: list[torch.optim.Optimizer] = [_adamw(self.others, config, decay)]
        if config.matrix_rate is not None:
            decay = config.weight_decay
            self.optimisers.append(Muon(matrices, lr=config.matrix_rate, weight_decay=decay))
        self.rates = [config.rate, config.matrix_rate]

    def step(self, rate_factor: float = 1.0) -> float:
        """One optimiser step; clears the gradients and returns their norm before clipping.

        `rate_factor` multiplies the rates. FloatingPointError for a gradient that is not finite.
        """
        norm = clip_gradients(self.others, self.config.clip_norm)
        for optimiser, rate in zip(self.optimisers, self.rates, strict=False):
            for group in optimiser.param_groups:
                group["lr"] = rate * rate_factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        reshard(self.network)
        return norm

    def clear(self) -> None:
        """Drop the gradients of a step that is not taken."""
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        reshard(self.network)

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether all trained weights are, on every process."""
        held = (p.detach() for _, p in trainable(self.network))
        own = (p.to_local() if isinstance(p, DTensor) else p for p in held)
        return not all_reduce_max(any(not bool(p.isfinite().all()) for p in own))

    def state(self) -> dict[str, Any]:
        """Weights and moments as nested dictionaries of tensors; rates are the config's."""
        model, optimiser = self._state_dict()
        return {"model": model, "moments": optimiser["state"]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` has returned."""
        _, live = self._state_dict()
        frozen = {name: p for name, p in self.network.named_parameters() if not p.requires_grad}
        set_state_dict(
            self.network,
            self.optimisers,
            model_state_dict={**frozen, **state["model"]},
            optim_state_dict=live | {"state": state["moments"]},
            options=_TRAINED_ONLY,
        )

    def _state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """torch's, which gives optimisers that have none their moments by a step of nothing: here
        it does not count."""
        fresh = [optimiser for optimiser in self.optimisers if not optimiser.state]
        found = get_state_dict(self.network, self.optimisers, options=_TRAINED_ONLY)
        counts = [s["step"] for each in fresh for s in each.state.values() if "step" in s]
        for count in counts:
            count.zero_()
        if not counts:
            return found
        return get_state_dict(self.network, self.optimisers, options=_TRAINED_ONLY)


def _adamw(
    parameters: list[torch.nn.Parameter], config: OptimiserConfig, decay: float
) -> torch.optim.Optimizer:
    first, second = config.betas
    if first == 0:
        return MomentlessAdamW(parameters, lr=config.rate, beta2=second, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=config.rate, betas=config.betas, weight_decay=decay)
