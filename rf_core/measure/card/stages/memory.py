"""What the planner says a stream takes, against what it took; and whether it stays."""

from __future__ import annotations

import gc
from typing import Any

import torch

from ....decoders.handoff import Handoff
from ....fast.stopwatch import Stopwatch
from ....memory.footprint import DecoderConfig, Sizes
from ....memory.plan import GB, fit
from ...bench import growth
from ...workload import RANDOM_SIZES, Workload, WorkloadOptions, decoder_sizes, load_workload
from ..plan import Setting
from ..record import Record
from . import workload

_CHUNKS = 6  # past the first eviction
_FLAT_CHUNKS, _FLAT_SECONDS = 100, 30.0
_TOLERANCE = 0.1  # of the plan, on either side


@torch.no_grad()
def run(record: Record, setting: Setting) -> None:
    """Without a decoder, with TAEHV, with the Wan VAE; then the length of a stream."""
    fields = workload(setting) | {"attention": "auto", "graphs": True}
    for decoder, sizes in (("none", None), *decoder_sizes(setting.size).items()):
        try:
            _planned(record, decoder, sizes, fields)
        except torch.OutOfMemoryError:
            record.append("out_of_memory", decoder)
            torch.cuda.empty_cache()
    _flat(record, fields)


def _planned(
    record: Record, decoder: str, decoder_config: DecoderConfig | None, fields: dict[str, Any]
) -> None:
    device = fields["device"]
    sizes = Sizes(
        model=RANDOM_SIZES[fields["size"]],
        height=fields["height"],
        width=fields["width"],
        decoder=decoder_config,
        dtype=fields["dtype"],
        device=device,
        graphs=True,
    )
    plan = fit(
        sizes, 1 << 62, group_frames=sizes.cache.chunk_frames, offload="none", must_record=True
    )
    row: dict[str, Any] = {"decoder": decoder, "peak": plan.peak, "needed": plan.needed}
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    extra = _stream(load_workload(WorkloadOptions(decoder=decoder, **fields)))
    if device == "cuda":
        row["sink_copy"] = extra
        row["allocated"] = torch.cuda.max_memory_allocated(device) - extra
        row["reserved"] = torch.cuda.max_memory_reserved(device) - extra
        off = row["reserved"] / plan.needed - 1
        record.say(
            f"{decoder}: {row['allocated'] / GB:.2f} GB allocated, {row['reserved'] / GB:.2f} "
            f"reserved; planned {plan.peak / GB:.2f} and {plan.needed / GB:.2f}; "
            f"{extra / GB:.2f} more hold the sink's copy"
        )
        record.check(f"reserved beyond the plan, decoder {decoder}", off, _TOLERANCE)
    record.append("rows", row)


def _stream(work: Workload) -> int:
    """Some chunks, made and handed on as a run does it; the bytes of the sink's copy on the card,
    which is there only while much is free, and which no plan counts."""
    stream = work.stream()
    if stream.decoder is None:
        for _ in range(_CHUNKS):
            stream.generate()
    else:
        with Handoff(stream.decoder, lambda images: None, device=stream.device) as handoff:
            for _ in range(_CHUNKS):
                stream.state.decoder = handoff.submit(stream.generate(), stream.state.decoder)
    backup = stream.state.cache.sink_backup
    return 0 if backup is None else sum(t.nbytes for t in backup.tensors.values() if t.is_cuda)


def _flat(record: Record, fields: dict[str, Any]) -> None:
    stream = load_workload(WorkloadOptions(decoder="none", **fields)).stream()
    for _ in range(_CHUNKS):
        stream.generate()
    clock, watch = Stopwatch(stream.device), Stopwatch(stream.device)
    seconds: list[float] = []
    held: list[float] = []
    spent = 0.0
    while len(seconds) < _FLAT_CHUNKS and spent < _FLAT_SECONDS:
        stream.generate()
        seconds.append(watch.lap())
        spent += clock.lap()
        if fields["device"] == "cuda":
            held.append(torch.cuda.memory_allocated(fields["device"]))
    slopes = growth(seconds), growth(held)
    record.note("flat", {"chunks": len(seconds), "seconds": slopes[0], "bytes": slopes[1]})
    if slopes[0] is not None and slopes[1] is not None:
        record.say(
            f"over {len(seconds)} chunks {1e3 * slopes[0]:+.3f} ms and {slopes[1] / 1e6:+.3f} MB "
            "in 100 chunks"
        )
        record.check("bytes more in 100 chunks", abs(slopes[1]), 1e6)
