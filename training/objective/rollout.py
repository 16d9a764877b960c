"""The student's rollout under autograd, with the very cache that inference streams through.

Chunk by chunk (Self Forcing, arXiv 2506.08009): denoise without gradient down to the exit step,
take that one step with gradient, then write the cache slot by a clean pass without gradient. What
a chunk sees of its past is a copy that nothing writes to, so a recomputed forward reads the same,
and no gradient leaks from a chunk into the ones before it. Window, evictions and the EMA-Sink are
`KVCache`'s own: a rollout longer than the window trains the sink as it will be used. A change of
prompt recaches as a stream does. A first chunk may be given, as a stream begins from an image: its
clean pass is all that the student does of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rf_core.attention import Attention, sdpa
from rf_core.config import CacheConfig, Grid, SamplerConfig
from rf_core.kv_cache import KeyValues, KVCache
from rf_core.layers import PromptKV
from rf_core.model import PromptContext, WanModel
from rf_core.recache import recache
from rf_core.scheduler import add_noise, flow_to_x0, sampling_timesteps

from .tensors import Tensors

T = TypeVar("T", bound=KeyValues)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A window of a rollout: consecutive chunks."""

    latents: Tensor
    """Clean latents [B, C, F, h, w], with gradient where the window is supervised."""
    past: Tensor
    """The clean latents of the chunk before it, without gradient; no frames for the first."""
    timestep: float
    """Of the exit step, at which the last pass denoises."""
    num_evictions: int
    """How often the cache has evicted frames into the sink so far."""
    given_BF: Tensor | None
    """Which frames were given and not generated, bool [B, F]; None where none was."""


@dataclass(frozen=True, kw_only=True)
class Start(Tensors):
    """Given first chunks, which stand in place of generated ones."""

    latents: Tensor
    """Clean latents of a chunk, [B, C, F, h, w]."""
    given_B: Tensor | None = None
    """Which samples begin so, bool [B]; None for all: then nothing is denoised in that chunk.
    Sharded networks need the same passes on all processes, and so None on all of them or on none.
    """

    def over(self, x0: Tensor) -> Tensor:
        """The given chunks where there are any, the generated ones elsewhere."""
        assert self.given_B is not None
        return self.latents.to(x0).where(self.given_B[:, None, None, None, None], x0)

    def given_frames(self, frames: int) -> Tensor:
        """Which of the first latent frames of a rollout are given, bool [B, F]."""
        chunk = torch.arange(frames, device=self.latents.device) < self.latents.shape[2]
        whole = chunk.expand(len(self.latents), -1)
        return whole if self.given_B is None else whole & self.given_B[:, None]


@dataclass(frozen=True, kw_only=True)
class RolloutDraws(Tensors):
    """The random part of a rollout; the same draws give the same rollout."""

    noise: Tensor
    """What chunks start from, [B, C, F, h, w], F whole chunks."""
    renoise: Tensor
    """Noise that is added again between passes, [steps - 1, B, C, F, h, w]."""
    exit_step: int
    """The last denoising step of every chunk, from 0; shared by all chunks, samples and ranks."""
    start: Start | None = None
    """First chunks that are given; None where all is generated."""


@dataclass(frozen=True, kw_only=True)
class PromptSwitch(Tensors):
    """A change of prompt between two windows, with a recache (LongLive, arXiv 2509.22622)."""

    window: int
    """The first window under the new prompts, of those that are rolled out, from 0."""
    embeds: Tensor
    """The prompts from there on, [B, S, D]; of samples that keep theirs, the same as before."""
    samples: Tensor
    """Which samples change, bool [B]: the past of the others stays as it is."""


@dataclass(kw_only=True)
class RolloutState:
    """Where a rollout stands between two windows; `roll_out` moves it on in place."""

    cache: KVCache
    last_latents: Tensor
    """Its last clean latents [B, C, F, h, w], no more than the window holds beside its sink."""

    @classmethod
    def begin(
        cls,
        model: WanModel,
        latents: Tensor,
        config: CacheConfig,
        dtype: torch.dtype | None = None,
    ) -> RolloutState:
        """An empty one for rollouts of latents of that shape, [B, C, F, h, w], on their device."""
        cache = model.new_cache(
            config,
            batch=latents.shape[0],
            grid=Grid.of_latents(*latents.shape[-2:], model.config.patch_size),
            dtype=dtype or model.patch_embedding.weight.dtype,
            device=latents.device,
        )
        return cls(cache=cache, last_latents=latents[:, :, :0])

    def append(self, latents: Tensor) -> None:
        """Note the clean latents of a window that the cache holds."""
        config = self.cache.config
        room = config.window_frames - config.sink_frames
        every = torch.cat([self.last_latents, latents.detach()], dim=2)
        self.last_latents = every[:, :, -room:].clone()


def random_draws(
    shape: tuple[int, ...], sampler: SamplerConfig, generator: torch.Generator | None = None
) -> RolloutDraws:
    """Noise for latents of `shape` [B, C, F, h, w] and a uniform exit step.

    Seed the generator per rank, then share the exit step over ranks.
    """
    steps = len(sampler.steps)
    return RolloutDraws(
        noise=torch.randn(shape, generator=generator),
        renoise=torch.randn((steps - 1, *shape), generator=generator),
        exit_step=int(torch.randint(steps, (), generator=generator)),
    )


