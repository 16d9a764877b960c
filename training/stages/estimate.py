"""What a Re-DMD run takes, counted before it begins: memory of a process, operations of an update.
`costs` is the same for every recipe, with card hours and disk.

Memory is counted from the network itself: it runs once without weights or arithmetic while a hook
notes what autograd would keep, so nothing here has to follow the code by hand. Attention is taken
to keep its inputs and its output, as fused kernels do. The text encoder, which is gone before
training begins, and a reward's own network are left out; the decoding that a reward's gradient goes
through is counted. Where updates are of several sizes, all are counted as of the largest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rf_core.config import CacheConfig, Grid, ModelConfig, SamplerConfig
from rf_core.kv_cache import KVSnapshot
from rf_core.measure.counts import cache_bytes, num_parameters
from rf_core.model import WanModel

from ..objective.rollout import chunk_sizes
from ..run.lora import LoRAConfig
from ..run.networks import DTYPES, PlacementConfig, prepare
from ..run.optimise import OptimiserConfig
from ..run.sequence import own_grid
from .decoding_memory import decoding_memory
from .operations import pass_flops, trained
from .recipes import DistilConfig
from .trainer import RunConfig

MASTER = 4  # bytes of a trained weight, of its gradient, and of each of its moments


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The three networks."""

    student: ModelConfig
    teacher: ModelConfig
    critic: ModelConfig


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run takes."""

    memory: Mapping[str, int]
    """Bytes of one process, by what holds them."""
    flops: Mapping[str, int]
    """Operations of one update on one process, by what does them."""

    @property
    def bytes(self) -> int:
        """All memory of one process, at the peak."""
        return sum(self.memory.values())


def estimate(config: DistilConfig, sizes: Sizes, processes: int) -> Estimate:
    """Count a run; `config.run.redmd.batch` is shared out over `processes`."""
    share = config.run.redmd.batch / processes
    flops = {name: int(share * count) for name, count in _flops(config, sizes).items()}
    return Estimate(memory=_memory(config, sizes, processes), flops=flops)


def update_operations(config: DistilConfig, sizes: Sizes) -> int:
    """Operations of one update, over all processes."""
    return int(config.run.redmd.batch * sum(_flops(config, sizes).values()))


def _memory(config: DistilConfig, sizes: Sizes, processes: int) -> dict[str, int]:
    placement, shards = config.placement, num_shards(config.placement, processes)
    frozen = num_parameters(sizes.teacher) * DTYPES[placement.dtype].itemsize // shards
    run, every = config.run, (sizes.student, sizes.teacher, sizes.critic)
    student = training_bytes(sizes.student, run.generator, config.student_lora) // shards
    critic = training_bytes(sizes.critic, run.critic, config.critic_lora, average=False) // shards
    offloaded = {"none": 1, "teacher": 1, "all": 0}[placement.offload]
    return {
        "student, gradients, moments, average": student * offloaded,
        "critic, gradients, moments": critic * offloaded,
        "teacher": 0 if placement.offload != "none" else frozen,
        "gathered weights": gathered_bytes(placement, every, processes),
        "KV cache": _cache(config, sizes),
        "kept for the backward pass": max(
            _rollout_activations(config, sizes), _critic_activations(config, sizes)
        ),
        **decoding_memory(config),
    }


def num_shards(placement: PlacementConfig, processes: int) -> int:
    """Processes that share a copy of the weights out."""
    return placement.shard_over or processes


def training_bytes(
    size: ModelConfig, optimiser: OptimiserConfig, lora: LoRAConfig | None, average: bool = True
) -> int:
    """Weights of a trained network, their gradients, moments and average, on all processes."""
    saved = saved_state_bytes(size, optimiser, lora, average)
    trained = sum(count for count, _ in _trained(size, optimiser, lora))
    frozen = num_parameters(size) if lora is not None else 0
    return saved + MASTER * (trained + frozen)  # gradients, and what adapters stand beside


def saved_state_bytes(
    size: ModelConfig, optimiser: OptimiserConfig, lora: LoRAConfig | None, average: bool = True
) -> int:
    """What a checkpoint holds of a trained network: trained weights, moments and average."""
    copies = 2 if average else 1
    return MASTER * sum(c * (copies + moments) for c, moments in _trained(size, optimiser, lora))


def _trained(
    size: ModelConfig, optimiser: OptimiserConfig, lora: LoRAConfig | None
) -> list[tuple[int, int]]:
    """The trained entries of every parameter, or of the adapters of one, with their moments."""
    named = list(_meta_model(size, torch.float32).named_parameters())
    if lora is None:
        return [(p.numel(), optimiser.num_moments(name, p)) for name, p in named]
    return [
        (lora.rank * sum(p.shape), optimiser.num_moments(name, p))
        for name, p in named
        if name.endswith(".weight") and re.fullmatch(lora.targets, name.removesuffix(".weight"))
    ]


def gathered_bytes(placement: PlacementConfig, every: Sequence[ModelConfig], processes: int) -> int:
    """Whole weights that a process holds of sharded networks."""
    if processes == 1 and placement.dtype == "float32":
        return 0
    element = DTYPES[placement.dtype].itemsize
    if not placement.reshard:
        return sum(num_parameters(size) for size in every) * element
    # The block at work, the next one on its way, and the gradient of one.
    return max(3 * num_parameters(size) // size.num_layers for size in every) * element


def _cache(config: DistilConfig, sizes: Sizes) -> int:
    element = DTYPES[config.placement.dtype].itemsize
    whole = cache_bytes(sizes.student, config.run.redmd.cache, _own_grid(config, sizes), element)
    return whole * config.run.micro_batch


def _rollout_activations(config: DistilConfig, sizes: Sizes) -> int:
    cache, grid = config.run.redmd.cache, _own_grid(config, sizes)
    # The longest windows begin with a full cache.
    before = cache.window_frames if config.run.rollout_windows > 1 else 0
    passes = _passes(cache, config.run.window_frames, before)
    each = {one: saved_bytes(sizes.student, config.placement, grid, *one) for one in passes}
    kept = sum(count * each[one] for one, count in passes.items())
    return config.run.micro_batch * kept


def _passes(cache: CacheConfig, frames: int, before: int = 0) -> Counter[tuple[int, int]]:
    """How many chunks of a rollout have so many frames and see so many, where it has `before`."""
    sizes = chunk_sizes(frames, cache, begins=not before)
    begins = accumulate(sizes, initial=before)
    return Counter(
        (size, min(begin, cache.window_frames - size))
        for size, begin in zip(sizes, begins, strict=False)
    )


def _critic_activations(config: DistilConfig, sizes: Sizes) -> int:
    frames = config.run.window_frames
    one = saved_bytes(sizes.critic, config.placement, _own_grid(config, sizes), frames, None)
    return config.run.micro_batch * one


def saved_bytes(
    size: ModelConfig,
    placement: PlacementConfig,
    grid: Grid,
    frames: int,
    context_frames: int | None,
) -> int:
    """What autograd keeps of one pass over `frames` latent frames of one sample, in bytes.

    `context_frames` None is a pass of a bidirectional network. With checkpointing, the one block
    that is recomputed counts as well.
    """
    dtype = DTYPES[placement.dtype]
    none, block = _per_block(size, PlacementConfig(), dtype, grid, frames, context_frames)
    if not placement.checkpointing:
        return none + size.num_layers * block
    _, kept = _per_block(
        size, PlacementConfig(checkpointing=True), dtype, grid, frames, context_frames
    )
    snapshot = 2 * (context_frames or 0) * grid.frame_tokens * size.dim * dtype.itemsize
    return none + size.num_layers * (kept + snapshot) + block


def _per_block(
    size: ModelConfig,
    placement: PlacementConfig,
    dtype: torch.dtype,
    grid: Grid,
    frames: int,
    context_frames: int | None,
) -> tuple[int, int]:
    """What is kept outside of blocks, and for every block."""
    one, two = (
        _saved(
            prepare(
                _meta_model(replace(size, num_layers=layers), dtype).requires_grad_(True),
                placement,
                trained=True,
            ),
            dtype,
            grid,
            frames,
            context_frames,
        )
        for layers in (1, 2)
    )
    return 2 * one - two, two - one


def _meta_model(size: ModelConfig, dtype: torch.dtype) -> WanModel:
    with torch.device("meta"):
        return WanModel(size, dtype=dtype)


def _saved(
    network: WanModel,
    dtype: torch.dtype,
    grid: Grid,
    frames: int,
    context_frames: int | None,
) -> int:
    size = network.config
    _, rows, columns = size.patch_size
    x = torch.empty(
        1, size.in_dim, frames, grid.height * rows, grid.width * columns, device="meta", dtype=dtype
    )
    at = torch.empty(1, frames, device="meta")
    with torch.no_grad():
        prompt = network.prompt_context(
            torch.empty(1, size.text_len, size.text_dim, device="meta", dtype=dtype)
        )
    cache = None
    if context_frames is not None:
        tokens = context_frames * grid.frame_tokens
        shape = (size.num_layers, 1, tokens, size.num_heads, size.head_dim)
        k, v = (torch.empty(shape, device="meta", dtype=dtype) for _ in range(2))
        cache = KVSnapshot(k, v, context_frames)
    with _saved_storages(network) as storages:
        network(x, at, prompt, cache, _FusedAttention.apply)
    return sum(storages.values())


@contextmanager
def _saved_storages(network: WanModel) -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd keeps within it, weights left out."""
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    found: dict[int, int] = {}
    held = []  # so that no two storages ever have the same address

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            held.append(tensor)
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


