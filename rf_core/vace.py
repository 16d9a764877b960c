"""Control by VACE: a second network that hints at structure (VACE, arXiv 2503.07598).

It reads a control (depth, pose, outlines, a video with a mask, each as latents) beside what its
base denoises. Its blocks are blocks of Wan's; each gives a hint, which is added to what one of the
base's blocks makes, times a strength. Prompt, timesteps and places are the base's: a VACE holds no
weight of it. Names of weights are those of the published files.

Published ones were trained on whole videos. In a stream it sees either the chunk at hand alone, or,
through layers of its own in the stream's cache, the window as its base does (`ControlConfig`). What
it leaves in the cache depends on the control and not on its strength.

Letters as in `layers`; Z channels of the control.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import operations
from .attention import Attention, sdpa
from .config import CacheConfig, ModelConfig
from .config import ControlConfig as ControlConfig
from .config import VaceConfig as VaceConfig
from .kv_cache import KeyValues, KVCache, LayerWindow
from .layers import Block, CountedPromptKV, Modulations, PromptKV, summed
from .model import (
    ControlTokens,
    CountedPrompt,
    Hints,
    PromptContext,
    TimeContext,
    WanModel,
    embed_patches,
    fingerprint_of,
)
from .ranges import check_numbers
from .rope import Rope


@dataclass(frozen=True, kw_only=True)
class Control:
    """What structures one chunk."""

    context: Tensor
    """Latents of what is kept, latents of what is changed and the mask, [B or 1, Z, F, h, w]; F, h
    and w are the chunk's."""
    strength: float = 1.0
    """How much of the hints is added, from 0 to 10; as published 1. 0 is none, to the bit."""

    def __post_init__(self) -> None:
        check_numbers(self, strength=(0, 10))

    def framed(self) -> Tensor:
        """The context and a plane of the strength behind it, to be cut by frames as latents are:
        [B or 1, Z + 1, F, h, w], float32."""
        plane = torch.full_like(self.context[:, :1], self.strength)
        return torch.cat([self.context, plane], dim=1).float()


class VaceBlock(Block):
    """A block of Wan's that gives a hint; the first takes the control up."""

    def __init__(
        self, config: ModelConfig, operations: Any, *, is_first: bool, **factory: Any
    ) -> None:
        super().__init__(config, operations, **factory)
        if is_first:
            self.before_proj = operations.Linear(config.dim, config.dim, **factory)
        self.after_proj = operations.Linear(config.dim, config.dim, **factory)


