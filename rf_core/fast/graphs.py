"""Whole passes recorded once and replayed: the network without Python between its steps.

On a card a pass becomes a CUDA graph, which spares its launches too. On a CPU it becomes a
TorchScript trace: the same operations in the same order, to the bit; of a small network's time a
third is Python. Either replays one pass on the memory it was recorded with. So a pass' inputs are
copied to places of their own, caches are lent and come back, and there is a graph for every form of
a pass: while the window grows, when it is full, denoising or clean. What was captured for one
stream serves the next one of its size; one size is held at a time. A fork's cache is its own, and
its passes run as they would without graphs.

Weights may change: where they lie, as an adapter merged in place does, and the passes follow; or
by others in their place (assigned, moved, quantised), and all is recorded anew. Streams may be
stepped in threads of their own; their passes take turns.
"""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..attention import Attention, sdpa
from ..config import CacheConfig
from ..kv_cache import KeyValues, KVCache
from ..memory.offload import StreamedLayers
from ..model import ControlTokens, CountedPrompt, PromptContext, TimeContext, WanModel
from ..operations import is_watched
from ..rope import Rope
from ..vace import ControlledModel

logger = logging.getLogger(__name__)

Replay = Callable[[], Tensor]
"""Runs a captured pass again; its result, which the next replay of that pass may overwrite."""

Run = Callable[[], tuple[Tensor, ...]]
"""A pass: its result, empty where it has none, and the memory it has written to."""


class Capture(Protocol):
    """Makes a replay of a pass that reads and writes nothing but memory that stays."""

    patience: int
    """How often a form of pass is run before it is worth capturing."""

    def __call__(self, run: Run) -> Replay: ...


