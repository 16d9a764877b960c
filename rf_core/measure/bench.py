"""How fast a stream runs and whether it stays flat: what `python -m rf_core bench` measures.

Time to the first image, cold and warm; then every chunk's time in the network, in each decoder and
on the way to bytes on the host; memory held and at its peak, and the slope of both over the length;
what a change of prompt costs in each mode; what a snapshot takes. `measure.workload` says what is
run. Outputs are checked to be finite. Device time is waited for wherever a time is taken; between
chunks a run does not wait, so rates "streamed" are what it reaches.
"""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import TEMPORAL_FACTOR
from ..decoders.decoder import Decoder, DecoderState
from ..decoders.handoff import Handoff
from ..fast.stopwatch import Stopwatch
from ..state import Snapshot
from ..stream import Stream
from ..video import to_uint8
from .machine import format_machine, machine
from .table import format_table
from .workload import DecoderName, Workload, WorkloadOptions, load_workload

SWITCHES = ("soft", "recache", "blend 3", "cut")
"""Changes of prompt that are timed."""
STREAMED = 10
"""Chunks that are made one after another, as a run does it, after two that are not counted."""
REPEATS = 3
"""How often a warm start or a change of prompt is timed, for its median."""

Decode = Callable[[Tensor], Tensor | None]
"""A chunk's latents [B, C, F, h, w] to images [B, T, 3, H, W]; None without a decoder."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions(WorkloadOptions):
    """What is measured."""

    chunks: int = 500
    """Chunks to stream."""
    compile: bool = False
    """Compile every block with torch.compile; the cold start is measured before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile and self.graphs:
            raise ValueError("compiled blocks are not captured; ask for --compile or for graphs")
        if self.chunks < 2:
            raise ValueError(f"{self.chunks} chunks leave nothing after the first; measure 2")


Report = Callable[[str, Any], None]
"""Called with the name and the value of a measurement as soon as it is taken: `first_image`, then
`chunk` with the seconds of each, and what comes after."""


@torch.no_grad()
def bench(options: BenchOptions, report: Report = lambda name, value: None) -> dict[str, Any]:
    """Stream and measure; times in seconds, memory in bytes, all of it JSON can hold."""
    workload = load_workload(options)
    first = first_image(workload, options.compile)
    report("first_image", first)
    workload = replace(workload, encoder=None)  # gone before a stream begins, as in a real run
    _reset_peak(options.device)
    stream = workload.stream()
    laps, memory = _laps(stream, workload, options, report)
    clocks = machine(options.device)  # at once: they fall when the work ends
    peaks = _memory_peaks(options.device)
    report("memory", peaks)
    num_streamed = min(STREAMED, options.chunks)
    network_streamed = network_streamed_fps(stream, num_streamed)
    report("network_streamed_fps", network_streamed)
    switches, snapshot = switch_costs(stream, workload.prompts), snapshot_costs(stream)
    report("switches", switches)
    streamed = {}
    for name, decoder in workload.decoders.items():  # last: the stream's own does not see these
        streamed[name] = streamed_fps(stream, decoder, num_streamed)
        report(f"{name}_streamed_fps", streamed[name])
    growing = options.cache.window_frames // options.cache.chunk_frames + 1
    skipped = growing if options.chunks > 2 * growing else 1
    steady = {name: np.array(seconds[skipped:]) for name, seconds in laps.items()}
    return {
        "options": options.plain(),
        "machine": clocks,
        "attention": workload.attention.plain(),
        "first_image": first,
        "network_streamed_fps": network_streamed,
        **_rates(steady, streamed, options),
        "cache_bytes": stream.state.cache.nbytes,
        "weight_bytes": sum(p.nbytes for p in workload.model.parameters()),
        "memory_bytes": memory[-1],
        **peaks,
        "memory_bytes_per_100_chunks": growth(np.array(memory[skipped:], dtype=float)),
        "switches": switches,
        "snapshot": snapshot,
    }


