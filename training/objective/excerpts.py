"""Excerpts: single chunks of a stream, each with the past that a stream would keep for it.

A network learns to continue from three kinds of chunk:

    opening   sees nothing
    second    sees the opening
    later     sees the opening, kept as the sink, and the chunk before it

which is all that a window of three chunks ever holds. The three lie one after another, as a clip of
three chunks does. In some excerpts the prompt changes before the later chunk: it then shows another
clip, while its past shows the old one, run under the old prompt (as a `soft` switch leaves it) or
under the new one (as `recache` does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rf_core.attention import Attention, sdpa
from rf_core.config import Grid
from rf_core.layers import PromptKV
from rf_core.model import PromptContext, WanModel
from rf_core.ranges import MANY, check_numbers

from .causal import ChunkKV, LayersKV, empty_past
from .tensors import Tensors

KINDS = ("opening", "second", "later")


@dataclass(frozen=True, kw_only=True)
class ExcerptConfig:
    """How excerpts are drawn and how their past is shown."""

    switch_share: float = 0.25
    """Share in which the prompt changes before the later chunk."""
    context_noise: float = 0.1
    """Standard deviation of noise on past chunks: a stream's own past is never as clean as data."""
    stale_sink_share: float = 0.2
    """Share of sinks mixed with another clip's: over a long stream the sink becomes an average of
    much that is no longer true."""

    def __post_init__(self) -> None:
        check_numbers(self, switch_share=(0, 1), stale_sink_share=(0, 1), context_noise=(0, MANY))


@dataclass(frozen=True, kw_only=True)
class Excerpts(Tensors):
    """The past of the three chunks of N excerpts; every chunk is [N, C, F, h, w]."""

    opening: Tensor
    """The first chunk of the clip."""
    before: Tensor
    """The chunk before the later one."""
    other_opening: Tensor
    """The first chunk of another clip: what a stale sink is mixed with."""
    recached: Tensor
    """Whether `before` is run under the later chunk's prompt, bool [N]."""
    later_embeds: Tensor
    """The prompt of the later chunk, [N, S, D]."""
    other_embeds: Tensor
    """The prompt of the other clip, [N, S, D]."""
    sink_mix: Tensor | None = None
    """The other clip's share of the sink, [N] in [0, 1]; None where no sink is stale."""

    def select(self, rows: slice) -> Excerpts:
        """Some of the N excerpts."""
        return Excerpts(**{name: each[rows] for name, each in self.tensors().items()})

    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors that are not None, by field name."""
        every = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: tensor for name, tensor in every.items() if tensor is not None}


LATENT_FIELDS = ("opening", "before", "other_opening")
SAVED_FIELDS = (*LATENT_FIELDS, "recached", "later_embeds", "other_embeds")


def augment_past(
    excerpts: Excerpts, config: ExcerptConfig, generators: Sequence[torch.Generator]
) -> Excerpts:
    """Add noise to past chunks and make some sinks stale; one generator an excerpt."""
    chunks = torch.stack([getattr(excerpts, name).float() for name in LATENT_FIELDS])
    noise = [torch.randn(chunks[:, 0].shape, generator=each) for each in generators]
    stale, share = torch.stack([torch.rand(2, generator=each) for each in generators], dim=1)
    chunks = chunks + config.context_noise * torch.stack(noise, dim=1)
    return replace(
        excerpts,
        **dict(zip(LATENT_FIELDS, chunks, strict=True)),
        sink_mix=share * (stale < config.stale_sink_share) if config.stale_sink_share else None,
    )


@dataclass(frozen=True, kw_only=True)
class ExcerptPrompts:
    """Cross-attention keys and values of a batch's prompts, by the chunk that reads them."""

    first: PromptContext
    """The prompt of the opening and of the second chunk."""
    later: PromptContext
    """The prompt of the later chunk."""
    before: PromptContext
    """The prompt of the chunk before the later one."""
    other_opening: PromptContext | None
    """The prompt of the other clip; None where no sink is stale."""

    @classmethod
    def from_embeds(
        cls, model: WanModel, embeds: Tensor, excerpts: Excerpts, dtype: torch.dtype
    ) -> ExcerptPrompts:
        """From the clips' prompts, [N, S, D]; `dtype` is what the network computes in."""
        first = model.prompt_context(embeds.to(dtype))
        later = model.prompt_context(excerpts.later_embeds.to(dtype))
        other = None
        if excerpts.sink_mix is not None:
            other = model.prompt_context(excerpts.other_embeds.to(dtype))
        return cls(
            first=first,
            later=later,
            before=select_prompt(excerpts.recached, later, first),
            other_opening=other,
        )

    @property
    def by_chunk(self) -> tuple[PromptContext, PromptContext, PromptContext]:
        """The prompts of the three chunks, in the order of `KINDS`."""
        return self.first, self.first, self.later


