"""Regression on the teacher's trajectories: what makes a causal few-step student of a network.

Each chunk of a clip is shown where its trajectory passes one of the student's timesteps, drawn for
every chunk by itself, through the window a stream would have, and the student is asked where the
trajectory ends (CausVid, arXiv 2412.07772, sec. 4.2; Self Forcing, arXiv 2506.08009; Reward
Forcing, arXiv 2512.04678, starts from such a student). The published code sees the whole past under
a causal mask; window, sink and evictions are ours, and with a window as long as the clip the two
are the same.

In the run's folder: `config.json`, `log.jsonl`, `update_N` (checkpoints to go on from) and, at
every checkpoint, `student.safetensors`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from rf_core.attention import Attention, sdpa
from rf_core.config import SPATIAL_FACTOR, CacheConfig
from rf_core.model import WanModel
from rf_core.options import DEMO
from rf_core.ranges import MANY, check_folder_writable, check_numbers
from rf_core.scheduler import sampling_timesteps

from ..objective.causal import chunk_errors, predict_clip
from ..run import checkpointing
from ..run.config import to_json
from ..run.distributed import (
    gathered,
    my_samples,
    processes,
    rank,
    world_size,
)
from ..run.draws import generator_of, prompt_numbers
from ..run.ema import WeightAverage
from ..run.folder import (
    STUDENT,
    begin,
    checkpoint_path,
    forget_old,
    naming_the_last_good,
    to_go_on_from,
)
from ..run.journal import Journal
from ..run.networks import PlacementConfig, open_network, placement_dtype
from ..run.optimise import OptimiserConfig, Trained
from ..run.options import add_config_arguments, config_of
from .export import file_hash, write_student
from .trajectories import Pairs


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """The regression; its timesteps are those the trajectories are kept at."""

    pairs: Path = Path("pairs")
    """Folder of `ode_pairs`."""
    start: Path | None = None
    """What the student begins as, best the teacher itself; None for the bundled demo's teacher."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Window and sink a chunk sees its past through. Published: a window as long as the clip; by
    default the one the student will stream with, which is ours."""
    context: Literal["noisy", "clean"] = "noisy"
    """Where the past's keys and values come from: `noisy`, the same pass, each chunk at its own
    noise level (published); `clean`, passes at timestep 0 over the trajectories' ends, as a stream
    leaves them (teacher forcing), which take twice the time."""
    optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig(rate=2e-6, betas=(0.9, 0.999))
    )
    """Rate and betas are CausVid's for this stage; weight decay and clipping are as in Re-DMD."""
    updates: int = 3000
    """Optimiser steps (CausVid's released init has as many)."""
    batch: int = 64
    """Clips an update, over all processes and micro-batches; ours, as Re-DMD's total."""
    micro_batch: int = 1
    """Clips at a time."""
    ema: float = 0.99
    """Decay of the averaged weights, an update; this and the next as in Re-DMD."""
    ema_from: int = 200
    """Update at which averaging begins; until then the average is the student itself."""
    seed: int = 0
    """Of the clips' order and the timesteps."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """How the student is held."""
    checkpoint_every: int = 100
    """Updates between checkpoints."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    tensorboard: bool = True
    """Whether TensorBoard's files are written, where it is installed."""
    wandb: str | None = None
    """Project of Weights & Biases; None for none."""

    def __post_init__(self) -> None:
        counts = (self.updates, self.batch, self.micro_batch, self.checkpoint_every, self.keep)
        if min(counts) < 1:
            raise ValueError(
                f"updates, batch, micro_batch, checkpoint_every and keep are {counts}; "
                "each must be 1 or more"
            )
        check_numbers(self, seed=(0, 2**63 - 1), ema_from=(0, MANY))
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; give a decay in [0, 1)")


def miniature_init() -> InitConfig:
    """The bundled demo's teacher as a student, in minutes on a laptop."""
    return InitConfig(
        cache=CacheConfig(accumulator="float32"),
        optimiser=OptimiserConfig(rate=1.5e-3, betas=(0.9, 0.999), clip_norm=1.0),
        updates=300,
        batch=16,
        micro_batch=16,
        ema_from=50,
        checkpoint_every=50,
    )


def wan_init() -> InitConfig:
    """Wan 2.1 1.3B; change the files to where yours are."""
    return InitConfig(
        start=Path("models/wan2.1_t2v_1.3B.safetensors"),
        placement=PlacementConfig(dtype="bfloat16", checkpointing=True),
    )


INIT_PRESETS: Mapping[str, Callable[[], InitConfig]] = MappingProxyType(
    {"miniature": miniature_init, "wan": wan_init}
)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B clips, each of their N chunks at a timestep of its own."""

    noisy: Tensor
    """Where the chunks' trajectories are, [B, C, F, h, w]."""
    step_BN: Tensor
    """Which of the student's timesteps that is, from 0."""
    clean: Tensor
    """Where they end, [B, C, F, h, w]."""
    embeds: Tensor
    """Prompts, [B, S, D]."""

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class InitReport:
    """What an update did."""

    update: int
    loss: float
    """Mean squared error of the clean latents, over all chunks."""
    norm: float
    """Of the gradients, before clipping."""
    step_losses: Mapping[str, float]
    """The loss of the chunks at each of the student's timesteps that was drawn."""

    def numbers(self) -> dict[str, float]:
        """As flat names and numbers."""
        each = {f"loss/t{name}": value for name, value in self.step_losses.items()}
        return {"loss": self.loss, "norm": self.norm, **each}


