"""Which windows of which rollout an update trains on, and which prompts they show.

As published, an update has a rollout of its own. Its length may be drawn, its prompts may change at
a border of two windows, and it may go on through several updates (LongLive, arXiv 2509.22622).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .draws import Role, draw_border, switched_indices


@dataclass(frozen=True, kw_only=True)
class RolloutPart:
    """Consecutive windows of a rollout."""

    rollout: int
    """The rollout's number among its role's."""
    first: int
    """Its window that comes first here, from 0."""
    windows: int
    """How many are here."""
    length: int
    """Windows of the whole rollout."""

    @property
    def is_last(self) -> bool:
        """Whether the rollout ends here."""
        return self.first + self.windows == self.length


@dataclass(frozen=True, kw_only=True)
class PromptNumbers:
    """A micro-batch's prompts during a part of its rollout, by number."""

    before: list[int]
    """Of each sample, before they change."""
    after: list[int]
    """The same once they have; of samples that keep theirs, the same number."""
    border: int
    """The part's window with which they change, from 0; as many as it has windows for none."""
    windows: int
    """How many the part has."""

    @property
    def of_windows(self) -> list[list[int]]:
        """The prompts of each window."""
        return [self.before] * self.border + [self.after] * (self.windows - self.border)


def switch_prompts(
    seed: int,
    role: Role,
    part: RolloutPart,
    samples: Sequence[int],
    numbers: list[int],
    num_prompts: int,
    share: float,
    copies: int = 1,
    begun: list[int] | None = None,
) -> PromptNumbers:
    """A part's prompts, where the rollout begins with `numbers` and a `share` of samples changes.

    See `draws.switched_indices`. A rollout of one window has no border to change at. `begun` are
    the prompts that it begins with in their stead.
    """
    begun = numbers if begun is None else begun
    if not share or part.length == 1:
        return PromptNumbers(before=begun, after=begun, border=part.windows, windows=part.windows)
    drawn = switched_indices(seed, role, part.rollout, samples, numbers, num_prompts, share, copies)
    each = zip(numbers, drawn, begun, strict=True)
    after = [kept if new == old else new for old, new, kept in each]
    border = draw_border(seed, role, part.rollout, part.length) - part.first
    if border < 0:  # they changed in an earlier part
        return PromptNumbers(before=after, after=after, border=part.windows, windows=part.windows)
    return PromptNumbers(
        before=begun, after=after, border=min(border, part.windows), windows=part.windows
    )
