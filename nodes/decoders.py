"""ComfyUI's own VAE objects as streaming decoders.

The stock modules decode whole clips and remember nothing between calls; fed chunk by chunk with
their past kept here, they give the very same images. The weights stay where ComfyUI put them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..rf_core.config import SPATIAL_FACTOR, TEMPORAL_FACTOR
from ..rf_core.decoders.codec import VAEState, memory_frames, source_memory_images
from ..rf_core.decoders.decoder import check_source
from ..rf_core.decoders.vae import wan_memory_frames, wan_source_memory_images
from . import host


def _on_its_card(decode: Any) -> Any:
    @functools.wraps(decode)
    def decode_there(self: _Stock, *given: Any) -> Any:
        with host.on_card(self.device):
            return decode(self, *given)

    return decode_there


REPEATED = "Rep"
"""What the stock codec notes of an upsampling in time that has seen a stream's first frame only."""


ENCODER = "encoder."
"""How the names of an encoder's past begin."""


class _Stock:
    """What both share: sizes, dtype and the way between a stream's latents and the VAE's."""

    spatial_factor = SPATIAL_FACTOR
    temporal_factor = TEMPORAL_FACTOR
    kind: str
    numbers_per_pixel: int
    """What lives at once while 3 latent frames of a stream are decoded, in numbers a picture pixel;
    counted (`rf_core.memory.live_bytes`). ComfyUI's own estimate is of whole clips, without a past.
    """
    encoded_numbers_per_pixel: int
    """As many while a stream of images is encoded."""

    def __init__(self, vae: Any, latent_format: Any) -> None:
        self.vae, self.latent_format = vae, latent_format
        self.codec = vae.first_stage_model

    @property
    def device(self) -> torch.device:
        """Where ComfyUI decodes."""
        device: torch.device = self.vae.device
        return device

    def images_of(self, latent_frames: int, first: bool) -> int:
        """See `Decoder.images_of`."""
        return TEMPORAL_FACTOR * latent_frames - (TEMPORAL_FACTOR - 1 if first else 0)

    def decode_bytes(self, height: int, width: int, latent_frames: int) -> float:
        """The most that lives at once while a chunk of such a picture is decoded, with its past."""
        numbers = self.numbers_per_pixel * height * width * latent_frames / 3
        return numbers * self.vae.vae_dtype.itemsize

    def encode_bytes(self, height: int, width: int) -> float:
        """The most that lives at once while such a picture's images are encoded, with their past.

        They are encoded a latent frame at a time, however long a chunk is.
        """
        numbers = self.encoded_numbers_per_pixel * height * width
        return float(numbers * self.vae.vae_dtype.itemsize)

    def source_images_of(self, latent_frames: int, first: bool) -> int:
        """See `Decoder.source_images_of`."""
        return self.images_of(latent_frames, first)

    @_on_its_card
    def encode_chunk(self, images: Tensor, state: VAEState | None) -> tuple[Tensor, VAEState]:
        """See `Decoder.encode_chunk`; the weights are where ComfyUI put them, as for `decode`."""
        first = self.source_images_of(1, first=state is None)
        check_source(images, first, TEMPORAL_FACTOR, SPATIAL_FACTOR)
        past: dict[str, Tensor] = {}
        if state is not None:
            past = {key: self._cast(tensor) for key, tensor in taken_of_images(state).items()}
        done = images.shape[1] + (0 if state is None else state.num_frames)
        latents = []
        for part in (images[:, :first], *images[:, first:].split(TEMPORAL_FACTOR, dim=1)):
            if part.shape[1]:
                pixels = self._cast(self.vae.process_input(part))
                video = rearrange(pixels, "b t c h w -> b c t h w")
                latents.append(self._encode_frame(video, past))
        kept = {key: tensor.clone() for key, tensor in past.items()}  # not views of activations
        return self._known(torch.cat(latents, dim=2).float()), VAEState(kept, done)

    def _encode_frame(self, video: Tensor, past: dict[str, Tensor]) -> Tensor:
        """One latent frame, in the VAE socket's scale, after which `past` is the next one's."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """See `Decoder.encode`; one clip. ComfyUI may unload other models for it."""
        return self._known(self.vae.encode(rearrange(images[0], "t c h w -> t h w c"))).float()

    def _known(self, latents: Tensor) -> Tensor:
        """What the network knows of the VAE socket's latents."""
        return self.latent_format.process_in(latents)

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.vae.vae_dtype)

    def _images(self, pixels: Tensor) -> Tensor:
        images = self.vae.process_output(pixels.float())
        return rearrange(images, "b c t h w -> b t c h w")


