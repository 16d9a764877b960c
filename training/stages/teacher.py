"""The teacher's training by flow matching: on whole clips, and on chunks with a clean past.

One network learns both to denoise whole clips, in which all frames see each other, as Wan does, and
to continue a stream chunk by chunk from a clean past, as the student will. The second is what makes
its trajectories learnable: in a whole clip the first chunk depends on the noise of all later ones,
which a causal student cannot see, so that its regression collapses to a mean (Causal Forcing, arXiv
2602.02214, argues this). A new network may train on openings alone at first, which cost least: the
VAE is causal, so the first frames of a clip are a clip too. A trained network can leave that out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from rf_core.config import NUM_TRAIN_TIMESTEPS, CacheConfig, ModelConfig
from rf_core.decoders.decoder import Decoder
from rf_core.model import PromptContext, WanModel
from rf_core.ranges import LARGEST_WINDOW, MANY, MAX_STEPS, check_numbers
from rf_core.scheduler import add_noise, shift_sigma
from rf_core.weights.checkpoint import read_checkpoint

from ..choices import CLIPS, open_clips
from ..data.clips import (
    ClipSource,
    Groups,
    check_excerpts,
    draw_augmented_excerpts,
    draw_bucket,
    draw_clip,
    draw_seeds,
)
from ..data.embeddings import open_negative
from ..data.held_out import groups_among
from ..data.pairs import PairsConfig
from ..data.prompts import DataConfig, check_no_prompt_files
from ..objective.causal import chunk_errors
from ..objective.excerpts import (
    KINDS,
    ExcerptConfig,
    ExcerptPrompts,
    Excerpts,
    excerpt_flow,
    past_kv,
    select_prompt,
)
from ..objective.tensors import Tensors
from ..run.draws import seeded_generator
from ..run.folder import TEACHER, checkpoint_to_resume
from ..run.networks import PlacementConfig, new_network, open_network, placement_dtype
from ..run.optimise import OptimiserConfig
from ..run.options import add_config_arguments, add_run_arguments, config_from_args
from ..run.sequence import check_sequence, check_sizes
from .export import file_hash, write_student
from .supervised import (
    Report,
    SupervisedConfig,
    SupervisedTrainer,
    check_validation,
    micro_batches,
    run_stage,
    train,
    video_size,
)
from .trajectories import sample_trajectories
from .validation import decoded

_ROLE = "teacher"
Kind = Literal["opening", "excerpt", "whole"]
"""What an update trains on: first chunks, chunks with their past, or whole clips."""
LOSS_NAMES = (*KINDS, "whole")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the run."""

    until: float
    """Share of the updates at which it ends; 1 for the last."""
    kinds: tuple[Kind, ...]
    """What the updates train on, in turn."""


