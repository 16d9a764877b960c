"""Excerpts: single chunks of a stream, each with what the stream lets it see of its past.

Teacher and student learn to continue from three kinds of chunk of the same clip:

    opening   sees nothing
    second    sees the opening
    later     sees the opening, kept as the sink, and the chunk before it

which is all that a window of three chunks ever holds. In some excerpts the prompt changes before
the later chunk: it then shows another scene, while its past shows the old one, run under the old
prompt (as a `soft` switch leaves it) or under the new one (as `recache` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rf_core.config import Grid
from rf_core.layers import PromptKV
from rf_core.model import PromptContext, WanModel
from rf_core.rope import apply_rope, rope_table
from rf_core.text import TextEncoder

from .clips import Clips, captions

CHUNK_FRAMES = 3
KINDS = ("opening", "second", "later")

ChunkKV = list[tuple[Tensor, Tensor]]
"""Keys and values of a chunk in every layer."""


@dataclass(frozen=True, kw_only=True)
class Excerpts:
    """Three chunks of each of N streams; latents are [N, C, F, h, w]."""

    opening: Tensor
    """The first chunk."""
    second: Tensor
    """The chunk after it."""
    before: Tensor
    """The chunk before the later one."""
    later: Tensor
    """What follows, or what the changed prompt asks for."""
    prompts: list[str]
    """The captions of the first three."""
    later_prompts: list[str]
    """The captions of the later chunk."""
    recached: Tensor
    """Whether `before` was run under the later prompt, bool [N]."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def targets(self) -> Tensor:
        """The three chunks that are learnt, [3, N, C, F, h, w], in the order of `KINDS`."""
        return torch.stack([self.opening, self.second, self.later])

    def rows(self, indices: Sequence[int]) -> Excerpts:
        """Some of them, in float32."""

        def pick(values: Any) -> Any:
            if isinstance(values, list):
                return [values[index] for index in indices]
            some = values[list(indices)]
            return some.float() if some.is_floating_point() else some

        return Excerpts(**{each.name: pick(getattr(self, each.name)) for each in fields(self)})


@dataclass(frozen=True, kw_only=True)
class ExcerptConfig:
    """How excerpts are drawn and how their past is shown."""

    switch_share: float = 0.25
    """Share in which the prompt changes before the later chunk."""
    context_noise: float = 0.1
    """Standard deviation of noise on past chunks: a stream's own past is never as clean as data."""
    stale_sink_share: float = 0.2
    """Share of sinks mixed with another stream's: over a long stream the sink becomes an average
    of much that is no longer true."""


def draw_excerpts(
    clips: Clips,
    rows: Sequence[int],
    others: Sequence[int],
    rng: np.random.Generator,
    config: ExcerptConfig,
) -> Excerpts:
    """Excerpts of the clips `rows`; where the prompt changes, `others` say to what."""
    chunks = clips.latents.shape[2] // CHUNK_FRAMES
    count = len(rows)
    switched = rng.random(count) < config.switch_share
    at = rng.integers(1, chunks - 1, size=count)
    after = [other if cut else row for row, other, cut in zip(rows, others, switched, strict=True)]
    at_after = np.where(switched, rng.integers(1, chunks, size=count), at + 1)
    prompts = captions([clips.scenes[row] for row in rows], rng)
    changed = captions([clips.scenes[row] for row in others], rng)

    def chunk(clip: int, index: int) -> Tensor:
        start = int(index) * CHUNK_FRAMES
        return clips.latents[clip, :, start : start + CHUNK_FRAMES].float()

    def chunks_of(which: Sequence[int], indices: Sequence[int]) -> Tensor:
        return torch.stack([chunk(*pair) for pair in zip(which, indices, strict=True)])

    return Excerpts(
        opening=chunks_of(rows, [0] * count),
        second=chunks_of(rows, [1] * count),
        before=chunks_of(rows, at.tolist()),
        later=chunks_of(after, at_after.tolist()),
        prompts=prompts,
        later_prompts=[
            new if cut else old for old, new, cut in zip(prompts, changed, switched, strict=True)
        ],
        recached=torch.from_numpy(rng.random(count) < 0.5),
    )


