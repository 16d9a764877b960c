"""The exact tracker: what a video of the miniature world shows, read from its pixels.

Things and walls are brighter than any backdrop, and a wall is grey, so each bright pixel is given
to the palette colour of the nearest hue. What a thing covers of a pixel is then measured between
the colour of its inside and the backdrop around it, so a blurred edge still counts as its shape.
Per image and colour that yields an area, a centre of mass on the torus, a brightness and a fit to
each shape's outline; medians over images then give robust tracks. Captions are scored against
tracks, attribute by attribute. Videos are [T, 3, SIZE, SIZE] in [0, 1]; speeds are shape sizes a
latent frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import permutations

import torch
from torch import Tensor
from torch.nn import functional as F

from .scenes import (
    BACKGROUND,
    COLOURS,
    DIRECTIONS,
    IMAGES_PER_FRAME,
    LIT,
    PALETTE,
    SHAPE_SIZE,
    SHAPES,
    SIZE,
    Attributes,
    coverage,
    parse_caption,
    unit_area,
)

NO_SHAPE = NO_DIRECTION = "none"
SLOW_LIMIT = 0.55  # `slowly` (0.2 to 0.4) is kept below this
QUICK_LIMIT = 0.65  # `quickly` (0.8 to 1.2) is kept above this
STILL_LIMIT = 0.08  # slower than this, a shape counts as standing
COVERED = 0.4  # coverage from which a pixel belongs to the shape
MIN_AREA = 30  # pixels that a shape has to show to be seen: a third of the smallest
SWITCH_WINDOW = 10  # images that must agree before a new caption counts as followed
SWITCH_OPENING = 4  # images at its start that must agree by themselves
SWITCH_STAYS = 0.8  # share of the later windows that must go on agreeing

_GREY = 0.35  # saturation below which what is bright belongs to a wall
_HUE_LIMIT = 0.8  # cosine to a palette hue below which a pixel belongs to none
_REACH = 3  # pixels around a thing's inside in which its soft edge lies
_NOISE = 0.2  # coverage taken for none, and missing coverage taken for full
# Half: what is seen less is no thing; shapes stay in sight (0.84 of 45 images at least), but for
# those that a wall may hide.
_MIN_SHARE = 0.5
_MIN_SHARE_PAST_A_WALL = 0.1
_WALL_SHARE = 0.1  # share of a picture that is grey before it counts as having a wall
_EVEN = ("circle", "square")  # which the fourfold moment tells apart
_SQUARE = -0.006  # below it a square: decoded ones have -0.007 at most, circles -0.004 at least
_ALONE = 0.9  # share of a shape's usual fit below which there is more of its colour than one
_ONE = (
    0.6  # fit below which that is so all the time: of one thing, decoded or not, it is 0.8 or more
)
_WHOLE = 0.85  # share of a shape's usual area below which it is half hidden
_DIAGONAL = 0.6  # sideways over main motion from which a direction is none of the four
_GAP = 3  # images unseen after which a path is taken up anew
_CROP = SHAPE_SIZE + 14  # pixels: the square in which outlines are compared


@dataclass(frozen=True, kw_only=True)
class Track:
    """One colour's shape through a video."""

    colour: str
    """A key of `PALETTE`."""
    shape: str
    """The best fitting of `SHAPES`, or `none` of what is not one thing: twice there, or a ring."""
    direction: str
    """A key of `DIRECTIONS`, or `none`."""
    speed: float
    """Shape sizes a latent frame, along the direction's axis."""
    area: float
    """Median area where the shape is whole, in pixels."""
    presence: float
    """Share of images that show the shape, in [0, 1]."""
    fit: float
    """Correlation with the outline that fits best, 1 for a perfect picture."""
    size: float
    """Of `shape`, in pixels: a circle's diameter, a square's side, a triangle's height."""
    shade: float
    """Brightness, of its palette colour's."""
    pace: tuple[float, float]
    """Median speed along x and y from image to image, whatever its sign: of things that bounce."""


