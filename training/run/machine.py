"""What a run needs of the machine and its packages, checked before a group or a weight exists."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable

import torch

from .distributed import check_groups, check_shares, fitting_micro_batch
from .networks import PlacementConfig


def num_processes() -> int:
    """Processes that the run will have, by torchrun's WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_machine(placement: PlacementConfig, wandb: str | None = None) -> None:
    """ValueError where this machine lacks what a run asks for by name."""
    check_placement(placement, num_processes())
    if wandb is not None and not _is_installed("wandb"):
        raise ValueError(
            f"wandb is {wandb!r}, but wandb is not installed; pip install wandb, or leave it out"
        )
    if placement.compile is not None:
        known = torch._dynamo.list_backends(exclude_tags=())
        if placement.compile not in known:
            usual = ", ".join(torch._dynamo.list_backends())
            raise ValueError(
                f"placement.compile is {placement.compile!r}, which is no backend of "
                f"torch.compile here; it has {usual}"
            )


def check_placement(placement: PlacementConfig, processes: int) -> None:
    """ValueError where so many processes are no whole groups of those that a run asks for."""
    for name in ("shard_over", "sequence_over"):
        check_groups(name, getattr(placement, name), processes)


def check_batches(
    batches: Iterable[int], micro_batch: int, processes: int, sequence_over: int | None = None
) -> None:
    """ValueError where a batch cannot be shared out; fewer samples than a micro-batch are one."""
    for batch in batches:
        fitting = fitting_micro_batch(batch, micro_batch, processes, sequence_over)
        check_shares(batch, fitting, processes, sequence_over)


def _is_installed(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True
