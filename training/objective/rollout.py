"""The student's rollout under autograd, with the very cache that inference streams through.

Chunk by chunk (Self Forcing, arXiv 2506.08009): denoise without gradient down to the exit step,
take that one step with gradient, then write the cache slot by a clean pass without gradient. What
a chunk sees of its past is a copy that nothing writes to, so a recomputed forward reads the same,
and no gradient leaks from a chunk into the ones before it. Window, evictions and the EMA-Sink are
`KVCache`'s own: a rollout longer than the window trains the sink as it will be used. A change of
prompt recaches as a stream does. A first chunk may be given, as a stream begins from an image: its
clean pass is all that the student does of it.

A first chunk may be of another length, and have steps of its own (`SamplerConfig.first_steps`). The
exit step is then drawn from the longer schedule, and a chunk whose own is shorter ends with its
last: so each step of either is trained, the last of the shorter one most often.
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
from rf_core.scheduler import add_noise, flow_to_x0, noise_timestep, sampling_timesteps

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
    """Of the exit step, at which the last pass denoises; of the window's last chunk."""
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
    """Noise that is added again between passes, [steps - 1, B, C, F, h, w], of the chunk that has
    most."""
    exit_step: int
    """The last denoising step of every chunk, from 0, or of one with fewer steps its last; shared
    by all chunks, samples and ranks."""
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
    """Its last clean latents [B, C, F, h, w], as many as a recache may run again."""

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
        every = torch.cat([self.last_latents, latents.detach()], dim=2)
        self.last_latents = every[:, :, -_recached_frames(self.cache.config) :].clone()


def _recached_frames(config: CacheConfig) -> int:
    """How many a recache runs again at most: the opening's too, while a joint one may."""
    return config.window_frames - (config.opening_frames if config.recache == "chunks" else 0)


def check_rollouts(cache: CacheConfig, sampler: SamplerConfig) -> None:
    """ValueError for what streams can do and rollouts cannot."""
    if cache.rebuild != "never":
        raise ValueError(
            f"cache.rebuild is {cache.rebuild!r}, and rollouts keep their cache from chunk to "
            "chunk; set it to never"
        )
    if sampler.rolling:
        raise ValueError(
            "sampler.rolling is on, and rollouts denoise one chunk after the other; set it to false"
        )


def random_draws(
    shape: tuple[int, ...], sampler: SamplerConfig, generator: torch.Generator | None = None
) -> RolloutDraws:
    """Noise for latents of `shape` [B, C, F, h, w] and a uniform exit step.

    Seed the generator per rank, then share the exit step over ranks.
    """
    steps = sampler.most_steps
    return RolloutDraws(
        noise=torch.randn(shape, generator=generator),
        renoise=torch.randn((steps - 1, *shape), generator=generator),
        exit_step=int(torch.randint(steps, (), generator=generator)),
    )


def chunk_sizes(frames: int, config: CacheConfig, *, begins: bool = True) -> list[int]:
    """Latent frames of each chunk of a rollout of so many; empty where they are not whole chunks.

    One that `begins` has a first chunk, which may be of another length.
    """
    first = config.first_frames if begins else config.chunk_frames
    later, rest = divmod(frames - first, config.chunk_frames)
    return [] if later < 0 or rest else [first] + [config.chunk_frames] * later


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
    dtype = dtype or model.patch_embedding.weight.dtype
    state = state or RolloutState.begin(model, draws.noise, cache_config, dtype)
    begins = state.cache.num_frames == 0
    sizes = chunk_sizes(draws.noise.shape[2], cache_config, begins=begins)
    per_window = window_chunks or len(sizes)
    if not sizes or len(sizes) % per_window:
        count = f"{window_chunks} " if window_chunks else ""
        raise ValueError(
            f"noise of {draws.noise.shape[2]} latent frames is not whole windows of {count}chunks "
            f"of {cache_config.chunk_frames}"
        )
    noises = draws.noise.split(sizes, dim=2), draws.renoise.split(sizes, dim=3)
    timesteps = _timesteps(draws, sampler, len(sizes), begins)
    parts = list(zip(*noises, timesteps, strict=True))
    if draws.start is not None and draws.start.latents.shape != parts[0][0].shape:
        raise ValueError(
            f"start latents are {list(draws.start.latents.shape)}; a chunk of the rollout is "
            f"{list(parts[0][0].shape)}"
        )
    assert draws.start is None or begins, "a start begins a rollout"
    for window, first in enumerate(range(0, len(parts), per_window)):
        switches = switch is not None and window == switch.window
        if switches:
            prompt_embeds = switch.embeds
        student = _Student(
            model, prompt_embeds.to(dtype), state.cache, sampler, attention, dtype, supervised
        )
        if switches:
            student.recache(state.last_latents, switch.samples)
        past = state.last_latents[:, :, -cache_config.chunk_frames :]
        start = None if window else draws.start
        chunks = [
            student.next_chunk(*part, None if number else start)
            for number, part in enumerate(parts[first : first + per_window])
        ]
        latents = torch.cat(chunks, dim=2)
        state.append(latents)
        yield Rollout(
            latents=latents,
            past=past,
            timestep=timesteps[first + per_window - 1][-1],
            num_evictions=state.cache.num_evictions,
            given_BF=None if start is None else start.given_frames(latents.shape[2]),
        )


