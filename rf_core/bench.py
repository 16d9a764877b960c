"""How fast a stream runs and whether it stays flat: what `python -m rf_core bench` measures.

`demo` streams the bundled weights and decodes. The other sizes have random weights (the head
included, so that nothing is trivially zero) and no decoder: only their time and memory mean
anything. Outputs are checked to be finite.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attention import attention_backend
from .checkpoint import load_student
from .config import TEMPORAL_FACTOR, WAN_1_3B, WAN_14B, CacheConfig, ModelConfig
from .decoder import Decoder, load_decoder
from .generate import Files
from .model import WanModel
from .stream import Stream
from .text import load_text_encoder

TINY = ModelConfig(
    dim=48,
    ffn_dim=96,
    freq_dim=32,
    text_dim=24,
    text_len=16,
    num_heads=2,
    num_layers=2,
)
RANDOM_SIZES = MappingProxyType({"tiny": TINY, "1.3b": WAN_1_3B, "14b": WAN_14B})
SIZES = ("demo", *RANDOM_SIZES)
WEIGHT_STD = 0.02
DEMO_PROMPT = "a red circle moves right slowly"


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured."""

    size: str = "tiny"
    """One of SIZES."""
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


Report = Callable[[int, float], None]
"""Called with each chunk's number and its seconds."""


@torch.no_grad()
def bench(options: BenchOptions, report: Report = lambda chunk, seconds: None) -> dict[str, Any]:
    """Stream and measure; times in seconds, memory in bytes, all of it JSON can hold."""
    stream = _stream(options)
    times, memory = [], []
    for chunk in range(options.chunks):
        times.append(_timed_chunk(stream))
        memory.append(_memory_held(options.device))
        report(chunk, sum(times[-1]))
    growing = options.cache.window_frames // options.cache.chunk_frames + 1
    skipped = growing if options.chunks > 2 * growing else 1
    network, decode = np.array(times).T
    images = options.cache.chunk_frames * TEMPORAL_FACTOR
    return {
        "options": {**asdict(options), "dtype": str(options.dtype).removeprefix("torch.")},
        "torch": torch.__version__,
        "machine": _machine(options.device),
        "first_chunk_seconds": float(network[0] + decode[0]),
        "network_seconds": _percentiles(network[skipped:]),
        "decode_seconds": _percentiles(decode[skipped:]) if stream.decoder else None,
        "network_fps": images / float(np.median(network[skipped:])),
        "fps": images / float(np.median((network + decode)[skipped:])),
        "seconds_per_100_chunks": _growth((network + decode)[skipped:]),
        "cache_bytes": stream.state.cache.nbytes,
        "weight_bytes": sum(p.nbytes for p in stream.model.parameters()),
        "memory_bytes": memory[-1],
        "memory_peak_bytes": _memory_peak(options.device),
        "memory_bytes_per_100_chunks": _growth(np.array(memory[skipped:], dtype=float)),
        "snapshot": snapshot_costs(stream),
    }


def snapshot_costs(stream: Stream) -> dict[str, float]:
    """Bytes of an exact and a compact snapshot, and how far the next chunk after the compact one
    lies from the next chunk of the stream: relative norm of the latents, mean images in [0, 1]."""
    exact, compact = stream.snapshot(), stream.snapshot(compact=True)
    twin = stream.fork()
    twin.restore(compact)
    expected, found = stream.fork().step(), twin.step()
    costs = {
        "exact_bytes": exact.nbytes,
        "compact_bytes": compact.nbytes,
        "compact_latents_error": float(
            (found.latents - expected.latents).norm() / expected.latents.norm()
        ),
    }
    if expected.images is not None and found.images is not None:
        costs["compact_images_error"] = float((found.images - expected.images).abs().mean())
    return costs


