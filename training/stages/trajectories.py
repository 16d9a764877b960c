"""The teacher's ODE trajectories: what `ode_init` teaches the causal student.

The teacher integrates from noise to clean latents in small Euler steps (CausVid, arXiv 2412.07772,
sec. 4.2). The end is stored, with the points at the student's own timesteps: these are levels of
the grid, so that the points are exact. The published code keeps grid steps 0, 12, 24, 36 of 48,
which are the student's timesteps at shift 5 alone.

Trajectories are those of whole clips, as published, or of excerpts, whose chunks see their past.
In a whole clip the first chunk depends on the noise of all later ones, which a causal student
cannot see, so that its regression collapses to a mean (Causal Forcing, arXiv 2602.02214, argues
this). In an excerpt each point leads to one end alone.

Shards are safetensors, and functions of the config and their number. Processes share them out, and
an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from rf_core.config import NUM_TRAIN_TIMESTEPS, WAN_SIZE, SamplerConfig
from rf_core.model import PromptContext, WanModel, fingerprint_of
from rf_core.options import DEMO
from rf_core.ranges import check_folder_writable
from rf_core.scheduler import euler_levels, integrate, sampling_timesteps
from rf_core.stream import latent_size
from rf_core.weights.checkpoint import read_checkpoint

from ..choices import CLIPS, DATA_SET, open_clips
from ..data.clips import ClipSource, Conditions, check_excerpts, draw_clip, draw_excerpts
from ..data.embeddings import PromptEmbeds, open_negative, open_prompts
from ..data.pairs import (
    Origin,
    PairsConfig,
    Trajectories,
    check_shard,
    shard_path,
    shards_of,
    write_shard,
)
from ..data.prompts import check_no_prompt_files, check_prompt_files, wan_data
from ..data.seeded_noise import clip_noise
from ..objective.excerpts import (
    KINDS,
    LATENT_FIELDS,
    ExcerptPrompts,
    Excerpts,
    augment_past,
    excerpt_flow,
    past_kv,
)
from ..run.config import to_json
from ..run.distributed import (
    all_gather,
    barrier,
    num_shares,
    process_group,
    rank,
    share_number,
    world_size,
)
from ..run.draws import first_indices, seeded_generator, shuffled_indices
from ..run.folder import check_recipe, create_run_folder
from ..run.machine import check_machine
from ..run.networks import PlacementConfig, open_network, placement_dtype
from ..run.options import add_config_arguments, config_from_args, print_rank_0, show_progress
from ..run.sequence import check_sequence

_ROLE = "ode_pairs"
_STORED_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
DrawConditions = Callable[[Sequence[int]], Conditions]
"""Prompts, and excerpts where there are some, of the trajectories of those numbers."""


def miniature_pairs() -> PairsConfig:
    """How the bundled demo's student was taught: in minutes on a laptop.

    Few latents of large amplitude hold all of a video of that world, so what it shows is decided
    above a noise level of 0.9, and that is where the shift puts the steps.
    """
    return PairsConfig(
        kind="excerpts",
        source=CLIPS,
        steps=14,
        shift=12.0,
        guidance=2.0,
        latents=(16, 9, 8, 8),
        clips=1600,
        shard=64,
        batch=64,
    )


def wan_pairs() -> PairsConfig:
    """The published pairs; change the files to where yours are.

    About 276 GB. A teacher that fits a card is gathered once (`placement.reshard`); set it to true
    for the 14B.
    """
    height, width = latent_size(*WAN_SIZE, (1, 2, 2))
    return PairsConfig(
        teacher=Path("models/wan2.1_t2v_1.3B.safetensors"),
        latents=(16, 21, height, width),
        placement=PlacementConfig(dtype="bfloat16", reshard=False),
        data=wan_data(),
    )


PAIRS_PRESETS: Mapping[str, Callable[[], PairsConfig]] = MappingProxyType(
    {"miniature": miniature_pairs, "wan": wan_pairs}
)


def student_levels(sampler: SamplerConfig) -> list[float]:
    """The student's noise levels, high to low, as `sampling_timesteps` rounds them."""
    return (sampling_timesteps(sampler).double() / NUM_TRAIN_TIMESTEPS).tolist()


def levels_of(config: PairsConfig) -> list[float]:
    """Noise levels from 1 to 0: the shifted grid and the student's own levels, each once."""
    return euler_levels(config.steps, config.shift, student_levels(config.sampler))


