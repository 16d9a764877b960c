"""Where the time of a chunk and of a decode goes, by kind of work and by kernel."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from ...profile import ProfileOptions, costliest, profile
from ...workload import WorkloadOptions, load_workload
from ..plan import Setting
from ..record import Record
from . import workload

_CHUNKS, _KERNELS = 3, 40


@torch.no_grad()
def run(record: Record, setting: Setting) -> None:
    """Kinds of work first, then the costliest kernels of one chunk and of one decode."""
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
    work = load_workload(WorkloadOptions(decoder="wan", **fields))
    stream = work.stream()
    for _ in range(2):
        latents = stream.generate()
        stream.decode(latents)
    record.note("chunk_kernels", costliest(stream.generate, fields["device"], _KERNELS))
    decode = costliest(lambda: stream.decode(latents), fields["device"], _KERNELS)
    record.note("decode_kernels", decode)