CONTINUE = Phase(until=1.0, kinds=("excerpt", "excerpt", "whole"))


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(SupervisedConfig):
    """The teacher's training. Nothing here is published: the numbers are ours."""

    recipe = "teacher"
    may_change = (
        *SupervisedConfig.may_change,
        *("validation_steps", "validation_shift", "validation_guidance"),
    )

    source: Path = CLIPS
    """Folder of clips: the miniature world's, or whole clips of `ode_pairs`."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text encoder, and what stands for no prompt: `negative`."""
    start: Path | None = None
    """File of the initial weights; None for a new network."""
    model: ModelConfig | None = None
    """Sizes of the network; None for those of `start`."""
    phases: tuple[Phase, ...] = (CONTINUE,)
    """What updates train on over the run."""
    opening_batch: int = 64
    """Openings an update; `batch` is that of excerpts and of whole clips."""
    chunk_frames: int = CacheConfig.chunk_frames
    """Latent frames of a chunk, as of the student's cache."""
    excerpts: ExcerptConfig = field(default_factory=ExcerptConfig)
    """How excerpts are drawn and augmented."""
    balanced: bool = False
    """Whether kinds of clip come equally often, where the source tells them apart."""
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
        default_factory=lambda: OptimiserConfig(rate=1e-5, betas=(0.9, 0.999), clip_norm=1.0)
    )
    """Rates and their schedule."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, shift=(0.01, 1000.0), prompt_dropout=(0, 1))
        check_numbers(self, opening_batch=(1, MANY), chunk_frames=(1, LARGEST_WINDOW))
        check_numbers(self, validation_steps=(1, MAX_STEPS), validation_shift=(0.01, 1000.0))
        check_numbers(self, validation_guidance=(1, 1000.0))
        ends = [phase.until for phase in self.phases]
        if not ends or ends[-1] != 1 or ends != sorted(ends) or ends[0] <= 0:
            raise ValueError(f"phases end at {ends}; give shares that rise to 1")
        if not all(phase.kinds for phase in self.phases):
            raise ValueError("a phase has no kinds; name what its updates see")

    def kind_at(self, update: int) -> Kind:
        """What an update trains on."""
        phase = next(each for each in self.phases if update / self.updates < each.until)
        return phase.kinds[update % len(phase.kinds)]

    def batch_at(self, update: int) -> int:
        """Batch size of an update."""
        return self._batch_of(self.kind_at(update))

    @property
    def batches(self) -> set[int]:
        """Batch sizes of all updates."""
        return {self._batch_of(kind) for phase in self.phases for kind in phase.kinds}

    def _batch_of(self, kind: Kind) -> int:
        return self.opening_batch if kind == "opening" else self.batch


def miniature_teacher() -> TeacherConfig:
    """The bundled demo's teacher, from nothing: an hour on a laptop."""
    return TeacherConfig(
        model=ModelConfig(
            dim=160, ffn_dim=640, freq_dim=128, text_dim=64, text_len=96, num_heads=4, num_layers=5
        ),
        phases=(Phase(until=0.3, kinds=("opening",)), CONTINUE),
        balanced=True,
        optimiser=OptimiserConfig(
            rate=6e-3,
            betas=(0.9, 0.95),
            clip_norm=1.0,
            matrix_rate=1.5e-2,
            schedule="cosine",
            warmup=100,
        ),
        updates=2588,
        batch=16,
        micro_batch=64,
        ema=0.999,
        ema_from=None,
        validate_every=300,
        validation_steps=14,
        validation_shift=12.0,
        validation_guidance=2.0,
    )


def wan_teacher() -> TeacherConfig:
    """Wan 2.1 1.3B learns to continue from a clean past; change the files to where yours are.

    Its clips are its own, whole clips of `ode_pairs`, so that no video need be encoded.
    """
    return TeacherConfig(
        source=Path("runs/pairs"),
        start=Path("models/wan2.1_t2v_1.3B.safetensors"),
        data=DataConfig(text_encoder="google/umt5-xxl"),
        placement=PlacementConfig(dtype="bfloat16", checkpointing=True),
    )


TEACHER_PRESETS: Mapping[str, Callable[[], TeacherConfig]] = MappingProxyType(
    {"miniature": miniature_teacher, "wan": wan_teacher}
)


@dataclass(frozen=True, kw_only=True)
class TeacherBatch(Tensors):
    """B clips, each of their N parts at a timestep of its own: N is 3 for excerpts, or 1."""

    latents: Tensor
    """Clean, [B, C, F, h, w]."""
    noise: Tensor
    """The same shape."""
    timestep_BN: Tensor
    """Timestep of each part, [B, N]."""
    dropped_BN: Tensor
    """Whether a part's prompt is dropped, for guidance, bool [B, N]."""
    embeds: Tensor
    """Prompts, [B, S, D]."""
    excerpts: Excerpts | None = None
    """The pasts of the chunks, where they are those of excerpts."""