@torch.no_grad()
def sample_trajectories(
    teacher: WanModel,
    noise: Tensor,
    cond: Tensor,
    uncond: Tensor,
    config: PairsConfig,
    dtype: torch.dtype | None = None,
    excerpts: Excerpts | None = None,
) -> tuple[Tensor, Tensor]:
    """Integrate the teacher's guided ODE from noise [B, C, F, h, w] to clean latents.

        Returns the latents at the student's K timesteps, [B, K, C, F, h, w],
    and the clean latents. `cond` is [B, S, D], `uncond` [1 or B, S, D]. `dtype` is what the teacher
    computes in, by default that of its weights. The past of excerpts is the same for both prompts.
    """
    dtype = dtype or teacher.patch_embedding.weight.dtype
    uncond = uncond.expand(len(noise), -1, -1).to(dtype)
    uncond_prompt = teacher.prompt_context(uncond) if config.guidance != 1 else None
    if excerpts is None:
        prompts: Sequence[PromptContext] = (teacher.prompt_context(cond.to(dtype)),)
    else:
        excerpt_prompts = ExcerptPrompts.from_embeds(teacher, cond, excerpts, dtype)
        prompts = excerpt_prompts.by_chunk
        past = past_kv(teacher, excerpts, excerpt_prompts, dtype=dtype)

    def predict(x: Tensor, at: Tensor, prompts: Sequence[PromptContext]) -> Tensor:
        if excerpts is None:
            return teacher(x.to(dtype), at, prompts[0]).float()
        return excerpt_flow(teacher, x, at, prompts, past, dtype=dtype)

    def flow(x: Tensor, level: float) -> Tensor:
        at = x.new_full((x.shape[0], x.shape[2]), level * NUM_TRAIN_TIMESTEPS)
        cond_flow = predict(x, at, prompts)
        if uncond_prompt is None:
            return cond_flow
        uncond_flow = predict(x, at, (uncond_prompt,) * len(prompts))
        return uncond_flow + config.guidance * (cond_flow - uncond_flow)

    end, points = integrate(flow, noise, levels_of(config), student_levels(config.sampler))
    return torch.stack(points, dim=1), end


def write_pairs(config: PairsConfig, out: Path, device: torch.device) -> Iterator[int]:
    """Make the shards that `out` lacks, yielding how many clips there are so far.

    Every process calls this together. ValueError, before any weight is read, where a file is
    missing, or where `out` holds shards of another config or teacher.
    """
    check_recipe(config, out)
    path, dtype = teacher_path(config), placement_dtype(config.placement)
    over = config.placement.sequence_over
    check_sequence(over, read_checkpoint(path).config, config.latents, "teacher")
    source = _open_source(config, device)
    origin = Origin(teacher=fingerprint(path), clips=None if source is None else len(source))
    for shard in shards_of(out):
        check_shard(shard, config, origin)
    missing = _missing(config, out)
    done = config.clips - len(missing) * config.shard
    yield done
    if not missing:
        return
    create_run_folder(config, out)
    if source is None:
        prompts, embeds, uncond = open_prompts(
            config.data,
            DATA_SET,
            out / "embeddings",
            device,
            dtype,
            lambda count: first_indices(config.seed, "generator", config.clips, count),
        )
        draw_conditions = prompt_conditions(prompts, embeds, config)
    else:
        uncond = open_negative(config.data, out / "embeddings", device, dtype)
        draw_conditions = excerpt_conditions(source, config)
    offload = config.placement.offload != "none"
    teacher = open_network(
        path, config.placement, device, trained=False, offload=offload, latents=config.latents
    )
    at_once = num_shares(world_size(), over)
    is_first_of_group = rank() % (over or 1) == 0
    for first in range(0, len(missing), at_once):
        # Sharded networks run in step: a process without a shard left computes one and drops it.
        place = first + share_number(over)
        number = missing[min(place, len(missing) - 1)]
        trajectories = make_shard(
            teacher, draw_conditions, uncond.to(device), config, number, dtype
        )
        if place < len(missing) and is_first_of_group:
            write_shard(shard_path(out, number), trajectories, config, number, origin)
        done += config.shard * min(at_once, len(missing) - first)
        yield done
    barrier()


def prompt_conditions(
    prompts: Sequence[str], embeds: PromptEmbeds, config: PairsConfig
) -> DrawConditions:
    """Conditions of whole clips: a prompt each, in shuffled order."""

    def draw_conditions(clips: Sequence[int]) -> Conditions:
        numbers = shuffled_indices(config.seed, "generator", 0, clips, 1, len(prompts))
        texts = [prompts[each] for each in numbers]
        return Conditions(numbers=numbers, prompts=texts, embeds=embeds.embeds(numbers))

    return draw_conditions


def excerpt_conditions(source: ClipSource, config: PairsConfig) -> DrawConditions:
    """Conditions of excerpts that are drawn from clips."""
    groups = (range(len(source)),)

    def draw_conditions(clips: Sequence[int]) -> Conditions:
        rows = [draw_clip(groups, config.seed, _ROLE, clip) for clip in clips]
        drawn = [seeded_generator(config.seed, _ROLE, clip, "excerpt") for clip in clips]
        size = config.latents[1] // len(KINDS)
        return draw_excerpts(source, rows, groups, config.excerpts, drawn, size)[1]

    return draw_conditions


