"""The miniature world as a data set: the prompts that runs on it train on and are measured by."""

from __future__ import annotations

from .clips import captions, scene_of
from .scenes import all_captions


class Captions:
    """The prompts of the miniature world, which it writes itself."""

    def training_prompts(self) -> list[str]:
        """Every caption of one thing, then 64 of two."""
        doubles = (captions([scene_of(5, index)])[0] for index in range(6400))
        two = [text for text in doubles if " and " in text][:64]
        return [*all_captions(), *two]

    def evaluation_prompts(self) -> list[str]:
        """Every caption of one thing."""
        return all_captions()
