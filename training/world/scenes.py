"""The miniature world: coloured shapes gliding over a torus, and the captions that name them.

Videos are made on the fly from a seed, so a data set is a function and no file. The world wraps
around at its edges: motion is stationary, and a stream of it can go on for ever. Every word of a
caption is a fact that `training.world.tracker` can check.

There are three worlds (`WORLDS`). In the `plain` one a caption says all that there is to say. In
the `rich` one a video has to keep what its caption does not name: the backdrop, a thing's shade and
size, and its colour and shape where the caption leaves them open, also while it is behind a wall,
from where it comes out after a rest; `single` is of one such thing. Captions of the plain world are
captions of the rich one.
Coordinates are pixels, x to the right and y down; time is counted in images.
"""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Speed = Literal["slowly", "quickly"]

SIZE = 64  # pixels, both sides of the picture
SHAPE_SIZE = 16  # pixels: a circle's diameter, a square's side, a triangle's height
IMAGES_PER_FRAME = 4  # images of one latent frame: the VAE's factor in time
BACKGROUND = (0.08, 0.08, 0.10)
PALETTE = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.25),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.80, 0.20, 0.85),
    "cyan": (0.15, 0.85, 0.90),
}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
VERBS = ("moves", "is moving", "drifts", "glides")
BOUNCING_VERBS = ("bounces", "is bouncing")
OPEN_SHAPE = "shape"  # what a caption calls a thing whose shape it leaves open
PAST_A_WALL = " past a wall"
SPEED_RANGES: dict[Speed | None, tuple[float, float]] = {
    "slowly": (0.2, 0.4),
    "quickly": (0.8, 1.2),
    None: (0.2, 1.2),
}  # shape sizes a latent frame; None is a speed the caption leaves open
FREE_SPEED_SHARE = 0.4
_TRIES = 1000  # places drawn until things fit: two do within some ten
LANE = 20  # pixels between the lanes of two shapes that move along the same axis
WALL_COLOUR = (0.62, 0.60, 0.56)
LIT = (
    0.4  # brightness (the largest of red, green, blue) above every backdrop, below things and wall
)

_TRIANGLE_HALF_BASE = 9 / 16  # of the height
_MARGIN = 4  # pixels around a shape that hold its soft edge
_CLAUSE = re.compile(
    rf"an? (?:({'|'.join(COLOURS)}) )?({'|'.join((*SHAPES, OPEN_SHAPE))}) "
    rf"(?:{'|'.join(VERBS)}|({'|'.join(BOUNCING_VERBS)})) "
    rf"({'|'.join(DIRECTIONS)})(?: ({'|'.join(s for s in SPEED_RANGES if s)}))?"
)


@dataclass(frozen=True, kw_only=True)
class World:
    """What scenes may hold. Defaults are the plain world's, where captions say everything."""

    two_things_share: float = 0.3
    """How often there are two things."""
    bimodal_speeds: bool = False
    """Whether a speed that the caption leaves open is slow or quick, and nothing between."""
    backdrops: bool = False
    """Whether backdrops differ in hue, brightness, gradient and stripes."""
    plain_share: float = 0.0
    """How often the backdrop is the plain world's all the same."""
    shades: tuple[float, float] = (1.0, 1.0)
    """Range of a thing's brightness, of its palette colour's."""
    sizes: tuple[float, float] = (SHAPE_SIZE, SHAPE_SIZE)
    """Range of a thing's size, in pixels."""
    open_share: float = 0.0
    """How often a caption leaves a thing's colour open, and how often its shape."""
    bounce_share: float = 0.0
    """How often things bounce off the picture's edges, where there is no wall."""
    wall_share: float = 0.0
    """How often there is a wall, which is named."""
    wall_widths: tuple[float, float] = (20.0, 36.0)
    """Range of its width, in pixels."""
    wall_rests: tuple[float, float] = (0.0, 24.0)
    """Range of how long a thing rests behind it, in images."""


PLAIN = "plain"
_RICH = World(
    two_things_share=0.4,
    bimodal_speeds=True,
    backdrops=True,
    plain_share=0.15,
    shades=(0.7, 1.0),
    sizes=(12.0, 20.0),
    open_share=0.15,
    bounce_share=0.15,
    wall_share=0.3,
)
WORLDS: Mapping[str, World] = MappingProxyType(
    {
        PLAIN: World(),
        "rich": _RICH,
        "single": replace(
            _RICH, two_things_share=0.0, plain_share=0.0, bounce_share=0.0, wall_share=0.4
        ),
    }
)
"""`single` is what a long video of the rich one is judged by: one thing, with all that it keeps."""