def make_shard(
    teacher: WanModel,
    draw_conditions: DrawConditions,
    uncond: Tensor,
    config: PairsConfig,
    number: int,
    dtype: torch.dtype | None = None,
) -> Trajectories:
    """The trajectories of one shard; `uncond` is [1, S, D] on the teacher's device."""
    clips = range(number * config.shard, (number + 1) * config.shard)
    conditions, parts = draw_conditions(clips), []
    if conditions.excerpts is not None:  # trajectories see the past in the dtype it is stored in
        kept = {
            name: _to_stored_dtype(getattr(conditions.excerpts, name), config)
            for name in LATENT_FIELDS
        }
        conditions = replace(conditions, excerpts=replace(conditions.excerpts, **kept))
    for start in range(0, config.shard, config.batch):
        part = slice(start, start + config.batch)
        drawn = [clip_noise(config.seed, clip, config.latents) for clip in clips[part]]
        noise = torch.stack(drawn)
        excerpts = None
        if conditions.excerpts is not None:
            past = [seeded_generator(config.seed, _ROLE, clip, "past") for clip in clips[part]]
            excerpts = augment_past(conditions.excerpts.select(part), config.excerpts, past).to(
                uncond.device
            )
        prompt = conditions.embeds[part].to(uncond)
        parts.append(
            sample_trajectories(
                teacher, noise.to(uncond.device), prompt, uncond, config, dtype, excerpts
            )
        )
    points, clean = (torch.cat(each).cpu() for each in zip(*parts, strict=True))
    return Trajectories(
        points=_to_stored_dtype(points, config),
        clean=_to_stored_dtype(clean, config),
        **vars(conditions),
    )


def _to_stored_dtype(latents: Tensor, config: PairsConfig) -> Tensor:
    kept = latents.to(_STORED_DTYPES[config.stored])
    if not kept.isfinite().all():
        raise FloatingPointError(
            f"the latents are not finite in {config.stored}: they reach "
            f"{float(latents.abs().max()):.4g}; check teacher and guidance, or set stored=bfloat16"
        )
    return kept


def teacher_path(config: PairsConfig) -> Path:
    """The teacher's file. ValueError where it, or a prompt file, does not exist."""
    path = config.teacher or DEMO / "teacher.safetensors"
    if not path.exists():
        raise ValueError(f"teacher is {path}, which is not there")
    if config.kind == "excerpts" and config.source is None:
        raise ValueError("kind is excerpts; give source, a folder of clips to cut them from")
    if config.kind == "excerpts":
        check_no_prompt_files(config.data)
    check_prompt_files(config.data)
    return path


def fingerprint(path: Path) -> str:
    """A short hash of a network's weights, the same for every dtype they may be stored in."""
    return fingerprint_of(read_checkpoint(path).tensors["blocks.0.modulation"])


def _open_source(config: PairsConfig, device: torch.device) -> ClipSource | None:
    if config.kind == "clips":
        return None
    assert config.source is not None
    source = open_clips(config.source, config.data, device)
    channels, frames, rows, columns = config.latents
    if len(source.buckets) > 1:
        sizes = ", ".join(f"{h}x{w}" for h, w in source.buckets)
        raise ValueError(
            f"{config.source} holds clips whose latents are {sizes}; trajectories are of one size: "
            "give a folder of clips of that size alone"
        )
    if (source.shape[0], *source.shape[2:]) != (channels, rows, columns):
        raise ValueError(
            f"latents are {config.latents}; {config.source} holds clips of {source.shape}: "
            "channels, rows and columns must be the same"
        )
    check_excerpts(source, frames // len(KINDS))
    return source


def _missing(config: PairsConfig, out: Path) -> list[int]:
    shards = range(config.clips // config.shard)
    here = torch.tensor([not shard_path(out, number).exists() for number in shards])
    # All processes use the first one's list: a shared disk may show new files late.
    agreed = all_gather(here)[: len(shards)]
    return agreed.nonzero().flatten().tolist()


def add_pairs_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ode_pairs`."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the trajectories")
    add_config_arguments(parser, PAIRS_PRESETS)


def run_pairs(args: argparse.Namespace) -> int:
    """Make the teacher's trajectories, or those that are missing."""
    config = config_from_args(args, PairsConfig, PAIRS_PRESETS)
    check_machine(config.placement)
    check_folder_writable(args.out)
    with process_group(args.device) as device:
        print_rank_0(to_json(config))
        shards = ((done, "") for done in write_pairs(config, args.out, device))
        show_progress(config.clips, "clip", shards)
        print_rank_0(f"{args.out}: {config.clips} trajectories")
    return 0