def roll_out(
    model: WanModel,
    prompt_embeds: Tensor,
    draws: RolloutDraws,
    sampler: SamplerConfig,
    cache_config: CacheConfig,
    *,
    window_chunks: int | None = None,
    supervised: bool = True,
    attention: Attention = sdpa,
    dtype: torch.dtype | None = None,
    switch: PromptSwitch | None = None,
    state: RolloutState | None = None,
) -> Iterator[Rollout]:
    """Stream as many chunks as there is noise, yielding them `window_chunks` at a time.

    `prompt_embeds` is [B, S, D]; `window_chunks` None yields all chunks at once. No gradient leads
    from a window into the one before: call backward on each before the next is asked for, and a
    rollout of any length takes the memory of one window. `dtype` is what the network computes in,
    by default that of its weights. With a `state` the rollout goes on from there. ValueError where
    the noise is not whole windows, or the start no chunk of it.
    """
    chunk = cache_config.chunk_frames
    parts = list(
        zip(
            draws.noise.split(chunk, dim=2),
            draws.renoise.split(chunk, dim=3),
            strict=True,
        )
    )
    per_window = window_chunks or len(parts)
    if draws.noise.shape[2] % (chunk * per_window):
        raise ValueError(
            f"noise of {draws.noise.shape[2]} latent frames is not whole windows of {per_window} "
            f"chunks of {chunk}"
        )
    if draws.start is not None and draws.start.latents.shape != parts[0][0].shape:
        raise ValueError(
            f"start latents are {list(draws.start.latents.shape)}; a chunk of the rollout is "
            f"{list(parts[0][0].shape)}"
        )
    timesteps = sampling_timesteps(sampler).tolist()[: draws.exit_step + 1]
    dtype = dtype or model.patch_embedding.weight.dtype
    state = state or RolloutState.begin(model, draws.noise, cache_config, dtype)
    assert draws.start is None or not state.last_latents.shape[2], "a start begins a rollout"
    for window, first in enumerate(range(0, len(parts), per_window)):
        switches = switch is not None and window == switch.window
        if switches:
            prompt_embeds = switch.embeds
        student = _Student(
            model, prompt_embeds.to(dtype), state.cache, attention, dtype, supervised
        )
        if switches:
            student.recache(state.last_latents, switch.samples)
        past = state.last_latents[:, :, -chunk:]
        start = None if window else draws.start
        chunks = [
            student.next_chunk(*part, timesteps, None if number else start)
            for number, part in enumerate(parts[first : first + per_window])
        ]
        latents = torch.cat(chunks, dim=2)
        state.append(latents)
        yield Rollout(
            latents=latents,
            past=past,
            timestep=timesteps[-1],
            num_evictions=state.cache.num_evictions,
            given_BF=None if start is None else start.given_frames(latents.shape[2]),
        )


def detached(prompt: PromptContext) -> PromptContext:
    """The same prompt without gradient."""
    return tuple(PromptKV(kv.k_BSHD.detach(), kv.v_BSHD.detach()) for kv in prompt)


class _Student:
    """The student and its cache during one window, with the prompt's keys and values."""

    def __init__(
        self,
        model: WanModel,
        prompt_embeds: Tensor,
        cache: KVCache,
        attention: Attention,
        dtype: torch.dtype,
        supervised: bool,
    ) -> None:
        self.model, self.cache, self.attention, self.dtype = model, cache, attention, dtype
        self.supervised = supervised
        with torch.set_grad_enabled(supervised):
            self.prompt = model.prompt_context(prompt_embeds)
        self.detached_prompt = detached(self.prompt)

    def next_chunk(
        self, noise: Tensor, renoise: Tensor, timesteps: Sequence[float], start: Start | None
    ) -> Tensor:
        """The next chunk, with gradient through the last of `timesteps`' passes, or a given one."""
        self.cache.advance()
        if start is not None and start.given_B is None:
            x0 = start.latents.to(noise)
        else:
            x0 = self._generate(noise, renoise, timesteps)
            x0 = x0 if start is None else start.over(x0)
        with torch.no_grad():
            self._clean_pass(x0.detach(), self.cache)
        self.cache.finish()
        return x0

    def _generate(self, noise: Tensor, renoise: Tensor, timesteps: Sequence[float]) -> Tensor:
        x = noise
        with torch.no_grad():
            for step, timestep in enumerate(timesteps[:-1]):
                x0 = self._predict_x0(x, timestep, self.detached_prompt, self.cache)
                x = add_noise(x0, renoise[step], _all_frames(x0, timesteps[step + 1]))
        with torch.set_grad_enabled(self.supervised):
            context = self.cache.snapshot() if self.supervised else self.cache
            return self._predict_x0(x, timesteps[-1], self.prompt, context)

    @torch.no_grad()
    def recache(self, last_latents: Tensor, samples: Tensor) -> None:
        """Write the past of some samples, bool [B], anew under this window's prompt.

        All run along, so that processes which share a network stay in step.
        """
        again = self.cache.clone()
        recache(again, last_latents, lambda clean: self._clean_pass(clean, again))
        self.cache.copy_samples(again, samples)

    def _clean_pass(self, clean: Tensor, cache: KVCache) -> None:
        self.model.write_cache(
            clean.to(self.dtype), *self._inputs(clean, 0.0, self.detached_prompt, cache)
        )

    def _predict_x0(
        self, x: Tensor, timestep: float, prompt: PromptContext, cache: KeyValues
    ) -> Tensor:
        flow = self.model(x.to(self.dtype), *self._inputs(x, timestep, prompt, cache))
        return flow_to_x0(flow, x, _all_frames(x, timestep))

    def _inputs(
        self, x: Tensor, timestep: float, prompt: PromptContext, cache: T
    ) -> tuple[Tensor, PromptContext, T, Attention]:
        return _all_frames(x, timestep), prompt, cache, self.attention


def _all_frames(x: Tensor, timestep: float) -> Tensor:
    return x.new_full((x.shape[0], x.shape[2]), timestep)
