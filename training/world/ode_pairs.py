"""The teacher's ODE trajectories: what the causal student is first taught to reproduce.

The teacher's sampler walks from noise to a clean chunk in small Euler steps, with the past of an
excerpt in sight. Its end is kept with the points where it passes the student's own timesteps: pairs
for a regression (CausVid, arXiv 2412.07772, sec. 4.2). Each point leads to one end alone, so the
student learns to make up its mind; taught the mean of what a noised chunk may have been, it began
videos with nothing at all. Shards are functions of (seed, shard), so a run that was cut off goes on
where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rf_core.config import NUM_TRAIN_TIMESTEPS, SamplerConfig
from rf_core.model import PromptContext, WanModel
from rf_core.numbered import numbered
from rf_core.scheduler import sampling_timesteps, shift_sigma
from rf_core.text import TextEncoder
from rf_core.weights.files import parse_json, read_weights

from .clips import Clips, write_atomically
from .excerpts import ExcerptConfig, Excerpts, Past, Prompts, draw_excerpts, pasts


@dataclass(frozen=True, kw_only=True)
class EulerConfig:
    """The teacher's sampler."""

    steps: int = 28
    """Euler steps."""
    shift: float = 12.0
    """Flow shift of the grid. Few latents of large amplitude hold all of a video of this world, so
    what it shows is decided above a noise level of 0.9, and that is where steps are needed."""
    guidance: float = 2.5
    """Classifier-free guidance: 1 is none, s gives uncond + s (cond - uncond)."""

    def sigmas(self, through: Sequence[float] = ()) -> Tensor:
        """Noise levels from 1 to 0 in float32: steps + 1 of them, and those of `through`."""
        plain = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
        levels = torch.cat([shift_sigma(plain, self.shift).float(), torch.tensor(through)])
        return levels.unique().flip(0)


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """How many trajectories, and how they are made."""

    num_excerpts: int = 1536
    """Excerpts at most, with three trajectories each."""
    part: tuple[int, int] = (0, 1)
    """(i, n): make every n-th shard from the i-th on."""
    minutes: float | None = None
    """Wall-clock minutes after which no further shard is begun; None for no limit."""
    euler: EulerConfig = field(default_factory=EulerConfig)
    """The teacher's sampler."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The student's schedule, at whose timesteps points are kept."""
    excerpts: ExcerptConfig = field(default_factory=ExcerptConfig)
    """How excerpts are drawn."""
    shard: int = 64
    """Excerpts in a file, made together."""
    seed: int = 2
    """Seeds each shard's excerpts and noise, together with the shard's number."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Three trajectories of each of N excerpts."""

    excerpts: Excerpts
    """What the trajectories see of their past."""
    points: Tensor
    """Where they are at each of the K sampling timesteps, the first being noise:
    [K, 3, N, C, F, h, w], float16."""
    clean: Tensor
    """The chunks they lead to [3, N, C, F, h, w], float16."""


