"""Training a VACE: control that is learnt beside a network that stays as it is.

The base is frozen. A VACE (arXiv 2503.07598, sec. 3.3, "context adapter tuning") reads the control
context of a clip and adds hints to the base's blocks; it begins with copies of those blocks, and
with hints of zero. The loss is flow matching on true clips. The base is the bidirectional one, as
of the published VACE; the students that were made of it take its hints as it does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from rf_core.config import NUM_TRAIN_TIMESTEPS, ModelConfig, VaceConfig
from rf_core.decoders.decoder import Decoder
from rf_core.model import pad_prompt
from rf_core.options import DEMO
from rf_core.ranges import MANY, MAX_LAYERS, MAX_STEPS, check_numbers
from rf_core.scheduler import add_noise, shift_sigma
from rf_core.weights.checkpoint import read_checkpoint

from ..choices import CLIPS, open_controlled
from ..data.clips import ClipSource, Groups, draw_bucket, draw_clip, draw_seeds
from ..data.controls import ControlContexts, read_controls
from ..data.embeddings import open_negative
from ..data.held_out import groups_among
from ..data.pairs import PairsConfig
from ..data.prompts import DataConfig, check_no_prompt_files
from ..objective.causal import chunk_errors
from ..objective.tensors import Tensors
from ..run.controlled import TrainedControl, UnderControl, open_control
from ..run.draws import seeded_generator
from ..run.folder import CONTROL, checkpoint_to_resume
from ..run.networks import PlacementConfig, placement_dtype
from ..run.optimise import OptimiserConfig
from ..run.options import add_config_arguments, add_run_arguments, config_from_args
from .export import file_hash, write_control
from .supervised import (
    Report,
    SupervisedConfig,
    SupervisedTrainer,
    check_validation,
    micro_batches,
    run_stage,
    train,
)
from .teacher import miniature_teacher
from .trajectories import sample_trajectories
from .validation import decoded

_ROLE = "control"
CONTROLS = CLIPS.parent / "controls"
"""The folder that `python -m training.world controls` writes."""


@dataclass(frozen=True, kw_only=True)
class ControlRunConfig(SupervisedConfig):
    """The training of a VACE. Nothing here is published: the numbers are ours."""

    recipe = "control"
    may_change = (
        *SupervisedConfig.may_change,
        *("validation_steps", "validation_shift", "validation_guidance"),
    )

    source: Path = CLIPS
    """Folder of clips: the miniature world's, or encoded videos of `latents`."""
    controls: Path = CONTROLS
    """Folder of their control contexts, one or more of each clip, drawn in turn."""
    colours_alone: float = 0.5
    """Share of the miniature world's captions that name colours and leave the rest to the control;
    other clips have one caption."""
    frames: int | None = None
    """Latent frames of a clip that are trained on, from its first; null for all."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text encoder, and what stands for no prompt: `negative`."""
    base: Path | None = None
    """The bidirectional network that is controlled and stays as it is; None for the bundled demo's
    teacher."""
    layers: tuple[int, ...] = (0, 2, 4)
    """The base's blocks that are given hints, of which the first is the base's first; published:
    every second one."""
    shift: float = 5.0
    """Flow shift of the training timesteps."""
    prompt_dropout: float = 0.1
    """Share of prompts replaced by the one that stands for none, for guidance."""
    validation_steps: int = PairsConfig.steps
    """Euler steps of validation's clips; these and the next two as of `ode_pairs`."""
    validation_shift: float = PairsConfig.shift
    """Flow shift of their grid."""
    validation_guidance: float = PairsConfig.guidance
    """Their classifier-free guidance; 1 for none."""
    optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig(rate=5e-5, betas=(0.9, 0.999), clip_norm=1.0)
    )
    """Rates and their schedule."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, shift=(0.01, 1000.0), prompt_dropout=(0, 1), colours_alone=(0, 1))
        check_numbers(self, validation_steps=(1, MAX_STEPS), validation_shift=(0.01, 1000.0))
        check_numbers(self, validation_guidance=(1, 1000.0), frames=(1, MANY))
        VaceConfig(layers=self.layers)  # refuses what are no layers
        if self.layers[-1] >= MAX_LAYERS:
            raise ValueError(
                f"layers end with {self.layers[-1]}; no network has more than {MAX_LAYERS} blocks"
            )
        if self.placement.sequence_over not in (None, 1):
            raise ValueError(
                f"placement.sequence_over is {self.placement.sequence_over}; control's tokens are "
                "not shared out: leave it null, and share weights out (placement.shard_over)"
            )


def miniature_control() -> ControlRunConfig:
    """The bundled demo's control, from its teacher: in minutes on a laptop."""
    return ControlRunConfig(
        frames=9,
        shift=12.0,
        optimiser=replace(miniature_teacher().optimiser, warmup=50),
        updates=600,
        batch=16,
        micro_batch=16,
        ema=0.99,
        ema_from=None,
        validate_every=200,
        validation_steps=14,
        validation_shift=12.0,
        validation_guidance=2.0,
    )


