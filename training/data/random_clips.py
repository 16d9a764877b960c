"""Random tensors in the place of clips, trajectories and prompts: what a dry run trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..objective.excerpts import KINDS, Excerpts
from .clips import Buckets, Groups
from .pairs import Pairs, PairsConfig, Trajectories

COUNT = 64
"""How many there seem to be."""


@dataclass(frozen=True)
class RandomClips:
    """A `ClipSource` of noise; prompts are as long as the network reads."""

    shape: tuple[int, int, int, int]
    """Of a clip's latents: channels, frames, rows, columns."""
    text: tuple[int, int]
    """Of an encoded prompt: tokens, width."""

    def __len__(self) -> int:
        return COUNT

    @property
    def groups(self) -> Groups:
        """See `ClipSource`."""
        return (range(COUNT),)

    @property
    def origins(self) -> Sequence[int]:
        """See `ClipSource`."""
        return range(COUNT)

    @property
    def buckets(self) -> Buckets:
        """See `ClipSource`."""
        _, _, rows, columns = self.shape
        return {(rows, columns): range(COUNT)}

    def latents(self, rows: Sequence[int]) -> Tensor:
        """See `ClipSource`."""
        return torch.randn(len(rows), *self.shape)

    def captions(self, rows: Sequence[int], seeds: Sequence[int]) -> tuple[list[str], Tensor]:
        """See `ClipSource`."""
        return [""] * len(rows), torch.randn(len(rows), *self.text)


@dataclass(frozen=True)
class RandomContexts:
    """Control contexts of noise."""

    shape: tuple[int, int, int, int]
    """Of a context: channels, frames, rows, columns."""

    def of(self, rows: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
        """See `ControlContexts`."""
        return torch.randn(len(rows), *self.shape)


@dataclass(frozen=True, kw_only=True)
class RandomPairs(Pairs):
    """Trajectories of noise, as `ode_pairs` would make them with a config."""

    shards: tuple[()] = ()
    made_with: PairsConfig
    text: tuple[int, int]
    """Of an encoded prompt: tokens, width."""

    def __len__(self) -> int:
        return COUNT

    @cached_property
    def config(self) -> PairsConfig:
        """See `Pairs`."""
        return self.made_with

    def rows(self, numbers: Sequence[int]) -> Trajectories:
        """See `Pairs`."""
        count, config = len(numbers), self.made_with
        channels, frames, *size = config.latents

        def prompts() -> Tensor:
            return torch.randn(count, *self.text)

        excerpts = None
        if config.kind == "excerpts":
            chunk = (count, channels, frames // len(KINDS), *size)
            excerpts = Excerpts(
                opening=torch.randn(chunk),
                before=torch.randn(chunk),
                other_opening=torch.randn(chunk),
                recached=torch.zeros(count, dtype=torch.bool),
                later_embeds=prompts(),
                other_embeds=prompts(),
            )
        return Trajectories(
            points=torch.randn(count, len(config.sampler.all_steps), *config.latents),
            clean=torch.randn(count, *config.latents),
            embeds=prompts(),
            prompts=[""] * count,
            numbers=list(numbers),
            excerpts=excerpts,
        )
