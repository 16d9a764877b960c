"""What the Wan VAE and TAEHV share: weights that see a stream through explicit state.

Every layer that looks back in time reads a few past frames from a `VAEState` that the caller passes
in and leaves the last ones in the state it gets back, so whole clips and endless streams are one
code path: a whole clip is a stream of one chunk. Modules hold weights only. Some steps have a
fast path on one device or another, each equal to its definition up to rounding (`FastPaths`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..devices import to_device

RGB = 3
# Weights in these layouts make torch keep activations channel by channel within each position.
_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True, kw_only=True)
class FastPaths:
    """Which steps of a codec are computed faster than by their definition; by default none.

    Each is equal to its definition up to rounding. `FastPaths.on` knows what suits a device; a
    codec whose `fast_paths` are set takes those everywhere.
    """

    fold_doubling: bool = False
    """Convolve doubled pixels without doubling them: 4 products of 9 (`convolve_upsampled`)."""
    defer_sums: bool = False
    """Leave the Wan VAE's biases and shortcuts to the next norm, which adds them in its own pass,
    where there is a fused kernel for it. cuDNN and torch take a pass for each."""
    fill_inputs: bool = False
    """Write what the Wan VAE's 3D convolutions read among zeros, up to a multiple of 64 channels:
    of 96 cuDNN 9.19 multiplies 247 TFLOP/s on an H100, of 128 it does the same work at 438."""

    @classmethod
    def on(cls, device: torch.device) -> FastPaths:
        """What suits a device; tensors on `meta` stand for a card's."""
        if device.type == "cpu":
            return cls(fold_doubling=True)
        if device.type not in ("cuda", "meta"):
            return cls()
        return cls(fold_doubling=True, defer_sums=True, fill_inputs=True)


class PendingPass(Protocol):
    """A pass that may still be under way when the state it makes is handed out."""

    def wait(self, tensors: Collection[Tensor]) -> None:
        """Let what the caller queues next read these tensors of the state as the pass leaves them.

        On a device it is the caller's stream that waits, and not the host. Their memory is not
        given away before the caller's stream has read them.
        """