class _FusedAttention(torch.autograd.Function):
    """Attention that keeps what a fused kernel keeps; its result means nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


def _flops(config: DistilConfig, sizes: Sizes) -> dict[str, int]:
    """Of one sample, through one update."""
    run, redmd, grid = config.run, config.run.redmd, _grid(config, sizes)
    windows, frames = run.mean_windows, run.window_frames
    chunks = _chunks_flops(run, sizes.student, grid)
    score_pass = {
        name: int(windows * pass_flops(size, grid, frames))
        for name, size in (("teacher", sizes.teacher), ("critic", sizes.critic))
    }
    backward = trained(config.placement) - 1
    rollout = int(chunks * _mean_passes(redmd.sampler) + _recache_flops(run, sizes.student, grid))
    ratio = run.critic_ratio
    return {
        "rollouts": (1 + ratio) * rollout,
        "generator's backward passes": int(chunks * backward),
        "scores": score_pass["critic"] + 2 * score_pass["teacher"],
        "critic's passes": ratio * (1 + backward) * score_pass["critic"],
    }


def _chunks_flops(run: RunConfig, size: ModelConfig, grid: Grid) -> float:
    """A pass over each chunk of an update's rollout, of their mean length."""
    frames = run.window_frames
    lengths = range(1, run.windows + 1) if run.random_length else (run.rollout_windows,)
    passes = sum((_passes(run.redmd.cache, frames * each) for each in lengths), Counter())
    every = sum(count * pass_flops(size, grid, *one) for one, count in passes.items())
    return every / len(lengths) / run.carry


def _mean_passes(sampler: SamplerConfig) -> float:
    """Of a chunk but the first: down to an exit step, where it has that many, and a clean pass."""
    steps, most = len(sampler.steps), sampler.most_steps
    return sum(min(exits, steps) for exits in range(1, most + 1)) / most + 1


def _own_grid(config: DistilConfig, sizes: Sizes) -> Grid:
    """Whose tokens a process has: a cache's heads are as many fewer."""
    return own_grid(_grid(config, sizes), config.placement.sequence_over)


def _recache_flops(run: RunConfig, size: ModelConfig, grid: Grid) -> float:
    """Of an update's rollout, whose part it is where it goes on through several."""
    cache = run.redmd.cache
    if not run.switch_share:
        return 0.0
    again = cache.window_frames - cache.head_frames
    if cache.recache != "chunks":  # in one pass
        return pass_flops(size, grid, again, cache.head_frames) / run.carry
    context = cache.window_frames - cache.chunk_frames
    one = pass_flops(size, grid, cache.chunk_frames, context)
    return again / cache.chunk_frames * one / run.carry


def _grid(config: DistilConfig, sizes: Sizes) -> Grid:
    return Grid.of_latents(*config.run.largest_size, sizes.student.patch_size)
