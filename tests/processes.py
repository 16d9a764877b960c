"""Child processes that begin with torch imported, which takes each a second or two otherwise."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
IMPORTED = ["torch.distributed.fsdp", "torch._dynamo", "rf_core.stream"]
multiprocessing.set_forkserver_preload(IMPORTED)


def spawn(function: Callable[..., None], arguments: tuple[Any, ...], nprocs: int) -> None:
    """`torch.multiprocessing.spawn`; the children are forked off a process that runs nothing."""
    mp.start_processes(function, arguments, nprocs=nprocs, start_method=METHOD)
