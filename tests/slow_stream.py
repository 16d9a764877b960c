"""A slow, obvious stream: what `rf_core.stream` is to do, whatever it is asked and in what order.

The window is a list of frames, each with its own tensors, joined anew for every pass. A chunk's
clean pass follows it at once, a state is a value that nothing writes to, so a snapshot and a fork
are that value, and an abort is nothing at all. It shares the network with the engine, and no
memory, eviction or order of passes: the two are equal to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from rf_core.attention import sdpa
from rf_core.config import CacheConfig, Grid, SamplerConfig
from rf_core.decoders.decoder import Decoder
from rf_core.model import TimeContext, WanModel
from rf_core.prompts import Switch
from rf_core.rope import apply_rope, rope_table
from rf_core.scheduler import add_noise, flow_to_x0, sampling_timesteps
from rf_core.state import slerp
from rf_core.stream import chunk_noise

Layers = tuple[tuple[Tensor, Tensor], ...]
"""Keys, not rotated, and values of every layer, [B, tokens of a frame, H, D] each."""


@dataclass(frozen=True)
class Frame:
    latents: Tensor  # clean, [B, C, 1, h, w]
    layers: Layers
    prompt: Tensor  # that its clean pass saw


@dataclass(frozen=True)
class SlowState:
    cache: CacheConfig
    prompt: Tensor
    num_chunks: int = 0
    frames: tuple[Frame, ...] = ()  # the anchor first, then the sink
    clip: tuple[Tensor, ...] = ()  # clean latents of each chunk since the last cut
    blend: tuple[Switch, Tensor, Tensor, int] | None = None  # how, from, to, chunks made
    recache_due: bool = False
    num_evictions: int = 0
    decay: float | None = None  # asked for, from the next eviction on
    began: bool = False  # frames have left for a chunk that was stopped


class SlowStream:
    """As `rf_core.stream.Stream`, with the same arguments."""

    def __init__(
        self,
        model: WanModel,
        prompt_embeds: Tensor,
        *,
        height: int,
        width: int,
        sampler: SamplerConfig,
        cache: CacheConfig,
        seed: int = 0,
        batch: int = 1,
        decoder: Decoder | None = None,
    ) -> None:
        self.model, self.sampler, self.seed, self.batch = model, sampler, seed, batch
        self.decoder, self.dtype = decoder, model.patch_embedding.weight.dtype
        self.size = height // 8, width // 8
        self.grid = Grid.of_latents(*self.size, model.config.patch_size)
        self.state = SlowState(cache, self._batched(prompt_embeds))
        # The same at every call: kept, as the network keeps it, so that programs are quicker.
        self._prompt_context = lru_cache(8)(model.counted_prompt)
        self._time_context = lru_cache(8)(self._new_time_context)

    def step(self) -> Tensor:
        """The next chunk's latents, from noise."""
        prompt, frames = self._begin()
        shape = (self.model.config.in_dim, self.state.cache.chunk_frames, *self.size)
        seeds = [self.seed + sample for sample in range(self.batch)]
        times = sampling_timesteps(self.sampler).tolist()
        x, *renoise = chunk_noise(seeds, self.state.num_chunks, shape, len(times))
        for i, time in enumerate(times):
            at_BF = torch.full((self.batch, x.shape[2]), time)
            flow, _ = self._pass(frames, x, time, prompt)
            x = flow_to_x0(flow, x, at_BF)
            if i + 1 < len(times):
                x = add_noise(x, renoise[i], torch.full_like(at_BF, times[i + 1]))
        self._finish(prompt, frames, x)
        return x

    def replay(self, latents: Tensor) -> None:
        """The next chunk is given."""
        self._finish(*self._begin(), latents)

    def start_from(self, latents: Tensor) -> None:
        """The first chunks are given."""
        for part in latents.split(self.state.cache.chunk_frames, dim=2):
            self.replay(part)

    def switch(self, prompt_embeds: Tensor, how: str) -> None:
        """What is said in `Stream.switch`, done at once but for a recache, which waits."""
        switch, prompt, state = Switch.parse(how), self._batched(prompt_embeds), self.state
        if switch.mode == "blend":  # a recache that is due stays so
            self.state = replace(state, blend=(switch, state.prompt, prompt, 0))
            return
        if switch.mode == "cut":
            state = SlowState(state.cache, prompt, state.num_chunks, decay=state.decay)
        due = switch.mode == "recache"
        self.state = replace(state, prompt=prompt, blend=None, recache_due=due)

    def set_decay(self, decay: float) -> None:
        """What is said in `Stream.set_decay`."""
        self.state = replace(self.state, decay=decay)

    def abort(self, *, in_recache: bool, began: bool) -> None:
        """A step was stopped; `in_recache` says whether it had run a pass of a recache that is due.

        Nobody can tell, but that such a recache is done; and where it `began` to denoise, the
        frames that left did so with the decay of that time.
        """
        if self.state.recache_due and in_recache:
            self.state = self._recached(self.state)
        if began and not self.state.began:
            self.state = replace(self._decayed(self.state), began=self._leaving > 0)

    def fork(self) -> SlowStream:
        """A second stream."""
        twin = object.__new__(SlowStream)
        twin.__dict__.update(self.__dict__)
        return twin

    def images(self) -> Tensor:
        """The last chunk's, its whole clip decoded for them chunk by chunk."""
        return self._decoded(self.state.clip)[-1]

    def whole_images(self) -> tuple[Tensor, Tensor]:
        """The clip's since the last cut, decoded at once and chunk by chunk."""
        clip = self.state.clip
        once, parts = self._decoded([torch.cat(clip, dim=2)]), self._decoded(clip)
        return once[0], torch.cat(parts, dim=1)

    def window(self) -> tuple[Tensor, Tensor]:
        """Every layer's rotated keys, and values, as the next pass would see them."""
        joined = [self._joined(self.state.frames, n) for n in range(len(self.model.blocks))]
        keys, values = zip(*joined, strict=True)
        return torch.stack(keys), torch.stack(values)

    @property
    def untouched(self) -> bool:
        """Whether the window is what one run over its latents under the prompt would make.

        Where frames have left for a stopped chunk, they leave again then, with a newer decay.
        """
        prompts = [frame.prompt for frame in self.state.frames]
        tokens = self.model.config.text_len
        now = padded(self.state.prompt, tokens)
        same = all(torch.equal(padded(prompt, tokens), now) for prompt in prompts)
        odd = self.state.began and self.state.decay is not None
        return same and not odd and not self.state.num_evictions

    @torch.no_grad()
    def _decoded(self, clip: Sequence[Tensor]) -> list[Tensor]:
        assert self.decoder is not None
        made, past = [], None
        for latents in clip:
            images, past = self.decoder.decode(latents, past)
            made.append(images)
        return made

    def _begin(self) -> tuple[Tensor, tuple[Frame, ...]]:
        """The prompt of the next chunk, and the frames before it."""
        if self.state.recache_due:
            self.state = self._recached(self.state)
        if not self.state.began:
            self.state = self._decayed(self.state)
        state, prompt = self.state, self.state.prompt
        if state.blend is not None:
            switch, start, target, done = state.blend
            weight = (done + 1) / switch.blend_chunks
            tokens = max(start.shape[1], target.shape[1])
            start, target = (padded(embeds, tokens) for embeds in (start, target))
            mix = slerp if switch.interpolation == "slerp" else torch.lerp
            prompt = target if weight >= 1 else mix(start, target, weight)
        leaving = self._leaving
        return prompt, evict(state.frames, leaving, state.cache) if leaving > 0 else state.frames

    @property
    def _leaving(self) -> int:
        cache = self.state.cache
        return len(self.state.frames) + cache.chunk_frames - cache.window_frames

    def _decayed(self, state: SlowState) -> SlowState:
        """The decay that was asked for is in force."""
        if state.decay is None:
            return state
        return replace(state, cache=replace(state.cache, decay=state.decay), decay=None)

    def _finish(self, prompt: Tensor, frames: tuple[Frame, ...], x0: Tensor) -> None:
        state, blend, due = self.state, self.state.blend, False
        if blend is not None:
            switch, start, target, done = blend
            due = done + 1 == switch.blend_chunks
            blend = None if due else (switch, start, target, done + 1)
        evicted = frames is not state.frames
        self.state = replace(
            state,
            prompt=prompt,
            num_chunks=state.num_chunks + 1,
            frames=self._with_clean(frames, x0, prompt),
            clip=(*state.clip, x0),
            blend=blend,
            recache_due=due,
            num_evictions=state.num_evictions + evicted,
            began=False,
        )

    def _recached(self, state: SlowState) -> SlowState:
        """The frames after the sink run again under the prompt, a chunk at a time."""
        kept, size = state.cache.anchor_frames + state.cache.sink_frames, state.cache.chunk_frames
        frames, old = state.frames[:kept], state.frames[kept:]
        while old:
            count = len(old) % size or size
            latents = torch.cat([frame.latents for frame in old[:count]], dim=2)
            frames, old = self._with_clean(frames, latents, state.prompt), old[count:]
        return replace(state, frames=frames, recache_due=False, began=False)

    def _with_clean(
        self, frames: tuple[Frame, ...], latents: Tensor, prompt: Tensor
    ) -> tuple[Frame, ...]:
        """The frames and those of a clean pass over latents that follow them."""
        _, made = self._pass(frames, latents, 0.0, prompt)
        cache = self.state.cache
        for part, layers in zip(latents.split(1, dim=2), made, strict=True):
            if cache.storage == "int8" and len(frames) >= cache.anchor_frames + cache.sink_frames:
                layers = tuple((in_8_bits(k), in_8_bits(v)) for k, v in layers)
            frames = (*frames, Frame(part, layers, prompt))
        return frames

    @torch.no_grad()
    def _pass(
        self, frames: Sequence[Frame], x: Tensor, time: float, prompt: Tensor
    ) -> tuple[Tensor, list[Layers]]:
        """The flow of x [B, C, F, h, w] after these frames, and keys and values of its frames."""
        window = _Window(self, frames)
        seen = self._time_context(time, x.shape[2]), self._prompt_context(prompt), window, sdpa
        flow = self.model(x.to(self.dtype), *seen)
        tokens = self.grid.frame_tokens
        split = [zip(k.split(tokens, 1), v.split(tokens, 1), strict=True) for k, v in window.made]
        return flow, list(zip(*split, strict=True))

    def _joined(self, frames: Sequence[Frame], layer: int) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values, of the frames; of none, empty ones."""
        config, tokens = self.model.config, self.grid.frame_tokens
        nothing = torch.zeros(self.batch, 0, config.num_heads, config.head_dim, dtype=self.dtype)
        keys, values = (
            torch.cat([nothing, *(f.layers[layer][which].to(self.dtype) for f in frames)], dim=1)
            for which in (0, 1)
        )
        table = rope_table(self.state.cache.window_frames, self.grid, config.head_dim)
        return apply_rope(keys, table.tokens(0, len(frames) * tokens)), values

    def _new_time_context(self, time: float, frames: int) -> TimeContext:
        return self.model.time_context(torch.full((self.batch, frames), time), self.dtype)

    def _batched(self, prompt_embeds: Tensor) -> Tensor:
        return prompt_embeds.clone().expand(self.batch, -1, -1).to(self.dtype)


class _Window:
    """Frames as the network asks for them; what it computes is in `made`, layer by layer."""

    def __init__(self, stream: SlowStream, frames: Sequence[Frame]) -> None:
        self._stream, self._frames = stream, frames
        self.context_frames, self.made = len(frames), []

    def layer(self, index: int) -> _Window:
        self._index = index
        return self

    def extend(self, k: Tensor, rotated: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._stream._joined(self._frames, self._index)
        self.made.append((k, v))
        return torch.cat([keys, rotated], dim=1), torch.cat([values, v], dim=1)


def evict(frames: tuple[Frame, ...], leaving: int, cache: CacheConfig) -> tuple[Frame, ...]:
    """The frames after the oldest ones that follow the sink have left into it."""
    num_sink = cache.sink_frames
    anchor, others = frames[: cache.anchor_frames], frames[cache.anchor_frames :]
    sink, gone, rest = others[:num_sink], others[num_sink:][:leaving], others[num_sink + leaving :]
    if cache.decay == 1:
        return anchor + sink + rest
    mixed = []
    for place, frame in enumerate(sink):
        first, stop = place * leaving // num_sink, -(-(place + 1) * leaving // num_sink)
        pairs = zip(frame.layers, *(old.layers for old in gone[first:stop]), strict=True)
        layers = tuple(
            tuple(
                update_sink(old[which], [new[which] for new in news], cache, keys=which == 0)
                for which in (0, 1)
            )
            for old, *news in pairs
        )
        mixed.append(replace(frame, layers=layers))
    return (*anchor, *mixed, *rest)


def update_sink(sink: Tensor, gone: list[Tensor], cache: CacheConfig, *, keys: bool) -> Tensor:
    """One frame of the sink, [B, tokens, H, D], after its share of what leaves."""
    new = gone[0] if len(gone) == 1 else torch.stack(gone).mean(0)
    if cache.accumulator == "float32":
        sink = sink.float()
    new = new.to(sink.dtype)
    mixed = cache.decay * sink + (1 - cache.decay) * new
    if keys and cache.keep_key_norms:
        was, came, now = (x.float().flatten(2).norm(dim=2) for x in (sink, new, mixed))
        longer = (cache.decay * was + (1 - cache.decay) * came) / now.clamp_min(1e-6)
        mixed = mixed * longer.to(mixed.dtype)[..., None, None]
    return mixed


def padded(prompt: Tensor, tokens: int) -> Tensor:
    """A prompt [B, S, D] with zeros behind it, as the network sees it."""
    return F.pad(prompt, (0, 0, 0, tokens - prompt.shape[1]))


def in_8_bits(x: Tensor) -> Tensor:
    """Rounded to 127 steps of every token's and head's largest number, in float32."""
    largest = x.float().abs().amax(dim=-1, keepdim=True)
    unit = (largest * (1 / 127)).clamp_min(torch.finfo(torch.float32).tiny)
    return (x.float() * unit.reciprocal()).round() * unit
