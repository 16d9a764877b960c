"""Measures teacher and student by what their videos show.

Every number is the tracker's. Its own accuracy on true videos, and on true videos that went
through the VAE, stands beside the models': what is lost there is not the models' to gain.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rf_core.config import NUM_TRAIN_TIMESTEPS, SPATIAL_FACTOR, CacheConfig, SamplerConfig
from rf_core.decoders.decoder import WanDecoder
from rf_core.decoders.vae import WanVAE
from rf_core.model import WanModel
from rf_core.scheduler import euler_levels, integrate
from rf_core.stream import Stream
from rf_core.text import TextEncoder

from .clips import captions, decode_latents, encode_scenes, num_images, scene_of
from .metric import ATTRIBUTES, mean_of_known
from .scenes import (
    PLAIN,
    SIZE,
    SPEED_RANGES,
    WORLDS,
    all_captions,
    parse_caption,
    render,
    scene_of_caption,
)
from .tracker import Drift, drift, score, switch_delay

SWITCH_MODES = ("soft", "recache", "blend 3", "cut")
Report = dict[str, Any]
"""Plain JSON."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured, and on how much."""

    single: int = 216
    """Captions of one thing, drawn from all 216."""
    double: int = 64
    """Captions of two things."""
    frames: int = 15
    """Latent frames of the teacher's and the true clips."""
    chunks: int = 7
    """Chunks of the student's clips."""
    drift_videos: int = 16
    """Streams measured for drift."""
    drift_chunks: int = 40
    """Their length."""
    drift_window: int = 48
    """Images of a window of drift."""
    switches: int = 24
    """Prompt changes of each mode."""
    switch_after: int = 4
    """Chunks before the change."""
    switch_chunks: int = 10
    """Chunks after it."""
    batch: int = 24
    """Streams made together."""
    world: str = PLAIN
    """Of `scenes.WORLDS`: of the true videos; captions are those that both worlds have."""
    seed: int = 3
    """Seeds captions and noise."""


@dataclass(frozen=True, kw_only=True)
class EulerConfig:
    """How a teacher's clips are sampled."""

    steps: int = 28
    """Euler steps."""
    shift: float = 12.0
    """Flow shift of the grid. Few latents of large amplitude hold all of a video of this world, so
    what it shows is decided above a noise level of 0.9, and that is where steps are needed."""
    guidance: float = 2.5
    """Classifier-free guidance: 1 is none, s gives uncond + s (cond - uncond)."""


@torch.no_grad()
def sample(
    model: WanModel,
    encoder: TextEncoder,
    prompts: Sequence[str],
    config: EulerConfig,
    frames: int,
    seed: int,
    batch: int = 32,
) -> Tensor:
    """The teacher's clips for prompts: clean latents [N, C, frames, h, w]."""
    generator = torch.Generator().manual_seed(seed)
    levels, side = euler_levels(config.steps, config.shift), SIZE // SPATIAL_FACTOR
    parts = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        noise = torch.randn(len(some), model.config.in_dim, frames, side, side, generator=generator)
        noise = noise.to(model.patch_embedding.weight.device)
        cond, uncond = (
            model.prompt_context(encoder.encode(texts)) for texts in (some, [""] * len(some))
        )

        def flow(x: Tensor, level: float, cond: Any = cond, uncond: Any = uncond) -> Tensor:
            at = x.new_full((x.shape[0], x.shape[2]), level * NUM_TRAIN_TIMESTEPS)
            plain = model(x, at, uncond)
            return plain + config.guidance * (model(x, at, cond) - plain)

        parts.append(integrate(flow, noise, levels)[0])
    return torch.cat(parts)


def evaluate(
    vae: WanVAE,
    encoder: TextEncoder,
    teacher: WanModel | None,
    student: WanModel | None,
    euler: EulerConfig,
    config: EvaluateConfig,
    cache: CacheConfig | None = None,
    sampler: SamplerConfig | None = None,
) -> Report:
    """All measurements of the models that are given."""
    prompts = evaluation_prompts(config)
    report: Report = {"true": true_accuracy(vae, prompts, config)}
    if teacher is not None:
        _log.info("teacher")
        latents = sample(teacher, encoder, prompts, euler, config.frames, config.seed)
        report["teacher"] = accuracy(vae, latents, prompts)
    if student is not None:
        streams = Streams(student, encoder, vae, config, cache, sampler)
        _log.info("student")
        report["student"] = accuracy_of(streams.videos(prompts, config.chunks), prompts)
        _log.info("drift")
        report["drift"] = drift_report(streams)
        _log.info("switches")
        report["switch"] = {mode: switch_report(streams, mode) for mode in SWITCH_MODES}
    return report