def taken_of_images(state: VAEState) -> dict[str, Tensor]:
    """All tensors of a stream of images, taken; ValueError for a state of decoded latents."""
    state.require_unspent()
    if any(not key.startswith(ENCODER) for key in state.tensors):
        raise ValueError(
            "this state is of a stream that is decoded, not encoded; pass None to begin a new one"
        )
    return {key: tensor for key in [*state.tensors] if (tensor := state.take(key)) is not None}


class StockWanDecoder(_Stock):
    """The Wan 2.1 VAE: a stream's first latent frame alone, then the others together."""

    kind = "comfy-wan"
    numbers_per_pixel, encoded_numbers_per_pixel = 3510, 4780

    @property
    def memory_frames(self) -> int:
        """See `Decoder.memory_frames`."""
        return wan_memory_frames(self.codec.num_res_blocks, self.codec.temperal_upsample)

    @property
    def source_memory_images(self) -> int:
        """See `Decoder.source_memory_images`."""
        downsample = self.codec.temperal_upsample[::-1]
        return wan_source_memory_images(self.codec.num_res_blocks, downsample)

    @_on_its_card
    def decode(self, latents: Tensor, state: VAEState | None) -> tuple[Tensor, VAEState]:
        """See `Decoder.decode`."""
        z = self.codec.conv2(self._cast(self.latent_format.process_out(latents)))
        layers = host.count_cache_layers(self.codec.decoder)
        past: list[Any] = [None] * layers
        if state is None:
            parts, done = [part for part in (z[:, :, :1], z[:, :, 1:]) if part.shape[2]], 0
        else:
            parts, done = [z], state.num_frames
            state.require_unspent()
            for index in range(layers):  # taken, as the codec lets go of each where it reads it
                tensor = state.take(str(index))
                past[index] = REPEATED if tensor is None else self._cast(tensor)
                del tensor
        pixels = []
        for part in parts:
            pixels += self._decode_part(part, past)
        kept = {str(i): tensor for i, tensor in enumerate(past) if torch.is_tensor(tensor)}
        return self._images(torch.cat(pixels, dim=2)), VAEState(kept, done + latents.shape[2])

    def _decode_part(self, part: Tensor, past: list[Any]) -> list[Tensor]:
        """Images of latent frames [B, C, F, h, w], after which `past` is what the next ones need.

        The codec keeps a part's last two frames at each layer; of one alone, which it takes for a
        clip's end, the frame before goes with it.
        """
        before = last_frames(past) if part.shape[2] == 1 else {}
        pixels: list[Tensor] = self.codec.decoder(part, feat_cache=past, feat_idx=[0])
        put_before(before, past)
        return pixels

    def _encode_frame(self, video: Tensor, past: dict[str, Tensor]) -> Tensor:
        # `final`, or the codec would keep an odd latent frame until it has two.
        layers = range(host.count_cache_layers(self.codec.encoder))
        cache: list[Any] = [past.pop(f"{ENCODER}{index}", None) for index in layers]
        before = last_frames(cache)
        moments = self.codec.encoder(video, feat_cache=cache, feat_idx=[0], final=True)
        put_before(before, cache)
        tensors = ((index, each) for index, each in enumerate(cache) if torch.is_tensor(each))
        past.update({f"{ENCODER}{index}": each for index, each in tensors})
        mean: Tensor = self.codec.conv1(moments).chunk(2, dim=1)[0]
        return mean


def last_frames(past: list[Any]) -> dict[int, Tensor]:
    """The last frame of each layer's past."""
    tensors = ((index, each) for index, each in enumerate(past) if torch.is_tensor(each))
    return {index: each[:, :, -1:].clone() for index, each in tensors}


def put_before(frames: dict[int, Tensor], past: list[Any]) -> None:
    """Put each of the frames before what a layer kept, where that is one frame."""
    for index, frame in frames.items():
        if past[index].shape[2] == 1:
            past[index] = torch.cat([frame, past[index]], dim=2)


