"""What a video shows, measured from its pixels alone: nothing here has weights or is downloaded.

Videos are [T, 3, H, W] in [0, 1]. Optical flow says how much moves (`motion`, `is_dynamic`); the
rest says what is paid for it: `flicker`, a copy of the first image, a look that drifts away. The
two named after VBench (arXiv 2311.17982) follow its rules, with the flow that is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Protocol

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from rf_core.config import FPS

GROUP = 8
"""Images measured at once; memory follows it, results do not."""
TOP_SHARE = 0.05
"""Share of the pixels, the fastest, that `motion` is the mean of (VBench's dynamic degree)."""

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_SSIM_SIGMA, _SSIM_RADIUS = 1.5, 5  # pixels; Wang et al. 2004, sec. III B
_SSIM_FLOOR = (0.01**2, 0.03**2)


class FlowEstimator(Protocol):
    """Finds where the pixels of one image are in the next."""

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Flow [N, 2, H, W] in pixels, x then y, between images [N, 3, H, W] in [0, 1].

        What `first` shows at (x, y), `second` shows at (x, y) + flow.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LucasKanadeConfig:
    """A pyramid of Lucas-Kanade steps (Bouguet 2001) that takes rest for the likeliest motion."""

    window: float = 3.0
    """Standard deviation of the Gaussian window in which motion is one, in pixels of each level."""
    iterations: int = 6
    """Steps on each level."""
    stiffness: float = 1e-5
    """Strength of the prior for rest (Simoncelli 1991), in squared grey levels of [0, 1].

    Where a picture has no more texture than this, nothing is seen to move.
    """
    smallest: int = 12
    """Rows and columns the coarsest level has at least."""

    def __post_init__(self) -> None:
        if not (self.window > 0 and self.stiffness > 0):
            raise ValueError(
                f"window is {self.window}, stiffness {self.stiffness}; both must be positive"
            )
        if self.iterations < 1 or self.smallest < 2:
            raise ValueError(
                f"iterations is {self.iterations}, smallest {self.smallest}; give at least 1 and 2"
            )


DEFAULT_FLOW = LucasKanadeConfig()


def lucas_kanade(first: Tensor, second: Tensor, config: LucasKanadeConfig = DEFAULT_FLOW) -> Tensor:
    """Flow [N, 2, H, W] in pixels between images [N, 3, H, W] of any size; see `FlowEstimator`.

    Pixels that would leave the picture do not count. Differentiable by the images.
    """
    levels = _pyramid(torch.cat([first, second]).float(), config.smallest)
    found = first.new_zeros(len(first), 2, *levels[-1].shape[2:], dtype=torch.float32)
    for level in reversed(levels):
        found = _rescaled(found, *level.shape[2:])
        before, after = level.chunk(2)
        for _ in range(config.iterations):
            found = found + _step(before, after, found, config)
    return found


def flow(images: Tensor, estimate: FlowEstimator = lucas_kanade) -> Tensor:
    """Flow [T-1, 2, H, W] in pixels an image, x then y, of a video [T, 3, H, W] in [0, 1].

    ValueError for anything but a video of two images or more.
    """
    return torch.cat(list(_flows(images, estimate)))


def motion(video: Tensor, estimate: FlowEstimator = lucas_kanade) -> dict[str, float]:
    """How fast a video [T, 3, H, W] moves, in pixels an image, averaged over its pairs of images.

    `motion` is the mean flow magnitude of the fastest `TOP_SHARE` of the pixels, as in VBench's
    dynamic degree; `mean_motion` that of all of them. ValueError for less than two images.
    """
    with torch.no_grad():
        return {name: float(each) for name, each in motion_scores(video, estimate).items()}


def motion_scores(video: Tensor, estimate: FlowEstimator = lucas_kanade) -> dict[str, Tensor]:
    """`motion` as scalars, float64 on the CPU, differentiable by the video where the flow is."""
    fastest, every = [], []
    for part in _flows(video, estimate):
        speed = part.norm(dim=1).flatten(1)
        fastest.append(_top_mean(speed))
        every.append(speed.mean(dim=1))
    return {
        "motion": torch.cat(fastest).cpu().double().mean(),
        "mean_motion": torch.cat(every).cpu().double().mean(),
    }


def is_dynamic(video: Tensor, estimate: FlowEstimator = lucas_kanade, fps: float = FPS) -> bool:
    """Whether a video [T, 3, H, W] of `fps` images a second counts as moving, by VBench's rule.

    Seen 8 times a second, the fastest 5 % of the pixels must move by more than 6 pixels (of 256 on
    the shorter side) in a quarter of the images (vbench/dynamic_degree.py). VBench's flow is RAFT
    (`training.measures.flow`); others shift the limit. ValueError for less than two images seen.
    """
    seen = video[:: max(1, round(fps / 8))]
    limit = max(1.0, 8 / fps) * 6 * min(video.shape[2:]) / 256
    wanted = max(1, round(len(seen) / 4))
    fastest = [_top_mean(part.norm(dim=1).flatten(1)) for part in _flows(seen, estimate)]
    return int((torch.cat(fastest) > limit).sum()) >= wanted


def flicker(video: Tensor) -> float:
    """VBench's temporal flickering of a video [T, 3, H, W]: (255 - d) / 255, 1 for a still one.

    d is the mean absolute difference of neighbouring images in bytes (vbench/
    temporal_flickering.py). Motion lowers it too: VBench asks it of still scenes alone, so compare
    videos of like motion. ValueError for less than two images.
    """
    pairs = (
        (part[1:].float() - part[:-1].float()).abs().mean(dim=(1, 2, 3)) for part in _pairs(video)
    )
    return 1 - float(torch.cat(list(pairs)).cpu().double().mean())


def first_frame_copy(video: Tensor) -> float:
    """How much the second half of a video [T, 3, H, W] still is its first image: mean SSIM.

    1 for a frozen video, about 0 where nothing is left in its place. A still background counts as
    a copy, so compare models on the same prompts. ValueError for less than two images.
    """
    _check(video)
    first = _luma(video[:1])
    later = video[len(video) // 2 :].split(GROUP)
    return float(torch.cat([_ssim(_luma(part), first) for part in later]).cpu().double().mean())


@dataclass(frozen=True, kw_only=True)
class ImageStatistics:
    """The statistics of some images, each in per cent of the full range."""

    red: float
    """Mean of the channel."""
    green: float
    """Mean of the channel."""
    blue: float
    """Mean of the channel."""
    contrast: float
    """Standard deviation of the luma within an image."""
    saturation: float
    """Largest less smallest channel of a pixel, averaged."""
    sharpness: float
    """Mean gradient of the luma, a pixel."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How the look of a video changes from window to window."""

    early: ImageStatistics
    """The first window."""
    late: ImageStatistics
    """The last whole window."""
    sharpness_std: float
    """Standard deviation of the windows' sharpness, in its unit: a stand-in, see `drift`."""

    @property
    def colour_shift(self) -> float:
        """Distance of the late mean colour from the early one in RGB, per cent."""
        before, after = ((each.red, each.green, each.blue) for each in (self.early, self.late))
        return math.dist(before, after)


def drift(video: Tensor, window_images: int) -> Drift:
    """How the look of a video [T, 3, H, W] changes between its whole windows of that many images.

    Reward Forcing (arXiv 2512.04678) measures drift as the standard deviation of VBench's imaging
    quality over windows. That needs a learned judge; `sharpness_std` puts plain sharpness in its
    place, so it compares videos measured here and never with the paper's numbers. ValueError for
    less than two windows.
    """
    _check(video)
    statistics = [image_statistics(video[part]) for part in windows(len(video), window_images)]
    sharpness = torch.tensor([each.sharpness for each in statistics], dtype=torch.float64)
    return Drift(
        early=statistics[0], late=statistics[-1], sharpness_std=float(sharpness.std(correction=0))
    )


def windows(num_images: int, window_images: int) -> list[slice]:
    """The whole windows of a video; ValueError for less than two."""
    count = num_images // window_images if window_images > 0 else 0
    if count < 2:
        raise ValueError(
            f"a video of {num_images} images does not hold two windows of {window_images}; "
            f"choose windows of 1 to {max(1, num_images // 2)} images, or make longer videos"
        )
    return [slice(i * window_images, (i + 1) * window_images) for i in range(count)]


def image_statistics(images: Tensor) -> ImageStatistics:
    """The statistics of images [T, 3, H, W] in [0, 1]."""
    parts = torch.cat([_statistics(part.float()) for part in images.split(GROUP)])
    means = (100 * parts.cpu().double().mean(0)).tolist()
    return ImageStatistics(
        **dict(zip((each.name for each in fields(ImageStatistics)), means, strict=True))
    )


def measure(
    video: Tensor, window_images: int, estimate: FlowEstimator = lucas_kanade
) -> dict[str, float]:
    """All of the above by name, for one video [T, 3, H, W]; ValueError where one does not fit."""
    change = drift(video, window_images)
    early, late = asdict(change.early), asdict(change.late)
    return {
        **motion(video, estimate),
        "dynamic": float(is_dynamic(video, estimate)),
        "flicker": flicker(video),
        "first_frame_copy": first_frame_copy(video),
        "sharpness_std": change.sharpness_std,
        "colour_shift": change.colour_shift,
        **{f"{name}_early": value for name, value in early.items()},
        **{f"{name}_late": value for name, value in late.items()},
    }


def _check(video: Tensor) -> None:
    if video.ndim != 4 or video.shape[1] != 3 or len(video) < 2:
        raise ValueError(
            f"video has shape {tuple(video.shape)}; give [T, 3, H, W] of at least two images"
        )


def _pairs(video: Tensor) -> Iterator[Tensor]:
    """Runs of images that overlap by one, so that every pair of neighbours is in one of them."""
    _check(video)
    for start in range(0, len(video) - 1, GROUP):
        yield video[start : start + GROUP + 1]


def _flows(video: Tensor, estimate: FlowEstimator) -> Iterator[Tensor]:
    return (estimate(part[:-1].float(), part[1:].float()) for part in _pairs(video))


def _top_mean(speed_NP: Tensor) -> Tensor:
    """Mean of the largest `TOP_SHARE` of each row, [N]."""
    count = max(1, int(speed_NP.shape[1] * TOP_SHARE))
    return speed_NP.topk(count, dim=1).values.mean(dim=1)


def _pyramid(images: Tensor, smallest: int) -> list[Tensor]:
    """Images, each half the size of the one before; the first is smoothed to be differentiated."""
    levels = [_blur(images, 0.8, "replicate")]
    while min(levels[-1].shape[2:]) >= 2 * smallest:
        size = [(side + 1) // 2 for side in levels[-1].shape[2:]]
        levels.append(F.interpolate(levels[-1], size, mode="bilinear", antialias=True))
    return levels


def _rescaled(found: Tensor, height: int, width: int) -> Tensor:
    """Flow on a finer grid, in its pixels."""
    if found.shape[2:] == (height, width):
        return found
    factor = found.new_tensor([width / found.shape[3], height / found.shape[2]])
    return F.interpolate(found, (height, width), mode="bilinear") * factor[:, None, None]


def _step(before: Tensor, after: Tensor, found: Tensor, config: LucasKanadeConfig) -> Tensor:
    """The change of a flow [N, 2, H, W] by one Gauss-Newton step.

    It minimises, over each window, |gradient . change + difference|^2, and stiffness times
    |flow + change|^2.
    """
    moved, inside = _warp(after, found)
    gx, gy = _gradient((before + moved) / 2)
    difference = moved - before
    products = [gx * gx, gx * gy, gy * gy, gx * difference, gy * difference]
    sums = torch.stack([each.mean(dim=1) for each in products], dim=1) * inside
    xx, xy, yy, x, y = _blur(sums, config.window, "constant").unbind(dim=1)
    xx, yy = xx + config.stiffness, yy + config.stiffness
    u, v = found.unbind(dim=1)
    x, y = x + config.stiffness * u, y + config.stiffness * v
    change = torch.stack([xy * y - yy * x, xy * x - xx * y], dim=1)
    return (change / (xx * yy - xy * xy).unsqueeze(1)).clamp(-1, 1)


def _warp(images: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Images read where the flow points, and 1 where that is inside the picture, [N, 1, H, W]."""
    height, width = images.shape[2:]
    x = torch.arange(width, device=found.device) + found[:, 0]
    y = torch.arange(height, device=found.device)[:, None] + found[:, 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved, inside.unsqueeze(1).float()


def _gradient(images: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences along x and y, a pixel; the edge is repeated outside."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    along_x = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    return along_x, (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2


def _blur(images: Tensor, sigma: float, padding: str, radius: int | None = None) -> Tensor:
    """Every channel smoothed by a Gaussian, cut off at `radius` pixels (three sigma)."""
    radius = math.ceil(3 * sigma) if radius is None else radius
    offset = torch.arange(-radius, radius + 1, dtype=torch.float32, device=images.device)
    kernel = torch.exp(-offset.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    planes = rearrange(images, "n c h w -> (n c) 1 h w")
    if padding != "valid":
        planes = F.pad(planes, (radius,) * 4, mode=padding)
    planes = F.conv2d(F.conv2d(planes, kernel[None, None, None]), kernel[None, None, :, None])
    return rearrange(planes, "(n c) 1 h w -> n c h w", n=len(images))


def _luma(images: Tensor) -> Tensor:
    """[T, 3, H, W] to [T, 1, H, W]."""
    weights = torch.tensor(_LUMA, device=images.device)[:, None, None]
    return (images.float() * weights).sum(dim=1, keepdim=True)


def _ssim(images: Tensor, other: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of lumas [T, 1, H, W] with [1, 1, H, W]: [T]."""
    images, other = torch.broadcast_tensors(images, other)
    stacked = torch.cat([images, other, images**2, other**2, images * other], dim=1)
    radius = min(_SSIM_RADIUS, (min(images.shape[2:]) - 1) // 2)
    mean, other_mean, square, other_square, product = _blur(
        stacked, _SSIM_SIGMA, "valid", radius
    ).unbind(dim=1)
    low, high = _SSIM_FLOOR
    covariance = product - mean * other_mean
    spread = square - mean**2 + other_square - other_mean**2
    alike = (2 * mean * other_mean + low) * (2 * covariance + high)
    return (alike / ((mean**2 + other_mean**2 + low) * (spread + high))).mean(dim=(1, 2))


def _statistics(images: Tensor) -> Tensor:
    """Per image the six numbers of a `ImageStatistics` in their order, [T, 6] in [0, 1]."""
    luma = _luma(images)
    along_x, along_y = _gradient(luma)
    columns = [
        *reduce(images, "t c h w -> c t", "mean"),
        luma.flatten(1).std(dim=1, correction=0),
        (images.amax(dim=1) - images.amin(dim=1)).flatten(1).mean(dim=1),
        (along_x.square() + along_y.square()).sqrt().flatten(1).mean(dim=1),
    ]
    return torch.stack(columns, dim=1)
