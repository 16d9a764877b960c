"""The exact tracker: what a video of the miniature world shows, read from its pixels.

Each pixel is given to the palette colour whose direction away from the background it shares, so a
blurred edge still counts as its shape. Per image and colour that yields an area, a centre of mass
on the torus and a fit to each shape's outline; medians over images then give robust tracks.
Captions are scored against tracks, attribute by attribute. Videos are [T, 3, SIZE, SIZE] in
[0, 1]; speeds are shape sizes a latent frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import reduce
from torch import Tensor
from torch.nn import functional as F

from .scenes import (
    BACKGROUND,
    COLOURS,
    DIRECTIONS,
    IMAGES_PER_FRAME,
    PALETTE,
    SHAPE_SIZE,
    SHAPES,
    SIZE,
    Attributes,
    coverage,
    parse_caption,
)

NO_DIRECTION = "none"
SLOW_LIMIT = 0.55  # `slowly` (0.2 to 0.4) is kept below this
QUICK_LIMIT = 0.65  # `quickly` (0.8 to 1.2) is kept above this
STILL_LIMIT = 0.08  # slower than this, a shape counts as standing
SWITCH_WINDOW = 10  # images that must agree before a new caption counts as followed
SWITCH_OPENING = 4  # images at its start that must agree by themselves
SWITCH_STAYS = 0.8  # share of the later windows that must go on agreeing

_DARK = 0.1  # distance from the background in RGB up to which a pixel is background
_HUE_LIMIT = 0.9  # cosine to a palette colour below which a pixel belongs to none
_INSIDE = 0.4  # coverage from which a pixel belongs to the shape
_MIN_AREA = 48  # pixels: a third of the smallest shape
# Half: a decoder's blur can give a shape a rim of another colour in some images (0.44 of 45 at
# most, measured on the demo's VAE), while real shapes stay in sight (0.84 of 45 at least).
_MIN_SHARE = 0.5  # share of images in which a colour shows before it counts as present
_WHOLE = 0.85  # share of a shape's usual area below which it is half hidden
_DIAGONAL = 0.6  # sideways over main motion from which a direction is none of the four
_CROP = SHAPE_SIZE + 10  # pixels: the square in which outlines are compared


@dataclass(frozen=True, kw_only=True)
class Track:
    """One colour's shape through a video."""

    colour: str
    """A key of `PALETTE`."""
    shape: str
    """The best fitting of `SHAPES`."""
    direction: str
    """A key of `DIRECTIONS`, or `none`."""
    speed: float
    """Shape sizes a latent frame, along the direction's axis."""
    area: float
    """Median area where the shape is whole, in pixels."""
    presence: float
    """Share of images that show the shape, in [0, 1]."""
    fit: float
    """Correlation with the outline of `shape`, 1 for a perfect picture."""


@dataclass(frozen=True, kw_only=True)
class Detections:
    """Measurements of every colour in every image. T images, C colours, S shapes."""

    area: Tensor
    """[T, C] pixels."""
    centre: Tensor
    """[T, C, 2] centre of mass (x, y) on the torus, pixels."""
    fit: Tensor
    """[T, C, S] correlation with each outline; 0 where the colour is absent."""

    def __getitem__(self, images: slice) -> Detections:
        """The detections of some of the images."""
        return Detections(area=self.area[images], centre=self.centre[images], fit=self.fit[images])


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far the images of one window differ from the world's colours and shapes; 0 for none."""

    start_image: int
    """The window's first image."""
    palette_error: float
    """Mean distance in RGB of pixels inside a shape from its palette colour."""
    background_error: float
    """Mean distance in RGB of pixels away from all shapes from the background."""
    area_error: float
    """Mean of |area / area of the outline that fits best - 1|; 1 where no shape is left."""
    softness: float
    """Pixels of half coverage over pixels of the shapes; about 0.1 in a true video."""


def colour_coverage(video: Tensor) -> Tensor:
    """How much of each pixel each colour covers: [T, 3, H, W] to [T, C, H, W], 0 or more.

    A pixel counts for one colour, the nearest in hue.
    """
    background = torch.tensor(BACKGROUND)
    palette = torch.tensor([PALETTE[name] for name in COLOURS]) - background
    excess = video.float() - background[:, None, None]
    image, row, column = (excess.square().sum(dim=1) > _DARK**2).nonzero(as_tuple=True)
    excess = excess[image, :, row, column]  # [pixels, 3]: most of a picture is background
    amount = excess @ palette.T
    hue = amount / (excess.norm(dim=1, keepdim=True) * palette.norm(dim=1))
    best, colour = hue.max(dim=1)
    amount = (amount / palette.square().sum(dim=1)).gather(1, colour[:, None])[:, 0].clamp(0, 1)
    covers = torch.zeros(len(video), len(COLOURS), *video.shape[2:])
    covers[image, colour, row, column] = torch.where(best > _HUE_LIMIT, amount, 0.0)
    return covers