class StockTAEHVDecoder(_Stock):
    """TAEHV: each memory block reads the frame before, and a stream's first images are dropped.

    taew2_1 knows the network's normalised latents. ComfyUI takes a file of its kind for
    HunyuanVideo's and scales latents for that; here it gets what it was made for.
    """

    kind = "comfy-taehv"
    numbers_per_pixel, encoded_numbers_per_pixel = 1900, 460

    @property
    def memory_frames(self) -> int:
        """See `Decoder.memory_frames`."""
        steps = []
        for layer in self.codec.decoder:
            if isinstance(layer, host.MemBlock):
                steps.append((1, 1))
            elif isinstance(layer, host.TGrow):
                steps.append((0, layer.stride))
        return memory_frames(steps)

    @property
    def source_memory_images(self) -> int:
        """See `Decoder.source_memory_images`."""
        steps = []
        for layer in self.codec.encoder:
            if isinstance(layer, host.MemBlock):
                steps.append((1, 1))
            elif isinstance(layer, host.TPool):
                steps.append((0, layer.stride))
        return source_memory_images(steps)

    @_on_its_card
    def decode(self, latents: Tensor, state: VAEState | None) -> tuple[Tensor, VAEState]:
        """See `Decoder.decode`."""
        if not self._normalised:
            latents = self.latent_format.process_out(latents)
        if state is not None:
            state.require_unspent()

        def past(key: str) -> Tensor | None:
            return None if state is None else self._cast(state.take(key))

        images, kept = self._run(self.codec.decoder, self._cast(latents), past)
        done = 0 if state is None else state.num_frames
        trim = 0 if state else self.codec.frames_to_trim
        return self._images(images[:, :, trim:]), VAEState(kept, done + latents.shape[2])

    def source_images_of(self, latent_frames: int, first: bool) -> int:
        """See `Decoder.source_images_of`."""
        return TEMPORAL_FACTOR * latent_frames

    def _encode_frame(self, video: Tensor, past: dict[str, Tensor]) -> Tensor:
        latent, kept = self._run(
            self.codec.encoder, video, lambda key: past.pop(ENCODER + key, None)
        )
        past.update({ENCODER + key: tensor for key, tensor in kept.items()})
        scaled: Tensor = self.codec.process_out(latent)
        return scaled

    def _run(
        self, layers: Any, x: Tensor, past: Callable[[str], Tensor | None]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x [B, C, T, H, W] through the layers; each memory block's past, and what it leaves."""
        batch, kept = x.shape[0], {}
        x = rearrange(x, "b c t h w -> (b t) c h w")
        for index, block in enumerate(layers):
            if isinstance(block, host.MemBlock):
                frames = rearrange(x, "(b t) c h w -> b t c h w", b=batch)
                if (first := past(str(index))) is None:
                    first = torch.zeros_like(frames[:, :1])
                before = torch.cat([first, frames[:, :-1]], dim=1)
                kept[str(index)] = frames[:, -1:].clone()
                x = block(x, before.flatten(0, 1))
            else:
                x = block(x)
        return rearrange(x, "(b t) c h w -> b c t h w", b=batch), kept

    def _known(self, latents: Tensor) -> Tensor:
        # Where ComfyUI has scaled what were normalised latents, that is undone.
        return self.codec.process_in(latents) if self._normalised else super()._known(latents)

    @property
    def _normalised(self) -> bool:
        return self.codec.latent_format is not None


def decoder_of(vae: Any, latent_format: Any) -> StockWanDecoder | StockTAEHVDecoder:
    """The streaming decoder of a VAE socket; ValueError that names a VAE of another kind."""
    codec = vae.first_stage_model
    if isinstance(codec, host.StockWanVAE) and codec.z_dim == latent_format.latent_channels:
        return StockWanDecoder(vae, latent_format)
    if isinstance(codec, host.StockTAEHV) and codec.latent_channels == 16:
        return StockTAEHVDecoder(vae, latent_format)
    made_for = {2: "images", 3: "video"}.get(getattr(vae, "latent_dim", 0), "something else")
    raise ValueError(
        f"this VAE is of another kind, made for {made_for} and {vae.latent_channels} latent "
        "channels, and does not decode Wan 2.1 latents: load wan_2.1_vae.safetensors, or "
        "taew2_1.safetensors for TAEHV"
    )
