"""The teacher's ODE trajectories: what the causal student is first taught to reproduce.

The teacher's sampler walks from noise to a clean clip in small Euler steps; both ends are kept,
pairs for a regression (CausVid, arXiv 2412.07772, sec. 4.2). There are whole clips, and single
chunks: what a clip's first chunk shows hangs on the noise of all its frames, of which the student
sees only the first, so it learns how a video begins from clips that are no longer than a chunk.
Shards are functions of (seed, shard), so a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rf_core.config import NUM_TRAIN_TIMESTEPS
from rf_core.model import PromptContext, WanModel
from rf_core.scheduler import shift_sigma
from rf_core.text import TextEncoder

from .clips import captions, scene_of, write_atomically


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

    def sigmas(self) -> Tensor:
        """Noise levels from 1 to 0, [steps + 1] in float32."""
        plain = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
        return shift_sigma(plain, self.shift).float()


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """How many trajectories, and how they are made."""

    num_trajectories: int = 768
    """Trajectories at most."""
    minutes: float | None = None
    """Wall-clock minutes after which no further shard is begun; None for no limit."""
    euler: EulerConfig = field(default_factory=EulerConfig)
    """The teacher's sampler."""
    frames: int = 15
    """Latent frames of a trajectory."""
    shard: int = 32
    """Trajectories in a file, made together."""
    seed: int = 2
    """Trajectory i has the caption of scene (seed, i); its shard's noise is seeded alike."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Ends of trajectories."""

    noise: Tensor
    """Where they begin [N, C, F, h, w], float16."""
    clean: Tensor
    """The clips they lead to [N, C, F, h, w], float16."""
    captions: list[str]
    """What each shows, or should."""


@torch.no_grad()
def integrate(
    model: WanModel,
    noise: Tensor,
    prompt: PromptContext,
    unconditional: PromptContext | None,
    config: EulerConfig,
) -> Tensor:
    """Follow the teacher's flow from noise [B, C, F, h, w] to clean latents.

    With guidance other than 1, `unconditional` is the context of the empty prompt.
    """
    x, sigmas = noise, config.sigmas()
    for sigma, after in pairwise(sigmas):
        timestep = float(sigma) * NUM_TRAIN_TIMESTEPS
        timestep_BF = x.new_full((x.shape[0], x.shape[2]), timestep)
        flow = model(x, timestep_BF, prompt)
        if config.guidance != 1:
            assert unconditional is not None
            plain = model(x, timestep_BF, unconditional)
            flow = plain + config.guidance * (flow - plain)
        x = x + (after - sigma) * flow
    return x


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
    keep: Sequence[int] = (),
) -> tuple[Tensor, list[Tensor]]:
    prompt = model.prompt_context(encoder.encode(prompts))
    empty = None
    if config.guidance != 1:
        empty = model.prompt_context(encoder.encode([""] * len(prompts)))
    return integrate(model, noise, prompt, empty, config)


def write_pairs(
    model: WanModel, encoder: TextEncoder, config: PairsConfig, folder: Path
) -> Iterator[int]:
    """Make the missing shards in `folder`; yields the number of trajectories so far."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for start in range(0, config.num_trajectories, config.shard):
        path = folder / f"pairs-{start:06}.safetensors"
        stop = min(start + config.shard, config.num_trajectories)
        if not path.exists():
            if config.minutes is not None and time.monotonic() - started > 60 * config.minutes:
                return
            _write_shard(model, encoder, config, path, range(start, stop))
        yield stop


def _write_shard(
    model: WanModel, encoder: TextEncoder, config: PairsConfig, path: Path, indices: range
) -> None:
    prompts = captions([scene_of(config.seed, index) for index in indices])
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + indices.start)
    shape = (len(prompts), model.config.in_dim, config.frames, 8, 8)
    noise = torch.randn(shape, generator=generator)
    clean = _integrate_prompts(model, encoder, prompts, noise, config.euler)
    note = {"captions": prompts, "seed": config.seed, "euler": asdict(config.euler)}
    tensors = {"noise": noise.half(), "clean": clean.half()}
    write_atomically(path, tensors, {"pairs": json.dumps(note)})


def read_pairs(folder: Path) -> Pairs:
    """Every shard of `folder`; ValueError where there is none."""
    paths = sorted(folder.glob("pairs-*.safetensors"))
    if not paths:
        raise ValueError(
            f"{folder} holds no trajectories; run `python -m training.world ode` first"
        )
    tensors: dict[str, list[Tensor]] = {"noise": [], "clean": []}
    prompts: list[str] = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name, parts in tensors.items():
                parts.append(file.get_tensor(name))
            note = json.loads(file.metadata()["pairs"])
        prompts += note["captions"]
    noise, clean = torch.cat(tensors["noise"]), torch.cat(tensors["clean"])
    return Pairs(noise=noise, clean=clean, captions=prompts)
