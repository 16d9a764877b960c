"""What a video keeps that its caption does not name.

Windows of a video give the backdrop's colour and each thing's shade and size as numbers, so that
drift can be followed over time. Where a thing goes behind a wall, what comes out is compared with
what went in.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from .scenes import IMAGES_PER_FRAME, SIZE
from .tracker import (
    MIN_AREA,
    Detections,
    Picture,
    Track,
    detections_of,
    look_at,
    torus_offset,
    tracks_of,
)

SHADE_LIMIT = 0.1  # difference of shade up to which a thing counts as the same
SIZE_LIMIT = 0.12  # relative difference of size up to which it does
JUMP = 10.0  # pixels from one image to the next, twice the way of the quickest thing
VIEW = 16  # images before and after an occlusion that are compared, at most
MIN_VIEW = 3  # and at least


@dataclass(frozen=True, kw_only=True)
class Look:
    """What the images of one window show."""

    start_image: int
    """The window's first image."""
    backdrop: tuple[float, float, float]
    """Median red, green and blue of what is neither thing nor wall, in [0, 1]; nan where nothing
    is."""
    slope: tuple[float, float]
    """Change of its brightness from the left to the right edge and from top to bottom, relative to
    the middle's."""
    wall: float
    """Share of the picture that a wall covers."""
    tracks: tuple[Track, ...]
    """Things, largest first, with their shade and size."""
    jumps: int
    """How often a thing was in quite another place from one image to the next: a video that falls
    back to its opening does so (LoL, arXiv 2601.16914)."""

    @property
    def hue(self) -> float:
        """Of the backdrop, in degrees; nan without one."""
        return 360 * colorsys.rgb_to_hsv(*self.backdrop)[0] if self.is_seen else math.nan

    @property
    def brightness(self) -> float:
        """Of the backdrop, in [0, 1]."""
        return max(self.backdrop)

    @property
    def is_seen(self) -> bool:
        """Whether there is a backdrop."""
        return not math.isnan(self.backdrop[0])


@dataclass(frozen=True, kw_only=True)
class Occlusion:
    """A thing that went out of sight and came back."""

    start_image: int
    """The first image that does not show it."""
    latent_frames: float
    """How long it was out of sight."""
    same_colour: bool
    same_shape: bool
    shade_change: float
    """After minus before."""
    size_change: float
    """Relative to the size before."""

    @property
    def is_same(self) -> bool:
        """Whether what came back is what went away."""
        return (
            self.same_colour
            and self.same_shape
            and abs(self.shade_change) <= SHADE_LIMIT
            and abs(self.size_change) <= SIZE_LIMIT
        )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a video keeps."""

    windows: tuple[Look, ...]
    occlusions: tuple[Occlusion, ...]
    """In order, of a video of one thing; of several, those in which none was in sight."""


def measure(video: Tensor, window_images: int) -> Memory:
    """Measure a video [T, 3, SIZE, SIZE] in [0, 1], window by whole window.

    ValueError for a window that is longer than the video.
    """
    if not 1 <= window_images <= len(video):
        raise ValueError(f"windows of {window_images} images do not fit a video of {len(video)}")
    windows, seen = [], []
    for number, part in enumerate(video.split(window_images)):
        picture = look_at(part)
        seen.append(detections_of(picture))
        if len(part) == window_images:
            windows.append(_look(part, picture, seen[-1], number * window_images))
    found = occlusions(Detections.join(seen))
    return Memory(windows=tuple(windows), occlusions=tuple(found))


def _look(video: Tensor, picture: Picture, seen: Detections, start: int) -> Look:
    shown = picture.is_backdrop
    colour = tuple(
        float(channel[shown].median()) if shown.any() else math.nan
        for channel in video.movedim(1, 0).float()
    )
    bright = picture.backdrop.median(dim=0).values.sum(dim=0)
    middle = float(bright[SIZE // 2, SIZE // 2])
    across, down = (float(bright[line][-1] - bright[line][0]) for line in _LINES)
    scale = middle if abs(middle) > 1e-3 else math.nan
    return Look(
        start_image=start,
        backdrop=(colour[0], colour[1], colour[2]),
        slope=(across / scale, down / scale),
        wall=float(seen.wall.median()),
        tracks=tuple(tracks_of(seen)),
        jumps=_jumps(seen),
    )


_LINES = ((SIZE // 2, slice(None)), (slice(None), SIZE // 2))  # the middle row and column


def _jumps(seen: Detections) -> int:
    shown = seen.area >= MIN_AREA
    step = torus_offset(seen.centre.diff(dim=0)).norm(dim=-1)
    return int((shown[1:] & shown[:-1] & (step > JUMP)).sum())


def occlusions(seen: Detections) -> list[Occlusion]:
    """When a thing was out of sight for a latent frame or longer, and what came back.

    Detections are of a video of one thing: of each image its largest counts.
    """
    shown = seen.area.amax(dim=1) >= MIN_AREA
    found = []
    for start, stop in _gaps(shown):
        before = _views(seen, shown, start - 1, -1)
        after = _views(seen, shown, stop, 1)
        if stop - start < IMAGES_PER_FRAME or before is None or after is None:
            continue
        found.append(
            Occlusion(
                start_image=start,
                latent_frames=(stop - start) / IMAGES_PER_FRAME,
                same_colour=before.colour == after.colour,
                same_shape=before.shape == after.shape,
                shade_change=after.shade - before.shade,
                size_change=after.size / before.size - 1,
            )
        )
    return found


def _gaps(shown: Tensor) -> list[tuple[int, int]]:
    """First and last-plus-one images of each stretch that shows nothing, between ones that do."""
    images = shown.nonzero().flatten().tolist()
    return [(a + 1, b) for a, b in pairwise(images) if b > a + 1]


def _views(seen: Detections, shown: Tensor, image: int, step: int) -> Track | None:
    stop = image
    while 0 <= stop < len(shown) and shown[stop] and abs(stop - image) < VIEW:
        stop += step
    low, high = sorted((image, stop - step))
    tracks = tracks_of(seen[low : high + 1]) if high - low + 1 >= MIN_VIEW else []
    return tracks[0] if tracks else None
