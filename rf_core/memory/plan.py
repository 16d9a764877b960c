"""How a stream is made to fit a device: decode grouping, rotated keys, and where weights lie.

`fit` tries the ways a run can be placed, those that cost least speed first, against what
`footprint` counts. Keeping the decoder off the device while the network runs is not among them:
memory peaks while decoding, so it would save nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch

from ..config import SPATIAL_FACTOR
from .footprint import Footprint, Sizes, footprint
from .offload import NUM_SLOTS

OffloadMode = Literal["none", "stream"]
GB = 1e9
# On a card, for what lies outside of tensors: workspaces of cuBLAS and cuDNN, what the allocator
# rounds up or cannot join. An H100 with room to spare reserved 8 % less than so planned for a
# network alone, as much with TAEHV, 4 % more with the Wan VAE (2026-11-27).
CUDA_FIXED = 256 * 2**20
CUDA_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How a run is placed."""

    group_frames: int
    """Latent frames decoded at once."""
    keep_rotated: bool = True
    """Whether the cache keeps rotated keys; without them it is smaller, and passes are slower."""
    offload: OffloadMode = "none"
    """`stream` where the student's layers, and its control network's, come from host memory in
    every pass."""
    text_offload: OffloadMode = "none"
    """The same for the text encoder's."""
    unrecorded: bool = False
    """Whether passes that could be recorded are not, which is slower, and smaller."""

    def __str__(self) -> str:
        frames = (
            "1 latent frame" if self.group_frames == 1 else f"{self.group_frames} latent frames"
        )
        text = f"decoding {frames} at once"
        text += "" if self.keep_rotated else ", rotating keys again in every pass"
        text += ", passes unrecorded" if self.unrecorded and self.offload == "none" else ""
        streamed = {"student": self.offload, "text encoder": self.text_offload}
        names = [name for name, mode in streamed.items() if mode == "stream"]
        return f"{text}, streaming the weights of the {' and the '.join(names)}" if names else text


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A placement and what it takes."""

    placement: Placement
    peak: int
    """Most bytes in tensors at once."""
    needed: int
    """The same with a card's allowance."""
    available: int
    """Bytes that were free."""

    def __str__(self) -> str:
        needed, free = self.needed / GB, self.available / GB
        return f"memory: {needed:.2f} GB of {free:.2f} GB free, {self.placement}"


def phases(parts: Footprint, placement: Placement) -> dict[str, dict[str, int]]:
    """What each phase of a run has on the device, in bytes by name.

    Where they overlap, decoding has the network's share on the way too: each works on a stream of
    its own, and an allocator does not lend one stream's memory to another.
    """
    student, control, text = (
        weights.streamed(NUM_SLOTS) if mode == "stream" else weights.total
        for weights, mode in (
            (parts.student, placement.offload),
            (parts.control, placement.offload),
            (parts.text, placement.text_offload),
        )
    )
    held = {
        "student": student,
        "keys and values": parts.cache,
        "prompt": parts.prompt,
        "decoder": parts.decoder.weights,
        "decoder state": parts.decoder.state,
        "images": parts.decoder.images,
    }
    if control:
        held["control network"] = control
    if parts.keeps_text:
        held["text encoder"] = text
    if parts.recorded and not placement.unrecorded:
        held["recorded passes"] = parts.recorded
    named = {
        "text": {"text encoder": text},
        "generate": held | {"on the way": parts.network},
    }
    if parts.decoder.decode:
        beside = parts.network if parts.overlapped else 0
        named["decode"] = held | {"on the way": parts.decoder.decode + beside}
    return named


def peak(parts: Footprint, placement: Placement) -> int:
    """The most bytes in tensors at once."""
    return max(sum(phase.values()) for phase in phases(parts, placement).values())


def fit(
    sizes: Sizes,
    available: int,
    *,
    group_frames: int | None = None,
    offload: OffloadMode | None = None,
    must_record: bool = False,
) -> Fit:
    """The first placement that fits into `available` bytes, those that cost least speed first.

    `group_frames`, `offload`, `must_record` and sizes without `keep_rotated` hold a choice fast.
    ValueError where nothing fits; it says what would.
    """
    tried = []
    for placement in _placements(sizes, group_frames, offload, must_record):
        tried.append(_try(sizes, placement, available))
        if tried[-1].needed <= available:
            return tried[-1]
    least = min(reversed(tried), key=lambda one: one.needed)  # of equals, what leaves most room
    raise ValueError(
        f"a stream of {sizes.width}x{sizes.height} with a window of {sizes.cache.window_frames} "
        f"latent frames takes {least.needed / GB:.2f} GB at the least, {least.placement}; free are "
        f"{available / GB:.2f} GB: {_remedy(sizes, least)}"
    )


