"""The miniature world: coloured shapes gliding over a dark torus, and the captions that name them.

Videos are made on the fly from a seed, so a data set is a function and no file. The world wraps
around at its edges: motion is stationary, and a stream of it can go on for ever. Every word of a
caption (colour, shape, direction, speed) is a fact that `training.world.tracker` can check.
Coordinates are pixels, x to the right and y down; time is counted in images.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Literal

import numpy as np
import torch
from einops import rearrange
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
SPEED_RANGES: dict[Speed | None, tuple[float, float]] = {
    "slowly": (0.2, 0.4),
    "quickly": (0.8, 1.2),
    None: (0.2, 1.2),
}  # shape sizes a latent frame; None is a speed the caption leaves open
TWO_SHAPES_SHARE = 0.3
FREE_SPEED_SHARE = 0.4
LANE = 20  # pixels between the lanes of two shapes that move along the same axis

_TRIANGLE_HALF_BASE = 9.0
_STAMP = SHAPE_SIZE + 8  # pixels: a square that holds any shape with its soft edge
_CLAUSE = re.compile(
    rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) (?:{'|'.join(VERBS)}) "
    rf"({'|'.join(DIRECTIONS)})(?: ({'|'.join(s for s in SPEED_RANGES if s)}))?"
)


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """The attributes of one shape, as a caption names them."""

    colour: str
    """A key of `PALETTE`."""
    shape: str
    """One of `SHAPES`."""
    direction: str
    """A key of `DIRECTIONS`."""
    speed_name: Speed | None = None
    """The adverb, or None where the caption leaves the speed open."""


@dataclass(frozen=True, kw_only=True)
class Thing(Attributes):
    """One moving shape: its attributes, with speed and position to draw it."""

    speed: float
    """Shape sizes a latent frame."""
    position: tuple[float, float] = field(default=(SIZE / 2, SIZE / 2))
    """Centre of mass (x, y) at image 0, in pixels."""

    @property
    def velocity(self) -> tuple[float, float]:
        """Pixels an image, along x and y."""
        step = self.speed * SHAPE_SIZE / IMAGES_PER_FRAME
        x, y = DIRECTIONS[self.direction]
        return x * step, y * step


Scene = tuple[Thing, ...]


def caption_of(attributes: Attributes, verb: str = VERBS[0]) -> str:
    """The clause for one shape: `a red circle moves left slowly`."""
    adverb = f" {attributes.speed_name}" if attributes.speed_name else ""
    return f"a {attributes.colour} {attributes.shape} {verb} {attributes.direction}{adverb}"


def caption(scene: Sequence[Attributes], rng: np.random.Generator | None = None) -> str:
    """The caption of a scene; `rng` picks the verbs, without it they are all `moves`."""
    verbs = [VERBS[rng.integers(len(VERBS))] if rng else VERBS[0] for _ in scene]
    return " and ".join(map(caption_of, scene, verbs))


def colour_caption(scene: Sequence[Attributes]) -> str:
    """A prompt that leaves all but colours to a control: `a red shape moves`."""
    return " and ".join(f"a {thing.colour} shape moves" for thing in scene)


def parse_caption(text: str) -> list[Attributes]:
    """The attributes of each shape of a caption; ValueError lists the known words."""
    attributes = []
    for clause in text.lower().strip().rstrip(".").split(" and "):
        match = _CLAUSE.fullmatch(" ".join(clause.split()))
        if match is None:
            raise ValueError(
                f"{clause!r} is not of the form 'a COLOUR SHAPE VERB DIRECTION [SPEED]'; "
                f"known words: {', '.join(COLOURS)}; {', '.join(SHAPES)}; {', '.join(VERBS)}; "
                f"{', '.join(DIRECTIONS)}; slowly, quickly"
            )
        colour, shape, direction, speed = match.groups()
        name = next(known for known in SPEED_RANGES if known == speed)
        attributes.append(
            Attributes(colour=colour, shape=shape, direction=direction, speed_name=name)
        )
    return attributes


def all_captions() -> list[str]:
    """Every caption of a single shape, in one phrasing: 6 x 3 x 4 x 3 of them."""
    return [
        caption_of(Attributes(colour=colour, shape=shape, direction=direction, speed_name=speed))
        for colour, shape, direction, speed in product(COLOURS, SHAPES, DIRECTIONS, SPEED_RANGES)
    ]


def place(attributes: Attributes, rng: np.random.Generator) -> Thing:
    """A thing that fits a caption: its speed drawn from the named range, its place anywhere."""
    x, y = rng.uniform(0, SIZE, 2)
    return Thing(
        colour=attributes.colour,
        shape=attributes.shape,
        direction=attributes.direction,
        speed_name=attributes.speed_name,
        speed=float(rng.uniform(*SPEED_RANGES[attributes.speed_name])),
        position=(float(x), float(y)),
    )


def sample_scene(rng: np.random.Generator, two_shapes_share: float = TWO_SHAPES_SHARE) -> Scene:
    """One or two things of different colours, every other attribute drawn independently."""
    count = 2 if rng.random() < two_shapes_share else 1
    colours = rng.permutation(len(COLOURS))[:count]
    return place_all([_sample_wanted(COLOURS[colour], rng) for colour in colours], rng)


def place_all(attributes: Sequence[Attributes], rng: np.random.Generator) -> Scene:
    """A scene that fits a caption; things on one axis get lanes of their own.

    Without lanes, one of two things might hide behind the other for a whole video.
    """
    while True:
        scene = tuple(place(each, rng) for each in attributes)
        if not any(_share_a_lane(a, b) for a, b in combinations(scene, 2)):
            return scene


def _share_a_lane(a: Thing, b: Thing) -> bool:
    across = [axis for axis in (0, 1) if not a.velocity[axis] and not b.velocity[axis]]
    apart = [abs((a.position[i] - b.position[i] + SIZE / 2) % SIZE - SIZE / 2) for i in across]
    return any(distance < LANE for distance in apart)


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

    Returns float32 [B, T, 3, SIZE, SIZE] in [0, 1]. Later things are drawn over earlier ones.
    """
    images = torch.empty(len(scenes), num_images, 3, SIZE, SIZE)
    images[:] = torch.tensor(BACKGROUND)[:, None, None]
    time = torch.arange(start_image, start_image + num_images, dtype=torch.float64)
    for layer in range(max(map(len, scenes))):
        for shape in SHAPES:
            videos = [
                index
                for index, scene in enumerate(scenes)
                if len(scene) > layer and scene[layer].shape == shape
            ]
            if videos:
                _stamp(images, videos, [scenes[index][layer] for index in videos], time)
    return images


