"""Where a chunk's time goes: what `python -m rf_core profile` measures.

Two runs. In the first, borders between kinds of work are timed and nothing else is watched: what
lies between two borders belongs to the innermost kind begun and not ended. Borders are set from
outside, around modules, the fused steps, the attention function and the cache, so the network knows
nothing of it; what a module does outside those is its own kind. In the second run
torch.profiler records every operator, for the trace and the list of the costliest ones.

Each kind stands beside its counted work (`rf_core.measure.counts`).
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, record_function

from .. import kernels
from ..attention import Attention
from ..config import Grid
from ..fast.stopwatch import Stopwatch, seconds_of, wait
from ..fp8 import Fp8Linear
from ..layers import Block, CountedPromptKV, CrossAttention, Head, SelfAttention
from ..model import WanModel
from ..stream import Stream
from ..video import to_uint8
from .counts import (
    CROSS_LINEARS,
    CROSS_PRODUCTS,
    ELEMENTWISE,
    EVICTION,
    FEED_FORWARD,
    HEADS,
    NORMS,
    OTHER_LINEARS,
    SELF_LINEARS,
    SELF_PRODUCTS,
    Work,
    chunk_work,
    decoder_work,
)
from .machine import format_machine, machine
from .table import format_table
from .workload import Workload, WorkloadOptions, load_workload

REST = "noise, schedule, rest"
TO_HOST = "to bytes on the host"
DECODE = "decode"
KERNELS = {
    "modulated_norm": NORMS,
    "modulated_after_residual": NORMS,
    "affine_after_residual": NORMS,
    "norm_rotate": HEADS,
    "write_keys_values": HEADS,
    "linear_gelu": FEED_FORWARD,
    "quantise_rows": ELEMENTWISE,
    "prompt_attention": CROSS_PRODUCTS,
}
"""Kinds of the fused steps."""
UNFUSED = {"gelu": ELEMENTWISE, "linear": SELF_LINEARS}
"""Kinds of steps that the definitions make by themselves and the kernels within another.

Of the linear layers those that are one product (`rf_core.fused_linear`); the others are modules.
"""
NUM_OPERATORS = 12
"""Costliest operators listed."""

_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace's events that take a card's time."""
_TO_HOST_EVENT = "DtoH"  # in the name of a copy to the host

Event = dict[str, Any]
"""One of a trace in Chrome's format: its times `ts` and `dur` are microseconds."""
Result = TypeVar("Result")
Timestamp = float | torch.cuda.Event


@dataclass(frozen=True, kw_only=True)
class ProfileOptions(WorkloadOptions):
    """What is profiled."""

    chunks: int = 5
    """Chunks of the steady state that are timed; one more is traced."""
    trace: Path
    """Where the trace goes, in Chrome's format."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunks < 1:
            raise ValueError(f"{self.chunks} chunks show nothing; profile 1")
        if torch.device(self.device).type not in ("cpu", "cuda"):
            raise ValueError(f"kinds of work cannot be timed on {self.device}; use cpu or cuda")
        if len(self.decoders) > 1:
            raise ValueError("a profile is of one decoder; ask for wan or taehv")


@dataclass(frozen=True, kw_only=True)
class DeviceTime:
    """What a card did in a span of time, in seconds."""

    span: float
    """From the first thing that it did to the end of the last."""
    busy: float
    """How much of it something ran."""
    to_host: float
    """How long copies to the host took, which run beside and count in neither."""

    @property
    def idle(self) -> float:
        """How much of the span nothing ran."""
        return self.span - self.busy


class Borders(Protocol):
    """Told when a kind of work begins and ends; kinds nest."""

    def begin(self, kind: str) -> None: ...

    def end(self) -> None: ...


class Timeline:
    """Seconds by kind, each span counted to the innermost kind alone."""

    def __init__(self, device: str | torch.device) -> None:
        self._device = torch.device(device)
        self._open = [REST]
        self._records: list[tuple[str, Timestamp]] = []

    def begin(self, kind: str) -> None:
        self._record(kind)
        self._open.append(kind)

    def end(self) -> None:
        self._open.pop()
        self._record(self._open[-1])

    def seconds(self) -> dict[str, float]:
        """Seconds of each kind between the first border and the last."""
        wait(self._device)
        found: dict[str, float] = {}
        for (kind, start), (_, stop) in zip(self._records, self._records[1:], strict=False):
            found[kind] = found.get(kind, 0.0) + _between(start, stop)
        return found

    def _record(self, kind: str) -> None:
        self._records.append((kind, self._now()))

    def _now(self) -> Timestamp:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class Ranges:
    """Names the kinds in a profiler's trace."""

    def __init__(self) -> None:
        self._open: list[record_function] = []

    def begin(self, kind: str) -> None:
        self._open.append(record_function(kind))
        self._open[-1].__enter__()

    def end(self) -> None:
        self._open.pop().__exit__(None, None, None)


