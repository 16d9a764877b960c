"""The miniature world's exact tracker as a metric: whether a video matches its caption."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

from .scenes import DIRECTIONS, SIZE, Attributes, parse_caption
from .tracker import Track, detect, pair, score_tracks, tracks_of

ATTRIBUTES = ("colour", "shape", "direction", "speed")


class TrackerMetric:
    """What the tracker measures of videos of the miniature world."""

    name = "tracker"
    title = "captions, by the exact tracker"
    columns = ("colour", "shape", "direction", "speed", "measured_speed", "speed_along")
    legend = (
        "shares that are right, speed of the captions that name one; then shape sizes a "
        "latent frame, in all and along the caption's direction"
    )

    def supports(self, prompts: Iterable[str], size: tuple[int, int]) -> bool:
        """Whether every prompt is a caption, and videos are of the world's size."""
        return size == (SIZE, SIZE) and all(map(_is_caption, prompts))

    def __call__(self, video: Tensor, prompt: str) -> dict[str, float | None]:
        """See `caption_measures`."""
        return caption_measures(video, prompt)


def caption_measures(video: Tensor, caption: str) -> dict[str, float | None]:
    """Whether a video [T, 3, SIZE, SIZE] of the miniature world matches its caption.

    `colour`, `shape`, `direction`, `speed` are 1 or 0, as `training.world.tracker.score` has them;
    `speed` is None where the caption names none, `measured_speed` where nothing shows.
    `speed_along` is in shape sizes a latent frame along the caption's direction, over its things:
    negative against it, 0 for one that does not show or moves sideways; of one that bounces it is
    the speed along its axis.
    """
    return track_measures(tracks_of(detect(video)), caption)


def track_measures(tracks: Sequence[Track], caption: str) -> dict[str, float | None]:
    """The same of a video's tracks."""
    targets = parse_caption(caption)
    found: dict[str, float | None] = dict(score_tracks(tracks, targets))
    if not any(each.speed_name for each in targets):
        found["speed"] = None
    found["measured_speed"] = _finite(found["measured_speed"])
    along = [
        _speed_along(seen, each) if each.colour in (None, seen.colour) else 0.0
        for seen, each in pair(tracks, targets)
    ]
    return found | {"speed_along": sum(along) / len(targets)}


def share_right(measures: Mapping[str, float | None]) -> float:
    """Share of a caption's attributes that are right, of those that it names."""
    asked = [value for name in ATTRIBUTES if (value := measures[name]) is not None]
    return sum(asked) / len(asked)


def mean_of_known(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """The mean of what is a number, nan of none."""
    known = np.isfinite(values)
    total, count = np.where(known, values, 0.0).sum(axis=axis), known.sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _speed_along(seen: Track, target: Attributes) -> float:
    if target.bounces:
        return seen.pace[target.axis]
    x, y = DIRECTIONS[target.direction]
    seen_x, seen_y = DIRECTIONS.get(seen.direction, (0, 0))
    return seen.speed * (x * seen_x + y * seen_y)


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _is_caption(prompt: str) -> bool:
    try:
        return bool(parse_caption(prompt))
    except ValueError:
        return False