def format_plan(sizes: Sizes, chosen: Fit) -> str:
    """What every part takes in every phase, as a table in GB."""
    columns = phases(_parts(sizes, chosen.placement), chosen.placement)
    names = list(dict.fromkeys(name for phase in columns.values() for name in phase))
    lines = ["".join(["GB".ljust(20), *(phase.rjust(10) for phase in columns)])]
    for name in names:
        cells = (f"{phase.get(name, 0) / GB:.3f}".rjust(10) for phase in columns.values())
        lines.append("".join([name.ljust(20), *cells]))
    sums = (f"{sum(phase.values()) / GB:.3f}".rjust(10) for phase in columns.values())
    return "\n".join([*lines, "".join(["all".ljust(20), *sums]), str(chosen)])


def _placements(
    sizes: Sizes, group_frames: int | None, offload: OffloadMode | None, must_record: bool
) -> Iterator[Placement]:
    chunk = sizes.cache.chunk_frames
    groups = range(chunk, 0, -1) if group_frames is None else [min(group_frames, chunk)]
    both: list[OffloadMode] = ["none", "stream"]
    if offload == "none" or _on_cpu(sizes):  # a CPU's weights are in host memory already
        both = ["none"]
    unrecorded = [False, True] if sizes.graphs and not must_record else [False]
    # The encoder runs once a prompt, so it is streamed first; the student runs five times a chunk.
    students = both if offload is None else [offload]
    rotated = [True, False] if sizes.keep_rotated else [False]
    grouped = groups if sizes.decoder else [chunk]
    for student, keep, bare, group, text in product(students, rotated, unrecorded, grouped, both):
        if student == "stream" and sizes.graphs and not bare:
            continue  # passes are recorded with all weights in place
        yield Placement(
            group_frames=group,
            keep_rotated=keep,
            offload=student,
            text_offload=text,
            unrecorded=bare,
        )


def _parts(sizes: Sizes, placement: Placement) -> Footprint:
    return footprint(replace(sizes, keep_rotated=placement.keep_rotated), placement.group_frames)


def _try(sizes: Sizes, placement: Placement, available: int) -> Fit:
    most = peak(_parts(sizes, placement), placement)
    needed = most if _on_cpu(sizes) else round(most * (1 + CUDA_SHARE)) + CUDA_FIXED
    return Fit(placement=placement, peak=most, needed=needed, available=available)


def _on_cpu(sizes: Sizes) -> bool:
    return torch.device(sizes.device).type == "cpu"


def _remedy(sizes: Sizes, least: Fit) -> str:
    """The largest picture of about this shape that fits so placed, in steps of a 64th of a side.

    Bytes go nearly with the pixels, so each guess lies on the line between the nearest two known.
    """

    def needed(part: int) -> int:
        return _try(_scaled(sizes, part / 64), least.placement, least.available).needed

    low, high = 1, 64
    at_low, at_high = needed(low), least.needed
    if at_low > least.available:
        return "no picture is small enough; free memory or use a smaller model"
    while high - low > 1:
        share = (least.available - at_low) / (at_high - at_low)
        guess = int((low**2 + share * (high**2 - low**2)) ** 0.5)
        middle = min(max(guess, low + 1), high - 1)
        at_middle = needed(middle)
        if at_middle <= least.available:
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
    smaller = _scaled(sizes, low / 64)
    return f"{smaller.width}x{smaller.height} fits, or take a smaller window"


def _scaled(sizes: Sizes, share: float) -> Sizes:
    rows, columns = (SPATIAL_FACTOR * patch for patch in sizes.model.patch_size[1:])
    height = max(1, int(sizes.height * share / rows)) * rows
    width = max(1, int(sizes.width * share / columns)) * columns
    return replace(sizes, height=height, width=width)
