"""What a control costs: what `bench --control` measures.

The same student streams alone and beside a VACE of random weights, whose values change no time, a
round of chunks each in turn, so that what else the machine does falls on all. The network alone is
timed, with a full window, clean passes included.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import torch

from ..config import ControlConfig, VaceConfig
from ..fast.graphs import GraphedModel
from ..stream import Stream
from ..vace import Control, ControlledModel, Vace
from ..weights.vace import context_channels
from .families import RoundsOptions, steady_laps
from .machine import format_machine, machine
from .table import format_table
from .workload import Workload, load_workload, randomise

FORMS: dict[str, ControlConfig | None] = {
    "none": None,
    "chunk": ControlConfig(past=False, clean=False),
    "chunk, clean": ControlConfig(past=False, clean=True),
    "past": ControlConfig(past=True, clean=False),
    "past, clean": ControlConfig(past=True, clean=True),
}
"""What a control's network sees, and whether a clean pass is hinted too."""


@torch.no_grad()
def compare_control(options: RoundsOptions) -> dict[str, Any]:
    """Seconds a chunk and bytes of a student alone and with a control, as JSON can hold them."""
    workload = load_workload(replace(options, graphs=False))
    size, place = workload.model.config, {"device": options.device, "dtype": options.dtype}
    spread = VaceConfig.spread(
        -(-size.num_layers // 2), size.num_layers, in_channels=context_channels(size)
    )
    vace = Vace(size, spread, **place).eval().requires_grad_(False)  # type: ignore[arg-type]
    randomise(vace)
    streams = {name: _stream(workload, vace, form, options) for name, form in FORMS.items()}
    laps: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMS}
    for _ in range(options.rounds):
        for name, stream in streams.items():
            laps[name] += steady_laps(stream, options, _control(stream, FORMS[name], spread))
    rows = []
    for name, stream in streams.items():
        walls, cpus = zip(*laps[name], strict=True)
        rows.append(
            {
                "control": name,
                "seconds": statistics.median(walls),
                "cpu_seconds": statistics.median(cpus),
                "cache_bytes": stream.state.cache.nbytes,
            }
        )
    return {
        "options": options.plain(),
        "machine": machine(options.device),
        "blocks": len(spread.layers),
        "weight_bytes": sum(each.nbytes for each in vace.parameters()),
        "control": rows,
    }


def format_control(result: dict[str, Any]) -> str:
    """The comparison as lines of text."""
    options, rows = result["options"], result["control"]
    title = (
        f"{options['size']} {options['width']}x{options['height']}, {options['dtype']}, the "
        f"network alone, chunks {options['chunks']} x {options['rounds']} rounds in turn; a "
        f"control network of {result['blocks']} blocks, {result['weight_bytes'] / 1e6:.1f} MB"
    )
    head = "control", "ms", "of none", "CPU ms", "of none", "cache MB"
    cells = [
        (
            row["control"],
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['seconds'] / rows[0]['seconds']:.2f}",
            f"{row['cpu_seconds'] * 1e3:.1f}",
            f"{row['cpu_seconds'] / rows[0]['cpu_seconds']:.2f}",
            f"{row['cache_bytes'] / 1e6:.2f}",
        )
        for row in rows
    ]
    facts = (f"{name:<14} {text}" for name, text in format_machine(result["machine"]))
    return "\n".join([title, *facts, "", *format_table(head, cells)])


def _stream(
    workload: Workload, vace: Vace, form: ControlConfig | None, options: RoundsOptions
) -> Stream:
    network = workload.model if form is None else ControlledModel(workload.model, vace, form)
    return replace(workload, passes=GraphedModel(network) if options.graphs else network).stream()


def _control(stream: Stream, form: ControlConfig | None, config: VaceConfig) -> Control | None:
    if form is None:
        return None
    frames = stream.cache_config.chunk_frames
    shape = stream.batch, config.in_channels, frames, *stream.latent_size
    return Control(context=torch.randn(shape, device=stream.device))