def draw_batch(
    source: ClipSource,
    config: TeacherConfig,
    update: int,
    before: int,
    samples: Sequence[int],
    among: Groups | None = None,
) -> TeacherBatch:
    """Some samples of an update: a function of the seed, on whatever process.

    `before` is the number of clips in all earlier updates. Clips are drawn `among` those groups;
    None for all of the source's.
    """
    c, kind, batch = config, config.kind_at(update), config.batch_at(update)
    groups = groups_of(source, c) if among is None else among
    groups = draw_bucket(source, groups, c.seed, _ROLE, update)
    rows = [draw_clip(groups, c.seed, _ROLE, before + each) for each in samples]

    def generators(what: str) -> list[torch.Generator]:
        return [seeded_generator(c.seed, _ROLE, update, each, what) for each in samples]

    excerpts = None
    if kind == "excerpt":
        latents, embeds, excerpts = draw_augmented_excerpts(
            source, rows, groups, c.excerpts, generators, c.chunk_frames
        )
    else:
        latents = source.latents(rows)
        latents = latents if kind == "whole" else latents[:, :, : c.chunk_frames]
        _, embeds = source.captions(rows, draw_seeds(generators("caption")))
    parts = len(KINDS) if kind == "excerpt" else 1
    drawn = generators("noise")
    noise = torch.stack([torch.randn(latents.shape[1:], generator=each) for each in drawn])
    within, dropped = torch.stack([torch.rand(2, parts, generator=g) for g in drawn], dim=1)
    # One draw in each of as many equal parts as there are samples: an update covers the range.
    strata = [
        torch.randperm(batch, generator=seeded_generator(c.seed, _ROLE, update, "strata", part))
        for part in range(parts)
    ]
    uniform = (torch.stack(strata, dim=1)[list(samples)] + within) / batch
    return TeacherBatch(
        latents=latents,
        noise=noise,
        timestep_BN=shift_sigma(uniform, c.shift) * NUM_TRAIN_TIMESTEPS,
        dropped_BN=dropped < c.prompt_dropout,
        embeds=embeds,
        excerpts=excerpts,
    )


def groups_of(source: ClipSource, config: TeacherConfig) -> Groups:
    """The clips that take turns."""
    return source.groups if config.balanced else (range(len(source)),)


