"""The Wan network, once: a causal student with a cache, a bidirectional teacher without.

The module holds weights only. The prompt's keys and values (`PromptContext`), the cache and the
attention backend come in with each call, so one set of weights serves any number of streams, can
be cloned and offloaded by its host, and gives the same result when a forward is recomputed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import operations
from .attention import Attention, sdpa
from .config import CacheConfig, ControlConfig, Grid, ModelConfig
from .kv_cache import KeyValues, KVCache
from .kv_int8 import Int8KVCache
from .layers import Block, CountedPromptKV, Head, HeadModulations, Modulations, PromptKV, hinted
from .padding import counted_rows
from .rope import Rope, rope_table

MAX_PERIOD = 10000.0  # of the sinusoidal timestep embedding

PromptContext = tuple[PromptKV, ...]
"""A prompt's cross-attention keys and values, one pair a layer."""
CountedPrompt = tuple[CountedPromptKV, ...]
"""The same with its padding counted."""
Hints = Callable[[Tensor, Rope], Iterator[Tensor | None]]
"""What another network adds behind the blocks: of a chunk's embedded latents [B, L, C] and their
places, for every block in turn what is added to its result [B, L, C], or None."""


class TimeContext(NamedTuple):
    """Timesteps of a chunk's frames as the network takes them."""

    timestep_BF: Tensor
    """The timesteps, in [0, 1000]."""
    blocks: tuple[Tensor | Modulations, ...]
    """Of each layer: what they do to it, or their projection [B, F, 6, C]."""
    head: HeadModulations
    whole_NBF1C: Tensor | None = None
    """What all of these are views of, so that one copy replaces them; None for projections."""

    @classmethod
    def of(cls, timestep_BF: Tensor, whole_NBF1C: Tensor) -> TimeContext:
        """Every layer's modulations, one after another, and the head's last."""
        parts, size = whole_NBF1C.unbind(), len(Modulations._fields)
        last = len(parts) - len(HeadModulations._fields)
        blocks = tuple(Modulations(*parts[at : at + size]) for at in range(0, last, size))
        return cls(timestep_BF, blocks, HeadModulations(*parts[last:]), whole_NBF1C)


class ControlTokens(NamedTuple):
    """A chunk's control as the network takes it: what does not change from pass to pass."""

    tokens_BLC: Tensor
    """Its embedded context, which the chunk's own tokens are added to."""
    strength_F: Tensor | None
    """How much of the hints each frame gets, in the dtype of the tokens; None for nothing at all:
    only later chunks may then see it."""


