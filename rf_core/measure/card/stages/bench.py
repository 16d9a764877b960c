"""Images a second, as `python -m rf_core bench` measures them."""

from __future__ import annotations

from typing import Any

import torch

from ....memory.plan import GB
from ...bench import BenchOptions, bench
from ..plan import Setting
from ..record import NotRun, Record
from . import workload

_CHUNKS, _CHUNKS_REHEARSED = 30, 4
_DECODERS = ("both", "taehv", "none")  # what is tried in turn where memory is short


def run(record: Record, setting: Setting) -> None:
    """Both decoders; where the card is too small for them, less."""
    for decoder in _DECODERS:
        try:
            measure(record, setting, decoder=decoder, chunks=_CHUNKS)
        except torch.OutOfMemoryError:
            record.append("out_of_memory", decoder)
            torch.cuda.empty_cache()
        else:
            return
    raise NotRun("the card's memory is too small for the network alone at this size")


def measure(record: Record, setting: Setting, *, chunks: int, **fields: Any) -> None:
    """One benchmark, noted measurement by measurement."""
    options = BenchOptions(
        chunks=_CHUNKS_REHEARSED if setting.rehearsal else chunks,
        attention="auto",
        graphs=True,
        **workload(setting),
        **fields,
    )

    def report(name: str, value: Any) -> None:
        (record.append if name == "chunk" else record.note)(name, value)

    result = bench(options, report)
    record.note("result", result)
    record.say(
        f"network {result['network_fps']:.1f} images/s, streamed "
        f"{result['network_streamed_fps']:.1f}"
    )
    for name, found in result["decoders"].items():
        record.say(
            f"{name}: decode {found['decode_fps']:.1f}, end to end {found['streamed_fps']:.1f} "
            "images/s"
        )
    first = result["first_image"]
    record.say(f"first image after {1e3 * first['warm']:.0f} ms, cold {1e3 * first['cold']:.0f}")
    if (peak := result["memory_peak_reserved_bytes"]) is not None:
        record.say(f"memory: {peak / GB:.2f} GB reserved at the peak")
