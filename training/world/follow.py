"""Measures how the student's streams follow a control: outlines by it, colours by the prompt.

Outlines of held-out clips control a stream, and its prompt names a colour alone. The tracker then
says how far the shape that is seen lies from the outline's, and whether its shape, direction, speed
and colour are right. Beside it stand the same streams without control, and under other settings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from rf_core.config import ControlConfig
from rf_core.decoders.decoder import WanDecoder
from rf_core.decoders.vae import WanVAE
from rf_core.model import WanModel
from rf_core.stream import Stream
from rf_core.text import TextEncoder
from rf_core.vace import Control, ControlledModel, Vace
from rf_core.weights.checkpoint import Checkpoint

from ..control_videos import ControlVideo
from .clips import decode_latents, encode_scenes, num_images, scene_of
from .controls import encode_controls
from .outlines import draw_outlines, sobel
from .scenes import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZE,
    Scene,
    Thing,
    caption,
    colour_caption,
    place,
    render,
)
from .tracker import Detections, detect, tracks_of

STRIPS = 6  # clips that are shown of each row
NEAR = 4.0  # pixels, a quarter of a shape: followed up to here
_AREA = 48  # pixels that a shape shows at least, as of the tracker
Prompt = Literal["colour", "caption", "contrary"]
"""What a prompt says: the colour alone; all of it; the colour, and another shape and direction."""
COLUMNS = ("near", "error", "late_error", "shape", "direction", "speed_error", "colour")
LEGEND = (
    f"near: share of images in which the colour is seen within {NEAR:.0f} pixels of the outline's "
    "middle; error: median distance in pixels where it is seen, late_error in the last third; "
    "shape, direction, colour: shares that are right (colour: that one and no other); speed_error: "
    "of the speed along the outline's direction, in shape sizes a latent frame; all +- 95 %"
)


@dataclass(frozen=True, kw_only=True)
class FollowConfig:
    """On how much it is measured."""

    clips: int = 32
    """Held-out clips of one thing each, for every row of the table."""
    chunks: int = 11
    """Their length: 8.1 s, in which the window moves eight times."""
    seed: int = 11
    """Seeds clips and noise."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table: how its streams are controlled."""

    name: str
    prompt: Prompt = "colour"
    strength: float = 1.0
    """0 is no control at all."""
    control: ControlConfig = field(default_factory=ControlConfig)
    edges: Literal["drawn", "sobel"] = "drawn"
    from_chunk: int = 0
    """The first chunk that is controlled."""
    until_chunk: int | None = None
    """The first that no longer is; None for all."""
    switch_chunk: int | None = None
    """Where the prompt changes to another colour, by a recache."""
    parts: tuple[tuple[str, int, int | None], ...] = (("", 0, None),)
    """What is measured by itself: its name, the first chunk, and the first that is not."""


def rows() -> list[Row]:
    """The table's; the last are of the ways in which a control may take part in a stream."""
    ways = [
        ControlConfig(past=past, clean=clean) for past in (True, False) for clean in (True, False)
    ]
    hard: list[tuple[str, dict[str, Any]]] = [
        ("", {}),
        (", the caption says otherwise", {"prompt": "contrary"}),
        (", strength 0.5", {"strength": 0.5}),
    ]
    return [
        Row(name="no control", strength=0),
        Row(name="no control, all in the caption", strength=0, prompt="caption"),
        Row(name="controlled"),
        Row(name="controlled by edges of the clip (Sobel)", edges="sobel"),
        Row(name="controlled, all in the caption", prompt="caption"),
        *(Row(name=f"strength {each}", strength=each) for each in (0.25, 0.5, 0.75, 1.5)),
        Row(name="from chunk 4 on", from_chunk=4, parts=((": before", 0, 4), (": after", 5, None))),
        Row(name="until chunk 6", until_chunk=6, parts=((": before", 0, 6), (": after", 7, None))),
        Row(
            name="prompt switched at chunk 6",
            switch_chunk=6,
            parts=((": before", 0, 6), (": after", 8, None)),
        ),
        *(
            Row(name=f"past={way.past}, clean={way.clean}{name}", control=way, **changes)
            for name, changes in hard
            for way in ways
            if changes.get("prompt") or way != ControlConfig()
        ),
    ]


