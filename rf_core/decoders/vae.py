"""The Wan 2.1 VAE, streamed: latents to pixels and back, any number of frames at a time.

Key names and arithmetic follow the official ones (Wan-Video/Wan2.1, wan/modules/vae.py); how a
stream is cut into chunks is `codec`'s part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .. import kernels
from ..kernels.availability import fused
from ..kernels.reference import channel_norm
from .codec import (
    RGB,
    Codec,
    FastPaths,
    FeatureCache,
    LayerFactory,
    Operations,
    VAEState,
    check_scales,
    check_shape,
    check_video,
    convolve_upsampled,
    float32_on_cpu,
    memory_frames,
    scales,
    source_memory_images,
)

__all__ = ["VAEConfig", "VAEDecoder", "VAEEncoder", "VAEState", "WanVAE"]

_PAST_FRAMES = 2  # what a causal convolution over three frames looks back on
# Up to this many channels x frames x rows of one sample, torch convolves by its slow_conv3d (ATen's
# Convolution.cpp, use_mkldnn); above it, or with two samples, by oneDNN: 2 to 20 times faster.
_SLOW_ROWS = 20480
_FULL_INPUTS = 64  # channels as cuDNN's kernels for Hopper take them; others get Ampere's
# The published normalisation of Wan 2.1 latents (Wan-Video/Wan2.1, wan/modules/vae.py).
WAN21_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN21_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Sizes and normalisation of a Wan VAE. Defaults are the published Wan 2.1 VAE."""

    dim: int = 96
    """Channels at full resolution."""
    z_dim: int = 16
    """Latent channels."""
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Channels of each level in multiples of `dim`, full resolution first; each level halves."""
    num_res_blocks: int = 2
    """Residual blocks of an encoder level; a decoder level has one more."""
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    """Whether the step after each level but the last also halves time (encoder order)."""
    latent_mean: tuple[float, ...] = WAN21_MEAN
    """Mean of each latent channel, taken off when encoding."""
    latent_std: tuple[float, ...] = WAN21_STD
    """Standard deviation of each latent channel, divided by when encoding."""

    def __post_init__(self) -> None:
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temporal_downsample has {len(self.temporal_downsample)} entries for "
                f"{len(self.dim_mult)} levels; give one less than dim_mult has"
            )
        check_scales(self, self.z_dim)

    @property
    def spatial_factor(self) -> int:
        """Pixels along each side of a latent."""
        return 1 << (len(self.dim_mult) - 1)

    @property
    def temporal_factor(self) -> int:
        """Images of each latent frame but a stream's first, which has one."""
        return 1 << sum(self.temporal_downsample)


class RMSNorm(nn.Module):
    """Scales the channels (dim 1) of each position to unit mean square, times a learned gain."""

    def __init__(
        self,
        dim: int,
        axes: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, ...] -> the same shape."""
        return channel_norm(x, self.gamma)


def _causal(build: LayerFactory, in_dim: int, out_dim: int) -> nn.Module:
    """Over 3 frames, rows and columns; past frames come from `FeatureCache`, not from padding."""
    return build.conv3d(in_dim, out_dim, 3, padding=(0, 1, 1))


def _norm(build: LayerFactory, dim: int, axes: int = 3) -> RMSNorm:
    return RMSNorm(dim, axes, build.device, build.dtype)


@dataclass
class DeferredSum:
    """A tensor [B, C, T, H, W] to which a bias [C] and a shortcut may still have to be added."""

    out: Tensor
    bias: Tensor | None = None
    shortcut: Tensor | None = None

    def added(self) -> Tensor:
        """All of it, written over `out`."""
        if self.bias is not None or self.shortcut is not None:
            kernels.add_in_place(self.out, self.bias, self.shortcut)
            self.bias = self.shortcut = None
        return self.out


def channels_for(conv: nn.Module, x: Tensor, fast_paths: FastPaths) -> int:
    """Channels that a convolution is to read of x [B, C, ...]: all, and zeros behind them."""
    channels = x.shape[1]
    filling = -channels % _FULL_INPUTS
    fills = fast_paths.fill_inputs and type(conv) is nn.Conv3d and x.itemsize == 2
    return channels + filling if fills and 2 * filling <= channels else channels


def _convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x) for x [B, C, T, H, W], never by torch's slow way; further channels of x are zeros."""
    if type(conv) is nn.Conv3d:
        return _convolve_with(conv, x, conv.bias)
    out: Tensor = conv(x)
    return out


