"""Where the nodes of a template go, so that nothing covers anything once it has run.

A node is measured as each renderer draws it, and gets the room that its results take beside. Each
column holds its nodes one below the other; then a node that a link runs behind moves down below it,
until there is none in either renderer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

TITLE = 30
"""Pixels of a node's title, which stands above its place."""
GAP = 40
"""Pixels between two nodes of a column."""
LANE = 100
"""Pixels between two columns: links go up and down there."""
CLEAR = 12
"""Pixels between a link and a node that it passes."""
BORDER = 20
"""Pixels around the nodes of a group."""
GROUP_TITLE = 50
BEND = 0.25
"""Of its length, how far a link goes straight on from either end, as LiteGraph draws it."""
SAMPLES = 48
MAX_MOVES = 500

RESULTS = {"RFStreamingSampler": 520, "RFLiveStream": 900, "RFPromptSchedule": 140}
"""Pixels by which a run makes a node taller at most: a square video as wide as the node, the
longest text."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One node as one renderer draws it, before a run; places are from its own."""

    size: Point
    inputs: dict[str, Point]
    outputs: dict[str, Point]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One node to be placed."""

    type: str
    column: int
    top: float
    """At least so far down."""
    drawn: tuple[Drawn, ...]
    """One for each renderer."""

    @property
    def width(self) -> float:
        """In the renderer that needs more."""
        return max(each.size[0] for each in self.drawn)

    @property
    def height(self) -> float:
        """After a run."""
        return max(each.size[1] for each in self.drawn) + RESULTS.get(self.type, 0)


def curve(start: Point, end: Point) -> Iterator[Point]:
    """Points along a link, its ends left out."""
    (x0, y0), (x3, y3) = start, end
    bend = BEND * ((x3 - x0) ** 2 + (y3 - y0) ** 2) ** 0.5
    x1, x2 = x0 + bend, x3 - bend
    for i in range(1, SAMPLES):
        t = i / SAMPLES
        a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
        yield a * x0 + b * x1 + c * x2 + d * x3, (a + b) * y0 + (c + d) * y3


def behind(points: list[Point], box: Box, clear: float) -> list[Point]:
    """The points that a node covers, or nearly."""
    left, top, right, bottom = box
    return [(x, y) for x, y in points if left < x < right and top - clear < y < bottom + clear]


def arrange(nodes: dict[str, Placed], links: list[tuple[str, str]]) -> dict[str, Point]:
    """A place for each node."""
    for source, target in links:
        start, end = source.partition(".")[0], target.partition(".")[0]
        if nodes[start].column >= nodes[end].column:
            raise ValueError(f"{source} to {target} does not go from left to right")
    lefts = _lefts(nodes)
    tops = {name: node.top for name, node in nodes.items()}
    for _ in range(MAX_MOVES):
        move = _overlap(nodes, tops) or _covered_link(nodes, links, lefts, tops)
        if move is None:
            highest = min(tops.values())
            return {name: (lefts[name], round(tops[name] - highest)) for name in nodes}
        name, pixels = move
        tops[name] += pixels
    raise ValueError(f"no place was found for {', '.join(nodes)}: start them at other heights")


def box_around(places: dict[str, Point], nodes: dict[str, Placed]) -> Box:
    """Around nodes as they are after a run."""
    return (
        min(x for x, _ in places.values()),
        min(y for _, y in places.values()) - TITLE,
        max(x + nodes[name].width for name, (x, _) in places.items()),
        max(y + nodes[name].height for name, (_, y) in places.items()),
    )


def _lefts(nodes: dict[str, Placed]) -> dict[str, float]:
    left, result = 0.0, {}
    for column in range(1 + max(node.column for node in nodes.values())):
        inside = {name: node for name, node in nodes.items() if node.column == column}
        result |= dict.fromkeys(inside, left)
        left += max(node.width for node in inside.values()) + LANE
    return result


def _overlap(nodes: dict[str, Placed], tops: dict[str, float]) -> tuple[str, float] | None:
    order = sorted(nodes, key=lambda name: (nodes[name].column, tops[name]))
    for upper, lower in pairwise(order):
        free = tops[upper] + nodes[upper].height + GAP + TITLE
        if nodes[upper].column == nodes[lower].column and tops[lower] < free:
            return lower, free - tops[lower]
    return None


def _covered_link(
    nodes: dict[str, Placed],
    links: list[tuple[str, str]],
    lefts: dict[str, float],
    tops: dict[str, float],
) -> tuple[str, float] | None:
    for source, target in links:
        (start, output), (end, into) = source.split("."), target.split(".")
        for renderer, drawn in enumerate(nodes[start].drawn):
            x0, y0 = drawn.outputs[output]
            x3, y3 = nodes[end].drawn[renderer].inputs[into]
            ends = (lefts[start] + x0, tops[start] + y0), (lefts[end] + x3, tops[end] + y3)
            points = list(curve(*ends))
            for name, node in nodes.items():
                top, bottom = tops[name] - TITLE, tops[name] + node.height
                box = (lefts[name], top, lefts[name] + node.width, bottom)
                covered = behind(points, box, CLEAR) if name not in (start, end) else []
                if covered:
                    return name, max(y for _, y in covered) + CLEAR + 1 - top
    return None
