"""Control contexts of clips, encoded once: what a VACE is trained to follow beside the clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rf_core.weights.files import read_weights

from ..control_files import TENSORS, shards_of_controls
from .clips import ClipSource


class ControlContexts(Protocol):
    """What controls clips, by their numbers."""

    def of(self, rows: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
        """A context of each clip, one of its own drawn by its generator, [N, 2 C + 64, F, h, w]."""
        ...


@dataclass(frozen=True)
class Contexts:
    """The contexts of a folder of clips; tensors are mapped, and read as they are asked for."""

    shards: Sequence[Mapping[str, Tensor]]

    @cached_property
    def places(self) -> dict[int, list[tuple[int, int]]]:
        """Of each clip that has any, its contexts as shard and place."""
        found: dict[int, list[tuple[int, int]]] = {}
        for shard, tensors in enumerate(self.shards):
            for place, row in enumerate(tensors["row"].tolist()):
                found.setdefault(row, []).append((shard, place))
        return found

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a context: channels, frames, rows, columns."""
        latents, mask = (self.shards[0][name].shape for name in ("inactive", "mask"))
        return 2 * latents[1] + mask[1], *latents[2:]

    def of(self, rows: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
        """See `ControlContexts`."""
        drawn = []
        for row, generator in zip(rows, generators, strict=True):
            own = self.places[row]
            shard, place = own[int(torch.randint(len(own), (), generator=generator))]
            tensors = (self.shards[shard][name][place] for name in TENSORS[:3])
            drawn.append(torch.cat([each.float() for each in tensors]))
        return torch.stack(drawn)


def read_controls(folder: Path, clips: ClipSource) -> Contexts:
    """The contexts of a folder.

    ValueError where it holds none, or others than of those clips: one of each at least, of as many
    frames, rows and columns.
    """
    shards = [read_weights(path).tensors for path in shards_of_controls(folder)]
    if not shards or any(set(TENSORS) - set(each) for each in shards):
        raise ValueError(
            f"controls is {folder}, which holds no control contexts; make them with `python -m "
            "training contexts`, or of the miniature's clips with `python -m training.world "
            "controls`"
        )
    found = Contexts(shards)
    if set(range(len(clips))) - set(found.places):
        raise ValueError(
            f"controls is {folder}, which controls {len(found.places)} clips of {len(clips)}; "
            "make those that are missing"
        )
    sizes = {tuple(shard["mask"].shape[2:]) for shard in shards}
    wanted = {(clips.shape[1], *size) for size in clips.buckets}
    if sizes != wanted:
        raise ValueError(
            f"controls is {folder}, of frames, rows and columns "
            f"{' and '.join(map(str, sorted(sizes)))}; the clips have "
            f"{' and '.join(map(str, sorted(wanted)))}: make them of these clips"
        )
    return found
