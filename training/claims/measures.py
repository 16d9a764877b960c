"""What is measured of a student: its motion, its captions and its quality, video by video.

All numbers are the exact tracker's or of measures that need no model. Optical flow is a motion that
no arm but its own is trained on. Videos and flow are made on the networks' device; the tracker asks
many small questions of a video, each of which a card would wait for, and so reads it on the CPU,
brought over whole.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rf_core.config import CacheConfig, SamplerConfig
from rf_core.model import WanModel
from rf_core.video import to_uint8

from ..measures.metrics import first_frame_copy, flicker, motion
from ..objective.redmd import ReDMDConfig
from ..world.clips import decode_latents, encode_scenes, num_images, scene_of
from ..world.evaluate import EulerConfig, EvaluateConfig, Streams, sample
from ..world.metric import caption_measures, share_right
from ..world.scenes import (
    PLAIN,
    WORLDS,
    all_captions,
    caption,
    parse_caption,
    render,
    scene_of_caption,
)
from ..world.stages import Files, open_encoder, open_network, open_vae
from ..world.tracker import drift
from .lasting import LastingConfig, lasting, lasting_prompts, switched

STRIP_PROMPT = "a red circle moves left"
STRIP_IMAGES = 8
Found = dict[str, Any]
"""Plain JSON."""


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """How much is measured."""

    free: int = 72
    """Captions that leave the speed open: what a motion reward can shift."""
    named: int = 24
    """Captions of one thing that name a speed."""
    double: int = 24
    """Captions of two things."""
    chunks: int = 5
    """Length of those videos, in chunks."""
    between: int = 24
    """Captions of free speed measured at each checkpoint."""
    lasting: LastingConfig = field(default_factory=LastingConfig)
    """Of long videos."""
    seed: int = 11
    """Of captions and noise."""


@dataclass(frozen=True, kw_only=True)
class Played:
    """A student, and how it streams."""

    student: WanModel
    cache: CacheConfig = field(default_factory=lambda: CacheConfig(accumulator="float32"))
    sampler: SamplerConfig = field(default_factory=SamplerConfig)


@dataclass(frozen=True, kw_only=True)
class Measurer:
    """A world's networks, and every measurement of a student."""

    config: MeasureConfig
    files: Files
    device: torch.device
    world: str = PLAIN
    """Of `WORLDS`: where true videos and long ones' captions come from."""

    @cached_property
    def vae(self) -> Any:
        """See `open_vae`."""
        return open_vae(self.files, self.device)

    @cached_property
    def encoder(self) -> Any:
        """See `open_encoder`."""
        return open_encoder(self.files, self.device)

    @cached_property
    def prompts(self) -> Mapping[str, Sequence[str]]:
        """See `prompts_of`."""
        return prompts_of(self.config)

    def played(self, played: Played) -> Found:
        """A video of every prompt, measured by group."""
        return self._groups(self._streams(played).each_video(self._every, self.config.chunks))

    def true(self, *, decoded: bool) -> Found:
        """The same of true videos of those prompts, or of these through the VAE."""
        return self._groups(self._true(self._every, self.config.chunks, decoded))

    def teacher(self, *, guided: bool) -> Found:
        """The same of the teacher's clips, at the guidance that it is matched at or without any."""
        teacher, frames = open_network(self.files.teacher, self.device), 3 * self.config.chunks
        euler = EulerConfig(guidance=1 + ReDMDConfig().guidance if guided else 1)
        clips = sample(teacher, self.encoder, self._every, euler, frames, self.config.seed)
        return self._groups(decode_latents(self.vae, each)[0] for each in clips.split(1))

    def point(self, played: Played) -> list[Found]:
        """A few captions of free speed: a point of a curve."""
        texts = self.prompts["free"][: self.config.between]
        videos = self._streams(played).videos(texts, self.config.chunks)
        return [_plain(_right(v, t)) for v, t in zip(videos, texts, strict=True)]

    def lasting(self, played: Played) -> Found:
        """Long videos, and prompts that change in them."""
        c, streams = self.config.lasting, self._streams(played)
        videos = streams.each_video(self._lasting_prompts, c.chunks)
        every = zip(videos, self._lasting_prompts, strict=True)
        found = [lasting(video, text, c.window_images) for video, text in every]
        return {"lasting": _plain(found), "switched": _plain(switched(streams, c))}

    def true_lasting(self, *, decoded: bool) -> Found:
        """Long true videos, or these through the VAE: what the measures have of drift."""
        c, texts = self.config.lasting, self._lasting_prompts
        videos = self._true(texts, c.chunks, decoded)
        found = [lasting(v, t, c.window_images) for v, t in zip(videos, texts, strict=True)]
        return {"lasting": _plain(found)}

    def strip(self, played: Played) -> str:
        """Some images of one prompt side by side, a PNG in base64."""
        (video,) = self._streams(played).videos([STRIP_PROMPT], self.config.chunks)
        chosen = video[torch.linspace(0, len(video) - 1, STRIP_IMAGES).long()]
        row, file = torch.cat(list(to_uint8(chosen.cpu())), dim=1), io.BytesIO()
        Image.fromarray(row.numpy()).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    @property
    def _lasting_prompts(self) -> list[str]:
        return lasting_prompts(self.world, self.config.lasting.videos, self.config.seed)

    def _true(self, texts: Sequence[str], chunks: int, decoded: bool) -> Iterator[Tensor]:
        rng, world, frames = np.random.default_rng(self.config.seed), WORLDS[self.world], 3 * chunks
        for text in texts:
            scene = scene_of_caption(text, rng, world)
            if decoded:
                yield decode_latents(self.vae, encode_scenes(self.vae, [scene], frames))[0]
            else:
                yield render([scene], num_images(frames))[0]

    @property
    def _every(self) -> list[str]:
        return [text for texts in self.prompts.values() for text in texts]

    def _streams(self, played: Played) -> Streams:
        options = EvaluateConfig(
            batch=8 if self.device.type == "cpu" else 24, seed=self.config.seed
        )
        parts = played.student, self.encoder, self.vae
        return Streams(*parts, options, played.cache, played.sampler)

    def _groups(self, videos: Iterator[Tensor]) -> Found:
        return {
            group: [
                _plain(_measure(next(videos).to(self.device), text, with_flow=group == "free"))
                for text in texts
            ]
            for group, texts in self.prompts.items()
        }