def first_image(workload: Workload, compiled: bool = False) -> dict[str, Any]:
    """Seconds to the first image on the host (to the first latents, without a decoder).

    `cold` is the process' very first, `warm` the median of later streams on the same weights,
    `text` the encoding of a prompt in each case, `compile` what torch.compile took.
    """
    cold = _start(workload)
    compile_seconds = _compile(workload) if compiled else None
    warm = statistics.median(_start(workload) for _ in range(REPEATS))
    return {
        "load": workload.load_seconds,
        "cold": cold,
        "warm": warm,
        "text_cold": workload.text_seconds,
        "text_warm": _text_seconds(workload),
        "compile": compile_seconds,
    }


def switch_costs(stream: Stream, prompts: Sequence[Tensor]) -> dict[str, dict[str, float]]:
    """Seconds from `switch()` to the first image of the next chunk, by mode, beside a plain chunk.

    `slowest` is the slowest chunk until the change is over, a blend's recache included.
    """
    costs, now = {}, stream.snapshot()  # and no fork, which would take a second cache
    for mode in ("plain", *SWITCHES):
        runs = [_switch_seconds(stream, now, mode, prompts[-1]) for _ in range(REPEATS)]
        costs[mode] = {
            "first": statistics.median(seconds[0] for seconds in runs),
            "slowest": statistics.median(max(seconds) for seconds in runs),
        }
    stream.restore(now)
    return costs


def network_streamed_fps(stream: Stream, chunks: int) -> float:
    """Images a second of the network as a run drives it: nobody waits between chunks, so a card
    always has work queued. Two chunks more than are counted; the stream is left where it was."""
    now = stream.snapshot()
    for chunk in range(-2, chunks):
        if chunk == 0:
            watch = Stopwatch(stream.device)
        stream.generate()
    seconds = watch.lap()
    stream.restore(now)
    return chunks * stream.cache_config.chunk_frames * TEMPORAL_FACTOR / seconds


def streamed_fps(stream: Stream, decoder: Decoder, chunks: int) -> float:
    """Images a second as a run makes them: on a card a chunk is decoded and copied to the host
    while the network makes the next one. The stream goes on by two chunks more than are counted."""
    state: DecoderState | None = None
    images = 0
    with Handoff(decoder, lambda images: None, device=stream.device) as handoff:
        for chunk in range(-2, chunks):
            if chunk == 0:
                handoff.flush()
                watch = Stopwatch(stream.device)
            state = handoff.submit(stream.generate(), state)
            if chunk >= 0:
                images += decoder.images_of(stream.cache_config.chunk_frames, first=False)
        handoff.flush()
        return images / watch.lap()


def snapshot_costs(stream: Stream) -> dict[str, float]:
    """Bytes of an exact and a compact snapshot, and how far the next chunk after the compact one
    lies from the next chunk of the stream: relative norm of the latents, mean images in [0, 1]."""
    exact, compact = stream.snapshot(), stream.snapshot(compact=True)
    expected = stream.step()
    stream.restore(compact)
    found = stream.step()
    stream.restore(exact)
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
    options = result["options"]
    title = (
        f"{options['size']} {options['width']}x{options['height']}, {options['chunks']} chunks, "
        f"{options['dtype']}, {result['attention']['name']}"
        f"{', compiled' if options['compile'] else ''}{', graphs' if options['graphs'] else ''}"
    )
    facts = [*format_machine(result["machine"]), *_first_rows(result)]
    return "\n".join(
        [
            title,
            *(f"{name:<14} {text}" for name, text in facts),
            "",
            *_chunk_table(result),
            "",
            *(f"{name:<14} {text}" for name, text in _memory_rows(result)),
            "",
            *_switch_table(result),
        ]
    )


def _laps(
    stream: Stream, workload: Workload, options: BenchOptions, report: Report
) -> tuple[dict[str, list[float]], list[int | None]]:
    """Seconds of every chunk by stage, and the memory held after it."""
    lanes = _lanes(stream, workload)
    laps: dict[str, list[float]] = {"network": []}
    laps |= {name + stage: [] for name in lanes for stage in ("", "_host")}
    memory = []
    for _ in range(options.chunks):
        chunk = _timed_chunk(stream, lanes)
        for name, seconds in chunk.items():
            laps[name].append(seconds)
        memory.append(_memory_held(options.device))
        report("chunk", chunk)
    return laps, memory


