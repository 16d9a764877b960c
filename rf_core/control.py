"""Control as VACE defines it: a video, a mask and pictures as the context of a stream's chunks.

Of each chunk the video's kept part (inactive), its part to be made anew (reactive) and the mask
are laid together to 96 channels (VACE, arXiv 2503.07598, sec. 3.2). Both parts are encoded as
streams of their own, so that any cut gives the bits of the whole and memory is a chunk's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from .config import FPS, SPATIAL_FACTOR, TEMPORAL_FACTOR
from .decoders.decoder import DecoderState
from .ranges import STRONGEST_CONTROL
from .source import ChunkEncoder, ImageReader, encode_next, on_white
from .vace import Control
from .video import letterbox

if TYPE_CHECKING:
    from .stream import Stream

ENCODINGS = 2
"""Streams of images that are encoded of a control video: what is kept of it, and what is not."""
GREY = 0.5
"""What stands for no picture, in [0, 1]: 0 in the encoder's range."""
MASK_CHANNELS = SPATIAL_FACTOR**2
"""Pixels of a mask that a latent stands for, each a channel of its own."""
_SAME_SHAPE = 0.02  # as much as a side that is rounded to a multiple of 8 changes it
_PAPER = 1.0  # around a reference picture of another shape: white, as in VACE