@dataclass(frozen=True)
class Student:
    """What streams are made of."""

    base: WanModel
    control: Vace
    settings: Checkpoint
    encoder: TextEncoder
    vae: WanVAE


def held_out(config: FollowConfig) -> list[Thing]:
    """The things that are followed."""
    found, index = [], 0
    while len(found) < config.clips:
        scene = scene_of(config.seed, index)
        found += scene.things if len(scene.things) == 1 else ()
        index += 1
    return found


def follow(
    student: Student, row: Row, things: Sequence[Thing], config: FollowConfig
) -> tuple[Tensor, dict[str, list[dict[str, float]]]]:
    """The streams of a row, [B, T, 3, H, W] in [0, 1]; of each of its parts what is followed."""
    context = contexts_of(student.vae, tuple(things), row.edges, config.chunks)
    shown = {0: things}
    stream = open_stream(student, [prompt_of(t, row.prompt) for t in things], row, config.seed)
    videos = []
    for chunk in range(config.chunks):
        if chunk == row.switch_chunk:
            shown[chunk] = [replace(t, colour=other(COLOURS, t.colour)) for t in things]
            texts = [prompt_of(each, row.prompt) for each in shown[chunk]]
            stream.switch(student.encoder.encode(texts), "recache")
        controls = row.strength > 0 and chunk >= row.from_chunk
        controls = controls and (row.until_chunk is None or chunk < row.until_chunk)
        videos.append(_step(stream, context, row.strength if controls else 0))
    video, found = torch.cat(videos, dim=1), {}
    for name, first, last in row.parts:
        since = max(chunk for chunk in shown if chunk <= first)
        begin, end = first_image(first), None if last is None else first_image(last)
        pairs = zip(video[:, begin:end], shown[since], strict=True)
        found[row.name + name] = [followed(detect(v), t, t.colour, begin) for v, t in pairs]
    return video, found


def _step(stream: Stream, context: Tensor, strength: float) -> Tensor:
    frames, start = stream.next_frames, stream.state.num_chunks * stream.next_frames
    part = context[:, :, start : start + frames]
    control = Control(context=part, strength=strength) if strength else None
    chunk = stream.generate(control=control)
    images = stream.decode(chunk)
    assert images is not None
    return images


def open_stream(student: Student, prompts: Sequence[str], row: Row, seed: int) -> Stream:
    """A stream of a batch of prompts, under a row's control."""
    return Stream(
        ControlledModel(student.base, student.control, row.control),
        student.encoder.encode(prompts),
        height=SIZE,
        width=SIZE,
        decoder=WanDecoder(student.vae),
        seed=1000 * seed,
        batch=len(prompts),
        cache=student.settings.cache,
        sampler=student.settings.sampler,
    )


def prompt_of(thing: Thing, says: Prompt) -> str:
    """A prompt for a thing that is shown in outline."""
    if says == "colour":
        return colour_caption(Scene((thing,)))
    if says == "caption":
        return caption(Scene((thing,)))
    shape, direction = other(SHAPES, thing.shape), other(tuple(DIRECTIONS), thing.direction)
    return caption(Scene((replace(thing, shape=shape, direction=direction),)))


def other(known: Sequence[str], name: str) -> str:
    """The next of some names."""
    return known[(known.index(name) + 1) % len(known)]


@cache
def contexts_of(
    vae: WanVAE, things: tuple[Thing, ...], edges: str, chunks: int, frames: int = 3
) -> Tensor:
    """Contexts [B, 96, F, h, w] of the outlines of things, of so many chunks."""
    images = num_images(chunks * frames)
    videos = []
    for thing in things:
        if edges == "drawn":
            found = draw_outlines([Scene((thing,))], images)[0]
        else:
            found = sobel(rearrange(render([Scene((thing,))], images)[0], "t c h w -> t h w c"))
        videos.append(ControlVideo(_channels_first(found), torch.ones(images, 1, SIZE, SIZE)))
    return torch.cat(encode_controls(vae, videos), dim=1)


def path_of(thing: Thing, images: int, start_image: int = 0) -> Tensor:
    """Where a thing's middle is, [T, 2] in pixels."""
    return thing.centres(torch.arange(start_image, start_image + images)).float()