def _stamp(images: Tensor, videos: list[int], things: list[Thing], time: Tensor) -> None:
    """Draw things of one shape into their videos, touching only the square around each."""
    start = torch.tensor([thing.position for thing in things], dtype=torch.float64)
    velocity = torch.tensor([thing.velocity for thing in things], dtype=torch.float64)
    centre = (start[:, None] + velocity[:, None] * time[:, None]) % SIZE  # [N, T, 2]
    corner = centre.floor() - _STAMP // 2
    pixels = corner[..., None] + torch.arange(_STAMP)  # [N, T, 2, stamp]
    dx, dy = (pixels + 0.5 - centre[..., None]).float().unbind(dim=2)
    alpha = coverage(things[0].shape, dx[..., None, :], dy[..., None])[:, :, None]

    columns, rows = (pixels.long() % SIZE).unbind(dim=2)
    at = (
        torch.tensor(videos)[:, None, None, None, None],
        torch.arange(len(time))[None, :, None, None, None],
        torch.arange(3)[None, None, :, None, None],
        rows[:, :, None, :, None],
        columns[:, :, None, None, :],
    )
    colours = torch.tensor([PALETTE[thing.colour] for thing in things])
    colour = rearrange(colours, "n c -> n 1 c 1 1")
    images[at] = torch.lerp(images[at], colour, alpha)


def coverage(shape: str, dx: Tensor, dy: Tensor) -> Tensor:
    """How much of a pixel at offset (dx, dy) from the centre of mass the shape covers, in [0, 1].

    A pixel within half a pixel of the outline is covered in part, by its signed distance.
    """
    return (0.5 - distance_outside(shape, dx, dy)).clamp(0, 1)


def distance_outside(shape: str, dx: Tensor, dy: Tensor) -> Tensor:
    """How far (dx, dy) from the centre of mass lies outside the shape's edge, in pixels.

    Negative inside. ValueError for a shape that the world does not have.
    """
    radius = SHAPE_SIZE / 2
    if shape == "circle":
        return (dx.square() + dy.square()).sqrt() - radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - radius
    if shape == "triangle":
        # Apex up: the centre of mass lies a third of the height above the base.
        slant = SHAPE_SIZE / np.hypot(SHAPE_SIZE, _TRIANGLE_HALF_BASE)
        across = _TRIANGLE_HALF_BASE / np.hypot(SHAPE_SIZE, _TRIANGLE_HALF_BASE)
        side = slant * dx.abs() - across * (dy + SHAPE_SIZE * 2 / 3)
        return torch.maximum(side, dy - SHAPE_SIZE / 3)
    raise ValueError(f"shape {shape!r} is unknown; the world has {', '.join(SHAPES)}")
