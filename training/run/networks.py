"""Opening the three networks of a distillation: from files, sharded, as adapters, recomputed.

A network is built without memory, given its adapters, cut into shards, and only then filled, by the
first process, from a memory-mapped file: no process ever holds more than its share and one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from rf_core.config import ModelConfig
from rf_core.model import WanModel
from rf_core.ranges import MANY, check_numbers
from rf_core.weights.checkpoint import read_checkpoint

from .distributed import rank, shard
from .lora import LoRAConfig, adapter_weights, add_adapters, renamed_base
from .sequence import split_sequence

N = TypeVar("N", bound=nn.Module)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """Where and how networks are held and run."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype they compute in. Weights that are trained, gradients and moments stay in float32;
    bfloat16 needs a process group, which `torchrun` gives, as FSDP2 does the casting."""
    checkpointing: bool = False
    """Whether blocks are recomputed in the backward pass: less memory, a third more time."""
    compile: str | None = None
    """torch.compile's backend for each block, such as `inductor`; None to run as written."""
    offload: Literal["none", "teacher", "all"] = "none"
    """Whose weights wait in host memory between uses (sharded runs only)."""
    reshard: bool = True
    """Whether gathered weights are given back after every block; False is faster and holds a
    whole network on each card."""
    shard_over: int | None = None
    """How many neighbouring processes share a copy of the weights out among them, such as the cards
    of a node; None for all. Each such group has a copy of its own (hybrid sharding, HSDP): weights
    are gathered within it, and gradients alone are summed over all."""
    sequence_over: int | None = None
    """How many neighbouring processes share the tokens of a sample out among them, of every
    network and of the student's cache, such as the cards of a node (sequence parallelism,
    DeepSpeed-Ulysses); None for a process a sample. It must divide the networks' heads and the
    tokens of a frame."""

    def __post_init__(self) -> None:
        check_numbers(self, shard_over=(1, MANY), sequence_over=(1, MANY))


def open_network(
    path: Path,
    placement: PlacementConfig,
    device: torch.device,
    *,
    trained: bool,
    offload: bool = False,
    lora: LoRAConfig | None = None,
    seed: int = 0,
    latents: Sequence[int] | None = None,
) -> WanModel:
    """A network from a checkpoint of any layout the engine reads, placed and ready.

    A network that is not trained is held in `placement.dtype`, one that is in float32; `lora` adds
    adapters, which are then all that is trained. `latents` is the shape of a sample, [C, F, h, w],
    by which `placement.sequence_over` shares tokens out; ValueError where it cannot. Every process
    calls this together.
    """
    source = read_checkpoint(path)
    return _placed(
        source.config, source.merged(), placement, device, trained, offload, lora, seed, latents
    )


def new_network(
    config: ModelConfig,
    placement: PlacementConfig,
    device: torch.device,
    *,
    seed: int,
    latents: Sequence[int] | None = None,
) -> WanModel:
    """A freshly drawn network, placed and ready to be trained; every process draws the same.

    `latents` as of `open_network`.
    """
    model = WanModel(config)
    generator = torch.Generator().manual_seed(seed)
    model.initialise(generator)
    # Wan's small text embedding is meant for thousands of inputs; at 64 it would drown the prompt.
    for layer in (model.text_embedding[0], model.text_embedding[2]):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
    tensors, offload = model.state_dict(), placement.offload == "all"
    return _placed(config, tensors, placement, device, True, offload, None, seed, latents)


def random_network(
    config: ModelConfig,
    placement: PlacementConfig,
    device: torch.device,
    *,
    trained: bool,
    offload: bool = False,
    lora: LoRAConfig | None = None,
    latents: Sequence[int] | None = None,
) -> WanModel:
    """A network as `open_network` places it, of weights that mean nothing: for a dry run.

    No process holds more than its share.
    """
    return _placed(config, None, placement, device, trained, offload, lora, 0, latents)


def _placed(
    config: ModelConfig,
    tensors: Mapping[str, Tensor] | None,
    placement: PlacementConfig,
    device: torch.device,
    trained: bool,
    offload: bool,
    lora: LoRAConfig | None,
    seed: int,
    latents: Sequence[int] | None,
) -> WanModel:
    network = _empty(config, torch.float32 if trained else DTYPES[placement.dtype])
    network = split_sequence(network, placement.sequence_over, latents, device.type)
    network.requires_grad_(trained and lora is None)
    if lora is not None:
        add_adapters(network, lora)
    if lora is not None and tensors is not None:
        tensors = renamed_base(network, tensors) | adapter_weights(network, seed)
    prepare(network, placement, trained=trained)
    shard(
        network,
        device.type,
        placement_dtype(placement),
        offload,
        placement.reshard,
        placement.shard_over,
    )
    if tensors is None:
        return drawn(network.to_empty(device="cpu" if offload else device))
    return filled(network, tensors, device, offload)


def prepare(network: N, placement: PlacementConfig, *, trained: bool) -> N:
    """Have blocks recompiled and recomputed as asked; changes no name of a weight."""
    if placement.compile is not None:
        # Blocks share their code, and so the count of how often it may be compiled anew: with and
        # without gradient, with each length of the cache, and without one.
        torch._dynamo.config.recompile_limit = 64
    for block in network.blocks:  # type: ignore[union-attr]
        if placement.checkpointing and trained:
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
        if placement.compile is not None:
            block.compile(backend=placement.compile)
    return network


def placement_dtype(placement: PlacementConfig) -> torch.dtype:
    """What networks compute in; ValueError where this process cannot."""
    if placement.dtype != "float32" and not dist.is_initialized():
        raise ValueError(
            f"placement.dtype is {placement.dtype}, which sharded networks cast to; start the run "
            "with `torchrun --nproc-per-node 1 -m training ...`"
        )
    if placement.offload != "none" and not dist.is_initialized():
        raise ValueError(
            f"placement.offload is {placement.offload}, which sharded networks can do; start the "
            "run with `torchrun --nproc-per-node 1 -m training ...`"
        )
    return DTYPES[placement.dtype]


def _empty(config: ModelConfig, dtype: torch.dtype) -> WanModel:
    with torch.device("meta"):
        return WanModel(config, dtype=dtype)


@torch.no_grad()
def drawn(network: N) -> N:
    """A placed network, filled with small noise."""
    for parameter in network.parameters():
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        own.normal_(std=0.02)
    return network


def filled(network: N, tensors: Mapping[str, Tensor], device: torch.device, offload: bool) -> N:
    """A placed network, filled with whole tensors; those of the first process count."""
    network.to_empty(device="cpu" if offload else device)
    if not dist.is_initialized():
        network.load_state_dict(tensors, strict=True)
        return network
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(network, dict(tensors) if rank() == 0 else {}, options=options)
    return network
