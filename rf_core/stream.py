"""The stream: a video that is made chunk by chunk and never has to end.

A `Stream` puts a network, a decoder and a plain `StreamState` together. Each `step()` denoises one
chunk in a few passes and decodes it; before the next one, a clean pass rewrites its cache slot, so
that images are handed on without waiting for it. All that changes lives in the state, so saving,
restoring and forking are copies of data. Noise is a function of (seed, chunk) alone: a longer video
begins with the shorter one. A chunk whose latents are kept is made again by one pass (`replay`).

Prompt changes act at chunk boundaries in one of four modes (`Stream.switch`). The published code
never refreshes cross-attention, so they are ours; `recache` follows LongLive (arXiv 2509.22622).

A chunk is made whole or not at all: what stops it in between, an `on_pass` that raises or memory
that runs out, leaves the stream as it stood before. Calls come one at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from einops import repeat
from torch import Tensor

from .attention import Attention, sdpa
from .config import SPATIAL_FACTOR, CacheConfig, Grid, SamplerConfig
from .decoders.decoder import Decoder
from .devices import to_device
from .kv_cache import KVCache
from .model import CountedPrompt, Network, PromptContext, TimeContext, pad_prompt
from .prompts import Switch
from .recache import chunks_from_end, recache, rerun
from .scheduler import add_noise, flow_to_x0, sampling_timesteps
from .state import (
    Blend,
    PendingCleanPass,
    Snapshot,
    StreamState,
    cache_config_of,
    check,
    pack,
    snapshot_errors,
    unpack,
)

_log = logging.getLogger(__name__)
DEFAULT_SWITCH = Switch()
_DRAWN_TOGETHER = 16  # normal numbers that torch's CPU generator draws at once

OnPass = Callable[[Literal["denoise", "clean"], int], None]
"""Called before every pass of the network with its kind and its number. What it raises ends the
chunk within one pass; the next step begins the same chunk again."""

OnPrediction = Callable[[int, Tensor], None]
"""Called after every denoising pass with its number and the clean chunk it predicts."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Latent frames made together, and their images."""

    index: int
    """Place in the stream, from 0."""
    latents: Tensor
    """Clean latents [B, C, F, h, w], float32."""
    images: Tensor | None
    """Images [B, T, 3, H, W] in [0, 1]; None without a decoder."""