def format_bench(result: dict[str, Any]) -> str:
    """The measurements as lines of text."""
    options, decode = result["options"], result["decode_seconds"]
    rows = [
        ("machine", f"{result['machine']}, torch {result['torch']}"),
        ("first chunk", f"{result['first_chunk_seconds']:.4f} s"),
        ("network", f"{_times(result['network_seconds'])}, {result['network_fps']:.1f} images/s"),
    ]
    if decode is not None:
        rows += [("decode", _times(decode)), ("together", f"{result['fps']:.1f} images/s")]
    rows += [
        ("weights", _megabytes(result["weight_bytes"])),
        ("KV cache", _megabytes(result["cache_bytes"])),
        ("memory", f"{_megabytes(result['memory_bytes'])} held at the end"),
        ("memory peak", _megabytes(result["memory_peak_bytes"])),
    ]
    time_growth, memory_growth = (
        result[f"{what}_per_100_chunks"] for what in ("seconds", "memory_bytes")
    )
    if time_growth is not None:
        rows.append(("time growth", f"{time_growth * 1e3:+.3f} ms per 100 chunks"))
    if memory_growth is not None:
        rows.append(("memory growth", f"{memory_growth / 1e6:+.3f} MB per 100 chunks"))
    snapshot = result["snapshot"]
    off = f"next chunk off by {snapshot['compact_latents_error']:.2%} in latents"
    if "compact_images_error" in snapshot:
        off += f", {snapshot['compact_images_error'] * 255:.2f} of 255 in images"
    rows += [
        ("snapshot", f"exact {_megabytes(snapshot['exact_bytes'])}"),
        ("", f"compact {_megabytes(snapshot['compact_bytes'])}, {off}"),
    ]
    title = (
        f"{options['size']} {options['width']}x{options['height']}, {options['chunks']} chunks, "
        f"{options['dtype']}, {options['attention']}"
    )
    return "\n".join([title, *(f"{name:<14} {text}" for name, text in rows)])


def _stream(options: BenchOptions) -> Stream:
    model, prompt, decoder = _demo(options) if options.size == "demo" else _random(options)
    return Stream(
        model,
        prompt,
        height=options.height,
        width=options.width,
        decoder=decoder,
        cache=options.cache,
        attention=attention_backend(options.attention),
    )


def _demo(options: BenchOptions) -> tuple[WanModel, Tensor, Decoder | None]:
    files, device, dtype = Files(), options.device, options.dtype
    encoder = load_text_encoder(files.text_encoder, device=device, dtype=dtype)
    model, _ = load_student(files.model, device=device, dtype=dtype)
    return model, encoder.encode([DEMO_PROMPT]), load_decoder(files.vae, device, dtype)


def _random(options: BenchOptions) -> tuple[WanModel, Tensor, Decoder | None]:
    config = RANDOM_SIZES[options.size]
    model = WanModel(config, device=options.device, dtype=options.dtype)
    generator = torch.Generator(options.device).manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=WEIGHT_STD, generator=generator)
    shape = (1, config.text_len, config.text_dim)
    return model, torch.randn(shape, generator=torch.Generator().manual_seed(0)), None


def _timed_chunk(stream: Stream) -> tuple[float, float]:
    """Seconds of the network and of the decoder for the next chunk."""
    began = time.perf_counter()
    latents = stream.generate()
    if not latents.isfinite().all():  # also waits for the device
        raise ValueError("latents are not finite; measure in a wider dtype")
    made = time.perf_counter()
    images = stream.decode(latents)
    if images is not None:
        images.cpu()
    return made - began, time.perf_counter() - made


def _times(percentiles: dict[str, float]) -> str:
    p50, p95, most = percentiles.values()
    return f"{p50:.4f} s a chunk, p95 {p95:.4f}, at most {most:.4f}"


def _megabytes(count: float | None) -> str:
    return "unknown" if count is None else f"{count / 1e6:.2f} MB"


def _percentiles(values: np.ndarray[Any, Any]) -> dict[str, float]:
    found = np.percentile(values, (50, 95, 100)).tolist()
    return dict(zip(("p50", "p95", "max"), found, strict=True))


def _growth(values: np.ndarray[Any, Any]) -> float | None:
    """How much the values rise over 100 chunks, by a straight line; None for too few."""
    if len(values) < 10 or np.isnan(values).any():
        return None
    return 100 * float(np.polyfit(np.arange(len(values)), values, 1)[0])


def _memory_held(device: str) -> int | None:
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")  # pages; the second number is what is resident
    if not statm.exists():
        return None
    import resource

    return int(statm.read_text().split()[1]) * resource.getpagesize()


def _memory_peak(device: str) -> int | None:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if platform.system() != "Linux":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