def wan_control() -> ControlRunConfig:
    """A VACE of Wan 2.1 1.3B; change the files to where yours are."""
    return ControlRunConfig(
        source=Path("runs/latents"),
        controls=Path("runs/controls"),
        base=Path("models/wan2.1_t2v_1.3B.safetensors"),
        layers=tuple(range(0, 30, 2)),
        data=DataConfig(text_encoder="google/umt5-xxl"),
        placement=PlacementConfig(dtype="bfloat16", checkpointing=True),
    )


CONTROL_PRESETS: Mapping[str, Callable[[], ControlRunConfig]] = MappingProxyType(
    {"miniature": miniature_control, "wan": wan_control}
)


@dataclass(frozen=True, kw_only=True)
class ControlBatch(Tensors):
    """B clips with what controls them."""

    latents: Tensor
    """Clean, [B, C, F, h, w]."""
    noise: Tensor
    """The same shape."""
    timestep_B: Tensor
    """Timestep of each clip, [B]."""
    dropped_B: Tensor
    """Whether its prompt is dropped, bool [B]."""
    embeds: Tensor
    """Prompts, [B, S, D]."""
    context: Tensor
    """Control contexts, [B, 2 C + 64, F, h, w]."""


def draw_batch(
    source: ClipSource,
    contexts: ControlContexts,
    config: ControlRunConfig,
    update: int,
    samples: Sequence[int],
    among: Groups,
) -> ControlBatch:
    """Some samples of an update, of clips `among` those groups: a function of the seed, on whatever
    process."""
    c = config
    groups = draw_bucket(source, among, c.seed, _ROLE, update)
    rows = [draw_clip(groups, c.seed, _ROLE, update * c.batch + each) for each in samples]

    def generators(what: str) -> list[torch.Generator]:
        return [seeded_generator(c.seed, _ROLE, update, each, what) for each in samples]

    latents, drawn = source.latents(rows)[:, :, : c.frames], generators("noise")
    _, embeds = source.captions(rows, draw_seeds(generators("caption")))
    noise = torch.stack([torch.randn(latents.shape[1:], generator=each) for each in drawn])
    within, dropped = torch.stack([torch.rand(2, generator=each) for each in drawn], dim=1)
    # One draw in each of as many equal parts as there are samples: an update covers the range.
    strata = torch.randperm(c.batch, generator=seeded_generator(c.seed, _ROLE, update, "strata"))
    uniform = (strata[list(samples)] + within) / c.batch
    return ControlBatch(
        latents=latents,
        noise=noise,
        timestep_B=shift_sigma(uniform, c.shift) * NUM_TRAIN_TIMESTEPS,
        dropped_B=dropped < c.prompt_dropout,
        embeds=embeds,
        context=contexts.of(rows, generators("context"))[:, :, : c.frames],
    )