def _convolve_with(conv: nn.Conv3d, x: Tensor, bias: Tensor | None) -> Tensor:
    weight = conv.weight
    if (filling := x.shape[1] - conv.in_channels) > 0:
        weight = F.pad(weight, (*[0, 0] * 3, 0, filling))
    assert isinstance(conv.padding, tuple)
    steps = (conv.padding, conv.stride, conv.dilation, conv.groups)
    small = x.shape[0] == 1 and x.shape[1:4].numel() <= _SLOW_ROWS
    if small and float32_on_cpu(x) and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x, weight, bias, *steps)
    padding, stride, dilation, groups = steps
    return F.conv3d(x, weight, bias, stride, padding, dilation, groups)


def _convolve_for_norm(conv: nn.Module, x: Tensor, fast_paths: FastPaths) -> DeferredSum:
    """conv(x) for a norm to read, which may have its bias still to add."""
    if fast_paths.defer_sums and type(conv) is nn.Conv3d and fused(x, *conv.parameters()):
        return DeferredSum(_convolve_with(conv, x, None), conv.bias)
    return DeferredSum(_convolve(conv, x))


def _activate(
    norm: nn.Module, conv: nn.Module, x: DeferredSum, feat_cache: FeatureCache, key: str
) -> Tensor:
    """silu(norm(x)) for x [B, C, T, H, W], behind the two frames of it the stream had at `key`.

    It is laid as `conv` reads it (`channels_for`). A shortcut that x lacked is added on the way.
    """
    if torch.is_grad_enabled():
        return feat_cache.extend(key, F.silu(norm(x.added())), _PAST_FRAMES)
    assert isinstance(norm, RMSNorm)
    channels = x.out.shape[1]
    size = channels_for(conv, x.out, feat_cache.fast_paths)
    if fused(x.out, norm.gamma):
        room = feat_cache.allocate(key, x.out, _PAST_FRAMES, size)
        _activate_fused(norm.gamma, x, room[:, :channels], feat_cache.fast_paths)
    else:  # the norm comes first: beside the room it would raise the peak
        normed = norm(x.added())
        room = feat_cache.allocate(key, x.out, _PAST_FRAMES, size)
        torch.ops.aten.silu.out(normed, out=room[:, :channels, _PAST_FRAMES:])
    feat_cache.store(key, room[:, :channels], _PAST_FRAMES)
    return room


def _activate_fused(gamma: Tensor, x: DeferredSum, room: Tensor, fast_paths: FastPaths) -> None:
    if not fast_paths.defer_sums:
        x.added()
    kernels.causal_norm_silu(x.out, gamma, room, x.bias, x.shortcut)
    if x.shortcut is not None:  # with it the sum was written; a bias alone is added in passing
        x.bias = x.shortcut = None


class ResidualBlock(nn.Module):
    """Two causal convolutions around a shortcut; module names are the published indices."""

    def __init__(self, in_dim: int, out_dim: int, path: str, build: LayerFactory) -> None:
        super().__init__()
        self.path = path
        self.residual = nn.ModuleDict(
            {
                "0": _norm(build, in_dim),
                "2": _causal(build, in_dim, out_dim),
                "3": _norm(build, out_dim),
                "6": _causal(build, out_dim, out_dim),
            }
        )
        same = in_dim == out_dim
        self.shortcut = nn.Identity() if same else build.conv3d(in_dim, out_dim, 1)

    def forward(self, x: DeferredSum, feat_cache: FeatureCache) -> DeferredSum:
        """x [B, C, T, H, W] -> [B, C', T, H, W], to which the shortcut is still to be added."""
        out = x
        for norm, name in (("0", "2"), ("3", "6")):
            conv, key = self.residual[name], f"{self.path}.residual.{name}"
            room = _activate(self.residual[norm], conv, out, feat_cache, key)
            del out  # or it would be held while the next is made
            out = _convolve_for_norm(conv, room, feat_cache.fast_paths)
            del room
        shortcut = _convolve(self.shortcut, x.added())
        return DeferredSum(out.out, out.bias, shortcut)