@dataclass(frozen=True, kw_only=True)
class Backdrop:
    """What is behind everything: a colour whose brightness varies over the picture."""

    colour: tuple[float, float, float] = BACKGROUND
    """Red, green and blue in the middle, in [0, 1]."""
    slope: float = 0.0
    """Change of brightness from one edge to the other, relative to the middle's."""
    axis: int = 0
    """The axis along which it changes: 0 for x, 1 for y."""
    stripes: float = 0.0
    """Relative amplitude of stripes."""
    period: float = 12.0
    """Their period, in pixels."""
    angle: float = 0.0
    """The direction they follow one another in, in radians from the x axis."""

    def draw(self) -> Tensor:
        """[3, SIZE, SIZE] in [0, 1]."""
        at = torch.arange(SIZE) + 0.5
        x, y = at[None, :], at[:, None]
        along = (x * math.cos(self.angle) + y * math.sin(self.angle)) * (2 * math.pi / self.period)
        brightness = 1 + self.slope * ((x, y)[self.axis] / SIZE - 0.5) + self.stripes * along.sin()
        return torch.tensor(self.colour)[:, None, None] * brightness


@dataclass(frozen=True, kw_only=True)
class Wall:
    """A band across the picture, before everything."""

    axis: int = 0
    """The axis along which things pass behind it: 0 for x, 1 for y."""
    start: float
    """Where it begins along that axis, in pixels."""
    width: float
    """How far it reaches, in pixels."""
    rest: float = 0.0
    """How long a thing that passes stands still behind its middle, in images."""

    def draw(self) -> Tensor:
        """How much of each pixel it covers, [SIZE, SIZE]."""
        at = torch.arange(SIZE, dtype=torch.float32)
        inside = (at + 1 - self.start).clamp(0, 1) - (at + 1 - self.start - self.width).clamp(0, 1)
        return (inside[None, :] if self.axis == 0 else inside[:, None]).expand(SIZE, SIZE)


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """The attributes of one shape, as a caption names them; None for what it leaves open."""

    colour: str | None
    """A key of `PALETTE`."""
    shape: str | None
    """One of `SHAPES`."""
    direction: str
    """A key of `DIRECTIONS`; of a thing that bounces, the one it begins with."""
    speed_name: Speed | None = None
    """The adverb."""
    bounces: bool = False
    """Whether it turns around at the picture's edges, in place of wrapping around."""

    @property
    def named(self) -> Attributes:
        """What a caption says of it."""
        return self

    @property
    def axis(self) -> int:
        """The axis it moves along: 0 for x, 1 for y."""
        return 0 if DIRECTIONS[self.direction][0] else 1


@dataclass(frozen=True, kw_only=True)
class Thing(Attributes):
    """One moving shape: its attributes, with all that it takes to draw it."""

    colour: str
    shape: str
    speed: float
    """Shape sizes (`SHAPE_SIZE`) a latent frame."""
    position: tuple[float, float] = field(default=(SIZE / 2, SIZE / 2))
    """Centre of mass (x, y) at image 0, in pixels."""
    shade: float = 1.0
    """Brightness of its palette colour."""
    size: float = SHAPE_SIZE
    """A circle's diameter, a square's side, a triangle's height, in pixels."""
    left_open: frozenset[str] = frozenset()
    """Which of `colour` and `shape` its caption leaves open."""
    turns: tuple[float, str] | None = None
    """The image from which on it has another palette colour, and which."""

    @property
    def named(self) -> Attributes:
        return Attributes(
            colour=None if "colour" in self.left_open else self.colour,
            shape=None if "shape" in self.left_open else self.shape,
            direction=self.direction,
            speed_name=self.speed_name,
            bounces=self.bounces,
        )

    @property
    def velocity(self) -> tuple[float, float]:
        """Pixels an image, along x and y."""
        step = self.speed * SHAPE_SIZE / IMAGES_PER_FRAME
        x, y = DIRECTIONS[self.direction]
        return x * step, y * step

    def centres(self, time: Tensor, wall: Wall | None = None) -> Tensor:
        """Where it is at times [T] in images: [T, 2] float64, (x, y) on the torus."""
        start, velocity = (
            torch.tensor(p, dtype=torch.float64) for p in (self.position, self.velocity)
        )
        moved = time.double()
        if wall is not None and wall.axis == self.axis:
            moved = _moving_time(moved, self, wall)
        centre = start + velocity * moved[:, None]
        if self.bounces:
            low, span = self.size / 2, SIZE - self.size
            along = (centre[:, self.axis] - low) % (2 * span)
            centre[:, self.axis] = low + torch.minimum(along, 2 * span - along)
        return centre % SIZE

    def colours(self, time: Tensor) -> Tensor:
        """Its colour at times [T]: [T, 3] in [0, 1]."""
        colour = torch.tensor(PALETTE[self.colour]).expand(len(time), 3)
        if self.turns is not None:
            after, later = self.turns
            colour = torch.where((time >= after)[:, None], torch.tensor(PALETTE[later]), colour)
        return colour * self.shade


