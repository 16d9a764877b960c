"""Clips to learn from, as latents with prompts, and the excerpts that are cut from them.

`training.choices` opens a folder of clips. It holds clips of the miniature world, or trajectories
of whole clips, which end in clips that the teacher has made.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..objective.excerpts import KINDS, ExcerptConfig, Excerpts, augment_past
from ..run.draws import seeded_generator, shuffled_indices

_CLIPS = ("clip", "switch_clip", "sink_clip")
Groups = Sequence[Sequence[int]]
"""Rows by kind of clip."""
Buckets = Mapping[tuple[int, int], Sequence[int]]
"""Rows by the size of their latents, rows and columns."""


class ClipSource(Protocol):
    """Clips as latents, with prompts that describe them; all have as many channels and frames."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a clip's latents: channels, frames, rows, columns; of the size that most have."""
        ...

    @property
    def groups(self) -> Groups:
        """Rows by kind of clip, for balanced draws; a single group where kinds do not matter."""
        ...

    @property
    def origins(self) -> Sequence[int]:
        """Of each clip, the number of the video, the prompt or the clip that it is made from."""
        ...

    @property
    def buckets(self) -> Buckets:
        """Rows by size; a single bucket where all clips have one."""
        ...

    def latents(self, rows: Sequence[int]) -> Tensor:
        """Some clips of one size, [N, C, F, h, w] in float32."""
        ...

    def captions(self, rows: Sequence[int], seeds: Sequence[int]) -> tuple[list[str], Tensor]:
        """Their prompts, as texts and encoded [N, S, D], on the CPU; seeds choose the words."""
        ...


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What N clips are generated from or trained on, besides latents."""

    numbers: list[int]
    """The number of each one's prompt, or clip, among all of the run."""
    prompts: list[str]
    """Prompts, as text."""
    embeds: Tensor
    """Prompts, encoded and padded with zeros to the longest, [N, S, D]."""
    excerpts: Excerpts | None = None
    """The pasts of chunks, where the clips are excerpts; None for whole clips."""


@dataclass(frozen=True, kw_only=True)
class ExcerptIndices:
    """Which clips and chunks an excerpt is made of, by their numbers."""

    clip: int
    """The clip it is cut from."""
    before: int
    """The chunk before the later one."""
    switch_clip: int
    """The clip that shows the new prompt, where the prompt changes."""
    later: int
    """The later chunk: of `switch_clip` where the prompt changes, else of `clip`."""
    switched: bool
    """Whether the prompt changes before the later chunk."""
    recached: bool
    """Whether `before` is then run under the new prompt."""
    sink_clip: int
    """The clip whose first chunk a stale sink is mixed with."""


def draw_clip(groups: Groups, seed: int, role: str, index: int) -> int:
    """The clip of draw `index`.

    Groups take turns. Each goes through all of its clips, in a new order every time.
    """
    turn, which = divmod(index, len(groups))
    group = groups[which]
    (place,) = shuffled_indices(seed, f"{role}/{which}", 0, [turn], 1, len(group))
    return group[place]


def by_size(source: ClipSource, groups: Groups) -> list[Groups]:
    """The groups of the clips of each size that they have; those that it has none of are left out.

    Groups with no clip have no size.
    """
    parts = [groups_within(groups, rows) for rows in source.buckets.values()]
    return [part for part in parts if part]


def groups_within(groups: Groups, rows: Sequence[int]) -> Groups:
    """The groups with those rows alone; groups that have none of them are left out."""
    kept = set(rows)
    parts = [[row for row in group if row in kept] for group in groups]
    return [part for part in parts if part]


def draw_bucket(source: ClipSource, groups: Groups, seed: int, role: str, update: int) -> Groups:
    """What an update draws from of `groups`, the same on all processes: clips of one size.

    A size is drawn as often as they have clips of it.
    """
    if len(source.buckets) == 1:
        return groups
    parts = by_size(source, groups)
    ends = list(accumulate(sum(map(len, part)) for part in parts))
    generator = seeded_generator(seed, role, update, "bucket")
    return parts[bisect(ends, int(torch.randint(ends[-1], (), generator=generator)))]