class GraphedModel:
    """Stands where a stream wants a network; every pass is captured once, then replayed.

    `capture` is the one of the model's device but for tests. Unless it `must`, a pass that fails
    to be recorded, as for want of memory, is warned of once, and all go on without. ValueError
    where the network cannot be captured, or can no longer.

    Of a network with control (`ControlledModel`) passes with one and without are recorded apart.
    """

    def __init__(
        self,
        model: WanModel | ControlledModel,
        capture: Capture | None = None,
        *,
        must: bool = True,
    ) -> None:
        self._model, self._given, self._must, self._failed = model, capture, must, False
        self._lock = threading.Lock()
        self.config, self.fingerprint = model.config, model.fingerprint
        self.control = model.control
        self.counted_prompt, self.time_context = model.counted_prompt, model.time_context
        self._forget(size=None)
        self._look_at_network()

    @property
    def network(self) -> WanModel:
        """The network, whose weights may be changed where they lie; of two the base."""
        return self._model.base if isinstance(self._model, ControlledModel) else self._model

    @property
    def patch_embedding(self) -> nn.Conv3d:
        """The network's, as it is now."""
        return self._model.patch_embedding

    def __call__(
        self,
        x: Tensor,
        time: TimeContext,
        prompt: PromptContext | CountedPrompt,
        cache: KeyValues,
        attention: Attention = sdpa,
        control: ControlTokens | None = None,
    ) -> Tensor:
        """See `WanModel.forward`. The flow is overwritten by the same stream's next pass."""
        return self._run(self._model.forward, x, time, prompt, cache, attention, control)

    def write_cache(
        self,
        x: Tensor,
        time: TimeContext,
        prompt: PromptContext | CountedPrompt,
        cache: KeyValues,
        attention: Attention = sdpa,
        control: ControlTokens | None = None,
    ) -> None:
        """See `WanModel.write_cache`."""
        self._run(self._model.write_cache, x, time, prompt, cache, attention, control)

    @property
    def control_channels(self) -> int:
        """See `ControlledModel.control_channels`."""
        return self._with_control.control_channels

    def control_facts(self) -> dict[str, Any] | None:
        """See `ControlledModel.control_facts`."""
        return self._with_control.control_facts()

    def embed_control(
        self, context: Tensor, strength_F: Tensor | None, dtype: torch.dtype
    ) -> ControlTokens:
        """See `ControlledModel.embed_control`; once a chunk, and so not recorded."""
        return self._with_control.embed_control(context, strength_F, dtype)

    @property
    def _with_control(self) -> ControlledModel:
        assert isinstance(self._model, ControlledModel), "it takes no control"
        return self._model

    def new_cache(self, config: CacheConfig, **sizes: Any) -> KVCache:
        """See `WanModel.new_cache`; the memory of one that is no longer in use is lent again."""
        if isinstance(self._capture, TraceCapture) and config.storage != "exact":
            return self._model.new_cache(config, **sizes)  # a trace loses sight of its rows
        size = (config, *sizes.items())
        with self._lock:
            if size != self._size:
                self._forget(size)
            if not self._free:
                self._free.append(self._model.new_cache(config, **sizes))
            memory = self._free.pop()
            cache = memory.shallow_copy()
            self._lent.add(memory.k_NBWHD.data_ptr())
            weakref.finalize(cache, self._free.append, memory)
            return cache

    def _forget(self, size: Any) -> None:
        self._size = size
        self._free: list[KVCache] = []
        self._lent: set[int] = set()
        self._forget_passes()

    def _forget_passes(self) -> None:
        self._inputs: dict[Any, _Inputs] = {}
        self._passes: dict[Any, _Pass] = {}
        self._uses: Counter[Any] = Counter()

    def _run(
        self,
        run: Callable[..., Any],
        x: Tensor,
        time: TimeContext,
        prompt: PromptContext | CountedPrompt,
        cache: KeyValues,
        attention: Attention,
        control: ControlTokens | None,
    ) -> Any:
        # What a view of a cache reads is made anew in each pass, which runs as it is; so does one
        # over more than a chunk, which comes with a change of prompt and takes much memory.
        if isinstance(cache, KVCache) and self._may_record(cache):
            with self._lock:
                replay = self._recorded(run, x, time, prompt, cache, attention, control)
                if replay is not None:
                    return replay()
        return run(x, time, prompt, cache, attention, *_if_there(control))

    def _may_record(self, cache: KVCache) -> bool:
        is_lent = cache.k_NBWHD.data_ptr() in self._lent
        return is_lent and cache.slot_frames <= cache.config.chunk_frames and not self._failed

    def _recorded(
        self,
        run: Callable[..., Any],
        x: Tensor,
        time: TimeContext,
        prompt: PromptContext | CountedPrompt,
        cache: KVCache,
        attention: Attention,
        control: ControlTokens | None,
    ) -> Replay | None:
        """The pass as it was recorded, its inputs in place; None where it is to run as it is."""
        if _fixed_by_recording(self._model) != self._fixed:
            self._look_at_network()
            self._forget_passes()
        memory = cache.k_NBWHD.data_ptr()
        window = cache.context_frames, cache.slot_frames
        hinted = None if control is None else control.strength_F is not None
        form = (run, x.shape, memory, *window, attention, hinted)
        # By thread, as libraries set themselves up for each: a form is recorded where it has run.
        use = form, threading.get_ident()
        self._uses[use] += 1
        if self._uses[use] <= self._capture.patience:
            return None
        # Places of each stream's own: another's next pass, in its thread, leaves them alone.
        inputs = self._inputs.get((x.shape, memory))
        if inputs is None:
            inputs = self._inputs[x.shape, memory] = _Inputs.like(x, time, prompt)
        inputs.set(x, time, prompt)
        placed = inputs.with_control(control)
        if form not in self._passes:
            fixed = cache.shallow_copy()  # and not the stream's own, which is to be let go of
            seen = (inputs.x, inputs.time, inputs.prompt, fixed, attention, *_if_there(placed))
            replay = self._captured(lambda: _with_memory(run(*seen), fixed))
            if replay is None:
                return None
            self._passes[form] = _Pass(replay, (self._model.rope(x, cache), fixed))
        return self._passes[form].replay

    def _look_at_network(self) -> None:
        _require_recordable(self._model)
        self._capture = self._given or _capture_for(self._model)
        self._fixed = _fixed_by_recording(self._model)

    def _captured(self, run: Run) -> Replay | None:
        try:
            return self._capture(run)
        except RuntimeError as error:
            if self._must:
                raise
            logger.warning("passes run unrecorded, which costs speed alone: %s", error)
        self._failed = True
        self._passes.clear()
        return None