def prompts_of(config: MeasureConfig) -> dict[str, list[str]]:
    """Captions by group: of free speed, of named speed, of two things."""
    rng = np.random.default_rng(config.seed)
    single = all_captions()
    free = [text for text in single if parse_caption(text)[0].speed_name is None]
    named = [text for text in single if parse_caption(text)[0].speed_name is not None]
    scenes = (scene_of(config.seed, index) for index in range(100 * config.double))
    double = [caption(scene) for scene in scenes if len(scene.things) == 2]
    pick = {"free": (free, config.free), "named": (named, config.named)}
    chosen = {
        name: [texts[i] for i in rng.permutation(len(texts))[:count]]
        for name, (texts, count) in pick.items()
    }
    return chosen | {"two": double[: config.double]}


def _measure(video: Tensor, text: str, *, with_flow: bool) -> Found:
    found: Found = {"first_frame_copy": first_frame_copy(video), "flicker": flicker(video)}
    if with_flow:
        found["flow"] = motion(video)["mean_motion"]
    video = video.cpu()
    (look,) = drift(video, len(video))
    return found | _right(video, text) | {"softness": look.softness, "area_error": look.area_error}


def _right(video: Tensor, text: str) -> Found:
    kept = caption_measures(video.cpu(), text)
    return {"prompt": text, **kept, "right": share_right(kept)}


def _plain(found: Any) -> Any:
    """Numbers of five digits, as a file is full of them; None where one is not finite."""
    if isinstance(found, Mapping):
        return {name: _plain(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [_plain(value) for value in found]
    if isinstance(found, float):
        return float(f"{found:.5g}") if math.isfinite(found) else None
    return found
