"""What a stream takes of a device's memory, part by part, before any weight is loaded.

A chunk is generated and decoded by weightless copies of the networks while the tensors that live
are counted (`live_bytes`). Nothing is estimated by formula: what the code does is what is counted.
Every layer adds the same, so a network of two and one of three tell of any depth; so do a control
network's blocks.

The stream that is counted has a full window, from which nothing has left: its first chunk runs all
of the past again, as a recache then does, and its second leaves the first one's clean pass behind.

Not counted: encoding start images, and what a text encoder takes beside its weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..config import CacheConfig, ControlConfig, ModelConfig, SamplerConfig, VaceConfig
from ..decoders.codec import put_channels_last
from ..decoders.decoder import _CHANNELS_LAST_DEVICES, DecoderState, TAEHVDecoder, WanDecoder
from ..decoders.taehv import TAEHV, TAEHVConfig
from ..decoders.vae import VAEConfig, WanVAE
from ..model import PromptContext, WanModel
from ..past import framed
from ..ranges import LARGEST_SIDE, check_numbers
from ..rope import rope_table
from ..stream import Stream, latent_size
from ..vace import Control, ControlledModel, Vace
from .live_bytes import fake_tensors, peak_bytes

DecoderConfig = VAEConfig | TAEHVConfig
_TIMESTEP = 0.0  # of a pass that is counted: any will do
_FEW_LAYERS = 3  # the fewest that show what another one adds: a first, a middle and a last
_FEW_BLOCKS = 2  # of a control network: a first, and another


@dataclass(frozen=True, kw_only=True)
class TextSizes:
    """Sizes of a text encoder. Defaults are UMT5-XXL's encoder (google/umt5-xxl), Wan's own."""

    parameters: int = 5_680_910_336
    """All of them."""
    outside: int = 256_384 * 4096
    """Those outside of its layers: the table of tokens."""
    layers: int = 24
    """Layers of about equal size."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """All that the memory of a stream depends on."""

    model: ModelConfig
    height: int
    """Picture rows, in pixels."""
    width: int
    """Picture columns, in pixels."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    keep_rotated: bool = True
    """Whether the cache keeps rotated keys beside the others (`KVCache.allocate`)."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    """Of the weights, the cache and the decoder."""
    decoder: DecoderConfig | None = None
    """Sizes of the decoder; None where nothing is decoded."""
    device: str = "cuda"
    """The kind of device: on a CPU, code takes other paths."""
    linear_bytes: int | None = None
    """Bytes of a weight in the student's linear layers, if not those of `dtype`."""
    text: TextSizes | None = None
    """The text encoder; None where prompts are encoded elsewhere."""
    keeps_text: bool = False
    """Whether the text encoder stays while the stream runs, for prompts to come."""
    graphs: bool = False
    """Whether passes are recorded (`fast.graphs`)."""
    encodes: int = 0
    """Streams of images that the decoder encodes too, a chunk at a time (`encode_chunk`)."""
    vace: VaceConfig | None = None
    """The control network beside the student, by which every chunk is made; None for none."""
    control: ControlConfig = field(default_factory=ControlConfig)
    """How it takes part."""

    def __post_init__(self) -> None:
        sides = dict.fromkeys(("height", "width"), (1, LARGEST_SIDE))
        check_numbers(self, **sides, batch=(1, 1024), linear_bytes=(1, 4))


@dataclass(frozen=True, kw_only=True)
class Layered:
    """Weights, most of them in layers."""

    total: int = 0
    """Bytes of all."""
    layer: int = 0
    """Bytes of one layer."""
    layers: int = 0
    """How many layers there are."""

    def streamed(self, slots: int) -> int:
        """Bytes on the device where only so many layers are there at a time."""
        return self.total - max(self.layers - slots, 0) * self.layer