def _timed_chunk(stream: Stream, lanes: dict[str, Decode]) -> dict[str, float]:
    watch = Stopwatch(stream.device)
    latents = stream.generate()
    seconds = {"network": watch.lap()}
    if not latents.isfinite().all():
        raise ValueError("latents are not finite; measure in a wider dtype")
    for name, decode in lanes.items():
        watch.lap()
        images = decode(latents)
        seconds[name] = watch.lap()
        assert images is not None
        to_uint8(images).cpu()
        seconds[f"{name}_host"] = watch.lap()
    return seconds


def _lanes(stream: Stream, workload: Workload) -> dict[str, Decode]:
    lanes: dict[str, Decode] = {}
    for name, decoder in workload.decoders.items():
        lanes[name] = stream.decode if decoder is stream.decoder else _beside(decoder)
    return lanes


def _beside(decoder: Decoder) -> Decode:
    """A decoder with a state of its own, beside the stream's."""
    state: DecoderState | None = None

    def decode(latents: Tensor) -> Tensor:
        nonlocal state
        images, state = decoder.decode(latents, state)
        return images

    return decode


def _start(workload: Workload) -> float:
    """Seconds until a stream's first image is on the host, handed on as a run does."""
    watch, began = Stopwatch(workload.options.device), time.perf_counter()
    stream = workload.stream()
    latents = stream.generate()
    if stream.decoder is None:
        return watch.lap()
    arrived: list[float] = []
    with Handoff(
        stream.decoder, lambda images: arrived.append(time.perf_counter()), device=stream.device
    ) as handoff:
        handoff.submit(latents, None)
    return arrived[0] - began


def _first_image_of(stream: Stream) -> None:
    images = stream.decode(stream.generate())
    if images is not None:
        to_uint8(images).cpu()


def _text_seconds(workload: Workload) -> float | None:
    if workload.encoder is None:
        return None
    seconds, watch = [], Stopwatch(workload.options.device)
    for _ in range(REPEATS):
        workload.encoder.encode(["a green triangle moves down"])
        seconds.append(watch.lap())
    return statistics.median(seconds)


