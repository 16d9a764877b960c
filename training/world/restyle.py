"""Measures what a source's clip keeps of itself, and what the prompt adds, at each strength.

Sources are true clips of the world with one thing; the prompt names another colour and another
shape. Half of the prompts name the source's direction, half another: what they keep of the source's
motion they keep against the prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
import torch
from torch import Tensor

from rf_core.config import CacheConfig
from rf_core.prompts import ChunkClock
from rf_core.source import motion_of, strength_at
from rf_core.stream import split_chunks

from .clips import encode_scenes
from .evaluate import Report, Streams
from .scenes import (
    COLOURS,
    DIRECTIONS,
    SHAPE_SIZE,
    SHAPES,
    SIZE,
    Attributes,
    Scene,
    Speed,
    Thing,
    caption_of,
    place,
    render,
)
from .tracker import Track, detect, drift, tracks_of

_log = logging.getLogger(__name__)

IN_PLACE = SHAPE_SIZE / 4
"""Pixels that a thing may be from the source's, in the median image, to be in its place."""
SAME_SPEED = 0.25
"""How far a speed may be from the source's, of it, to be the same."""
MEASURES = ("colour", "shape", "direction", "speed", "place")
"""What is counted: the first two are the prompt's, the others the source's."""

KINDS = ("agreeing", "contrary")
"""Prompts of the source's direction, and of another."""
SPEEDS: tuple[Speed, ...] = ("slowly", "quickly")
_MEANS = ("distance", "softness")

Strength = tuple[float, float]
"""What a still source gets, and what is added where all moves; see `strength_at`."""


@dataclass(frozen=True, kw_only=True)
class RestyleConfig:
    """What is measured, and on how much."""

    pairs: int = 48
    """Sources, each with two prompts: of its direction, and of another."""
    chunks: int = 7
    """Chunks of each clip."""
    strengths: tuple[Strength, ...] = (
        *((each, 0.0) for each in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.9, 1.0)),
        *((0.5, -0.15), (0.3, 0.15)),
    )
    """One row each."""
    seed: int = 8
    """Seeds sources, prompts and noise."""


@dataclass(frozen=True)
class Pair:
    """A source and what is asked of it."""

    source: Thing
    agreeing: Attributes
    """Of another colour and shape."""
    contrary: Attributes
    """Of another direction as well."""

    def prompt(self, kind: str) -> str:
        """What the prompt says."""
        return caption_of(self.wanted(kind))

    def wanted(self, kind: str) -> Attributes:
        """What the prompt names."""
        return self.agreeing if kind == "agreeing" else self.contrary


def restyle_pairs(config: RestyleConfig) -> list[Pair]:
    """Sources with their prompts, which leave the speed open."""
    rng = np.random.default_rng(config.seed)

    def other(names: Sequence[str], name: str) -> str:
        rest = [each for each in names if each != name]
        return rest[rng.integers(len(rest))]

    pairs = []
    for index in range(config.pairs):
        colour, shape, direction = (
            names[rng.integers(len(names))] for names in (COLOURS, SHAPES, tuple(DIRECTIONS))
        )
        speed = SPEEDS[index % 2]
        seen = Attributes(colour=colour, shape=shape, direction=direction, speed_name=speed)
        look = {"colour": other(COLOURS, colour), "shape": other(SHAPES, shape)}
        pairs.append(
            Pair(
                place(seen, rng),
                Attributes(**look, direction=direction),
                Attributes(**look, direction=other(tuple(DIRECTIONS), direction)),
            )
        )
    return pairs


def restyle_report(streams: Streams, config: RestyleConfig) -> Report:
    """What is measured at each strength, for both kinds of prompts, by the source's speed."""
    pairs, rows = restyle_pairs(config), []
    for strength in config.strengths:
        row: Report = {"strength": strength[0], "motion_strength": strength[1]}
        for kind in KINDS:
            videos = restyled(streams, pairs, kind, strength, config)
            found = [
                measures(video, pair.source, pair.wanted(kind))
                for video, pair in zip(videos, pairs, strict=True)
            ]
            row[kind] = {"all": _means(found)}
            for speed in {pair.source.speed_name for pair in pairs}:
                its = [pair.source.speed_name == speed for pair in pairs]
                row[kind][speed] = _means(list(compress(found, its)))
        _log.info("%s", row)
        rows.append(row)
    return {"pairs": len(pairs), "rows": rows}