@dataclass(frozen=True, kw_only=True)
class DecoderFootprint:
    """Bytes of a decoder and of what it works on; nothing, without one."""

    weights: int = 0
    """Its encoder half included."""
    state: int = 0
    """What it remembers of the stream, and of the streams of images that it encodes."""
    images: int = 0
    """The last chunk's images, those that a rebuilt context's head is encoded of, and those of a
    chunk that is encoded, float32."""
    decode: int = 0
    """Most that lives at once while a chunk is decoded, beside the above."""
    encode: int = 0
    """The same while that head or a chunk is encoded."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of each part of a stream whose window is full."""

    student: Layered
    text: Layered
    """The text encoder."""
    cache: int
    """Keys and values."""
    prompt: int
    """The prompt's embedding, and its keys and values."""
    network: int
    """Most that lives at once while a chunk is generated, a prompt changed or images encoded,
    beside the above."""
    decoder: DecoderFootprint
    recorded: int = 0
    """What recorded passes hold: their own places for what they read and, on a card, for what they
    make on the way."""
    control: Layered = field(default_factory=Layered)
    """The control network's weights; nothing, without one."""
    overlapped: bool = False
    """Whether a chunk is decoded while the network makes the next one (`Handoff`)."""
    keeps_text: bool = False
    """Whether the text encoder is there while the stream runs; else it is gone before."""


def footprint(sizes: Sizes, group_frames: int | None = None) -> Footprint:
    """Count a stream of these sizes, in seconds; what was counted before is remembered.

    `group_frames` latent frames are decoded at once, by default a whole chunk. ValueError where the
    sizes do not fit each other.
    """
    on_card = torch.device(sizes.device).type == "cuda"
    cache = sizes.cache
    if cache.rebuild == "reencoded":  # which is the decoder's part
        cache = replace(cache, rebuild="first")
    network = replace(sizes, cache=cache, decoder=None, text=None, keeps_text=False, graphs=False)
    layers, blocks = sizes.model.num_layers, 0 if sizes.vace is None else len(sizes.vace.layers)
    few = _count_network(network, _FEW_LAYERS, min(blocks, _FEW_BLOCKS))
    more = _count_network(network, _FEW_LAYERS + 1, min(blocks, _FEW_BLOCKS))
    each = {name: more[name] - few[name] for name in few}
    counted = {name: few[name] + (layers - _FEW_LAYERS) * each[name] for name in few}
    block = 0
    if blocks > _FEW_BLOCKS:
        wide = _count_network(network, _FEW_LAYERS, _FEW_BLOCKS + 1)
        block = wide["control"] - few["control"]
        counted |= {n: counted[n] + (blocks - _FEW_BLOCKS) * (wide[n] - few[n]) for n in few}
    decoder = DecoderFootprint()
    if sizes.decoder is not None:
        frames = sizes.cache.chunk_frames
        size = latent_size(sizes.height, sizes.width, sizes.model.patch_size)
        shape = (sizes.batch, sizes.model.in_dim, frames, *size)
        group = group_frames or frames
        kept = sizes.cache.rebuilt_images if sizes.cache.rebuild == "reencoded" else 0
        decoder = _count_decoder(
            sizes.decoder, shape, group, sizes.dtype, sizes.device, kept, sizes.encodes
        )
    return Footprint(
        student=Layered(total=counted["weights"], layer=each["weights"], layers=layers),
        text=_count_text(sizes),
        cache=counted["cache"],
        prompt=counted["prompt"],
        network=max(counted["chunks"], counted["switch"], decoder.encode),
        decoder=decoder,
        control=Layered(total=counted["control"], layer=block, layers=blocks),
        recorded=counted["read"] + on_card * counted["pass"] if _records(sizes) else 0,
        overlapped=on_card,
        keeps_text=sizes.keeps_text,
    )


def _records(sizes: Sizes) -> bool:
    """Whether passes are recorded; those of chunks that are denoised together are not."""
    return sizes.graphs and not sizes.sampler.rolling


