"""The published code and this one in turn, on the same weights and noise."""

from __future__ import annotations

from ....config import TEMPORAL_FACTOR
from ...baseline import BaselineOptions, compare
from ..plan import Setting
from ..record import NotRun, Record
from . import workload

_CHUNKS, _ROUNDS = 8, 1


def run(record: Record, setting: Setting) -> None:
    """A round of few chunks, of which those of a full window count."""
    if setting.published is None:
        raise NotRun("no checkout of the published code was given (--published DIR)")
    options = BaselineOptions(
        folder=setting.published,
        chunks=_CHUNKS,
        rounds=_ROUNDS,
        attention="auto",
        graphs=True,
        decoder="none",
        **workload(setting),
    )
    result = compare(options)
    result["options"]["folder"] = setting.published.name  # and no path of this machine
    record.note("result", result)
    record.check(
        "latents against the published", result["latents_error"], result["latents_error_limit"]
    )
    images = options.cache.chunk_frames * TEMPORAL_FACTOR
    (ours, _), (theirs, _) = (result["rounds"][0][who] for who in ("ours", "published"))
    record.note("fps", {"ours": images / ours, "published": images / theirs})
    record.say(f"published {images / theirs:.1f} images/s, this {images / ours:.1f} beside it")