class Stream:
    """One video in the making.

    `prompt_embeds` is the text encoder's output, [B or 1, S, D]; `height` and `width` are the
    picture's, in pixels. Sample b of a batch draws the noise of seed + b, so a batch equals its
    samples made alone. `dtype` is what the network computes in, by default that of its weights;
    latents stay float32 between passes. Without `keep_rotated` the cache is a third smaller and
    every pass slower (`KVCache.allocate`).
    """

    def __init__(
        self,
        model: Network,
        prompt_embeds: Tensor,
        *,
        height: int,
        width: int,
        decoder: Decoder | None = None,
        seed: int = 0,
        batch: int = 1,
        cache: CacheConfig | None = None,
        sampler: SamplerConfig | None = None,
        attention: Attention = sdpa,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        keep_rotated: bool = True,
    ) -> None:
        weight = model.patch_embedding.weight
        self.model, self.decoder, self.attention = model, decoder, attention
        self.dtype, self.device = dtype or weight.dtype, torch.device(device or weight.device)
        self.sampler = sampler or SamplerConfig()
        self.height, self.width, self.batch = height, width, batch
        self._keep_rotated = keep_rotated
        self.latent_size = latent_size(height, width, model.config.patch_size)
        embeds = self._batched(prompt_embeds)
        self.state = StreamState(seed, self._new_cache(cache or CacheConfig()), embeds)
        self._context = embeds, self._prompt_context(embeds)
        self._busy = threading.Lock()
        self._times: dict[tuple[float, int], TimeContext] = {}

    @property
    def cache_config(self) -> CacheConfig:
        """Window, sink and chunk of this stream."""
        return self.state.cache.config

    def step(
        self, on_pass: OnPass | None = None, on_prediction: OnPrediction | None = None
    ) -> Chunk:
        """Make the next chunk: denoise it and decode it."""
        index = self.state.num_chunks
        latents = self.generate(on_pass, on_prediction)
        return Chunk(index=index, latents=latents, images=self.decode(latents))

    @torch.no_grad()
    def generate(
        self, on_pass: OnPass | None = None, on_prediction: OnPrediction | None = None
    ) -> Tensor:
        """The next chunk's clean latents [B, C, F, h, w]; `decode` them before the next one."""
        on_pass = on_pass or _no_op
        with self._exclusive():
            prompt = self._begin_chunk(on_pass)
            noise, predict = self._noise(), partial(self._predict, prompt)
            timesteps = sampling_timesteps(self.sampler).tolist()
            try:
                x0 = denoise(predict, next(noise), noise, timesteps, on_pass, on_prediction)
            except BaseException:
                self.state.cache.abandon()
                raise
            self._finish_chunk(x0, prompt)
        return x0.clone()  # the clean pass is still to read what is kept

    @torch.no_grad()
    def replay(
        self, latents: Tensor, on_pass: OnPass | None = None, *, decode: bool = True
    ) -> Chunk:
        """Make the next chunk of its clean latents [B, C, F, h, w], kept when it was generated.

        By one pass in place of all, and with the same bits in everything that follows: of its
        latents and its changes of prompt a stream is made again up to any chunk. Without `decode`
        the decoder does not see it. ValueError for latents that are no chunk of this stream.
        """
        expected = self._frame_shape(self.cache_config.chunk_frames)
        if tuple(latents.shape) != expected:
            raise ValueError(f"latents are {list(latents.shape)}; a chunk is {list(expected)}")
        latents = latents.to(self.device, torch.float32, copy=True)
        with self._exclusive():
            index = self.state.num_chunks
            self._finish_chunk(latents, self._begin_chunk(on_pass or _no_op))
        images = self.decode(latents) if decode else None
        return Chunk(index=index, latents=latents.clone(), images=images)

    @torch.no_grad()
    def finish_clean_pass(self, on_pass: OnPass | None = None) -> None:
        """Rewrite the last chunk's cache slot by its clean pass, where that is still to be done.

        A recache that was begun and stopped is finished. The next chunk and a snapshot do both by
        themselves.
        """
        with self._exclusive():
            self._finish_clean_pass(on_pass or _no_op)

    def forget_weights(self) -> None:
        """Before the model's weights are changed, by a LoRA's strength or the like.

        The last chunk's clean pass is run with the old ones. What was computed of the prompt and of
        the timesteps is dropped.
        """
        with self._exclusive(), torch.no_grad():
            self._finish_clean_pass(_no_op)
            self._context = self._context[0].new_empty(0), ()
            self._times.clear()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor | None:
        """Images [B, T, 3, H, W] of the chunk just generated; None without a decoder.

        One that fails half way costs the stream its decoder's past (`VAEState`), for memory holds
        one: chunks can still be generated, but to decode again, restore a snapshot, the last one or
        a compact one of now, or cut. ValueError until then.
        """
        if self.decoder is None:
            return None
        images, self.state.decoder = self.decoder.decode(latents, self.state.decoder)
        return images

    @torch.no_grad()
    def start_from(self, latents: Tensor) -> list[Chunk]:
        """Begin with given clean latents [B, C, F, h, w] in place of noise; F is whole chunks.

        They enter the cache by clean passes, stand at the head of the video, and count as its
        first chunks.
        """
        frames = self.cache_config.chunk_frames
        expected = self._frame_shape(latents.shape[2])
        if self.state.num_chunks:
            raise ValueError("the stream has begun; start latents come before its first chunk")
        if tuple(latents.shape) != expected or latents.shape[2] % frames:
            raise ValueError(
                f"start latents have shape {tuple(latents.shape)}; this stream needs batch, "
                f"channels, height and width {(*expected[:2], *expected[3:])} and whole chunks of "
                f"{frames} frames"
            )
        return [self.replay(part) for part in latents.split(frames, dim=2)]

    @torch.no_grad()
    def start_from_images(self, images: Tensor) -> list[Chunk]:
        """Begin with a picture or a clip, images [B, T, 3, H, W] in [0, 1].

        What is taken of them says `start_clip`. The published student was trained on text alone:
        this is experimental.
        """
        if self.decoder is None:
            raise ValueError("start images need the decoder's encoder; give the stream a decoder")
        chunk_frames = self.cache_config.chunk_frames
        return self.start_from(start_latents(images, self.decoder, chunk_frames))

    def switch(self, prompt_embeds: Tensor, switch: Switch | str = DEFAULT_SWITCH) -> None:
        """Change the prompt from the next chunk on; `switch` may be written `blend 3 slerp`.

        - `soft`: only the cross-attention changes; slow and smooth.
        - `recache`: as soft, then the window's clean chunks after the sink run once under the new
          prompt, so that the past no longer speaks of the old one; the sink is kept.
        - `blend`: embeddings move over some chunks, the last fully new, then one recache.
        - `cut`: a fresh cache, sink, cross-attention and decoder: a clean cut.
        """
        if isinstance(switch, str):
            switch = Switch.parse(switch)
        embeds, state = self._batched(prompt_embeds), self.state
        with self._exclusive():
            if switch.mode == "cut":
                state.cut()
            elif switch.mode == "blend":
                state.blend = Blend(
                    start=state.prompt_embeds,
                    target=embeds,
                    num_chunks=switch.blend_chunks,
                    interpolation=switch.interpolation,
                )
                return
            state.prompt_embeds, state.blend = embeds, None
            state.recache_due = switch.mode == "recache"

    def set_decay(self, decay: float) -> None:
        """Change what the sink keeps when a chunk leaves the window; see `CacheConfig.decay`.

        From the next eviction on: one that a stopped chunk has begun is still of the old decay.
        ValueError for no fraction between 0 and 1.
        """
        with self._exclusive():
            self.state.decay_due = replace(self.cache_config, decay=decay).decay

    def snapshot(self, *, compact: bool = False) -> Snapshot:
        """The state between two chunks, to save or to `restore`; see `rf_core.state`."""
        with self._exclusive(), torch.no_grad():
            self._finish_clean_pass(_no_op)
            facts = {
                "model": asdict(self.model.config),
                "fingerprint": self.model.fingerprint(),
                "sampler": asdict(self.sampler),
                "height": self.height,
                "width": self.width,
                "batch": self.batch,
                "decoder": None if self.decoder is None else self.decoder.kind,
            }
            return pack(self.state, facts, compact=compact)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot; all of it is checked before anything changes.

        The past of a decoder of another kind is made anew of the last latents, and that is warned
        of. ValueError when the snapshot is damaged, another model's or of another size.
        """
        with self._exclusive():
            with snapshot_errors():
                cache = self._cache_for(snapshot)
            state = unpack(snapshot, cache)
            state.prompt_embeds = self._batched(state.prompt_embeds)
            self.state = state
            if snapshot.compact:
                self._rebuild(snapshot.facts["frames"])
            self._restore_decoder(snapshot)

    @classmethod
    def from_snapshot(
        cls,
        model: Network,
        snapshot: Snapshot,
        *,
        decoder: Decoder | None = None,
        **options: Any,
    ) -> Stream:
        """A stream of the snapshot's size and steps that goes on from it."""
        facts = snapshot.facts
        with snapshot_errors():
            sampler = facts["sampler"] | {"steps": tuple(facts["sampler"]["steps"])}
            stream = cls(
                model,
                snapshot.tensors["prompt_embeds"],
                height=facts["height"],
                width=facts["width"],
                batch=facts["batch"],
                decoder=decoder,
                sampler=SamplerConfig(**sampler),
                cache=cache_config_of(snapshot),
                **options,
            )
        stream.restore(snapshot)
        return stream

    def fork(self) -> Stream:
        """A second stream that goes on from here on its own; weights are shared."""
        twin = object.__new__(type(self))
        with self._exclusive():
            own = {"state": self.state.clone(), "_busy": threading.Lock()}
        twin.__dict__ = {**self.__dict__, **own}
        return twin

    def _cache_for(self, snapshot: Snapshot) -> KVCache:
        """A cache that the snapshot fits; ValueError where it does not fit this stream."""
        facts = snapshot.facts
        self._require("model sizes", _plain(facts["model"]), _plain(asdict(self.model.config)))
        self._require("model weights", facts["fingerprint"], self.model.fingerprint())
        for fact in ("height", "width", "batch"):
            self._require(fact, facts[fact], getattr(self, fact))
        cache, config = self.state.cache, cache_config_of(snapshot)
        if replace(cache.config, decay=config.decay) != config:
            cache = self._new_cache(config)
        text = self.model.config.text_len, self.model.config.text_dim
        as_saved = replace(cache, config=config, sink_backup=None)
        check(snapshot, as_saved, (self.batch, *text), self._frame_shape(1))
        return cache

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Around what a chunk in the making, which may be another thread's, must not see."""
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(
                "the stream is in the middle of a chunk; do this before or after it, for all acts "
                "from the next chunk on"
            )
        try:
            yield
        finally:
            self._busy.release()

    def _begin_chunk(self, on_pass: OnPass) -> Tensor:
        """Make room for the next chunk; its prompt [B, S, D]."""
        state = self.state
        state.chunk_open = True
        if state.recache_due:
            self._recache(state.prompt_embeds, on_pass)
            state.recache_due = False
        self._finish_clean_pass(on_pass)
        if state.decay_due is not None and not state.cache.evicted_frames:
            state.cache.set_decay(state.decay_due)
            state.decay_due = None
        state.cache.backup_sink()
        state.cache.advance()
        return state.prompt_embeds if state.blend is None else state.blend.embeds()

    def _finish_chunk(self, x0: Tensor, prompt: Tensor) -> None:
        state = self.state
        state.cache.finish()
        state.num_chunks += 1
        state.chunk_open = False
        state.pending_clean_pass = PendingCleanPass(latents=x0, prompt_embeds=prompt)
        if self._recache_rewrites():  # and the clean pass leaves the sink alone
            state.cache.backup_sink()
        self._record_latents(x0)
        if state.blend is not None:
            state.prompt_embeds = prompt
            state.blend = replace(state.blend, done=state.blend.done + 1)
            if state.blend.done == state.blend.num_chunks:
                state.blend, state.recache_due = None, True

    def _finish_clean_pass(self, on_pass: OnPass) -> None:
        state = self.state
        if state.half_recached is not None:
            self._recache(state.half_recached, on_pass)
        elif state.pending_clean_pass is not None:
            on_pass("clean", 0)
            self._clean_pass(
                state.pending_clean_pass.latents, state.pending_clean_pass.prompt_embeds
            )
            state.pending_clean_pass = None

    def _record_latents(self, x0: Tensor) -> None:
        state, config = self.state, self.cache_config
        held = 0 if state.first_latents is None else state.first_latents.shape[2]
        to_sink = min(config.sink_frames - held, x0.shape[2])
        if to_sink:
            state.first_latents = _append(state.first_latents, x0[:, :, :to_sink])
        if to_sink < x0.shape[2]:
            room = config.window_frames - config.sink_frames
            state.last_latents = _append(state.last_latents, x0[:, :, to_sink:])[:, :, -room:]

    @torch.no_grad()
    def _recache(self, prompt_embeds: Tensor, on_pass: OnPass) -> None:
        state, cache = self.state, self.state.cache
        if not self._recache_rewrites() and state.half_recached is None:
            self._finish_clean_pass(on_pass)
        if cache.num_frames + cache.evicted_frames > cache.config.sink_frames:
            assert state.last_latents is not None
            on_pass("clean", 0)
            state.half_recached = prompt_embeds
            cache.undo_eviction()  # a stop in what follows leaves all of it to be done again
            recache(
                cache,
                state.last_latents,
                partial(self._clean_pass, prompt_embeds=prompt_embeds),
                lambda number: on_pass("clean", number) if number else None,
            )
        state.half_recached = state.pending_clean_pass = None

    def _recache_rewrites(self) -> bool:
        """Whether a recache runs the whole of the last chunk again."""
        return self.state.cache.context_frames >= self.cache_config.sink_frames

    @torch.no_grad()
    def _rebuild(self, counts: Sequence[int]) -> None:
        """The window of a compact snapshot, of the latents that it holds."""
        state, frames = self.state, self.cache_config.chunk_frames
        first, last = ([] if t is None else [t] for t in (state.first_latents, state.last_latents))
        evictions = counts[2]
        if evictions or not first:
            parts = [p for t in first for p in t.split(frames, dim=2)]
            parts += [p for t in last for p in chunks_from_end(t, frames)]
        else:  # the chunks themselves, of which the sink may have cut one in two
            parts = list(torch.cat(first + last, dim=2).split(frames, dim=2))
        clean_pass = partial(self._clean_pass, prompt_embeds=state.prompt_embeds)
        rerun(state.cache, parts, clean_pass)

    def _restore_decoder(self, snapshot: Snapshot) -> None:
        """The decoder's past: the snapshot's where it is this decoder's, or made of the latents."""
        facts, used = snapshot.facts, snapshot.facts["decoder_frames"] is not None
        if self.decoder is None:
            self.state.decoder = None
        elif facts.get("decoder", "another decoder") != self.decoder.kind:
            if used and not snapshot.compact:
                _log.warning(
                    "the snapshot's images were decoded by %s; %s goes on from its last latents",
                    facts.get("decoder", "another decoder"),
                    self.decoder.kind,
                )
            self._redecode()
        elif snapshot.compact and used:
            self._redecode()

    def _redecode(self) -> None:
        """Give the decoder a past: whole chunks, of which the first may be longer."""
        self.state.decoder = None
        first, last = self.state.first_latents, self.state.last_latents
        frames = self.cache_config.chunk_frames
        if last is None or last.shape[2] < frames:  # of chunks that the sink has, or a part of
            last = first if last is None or first is None else torch.cat([first, last], dim=2)
        if last is not None:
            head = frames + last.shape[2] % frames
            for part in (last[:, :, :head], *chunks_from_end(last[:, :, head:], frames)):
                self.decode(part)

    def _predict(self, prompt_embeds: Tensor, x: Tensor, timestep: float) -> Tensor:
        return self.model(x.to(self.dtype), *self._pass_inputs(x, timestep, prompt_embeds))

    def _clean_pass(self, latents: Tensor, prompt_embeds: Tensor) -> None:
        self.model.write_cache(
            latents.to(self.dtype), *self._pass_inputs(latents, 0.0, prompt_embeds)
        )

    def _pass_inputs(
        self, x: Tensor, timestep: float, prompt_embeds: Tensor
    ) -> tuple[TimeContext, PromptContext | CountedPrompt, KVCache, Attention]:
        """What a pass over latents x [B, C, F, h, w] sees besides them."""
        key = timestep, x.shape[2]
        if key not in self._times:
            timestep_BF = torch.full((self.batch, x.shape[2]), timestep, device=self.device)
            self._times[key] = self.model.time_context(timestep_BF, self.dtype)
        if self._context[0] is not prompt_embeds:
            self._context = prompt_embeds, self._prompt_context(prompt_embeds)
        return self._times[key], self._context[1], self.state.cache, self.attention

    def _noise(self) -> Iterator[Tensor]:
        shape = (self.model.config.in_dim, self.cache_config.chunk_frames, *self.latent_size)
        seeds = [self.state.seed + sample for sample in range(self.batch)]
        pinned = self.device.type == "cuda"  # drawn where a card copies from
        draws = noise_draws(
            seeds, self.state.num_chunks, shape, len(self.sampler.steps), pinned=pinned
        )
        return (to_device(draw, self.device) for draw in draws)

    def _batched(self, prompt_embeds: Tensor) -> Tensor:
        if prompt_embeds.shape[0] not in (1, self.batch):
            raise ValueError(
                f"{prompt_embeds.shape[0]} prompts were given for a batch of {self.batch}; "
                "give one for all, or one each"
            )
        whole = pad_prompt(prompt_embeds, self.model.config).expand(self.batch, -1, -1)
        # A copy: what the caller does with theirs later is no change of prompt.
        return whole.to(self.device, self.dtype, copy=True)

    def _frame_shape(self, frames: int) -> tuple[int, ...]:
        """Of that many latent frames of this stream, [B, C, F, h, w]."""
        return self.batch, self.model.config.in_dim, frames, *self.latent_size

    @torch.no_grad()
    def _prompt_context(self, embeds: Tensor) -> PromptContext | CountedPrompt:
        return self.model.counted_prompt(embeds)

    def _new_cache(self, config: CacheConfig) -> KVCache:
        return self.model.new_cache(
            config,
            batch=self.batch,
            grid=Grid.of_latents(*self.latent_size, self.model.config.patch_size),
            dtype=self.dtype,
            device=self.device,
            keep_rotated=self._keep_rotated,
        )

    def _require(self, what: str, found: object, wanted: object) -> None:
        if found != wanted:
            raise ValueError(
                f"the snapshot's {what} is {found}, this stream's is {wanted}; "
                "restore it with the model and the size it was made with"
            )


