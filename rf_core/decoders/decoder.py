"""The border between latents and images: what a stream needs of the Wan VAE or TAEHV.

One protocol, two adapters. They handle what differs (pixel range, how a clip ends, dtype) and run
long inputs in parts, so that memory does not follow the input: `group_frames` latent frames are
decoded at once, and one is encoded, as in the published code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from ..weights.files import read_weights
from .codec import RGB, VAEState, put_channels_last
from .taehv import TAEHV, is_taehv, scales_of_file, taehv_of
from .vae import WanVAE
from .vae_files import naming, vae_of

DecoderState = VAEState
# Measured faster on CPUs; on CUDA expected, as its tensor cores want it, and not measured.
_CHANNELS_LAST_DEVICES = ("cpu", "cuda")


class Decoder(Protocol):
    """Latents of a stream to images, and images of a clip or a stream to latents."""

    kind: str
    """Names what made a state: only a decoder of the same kind goes on from it."""

    @property
    def memory_frames(self) -> int:
        """Latent frames after which nothing of what was before them is left in a state.

        Decoded from None, as many leave the state that a longer past leaves, and so every image
        after it: to the bit in whole chunks of the stream's, and after one chunk more where the
        first was cut (`Handoff` shows its first frame alone), which rounds otherwise. Counted from
        the layers.
        """

    @property
    def source_memory_images(self) -> int:
        """Images after which nothing of what was before them is left in an encoder's state.

        `memory_frames` of the stream that is encoded. Counted from the layers.
        """

    @property
    def spatial_factor(self) -> int:
        """Pixels along each side of a latent."""

    @property
    def temporal_factor(self) -> int:
        """Images of each latent frame but a stream's first, which has one."""

    def images_of(self, latent_frames: int, first: bool) -> int:
        """How many images the frames decode to; `first` where they begin a stream."""

    def decode(self, latents: Tensor, state: DecoderState | None) -> tuple[Tensor, DecoderState]:
        """The stream's next normalised latents [B, C, F, h, w] -> images, and the state after.

        Images are float32 [B, T, 3, H, W] in [0, 1]; `state` is None at the start of a stream, and
        taken (`VAEState`): one that fails half way may leave it spent.
        """

    def source_images_of(self, latent_frames: int, first: bool) -> int:
        """How many images the frames are encoded from; `first` where they begin a stream.

        `images_of` for the Wan VAE. TAEHV takes four for each frame, the first too, so that a
        stream of images runs three ahead of the images that are decoded from its latents.
        """

    def encode_chunk(
        self, images: Tensor, state: DecoderState | None
    ) -> tuple[Tensor, DecoderState]:
        """The stream's next images [B, T, 3, H, W] in [0, 1] -> latents, and the state after.

        Latents are normalised, float32 [B, C, F, h, w]; T is `source_images_of` F frames. However a
        stream is cut, each latent frame is encoded by itself behind the state, and so is the same
        to the bit. `state` is as in `decode`, but another than that of the decoded stream.

        ValueError where so many images do not make whole latent frames.
        """

    def encode(self, images: Tensor) -> Tensor:
        """A start clip's images [B, 4k+1, 3, H, W] in [0, 1] -> latents [B, C, k+1, h, w].

        As `encode_chunk`, with the last image repeated where more are needed.
        """


class _Adapter:
    """What both adapters share: sizes, dtype and running in groups.

    With `channels_last` the codec's own weights are put in that memory layout.
    """

    kind: str

    def __init__(
        self,
        codec: WanVAE | TAEHV,
        group_frames: int | None = None,
        channels_last: bool = False,
    ) -> None:
        if group_frames is not None and group_frames < 1:
            raise ValueError(f"group_frames is {group_frames}; use 1 or more, or None for no limit")
        if channels_last:
            put_channels_last(codec)
        self.codec = codec
        self.group_frames = group_frames

    @property
    def memory_frames(self) -> int:
        """See `Decoder.memory_frames`."""
        return self.codec.memory_frames

    @property
    def source_memory_images(self) -> int:
        """See `Decoder.source_memory_images`."""
        return self.codec.source_memory_images

    @property
    def spatial_factor(self) -> int:
        """Pixels along each side of a latent."""
        return self.codec.config.spatial_factor

    @property
    def temporal_factor(self) -> int:
        """Images of each latent frame but a stream's first, which has one."""
        return self.codec.config.temporal_factor

    def images_of(self, latent_frames: int, first: bool) -> int:
        """How many images the frames decode to; `first` where they begin a stream."""
        skipped = self.temporal_factor - 1 if first else 0
        return self.temporal_factor * latent_frames - skipped

    def _decode(self, latents: Tensor, state: DecoderState | None) -> tuple[Tensor, DecoderState]:
        group = self.group_frames or latents.shape[2]
        return _in_turn(self.codec.decode_chunk, self._cast(latents).split(group, dim=2), state)

    def source_images_of(self, latent_frames: int, first: bool) -> int:
        """See `Decoder.source_images_of`."""
        return self.images_of(latent_frames, first)

    def encode_chunk(
        self, images: Tensor, state: DecoderState | None
    ) -> tuple[Tensor, DecoderState]:
        """See `Decoder.encode_chunk`."""
        step, first = self.temporal_factor, self.source_images_of(1, first=state is None)
        check_source(images, first, step, self.spatial_factor)
        video = rearrange(images, "b t c h w -> b c t h w")
        parts = [video[:, :, :first], *video[:, :, first:].split(step, dim=2)]
        pixels = (self._pixels(self._cast(part)) for part in parts if part.shape[2])
        latents, state = _in_turn(self.codec.encode_chunk, pixels, state)
        return latents.float(), state

    def encode(self, images: Tensor) -> Tensor:
        """See `Decoder.encode`."""
        step = self.temporal_factor
        if images.ndim != 5 or images.shape[1] % step != 1:
            raise ValueError(
                f"a start clip is {list(images.shape)}; it must be [batch, {step}k + 1 images, 3, "
                "height, width]: trim it"
            )
        if lacking := self.source_images_of(1, first=True) - 1:
            images = torch.cat([images, images[:, -1:].expand(-1, lacking, -1, -1, -1)], dim=1)
        return self.encode_chunk(images, None)[0]

    def _pixels(self, video: Tensor) -> Tensor:
        """Images in [0, 1] in the codec's range."""
        return video

    def _cast(self, x: Tensor) -> Tensor:
        weights = next(self.codec.parameters())
        return x.to(device=weights.device, dtype=weights.dtype)