@lru_cache(maxsize=256)
def _count_network(sizes: Sizes, layers: int, blocks: int = 0) -> dict[str, int]:
    with _no_tables(), fake_tensors(sizes.device) as place:
        stream = _fake_stream(sizes, layers, blocks, place)
        network = stream.model
        student = network.base if isinstance(network, ControlledModel) else network
        assert isinstance(student, WanModel)
        state, (embeds, context) = stream.state, stream._context

        def two_chunks() -> None:
            _fill(stream)
            for _ in range(2):
                stream.generate(control=_fake_control(stream))

        def one_pass() -> None:
            inputs = x.to(stream.dtype), *stream._pass_inputs(x, _TIMESTEP, embeds)
            if tokens is None:
                network(*inputs)
            else:
                network(*inputs, tokens)  # type: ignore[call-arg]

        state.cache.num_frames = sizes.cache.window_frames  # so that frames leave
        state.cache.backup_sink()
        held = (
            sum(t.nbytes for t in state.cache.sink_backup.tensors.values())
            if state.cache.sink_backup
            else 0
        )
        chunks = peak_bytes(two_chunks, place)
        x, tokens = next(stream._noise(1)), stream._embedded(_fake_control(stream))
        table = () if state.cache.turning is None else state.cache.turning.table
        own_tables = 2 * sum(part.nbytes for part in table if part is not None)  # copied from one
        context_bytes = sum(t.nbytes for layer in context for t in layer)
        whole = stream._pass_inputs(x, _TIMESTEP, embeds)[0].whole_NBF1C
        assert whole is not None
        return {
            "chunks": chunks,
            "pass": peak_bytes(one_pass, place),
            "read": context_bytes
            + whole.nbytes
            + x.nbytes
            + sum(part.nbytes for part in tokens or () if part is not None),
            "switch": peak_bytes(lambda: stream._prompt_context(embeds), place),
            "weights": _weight_bytes(student, sizes.linear_bytes),
            "control": _weight_bytes(network.vace, sizes.linear_bytes)
            if isinstance(network, ControlledModel)
            else 0,
            # A card's sink is held by the host.
            "cache": state.cache.nbytes
            + own_tables
            + (0 if torch.device(sizes.device).type == "cuda" else held),
            "prompt": state.prompt_embeds.nbytes + context_bytes,
        }


@contextmanager
def _no_tables() -> Iterator[None]:
    """Every count makes its own rotary tables, and leaves no fake ones to others."""
    rope_table.cache_clear()
    try:
        yield
    finally:
        rope_table.cache_clear()


def _fake_stream(sizes: Sizes, layers: int, blocks: int, place: str) -> Stream:
    config = replace(sizes.model, num_layers=layers)
    student = _LongestPrompt(config, device=place, dtype=sizes.dtype)
    model: WanModel | ControlledModel = student
    if sizes.vace is not None:
        few = replace(sizes.vace, layers=tuple(range(blocks)))
        vace = Vace(config, few, device=place, dtype=sizes.dtype)
        model = ControlledModel(student, vace, sizes.control)
    model.requires_grad_(False)
    shape = (sizes.batch, config.text_len, config.text_dim)
    return Stream(
        model,
        torch.empty(shape, device=place, dtype=sizes.dtype),
        height=sizes.height,
        width=sizes.width,
        batch=sizes.batch,
        cache=sizes.cache,
        sampler=sizes.sampler,
        keep_rotated=sizes.keep_rotated,
    )


def _fill(stream: Stream) -> None:
    """Give a stream the past of a full window, to be run again."""
    state, config = stream.state, stream.cache_config
    first, last = (
        torch.empty(stream._frame_shape(frames), device=stream.device) if frames else None
        for frames in (config.kept_first, config.kept_last)
    )
    state.first_latents, state.last_latents, state.recache_due = first, last, True
    if channels := stream._kept_channels:
        state.first_control, state.last_control = (
            None if each is None else framed(None, each, channels) for each in (first, last)
        )