def select_prompt(which_B: Tensor, yes: PromptContext, no: PromptContext) -> PromptContext:
    """`yes` for the samples where `which_B` is true, `no` for the others."""
    mask = which_B[:, None, None, None]
    return tuple(
        PromptKV(torch.where(mask, a.k_BSHD, b.k_BSHD), torch.where(mask, a.v_BSHD, b.v_BSHD))
        for a, b in zip(yes, no, strict=True)
    )


@dataclass(frozen=True)
class PastKV:
    """Keys and values of the past that each kind of chunk attends to."""

    layers: tuple[LayersKV, LayersKV, LayersKV]
    """Keys and values, in the order of `KINDS`."""
    zero: Tensor
    """A scalar 0 that depends on the outputs of the clean passes; add it to the loss's graph."""


def past_kv(
    model: WanModel,
    excerpts: Excerpts,
    prompts: ExcerptPrompts,
    *,
    attention: Attention = sdpa,
    dtype: torch.dtype,
) -> PastKV:
    """Run clean passes over the past chunks of excerpts. Gradients go back through these passes."""
    grid = Grid.of_latents(*excerpts.opening.shape[-2:], model.config.patch_size)
    empty, outputs = empty_past(model.config.num_layers), []

    def after(latents: Tensor, prompt: PromptContext, past: LayersKV) -> LayersKV:
        chunk_kv, at = ChunkKV(past, grid), latents.new_zeros(latents.shape[0], latents.shape[2])
        outputs.append(model(latents.to(dtype), at, prompt, chunk_kv, attention))
        return chunk_kv.extended()

    opening = after(excerpts.opening, prompts.first, empty)
    before = after(excerpts.before, prompts.before, opening)
    if excerpts.sink_mix is not None:
        assert prompts.other_opening is not None
        other = after(excerpts.other_opening, prompts.other_opening, empty)
        before = _with_sink(before, other, excerpts.sink_mix)
    # FSDP gathers weights for a backward pass where it enters by the network's output. This one
    # enters by keys and values; outputs must be a part of the graph all the same.
    zero = 0 * torch.stack([each.float().mean() for each in outputs]).sum()
    return PastKV((empty, opening, before), zero)


def _with_sink(window: LayersKV, other: LayersKV, share_B: Tensor) -> LayersKV:
    """The window with its sink frames interpolated towards `other`, by a share for each sample."""

    def mixed(frames: Sequence[Tensor], other_frames: Sequence[Tensor]) -> tuple[Tensor, ...]:
        share = share_B[:, None, None, None].to(frames[0])
        pairs = zip(frames, other_frames, strict=False)  # the window goes on behind its sink
        return (*(torch.lerp(x, y, share) for x, y in pairs), *frames[len(other_frames) :])

    return tuple(
        (mixed(keys, other_keys), mixed(values, other_values))
        for (keys, values), (other_keys, other_values) in zip(window, other, strict=True)
    )


def excerpt_flow(
    model: WanModel,
    x: Tensor,
    timestep_BF: Tensor,
    prompts: Sequence[PromptContext],
    past: PastKV,
    *,
    attention: Attention = sdpa,
    dtype: torch.dtype,
) -> Tensor:
    """The flow of the three chunks of excerpts, `x` and result [B, C, 3 F, h, w].

    `prompts` are the three chunks', in the order of `KINDS`.
    """
    grid, size = (
        Grid.of_latents(*x.shape[-2:], model.config.patch_size),
        x.shape[2] // len(KINDS),
    )
    chunks = zip(
        x.to(dtype).split(size, 2), timestep_BF.split(size, 1), prompts, past.layers, strict=True
    )
    flows = [
        model(each, at, kv, ChunkKV(layers, grid), attention) for each, at, kv, layers in chunks
    ]
    return torch.cat(flows, dim=2).float() + past.zero