@dataclass
class _Inputs:
    """Where the passes of one shape read what differs between them."""

    x: Tensor
    time: TimeContext
    prompt: PromptContext | CountedPrompt
    now: tuple[Any, Any] = (None, None)
    """Whose timestep and prompt are there."""
    control: dict[str, Tensor] = field(default_factory=dict)
    """Parts of `ControlTokens`, by their names; made when the first one comes."""
    controlled_by: ControlTokens | None = None
    """Whose parts are there."""

    @classmethod
    def like(cls, x: Tensor, time: TimeContext, prompt: PromptContext | CountedPrompt) -> _Inputs:
        mine = TimeContext.of(time.timestep_BF, _whole(time).clone())  # no pass reads the timestep
        return cls(x.clone(), mine, pytree.tree_map(torch.clone, prompt))

    def set(self, x: Tensor, time: TimeContext, prompt: PromptContext | CountedPrompt) -> None:
        self.x.copy_(x)
        if time is not self.now[0]:
            _whole(self.time).copy_(_whole(time))
        if prompt is not self.now[1]:
            # All layers' keys, then their values, then counts: one dtype at a time is one launch.
            places, parts = (zip(*layers, strict=True) for layers in (self.prompt, prompt))
            for mine, new in zip(places, parts, strict=True):
                for place, part in zip(mine, new, strict=True):
                    place.resize_(part.shape)  # on a CPU, where it has the rows that a prompt has
                torch._foreach_copy_(mine, new)
        self.now = time, prompt

    def with_control(self, control: ControlTokens | None) -> ControlTokens | None:
        """A chunk's control in its places."""
        if control is None:
            return None
        parts = {name: part for name, part in control._asdict().items() if part is not None}
        for name, part in parts.items():
            place = self.control.setdefault(name, part.clone())
            if control is not self.controlled_by:
                place.copy_(part)
        self.controlled_by = control
        return ControlTokens(
            **{**control._asdict(), **{name: self.control[name] for name in parts}}
        )


def _if_there(control: ControlTokens | None) -> tuple[ControlTokens, ...]:
    """A network without control has no such argument."""
    return () if control is None else (control,)


def _whole(time: TimeContext) -> Tensor:
    assert time.whole_NBF1C is not None, "passes are recorded with what time_context makes"
    return time.whole_NBF1C


@dataclass(frozen=True)
class _Pass:
    replay: Replay
    read: tuple[Rope, KVCache]
    """Held, as the graph reads their rotary tables where they lie."""