class AttentionBlock(nn.Module):
    """One head of self-attention over the positions of each frame."""

    def __init__(self, dim: int, build: LayerFactory) -> None:
        super().__init__()
        self.norm = _norm(build, dim, axes=2)
        self.to_qkv = build.conv2d(dim, 3 * dim, 1)
        self.proj = build.conv2d(dim, dim, 1)

    def forward(self, x: DeferredSum, feat_cache: FeatureCache) -> DeferredSum:
        """x [B, C, T, H, W] -> the same shape. Frames do not see each other."""
        whole = x.added()
        frames = rearrange(whole, "b c t h w -> (b t) c h w")
        qkv = self.to_qkv(self.norm(frames))
        q, k, v = rearrange(qkv, "n (three c) h w -> three n (h w) c", three=3)
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        out = self.proj(rearrange(out, "n (h w) c -> n c h w", h=whole.shape[3]))
        attended = rearrange(out, "(b t) c h w -> b c t h w", b=whole.shape[0])
        return DeferredSum(whole + attended)


class Downsample(nn.Module):
    """Halves height and width and, with `temporal`, time after a stream's first frame."""

    def __init__(self, dim: int, temporal: bool, path: str, build: LayerFactory) -> None:
        super().__init__()
        self.key = f"{path}.time_conv"
        self.resample = nn.ModuleDict({"1": build.conv2d(dim, dim, 3, stride=2)})
        time_conv = build.conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None
        self.time_conv = time_conv

    def forward(self, x: DeferredSum, feat_cache: FeatureCache) -> DeferredSum:
        """x [B, C, T, H, W] -> [B, C, T', H/2, W/2]."""
        frames = rearrange(x.added(), "b c t h w -> (b t) c h w")
        frames = self.resample["1"](F.pad(frames, (0, 1, 0, 1)))
        half = rearrange(frames, "(b t) c h w -> b c t h w", b=x.out.shape[0])
        if self.time_conv is not None:
            half = self._halve_time(self.time_conv, half, feat_cache)
        return DeferredSum(half)

    def _halve_time(self, time_conv: nn.Module, x: Tensor, feat_cache: FeatureCache) -> Tensor:
        if not feat_cache.at_start:
            return _convolve(time_conv, feat_cache.extend(self.key, x, 1))
        feat_cache.store(self.key, x, 1)
        first = x[:, :, :1]  # passes unfiltered, and is the past of the frames after it
        if x.shape[2] == 1:
            return first
        return torch.cat([first, _convolve(time_conv, x)], dim=2)