@torch.no_grad()
def profile(options: ProfileOptions) -> dict[str, Any]:
    """Time by kind beside counted work, the costliest operators, and the trace on disk."""
    workload = load_workload(options)
    stream = workload.stream()
    for _ in range(steady_after(stream)):
        play(stream)
    plain = _plain_seconds(stream, options)
    timeline = Timeline(options.device)
    with instrumented(stream, timeline):
        for _ in range(options.chunks):
            timeline.begin(REST)
            play(stream, timeline)
            timeline.end()
    seconds = {kind: s / options.chunks for kind, s in timeline.seconds().items()}
    operators = _trace(stream, options)
    return {
        "options": options.plain(),
        "machine": machine(options.device),
        "plain_seconds": plain,
        "kinds": with_counts(
            seconds, counted(stream, workload), rates(options.device, options.dtype)
        ),
        "operators": operators,
    }


def steady_after(stream: Stream) -> int:
    """Chunks until the window is full and has let one go."""
    return stream.cache_config.window_frames // stream.cache_config.chunk_frames + 1


def play(stream: Stream, borders: Borders | None = None) -> None:
    """One chunk to bytes on the host, its stages between borders."""
    borders = borders or Timeline("cpu")
    latents = stream.generate()
    images = _within(borders, DECODE, stream.decode)(latents)
    if images is not None:
        _within(borders, TO_HOST, lambda: to_uint8(images).cpu())()


@contextmanager
def instrumented(stream: Stream, borders: Borders) -> Iterator[None]:
    """Sets borders in a stream's network, attention and cache, and takes them away again."""
    inside = [SELF_PRODUCTS]  # which attention's products come next
    calls: list[tuple[object, str, Callable[..., Any]]] = [
        (stream, "attention", _marked_attention(stream.attention, borders, inside)),
        (cache := stream.state.cache, "advance", _within(borders, EVICTION, cache.advance)),
        *(
            (place, name, _within(borders, kind, getattr(place, name)))
            for place, kinds in ((kernels, KERNELS), (kernels.reference, UNFUSED))
            for name, kind in kinds.items()
        ),
    ]
    assert isinstance(stream.model, WanModel), "graphs have no modules to watch"
    for name, module in stream.model.named_modules():
        if (kind := kind_of(name, module)) is not None:
            call = _attending(inside, module)
            calls.append((module, "forward", _within(borders, kind, call)))
    with ExitStack() as stack:
        for owner, name, call in calls:
            stack.enter_context(patch.object(owner, name, call))
        yield


def kind_of(name: str, module: nn.Module) -> str | None:
    """The kind of work a module of the network does outside its sub-modules, None for its own."""
    if isinstance(module, nn.Linear | Fp8Linear | nn.Conv3d):
        places = {"self_attn": SELF_LINEARS, "cross_attn": CROSS_LINEARS, "ffn": FEED_FORWARD}
        return next((k for place, k in places.items() if place in name), OTHER_LINEARS)
    if "Norm" in type(module).__name__:
        return NORMS
    kinds = {
        SelfAttention: HEADS,
        CrossAttention: HEADS,
        Block: ELEMENTWISE,
        Head: ELEMENTWISE,
    }
    return kinds.get(type(module))