class VAEState:
    """What decoding or encoding remembers between the chunks of one stream: plain data.

    A state is continued once. The pass over the next chunk takes each tensor out of it where it
    reads it, so that a stream holds one past and never the old one beside the new. `fork` it first
    to continue it twice, or to have it still should the pass fail: a pass that fails half way
    leaves it `spent`, and whoever would use it then is refused. No tensor is written in place, so
    forks share them until they part. Save `tensors` as safetensors, `num_frames` beside them; the
    size does not grow with the stream.

    It may be handed out while a device still makes it (`Handoff`). Whoever reads it then waits for
    what it reads, in whatever stream and thread that is; a fork waits as well.

    Args:
        tensors: past frames [B, C, frames, height, width] by the path of the layer that reads them.
        num_frames: frames the stream has consumed: latent frames when decoding, images when
            encoding.
        pending: the pass that makes the tensors; None where they are there.
    """

    def __init__(
        self, tensors: dict[str, Tensor], num_frames: int, pending: PendingPass | None = None
    ) -> None:
        self._tensors, self.num_frames, self.pending = tensors, num_frames, pending
        self.spent = False
        """Whether a pass has taken from it."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All past frames by layer, to be read by the caller, who waits for them."""
        self._wait(self._tensors.values())
        return self._tensors

    def shape(self, key: str) -> torch.Size | None:
        """The shape of a layer's past frames; None where there are none. Waits for nothing."""
        return self._tensors[key].shape if key in self._tensors else None

    def take(self, key: str) -> Tensor | None:
        """The past frames of a layer, no longer kept here; None where there are none."""
        if key not in self._tensors:
            return None
        self.spent = True
        tensor = self._tensors.pop(key)
        self._wait([tensor])
        return tensor

    def require_unspent(self) -> None:
        """ValueError where a pass has taken from this state."""
        if self.spent:
            raise ValueError(
                f"the state after {self.num_frames} frames was taken from by a pass that went on "
                "from it or failed; a state is good for one pass: fork() it before, or go on from "
                "a snapshot, or begin anew with None (in a stream, a switch with cut)"
            )

    def fork(self) -> VAEState:
        """A second state that goes on from here on its own.

        It takes no memory until they part; from then on it holds `nbytes`, wherever they lie. At
        832x480 in half precision those are 67 MB of TAEHV and 1.9 GB of the Wan VAE: of that one,
        keep few forks, or keep them on the host (`to`), or decode its last `memory_frames` again.
        """
        forked = VAEState(dict(self._tensors), self.num_frames, self.pending)
        forked.spent = self.spent
        return forked

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> VAEState:
        """A copy on another device or in another dtype."""
        copies = {
            key: past.to(device=device, dtype=dtype, copy=True)
            for key, past in self.tensors.items()
        }
        there = VAEState(copies, self.num_frames)
        there.spent = self.spent
        return there

    @property
    def nbytes(self) -> int:
        """Bytes the tensors take."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def _wait(self, tensors: Collection[Tensor]) -> None:
        if self.pending is not None:
            self.pending.wait(tensors)


class FeatureCache:
    """The past frames that causal convolutions read in one pass over a chunk (Wan's `feat_cache`).

    They are taken from the state before the pass and stored for the one after it. It lives for one
    pass, and tells its layers which `fast_paths` they take. With `keep` off nothing is stored, as
    for a whole clip. ValueError where the state is spent.
    """

    def __init__(self, state: VAEState | None, keep: bool, fast_paths: FastPaths) -> None:
        self.at_start = state is None
        self.fast_paths = fast_paths
        self.past = state or VAEState({}, 0)
        self.past.require_unspent()
        self.next: dict[str, Tensor] | None = {} if keep else None

    def take(self, key: str, x: Tensor) -> Tensor | None:
        """Take the frames the stream had before x [B, C, T, H, W] at layer `key`, None if none.

        Once for each layer. ValueError where x cannot follow them; they are not taken then.
        """
        past = self.past.shape(key)
        if past is not None and (*past[:2], *past[3:]) != (*x.shape[:2], *x.shape[3:]):
            raise ValueError(
                f"{list(x.shape)} at {key} does not continue a stream whose past there is "
                f"{list(past)}; batch and picture size stay the same in a stream: pass None "
                "as the state to begin a new one"
            )
        return self.past.take(key)

    def store(self, key: str, x: Tensor, frames: int) -> None:
        """Keep the last `frames` of x [B, C, T, H, W] for the next pass."""
        # A clone: a view would keep the whole chunk's activations alive.
        if self.next is not None:
            self.next[key] = x[:, :, -frames:].clone(memory_format=_layout_of(x))

    def allocate(self, key: str, x: Tensor, frames: int, channels: int) -> Tensor:
        """A tensor for x [B, C, T, H, W] with the `frames` before it in front; zeros if none.

        The caller writes the rest of the first C of its channels: [B, `channels`, frames + T, H, W]
        in the memory layout of x. The other channels are zeros.
        """
        past = self.take(key, x)
        room = torch.empty(
            (x.shape[0], channels, frames + x.shape[2], *x.shape[3:]),
            dtype=x.dtype,
            device=x.device,
            memory_format=_layout_of(x),
        )
        room[:, x.shape[1] :] = 0
        room[:, : x.shape[1], :frames] = 0 if past is None else past
        return room

    def extend(self, key: str, x: Tensor, frames: int) -> Tensor:
        """x [B, C, T, H, W] with the `frames` before it in front; zeros where none were."""
        room = self.allocate(key, x, frames, x.shape[1])
        room[:, :, frames:] = x
        self.store(key, room, frames)
        return room

    def state(self, num_frames: int) -> VAEState:
        """The state after a pass that consumed `num_frames`; needs `keep`.

        ValueError where the state before it was another network's.
        """
        assert self.next is not None
        if foreign := self.past.tensors:
            raise ValueError(
                f"the state holds the past of {some_keys(foreign)}, which is not in this network: "
                "it belongs to another; pass None to begin a new stream"
            )
        return VAEState(self.next, self.past.num_frames + num_frames)


class Codec(nn.Module, ABC):
    """Latents to pixels and back; the shapes and ranges are each network's own.

    Whole clips (`encode`, `decode`) and chunks of a stream with explicit state (`encode_chunk`,
    `decode_chunk`) give the same, however the stream is cut. A chunk takes the state it is given
    (`VAEState`). ValueError for another shape or, of chunks, a spent state or one of another
    stream.
    """

    fast_paths: FastPaths | None = None
    """How its steps are computed; None for what suits the device."""

    def fast_paths_for(self, x: Tensor) -> FastPaths:
        """How steps over x are computed."""
        return self.fast_paths or FastPaths.on(x.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, F, h, w] -> pixels [B, 3, 4(F-1)+1, 8h, 8w]."""
        return self._decode(
            latents, FeatureCache(None, keep=False, fast_paths=self.fast_paths_for(latents))
        )

    def decode_chunk(self, latents: Tensor, state: VAEState | None) -> tuple[Tensor, VAEState]:
        """The next latents [B, C, F, h, w] of a stream -> pixels [B, 3, T, 8h, 8w], state after.

        `state` is None at the start of a stream, whose first frame gives one image; every other
        gives four.
        """
        feat_cache = FeatureCache(state, keep=True, fast_paths=self.fast_paths_for(latents))
        pixels = self._decode(latents, feat_cache)
        return pixels, feat_cache.state(latents.shape[2])

    def encode(self, video: Tensor) -> Tensor:
        """Video [B, 3, 4k+1, H, W] -> normalised latents [B, C, k+1, H/8, W/8]."""
        return self._encode(
            video, FeatureCache(None, keep=False, fast_paths=self.fast_paths_for(video))
        )

    def encode_chunk(self, video: Tensor, state: VAEState | None) -> tuple[Tensor, VAEState]:
        """The next images [B, 3, T, H, W] of a stream -> latents [B, C, F, H/8, W/8], state after.

        `state` is None at the start of a stream.
        """
        feat_cache = FeatureCache(state, keep=True, fast_paths=self.fast_paths_for(video))
        latents = self._encode(video, feat_cache)
        return latents, feat_cache.state(video.shape[2])

    @property
    @abstractmethod
    def memory_frames(self) -> int:
        """See `Decoder.memory_frames`."""

    @property
    @abstractmethod
    def source_memory_images(self) -> int:
        """See `Decoder.source_memory_images`."""

    @abstractmethod
    def _decode(self, latents: Tensor, feat_cache: FeatureCache) -> Tensor: ...

    @abstractmethod
    def _encode(self, video: Tensor, feat_cache: FeatureCache) -> Tensor: ...


def memory_frames(steps: Sequence[tuple[int, int]]) -> int:
    """Frames that all a decoder's layers together look back on, in frames of its first layer.

    Each of `steps`, in their order, looks back on so many frames, then makes so many of each.
    """
    frames = 0
    for past, made in reversed(steps):
        frames = past - (-frames // made)
    return frames


def source_memory_images(steps: Sequence[tuple[int, int]]) -> int:
    """Images that all an encoder's layers together look back on.

    Each of `steps`, in their order, looks back on so many frames, then merges so many to one.
    """
    images, frame = 0, 1
    for past, merged in steps:
        images += past * frame
        frame *= merged
    return images


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


def _layout_of(x: Tensor) -> torch.memory_format:
    """The layout of x [B, C, T, H, W], which may be some of the channels of a larger tensor."""
    last = x.stride(1) == 1 and x.shape[1] > 1
    return torch.channels_last_3d if last else torch.contiguous_format


def float32_on_cpu(x: Tensor) -> bool:
    """Whether x is where some steps have a faster form, measured there and equal to rounding."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def convolve_upsampled(conv: nn.Module, x: Tensor, fast_paths: FastPaths) -> Tensor:
    """A 3x3 `conv` over x [N, C, H, W] with each pixel repeated 2x2 -> [N, C', 2H, 2W].

    Folded, taps that meet the same pixel are one, their sum: in half precision it is rounded, as
    weights are.
    """
    if fast_paths.fold_doubling and type(conv) is nn.Conv2d:
        if float32_on_cpu(x):
            return _transposed(conv, x)
        if x.device.type != "cpu" and not torch.is_grad_enabled():
            return convolve_in_phases(conv, x)
    doubled: Tensor = conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    return doubled


def _transposed(conv: nn.Conv2d, x: Tensor) -> Tensor:
    taps = conv.weight.flip(2, 3).transpose(0, 1)
    shifts = ((0, 1, 0, 1), (0, 1, 1, 0), (1, 0, 0, 1), (1, 0, 1, 0))
    kernel = torch.stack([F.pad(taps, shift) for shift in shifts]).sum(0)
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


def convolve_in_phases(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """As `convolve_upsampled`, by one 2x2 convolution, without gradients.

    Even and odd rows and columns of the result are four phases. Each sees 2x2 pixels, which begin
    one further down (right) for odd rows (columns); here they are channels of their own.
    """
    height, width = x.shape[2:]
    phases = F.conv2d(x, _phase_kernels(conv.weight), padding=1).unflatten(1, (2, 2, -1))
    last = x.is_contiguous(memory_format=torch.channels_last)
    out = torch.empty(
        (x.shape[0], conv.out_channels, 2 * height, 2 * width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    for row, column in product(range(2), repeat=2):
        phase = phases[:, row, column, :, row : row + height, column : column + width]
        place = out[:, :, row::2, column::2]
        if conv.bias is None:
            place.copy_(phase)
        else:
            torch.add(phase, conv.bias.view(-1, 1, 1), out=place)
    return out


def _phase_kernels(weight: Tensor) -> Tensor:
    """[C', C, 3, 3] -> [4C', C, 2, 2], even and odd rows, in each even and odd columns."""
    above, at, below = weight.float().unbind(2)
    rows = torch.stack([above, at + below, above + at, below])
    left, at, right = rows.unbind(-1)
    columns = torch.stack([left, at + right, left + at, right])
    kernels = rearrange(columns, "(b x) (a y) o i -> (a b o) i y x", a=2, b=2)
    return kernels.to(weight.dtype)


class LatentScales(Protocol):
    """A config that knows how its latents are normalised."""

    @property
    def latent_mean(self) -> tuple[float, ...]: ...
    @property
    def latent_std(self) -> tuple[float, ...]: ...


def scales(config: LatentScales, like: Tensor) -> tuple[Tensor, Tensor]:
    """Latent mean and std, each [C, 1, 1, 1], in the dtype and on the device of `like`."""
    numbers = torch.tensor([config.latent_mean, config.latent_std], dtype=like.dtype)
    mean, std = to_device(numbers, like.device)
    return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)


def put_channels_last(codec: nn.Module) -> None:
    """Lay out the weights of every convolution with channels last, in place; no value changes.

    Activations follow: norms then read neighbours, and frames are split and joined without copies.
    """
    for conv in codec.modules():
        if isinstance(weight := getattr(conv, "weight", None), nn.Parameter):
            weight.data = weight.data.contiguous(memory_format=_LAYOUTS[weight.ndim])


def check_scales(config: LatentScales, channels: int) -> None:
    """ValueError unless there is a mean and a std for each channel."""
    for name, values in (("latent_mean", config.latent_mean), ("latent_std", config.latent_std)):
        if len(values) != channels:
            raise ValueError(
                f"{name} has {len(values)} values; give one for each of {channels} channels"
            )
    if min(config.latent_std) <= 0:
        raise ValueError(f"latent_std holds {min(config.latent_std)}; every value is above 0")


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
