"""Recipes: whole runs by name, each a function that gives its full config and one that opens it.

The miniature distils the bundled demo: its teacher and student, its captions, its exact tracker as
the reward. Everything is what a large run uses but the sizes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rf_core.checkpoint import write_checkpoint

from .config import from_json, to_json
from .redmd import ReDMDConfig
from .rewards import TrackerReward, WeightConfig
from .trainer import Judge, OptimiserConfig, Report, RunConfig, Trainer
from .world.clips import captions, decode_latents, scene_of
from .world.scenes import SIZE, all_captions
from .world.stages import Files, file_hash, open_encoder, open_network, open_vae

_CONFIG, _STUDENT = "config.json", "student.safetensors"


@dataclass(frozen=True, kw_only=True)
class MiniatureConfig:
    """A distillation of the miniature world's student."""

    run: RunConfig = field(
        default_factory=lambda: RunConfig(
            redmd=ReDMDConfig(
                batch=8,
                supervised_chunks=None,
                weights=WeightConfig(baseline="batch", unit="batch", mean_one=True),
            ),
            generator=OptimiserConfig(rate=2e-5),
            critic=OptimiserConfig(rate=4e-5),
            latents=(16, 15, SIZE // 8, SIZE // 8),
            updates=80,
            micro_batch=8,
            ema_from=20,
        )
    )
    """The run; the window evicts twice in 15 latent frames."""
    reward: Literal["none", "motion", "caption"] = "motion"
    """The tracker's score that weighs samples; none is plain distribution matching."""
    two_things: int = 64
    """Captions of two things beside all 216 of one."""
    checkpoint_every: int = 20
    """Updates between checkpoints."""


def distil(config: MiniatureConfig, world: Path, out: Path, resume: bool) -> Iterator[Report]:
    """Run it, yielding a report an update; checkpoints, config and the student go to `out`.

    `world` holds vae, text_encoder, teacher and student. ValueError where `out` holds another run.
    """
    files = Files(world)
    trainer = _open(config, files)
    saved = _checkpoints(out)
    if saved and not resume:
        raise ValueError(f"{out} holds a run at update {saved[-1][0]}; --resume it, or choose anew")
    out.mkdir(parents=True, exist_ok=True)
    if saved:
        before = from_json(MiniatureConfig, (out / _CONFIG).read_text(encoding="utf-8"))
        if before != config:
            raise ValueError(f"{out} was begun with another config; see {out / _CONFIG}")
        trainer.load(saved[-1][1])
    (out / _CONFIG).write_text(to_json(config) + "\n", encoding="utf-8")
    clock = time.monotonic()
    while trainer.update < config.run.updates:
        yield trainer.step()
        if trainer.update % config.checkpoint_every == 0 or trainer.update == config.run.updates:
            trainer.save(out / f"update_{trainer.update:06}")
            _write_student(config, files, trainer, out / _STUDENT, time.monotonic() - clock)


def _open(config: MiniatureConfig, files: Files) -> Trainer:
    encoder = open_encoder(files)
    doubles = (captions([scene_of(5, index)])[0] for index in range(100 * config.two_things))
    two = [text for text in doubles if " and " in text][: config.two_things]
    prompts = [*all_captions(), *two]
    teacher = open_network(files.teacher)
    return Trainer(
        config.run,
        open_network(files.student),
        teacher,
        deepcopy(teacher),
        torch.cat([encoder.encode([text]) for text in prompts]),
        encoder.encode([""]),
        _judge(config, files, prompts),
    )


def _judge(config: MiniatureConfig, files: Files, prompts: list[str]) -> Judge | None:
    if config.reward == "none":
        return None
    vae, reward = open_vae(files), TrackerReward()

    def judge(x0: Tensor, numbers: list[int]) -> Tensor:
        videos = decode_latents(vae, x0)
        return reward(videos, [prompts[number] for number in numbers])[config.reward]

    return judge


def _checkpoints(out: Path) -> list[tuple[int, Path]]:
    found = [path for path in out.glob("update_*") if path.suffix != ".partial"]
    return sorted((int(path.name.removeprefix("update_")), path) for path in found)


def _write_student(
    config: MiniatureConfig, files: Files, trainer: Trainer, path: Path, seconds: float
) -> None:
    note = {
        "command": "python -m training re_dmd",
        "config": json.loads(to_json(config)),
        "updates": trainer.update,
        "minutes_since_start_or_resume": round(seconds / 60, 2),
        "made_from": {each.name: file_hash(each) for each in (files.teacher, files.student)},
    }
    tensors = {name: tensor.detach() for name, tensor in trainer.average.state_dict().items()}
    redmd = config.run.redmd
    write_checkpoint(
        path,
        tensors,
        trainer.average.config,
        redmd.cache,
        redmd.sampler,
        size=(SIZE, SIZE),
        provenance=note,
    )
