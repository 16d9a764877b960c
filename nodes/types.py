"""The sockets that ComfyUI has no type for, and what travels through them.

Everything here is immutable: ComfyUI caches outputs and hands them to many nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from comfy_api.latest import io

if TYPE_CHECKING:
    from torch import Tensor

    from ..rf_core.prompts import PromptTimeline
    from ..rf_core.state import Snapshot


UNITS: dict[str, Literal["s", "f", "c"]] = {"seconds": "s", "frames": "f", "chunks": "c"}
"""Units of time on nodes, and as the timeline's language has them."""


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Prompts in time with their encoded texts."""

    timeline: PromptTimeline
    """When which prompt holds."""
    embeds: dict[str, Tensor] = field(repr=False)
    """Each entry's text, global prefix included, to its embedding [1, S, D]."""
    ignored: tuple[str, ...] = ()
    """What the prompts carried that a stream does not follow."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a stream stands after its last chunk."""

    snapshot: Snapshot
    source: dict[str, Any]
    """What made it: shown on nodes, never needed to go on."""


SINK_VALUES = ("window_frames", "sink_frames", "decay", "accumulator", "anchor_frames")
"""What EMA-Sink Config sets of a stream's cache, an input each; the rest is the model's own."""
PRESET_VALUES = ("keep_key_norms", "memory_rates", "positions")
"""What its presets may set besides; of one that asks for nothing, the model's own."""

RFTimeline = io.Custom("RF_TIMELINE")
RFSink = io.Custom("RF_SINK")
RFState = io.Custom("RF_STATE")
RFControl = io.Custom("RF_CONTROL")
