"""What `bench` and `profile` run: networks of named sizes, decoders, prompts.

`demo` is the bundled student with its decoder and text encoder. The other sizes have random
weights, N(0, 0.02) with the head not zero and the gains of norms about one, as they are in trained
networks (or attention would be all but uniform): only their time and memory mean anything. Where a
network is narrower than the published one its weights are wider, or its blocks would do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..attention import attention_backend
from ..config import WAN_1_3B, WAN_14B, CacheConfig, Grid, ModelConfig, SamplerConfig
from ..decoders.decoder import TAEHVDecoder, WanDecoder, load_decoder
from ..decoders.taehv import TAEHV, TAEHVConfig
from ..decoders.vae import VAEConfig, WanVAE
from ..fast.dispatch import Choice, choose_attention
from ..fast.graphs import GraphedModel
from ..fast.quantise import quantise_linears
from ..fast.stopwatch import Stopwatch
from ..model import Network, WanModel
from ..options import Files
from ..ranges import LARGEST_SIDE, check_numbers
from ..rolling import check_rolling
from ..stream import Stream, latent_size
from ..text import TextEncoder, load_text_encoder
from ..weights.checkpoint import load_student

TINY = ModelConfig(
    dim=48,
    ffn_dim=96,
    freq_dim=32,
    text_dim=24,
    text_len=16,
    num_heads=2,
    num_layers=2,
)
RANDOM_SIZES = MappingProxyType({"tiny": TINY, "1.3b": WAN_1_3B, "14b": WAN_14B})
SIZES = ("demo", *RANDOM_SIZES)
DecoderName = Literal["wan", "taehv"]
_PUBLISHED_DECODERS: Mapping[DecoderName, VAEConfig | TAEHVConfig] = MappingProxyType(
    {"wan": VAEConfig(), "taehv": TAEHVConfig()}
)
_TINY_DECODERS: Mapping[DecoderName, VAEConfig | TAEHVConfig] = MappingProxyType(
    {
        "wan": VAEConfig(dim=4, num_res_blocks=1),
        "taehv": TAEHVConfig(decoder_widths=(8, 4, 4, 4), encoder_width=4),
    }
)
DECODERS: Mapping[str, tuple[DecoderName, ...]] = MappingProxyType(
    {"none": (), "wan": ("wan",), "taehv": ("taehv",), "both": ("wan", "taehv")}
)
WEIGHT_STD = 0.02
PROMPT_TOKENS = 128
"""Tokens of a random prompt. A language model writes out the prompts of the published code, which
then have some 100 to 150."""
PROMPTS = ("a red circle moves right slowly", "a blue square moves up quickly")


@dataclass(frozen=True, kw_only=True)
class WorkloadOptions:
    """What is run, and where."""

    size: str = "tiny"
    """One of SIZES."""
    height: int = 64
    """Picture rows, in pixels."""
    width: int = 64
    """Picture columns, in pixels."""
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    weights: Literal["exact", "fp8"] = "exact"
    """`fp8` holds the blocks' linear layers in 8 bits."""
    attention: str = "sdpa"
    """Name of an attention backend, or `auto` for the fastest here."""
    graphs: bool = False
    """Whether the network's passes are recorded and replayed (`rf_core.fast.graphs`)."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    decoder: str | None = None
    """One of DECODERS; by default `wan` for the demo and `none` for the others."""
    vae: Path | None = None
    """A decoder's weights in place of random ones (or of the demo's): a Wan VAE or a TAEHV."""
    text_encoder: str | None = None
    """UMT5 for the sizes that have none: a folder, a file or a hub id."""
    tokenizer: str | None = None
    """Folder or hub id of its tokenizer, where the encoder comes without one."""

    def __post_init__(self) -> None:
        check_numbers(self, height=(1, LARGEST_SIDE), width=(1, LARGEST_SIDE))
        if self.sampler.rolling:
            check_rolling(self.cache, self.sampler)
        if self.size not in SIZES:
            raise ValueError(f"size {self.size!r} is unknown; use one of {', '.join(SIZES)}")
        if self.decoder is not None and self.decoder not in DECODERS:
            raise ValueError(
                f"decoder {self.decoder!r} is unknown; use one of {', '.join(DECODERS)}"
            )
        if self.vae is not None and not self.decoders:
            raise ValueError(
                f"decoder weights are given ({self.vae}) and no decoder; ask for one of "
                f"{', '.join(name for name, kinds in DECODERS.items() if kinds)}"
            )

    @property
    def decoders(self) -> tuple[DecoderName, ...]:
        """Names of the decoders that run; a stream's own comes first."""
        return DECODERS[self.decoder or ("wan" if self.size == "demo" else "none")]

    def plain(self) -> dict[str, Any]:
        """The options as JSON can hold them."""
        return {name: _plain(value) for name, value in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Everything loaded and ready to stream."""

    options: WorkloadOptions
    model: WanModel
    passes: Network
    """What streams run: the network, or its graphs."""
    attention: Choice
    encoder: TextEncoder | None
    prompts: tuple[Tensor, Tensor]
    """Embeddings of two prompts, [1, S, D]: the first to stream under, the other to switch to."""
    decoders: dict[DecoderName, WanDecoder | TAEHVDecoder]
    load_seconds: float
    """What it took to read, or draw, all weights."""
    text_seconds: float | None
    """What the very first encoding of a prompt took; None without an encoder."""

    def stream(self, seed: int = 0) -> Stream:
        """A new stream under the first prompt, with the first decoder."""
        options = self.options
        return Stream(
            self.passes,
            self.prompts[0],
            height=options.height,
            width=options.width,
            seed=seed,
            decoder=next(iter(self.decoders.values()), None),
            cache=options.cache,
            sampler=options.sampler,
            attention=attention_backend(self.attention.name),
        )


def decoder_sizes(size: str) -> Mapping[DecoderName, VAEConfig | TAEHVConfig]:
    """Sizes of the decoders that stand beside a network of one of SIZES with random weights."""
    return _TINY_DECODERS if size == "tiny" else _PUBLISHED_DECODERS


def prompt_tokens(config: ModelConfig) -> int:
    """Tokens of a network's random prompt: where less fits in, the share that it is of Wan's."""
    return min(PROMPT_TOKENS, config.text_len // (WAN_1_3B.text_len // PROMPT_TOKENS))


@torch.no_grad()
def load_workload(options: WorkloadOptions) -> Workload:
    """Read or draw all weights. ValueError where a file does not fit."""
    watch = Stopwatch(options.device)
    model, encoder = _demo(options) if options.size == "demo" else _random(options)
    decoders = _decoders(options)
    load_seconds = watch.lap()
    first = _prompt(0, model, encoder)
    text_seconds = watch.lap()
    model = model.eval().requires_grad_(False)
    if options.weights == "fp8":
        quantise_linears(model)
    return Workload(
        options=options,
        model=model,
        passes=GraphedModel(model) if options.graphs else model,
        attention=_attention(options, model.config),
        encoder=encoder,
        prompts=(first, _prompt(1, model, encoder)),
        decoders=decoders,
        load_seconds=load_seconds,
        text_seconds=None if encoder is None else text_seconds,
    )


@torch.no_grad()
def randomise(module: nn.Module, std: float = WEIGHT_STD) -> None:
    """Draw every parameter from N(0, std), the gains of norms from N(1, std); ever the same."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            parameter.normal_(std=std, generator=generator)
            if "Norm" in type(part).__name__ and name in ("weight", "gamma"):
                parameter.add_(1)


def _demo(options: WorkloadOptions) -> tuple[WanModel, TextEncoder]:
    place = {"device": options.device, "dtype": options.dtype}
    encoder = load_text_encoder(Files().text_encoder, **place)  # type: ignore[arg-type]
    model, _ = load_student(Files().model, **place)  # type: ignore[arg-type]
    return model, encoder


def _random(options: WorkloadOptions) -> tuple[WanModel, TextEncoder | None]:
    config, device, dtype = RANDOM_SIZES[options.size], options.device, options.dtype
    model = WanModel(config, device=device, dtype=dtype)
    randomise(model, WEIGHT_STD * max(1.0, WAN_1_3B.dim / config.dim) ** 0.5)
    if options.text_encoder is None:
        return model, None
    encoder = load_text_encoder(
        options.text_encoder, device=device, dtype=dtype, tokenizer=options.tokenizer
    )
    return model, encoder


def _attention(options: WorkloadOptions, model: ModelConfig) -> Choice:
    size = latent_size(options.height, options.width, model.patch_size)
    return choose_attention(
        options.attention,
        model,
        options.cache,
        Grid.of_latents(*size, model.patch_size),
        batch=1,
        dtype=options.dtype,
        device=options.device,
    )


def _prompt(number: int, model: WanModel, encoder: TextEncoder | None) -> Tensor:
    """Of the encoder, or as one makes them: on the device, with zeros behind the tokens."""
    if encoder is not None:
        return encoder.encode([PROMPTS[number]])
    config, weight = model.config, model.patch_embedding.weight
    generator, tokens = torch.Generator().manual_seed(number), prompt_tokens(config)
    embeds = torch.zeros(1, config.text_len, config.text_dim)
    embeds[:, :tokens] = torch.randn((tokens, config.text_dim), generator=generator)
    return embeds.to(weight.device, weight.dtype)


def _decoders(options: WorkloadOptions) -> dict[DecoderName, WanDecoder | TAEHVDecoder]:
    path = Files().vae if options.vae is None and options.size == "demo" else options.vae
    given: dict[DecoderName, WanDecoder | TAEHVDecoder] = {}
    if path is not None and options.decoders:
        decoder = load_decoder(path, options.device, options.dtype)
        given["wan" if isinstance(decoder, WanDecoder) else "taehv"] = decoder
    if options.vae is not None and not given.keys() <= set(options.decoders):
        raise ValueError(
            f"{options.vae} is a decoder of the kind {', '.join(given)}; asked for is "
            f"{', '.join(options.decoders)}: ask for its kind"
        )
    return {name: given.get(name) or _random_decoder(name, options) for name in options.decoders}


def _random_decoder(name: DecoderName, options: WorkloadOptions) -> WanDecoder | TAEHVDecoder:
    place: dict[str, Any] = {"device": options.device, "dtype": options.dtype}
    sizes = decoder_sizes(options.size)[name]
    codec = WanVAE(sizes, **place) if isinstance(sizes, VAEConfig) else TAEHV(sizes, **place)
    randomise(codec)
    codec.eval().requires_grad_(False)
    kind = WanDecoder if isinstance(codec, WanVAE) else TAEHVDecoder
    return kind(codec, channels_last=True)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, CacheConfig | SamplerConfig):
        return dict(vars(value))
    return str(value) if isinstance(value, Path) else value