def _no_op(kind: str, number: int) -> None:
    """Stands for an `on_pass` that was not given."""


def denoise(
    predict: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    renoise: Iterable[Tensor],
    timesteps: Sequence[float],
    on_pass: OnPass | None = None,
    on_prediction: OnPrediction | None = None,
) -> Tensor:
    """Turn noise into a clean chunk, both [B, C, F, h, w].

    `predict(x, timestep)` gives the flow; `renoise` is mixed back between one pass and the next,
    and asked for when the first of them is on its way: x = (1 - sigma) x0 + sigma noise. The last
    pass's x0 is the result.
    """
    x, renoise = noise, iter(renoise)
    for i, timestep in enumerate(timesteps):
        if on_pass is not None:
            on_pass("denoise", i)
        at_BF = x.new_full((x.shape[0], x.shape[2]), timestep)
        x = flow_to_x0(predict(x, timestep), x, at_BF)
        if on_prediction is not None:
            on_prediction(i, x)
        if i + 1 < len(timesteps):
            x = add_noise(x, next(renoise), torch.full_like(at_BF, timesteps[i + 1]))
    return x


def chunk_noise(
    seeds: Sequence[int], chunk: int, shape: tuple[int, ...], num_draws: int
) -> list[Tensor]:
    """The noise of one chunk: `num_draws` tensors [len(seeds), *shape], float32 on the CPU.

    The first starts the chunk, the others go back in between its passes. A function of its
    arguments alone, drawn on the CPU so that every device sees the same. Of a seed torch's
    generator there takes 32 bits: of 77 000 chunks, 16 hours, two are as likely as not drawn alike.
    """
    return list(noise_draws(seeds, chunk, shape, num_draws))


