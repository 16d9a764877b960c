"""The claims' results as tables, a plot and strips of pictures.

Intervals are 95 % bootstraps over training seeds and prompts together; differences are paired, the
same seed, prompt and noise in both arms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rf_core.numbered import numbered
from rf_core.video import to_uint8
from rf_core.weights.checkpoint import load_student
from rf_core.weights.files import read_json

from ..run.folder import STUDENT
from .ablations import (
    ARMS,
    BASE,
    REWARD_ARMS,
    SINK_ARMS,
    Measurer,
    folder_of,
    result_path,
    streaming_config,
)

Result = Mapping[str, Any]
Row = Callable[[Result], list[float]]
REFERENCES = ("true videos", "teacher", "student before")
RESAMPLES = 2000


def read_results(out: Path) -> dict[str, list[Result]]:
    """Finished results by arm, one a seed; ValueError where there is none."""
    found: dict[str, list[Result]] = {}
    for arm in (*REFERENCES, *ARMS):
        if results := [read_json(path) for path in _paths(out, arm)]:
            found[arm] = results
    if not found:
        raise ValueError(f"{out} holds no results of claims")
    return found


def _paths(out: Path, arm: str) -> list[Path]:
    if arm in REFERENCES:
        return [path for path in [result_path(out, arm)] if path.exists()]
    return [path for _, path in numbered(out, lambda seed: result_path(out, arm, seed).name)]


def report(out: Path) -> str:
    """All tables, in Markdown."""
    results = read_results(out)
    parts = [_table("Rewards", results, [arm.name for arm in REWARD_ARMS], REWARD_COLUMNS)]
    sinks = [BASE, *(arm.name for arm in SINK_ARMS)]
    parts.append(_table("Sinks, over long videos", results, sinks, SINK_COLUMNS))
    return "\n\n".join(parts) + "\n"


def _of(group: str, name: str) -> Row:
    return lambda result: [float(each[name]) for each in result[group]]


def _late(name: str) -> Row:
    def row(result: Result) -> list[float]:
        if name == "right":
            return [float(each["late_right"]) for each in result["long"]]
        return [each["late"][name] - each["early"][name] for each in result["long"]]

    return row


REWARD_COLUMNS: Mapping[str, Row] = {
    "speed": _of("free", "speed_along"),
    "optical flow": _of("free", "flow"),
    "one thing right": _of("named", "right"),
    "two things right": _of("two", "right"),
    "first-frame copy": _of("free", "first_frame_copy"),
}
"""Speed in shape sizes a latent frame along the caption, where it leaves speed open; flow in
pixels an image; shares of attributes that are right; mean SSIM with the first image."""
SINK_COLUMNS: Mapping[str, Row] = {
    "late right": _late("right"),
    "colour drift": _late("palette_error"),
    "area drift": _late("area_error"),
    "softness drift": _late("softness"),
    "speed": _of("free", "speed_along"),
    "two things right": _of("two", "right"),
}
"""Attributes right in the last 57 images of 477; late minus early of the tracker's measures."""


def _table(
    title: str,
    results: Mapping[str, Sequence[Result]],
    arms: Sequence[str],
    columns: Mapping[str, Row],
) -> str:
    lines = [
        f"### {title}",
        "",
        "| | seeds | " + " | ".join(columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for arm in [*REFERENCES, *arms]:
        if arm in results:
            cells = [_cell(arm, results, row) for row in columns.values()]
            seeds = "" if arm in REFERENCES else str(len(results[arm]))
            lines.append(f"| {arm} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(arm: str, results: Mapping[str, Sequence[Result]], row: Row) -> str:
    """The mean with its interval and, for an arm, its paired difference from the base."""
    try:
        values = np.array([row(result) for result in results[arm]])
    except KeyError:  # true videos and the teacher's have no long ones
        return ""
    text = f"{np.nanmean(values):.3f} {_interval(values)}"
    if arm in REFERENCES or arm == BASE or BASE not in results:
        return text
    base = {result["seed"]: row(result) for result in results[BASE]}
    both = [(row(r), base[r["seed"]]) for r in results[arm] if r["seed"] in base]
    if not both:
        return text
    change = np.array([np.subtract(a, b) for a, b in both])
    return f"{text}; {np.nanmean(change):+.3f} {_interval(change)}"


def _interval(values_SN: np.ndarray) -> str:
    rng = np.random.default_rng(0)
    seeds, prompts = values_SN.shape
    rows = rng.integers(seeds, size=(RESAMPLES, seeds, 1))
    columns = rng.integers(prompts, size=(RESAMPLES, 1, prompts))
    means = np.nanmean(values_SN[rows, columns], axis=(1, 2))
    low, high = np.nanquantile(means, (0.025, 0.975))
    return f"[{low:.3f}, {high:.3f}]"


COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#bab0ac")


def motion_plot(out: Path) -> str:
    """Speed against updates of the reward arms, mean over seeds, as SVG."""
    results = read_results(out)
    curves = {
        arm.name: _mean_curve(results[arm.name]) for arm in REWARD_ARMS if arm.name in results
    }
    every = [speed for curve in curves.values() for _, speed in curve]
    last = max(update for curve in curves.values() for update, _ in curve)
    low, high = min(every) - 0.02, max(every) + 0.02

    def place(update: float, speed: float) -> tuple[float, float]:
        return 60 + 380 * update / last, 250 - 220 * (speed - low) / (high - low)

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 290" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="680" height="290" fill="white"/>',
        '<text x="60" y="280">updates</text>',
        '<text x="60" y="18">speed where the caption leaves it open, sizes a latent frame</text>',
    ]
    for speed in np.linspace(low, high, 5):
        y = place(0, speed)[1]
        parts.append(f'<path d="M60 {y:.1f}H440" stroke="#ddd"/>')
        parts.append(f'<text x="15" y="{y + 4:.1f}">{speed:.2f}</text>')
    for update in sorted({update for curve in curves.values() for update, _ in curve}):
        parts.append(f'<text x="{place(update, low)[0] - 6:.1f}" y="266">{update}</text>')
    for index, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*each) for each in curve))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        y = 40 + 20 * index
        parts.append(f'<rect x="455" y="{y - 10}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="473" y="{y}">{name}</text>')
    return "\n".join([*parts, "</svg>"])


def _mean_curve(results: Sequence[Result]) -> list[tuple[int, float]]:
    updates = sorted({int(update) for result in results for update in result["curve"]})
    return [
        (update, float(np.mean([result["curve"][str(update)] for result in results])))
        for update in updates
    ]


def strips(out: Path, measurer: Measurer, prompt: str, images: int = 8) -> Image.Image:
    """A row of images of one prompt from every arm's first student that is there."""
    rows = []
    for name, results in read_results(out).items():
        if name in ARMS:
            path = folder_of(out, ARMS[name], results[0]["seed"]) / STUDENT
            student, _ = load_student(path, device="cpu", dtype=torch.float32)
            (video,) = measurer.videos([prompt], student, *streaming_config(results[0]))
            rows.append(_row(video, images))
    return Image.fromarray(torch.cat(rows).numpy())


def _row(video: Tensor, images: int) -> Tensor:
    chosen = video[torch.linspace(0, len(video) - 1, images).long()]
    return torch.cat(list(to_uint8(chosen)), dim=1)