def followed(seen: Detections, thing: Thing, colour: str, start_image: int = 0) -> dict[str, float]:
    """How far what is seen follows a thing of that colour; see `LEGEND`."""
    index = COLOURS.index(colour)
    off = seen.centre[:, index] - path_of(thing, len(seen.area), start_image)
    distance = ((off + SIZE / 2) % SIZE - SIZE / 2).norm(dim=1)
    shown = seen.area[:, index] >= _AREA
    late = slice(-(len(shown) // 3), None)
    tracks = tracks_of(seen)
    track = next((each for each in tracks if each.colour == colour), None)
    x, y = DIRECTIONS[thing.direction]
    along = 0.0
    if track is not None:
        seen_x, seen_y = DIRECTIONS.get(track.direction, (0, 0))
        along = track.speed * (x * seen_x + y * seen_y)
    return {
        "near": float((shown & (distance <= NEAR)).float().mean()),
        "error": _median(distance[shown]),
        "late_error": _median(distance[late][shown[late]]),
        "shape": float(track is not None and track.shape == thing.shape),
        "direction": float(track is not None and track.direction == thing.direction),
        "speed_error": abs(along - thing.speed),
        "colour": float([each.colour for each in tracks] == [colour]),
    }


def _median(values: Tensor) -> float:
    return float(values.median()) if len(values) else math.nan


def first_image(chunk: int, frames: int = 3) -> int:
    """The number of a chunk's first image."""
    return num_images(chunk * frames) if chunk else 0


def truth(
    vae: WanVAE, things: Sequence[Thing], config: FollowConfig
) -> tuple[Tensor, list[dict[str, float]]]:
    """The same of the true clips through the VAE: what a perfect student would reach."""
    scenes = [Scene((thing,)) for thing in things]
    seen = decode_latents(vae, encode_scenes(vae, scenes, 3 * config.chunks))
    found = [followed(detect(v), t, t.colour) for v, t in zip(seen, things, strict=True)]
    return seen, found


@dataclass(frozen=True)
class MaskedClip:
    """A clip whose left half is kept, and an outline in its right half."""

    kept: Thing
    made: Thing

    def control(self, images: int) -> ControlVideo:
        """Its control video."""
        true = render([Scene((self.kept,))], images)[0]
        drawn = rearrange(draw_outlines([Scene((self.made,))], images)[0], "t h w c -> t c h w")
        mask = torch.zeros(images, 1, SIZE, SIZE)
        mask[..., SIZE // 2 :] = 1
        return ControlVideo(torch.where(mask > 0, drawn, true), mask)


def masked_clips(config: FollowConfig) -> list[MaskedClip]:
    """Clips of two things that move up and down, each in its half."""
    rng, found = np.random.default_rng([config.seed, 1]), []
    for thing in held_out(config):
        direction = thing.direction if thing.velocity[1] else ("up", "down")[rng.integers(2)]
        kept = replace(thing, direction=direction, position=(SIZE / 4, thing.position[1]))
        drawn = place(replace(thing, colour=other(COLOURS, thing.colour), direction=direction), rng)
        shape = SHAPES[rng.integers(len(SHAPES))]
        made = replace(drawn, shape=shape, position=(3 * SIZE / 4, drawn.position[1]))
        found.append(MaskedClip(kept, made))
    return found


def follow_masked(
    student: Student, row: Row, config: FollowConfig
) -> tuple[Tensor, dict[str, list[dict[str, float]]]]:
    """Streams in which the left half of a clip is kept, and the right half made of an outline.

    What is followed of the thing that is kept and of the one that is made, and `psnr` of the left
    half in dB.
    """
    clips, images = masked_clips(config), num_images(3 * config.chunks)
    context = torch.cat(encode_controls(student.vae, [c.control(images) for c in clips]), dim=1)
    prompts = [colour_caption(Scene((clip.kept, clip.made))) for clip in clips]
    stream = open_stream(student, prompts, row, config.seed)
    parts = [_step(stream, context, 1.0) for _ in range(config.chunks)]
    video = torch.cat(parts, dim=1)
    found: dict[str, list[dict[str, float]]] = {"kept": [], "made": []}
    for seen, clip in zip(video, clips, strict=True):
        detections = detect(seen)
        left = (seen - render([Scene((clip.kept,))], images)[0])[..., : SIZE // 2]
        for name, thing in (("kept", clip.kept), ("made", clip.made)):
            one = followed(detections, thing, thing.colour)
            one["colour"] = float(thing.colour in {each.colour for each in tracks_of(detections)})
            found[name].append(one | {"psnr": -10 * math.log10(float(left.square().mean()))})
    return video, found


def measure(
    student: Student, config: FollowConfig, known: Mapping[str, Any], out: Path
) -> Iterator[tuple[str, list[dict[str, float]]]]:
    """Every row of the table that is not `known`, as it is measured: its name and its clips'.

    Strips of the first clips of each are written to `out`.
    """
    things = held_out(config)
    if (name := "true clips through the VAE") not in known:
        _, found = truth(student.vae, things, config)
        yield name, found
    for row in rows():
        if row.name + row.parts[-1][0] not in known:
            video, parts = follow(student, row, things, config)
            images = [
                draw_outlines([Scene((thing,))], video.shape[1])[0] for thing in things[:STRIPS]
            ]
            _write_strips(out, row.name, [_channels_first(each) for each in images], video)
            yield from parts.items()
    for past in (True, False):
        name = f"masked, past={past}"
        if f"{name}: made" not in known:
            video, parts = follow_masked(
                student, Row(name=name, control=ControlConfig(past=past)), config
            )
            clips = masked_clips(config)[:STRIPS]
            _write_strips(out, name, [each.control(video.shape[1]).images for each in clips], video)
            for part, found in parts.items():
                yield f"{name}: {part}", found


def _channels_first(images: Tensor) -> Tensor:
    return rearrange(images, "t h w c -> t c h w")


def _write_strips(out: Path, name: str, controls: Sequence[Tensor], video: Tensor) -> None:
    pairs = zip(controls, video[: len(controls)], strict=True)
    whole = np.concatenate([np.asarray(strip(*pair)) for pair in pairs])
    plain = "".join(each if each.isalnum() else "_" for each in name)
    Image.fromarray(whole).save(out / f"{plain}.png")


def mean_of(found: Sequence[Mapping[str, float]], name: str) -> tuple[float, float]:
    """Mean and half width of its 95 % interval, of what is a number."""
    values = np.array([each[name] for each in found])
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    spread = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    return float(values.mean()), 1.96 * spread / math.sqrt(len(values))


def line(name: str, found: Sequence[Mapping[str, float]], columns: Sequence[str] = COLUMNS) -> str:
    """A row of a Markdown table."""
    cells = ("{:.2f} ± {:.2f}".format(*mean_of(found, column)) for column in columns)
    return f"| {name} | " + " | ".join(cells) + " |"


def strip(control: Tensor, video: Tensor, images: int = 8) -> Image.Image:
    """Images of a control video and of its stream, [T, 3, H, W] each, one above the other."""
    count = min(len(control), len(video))
    at = torch.linspace(0, count - 1, images).long()
    rows = [rearrange(each[at], "t c h w -> h (t w) c") for each in (control, video)]
    return Image.fromarray((torch.cat(rows).clamp(0, 1) * 255).byte().numpy())


def differences(found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Of each way in which a control may take part, how much its error is above that of seeing the
    past and hinting in the clean pass: clip by clip, mean and 95 % interval in pixels."""
    lines, first = [], ControlConfig(past=True, clean=True)
    plain = [row for row in rows() if row.parts == Row.parts and row.edges == Row.edges]
    of = {(row.control, row.prompt, row.strength): row.name for row in plain}
    for (way, prompt, strength), name in of.items():
        base = of[first, prompt, strength]
        if way != first and {name, base} <= set(found):
            pairs = zip(found[name], found[base], strict=True)
            each = [{"error": a["error"] - b["error"]} for a, b in pairs]
            lines.append(f"{name}: error {{:+.3f}} ± {{:.3f}}".format(*mean_of(each, "error")))
    return lines


def format_rows(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """All rows as a Markdown table."""
    head = ["| streams | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines = [line(name, each) for name, each in found.items()]
    kept = [
        f"{name}, left half: PSNR {{:.1f}} ± {{:.1f}} dB".format(*mean_of(each, "psnr"))
        for name, each in found.items()
        if each and "psnr" in each[0] and name.endswith("kept")
    ]
    return "\n".join([*head, *lines, "", *kept, "", *differences(found), "", LEGEND])