def counted(stream: Stream, workload: Workload) -> dict[str, Work]:
    """The work of one chunk of the steady state by kind, the decoder's included."""
    model, cache = stream.model.config, stream.cache_config
    grid = Grid.of_latents(*stream.latent_size, model.patch_size)
    keys = prompt_keys(stream)
    parts = chunk_work(model, cache, stream.sampler, grid, stream.dtype.itemsize, keys)
    for decoder in workload.decoders.values():
        shape = (stream.batch, model.out_dim, cache.chunk_frames, *stream.latent_size)
        parts[DECODE] = decoder_work(decoder.codec, shape)
    return parts


def prompt_keys(stream: Stream) -> int:
    """How many keys of the prompt a pass computes with; waits for the device."""
    first = stream._context[1][0]
    if isinstance(first, CountedPromptKV):
        return int(first.bias_BS.isfinite().sum(1).max())
    return first.k_BSHD.shape[1]


def rates(device: str, dtype: torch.dtype) -> Work:
    """What the device does in a second, measured: of a large product and of a large copy."""
    large = torch.device(device).type == "cuda"
    a = torch.randn((8192, 8192) if large else (1024, 1024), device=device).to(dtype)
    source = torch.empty(1 << (30 if large else 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = seconds_of(lambda: a @ a, device)
    copy = seconds_of(lambda: target.copy_(source), device)
    return Work(int(2 * a.shape[0] ** 3 / product), int(2 * source.nbytes / copy))


def with_counts(
    seconds: dict[str, float], work: dict[str, Work], rate: Work
) -> list[dict[str, Any]]:
    """Each kind's seconds with its counted work and what that takes at the given rates."""
    rows = []
    for kind in sorted({*seconds, *work}, key=lambda kind: -seconds.get(kind, 0.0)):
        needed = work.get(kind, Work())
        rows.append(
            {
                "kind": kind,
                "seconds": seconds.get(kind),
                "flops": needed.flops,
                "bytes": needed.bytes,
                "seconds_at_best": max(needed.flops / rate.flops, needed.bytes / rate.bytes),
            }
        )
    return rows


def format_profile(result: dict[str, Any]) -> str:
    """The profile as lines of text."""
    options = result["options"]
    title = (
        f"{options['size']} {options['width']}x{options['height']}, {options['dtype']}, "
        f"{options['attention']}, mean of {options['chunks']} chunks"
    )
    spent = sum(row["seconds"] or 0.0 for row in result["kinds"])
    rows = [
        *format_machine(result["machine"]),
        ("a chunk", f"{spent:.4f} s with borders, {result['plain_seconds']:.4f} s without"),
        ("trace", options["trace"]),
    ]
    return "\n".join(
        [
            title,
            *(f"{name:<14} {text}" for name, text in rows),
            "",
            *_kind_table(result["kinds"], spent),
            "",
            *_operator_table(result["operators"]),
        ]
    )


def _kind_table(kinds: list[dict[str, Any]], spent: float) -> list[str]:
    everything = {
        "kind": "all",
        "seconds": spent,
        **{name: sum(row[name] for row in kinds) for name in ("flops", "bytes", "seconds_at_best")},
    }
    rows = []
    for row in (*kinds, everything):
        seconds = row["seconds"]
        timed = ("elsewhere", "") if seconds is None else (_ms(seconds), f"{seconds / spent:.1%}")
        amounts = (f"{row[name] / 1e9:.3g}" if row[name] else "" for name in ("flops", "bytes"))
        best = _ms(row["seconds_at_best"]) if row["seconds_at_best"] else ""
        rows.append((row["kind"], *timed, *amounts, best))
    return format_table(("kind", "ms", "share", "GFLOP", "GB", "ms at best"), rows)


def _operator_table(operators: list[dict[str, Any]]) -> list[str]:
    rows = [(row["name"], str(row["calls"]), _ms(row["seconds"])) for row in operators]
    return format_table(("operator", "calls", "ms, its own"), rows)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _plain_seconds(stream: Stream, options: ProfileOptions) -> float:
    watch, seconds = Stopwatch(options.device), []
    for _ in range(options.chunks):
        play(stream)
        seconds.append(watch.lap())
    return statistics.fmean(seconds)


def costliest(
    call: Callable[[], Any], device: str | torch.device, number: int
) -> list[dict[str, Any]]:
    """The kernels of a call that take most time on a card, elsewhere torch's operators."""
    wait(device)
    with torch.profiler.profile(activities=_activities(device)) as recorded:
        call()
        wait(device)
    kind = torch.device(device).type.upper()
    return _by_time(recorded, device, number, lambda event: event.device_type.name == kind)


def device_events(call: Callable[[], Any], device: str | torch.device) -> list[Event]:
    """What a card does for a call, as torch.profiler's trace has it; nothing elsewhere."""
    wait(device)
    with torch.profiler.profile(activities=_activities(device)) as recorded:
        call()
        wait(device)
    with tempfile.TemporaryDirectory() as folder:
        recorded.export_chrome_trace(str(path := Path(folder) / "trace.json"))
        events: list[Event] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return [event for event in events if event.get("cat") in _ON_DEVICE]


def busy_and_idle(events: Sequence[Event]) -> DeviceTime | None:
    """How much of the time between a card's first event and its last it had something to do.

    None where it had nothing to do at all.
    """
    copies = [event for event in events if _TO_HOST_EVENT in event["name"]]
    work = [event for event in events if _TO_HOST_EVENT not in event["name"]]
    if not work:
        return None
    begin = min(event["ts"] for event in work)
    span = max(event["ts"] + event["dur"] for event in work) - begin
    return DeviceTime(span=span / 1e6, busy=_covered(work), to_host=_covered(copies))


def costliest_events(events: Sequence[Event], number: int) -> list[dict[str, Any]]:
    """The events' names that take most time, as rows like those of `costliest`."""
    calls = Counter(event["name"] for event in events)
    spent = Counter[str]()
    for event in events:
        spent[event["name"]] += event["dur"]
    return [
        {"name": name, "calls": calls[name], "seconds": duration / 1e6}
        for name, duration in spent.most_common(number)
    ]


def _covered(events: Sequence[Event]) -> float:
    """Seconds in which at least one of the events runs."""
    covered, reached = 0.0, -float("inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        end = event["ts"] + event["dur"]
        covered += max(0.0, end - max(reached, event["ts"]))
        reached = max(reached, end)
    return covered / 1e6


def _trace(stream: Stream, options: ProfileOptions) -> list[dict[str, Any]]:
    """Writes the trace of one chunk; the costliest operators by their own time."""
    ranges, activities = Ranges(), _activities(options.device)
    with torch.profiler.profile(activities=activities) as recorded, instrumented(stream, ranges):
        play(stream, ranges)
        wait(options.device)
    options.trace.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(options.trace))
    return _by_time(
        recorded, options.device, NUM_OPERATORS, lambda event: event.key.startswith("aten::")
    )


def _activities(device: str | torch.device) -> list[ProfilerActivity]:
    cuda = torch.device(device).type == "cuda"
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]


def _by_time(
    recorded: torch.profiler.profile,
    device: str | torch.device,
    number: int,
    wanted: Callable[[Any], bool],
) -> list[dict[str, Any]]:
    cuda = torch.device(device).type == "cuda"
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = [
        {"name": event.key, "calls": event.count, "seconds": getattr(event, own) / 1e6}
        for event in recorded.key_averages()
        if wanted(event)
    ]
    return sorted(found, key=lambda row: -row["seconds"])[:number]


def _attending(inside: list[str], module: nn.Module) -> Callable[..., Any]:
    """The module's forward; an attention's own says whose products follow."""
    if not isinstance(module, SelfAttention | CrossAttention):
        return module.forward
    kind = SELF_PRODUCTS if isinstance(module, SelfAttention) else CROSS_PRODUCTS
    forward = module.forward

    def attending(*args: Any) -> Any:
        inside[0] = kind
        return forward(*args)

    return attending


def _marked_attention(attention: Attention, borders: Borders, inside: list[str]) -> Attention:
    def marked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _within(borders, inside[0], attention)(q, k, v)

    return marked_attention


def _within(borders: Borders, kind: str, call: Callable[..., Result]) -> Callable[..., Result]:
    def within(*args: Any, **options: Any) -> Result:
        borders.begin(kind)
        try:
            return call(*args, **options)
        finally:
            borders.end()

    return within


def _between(start: Timestamp, stop: Timestamp) -> float:
    if isinstance(start, float):
        assert isinstance(stop, float)
        return stop - start
    assert not isinstance(stop, float)
    return start.elapsed_time(stop) / 1e3