def evaluation_prompts(config: EvaluateConfig) -> list[str]:
    """Captions of one thing, then of two."""
    rng = np.random.default_rng(config.seed)
    every = all_captions()
    singles = [every[index] for index in rng.permutation(len(every))[: config.single]]
    doubles: list[str] = []
    index = 0
    while len(doubles) < config.double:
        scene = scene_of(config.seed, index)
        doubles += captions([scene]) if len(scene.things) == 2 else []
        index += 1
    return singles + doubles


def accuracy(vae: WanVAE, latents: Tensor, prompts: Sequence[str]) -> Report:
    """How latents [N, C, F, h, w] keep their prompts, once decoded."""
    videos = [decode_latents(vae, part)[0] for part in latents.split(1)]
    return accuracy_of(videos, prompts)


def accuracy_of(videos: Sequence[Tensor], prompts: Sequence[str]) -> Report:
    """Right and counted videos [T, 3, H, W] per attribute, for all and for one and two things.

    Speed counts where the caption names one; `free_speed` describes those that leave it open.
    """
    scores = [score(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]
    targets = [parse_caption(prompt) for prompt in prompts]
    groups = {
        "all": range(len(prompts)),
        "one": [i for i, things in enumerate(targets) if len(things) == 1],
        "two": [i for i, things in enumerate(targets) if len(things) == 2],
    }
    named = {i for i, things in enumerate(targets) if any(t.speed_name for t in things)}
    report: Report = {}
    for group, members in groups.items():
        speeds = [i for i in members if i in named]
        counted = {name: speeds if name == "speed" else members for name in ATTRIBUTES}
        report[group] = {
            name: {"right": int(sum(scores[i][name] for i in rows)), "of": len(rows)}
            for name, rows in counted.items()
        }
    free = [i for i in groups["one"] if i not in named]
    report["free_speed"] = _spread([scores[i]["measured_speed"] for i in free])
    for name in ("slowly", "quickly"):
        rows = [i for i in groups["one"] if targets[i][0].speed_name == name]
        report[f"{name}_speed"] = _spread([scores[i]["measured_speed"] for i in rows])
    return report


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, deviation and deciles of what is a number; nan where nothing is."""
    known = np.array([value for value in values if not math.isnan(value)])
    if not len(known):
        return dict.fromkeys(("mean", "std", "p10", "p50", "p90"), math.nan)
    deciles = np.quantile(known, (0.1, 0.5, 0.9)).tolist()
    numbers = (float(known.mean()), float(known.std()), *deciles)
    return dict(zip(("mean", "std", "p10", "p50", "p90"), numbers, strict=True))


def true_accuracy(vae: WanVAE, prompts: Sequence[str], config: EvaluateConfig) -> Report:
    """The tracker on true videos of the prompts, and on those videos through the VAE."""
    rng = np.random.default_rng([config.seed, 1])
    scenes = [scene_of_caption(prompt, rng, WORLDS[config.world]) for prompt in prompts]
    images = num_images(config.frames)
    true = [render([scene], images)[0] for scene in scenes]
    latents = encode_scenes(vae, scenes, config.frames)
    return {
        "pixels": accuracy_of(true, prompts),
        "vae": accuracy(vae, latents, prompts),
        "uniform_speed": dict(zip(("low", "high"), SPEED_RANGES[None], strict=True)),
    }


@dataclass(frozen=True)
class Streams:
    """A student with what it takes to stream videos of the world."""

    student: WanModel
    encoder: TextEncoder
    vae: WanVAE
    config: EvaluateConfig
    cache: CacheConfig | None = None
    sampler: SamplerConfig | None = None

    def open(self, prompts: Sequence[str], seed: int) -> Stream:
        """A stream of a batch of prompts; sample b has the noise of seed + b."""
        return Stream(
            self.student,
            self.encoder.encode(prompts),
            height=SIZE,
            width=SIZE,
            decoder=WanDecoder(self.vae),
            seed=seed,
            batch=len(prompts),
            cache=self.cache,
            sampler=self.sampler,
        )

    def videos(self, prompts: Sequence[str], chunks: int) -> list[Tensor]:
        """A video [T, 3, H, W] of each prompt."""
        return list(self.each_video(prompts, chunks))

    def each_video(self, prompts: Sequence[str], chunks: int) -> Iterator[Tensor]:
        """The same one by one: no more than a batch is held."""
        for start in range(0, len(prompts), self.config.batch):
            stream = self.open(prompts[start : start + self.config.batch], seed=1000 + start)
            yield from stream_images(stream, chunks).unbind()


def stream_images(stream: Stream, chunks: int) -> Tensor:
    """The images of a stream's next chunks, [B, T, 3, H, W]."""
    parts = []
    for _ in range(chunks):
        images = stream.step().images
        assert images is not None
        parts.append(images)
    return torch.cat(parts, dim=1)


def drift_report(streams: Streams) -> Report:
    """The look of early and late windows of long videos, and what late ones still show."""
    config = streams.config
    prompts = evaluation_prompts(config)[: config.drift_videos]
    videos = streams.videos(prompts, config.drift_chunks)
    windows = [drift(video, config.drift_window) for video in videos]
    late_images = num_images(3 * config.chunks)
    return {
        "windows": [_mean_drift([each[i] for each in windows]) for i in range(len(windows[0]))],
        "early": _mean_drift([each[0] for each in windows]),
        "late": _mean_drift([each[-1] for each in windows]),
        "late_accuracy": accuracy_of([video[-late_images:] for video in videos], prompts),
    }


def _mean_drift(windows: Sequence[Drift]) -> dict[str, float]:
    """Mean of each measure over the windows in which it is a number."""
    names = [field.name for field in fields(Drift)]
    rows = np.array([[getattr(each, name) for name in names] for each in windows])
    means = mean_of_known(rows, 0)
    return dict(zip(names, means.tolist(), strict=True))


def switch_report(streams: Streams, mode: str) -> Report:
    """How long a change of colour, shape and direction takes to show, in images and chunks."""
    config = streams.config
    before, after = switch_prompts(config)
    stream = streams.open(before, seed=5000)
    first = stream_images(stream, config.switch_after)
    stream.switch(streams.encoder.encode(after), mode)
    videos = torch.cat([first, stream_images(stream, config.switch_chunks)], dim=1)
    delays = [
        switch_delay(video, first.shape[1], prompt)
        for video, prompt in zip(videos, after, strict=True)
    ]
    followed = [delay for delay in delays if delay is not None]
    images = 4 * stream.cache_config.chunk_frames
    median = float(np.median(followed)) if followed else math.nan
    return {
        "followed": len(followed),
        "of": len(delays),
        "median_images": median,
        "median_chunks": median / images,
        "worst_images": max(followed, default=None),
        "delays": delays,
    }


def switch_prompts(config: EvaluateConfig) -> tuple[list[str], list[str]]:
    """Pairs of captions of one thing that differ in colour, shape and direction."""
    rng = np.random.default_rng([config.seed, 2])
    every = all_captions()
    pairs: list[tuple[str, str]] = []
    while len(pairs) < config.switches:
        a, b = (every[index] for index in rng.integers(len(every), size=2))
        (x,), (y,) = parse_caption(a), parse_caption(b)
        if x.colour != y.colour and x.shape != y.shape and x.direction != y.direction:
            pairs.append((a, b))
    return [a for a, _ in pairs], [b for _, b in pairs]


def format_report(report: Report) -> str:
    """The report as tables for a terminal."""
    rows = {
        "tracker on true videos": report["true"]["pixels"],
        "true videos through the VAE": report["true"]["vae"],
    }
    rows |= {name: report[name] for name in ("teacher", "student") if name in report}
    lines = [_accuracy_table(rows)]
    if "drift" in report:
        lines += [_drift_table(report["drift"]), _switch_table(report["switch"])]
    return "\n\n".join(lines)


def _accuracy_table(rows: dict[str, Report]) -> str:
    lines = [f"{'caption accuracy':<34}" + "".join(f"{name:>17}" for name in ATTRIBUTES)]
    for name, report in rows.items():
        for group in ("all", "one", "two"):
            if report[group]["colour"]["of"]:
                label = name if group == "all" else f"  {group} thing{'s' * (group == 'two')}"
                cells = (_share(report[group][attribute]) for attribute in ATTRIBUTES)
                lines.append(f"{label:<34}" + "".join(f"{cell:>17}" for cell in cells))
        speeds = (
            f"{kind} {report[f'{kind}_speed']['mean']:.2f} +- {report[f'{kind}_speed']['std']:.2f}"
            for kind in ("slowly", "quickly", "free")
        )
        lines.append("  measured speed: " + ", ".join(speeds))
    return "\n".join(lines)


def _share(count: dict[str, int]) -> str:
    share = f"{count['right'] / count['of']:.1%}" if count["of"] else "-"
    return f"{share} ({count['right']}/{count['of']})"


def _drift_table(report: Report) -> str:
    names = ("palette_error", "background_error", "area_error", "softness")
    lines = [f"{'drift':<34}" + "".join(f"{name:>17}" for name in names)]
    for when in ("early", "late"):
        lines.append(f"{when:<34}" + "".join(f"{report[when][name]:>17.4f}" for name in names))
    late = report["late_accuracy"]["all"]
    lines.append("late accuracy: " + ", ".join(f"{n} {_share(late[n])}" for n in ATTRIBUTES))
    return "\n".join(lines)


def _switch_table(report: dict[str, Report]) -> str:
    lines = [f"{'prompt switch':<34}{'followed':>17}{'median images':>17}{'median chunks':>17}"]
    for mode, each in report.items():
        lines.append(
            f"{mode:<34}{_share({'right': each['followed'], 'of': each['of']}):>17}"
            f"{each['median_images']:>17.1f}{each['median_chunks']:>17.2f}"
        )
    return "\n".join(lines)