def detect(video: Tensor) -> Detections:
    """Measure every colour in every image of a video [T, 3, SIZE, SIZE]."""
    if video.ndim != 4 or tuple(video.shape[1:]) != (3, SIZE, SIZE):
        raise ValueError(
            f"video has shape {tuple(video.shape)}; the tracker reads [T, 3, {SIZE}, {SIZE}]"
        )
    amounts = colour_coverage(video)
    area = reduce(amounts > _INSIDE, "t c h w -> t c", "sum").float()
    weight = amounts * (amounts > _INSIDE / 2)
    centre = torch.stack([_circular_mean(weight.sum(2)), _circular_mean(weight.sum(3))], dim=-1)
    fit = torch.zeros(*area.shape, len(SHAPES))
    shown = area >= _MIN_AREA
    if shown.any():
        fit[shown] = _outline_fit(amounts[shown], centre[shown])
    return Detections(area=area, centre=centre, fit=fit)


def _circular_mean(weight: Tensor) -> Tensor:
    angle = (torch.arange(SIZE) + 0.5) * (2 * math.pi / SIZE)
    mean = torch.atan2((weight * angle.sin()).sum(-1), (weight * angle.cos()).sum(-1))
    return (mean * SIZE / (2 * math.pi)) % SIZE


def _outline_fit(amounts: Tensor, centre: Tensor) -> Tensor:
    """Correlation of [N, H, W] covers with each shape drawn at [N, 2] centres: [N, S]."""
    pixels = (centre.floor() - _CROP // 2)[..., None] + torch.arange(_CROP)  # [N, 2, crop]
    columns, rows = (pixels.long() % SIZE).unbind(dim=1)
    seen = amounts[torch.arange(len(amounts))[:, None, None], rows[:, :, None], columns[:, None]]
    dx, dy = (pixels + 0.5 - centre[..., None]).unbind(dim=1)
    drawn = torch.stack([coverage(shape, dx[:, None], dy[..., None]) for shape in SHAPES], dim=1)
    seen, drawn = (
        image - image.mean(dim=(-2, -1), keepdim=True) for image in (seen[:, None], drawn)
    )
    norm = seen.square().sum((-2, -1)) * drawn.square().sum((-2, -1))
    return (seen * drawn).sum((-2, -1)) / norm.sqrt().clamp_min(1e-6)


def track(video: Tensor) -> list[Track]:
    """The tracks of a video [T, 3, SIZE, SIZE], one per colour that shows, largest first."""
    return tracks_of(detect(video))


def tracks_of(detections: Detections) -> list[Track]:
    """Join detections to tracks, one per colour that shows, largest first."""
    share = (detections.area >= _MIN_AREA).float().mean(dim=0)
    present = [index for index, seen in enumerate(share.tolist()) if seen >= _MIN_SHARE]
    tracks = [_track_colour(detections, index) for index in present]
    return sorted(tracks, key=lambda each: each.area, reverse=True)


def _track_colour(detections: Detections, index: int) -> Track:
    area = detections.area[:, index]
    shown = area >= _MIN_AREA
    whole = shown & (area >= _WHOLE * area[shown].quantile(0.9))
    fits = detections.fit[whole, index].median(dim=0).values
    velocity = _velocity(detections.centre[whole, index], whole.nonzero().flatten())
    direction, speed = _direction(*velocity.tolist())
    return Track(
        colour=COLOURS[index],
        shape=SHAPES[int(fits.argmax())],
        direction=direction,
        speed=speed,
        area=float(area[whole].median()),
        presence=float(shown.float().mean()),
        fit=float(fits.max()),
    )


def _velocity(centre: Tensor, image: Tensor) -> Tensor:
    """Pixels an image along x and y: the median slope (Theil, Sen) of the unwrapped path."""
    if len(image) < 2:
        return torch.zeros(2)
    gap = image.diff()[:, None]
    step = _wrap(centre.diff(dim=0))
    guess = step[gap[:, 0] == gap.min()].median(dim=0).values / gap.min()
    # Across a gap the path may have wrapped: add what the guess says, unwrap only the rest.
    path = (_wrap(centre.diff(dim=0) - guess * gap) + guess * gap).cumsum(dim=0)
    path = F.pad(path, (0, 0, 1, 0))
    first, second = torch.triu_indices(len(image), len(image), offset=1)
    slopes = (path[second] - path[first]) / (image[second] - image[first])[:, None]
    return slopes.median(dim=0).values


def _wrap(offset: Tensor) -> Tensor:
    return (offset + SIZE / 2) % SIZE - SIZE / 2


def _direction(x: float, y: float) -> tuple[str, float]:
    main, side = max(abs(x), abs(y)), min(abs(x), abs(y))
    speed = main * IMAGES_PER_FRAME / SHAPE_SIZE
    if speed < STILL_LIMIT or side > _DIAGONAL * main:
        return NO_DIRECTION, speed
    return max(
        DIRECTIONS, key=lambda name: x * DIRECTIONS[name][0] + y * DIRECTIONS[name][1]
    ), speed


def score(video: Tensor, caption: str) -> dict[str, float]:
    """Whether a video [T, 3, SIZE, SIZE] matches its caption, attribute by attribute.

    `colour` (just the named ones show), `shape`, `direction` and `speed` are 1.0 or 0.0 and ask it
    of every thing; where the caption leaves the speed open, it need only move. `measured_speed` is
    the mean in sizes a latent frame, nan where nothing shows.
    """
    return score_tracks(tracks_of(detect(video)), parse_caption(caption))


def score_tracks(tracks: Sequence[Track], targets: Sequence[Attributes]) -> dict[str, float]:
    """`score` for tracks and a parsed caption. A wrong colour does not make the rest wrong."""
    pairs = _pair(tracks, targets)
    complete = len(pairs) == len(targets)
    speeds = [seen.speed for seen, _ in pairs]
    named = sorted(target.colour for target in targets)
    correct = {
        "colour": sorted(seen.colour for seen in tracks) == named,
        "shape": complete and all(seen.shape == target.shape for seen, target in pairs),
        "direction": complete and all(seen.direction == target.direction for seen, target in pairs),
        "speed": complete and all(_speed_fits(seen.speed, target) for seen, target in pairs),
    }
    measured = sum(speeds) / len(speeds) if speeds else math.nan
    return {name: float(value) for name, value in correct.items()} | {"measured_speed": measured}


def _pair(tracks: Sequence[Track], targets: Sequence[Attributes]) -> list[tuple[Track, Attributes]]:
    """Match tracks to targets: by colour, then the remaining ones in order."""
    by_colour = {seen.colour: seen for seen in tracks}
    pairs = [(by_colour[target.colour], target) for target in targets if target.colour in by_colour]
    named = {target.colour for target in targets}
    spare = [seen for seen in tracks if seen.colour not in named]
    missing = [target for target in targets if target.colour not in by_colour]
    return pairs + list(zip(spare, missing, strict=False))


def _speed_fits(speed: float, target: Attributes) -> bool:
    if target.speed_name == "slowly":
        return STILL_LIMIT <= speed < SLOW_LIMIT
    return speed > (QUICK_LIMIT if target.speed_name == "quickly" else STILL_LIMIT)


def switch_delay(video: Tensor, switch_image: int, caption: str) -> int | None:
    """Images after `switch_image` until the video follows a new caption; None if it never does.

    Followed means: colour, shape and direction all hold in a window of `SWITCH_WINDOW` images that
    begins there, in its first `SWITCH_OPENING` images alone, and in `SWITCH_STAYS` of all later
    windows. A window alone would pass while old images are its minority.
    """
    targets = parse_caption(caption)
    detections = detect(video[switch_image:])
    starts = range(len(detections.area) - SWITCH_WINDOW + 1)
    follows = [_follows(detections[at : at + SWITCH_WINDOW], targets) for at in starts]
    for delay in starts:
        stays = sum(follows[delay:]) >= SWITCH_STAYS * len(follows[delay:])
        opening = detections[delay : delay + SWITCH_OPENING]
        if follows[delay] and stays and _follows(opening, targets):
            return delay
    return None


def _follows(detections: Detections, targets: Sequence[Attributes]) -> bool:
    scores = score_tracks(tracks_of(detections), targets)
    return all(scores[attribute] == 1.0 for attribute in ("colour", "shape", "direction"))


def drift(video: Tensor, window_images: int) -> list[Drift]:
    """The look of each whole window of a video [T, 3, SIZE, SIZE], to compare early with late."""
    return [
        _drift(video[start : start + window_images], start)
        for start in range(0, len(video) - window_images + 1, window_images)
    ]


def _drift(video: Tensor, start_image: int) -> Drift:
    amounts = colour_coverage(video)
    total = amounts.sum(dim=1, keepdim=True)
    inside = -F.max_pool2d(-(amounts > _INSIDE).float(), 3, 1, 1) > 0
    outside = F.max_pool2d((total > _INSIDE / 2).float(), 7, 1, 3) == 0
    palette = torch.tensor([PALETTE[name] for name in COLOURS])
    off_palette = (video[:, None].float() - palette[:, :, None, None]).norm(dim=2)
    off_background = (video.float() - torch.tensor(BACKGROUND)[:, None, None]).norm(dim=1)
    half = ((total > 0.15) & (total < 0.85)).sum() / (total > _INSIDE).sum().clamp_min(1)
    return Drift(
        start_image=start_image,
        palette_error=_mean(off_palette[inside]),
        background_error=_mean(off_background[outside[:, 0]]),
        area_error=_area_error(tracks_of(detect(video))),
        softness=float(half),
    )


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


def _area_error(tracks: Sequence[Track]) -> float:
    if not tracks:
        return 1.0
    offset = torch.arange(_CROP) + 0.5 - _CROP / 2
    errors = [
        abs(each.area / float(coverage(each.shape, offset, offset[:, None]).sum()) - 1)
        for each in tracks
    ]
    return sum(errors) / len(errors)