def draw_steps(
    seed: int, update: int, samples: Sequence[int], chunks: int, num_steps: int
) -> Tensor:
    """Which timestep each chunk of those samples is shown at, [B, N]: uniform, as published."""
    drawn = [
        torch.randint(
            num_steps, (chunks,), generator=generator_of(seed, "ode_init", update, sample)
        )
        for sample in samples
    ]
    return torch.stack(drawn)


def draw_batch(pairs: Pairs, config: InitConfig, update: int, samples: Sequence[int]) -> Batch:
    """Those samples of an update: a function of the seed, whoever asks; latents in float32."""
    clips = prompt_numbers(config.seed, "generator", update, samples, config.batch, len(pairs))
    found = pairs.rows(clips)
    size, (num_steps, *_) = config.cache.chunk_frames, found.points.shape[1:]
    steps = draw_steps(config.seed, update, samples, found.clean.shape[2] // size, num_steps)
    return Batch(
        noisy=at_steps(found.points, steps, size).float(),
        step_BN=steps,
        clean=found.clean.float(),
        embeds=found.embeds,
    )


def at_steps(points: Tensor, step_BN: Tensor, chunk_frames: int) -> Tensor:
    """Every chunk at its own point of the trajectory: [B, K, C, F, h, w] to [B, C, F, h, w]."""
    step_BF = step_BN.repeat_interleave(chunk_frames, dim=1)
    index = step_BF[:, None, None, :, None, None].expand(-1, 1, *points.shape[2:])
    return points.gather(1, index)[:, 0]


def regression_errors(
    student: WanModel,
    batch: Batch,
    timesteps: Tensor,
    config: InitConfig,
    *,
    attention: Attention = sdpa,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Mean squared error of every chunk's predicted clean latents, [B, N].

    `timesteps` are the student's, [K]; `dtype` is what it computes in.
    """
    dtype = dtype or student.patch_embedding.weight.dtype
    timestep_BN = timesteps.to(batch.noisy)[batch.step_BN]
    x0 = predict_clip(
        student,
        batch.noisy,
        timestep_BN.repeat_interleave(config.cache.chunk_frames, dim=1),
        student.prompt_context(batch.embeds.to(dtype)),
        config.cache,
        clean=batch.clean if config.context == "clean" else None,
        attention=attention,
        dtype=dtype,
    )
    return chunk_errors(x0, batch.clean, config.cache.chunk_frames)


class InitTrainer:
    """The student with all that the regression changes."""

    def __init__(
        self, config: InitConfig, student: WanModel, pairs: Pairs, device: torch.device
    ) -> None:
        """`student` is placed and sharded already. ValueError for clips of no whole chunks."""
        _, frames, *_ = pairs.config.latents
        if frames % config.cache.chunk_frames:
            raise ValueError(
                f"the clips have {frames} latent frames; set cache.chunk_frames, now "
                f"{config.cache.chunk_frames}, to one of their divisors, or make other clips"
            )
        self.config, self.student, self.pairs, self.device = config, student, pairs, device
        self.dtype = placement_dtype(config.placement)
        self.micro_batches = my_samples(config.batch, config.micro_batch)
        self.timesteps = sampling_timesteps(pairs.config.sampler)
        self.average = WeightAverage(student)
        self.trained = Trained(student, config.optimiser)
        self.update = 0

    def step(self) -> InitReport:
        """One update, and the average. FloatingPointError where the loss is not finite."""
        c = self.config
        sums = self._gradients()
        loss = float(sums[0].sum() / sums[1].sum())
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss:.4g} at update {self.update}; lower optimiser.rate"
            )
        norm = self.trained.descend()
        self.update += 1
        self.average.follow(c.ema if self.update > c.ema_from else 0.0)
        each = zip(self.timesteps.tolist(), *sums.tolist(), strict=True)
        return InitReport(
            update=self.update - 1,
            loss=loss,
            norm=norm,
            step_losses={f"{t:.0f}": total / count for t, total, count in each if count},
        )

    def averaged(self) -> AbstractContextManager[None]:
        """Within it, the student has its averaged weights."""
        return self.average.applied()

    def save(self, folder: Path) -> None:
        """Write everything to go on from; `folder` is complete once it exists."""
        checkpointing.save(self._state(), folder)

    def load(self, folder: Path) -> None:
        """Go on from what `save` has written, on however many processes.

        ValueError where there were more or fewer trajectories: their order would be another one.
        """
        state = self._state()
        checkpointing.load(state, folder)
        if int(state["clips"]) != len(self.pairs):
            raise ValueError(
                f"{folder} was trained on {int(state['clips'])} trajectories; "
                f"{self.config.pairs} holds {len(self.pairs)}: give it the same, or begin anew"
            )
        self.trained.load(state["student"])
        self.update = int(state["update"])

    def _state(self) -> dict[str, Any]:
        return {
            "average": self.average.tensors,
            "update": torch.tensor(self.update),
            "clips": torch.tensor(len(self.pairs)),
            "student": self.trained.state(),
        }

    def _gradients(self) -> Tensor:
        """Accumulates an update's gradients; sums and counts of errors a timestep, [2, K]."""
        c, num_steps = self.config, len(self.timesteps)
        sums = torch.zeros(2, num_steps, dtype=torch.float64)
        for samples in self.micro_batches:
            batch = draw_batch(self.pairs, c, self.update, samples).to(self.device)
            errors = regression_errors(self.student, batch, self.timesteps, c, dtype=self.dtype)
            # FSDP averages over processes, where losses are shares of a sum.
            share = errors.mean(dim=1).sum() / c.batch * world_size()
            share.backward()
            found, step = errors.detach().double().cpu().flatten(), batch.step_BN.cpu().flatten()
            sums[0].index_add_(0, step, found)
            sums[1].index_add_(0, step, torch.ones_like(found))
        return gathered(sums[None]).sum(dim=0)


def init_student(
    config: InitConfig, out: Path, device: torch.device, *, resume: bool = False
) -> Iterator[InitReport]:
    """Run the regression, yielding a report an update.

    ValueError, before any weight is read, where a file is missing or `out` holds another run;
    FloatingPointError, with the last good checkpoint named, where the run breaks down.
    """
    start, pairs = start_path(config), Pairs.open(config.pairs)
    saved = to_go_on_from(config, out, resume)
    clock = time.monotonic()
    student = open_network(
        start,
        config.placement,
        device,
        trained=True,
        offload=config.placement.offload == "all",
    )
    trainer = InitTrainer(config, student, pairs, device)
    if saved is not None:
        trainer.load(saved)
    begin(config, out)
    origin = file_hash(start) if rank() == 0 else ""  # every byte is read: once, by who writes
    with Journal(
        out,
        first_update=trainer.update,
        tensorboard=config.tensorboard,
        wandb=config.wandb,
        config=config,
    ) as journal:
        while trainer.update < config.updates:
            yield _update(trainer, journal, out, clock, origin)


def start_path(config: InitConfig) -> Path:
    """What the student begins as; ValueError where it is not there."""
    path = config.start or DEMO / "teacher.safetensors"
    if not path.exists():
        raise ValueError(f"start is {path}, which is not there")
    return path


def provenance(config: InitConfig, pairs: Pairs, updates: int, start: str) -> dict[str, Any]:
    """How a student is made, as plain JSON; `start` is the hash of what it began as."""
    return {
        "command": "python -m training ode_init",
        "config": json.loads(to_json(config)),
        "updates": updates,
        "processes": world_size(),
        "torch": str(torch.__version__),
        "made_from": {"start": start},
        "pairs": {
            "trajectories": len(pairs),
            "teacher": pairs.teacher,
            "config": json.loads(to_json(pairs.config)),
        },
    }


def _update(
    trainer: InitTrainer, journal: Journal, out: Path, clock: float, start: str
) -> InitReport:
    began, config = time.perf_counter(), trainer.config
    with naming_the_last_good(out):
        report = trainer.step()
    journal.write(report.update, report.numbers() | {"seconds": time.perf_counter() - began})
    if trainer.update % config.checkpoint_every == 0 or trainer.update == config.updates:
        _checkpoint(trainer, out, clock, start)
    return report


def _checkpoint(trainer: InitTrainer, out: Path, clock: float, start: str) -> None:
    trainer.save(checkpoint_path(out, trainer.update))
    config, pairs = trainer.config, trainer.pairs
    *_, rows, columns = pairs.config.latents
    size = (rows * SPATIAL_FACTOR, columns * SPATIAL_FACTOR)
    note = provenance(config, pairs, trainer.update, start)
    note["minutes_since_start_or_resume"] = round((time.monotonic() - clock) / 60, 2)
    with trainer.averaged():
        write_student(
            out / STUDENT, trainer.student, config.cache, pairs.config.sampler, size, note
        )
    forget_old(out, config.keep)


def add_init_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ode_init`."""
    parser.add_argument("--pairs", type=Path, required=True, help="folder of ode_pairs")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    add_config_arguments(parser, INIT_PRESETS)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")


def run_init(args: argparse.Namespace) -> int:
    """Make a causal student of a network by regression on trajectories."""
    config = replace(config_of(args, InitConfig, INIT_PRESETS), pairs=args.pairs)
    check_folder_writable(args.out)
    with processes(args.device) as device:
        first = rank() == 0
        if first:
            print(to_json(config), flush=True)  # noqa: T201
        with tqdm(total=config.updates, unit="update", disable=not first) as bar:
            for report in init_student(config, args.out, device, resume=args.resume):
                bar.update(report.update + 1 - bar.n)
                told = (f"{name} {value:.4g}" for name, value in report.numbers().items())
                bar.write(f"{report.update}: {', '.join(told)}")
    if first:
        print(f"{args.out}: the averaged weights are in {STUDENT}")  # noqa: T201
    return 0
