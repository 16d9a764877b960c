"""What a run is controlled by, as files: checked before any weight is read, opened beside a stream.

`control` makes of them what the network takes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from .control import ControlSource, check_times, fitted_reference, shape_note
from .digests import file_digest
from .ranges import MANY, STRONGEST_CONTROL
from .source import AtEnd, ChunkEncoder, ImageReader, clip_reader
from .video import check_images, image_size, read_images

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ControlInputs:
    """Of one run. ValueError names the option that is amiss."""

    video: Path | None = None
    """Guides the structure: depth, pose, outlines, or a video of which a part is made anew."""
    mask: Path | None = None
    """White where the video is made anew, black where it is kept; a picture holds for all of it."""
    references: tuple[Path, ...] = ()
    """Pictures whose things or people are to appear, each a frame of the window."""
    strength: float = 1.0
    """How much the network's hints count; 0 is none."""
    start: float = 0.0
    """Seconds of the video from which on the control acts."""
    end: float | None = None
    """Seconds of the video up to which it acts; None for all of it."""
    at_end: AtEnd = "stop"
    """What follows the end of the control video or its mask."""

    def __post_init__(self) -> None:
        for name, most in (("strength", STRONGEST_CONTROL), ("start", MANY), ("end", MANY)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise ValueError(f"--control-{name} is {value:g}; give a number from 0 to {most:g}")
        check_times(self.start, self.end)
        if self.at_end not in get_args(AtEnd):
            raise ValueError(f"at_end is {self.at_end!r}; use one of {', '.join(get_args(AtEnd))}")
        if self.mask is not None and self.video is None:
            raise ValueError(
                "--control-mask says which part of a control video is made anew; give --control too"
            )

    @property
    def given(self) -> bool:
        """Whether there is anything to be controlled by."""
        return self.video is not None or bool(self.references)

    def check_model(self, model: Path | None) -> None:
        """ValueError where there is a control and no network that takes it, or the other way."""
        if self.given and model is None:
            raise ValueError(
                "--control and --reference need a network that follows them; give --control-model "
                "FILE, a VACE for the student, or demo for the bundled one"
            )
        if model is not None and not self.given:
            raise ValueError(
                f"--control-model {model} has nothing to follow; give --control VIDEO or "
                "--reference PICTURE, or leave it out"
            )

    def check_files(self) -> None:
        """ValueError, with the path, for a file that is not there or holds no images."""
        named = {"control video": self.video, "control mask": self.mask}
        given = [(what, path) for what, path in named.items() if path is not None]
        for what, path in (*given, *(("reference picture", each) for each in self.references)):
            if not path.is_file():
                raise ValueError(f"there is no {what} at {path}; check the path")
            check_images(path)
        if self.video is None or self.mask is None:
            return
        if note := shape_note(image_size(self.video), image_size(self.mask)):
            _log.warning("%s", note)

    def record(self) -> dict[str, Any] | None:
        """What is kept in a video's metadata; None where nothing controls it."""
        if not self.given:
            return None
        return {
            "video": self.video and self.video.name,
            "mask": self.mask and self.mask.name,
            "references": [each.name for each in self.references],
            "strength": self.strength,
            "start": self.start,
            "end": self.end,
            "at_end": self.at_end,
        }

    def open(self, encoder: ChunkEncoder, *, height: int, width: int, fps: int) -> ControlSource:
        """The contexts of a stream's chunks; `height` and `width` are its picture's, in pixels."""

        def reader(path: Path | None) -> ImageReader | None:
            if path is None:
                return None
            return clip_reader(path, height=height, width=width, at_end=self.at_end, fps=fps)

        references = [_reference(path, height, width) for path in self.references]
        return ControlSource(
            encoder,
            reader(self.video),
            reader(self.mask),
            height=height,
            width=width,
            references=torch.stack(references) if references else None,
            start=self.start,
            end=self.end,
            fps=fps,
            facts=self._facts,
        )

    def _facts(self) -> dict[str, Any]:
        files = [self.video, self.mask, *self.references]
        digests = [file_digest(path) for path in files if path is not None]
        how = {name: value for name, value in (self.record() or {}).items() if name != "strength"}
        return {**how, "digests": digests}


def _reference(path: Path, height: int, width: int) -> Tensor:
    own_height, own_width = image_size(path)
    image = read_images(path, width=own_width, height=own_height, num_images=1)[0, 0]
    return fitted_reference(image, height, width)