def parts_of(images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Images [T, 3, H, W] and a mask [T, 1, H, W], in [0, 1] -> inactive and reactive images.

    A pixel is in one of the two, by what its mask is nearer to, and grey in the other.
    """
    made = (mask > 0.5).to(images.dtype)
    shown = images - GREY
    return GREY + shown * (1 - made), GREY + shown * made


def packed_mask(mask: Tensor, first_images: int, step: int = TEMPORAL_FACTOR) -> Tensor:
    """A mask [T, 1, H, W] of a chunk's images -> [1, 64, F, h, w], each latent's 8x8 pixels.

    A latent frame is of `step` images, the first one of `first_images`; the one past the middle
    stands for all. VACE takes the nearest image of the whole clip, which an endless stream has not:
    with a mask that moves, its choice lies up to two images later, with one at rest it is the same.
    """
    groups = [mask[:first_images], *mask[first_images:].split(step)]
    chosen = torch.stack([group[len(group) // 2, 0] for group in groups if len(group)])
    side = SPATIAL_FACTOR
    return rearrange(chosen, "f (h p) (w q) -> 1 (p q) f h w", p=side, q=side).float()


@torch.no_grad()
def context_of(images: Tensor, encoder: ChunkEncoder, mask: Tensor | None = None) -> Tensor:
    """The context [1, 96, F, h, w] of a whole clip, images [T, 3, H, W] in [0, 1].

    `mask` [T, 1, H, W] is 1 where the picture is to be made and 0 where it is to be kept; without
    one all is to be made. T is 4 (F - 1) + 1.
    """
    return _Encodings(encoder).context(images, mask)


@torch.no_grad()
def reference_context(images: Tensor, encoder: ChunkEncoder) -> Tensor:
    """The context [1, 96, R, h, w] of reference pictures [R, 3, H, W] in [0, 1], a frame each.

    Each is encoded by itself, kept whole (mask 0), and its reactive part is zeros.
    """
    _require_numbers("a reference picture", images)
    encoded = [_Encoding(encoder).encode(image[None]) for image in images.clamp(0, 1)]
    latents = torch.cat(encoded, dim=2)
    rest = latents.new_zeros(1, latents.shape[1] + MASK_CHANNELS, *latents.shape[2:])
    return torch.cat([latents, rest], dim=1)


def fitted_reference(image: Tensor, height: int, width: int) -> Tensor:
    """A picture [3, H, W] in [0, 1], scaled to lie within [3, height, width], white beside it.

    What a fourth channel says is transparent becomes white as well.
    """
    return letterbox(on_white(rearrange(image, "c h w -> h w c")), width, height, _PAPER)


def shape_note(control: tuple[int, int], mask: tuple[int, int]) -> str | None:
    """What is to be known where a mask has another shape, (height, width), than its video."""
    if math.isclose(control[0] / control[1], mask[0] / mask[1], rel_tol=_SAME_SHAPE):
        return None
    sizes = [f"{width}x{height}" for height, width in (mask, control)]
    return (
        f"the mask is {sizes[0]} and the control video {sizes[1]}: each is cut to the picture by "
        "itself, so give them one shape where they are to lie over each other"
    )


class ControlSource:
    """A control video and its mask as the context of a stream's chunks, in turn.

    Image n of both is that of the video's image n; without a video all is grey, to be made by the
    prompt and the references alone. A chunk is controlled whose middle lies from `start` on and
    before `end`, in seconds of the video. Readers give images at the stream's size and rate and
    say what follows their end; where the one that stops first has ended, so has the control.
    `references` are pictures [R, 3, H, W] that the video refers to from its beginning, or a cut, on
    (`Stream.refer_to`). A stream that goes on in its midst begins at a `place`: an image of the
    control, and the one that the decoder's stream began with. `facts` gives what a log says of it
    all, as `Source.facts`.
    ValueError for a mask without a video and for an `end` that is not after the `start`.
    """

    def __init__(
        self,
        encoder: ChunkEncoder,
        images: ImageReader | None = None,
        mask: ImageReader | None = None,
        *,
        height: int,
        width: int,
        references: Tensor | None = None,
        start: float = 0.0,
        end: float | None = None,
        fps: int = FPS,
        place: tuple[int, int] = (0, 0),
        facts: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        check_times(start, end)
        if mask is not None and images is None:
            raise ValueError("a mask says which part of a control video is kept; give one with it")
        self._encoder, self._size, self._facts = encoder, (height, width), facts
        self._references, self._place = references, place
        self._referred: Tensor | None = None
        self._step = encoder.source_images_of(1, first=False)
        self._readers = [each for each in (images, mask) if each is not None]
        self._from, self._until = start * fps, math.inf if end is None else end * fps
        self._encodings = _Encodings(encoder)
        self._image = self._since = self._read = 0
        self._continues = self._ended = False

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `Source.facts`."""
        return self._facts()

    def next(
        self, stream: Stream, images: int, since: int = 0, *, strength: float = 1.0
    ) -> Control | None:
        """The control of a stream's next chunk; None for none.

        The chunk begins with image number `images` after the place; `since` is as in `Source.seek`.
        """
        self.refer(stream, strength=strength)
        begin, begun = self._place
        image, since = begin + images, begin + since if since else begun
        if image != self._image:
            self.seek(image, since)
        # A chunk that is made again is not always decoded: no past says nothing then.
        first = stream.decodes_afresh and image == since
        context = self.context(stream.next_frames, first=first)
        return None if context is None else Control(context=context, strength=strength)

    def refer(self, stream: Stream, *, strength: float = 1.0) -> None:
        """Let a stream without a past refer to the pictures; before its first chunk, and anew after
        a cut. Of one that has begun nothing is changed."""
        if self._references is None or stream.state.cache.num_frames:
            return
        if self._referred is None:
            self._referred = reference_context(self._references, self._encoder)
        stream.refer_to(Control(context=self._referred, strength=strength))

    @property
    def since(self) -> int:
        """The control's image that the decoder's stream of the last chunk began with."""
        return self._since

    @torch.no_grad()
    def context(self, frames: int, *, first: bool) -> Tensor | None:
        """The context [1, 96, F, h, w] of the next so many latent frames; None for no control.

        `first` where the chunk begins a decoder's stream, as of `Source.latents`. ValueError where
        the control ends within the first chunk, and for images that hold NaN.
        """
        begin, count = self._image, self._step * frames - (self._step - 1) * first
        self._image += count
        if first:
            self._since, self._continues = begin, False
        active = self._from <= begin + count / 2 < self._until
        continues, context = self._continues, None
        self._continues = False  # one that fails does not
        if active and not self._ended and (continues or self._begin(begin, first)):
            context = self._next(count)
        if self._ended and not begin:
            raise ValueError(
                f"{' or '.join(reader.name for reader in self._readers)} has fewer images than the "
                f"{count} of a stream's first chunk; give a longer one, or let it hold or loop at "
                "its end"
            )
        self._continues = context is not None
        return context

    def seek(self, images: int, since: int = 0) -> None:
        """See `Source.seek`."""
        self._image, self._since = images, since
        self._continues = self._ended = False

    def close(self) -> None:
        """Let go of what is read; `next` reads it again."""
        self._continues, self._read = False, -1
        for reader in self._readers:
            reader.close()

    def attach(self, encoder: ChunkEncoder) -> None:
        """Go on, to the bit, with another encoder of the same kind."""
        self._encoder, self._continues = encoder, False

    def _begin(self, image: int, first: bool) -> bool:
        """Encode as many images before one as an encoder remembers; whether it has not ended."""
        self._encodings = _Encodings(self._encoder)
        if first:
            self._seek(image)
            return True
        groups = -(-self._encoder.source_memory_images // self._step)
        groups = min(groups, max(0, image - self._since - 1) // self._step)
        # A stream that was not controlled from its beginning: its first image stands for the past.
        self._seek(max(image - 1 - groups * self._step, self._since))
        begun = all(self._next(count) is not None for count in (1, *[self._step] * groups))
        self._seek(image)
        return begun

    def _seek(self, image: int) -> None:
        if image != self._read:
            for reader in self._readers:
                reader.seek(image)
        self._read = image

    def _next(self, count: int) -> Tensor | None:
        """The context of the next so many images; None at the end."""
        taken = [reader.take(count) for reader in self._readers]
        self._read += count
        found = [each for each in taken if each is not None]
        if len(found) < len(taken):
            self._ended = True
            return None
        images, *masks = found or [torch.full((count, 3, *self._size), GREY)]
        mask = masks[0].mean(dim=1, keepdim=True) if masks else None
        return self._encodings.context(images, mask)


class _Encodings:
    """The encodings of both parts, at one place in their streams."""

    def __init__(self, encoder: ChunkEncoder) -> None:
        self._encoder = encoder
        self._inactive, self._reactive = _Encoding(encoder), _Encoding(encoder)

    def context(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """That of the next images [T, 3, H, W] with their mask [T, 1, H, W]."""
        _require_numbers("the control video", images)
        images = images.clamp(0, 1)
        mask = torch.ones_like(images[:, :1]) if mask is None else mask.clamp(0, 1)
        _require_numbers("the mask", mask)
        step = self._encoder.source_images_of(1, first=False)
        packed = packed_mask(mask, step if self._inactive.state else 1, step)
        inactive, reactive = parts_of(images, mask)
        latents = self._inactive.encode(inactive), self._reactive.encode(reactive)
        return torch.cat([*latents, packed.to(latents[0].device)], dim=1)


class _Encoding:
    """The encoding of one part; where nothing has moved for long, it is repeated and not redone."""

    def __init__(self, encoder: ChunkEncoder) -> None:
        self._encoder = encoder
        self.state: DecoderState | None = None
        self._last: Tensor | None = None
        self._frame: Tensor
        self._still = 0  # images alike, of whole chunks

    def encode(self, images: Tensor) -> Tensor:
        """Latents [1, C, F, h, w] of the next images [T, 3, H, W]."""
        before = images[:1] if self._last is None else self._last
        still = bool((images == before).all())
        step = self._encoder.source_images_of(1, first=False)
        if still and self._still >= self._encoder.source_memory_images + step:
            return self._frame.expand(-1, -1, len(images) // step, -1, -1)
        latents, self.state = encode_next(self._encoder, images, self.state)
        self._still = self._still + len(images) if still else 0
        self._last, self._frame = images[-1:].clone(), latents[:, :, -1:].clone()
        return latents


def check_control_strength(strength: float) -> None:
    """ValueError for a strength that is no number from 0 to `STRONGEST_CONTROL`."""
    if not 0 <= strength <= STRONGEST_CONTROL:
        raise ValueError(
            f"the control's strength is {strength}; give a number from 0 to {STRONGEST_CONTROL:g}"
        )


def check_times(start: float, end: float | None) -> None:
    """ValueError for times, in seconds, that nothing lies between."""
    if end is not None and not end > start:
        raise ValueError(
            f"control ends at {end:g} s and starts at {start:g} s; let it end after it starts"
        )


def _require_numbers(what: str, images: Tensor) -> None:
    if images.isnan().any():
        raise ValueError(f"{what} holds values that are no numbers (NaN); give another")
