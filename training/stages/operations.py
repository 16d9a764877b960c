"""Operations of the stages, counted from their configs: a multiply-add is two, products alone.

Each function counts one sample (a clip, an excerpt); a stage's update has as many as its batch. A
pass that trains counts three times a forward one, four times where its blocks are recomputed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch

from rf_core.config import CacheConfig, Grid, ModelConfig
from rf_core.decoders.decoder import WanDecoder
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.measure.counts import pass_work, total
from rf_core.memory.footprint import TextSizes

from ..data.latents import clip_images
from ..data.pairs import PairsConfig
from ..objective.excerpts import KINDS, ExcerptConfig
from ..run.networks import PlacementConfig
from .consistency import ConsistencyConfig
from .control import ControlRunConfig
from .latents import LatentsConfig
from .regression import InitConfig
from .teacher import Kind, TeacherConfig
from .trajectories import levels_of


def pass_flops(size: ModelConfig, grid: Grid, frames: int, context_frames: int = 0) -> int:
    """A forward pass over `frames` latent frames that also attend to `context_frames`."""
    window = context_frames + frames
    cache = CacheConfig(window_frames=window, chunk_frames=frames, sink_frames=0)
    return total(pass_work(size, cache, grid, context_frames=context_frames)).flops


def trained(placement: PlacementConfig) -> int:
    """What a pass and its backward pass take, in forward passes."""
    return 4 if placement.checkpointing else 3


def contexts(cache: CacheConfig, frames: int) -> list[int]:
    """What the window holds before each chunk of a clip, in latent frames."""
    most = cache.window_frames - cache.chunk_frames
    return [min(start, most) for start in range(0, frames, cache.chunk_frames)]


def excerpt_contexts(frames: int, config: ExcerptConfig) -> tuple[list[int], list[int]]:
    """The same of an excerpt's clean passes over the past, and of its three chunks."""
    past = [0, frames] + ([0] if config.stale_sink_share else [])
    return past, [frames * place for place in range(len(KINDS))]


def _passes(size: ModelConfig, grid: Grid, frames: int, before: list[int]) -> int:
    return sum(pass_flops(size, grid, frames, each) for each in before)


def teacher_flops(
    config: TeacherConfig, size: ModelConfig, grid: Grid, frames: int
) -> Counter[str]:
    """By what updates see: of all updates of the run; clips have so many latent frames."""
    chunk = config.chunk_frames
    past, chunks = excerpt_contexts(chunk, config.excerpts)
    one: dict[Kind, int] = {
        "opening": pass_flops(size, grid, chunk),
        "excerpt": _passes(size, grid, chunk, past + chunks),
        "whole": pass_flops(size, grid, frames),
    }
    found: Counter[str] = Counter()
    for update in range(config.updates):
        kind = config.kind_at(update)
        found[kind] += config.batch_at(update) * trained(config.placement) * one[kind]
    return found


def trajectory_flops(config: PairsConfig, size: ModelConfig, grid: Grid) -> int:
    """A trajectory: Euler steps of the grid, guided ones with a pass of either prompt."""
    frames, steps = config.latents[1], len(levels_of(config)) - 1
    passes = steps * (2 if config.guidance != 1 else 1)
    if config.kind == "clips":
        return passes * pass_flops(size, grid, frames)
    chunk = frames // len(KINDS)
    past, chunks = excerpt_contexts(chunk, config.excerpts)
    return _passes(size, grid, chunk, past) + passes * _passes(size, grid, chunk, chunks)


def regression_flops(config: InitConfig, pairs: PairsConfig, size: ModelConfig, grid: Grid) -> int:
    """A trajectory's chunks in turn, through the window; with `context=clean` again as they end."""
    chunk, frames = config.cache.chunk_frames, pairs.latents[1]
    if pairs.kind == "excerpts":
        past, before = excerpt_contexts(chunk, pairs.excerpts)
    else:
        before = contexts(config.cache, frames)
        past = before[:-1] if config.context == "clean" else []
    return trained(config.placement) * _passes(size, grid, chunk, past + before)


def consistency_flops(
    config: ConsistencyConfig, student: ModelConfig, teacher: ModelConfig, grid: Grid
) -> dict[str, int]:
    """An excerpt: the teacher's guided step, the student's target, and what it is trained on."""
    chunk = config.cache.chunk_frames
    past, chunks = excerpt_contexts(chunk, config.excerpts)
    guided = chunks * (2 if config.guidance != 1 else 1)
    passes = trained(config.placement) * _passes(student, grid, chunk, past + chunks)
    return {
        "teacher's step": _passes(teacher, grid, chunk, past + guided),
        "student's target": _passes(student, grid, chunk, chunks),
        "student's passes": passes,
    }


def control_flops(
    config: ControlRunConfig, size: ModelConfig, grid: Grid, frames: int
) -> dict[str, int]:
    """A clip through the frozen base, whose weights take no gradient, and through the VACE.

    A VACE is taken for as many of the base's blocks; the projections of its hints are left out.
    """
    again = trained(config.placement)
    vace = replace(size, num_layers=len(config.layers))
    return {
        "base": (again - 1) * pass_flops(size, grid, frames),
        "VACE": again * pass_flops(vace, grid, frames),
    }


def encoding_flops(config: LatentsConfig, vae: VAEConfig) -> int:
    """A clip of the largest size through the VAE's encoder; counted by running a weightless one."""
    from torch.utils.flop_counter import FlopCounterMode  # which imports triton: slow

    decoder = WanDecoder(WanVAE(vae, device="meta"), group_frames=3)
    images = torch.empty(1, clip_images(config.frames), 3, *config.largest_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder.encode(images)
    return counter.get_total_flops()


def prompt_flops(text: TextSizes, text_len: int) -> int:
    """A prompt through the text encoder, which computes with its padding."""
    return 2 * (text.parameters - text.outside) * text_len
