"""The Wan 2.1 VAE, streamed: latents to pixels and back, any number of frames at a time.

Every layer that looks back in time reads a few past frames from a `VAEState` that the caller passes
in and leaves the last ones in the state it gets back, so whole clips and endless streams are one
code path: a whole clip is a stream of one chunk. Modules hold weights only, under the official key
names (Wan-Video/Wan2.1, wan/modules/vae.py), whose arithmetic this follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

RGB = 3
_PAST_FRAMES = 2  # what a causal convolution over three frames looks back on
# Up to this many channels x frames x rows of one sample, torch convolves by its slow_conv3d (ATen's
# Convolution.cpp, use_mkldnn); above it, or with two samples, by oneDNN: 2 to 10 times faster.
_SLOW_ROWS = 20480
_LEAST_POWER = 1e-24  # the square of where F.normalize stops dividing
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
        for name, values in (("latent_mean", self.latent_mean), ("latent_std", self.latent_std)):
            if len(values) != self.z_dim:
                raise ValueError(
                    f"{name} has {len(values)} values; give one for each of {self.z_dim} channels"
                )
        if min(self.latent_std) <= 0:
            raise ValueError(f"latent_std holds {min(self.latent_std)}; every value is above 0")

    @property
    def spatial_factor(self) -> int:
        """Pixels along each side of a latent."""
        return 1 << (len(self.dim_mult) - 1)

    @property
    def temporal_factor(self) -> int:
        """Images of each latent frame but a stream's first, which has one."""
        return 1 << sum(self.temporal_downsample)