@torch.no_grad()
def integrate(
    model: WanModel,
    noise: Tensor,
    prompt: PromptContext,
    unconditional: PromptContext,
    config: EulerConfig,
    past: Past | None = None,
    through: Sequence[float] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Follow the teacher's flow from noise [B, C, F, h, w] to clean latents.

    Returns the end, and where it was at each noise level of `through`. `unconditional` is the
    context of the empty prompt; with guidance both passes see the same past.
    """
    x, sigmas, points = noise, config.sigmas(through), {}
    wanted = torch.tensor(through).tolist()  # in float32, as the grid is
    for sigma, after in pairwise(sigmas):
        if float(sigma) in wanted:
            points[float(sigma)] = x
        timestep = float(sigma) * NUM_TRAIN_TIMESTEPS
        timestep_BF = x.new_full((x.shape[0], x.shape[2]), timestep)
        flow = model(x, timestep_BF, prompt, past)
        if config.guidance != 1:
            plain = model(x, timestep_BF, unconditional, past)
            flow = plain + config.guidance * (flow - plain)
        x = x + (after - sigma) * flow
    return x, [points[level] for level in wanted]


def sample(
    model: WanModel,
    encoder: TextEncoder,
    prompts: Sequence[str],
    config: EulerConfig,
    frames: int,
    seed: int,
    latent_size: tuple[int, int] = (8, 8),
    batch: int = 32,
) -> Tensor:
    """The teacher's clips for prompts: clean latents [N, C, frames, h, w]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (model.config.in_dim, frames, *latent_size)
    parts = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        noise = torch.randn(len(some), *shape, generator=generator)
        parts.append(_integrate_prompts(model, encoder, some, noise, config))
    return torch.cat(parts)


@torch.no_grad()
def _integrate_prompts(
    model: WanModel,
    encoder: TextEncoder,
    prompts: Sequence[str],
    noise: Tensor,
    config: EulerConfig,
) -> Tensor:
    prompt = model.prompt_context(encoder.encode(prompts))
    return integrate(model, noise, prompt, _empty(model, encoder, len(prompts)), config)[0]


def _empty(model: WanModel, encoder: TextEncoder, count: int) -> PromptContext:
    return model.prompt_context(encoder.encode([""] * count))


def write_pairs(
    model: WanModel, encoder: TextEncoder, clips: Clips, config: PairsConfig, folder: Path
) -> Iterator[int]:
    """Make the missing shards in `folder`; yields the number of excerpts so far."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    which, parts = config.part
    shards = range(0, config.num_excerpts, config.shard)[which::parts]
    for start in shards:
        path = folder / _shard_name(start)
        stop = min(start + config.shard, config.num_excerpts)
        if not path.exists():
            if config.minutes is not None and time.monotonic() - started > 60 * config.minutes:
                return
            rng = np.random.default_rng([config.seed, start])
            rows, others = rng.integers(len(clips.scenes), size=(2, stop - start)).tolist()
            excerpts = draw_excerpts(clips, rows, others, rng, config.excerpts)
            _write_shard(path, config, follow(model, encoder, excerpts, config, start))
        yield stop


@torch.no_grad()
def follow(
    model: WanModel, encoder: TextEncoder, excerpts: Excerpts, config: PairsConfig, seed: int
) -> Pairs:
    """The trajectories of some excerpts from freshly drawn noise."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + seed)
    noise = torch.randn(excerpts.targets.shape, generator=generator)
    prompts, empty = Prompts.read(model, encoder, excerpts), _empty(model, encoder, len(excerpts))
    past_of = pasts(model, excerpts, prompts, config.excerpts, generator)
    prompt_of = (prompts.first, prompts.first, prompts.later)
    levels = (sampling_timesteps(config.sampler) / NUM_TRAIN_TIMESTEPS).tolist()
    clean, points = [], []
    for start, prompt, past in zip(noise, prompt_of, past_of, strict=True):
        end, passed = integrate(model, start, prompt, empty, config.euler, past, levels)
        clean.append(end)
        points.append(torch.stack(passed))
    return Pairs(excerpts=excerpts, points=torch.stack(points, dim=1), clean=torch.stack(clean))


LATENTS = ("opening", "second", "before", "later")


def _shard_name(start: int) -> str:
    return f"pairs-{start:06}.safetensors"


def _write_shard(path: Path, config: PairsConfig, pairs: Pairs) -> None:
    excerpts = pairs.excerpts
    tensors = {name: getattr(excerpts, name).half() for name in LATENTS}
    tensors |= {"points": pairs.points.half(), "clean": pairs.clean.half()}
    tensors["recached"] = excerpts.recached
    note = {
        "prompts": excerpts.prompts,
        "later_prompts": excerpts.later_prompts,
        "config": asdict(config),
    }
    write_atomically(path, tensors, {"pairs": json.dumps(note)})


def read_pairs(folder: Path) -> Pairs:
    """Every shard of `folder`; ValueError where there is none."""
    paths = [path for _, path in numbered(folder, _shard_name)]
    if not paths:
        raise ValueError(
            f"{folder} holds no trajectories; run `python -m training.world ode` first"
        )
    shards, prompts, later_prompts = [], [], []
    for path in paths:
        file = read_weights(path)
        shards.append(file.tensors)
        note = parse_json(path, file.metadata["pairs"])
        prompts += note["prompts"]
        later_prompts += note["later_prompts"]
    joined = {name: torch.cat([shard[name] for shard in shards]) for name in (*LATENTS, "recached")}
    excerpts = Excerpts(**joined, prompts=prompts, later_prompts=later_prompts)
    return Pairs(
        excerpts=excerpts,
        points=torch.cat([shard["points"] for shard in shards], dim=2),
        clean=torch.cat([shard["clean"] for shard in shards], dim=1),
    )
