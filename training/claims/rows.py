"""What tables and plots show of a result: a number a video, or a number a video and window."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import Any

import numpy as np

from ..world.metric import mean_of_known
from ..world.scenes import IMAGES_PER_FRAME
from .arms import Arm, Motion
from .results import Result, Row

Series = Callable[[Mapping[str, Any]], list[float | None]]
"""A measure of every window of a long video."""
Measure = Callable[[Sequence[Mapping[str, Any]]], list[float | None]]
"""A number a video of some short ones."""
BINS = ((0, 3), (3, 6), (6, 9), (9, 10**6))
"""Latent frames that an occlusion takes, from and up to; 6 are the past in a window with no sink,
half of them where there is one."""


def _of(group: str, name: str) -> Row:
    return lambda result: [each[name] for each in result[group]]


def speeds(videos: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Along the caption's direction."""
    return [video["speed_along"] for video in videos]


def moving(videos: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """The same of videos that move as their caption says: what fails has none, and is not slow."""
    return [speed if speed and speed > 0 else None for speed in speeds(videos)]


def spread(videos: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Each video's distance from the mean speed, of those that move as their caption says: all of
    one speed would be 0, and what fails is not taken for variety."""
    found = moving(videos)
    mean = fmean(known) if (known := [speed for speed in found if speed]) else 0.0
    return [None if speed is None else abs(speed - mean) for speed in found]


REWARD_ROWS: Mapping[str, Row] = MappingProxyType(
    {
        "speed": lambda result: speeds(result["free"]),
        "speed of what moves": lambda result: moving(result["free"]),
        "spread of speed": lambda result: spread(result["free"]),
        "flow": _of("free", "flow"),
        "one thing right": _of("named", "right"),
        "two things right": _of("two", "right"),
        "first-frame copy": _of("free", "first_frame_copy"),
        "flicker": _of("free", "flicker"),
        "softness": _of("free", "softness"),
        "area error": _of("free", "area_error"),
    }
)
"""Their units are the report's to tell."""
_OF_MOTION: Mapping[Motion, tuple[str, ...]] = MappingProxyType(
    {"speed": ("speed", "speed of what moves"), "flow": ("flow",)}
)


def trains_on(arm: Arm, row: str) -> bool:
    """Whether a row is of the motion that an arm is trained on, and so does not judge it."""
    return arm.trained_on is not None and row in _OF_MOTION[arm.trained_on]


def _brightness(colour: np.ndarray) -> np.ndarray:
    return colour.max(axis=-1, keepdims=True)


def _tint(colour: np.ndarray) -> np.ndarray:
    return colour - colour.mean(axis=-1, keepdims=True)


def _of_backdrop(part: Callable[[np.ndarray], np.ndarray]) -> Series:
    """The distance from the first window's, of what is seen of its red, green and blue."""

    def series(video: Mapping[str, Any]) -> list[float | None]:
        seen = np.array([look["backdrop"] for look in video["looks"]], dtype=float)
        away = np.linalg.norm(part(seen) - part(seen[:1]), axis=-1)
        return [float(each) if np.isfinite(each) else None for each in away]

    return series


def _of_things(name: str) -> Series:
    """Mean distance, relative, from the first window's, over the colours that both show."""

    def series(video: Mapping[str, Any]) -> list[float | None]:
        looks = [{t["colour"]: t[name] for t in look["things"]} for look in video["looks"]]
        first = looks[0]
        return [
            fmean(abs(look[c] / first[c] - 1) for c in both)
            if (both := [c for c in look if first.get(c) and look[c] is not None])
            else None
            for look in looks
        ]

    return series


def _lost(video: Mapping[str, Any]) -> list[float | None]:
    """1 where no colour of the first window's things is seen."""
    looks = [{thing["colour"] for thing in look["things"]} for look in video["looks"]]
    return [float(not look & looks[0]) for look in looks]


def _plainly(name: str) -> Series:
    return lambda video: video[name]


DRIFTS: Mapping[str, Series] = MappingProxyType(
    {
        "backdrop's brightness": _of_backdrop(_brightness),
        "backdrop's tint": _of_backdrop(_tint),
        "shade": _of_things("shade"),
        "size": _of_things("size"),
    }
)
"""The distance from the first window's: brightness in [0, 1], tint as that of red, green and blue
less their mean, as a hue means little where all is nearly grey; shade and size relative, where the
thing is still seen."""
SERIES: Mapping[str, Series] = MappingProxyType(
    {
        **DRIFTS,
        "speed": _plainly("speed"),
        "first picture": _plainly("copy"),
        "caption right": _plainly("right"),
        "thing lost": _lost,
    }
)
"""And what is kept: speed in shape sizes a latent frame along the caption, likeness to the first
image as a mean SSIM, the share of the caption's attributes that are right; whether what the first
window shows is gone."""


def windows_of(result: Result, series: Series) -> np.ndarray:
    """A measure [videos, windows] of long videos, nan where it is no number."""
    rows = [series(video) for video in result["lasting"]]
    return np.array(rows, dtype=float)


def _late(name: str) -> Row:
    """The mean over the last quarter of the windows."""

    def row(result: Result) -> list[float | None]:
        values = windows_of(result, SERIES[name])
        return mean_of_known(values[:, -max(1, values.shape[1] // 4) :], 1).tolist()

    return row


def _nothing_right(result: Result) -> list[float | None]:
    return [fmean(right == 0 for right in video["right"]) for video in result["lasting"]]


def _jumps(result: Result) -> list[float | None]:
    return [float(sum(look["jumps"] for look in video["looks"])) for video in result["lasting"]]


def _same(low: float, up: float) -> Row:
    """The share of a video's occlusions of so many latent frames after which it is the same."""

    def row(result: Result) -> list[float | None]:
        every = [
            [each["same"] for each in video["occlusions"] if low <= each["latent_frames"] < up]
            for video in result["lasting"]
        ]
        return [fmean(each) if each else None for each in every]

    return row


def _after_switch(name: str) -> Row:
    def row(result: Result) -> list[float | None]:
        return [
            float(np.mean(values[-max(1, len(values) // 2) :])) if (values := each[name]) else None
            for each in result.get("switched", [])
        ]

    return row


def _delay(result: Result) -> list[float | None]:
    """What never follows counts with all that was waited."""
    every = result.get("switched", [])
    return [each["images"] if each["delay"] is None else each["delay"] for each in every]


def _followed(result: Result) -> list[float | None]:
    return [float(each["delay"] is not None) for each in result.get("switched", [])]


SINK_ROWS: Mapping[str, Row] = MappingProxyType(
    {
        **{name: _late(name) for name in SERIES},
        "same, hidden for less than 6": _same(0, 6),
        "same, hidden for longer": _same(6, math.inf),
        "nothing right": _nothing_right,
        "jumps": _jumps,
        "switches followed": _followed,
        "images to a switch": _delay,
        "old colour after a switch": _after_switch("old_colour"),
        "first picture after a switch": _after_switch("copy"),
    }
)
"""The same."""


def identity(results: Sequence[Result]) -> list[tuple[int, int]]:
    """How often a thing was the same after an occlusion, and of how many, by `BINS`."""
    every = [each for r in results for video in r["lasting"] for each in video["occlusions"]]
    binned = [[o["same"] for o in every if low <= o["latent_frames"] < up] for low, up in BINS]
    return [(sum(same), len(same)) for same in binned]


def collapse(result: Result) -> list[int]:
    """The latent frames at which the first window with nothing right begins, of those with one."""
    found = []
    for video in result["lasting"]:
        starts = [look["start_image"] for look in video["looks"]]
        wrong = [s for s, right in zip(starts, video["right"], strict=True) if right == 0]
        found += [wrong[0] // IMAGES_PER_FRAME] if wrong else []
    return found


def curve(results: Sequence[Result], measure: Measure) -> list[tuple[int, float]]:
    """A measure against updates, mean over captions, at those that every seed has."""
    shared = set.intersection(*(set(result["curve"]) for result in results))
    every = {u: [measure(result["curve"][u]) for result in results] for u in shared}
    means = {int(u): float(mean_of_known(np.array(each, dtype=float))) for u, each in every.items()}
    return sorted(means.items())


def gained(measure: Measure) -> Row:
    """What a curve's last point has more than its first, caption by caption."""

    def row(result: Result) -> list[float | None]:
        first, *_, last = (measure(result["curve"][k]) for k in sorted(result["curve"], key=int))
        return (np.array(last, dtype=float) - np.array(first, dtype=float)).tolist()

    return row
