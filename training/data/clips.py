"""Clips to learn from, as latents with prompts, and the excerpts that are cut from them.

What a folder of clips is, `training.choices` knows: the miniature world's, or trajectories of whole
clips, which end in clips of the teacher's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..objective.excerpts import KINDS, ExcerptConfig, Excerpts
from ..run.draws import prompt_numbers

_CLIPS = ("row", "other", "stranger")
Groups = Sequence[Sequence[int]]
"""Rows by kind of clip."""


class ClipSource(Protocol):
    """Clips as latents, with prompts that say what they show."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a clip's latents: channels, frames, rows, columns."""
        ...

    @property
    def groups(self) -> Groups:
        """Kinds of clip that may be drawn evenly; one group where there is one kind."""
        ...

    def latents(self, rows: Sequence[int]) -> Tensor:
        """Some clips, [N, C, F, h, w] in float32."""
        ...

    def captions(self, rows: Sequence[int], seeds: Sequence[int]) -> tuple[list[str], Tensor]:
        """Their prompts, as texts and encoded [N, S, D], on the CPU; seeds choose the words."""
        ...


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What N clips are made, or learnt, from."""

    numbers: list[int]
    """Their places among all prompts, or clips, of the run."""
    prompts: list[str]
    """What they show."""
    embeds: Tensor
    """The same encoded and padded with zeros to the longest, [N, S, D]."""
    excerpts: Excerpts | None = None
    """What their chunks see, where they are excerpts; a whole clip's chunks see each other."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Which chunks an excerpt is made of."""

    row: int
    """The clip."""
    at: int
    """The chunk before the later one."""
    other: int
    """The clip that a changed prompt asks for."""
    after: int
    """The later chunk, of either clip."""
    switched: bool
    """Whether the prompt changes."""
    recached: bool
    """Whether the past is then run under the new one."""
    stranger: int
    """The clip of a stale sink."""


def row_of(groups: Groups, seed: int, role: str, index: int) -> int:
    """The clip that is drawn in turn `index`: groups take turns, and of each no clip comes again
    before every other has been seen."""
    turn, which = divmod(index, len(groups))
    group = groups[which]
    (place,) = prompt_numbers(seed, f"{role}/{which}", 0, [turn], 1, len(group))
    return group[place]


def draw_cut(
    row: int, groups: Groups, chunks: int, config: ExcerptConfig, generator: torch.Generator
) -> Cut:
    """An excerpt of a clip of so many chunks."""

    def below(limit: int, least: int = 0) -> int:
        return int(torch.randint(least, limit, (), generator=generator))

    def any_clip() -> int:
        group = groups[below(len(groups))]
        return group[below(len(group))]

    switched = float(torch.rand((), generator=generator)) < config.switch_share
    at, after = below(chunks - 1, 1), below(chunks, 1)
    return Cut(
        row=row,
        at=at,
        other=any_clip(),
        after=after if switched else at + 1,
        switched=switched,
        recached=bool(below(2)),
        stranger=any_clip(),
    )


def cut_excerpts(
    source: ClipSource, cuts: Sequence[Cut], seeds: Sequence[Sequence[int]], size: int
) -> tuple[Tensor, Conditions]:
    """The three chunks of excerpts one after another, [N, C, 3 F, h, w], and what they see.

    `seeds` are three for each: of the prompts of clip, other clip and stranger; `size` is a chunk's
    latent frames.
    """
    rows, others, strangers = ([getattr(cut, name) for cut in cuts] for name in _CLIPS)
    own, other = source.latents(rows), source.latents(others)

    def chunks(clips: Sequence[Tensor], places: Sequence[int]) -> Tensor:
        pairs = zip(clips, places, strict=True)
        return torch.stack([clip[:, at * size : (at + 1) * size] for clip, at in pairs])

    after = [b if cut.switched else a for a, b, cut in zip(own, other, cuts, strict=True)]
    texts, (embeds, changed, strange) = zip(
        *(
            source.captions(clips, [each[i] for each in seeds])
            for i, clips in enumerate((rows, others, strangers))
        ),
        strict=True,
    )
    asked = [b if cut.switched else a for a, b, cut in zip(embeds, changed, cuts, strict=True)]
    targets = torch.cat([own[:, :, : 2 * size], chunks(after, [cut.after for cut in cuts])], dim=2)
    excerpts = Excerpts(
        opening=own[:, :, :size],
        before=chunks(own, [cut.at for cut in cuts]),
        stranger=source.latents(strangers)[:, :, :size],
        recached=torch.tensor([cut.recached for cut in cuts]),
        later_embeds=pad_sequence(asked, batch_first=True),
        stranger_embeds=strange,
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
    """Excerpts of clips, each a function of its generator; as `cut_excerpts` gives them."""
    chunks = source.shape[1] // chunk_frames
    pairs = zip(rows, generators, strict=True)
    cuts = [draw_cut(row, groups, chunks, config, each) for row, each in pairs]
    seeds = [draw_seeds([each] * len(_CLIPS)) for each in generators]
    return cut_excerpts(source, cuts, seeds, chunk_frames)


def draw_seeds(generators: Sequence[torch.Generator]) -> list[int]:
    """A seed of each generator, to choose a caption by."""
    return [int(torch.randint(2**31, (), generator=each)) for each in generators]


def check_excerpts(source: ClipSource, chunk_frames: int) -> None:
    """ValueError for clips that are too short to be cut."""
    frames = source.shape[1]
    if frames < len(KINDS) * chunk_frames:
        raise ValueError(
            f"the clips have {frames} latent frames; an excerpt is cut from "
            f"{len(KINDS) * chunk_frames} or more, {len(KINDS)} chunks of {chunk_frames}"
        )
