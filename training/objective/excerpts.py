"""Excerpts: single chunks of a stream, each with what the stream lets it see of its past.

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

from .causal import Layers, Slot, no_past
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
    """What the three chunks of N excerpts see; chunks are [N, C, F, h, w]."""

    opening: Tensor
    """The first chunk of the clip."""
    before: Tensor
    """The chunk before the later one."""
    stranger: Tensor
    """The first chunk of another clip, for sinks that are stale."""
    recached: Tensor
    """Whether `before` is run under the later chunk's prompt, bool [N]."""
    later_embeds: Tensor
    """The prompt of the later chunk, [N, S, D]."""
    stranger_embeds: Tensor
    """The prompt of the other clip, [N, S, D]."""
    stale: Tensor | None = None
    """How much of the sink is the other clip's, [N]; None where no sink is stale."""

    def part(self, rows: slice) -> Excerpts:
        """Some of them."""
        return Excerpts(**{name: each[rows] for name, each in self.tensors().items()})

    def tensors(self) -> Mapping[str, Tensor]:
        """What there is, by name."""
        every = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: tensor for name, tensor in every.items() if tensor is not None}


LATENTS = ("opening", "before", "stranger")
STORED = (*LATENTS, "recached", "later_embeds", "stranger_embeds")


def shown(
    excerpts: Excerpts, config: ExcerptConfig, generators: Sequence[torch.Generator]
) -> Excerpts:
    """Excerpts as a network sees them: noise on past chunks, and some sinks stale."""
    chunks = torch.stack([getattr(excerpts, name).float() for name in LATENTS])
    noise = [torch.randn(chunks[:, 0].shape, generator=each) for each in generators]
    stale, share = torch.stack([torch.rand(2, generator=each) for each in generators], dim=1)
    chunks = chunks + config.context_noise * torch.stack(noise, dim=1)
    return replace(
        excerpts,
        **dict(zip(LATENTS, chunks, strict=True)),
        stale=share * (stale < config.stale_sink_share) if config.stale_sink_share else None,
    )


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of a batch of excerpts, read by one network."""

    first: PromptContext
    """Of the opening and the second chunk."""
    later: PromptContext
    """Of the later chunk."""
    before: PromptContext
    """Of the chunk before it."""
    stranger: PromptContext | None
    """Of the other clip, where sinks are stale."""

    @classmethod
    def read(
        cls, model: WanModel, embeds: Tensor, excerpts: Excerpts, dtype: torch.dtype
    ) -> Prompts:
        """`embeds` are the clips' prompts, [N, S, D]; `dtype` is what the network computes in."""
        first = model.prompt_context(embeds.to(dtype))
        later = model.prompt_context(excerpts.later_embeds.to(dtype))
        stale = excerpts.stale is not None
        return cls(
            first=first,
            later=later,
            before=choose(excerpts.recached, later, first),
            stranger=model.prompt_context(excerpts.stranger_embeds.to(dtype)) if stale else None,
        )

    @property
    def of_targets(self) -> tuple[PromptContext, PromptContext, PromptContext]:
        """In the order of `KINDS`."""
        return self.first, self.first, self.later


def choose(which_B: Tensor, yes: PromptContext, no: PromptContext) -> PromptContext:
    """Sample by sample one of two prompts."""
    mask = which_B[:, None, None, None]
    return tuple(
        PromptKV(torch.where(mask, a.k_BSHD, b.k_BSHD), torch.where(mask, a.v_BSHD, b.v_BSHD))
        for a, b in zip(yes, no, strict=True)
    )


@dataclass(frozen=True)
class Pasts:
    """What each kind of chunk sees of earlier ones."""

    layers: tuple[Layers, Layers, Layers]
    """Keys and values, in the order of `KINDS`."""
    unread: Tensor
    """Zero, made of the passes' outputs."""


def pasts(
    model: WanModel,
    excerpts: Excerpts,
    prompts: Prompts,
    *,
    attention: Attention = sdpa,
    dtype: torch.dtype,
) -> Pasts:
    """The pasts of excerpts, by clean passes over the chunks before; gradients pass into those."""
    grid = Grid.of_latents(*excerpts.opening.shape[-2:], model.config.patch_size)
    nothing, outputs = no_past(model.config.num_layers), []

    def after(latents: Tensor, prompt: PromptContext, past: Layers) -> Layers:
        slot, at = Slot(past, grid), latents.new_zeros(latents.shape[0], latents.shape[2])
        outputs.append(model(latents.to(dtype), at, prompt, slot, attention))
        return slot.followed()

    opening = after(excerpts.opening, prompts.first, nothing)
    before = after(excerpts.before, prompts.before, opening)
    if excerpts.stale is not None:
        assert prompts.stranger is not None
        other = after(excerpts.stranger, prompts.stranger, nothing)
        before = _with_sink(before, other, excerpts.stale)
    # FSDP gathers weights for a backward pass where it enters by the network's output. This one
    # enters by keys and values; outputs must be a part of the graph all the same.
    unread = 0 * torch.stack([each.float().mean() for each in outputs]).sum()
    return Pasts((nothing, opening, before), unread)


def _with_sink(window: Layers, other: Layers, share_B: Tensor) -> Layers:
    """A window whose first frames are mixed with those of another."""

    def mixed(frames: Sequence[Tensor], strange: Sequence[Tensor]) -> tuple[Tensor, ...]:
        share = share_B[:, None, None, None].to(frames[0])
        pairs = zip(frames, strange, strict=False)  # the window goes on behind its sink
        return (*(torch.lerp(x, y, share) for x, y in pairs), *frames[len(strange) :])

    return tuple(
        (mixed(keys, other_keys), mixed(values, other_values))
        for (keys, values), (other_keys, other_values) in zip(window, other, strict=True)
    )


def excerpt_flow(
    model: WanModel,
    x: Tensor,
    timestep_BF: Tensor,
    prompts: Sequence[PromptContext],
    past: Pasts,
    *,
    attention: Attention = sdpa,
    dtype: torch.dtype,
) -> Tensor:
    """The flow of the three chunks of excerpts, `x` and result [B, C, 3 F, h, w].

    `prompts` are the three chunks', in the order of `KINDS`.
    """
    grid, size = Grid.of_latents(*x.shape[-2:], model.config.patch_size), x.shape[2] // len(KINDS)
    chunks = zip(
        x.to(dtype).split(size, 2), timestep_BF.split(size, 1), prompts, past.layers, strict=True
    )
    flows = [model(each, at, kv, Slot(layers, grid), attention) for each, at, kv, layers in chunks]
    return torch.cat(flows, dim=2).float() + past.unread
