"""Bytes on disk of the stages, counted from their configs."""

from __future__ import annotations

import math
from collections.abc import Callable

from rf_core.config import NUM_TRAIN_TIMESTEPS, ModelConfig
from rf_core.measure.counts import num_parameters
from rf_core.scheduler import all_timesteps

from ..choices import DATA_SET
from ..data.pairs import PairsConfig
from ..data.prompts import DataConfig, count_prompts
from ..objective.excerpts import KINDS, LATENT_FIELDS
from ..run.draws import first_indices
from ..run.networks import DTYPES, PlacementConfig
from .estimate import MASTER, Sizes, saved_state_bytes
from .latents import LatentsConfig
from .re_dmd import needed_prompts
from .recipes import DistilConfig
from .supervised import SupervisedConfig
from .trainer import prompt_draws

PROMPT_TOKENS = 60
"""Of a prompt, about; embeddings are as long as their prompts."""
_HALF = 2  # bytes of a stored latent's entry


def checkpoints(count: int, each: int) -> dict[str, int]:
    """Those that are kept, and the one that is written before the oldest goes."""
    return {f"checkpoints: {count} kept and one in the making": (count + 1) * each}


def re_dmd_disk(config: DistilConfig, sizes: Sizes, prompts: int) -> dict[str, int]:
    """Checkpoints, the averaged student, and embeddings of so many prompts."""
    run, output = config.run, config.output
    state = saved_state_bytes(sizes.student, run.generator, config.student_lora)
    state += saved_state_bytes(sizes.critic, run.critic, config.critic_lora, average=False)
    found = checkpoints(output.keep, state)
    if config.student_lora is None:
        found["averaged student"] = MASTER * num_parameters(sizes.student)
    return found | embeddings(config.placement, sizes.student, prompts)


def supervised_disk(config: SupervisedConfig, size: ModelConfig) -> dict[str, int]:
    """Checkpoints, and the averaged weights."""
    found = checkpoints(config.keep, saved_state_bytes(size, config.optimiser, None))
    return found | {"averaged weights": MASTER * num_parameters(size)}


def pairs_disk(config: PairsConfig, size: ModelConfig, prompts: int) -> dict[str, int]:
    """Trajectories with their prompts, and the embeddings that these are copied from."""
    clip = math.prod(config.latents)
    timesteps = all_timesteps(config.sampler).tolist()
    points = sum(each < NUM_TRAIN_TIMESTEPS for each in timesteps)  # the noise is not stored
    each = (points + 1) * clip * _HALF
    texts = 1
    if config.kind == "excerpts":
        each += len(LATENT_FIELDS) * clip // len(KINDS) * _HALF
        texts = len(KINDS)
    carried = config.clips * texts * prompt_bytes(config.placement, size)
    own = embeddings(config.placement, size, prompts) if config.kind == "clips" else {}
    return {"trajectories": config.clips * each, "their prompts": carried, **own}


def latents_disk(config: LatentsConfig, channels: int, factor: int, clips: int) -> dict[str, int]:
    """Clips in float16, as of the largest size."""
    rows, columns = (side // factor for side in config.largest_size)
    return {"clips": clips * channels * config.frames * rows * columns * _HALF}


def embeddings(placement: PlacementConfig, size: ModelConfig, prompts: int) -> dict[str, int]:
    """Encoded prompts, of which a data set's own are not kept on disk."""
    kept = prompts * prompt_bytes(placement, size)
    return {f"{prompts} encoded prompts": kept} if prompts else {}


def prompt_bytes(placement: PlacementConfig, size: ModelConfig) -> int:
    """An encoded prompt."""
    tokens = min(PROMPT_TOKENS, size.text_len)
    return tokens * size.text_dim * DTYPES[placement.dtype].itemsize


def distilled_prompts(config: DistilConfig) -> int:
    """Prompts that a distillation encodes; the most of them, where its files are not there."""
    shown = config.output.validation_prompts if config.output.validate_every else 0
    most = sum(prompt_draws(config.run).values()) + shown
    return _distinct(config.data, most, lambda count: needed_prompts(config, count))


def trajectories_prompts(config: PairsConfig) -> int:
    """The same of trajectories."""
    if config.kind == "excerpts":
        return 0
    return _distinct(
        config.data,
        config.clips,
        lambda count: first_indices(config.seed, "generator", config.clips, count),
    )


def _distinct(data: DataConfig, most: int, drawn: Callable[[int], list[int]]) -> int:
    if not data.prompts:
        return 0
    if not all(path.exists() for path in data.prompts):
        return min(most, data.limit or most)
    return len(set(drawn(count_prompts(data, DATA_SET))))
