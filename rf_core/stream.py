"""The stream: a video that is made chunk by chunk and never has to end.

A `Stream` puts a network, a decoder and a plain `StreamState` together. Each `step()` denoises one
chunk in a few passes and decodes it; before the next one, a clean pass rewrites its cache slot, so
that images are handed on without waiting for it. All that changes lives in the state, so saving,
restoring and forking are copies of data. Noise is a function of (seed, chunk) alone: a longer video
begins with the shorter one. A chunk whose latents are kept is made again by one pass (`replay`).
A source's latents may stand at a chunk's beginning in place of noise alone (`generate`'s `guide`),
and a second network may structure it (`control`; see `vace`).

Prompt changes act at chunk boundaries in one of four modes (`Stream.switch`). The published code
never refreshes cross-attention, so they are ours; `recache` follows LongLive (arXiv 2509.22622).

A chunk is made whole or not at all: what stops it in between, an `on_pass` that raises or memory
that runs out, leaves the stream as it stood before. Calls come one at a time.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from einops import repeat
from torch import Tensor

from .attention import Attention, sdpa
from .config import SPATIAL_FACTOR, CacheConfig, Grid, SamplerConfig
from .decoders.decoder import Decoder
from .decoders.handoff import Handoff
from .devices import to_device
from .kv_cache import KeyValues, KVCache
from .model import (
    ControlledNetwork,
    ControlTokens,
    CountedPrompt,
    Network,
    PromptContext,
    TimeContext,
    pad_prompt,
)
from .past import append, framed, joined, kept_of, parted, split_at, with_control
from .prompts import Switch
from .recache import CleanPass, OnPart, begins_at, chunks_from_end, recache, rerun
from .rolling import CleanContext, JointContext, check_rolling, roll
from .scheduler import add_noise, check_strength, entered_at, flow_to_x0, sampling_timesteps
from .state import (
    Blend,
    PendingCleanPass,
    Snapshot,
    StreamState,
    cache_config_of,
    check,
    counts_of,
    pack,
    snapshot_errors,
    unpack,
)
from .vace import Control

_log = logging.getLogger(__name__)
DEFAULT_SWITCH = Switch()
GUIDE_STRENGTH = 0.4
"""Where none is named: noise at 0.77, and two of the four published passes. Of those measured
(docs/video_in.md) the highest that keeps the source's motion, where the prompt's look is whole;
StreamDiffusionV2 has noise at 0.68 to 0.76 (arXiv 2511.07399, figure 8)."""
NO_GUIDES = (
    "a rolling sampler takes no guide, for it begins chunks before their guides are there; use a "
    "student that makes one chunk at a time"
)
"""Why there are none."""
NO_CONTROL = (
    "a rolling sampler takes no control, for it begins chunks before theirs is there; use a "
    "student that makes one chunk at a time"
)
"""Why there is none."""
_DRAWN_TOGETHER = 16  # normal numbers that torch's CPU generator draws at once

OnPass = Callable[[Literal["denoise", "clean"], int], None]
"""Called before every pass of the network with its kind and its number. What it raises ends the
chunk within one pass; the next step begins the same chunk again."""

_ChunkControl = tuple[Control | None, ControlTokens | None]
"""A chunk's control, and what the network makes of it."""

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
    every pass slower (`KVCache.allocate`). A rolling sampler looks ahead, but not past
    `last_chunk`; without it a longer video begins with the shorter one.
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
        last_chunk: int | None = None,
    ) -> None:
        weight = model.patch_embedding.weight
        self.model, self.decoder, self.attention = model, decoder, attention
        self.dtype, self.device = dtype or weight.dtype, torch.device(device or weight.device)
        self.sampler = sampler or SamplerConfig()
        self.height, self.width, self.batch = height, width, batch
        self._keep_rotated, self.last_chunk = keep_rotated, last_chunk
        if self.sampler.rolling:
            check_rolling(cache or CacheConfig(), self.sampler)
        self.latent_size = latent_size(height, width, model.config.patch_size)
        embeds = self._batched(prompt_embeds)
        self.state = StreamState(seed, self._new_cache(cache or CacheConfig()), embeds)
        self._context = embeds, self._prompt_context(embeds)
        self._busy = threading.Lock()
        self._told_of_head = False
        self._times: dict[tuple[float | tuple[float, ...], int], TimeContext] = {}
        self._draws: dict[int, tuple[int, Iterator[Tensor]]] = {}

    @property
    def cache_config(self) -> CacheConfig:
        """Window, sink and chunk of this stream."""
        return self.state.cache.config

    def step(
        self,
        on_pass: OnPass | None = None,
        on_prediction: OnPrediction | None = None,
        *,
        guide: Tensor | None = None,
        strength: float = GUIDE_STRENGTH,
        control: Control | None = None,
    ) -> Chunk:
        """Make the next chunk: denoise it and decode it; the rest is as in `generate`."""
        index = self.state.num_chunks
        latents = self.generate(
            on_pass, on_prediction, guide=guide, strength=strength, control=control
        )
        return Chunk(index=index, latents=latents, images=self.decode(latents))

    @torch.no_grad()
    def generate(
        self,
        on_pass: OnPass | None = None,
        on_prediction: OnPrediction | None = None,
        *,
        guide: Tensor | None = None,
        strength: float = GUIDE_STRENGTH,
        control: Control | None = None,
    ) -> Tensor:
        """The next chunk's clean latents [B, C, F, h, w]; `decode` them before the next one.

        Where a context is rebuilt of images (`CacheConfig.rebuild`), before a snapshot as well.

        `guide` is a source's clean latents for this chunk [B, C, F, h, w], F being `next_frames`.
        The chunk's first noise is mixed into them, and only the steps below are run (SDEdit,
        arXiv 2108.01073; of a stream StreamDiffusionV2, arXiv 2511.07399). `strength` in [0, 1]
        says how far up the schedule they enter, by the formula of `entered_at`: 1 is text alone,
        to the bit; 0 is the guide itself, with no pass. The context holds what was made of it.
        ValueError for a guide of another shape or with nan, a strength outside [0, 1], and a
        rolling sampler.

        `control` structures the chunk by a VACE beside the network, with a strength of its own;
        guide and control go together. Without one, and at its strength 0, the chunk is the
        network's own to the bit, if its past is. ValueError where the network takes none, for a
        context of another shape or with nan, and for a rolling sampler.
        """
        on_pass = on_pass or _no_op
        with self._exclusive():
            tokens = self._embedded(control)
            make = self._maker(guide, strength, tokens)
            x0 = self._make(
                lambda prompt: make(prompt, on_pass, on_prediction), on_pass, (control, tokens)
            )
        return x0.clone()  # the clean pass is still to read what is kept

    @property
    def next_frames(self) -> int:
        """Latent frames of the next chunk."""
        return self.cache_config.first_frames if self._begins else self.cache_config.chunk_frames

    @property
    def _begins(self) -> bool:
        """Whether nothing of the video is there: before its first chunk, or after a cut."""
        return self.state.cache.num_frames == self.state.reference_frames

    @property
    def decodes_afresh(self) -> bool:
        """Whether the next chunk begins a decoder's stream: the video's first, or after a cut."""
        return self._begins if self.decoder is None else self.state.decoder is None

    def _make(
        self,
        latents_of: Callable[[Tensor], Tensor],
        on_pass: OnPass,
        control: _ChunkControl,
        *,
        is_start: bool = False,
    ) -> Tensor:
        """The next chunk, whose clean latents are a function of its prompt [B, S, D]."""
        prompt = self._begin_chunk(on_pass)
        try:
            x0 = latents_of(prompt)
        except BaseException:
            self.state.cache.abandon()
            raise
        self._finish_chunk(x0, prompt, control, is_start=is_start)
        return x0

    def _maker(
        self, guide: Tensor | None, strength: float, control: ControlTokens | None
    ) -> Callable[[Tensor, OnPass, OnPrediction | None], Tensor]:
        """What makes the next chunk of its prompt; what is asked for is checked first."""
        check_strength(strength)
        denoise = partial(self._denoise, control=control)
        if guide is None:
            return self._roll if self.sampler.rolling else denoise
        if self.sampler.rolling:
            raise ValueError(NO_GUIDES)
        self._require_chunk("the guide's latents", guide)
        _require_finite("the guide", guide)
        if strength == 1:
            return denoise
        guide = guide.to(self.device, torch.float32, copy=True)
        if strength == 0:
            return lambda *_: guide
        return partial(denoise, guide=guide, strength=strength)

    def _denoise(
        self,
        prompt: Tensor,
        on_pass: OnPass,
        seen: OnPrediction | None,
        guide: Tensor | None = None,
        strength: float = 1,
        control: ControlTokens | None = None,
    ) -> Tensor:
        is_first, predict = self.state.first_due, partial(self._predict, prompt, control)
        timesteps, levels = entered_at(strength, self.sampler, is_first=is_first)
        noise = self._noise(len(self.sampler.steps_of(is_first)))
        x = next(noise)
        if guide is not None:
            x = add_noise(guide, x, x.new_full((x.shape[0], x.shape[2]), levels[0]))
        x0 = denoise(predict, x, noise, timesteps, on_pass, seen, levels=levels)
        if guide is not None and timesteps[0] not in self._timesteps():
            # Of these a strength that moves has any number.
            self._times.pop((timesteps[0], x.shape[2]), None)
        return x0

    def _roll(self, prompt: Tensor, on_pass: OnPass, seen: OnPrediction | None) -> Tensor:
        state, frames, first = self.state, self.cache_config.chunk_frames, self.state.num_chunks

        def predict(x: Tensor, timesteps: tuple[float, ...]) -> Tensor:
            view = JointContext(state.cache, x.shape[2])
            return self.model(x.to(self.dtype), *self._pass_inputs(x, timesteps, prompt, view))

        x0, others = roll(
            predict,
            () if state.in_flight is None else state.in_flight.split(frames, dim=2),
            lambda place, number: self._draw(first + place, number),
            self._timesteps(),
            lambda place: self.last_chunk is None or first + place <= self.last_chunk,
            lambda number: on_pass("denoise", number),
            seen or _see_nothing,
        )
        state.in_flight = torch.cat(others, dim=2) if others else None
        return x0

    @torch.no_grad()
    def replay(
        self,
        latents: Tensor,
        on_pass: OnPass | None = None,
        *,
        decode: bool = True,
        is_start: bool = False,
        control: Control | None = None,
    ) -> Chunk:
        """Make the next chunk of its clean latents [B, C, F, h, w], kept when it was generated.

        By one pass in place of all, and with the same bits in everything that follows: of its
        latents and its changes of prompt a stream is made again up to any chunk. Of a rolling
        sampler all passes are run, for the chunks in flight. Without `decode` the decoder does not
        see it; a context that is rebuilt of images needs those of its chunks. `is_start` is for
        latents that were no chunk's, as `start_from` takes them; `control` is what the chunk was
        made with. ValueError for latents that are no chunk of this stream.
        """
        if is_start and not self.state.first_due:
            raise ValueError("a chunk was generated; start latents come before the first one")
        options = {"decode": decode, "is_start": is_start}
        return self._given_chunk(latents, on_pass or _no_op, control, **options)

    def _given_chunk(
        self,
        latents: Tensor,
        on_pass: OnPass,
        control: Control | None = None,
        *,
        decode: bool = True,
        is_start: bool = False,
    ) -> Chunk:
        self._require_chunk("latents", latents)
        latents = latents.to(self.device, torch.float32, copy=True)

        def given(prompt: Tensor) -> Tensor:
            if self.sampler.rolling and not is_start:
                self._roll(prompt, on_pass, None)
            return latents

        with self._exclusive():
            index, tokens = self.state.num_chunks, self._embedded(control)
            self._make(given, on_pass, (control, tokens), is_start=is_start)
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
        self._see(images)
        return images

    def hand_on(self, latents: Tensor, handoff: Handoff) -> None:
        """As `decode`, where a handoff of this stream's decoder delivers the images."""
        state = self.state
        state.decoder = handoff.submit(latents, state.decoder, self._see)
        if state.last_images is not None and state.decoder.pending is not None:
            state.decoder.pending.wait((state.last_images,))

    def _see(self, images: Tensor) -> None:
        """Keep of images [B, T, 3, H, W] what a rebuilt context's head is encoded of."""
        if self.cache_config.rebuild == "reencoded":
            seen = append(self.state.last_images, images, dim=1)
            self.state.last_images = seen[:, -self.cache_config.rebuilt_images :].clone()

    @torch.no_grad()
    def start_from(self, latents: Tensor) -> list[Chunk]:
        """Begin with given clean latents [B, C, F, h, w] in place of noise; F is whole chunks.

        They enter the cache by clean passes, stand at the head of the video, and count as its
        first chunks.
        """
        expected = self._frame_shape(latents.shape[2])
        if self.state.num_chunks:
            raise ValueError("the stream has begun; start latents come before its first chunk")
        first, frames = self.cache_config.first_frames, self.cache_config.chunk_frames
        beyond = latents.shape[2] - first
        if tuple(latents.shape) != expected or beyond < 0 or beyond % frames:
            begun = "" if first == frames else f" after a first one of {first}"
            raise ValueError(
                f"start latents have shape {tuple(latents.shape)}; this stream needs batch, "
                f"channels, height and width {(*expected[:2], *expected[3:])} and whole chunks of "
                f"{frames} frames{begun}"
            )
        parts = split_chunks(latents, self.cache_config)
        return [self._given_chunk(part, _no_op, is_start=True) for part in parts]

    @torch.no_grad()
    def start_from_images(self, images: Tensor) -> list[Chunk]:
        """Begin with a picture or a clip, images [B, T, 3, H, W] in [0, 1].

        What is taken of them says `start_clip`. The published student was trained on text alone:
        this is experimental.
        """
        if self.decoder is None:
            raise ValueError("start images need the decoder's encoder; give the stream a decoder")
        return self.start_from(start_latents(images, self.decoder, self.cache_config))

    @torch.no_grad()
    def refer_to(self, references: Control) -> None:
        """Begin with reference images that are no part of the video: people, things, a look.

        Before the first chunk, and anew after a cut, which forgets them. `references` is their
        context [B or 1, Z, R, h, w], whose first latents are the R encoded pictures, a frame each.
        A published VACE has them as frames in front of the video; here they are a hidden chunk in
        front of the first, run by a clean pass like any past and never decoded. They count as no
        chunk, and draw no noise. They are the first R frames of the window, in anchor and sink in
        the place of as many of the video's: its length and what is recent stay as they are. With a
        `decay` under 1 those in the sink fade as it does, and those in the anchor never. ValueError
        where the network takes no control, something was made, these have fewer frames, or chunks
        roll.
        """
        with self._exclusive():
            tokens = self._embedded(references, references=True)
            state, frames = self.state, references.context.shape[2]
            if not self._begins or state.reference_frames:
                raise ValueError(
                    "something was made already; references come before the first chunk, or right "
                    "after a cut"
                )
            if frames > (opening := self.cache_config.opening_frames):
                raise ValueError(
                    f"{frames} reference images are given, and they stay in the sink, which has "
                    f"{opening} frames; give fewer, or raise sink_frames"
                )
            latents, _ = parted(references.context, self.model.config.in_dim)
            latents = latents.to(self.device, torch.float32)
            latents = latents.expand(self.batch, -1, -1, -1, -1).clone()
            state.cache.advance(frames)
            state.cache.finish()
            prompt = state.prompt_embeds if state.blend is None else state.blend.embeds()
            state.pending_clean_pass = PendingCleanPass(
                latents=latents, prompt_embeds=prompt, control=tokens
            )
            self._record(latents, references)
            state.reference_frames = frames

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
                    holds=self.cache_config.blend_holds,
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
            if (known := self._control_facts()) is not None:
                facts["control"] = known
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
            self.state, self._draws = state, {}
            if snapshot.compact:
                self._rebuild(counts_of(snapshot.facts))
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
            stream = cls(
                model,
                snapshot.tensors["prompt_embeds"],
                height=facts["height"],
                width=facts["width"],
                batch=facts["batch"],
                decoder=decoder,
                sampler=SamplerConfig(**facts["sampler"]),
                cache=cache_config_of(snapshot),
                **options,
            )
        stream.restore(snapshot)
        return stream

    def fork(self) -> Stream:
        """A second stream that goes on from here on its own; weights are shared."""
        twin = object.__new__(type(self))
        with self._exclusive():
            own = {"state": self.state.clone(), "_busy": threading.Lock(), "_draws": {}}
        twin.__dict__ = {**self.__dict__, **own}
        return twin

    def _cache_for(self, snapshot: Snapshot) -> KVCache:
        """A cache that the snapshot fits; ValueError where it does not fit this stream."""
        facts = snapshot.facts
        self._require("model sizes", _plain(facts["model"]), _plain(asdict(self.model.config)))
        self._require("model weights", facts["fingerprint"], self.model.fingerprint())
        for fact in ("height", "width", "batch"):
            self._require(fact, facts[fact], getattr(self, fact))
        self._require("control's past", facts.get("control"), self._control_facts())
        cache, config = self.state.cache, cache_config_of(snapshot)
        if replace(cache.config, decay=config.decay) != config:
            cache = self._new_cache(config)
        text = self.model.config.text_len, self.model.config.text_dim
        as_saved = replace(cache, config=config, sink_backup=None)
        channels = 0 if self._controlled is None else self._controlled.control_channels
        check(snapshot, as_saved, (self.batch, *text), self._frame_shape(1), channels)
        if self.sampler.rolling:
            check_rolling(config, self.sampler)
        self._require_flight(snapshot)
        return cache

    def _require_flight(self, snapshot: Snapshot) -> None:
        """ValueError where chunks in flight are not those that this stream has at that place."""
        held, config = snapshot.tensors.get("in_flight"), cache_config_of(snapshot)
        found = 0 if held is None else held.shape[2] // config.chunk_frames
        wanted = len(self.sampler.steps) - 1 if self.sampler.rolling else 0
        if self.last_chunk is not None:
            wanted = max(0, min(wanted, self.last_chunk + 1 - snapshot.facts["num_chunks"]))
        if found not in (0, wanted):
            raise ValueError(
                f"the snapshot has {found} chunks in flight, and this stream {wanted} at its "
                "place; go on with the steps and up to the last chunk that it was made with"
            )

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
        state.cache.advance(self.next_frames)
        return state.prompt_embeds if state.blend is None else state.blend.embeds()

    def _finish_chunk(
        self, x0: Tensor, prompt: Tensor, control: _ChunkControl, *, is_start: bool = False
    ) -> None:
        state = self.state
        state.cache.finish()
        state.num_chunks += 1
        state.chunk_open = False
        state.first_due = state.first_due and is_start
        at = 0.0 if is_start else self.sampler.clean_timestep
        given, tokens = control
        state.pending_clean_pass = PendingCleanPass(
            latents=x0, prompt_embeds=prompt, timestep=at, control=tokens
        )
        if state.cache.context_frames >= self.cache_config.head_frames:
            state.cache.backup_sink()  # as its clean pass leaves the head alone
        self._record(x0, given)
        if state.blend is not None:
            state.prompt_embeds = prompt
            state.blend = replace(state.blend, done=state.blend.done + 1)
            if state.blend.done == state.blend.num_chunks:
                state.blend, state.recache_due = None, True

    def _finish_clean_pass(self, on_pass: OnPass) -> None:
        state = self.state
        if state.half_recached is not None:
            self._recache(state.half_recached, on_pass)
        elif (due := state.pending_clean_pass) is not None:
            on_pass("clean", 0)
            if self.cache_config.rebuild != "never":
                self._rebuild_context(due.prompt_embeds, on_pass)
            else:
                self._clean_pass(due.latents, due.prompt_embeds, due.timestep, due.control)
            state.pending_clean_pass = None

    def _record(self, x0: Tensor, control: Control | None) -> None:
        """Keep a chunk's latents, and its control, for passes over the past."""
        state, config = self.state, self.cache_config
        held = state.first_latents, state.last_latents
        if (channels := self._kept_channels) and (control or state.has_control):
            first, last = (
                framed(None, latents, channels) if kept is None and latents is not None else kept
                for kept, latents in zip(
                    (state.first_control, state.last_control), held, strict=True
                )
            )
            new = framed(control, x0, channels)
            state.first_control, state.last_control = kept_of(first, last, new, config)
        state.first_latents, state.last_latents = kept_of(*held, x0, config)

    @property
    def _kept(self) -> tuple[Tensor | None, Tensor | None]:
        """The latents that are kept of the beginning and of the end, their control behind them."""
        state = self.state
        return (
            with_control(state.first_latents, state.first_control),
            with_control(state.last_latents, state.last_control),
        )

    @torch.no_grad()
    def _recache(self, prompt_embeds: Tensor, on_pass: OnPass) -> None:
        state, cache = self.state, self.state.cache
        if self.cache_config.rebuild != "never":
            on_pass("clean", 0)
            state.half_recached = prompt_embeds
            self._rebuild_context(prompt_embeds, on_pass)
            state.half_recached = state.pending_clean_pass = None
            return
        begin = begins_at(cache)
        if begin > cache.context_frames and state.half_recached is None:
            self._finish_clean_pass(on_pass)  # of a chunk that lies across
        frames = cache.num_frames + cache.evicted_frames - begin
        if (past := joined(*self._kept, frames)) is not None:
            on_pass("clean", 0)
            state.half_recached = prompt_embeds
            cache.undo_eviction()  # a stop in what follows leaves all of it to be done again
            recache(cache, past, self._clean_passes(prompt_embeds), _but_first(on_pass))
            if begin == 0:
                self._remember(past)
        state.half_recached = state.pending_clean_pass = None

    def _remember(self, past: Tensor) -> None:
        """Latents, and their control, that the whole window was made of: the opening's first."""
        state, opening = self.state, self.cache_config.opening_frames
        held = sum(each.shape[2] for each in self._kept if each is not None)
        state.reference_frames = max(0, state.reference_frames - (held - past.shape[2]))
        latents, control = parted(past, self.model.config.in_dim)
        state.first_latents, state.last_latents = split_at(latents, opening)
        state.first_control = state.last_control = None
        if control is not None:
            state.first_control, state.last_control = split_at(control, opening)

    @torch.no_grad()
    def _rebuild(self, counts: Sequence[int]) -> None:
        """The window of a compact snapshot, of the latents that it holds."""
        state, config, (num_frames, _, evictions, _, gone) = self.state, self.cache_config, counts
        if config.rebuild != "never":
            if num_frames:
                self._rebuild_context(state.prompt_embeds, _no_op)
            return
        clean_pass = self._clean_passes(state.prompt_embeds)
        (first, last), again = self._kept, num_frames
        if (evictions or gone) and first is not None:
            rerun(state.cache, first.split(config.chunk_frames, dim=2), clean_pass)
            first, again = None, num_frames - config.opening_frames
        # Of a window that has not moved the chunks themselves, which its opening may cut in two.
        state.cache.gone_frames = gone
        if (latents := joined(first, last, again)) is not None:
            rerun(state.cache, chunks_from_end(latents, config.chunk_frames), clean_pass)

    @torch.no_grad()
    def _rebuild_context(self, prompt_embeds: Tensor, on_pass: OnPass) -> None:
        """The window before the next chunk, made anew (`CacheConfig.rebuild`)."""
        head, recent = self._head(), self.cache_config.rebuilt_frames - 1
        if head is None:  # nothing was made
            return
        last = joined(None, self._kept[1], recent)
        context = head if last is None else torch.cat([head, last], dim=2)
        self.state.cache.truncate(0)
        parts = context.split(self.cache_config.chunk_frames, dim=2)
        rerun(self.state.cache, parts, self._clean_passes(prompt_embeds), _but_first(on_pass))

    def _head(self) -> Tensor | None:
        """The latent frame that a rebuilt context begins with, [B, C, 1, h, w], and its control."""
        first, last = self._kept
        in_sight = last is None or last.shape[2] < self.cache_config.kept_last
        if self.cache_config.rebuild == "first" or in_sight or not self._can_encode():
            return first
        assert self.decoder is not None and self.state.last_images is not None
        head = self.decoder.encode(self.state.last_images[:, :1])
        recent = joined(None, self.state.last_control, self.cache_config.rebuilt_frames)
        return with_control(head, None if recent is None else recent[:, :, :1])

    def _can_encode(self) -> bool:
        """Whether a context's head can be encoded of an image; where it cannot, that is said."""
        can = self.decoder is not None and self.state.last_images is not None
        if not can and not self._told_of_head:
            _log.warning(
                "rebuild is 'reencoded', and the stream's images are not decoded beside it: "
                "as with 'first', the context's head stays the stream's first frame"
            )
            self._told_of_head = True
        return can

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
        assert self.decoder is not None
        self.state.decoder = None
        first, last = self.state.first_latents, self.state.last_latents
        frames, references = self.cache_config.chunk_frames, self.state.reference_frames
        if first is not None and references:
            first = first[:, :, references:] if first.shape[2] > references else None
        if last is None or last.shape[2] < frames:  # of chunks that the sink has, or a part of
            last = first if last is None or first is None else torch.cat([first, last], dim=2)
        if last is not None:
            head = frames + last.shape[2] % frames
            for part in (last[:, :, :head], *chunks_from_end(last[:, :, head:], frames)):
                _, self.state.decoder = self.decoder.decode(part, self.state.decoder)

    def _clean_passes(self, prompt_embeds: Tensor) -> CleanPass:
        """Those of a past that runs again under a prompt, its control behind its latents."""
        at = self.sampler.clean_timestep

        def clean_pass(past: Tensor) -> None:
            latents, control = parted(past, self.model.config.in_dim)
            tokens = None
            if control is not None and self._controlled is not None:
                context, strength_F = control[:, :-1], control[0, -1, :, 0, 0]
                tokens = self._controlled.embed_control(context, strength_F, self.dtype)
            self._clean_pass(latents, prompt_embeds, at, tokens)

        return clean_pass

    def _predict(
        self, prompt_embeds: Tensor, control: ControlTokens | None, x: Tensor, timestep: float
    ) -> Tensor:
        inputs = x.to(self.dtype), *self._pass_inputs(x, timestep, prompt_embeds)
        if self._controlled is None:
            return self.model(*inputs)
        return self._controlled(*inputs, control)

    def _clean_pass(
        self,
        latents: Tensor,
        prompt_embeds: Tensor,
        timestep: float,
        control: ControlTokens | None = None,
    ) -> None:
        view = CleanContext(self.state.cache) if self.sampler.rolling else None
        inputs = self._pass_inputs(latents, timestep, prompt_embeds, view)
        if self._controlled is None:
            self.model.write_cache(latents.to(self.dtype), *inputs)
        else:
            self._controlled.write_cache(latents.to(self.dtype), *inputs, control)

    @property
    def _controlled(self) -> ControlledNetwork | None:
        """The network, where it takes a control."""
        return None if self.model.control is None else cast(ControlledNetwork, self.model)

    @property
    def _kept_channels(self) -> int:
        """Of a control's context that is kept for clean passes, 0 where they see none."""
        if (network := self._controlled) is None or network.control is None:
            return 0
        return network.control_channels if network.control.past or network.control.clean else 0

    def _control_facts(self) -> dict[str, Any] | None:
        """What a cache depends on of the control's network; None for nothing."""
        return None if self._controlled is None else self._controlled.control_facts()

    def _embedded(
        self, control: Control | None, *, references: bool = False
    ) -> ControlTokens | None:
        """A control as all passes of the next chunk take it; checked."""
        if control is None:
            return None
        if self.sampler.rolling:
            raise ValueError(NO_CONTROL)
        if (network := self._controlled) is None:
            raise ValueError(
                "this stream's network takes no control; put a VACE beside it (`ControlledModel`)"
            )
        self._require_control(control, network.control_channels, references)
        context = control.context.to(self.device).expand(self.batch, -1, -1, -1, -1)
        strength_F = None
        if control.strength:
            frames = context.shape[2]
            strength_F = torch.full((frames,), control.strength, device=self.device)
        return network.embed_control(context, strength_F, self.dtype)

    def _require_control(self, control: Control, channels: int, references: bool) -> None:
        found = list(control.context.shape)
        frames = found[2] if references and len(found) == 5 else self.next_frames
        wanted = [self.batch, channels, max(frames, 1), *self.latent_size]
        if found not in (wanted, [1, *wanted[1:]]):
            what = "references" if references else "the control"
            raise ValueError(f"{what} of shape {found} do not fit; {wanted} is needed")
        _require_finite("the control", control.context)

    def _timesteps(self) -> list[float]:
        """Those of the next chunk that is generated."""
        return sampling_timesteps(self.sampler, is_first=self.state.first_due).tolist()

    def _pass_inputs(
        self,
        x: Tensor,
        timestep: float | tuple[float, ...],
        prompt_embeds: Tensor,
        view: KeyValues | None = None,
    ) -> tuple[TimeContext, PromptContext | CountedPrompt, KeyValues, Attention]:
        """What a pass over latents x [B, C, F, h, w] sees besides them.

        `timestep` is that of all frames, or of as many equal parts; `view` stands for the cache.
        """
        key = timestep, x.shape[2]
        if key not in self._times:
            each = torch.tensor(timestep, device=self.device).reshape(-1)
            timestep_BF = each.repeat_interleave(x.shape[2] // len(each)).expand(self.batch, -1)
            self._times[key] = self.model.time_context(timestep_BF, self.dtype)
        if self._context[0] is not prompt_embeds:
            self._context = prompt_embeds, self._prompt_context(prompt_embeds)
        return self._times[key], self._context[1], view or self.state.cache, self.attention

    def _draw(self, chunk: int, number: int) -> Tensor:
        """One draw of a chunk, as `noise_draws` gives them one after another."""
        drawn, draws = self._draws.pop(chunk, (number + 1, iter(())))
        if number < drawn:
            drawn, draws = 0, self._noise_of(chunk, len(self.sampler.steps))
        noise = next(itertools.islice(draws, number - drawn, None))
        if number + 1 < len(self.sampler.steps):
            self._draws[chunk] = number + 1, draws
        return noise

    def _noise(self, num_draws: int) -> Iterator[Tensor]:
        """Of the chunk that was begun: what it starts from, and what goes back in."""
        return self._noise_of(self.state.num_chunks, num_draws)

    def _noise_of(self, chunk: int, num_draws: int) -> Iterator[Tensor]:
        frames = self.state.cache.slot_frames
        shape = (self.model.config.in_dim, frames, *self.latent_size)
        seeds = [self.state.seed + sample for sample in range(self.batch)]
        pinned = self.device.type == "cuda"  # drawn where a card copies from
        draws = noise_draws(seeds, chunk, shape, num_draws, pinned=pinned)
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

    def _require_chunk(self, what: str, latents: Tensor) -> None:
        expected = self._frame_shape(self.next_frames)
        if tuple(latents.shape) != expected:
            raise ValueError(f"{what} are {list(latents.shape)}; a chunk is {list(expected)}")

    def _require(self, what: str, found: object, wanted: object) -> None:
        if found != wanted:
            raise ValueError(
                f"the snapshot's {what} is {found}, this stream's is {wanted}; "
                "restore it with the model and the size it was made with"
            )


def _but_first(on_pass: OnPass) -> OnPart:
    """Tells of clean passes after the first, of which the caller tells beforehand."""
    return lambda number: on_pass("clean", number) if number else None


def _see_nothing(number: int, x0: Tensor) -> None:
    """Stands for an `on_prediction` that was not given."""


def _require_finite(what: str, latents: Tensor) -> None:
    if (~latents.isfinite()).any():
        raise ValueError(
            f"{what}'s latents hold numbers that are not finite: its images do, or its encoder's "
            "dtype is too narrow; encode in float32 or bfloat16"
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
    *,
    levels: Sequence[float] | None = None,
) -> Tensor:
    """Turn noise into a clean chunk, both [B, C, F, h, w].

    `predict(x, timestep)` gives the flow; `renoise` is mixed back between one pass and the next,
    and asked for when the first of them is on its way: x = (1 - sigma) x0 + sigma noise. The last
    pass's x0 is the result. `levels` are the timesteps of the noise in x, where they are others.
    """
    x, renoise, levels = noise, iter(renoise), levels or timesteps
    for i, timestep in enumerate(timesteps):
        if on_pass is not None:
            on_pass("denoise", i)
        at_BF = x.new_full((x.shape[0], x.shape[2]), levels[i])
        x = flow_to_x0(predict(x, timestep), x, at_BF)
        if on_prediction is not None:
            on_prediction(i, x)
        if i + 1 < len(timesteps):
            x = add_noise(x, next(renoise), torch.full_like(at_BF, levels[i + 1]))
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


def start_clip(images: Tensor, decoder: Decoder, cache: CacheConfig) -> Tensor:
    """What a stream can begin with of images [B, T, 3, H, W]: whole chunks.

    A single picture is held for one chunk; of a clip the last images are taken. ValueError where
    the clip is shorter than a chunk.
    """
    first = decoder.images_of(cache.first_frames, first=True)
    later = decoder.images_of(cache.chunk_frames, first=False)
    if images.shape[1] == 1:
        images = repeat(images, "b 1 c h w -> b t c h w", t=first)
    if images.shape[1] < first:
        raise ValueError(
            f"the start clip has {images.shape[1]} images; give 1 picture or at least {first}"
        )
    keep = first + (images.shape[1] - first) // later * later
    return images[:, -keep:]


def start_latents(images: Tensor, decoder: Decoder, cache: CacheConfig) -> Tensor:
    """Clean latents [B, C, F, h, w] of what `start_clip` takes of images: F is whole chunks."""
    return decoder.encode(start_clip(images, decoder, cache))


def split_chunks(latents: Tensor, cache: CacheConfig) -> list[Tensor]:
    """The chunks [B, C, F, h, w] of a stream that begins with such latents."""
    first, rest = latents[:, :, : cache.first_frames], latents[:, :, cache.first_frames :]
    return [first, *(rest.split(cache.chunk_frames, dim=2) if rest.shape[2] else ())]


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