def teacher_errors(
    model: WanModel, batch: TeacherBatch, uncond: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Mean squared error of the flow of every part, [B, N] (Lipman et al. 2022).

    `uncond` is [1, S, D]; `dtype` is what the network computes in.
    """
    dtype = dtype or model.patch_embedding.weight.dtype
    size = batch.latents.shape[2] // batch.timestep_BN.shape[1]
    timestep_BF = batch.timestep_BN.repeat_interleave(size, dim=1)
    noisy = add_noise(batch.latents, batch.noise, timestep_BF)
    empty = model.prompt_context(uncond.to(dtype))

    def dropped(contexts: Sequence[PromptContext]) -> list[PromptContext]:
        masks = batch.dropped_BN.unbind(1)
        return [
            select_prompt(mask, empty, each) for mask, each in zip(masks, contexts, strict=True)
        ]

    if batch.excerpts is None:
        (prompt,) = dropped([model.prompt_context(batch.embeds.to(dtype))])
        flow = model(noisy.to(dtype), timestep_BF, prompt).float()
    else:
        excerpt_prompts = ExcerptPrompts.from_embeds(model, batch.embeds, batch.excerpts, dtype)
        past = past_kv(model, batch.excerpts, excerpt_prompts, dtype=dtype)
        prompts = dropped(excerpt_prompts.by_chunk)
        flow = excerpt_flow(model, noisy, timestep_BF, prompts, past, dtype=dtype)
    return chunk_errors(flow, batch.noise - batch.latents, size)


class TeacherTrainer(SupervisedTrainer):
    """The teacher with the state of its training."""

    config: TeacherConfig
    command, file = "python -m training teacher", TEACHER

    def __init__(
        self,
        config: TeacherConfig,
        teacher: WanModel,
        source: ClipSource,
        uncond: Tensor,
        device: torch.device,
    ) -> None:
        """`teacher` is placed and sharded already; `uncond` is [1, S, D]."""
        super().__init__(config, teacher, LOSS_NAMES, source)
        self.groups = groups_among(groups_of(source, config), self.split)
        self.source, self.uncond, self.device = source, uncond.to(device), device
        sizes = [config.batch_at(update) for update in range(config.updates)]
        self.clips_before = list(accumulate(sizes, initial=0))  # clips seen before each update
        over = config.placement.sequence_over
        for batch in set(sizes):
            micro_batches(batch, config.micro_batch, over)  # refuses what cannot be shared out

    def batch(self) -> int:
        """See `SupervisedTrainer`."""
        return self.config.batch_at(self.update)

    def errors(self, samples: range) -> tuple[Tensor, Tensor]:
        """See `SupervisedTrainer`: of chunks, or of whole clips."""
        before = self.clips_before[self.update]
        return self._errors(self.config, self.update, before, samples, self.groups)

    def held_out_errors(self, held: Sequence[int], samples: range) -> tuple[Tensor, Tensor]:
        """See `SupervisedTrainer`: of each kind that the run ends with."""
        kinds = tuple(dict.fromkeys(self.config.phases[-1].kinds))
        fixed = replace(
            self.config,
            phases=(Phase(until=1.0, kinds=kinds),),
            updates=len(kinds),
            batch=len(held),
            opening_batch=len(held),
            seed=0,
        )
        each = [self._errors(fixed, at, 0, samples, (held,)) for at in range(len(kinds))]
        errors, which = (torch.cat(parts, dim=1) for parts in zip(*each, strict=True))
        return errors, which

    def video(self, embeds: Tensor, decoder: Decoder | None, seed: int) -> Tensor | None:
        """See `SupervisedTrainer`: a whole clip, sampled as `ode_pairs` does it."""
        c, drawn = self.config, seeded_generator("validation", seed)
        noise = torch.randn(1, *self.source.shape, generator=drawn).to(self.device)
        steps = PairsConfig(
            steps=c.validation_steps, shift=c.validation_shift, guidance=c.validation_guidance
        )
        _, clip = sample_trajectories(self.network, noise, embeds, self.uncond, steps, self.dtype)
        return decoded(clip, decoder)

    def _errors(
        self, config: TeacherConfig, update: int, before: int, samples: range, groups: Groups
    ) -> tuple[Tensor, Tensor]:
        batch = draw_batch(self.source, config, update, before, samples, groups)
        errors = teacher_errors(self.network, batch.to(self.device), self.uncond, self.dtype)
        first = LOSS_NAMES.index("whole") if config.kind_at(update) == "whole" else 0
        return errors, torch.arange(first, first + errors.shape[1]).expand_as(errors)

    def write(self, path: Path, note: Mapping[str, Any]) -> None:
        """See `SupervisedTrainer`."""
        write_student(path, self.network, None, None, video_size(self.source.shape), note)

    def origin(self) -> dict[str, Any]:
        """See `SupervisedTrainer`."""
        start = self.config.start
        made_from = {} if start is None else {"start": file_hash(start)}
        return {"made_from": made_from, "clips": len(self.source)}


def train_teacher(
    config: TeacherConfig, out: Path, device: torch.device, *, resume: bool = False
) -> Iterator[Report]:
    """Train a teacher, yielding a report an update.

    ValueError, before any weight is read, where a file is missing or `out` holds another run;
    FloatingPointError, with the last good checkpoint named, where the run breaks down.
    """
    model = read_model_config(config)
    check_no_prompt_files(config.data)
    source = open_clips(config.source, config.data, device)
    if source.shape[0] != model.in_dim:
        raise ValueError(
            f"{config.source} holds latents of {source.shape[0]} channels; the network reads "
            f"{model.in_dim}: give it clips of its own VAE"
        )
    check_excerpts(source, config.chunk_frames)
    over = config.placement.sequence_over
    for latents in source.buckets:
        check_sequence(over, model, latents, "the network")
    check_sizes(over, source.buckets, "source")
    check_validation(config, source)
    resumed = checkpoint_to_resume(config, out, resume)
    dtype, placement = placement_dtype(config.placement), config.placement
    uncond = open_negative(config.data, out / "embeddings", device, dtype)
    if config.start is None:
        network = new_network(model, placement, device, seed=config.seed, latents=source.shape)
    else:
        offload = placement.offload == "all"
        network = open_network(
            config.start, placement, device, trained=True, offload=offload, latents=source.shape
        )
    yield from train(TeacherTrainer(config, network, source, uncond, device), out, resumed)


def read_model_config(config: TeacherConfig) -> ModelConfig:
    """Sizes of the network; ValueError where `start` and `model` give none, or two different."""
    if config.start is None:
        if config.model is None:
            raise ValueError("neither start nor model is given; name a file, or give its sizes")
        return config.model
    if not config.start.exists():
        raise ValueError(f"start is {config.start}, which is not there")
    found = read_checkpoint(config.start).config
    if config.model not in (None, found):
        raise ValueError(
            f"start is {config.start}, of other sizes than model; set model=null for its own"
        )
    return found


def add_teacher_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `teacher`."""
    add_run_arguments(parser)
    add_config_arguments(parser, TEACHER_PRESETS)


def run_teacher(args: argparse.Namespace) -> int:
    """Train a teacher."""
    config = config_from_args(args, TeacherConfig, TEACHER_PRESETS)
    return run_stage(
        args,
        config,
        lambda device: train_teacher(config, args.out, device, resume=args.resume),
        TEACHER,
    )
