"""The claims' results as pictures that are grasped in ten seconds."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..world.metric import mean_of_known
from ..world.scenes import IMAGES_PER_FRAME
from .arms import ARMS, BESIDE, LASTING, STARTS, Arm, Study
from .plan import TEACHER, TRUE, UNGUIDED
from .report import boundary_arms
from .results import (
    Estimate,
    Result,
    Results,
    difference,
    level,
    reference,
    results_of,
)
from .rows import (
    BINS,
    DRIFTS,
    REWARD_ROWS,
    SERIES,
    Measure,
    curve,
    gained,
    identity,
    speeds,
    spread,
    trains_on,
    windows_of,
)

Point = tuple[float, float]
COLOURS = (
    *("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b", "#e377c2"),
    *("#7f7f7f", "#bcbd22", "#000000"),
)
GAIN, LOSS, NULL, GREY = "#1f77b4", "#d62728", "#8a8a8a", "#dddddd"
_SCALE = 2  # drawn so much larger, and then made smaller, which smooths edges
_FOREST = (
    *("speed", "speed of what moves", "spread of speed"),
    *("flow", "one thing right", "two things right"),
)
_TIMED = (
    *("backdrop's brightness", "backdrop's tint", "size", "first picture"),
    *("speed", "caption right", "thing lost"),
)
"""Of the series, those drawn against time."""
_ROW, _NAMES, _PANEL, _GAP = 22, 190, 150, 16


@dataclass(frozen=True)
class Canvas:
    """A white picture in pixels, drawn on at twice its size."""

    width: int
    height: int
    image: Image.Image = field(init=False)

    def __post_init__(self) -> None:
        size = (self.width * _SCALE, self.height * _SCALE)
        object.__setattr__(self, "image", Image.new("RGB", size, "white"))

    @property
    def _draw(self) -> ImageDraw.ImageDraw:
        return ImageDraw.Draw(self.image)

    def line(self, points: Sequence[Point], colour: str, width: float = 1.0) -> None:
        """Straight from point to point."""
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        self._draw.line(scaled, fill=colour, width=round(width * _SCALE), joint="curve")

    def dot(self, at: Point, colour: str, *, hollow: bool = False, radius: float = 4) -> None:
        """A disc, or a ring."""
        (x, y), r = (each * _SCALE for each in at), radius * _SCALE
        fill = "white" if hollow else colour
        self._draw.ellipse((x - r, y - r, x + r, y + r), fill, outline=colour, width=2 * _SCALE)

    def box(self, corner: Point, size: Point, colour: str) -> None:
        """A rectangle."""
        (x, y), (w, h) = corner, size
        self._draw.rectangle([each * _SCALE for each in (x, y, x + w, y + h)], fill=colour)

    def text(
        self, at: Point, text: str, *, size: int = 12, anchor: str = "lm", colour: str = "#222222"
    ) -> None:
        """By default from the left, and centred about `at` in height."""
        place = at[0] * _SCALE, at[1] * _SCALE
        self._draw.text(place, text, fill=colour, font=_font(size * _SCALE), anchor=anchor)

    def paste(self, picture: Image.Image, corner: Point) -> None:
        """A picture at its own size."""
        size = picture.width * _SCALE, picture.height * _SCALE
        larger = picture.resize(size, Image.Resampling.NEAREST)
        self.image.paste(larger, (round(corner[0] * _SCALE), round(corner[1] * _SCALE)))

    def finished(self) -> Image.Image:
        """The picture at its size."""
        return self.image.resize((self.width, self.height), Image.Resampling.LANCZOS)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


@dataclass(frozen=True)
class Panel:
    """Axes: a rectangle of a canvas, and the values that its edges stand for."""

    canvas: Canvas
    corner: Point
    size: Point
    x: Point
    y: Point

    def at(self, x: float, y: float) -> Point:
        """Where values are on the canvas."""
        right = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.corner[0] + right * self.size[0], self.corner[1] + (1 - up) * self.size[1]

    def frame(self, title: str, ticks: Sequence[tuple[float, str]], unit: str) -> None:
        """A title above, lines at three heights with their values, and words below."""
        for above, part in enumerate(reversed(_in_lines(title))):
            self.canvas.text((self.corner[0], self.corner[1] - 12 - 15 * above), part, size=13)
        for y in np.linspace(*self.y, 3).tolist():
            self.canvas.line([self.at(self.x[0], y), self.at(self.x[1], y)], GREY)
            left = self.at(self.x[0], y)
            self.canvas.text((left[0] - 5, left[1]), f"{y:.2g}", size=10, anchor="rm")
        for x, word in ticks:
            below = self.at(x, self.y[0])
            self.canvas.text((below[0], below[1] + 9), word, size=10, anchor="mm")
        middle = self.corner[0] + self.size[0] / 2
        self.canvas.text((middle, self.corner[1] + self.size[1] + 24), unit, size=10, anchor="mm")

    def curve(self, points: Sequence[Point], colour: str, *, dots: bool = False) -> None:
        """A line through points; what is no number is left out."""
        known = [self.at(x, y) for x, y in points if np.isfinite(y)]
        if len(known) > 1:
            self.canvas.line(known, colour, 2)
        for each in known if dots or len(known) == 1 else ():
            self.canvas.dot(each, colour, radius=2.5)


def pictures(results: Results) -> dict[str, Image.Image]:
    """The plots of what is there, by the names of their files."""
    made = {
        "rewards": _forest(results),
        **{study: _against_time(results, study) for study in LASTING},
        "speeds": _speeds(results),
        "boundary": _map(results),
        "strips": _strips(results),
    }
    return {f"{name}.png": image for name, image in made.items() if image is not None}


def _forest(results: Results) -> Image.Image | None:
    """Every arm's difference from DMD, with its interval, a column a measure."""
    found = {
        arm: {name: difference(results, arm, REWARD_ROWS[name]) for name in _FOREST}
        for arm in ARMS.values()
        if arm.study == "rewards" and results_of(results, arm)
    }
    found = {arm: cells for arm, cells in found.items() if any(cells.values())}
    if not found:
        return None
    starts = [start for start in STARTS if any(arm.start == start for arm in found)]
    height = 70 + _ROW * (len(found) + len(starts)) + 46
    canvas = Canvas(_NAMES + len(_FOREST) * (_PANEL + _GAP) + 10, height)
    canvas.text((10, 18), "Difference from DMD of the same start, with 95 % intervals", size=15)
    rows: list[str | Arm] = []
    for start in starts:
        rows += [start, *(arm for arm in found if arm.start == start)]
    for index, row in enumerate(rows):
        y = 80 + _ROW * index
        if isinstance(row, str):
            canvas.text((10, y), f"from {row}", size=12, colour="#000000")
            canvas.line([(10, y + 9), (canvas.width - 10, y + 9)], GREY)
        else:
            seeds = len(results_of(results, row))
            canvas.text((22, y), f"{row.name} ({seeds})", size=11)
    for column, name in enumerate(_FOREST):
        cells = {arm: cell for arm, each in found.items() if (cell := each[name]) is not None}
        reach = max((abs(v) for c in cells.values() for v in (c.low, c.high)), default=0) or 1.0
        left = _NAMES + column * (_PANEL + _GAP)
        panel = Panel(canvas, (left, 60), (_PANEL, height - 106), (-reach, reach), (0, 1))
        _forest_panel(panel, name, [(rows.index(arm), arm, cell) for arm, cell in cells.items()])
    legend = "blue: more   red: less   grey: no difference shown   "
    legend += "ring: the arm is trained on this measure   (n): seeds"
    canvas.text((10, height - 12), legend, size=11)
    return canvas.finished()


