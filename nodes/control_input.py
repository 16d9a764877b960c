"""What controls a stream: what Control Video hands on, and where in it a video stands.

As of a source, a state remembers which control it had and how far that had come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..rf_core.control import ControlSource, fitted_reference, shape_note
from ..rf_core.source import AtEnd, ChunkEncoder, ImageReader
from ..rf_core.state import Snapshot
from .source import Footage, Place, place_in, with_place

PLACE = "control_place"
"""Name under which a snapshot's facts say how far its control had come."""


@dataclass(frozen=True, kw_only=True)
class ControlInput:
    """What controls a video beside its prompt; nothing of it is encoded yet."""

    video: Any = None
    """IMAGE [T, H, W, C] or VIDEO; None for none."""
    mask: Tensor | None = None
    """MASK [T, H, W]."""
    reference: Tensor | None = None
    """IMAGE, a picture each."""
    strength: float = 1.0
    start: float = 0.0
    """Seconds of the video from which on it acts."""
    end: float | None = None
    """Seconds up to which it acts; None for all of it."""
    at_end: AtEnd = "stop"
    """What follows the end of the video or the mask."""
    place: Place = field(default_factory=Place)
    """Where a run begins in it."""

    @property
    def num_references(self) -> int:
        """Pictures that are referred to."""
        return 0 if self.reference is None else len(self.reference)

    @cached_property
    def _footage(self) -> dict[str, Footage]:
        given = {"control": self.video, "mask": self.mask, "reference": self.reference}
        return {
            name: Footage(_shown(each) if name == "mask" else each)
            for name, each in given.items()
            if each is not None
        }

    @cached_property
    def digest(self) -> str:
        """A hash of all that is shown."""
        return " ".join(f"{name} {each.digest}" for name, each in self._footage.items())

    @property
    def key(self) -> tuple[Any, ...]:
        """Of equal keys the controls are equal, and act alike."""
        times = self.start, self.end, self.at_end
        return self.digest, self.strength, *times, self.place

    def check(self, height: int, width: int, fps: int) -> None:
        """ValueError, in a sentence, where something of it has no images, or another form."""
        for reader in self._readers(height, width, fps).values():
            reader.close()

    def open(self, encoder: ChunkEncoder, height: int, width: int, fps: int) -> ControlSource:
        """The contexts of a stream's chunks; `height` and `width` are its picture's, in pixels."""
        readers, references = self._readers(height, width, fps), None
        if self.reference is not None:
            pictures = rearrange(self.reference.cpu().float(), "r h w c -> r c h w")
            fitted = [fitted_reference(each, height, width) for each in pictures]
            references = torch.stack(fitted)
        return ControlSource(
            encoder,
            readers.get("control"),
            readers.get("mask"),
            height=height,
            width=width,
            references=references,
            start=self.start,
            end=self.end,
            fps=fps,
            place=(self.place.images, self.place.since),
            facts=self.facts,
        )

    def facts(self) -> Mapping[str, Any]:
        """What a log says of it."""
        how = {"start": self.start, "end": self.end, "at_end": self.at_end}
        return {"digest": self.digest, **how, "begins": self.place.images}

    def placed(self, snapshot: Snapshot | None) -> ControlInput:
        """The same at the place where a snapshot left it; at its beginning where it did not."""
        place = place_in(snapshot, PLACE, lambda: self.digest)
        return self if place is None else replace(self, place=place)

    def noted(self, snapshot: Snapshot, place: Place) -> Snapshot:
        """The snapshot, which now says how far this control had come."""
        return with_place(snapshot, PLACE, self.digest, place)

    def notes(self, snapshot: Snapshot | None, fps: int) -> list[str]:
        """What is to be known of it, a line each."""
        lines = []
        if self.mask is not None and torch.is_tensor(self.video):
            sizes = tuple(self.video.shape[1:3]), tuple(self.mask.shape[-2:])
            lines += [f"note: {note}" for note in [shape_note(*sizes)] if note]
        if self.place.images:
            seconds = self.place.images / fps
            lines.append(f"the control goes on at {seconds:.2f} s, where the state left it")
        elif snapshot is not None and PLACE in snapshot.facts:
            lines.append("note: another control than the state's, from its beginning on")
        return lines

    def _readers(self, height: int, width: int, fps: int) -> dict[str, ImageReader]:
        readers = {}
        for name in ("control", "mask"):
            if name in self._footage:
                try:
                    reader = self._footage[name].reader(height, width, fps, self.at_end, "crop")
                except ValueError as error:
                    raise ValueError(str(error).replace("the source", f"the {name}")) from error
                reader.name = f"the {name}"
                readers[name] = reader
        return readers


def _shown(mask: Tensor) -> Tensor:
    """A mask [T, H, W], or a single one [H, W], as grey images [T, H, W, 3]."""
    return mask.reshape(-1, *mask.shape[-2:])[..., None].expand(-1, -1, -1, 3)
