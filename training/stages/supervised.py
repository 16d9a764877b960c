"""The training loop of the stages with given targets: updates, checkpoints, the run's folder.

In the folder: `config.json`, `log.jsonl`, `update_N` (checkpoints to resume from) and, at every
checkpoint, the averaged weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rf_core.config import SPATIAL_FACTOR
from rf_core.decoders.decoder import Decoder
from rf_core.model import WanModel
from rf_core.options import DEMO
from rf_core.ranges import MANY, check_folder_writable, check_numbers
from rf_core.weights.checkpoint import read_checkpoint

from ..data.clips import ClipSource, by_size
from ..data.held_out import split_clips
from ..run import checkpointing
from ..run.config import to_json
from ..run.distributed import (
    Stopped,
    fitting_micro_batch,
    local_micro_batches,
    process_group,
    rank,
    world_size,
)
from ..run.ema import AverageConfig, WeightAverage
from ..run.error_sums import ErrorSums
from ..run.folder import (
    Resumed,
    checkpoint_path,
    create_run_folder,
    delete_old_checkpoints,
    is_saved,
    name_last_checkpoint_on_error,
)
from ..run.journal import Journal
from ..run.machine import check_batches, check_machine, num_processes
from ..run.memory import costs
from ..run.networks import PlacementConfig, placement_dtype
from ..run.optimise import RATES, OptimiserConfig, TrainedNetwork
from ..run.options import format_numbers, print_rank_0, show_progress
from ..run.signals import StopRequest, stop_on_signal
from .validation import (
    Validation,
    held_out_loss,
    is_due,
    log_validation,
    open_decoder,
    show,
    validation_folder,
    was_validated,
)


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(AverageConfig):
    """Options of such a run; its average is as of Re-DMD."""

    recipe: ClassVar[str]
    """The command that runs it."""
    may_change: ClassVar = (
        *("updates", "micro_batch", "checkpoint_every", "keep", "tensorboard", "wandb", "vae"),
        *("validate_every", "validation_prompts"),
        *("placement", *(f"optimiser.{name}" for name in RATES)),
    )
    """Fields and groups of fields that may be others when a run is resumed."""
    optimiser: OptimiserConfig
    """Rates and their schedule."""
    updates: int = 3000
    """Optimiser steps."""
    batch: int = 64
    """Clips an update, over all processes and micro-batches; ours, as Re-DMD's total."""
    micro_batch: int = 1
    """Clips at a time."""
    ema_from: int | None = 200
    """See `AverageConfig`."""
    seed: int = 0
    """Of everything random."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """How the network is held."""
    checkpoint_every: int = 100
    """Updates between checkpoints."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    validate_every: int = 0
    """Updates between validations of the averaged network, each after a checkpoint of its own; 0
    for none."""
    validation_prompts: int = 4
    """Videos that a validation makes, of prompts of held-out clips or, without any, of others."""
    validation_clips: int = 0
    """Clips that are never trained on, on which a validation measures the loss."""
    vae: Path | None = None
    """Wan VAE or TAEHV of the clips' latents, for the videos; None for the bundled demo's."""
    tensorboard: bool = True
    """Whether TensorBoard's files are written, where it is installed."""
    wandb: str | None = None
    """Project of Weights & Biases; None for none."""

    def __post_init__(self) -> None:
        counts = ("updates", "batch", "micro_batch", "checkpoint_every", "keep")
        super().__post_init__()
        check_numbers(self, **dict.fromkeys(counts, (1, MANY)), seed=(0, 2**63 - 1))
        asked = ("validate_every", "validation_prompts", "validation_clips")
        check_numbers(self, **dict.fromkeys(asked, (0, MANY)))
        if self.validation_clips and not self.validate_every:
            raise ValueError(
                f"validation_clips is {self.validation_clips} and validate_every is 0, so that "
                "nothing would measure them; give validate_every"
            )

    @property
    def batches(self) -> set[int]:
        """Batch sizes of all updates."""
        return {self.batch}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an update did."""

    update: int
    loss: float
    """Mean squared error over everything."""
    norm: float
    """Of the gradients that are clipped, before that."""
    losses: Mapping[str, float]
    """Mean loss by name: of kinds of chunk, or of timesteps."""

    def numbers(self) -> dict[str, float]:
        """As flat names and numbers."""
        each = {f"loss/{name}": value for name, value in self.losses.items()}
        return {"loss": self.loss, "norm": self.norm, **each}


class SupervisedTrainer(ABC):
    """A network with all that a run changes."""

    command: str
    """The command that makes its file, for provenance."""
    file: str
    """The averaged weights' name in the run's folder."""
    device: torch.device

    def __init__(
        self, config: SupervisedConfig, network: WanModel, names: Sequence[str], clips: ClipSource
    ) -> None:
        """`network` is placed and sharded already; losses are logged under `names`."""
        self.config, self.network, self.names, self.clips = config, network, names, len(clips)
        self._captioned = clips
        self.split = split_clips(clips, config.validation_clips)
        self.held_out = [held for (held,) in by_size(clips, (self.split.held_out,))]
        """Held-out rows of each size."""
        self.dtype = placement_dtype(config.placement)
        self.average = WeightAverage(network)
        self.trained = TrainedNetwork(network, config.optimiser)
        self.update = 0

    @abstractmethod
    def errors(self, samples: range) -> tuple[Tensor, Tensor]:
        """Errors of some samples of the update, [B, N], and the index of each in `names`."""

    @abstractmethod
    def held_out_errors(self, held: Sequence[int], samples: range) -> tuple[Tensor, Tensor]:
        """The same of some of the clips `held`, with draws that are the same at every call.

        They are held out, all of one size; samples number them in an order that is drawn.
        """

    def captions(self, rows: Sequence[int]) -> tuple[list[str], Tensor]:
        """Prompts of some clips, as texts and encoded [N, S, D]."""
        return self._captioned.captions(rows, rows)

    @abstractmethod
    def video(self, embeds: Tensor, decoder: Decoder | None, seed: int) -> Tensor | None:
        """A video [T, 3, H, W] in [0, 1] of a prompt [1, S, D], on all processes together; the one
        with the decoder has it."""

    @abstractmethod
    def write(self, path: Path, note: Mapping[str, Any]) -> None:
        """Write the network, as it is, with a note of how it was made."""

    @abstractmethod
    def origin(self) -> dict[str, Any]:
        """Provenance: the files it is made from, as plain JSON."""

    def batch(self) -> int:
        """Samples of the update."""
        return self.config.batch

    def step(self, stop: StopRequest | None = None) -> Report:
        """One update, and the average.

        Raises:
            FloatingPointError: something is not finite.
            Stopped: as `stop` asked for, between two micro-batches; the update is not begun then.
        """
        c = self.config
        loss, losses = self._gradients(stop).means()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss:.4g} at update {self.update}; lower optimiser.rate"
            )
        try:
            norm = self.trained.step(c.optimiser.rate_factor(self.update, c.updates))
        except FloatingPointError:
            raise FloatingPointError(
                f"the gradients are not finite at update {self.update}; lower optimiser.rate"
            ) from None
        self.average.update(c.decay(self.update, self.batch()))
        self.update += 1
        return Report(update=self.update - 1, loss=loss, norm=norm, losses=losses)

    def averaged(self) -> AbstractContextManager[None]:
        """Within it, the network has its averaged weights."""
        return self.average.applied()

    def save(self, folder: Path) -> None:
        """Write a checkpoint; `folder` is complete once it exists.

        FloatingPointError, and nothing is written, where weights are not finite.
        """
        if not self.trained.is_finite():
            raise FloatingPointError(
                f"the weights are not finite after update {self.update}; lower optimiser.rate"
            )
        checkpointing.save(self._state(), folder)

    def load(self, folder: Path) -> None:
        """Resume from what `save` has written, on any number of processes.

        ValueError where the number of clips differs: their order would be different.
        """
        state = self._state()
        checkpointing.load(state, folder)
        if int(state["clips"]) != self.clips:
            raise ValueError(
                f"{folder} was trained on {int(state['clips'])} clips; there are {self.clips} now: "
                "give it the same, or start a new run"
            )
        self.trained.load(state["student"])
        self.update = int(state["update"])

    def _state(self) -> dict[str, Any]:
        return {
            "average": self.average.tensors,
            "update": torch.tensor(self.update),
            "clips": torch.tensor(self.clips),
            "student": self.trained.state(),  # whatever is trained: the name of saved runs
        }

    def validate(self, decoder: Decoder | None, out: Path) -> Validation:
        """What the averaged network makes of held-out clips and of prompts, on all processes."""
        c = self.config
        rows = self.split.shown(c.validation_prompts)
        with self.averaged(), torch.no_grad():
            loss = {}
            if self.held_out:
                parts = self.held_out
                loss = held_out_loss(self.held_out_errors, self.names, parts, c.micro_batch)
            if not rows:
                return Validation(numbers=loss)
            prompts, embeds = self.captions(rows)

            def make(number: int) -> Tensor | None:
                return self.video(embeds[number : number + 1].to(self.device), decoder, number)

            found = show(prompts, validation_folder(out, self.update), make)
        return Validation(numbers={**loss, **found.numbers}, videos=found.videos)

    def _gradients(self, stop: StopRequest | None) -> ErrorSums:
        """Accumulates an update's gradients; the errors of this process."""
        batch = self.batch()
        sums, c = ErrorSums(self.names), self.config
        for samples in micro_batches(batch, c.micro_batch, c.placement.sequence_over):
            if stop is not None and stop.agreed():
                self.trained.clear()
                raise Stopped(stop.number)
            errors, which = self.errors(samples)
            # FSDP averages over processes, where losses are shares of a sum; processes that share
            # a sample's tokens have the same loss, and each its part of the gradient.
            share = errors.mean(dim=1).sum() / batch * world_size()
            share.backward()
            sums.add(errors, which)
        return sums


