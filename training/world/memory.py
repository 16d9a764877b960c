"""What a video keeps that its caption does not name.

Windows of a video give the backdrop's colour and each thing's shade and size as numbers, so that
drift can be followed over time. Where a thing goes behind a wall, what comes out is compared with
what went in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .scenes import COLOURS, IMAGES_PER_FRAME, SIZE
from .tracker import (
    COVERED,
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
MIN_VIEW = 3  # and at least: what is seen for less is not seen
LONGEST = 14  # latent frames out of sight after which a thing is lost: the world's are shorter
_LEAST = 0.25  # share of the pictures that has to be seen as backdrop, or all but things is


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


@dataclass(frozen=True, kw_only=True)
class Occlusion:
    """A thing that went out of sight at a wall, and what came out."""

    start_image: int
    """The first image that does not show it."""
    latent_frames: float
    """How long it was out of sight; `LONGEST` of what is lost."""
    same_colour: bool = False
    same_shape: bool = False
    shade_change: float = math.nan
    """After minus before; nan for what came out as no thing, or not at all."""
    size_change: float = math.nan
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
    """Of every colour, in order."""


def measure(video: Tensor, window_images: int) -> Memory:
    """Measure a video [T, 3, SIZE, SIZE] in [0, 1], window by whole window.

    ValueError for a window that is longer than the video.
    """
    if not 1 <= window_images <= len(video):
        raise ValueError(f"windows of {window_images} images do not fit a video of {len(video)}")
    parts = video.split(window_images)
    pictures = [look_at(part) for part in parts]
    whole = Detections.join([detections_of(picture) for picture in pictures])
    windows = tuple(
        _look(part, picture, whole, number * window_images)
        for number, (part, picture) in enumerate(zip(parts, pictures, strict=True))
        if len(part) == window_images
    )
    return Memory(windows=windows, occlusions=tuple(occlusions(whole)))


def _look(video: Tensor, picture: Picture, whole: Detections, start: int) -> Look:
    shown = picture.is_backdrop
    free = ~(picture.covers > COVERED).any(dim=1)
    for wider in (free & ~picture.wall, free):  # one that has grown bright is none of a wall either
        shown = shown if shown.float().mean() >= _LEAST else wider
    colour = tuple(
        float(channel[shown].median()) if shown.any() else math.nan
        for channel in video.movedim(1, 0).float()
    )
    bright = picture.backdrop.median(dim=0).values.sum(dim=0)
    middle = float(bright[SIZE // 2, SIZE // 2])
    across, down = (float(bright[line][-1] - bright[line][0]) for line in _LINES)
    scale = middle if abs(middle) > 1e-3 else math.nan
    seen = whole[start : start + len(video)]
    return Look(
        start_image=start,
        backdrop=(colour[0], colour[1], colour[2]),
        slope=(across / scale, down / scale),
        wall=float(seen.wall.median()),
        tracks=tuple(tracks_of(seen)),
        jumps=_jumps(whole[max(0, start - 1) : start + len(video)]),
    )


_LINES = ((SIZE // 2, slice(None)), (slice(None), SIZE // 2))  # the middle row and column


def _jumps(seen: Detections) -> int:
    shown = seen.area >= MIN_AREA
    step = torus_offset(seen.centre.diff(dim=0)).norm(dim=-1)
    return int((shown[1:] & shown[:-1] & (step > JUMP)).sum())


def occlusions(seen: Detections) -> list[Occlusion]:
    """When a thing went out of sight at a wall for a latent frame or longer, and what came out.

    What comes out is the same colour, or whatever shows first where nothing else was in sight. What
    does not for `LONGEST` is lost, and not the same. What a video's ends cut off is left out.
    """
    shown = torch.stack([_steady(each) for each in (seen.area >= MIN_AREA).unbind(1)], dim=1)
    found = [
        occlusion
        for colour in range(shown.shape[1])
        for begin, end in _runs(shown[:, colour])
        if (occlusion := _occlusion(seen, shown, colour, begin, end)) is not None
    ]
    return sorted(found, key=lambda each: each.start_image)


def _occlusion(
    seen: Detections, shown: Tensor, colour: int, begin: int, end: int
) -> Occlusion | None:
    """Of what was in sight from `begin` until before `end`."""
    longest, length = LONGEST * IMAGES_PER_FRAME, len(shown)
    if end == length or not seen.at_wall[max(begin, end - MIN_VIEW) : end, colour].any():
        return None
    before = _view(seen, colour, max(begin, end - VIEW), end)
    if before is None or (begin == 0 and end < VIEW):
        return None
    later = shown[end:]
    back = later[:, colour] if shown[end].any() else later.any(dim=1)
    out = end + int(back.int().argmax()) if back.any() else length
    if out - end > longest or (out == length and length - end >= longest):
        return Occlusion(start_image=end, latent_frames=LONGEST)
    if out == length or out - end < IMAGES_PER_FRAME:
        return None
    other = colour if shown[out, colour] else int(seen.area[out].argmax())
    rest = shown[out:, other]
    stop = min(length, out + (VIEW if rest.all() else int(rest.int().argmin())))
    if stop - out < VIEW and stop == length:
        return None
    after = _view(seen, other, out, min(stop, out + VIEW))
    hidden = (out - end) / IMAGES_PER_FRAME
    if after is None:
        return Occlusion(start_image=end, latent_frames=hidden)
    return Occlusion(
        start_image=end,
        latent_frames=hidden,
        same_colour=before.colour == after.colour,
        same_shape=before.shape == after.shape,
        shade_change=after.shade - before.shade,
        size_change=after.size / before.size - 1,
    )


def _steady(shown: Tensor) -> Tensor:
    """Without what is seen for less than `MIN_VIEW` images."""
    steady = torch.zeros_like(shown)
    for begin, end in _runs(shown):
        steady[begin:end] = end - begin >= MIN_VIEW
    return steady


def _runs(shown: Tensor) -> list[tuple[int, int]]:
    """First and last-plus-one of each stretch that is true."""
    edges = F.pad(shown.int(), (1, 1)).diff()
    begins, ends = ((edges == step).nonzero().flatten().tolist() for step in (1, -1))
    return list(zip(begins, ends, strict=True))


def _view(seen: Detections, colour: int, begin: int, end: int) -> Track | None:
    tracks = tracks_of(seen[begin:end])
    return next((each for each in tracks if each.colour == COLOURS[colour]), None)
