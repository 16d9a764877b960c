"""Many processes: FSDP2 for networks, a share of the samples each, sums and gathers.

In a single process every function does nothing. Parameters are sharded block by block; a block's
other entry points (`prompt_kv`, `modulations`, `write_cache`) gather them as its forward does.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from rf_core.console import exit_process
from rf_core.model import WanModel

T = TypeVar("T")


class Stopped(Exception):  # noqa: N818  # no error: it was asked for
    """A run that was asked to stop, and where it goes on."""

    def __init__(self, number: int, where: str = "") -> None:
        super().__init__(number, where)
        self.number, self.where = number, where

    def saved(self, out: Path, update: int) -> Stopped:
        """The same, once what the run in `out` has done is saved; it is in update `update`."""
        where = f"{out} is saved in update {update}; --resume goes on from there"
        return Stopped(self.number, where)

    @property
    def code(self) -> int:
        """What the process is to leave with."""
        return 128 + self.number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}: {self.where}"


def world_size() -> int:
    """Processes in the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Within it, the process group that `torchrun` asks for; yields this process' device.

    `device` is `cpu` or `cuda`. Without torchrun there is a single process and no group.
    """
    if "RANK" not in os.environ:
        yield torch.device(device)
        return
    place = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else device
    if device == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield torch.device(place)
    except BaseException as error:
        error.is_told = not _is_first_to_tell(error)  # type: ignore[attr-defined]
        if device == "cuda":  # at once: destroying an NCCL group would wait for the others
            exit_process(exit_code(error))
        dist.destroy_process_group()
        raise
    barrier()
    dist.destroy_process_group()


def exit_code(error: BaseException) -> int:
    """What a command leaves with for an error, which is told on one process alone.

    What is wrong in the same words is told by the first process that meets it; before there is a
    group, by the first of each machine.
    """
    told = getattr(error, "is_told", os.environ.get("LOCAL_RANK", "0") != "0")
    if isinstance(error, Stopped):
        if not told:
            sys.stderr.write(f"{error}\n")
        return error.code
    if isinstance(error, KeyboardInterrupt):
        if not told:
            sys.stderr.write("stopped\n")
        return 128 + signal.SIGINT
    if not isinstance(error, ValueError | OSError | FloatingPointError):
        traceback.print_exception(error)
    elif not told:
        sys.stderr.write(f"error: {error}\n")
    return 1


def _is_first_to_tell(error: BaseException) -> bool:
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.add(f"told: {type(error).__name__}: {error}", 1) == 1
    except (RuntimeError, ValueError):  # whoever holds the store is gone
        return rank() == 0


def shard(
    network: WanModel,
    device: str,
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
    reshard_blocks: bool = True,
    shard_over: int | None = None,
) -> WanModel:
    """Shard a network's parameters over all processes, in place; `device` is its kind.

    Blocks compute in `dtype` and sum gradients in float32. With `offload`, shards wait in host
    memory; without `reshard_blocks`, gathered blocks are kept until the backward pass. With
    `shard_over`, every so many neighbouring processes have a copy of their own (HSDP). ValueError
    where processes cannot be shared out so.
    """
    if not dist.is_initialized():
        return network
    # Inputs are cast by whoever calls: timesteps and positions must stay in float32.
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    options = {
        "mesh": _mesh(device, shard_over),
        "mp_policy": precision,
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for block in network.blocks:
        for projection in ("before_proj", "after_proj"):  # of a VACE, called outside its block
            if hasattr(block, projection):
                fully_shard(getattr(block, projection), **options)
        fully_shard(block, reshard_after_forward=reshard_blocks, **options)
        for method in ("prompt_kv", "modulations", "write_cache"):
            register_fsdp_forward_method(block, method)
    fully_shard(network, **options)
    for method in ("prompt_context", "counted_prompt", "time_context", "write_cache"):
        if hasattr(network, method):
            register_fsdp_forward_method(network, method)
    return network


def _mesh(device: str, shard_over: int | None) -> DeviceMesh:
    if shard_over is None:
        return init_device_mesh(device, (world_size(),))
    check_groups("shard_over", shard_over, world_size())
    copies = world_size() // shard_over
    return init_device_mesh(device, (copies, shard_over), mesh_dim_names=("copy", "shard"))


def check_groups(name: str, over: int | None, processes: int) -> None:
    """ValueError where processes are no whole groups of as many as a field of placement says."""
    if over is not None and processes % over:
        raise ValueError(
            f"placement.{name} is {over}, of which the number of processes, {processes}, is no "
            "multiple; give the cards of a node, and start whole nodes"
        )


def shard_modules(network: nn.Module, parts: Iterable[nn.Module], device: str) -> None:
    """Shard any frozen network, part by part, in place, in the dtype it has."""
    mesh = init_device_mesh(device, (world_size(),))
    for part in parts:
        fully_shard(part, mesh=mesh)
    fully_shard(network, mesh=mesh)


def check_shares(
    batch: int, micro_batch: int, processes: int, sequence_over: int | None = None
) -> int:
    """Samples of each process; ValueError where they cannot be shared out in micro-batches.

    With `sequence_over`, so many neighbouring processes have the same samples.
    """
    shares = num_shares(processes, sequence_over)
    share, rest = divmod(batch, shares)
    if rest or share % micro_batch:
        over = f"{processes} processes"
        if shares < processes:
            over += f" in groups of placement.sequence_over {sequence_over}"
        raise ValueError(
            f"a batch of {batch} cannot be shared out in micro-batches of {micro_batch} over "
            f"{over}; give a batch that is a multiple of {micro_batch * shares}"
        )
    return share


def num_shares(processes: int, sequence_over: int | None) -> int:
    """How many shares of a batch there are: one a group of `sequence_over` processes."""
    return processes // (sequence_over or 1)


def fitting_micro_batch(
    batch: int, micro_batch: int, processes: int, sequence_over: int | None = None
) -> int:
    """Samples at a time: `micro_batch`, or all of a process's where there are fewer."""
    return min(micro_batch, max(1, batch // num_shares(processes, sequence_over)))


def share_number(sequence_over: int | None) -> int:
    """Which share of a batch is this process's."""
    return rank() // (sequence_over or 1)


def local_micro_batches(
    batch: int, micro_batch: int, sequence_over: int | None = None
) -> list[range]:
    """This process's micro-batches of the samples 0 to batch - 1.

    ValueError where they cannot be shared out evenly.
    """
    share = check_shares(batch, micro_batch, world_size(), sequence_over)
    first = share * share_number(sequence_over)
    return [range(i, i + micro_batch) for i in range(first, first + share, micro_batch)]


def all_reduce_sum(value: float) -> float:
    """The sum over processes."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


def all_reduce_max(value: int) -> int:
    """The largest over processes."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def all_gather(values: Tensor, sequence_over: int | None = None) -> Tensor:
    """The values [n, ...] of all processes, concatenated in the order of ranks.

    With `sequence_over`, those of the first of every so many, which have the same.
    """
    if not dist.is_initialized():
        return values
    every = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(every, values.contiguous())
    return torch.cat(every[:: sequence_over or 1])


def broadcast_from_rank_0(value: T) -> T:
    """The first process' value, on all: processes may see a shared disk at different moments."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def reshard(network: nn.Module) -> None:
    """Free gathered weights after their shards have changed, so that they are gathered again."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Clip gradients to a norm; returns it. FloatingPointError where it is not finite."""
    total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = float(total.full_tensor() if hasattr(total, "full_tensor") else total)
    if not math.isfinite(norm):
        raise FloatingPointError("the gradients are not finite")
    nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return norm
