"""How fast a stream runs and whether it stays flat: what `python -m rf_core bench` measures.

Weights are random (the head included, so that nothing is trivially zero), the picture's content is
noise; only time and memory mean anything. Outputs are checked to be finite.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from .attention import attention_backend
from .config import TEMPORAL_FACTOR, WAN_1_3B, WAN_14B, CacheConfig, ModelConfig
from .model import WanModel
from .stream import Stream

TINY = ModelConfig(
    dim=48,
    ffn_dim=96,
    freq_dim=32,
    text_dim=24,
    text_len=16,
    num_heads=2,
    num_layers=2,
)
SIZES = MappingProxyType({"tiny": TINY, "1.3b": WAN_1_3B, "14b": WAN_14B})
WEIGHT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured."""

    size: str = "tiny"
    """Name of a network size, a key of SIZES."""
    chunks: int = 500
    """Chunks to stream."""
    height: int = 64
    """Picture rows, in pixels."""
    width: int = 64
    """Picture columns, in pixels."""
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    attention: str = "sdpa"
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size {self.size!r} is unknown; use one of {', '.join(SIZES)}")
        if self.chunks < 2:
            raise ValueError(f"{self.chunks} chunks leave nothing after the first; measure 2")


@torch.no_grad()
def bench(
    options: BenchOptions, report: Callable[[int, float], None] = lambda chunk, seconds: None
) -> dict[str, Any]:
    """Stream with random weights; times in seconds, memory in bytes, all JSON can hold."""
    stream = _random_stream(options)
    seconds, memory = [], []
    for chunk in range(options.chunks):
        began = time.perf_counter()
        latents = stream.step().latents
        if not latents.isfinite().all():  # also waits for the device
            raise ValueError(f"chunk {chunk} is not finite; measure in a wider dtype")
        seconds.append(time.perf_counter() - began)
        memory.append(_memory(options.device))
        report(chunk, seconds[-1])
    growing = options.cache.window_frames // options.cache.chunk_frames + 1
    skipped = growing if options.chunks > 2 * growing else 1
    images = options.cache.chunk_frames * TEMPORAL_FACTOR
    steady = np.array(seconds[skipped:])
    return {
        "options": {**asdict(options), "dtype": str(options.dtype).removeprefix("torch.")},
        "torch": torch.__version__,
        "machine": _machine(options.device),
        "first_chunk_seconds": seconds[0],
        "chunk_seconds": dict(zip(("p50", "p95", "max"), _percentiles(steady), strict=True)),
        "images_per_second": images / float(np.median(steady)),
        "seconds_per_100_chunks": _growth(steady),
        "cache_bytes": stream.state.cache.nbytes,
        "weight_bytes": sum(p.nbytes for p in stream.model.parameters()),
        "memory_bytes": memory[-1],
        "memory_bytes_per_100_chunks": _growth(np.array(memory[skipped:], dtype=float)),
    }


def format_bench(result: dict[str, Any]) -> str:
    """The measurements as lines of text."""
    options, chunk = result["options"], result["chunk_seconds"]
    lines = [
        f"{options['size']} {options['width']}x{options['height']} {options['dtype']} "
        f"{options['attention']}, {options['chunks']} chunks, {result['machine']}, "
        f"torch {result['torch']}",
        f"first chunk     {result['first_chunk_seconds']:.4f} s",
        f"a later chunk   {chunk['p50']:.4f} s median, {chunk['p95']:.4f} p95, "
        f"{chunk['max']:.4f} max, {result['images_per_second']:.2f} images/s (network alone)",
        f"weights         {result['weight_bytes'] / 1e6:.1f} MB",
        f"KV cache        {result['cache_bytes'] / 1e6:.1f} MB",
    ]
    if result["memory_bytes"] is not None:
        lines.append(f"memory held     {result['memory_bytes'] / 1e6:.1f} MB")
    for what, unit, scale in (("time", "ms", 1e3), ("memory", "MB", 1e-6)):
        key = "seconds_per_100_chunks" if what == "time" else "memory_bytes_per_100_chunks"
        if result[key] is not None:
            lines.append(f"{what + ' growth':<15} {result[key] * scale:+.3f} {unit} per 100 chunks")
    return "\n".join(lines)


def _random_stream(options: BenchOptions) -> Stream:
    config = SIZES[options.size]
    model = WanModel(config, device=options.device, dtype=options.dtype)
    generator = torch.Generator(options.device).manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=WEIGHT_STD, generator=generator)
    shape = (1, config.text_len, config.text_dim)
    prompt = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return Stream(
        model,
        prompt,
        height=options.height,
        width=options.width,
        cache=options.cache,
        attention=attention_backend(options.attention),
    )


def _percentiles(values: np.ndarray[Any, Any]) -> Sequence[float]:
    return [float(v) for v in np.percentile(values, (50, 95, 100))]


def _growth(values: np.ndarray[Any, Any]) -> float | None:
    """How much the values rise over 100 chunks, by a straight line; None for too few."""
    if len(values) < 10 or np.isnan(values).any():
        return None
    return 100 * float(np.polyfit(np.arange(len(values)), values, 1)[0])


def _memory(device: str) -> int | None:
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")  # pages; the second number is what is resident
    if not statm.exists():
        return None
    import resource

    return int(statm.read_text().split()[1]) * resource.getpagesize()


def _machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