def micro_batches(batch: int, micro_batch: int, sequence_over: int | None = None) -> list[range]:
    """This process's samples, `micro_batch` at a time or all where there are fewer."""
    fitting = fitting_micro_batch(batch, micro_batch, world_size(), sequence_over)
    return local_micro_batches(batch, fitting, sequence_over)


def video_size(latents: Sequence[int]) -> tuple[int, int]:
    """Height and width of the videos of latents [..., h, w]."""
    *_, rows, columns = latents
    return rows * SPATIAL_FACTOR, columns * SPATIAL_FACTOR


def train(trainer: SupervisedTrainer, out: Path, resumed: Resumed | None) -> Iterator[Report]:
    """Train in the folder `out`, from a checkpoint if one is given; yields a report an update.

    Raises:
        FloatingPointError: the run broke down; the last good checkpoint is named.
        Stopped: a signal asked for it; the run is saved.
    """
    config, clock = trainer.config, time.monotonic()
    decoder = None
    if config.validate_every and config.validation_prompts:
        decoder = open_decoder(vae_path(config), trainer.device, trainer.dtype)
    if resumed is not None:
        trainer.load(resumed.checkpoint)
    create_run_folder(config, out)
    origin = trainer.origin() if rank() == 0 else {}  # every byte is read: once, by who writes
    with (
        Journal(
            out,
            first_update=trainer.update,
            tensorboard=config.tensorboard,
            wandb=config.wandb,
            config=config,
        ) as journal,
        stop_on_signal() as stop,
    ):
        if resumed is not None:
            journal.write_changes(trainer.update, resumed.changes)
            done = was_validated(out, trainer.update)
            if _validation_is_due(trainer) and not done:  # it broke off, or failed
                log_validation(journal, trainer.update, trainer.validate(decoder, out))
        while trainer.update < config.updates:
            began = time.perf_counter()
            try:
                with name_last_checkpoint_on_error(out, trainer.update):
                    report = trainer.step(stop)
            except Stopped as stopped:
                if not is_saved(out, trainer.update):
                    _checkpoint(trainer, journal, out, clock, origin)
                raise stopped.saved(out, trainer.update) from None
            journal.write(report.update, report.numbers() | costs(began, trainer.device))
            validates = _validation_is_due(trainer)
            last = trainer.update == config.updates
            if trainer.update % config.checkpoint_every == 0 or last or validates:
                with name_last_checkpoint_on_error(out, trainer.update):
                    _checkpoint(trainer, journal, out, clock, origin)
            if validates:
                log_validation(journal, trainer.update, trainer.validate(decoder, out))
            yield report


