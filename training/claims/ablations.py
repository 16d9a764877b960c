"""The paper's ablations in miniature: what Re-DMD and the EMA-Sink do where it can be counted.

Every arm distils the bundled student from the same start, with the same prompts, for the same
number of updates; arms differ by the settings below and nothing else. All numbers come from the
exact tracker or from measures that need no model. An arm and seed that is finished is not run
again, so the command continues where it stopped and takes more seeds later.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rf_core.config import CacheConfig, SamplerConfig
from rf_core.model import WanModel
from rf_core.options import DEMO
from rf_core.weights.checkpoint import load_student
from rf_core.writing import write_text

from ..measures.metrics import first_frame_copy, flicker, motion
from ..run.checkpointing import read_part
from ..run.config import apply_overrides, from_dict, to_json
from ..run.folder import STUDENT, checkpoints
from ..stages.re_dmd import distil
from ..stages.recipes import DistilConfig, miniature
from ..world.clips import decode_latents, num_images, scene_of
from ..world.evaluate import ATTRIBUTES, EulerConfig, EvaluateConfig, Streams, sample
from ..world.metric import caption_measures
from ..world.scenes import all_captions, caption, parse_caption, render, scene_of_caption
from ..world.stages import Files, open_encoder, open_network, open_vae
from ..world.tracker import drift

_log = logging.getLogger(__name__)

COMMON = (
    "run.updates=40",
    "run.generator.rate=5e-5",
    "run.critic.rate=1e-4",
    "run.ema=0.9",
    "run.ema_from=10",
    "output.checkpoint_every=20",
    "output.validate_every=0",
    "output.tensorboard=false",
)
PLAIN = ("reward.kind=none",)
NORMALISED = ("run.redmd.weights.effective_share=0.4", "run.redmd.weights.mean_one=true")
CACHE = "run.redmd.cache"


@dataclass(frozen=True)
class Arm:
    """One way of training."""

    name: str
    settings: tuple[str, ...]
    """Beside `COMMON`, on the miniature's recipe."""


REWARD_ARMS = (
    Arm("DMD", PLAIN),
    Arm(
        "Re-DMD, as published",
        ("run.redmd.weights.effective_share=null", "run.redmd.weights.mean_one=false"),
    ),
    Arm("Re-DMD, normalised", NORMALISED),
    Arm("Re-DMD, shuffled rewards", (*NORMALISED, "run.redmd.weights.shuffled=true")),
    Arm("tilted critic", (*NORMALISED, 'run.redmd.weigh="critic"')),
    Arm("best of 2", ("run.redmd.weights.best_of=2",)),
)
SINK_ARMS = (
    Arm("DMD, static sink", (*PLAIN, f"{CACHE}.decay=1.0")),
    Arm("DMD, no sink", (*PLAIN, f"{CACHE}.sink_frames=0")),
    Arm("DMD, EMA 0.99", (*PLAIN, f"{CACHE}.decay=0.99")),
    Arm("DMD, EMA 0.9", (*PLAIN, f"{CACHE}.decay=0.9")),
    Arm(
        "DMD, EMA 0.9, key norms kept",
        (*PLAIN, f"{CACHE}.decay=0.9", f"{CACHE}.keep_key_norms=true"),
    ),
)
ARMS = MappingProxyType({arm.name: arm for arm in (*REWARD_ARMS, *SINK_ARMS)})
"""DMD, with an EMA of 0.999 in float32, is the arm that every other one is compared with."""
BASE = "DMD"


@dataclass(frozen=True, kw_only=True)
class ClaimsConfig:
    """How much is measured."""

    free: int = 72
    """Captions that leave the speed open: what a motion reward can shift."""
    named: int = 24
    """Captions of one thing that name a speed."""
    double: int = 24
    """Captions of two things."""
    chunks: int = 5
    """Length of those videos, in chunks."""
    long: int = 6
    """Long videos, for drift."""
    long_chunks: int = 40
    """Their length: 120 latent frames, 30 windows' worth of evictions and more."""
    between: int = 24
    """Captions of free speed measured at each checkpoint before the last."""
    seed: int = 11
    """Of captions and noise."""


def run_claims(
    out: Path, seeds: Sequence[int], arms: Sequence[Arm], config: ClaimsConfig
) -> Iterator[str]:
    """Train and measure what is missing, yielding the name of each result as it is there."""
    measurer = Measurer(config)
    out.mkdir(parents=True, exist_ok=True)
    for name, make in measurer.references().items():
        if not result_path(out, name).exists():
            _write(result_path(out, name), make() | {"arm": name})
            yield name
    for seed in seeds:
        for arm in arms:
            path = result_path(out, arm.name, seed)
            if not path.exists():
                _write(path, _run_arm(out, arm, seed, measurer))
                yield _name(arm.name, seed)


def _run_arm(out: Path, arm: Arm, seed: int, measurer: Measurer) -> dict[str, Any]:
    config = apply_overrides(miniature(), [*COMMON, f"run.seed={seed}", *arm.settings])
    folder = folder_of(out, arm, seed)
    for report in distil(config, folder, torch.device("cpu"), resume=bool(checkpoints(folder))):
        _log.info("%s, seed %d: update %d", arm.name, seed, report.update)
    cache, sampler = config.run.redmd.cache, config.run.redmd.sampler
    curve = {0: measurer.speed(measurer.start, cache, sampler)}
    for update, path in checkpoints(folder)[:-1]:
        curve[update] = measurer.speed(_averaged(path, measurer.start), cache, sampler)
    student, _ = load_student(folder / STUDENT, device="cpu", dtype=torch.float32)
    found = measurer.measure(measurer.stream(student, cache, sampler))
    curve[config.run.updates] = _mean_speed(found["free"][: measurer.config.between])
    long = measurer.drift(student, cache, sampler)
    return {
        "arm": arm.name,
        "seed": seed,
        "config": json.loads(to_json(config)),
        "curve": curve,
        "long": long,
        **found,
    }