def _forest_panel(panel: Panel, name: str, cells: Sequence[tuple[int, Arm, Estimate]]) -> None:
    canvas, middle = panel.canvas, panel.at(0, 0)[0]
    bottom = panel.corner[1] + panel.size[1]
    canvas.text((middle, 46), name, size=13, anchor="mm")
    canvas.line([(middle, panel.corner[1]), (middle, bottom)], "#888888")
    for value in (*panel.x,):
        x = panel.at(value, 0)[0]
        anchor = "lm" if value < 0 else "rm"
        canvas.text((x, bottom + 10), f"{value:+.2g}", size=10, anchor=anchor)
    canvas.text((middle, bottom + 10), "0", size=10, anchor="mm")
    for row, arm, cell in cells:
        y = 80 + _ROW * row
        colour = NULL if cell.is_null else GAIN if cell.mean > 0 else LOSS
        canvas.line([(panel.at(cell.low, 0)[0], y), (panel.at(cell.high, 0)[0], y)], colour, 2)
        canvas.dot((panel.at(cell.mean, 0)[0], y), colour, hollow=trains_on(arm, name))


def _speeds(results: Results) -> Image.Image | None:
    """The speed of every video as a dot, a row an arm: of all its seeds, beside what is matched."""
    names = (TRUE, TEACHER, UNGUIDED)
    rows = [(name, [r]) for name in names if (r := reference(results, "rewards", name))]
    for start in STARTS:
        of = ("rewards", "boundary")
        arms = [arm for arm in ARMS.values() if arm.start == start and arm.study in of]
        found = [(f"    {arm.name}", each) for arm in arms if (each := results_of(results, arm))]
        before = reference(results, "rewards", start)
        rows += [(f"from {start}", [before] if before else []), *found] if found else []
    every = [
        (name, [v for r in each for v in speeds(r["free"]) if v is not None]) for name, each in rows
    ]
    values = [value for _, each in every for value in each]
    if not values:
        return None
    canvas = Canvas(820, 90 + _ROW * len(rows))
    title = "Speed of every video whose caption leaves it open (line: the mean; backwards is at 0)"
    canvas.text((10, 18), title, size=15)
    size = (520, _ROW * len(rows))
    panel = Panel(canvas, (280, 40), size, (0, max(values) * 1.05), (0, 1))
    right = panel.x[1]
    for tick in np.arange(0, right, 0.25).tolist():
        x, bottom = panel.at(tick, 0)
        canvas.line([(x, panel.corner[1]), (x, bottom)], GREY)
        canvas.text((x, bottom + 10), f"{tick:g}", size=10, anchor="mm")
    canvas.text((540, canvas.height - 12), "shape sizes a latent frame", size=10, anchor="mm")
    for index, (name, shown) in enumerate(every):
        y = 40 + _ROW * (index + 0.5)
        canvas.text((10, y), name, size=12)
        for number, value in enumerate(shown):
            jitter = (number * 7 % 11 - 5) * 1.1  # so that equal ones are seen to be many
            canvas.dot((panel.at(max(value, 0), 0)[0], y + jitter), GAIN, radius=1)
        if shown:
            middle = panel.at(float(np.mean(shown)), 0)[0]
            canvas.line([(middle, y - 9), (middle, y + 9)], LOSS, 2)
    return canvas.finished()


