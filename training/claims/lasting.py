"""What a long video keeps: of what its caption names, of what it does not, and of its past.

Windows of equal length are looked at one after another, so that each measure stands against time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..measures.metrics import first_frame_copy
from ..world.clips import scene_of
from ..world.evaluate import EvaluateConfig, Streams, stream_images, switch_prompts
from ..world.memory import Look, Occlusion, measure
from ..world.metric import share_right, track_measures
from ..world.scenes import WORLDS, caption, names_wall, parse_caption
from ..world.tracker import switch_delay

SWITCH_MODE = "recache"


@dataclass(frozen=True, kw_only=True)
class LastingConfig:
    """How long, and how often."""

    videos: int = 16
    """Long videos."""
    chunks: int = 84
    """Their length: 252 latent frames."""
    window_images: int = 48
    """Images of a window: 12 latent frames, a third more than attention sees."""
    switches: int = 8
    """Videos whose prompt changes."""
    switch_after: int = 7
    """Chunks before the change: the first of them has left the window."""
    switch_chunks: int = 20
    """Chunks after it."""


def lasting_prompts(world: str, count: int, seed: int) -> list[str]:
    """Captions of a world, of one thing that does not bounce. Where the world has walls three of
    four name one, and two of them a slow thing, which is hidden long."""
    kinds: dict[str, list[str]] = {"open": [], "walled": [], "slow": []}
    for index in range(40 * count):
        text = caption(scene_of(seed, index, world))
        each, *more = parse_caption(text)
        if not more and not each.bounces:
            walled = "slow" if each.speed_name == "slowly" else "walled"
            kinds[walled if names_wall(text) else "open"].append(text)
    if not WORLDS[world].wall_share:
        return kinds["open"][:count]
    turns = zip(kinds["slow"], kinds["walled"], kinds["slow"][count:], kinds["open"], strict=False)
    return [text for turn in turns for text in turn][:count]


def lasting(video: Tensor, text: str, window_images: int) -> dict[str, Any]:
    """A long video [T, 3, H, W] of a caption, window by window, as plain values.

    `right` is the share of the caption's attributes, `speed` in shape sizes a latent frame along
    it, `copy` how much of the first image is left in its place; `looks` and `occlusions` are what
    `training.world.memory.measure` finds.
    """
    video = video.cpu()
    memory = measure(video, window_images)
    kept = [track_measures(look.tracks, text) for look in memory.windows]
    return {
        "prompt": text,
        "right": [share_right(each) for each in kept],
        "speed": [each["speed_along"] for each in kept],
        "copy": _copies(video[:1], video, window_images),
        "looks": [_look(look) for look in memory.windows],
        "occlusions": [_occlusion(each) for each in memory.occlusions],
    }


def _look(look: Look) -> dict[str, Any]:
    things = [
        {"colour": t.colour, "shape": t.shape, "shade": t.shade, "size": t.size}
        for t in look.tracks
    ]
    return {
        "start_image": look.start_image,
        "backdrop": list(look.backdrop),
        "jumps": look.jumps,
        "things": things,
    }


def _occlusion(found: Occlusion) -> dict[str, Any]:
    return {
        "latent_frames": found.latent_frames,
        "same": found.is_same,
        "shade": found.shade_change,
        "size": found.size_change,
    }


def switched(streams: Streams, config: LastingConfig) -> list[dict[str, Any]]:
    """Videos whose colour, shape and direction change in their midst, and what is left of before.

    `delay` is in images, None where the new prompt never shows in the `images` after; `old_colour`
    says of each window after it whether the old colour is seen; `copy` and `right` are as of
    `lasting`.
    """
    before, after = switch_prompts(
        EvaluateConfig(switches=config.switches, seed=streams.config.seed)
    )
    stream = streams.open(before, seed=5000)
    first = stream_images(stream, config.switch_after)
    stream.switch(streams.encoder.encode(after), SWITCH_MODE)
    later = stream_images(stream, config.switch_chunks)
    every = zip(first.cpu(), later.cpu(), before, after, strict=True)
    return [_switched(*each, config.window_images) for each in every]


def _switched(
    first: Tensor, later: Tensor, before: str, after: str, window_images: int
) -> dict[str, Any]:
    whole = torch.cat([first, later])
    memory = measure(whole, window_images)
    (old,) = parse_caption(before)
    looks = [look for look in memory.windows if look.start_image >= len(first)]
    found = lasting(later, after, window_images)
    return {
        "before": before,
        "after": after,
        "delay": switch_delay(whole, len(first), after),
        "images": len(later),
        "old_colour": [any(track.colour == old.colour for track in look.tracks) for look in looks],
        "right": found["right"],
        "copy": _copies(first[:1], later, window_images),
        "looks": [_look(look) for look in memory.windows],
    }


def _copies(first: Tensor, video: Tensor, window_images: int) -> list[float]:
    """Likeness of each window to the first image [1, 3, H, W], by `first_frame_copy`."""
    windows = video.split(window_images)[: len(video) // window_images]
    return [first_frame_copy(torch.cat([first.expand_as(each), each])) for each in windows]