def control_errors(
    network: TrainedControl,
    batch: ControlBatch,
    uncond: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Mean squared error of the controlled flow of every clip, [B, 1] (Lipman et al. 2022).

    `uncond` is [1, S, D]; `dtype` is what the network computes in.
    """
    dtype, frames = dtype or torch.float32, batch.latents.shape[2]
    timestep_BF = batch.timestep_B[:, None].expand(-1, frames)
    noisy = add_noise(batch.latents, batch.noise, timestep_BF)
    embeds = torch.where(
        batch.dropped_B[:, None, None],
        pad_prompt(uncond, network.config),
        pad_prompt(batch.embeds, network.config),
    )
    prompt = network.prompt_context(embeds.to(dtype))
    flow = network(noisy.to(dtype), timestep_BF, prompt, batch.context.to(dtype)).float()
    return chunk_errors(flow, batch.noise - batch.latents, frames)


class ControlTrainer(SupervisedTrainer):
    """The VACE beside its base, with the state of its training."""

    config: ControlRunConfig
    network: TrainedControl
    command, file = "python -m training control", CONTROL

    def __init__(
        self,
        config: ControlRunConfig,
        network: TrainedControl,
        source: ClipSource,
        contexts: ControlContexts,
        uncond: Tensor,
        device: torch.device,
    ) -> None:
        """`network` is placed and sharded already; `uncond` is [1, S, D]."""
        super().__init__(config, network, ("whole",), source)
        self.source, self.contexts = source, contexts
        self.uncond, self.device = uncond.to(device), device
        self.groups = groups_among(source.groups, self.split)
        micro_batches(config.batch, config.micro_batch)  # refuses what cannot be shared out

    def errors(self, samples: range) -> tuple[Tensor, Tensor]:
        """See `SupervisedTrainer`: of whole clips."""
        return self._errors(self.config, self.update, samples, self.groups)

    def held_out_errors(self, held: Sequence[int], samples: range) -> tuple[Tensor, Tensor]:
        """See `SupervisedTrainer`."""
        fixed = replace(self.config, batch=len(held), seed=0)
        return self._errors(fixed, 0, samples, (held,))

    def video(self, embeds: Tensor, decoder: Decoder | None, seed: int) -> Tensor | None:
        """See `SupervisedTrainer`: a whole clip under a control of the clip of that prompt."""
        c, drawn = self.config, seeded_generator("validation", seed)
        row = self.split.shown(c.validation_prompts)[seed]
        context = self.contexts.of([row], [drawn]).to(self.device, self.dtype)
        shape = 1, self.source.shape[0], *context.shape[2:]
        noise = torch.randn(shape, generator=drawn).to(self.device)
        steps = PairsConfig(
            steps=c.validation_steps, shift=c.validation_shift, guidance=c.validation_guidance
        )
        controlled = UnderControl(self.network, context)
        _, clip = sample_trajectories(controlled, noise, embeds, self.uncond, steps, self.dtype)
        return decoded(clip, decoder)

    def _errors(
        self, config: ControlRunConfig, update: int, samples: range, groups: Groups
    ) -> tuple[Tensor, Tensor]:
        batch = draw_batch(self.source, self.contexts, config, update, samples, groups)
        errors = control_errors(self.network, batch.to(self.device), self.uncond, self.dtype)
        return errors, torch.zeros_like(errors, dtype=torch.long)

    def write(self, path: Path, note: Mapping[str, Any]) -> None:
        """See `SupervisedTrainer`: the VACE alone."""
        write_control(path, self.network, note)

    def origin(self) -> dict[str, Any]:
        """See `SupervisedTrainer`."""
        return {"made_from": {"base": file_hash(base_path(self.config))}, "clips": len(self.source)}


def train_control(
    config: ControlRunConfig, out: Path, device: torch.device, *, resume: bool = False
) -> Iterator[Report]:
    """Train a VACE, yielding a report an update.

    ValueError, before any weight is read, where a file is missing, where clips and controls do not
    fit each other or the base, or where `out` holds another run; FloatingPointError, with the last
    good checkpoint named, where the run breaks down.
    """
    path = base_path(config)
    check_no_prompt_files(config.data)
    size = read_checkpoint(path).config
    check_layers(config, size)
    source = open_controlled(config.source, config.data, device, config.colours_alone)
    contexts = read_controls(config.controls, source)
    if source.shape[0] != size.in_dim:
        raise ValueError(
            f"{config.source} holds latents of {source.shape[0]} channels; base is {path}, which "
            f"reads {size.in_dim}: give it clips of its own VAE"
        )
    check_validation(config, source)
    resumed = checkpoint_to_resume(config, out, resume)
    uncond = open_negative(
        config.data, out / "embeddings", device, placement_dtype(config.placement)
    )
    vace = VaceConfig(layers=config.layers, in_channels=contexts.shape[0])
    network = open_control(path, vace, config.placement, device, seed=config.seed)
    yield from train(
        ControlTrainer(config, network, source, contexts, uncond, device), out, resumed
    )


def base_path(config: ControlRunConfig) -> Path:
    """The file of the base; ValueError where it does not exist."""
    path = config.base or DEMO / "teacher.safetensors"
    if not path.exists():
        raise ValueError(f"base is {path}, which is not there")
    return path


def check_layers(config: ControlRunConfig, size: ModelConfig) -> None:
    """ValueError for hints to blocks that the base does not have."""
    if config.layers[-1] >= size.num_layers:
        raise ValueError(
            f"layers are {list(config.layers)}, and the base has {size.num_layers} blocks, "
            "numbered from 0; hints go behind those alone"
        )


def add_control_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `control`."""
    add_run_arguments(parser)
    add_config_arguments(parser, CONTROL_PRESETS)


def run_control(args: argparse.Namespace) -> int:
    """Train a VACE beside a frozen network."""
    config = config_from_args(args, ControlRunConfig, CONTROL_PRESETS)
    return run_stage(
        args,
        config,
        lambda device: train_control(config, args.out, device, resume=args.resume),
        CONTROL,
    )