@dataclass
class Past:
    """The keys and values a chunk sees of earlier ones: a cache through which gradients pass."""

    grid: Grid
    """Tokens of a frame."""
    chunks: tuple[ChunkKV, ...] = ()
    """Earlier chunks, oldest first."""
    own: ChunkKV = field(default_factory=list)
    """Those of the chunk itself, in its last pass."""

    @property
    def context_frames(self) -> int:
        """Latent frames before the current chunk."""
        return CHUNK_FRAMES * len(self.chunks)

    def layer(self, index: int) -> LayerPast:
        """The window of one layer."""
        return LayerPast(self, index)


@dataclass
class LayerPast:
    """One layer of a `Past`."""

    past: Past
    index: int

    def extend(self, k_BLHD: Tensor, rotated_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor]:
        """The past's rotated keys, and values, with the current chunk's at the end."""
        own, chunks = self.past.own, [chunk[self.index] for chunk in self.past.chunks]
        del own[self.index :]
        own.append((k_BLHD, v_BLHD))
        if not chunks:
            return rotated_BLHD, v_BLHD
        keys, values = (torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True))
        frames = self.past.context_frames
        rope = rope_table(frames, self.past.grid, k_BLHD.shape[-1])
        return (
            torch.cat([apply_rope(keys, rope), rotated_BLHD], dim=1),
            torch.cat([values, v_BLHD], dim=1),
        )


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of a batch of excerpts, read by one network."""

    first: PromptContext
    later: PromptContext
    recached: PromptContext
    """Of the chunk before the later one."""

    @classmethod
    def read(cls, model: WanModel, encoder: TextEncoder, excerpts: Excerpts) -> Prompts:
        """Encode each caption once."""
        first = model.prompt_context(encoder.encode(excerpts.prompts))
        later = model.prompt_context(encoder.encode(excerpts.later_prompts))
        return cls(first=first, later=later, recached=choose(excerpts.recached, later, first))


def choose(which_B: Tensor, yes: PromptContext, no: PromptContext) -> PromptContext:
    """Sample by sample one of two prompts."""
    mask = which_B[:, None, None, None]
    return tuple(
        PromptKV(torch.where(mask, a.k_BSHD, b.k_BSHD), torch.where(mask, a.v_BSHD, b.v_BSHD))
        for a, b in zip(yes, no, strict=True)
    )


def pasts(
    model: WanModel,
    excerpts: Excerpts,
    prompts: Prompts,
    config: ExcerptConfig,
    generator: torch.Generator | None = None,
) -> tuple[Past, Past, Past]:
    """What the opening, the second and the later chunk see, by clean passes over the chunks before.

    Gradients pass into those passes.
    """

    grid = Grid.of_latents(*excerpts.opening.shape[-2:], model.config.patch_size)

    def rerun(latents: Tensor, prompt: PromptContext, past: Past) -> ChunkKV:
        noise = torch.randn(latents.shape, generator=generator)
        blurred = latents + config.context_noise * noise
        model(blurred, latents.new_zeros(latents.shape[0], latents.shape[2]), prompt, past)
        return past.own

    opening = rerun(excerpts.opening, prompts.first, Past(grid))
    before = rerun(excerpts.before, prompts.recached, Past(grid, (opening,)))
    stale = torch.rand(len(excerpts), generator=generator) < config.stale_sink_share
    share = torch.rand(len(excerpts), generator=generator) * stale
    sink = [(_mixed(k, share), _mixed(v, share)) for k, v in opening]
    return Past(grid), Past(grid, (opening,)), Past(grid, (sink, before))


def _mixed(x_BLHD: Tensor, share_B: Tensor) -> Tensor:
    return torch.lerp(x_BLHD, x_BLHD.roll(1, dims=0), share_B[:, None, None, None])
