"""What a run will take, counted before it begins: memory of a process, operations of an update.

Memory is counted from the network itself: it runs once without weights or arithmetic while a hook
notes what autograd would keep, so nothing here has to follow the code by hand. Attention is taken
to keep its inputs and its output, as fused kernels do. The text encoder, which is gone before
training begins, and a reward's own network are left out. Where updates are of several sizes, all
are counted as of the largest.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rf_core.config import CacheConfig, Grid, ModelConfig
from rf_core.kv_cache import KVSnapshot
from rf_core.measure.counts import cache_bytes, num_parameters, pass_work, total
from rf_core.model import WanModel

from ..objective.redmd import ReDMDConfig
from ..run.networks import DTYPES, PlacementConfig, prepare
from .recipes import DistilConfig

MASTER = 4  # bytes of a trained weight, of its gradient, and of each of AdamW's two moments


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


def format_estimate(found: Estimate, speed: float | None = None) -> str:
    """Lines for a terminal; `speed` is in operations a second, as `matmul_speed` measures it."""
    rows = [f"{name:<38}{count / 1e9:>12.2f} GB" for name, count in found.memory.items()]
    rows.append(f"{'a process takes about':<38}{found.bytes / 1e9:>12.2f} GB")
    operations = sum(found.flops.values())
    rows += [f"{name:<38}{_operations(count):>15}" for name, count in found.flops.items()]
    rows.append(f"{'an update on a process':<38}{_operations(operations):>15}")
    if speed is not None:
        rows.append(
            f"{'at the speed of its matrix products':<38}{operations / speed:>13.1f} s "
            f"({speed / 1e12:.2f} TFLOP/s)"
        )
    return "\n".join(rows)


def _operations(count: int) -> str:
    return f"{count / 1e15:.2f} PFLOP" if count >= 1e15 else f"{count / 1e12:.2f} TFLOP"


def matmul_speed(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations a second of large matrix products here."""
    side = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        (a @ b).flatten()[0].item()  # waits for the device
        count += 1
    return 2 * side**3 * count / (time.perf_counter() - began)


def _memory(config: DistilConfig, sizes: Sizes, processes: int) -> dict[str, int]:
    placement, element = config.placement, DTYPES[config.placement.dtype].itemsize
    frozen = num_parameters(sizes.teacher) * element // processes
    student, critic = (
        _trained(size, lora, processes, average)
        for size, lora, average in (
            (sizes.student, config.student_lora, True),
            (sizes.critic, config.critic_lora, False),
        )
    )
    offloaded = {"none": 1, "teacher": 1, "all": 0}[placement.offload]
    return {
        "student, gradients, moments, average": student * offloaded,
        "critic, gradients, moments": critic * offloaded,
        "teacher": 0 if placement.offload != "none" else frozen,
        "gathered weights": _gathered(config.placement, sizes, processes),
        "KV cache": _cache(config, sizes),
        "kept for the backward pass": max(
            _rollout_activations(config, sizes), _critic_activations(config, sizes)
        ),
    }


def _trained(size: ModelConfig, lora: Any, processes: int, average: bool) -> int:
    weights = num_parameters(size) * MASTER
    if lora is None:
        return weights * (5 if average else 4) // processes
    adapters = sum(lora.rank * sum(layer.shape) * MASTER for layer in _targets(size, lora.targets))
    return (weights + adapters * (5 if average else 4)) // processes


def _targets(size: ModelConfig, pattern: str) -> list[Tensor]:
    return [
        parameter
        for name, parameter in _meta_model(size, torch.float32).named_parameters()
        if name.endswith(".weight") and re.fullmatch(pattern, name.removesuffix(".weight"))
    ]


def _gathered(placement: PlacementConfig, sizes: Sizes, processes: int) -> int:
    if processes == 1 and placement.dtype == "float32":
        return 0
    element = DTYPES[placement.dtype].itemsize
    every = (sizes.student, sizes.teacher, sizes.critic)
    if not placement.reshard:
        return sum(num_parameters(size) for size in every) * element
    # The block at work, the next one on its way, and the gradient of one.
    return max(3 * num_parameters(size) // size.num_layers for size in every) * element


def _cache(config: DistilConfig, sizes: Sizes) -> int:
    element = DTYPES[config.placement.dtype].itemsize
    whole = cache_bytes(sizes.student, config.run.redmd.cache, _grid(config, sizes), element)
    return whole * config.run.micro_batch


def _rollout_activations(config: DistilConfig, sizes: Sizes) -> int:
    cache, grid = config.run.redmd.cache, _grid(config, sizes)
    chunks = config.run.window_frames // cache.chunk_frames
    before = config.run.windows > 1  # the longest windows begin with a full cache
    contexts = [
        cache.window_frames - cache.chunk_frames
        if before
        else min(n * cache.chunk_frames, cache.window_frames - cache.chunk_frames)
        for n in range(chunks)
    ]
    each = {
        context: saved_bytes(sizes.student, config.placement, grid, cache.chunk_frames, context)
        for context in set(contexts)
    }
    return config.run.micro_batch * sum(each[context] for context in contexts)


def _critic_activations(config: DistilConfig, sizes: Sizes) -> int:
    frames = config.run.window_frames
    one = saved_bytes(sizes.critic, config.placement, _grid(config, sizes), frames, None)
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
    windows, frames = run.windows, run.window_frames
    chunks = run.latents[1] // redmd.cache.chunk_frames
    student = _pass(sizes.student, redmd.cache, grid)
    score_pass = {
        name: windows * _pass(size, _bidirectional(frames), grid)
        for name, size in (("teacher", sizes.teacher), ("critic", sizes.critic))
    }
    backward = 3 if config.placement.checkpointing else 2
    rollout = int(chunks * _mean_passes(redmd) * student)
    ratio = run.critic_ratio
    return {
        "rollouts": (1 + ratio) * rollout,
        "generator's backward passes": chunks * backward * student,
        "scores": score_pass["critic"] + 2 * score_pass["teacher"],
        "critic's passes": ratio * (1 + backward) * score_pass["critic"],
    }


def _mean_passes(config: ReDMDConfig) -> float:
    """Of a chunk: down to an exit step that is as often each one, and the clean pass."""
    return (len(config.sampler.steps) + 1) / 2 + 1


def _pass(size: ModelConfig, cache: CacheConfig, grid: Grid) -> int:
    context = cache.window_frames - cache.chunk_frames
    return total(pass_work(size, cache, grid, context_frames=context)).flops


def _bidirectional(frames: int) -> CacheConfig:
    return CacheConfig(window_frames=frames, chunk_frames=frames, sink_frames=0)


def _grid(config: DistilConfig, sizes: Sizes) -> Grid:
    rows, columns = max(config.run.sizes, key=math.prod)
    return Grid.of_latents(rows, columns, sizes.student.patch_size)
