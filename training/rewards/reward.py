"""Rewards of videos, and of latents through the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from rf_core.decoders.decoder import Decoder

from ..objective.redmd import Anchor
from ..run.distributed import all_reduce_sum
from .decoding import decode_with_gradient, fixed_frames


class Reward(Protocol):
    """Scores finished videos."""

    scores: ClassVar[tuple[str, ...]]
    """Names of what it gives."""
    differentiable: ClassVar[tuple[str, ...]]
    """Which of them are differentiable by the videos; a class that does not say has none."""

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Scores [B] by name, of videos [B, T, 3, H, W] in [0, 1] and their prompts."""
        ...


@dataclass(frozen=True, kw_only=True)
class WeightedScore:
    """A reward's score as a part of a sum."""

    name: str
    """Of the reward, for the log and for messages."""
    reward: Reward
    score: str
    """Which of its scores."""
    share: float
    """What it is multiplied by."""

    def of(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """The score [B], not multiplied; ValueError where the reward has none of that name."""
        found = self.reward(videos, prompts)
        if self.score not in found:
            raise ValueError(f"{self.name} gives {', '.join(found)}, and no {self.score}")
        return found[self.score]


class Texts(Protocol):
    """Prompts by their numbers."""

    def __getitem__(self, number: int, /) -> str: ...


class LatentRewards:
    """A weighted sum of rewards' scores as a function of clean latents; a `LatentReward`.

    Samples are decoded one at a time, once for all rewards. With `recomputed_frames`, gradients are
    those of as many latent frames at a time, decoded again (`decode_with_gradient`).
    """

    def __init__(
        self,
        parts: Sequence[WeightedScore],
        decoder: Decoder,
        prompts: Texts,
        device: torch.device,
        recomputed_frames: int | None = None,
    ) -> None:
        self.parts, self.decoder, self.prompts, self.device = parts, decoder, prompts, device
        self.recomputed_frames = recomputed_frames
        self._sums = dict.fromkeys((f"{p.name}.{p.score}" for p in parts), 0.0)
        self._count = 0

    @torch.no_grad()
    def __call__(self, x0: Tensor, numbers: list[int]) -> Tensor:
        """Scores [B] of latents [B, C, F, h, w]; ValueError where a reward has no such score."""
        videos = torch.cat([self.decoder.decode(each, None)[0] for each in x0.split(1)])
        return self._total(videos, numbers)

    def gradients(
        self, x0: Tensor, numbers: list[int], mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same scores, and their gradient by the latents, [B, C, F, h, w].

        `mask` broadcasts to the latents, and is true where they carry gradient; None for all.
        """
        scores, slopes = [], torch.zeros_like(x0)
        for b, number in enumerate(numbers):
            first = fixed_frames(mask, b)
            with torch.enable_grad():
                latents = x0[b : b + 1].detach().requires_grad_(True)
                videos = decode_with_gradient(self.decoder, latents, first, self.recomputed_frames)
                score = self._total(videos, [number])
                (slope,) = torch.autograd.grad(score.sum(), latents)
            scores.append(score.detach())
            slopes[b] = slope[0] if mask is None else slope[0] * mask[b]
        return torch.cat(scores), slopes

    def _total(self, videos: Tensor, numbers: list[int]) -> Tensor:
        texts = [self.prompts[number] for number in numbers]
        total = torch.zeros(len(videos), device=self.device)
        for part, name in zip(self.parts, self._sums, strict=True):
            score = part.of(videos if part.share else videos.detach(), texts).to(total)
            self._sums[name] += float(score.detach().sum())
            total = total + part.share * score
        self._count += len(videos)
        return total

    def take_means(self) -> dict[str, float]:
        """Each score's mean over all samples since the last call, of every process."""
        count = max(1.0, all_reduce_sum(float(self._count)))
        means = {name: all_reduce_sum(total) / count for name, total in self._sums.items()}
        self._sums, self._count = dict.fromkeys(self._sums, 0.0), 0
        return means


def image_anchor(decoder: Decoder | None) -> Anchor:
    """Decode latent frames, and encode their last image as the first frame of a clip."""
    assert decoder is not None

    @torch.no_grad()
    def anchor(frames: Tensor) -> Tensor:
        images, _ = decoder.decode(frames, None)
        return decoder.encode(images[:, -1:])

    return anchor
