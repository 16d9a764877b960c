"""Clips that are never trained on, so that a loss on them says what the training's does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Protocol

import torch

from ..run.draws import seeded_generator
from .clips import Groups, groups_within


class Origins(Protocol):
    """What knows of each of its clips what it was made from."""

    def __len__(self) -> int:
        """How many clips there are."""
        ...

    @property
    def origins(self) -> Sequence[int]:
        """Of each clip, the number of the video, the prompt or the clip that it is made from."""
        ...


@dataclass(frozen=True)
class Split:
    """The rows of a run's clips."""

    trained: Sequence[int]
    held_out: Sequence[int]
    """Those that losses are measured on, of as many origins as there are."""

    def shown(self, count: int) -> list[int]:
        """Rows whose prompts a validation shows: held-out ones, or any where there are none."""
        if self.held_out:
            return list(self.held_out[:count])
        return [self.trained[place] for place in _shuffled(len(self.trained))[:count]]


def split_clips(source: Origins, count: int) -> Split:
    """Hold out `count` clips: the same ones for every seed, so that runs can be compared.

    What a clip is made from is held out whole: no other clip of its video or prompt is trained on.
    ValueError where none would be left.
    """
    if not count:
        return Split(range(len(source)), ())
    rows_of: dict[int, list[int]] = {}
    for row, origin in enumerate(source.origins):
        rows_of.setdefault(origin, []).append(row)
    families = list(rows_of.values())
    taken: list[list[int]] = []
    for place in _shuffled(len(families)):
        if sum(map(len, taken)) >= count:
            break
        taken.append(families[place])
    held = [row for row in chain(*zip_longest(*taken)) if row is not None]
    trained = sorted(set(range(len(source))) - set(held))
    if not trained:
        raise ValueError(
            f"validation_clips is {count}, and the {len(source)} clips are of {len(families)} "
            "videos or prompts, which are held out whole: none is left to train on; hold out fewer"
        )
    return Split(trained, held[:count])


def groups_among(groups: Groups, split: Split) -> Groups:
    """The groups with the trained rows alone; groups that have none are left out."""
    return groups_within(groups, split.trained) if split.held_out else groups


def _shuffled(count: int) -> list[int]:
    generator = seeded_generator("held out", count)
    return [int(place) for place in torch.randperm(count, generator=generator)]
