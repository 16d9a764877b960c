"""The sliding window of keys and values, with its EMA-Sink.

Attention sees a window of latent frames: a sink, the previous chunks, the current chunk. Keys are
kept before rotation, so no position grows with the stream, and are rotated by their place in the
window once a chunk, when the window has moved. When it is full the oldest chunk leaves, and the
sink takes it up by an exponential moving average (Reward Forcing, arXiv 2512.04678, sec. 3.2): the
start of the video is remembered, yet kept fresh.

Other students' caches are settings of this one. Before the sink there may be an anchor, the first
frames of the stream, which never change (`anchor_frames`); the sink then begins with the frames
after them. These two, the opening, may keep their frames' own time (`positions`): then only their
turn changes, as angles matter by their differences alone. Between sink and past there may be
memories, a frame each, of one mean over all that leaves (`memory_rates`). Opening and memories
together are the head.

The order of use, once per chunk:

    cache.advance()                                         # grow, or let the oldest frames leave
    rotated, v = cache.layer(i).extend(k, rotated_k, v)       # in every layer, in every pass

Every denoising pass overwrites the same slot and the last, clean pass leaves what later chunks
see. A chunk that is not made is given up (`abandon`). What left the window for it stays away, as
the next one needs the room too, unless the window itself is to be written again (`undo_eviction`,
which `backup_sink` before `advance` makes possible). Under autograd use `cache.snapshot()`, which
is never written to.

Letters: N layers, B batch, W window tokens, L tokens of the slot, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from . import kernels
from .config import CacheConfig, Grid
from .rope import Rope, apply_rope, rope_from, rope_table

_EXACT, _BEFORE = "exact_sink", "before."  # names in `state_dict()`
ROOM = 4  # times the sink that a card has free, or its copy goes to the host


class LayerWindow(Protocol):
    """What one self-attention layer asks of a cache."""

    def extend(self, k_BLHD: Tensor, rotated_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor]:
        """Set the current chunk's keys, the same rotated to their places, and its values.

        Returns the whole window's rotated keys and values, [B, tokens, H, D] each.
        """
        ...


class KeyValues(Protocol):
    """What the network asks of a cache."""

    @property
    def context_frames(self) -> int:
        """Latent frames of the window that lie before the current chunk."""
        ...

    def layer(self, index: int) -> LayerWindow:
        """The window of one layer, for the current chunk."""
        ...


@dataclass(frozen=True)
class KVSnapshot:
    """The context of one chunk, copied: safe to read again when a forward is recomputed."""

    rotated_NBWHD: Tensor
    v_NBWHD: Tensor
    context_frames: int

    def layer(self, index: int) -> LayerWindow:
        """The window of one layer, through which gradients of the current chunk pass."""
        return _CopiedWindow(self.rotated_NBWHD[index], self.v_NBWHD[index])


class _CopiedWindow:
    """A context that is joined to the chunk, and never written to.

    No dataclass, as the other windows: FSDP would look into it for tensors.
    """

    def __init__(self, rotated_BWHD: Tensor, v_BWHD: Tensor) -> None:
        self._context = rotated_BWHD, v_BWHD

    def extend(self, k_BLHD: Tensor, rotated_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor]:
        rotated, v = self._context
        return torch.cat([rotated, rotated_BLHD], dim=1), torch.cat([v, v_BLHD], dim=1)


class InPlaceWindow:
    """A part of the cache's own memory: the slot is written in place, the window read in place."""

    def __init__(self, k_BWHD: Tensor, rotated_BWHD: Tensor, v_BWHD: Tensor, start: int) -> None:
        self._window, self._start = (k_BWHD, rotated_BWHD, v_BWHD), start

    @property
    def slots(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where the chunk's keys, rotated keys and values go, [B, L, H, D] each.

        Cut from the window where they are used: a compiler that was given both would lose writes.
        """
        k, rotated, v = (t.narrow(1, self._start, t.shape[1] - self._start) for t in self._window)
        return k, rotated, v

    def read(self) -> tuple[Tensor, Tensor]:
        """The window's rotated keys and values, once the slots are written."""
        return self._window[1:]

    def extend(self, k_BLHD: Tensor, rotated_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor]:
        assert not k_BLHD.requires_grad, "under autograd pass cache.snapshot() to the model"
        for slot, new in zip(self.slots, (k_BLHD, rotated_BLHD, v_BLHD), strict=True):
            slot.copy_(new)
        return self.read()


class RotatingWindow(InPlaceWindow):
    """The same where rotated keys are not kept: the context is rotated again in every pass."""

    def __init__(
        self, k_BWHD: Tensor, rotated_BWHD: Tensor, v_BWHD: Tensor, start: int, rope: Rope
    ) -> None:
        super().__init__(k_BWHD, rotated_BWHD, v_BWHD, start)
        self._rope = rope

    def read(self) -> tuple[Tensor, Tensor]:
        k, rotated, _ = (t[None, :, : self._start] for t in self._window)
        kernels.rotate_context(k, self._rope, rotated)
        return super().read()


@dataclass
class SinkBackup:
    """A copy of the sink, rarely read: beside it where a card has plenty of room, else the host's.

    Pinned memory for it stops the host for 0.65 s at 832x480 (H100, 2026-11-27), in a stream's
    third chunk. No plan counts it, as it goes to a card only where much is free.
    """

    tensors: dict[str, Tensor]
    """By the names of `KVCache.sink_tensors`."""
    evictions: int | None = None
    """How many the sink had seen; None where there is no copy."""
    copied: torch.cuda.Event | None = None
    """Recorded after the copy, where a CUDA stream of its own makes it."""

    @classmethod
    def allocate_like(cls, tensors: Mapping[str, Tensor]) -> SinkBackup:
        """Memory for such tensors; pinned, where it is the host's and they are a card's."""
        allocate = torch.empty_like if _have_room_beside(tensors) else _host_memory
        return cls({name: allocate(tensor) for name, tensor in tensors.items()})

    def save(self, tensors: Mapping[str, Tensor], evictions: int) -> None:
        """Copy the tensors; from a card to the host on a CUDA stream of its own, beside passes."""
        self.evictions = evictions
        if all(t.device == self.tensors[name].device for name, t in tensors.items()):
            self._copy(tensors)
            return
        (device,) = {t.device for t in tensors.values()}
        side = _copy_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            self._copy(tensors)
            self.copied = torch.cuda.Event()
            self.copied.record(side)

    def wait(self) -> None:
        """Let what follows on the caller's stream wait for the copy."""
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy back."""
        self.wait()
        for name, tensor in tensors.items():
            _copy_blocks(self.tensors[name], tensor)

    def clone(self) -> SinkBackup:
        """An independent copy."""
        if self.copied is not None:
            self.copied.synchronize()
        return SinkBackup(
            {name: tensor.clone() for name, tensor in self.tensors.items()}, self.evictions
        )

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            _copy_blocks(tensor, self.tensors[name])


@dataclass
class TurningTable:
    """Angles of a window whose opening keeps its own time, in place: recorded passes read them."""

    table: Rope
    gone_frames: int = 0
    """The frames that had left when they were set."""

    @classmethod
    def of(cls, cache: KVCache) -> TurningTable | None:
        """A cache's own; None where its opening is placed by the window."""
        absolute = cache.config.positions == "absolute" and cache.config.opening_frames
        return cls(cache.table.clone()) if absolute else None

    def set(self, cache: KVCache) -> None:
        """Put anchor and sink as far back as frames have left the cache."""
        if self.gone_frames != cache.gone_frames:
            place = cache.config.opening_frames, cache.grid, cache.k_NBWHD.shape[-1]
            opening = rope_from(-cache.gone_frames, *place, cache.k_NBWHD.device)
            self.table.copy_(opening)
            self.gone_frames = cache.gone_frames


def _copy_blocks(source: Tensor, target: Tensor) -> None:
    """Copy [..., S, H, D] block by block, each in one piece: a card needs no memory for it then."""
    for mine, new in zip(target.flatten(0, -4), source.flatten(0, -4), strict=True):
        mine.copy_(new, non_blocking=True)


def _have_room_beside(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a second copy leaves their device with as much again, several times over."""
    cards = {t.device for t in tensors.values() if t.device.type == "cuda"}
    needed = ROOM * sum(t.nbytes for t in tensors.values())
    return all(torch.cuda.mem_get_info(card)[0] >= needed for card in cards)


def _host_memory(x: Tensor) -> Tensor:
    on_card = x.device.type == "cuda"
    return torch.empty_like(x, device="cpu" if on_card else x.device, pin_memory=on_card)


@lru_cache(maxsize=64)
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@dataclass
class KVCache:
    """Keys and values of every layer, allocated once for the life of a stream.

    Frames lie in the order anchor, sink, memories, previous, current. `num_frames` counts those
    that are valid, `slot_frames` those of them that belong to the current chunk; both are Python
    ints, so no pass ever waits for the device.
    """

    config: CacheConfig
    grid: Grid
    k_NBWHD: Tensor
    v_NBWHD: Tensor
    rotated_NBWHD: Tensor
    """Keys rotated to their places; of one layer only, where they are not kept."""
    exact_sink: Tensor | None = None
    """The float32 accumulator, keys then values, [2, N, B, head tokens, H, D]."""
    num_frames: int = 0
    slot_frames: int = 0
    num_evictions: int = 0
    evicted_frames: int = 0
    """Latent frames that left the window for a chunk which is not made yet."""
    gone_frames: int = 0
    """Latent frames that have left the window since it was empty."""
    torn: bool = False
    """An eviction failed half way: window and sink hold neither what was nor what was to be."""
    turning: TurningTable | None = field(default=None, repr=False)
    """The window's angles where its opening keeps its own time; made where they are not given."""
    sink_backup: SinkBackup | None = field(default=None, repr=False)
    """The sink before the eviction that `backup_sink` was called for."""
    _windows: dict[int, LayerWindow] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.turning is None:
            self.turning = TurningTable.of(self)

    @classmethod
    def allocate(
        cls,
        config: CacheConfig,
        *,
        num_layers: int,
        batch: int,
        grid: Grid,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        keep_rotated: bool = True,
    ) -> KVCache:
        """An empty cache: 3 * N * B * W * H * D elements, and nothing more is ever allocated.

        Without `keep_rotated` it is a third smaller, and every pass rotates the context's keys
        again: slower, and the same to the bit.
        """
        window, head = (n * grid.frame_tokens for n in (config.window_frames, config.head_frames))
        rest = (batch, window, num_heads, head_dim)
        k, v, rotated = (
            torch.zeros((layers, *rest), dtype=dtype, device=device)
            for layers in (num_layers, num_layers, num_layers if keep_rotated else 1)
        )
        exact_sink = None
        if config.accumulator == "float32" and dtype != torch.float32:
            shape = (2, num_layers, batch, head, num_heads, head_dim)
            exact_sink = torch.zeros(shape, dtype=torch.float32, device=device)
        return cls(config, grid, k, v, rotated, exact_sink)

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame."""
        return self.grid.frame_tokens

    @property
    def keeps_rotated(self) -> bool:
        """Whether rotated keys are kept from pass to pass."""
        return self.rotated_NBWHD.shape[0] == self.k_NBWHD.shape[0]

    @property
    def context_frames(self) -> int:
        """Latent frames of the window that lie before the current chunk."""
        return self.num_frames - self.slot_frames

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor the cache owns."""
        return sum(t.nbytes for t in self.tensors().values()) + self.rotated_NBWHD.nbytes

    @torch.no_grad()
    def advance(self, frames: int | None = None) -> None:
        """Open the slot of the next chunk; the oldest frames past the window leave into the sink.

        `frames` is the size of the coming chunk in latent frames, by default `chunk_frames`.
        """
        frames = self.config.chunk_frames if frames is None else frames
        room = self.config.window_frames - min(self.config.head_frames, self.num_frames)
        if not 0 < frames <= room:
            raise ValueError(
                f"a chunk of {frames} latent frames does not fit the {room} frames that the window "
                f"of {self.config.window_frames} leaves beside its sink; use fewer at a time"
            )
        self.require_intact()
        overflow = self.num_frames + frames - self.config.window_frames
        if overflow > 0:
            self._evict(overflow)
        if self.turning is not None:
            self.turning.set(self)
        if self.keeps_rotated:  # before the slot counts, as it may fail
            stop = self.num_frames * self.frame_tokens
            k, rotated = (t[:, :, :stop] for t in (self.k_NBWHD, self.rotated_NBWHD))
            kernels.rotate_context(k, self._rope(0, stop), rotated)
        self.num_frames += frames
        self.slot_frames = frames
        self._windows = {}

    def backup_sink(self) -> None:
        """Copy what the next chunk's eviction will overwrite, for `undo_eviction`.

        Before `advance`, or earlier where nothing writes to the sink in between. The copy is as
        large as the sink (0.86 GB at 832x480 in bfloat16) and takes no time to speak of: to the
        host it is made beside the next pass (231.9 ms a chunk, 231.2 without; H100, 2026-11-27).
        """
        if self.num_frames + self.config.chunk_frames <= self.config.window_frames:
            return
        tensors = self.sink_tensors()
        if self.sink_backup is None or self.sink_backup.tensors.keys() != tensors.keys():
            self.sink_backup = SinkBackup.allocate_like(tensors)
        if self.sink_backup.evictions != self.num_evictions:
            self.sink_backup.save(tensors, self.num_evictions)

    def set_decay(self, decay: float) -> None:
        """What the sink keeps at the next eviction; call it before `backup_sink`."""
        assert not self.evicted_frames, "that eviction may still be undone, with its own decay"
        self.config = replace(self.config, decay=decay)

    def finish(self) -> None:
        """The chunk in the slot is made."""
        self.evicted_frames = 0

    def abandon(self) -> None:
        """The chunk in the slot is not made; the next one takes its place."""
        self.truncate(self.context_frames)

    def undo_eviction(self) -> None:
        """Before a recache: as it was before frames left for a chunk that was not made.

        The sink is what it was; of the window after it the places are back, and hold nothing.
        """
        if not self.evicted_frames:
            return
        assert not self.slot_frames, "a chunk is made, or given up first"
        assert self.sink_backup is not None, "backup_sink() comes before advance()"
        self.sink_backup.restore(self.sink_tensors())
        self.num_frames += self.evicted_frames
        self.gone_frames -= self.evicted_frames
        self.num_evictions -= 1
        self.evicted_frames = 0

    def layer(self, index: int) -> LayerWindow:
        """The window of one layer, made once a chunk. What it returns are views of the cache.

        Extending it again overwrites the slot; read the window before the next write.
        """
        if index not in self._windows:
            assert self.slot_frames, "advance() opens a slot first"
            self._windows[index] = self._window(index)
        return self._windows[index]

    def context(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys before rotation, and values, of what lies before the slot."""
        stop = self.context_frames * self.frame_tokens
        return self.k_NBWHD[layer, :, :stop], self.v_NBWHD[layer, :, :stop]

    def truncate(self, frames: int) -> None:
        """Forget everything after the first `frames` latent frames; the next slot follows them."""
        assert 0 <= frames <= self.num_frames
        self.num_frames, self.slot_frames = frames, 0

    @property
    def fixed_frames(self) -> int:
        """Latent frames at the window's start that are run again by no recache."""
        c, evictions = self.config, self.num_evictions - (self.evicted_frames > 0)
        return c.head_frames if evictions else c.opening_frames

    @property
    def has_moved(self) -> bool:
        """Whether frames have left it, for chunks that are made."""
        return self.gone_frames > self.evicted_frames

    def start_anew(self) -> None:
        """What the window holds is as if it began with it: nothing has left, the sink is new."""
        self.num_evictions = self.gone_frames = 0
        self.forget_backup()

    def forget_backup(self) -> None:
        """After the sink was written by a pass: the next chunk's copy of it is to be made."""
        if self.sink_backup is not None:
            self.sink_backup.evictions = None

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        self.num_frames = self.slot_frames = self.num_evictions = self.evicted_frames = 0
        self.gone_frames = 0
        self.torn = False
        self.forget_backup()

    def require_intact(self) -> None:
        """ValueError where an eviction failed half way."""
        if self.torn:
            raise ValueError(
                "the window was being moved when that failed, for memory that ran out or the like: "
                "go on from a snapshot, or begin anew (in a stream, a switch with cut)"
            )

    def snapshot(self) -> KVSnapshot:
        """The current chunk's context, copied, for passes under autograd."""
        stop = self.context_frames * self.frame_tokens
        layers = [self.context(layer) for layer in range(self.k_NBWHD.shape[0])]
        layers = [(apply_rope(k, self._rope(0, stop)), v) for k, v in layers]
        rotated, v = (torch.stack(parts).detach() for parts in zip(*layers, strict=True))
        return KVSnapshot(rotated, v, self.context_frames)

    def clone(self) -> KVCache:
        """An independent copy."""
        k, v, rotated = (t.clone() for t in (self.k_NBWHD, self.v_NBWHD, self.rotated_NBWHD))
        exact = None if self.exact_sink is None else self.exact_sink.clone()
        return replace(
            self,
            k_NBWHD=k,
            v_NBWHD=v,
            rotated_NBWHD=rotated,
            exact_sink=exact,
            turning=None,
            sink_backup=self._cloned_backup(),
        )

    def copy_samples(self, other: KVCache, samples: Tensor) -> None:
        """Take over what another cache with the same counts remembers of some samples, bool [B]."""
        assert self.counts() == other.counts()
        theirs = other.tensors()
        for name, tensor in self.tensors().items():
            samples_first(tensor)[samples] = samples_first(theirs[name])[samples]

    def shallow_copy(self) -> KVCache:
        """A cache on the same memory with counts of its own."""
        return replace(self, sink_backup=None)

    def sink_tensors(self) -> dict[str, Tensor]:
        """What an eviction overwrites of the head, by name; empty for one that never changes."""
        head = self.config.head_frames * self.frame_tokens
        if not self._head_changes():
            return {}
        found = {"k": self.k_NBWHD[:, :, :head], "v": self.v_NBWHD[:, :, :head]}
        return found if self.exact_sink is None else found | {_EXACT: self.exact_sink}

    def tensors(self) -> dict[str, Tensor]:
        """What the cache remembers, by name; rotated keys follow from it."""
        owned = {"k": self.k_NBWHD, "v": self.v_NBWHD}
        return owned if self.exact_sink is None else owned | {_EXACT: self.exact_sink}

    def counts(self) -> list[int]:
        """What it remembers besides."""
        found = [self.num_frames, self.slot_frames, self.num_evictions, self.evicted_frames]
        return [*found, self.gone_frames]

    def counts_before_eviction(self) -> list[int]:
        """The same, as before the eviction for a chunk that is not made."""
        evictions, gone = self.num_evictions - (self.evicted_frames > 0), self.evicted_frames
        return [self.num_frames + gone, self.slot_frames, evictions, 0, self.gone_frames - gone]

    def state_dict(self) -> dict[str, Tensor]:
        """`tensors()`, and the sink from before an eviction that may still be undone."""
        held = self.sink_backup.clone().tensors if self.evicted_frames and self.sink_backup else {}
        return self.tensors() | {f"{_BEFORE}{name}": tensor for name, tensor in held.items()}

    def check(self, tensors: Mapping[str, Tensor], evicted_frames: int) -> None:
        """ValueError unless `load` can take over what another cache of these sizes remembers."""
        odd = (self.tensors().keys() ^ _without(tensors, _BEFORE).keys()) - {_EXACT}
        if odd:
            raise ValueError(
                f"keys and values are kept in another form there: one cache has "
                f"{', '.join(sorted(odd))}, the other has not; use the form they were saved in"
            )
        mine = self.tensors()
        if evicted_frames:
            mine |= {f"{_BEFORE}{name}": each for name, each in self.sink_tensors().items()}
        if missing := mine.keys() - tensors.keys() - {_EXACT, f"{_BEFORE}{_EXACT}"}:
            raise ValueError(f"{', '.join(sorted(missing))} of the cache is missing")
        for name in mine.keys() & tensors.keys():
            require_like(name, tensors[name], mine[name])

    def load(self, tensors: Mapping[str, Tensor], counts: Sequence[int]) -> None:
        """Take over what `check` has found to fit, with the names of `state_dict()`."""
        self.reset()
        self.num_frames, self.slot_frames, self.num_evictions, self.evicted_frames = counts[:4]
        self.gone_frames = counts[4]
        _copy_sinks(self.tensors(), _without(tensors, _BEFORE), self.num_evictions)
        if self.evicted_frames:
            self.sink_backup = SinkBackup.allocate_like(self.sink_tensors())
            self.sink_backup.evictions = self.num_evictions - 1
            _copy_sinks(
                self.sink_backup.tensors, strip_prefix(tensors, _BEFORE), self.num_evictions - 1
            )

    def _cloned_backup(self) -> SinkBackup | None:
        """For a copy of the cache; None where it will be made again before it is needed."""
        return self.sink_backup.clone() if self.sink_backup and self.evicted_frames else None

    def _rope(self, start: int, stop: int) -> Rope:
        table = self.table if self.turning is None else self.turning.table
        return table.tokens(start, stop)

    @property
    def table(self) -> Rope:
        """The window's angles by places in it."""
        frames, head_dim = self.config.window_frames, self.k_NBWHD.shape[-1]
        return rope_table(frames, self.grid, head_dim, self.k_NBWHD.device)

    def _window(self, layer: int) -> LayerWindow:
        start, stop = (n * self.frame_tokens for n in (self.context_frames, self.num_frames))
        rotated = self.rotated_NBWHD[layer if self.keeps_rotated else 0].narrow(1, 0, stop)
        k, v = (t[layer].narrow(1, 0, stop) for t in (self.k_NBWHD, self.v_NBWHD))
        if self.keeps_rotated:
            return InPlaceWindow(k, rotated, v, start)
        return RotatingWindow(k, rotated, v, start, self._rope(0, start))

    def _head_changes(self) -> bool:
        c = self.config
        return bool(c.memory_rates) or (c.sink_frames > 0 and c.decay < 1)

    def _evict(self, frames: int) -> None:
        c, tokens = self.config, self.frame_tokens
        sink = slice(c.anchor_frames * tokens, c.opening_frames * tokens)
        memories = slice(sink.stop, c.head_frames * tokens)
        leaving = frames * tokens
        stop = self.num_frames * self.frame_tokens
        if self.sink_backup is not None:
            self.sink_backup.wait()
        self.torn = True
        if self.exact_sink is not None and self.num_evictions == 0:
            for exact, tensor in zip(self.exact_sink, (self.k_NBWHD, self.v_NBWHD), strict=True):
                exact.copy_(tensor[:, :, : memories.stop])
        if c.sink_frames and c.decay < 1:
            self._update_sink(sink, leaving)
        if c.memory_rates:
            self._update_memories(memories, leaving)
        self._close_gap(memories.stop, stop, leaving)
        self.torn = False
        self.num_frames -= frames
        self.gone_frames += frames
        self.num_evictions += 1
        self.evicted_frames = frames

    def _close_gap(self, head: int, stop: int, leaving: int) -> None:
        """Tokens after those that leave move up behind the head."""
        for tensor in (self.k_NBWHD, self.v_NBWHD):
            shift_tokens(tensor, head, stop, leaving)

    def _update_memories(self, memories: slice, leaving: int) -> None:
        """The `leaving` tokens after the head into the memories, which are its last."""
        head, first = memories.stop, self.num_evictions == 0
        both = self.k_NBWHD, self.v_NBWHD
        for tensor, average in zip(
            both, both if self.exact_sink is None else self.exact_sink, strict=True
        ):
            for layer, exact in zip(tensor, average, strict=True):
                gone = layer[:, head : head + leaving]
                update_memories(exact[:, memories], gone, self.config, first)
                layer[:, memories] = exact[:, memories]

    def _update_sink(self, sink: slice, leaving: int) -> None:
        """The `leaving` tokens after the head into those of the sink."""
        both, c = (self.k_NBWHD, self.v_NBWHD), self.config
        head = c.head_frames * self.frame_tokens
        sinks = both[0][:, :, sink], both[1][:, :, sink]
        evicted = both[0][:, :, head:][:, :, :leaving], both[1][:, :, head:][:, :, :leaving]
        exact = None if self.exact_sink is None else self.exact_sink[:, :, :, sink]
        if c.sink_frames * self.frame_tokens == leaving and not c.keep_key_norms:
            kernels.update_sink(sinks, evicted, c.decay, exact)
            return
        averages = sinks if exact is None else exact
        for which in range(2):
            parts = zip(sinks[which], evicted[which], averages[which], strict=True)
            for tensor, gone, average in parts:
                average.copy_(update_sink(average, gone, c, self.frame_tokens, keys=which == 0))
                tensor.copy_(average)


def samples_first(tensor: Tensor) -> Tensor:
    """A view of one of a cache's tensors, [..., B, L, H, D], with the batch as its first axis."""
    return tensor.movedim(-4, 0)


def require_like(name: str, given: Tensor, mine: Tensor) -> None:
    """ValueError unless one tensor can be copied to the other as it is, but for its precision."""
    if given.shape != mine.shape or given.is_floating_point() != mine.is_floating_point():
        raise ValueError(
            f"{name} is {given.dtype} {list(given.shape)}, and {mine.dtype} {list(mine.shape)} here"
        )


def _copy_sinks(mine: Mapping[str, Tensor], given: Mapping[str, Tensor], evictions: int) -> None:
    """Copy a cache's tensors, or a sink's; between precisions, too, of which one accumulates apart.

    Where the sink itself is float32, it is its own accumulator.
    """
    for name in mine.keys() & given.keys():
        mine[name].copy_(given[name])
    if _EXACT in mine.keys() ^ given.keys() and evictions:
        accumulator = mine[_EXACT] if _EXACT in mine else given[_EXACT]
        for part, name in zip(accumulator, "kv", strict=True):
            tokens = part.shape[2]
            if _EXACT in mine:
                part.copy_(given[name][:, :, :tokens])
            else:
                mine[name][:, :, :tokens] = part


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by what follows it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _without(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def shift_tokens(x_NBWHD: Tensor, start: int, stop: int, by: int) -> None:
    """Tokens `start + by` to `stop` move to `start` on, in place."""
    for at in range(start, stop - by, by):  # pieces that do not overlap
        end = min(at + by, stop - by)
        x_NBWHD[:, :, at:end] = x_NBWHD[:, :, at + by : end + by]


def update_sink(
    sink_BLHD: Tensor, evicted_BLHD: Tensor, config: CacheConfig, frame_tokens: int, *, keys: bool
) -> Tensor:
    """The sink after frames have left into it, in its own dtype; gradients pass.

    `keys` says which of keys and values these are: only keys are ever given back their length.
    """
    decay = config.decay
    evicted = match_frames(evicted_BLHD, config.sink_frames, frame_tokens).to(sink_BLHD)
    # Each product is rounded to the sink's dtype before the sum, as published.
    average = decay * sink_BLHD + (1 - decay) * evicted
    if keys and config.keep_key_norms:
        average = average * _shrinkage(sink_BLHD, evicted, decay, average)
    return average


def update_memories(
    memories_BLHD: Tensor, evicted_BLHD: Tensor, config: CacheConfig, first: bool
) -> None:
    """Mix into each memory, in place, the mean over frames and tokens of what leaves.

    As MemRoPE's code does, with rates for what is new; at the first eviction all become the mean,
    and the frames that lay there until then are lost. So memories have no rows and columns.
    """
    mean = evicted_BLHD.to(memories_BLHD).mean(dim=1, keepdim=True)
    memories = memories_BLHD.chunk(len(config.memory_rates), dim=1)
    for memory, rate in zip(memories, config.memory_rates, strict=True):
        memory.copy_(mean if first else rate * mean + (1 - rate) * memory)


def _shrinkage(sink: Tensor, evicted: Tensor, decay: float, average: Tensor) -> Tensor:
    """By how much averaging has shortened each token's key, [B, L, 1, 1]."""
    lengths = [x.float().flatten(2).norm(dim=2) for x in (sink, evicted, average)]
    wanted = decay * lengths[0] + (1 - decay) * lengths[1]
    return (wanted / lengths[2].clamp_min(1e-6)).to(average)[..., None, None]


def match_frames(x_BLHD: Tensor, frames: int, frame_tokens: int) -> Tensor:
    """Average (or repeat) the latent frames of `x` so that there are `frames` of them.

    Frame j of the result is the mean of the frames that fall on its share of the time span, as in
    adaptive average pooling; equal counts return `x` itself.
    """
    x_FBTHD = x_BLHD.unflatten(1, (-1, frame_tokens)).movedim(1, 0)
    have = x_FBTHD.shape[0]
    if have == frames:
        return x_BLHD
    spans = [(j * have // frames, -(-(j + 1) * have // frames)) for j in range(frames)]
    return torch.cat([x_FBTHD[start:stop].mean(0) for start, stop in spans], dim=1)
