"""Causal consistency distillation: a few-step causal student without stored trajectories.

A chunk of a clip is noised to a level of the teacher's grid; the teacher, which continues from a
clean past, makes one guided Euler step from there; and the student is to predict from both points
the same clean chunk (consistency models, Song et al., arXiv 2303.01469; its own prediction, without
gradient, is the target, as in arXiv 2310.14189; for causal students Causal Forcing, arXiv
2602.02214). What `ode_pairs` and `ode_init` take some 48 guided passes a clip for, and its disk,
here takes one; clips are real, of the miniature world, or whole clips of `ode_pairs`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from rf_core.config import NUM_TRAIN_TIMESTEPS, CacheConfig, SamplerConfig
from rf_core.decoders.decoder import Decoder
from rf_core.model import WanModel
from rf_core.options import DEMO
from rf_core.ranges import MANY, check_numbers
from rf_core.scheduler import add_noise, euler_levels, flow_to_x0
from rf_core.weights.checkpoint import read_checkpoint

from ..choices import CLIPS, open_clips
from ..data.clips import ClipSource, check_excerpts, draw_augmented_excerpts, draw_bucket, draw_clip
from ..data.embeddings import open_negative
from ..data.pairs import check_taught
from ..data.prompts import DataConfig, check_no_prompt_files
from ..objective.causal import check_clip_cache, chunk_errors
from ..objective.excerpts import (
    KINDS,
    ExcerptConfig,
    ExcerptPrompts,
    Excerpts,
    excerpt_flow,
    past_kv,
)
from ..objective.tensors import Tensors
from ..run.draws import seeded_generator
from ..run.folder import STUDENT, checkpoint_to_resume
from ..run.networks import PlacementConfig, open_network, placement_dtype
from ..run.optimise import OptimiserConfig
from ..run.options import add_config_arguments, add_run_arguments, config_from_args
from ..run.sequence import check_cache, check_sequence, check_sizes
from .export import file_hash, write_student
from .regression import check_excerpt_cache, miniature_init
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
from .trajectories import student_levels
from .validation import stream_video

_ROLE = "consistency"


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig(SupervisedConfig):
    """The distillation. Nothing here is published for this network: the numbers are ours."""

    recipe = "consistency"
    may_change = (*SupervisedConfig.may_change, "validation_chunks")

    source: Path = CLIPS
    """Folder of clips: the miniature world's, or whole clips of `ode_pairs`."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text encoder, and what stands for no prompt: `negative`."""
    teacher: Path | None = None
    """A teacher that continues from a clean past (`teacher`); None for the bundled demo's."""
    start: Path | None = None
    """File of the student's initial weights; None for the teacher's."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The student's timesteps, which are levels of the grid."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Window and sink that the student is to stream with: three chunks, the first the sink."""
    steps: int = 48
    """Euler steps of the teacher's grid, the student's own levels among them."""
    shift: float = 5.0
    """Of the grid, as of `ode_pairs`."""
    guidance: float = 3.0
    """Classifier-free guidance of the teacher's step; 1 for none."""
    excerpts: ExcerptConfig = field(default_factory=ExcerptConfig)
    """How chunks and their past are drawn."""
    validation_chunks: int = 14
    """Length of validation's videos, which are streamed, in chunks."""
    optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig(rate=2e-6, betas=(0.9, 0.999))
    )
    """As of `ode_init`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_taught(self.sampler, with_clean_past=True)
        check_clip_cache(self.cache)
        check_numbers(self, steps=(1, MANY), shift=(0.01, 1000.0), guidance=(1, 1000.0))
        check_numbers(self, validation_chunks=(1, MANY))

    @property
    def levels(self) -> list[float]:
        """Noise levels from 1 to 0."""
        return euler_levels(self.steps, self.shift, student_levels(self.sampler))


def miniature_consistency() -> ConsistencyConfig:
    """The bundled demo's student by the cheaper way: its numbers are `ode_init`'s."""
    init = miniature_init()
    return ConsistencyConfig(
        steps=14,
        shift=12.0,
        guidance=2.0,
        optimiser=init.optimiser,
        updates=init.updates,
        batch=init.batch,
        micro_batch=init.micro_batch,
        ema=init.ema,
        ema_from=init.ema_from,
        validate_every=init.validate_every,
        validation_chunks=init.validation_chunks,
    )


def wan_consistency() -> ConsistencyConfig:
    """Wan 2.1 1.3B; change the files to where yours are."""
    return ConsistencyConfig(
        source=Path("runs/pairs"),
        teacher=Path("runs/teacher/teacher.safetensors"),
        data=DataConfig(text_encoder="google/umt5-xxl"),
        placement=PlacementConfig(dtype="bfloat16", checkpointing=True),
    )


CONSISTENCY_PRESETS: Mapping[str, Callable[[], ConsistencyConfig]] = MappingProxyType(
    {"miniature": miniature_consistency, "wan": wan_consistency}
)


@dataclass(frozen=True, kw_only=True)
class ConsistencyBatch(Tensors):
    """B excerpts, each of their three chunks at a level of its own."""

    latents: Tensor
    """Clean, [B, C, 3 F, h, w]."""
    noise: Tensor
    """The same shape."""
    level_BN: Tensor
    """Index of each chunk's level in the grid, [B, 3]; the last level, 0, is none."""
    embeds: Tensor
    """Prompts, [B, S, D]."""
    excerpts: Excerpts
    """The pasts of the chunks."""