@dataclass(frozen=True)
class VAEState:
    """What decoding or encoding remembers between the chunks of one stream: plain data.

    Nothing here is written in place, so a state may be kept, continued twice (a fork) or saved
    (`tensors` as safetensors, `num_frames` beside it). Its size does not grow with the stream.
    """

    tensors: dict[str, Tensor]
    """Past frames [B, C, frames, height, width] by the path of the layer that reads them."""
    num_frames: int
    """Frames the stream has consumed: latent frames when decoding, images when encoding."""

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> VAEState:
        """The same state on another device or in another dtype."""
        moved = {key: value.to(device=device, dtype=dtype) for key, value in self.tensors.items()}
        return replace(self, tensors=moved)

    def clone(self) -> VAEState:
        """A copy that shares no memory with this one."""
        return replace(self, tensors={key: value.clone() for key, value in self.tensors.items()})

    @property
    def nbytes(self) -> int:
        """Bytes the tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Operations(Protocol):
    """Where layers come from: `torch.nn`, or a namespace with the same constructors."""

    @property
    def Conv2d(self) -> Callable[..., nn.Module]: ...  # noqa: N802
    @property
    def Conv3d(self) -> Callable[..., nn.Module]: ...  # noqa: N802


@dataclass(frozen=True)
class LayerFactory:
    """Makes layers on one device, in one dtype, from one namespace (`torch.nn` or alike)."""

    operations: Operations
    device: torch.device | str | None
    dtype: torch.dtype | None

    def conv2d(self, in_dim: int, out_dim: int, kernel: int, **options: int) -> nn.Module:
        """A convolution over the rows and columns of single frames."""
        conv: Callable[..., nn.Module] = self.operations.Conv2d
        return conv(in_dim, out_dim, kernel, device=self.device, dtype=self.dtype, **options)

    def conv3d(
        self, in_dim: int, out_dim: int, kernel: int | tuple[int, int, int], **options: object
    ) -> nn.Module:
        """A convolution over frames, rows and columns."""
        conv: Callable[..., nn.Module] = self.operations.Conv3d
        return conv(in_dim, out_dim, kernel, device=self.device, dtype=self.dtype, **options)

    def causal(self, in_dim: int, out_dim: int) -> nn.Module:
        """Over 3 frames, rows and columns; the past frames come from `Carry`, not from padding."""
        return self.conv3d(in_dim, out_dim, 3, padding=(0, 1, 1))

    def norm(self, dim: int, axes: int = 3) -> RMSNorm:
        """A norm over the channels, which `axes` others follow."""
        return RMSNorm(dim, axes, self.device, self.dtype)


class Carry:
    """The past frames of one pass over a chunk: read from the state before it, kept for the next.

    Lives for one pass; with `keep` off nothing is kept, as for a whole clip.
    """

    def __init__(self, state: VAEState | None, keep: bool) -> None:
        self.at_start = state is None
        self.past: Mapping[str, Tensor] = state.tensors if state else {}
        self.next: dict[str, Tensor] | None = {} if keep else None
        self.num_frames = state.num_frames if state else 0

    def before(self, key: str, x: Tensor) -> Tensor | None:
        """The frames the stream had before x [B, C, T, H, W] at layer `key`, None at its start.

        ValueError where x cannot follow them.
        """
        past = self.past.get(key)
        if past is not None and (*past.shape[:2], *past.shape[3:]) != (*x.shape[:2], *x.shape[3:]):
            raise ValueError(
                f"{list(x.shape)} at {key} does not continue a stream whose past there is "
                f"{list(past.shape)}; batch and picture size stay the same in a stream: pass None "
                "as the state to begin a new one"
            )
        return past

    def leave(self, key: str, x: Tensor, frames: int) -> None:
        """Keep the last `frames` of x [B, C, T, H, W] for the next pass."""
        # A clone: a view would keep the whole chunk's activations alive.
        if self.next is not None:
            self.next[key] = x[:, :, -frames:].clone()

    def extend(self, key: str, x: Tensor, frames: int = _PAST_FRAMES) -> Tensor:
        """x [B, C, T, H, W] with the `frames` before it in front; zeros where none were."""
        past = self.before(key, x)
        room = (0, 0, 0, 0, frames, 0)
        x = F.pad(x, room) if past is None else torch.cat([past, x], dim=2)
        self.leave(key, x, frames)
        return x

    def state(self, num_frames: int) -> VAEState:
        """The state after a pass that consumed `num_frames`; needs `keep`.

        ValueError where the state before it was another network's.
        """
        assert self.next is not None
        if foreign := self.past.keys() - self.next.keys():
            raise ValueError(
                f"the state holds the past of {some_keys(foreign)}, which is not in this network: "
                "it belongs to another; pass None to begin a new stream"
            )
        return VAEState(self.next, self.num_frames + num_frames)


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
        gain = self.gamma.to(x) * math.sqrt(x.shape[1])
        if not _on_cpu_in_float32(x):
            return F.normalize(x, dim=1) * gain
        # F.normalize walks each position's channels one by one; a sum over planes is vectorised.
        power = x.square().sum(dim=1, keepdim=True)
        return x * power.clamp_min(_LEAST_POWER).rsqrt() * gain


def _on_cpu_in_float32(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


def _causally(conv: nn.Module, x: Tensor) -> Tensor:
    """A `LayerFactory.causal` over x [B, C, T + 2, H, W] -> [B, C', T, H, W].

    One small sample on a CPU goes through as a batch of its frames, each behind its own past.
    """
    small = x.shape[0] == 1 and x.shape[1:4].numel() <= _SLOW_ROWS
    if not (small and _on_cpu_in_float32(x)):
        whole: Tensor = conv(x)
        return whole
    frames = x.unfold(2, _PAST_FRAMES + 1, 1)
    out = conv(rearrange(frames, "1 c n h w t -> n c t h w"))
    joined: Tensor = rearrange(out, "n c 1 h w -> 1 c n h w")
    return joined


class ResidualBlock(nn.Module):
    """Two causal convolutions around a shortcut; module names are the published indices."""

    def __init__(self, in_dim: int, out_dim: int, path: str, build: LayerFactory) -> None:
        super().__init__()
        self.path = path
        self.residual = nn.ModuleDict(
            {
                "0": build.norm(in_dim),
                "2": build.causal(in_dim, out_dim),
                "3": build.norm(out_dim),
                "6": build.causal(out_dim, out_dim),
            }
        )
        same = in_dim == out_dim
        self.shortcut = nn.Identity() if same else build.conv3d(in_dim, out_dim, 1)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """x [B, C, T, H, W] -> [B, C', T, H, W]."""
        out = x
        for norm, conv in (("0", "2"), ("3", "6")):
            out = F.silu(self.residual[norm](out))
            out = _causally(self.residual[conv], carry.extend(f"{self.path}.residual.{conv}", out))
        shortcut: Tensor = self.shortcut(x)
        return out + shortcut


class AttentionBlock(nn.Module):
    """One head of self-attention over the positions of each frame."""

    def __init__(self, dim: int, build: LayerFactory) -> None:
        super().__init__()
        self.norm = build.norm(dim, axes=2)
        self.to_qkv = build.conv2d(dim, 3 * dim, 1)
        self.proj = build.conv2d(dim, dim, 1)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """x [B, C, T, H, W] -> the same shape. Frames do not see each other."""
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        qkv = self.to_qkv(self.norm(frames))
        q, k, v = rearrange(qkv, "n (three c) h w -> three n 1 (h w) c", three=3)
        out = F.scaled_dot_product_attention(q, k, v)
        out = self.proj(rearrange(out, "n 1 (h w) c -> n c h w", h=x.shape[3]))
        attended: Tensor = rearrange(out, "(b t) c h w -> b c t h w", b=x.shape[0])
        return x + attended


class Downsample(nn.Module):
    """Halves height and width and, with `temporal`, time after a stream's first frame."""

    def __init__(self, dim: int, temporal: bool, path: str, build: LayerFactory) -> None:
        super().__init__()
        self.key = f"{path}.time_conv"
        self.resample = nn.ModuleDict({"1": build.conv2d(dim, dim, 3, stride=2)})
        time_conv = build.conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None
        self.time_conv = time_conv

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """x [B, C, T, H, W] -> [B, C, T', H/2, W/2]."""
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        frames = self.resample["1"](F.pad(frames, (0, 1, 0, 1)))
        x = rearrange(frames, "(b t) c h w -> b c t h w", b=x.shape[0])
        return x if self.time_conv is None else self._halve_time(self.time_conv, x, carry)

    def _halve_time(self, time_conv: nn.Module, x: Tensor, carry: Carry) -> Tensor:
        past = carry.before(self.key, x)
        carry.leave(self.key, x, 1)
        if past is not None:
            out: Tensor = time_conv(torch.cat([past, x], dim=2))
            return out
        first = x[:, :, :1]  # passes unfiltered, and is the past of the frames after it
        return first if x.shape[2] == 1 else torch.cat([first, time_conv(x)], dim=2)


class Upsample(nn.Module):
    """Doubles height and width, halves the channels and, with `temporal`, doubles time after a
    stream's first frame."""

    def __init__(self, dim: int, temporal: bool, path: str, build: LayerFactory) -> None:
        super().__init__()
        self.key = f"{path}.time_conv"
        self.resample = nn.ModuleDict({"1": build.conv2d(dim, dim // 2, 3, padding=1)})
        self.time_conv = build.conv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """x [B, C, T, H, W] -> [B, C/2, T', 2H, 2W]."""
        if self.time_conv is not None:
            x = self._double_time(self.time_conv, x, carry)
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        frames = self.resample["1"](F.interpolate(frames, scale_factor=2, mode="nearest"))
        out: Tensor = rearrange(frames, "(b t) c h w -> b c t h w", b=x.shape[0])
        return out

    def _double_time(self, time_conv: nn.Module, x: Tensor, carry: Carry) -> Tensor:
        # The published model leaves the first frame out of time altogether: it stays one frame,
        # and the frames after it see zeros, not it, as their past.
        skipped = 1 if carry.at_start else 0
        if x.shape[2] == skipped:
            return x
        rest = time_conv(carry.extend(self.key, x[:, :, skipped:]))
        rest = rearrange(rest, "b (two c) t h w -> b c (t two) h w", two=2)
        return torch.cat([x[:, :, :1], rest], dim=2) if skipped else rest


class Head(nn.Module):
    """Norm, SiLU and the last causal convolution."""

    def __init__(self, in_dim: int, out_dim: int, path: str, build: LayerFactory) -> None:
        super().__init__()
        self.key = f"{path}.2"
        self.add_module("0", build.norm(in_dim))
        self.add_module("2", build.causal(in_dim, out_dim))

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """x [B, C, T, H, W] -> [B, C', T, H, W]."""
        norm, conv = self.children()
        return _causally(conv, carry.extend(self.key, F.silu(norm(x))))


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
        self.conv1 = build.causal(RGB, config.dim)
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

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """x [B, 3, T, H, W] -> [B, 2z, F, h, w]."""
        x = _causally(self.conv1, carry.extend(self.key, x))
        for block in (*self.downsamples, *self.middle, self.head):
            x = block(x, carry)
        return x


class VAEDecoder(nn.Module):
    """Latents (in the VAE's own scale) to pixels."""

    def __init__(self, config: VAEConfig, path: str, build: LayerFactory) -> None:
        super().__init__()
        dims = [config.dim * multiple for multiple in reversed(config.dim_mult)]
        temporal = config.temporal_downsample[::-1]
        self.key = f"{path}.conv1"
        self.conv1 = build.causal(config.z_dim, dims[0])
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

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """x [B, z, F, h, w] -> [B, 3, T, H, W]."""
        x = _causally(self.conv1, carry.extend(self.key, x))
        for block in (*self.middle, *self.upsamples, self.head):
            x = block(x, carry)
        return x


class WanVAE(nn.Module):
    """The Wan 2.1 VAE. Whole clips (`encode`, `decode`) and chunks of a stream with explicit state
    (`encode_chunk`, `decode_chunk`) give the same, however the stream is cut.

    `operations` supplies Conv2d and Conv3d; `device` and `dtype` are passed on to them.
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

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, z, F, h, w] -> pixels [B, 3, 4(F-1)+1, 8h, 8w] around [-1, 1].

        Not clamped. ValueError for another shape.
        """
        return self._decode(latents, Carry(None, keep=False))

    def decode_chunk(self, latents: Tensor, state: VAEState | None) -> tuple[Tensor, VAEState]:
        """The next latents [B, z, F, h, w] of a stream -> pixels [B, 3, T, 8h, 8w], state after.

        `state` is None at the start of a stream, whose first frame gives one image; every other
        gives four. ValueError for another shape or a state of another stream.
        """
        carry = Carry(state, keep=True)
        pixels = self._decode(latents, carry)
        return pixels, carry.state(latents.shape[2])

    def encode(self, video: Tensor) -> Tensor:
        """Video [B, 3, 4k+1, H, W] in [-1, 1] -> normalised latents [B, z, k+1, H/8, W/8].

        The mean of the posterior. ValueError for another length, size or shape.
        """
        return self._encode(video, Carry(None, keep=False))

    def encode_chunk(self, video: Tensor, state: VAEState | None) -> tuple[Tensor, VAEState]:
        """The next images [B, 3, T, H, W] of a stream -> latents [B, z, F, H/8, W/8], state after.

        T is 4k+1 at the start of a stream (`state` None) and 4k after it. ValueError otherwise.
        """
        carry = Carry(state, keep=True)
        latents = self._encode(video, carry)
        return latents, carry.state(video.shape[2])

    def _decode(self, latents: Tensor, carry: Carry) -> Tensor:
        check_shape(latents, self.config.z_dim, "latents")
        mean, std = scales(self.config, latents)
        pixels: Tensor = self.decoder(self.conv2(latents * std + mean), carry)
        return pixels

    def _encode(self, video: Tensor, carry: Carry) -> Tensor:
        step = self.config.temporal_factor
        check_video(video, step, 1 % step if carry.at_start else 0, self.config.spatial_factor)
        mean, std = scales(self.config, video)
        moments = self.conv1(self.encoder(video, carry))
        latents: Tensor = (moments[:, : self.config.z_dim] - mean) / std
        return latents


class LatentScales(Protocol):
    """A config that knows how its latents are normalised."""

    @property
    def latent_mean(self) -> tuple[float, ...]: ...
    @property
    def latent_std(self) -> tuple[float, ...]: ...


def scales(config: LatentScales, like: Tensor) -> tuple[Tensor, Tensor]:
    """Latent mean and std, each [C, 1, 1, 1], in the dtype and on the device of `like`."""
    mean, std = like.new_tensor([config.latent_mean, config.latent_std])
    return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)


def check_video(video: Tensor, step: int, rest: int, side: int) -> None:
    """ValueError unless video is [B, 3, step * k + rest, H, W], H and W multiples of `side`."""
    check_shape(video, RGB, "video")
    num_images, height, width = video.shape[2:]
    if num_images % step != rest:
        rule = f"{step}k + {rest}" if rest else f"a multiple of {step}"
        raise ValueError(
            f"video has {num_images} images; here their number is {rule} (4k + 1 at the start of "
            "a Wan stream, 4k after it); trim or pad it"
        )
    if height % side or width % side:
        raise ValueError(
            f"video is {height}x{width}; both must be multiples of {side}; crop or resize it"
        )


def check_shape(x: Tensor, channels: int, name: str) -> None:
    """ValueError unless x is [B, channels, T, H, W] and not empty."""
    if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
        raise ValueError(
            f"{name} is {list(x.shape)}; it must be [batch, {channels}, frames, height, width] "
            "with every size above 0"
        )


def some_keys(keys: Collection[str]) -> str:
    """A few of the keys, and how many more there are, for a message."""
    shown = ", ".join(sorted(keys)[:3])
    return f"{shown} and {len(keys) - 3} more" if len(keys) > 3 else shown or "none"