class Network(Protocol):
    """What a stream asks of a network: a `WanModel`, or what stands for one."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def control(self) -> ControlConfig | None:
        """How it takes control: then it is a `ControlledNetwork`. None where it takes none."""

    @property
    def patch_embedding(self) -> nn.Conv3d: ...
    def fingerprint(self) -> str: ...
    def counted_prompt(self, prompt_embeds_BSD: Tensor, /) -> PromptContext | CountedPrompt: ...
    def time_context(self, timestep_BF: Tensor, dtype: torch.dtype, /) -> TimeContext: ...
    def new_cache(
        self,
        config: CacheConfig,
        /,
        *,
        batch: int,
        grid: Grid,
        dtype: torch.dtype,
        device: torch.device | str,
        keep_rotated: bool,
    ) -> KVCache: ...
    def write_cache(
        self,
        x: Tensor,
        time: TimeContext,
        prompt: PromptContext | CountedPrompt,
        cache: KeyValues,
        attention: Attention,
        /,
    ) -> None: ...
    def __call__(
        self,
        x: Tensor,
        time: TimeContext,
        prompt: PromptContext | CountedPrompt,
        cache: KeyValues,
        attention: Attention,
        /,
    ) -> Tensor: ...


class ControlledNetwork(Network, Protocol):
    """A network whose chunks may have a control beside the prompt (`vace.ControlledModel`)."""

    @property
    def control_channels(self) -> int: ...
    def control_facts(self) -> dict[str, Any] | None: ...
    def embed_control(
        self, context: Tensor, strength_F: Tensor | None, dtype: torch.dtype, /
    ) -> ControlTokens: ...
    def write_cache(
        self,
        x: Tensor,
        time: TimeContext,
        prompt: PromptContext | CountedPrompt,
        cache: KeyValues,
        attention: Attention,
        control: ControlTokens | None = None,
        /,
    ) -> None: ...
    def __call__(
        self,
        x: Tensor,
        time: TimeContext,
        prompt: PromptContext | CountedPrompt,
        cache: KeyValues,
        attention: Attention,
        control: ControlTokens | None = None,
        /,
    ) -> Tensor: ...


class WanModel(nn.Module):
    """Wan 2.1 text-to-video (arXiv 2503.20314), keyed as released.

    `operations` supplies Linear, LayerNorm, RMSNorm and Conv3d. Parameters are uninitialised until
    a state dict is loaded or `initialise` is called. Blocks of another network that reads the same
    prompt and timesteps may follow its own in what is made of those (`further`).
    """

    control = None
    """It takes none by itself."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        operations: Any = operations,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory = {"dtype": dtype, "device": device}
        linear, dim, patch = operations.Linear, config.dim, config.patch_size
        self.patch_embedding = operations.Conv3d(
            config.in_dim, dim, kernel_size=patch, stride=patch, **factory
        )
        self.text_embedding = nn.Sequential(
            linear(config.text_dim, dim, **factory),
            nn.GELU(approximate="tanh"),
            linear(dim, dim, **factory),
        )
        self.time_embedding = nn.Sequential(
            linear(config.freq_dim, dim, **factory), nn.SiLU(), linear(dim, dim, **factory)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), linear(dim, 6 * dim, **factory))
        blocks = (Block(config, operations, **factory) for _ in range(config.num_layers))
        self.blocks = nn.ModuleList(blocks)
        self.head = Head(config, operations, **factory)

    def fingerprint(self) -> str:
        """Tells one training's weights from another's; see `fingerprint_of`."""
        return fingerprint_of(self.get_parameter("blocks.0.modulation"))

    def prompt_context(
        self, prompt_embeds_BSD: Tensor, further: Iterable[nn.Module] = ()
    ) -> PromptContext:
        """Cross-attention keys and values of a prompt, computed once for as long as it lasts.

        Takes the text encoder's output [B, S, text_dim] with S up to `text_len`; shorter prompts
        are padded with zeros to `text_len`, which the network attends to, as it was trained.
        """
        text = self.text_embedding(pad_prompt(prompt_embeds_BSD, self.config))
        return tuple(block.prompt_kv(text) for block in chain(self.blocks, further))  # type: ignore[operator]

    def counted_prompt(
        self, prompt_embeds_BSD: Tensor, further: Iterable[nn.Module] = ()
    ) -> PromptContext | CountedPrompt:
        """As `prompt_context`, for streams: attention sees one key for all equal ones of padding.

        The flow is the same but for rounding. Rows of padding are those of zeros at the end.
        """
        embeds = pad_prompt(prompt_embeds_BSD, self.config)
        if (counted := counted_rows(embeds)) is None:
            return self.prompt_context(embeds, further)
        rows_BSD, bias_BS = counted
        text = self.text_embedding(rows_BSD)
        layers = (block.prompt_kv(text) for block in chain(self.blocks, further))  # type: ignore[operator]
        return tuple(CountedPromptKV(kv.k_BSHD, kv.v_BSHD, bias_BS) for kv in layers)

    def time_context(
        self, timestep_BF: Tensor, dtype: torch.dtype, further: Iterable[nn.Module] = ()
    ) -> TimeContext:
        """What timesteps in [0, 1000] are to every block, computed once for as long as they recur.

        `dtype` is what the network computes in.
        """
        time = self.projected_time(timestep_BF, dtype)
        blocks = [block.modulations(time.blocks[0]) for block in chain(self.blocks, further)]  # type: ignore[operator]
        return TimeContext.of(timestep_BF, torch.stack([*chain(*blocks), *time.head]))

    @property
    def cached_heads(self) -> int:
        """Heads whose keys and values a cache of this process holds."""
        return self.config.num_heads

    def new_cache(
        self,
        config: CacheConfig,
        *,
        batch: int,
        grid: Grid,
        dtype: torch.dtype,
        device: torch.device | str,
        keep_rotated: bool = True,
        further_layers: int = 0,
    ) -> KVCache:
        """An empty cache for a stream of this network; see `KVCache.allocate`."""
        kind = Int8KVCache if config.storage == "int8" else KVCache
        return kind.allocate(
            config,
            num_layers=self.config.num_layers + further_layers,
            batch=batch,
            grid=grid,
            num_heads=self.cached_heads,
            head_dim=self.config.head_dim,
            dtype=dtype,
            device=device,
            keep_rotated=keep_rotated,
        )

    def forward(
        self,
        x: Tensor,
        time: Tensor | TimeContext,
        prompt: PromptContext | CountedPrompt,
        cache: KeyValues | None = None,
        attention: Attention = sdpa,
        hints: Hints | None = None,
    ) -> Tensor:
        """Predict the flow of latents `x` [B, C, F, h, w].

        `time` is the frames' timesteps [B, F] in [0, 1000], or what `time_context` makes of them.
        With a cache the frames are the current chunk and see its window; `cache.advance()` must
        have opened their slot. Without one all frames see each other. `hints` are added behind the
        blocks.
        """
        context, rope = self.projected_time(time, x.dtype), self.rope(x, cache)
        tokens = self._tokens(x)
        added = self._added(hints, tokens, rope)
        for index, (block, at, kv, hint) in enumerate(
            zip(self.blocks, context.blocks, prompt, added, strict=True)
        ):
            window = None if cache is None else cache.layer(index)
            tokens = hinted(block(tokens, at, kv, rope, window, attention), hint)
        return self._unpatchify(self.head(tokens, context.head), self._grid(x))

    def write_cache(
        self,
        x: Tensor,
        time: Tensor | TimeContext,
        prompt: PromptContext | CountedPrompt,
        cache: KeyValues,
        attention: Attention = sdpa,
        hints: Hints | None = None,
    ) -> None:
        """As `forward`, for what it leaves in the cache alone: ends at the last keys and values.

        `hints` are gone through to their end.
        """
        context, rope = self.projected_time(time, x.dtype), self.rope(x, cache)
        tokens, last = self._tokens(x), len(self.blocks) - 1
        added = self._added(hints, tokens, rope)
        for index, (block, at, kv, hint) in enumerate(
            zip(self.blocks, context.blocks, prompt, added, strict=True)
        ):
            if index < last:
                tokens = block(tokens, at, kv, rope, cache.layer(index), attention)
                tokens = hinted(tokens, hint)
            else:
                block.write_cache(tokens, at, rope, cache.layer(index))  # type: ignore[operator]

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw weights as Wan does: Xavier for matrices, a zero head, small embeddings."""
        for name, parameter in self.named_parameters():
            if name.endswith("modulation"):
                parameter.normal_(std=self.config.dim**-0.5, generator=generator)
            elif parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif name.startswith(("text_embedding", "time_embedding")):
                parameter.normal_(std=0.02, generator=generator)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)
        self.head.head.weight.zero_()

    def _grid(self, x: Tensor) -> Grid:
        return Grid.of_latents(x.shape[-2], x.shape[-1], self.config.patch_size)

    def _added(
        self, hints: Hints | None, tokens_BLC: Tensor, rope: Rope
    ) -> Iterable[Tensor | None]:
        return repeat(None, len(self.blocks)) if hints is None else hints(tokens_BLC, rope)

    def _tokens(self, x: Tensor) -> Tensor:
        return embed_patches(self.patch_embedding, x, self.config.patch_size)

    # A compiler does not know that the table is kept, and would make it anew in every pass.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def rope(self, x: Tensor, cache: KeyValues | None) -> Rope:
        """The places of these frames' tokens in the window."""
        grid, before = self._grid(x), 0 if cache is None else cache.context_frames
        frames = before + x.shape[2]
        table = rope_table(frames, grid, self.config.head_dim, x.device)
        return table.tokens(before * grid.frame_tokens, frames * grid.frame_tokens)

    def projected_time(self, time: Tensor | TimeContext, dtype: torch.dtype) -> TimeContext:
        """What timesteps [B, F] are to every block before its own modulation is added."""
        # Under FSDP a block's parameters are there within its own forward alone, so timesteps that
        # come as a tensor are left to the blocks.
        if isinstance(time, TimeContext):
            return time
        time_BFC = self._embed_time(time, dtype)
        time_BF6C = self.time_projection(time_BFC).unflatten(2, (6, -1))
        blocks = (time_BF6C,) * len(self.blocks)
        return TimeContext(time, blocks, self.head.modulations(time_BFC))

    def _embed_time(self, timestep_BF: Tensor, dtype: torch.dtype) -> Tensor:
        half, device = self.config.freq_dim // 2, timestep_BF.device
        if device.type == "mps":  # which has no float64
            timestep_BF = timestep_BF.cpu()
        exponents = torch.arange(half, dtype=torch.float64, device=timestep_BF.device) / half
        angles = timestep_BF.double()[..., None] * MAX_PERIOD**-exponents
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.time_embedding(waves.to(dtype).to(device))

    def _unpatchify(self, patches_BLC: Tensor, grid: Grid) -> Tensor:
        frames, rows, columns = self.config.patch_size
        return rearrange(
            patches_BLC,
            "b (f h w) (p q r c) -> b c (f p) (h q) (w r)",
            h=grid.height,
            w=grid.width,
            p=frames,
            q=rows,
            r=columns,
        )