@dataclass(frozen=True, kw_only=True)
class Detections:
    """Measurements of every colour in every image. T images, C colours, S shapes."""

    area: Tensor
    """[T, C] pixels."""
    centre: Tensor
    """[T, C, 2] centre of mass (x, y) on the torus, pixels."""
    fit: Tensor
    """[T, C, S] correlation with each outline; 0 where the colour is absent."""
    fourfold: Tensor
    """[T, C] how square a shape is, whatever its size: 0 for a circle, -1/60 for a square."""
    shade: Tensor
    """[T, C] brightness inside, of the palette colour's; 0 where the colour is absent."""
    wall: Tensor
    """[T] share of the picture that a wall covers."""
    at_wall: Tensor
    """[T, C] whether a shape touches it."""

    def __getitem__(self, images: slice) -> Detections:
        """The detections of some of the images."""
        return Detections(**{each.name: getattr(self, each.name)[images] for each in fields(self)})

    @classmethod
    def join(cls, parts: Sequence[Detections]) -> Detections:
        """The detections of a video from those of its parts."""
        names = [each.name for each in fields(cls)]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


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


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What belongs to what, in every image."""

    covers: Tensor
    """[T, C, H, W]: how much of each pixel each palette colour covers, in [0, 1]."""
    shade: Tensor
    """[T, C]: brightness of its inside, of the palette colour's; 0 where it has none."""
    wall: Tensor
    """[T, H, W]: whether a pixel is a wall's."""
    backdrop: Tensor
    """[T, 3, H, W]: the backdrop as a plane through what is neither, in [0, 1]."""
    is_backdrop: Tensor
    """[T, H, W]: whether a pixel shows it, and lies away from everything else."""


def look_at(video: Tensor) -> Picture:
    """Tell things, wall and backdrop of a video [T, 3, SIZE, SIZE] apart."""
    video = video.float()
    bright, least = video.amax(dim=1), video.amin(dim=1)
    lit = bright > LIT
    wall = lit & (bright - least < _GREY * bright)
    named = _nearest_colour(video, lit & ~wall)
    inside = _erode(named[:, None] == torch.arange(len(COLOURS))[:, None, None])
    seen = inside.any(dim=(0, 2, 3)).nonzero()[:, 0]
    inside = inside[:, seen]  # [T, K, H, W]
    palette = torch.tensor([PALETTE[COLOURS[index]] for index in seen.tolist()]).reshape(-1, 3)
    shown, counts = inside.any(dim=(2, 3)), inside.sum(dim=(2, 3)).clamp_min(1)
    colours = torch.einsum("tchw,tkhw->tkc", video, inside.float()) / counts[..., None]
    near = _spread(inside)
    any_inside = inside.any(dim=1, keepdim=True)
    is_backdrop = ~_spread(lit[:, None] | any_inside)[:, 0]
    backdrop = _plane(video, is_backdrop)
    above = video - backdrop
    amounts = []
    for index in range(len(seen)):
        rise = colours[:, index, :, None, None] - backdrop
        amounts.append((rise * above).sum(dim=1) / rise.square().sum(dim=1).clamp_min(1e-6))
    amount = torch.stack(amounts, dim=1) if amounts else torch.zeros(inside.shape)
    amount = ((amount - _NOISE) / (1 - 2 * _NOISE)).clamp(0, 1)
    others = (any_inside & ~inside) | wall[:, None]
    covers = torch.zeros(len(video), len(COLOURS), *video.shape[2:])
    covers[:, seen] = torch.where(near & ~others, amount, 0.0)
    shade = torch.zeros(len(video), len(COLOURS))
    relative = (colours * palette).sum(dim=-1) / palette.square().sum(dim=-1)
    shade[:, seen] = torch.where(shown, relative, 0.0)
    return Picture(
        covers=covers, shade=shade, wall=wall, backdrop=backdrop, is_backdrop=is_backdrop
    )


