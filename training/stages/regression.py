"""Regression on the teacher's trajectories, which makes a network a causal few-step student.

The input is a chunk's trajectory at one of the student's timesteps, drawn for every chunk by
itself; the target is the end of the trajectory (CausVid, arXiv 2412.07772, sec. 4.2; Self Forcing,
arXiv 2506.08009; Reward Forcing, arXiv 2512.04678, starts from such a student). The published code
attends to the whole past under a causal mask; here a chunk attends to the window that a stream
would have, with its sink and evictions. With a window as long as the clip the two are the same. In
excerpts, each chunk attends to its own clean past.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from rf_core.attention import Attention, sdpa
from rf_core.config import CacheConfig, SamplerConfig
from rf_core.decoders.decoder import Decoder
from rf_core.families import AUTO, check_family
from rf_core.model import WanModel
from rf_core.options import DEMO
from rf_core.ranges import MANY, check_numbers
from rf_core.scheduler import all_timesteps, flow_to_x0
from rf_core.weights.checkpoint import read_checkpoint

from ..data.pairs import Pairs
from ..objective.causal import check_clip_cache, chunk_errors, predict_clip
from ..objective.excerpts import (
    KINDS,
    ExcerptPrompts,
    Excerpts,
    augment_past,
    excerpt_flow,
    past_kv,
)
from ..objective.tensors import Tensors
from ..run.config import to_json
from ..run.draws import seeded_generator, shuffled_indices
from ..run.folder import STUDENT, checkpoint_to_resume
from ..run.networks import PlacementConfig, open_network
from ..run.optimise import OptimiserConfig
from ..run.options import (
    add_config_arguments,
    add_run_arguments,
    begins_with_preset,
    config_from_args,
)
from ..run.sequence import check_cache, check_sequence
from .export import file_hash, write_student
from .schedule import Schedule, notes_on_schedule, notes_on_taken, with_taken
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
from .validation import stream_video

_ROLE = "ode_init"


@dataclass(frozen=True, kw_only=True)
class InitConfig(SupervisedConfig):
    """The regression; its timesteps are those the trajectories are kept at.

    CausVid's released init has as many updates.
    """

    recipe = "ode_init"
    may_change = (*SupervisedConfig.may_change, "validation_chunks")

    pairs: Path = Path("pairs")
    """Folder of `ode_pairs`."""
    start: Path | None = None
    """File of the initial weights, best the teacher's; None for the bundled demo's teacher."""
    family: str = AUTO
    """Whose student `start` is, where it is one, of `rf_core.families.FAMILIES`; `auto` for what
    its file tells."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Window and sink a chunk sees its past through. Published: a window as long as the clip; by
    default the one the student will stream with, which is ours, or that of a student as `start`."""
    context: Literal["noisy", "clean"] = "noisy"
    """Where the past's keys and values come from: `noisy`, the same pass, each chunk at its own
    noise level (published); `clean`, passes at the clean timestep (0 but where the student's is
    another) over the trajectories' ends, as a stream leaves them (teacher forcing), which take
    twice the time. The past of excerpts is clean."""
    first_step_share: float | None = None
    """Share of chunks at the first timestep, the hardest; the others share the rest evenly.
    None for all evenly (published)."""
    validation_chunks: int = 14
    """Length of validation's videos, which are streamed, in chunks."""
    optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig(rate=2e-6, betas=(0.9, 0.999))
    )
    """Rate and betas are CausVid's for this stage; weight decay and clipping are as in Re-DMD."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_family(self.family)
        check_clip_cache(self.cache)
        check_numbers(self, first_step_share=(1e-6, 1))  # a stream begins at that timestep
        check_numbers(self, validation_chunks=(1, MANY))


def miniature_init() -> InitConfig:
    """The bundled demo's student, from its teacher: in minutes on a laptop."""
    return InitConfig(
        context="clean",
        first_step_share=0.4,
        optimiser=OptimiserConfig(
            rate=1.5e-3,
            betas=(0.9, 0.95),
            clip_norm=1.0,
            matrix_rate=4e-3,
            schedule="cosine",
            warmup=20,
        ),
        updates=1266,
        batch=16,
        micro_batch=16,
        ema=0.995,
        ema_from=None,
        validate_every=300,
        validation_chunks=7,
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
class Batch(Tensors):
    """B clips, each of their N chunks at a timestep of its own."""

    noisy: Tensor
    """Trajectories at the chunks' timesteps, [B, C, F, h, w]."""
    step_BN: Tensor
    """Index of the student's timestep, from 0."""
    clean: Tensor
    """Clean latents at the ends of the trajectories, [B, C, F, h, w]."""
    embeds: Tensor
    """Prompts, [B, S, D]."""
    excerpts: Excerpts | None = None
    """The pasts of the chunks, where they are those of excerpts."""


def draw_steps(
    seed: int,
    update: int,
    samples: Sequence[int],
    chunks: int,
    sampler: SamplerConfig,
    first_step_share: float | None = None,
) -> Tensor:
    """Index of the timestep of each chunk of those samples, [B, N]; see `first_step_share`.

    Of `all_timesteps`, though each chunk is drawn one of its own.
    """

    def drawn(generator: torch.Generator, count: int, is_first: bool) -> Tensor:
        own = torch.tensor([sampler.all_steps.index(t) for t in sampler.steps_of(is_first)])
        if first_step_share is None:
            return own[torch.randint(len(own), (count,), generator=generator)]
        first = torch.rand(count, generator=generator) < first_step_share
        later = torch.randint(1, max(2, len(own)), (count,), generator=generator)
        return own[later.where(~first, 0).clamp(max=len(own) - 1)]

    steps = [drawn(seeded_generator(seed, _ROLE, update, each), chunks, False) for each in samples]
    if sampler.first_steps:
        for sample, found in zip(samples, steps, strict=True):
            generator = seeded_generator(seed, _ROLE, update, sample, "first")
            found[:1] = drawn(generator, 1, True)
    return torch.stack(steps)


def draw_batch(
    pairs: Pairs,
    config: InitConfig,
    update: int,
    samples: Sequence[int],
    among: Sequence[int] | None = None,
) -> Batch:
    """Some samples of an update: a function of the seed, on whatever process; float32 latents.

    They are drawn `among` those rows; None for all.
    """
    rows = range(len(pairs)) if among is None else among
    places = shuffled_indices(config.seed, "generator", update, samples, config.batch, len(rows))
    trajectories = pairs.rows([rows[place] for place in places])
    size, sampler = config.cache.chunk_frames, pairs.config.sampler
    chunks = trajectories.clean.shape[2] // size
    steps = draw_steps(config.seed, update, samples, chunks, sampler, config.first_step_share)
    excerpts = None
    if trajectories.excerpts is not None:
        drawn = [seeded_generator(config.seed, _ROLE, update, each, "past") for each in samples]
        excerpts = augment_past(trajectories.excerpts, pairs.config.excerpts, drawn)
    return Batch(
        noisy=select_steps(trajectories.points, steps, size).float(),
        step_BN=steps,
        clean=trajectories.clean.float(),
        embeds=trajectories.embeds,
        excerpts=excerpts,
    )


def select_steps(points: Tensor, step_BN: Tensor, chunk_frames: int) -> Tensor:
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
    clean_timestep: float = 0.0,
) -> Tensor:
    """Mean squared error of every chunk's predicted clean latents, [B, N].

    `timesteps` are the student's, [K]; `dtype` is what it computes in. A whole clip's clean past is
    run at `clean_timestep`.
    """
    dtype = dtype or student.patch_embedding.weight.dtype
    size, options = config.cache.chunk_frames, {"attention": attention, "dtype": dtype}
    timestep_BF = timesteps.to(batch.noisy)[batch.step_BN].repeat_interleave(size, dim=1)
    if batch.excerpts is None:
        x0 = predict_clip(
            student,
            batch.noisy,
            timestep_BF,
            student.prompt_context(batch.embeds.to(dtype)),
            config.cache,
            clean=batch.clean if config.context == "clean" else None,
            clean_timestep=clean_timestep,
            **options,
        )
    else:
        prompts = ExcerptPrompts.from_embeds(student, batch.embeds, batch.excerpts, dtype)
        past = past_kv(student, batch.excerpts, prompts, **options)
        flow = excerpt_flow(student, batch.noisy, timestep_BF, prompts.by_chunk, past, **options)
        x0 = flow_to_x0(flow, batch.noisy, timestep_BF)
    return chunk_errors(x0, batch.clean, size)