def _fake_control(stream: Stream) -> Control | None:
    """A control for the next chunk, where there can be one."""
    if stream._controlled is None or stream.sampler.rolling:
        return None
    frames, channels = stream.cache_config.chunk_frames, stream._controlled.control_channels
    shape = stream.batch, channels, frames, *stream.latent_size
    return Control(context=torch.empty(shape, device=stream.device))


class _LongestPrompt(WanModel):
    """A fake tensor has no values to find padding by, and the longest prompt has none."""

    def counted_prompt(
        self, prompt_embeds_BSD: Tensor, further: Iterable[nn.Module] = ()
    ) -> PromptContext:
        return self.prompt_context(prompt_embeds_BSD, further)


@lru_cache(maxsize=256)
def _count_decoder(
    config: DecoderConfig,
    shape: tuple[int, ...],
    group_frames: int,
    dtype: torch.dtype,
    device: str,
    kept_images: int,
    encodes: int,
) -> DecoderFootprint:
    """A chunk of latents [B, C, F, h, w] of a running stream."""
    with fake_tensors(device) as place:
        codec = _codec(config, place, dtype).requires_grad_(False)
        latents = torch.empty(shape, device=place)
        if device in _CHANNELS_LAST_DEVICES:  # as `load_decoder` does
            put_channels_last(codec)
        decoder: WanDecoder | TAEHVDecoder
        if isinstance(codec, WanVAE):
            decoder = WanDecoder(codec, group_frames)
        else:
            decoder = TAEHVDecoder(codec, group_frames)
        made: list[tuple[Tensor, DecoderState]] = []

        def two_chunks() -> None:  # the first is shorter
            made.append(decoder.decode(latents, decoder.decode(latents, None)[1]))

        most = peak_bytes(two_chunks, latents.device)
        ((images, state),) = made
        head = images[:, :1]
        head_most = peak_bytes(lambda: decoder.encode(head), place) if kept_images else 0
        source, past, source_most = _count_encoder(decoder, images) if encodes else (0, 0, 0)
        return DecoderFootprint(
            weights=sum(parameter.nbytes for parameter in codec.parameters()),
            state=state.nbytes + encodes * past,
            images=images.nbytes + kept_images * head.numel() * head.itemsize + encodes * source,
            decode=most - state.nbytes,
            encode=max(head_most, source_most),
        )


def _count_encoder(decoder: WanDecoder | TAEHVDecoder, images: Tensor) -> tuple[int, int, int]:
    """Bytes of a chunk's images, of the past behind it, and the most that encoding it takes.

    `images` are a later chunk's: as many are encoded at a time.
    """
    first = images[:, : decoder.source_images_of(1, first=True)]
    made: list[DecoderState] = []

    def two_parts() -> None:
        made.append(decoder.encode_chunk(images, decoder.encode_chunk(first, None)[1])[1])

    most = peak_bytes(two_parts, images.device)
    return images.nbytes, made[0].nbytes, most - made[0].nbytes


def _codec(config: DecoderConfig, place: str, dtype: torch.dtype) -> WanVAE | TAEHV:
    if isinstance(config, VAEConfig):
        return WanVAE(config, device=place, dtype=dtype)
    return TAEHV(config, device=place, dtype=dtype)


def _count_text(sizes: Sizes) -> Layered:
    if (text := sizes.text) is None:
        return Layered()
    each = (text.parameters - text.outside) // text.layers
    width = sizes.dtype.itemsize
    return Layered(total=text.parameters * width, layer=each * width, layers=text.layers)


def _weight_bytes(model: nn.Module, linear_bytes: int | None) -> int:
    size = sum(parameter.nbytes for parameter in model.parameters())
    if linear_bytes is None:
        return size
    linears = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    return size - sum(w.numel() * (w.itemsize - linear_bytes) for w in linears)