def folder_of(out: Path, arm: Arm, seed: int) -> Path:
    """Where an arm's run is."""
    return out / _slug(f"{arm.name} {seed}")


def streaming_config(result: Mapping[str, Any]) -> tuple[CacheConfig, SamplerConfig]:
    """The cache and the schedule a result's student streams with."""
    redmd = from_dict(DistilConfig, result["config"]).run.redmd
    return redmd.cache, redmd.sampler


def _averaged(checkpoint: Path, like: WanModel) -> WanModel:
    student = WanModel(like.config)
    student.load_state_dict(read_part(checkpoint, "average"))
    return student.eval().requires_grad_(False)


class Measurer:
    """The miniature's networks, and every measurement of a student."""

    def __init__(self, config: ClaimsConfig) -> None:
        self.config, self.files = config, Files(DEMO)
        self.vae, self.encoder = open_vae(self.files), open_encoder(self.files)
        self.start = open_network(self.files.student)
        self.prompts = prompts_of(config)

    def references(self) -> Mapping[str, Any]:
        """What arms are compared with: true videos, the teacher, the student before training."""
        return {
            "true videos": lambda: self.measure(self._true()),
            "teacher": lambda: self.measure(self._teacher()),
            "student before": lambda: (
                self.measure(
                    self.stream(self.start, CacheConfig(accumulator="float32"), SamplerConfig())
                )
                | {
                    "long": self.drift(
                        self.start, CacheConfig(accumulator="float32"), SamplerConfig()
                    )
                }
            ),
        }

    def stream(self, student: WanModel, cache: CacheConfig, sampler: SamplerConfig) -> list[Tensor]:
        """A video of every prompt."""
        every = [text for texts in self.prompts.values() for text in texts]
        return self.videos(every, student, cache, sampler)

    def videos(
        self,
        texts: Sequence[str],
        student: WanModel,
        cache: CacheConfig,
        sampler: SamplerConfig,
    ) -> list[Tensor]:
        """A video [T, 3, H, W] of each caption."""
        return self._streams(student, cache, sampler).videos(texts, self.config.chunks)

    def measure(self, videos: list[Tensor]) -> dict[str, list[dict[str, Any]]]:
        """Every video's measures, by group of captions."""
        found, rest = {}, iter(videos)
        for group, texts in self.prompts.items():
            pairs = [(next(rest), text) for text in texts]
            found[group] = [_measure(video, text, flow=group == "free") for video, text in pairs]
        return found

    def speed(self, student: WanModel, cache: CacheConfig, sampler: SamplerConfig) -> float:
        """Mean speed of a few captions that leave it open."""
        texts = self.prompts["free"][: self.config.between]
        videos = self.videos(texts, student, cache, sampler)
        return _mean_speed([caption_measures(v, t) for v, t in zip(videos, texts, strict=True)])

    def drift(
        self, student: WanModel, cache: CacheConfig, sampler: SamplerConfig
    ) -> list[dict[str, Any]]:
        """Long videos: how early and late windows differ, and whether late ones keep the prompt."""
        texts, images = self.prompts["named"][: self.config.long], num_images(15)
        found = []
        for text in texts:
            (video,) = self._streams(student, cache, sampler).videos(
                [text], self.config.long_chunks
            )
            windows = drift(video, images)
            found.append(
                {"prompt": text, "early": asdict(windows[0]), "late": asdict(windows[-1])}
                | {"late_right": _share_right(caption_measures(video[-images:], text))}
            )
        return found

    def _streams(self, student: WanModel, cache: CacheConfig, sampler: SamplerConfig) -> Streams:
        options = EvaluateConfig(batch=8, seed=self.config.seed)
        return Streams(student, self.encoder, self.vae, options, cache, sampler)

    def _true(self) -> list[Tensor]:
        rng = np.random.default_rng(self.config.seed)
        every = [text for texts in self.prompts.values() for text in texts]
        images = num_images(3 * self.config.chunks)
        return [render([scene_of_caption(text, rng)], images)[0] for text in every]

    def _teacher(self) -> list[Tensor]:
        every = [text for texts in self.prompts.values() for text in texts]
        teacher, frames = open_network(self.files.teacher), 3 * self.config.chunks
        latents = sample(teacher, self.encoder, every, EulerConfig(), frames, self.config.seed)
        return [decode_latents(self.vae, each)[0] for each in latents.split(1)]


def prompts_of(config: ClaimsConfig) -> dict[str, list[str]]:
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


def _measure(video: Tensor, text: str, flow: bool) -> dict[str, Any]:
    kept = caption_measures(video, text)
    found: dict[str, Any] = {"prompt": text, **kept, "right": _share_right(kept)}
    if flow:
        found |= {"first_frame_copy": first_frame_copy(video), "flicker": flicker(video)}
        found |= {"flow": motion(video)["mean_motion"]}
    return found


def _mean_speed(found: Sequence[Mapping[str, Any]]) -> float:
    return float(np.mean([each["speed_along"] for each in found]))


def _share_right(kept: Mapping[str, float | None]) -> float:
    asked = [kept[name] for name in ATTRIBUTES if kept[name] is not None]
    return float(np.mean(np.array(asked, dtype=float)))


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower())


def result_path(out: Path, arm: str, seed: int | None = None) -> Path:
    """Where the result of an arm's run is, or of what the arms stand beside."""
    return out / f"{_slug(_name(arm, seed))}.json"


def _name(arm: str, seed: int | None) -> str:
    return arm if seed is None else f"{arm}, seed {seed}"


def _write(path: Path, found: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(found))