def draw_batch(
    source: ClipSource,
    config: ConsistencyConfig,
    update: int,
    samples: Sequence[int],
    among: Sequence[int] | None = None,
) -> ConsistencyBatch:
    """Some samples of an update: a function of the seed, on whatever process.

    They are drawn `among` those rows, all of an update of one size; None for all rows.
    """
    c, rows_of = config, range(len(source)) if among is None else among
    groups = draw_bucket(source, (rows_of,), c.seed, _ROLE, update)
    rows = [draw_clip(groups, c.seed, _ROLE, update * c.batch + each) for each in samples]

    def generators(what: str) -> list[torch.Generator]:
        return [seeded_generator(c.seed, _ROLE, update, each, what) for each in samples]

    latents, embeds, excerpts = draw_augmented_excerpts(
        source, rows, groups, c.excerpts, generators, c.cache.chunk_frames
    )
    drawn, last = generators("noise"), len(c.levels) - 1
    noise = torch.stack([torch.randn(latents.shape[1:], generator=each) for each in drawn])
    return ConsistencyBatch(
        latents=latents,
        noise=noise,
        level_BN=torch.stack([torch.randint(last, (len(KINDS),), generator=g) for g in drawn]),
        embeds=embeds,
        excerpts=excerpts,
    )


def consistency_errors(
    student: WanModel,
    teacher: WanModel,
    batch: ConsistencyBatch,
    uncond: Tensor,
    config: ConsistencyConfig,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Mean squared difference of the clean chunks that the student predicts from a point and from
    the teacher's next one, [B, 3].

    `uncond` is [1, S, D]; `dtype` is what both networks compute in.
    """
    dtype, size = dtype or student.patch_embedding.weight.dtype, config.cache.chunk_frames
    levels = torch.tensor(config.levels).to(batch.noise)
    now, after = (levels[batch.level_BN + i].repeat_interleave(size, dim=1) for i in (0, 1))
    at_now, at_after = now * NUM_TRAIN_TIMESTEPS, after * NUM_TRAIN_TIMESTEPS
    noisy = add_noise(batch.latents, batch.noise, at_now)
    with torch.no_grad():
        flow = _guided_flow(teacher, noisy, at_now, batch, uncond, config.guidance, dtype)
        less_noisy = noisy + _each(after - now) * flow
    prompts = ExcerptPrompts.from_embeds(student, batch.embeds, batch.excerpts, dtype)
    past = past_kv(student, batch.excerpts, prompts, dtype=dtype)

    def predicted(x: Tensor, timestep_BF: Tensor) -> Tensor:
        found = excerpt_flow(student, x, timestep_BF, prompts.by_chunk, past, dtype=dtype)
        return flow_to_x0(found, x, timestep_BF)

    with torch.no_grad():
        target = predicted(less_noisy, at_after).where(_each(after) > 0, less_noisy)
    return chunk_errors(predicted(noisy, at_now), target, size)


def _guided_flow(
    teacher: WanModel,
    x: Tensor,
    timestep_BF: Tensor,
    batch: ConsistencyBatch,
    uncond: Tensor,
    guidance: float,
    dtype: torch.dtype,
) -> Tensor:
    """The teacher's flow of the three chunks; their past is the same for both prompts."""
    prompts = ExcerptPrompts.from_embeds(teacher, batch.embeds, batch.excerpts, dtype)
    past = past_kv(teacher, batch.excerpts, prompts, dtype=dtype)
    cond = excerpt_flow(teacher, x, timestep_BF, prompts.by_chunk, past, dtype=dtype)
    if guidance == 1:
        return cond
    empty = teacher.prompt_context(uncond.expand(len(x), -1, -1).to(dtype))
    without = excerpt_flow(teacher, x, timestep_BF, (empty,) * len(KINDS), past, dtype=dtype)
    return without + guidance * (cond - without)


def _each(values_BF: Tensor) -> Tensor:
    return values_BF[:, None, :, None, None]


class ConsistencyTrainer(SupervisedTrainer):
    """The student with the state of its distillation, and its teacher."""

    config: ConsistencyConfig
    command, file = "python -m training consistency", STUDENT

    def __init__(
        self,
        config: ConsistencyConfig,
        student: WanModel,
        teacher: WanModel,
        source: ClipSource,
        uncond: Tensor,
        device: torch.device,
    ) -> None:
        """Networks are placed and sharded already; `uncond` is [1, S, D]."""
        steps = torch.tensor(student_levels(config.sampler))
        names = [f"t{NUM_TRAIN_TIMESTEPS * level:.0f}" for level in steps.tolist()]
        super().__init__(config, student, names, source)
        self.teacher, self.source, self.device = teacher, source, device
        self.uncond = uncond.to(device)
        levels = torch.tensor(config.levels[:-1])
        self._names_of_levels = (steps[:, None] >= levels).sum(0) - 1  # of which step it is below
        over = config.placement.sequence_over
        micro_batches(config.batch, config.micro_batch, over)  # refuses what cannot be shared out

    def errors(self, samples: range) -> tuple[Tensor, Tensor]:
        """See `SupervisedTrainer`: each chunk's, by the student's step that its level is of."""
        c, among = self.config, self.split.trained
        return self._errors(draw_batch(self.source, c, self.update, samples, among))

    def held_out_errors(self, held: Sequence[int], samples: range) -> tuple[Tensor, Tensor]:
        """See `SupervisedTrainer`."""
        fixed = replace(self.config, batch=len(held), seed=0)
        return self._errors(draw_batch(self.source, fixed, 0, samples, held))

    def video(self, embeds: Tensor, decoder: Decoder | None, seed: int) -> Tensor | None:
        """See `SupervisedTrainer`: a stream."""
        return stream_video(
            self.network,
            embeds,
            self.config.cache,
            self.config.sampler,
            decoder,
            self.config.validation_chunks,
            video_size(self.source.shape),
            seed=seed,
            dtype=self.dtype,
        )

    def _errors(self, batch: ConsistencyBatch) -> tuple[Tensor, Tensor]:
        errors = consistency_errors(
            self.network,
            self.teacher,
            batch.to(self.device),
            self.uncond,
            self.config,
            self.dtype,
        )
        return errors, self._names_of_levels[batch.level_BN]

    def write(self, path: Path, note: Mapping[str, Any]) -> None:
        """See `SupervisedTrainer`."""
        size = video_size(self.source.shape)
        write_student(path, self.network, self.config.cache, self.config.sampler, size, note)

    def origin(self) -> dict[str, Any]:
        """See `SupervisedTrainer`."""
        files = paths_of(self.config)
        hashes = {path: file_hash(path) for path in set(files.values())}
        made_from = {name: hashes[path] for name, path in files.items()}
        return {"made_from": made_from, "clips": len(self.source)}


def distil_consistency(
    config: ConsistencyConfig, out: Path, device: torch.device, *, resume: bool = False
) -> Iterator[Report]:
    """Run the distillation, yielding a report an update.

    Raises:
        ValueError: a file is missing, or `out` holds another run; before any weight is read.
        FloatingPointError: the run broke down; the last good checkpoint is named.
        Stopped: a signal asked for it; the run is saved.
    """
    files = paths_of(config)
    check_excerpt_cache(config.cache, config.cache.chunk_frames)
    check_no_prompt_files(config.data)
    source = open_clips(config.source, config.data, device)
    placement = config.placement
    check_cache(placement.sequence_over, config.cache, "cache")
    for name, path in files.items():
        size = read_checkpoint(path).config
        if size.in_dim != source.shape[0]:
            raise ValueError(
                f"{config.source} holds latents of {source.shape[0]} channels; {name} is {path}, "
                f"which reads {size.in_dim}: give it clips of its own VAE"
            )
        for latents in source.buckets:
            check_sequence(placement.sequence_over, size, latents, name)
    check_sizes(placement.sequence_over, source.buckets, "source")
    check_excerpts(source, config.cache.chunk_frames)
    check_validation(config, source)
    resumed = checkpoint_to_resume(config, out, resume)
    uncond = open_negative(config.data, out / "embeddings", device, placement_dtype(placement))
    opened = partial(open_network, placement=placement, device=device, latents=source.shape)
    student = opened(files["start"], trained=True, offload=placement.offload == "all")
    teacher = opened(files["teacher"], trained=False, offload=placement.offload != "none")
    trainer = ConsistencyTrainer(config, student, teacher, source, uncond, device)
    yield from train(trainer, out, resumed)


def paths_of(config: ConsistencyConfig) -> dict[str, Path]:
    """Files of the initial weights and of the teacher; ValueError where one does not exist."""
    teacher = config.teacher or DEMO / "teacher.safetensors"
    files = {"teacher": teacher, "start": config.start or teacher}
    for name, path in files.items():
        if not path.exists():
            raise ValueError(f"{name} is {path}, which is not there")
    return files


def add_consistency_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `consistency`."""
    add_run_arguments(parser)
    add_config_arguments(parser, CONSISTENCY_PRESETS)


def run_consistency(args: argparse.Namespace) -> int:
    """Distil a few-step student from a teacher without trajectories."""
    config = config_from_args(args, ConsistencyConfig, CONSISTENCY_PRESETS)
    return run_stage(
        args,
        config,
        lambda device: distil_consistency(config, args.out, device, resume=args.resume),
        STUDENT,
    )