def _timesteps(
    draws: RolloutDraws, sampler: SamplerConfig, chunks: int, begins: bool
) -> list[list[float]]:
    """Those of each chunk, down to the exit step; the first that is generated has its own."""
    first = 0 if draws.start is None or draws.start.given_B is not None else 1
    return [
        sampling_timesteps(sampler, is_first=begins and n <= first).tolist()[: draws.exit_step + 1]
        for n in range(chunks)
    ]


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
        sampler: SamplerConfig,
        attention: Attention,
        dtype: torch.dtype,
        supervised: bool,
    ) -> None:
        self.model, self.cache, self.attention, self.dtype = model, cache, attention, dtype
        self.sampler, self.supervised = sampler, supervised
        with torch.set_grad_enabled(supervised):
            self.prompt = model.prompt_context(prompt_embeds)
        self.detached_prompt = detached(self.prompt)

    def next_chunk(
        self, noise: Tensor, renoise: Tensor, timesteps: Sequence[float], start: Start | None
    ) -> Tensor:
        """The next chunk, with gradient through the last of `timesteps`' passes, or a given one."""
        self.cache.advance(noise.shape[2])
        if start is not None and start.given_B is None:
            x0 = start.latents.to(noise)
        else:
            x0 = self._generate(noise, renoise, timesteps)
            x0 = x0 if start is None else start.over(x0)
        with torch.no_grad():
            given_BF = None if start is None else start.given_frames(x0.shape[2])
            self._clean_pass(x0.detach(), self.cache, given_BF)
        self.cache.finish()
        return x0

    def _generate(self, noise: Tensor, renoise: Tensor, timesteps: Sequence[float]) -> Tensor:
        x = noise
        with torch.no_grad():
            for step, timestep in enumerate(timesteps[:-1]):
                x0 = self._predict_x0(x, timestep, self.detached_prompt, self.cache)
                x = add_noise(x0, renoise[step], self._level(x0, timesteps[step + 1]))
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

    def _clean_pass(self, clean: Tensor, cache: KVCache, given_BF: Tensor | None = None) -> None:
        at_BF = _all_frames(clean, self.sampler.clean_timestep)
        if given_BF is not None:  # a stream's start latents are run at 0
            at_BF = at_BF.masked_fill(given_BF.to(at_BF.device), 0.0)
        prompt = self.detached_prompt
        self.model.write_cache(clean.to(self.dtype), at_BF, prompt, cache, self.attention)

    def _predict_x0(
        self, x: Tensor, timestep: float, prompt: PromptContext, cache: KeyValues
    ) -> Tensor:
        flow = self.model(x.to(self.dtype), *self._inputs(x, timestep, prompt, cache))
        return flow_to_x0(flow, x, self._level(x, timestep))

    def _level(self, x: Tensor, timestep: float) -> Tensor:
        return _all_frames(x, noise_timestep(timestep, self.sampler.shift))

    def _inputs(
        self, x: Tensor, timestep: float, prompt: PromptContext, cache: T
    ) -> tuple[Tensor, PromptContext, T, Attention]:
        return _all_frames(x, timestep), prompt, cache, self.attention


def _all_frames(x: Tensor, timestep: float) -> Tensor:
    return x.new_full((x.shape[0], x.shape[2]), timestep)