def _nearest_colour(video: Tensor, where: Tensor) -> Tensor:
    """The number of the palette colour of the nearest hue [T, H, W]; that of none elsewhere."""
    palette = torch.tensor([PALETTE[name] for name in COLOURS])
    hues = F.normalize(palette - palette.amin(dim=1, keepdim=True), dim=1)
    image, row, column = where.nonzero(as_tuple=True)
    pixels = video[image, :, row, column]
    chroma = F.normalize(pixels - pixels.amin(dim=1, keepdim=True), dim=1)
    best, colour = (chroma @ hues.T).max(dim=1)
    named = torch.full(where.shape, len(COLOURS))
    named[image, row, column] = torch.where(best > _HUE_LIMIT, colour, len(COLOURS))
    return named


def _erode(mask: Tensor) -> Tensor:
    """What of masks [..., H, W] lies a pixel inside, on the torus: a rim has no inside."""
    return ~_spread(~mask, 1)


def _spread(mask: Tensor, by: int = _REACH) -> Tensor:
    """What lies within a square of so many pixels around masks [..., H, W], on the torus."""
    for axis in (-2, -1):
        for _ in range(by):
            mask = mask | mask.roll(1, axis) | mask.roll(-1, axis)
    return mask


def _plane(video: Tensor, where: Tensor) -> Tensor:
    """The plane through some pixels of each image, by least squares: [T, 3, H, W]."""
    at = (torch.arange(SIZE, device=video.device) + 0.5) / SIZE - 0.5
    x, y = at.expand(SIZE, SIZE), at[:, None].expand(SIZE, SIZE)
    basis = torch.stack([torch.ones_like(x), x, y])  # [3, H, W]
    weighted = basis * where[:, None]
    gram = torch.einsum("tihw,jhw->tij", weighted, basis) + 1e-3 * torch.eye(3, device=video.device)
    right = torch.einsum("tihw,tchw->tic", weighted, video)
    return torch.einsum("tic,ihw->tchw", torch.linalg.solve(gram, right), basis)


def detect(video: Tensor) -> Detections:
    """Measure every colour in every image of a video [T, 3, SIZE, SIZE]."""
    if video.ndim != 4 or tuple(video.shape[1:]) != (3, SIZE, SIZE):
        raise ValueError(
            f"video has shape {tuple(video.shape)}; the tracker reads [T, 3, {SIZE}, {SIZE}]"
        )
    return detections_of(look_at(video))


def detections_of(picture: Picture) -> Detections:
    """The measurements of a video that was looked at."""
    covers = picture.covers
    area = covers.sum(dim=(2, 3))
    centre = torch.stack([_circular_mean(covers.sum(2)), _circular_mean(covers.sum(3))], dim=-1)
    fit, fourfold = torch.zeros(*area.shape, len(SHAPES)), torch.zeros(area.shape)
    shown = area >= MIN_AREA
    if shown.any():
        fit[shown], fourfold[shown] = _outlines(covers[shown], centre[shown], area[shown])
    return Detections(
        area=area,
        centre=centre,
        fit=fit,
        fourfold=fourfold,
        shade=picture.shade,
        wall=picture.wall.float().mean(dim=(1, 2)),
        at_wall=((covers > 0) & _spread(picture.wall)[:, None]).flatten(2).any(dim=2),
    )


def _circular_mean(weight: Tensor) -> Tensor:
    angle = (torch.arange(SIZE) + 0.5) * (2 * math.pi / SIZE)
    mean = torch.atan2((weight * angle.sin()).sum(-1), (weight * angle.cos()).sum(-1))
    return (mean * SIZE / (2 * math.pi)) % SIZE