class Upsample(nn.Module):
    """Doubles height and width, halves the channels and, with `temporal`, doubles time after a
    stream's first frame."""

    def __init__(self, dim: int, temporal: bool, path: str, build: LayerFactory) -> None:
        super().__init__()
        self.key = f"{path}.time_conv"
        self.resample = nn.ModuleDict({"1": build.conv2d(dim, dim // 2, 3, padding=1)})
        self.time_conv = build.conv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: DeferredSum, feat_cache: FeatureCache) -> DeferredSum:
        """x [B, C, T, H, W] -> [B, C/2, T', 2H, 2W]."""
        whole = x.added()
        if self.time_conv is not None:
            whole = self._double_time(self.time_conv, whole, feat_cache)
        frames = rearrange(whole, "b c t h w -> (b t) c h w")
        frames = convolve_upsampled(self.resample["1"], frames, feat_cache.fast_paths)
        return DeferredSum(rearrange(frames, "(b t) c h w -> b c t h w", b=whole.shape[0]))

    def _double_time(self, time_conv: nn.Module, x: Tensor, feat_cache: FeatureCache) -> Tensor:
        # The published model leaves the first frame out of time altogether: it stays one frame,
        # and the frames after it see zeros, not it, as their past.
        skipped = 1 if feat_cache.at_start else 0
        if x.shape[2] == skipped:
            return x
        past_and_rest = feat_cache.extend(self.key, x[:, :, skipped:], _PAST_FRAMES)
        rest = _convolve(time_conv, past_and_rest)
        rest = rearrange(rest.movedim(1, -1), "b t h w (two c) -> b (t two) h w c", two=2)
        rest = rest.movedim(-1, 1)  # by way of channels last, the layout of a stream
        return torch.cat([x[:, :, :1], rest], dim=2) if skipped else rest


class Head(nn.Module):
    """Norm, SiLU and the last causal convolution."""

    def __init__(self, in_dim: int, out_dim: int, path: str, build: LayerFactory) -> None:
        super().__init__()
        self.key = f"{path}.2"
        self.add_module("0", _norm(build, in_dim))
        self.add_module("2", _causal(build, in_dim, out_dim))

    def forward(self, x: DeferredSum, feat_cache: FeatureCache) -> Tensor:
        """x [B, C, T, H, W] -> [B, C', T, H, W]."""
        norm, conv = self.children()
        room = _activate(norm, conv, x, feat_cache, self.key)
        return _convolve(conv, room)


def _next_path(path: str, blocks: nn.ModuleList) -> str:
    return f"{path}.{len(blocks)}"


def _middle(dim: int, path: str, build: LayerFactory) -> nn.ModuleList:
    return nn.ModuleList(
        [
            ResidualBlock(dim, dim, f"{path}.0", build),
            AttentionBlock(dim, build),
            ResidualBlock(dim, dim, f"{path}.2", build),
        ]
    )


class VAEEncoder(nn.Module):
    """Pixels to the moments of the latents (mean, then log variance)."""

    def __init__(self, config: VAEConfig, path: str, build: LayerFactory) -> None:
        super().__init__()
        dims = [config.dim * multiple for multiple in config.dim_mult]
        self.key = f"{path}.conv1"
        self.conv1 = _causal(build, RGB, config.dim)
        self.downsamples = nn.ModuleList()
        in_dim = config.dim
        for level, out_dim in enumerate(dims):
            for _ in range(config.num_res_blocks):
                at = _next_path(f"{path}.downsamples", self.downsamples)
                self.downsamples.append(ResidualBlock(in_dim, out_dim, at, build))
                in_dim = out_dim
            if level < len(dims) - 1:
                at = _next_path(f"{path}.downsamples", self.downsamples)
                temporal = config.temporal_downsample[level]
                self.downsamples.append(Downsample(out_dim, temporal, at, build))
        self.middle = _middle(in_dim, f"{path}.middle", build)
        self.head = Head(in_dim, 2 * config.z_dim, f"{path}.head", build)

    def forward(self, x: Tensor, feat_cache: FeatureCache) -> Tensor:
        """x [B, 3, T, H, W] -> [B, 2z, F, h, w]."""
        x = _convolve(self.conv1, feat_cache.extend(self.key, x, _PAST_FRAMES))
        out = DeferredSum(x)
        del x  # which the next block may write over and let go of
        for block in (*self.downsamples, *self.middle):
            out = block(out, feat_cache)
        return self.head(out, feat_cache)


class VAEDecoder(nn.Module):
    """Latents (in the VAE's own scale) to pixels."""

    def __init__(self, config: VAEConfig, path: str, build: LayerFactory) -> None:
        super().__init__()
        dims = [config.dim * multiple for multiple in reversed(config.dim_mult)]
        temporal = config.temporal_downsample[::-1]
        self.key = f"{path}.conv1"
        self.conv1 = _causal(build, config.z_dim, dims[0])
        self.middle = _middle(dims[0], f"{path}.middle", build)
        self.upsamples = nn.ModuleList()
        in_dim = dims[0]
        for level, out_dim in enumerate(dims):
            for _ in range(config.num_res_blocks + 1):
                at = _next_path(f"{path}.upsamples", self.upsamples)
                self.upsamples.append(ResidualBlock(in_dim, out_dim, at, build))
                in_dim = out_dim
            if level < len(dims) - 1:
                at = _next_path(f"{path}.upsamples", self.upsamples)
                self.upsamples.append(Upsample(out_dim, temporal[level], at, build))
                in_dim = out_dim // 2
        self.head = Head(in_dim, RGB, f"{path}.head", build)

    def forward(self, x: Tensor, feat_cache: FeatureCache) -> Tensor:
        """x [B, z, F, h, w] -> [B, 3, T, H, W]."""
        x = _convolve(self.conv1, feat_cache.extend(self.key, x, _PAST_FRAMES))
        out = DeferredSum(x)
        del x  # which the next block may write over and let go of
        for block in (*self.middle, *self.upsamples):
            out = block(out, feat_cache)
        return self.head(out, feat_cache)


def wan_memory_frames(num_res_blocks: int, temporal_upsample: Sequence[bool]) -> int:
    """Latent frames that a Wan decoder looks back on; 38 for the published one.

    `num_res_blocks` is `VAEConfig`'s; `temporal_upsample` says which step between two levels, in
    decoder order, makes two frames of one.
    """
    conv, block = (_PAST_FRAMES, 1), (2 * _PAST_FRAMES, 1)
    steps = [conv, block, block]
    for doubles in (*temporal_upsample, None):
        steps += [block] * (num_res_blocks + 1)
        if doubles:
            steps.append((_PAST_FRAMES, 2))
    return memory_frames([*steps, conv])


def wan_source_memory_images(num_res_blocks: int, temporal_downsample: Sequence[bool]) -> int:
    """Images that a Wan encoder looks back on; 109 for the published one.

    `num_res_blocks` is `VAEConfig`'s; `temporal_downsample` says which step between two levels, in
    encoder order, makes one frame of two.
    """
    conv, block = (_PAST_FRAMES, 1), (2 * _PAST_FRAMES, 1)
    steps = [conv]
    for halves in (*temporal_downsample, None):
        steps += [block] * num_res_blocks
        if halves:
            steps.append((1, 2))
    return source_memory_images([*steps, block, block, conv])


class WanVAE(Codec):
    """The Wan 2.1 VAE: pixels around [-1, 1], decoded ones not clamped.

    A stream of images begins with 4k+1 of them and goes on with 4k. Latents are the mean of the
    posterior. `operations` supplies Conv2d and Conv3d; `device` and `dtype` are passed on to them.
    """

    def __init__(
        self,
        config: VAEConfig,
        operations: Operations = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        build = LayerFactory(operations, device, dtype)
        self.config = config
        self.encoder = VAEEncoder(config, "encoder", build)
        self.conv1 = build.conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = build.conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = VAEDecoder(config, "decoder", build)

    @property
    def memory_frames(self) -> int:
        """See `Decoder.memory_frames`."""
        upsample = self.config.temporal_downsample[::-1]
        return wan_memory_frames(self.config.num_res_blocks, upsample)

    @property
    def source_memory_images(self) -> int:
        """See `Decoder.source_memory_images`."""
        config = self.config
        return wan_source_memory_images(config.num_res_blocks, config.temporal_downsample)

    def _decode(self, latents: Tensor, feat_cache: FeatureCache) -> Tensor:
        check_shape(latents, self.config.z_dim, "latents")
        mean, std = scales(self.config, latents)
        pixels: Tensor = self.decoder(_convolve(self.conv2, latents * std + mean), feat_cache)
        return pixels

    def _encode(self, video: Tensor, feat_cache: FeatureCache) -> Tensor:
        step = self.config.temporal_factor
        check_video(video, step, 1 % step if feat_cache.at_start else 0, self.config.spatial_factor)
        mean, std = scales(self.config, video)
        moments = self.conv1(self.encoder(video, feat_cache))
        latents: Tensor = (moments[:, : self.config.z_dim] - mean) / std
        return latents