def embed_patches(
    embedding: nn.Module, x_BCFhw: Tensor, patch_size: tuple[int, int, int]
) -> Tensor:
    """Patches of latents as tokens [B, L, C], in frame, row, column order, by a convolution."""
    if type(embedding) is not nn.Conv3d:  # a host's, which may cast or patch its weights
        return rearrange(embedding(x_BCFhw), "b c f h w -> b (f h w) c").contiguous()
    # Patches do not overlap, so the convolution is a product, and as one it is fast everywhere.
    _, p, q = patch_size
    patches = rearrange(x_BCFhw, "b c f (h p) (w q) -> b (f h w) (c p q)", p=p, q=q)
    return F.linear(patches, embedding.weight.flatten(1), embedding.bias)


def pad_prompt(prompt_embeds_BSD: Tensor, config: ModelConfig) -> Tensor:
    """Zeros behind a prompt up to `text_len`; ValueError for one that the network cannot read."""
    short = config.text_len - prompt_embeds_BSD.shape[1]
    if short < 0 or prompt_embeds_BSD.shape[2] != config.text_dim:
        raise ValueError(
            f"prompt embeddings have shape {tuple(prompt_embeds_BSD.shape)}; this model reads "
            f"at most {config.text_len} tokens of width {config.text_dim}: "
            "use the text encoder it was trained with"
        )
    return F.pad(prompt_embeds_BSD, (0, 0, 0, short))


def fingerprint_of(modulation: Tensor) -> str:
    """A checkpoint's fingerprint, by the modulation of its first block.

    That is small, differs between trainings, and is left alone by quantisation; bfloat16 makes it
    the same for every wider dtype it is kept in.
    """
    data = modulation.detach().to("cpu", torch.bfloat16).float().numpy().tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()
