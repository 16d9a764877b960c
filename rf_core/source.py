"""A source of guides: a video file as the latents that a stream's chunks are guided by, in turn.

It is read as it is needed and encoded as one stream of images, so that memory does not grow with
the clip: `Stream.step(guide=source.latents(stream.next_frames))`.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import closing
from itertools import count, islice
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from .config import FPS
from .decoders.decoder import DecoderState
from .video import check_images, images_at_rate

_log = logging.getLogger(__name__)

AtEnd = Literal["stop", "hold", "loop"]
"""What a source does at its end: give nothing more, go on with its last image, or begin again."""
_SAID: dict[AtEnd, str] = {
    "stop": "what fills no chunk is left out, and no guide follows",
    "hold": "its last image is held",
    "loop": "it begins again",
}


class ChunkEncoder(Protocol):
    """What a source asks of a decoder: its twin, from images to latents."""

    def source_images_of(self, latent_frames: int, first: bool) -> int:
        """How many images the frames are encoded from; `first` where they begin a stream."""

    def encode_chunk(
        self, images: Tensor, state: DecoderState | None
    ) -> tuple[Tensor, DecoderState]:
        """The stream's next images [B, T, 3, H, W] in [0, 1] -> latents, and the state after."""


class ClipSource:
    """A video file, `fps` images a second, scaled to cover the picture and cropped to its centre.

    `height` and `width` are the stream's, in pixels. `at_end` is one of `AtEnd`; the log says when
    the end is met. Close it, or use it in a `with`. ValueError: no such file, or no images in it.
    """

    def __init__(
        self,
        path: str | Path,
        encoder: ChunkEncoder,
        *,
        height: int,
        width: int,
        at_end: AtEnd = "stop",
        fps: int = FPS,
    ) -> None:
        if at_end not in get_args(AtEnd):
            raise ValueError(f"at_end is {at_end!r}; use one of {', '.join(get_args(AtEnd))}")
        check_images(path)
        self.path, self.at_end = Path(path), at_end
        self._encoder = encoder
        self._state: DecoderState | None = None
        self._images = self._read(height, width, fps)
        self._last: Tensor | None = None
        self._held: Tensor | None = None

    @torch.no_grad()
    def latents(self, frames: int) -> Tensor | None:
        """The next so many latent frames [1, C, F, h, w], clean; None after the end.

        `stop` leaves out the images at the end that fill no chunk; ValueError where they are all.
        `hold` fills the last chunk with the last image; a chunk of nothing else follows, and is
        repeated. `loop` goes on with the first image, within a chunk where the end is met there.
        """
        if self._held is not None and self._held.shape[2] == frames:
            return self._held
        needed = self._encoder.source_images_of(frames, first=self._state is None)
        images = list(islice(self._images, needed))
        lacking = needed - len(images)
        if lacking and self.at_end == "stop":
            self._require_begun(len(images), needed)
            return None
        found, self._last = len(images), images[-1] if images else self._last
        assert self._last is not None, "a clip has an image"
        filled = torch.stack([*images, *[self._last] * lacking])
        latents, self._state = self._encoder.encode_chunk(filled.unsqueeze(0), self._state)
        self._held = None if found else latents
        return latents

    def close(self) -> None:
        """Leave the file."""
        self._images.close()

    def __enter__(self) -> ClipSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, height: int, width: int, fps: int) -> Generator[Tensor, None, None]:
        for turn in count():
            shown = 0
            with closing(images_at_rate(self.path, width=width, height=height, fps=fps)) as images:
                for image in images:
                    shown += 1
                    yield image
            if turn == 0:
                what = f"{self.path} ends after {shown} images at {fps} a second"
                _log.warning("%s; %s", what, _SAID[self.at_end])
            if self.at_end != "loop":
                return

    def _require_begun(self, found: int, needed: int) -> None:
        if self._state is None:
            raise ValueError(
                f"{self.path} has {found} images at the stream's rate, and its first chunk takes "
                f"{needed}; give a longer clip, or let it hold or loop at its end"
            )
