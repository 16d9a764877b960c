"""Start images of rollouts: pictures with captions, or the first frames of clips.

`training.choices` opens a folder of them. A picture fills a chunk as a stream's start image does;
of a clip its first latent frames are taken, a chunk of them, and no VAE is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rf_core.config import SPATIAL_FACTOR, CacheConfig
from rf_core.decoders.decoder import Decoder
from rf_core.ranges import check_numbers
from rf_core.stream import start_latents
from rf_core.video import read_images

from ..objective.rollout import Start
from ..run.draws import Role, draw_starts
from .clips import ClipSource
from .embeddings import PromptEmbeds


@dataclass(frozen=True, kw_only=True)
class StartsConfig:
    """Which rollouts begin from an image. Not published: students are trained on text alone."""

    source: Path | None = None
    """Folder of pictures with captions; or of clips with prompts, encoded, of which the first
    frames are taken."""
    captions: Path | None = None
    """Of pictures: CSV with the columns `file` and `prompt`; None for a .txt of its name beside
    each."""
    share: float = 0.0
    """Share of the rollouts that begin so; 0 for none."""

    def __post_init__(self) -> None:
        check_numbers(self, share=(0, 1))
        if self.share and self.source is None:
            raise ValueError(f"share is {self.share}; give source, a folder of start images")
        if self.source is not None and not self.share:
            raise ValueError(f"source is {self.source} and share 0; give a share above 0")
        if self.captions is not None and self.source is None:
            raise ValueError(f"captions is {self.captions}; give source, the pictures' folder")


class StartSource(Protocol):
    """Start images as latents, each with the prompt that describes it."""

    def rows(self, size: tuple[int, int]) -> Sequence[int]:
        """Those there are for latents of so many rows and columns, by number."""
        ...

    def latents(self, numbers: Sequence[int], size: tuple[int, int]) -> Tensor:
        """Some as a chunk of clean latents, [N, C, F, h, w] in float32; `size` is h and w."""
        ...

    def prompt(self, number: int) -> str:
        """The prompt of one."""
        ...

    def embeds(self, number: int) -> Tensor:
        """The same encoded, [S, D], on the CPU."""
        ...


@dataclass(frozen=True, kw_only=True)
class PictureStarts:
    """Pictures as a `StartSource`: encoded as they are asked for, at the size that is asked for."""

    paths: Sequence[Path]
    prompts: Sequence[str]
    prompt_embeds: PromptEmbeds
    decoder: Decoder
    device: torch.device
    cache: CacheConfig
    """Whose first chunk a picture fills."""

    def rows(self, size: tuple[int, int]) -> Sequence[int]:
        """See `StartSource`: all, which are scaled to cover any size, and cropped."""
        return range(len(self.paths))

    @torch.no_grad()
    def latents(self, numbers: Sequence[int], size: tuple[int, int]) -> Tensor:
        """See `StartSource`."""
        height, width = (SPATIAL_FACTOR * side for side in size)
        pictures = (
            read_images(self.paths[number], width=width, height=height, num_images=1)
            for number in numbers
        )
        each = [
            start_latents(picture.to(self.device), self.decoder, self.cache) for picture in pictures
        ]
        return torch.cat(each).float()

    def prompt(self, number: int) -> str:
        """See `StartSource`."""
        return self.prompts[number]

    def embeds(self, number: int) -> Tensor:
        """See `StartSource`."""
        return self.prompt_embeds.embeds([number])[0]


@dataclass(frozen=True, kw_only=True)
class ClipStarts:
    """The first frames of clips as a `StartSource`. Where a clip has many captions, one is kept."""

    clips: ClipSource
    chunk_frames: int

    def rows(self, size: tuple[int, int]) -> Sequence[int]:
        """See `StartSource`."""
        return self.clips.buckets.get(size, ())

    def latents(self, numbers: Sequence[int], size: tuple[int, int]) -> Tensor:
        """See `StartSource`."""
        return self.clips.latents(numbers)[:, :, : self.chunk_frames]

    def prompt(self, number: int) -> str:
        """See `StartSource`."""
        return self.clips.captions([number], [number])[0][0]

    def embeds(self, number: int) -> Tensor:
        """See `StartSource`."""
        return self.clips.captions([number], [number])[1][0]


@dataclass(frozen=True, kw_only=True)
class Starts:
    """The start images of a run, whose prompts are numbered after the run's own."""

    source: StartSource
    share: float
    own: PromptEmbeds
    """The run's own prompts."""

    def draw(
        self,
        seed: int,
        role: Role,
        rollout: int,
        samples: Sequence[int],
        size: tuple[int, int],
        copies: int,
    ) -> list[int | None]:
        """The start image of each of those samples, for latents of so many rows and columns."""
        rows = self.source.rows(size)
        places = draw_starts(seed, role, rollout, samples, self.share, len(rows), copies)
        return [None if place is None else rows[place] for place in places]

    def embeds(self, numbers: Sequence[int]) -> Tensor:
        """Embeddings of the run's own prompts and of the start images', by number, [B, S, D]."""
        count = len(self.own)
        each = [
            self.own.embeds([n])[0] if n < count else self.source.embeds(n - count) for n in numbers
        ]
        return pad_sequence(each, batch_first=True)

    def start(self, drawn: Sequence[int | None], shape: tuple[int, ...]) -> Start:
        """The first chunks of some rollouts; `shape` is a chunk's, [C, F, h, w]."""
        given = torch.tensor([number is not None for number in drawn])
        latents = torch.zeros((len(drawn), *shape))
        numbers = [number for number in drawn if number is not None]
        if numbers:
            *_, rows, columns = shape
            latents[given] = self.source.latents(numbers, (rows, columns)).to(latents)
        return Start(latents=latents, given_B=None if self.share == 1 else given)


def with_starts(numbers: Sequence[int], drawn: Sequence[int | None], num_prompts: int) -> list[int]:
    """Numbers of prompts, of so many, or of start images' where samples begin from one."""
    pairs = zip(numbers, drawn, strict=True)
    return [number if start is None else num_prompts + start for number, start in pairs]


@dataclass(frozen=True)
class StartedTexts:
    """The texts of a run's own prompts and, after them, of its start images', by number."""

    own: Sequence[str]
    source: StartSource

    def __getitem__(self, number: int, /) -> str:
        count = len(self.own)
        return self.own[number] if number < count else self.source.prompt(number - count)
