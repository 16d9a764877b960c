"""What tables and plots show of a result: a number a video, or a number a video and window."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import Any

import numpy as np

from ..world.scenes import IMAGES_PER_FRAME
from .results import Result, Row

Series = Callable[[Mapping[str, Any]], list[float | None]]
"""A measure of every window of a long video."""
BINS = ((0, 4), (4, 8), (8, 12), (12, 10**6))
"""Latent frames that an occlusion takes, from and up to."""


def _of(group: str, name: str) -> Row:
    return lambda result: [each[name] for each in result[group]]


REWARD_ROWS: Mapping[str, Row] = MappingProxyType(
    {
        "speed": _of("free", "speed_along"),
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


def _distance(name: str) -> Series:
    def series(video: Mapping[str, Any]) -> list[float | None]:
        first, *_ = looks = [look[name] for look in video["looks"]]
        return [None if None in (first, each) else abs(each - first) for each in looks]

    return series


def _hue(video: Mapping[str, Any]) -> list[float | None]:
    found = _distance("hue")(video)
    return [None if each is None else min(each % 360, 360 - each % 360) for each in found]


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


def _plainly(name: str) -> Series:
    return lambda video: video[name]


DRIFTS: Mapping[str, Series] = MappingProxyType(
    {
        "backdrop's hue": _hue,
        "backdrop's brightness": _distance("brightness"),
        "shade": _of_things("shade"),
        "size": _of_things("size"),
    }
)
"""The distance from the first window's: hue in degrees, brightness in [0, 1], shade and size
relative."""
SERIES: Mapping[str, Series] = MappingProxyType(
    {
        **DRIFTS,
        "speed": _plainly("speed"),
        "first picture": _plainly("copy"),
        "caption right": _plainly("right"),
    }
)
"""And what is kept: speed in shape sizes a latent frame along the caption, likeness to the first
image as a mean SSIM, the share of the caption's attributes that are right."""


def windows_of(result: Result, series: Series) -> np.ndarray:
    """A measure [videos, windows] of long videos, nan where it is no number."""
    rows = [series(video) for video in result["lasting"]]
    return np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=float)


def _late(name: str) -> Row:
    """The mean over the last quarter of the windows."""

    def row(result: Result) -> list[float | None]:
        values = windows_of(result, SERIES[name])
        late = values[:, -max(1, values.shape[1] // 4) :]
        return [float(np.nanmean(v)) if not np.isnan(v).all() else None for v in late]

    return row


def _nothing_right(result: Result) -> list[float | None]:
    return [fmean(right == 0 for right in video["right"]) for video in result["lasting"]]


def _jumps(result: Result) -> list[float | None]:
    return [float(sum(look["jumps"] for look in video["looks"])) for video in result["lasting"]]


def _same(result: Result) -> list[float | None]:
    return [
        fmean(each["same"] for each in video["occlusions"]) if video["occlusions"] else None
        for video in result["lasting"]
    ]


def _after_switch(name: str) -> Row:
    def row(result: Result) -> list[float | None]:
        return [
            float(np.mean(values[-max(1, len(values) // 2) :])) if (values := each[name]) else None
            for each in result.get("switched", [])
        ]

    return row


def _delay(result: Result) -> list[float | None]:
    return [each["delay"] for each in result.get("switched", [])]


SINK_ROWS: Mapping[str, Row] = MappingProxyType(
    {
        **{name: _late(name) for name in SERIES},
        "same after an occlusion": _same,
        "nothing right": _nothing_right,
        "jumps": _jumps,
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


def curve(results: Sequence[Result], name: str = "speed_along") -> list[tuple[int, float]]:
    """A measure against updates, mean over captions and seeds that are there."""
    updates = sorted({int(update) for result in results for update in result["curve"]})
    return [
        (
            update,
            fmean(
                each[name]
                for result in results
                for each in result["curve"].get(str(update), [])
                if each[name] is not None
            ),
        )
        for update in updates
    ]


def gained(name: str = "speed_along") -> Row:
    """What a curve's last point has more than its first, caption by caption."""

    def row(result: Result) -> list[float | None]:
        first, *_, last = (result["curve"][key] for key in sorted(result["curve"], key=int))
        return [
            None if None in (a[name], b[name]) else b[name] - a[name]
            for a, b in zip(first, last, strict=True)
        ]

    return row
