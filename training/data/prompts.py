"""Prompts: what students are trained to show, from files or from a data set that writes its own.

Prompt files are what `rf_core.prompt_files` reads (VidProM's is one).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rf_core.prompt_files import COLUMN, read_prompt_file
from rf_core.ranges import MANY, check_numbers

from ..run.distributed import rank

_log = logging.getLogger(__name__)
WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"  # noqa: RUF001
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"  # noqa: RUF001
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
"""Wan 2.1's negative prompt: over-exposed, still, blurred, subtitles, deformed, and so on."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the student is trained to show."""

    prompts: tuple[Path, ...] = ()
    """Prompt files; none for the data set's own prompts."""
    column: str = COLUMN
    """Of CSV, TSV and JSON lines."""
    limit: int | None = None
    """Prompts taken, from the first on; None for all."""
    negative: str = ""
    """What the teacher is guided away from."""
    text_encoder: str | None = None
    """Folder or hub id of a UMT5, or a file as the engine reads it; None for the bundled demo's."""
    cache: Path | None = None
    """Folder of embeddings, which runs and stages may share: what it holds of this encoder is not
    encoded again. None for `embeddings` in the run's folder."""
    encode_batch: int = 8
    """Prompts encoded at a time."""

    def __post_init__(self) -> None:
        check_numbers(self, limit=(1, MANY), encode_batch=(1, MANY))


def wan_data() -> DataConfig:
    """As published: Wan 2.1's own negative prompt, which its scores are guided away from."""
    return DataConfig(
        prompts=(Path("prompts.txt"),), negative=WAN_NEGATIVE, text_encoder="google/umt5-xxl"
    )


class DataSet(Protocol):
    """A data set that writes its own prompts."""

    def training_prompts(self) -> list[str]:
        """Those that students are trained on."""
        ...

    def evaluation_prompts(self) -> list[str]:
        """Those that students are measured by."""
        ...


def check_prompt_files(config: DataConfig) -> None:
    """ValueError for a prompt file that is not there."""
    for path in config.prompts:
        if not path.exists():
            raise ValueError(f"data.prompts names {path}, which is not there")


def check_no_prompt_files(config: DataConfig) -> None:
    """ValueError for prompt files where clips come with prompts of their own."""
    if config.prompts:
        raise ValueError(
            f"data.prompts names {config.prompts[0]}, but clips have prompts of their own; "
            "set data.prompts=[]"
        )


def read_prompts(config: DataConfig) -> list[str]:
    """Every prompt once, in order of first appearance; what is left out is logged.

    ValueError where there is none.
    """
    prompts, notes = _prompts_of(config)
    if rank() == 0:
        for line in notes:
            _log.warning("%s", line)
    return prompts[: config.limit]


def count_prompts(config: DataConfig, own: DataSet) -> int:
    """How many prompts a run has; those of the data set where the config names no file."""
    prompts = _prompts_of(config)[0] if config.prompts else own.training_prompts()
    return len(prompts[: config.limit])


def _prompts_of(config: DataConfig) -> tuple[list[str], list[str]]:
    """Every prompt once, and what is to be said of those that are left out."""
    files = [read_prompt_file(path, config.column) for path in config.prompts]
    found = [text for file in files for text in file.prompts.values()]
    prompts = list(dict.fromkeys(found))
    notes = [file.left_out for file in files if file.left_out]
    if len(prompts) < len(found):
        notes.append(f"{len(found) - len(prompts)} of {len(found)} prompts repeat one before")
    return prompts, notes