@torch.no_grad()
def restyled(
    streams: Streams, pairs: Sequence[Pair], kind: str, strength: Strength, config: RestyleConfig
) -> list[Tensor]:
    """A video [T, 3, SIZE, SIZE] of each pair."""
    together = 1 if strength[1] else streams.config.batch  # a batch has one strength
    videos: list[Tensor] = []
    for start in range(0, len(pairs), together):
        some = pairs[start : start + together]
        stream = streams.open([pair.prompt(kind) for pair in some], seed=1000 + start)
        parts = []
        for images, guide in sources(streams, some, stream.cache_config, config.chunks):
            now = strength_at(*strength, motion_of(images[0]))
            made = stream.step(guide=guide, strength=now).images
            assert made is not None
            parts.append(made)
        videos += torch.cat(parts, dim=1).unbind()
    return videos


def sources(
    streams: Streams, pairs: Sequence[Pair], cache: CacheConfig, chunks: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each chunk the images [B, T, 3, SIZE, SIZE], behind the last one before them, and the
    clean latents [B, C, F, h, w]."""
    clock = ChunkClock.of(cache)
    scenes = [Scene((pair.source,)) for pair in pairs]
    latents = encode_scenes(streams.vae, scenes, clock.frames_before(chunks))
    images = render(scenes, clock.images_before(chunks))
    for chunk, part in enumerate(split_chunks(latents, cache)):
        begin = max(0, clock.images_before(chunk) - 1)
        yield images[:, begin : clock.images_before(chunk + 1)], part


def measures(video: Tensor, source: Thing, wanted: Attributes) -> dict[str, float]:
    """Whether a video [T, 3, SIZE, SIZE] has the prompt's look and the source's motion.

    1 or 0 for each of `MEASURES`, of the largest thing that shows, with `distance`, the median one
    from the source's place in pixels, and `softness`, see `Drift`.
    """
    detections = detect(video)
    tracks = tracks_of(detections)
    soft = drift(video, len(video))[0].softness
    if not tracks:
        return dict.fromkeys(MEASURES, 0.0) | {"distance": SIZE / 2, "softness": soft}
    seen: Track = tracks[0]
    away = _distance(detections.centre[:, COLOURS.index(seen.colour)], source)
    found = {
        "colour": [each.colour for each in tracks] == [wanted.colour],
        "shape": seen.shape == wanted.shape,
        "direction": seen.direction == source.direction,
        "speed": abs(seen.speed / source.speed - 1) < SAME_SPEED,
        "place": away < IN_PLACE,
    }
    return {name: float(value) for name, value in found.items()} | {
        "distance": away,
        "softness": soft,
    }


def _distance(centre: Tensor, source: Thing) -> float:
    time = torch.arange(len(centre))[:, None]
    true = torch.tensor(source.position) + torch.tensor(source.velocity) * time
    apart = (centre - true + SIZE / 2) % SIZE - SIZE / 2
    return float(apart.norm(dim=1).median())


def _means(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def format_restyle(report: Report) -> str:
    """The report as tables for a terminal."""
    names, lines = (*MEASURES, *_MEANS), [f"{report['pairs']} sources"]
    for kind in KINDS:
        lines.append(f"{kind + ' prompts':<26}" + "".join(f"{name:>11}" for name in names))
        for row in report["rows"]:
            lines += [_line(row, kind, group) for group in ("all", *SPEEDS) if group in row[kind]]
    return "\n".join(lines)


def _line(row: Report, kind: str, group: str) -> str:
    moves = f" {row['motion_strength']:+.2f}" if row["motion_strength"] else ""
    name = f"{row['strength']:.2f}{moves}" if group == "all" else f"  sources that move {group}"
    found = row[kind][group]
    shares = (f"{found[name]:>11.0%}" for name in MEASURES)
    return f"{name:<26}" + "".join((*shares, *(f"{found[n]:>11.2f}" for n in _MEANS)))
