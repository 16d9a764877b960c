"""A network and the VACE that is trained beside it, placed as one: sharded, recomputed, filled."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from rf_core.config import ModelConfig, VaceConfig
from rf_core.model import PromptContext, WanModel
from rf_core.vace import ControlledModel, Vace
from rf_core.weights.checkpoint import read_checkpoint

from .distributed import shard
from .networks import PlacementConfig, drawn, filled, placement_dtype, prepare


class TrainedControl(nn.Module):
    """A frozen base and its VACE as what is trained: one module, so that FSDP gathers for both."""

    def __init__(self, model: ControlledModel) -> None:
        super().__init__()
        self.base, self.vace = model.base, model.vace
        self._model = (model,)  # no module of its own: it has the same two

    @property
    def config(self) -> ModelConfig:
        """The base's sizes."""
        return self.base.config

    @property
    def blocks(self) -> list[nn.Module]:
        """Those of both."""
        return list(chain(self.base.blocks, self.vace.vace_blocks))

    def prompt_context(self, prompt_embeds_BSD: Tensor) -> PromptContext:
        """See `ControlledModel.prompt_context`."""
        return self._model[0].prompt_context(prompt_embeds_BSD)

    def forward(
        self, x: Tensor, timestep_BF: Tensor, prompt: PromptContext, context: Tensor
    ) -> Tensor:
        """The flow of whole clips [B, C, F, h, w] under control contexts [B, Z, F, h, w]."""
        model, ones = self._model[0], x.new_ones(x.shape[2])
        control = model.embed_control(context, ones, x.dtype)
        return model(x, timestep_BF, prompt, control=control)


class UnderControl:
    """The same under one context, as whoever samples a network calls it."""

    def __init__(self, network: TrainedControl, context: Tensor) -> None:
        """`context` is [1 or B, Z, F, h, w]."""
        self.network, self.context = network, context

    def prompt_context(self, prompt_embeds_BSD: Tensor) -> PromptContext:
        """See `TrainedControl`."""
        return self.network.prompt_context(prompt_embeds_BSD)

    def __call__(self, x: Tensor, timestep_BF: Tensor, prompt: PromptContext) -> Tensor:
        context = self.context.expand(len(x), -1, -1, -1, -1)
        return self.network(x, timestep_BF, prompt, context)


def open_control(
    path: Path, vace: VaceConfig, placement: PlacementConfig, device: torch.device, *, seed: int
) -> TrainedControl:
    """A network from a file, frozen, with a new VACE that hints nothing yet and is to be trained.

    Every process calls this together, and draws the same.
    """
    source = read_checkpoint(path)
    base = WanModel(source.config)
    base.load_state_dict(source.merged(), strict=True)
    new = Vace(source.config, vace)
    new.initialise(base, torch.Generator().manual_seed(seed))
    tensors = TrainedControl(ControlledModel(base, new)).state_dict()
    network = _placed(source.config, vace, placement, device)
    return filled(network, tensors, device, placement.offload == "all")


def random_control(
    size: ModelConfig, vace: VaceConfig, placement: PlacementConfig, device: torch.device
) -> TrainedControl:
    """The same of weights that mean nothing: for a dry run."""
    network = _placed(size, vace, placement, device)
    return drawn(network.to_empty(device="cpu" if placement.offload == "all" else device))


def _placed(
    size: ModelConfig, vace: VaceConfig, placement: PlacementConfig, device: torch.device
) -> TrainedControl:
    with torch.device("meta"):
        network = TrainedControl(ControlledModel(WanModel(size), Vace(size, vace)))
    network.base.requires_grad_(False)
    prepare(network, placement, trained=True)
    shard(
        network,
        device.type,
        placement_dtype(placement),
        placement.offload == "all",
        placement.reshard,
        placement.shard_over,
    )
    return network
