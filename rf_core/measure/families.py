"""Families beside each other: what `bench --families` measures.

Every preset streams the same network at the same size, a round of chunks each in turn, so that what
else the machine does falls on all. The network alone is timed, with a full window, cache passes
included. Beside it stands what a latent frame takes at Wan's own size, counted.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..config import TEMPORAL_FACTOR, WAN_1_3B, WAN_SIZE, Grid
from ..families import DEFAULT, FAMILIES, Family
from ..fast.graphs import GraphedModel
from ..fast.stopwatch import Stopwatch
from ..stream import Stream, latent_size
from ..vace import Control
from .counts import chunk_passes, chunk_work, total
from .machine import format_machine, machine
from .table import format_table
from .workload import Workload, WorkloadOptions, load_workload

_WARM = 10  # chunks after which a CPU, too, has recorded the passes that it will


@dataclass(frozen=True, kw_only=True)
class RoundsOptions(WorkloadOptions):
    """What is compared in turns; of families each one's own cache and sampler take the place of
    those given."""

    chunks: int = 12
    """Chunks of each in a round."""
    rounds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("chunks", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{getattr(self, name)} {name} measure nothing; make 1")


@torch.no_grad()
def compare_families(options: RoundsOptions) -> dict[str, Any]:
    """Passes, counted work and measured seconds a chunk of every family, as JSON can hold them."""
    workload = load_workload(replace(options, graphs=False))
    laps: dict[str, list[tuple[float, float]]] = {name: [] for name in FAMILIES}
    for _ in range(options.rounds):
        for name, family in FAMILIES.items():
            laps[name] += _laps(workload, family, options)
    rows = []
    for name, family in FAMILIES.items():
        walls, cpus = zip(*laps[name], strict=True)
        seconds, frames = statistics.median(walls), family.cache.chunk_frames
        rows.append(
            {
                "family": name,
                **passes_of(family),
                "seconds": seconds,
                "cpu_seconds": statistics.median(cpus),
                "fps": frames * TEMPORAL_FACTOR / seconds,
            }
        )
    return {"options": options.plain(), "machine": machine(options.device), "families": rows}


def passes_of(family: Family) -> dict[str, Any]:
    """Latent frames and passes of a family's chunks: the first one's, and of the steady state.

    `work` is the operations of a latent frame, of the 1.3B at the published size, relative to ours.
    """
    cache, sampler = family.cache, family.sampler
    passes = chunk_passes(cache, sampler)
    denoising = sampler.passes_of(is_first=False)
    return {
        "frames": cache.chunk_frames,
        "first_passes": sampler.passes_of(is_first=True),
        "passes": denoising,
        "cache_passes": sum(each.count for each in passes) - denoising,
        "pass_frames": passes[0].frames,
        "attended_frames": passes[0].frames + passes[0].context_frames,
        "work": _flops_per_frame(family) / _flops_per_frame(FAMILIES[DEFAULT]),
    }


def format_families(result: dict[str, Any]) -> str:
    """The comparison as lines of text."""
    options = result["options"]
    title = (
        f"{options['size']} {options['width']}x{options['height']}, {options['dtype']}, "
        f"the network alone, chunks {options['chunks']} x {options['rounds']} rounds in turn"
    )
    head = (
        *("family", "frames", "first", "later", "frames a pass", "attended"),
        *("work a frame", "ms", "CPU ms", "images/s"),
    )
    facts = (f"{name:<14} {text}" for name, text in format_machine(result["machine"]))
    return "\n".join([title, *facts, "", *format_table(head, list(_cells(result["families"])))])


def _cells(rows: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        yield (
            row["family"],
            str(row["frames"]),
            str(row["first_passes"]),
            f"{row['passes']} + {row['cache_passes']}",
            str(row["pass_frames"]),
            str(row["attended_frames"]),
            f"{row['work']:.2f}",
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['cpu_seconds'] * 1e3:.1f}",
            f"{row['fps']:.1f}",
        )


def _laps(workload: Workload, family: Family, options: RoundsOptions) -> list[tuple[float, float]]:
    network = GraphedModel(workload.model) if options.graphs else workload.model
    cache = family.cache
    if cache.rebuild == "reencoded":  # nothing is decoded, so nothing encoded
        cache = replace(cache, rebuild="first")
    own = replace(options, cache=cache, sampler=family.sampler)
    return steady_laps(replace(workload, passes=network, options=own).stream(), options)


def steady_laps(
    stream: Stream, options: RoundsOptions, control: Control | None = None
) -> list[tuple[float, float]]:
    """Seconds of each chunk by the wall, and of CPU time, once the window is full."""
    cache = stream.cache_config
    for _ in range(cache.window_frames // cache.chunk_frames + _WARM):
        stream.generate(control=control)
    watch, laps = Stopwatch(options.device), []
    for _ in range(options.chunks):
        stream.generate(control=control)
        laps.append(watch.laps())
    return laps


def _flops_per_frame(family: Family) -> float:
    """Operations of a latent frame of the 1.3B at the published size, in the steady state."""
    grid = Grid.of_latents(*latent_size(*WAN_SIZE, WAN_1_3B.patch_size), WAN_1_3B.patch_size)
    work = total(chunk_work(WAN_1_3B, family.cache, family.sampler, grid))
    return work.flops / family.cache.chunk_frames
