"""The sliding window of keys and values, with its EMA-Sink.

Attention sees a window of latent frames: a sink, the previous chunks, the current chunk. Keys are
kept before rotation and turned by their place in the window on reading, so no position grows with
the stream. When the window is full the oldest chunk leaves, and the sink takes it up by an
exponential moving average (Reward Forcing, arXiv 2512.04678, sec. 3.2): the start of the video is
remembered, yet kept fresh.

The order of use, once per chunk:

    cache.advance()                      # grow, or let the oldest frames leave into the sink
    k, v = cache.extend(layer, k, v)     # in every layer, in every pass; overwrites the slot

Every denoising pass overwrites the same slot and the last, clean pass leaves what later chunks
see: nothing is ever rewound. Under autograd use `cache.snapshot()`, which is never written to.

Letters: N layers, B batch, W window tokens, L tokens of the slot, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .config import CacheConfig


class KeyValues(Protocol):
    """What a self-attention layer asks of a cache."""

    @property
    def context_frames(self) -> int:
        """Latent frames of the window that lie before the current chunk."""
        ...

    def extend(self, layer: int, k_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor]:
        """Set the current chunk of `layer`; returns the whole window's keys and values."""
        ...


@dataclass(frozen=True)
class KVSnapshot:
    """The context of one chunk, copied: safe to read again when a forward is recomputed."""

    k_NBWHD: Tensor
    v_NBWHD: Tensor
    context_frames: int

    def extend(self, layer: int, k_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor]:
        """The window's keys and values with the current chunk at the end; gradients pass."""
        k = torch.cat([self.k_NBWHD[layer], k_BLHD], dim=1)
        v = torch.cat([self.v_NBWHD[layer], v_BLHD], dim=1)
        return k, v


@dataclass
class KVCache:
    """Keys and values of every layer, allocated once for the life of a stream.

    Frames lie in the order sink, previous, current. `num_frames` counts those that are valid,
    `slot_frames` those of them that belong to the current chunk; both are Python ints, so no pass
    ever waits for the device.
    """

    config: CacheConfig
    frame_tokens: int
    k_NBWHD: Tensor
    v_NBWHD: Tensor
    exact_sink: Tensor | None = None
    """The float32 accumulator, keys then values, [2, N, B, sink tokens, H, D]."""
    num_frames: int = 0
    slot_frames: int = 0
    num_evictions: int = 0

    @classmethod
    def allocate(
        cls,
        config: CacheConfig,
        *,
        num_layers: int,
        batch: int,
        frame_tokens: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> KVCache:
        """An empty cache: 2 * N * B * W * H * D elements, and nothing more is ever allocated."""
        window = config.window_frames * frame_tokens
        shape = (num_layers, batch, window, num_heads, head_dim)
        k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        exact_sink = None
        if config.accumulator == "float32" and dtype != torch.float32:
            sink = (2, num_layers, batch, config.sink_frames * frame_tokens, num_heads, head_dim)
            exact_sink = torch.zeros(sink, dtype=torch.float32, device=device)
        return cls(config, frame_tokens, k, v, exact_sink)

    @property
    def context_frames(self) -> int:
        """Latent frames of the window that lie before the current chunk."""
        return self.num_frames - self.slot_frames

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor the cache owns."""
        return sum(t.nbytes for t in self.tensors().values())

    @torch.no_grad()
    def advance(self, frames: int | None = None) -> None:
        """Open the slot of the next chunk; the oldest frames past the window leave into the sink.

        `frames` is the size of the coming chunk in latent frames, by default `chunk_frames`.
        """
        frames = self.config.chunk_frames if frames is None else frames
        room = self.config.window_frames - self.config.sink_frames
        if not 0 < frames <= room:
            raise ValueError(
                f"a chunk of {frames} latent frames does not fit the {room} frames that the window "
                f"of {self.config.window_frames} leaves beside its sink; use fewer at a time"
            )
        overflow = self.num_frames + frames - self.config.window_frames
        if overflow > 0:
            self._evict(overflow)
        self.num_frames += frames
        self.slot_frames = frames

    def extend(self, layer: int, k_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor]:
        """Write the current chunk of `layer` and return the window, [B, tokens, H, D] each.

        Calling it again overwrites the slot. The result is a view: read it before the next write.
        """
        assert not k_BLHD.requires_grad, "under autograd pass cache.snapshot() to the model"
        start, stop = (n * self.frame_tokens for n in (self.context_frames, self.num_frames))
        assert k_BLHD.shape[1] == stop - start, "advance() opens a slot of the chunk's size first"
        k, v = self.k_NBWHD[layer], self.v_NBWHD[layer]
        k[:, start:stop] = k_BLHD
        v[:, start:stop] = v_BLHD
        return k[:, :stop], v[:, :stop]

    def truncate(self, frames: int) -> None:
        """Forget everything after the first `frames` latent frames; the next slot follows them."""
        assert 0 <= frames <= self.num_frames
        self.num_frames, self.slot_frames = frames, 0

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        self.num_frames = self.slot_frames = self.num_evictions = 0

    def snapshot(self) -> KVSnapshot:
        """The current chunk's context, copied, for passes under autograd."""
        stop = self.context_frames * self.frame_tokens
        k, v = (t[:, :, :stop].detach().clone() for t in (self.k_NBWHD, self.v_NBWHD))
        return KVSnapshot(k, v, self.context_frames)

    def clone(self) -> KVCache:
        """An independent copy."""
        return self.with_tensors({name: t.clone() for name, t in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor the cache owns, by name."""
        owned = {"k": self.k_NBWHD, "v": self.v_NBWHD, "exact_sink": self.exact_sink}
        return {name: tensor for name, tensor in owned.items() if tensor is not None}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> KVCache:
        """The same cache around other tensors, named as `tensors()` names them."""
        k, v, exact_sink = tensors["k"], tensors["v"], tensors.get("exact_sink")
        return replace(self, k_NBWHD=k, v_NBWHD=v, exact_sink=exact_sink)

    def _evict(self, frames: int) -> None:
        sink = self.config.sink_frames * self.frame_tokens
        gone = sink + frames * self.frame_tokens
        stop = self.num_frames * self.frame_tokens
        for which, tensor in enumerate((self.k_NBWHD, self.v_NBWHD)):
            for layer in range(tensor.shape[0]):
                window = tensor[layer]
                if sink and self.config.decay < 1:
                    self._absorb(which, layer, window[:, :sink], window[:, sink:gone])
                window[:, sink : stop - gone + sink] = window[:, gone:stop].clone()
        self.num_frames -= frames
        self.num_evictions += 1

    def _absorb(self, which: int, layer: int, sink_BLHD: Tensor, evicted_BLHD: Tensor) -> None:
        exact = None
        if self.exact_sink is not None:
            exact = self.exact_sink[which, layer]
            if self.num_evictions == 0:
                exact.copy_(sink_BLHD)
        sink = sink_BLHD if exact is None else exact
        sink.copy_(absorb(sink, evicted_BLHD, self.config, self.frame_tokens, keys=which == 0))
        if exact is not None:
            sink_BLHD.copy_(exact)


def absorb(
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
