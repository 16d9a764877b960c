"""What an evaluation asks of prompts that can be checked from a video's pixels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

Measures = dict[str, float | None]
"""Measures by name; None where a video has none."""


class PromptMetric(Protocol):
    """Measures whether a video keeps its prompt, where it can read both."""

    name: str
    """What records call it by."""
    title: str
    """Of its table in the report."""
    columns: tuple[str, ...]
    """Names of the measures there."""
    legend: str
    """What they mean."""

    def supports(self, prompts: Iterable[str], size: tuple[int, int]) -> bool:
        """Whether it can read all of these prompts, and videos of this height and width."""
        ...

    def __call__(self, video: Tensor, prompt: str) -> Measures:
        """Measures of a video [T, 3, H, W] in [0, 1]."""
        ...
