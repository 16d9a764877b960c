"""Memory of a process of the stages before Re-DMD, counted as `estimate` counts Re-DMD's."""

from __future__ import annotations

from dataclasses import replace

import torch

from rf_core.config import Grid, ModelConfig
from rf_core.decoders.decoder import WanDecoder
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.measure.counts import num_parameters
from rf_core.memory.live_bytes import fake_tensors, peak_bytes

from ..data.latents import clip_images
from ..data.pairs import PairsConfig
from ..run.distributed import fitting_micro_batch
from ..run.networks import DTYPES, PlacementConfig
from .consistency import ConsistencyConfig
from .control import ControlRunConfig
from .estimate import MASTER, gathered_bytes, num_shards, saved_bytes, training_bytes
from .latents import LatentsConfig
from .operations import contexts, excerpt_contexts
from .regression import InitConfig
from .supervised import SupervisedConfig
from .teacher import TeacherConfig

KEPT = "kept for the backward pass"


def teacher_memory(
    config: TeacherConfig, size: ModelConfig, grid: Grid, frames: int, processes: int
) -> dict[str, int]:
    """Of the kinds of update the one that keeps most."""
    chunk, placement = config.chunk_frames, config.placement
    past, chunks = excerpt_contexts(chunk, config.excerpts)
    passes = {
        "opening": (chunk, [None]),
        "excerpt": (chunk, [*past, *chunks]),
        "whole": (frames, [None]),
    }
    kinds = {kind for phase in config.phases for kind in phase.kinds}
    kept = max(
        _samples(config, processes, config.opening_batch if kind == "opening" else config.batch)
        * _kept(size, placement, grid, *passes[kind])
        for kind in kinds
    )
    return _trained_memory(config, size, processes) | {KEPT: kept}


def control_memory(
    config: ControlRunConfig, size: ModelConfig, grid: Grid, frames: int, processes: int
) -> dict[str, int]:
    """The frozen base, the VACE that is trained, and what both keep of a pass.

    A VACE is taken for as many of the base's blocks, and what a block keeps for a trained one's.
    """
    share = replace(size, num_layers=len(config.layers))
    both = replace(size, num_layers=size.num_layers + len(config.layers))
    base = MASTER * num_parameters(size) // num_shards(config.placement, processes)
    kept = _samples(config, processes, config.batch) * _kept(
        both, config.placement, grid, frames, [None]
    )
    found = _trained_memory(config, share, processes)
    return {"base": base if config.placement.offload != "all" else 0, **found, KEPT: kept}


def pairs_memory(
    config: PairsConfig, size: ModelConfig, grid: Grid, processes: int
) -> dict[str, int]:
    """The teacher, and what a pass of it works on."""
    placement = config.placement
    tokens = config.batch * config.latents[1] * grid.frame_tokens
    # The feed-forward layer and its GELU; the residual stream, norms, queries and what attends.
    work = tokens * (2 * size.ffn_dim + 8 * size.dim) * DTYPES[placement.dtype].itemsize
    return _teacher_memory(placement, size, processes) | {
        "gathered weights": gathered_bytes(placement, [size], processes),
        "a pass's own": work,
    }


def regression_memory(
    config: InitConfig, pairs: PairsConfig, size: ModelConfig, grid: Grid, processes: int
) -> dict[str, int]:
    """The student; a clip's passes are all kept until its loss is there."""
    chunk = config.cache.chunk_frames
    if pairs.kind == "excerpts":
        past, chunks = excerpt_contexts(chunk, pairs.excerpts)
        before = past + chunks
    else:
        before = contexts(config.cache, pairs.latents[1])
        before = before + (before[:-1] if config.context == "clean" else [])
    kept = _kept(size, config.placement, grid, chunk, before)
    return _trained_memory(config, size, processes) | {
        KEPT: _samples(config, processes, config.batch) * kept
    }


def consistency_memory(
    config: ConsistencyConfig,
    student: ModelConfig,
    teacher: ModelConfig,
    grid: Grid,
    processes: int,
) -> dict[str, int]:
    """Student and teacher; of an excerpt's passes, the student's are kept."""
    chunk = config.cache.chunk_frames
    past, chunks = excerpt_contexts(chunk, config.excerpts)
    kept = _kept(student, config.placement, grid, chunk, past + chunks)
    return {
        **_trained_memory(config, student, processes),
        **_teacher_memory(config.placement, teacher, processes),
        "gathered weights": gathered_bytes(config.placement, [student, teacher], processes),
        KEPT: _samples(config, processes, config.batch) * kept,
    }


def latents_memory(config: LatentsConfig, vae: VAEConfig) -> dict[str, int]:
    """The VAE, a clip's images, and the most that lives while they are encoded."""
    dtype = getattr(torch, config.dtype)
    with fake_tensors("cuda") as place:
        decoder = WanDecoder(WanVAE(vae, device=place, dtype=dtype), group_frames=3)
        images = torch.empty(1, clip_images(config.frames), 3, *config.largest_size, device=place)
        most = peak_bytes(lambda: decoder.encode(images), images.device)
        weights = sum(each.nbytes for each in decoder.codec.parameters())
    return {"VAE": weights, "a clip's images": images.nbytes, "encoding": most}


def _kept(
    size: ModelConfig,
    placement: PlacementConfig,
    grid: Grid,
    frames: int,
    before: list[int] | list[None],
) -> int:
    each = {context: saved_bytes(size, placement, grid, frames, context) for context in set(before)}
    return sum(each[context] for context in before)


def _samples(config: SupervisedConfig, processes: int, batch: int) -> int:
    """Samples at a time: as `supervised.micro_batches`."""
    over = config.placement.sequence_over
    return fitting_micro_batch(batch, config.micro_batch, processes, over)


def _trained_memory(config: SupervisedConfig, size: ModelConfig, processes: int) -> dict[str, int]:
    shards = num_shards(config.placement, processes)
    held = training_bytes(size, config.optimiser, None) // shards
    return {
        "weights, gradients, moments, average": held if config.placement.offload != "all" else 0,
        "gathered weights": gathered_bytes(config.placement, [size], processes),
    }


def _teacher_memory(
    placement: PlacementConfig, size: ModelConfig, processes: int
) -> dict[str, int]:
    element = DTYPES[placement.dtype].itemsize
    held = num_parameters(size) * element // num_shards(placement, processes)
    return {"teacher": held if placement.offload == "none" else 0}