def check_validation(config: SupervisedConfig, clips: ClipSource) -> None:
    """ValueError where the VAE is not there, or is another than the clips can be of, or where
    holding out leaves nothing to train on."""
    split_clips(clips, config.validation_clips)
    if not (config.validate_every and config.validation_prompts):
        return
    path, sizes = vae_path(config), [video_size(size) for size in clips.buckets]
    if config.vae is None and read_checkpoint(DEMO / "teacher.safetensors").size not in sizes:
        found = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise ValueError(
            f"vae is not given, and {path} is of another world than clips of {found}; "
            "name the VAE that encoded them, or set validation_prompts to 0"
        )


def vae_path(config: SupervisedConfig) -> Path:
    """The file of the decoder of validation's videos; ValueError where it does not exist."""
    path = config.vae or DEMO / "vae.safetensors"
    if not path.exists():
        raise ValueError(
            f"vae is {path}, which is not there; validation's videos need it: name it, or set "
            "validation_prompts or validate_every to 0"
        )
    return path


def _validation_is_due(trainer: SupervisedTrainer) -> bool:
    c = trainer.config
    asked = bool(c.validation_prompts or c.validation_clips)
    return asked and is_due(c.validate_every, trainer.update, c.updates)


def _checkpoint(
    trainer: SupervisedTrainer, journal: Journal, out: Path, clock: float, origin: Mapping[str, Any]
) -> None:
    folder = checkpoint_path(out, trainer.update)
    trainer.save(folder)
    journal.write_checkpoint(trainer.update - 1, folder)
    note = {
        "command": trainer.command,
        "config": json.loads(to_json(trainer.config)),
        "updates": trainer.update,
        "processes": world_size(),
        "torch": str(torch.__version__),
        **origin,
        "minutes_since_start_or_resume": round((time.monotonic() - clock) / 60, 2),
    }
    with trainer.averaged():
        trainer.write(out / trainer.file, note)
    delete_old_checkpoints(out, trainer.config.keep)


def run_stage(
    args: argparse.Namespace,
    config: SupervisedConfig,
    start: Callable[[torch.device], Iterator[Report]],
    file: str,
    notes: Callable[[], Sequence[str]] = tuple,
) -> int:
    """Run a stage on all processes, with a progress bar; `start` begins it on a device.

    `notes` gives lines to print before, once the machine is found fit.
    """
    check_machine(config.placement, config.wandb)
    over = config.placement.sequence_over
    check_batches(config.batches, config.micro_batch, num_processes(), over)
    check_folder_writable(args.out)
    lines = [to_json(config), *notes()]
    with process_group(args.device) as device:
        print_rank_0("\n".join(lines))
        steps = ((each.update + 1, _line(each)) for each in start(device))
        show_progress(config.updates, "update", steps)
        print_rank_0(f"{args.out}: the averaged weights are in {file}")
    return 0


def _line(report: Report) -> str:
    return f"{report.update}: {format_numbers(report.numbers())}"