def _compile(workload: Workload) -> float:
    # A window's growth and one eviction meet every shape; the second time nothing is compiled.
    for block in workload.model.blocks:
        block.compile()
    cache = workload.options.cache
    seconds = []
    for _ in range(2):
        stream, watch = workload.stream(), Stopwatch(workload.options.device)
        for _ in range(cache.window_frames // cache.chunk_frames + 2):
            stream.generate()
        seconds.append(watch.lap())
    return max(0.0, seconds[0] - seconds[1])


def _switch_seconds(stream: Stream, now: Snapshot, mode: str, embeds: Tensor) -> list[float]:
    stream.restore(now)
    seconds: list[float] = []
    watch = Stopwatch(stream.device)
    if mode != "plain":
        stream.switch(embeds, mode)
    while not seconds or stream.state.blend is not None or stream.state.recache_due:
        _first_image_of(stream)
        seconds.append(watch.lap())
    return seconds


def _rates(
    steady: dict[str, Any], streamed: dict[DecoderName, float], options: BenchOptions
) -> dict[str, Any]:
    images = options.cache.chunk_frames * TEMPORAL_FACTOR
    network = steady["network"]
    decoders = {}
    for name in options.decoders:
        decode, host = steady[name], steady[f"{name}_host"]
        decoders[name] = {
            "decode_seconds": _percentiles(decode),
            "host_seconds": _percentiles(host),
            "decode_fps": images / float(np.median(decode)),
            "fps": images / float(np.median(network + decode)),
            "host_fps": images / float(np.median(network + decode + host)),
            "streamed_fps": streamed[name],
        }
    whole = network
    if options.decoders:
        first = options.decoders[0]
        whole = network + steady[first] + steady[f"{first}_host"]
    return {
        "network_seconds": _percentiles(network),
        "network_fps": images / float(np.median(network)),
        "decoders": decoders,
        "seconds_per_100_chunks": growth(whole),
    }


def _first_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    first = result["first_image"]
    what = "first image" if result["decoders"] else "first latents"
    rows = [("loading", f"{first['load']:.3f} s")]
    for state in ("cold", "warm"):
        text = f"{first[state]:.4f} s from embeddings"
        if (encoding := first[f"text_{state}"]) is not None:
            text += f", {first[state] + encoding:.4f} s from the text"
        rows.append((what, f"{text} ({state})"))
    if first["compile"] is not None:
        rows.append(("compiling", f"{first['compile']:.2f} s, between cold and warm"))
    return rows


def _chunk_table(result: dict[str, Any]) -> list[str]:
    streamed = f"{result['network_streamed_fps']:.1f}"
    rows = [
        _chunk_row("network", result["network_seconds"], result["network_fps"]),
        ["network, streamed", "", "", "", streamed],
    ]
    for name, found in result["decoders"].items():
        rows += [
            _chunk_row(f"+ {name} decode", found["decode_seconds"], found["fps"]),
            _chunk_row("+ to bytes on the host", found["host_seconds"], found["host_fps"]),
            ["all of it, decoding beside the network", "", "", "", f"{found['streamed_fps']:.1f}"],
        ]
    return format_table(("seconds a chunk", "p50", "p95", "max", "images/s so far"), rows)


def _chunk_row(name: str, percentiles: dict[str, float], fps: float) -> list[str]:
    return [name, *(f"{seconds:.4f}" for seconds in percentiles.values()), f"{fps:.1f}"]


def _memory_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    reserved = result["memory_peak_reserved_bytes"]
    peak = _megabytes(result["memory_peak_bytes"])
    snapshot = result["snapshot"]
    off = f"next chunk off by {snapshot['compact_latents_error']:.2%} in latents"
    if "compact_images_error" in snapshot:
        off += f", {snapshot['compact_images_error'] * 255:.2f} of 255 in images"
    rows = [
        ("weights", _megabytes(result["weight_bytes"])),
        ("KV cache", _megabytes(result["cache_bytes"])),
        ("memory", f"{_megabytes(result['memory_bytes'])} held at the end"),
        ("memory peak", peak if reserved is None else f"{peak}, {_megabytes(reserved)} reserved"),
        ("snapshot", f"exact {_megabytes(snapshot['exact_bytes'])}"),
        ("", f"compact {_megabytes(snapshot['compact_bytes'])}, {off}"),
    ]
    if (slope := result["seconds_per_100_chunks"]) is not None:
        rows.append(("time growth", f"{slope * 1e3:+.3f} ms per 100 chunks"))
    if (slope := result["memory_bytes_per_100_chunks"]) is not None:
        rows.append(("memory growth", f"{slope / 1e6:+.3f} MB per 100 chunks"))
    return rows


def _switch_table(result: dict[str, Any]) -> list[str]:
    what = "image" if result["decoders"] else "latents"
    plain = result["switches"]["plain"]["first"]
    rows = [
        [mode, f"{cost['first']:.4f}", f"{cost['first'] / plain:.2f}", f"{cost['slowest']:.4f}"]
        for mode, cost in result["switches"].items()
    ]
    head = ("prompt switch", f"s to the next {what}", "of a plain chunk", "slowest chunk, s")
    return format_table(head, rows)


def _megabytes(count: float | None) -> str:
    return "unknown" if count is None else f"{count / 1e6:.2f} MB"


def _percentiles(values: np.ndarray[Any, Any]) -> dict[str, float]:
    found = np.percentile(values, (50, 95, 100)).tolist()
    return dict(zip(("p50", "p95", "max"), found, strict=True))


def growth(values: Sequence[float] | np.ndarray[Any, Any]) -> float | None:
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


def _reset_peak(device: str) -> None:
    gc.collect()
    if torch.device(device).type == "cuda":  # a process' resident peak cannot be taken back
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _memory_peaks(device: str) -> dict[str, int | None]:
    """Allocated and reserved on a card since `_reset_peak`, resident in the process elsewhere."""
    peak: int | None = None
    reserved: int | None = None
    if torch.device(device).type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        reserved = torch.cuda.max_memory_reserved(device)
    elif platform.system() == "Linux":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"memory_peak_bytes": peak, "memory_peak_reserved_bytes": reserved}
