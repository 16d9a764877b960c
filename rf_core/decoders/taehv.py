"""TAEHV: the tiny autoencoder that decodes Wan latents about 25 times cheaper than the Wan VAE.

The `taew2_1` layout of madebyollin/taehv (MIT), whose key names and arithmetic this follows. It
works on single frames, except that each memory block also sees the frame before: that frame is the
whole state of a stream, passed in and returned as a `VAEState`. As its README says ("does not use
any latent scales / shifts"), `taew2_1` reads and writes the normalised latents of the diffusion
model. LightX2V's `lighttaew2_1` has the same layout but takes latents before normalisation; its
own loader knows it by the file's name, and so does `load_taehv`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..weights.files import WeightFile, read_weights
from .codec import (
    RGB,
    Codec,
    FeatureCache,
    LayerFactory,
    Operations,
    check_scales,
    check_shape,
    check_video,
    convolve_upsampled,
    memory_frames,
    scales,
    some_keys,
    source_memory_images,
)
from .vae import WAN21_MEAN, WAN21_STD
from .vae_files import frozen, naming, normalisation_of

_MEMORY_BLOCKS = 3  # per level
_POOL_FRAMES = (2, 2, 1)  # frames each encoder level merges into one
_GROW_FRAMES = (1, 2, 2)  # frames each decoder level makes of one
_WIDTH_KEYS = tuple(f"decoder.{index}.weight" for index in (1, 8, 14, 20))


@dataclass(frozen=True, kw_only=True)
class TAEHVConfig:
    """Sizes of a TAEHV. Defaults are `taew2_1`."""

    latent_channels: int = 16
    """Channels of a latent frame."""
    decoder_widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    """Channels of the decoder from latents to pixels."""
    encoder_width: int = 64
    """Channels of the encoder."""
    latent_mean: tuple[float, ...] = (0.0,) * 16
    """Mean of each channel of the latents the weights know; 0 where they know normalised ones."""
    latent_std: tuple[float, ...] = (1.0,) * 16
    """Standard deviation of each channel of those latents; 1 where they know normalised ones."""

    spatial_factor = 2 ** len(_GROW_FRAMES)
    temporal_factor = 4

    def __post_init__(self) -> None:
        check_scales(self, self.latent_channels)


class Clamp(nn.Module):
    """Holds latents softly within (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return 3 * torch.tanh(x / 3)


class MemoryBlock(nn.Module):
    """Three convolutions over a frame and the one before it, around a shortcut."""

    def __init__(self, dim: int, build: LayerFactory) -> None:
        super().__init__()
        in_dims = {"0": 2 * dim, "2": dim, "4": dim}
        convs = {key: build.conv2d(in_dim, dim, 3, padding=1) for key, in_dim in in_dims.items()}
        self.conv = nn.ModuleDict(convs)

    def forward(self, x: Tensor, pairs: Tensor) -> Tensor:
        """x [N, C, H, W], and with the frame before each [N, 2C, H, W] -> [N, C, H, W]."""
        out = F.relu(self.conv["0"](pairs))
        out = F.relu(self.conv["2"](out))
        return F.relu(self.conv["4"](out) + x)


class Pool(nn.Module):
    """Merges `frames` neighbours in time into one frame."""

    def __init__(self, dim: int, frames: int, build: LayerFactory) -> None:
        super().__init__()
        self.frames = frames
        self.conv = build.conv2d(frames * dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N * frames, C, H, W] -> [N, C, H, W]."""
        out: Tensor = self.conv(rearrange(x, "(n s) c h w -> n (s c) h w", s=self.frames))
        return out


class Grow(nn.Module):
    """Makes `frames` neighbours in time of one frame."""

    def __init__(self, dim: int, frames: int, build: LayerFactory) -> None:
        super().__init__()
        self.frames = frames
        self.conv = build.conv2d(dim, frames * dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N * frames, C, H, W]."""
        out: Tensor = self.conv(x).movedim(1, -1)
        out = rearrange(out, "n h w (s c) -> (n s) h w c", s=self.frames)
        return out.movedim(-1, 1)  # by way of channels last, the layout of a stream


def _encoder(config: TAEHVConfig, build: LayerFactory) -> nn.ModuleList:
    dim = config.encoder_width
    layers = [build.conv2d(RGB, dim, 3, padding=1), nn.ReLU()]
    for frames in _POOL_FRAMES:
        layers += [Pool(dim, frames, build)]
        layers += [build.conv2d(dim, dim, 3, padding=1, stride=2, bias=False)]
        layers += [MemoryBlock(dim, build) for _ in range(_MEMORY_BLOCKS)]
    return nn.ModuleList([*layers, build.conv2d(dim, config.latent_channels, 3, padding=1)])


def _decoder(config: TAEHVConfig, build: LayerFactory) -> nn.ModuleList:
    widths = config.decoder_widths
    layers = [Clamp(), build.conv2d(config.latent_channels, widths[0], 3, padding=1), nn.ReLU()]
    for (dim, next_dim), frames in zip(pairwise(widths), _GROW_FRAMES, strict=True):
        layers += [MemoryBlock(dim, build) for _ in range(_MEMORY_BLOCKS)]
        # Between them rows and columns double, as published; `_run` doubles after `Grow`.
        layers += [nn.Identity(), Grow(dim, frames, build)]
        layers += [build.conv2d(dim, next_dim, 3, padding=1, bias=False)]
    return nn.ModuleList([*layers, nn.ReLU(), build.conv2d(widths[-1], RGB, 3, padding=1)])


def _paired(x: Tensor, feat_cache: FeatureCache, key: str) -> Tensor:
    """Each frame of x [B, C, T, H, W] with the one before it -> [(B T), 2C, H, W]."""
    past = feat_cache.take(key, x)
    first = torch.zeros_like(x[:, :, :1]) if past is None else past
    feat_cache.store(key, x, 1)
    pairs = torch.cat([x, torch.cat([first, x[:, :, :-1]], dim=2)], dim=1)
    out: Tensor = rearrange(pairs, "b c t h w -> (b t) c h w")
    return out


def _run(layers: nn.ModuleList, path: str, x: Tensor, feat_cache: FeatureCache) -> Tensor:
    """x [B, C, T, H, W] through the layers, each memory block with the frame before each frame."""
    batch = x.shape[0]
    x = rearrange(x, "b c t h w -> (b t) c h w")
    grown = False
    for index, layer in enumerate(layers):
        if isinstance(layer, MemoryBlock):
            frames = rearrange(x, "(b t) c h w -> b c t h w", b=batch)
            x = layer(x, _paired(frames, feat_cache, f"{path}.{index}"))
        elif grown:
            # Doubling commutes with `Grow`, pixel by pixel, and with it costs four times as much.
            x = convolve_upsampled(layer, x, feat_cache.fast_paths)
        else:
            x = layer(x)
        grown = isinstance(layer, Grow)
    out: Tensor = rearrange(x, "(b t) c h w -> b c t h w", b=batch)
    return out


class TAEHV(Codec):
    """The tiny autoencoder: pixels in [0, 1], decoded ones clamped to it.

    A stream of images comes in fours; `fill_last_group` fills the last four of a clip, and
    `encode` does. `operations` supplies Conv2d; `device` and `dtype` are passed on to it.
    """

    def __init__(
        self,
        config: TAEHVConfig,
        operations: Operations = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        build = LayerFactory(operations, device, dtype)
        self.config = config
        self.encoder = _encoder(config, build)
        self.decoder = _decoder(config, build)

    def encode(self, video: Tensor) -> Tensor:
        """Video [B, 3, T, H, W] -> normalised latents [B, C, ceil(T/4), H/8, W/8]."""
        return super().encode(fill_last_group(video))

    @property
    def memory_frames(self) -> int:
        """See `Decoder.memory_frames`; 8 for `taew2_1`."""
        blocks = [(1, 1)] * _MEMORY_BLOCKS
        return memory_frames([step for made in _GROW_FRAMES for step in (*blocks, (0, made))])

    @property
    def source_memory_images(self) -> int:
        """See `Decoder.source_memory_images`; 30 for `taew2_1`."""
        blocks = [(1, 1)] * _MEMORY_BLOCKS
        return source_memory_images([s for merged in _POOL_FRAMES for s in ((0, merged), *blocks)])

    def _decode(self, latents: Tensor, feat_cache: FeatureCache) -> Tensor:
        check_shape(latents, self.config.latent_channels, "latents")
        mean, std = scales(self.config, latents)
        pixels = _run(self.decoder, "decoder", latents * std + mean, feat_cache).clamp(0, 1)
        # The first latent frame stands for one image, the last of the four it grows into.
        return pixels[:, :, self.config.temporal_factor - 1 :] if feat_cache.at_start else pixels

    def _encode(self, video: Tensor, feat_cache: FeatureCache) -> Tensor:
        check_video(video, self.config.temporal_factor, 0, self.config.spatial_factor)
        mean, std = scales(self.config, video)
        return (_run(self.encoder, "encoder", video, feat_cache) - mean) / std


def fill_last_group(video: Tensor) -> Tensor:
    """Video [B, 3, T, H, W] with its last image repeated until T is a multiple of four.

    How the published code ends a clip; 4k + 1 images become k + 1 latent frames.
    """
    check_shape(video, RGB, "video")
    lacking = -video.shape[2] % TAEHVConfig.temporal_factor
    return torch.cat([video, video[:, :, -1:].expand(-1, -1, lacking, -1, -1)], dim=2)


def is_taehv(sd: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of a TAEHV, for this or another video model."""
    return {"encoder.0.weight", *_WIDTH_KEYS, "decoder.22.weight"} <= sd.keys()


def taehv_config_of(
    sd: Mapping[str, Tensor], scales: Mapping[str, tuple[float, ...]]
) -> TAEHVConfig:
    """Sizes from the tensors; `scales` gives latent_mean and latent_std where they are not 0 and 1.

    ValueError where this is no TAEHV or one for another video model.
    """
    if not is_taehv(sd):
        raise ValueError(
            f"this is not a TAEHV: its keys are {some_keys(sd)}, where encoder.0.weight and the "
            "like are expected; use taew2_1.pth or taew2_1.safetensors"
        )
    if sd["decoder.22.weight"].shape[0] != RGB:
        raise ValueError(
            f"this TAEHV is for another video model ({sd['decoder.1.weight'].shape[1]} latent "
            "channels, pixels in patches); Wan 2.1 latents need taew2_1.pth or taew2_1.safetensors"
        )
    channels = sd["decoder.1.weight"].shape[1]
    widths = [sd[key].shape[0] for key in _WIDTH_KEYS]
    normal = {"latent_mean": (0.0,) * channels, "latent_std": (1.0,) * channels}
    return TAEHVConfig(
        latent_channels=channels,
        decoder_widths=(widths[0], widths[1], widths[2], widths[3]),
        encoder_width=sd["encoder.0.weight"].shape[0],
        **{**normal, **scales},
    )


def scales_of_file(file: WeightFile) -> dict[str, tuple[float, ...]]:
    """The latent mean and std a TAEHV file asks for: its metadata's, else Wan's for `lighttae`."""
    asked = normalisation_of(file.metadata)
    if asked or "lighttae" not in file.path.name.lower():
        return asked
    return {"latent_mean": WAN21_MEAN, "latent_std": WAN21_STD}


def taehv_of(
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, tuple[float, ...]],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    operations: Operations = nn,
) -> TAEHV:
    """A frozen TAEHV from a file's tensors; see `load_taehv`."""
    taehv = TAEHV(taehv_config_of(tensors, scales), operations, device="meta")
    return frozen(taehv, tensors, "TAEHV", device, dtype)


def load_taehv(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TAEHV:
    """A frozen TAEHV from a .safetensors or .pth file in the `taew2_1` layout.

    ValueError, with the file's path, for a file that is not one.
    """
    file = read_weights(path)
    with naming(file.path):
        return taehv_of(file.tensors, scales_of_file(file), device, dtype)