def _against_time(results: Results, study: Study) -> Image.Image | None:
    """The sinks' measures against time, and identity against an occlusion's length."""
    arms = [a for a in ARMS.values() if a.study == study and results_of(results, a)]
    if not arms:
        return None
    lines: dict[str, tuple[list[Result], str]] = {
        arm.name: (results_of(results, arm), COLOURS[index % len(COLOURS)])
        for index, arm in enumerate(arms)
    }
    if true := reference(results, BESIDE.get(study, study), TRUE):
        lines[TRUE] = ([true], "#bbbbbb")
    canvas = Canvas(1080, 560)
    titles = {name: f"drift of {name}" for name in DRIFTS}
    for index, name in enumerate(_TIMED):
        curves = {
            line: mean_of_known(np.concatenate([windows_of(r, SERIES[name]) for r in found]), 0)
            for line, (found, _) in lines.items()
        }
        panel = _panel(canvas, index, list(curves.values()), _window_frames(lines))
        end = panel.x[1]
        panel.frame(titles.get(name, name), [(0, "0"), (end, f"{end:.0f}")], "latent frames")
        for line, values in curves.items():
            points = zip(np.linspace(0, end, len(values)).tolist(), values.tolist(), strict=True)
            panel.curve(list(points), lines[line][1])
    panel = Panel(canvas, (60 + 3 * 265, 320), (190, 170), (-0.4, len(BINS) - 0.6), (0, 1))
    spans = [f"{low}-{up - 1}" if up < 1000 else f"{low}+" for low, up in BINS]
    panel.frame("same after an occlusion", list(enumerate(spans)), "latent frames hidden")
    for found, colour in lines.values():
        shares = [same / of if of else np.nan for same, of in identity(found)]
        panel.curve(list(enumerate(shares)), colour, dots=True)
    for index, (line, (_, colour)) in enumerate(lines.items()):
        x, y = 30 + 262 * (index % 4), 12 + 18 * (index // 4)
        canvas.line([(x, y), (x + 18, y)], colour, 3)
        canvas.text((x + 24, y), line, size=12)
    return canvas.finished()


def _window_frames(lines: Mapping[str, tuple[Sequence[Result], str]]) -> float:
    """The latent frame at which the last window begins."""
    looks = next(iter(lines.values()))[0][0]["lasting"][0]["looks"]
    return looks[-1]["start_image"] / IMAGES_PER_FRAME or 1.0


def _panel(canvas: Canvas, index: int, values: Sequence[np.ndarray], end: float) -> Panel:
    every = np.concatenate(values)
    known = every[np.isfinite(every)]
    high = float(known.max()) if len(known) else 1.0
    low = min(0.0, float(known.min())) if len(known) else 0.0
    corner = 60 + 265 * (index % 4), 90 + 230 * (index // 4)
    return Panel(canvas, corner, (190, 170), (0, end), (low, high * 1.05 or 1.0))


@dataclass(frozen=True)
class _Map:
    """Starts down, settings across: a block of cells and curves a measure of motion."""

    canvas: Canvas
    results: Results
    names: Mapping[Arm, str]
    """Of the arms' settings."""
    columns: Sequence[str]
    starts: Sequence[str]

    def cells(self, measure: Measure, top: float) -> None:
        """What each arm's last update has more than its start."""
        canvas, columns, starts = self.canvas, self.columns, self.starts
        changes = {a: level(results_of(self.results, a), gained(measure)) for a in self.names}
        reach = max(abs(c.mean) for c in changes.values()) or 1.0
        for index, name in enumerate(columns):
            for line, part in enumerate(_in_lines(name)):
                at = 235 + 130 * index, top + 48 + 14 * line
                canvas.text(at, part, size=11, anchor="mm")
        for row, start in enumerate(starts):
            for line, part in enumerate(_in_lines(start)):
                canvas.text((10, top + 90 + 60 * row + 15 * line), part, size=12)
        for arm, change in changes.items():
            x = 172 + 130 * columns.index(self.names[arm])
            y = top + 78 + 60 * starts.index(arm.start)
            canvas.box((x, y), (126, 56), _blend(change.mean / reach, pale=change.is_null))
            canvas.text((x + 63, y + 20), f"{change.mean:+.3f}", size=15, anchor="mm")
            span = f"[{change.low:+.2f}, {change.high:+.2f}]"
            canvas.text((x + 63, y + 40), span, size=10, anchor="mm")

    def ways(self, measure: Measure, top: float) -> None:
        """The measure against updates, a panel a start."""
        curves = {arm: curve(results_of(self.results, arm), measure) for arm in self.names}
        every = [value for points in curves.values() for _, value in points]
        last = max(update for points in curves.values() for update, _ in points)
        span = (min(0.0, *every), max(every) * 1.05 or 1.0)
        each = (self.canvas.width - 40) / len(self.starts)
        for index, start in enumerate(self.starts):
            corner = 44 + each * index, top + 10
            panel = Panel(self.canvas, corner, (each - 40, 140), (0, last), span)
            panel.frame(f"from {start}", [(0, "0"), (last, str(last))], "updates")
            for arm, points in curves.items():
                if arm.start == start:
                    colour = COLOURS[self.columns.index(self.names[arm])]
                    panel.curve([(float(x), y) for x, y in points], colour, dots=True)


def _map(results: Results) -> Image.Image | None:
    """Motion that plain distribution matching kept or lost, by start and setting, and the way: its
    mean, and below it its spread."""
    names = boundary_arms(results)
    if not names:
        return None
    columns = sorted(set(names.values()))
    starts = [start for start in STARTS if any(arm.start == start for arm in names)]
    block = 90 + 60 * len(starts) + 265
    canvas = Canvas(max(700, 190 + 130 * len(columns)), 2 * block + 30)
    drawn = _Map(canvas, results, names, columns, starts)
    for index, (what, measure) in enumerate((("Speed", speeds), ("Spread of speeds", spread))):
        top = index * block
        title = f"{what} after distribution matching, less before (pale: the interval holds 0)"
        canvas.text((10, top + 18), title, size=14)
        drawn.cells(measure, top)
        drawn.ways(measure, top + 155 + 60 * len(starts))
    for index, name in enumerate(columns):
        x, y = 20 + index * (canvas.width - 40) / len(columns), 2 * block + 10
        canvas.line([(x, y), (x + 18, y)], COLOURS[index], 3)
        canvas.text((x + 22, y), name, size=10)
    return canvas.finished()


def _in_lines(name: str) -> list[str]:
    return name.replace(", ", ",\n").split("\n")


def _blend(share: float, *, pale: bool) -> str:
    """White for 0, towards blue for 1 and red for -1."""
    full = np.array((31, 119, 180) if share > 0 else (214, 39, 40))
    amount = min(1.0, abs(share)) * (0.25 if pale else 0.8)
    red, green, blue = (255 + amount * (full - 255)).astype(int).tolist()
    return f"#{red:02x}{green:02x}{blue:02x}"


def _strips(results: Results) -> Image.Image | None:
    """One prompt's images, a row an arm, of the first seed that is there."""
    shown = (arm for arm in ARMS.values() if arm.study != "boundary")
    found = {arm: results_of(results, arm) for arm in shown}
    rows = {
        arm: Image.open(io.BytesIO(base64.b64decode(each[0]["strip"])))
        for arm, each in found.items()
        if each
    }
    if not rows:
        return None
    canvas = Canvas(260 + max(row.width for row in rows.values()), 68 * len(rows) + 4)
    for index, (arm, row) in enumerate(rows.items()):
        canvas.text((8, 68 * index + 28), arm.name, size=12)
        canvas.text((8, 68 * index + 44), f"{arm.study}, from {arm.start}", size=10)
        canvas.paste(row, (252, 68 * index + 2))
    return canvas.finished()