class InitTrainer(SupervisedTrainer):
    """The student with the state of the regression."""

    config: InitConfig
    command, file = "python -m training ode_init", STUDENT

    def __init__(
        self, config: InitConfig, student: WanModel, pairs: Pairs, device: torch.device
    ) -> None:
        """`student` is placed and sharded already. ValueError for clips of no whole chunks."""
        check_pairs(config, pairs)
        self.pairs, self.device = pairs, device
        self.timesteps = all_timesteps(pairs.config.sampler)
        super().__init__(config, student, [f"t{t:.0f}" for t in self.timesteps], pairs)
        over = config.placement.sequence_over
        micro_batches(config.batch, config.micro_batch, over)  # refuses what cannot be shared out

    def errors(self, samples: range) -> tuple[Tensor, Tensor]:
        """See `SupervisedTrainer`: each chunk's, by its timestep."""
        c, among = self.config, self.split.trained
        return self._errors(draw_batch(self.pairs, c, self.update, samples, among))

    def held_out_errors(self, held: Sequence[int], samples: range) -> tuple[Tensor, Tensor]:
        """See `SupervisedTrainer`."""
        fixed = replace(self.config, batch=len(held), seed=0)
        return self._errors(draw_batch(self.pairs, fixed, 0, samples, held))

    def video(self, embeds: Tensor, decoder: Decoder | None, seed: int) -> Tensor | None:
        """See `SupervisedTrainer`: a stream."""
        return stream_video(
            self.network,
            embeds,
            self.config.cache,
            self.pairs.config.sampler,
            decoder,
            self.config.validation_chunks,
            video_size(self.pairs.config.latents),
            seed=seed,
            dtype=self.dtype,
        )

    def _errors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        batch = batch.to(self.device)
        errors = regression_errors(
            self.network,
            batch,
            self.timesteps,
            self.config,
            dtype=self.dtype,
            clean_timestep=self.pairs.config.sampler.clean_timestep,
        )
        return errors, batch.step_BN

    def write(self, path: Path, note: Mapping[str, Any]) -> None:
        """See `SupervisedTrainer`."""
        pairs_config, size = self.pairs.config, video_size(self.pairs.config.latents)
        family = read_checkpoint(start_path(self.config), family=self.config.family).family
        cache, sampler = self.config.cache, pairs_config.sampler
        write_student(path, self.network, cache, sampler, size, note, family=family)

    def origin(self) -> dict[str, Any]:
        """See `SupervisedTrainer`."""
        return {
            "made_from": {"start": file_hash(start_path(self.config))},
            "pairs": {
                "trajectories": len(self.pairs),
                "teacher": self.pairs.origin.teacher,
                "config": json.loads(to_json(self.pairs.config)),
            },
        }


