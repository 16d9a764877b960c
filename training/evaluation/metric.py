"""The Protocol of a metric that checks a video against its prompt, from pixels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

Measures = dict[str, float | None]
"""Measures by name; None where a video has none."""


class PromptMetric(Protocol):
    """Measures whether a video matches its prompt."""

    name: str
    """Its key in records."""
    title: str
    """Title of its table in the report."""
    columns: tuple[str, ...]
    """Names of the measures in that table."""
    legend: str
    """What the columns mean, in a sentence below the table."""

    def supports(self, prompts: Iterable[str], size: tuple[int, int]) -> bool:
        """Whether it can parse all of these prompts and measure videos of this height and width."""
        ...

    def __call__(self, video: Tensor, prompt: str) -> Measures:
        """Measures of a video [T, 3, H, W] in [0, 1]."""
        ...
