"""ComfyUI's own VAE objects as streaming decoders.

The stock modules decode whole clips and remember nothing between calls; fed chunk by chunk with
their past kept here, they give the very same images. The weights stay where ComfyUI put them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..rf_core.config import SPATIAL_FACTOR, TEMPORAL_FACTOR
from ..rf_core.decoders.codec import VAEState, memory_frames
from ..rf_core.decoders.vae import wan_memory_frames
from . import host


def _on_its_card(decode: Any) -> Any:
    @functools.wraps(decode)
    def decode_there(self: _Stock, *given: Any) -> Any:
        with host.on_card(self.device):
            return decode(self, *given)

    return decode_there


REPEATED = "Rep"
"""What the stock codec notes of an upsampling in time that has seen a stream's first frame only."""


class _Stock:
    """What both share: sizes, dtype and the way between a stream's latents and the VAE's."""

    spatial_factor = SPATIAL_FACTOR
    temporal_factor = TEMPORAL_FACTOR
    kind: str
    numbers_per_pixel: int
    """What lives at once while 3 latent frames of a stream are decoded, in numbers a picture pixel;
    counted (`rf_core.memory.live_bytes`). ComfyUI's own estimate is of whole clips, without a past.
    """

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


class StockWanDecoder(_Stock):
    """The Wan 2.1 VAE: a stream's first latent frame alone, then the others together."""

    kind = "comfy-wan"
    numbers_per_pixel = 3510

    @property
    def memory_frames(self) -> int:
        """See `Decoder.memory_frames`."""
        return wan_memory_frames(self.codec.num_res_blocks, self.codec.temperal_upsample)

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
        before: dict[int, Tensor] = {}
        if part.shape[2] == 1:
            tensors = ((index, each) for index, each in enumerate(past) if torch.is_tensor(each))
            before = {index: each[:, :, -1:].clone() for index, each in tensors}
        pixels: list[Tensor] = self.codec.decoder(part, feat_cache=past, feat_idx=[0])
        for index, frame in before.items():
            if past[index].shape[2] == 1:
                past[index] = torch.cat([frame, past[index]], dim=2)
        return pixels


class StockTAEHVDecoder(_Stock):
    """TAEHV: each memory block reads the frame before, and a stream's first images are dropped.

    taew2_1 knows the network's normalised latents. ComfyUI takes a file of its kind for
    HunyuanVideo's and scales latents for that; here it gets what it was made for.
    """

    kind = "comfy-taehv"
    numbers_per_pixel = 1900

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

    @_on_its_card
    def decode(self, latents: Tensor, state: VAEState | None) -> tuple[Tensor, VAEState]:
        """See `Decoder.decode`."""
        batch = latents.shape[0]
        if not self._normalised:
            latents = self.latent_format.process_out(latents)
        if state is not None:
            state.require_unspent()
        x = rearrange(self._cast(latents), "b c t h w -> (b t) c h w")
        kept: dict[str, Tensor] = {}
        for index, block in enumerate(self.codec.decoder):
            if isinstance(block, host.MemBlock):
                frames = rearrange(x, "(b t) c h w -> b t c h w", b=batch)
                first = torch.zeros_like(frames[:, :1])
                if state is not None:
                    first = self._cast(state.take(str(index)))
                before = torch.cat([first, frames[:, :-1]], dim=1)
                kept[str(index)] = frames[:, -1:].clone()
                x = block(x, before.flatten(0, 1))
            else:
                x = block(x)
        images = rearrange(x, "(b t) c h w -> b c t h w", b=batch)
        done = 0 if state is None else state.num_frames
        trim = 0 if state else self.codec.frames_to_trim
        return self._images(images[:, :, trim:]), VAEState(kept, done + latents.shape[2])

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
