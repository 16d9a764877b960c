"""Our stream against the published code: what `bench --baseline` measures.

Both run in one process on the same weights, prompt and noise, chunk by chunk in turn, so that what
else the machine does falls on both. Only the network is compared: the published code decodes once,
after the last chunk. Latents come first: where they differ there is no ratio of times.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Grid
from ..fast.stopwatch import Stopwatch
from ..stream import Stream, chunk_noise
from .machine import format_machine, machine
from .published import Published, check_settings
from .table import format_table
from .verify import RELATIVE_NORM
from .workload import Workload, WorkloadOptions, load_workload


@dataclass(frozen=True, kw_only=True)
class BaselineOptions(WorkloadOptions):
    """What is compared."""

    folder: Path
    """A checkout of the published code."""
    chunks: int = 12
    """Chunks of a round; those before the window's second eviction are not counted."""
    rounds: int = 3
    """Rollouts, each from noise of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self.cache, self.sampler)
        if self.chunks <= self.warm_up:
            raise ValueError(
                f"{self.chunks} chunks leave nothing after the first {self.warm_up}, in which the "
                f"window fills; make {self.warm_up + 1}"
            )
        if self.rounds < 1:
            raise ValueError(f"{self.rounds} rounds measure nothing; make 1")

    @property
    def warm_up(self) -> int:
        """Chunks until the window is full and has let one go."""
        return self.cache.window_frames // self.cache.chunk_frames + 1


@dataclass(frozen=True)
class _Round:
    """Median seconds a chunk, by the wall and of CPU time, and how far the latents differ."""

    ours: tuple[float, float]
    published: tuple[float, float]
    error: float


@torch.no_grad()
def compare(options: BaselineOptions) -> dict[str, Any]:
    """Seconds a chunk of both, and their ratio where the latents agree; None where they do not."""
    workload = load_workload(options)
    stream = workload.stream()
    published = Published(
        options.folder,
        workload.model,
        cache=options.cache,
        sampler=stream.sampler,
        grid=Grid.of_latents(*stream.latent_size, workload.model.config.patch_size),
    )
    del stream
    rounds = [_round(workload, published, options, seed) for seed in range(options.rounds)]
    error, limit = max(r.error for r in rounds), RELATIVE_NORM[options.dtype]
    agrees = error <= limit
    ratios = [
        [theirs / ours for ours, theirs in zip(r.ours, r.published, strict=True)] for r in rounds
    ]
    walls, cpus = zip(*ratios, strict=True)
    return {
        "options": options.plain(),
        "machine": machine(options.device),
        "attention": workload.attention.name,
        "replaced_attention": published.replaced_attention,
        "latents_error": error,
        "latents_error_limit": limit,
        "agrees": agrees,
        "rounds": [{"ours": r.ours, "published": r.published} for r in rounds],
        "ratio": _spread(walls) if agrees else None,
        "cpu_ratio": _spread(cpus) if agrees else None,
    }


def format_comparison(result: dict[str, Any]) -> str:
    """The comparison as lines of text."""
    options = result["options"]
    title = (
        f"{options['size']} {options['width']}x{options['height']}, {options['dtype']}, "
        f"the network alone, chunks {options['chunks']} x {options['rounds']} rounds in turn"
    )
    verdict = "agree" if result["agrees"] else "DISAGREE"
    latents = (
        f"{verdict}: relative norm of the difference {result['latents_error']:.2g}, "
        f"limit {result['latents_error_limit']:g}"
    )
    theirs = "SDPA in place of flash-attn" if result["replaced_attention"] else "its flash-attn"
    rows = [
        *format_machine(result["machine"]),
        ("attention", f"ours {result['attention']}; published {theirs}"),
        ("latents", latents),
    ]
    return "\n".join([title, *(f"{name:<14} {text}" for name, text in rows), "", *_times(result)])


def _times(result: dict[str, Any]) -> list[str]:
    if not result["agrees"]:
        return ["no ratio of times: what is compared does not compute the same"]
    rows = []
    for number, seconds in enumerate(result["rounds"], 1):
        pairs = list(zip(seconds["ours"], seconds["published"], strict=True))
        cells = [cell for our, their in pairs for cell in (f"{our:.4f}", f"{their:.4f}")]
        rows.append([f"round {number}", *cells])
    head = ("median s a chunk", "ours", "published", "CPU: ours", "CPU: published")
    return [
        *format_table(head, rows),
        f"published / ours: {_ratio(result['ratio'])}; of CPU time {_ratio(result['cpu_ratio'])}",
    ]


def _ratio(spread: dict[str, float]) -> str:
    return f"{spread['median']:.3f} ({spread['min']:.3f} to {spread['max']:.3f} over the rounds)"


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def _round(workload: Workload, published: Published, options: BaselineOptions, seed: int) -> _Round:
    stream = workload.stream(seed)
    watch = Stopwatch(options.device)
    ours: list[tuple[float, float]] = []
    latents: list[Tensor] = []

    def before_chunk(chunk: int) -> None:
        watch.laps()
        made = stream.generate()
        ours.append(watch.laps())
        latents.append(made.float().cpu())

    noise, renoise = _noise(stream, options, seed)
    found, theirs = published.stream(workload.prompts[0], noise, renoise, before_chunk)
    pairs = zip(latents, found.split(options.cache.chunk_frames, dim=2), strict=True)
    errors = torch.stack([(our - their).norm() / their.norm() for our, their in pairs])
    error = float(errors.nan_to_num(nan=torch.inf).max())
    return _Round(_medians(ours[options.warm_up :]), _medians(theirs[options.warm_up :]), error)


def _medians(laps: Sequence[tuple[float, float]]) -> tuple[float, float]:
    walls, cpus = zip(*laps, strict=True)
    return statistics.median(walls), statistics.median(cpus)


def _noise(stream: Stream, options: BaselineOptions, seed: int) -> tuple[Tensor, Iterator[Tensor]]:
    """Our stream's noise of all chunks, as the published code takes it."""
    shape = (stream.model.config.in_dim, options.cache.chunk_frames, *stream.latent_size)
    steps = len(stream.sampler.steps)
    draws = [chunk_noise([seed], chunk, shape, steps) for chunk in range(options.chunks)]
    renoise = (draw for first, *later in draws for draw in later)
    return torch.cat([first for first, *_ in draws], dim=2), renoise