def noise_draws(
    seeds: Sequence[int],
    chunk: int,
    shape: tuple[int, ...],
    num_draws: int,
    *,
    pinned: bool = False,
) -> Iterator[Tensor]:
    """As `chunk_noise`, each drawn when it is asked for: a device works while the next is drawn."""
    generators = [_generator(seed, chunk) for seed in seeds]
    if math.prod(shape) % _DRAWN_TOGETHER:  # such a tail would be drawn anew, and all after it
        samples = [torch.randn((num_draws, *shape), generator=each) for each in generators]
        yield from torch.stack(samples, dim=1)
        return
    for _ in range(num_draws):
        draw = torch.empty((len(generators), *shape), pin_memory=pinned)
        for sample, generator in zip(draw, generators, strict=True):
            sample.normal_(generator=generator)
        yield draw


def _generator(seed: int, chunk: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{chunk}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def latent_size(height: int, width: int, patch_size: tuple[int, int, int]) -> tuple[int, int]:
    """Latent rows and columns of a picture in pixels; ValueError where it does not fit."""
    units = [SPATIAL_FACTOR * patch for patch in patch_size[1:]]
    sizes = (height, width)
    if any(size < unit or size % unit for size, unit in zip(sizes, units, strict=True)):
        near = [max(1, round(s / unit)) * unit for s, unit in zip(sizes, units, strict=True)]
        raise ValueError(
            f"a picture of {width}x{height} pixels does not fit the model: width must be a "
            f"multiple of {units[1]}, height of {units[0]}; the nearest is {near[1]}x{near[0]}"
        )
    return height // SPATIAL_FACTOR, width // SPATIAL_FACTOR


def start_clip(images: Tensor, decoder: Decoder, chunk_frames: int) -> Tensor:
    """What a stream can begin with of images [B, T, 3, H, W]: whole chunks.

    A single picture is held for one chunk; of a clip the last images are taken. ValueError where
    the clip is shorter than a chunk.
    """
    first, later = (decoder.images_of(chunk_frames, first=is_first) for is_first in (True, False))
    if images.shape[1] == 1:
        images = repeat(images, "b 1 c h w -> b t c h w", t=first)
    if images.shape[1] < first:
        raise ValueError(
            f"the start clip has {images.shape[1]} images; give 1 picture or at least {first}"
        )
    keep = first + (images.shape[1] - first) // later * later
    return images[:, -keep:]


def start_latents(images: Tensor, decoder: Decoder, chunk_frames: int) -> Tensor:
    """Clean latents [B, C, F, h, w] of what `start_clip` takes of images: F is whole chunks."""
    return decoder.encode(start_clip(images, decoder, chunk_frames))


def _append(old: Tensor | None, new: Tensor) -> Tensor:
    return new.clone() if old is None else torch.cat([old, new], dim=2)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
