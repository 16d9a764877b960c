"""Where the time of a chunk and of a decode goes, by kind of work and by kernel; how much of a
recorded chunk the card is idle."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import torch

from ....kernels.availability import multiplies_fp8
from ...profile import (
    ProfileOptions,
    busy_and_idle,
    costliest,
    costliest_events,
    device_events,
    profile,
    steady_after,
)
from ...workload import WorkloadOptions, load_workload
from ..plan import Setting
from ..record import Record
from . import workload

_CHUNKS, _KERNELS = 3, 40


@torch.no_grad()
def run(record: Record, setting: Setting) -> None:
    """Kinds of work first, then a recorded chunk, then the kernels of one that is not and of one
    decode."""
    fields = workload(setting) | {"attention": "auto"}
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        result = profile(ProfileOptions(chunks=_CHUNKS, trace=trace, decoder="none", **fields))
    record.note("kinds", result["kinds"])
    record.note("chunk_seconds", result["plain_seconds"])
    slowest = max(result["kinds"], key=lambda row: row["seconds"] or 0.0)
    record.say(
        f"most of a chunk's {1e3 * result['plain_seconds']:.1f} ms: {slowest['kind']}, "
        f"{1e3 * slowest['seconds']:.1f} ms ({1e3 * slowest['seconds_at_best']:.1f} at best)"
    )
    _recorded(record, fields)
    if fields["device"] == "cuda" and multiplies_fp8(torch.device(fields["device"])):
        _recorded(record, fields, weights="fp8")
    work = load_workload(WorkloadOptions(decoder="wan", **fields))
    stream = work.stream()
    for _ in range(2):
        latents = stream.generate()
        stream.decode(latents)
    record.note("chunk_kernels", costliest(stream.generate, fields["device"], _KERNELS))
    decode = costliest(lambda: stream.decode(latents), fields["device"], _KERNELS)
    record.note("decode_kernels", decode)


def _recorded(
    record: Record, fields: dict[str, Any], weights: Literal["exact", "fp8"] = "exact"
) -> None:
    """What the card does in a chunk whose passes are replayed, and whether it ever waits."""
    options = WorkloadOptions(decoder="none", graphs=True, weights=weights, **fields)
    stream = load_workload(options).stream()
    for _ in range(steady_after(stream) + 1):  # the last of them with all its passes recorded
        stream.generate()
    events = device_events(stream.generate, options.device)
    kernels, found = costliest_events(events, _KERNELS), busy_and_idle(events)
    row: dict[str, Any] = {"weights": weights, "kernels": kernels}
    if found is not None:
        row |= {**vars(found), "idle": found.idle}
        what = "a recorded chunk" if weights == "exact" else f"the same in {weights}"
        record.say(f"{what}: {1e3 * found.span:.0f} ms on the device, {1e3 * found.idle:.1f} idle")
    record.append("recorded", row)