def _moving_time(time: Tensor, thing: Thing, wall: Wall) -> Tensor:
    """The part of the time in which a thing moves, that rests behind a wall in every round."""
    speed = abs(thing.velocity[wall.axis])
    way = (wall.start + wall.width / 2 - thing.position[wall.axis]) * math.copysign(
        1, thing.velocity[wall.axis]
    )
    first, around = (way % SIZE) / speed, SIZE / speed
    since = time - first
    rounds = torch.div(since, around + wall.rest, rounding_mode="floor")
    within = since - rounds * (around + wall.rest)
    return torch.where(since < 0, time, first + rounds * around + (within - wall.rest).clamp_min(0))


@dataclass(frozen=True)
class Scene:
    """What a video shows."""

    things: tuple[Thing, ...]
    """Later ones are before earlier ones."""
    backdrop: Backdrop = Backdrop()
    wall: Wall | None = None
    """None for none."""


def caption_of(attributes: Attributes, verb: str | None = None) -> str:
    """The clause for one shape: `a red circle moves left slowly`."""
    named = attributes.named
    words = ["a", named.colour, named.shape or OPEN_SHAPE, verb or _verbs(named)[0]]
    return " ".join(word for word in (*words, named.direction, named.speed_name) if word)


def _verbs(attributes: Attributes) -> tuple[str, ...]:
    return BOUNCING_VERBS if attributes.bounces else VERBS


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The caption of a scene; `rng` picks the verbs, without it they are the first."""
    choices = [_verbs(thing) for thing in scene.things]
    verbs = [verbs[rng.integers(len(verbs))] if rng else None for verbs in choices]
    return " and ".join(map(caption_of, scene.things, verbs)) + PAST_A_WALL * bool(scene.wall)


def colour_caption(scene: Scene) -> str:
    """A prompt that leaves all but colours to a control: `a red shape moves`."""
    return " and ".join(f"a {thing.colour} shape moves" for thing in scene.things)


def names_wall(text: str) -> bool:
    """Whether a caption says that there is a wall."""
    return _words(text).endswith(PAST_A_WALL)


def _words(text: str) -> str:
    return " ".join(text.lower().strip().rstrip(".").split())


def parse_caption(text: str) -> list[Attributes]:
    """The attributes of each shape of a caption; ValueError lists the known words."""
    attributes = []
    for clause in _words(text).removesuffix(PAST_A_WALL).split(" and "):
        match = _CLAUSE.fullmatch(clause)
        if match is None:
            raise ValueError(
                f"{clause!r} is not of the form 'a COLOUR SHAPE VERB DIRECTION [SPEED]'; "
                f"known words: {', '.join(COLOURS)}; {', '.join((*SHAPES, OPEN_SHAPE))}; "
                f"{', '.join((*VERBS, *BOUNCING_VERBS))}; {', '.join(DIRECTIONS)}; slowly, quickly;"
                f" at the end{PAST_A_WALL}"
            )
        colour, shape, bouncing, direction, speed = match.groups()
        name = next(known for known in SPEED_RANGES if known == speed)
        attributes.append(
            Attributes(
                colour=colour,
                shape=None if shape == OPEN_SHAPE else shape,
                direction=direction,
                speed_name=name,
                bounces=bool(bouncing),
            )
        )
    return attributes


def all_captions() -> list[str]:
    """Every caption of a single shape, in one phrasing: 6 x 3 x 4 x 3 of them."""
    return [
        caption_of(Attributes(colour=colour, shape=shape, direction=direction, speed_name=speed))
        for colour, shape, direction, speed in product(COLOURS, SHAPES, DIRECTIONS, SPEED_RANGES)
    ]


def place(attributes: Attributes, rng: np.random.Generator, world: World = WORLDS[PLAIN]) -> Thing:
    """A thing that fits a caption: what is left open drawn from the world's ranges, its place
    anywhere."""
    x, y = rng.uniform(0, SIZE, 2)
    speeds = SPEED_RANGES[attributes.speed_name]
    if world.bimodal_speeds and attributes.speed_name is None:
        speeds = SPEED_RANGES["slowly" if rng.random() < 0.5 else "quickly"]
    thing = Thing(
        colour=attributes.colour or COLOURS[rng.integers(len(COLOURS))],
        shape=attributes.shape or SHAPES[rng.integers(len(SHAPES))],
        direction=attributes.direction,
        speed_name=attributes.speed_name,
        bounces=attributes.bounces,
        speed=float(rng.uniform(*speeds)),
        position=(float(x), float(y)),
        left_open=frozenset(
            name for name in ("colour", "shape") if getattr(attributes, name) is None
        ),
        shade=_draw(world.shades, rng),
        size=_draw(world.sizes, rng),
    )
    return _between_edges(thing) if thing.bounces else thing


def _between_edges(thing: Thing) -> Thing:
    """It begins where it can be, or else it would begin on its way back."""
    position = list(thing.position)
    position[thing.axis] = thing.size / 2 + position[thing.axis] * (1 - thing.size / SIZE)
    return replace(thing, position=(position[0], position[1]))


def _draw(limits: tuple[float, float], rng: np.random.Generator) -> float:
    low, high = limits
    return float(rng.uniform(low, high)) if low < high else low


def sample_scene(rng: np.random.Generator, world: World = WORLDS[PLAIN]) -> Scene:
    """One or two things of different colours, every other attribute drawn independently."""
    count = 2 if rng.random() < world.two_things_share else 1
    colours = rng.permutation(len(COLOURS))[:count]
    wanted = [_sample_wanted(COLOURS[colour], rng) for colour in colours]
    walled = bool(world.wall_share) and rng.random() < world.wall_share
    if world.bounce_share and not walled:
        wanted = [replace(each, bounces=rng.random() < world.bounce_share) for each in wanted]
    scene = place_all(wanted, rng, world, walled=walled)
    return replace(scene, things=tuple(_left_open(thing, world, rng) for thing in scene.things))


def _left_open(thing: Thing, world: World, rng: np.random.Generator) -> Thing:
    if not world.open_share:
        return thing
    names = [name for name in ("colour", "shape") if rng.random() < world.open_share]
    return replace(thing, left_open=frozenset(names))


def place_all(
    attributes: Sequence[Attributes],
    rng: np.random.Generator,
    world: World = WORLDS[PLAIN],
    *,
    walled: bool = False,
) -> Scene:
    """A scene that fits a caption; things on one axis get lanes of their own.

    Without lanes, one of two things might hide behind the other for a whole video; nor does a thing
    that moves along a wall stay behind it. ValueError where they do not fit, as four on one axis.
    """
    for _ in range(_TRIES):
        things = tuple(place(each, rng, world) for each in attributes)
        wall = _sample_wall(things[0].axis, rng, world) if walled else None
        in_sight = wall is None or not any(_stays_behind(wall, thing) for thing in things)
        if in_sight and not any(_share_a_lane(a, b) for a, b in combinations(things, 2)):
            drop = sample_backdrop(rng, world) if world.backdrops else Backdrop()
            return Scene(things, drop, wall)
    raise ValueError(f"{len(things)} things find no places in one picture")


def scene_of_caption(text: str, rng: np.random.Generator, world: World = WORLDS[PLAIN]) -> Scene:
    """A scene that a caption is true of."""
    return place_all(parse_caption(text), rng, world, walled=names_wall(text))


def sample_backdrop(rng: np.random.Generator, world: World) -> Backdrop:
    """A backdrop darker than any thing, whose hue no caption names."""
    if rng.random() < world.plain_share:
        return Backdrop()
    hue, saturation, value = rng.uniform((0, 0.3, 0.08), (1, 0.8, 0.24)).tolist()
    striped = rng.random() < 0.4
    return Backdrop(
        colour=colorsys.hsv_to_rgb(hue, saturation, value),
        slope=float(rng.uniform(-0.5, 0.5)),
        axis=int(rng.integers(2)),
        stripes=float(rng.uniform(0.1, 0.2)) if striped else 0.0,
        period=float(rng.uniform(8, 16)),
        angle=float(rng.integers(4)) * math.pi / 4,
    )


def _sample_wall(axis: int, rng: np.random.Generator, world: World) -> Wall:
    width = _draw(world.wall_widths, rng)
    start = float(rng.uniform(0, SIZE - width))
    return Wall(axis=axis, start=start, width=width, rest=round(_draw(world.wall_rests, rng)))


def _stays_behind(wall: Wall, thing: Thing) -> bool:
    if wall.axis == thing.axis:
        return False
    before = (thing.position[wall.axis] - wall.start - wall.width / 2 + SIZE / 2) % SIZE - SIZE / 2
    return abs(before) < (wall.width + thing.size) / 2


def _share_a_lane(a: Thing, b: Thing) -> bool:
    across = [axis for axis in (0, 1) if not a.velocity[axis] and not b.velocity[axis]]
    apart = [abs((a.position[i] - b.position[i] + SIZE / 2) % SIZE - SIZE / 2) for i in across]
    lane = LANE + max(a.size, b.size) - SHAPE_SIZE
    return any(distance < lane for distance in apart)


def _sample_wanted(colour: str, rng: np.random.Generator) -> Attributes:
    named: Speed = "slowly" if rng.random() < 0.5 else "quickly"
    return Attributes(
        colour=colour,
        shape=SHAPES[rng.integers(len(SHAPES))],
        direction=tuple(DIRECTIONS)[rng.integers(len(DIRECTIONS))],
        speed_name=None if rng.random() < FREE_SPEED_SHARE else named,
    )


def render(scenes: Sequence[Scene], num_images: int, start_image: int = 0) -> Tensor:
    """Images `start_image` to `start_image + num_images` of each scene.

    Returns float32 [B, T, 3, SIZE, SIZE] in [0, 1]. Later things are drawn over earlier ones, and
    the wall over all.
    """
    time = torch.arange(start_image, start_image + num_images, dtype=torch.float64)
    backdrops = torch.stack([scene.backdrop.draw() for scene in scenes])
    images = backdrops[:, None].expand(-1, num_images, -1, -1, -1).contiguous()
    for video, scene in zip(images, scenes, strict=True):
        for thing in scene.things:
            _stamp(video, thing, scene.wall, time)
        if scene.wall is not None:
            colour = torch.tensor(WALL_COLOUR)[:, None, None]
            video.lerp_(colour.expand_as(video), scene.wall.draw().expand_as(video))
    return images


def _stamp(video: Tensor, thing: Thing, wall: Wall | None, time: Tensor) -> None:
    """Draw a thing into [T, 3, SIZE, SIZE], touching only the square around it."""
    centre = thing.centres(time, wall)  # [T, 2]
    side = math.ceil(thing.size * 9 / 8) + 2 * _MARGIN
    corner = centre.floor() - side // 2
    pixels = corner[..., None] + torch.arange(side)  # [T, 2, side]
    dx, dy = (pixels + 0.5 - centre[..., None]).float().unbind(dim=1)
    alpha = coverage(thing.shape, dx[:, None, :], dy[:, :, None], thing.size)[:, None]
    columns, rows = (pixels.long() % SIZE).unbind(dim=1)
    at = (
        torch.arange(len(time))[:, None, None, None],
        torch.arange(3)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    )
    video[at] = torch.lerp(video[at], thing.colours(time)[:, :, None, None], alpha)


def coverage(
    shape: str, dx: Tensor, dy: Tensor, size: float | Tensor = float(SHAPE_SIZE)
) -> Tensor:
    """How much of a pixel at offset (dx, dy) from the centre of mass the shape covers, in [0, 1].

    A pixel within half a pixel of the outline is covered in part, by its signed distance.
    """
    return (0.5 - distance_outside(shape, dx, dy, size)).clamp(0, 1)


def distance_outside(
    shape: str, dx: Tensor, dy: Tensor, size: float | Tensor = float(SHAPE_SIZE)
) -> Tensor:
    """How far (dx, dy) from the centre of mass lies outside the shape's edge, in pixels.

    Negative inside. ValueError for a shape that the world does not have.
    """
    if shape == "circle":
        return (dx.square() + dy.square()).sqrt() - size / 2
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - size / 2
    if shape == "triangle":
        # Apex up: the centre of mass lies a third of the height above the base.
        slope = math.hypot(1.0, _TRIANGLE_HALF_BASE)
        side = (dx.abs() - _TRIANGLE_HALF_BASE * (dy + size * 2 / 3)) / slope
        return torch.maximum(side, dy - size / 3)
    raise ValueError(f"shape {shape!r} is unknown; the world has {', '.join(SHAPES)}")


def unit_area(shape: str) -> float:
    """The area of a shape of size 1."""
    return {"circle": math.pi / 4, "square": 1.0, "triangle": _TRIANGLE_HALF_BASE}[shape]