class WanDecoder(_Adapter):
    """The Wan VAE as a `Decoder`; decodes `group_frames` latent frames at a time (None: all)."""

    kind = "wan"

    def decode(self, latents: Tensor, state: DecoderState | None) -> tuple[Tensor, DecoderState]:
        """See `Decoder.decode`."""
        pixels, state = self._decode(latents, state)
        return _images_of(pixels.float() / 2 + 0.5), state

    def _pixels(self, video: Tensor) -> Tensor:
        return video * 2 - 1


class TAEHVDecoder(_Adapter):
    """TAEHV as a `Decoder`; decodes `group_frames` latent frames at a time (None: all)."""

    kind = "taehv"

    def decode(self, latents: Tensor, state: DecoderState | None) -> tuple[Tensor, DecoderState]:
        """See `Decoder.decode`."""
        pixels, state = self._decode(latents, state)
        return _images_of(pixels.float()), state

    def source_images_of(self, latent_frames: int, first: bool) -> int:
        """See `Decoder.source_images_of`."""
        return self.temporal_factor * latent_frames


def check_source(images: Tensor, first: int, step: int, side: int) -> None:
    """ValueError unless images [B, T, 3, H, W] make whole latent frames.

    The first of them is made of `first` images, every later one of `step`; height and width are
    multiples of `side`.
    """
    if images.ndim != 5 or images.shape[2] != RGB:
        raise ValueError(
            f"the images to encode are {list(images.shape)}; they must be [batch, images, {RGB}, "
            "height, width]"
        )
    if images.shape[1] < first or (images.shape[1] - first) % step:
        rule = f"{step}k + {first}" if first < step else f"a multiple of {step}"
        raise ValueError(
            f"{images.shape[1]} images do not make whole latent frames; here in the stream their "
            f"number is {rule}: keep what is over for the next part, or repeat the last image"
        )
    height, width = images.shape[3:]
    if height % side or width % side:
        raise ValueError(
            f"the images to encode are {height}x{width}; both must be multiples of {side}; crop or "
            "resize them"
        )


def back_chunks(memory_frames: int, chunk_frames: int) -> int:
    """Chunks to decode again before one, to decode it as if all before had been.

    One more than the decoder remembers: the first that is decoded from nothing may be cut in two,
    and round otherwise.
    """
    return 1 - (-memory_frames // chunk_frames)


def load_decoder(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    group_frames: int | None = None,
    channels_last: bool | None = None,
) -> WanDecoder | TAEHVDecoder:
    """The decoder a .safetensors or .pth file holds: a Wan 2.1 VAE or a TAEHV (`taew2_1`).

    `channels_last` is the memory layout, by default what suits the device.

    ValueError, with the file's path, for a file that is neither.
    """
    if channels_last is None:
        channels_last = torch.device(device).type in _CHANNELS_LAST_DEVICES
    file = read_weights(path)
    with naming(file.path):
        if is_taehv(file.tensors):
            taehv = taehv_of(file.tensors, scales_of_file(file), device, dtype)
            return TAEHVDecoder(taehv, group_frames, channels_last)
        vae = vae_of(file.tensors, file.metadata, device, dtype)
        return WanDecoder(vae, group_frames, channels_last)


def _in_turn(
    run: Callable[[Tensor, VAEState | None], tuple[Tensor, VAEState]],
    parts: Iterable[Tensor],
    state: VAEState | None,
) -> tuple[Tensor, VAEState]:
    done = []
    for part in parts:
        out, state = run(part, state)
        done.append(out)
    assert state is not None
    return torch.cat(done, dim=2), state


def _images_of(pixels: Tensor) -> Tensor:
    images: Tensor = rearrange(pixels.clamp(0, 1), "b c t h w -> b t c h w")
    if images.device.type == "cpu":  # elsewhere reading would wait; `handoff` looks later
        check_images(images.isnan().any())
    return images


def check_images(have_nan: Tensor) -> None:
    """ValueError where a flag, on the CPU, says that decoded images hold NaN."""
    if have_nan:
        raise ValueError(
            "the decoded images hold NaN: the latents are not finite, or float16 is too narrow "
            f"for this decoder (it ends at {torch.finfo(torch.float16).max:.0f}); decode in "
            "bfloat16 or float32"
        )