def check_pairs(config: InitConfig, pairs: Pairs) -> None:
    """ValueError for trajectories that the config cannot learn from."""
    c, frames, size = config.cache, pairs.config.latents[1], config.cache.chunk_frames
    if pairs.config.kind == "clips":
        if frames % size:
            raise ValueError(
                f"the clips have {frames} latent frames; set cache.chunk_frames, now {size}, to "
                "one of their divisors, or make other clips"
            )
        return
    check_excerpt_cache(c, frames // len(KINDS))
    if config.context != "clean":
        raise ValueError("the trajectories are excerpts, whose past is clean; set context=clean")


def check_excerpt_cache(cache: CacheConfig, chunk_frames: int) -> None:
    """ValueError for a cache that is not the one that excerpts show, of three chunks."""
    window = len(KINDS) * chunk_frames
    expected = {"chunk": chunk_frames, "window": window, "sink": chunk_frames, "anchor": 0}
    for name, value in expected.items():
        if (given := getattr(cache, f"{name}_frames")) != value:
            raise ValueError(
                f"excerpts are {len(KINDS)} chunks, the first of which is the "
                f"sink: cache.{name}_frames is {given}; set it to {value}"
            )
    if cache.positions != "window":
        raise ValueError(
            f"excerpts have their sink right before the chunk after it: cache.positions is "
            f"{cache.positions}; set it to window"
        )


def init_student(
    config: InitConfig, out: Path, device: torch.device, *, resume: bool = False
) -> Iterator[Report]:
    """Run the regression, yielding a report an update.

    ValueError, before any weight is read, where a file is missing or `out` holds another run;
    FloatingPointError, with the last good checkpoint named, where the run breaks down.
    """
    start, pairs, placement = start_path(config), Pairs.open(config.pairs), config.placement
    check_pairs(config, pairs)
    size, latents, over = (
        read_checkpoint(start).config,
        pairs.config.latents,
        placement.sequence_over,
    )
    in_channels, channels = size.in_dim, latents[0]
    if in_channels != channels:
        raise ValueError(
            f"start is {start}, which reads {in_channels} channels; the trajectories have "
            f"{channels}: give it those of its own VAE"
        )
    check_cache(over, config.cache, "cache")
    check_sequence(over, size, latents, "start")
    check_validation(config, pairs)
    resumed = checkpoint_to_resume(config, out, resume)
    offload = placement.offload == "all"
    student = open_network(start, placement, device, trained=True, offload=offload, latents=latents)
    yield from train(InitTrainer(config, student, pairs, device), out, resumed)


def start_path(config: InitConfig) -> Path:
    """The file of the student's initial weights; ValueError where it does not exist."""
    path = config.start or DEMO / "teacher.safetensors"
    if not path.exists():
        raise ValueError(f"start is {path}, which is not there")
    return path


def init_config(args: argparse.Namespace) -> tuple[InitConfig, list[str]]:
    """The config of a command line, and what it takes from a student that it begins with."""
    config = config_from_args(args, InitConfig, INIT_PRESETS)
    path = config.start or DEMO / "teacher.safetensors"
    if not begins_with_preset(args) or not path.exists():
        return config, []
    own = Schedule(cache=config.cache, sampler=SamplerConfig())
    found = replace(own, cache=own.of_file(path, config.family).cache)
    config = with_taken(config, path, found.differences(own), args.set)
    taken = replace(own, cache=config.cache).differences(own)
    return config, notes_on_taken(taken, path, config.family, "family")


def add_init_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ode_init`."""
    parser.add_argument("--pairs", type=Path, required=True, help="folder of ode_pairs")
    add_run_arguments(parser)
    add_config_arguments(parser, INIT_PRESETS)


def run_init(args: argparse.Namespace) -> int:
    """Make a causal student of a network by regression on trajectories."""
    config, taken = init_config(args)
    config = replace(config, pairs=args.pairs)

    def notes() -> list[str]:
        schedule = Schedule(cache=config.cache, sampler=Pairs.open(config.pairs).config.sampler)
        return taken + notes_on_schedule(schedule, start_path(config), config.family)

    return run_stage(
        args,
        config,
        lambda device: init_student(config, args.out, device, resume=args.resume),
        STUDENT,
        notes,
    )
