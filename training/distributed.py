"""Many processes: networks sharded by FSDP2, samples shared out, numbers added up.

Every function does nothing in a single process. Parameters are sharded block by block; a block's
second way in, `prompt_kv`, gathers them as its forward does.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from rf_core.model import WanModel


def world_size() -> int:
    """Processes in the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def shard(network: WanModel, device: str) -> WanModel:
    """Shard a network's parameters over all processes, in place; `device` is its kind."""
    if not dist.is_initialized():
        return network
    mesh = init_device_mesh(device, (world_size(),))
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "prompt_kv")
    fully_shard(network, mesh=mesh)
    register_fsdp_forward_method(network, "prompt_context")
    return network


def my_samples(batch: int, micro_batch: int) -> list[range]:
    """This process's micro-batches of the samples 0 to batch - 1.

    ValueError where they cannot be shared out evenly.
    """
    share, rest = divmod(batch, world_size())
    if rest or share % micro_batch:
        raise ValueError(
            f"a batch of {batch} cannot be shared out in micro-batches of {micro_batch} over "
            f"{world_size()} processes; give a batch that is a multiple of "
            f"{micro_batch * world_size()}"
        )
    first = share * rank()
    return [range(i, i + micro_batch) for i in range(first, first + share, micro_batch)]


def summed(value: float) -> float:
    """The sum over processes."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


def clip_gradients(network: nn.Module, largest: float) -> float:
    """Scale gradients down to a norm; returns what it was. RuntimeError for one that is NaN."""
    norm = nn.utils.clip_grad_norm_(network.parameters(), largest, error_if_nonfinite=True)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