class Vace(nn.Module):
    """The published VACE for a base of given sizes, keyed as released; see `weights.vace`.

    `operations` as for `WanModel`. Parameters are uninitialised until a state dict is loaded or
    `initialise` is called. ValueError where the base has no such layers.
    """

    def __init__(
        self,
        base: ModelConfig,
        config: VaceConfig | None = None,
        *,
        operations: Any = operations,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        config = config or VaceConfig()
        if config.layers[-1] >= base.num_layers:
            raise ValueError(
                f"layers are {config.layers}, and the base has {base.num_layers} blocks, numbered "
                "from 0; hints go behind those alone"
            )
        self.base_config, self.config = base, config
        factory = {"dtype": dtype, "device": device}
        patch = base.patch_size
        self.vace_patch_embedding = operations.Conv3d(
            config.in_channels, base.dim, kernel_size=patch, stride=patch, **factory
        )
        self.vace_blocks = nn.ModuleList(
            VaceBlock(base, operations, is_first=index == 0, **factory)
            for index in range(len(config.layers))
        )

    @property
    def blocks(self) -> nn.ModuleList:
        """Its blocks, as a network's are called."""
        return self.vace_blocks

    @torch.no_grad()
    def initialise(self, base: WanModel, generator: torch.Generator | None = None) -> None:
        """Begin a training as published: blocks of the base, and projections that hint nothing."""
        weight = self.vace_patch_embedding.weight
        nn.init.xavier_uniform_(weight.flatten(1), generator=generator)
        self.vace_patch_embedding.bias.zero_()
        for layer, block in zip(self.config.layers, self.vace_blocks, strict=True):
            block.load_state_dict(base.blocks[layer].state_dict(), strict=False)
            for name in ("before_proj", "after_proj"):
                for parameter in getattr(block, name, nn.Module()).parameters():
                    parameter.zero_()

    def embed(self, context: Tensor) -> Tensor:
        """A control [B, Z, F, h, w] as what its first block adds the base's tokens to, [B, L, C].

        It does not change from pass to pass.
        """
        tokens = embed_patches(self.vace_patch_embedding, context, self.base_config.patch_size)
        for block in self.vace_blocks:  # by `for`, as its weights may be there in its turn alone
            tokens = block.before_proj(tokens)  # type: ignore[operator]
            break
        return tokens

    def hints(
        self,
        tokens_BLC: Tensor,
        rope: Rope,
        times: Iterable[Tensor | Modulations],
        prompt: Iterable[PromptKV | CountedPromptKV],
        windows: Iterable[LayerWindow | None],
        attention: Attention,
    ) -> Iterator[Tensor]:
        """What each of its blocks in turn hints, [B, L, C], made when it is asked for.

        `tokens` are the embedded control and the base's embedded latents, summed, and `rope` has
        their places; the others are one a block, as `Block.forward` takes them.
        """
        x = tokens_BLC
        for block, at, kv, window in zip(self.vace_blocks, times, prompt, windows, strict=True):
            x = summed(block(x, at, kv, rope, window, attention))
            yield block.after_proj(x)  # type: ignore[operator]

    def write_cache(
        self,
        tokens_BLC: Tensor,
        rope: Rope,
        times: Iterable[Tensor | Modulations],
        prompt: Iterable[PromptKV | CountedPromptKV],
        windows: Iterable[LayerWindow],
        attention: Attention,
    ) -> None:
        """As `hints`, for what it leaves in its windows alone."""
        x, last = tokens_BLC, len(self.vace_blocks) - 1
        parts = zip(self.vace_blocks, times, prompt, windows, strict=True)
        for index, (block, at, kv, window) in enumerate(parts):
            if index < last:
                x = block(x, at, kv, rope, window, attention)
            else:
                block.write_cache(x, at, rope, window)  # type: ignore[operator]


class ControlledModel(nn.Module):
    """A base and its VACE as one network for streams (`model.ControlledNetwork`).

    Both keep their weights, and may serve others beside. Without a control a pass is the base's
    own, to the bit. `control` says how the VACE takes part in a stream. ValueError for a VACE of
    other sizes.
    """

    def __init__(self, base: WanModel, vace: Vace, control: ControlConfig | None = None) -> None:
        super().__init__()
        if vace.base_config != base.config:
            raise ValueError(
                f"the VACE is made for {vace.base_config}, and its base is {base.config}; take one "
                "of the base's sizes"
            )
        self.base, self.vace = base, vace
        self.control = control or ControlConfig()

    @property
    def config(self) -> ModelConfig:
        """The base's sizes."""
        return self.base.config

    @property
    def network(self) -> WanModel:
        """The base, whose weights may be changed where they lie."""
        return self.base

    @property
    def patch_embedding(self) -> nn.Conv3d:
        """The base's."""
        return self.base.patch_embedding

    @property
    def control_channels(self) -> int:
        """Of a control's context."""
        return self.vace.config.in_channels

    def fingerprint(self) -> str:
        """The base's."""
        return self.base.fingerprint()

    def control_facts(self) -> dict[str, Any] | None:
        """Whose past lies in a cache, as JSON has it: None where the VACE sees none."""
        if not self.control.past:
            return None
        own = fingerprint_of(self.vace.get_parameter("vace_blocks.0.modulation"))
        return {"fingerprint": own, "layers": list(self.vace.config.layers)}

    def prompt_context(self, prompt_embeds_BSD: Tensor) -> PromptContext:
        """See `WanModel.prompt_context`; the VACE's layers come behind the base's."""
        return self.base.prompt_context(prompt_embeds_BSD, self.vace.vace_blocks)

    def counted_prompt(self, prompt_embeds_BSD: Tensor) -> PromptContext | CountedPrompt:
        """See `WanModel.counted_prompt`; the VACE's layers come behind the base's."""
        return self.base.counted_prompt(prompt_embeds_BSD, self.vace.vace_blocks)

    def time_context(self, timestep_BF: Tensor, dtype: torch.dtype) -> TimeContext:
        """See `WanModel.time_context`; the VACE's layers come behind the base's."""
        return self.base.time_context(timestep_BF, dtype, self.vace.vace_blocks)

    def new_cache(self, config: CacheConfig, **sizes: Any) -> KVCache:
        """See `WanModel.new_cache`; where the VACE sees the past its layers come behind."""
        further = len(self.vace.vace_blocks) if self.control.past else 0
        return self.base.new_cache(config, **sizes, further_layers=further)

    def rope(self, x: Tensor, cache: KeyValues | None) -> Rope:
        """See `WanModel.rope`."""
        return self.base.rope(x, cache)

    def embed_control(
        self, context: Tensor, strength_F: Tensor | None, dtype: torch.dtype
    ) -> ControlTokens:
        """A control [B, Z, F, h, w] as passes in `dtype` take it, for all passes of a chunk.

        `strength` [F] is how much of the hints each frame gets; None is for a chunk that none is
        added to, and which later ones may see.
        """
        tokens = self.vace.embed(context.to(dtype))
        return ControlTokens(tokens, None if strength_F is None else strength_F.to(tokens))

    def forward(
        self,
        x: Tensor,
        time: Tensor | TimeContext,
        prompt: PromptContext | CountedPrompt,
        cache: KeyValues | None = None,
        attention: Attention = sdpa,
        control: ControlTokens | None = None,
    ) -> Tensor:
        """See `WanModel.forward`; `control` is what `embed_control` makes of a context.

        Without a cache this is the published, bidirectional network.
        """
        at, own, seen = self._parts(time, x.dtype, prompt, cache, attention)
        if control is None or control.strength_F is None:
            return self.base(x, at, own, cache, attention)
        return self.base(x, at, own, cache, attention, self._hints(control, seen))

    def write_cache(
        self,
        x: Tensor,
        time: Tensor | TimeContext,
        prompt: PromptContext | CountedPrompt,
        cache: KeyValues,
        attention: Attention = sdpa,
        control: ControlTokens | None = None,
    ) -> None:
        """See `WanModel.write_cache`.

        Where the VACE sees the past, of a chunk without a control it keeps what it makes of
        `no_control`.
        """
        at, own, seen = self._parts(time, x.dtype, prompt, cache, attention)
        past, hints = self.control.past, None
        if control is None and past:
            control = self.embed_control(no_control(x, self.control_channels), None, x.dtype)
        if control is not None and control.strength_F is not None and self.control.clean:
            hints = self._hints(control, seen)
        elif control is not None and past:
            hints = self._only_kept(control, seen)
        self.base.write_cache(x, at, own, cache, attention, hints)

    def _parts(
        self,
        time: Tensor | TimeContext,
        dtype: torch.dtype,
        prompt: PromptContext | CountedPrompt,
        cache: KeyValues | None,
        attention: Attention,
    ) -> tuple[TimeContext, PromptContext | CountedPrompt, _Seen]:
        """Timesteps and prompt of the base; and what the VACE sees besides tokens."""
        first, count = self.config.num_layers, len(self.vace.vace_blocks)
        if isinstance(time, TimeContext):
            at, times = time._replace(blocks=time.blocks[:first]), time.blocks[first:]
        else:
            at = self.base.projected_time(time, dtype)
            times = at.blocks[:1] * count
        windows: Iterable[LayerWindow | None] = repeat(None, count)
        if cache is not None and self.control.past:
            windows = map(cache.layer, range(first, first + count))
        return at, prompt[:first], _Seen(times, prompt[first:], windows, attention)

    def _hints(self, control: ControlTokens, seen: _Seen) -> Hints:
        layers, strength_F = self.vace.config.layers, control.strength_F
        assert strength_F is not None

        def hints(tokens_BLC: Tensor, rope: Rope) -> Iterator[Tensor | None]:
            made = self.vace.hints(control.tokens_BLC + tokens_BLC, rope, *seen)
            for index in range(self.config.num_layers):
                yield scaled(next(made), strength_F) if index in layers else None

        return hints

    def _only_kept(self, control: ControlTokens, seen: _Seen) -> Hints:
        """None at all, once the VACE has left its keys and values."""

        def hints(tokens_BLC: Tensor, rope: Rope) -> Iterator[Tensor | None]:
            self.vace.write_cache(control.tokens_BLC + tokens_BLC, rope, *seen)
            yield from repeat(None, self.config.num_layers)

        return hints


class _Seen(NamedTuple):
    """What a VACE sees besides tokens and their places, one a block but for the attention."""

    times: Iterable[Tensor | Modulations]
    prompt: Iterable[PromptKV | CountedPromptKV]
    windows: Iterable[Any]
    attention: Attention


def scaled(hint_BLC: Tensor, strength_F: Tensor) -> Tensor:
    """A hint times each frame's strength."""
    return (hint_BLC.unflatten(1, (len(strength_F), -1)) * strength_F[:, None, None]).flatten(1, 2)


def no_control(latents: Tensor, channels: int) -> Tensor:
    """The control [B, Z, F, h, w] of a chunk [B, C, F, h, w] without one.

    Nothing is kept and all is to be made: latents of 0 and a mask of ones, as ComfyUI's own VACE
    has it where none is given.
    """
    batch, latent_channels, *rest = latents.shape
    context = latents.new_zeros(batch, channels, *rest)
    context[:, 2 * latent_channels :] = 1
    return context
