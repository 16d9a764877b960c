"""The exact account as a picture and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Point = Mapping[str, float]

COLOURS = ("#1f77b4", "#d62728", "#8a8a8a", "#ff7f0e", "#9467bd", "#2ca02c")
_WIDTH, _HEIGHT, _LEFT, _TOP, _APART = 250, 190, 48, 40, 300
_LOW, _HIGH = 0.3, 1.1  # of mean speed
_TITLES = {
    "unlimited": "a student that can be any distribution",
    "one Gaussian": "a student that can be one Gaussian",
}


def plot(found: Mapping[str, Any]) -> str:
    """Mean speed against updates of every arm, a panel for each student, as SVG."""
    curves = found["curves"]
    arms = list(next(iter(curves.values())))
    width, height = _LEFT + _APART * len(curves) + 20, _TOP + _HEIGHT + 90
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for panel, (name, each) in enumerate(curves.items()):
        parts += _panel(_LEFT + panel * _APART, _TITLES[name], each, found)
    for index, arm in enumerate(arms):
        x, y = _LEFT + 200 * (index % 3), _TOP + _HEIGHT + 56 + 20 * (index // 3)
        parts.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{COLOURS[index]}"/>')
        parts.append(f'<text x="{x + 18}" y="{y}">{arm}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _panel(
    left: int, title: str, curves: Mapping[str, Sequence[Point]], found: Mapping[str, Any]
) -> list[str]:
    last = max(curve[-1]["update"] for curve in curves.values())
    parts = [f'<text x="{left}" y="{_TOP - 20}">{title}</text>']
    for speed in (0.3, 0.5, 0.7, 0.9, 1.1):
        y = _height(speed)
        parts.append(f'<path d="M{left} {y:.1f}h{_WIDTH}" stroke="#eee"/>')
        parts.append(f'<text x="{left - 26}" y="{y + 4:.1f}">{speed:.1f}</text>')
    for name in ("teacher", "tilted"):
        y = _height(found[name]["mean_speed"])
        text = "the teacher's" if name == "teacher" else "the tilted teacher's"
        parts.append(f'<path d="M{left} {y:.1f}h{_WIDTH}" stroke="black" stroke-dasharray="4 3"/>')
        parts.append(f'<text x="{left + _WIDTH}" y="{y + 14:.1f}" text-anchor="end">{text}</text>')
    for colour, curve in zip(COLOURS, curves.values(), strict=True):
        points = " ".join(
            f"{left + _WIDTH * each['update'] / last:.1f},{_height(each['mean_speed']):.1f}"
            for each in curve
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
    y = _TOP + _HEIGHT + 18
    parts.append(f'<text x="{left}" y="{y}">mean speed against updates, 0 to {last:.0f}</text>')
    return parts


def _height(speed: float) -> float:
    return _TOP + _HEIGHT * (_HIGH - speed) / (_HIGH - _LOW)


def table(found: Mapping[str, Any]) -> str:
    """Where every arm ends, in Markdown: mean speed, and KL to the teacher and the tilted one."""
    teacher, tilted = found["teacher"], found["tilted"]
    lines = [
        "| | any distribution: speed | KL to teacher | to tilted | one Gaussian: speed | "
        "KL to teacher | to tilted |",
        "|---|---|---|---|---|---|---|",
        f"| teacher | {teacher['mean_speed']:.3f} | 0 | {teacher['kl_to_tilted']:.3f} | | | |",
        f"| tilted teacher | {tilted['mean_speed']:.3f} | {tilted['kl_to_teacher']:.3f} | 0 "
        "| | | |",
    ]
    for arm in next(iter(found["curves"].values())):
        ends = [curves[arm][-1] for curves in found["curves"].values()]
        cells = [f"{end[name]:.3f}" for end in ends for name in _MEASURES]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


_MEASURES = ("mean_speed", "kl_to_teacher", "kl_to_tilted")