def _outlines(covers: Tensor, centre: Tensor, area: Tensor) -> tuple[Tensor, Tensor]:
    """Of covers [N, H, W], of areas [N] at centres [N, 2]: correlation with each shape [N, S], and
    the fourfold moment Re(z^4) over the cube of the area [N].

    The moment is of a harmonic function, and so no even blur changes it. A correlation hardly tells
    a square with soft corners from a circle of its area.
    """
    pixels = (centre.floor() - _CROP // 2)[..., None] + torch.arange(_CROP)  # [N, 2, crop]
    columns, rows = (pixels.long() % SIZE).unbind(dim=1)
    seen = covers[torch.arange(len(covers))[:, None, None], rows[:, :, None], columns[:, None]]
    dx, dy = (pixels + 0.5 - centre[..., None]).unbind(dim=1)
    x2, y2 = dx[:, None].square(), dy[..., None].square()
    fourfold = (seen * (x2 * x2 - 6 * x2 * y2 + y2 * y2)).sum(dim=(-2, -1)) / area**3
    sizes = [(area / unit_area(shape)).sqrt()[:, None, None] for shape in SHAPES]
    drawn = torch.stack(
        [
            coverage(shape, dx[:, None], dy[..., None], size)
            for shape, size in zip(SHAPES, sizes, strict=True)
        ],
        dim=1,
    )
    seen, drawn = (
        image - image.mean(dim=(-2, -1), keepdim=True) for image in (seen[:, None], drawn)
    )
    norm = seen.square().sum((-2, -1)) * drawn.square().sum((-2, -1))
    return (seen * drawn).sum((-2, -1)) / norm.sqrt().clamp_min(1e-6), fourfold


def track(video: Tensor) -> list[Track]:
    """The tracks of a video [T, 3, SIZE, SIZE], one per colour that shows, largest first."""
    return tracks_of(detect(video))


def tracks_of(detections: Detections) -> list[Track]:
    """Join detections to tracks, one per colour that shows, largest first."""
    share = (detections.area >= MIN_AREA).float().mean(dim=0)
    walled = float(detections.wall.median()) > _WALL_SHARE
    least = _MIN_SHARE_PAST_A_WALL if walled else _MIN_SHARE
    present = [index for index, seen in enumerate(share.tolist()) if seen >= least]
    tracks = [_track_colour(detections, index) for index in present]
    return sorted(tracks, key=lambda each: each.area, reverse=True)


def _track_colour(detections: Detections, index: int) -> Track:
    area, fit = detections.area[:, index], detections.fit[:, index].amax(dim=1)
    shown = area >= MIN_AREA
    usual = fit[shown].quantile(0.9)
    alone = shown & (fit >= torch.minimum(usual, _ALONE * usual))  # it may be negative
    whole = alone & (area >= _WHOLE * area[alone].quantile(0.9))
    fits = detections.fit[whole, index].median(dim=0).values
    velocity, pace = _velocity(detections.centre[whole, index], whole.nonzero().flatten())
    direction, speed = _direction(*velocity.tolist())
    shape = SHAPES[int(fits.argmax())]
    if shape in _EVEN:
        shape = _EVEN[int(detections.fourfold[whole, index].median() < _SQUARE)]
    median_area = float(area[whole].median())
    size = math.sqrt(median_area / unit_area(shape))
    x, y = (pace * IMAGES_PER_FRAME / SHAPE_SIZE).tolist()
    if fits.max() < _ONE:
        shape, direction, speed, x, y = NO_SHAPE, NO_DIRECTION, 0.0, 0.0, 0.0
    return Track(
        colour=COLOURS[index],
        shape=shape,
        direction=direction,
        speed=speed,
        area=median_area,
        presence=float(shown.float().mean()),
        fit=float(fits.max()),
        size=size,
        shade=float(detections.shade[whole, index].median()),
        pace=(x, y),
    )


def _velocity(centre: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels an image along x and y: the median slope (Theil, Sen) of a path, and the median of its
    steps' sizes.

    Slopes are those within runs without gaps: behind a wall a thing may rest.
    """
    if len(image) < 2:
        return torch.zeros(2), torch.zeros(2)
    gap, step = image.diff(), torus_offset(centre.diff(dim=0))
    close = gap <= max(_GAP, int(gap.min()))
    step = torch.where(close[:, None], step, 0.0)
    path, run = F.pad(step.cumsum(dim=0), (0, 0, 1, 0)), F.pad((~close).cumsum(dim=0), (1, 0))
    first, second = torch.triu_indices(len(image), len(image), offset=1)
    first, second = (pick[run[first] == run[second]] for pick in (first, second))
    slopes = (path[second] - path[first]) / (image[second] - image[first])[:, None]
    pace = (step[close] / gap[close, None]).abs().median(dim=0).values
    return slopes.median(dim=0).values, pace


def torus_offset(offset: Tensor) -> Tensor:
    """The shortest way round of differences between places, in pixels."""
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

    `colour` (just the named ones show, each once), `shape`, `direction` and `speed` are 1.0 or 0.0
    and ask it of every thing; where the caption leaves the speed open, it need only move.
    `measured_speed` is the mean in sizes a latent frame, nan where nothing shows.
    """
    return score_tracks(tracks_of(detect(video)), parse_caption(caption))


def score_tracks(tracks: Sequence[Track], targets: Sequence[Attributes]) -> dict[str, float]:
    """`score` for tracks and a parsed caption. A wrong colour does not make the rest wrong."""
    pairs = pair(tracks, targets)
    complete = len(pairs) == len(targets)
    speeds = [_speed_of(seen, target) for seen, target in pairs]
    named = {target.colour for target in targets} - {None}
    shown = {seen.colour for seen in tracks if seen.shape != NO_SHAPE}
    correct = {
        "colour": named <= shown and len(shown) == len(tracks) == len(targets),
        "shape": complete and all(_shape_fits(seen, target) for seen, target in pairs),
        "direction": complete and all(_direction_fits(seen, target) for seen, target in pairs),
        "speed": complete and all(_speed_fits(seen, target) for seen, target in pairs),
    }
    measured = sum(speeds) / len(speeds) if speeds else math.nan
    return {name: float(value) for name, value in correct.items()} | {"measured_speed": measured}


def pair(tracks: Sequence[Track], targets: Sequence[Attributes]) -> list[tuple[Track, Attributes]]:
    """Match tracks to targets: by colour, then the others so that most of what is said is true."""
    by_colour = {seen.colour: seen for seen in tracks}
    pairs = [(by_colour[target.colour], target) for target in targets if target.colour in by_colour]
    named = {target.colour for target in targets}
    spare = [seen for seen in tracks if seen.colour not in named]
    missing = [target for target in targets if target.colour not in by_colour]
    orders = permutations(spare, min(len(spare), len(missing)))
    return pairs + max((list(zip(each, missing, strict=False)) for each in orders), key=_true_of)


def _true_of(pairs: Sequence[tuple[Track, Attributes]]) -> int:
    return sum(
        fits(*each) for each in pairs for fits in (_shape_fits, _direction_fits, _speed_fits)
    )


def _shape_fits(seen: Track, target: Attributes) -> bool:
    return seen.shape == target.shape or (target.shape is None and seen.shape != NO_SHAPE)


def _direction_fits(seen: Track, target: Attributes) -> bool:
    if target.bounces:
        return seen.pace[target.axis] > max(STILL_LIMIT, seen.pace[1 - target.axis])
    return seen.direction == target.direction


def _speed_of(seen: Track, target: Attributes) -> float:
    return seen.pace[target.axis] if target.bounces else seen.speed


def _speed_fits(seen: Track, target: Attributes) -> bool:
    speed = _speed_of(seen, target)
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
    picture = look_at(video)
    amounts = picture.covers
    total = amounts.sum(dim=1, keepdim=True)
    inside = -F.max_pool2d(-(amounts > COVERED).float(), 3, 1, 1) > 0
    palette = torch.tensor([PALETTE[name] for name in COLOURS])
    off_palette = (video[:, None].float() - palette[:, :, None, None]).norm(dim=2)
    off_background = (video.float() - torch.tensor(BACKGROUND)[:, None, None]).norm(dim=1)
    half = ((total > 0.15) & (total < 0.85)).sum() / (total > COVERED).sum().clamp_min(1)
    return Drift(
        start_image=start_image,
        palette_error=_mean(off_palette[inside]),
        background_error=_mean(off_background[picture.is_backdrop]),
        area_error=_area_error(tracks_of(detections_of(picture))),
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
        if each.shape != NO_SHAPE
        else 1.0
        for each in tracks
    ]
    return sum(errors) / len(errors)