class CudaCapture:
    """Captures on a CUDA device; graphs that live at once share one pool of memory.

    So each graph's replay follows the last one's, whatever stream that was on, and its result is
    copied before the next may write over it.
    """

    patience = 1
    """What runs once in a stream, as the clean passes while its window grows, runs as it is: to
    record it takes twice as long. And whatever a library makes for new shapes is made by then."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._graphs = device, weakref.WeakSet[torch.cuda.CUDAGraph]()
        self._set_up: set[int] = set()
        # Always the same one: libraries keep a workspace for each stream they have seen, and what
        # they first take during a capture would lie in its pool.
        self._stream = torch.cuda.Stream(device)
        self._last: torch.cuda.Stream | None = None

    def __call__(self, run: Run) -> Replay:
        if not self._graphs:  # a pool whose graphs are gone cannot be captured into
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(self._device):
            self._set_up_libraries(run)
            graph = torch.cuda.CUDAGraph()
            result = self._capture(graph, run)
        self._graphs.add(graph)

        def replay() -> Tensor:
            self._follow()
            graph.replay()
            return result.clone()

        return replay

    def _follow(self) -> None:
        current = torch.cuda.current_stream()
        if self._last is not None and current != self._last:
            current.wait_stream(self._last)
        self._last = current

    def _set_up_libraries(self, run: Run) -> None:
        """They take their workspaces in the first run of a thread on this stream."""
        if threading.get_ident() in self._set_up:
            return
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                run()
        finally:
            current.wait_stream(self._stream)
        self._set_up.add(threading.get_ident())

    def _capture(self, graph: torch.cuda.CUDAGraph, run: Run) -> Tensor:
        capture = torch.cuda.graph(
            graph,
            pool=self._pool,
            stream=self._stream,
            capture_error_mode="thread_local",  # others go on, such as handing images to the host
        )
        try:
            # Where a capture's end fails, torch leaves its stream the current one: set it back.
            with torch.cuda.stream(torch.cuda.current_stream()), capture:
                result, *_ = run()
        except BaseException:
            # Nor does it tell its allocator then, which would go on waiting for the end.
            with suppress(Exception):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
                torch._C._cuda_releasePool(torch.cuda.current_device(), self._pool)
            raise
        return result


class TraceCapture:
    """Captures on the CPU, where it takes as long as some twenty passes."""

    patience = 8

    def __call__(self, run: Run) -> Replay:
        unused = torch.zeros(())
        with warnings.catch_warnings(), _PlainSizes():
            warnings.simplefilter("ignore")  # sizes become constants, as they are to be
            # What is written is returned as well: writing alone would be taken for idle.
            trace = torch.jit.trace(lambda unused: run(), unused, check_trace=False)

        def replay() -> Tensor:
            # Optimised, it would compute once for all what hangs on its inputs: they lie in memory
            # of ours, which it takes for constant.
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                return trace(unused)[0]

        return replay


class _PlainSizes(TorchFunctionMode):
    """Sizes of tensors are numbers in a trace too, which else repeats all arithmetic with them."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return torch.Size(map(int, result)) if isinstance(result, torch.Size) else result


def _with_memory(result: Tensor | None, cache: KVCache) -> tuple[Tensor, ...]:
    empty = cache.k_NBWHD.new_empty(0)
    return (empty if result is None else result, *cache.tensors().values(), cache.rotated_NBWHD)


def _fixed_by_recording(module: nn.Module) -> list[Any]:
    """What a recorded pass goes on with, whatever the network has by then: its modules' code, and
    where their tensors lie.

    Looked at before every pass, and so without what `nn.Module.modules` does besides. Nothing is
    held: weights that are exchanged must be let go of.
    """
    found: list[Any] = []

    def look(module: nn.Module) -> None:
        own = module.__dict__
        found.append(type(module))
        for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
            found.append(None if tensor is None else tensor.data_ptr())
        if is_watched(module):
            found.append("watched")
        for child in own["_modules"].values():
            look(child)

    look(module)
    return found


def _capture_for(model: nn.Module) -> Capture:
    parameter = next(model.parameters())
    return CudaCapture(parameter.device) if parameter.is_cuda else TraceCapture()


def _require_recordable(model: nn.Module) -> None:
    """ValueError where a recording would leave out what the network does."""
    if any(isinstance(part, StreamedLayers) for part in model.modules()):
        raise ValueError("recorded passes need all weights in place; leave out --offload stream")
    devices = {p.device.type for p in model.parameters()}
    if len(devices) > 1 or not devices <= {"cuda", "cpu"}:
        raise ValueError(
            f"passes are recorded on one card or on the CPU, and the weights are on "
            f"{', '.join(sorted(devices))}; switch graphs off"
        )
    for name, part in model.named_modules():
        if is_watched(part):
            raise ValueError(
                f"recorded passes run no Python, so the hooks of {name} would not run; switch "
                "graphs off, or take the hooks away"
            )