def draw_excerpt(
    row: int, groups: Groups, chunks: int, config: ExcerptConfig, generator: torch.Generator
) -> ExcerptIndices:
    """Draw an excerpt of clip `row`; every clip has so many chunks."""

    def below(limit: int, least: int = 0) -> int:
        return int(torch.randint(least, limit, (), generator=generator))

    def any_clip() -> int:
        group = groups[below(len(groups))]
        return group[below(len(group))]

    switched = float(torch.rand((), generator=generator)) < config.switch_share
    before, later = below(chunks - 1, 1), below(chunks, 1)
    return ExcerptIndices(
        clip=row,
        before=before,
        switch_clip=any_clip(),
        later=later if switched else before + 1,
        switched=switched,
        recached=bool(below(2)),
        sink_clip=any_clip(),
    )


def gather_excerpts(
    source: ClipSource, indices: Sequence[ExcerptIndices], seeds: Sequence[Sequence[int]], size: int
) -> tuple[Tensor, Conditions]:
    """The three chunks of N excerpts in a row, [N, C, 3 F, h, w], with their prompts and pasts.

    `seeds` has three numbers an excerpt, which choose the captions of `clip`, `switch_clip` and
    `sink_clip`. `size` is the latent frames of a chunk, F.
    """
    rows, switch_rows, sink_rows = ([getattr(each, name) for each in indices] for name in _CLIPS)
    own, switch = source.latents(rows), source.latents(switch_rows)

    def chunks(clips: Sequence[Tensor], places: Sequence[int]) -> Tensor:
        pairs = zip(clips, places, strict=True)
        return torch.stack([clip[:, at * size : (at + 1) * size] for clip, at in pairs])

    switched = [each.switched for each in indices]
    later = [b if new else a for a, b, new in zip(own, switch, switched, strict=True)]
    texts, (embeds, switch_embeds, sink_embeds) = zip(
        *(
            source.captions(clips, [each[i] for each in seeds])
            for i, clips in enumerate((rows, switch_rows, sink_rows))
        ),
        strict=True,
    )
    pairs = zip(embeds, switch_embeds, switched, strict=True)
    later_embeds = [b if new else a for a, b, new in pairs]
    last = chunks(later, [each.later for each in indices])
    targets = torch.cat([own[:, :, : 2 * size], last], dim=2)
    excerpts = Excerpts(
        opening=own[:, :, :size],
        before=chunks(own, [each.before for each in indices]),
        other_opening=source.latents(sink_rows)[:, :, :size],
        recached=torch.tensor([each.recached for each in indices]),
        later_embeds=pad_sequence(later_embeds, batch_first=True),
        other_embeds=sink_embeds,
    )
    return targets, Conditions(numbers=rows, prompts=texts[0], embeds=embeds, excerpts=excerpts)


def draw_excerpts(
    source: ClipSource,
    rows: Sequence[int],
    groups: Groups,
    config: ExcerptConfig,
    generators: Sequence[torch.Generator],
    chunk_frames: int,
) -> tuple[Tensor, Conditions]:
    """Draw an excerpt of each clip in `rows`, by its generator; returns as `gather_excerpts`."""
    chunks = source.shape[1] // chunk_frames
    pairs = zip(rows, generators, strict=True)
    indices = [draw_excerpt(row, groups, chunks, config, each) for row, each in pairs]
    seeds = [draw_seeds([each] * len(_CLIPS)) for each in generators]
    return gather_excerpts(source, indices, seeds, chunk_frames)


def draw_augmented_excerpts(
    source: ClipSource,
    rows: Sequence[int],
    groups: Groups,
    config: ExcerptConfig,
    generators: Callable[[str], Sequence[torch.Generator]],
    chunk_frames: int,
) -> tuple[Tensor, Tensor, Excerpts]:
    """Excerpts of the clips in `rows` to train on, their pasts augmented.

    Their chunks [N, C, 3 F, h, w], prompts [N, S, D] and pasts; `generators` gives one a clip, by
    what it draws.
    """
    drawn = generators("excerpt")
    latents, conditions = draw_excerpts(source, rows, groups, config, drawn, chunk_frames)
    assert conditions.excerpts is not None
    past = augment_past(conditions.excerpts, config, generators("past"))
    return latents, conditions.embeds, past


def draw_seeds(generators: Sequence[torch.Generator]) -> list[int]:
    """A random seed from each generator, to choose a caption with."""
    return [int(torch.randint(2**31, (), generator=each)) for each in generators]


def check_excerpts(source: ClipSource, chunk_frames: int) -> None:
    """ValueError for clips that are too short to be cut."""
    frames = source.shape[1]
    if frames < len(KINDS) * chunk_frames:
        raise ValueError(
            f"the clips have {frames} latent frames; an excerpt is cut from "
            f"{len(KINDS) * chunk_frames} or more, {len(KINDS)} chunks of {chunk_frames}"
        )
