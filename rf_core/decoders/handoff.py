"""Images on their way from latents to whoever writes them, while the network runs, and in order.

On CUDA a chunk is decoded on a second stream while the network makes the next one, takes its final
form on the device, and is copied to pinned memory of the host, where a thread waits for it and
delivers it. The thread that drives the network only queues work. On other devices a chunk is
decoded at once, in the caller's thread. The images are the same.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import TracebackType

import torch
from torch import Tensor

from ..video import to_uint8
from .decoder import Decoder, DecoderState, check_images

Deliver = Callable[[Tensor], object]
"""Takes a chunk's images on the CPU, or a part of them, in the form that was asked for; they are
overwritten once it returns. It runs in the handoff's thread where there is one."""


class Handoff:
    """Decodes chunks and delivers their images in order, at most `depth` deliveries behind.

    Use it as a context manager. It waits at its end for all that was submitted, also when the body
    raised: what was decoded is delivered. What `deliver` raises comes out of the next call, and
    nothing more is delivered then.

    Args:
        decoder: what makes images of latents.
        deliver: takes each chunk's images; a stream's first image by itself, with `first_alone`.
        device: where the decoder computes.
        depth: deliveries decoded and not yet made before `submit` waits; 1 or more.
        form: makes what is delivered of images [B, T, 3, H, W]; bytes [B, T, H, W, 3] by default.
        side_stream: whether to decode on a second CUDA stream; None does so on CUDA.
        threaded: whether to deliver in a thread of its own; None does so with a second stream.
        first_alone: whether to decode a stream's first latent frame by itself, so that its image is
            there before the others of its chunk are decoded; None does so with a second stream.
            The images are the same up to rounding. On a CPU the first chunk is a fifth slower so.

    Raises:
        ValueError: depth is below 1.
    """

    def __init__(
        self,
        decoder: Decoder,
        deliver: Deliver,
        *,
        device: torch.device | str = "cpu",
        depth: int = 2,
        convert: Callable[[Tensor], Tensor] = to_uint8,
        side_stream: bool | None = None,
        threaded: bool | None = None,
        first_alone: bool | None = None,
    ) -> None:
        if depth < 1:
            raise ValueError(f"depth is {depth}; keep at least 1 delivery on its way")
        if side_stream is None:
            side_stream = torch.device(device).type == "cuda"
        self._decoder, self._deliver, self._convert = decoder, deliver, convert
        self._first_alone = side_stream if first_alone is None else first_alone
        self._lane = _CudaLane(torch.device(device)) if side_stream else _HostLane()
        self._slots: queue.Queue[_Slot] = queue.Queue()
        for _ in range(depth):
            self._slots.put(_Slot())
        self._pending: queue.Queue[_Slot | None] = queue.Queue()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        if side_stream if threaded is None else threaded:
            self._thread = threading.Thread(target=self._deliver_all, name="handoff", daemon=True)
            self._thread.start()

    def submit(
        self,
        latents: Tensor,
        state: DecoderState | None,
        see: Callable[[Tensor], object] | None = None,
    ) -> DecoderState:
        """Decode the stream's next latents [B, C, F, h, w]; the state after them.

        `see` is given the images [B, T, 3, H, W] in [0, 1] where they are decoded; on CUDA they
        are still being made, as the state is.

        Waits while `depth` deliveries are on their way. On CUDA the state is still being made when
        this returns; whoever reads it waits for it, but for `submit`, which queues behind. The
        state given is taken (`VAEState`).

        Raises:
            ValueError: the latents or the state do not fit, or an earlier chunk's images held NaN.
        """
        if self._first_alone and state is None and latents.shape[2] > 1:
            state = self._submit(latents[:, :, :1], None, see)
            latents = latents[:, :, 1:]
        return self._submit(latents, state, see)

    def _submit(
        self,
        latents: Tensor,
        state: DecoderState | None,
        see: Callable[[Tensor], object] | None,
    ) -> DecoderState:
        slot = self._slots.get()
        try:
            self._raise_failure()
            state = self._lane.decode(partial(self._images, see), latents, state, slot)
        except BaseException:
            self._slots.put(slot)
            raise
        self._pending.put(slot)
        if self._thread is None:
            self._deliver_next()
            self._raise_failure()
        return state

    def flush(self) -> None:
        """Wait until all is delivered."""
        self._pending.join()
        self._raise_failure()

    def close(self) -> None:
        """Deliver what was submitted and end the thread; more than once does no harm."""
        if self._thread is not None:
            self._pending.put(None)
            self._thread.join()
            self._thread = None
        self._lane.join()

    def __enter__(self) -> Handoff:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if error is None:
            self._raise_failure()

    @torch.no_grad()
    def _images(
        self,
        see: Callable[[Tensor], object] | None,
        latents: Tensor,
        state: DecoderState | None,
    ) -> tuple[Tensor, Tensor, DecoderState]:
        """Images as they are delivered, whether any holds NaN, and the state after them."""
        images, state = self._decoder.decode(latents, state)
        if see is not None:
            see(images)
        return self._convert(images), images.isnan().any(), state

    def _deliver_all(self) -> None:
        self._lane.enter_thread()
        while self._deliver_next():
            pass

    def _deliver_next(self) -> bool:
        slot = self._pending.get()
        if slot is None:
            self._pending.task_done()
            return False
        try:
            # After a failure chunks are only let go of, or `submit` would wait for them forever.
            if self._failure is None:
                self._deliver(slot.images())
        except BaseException as failure:
            self._failure = failure
        finally:
            self._slots.put(slot)
            self._pending.task_done()
        return True

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


_Images = Callable[[Tensor, DecoderState | None], tuple[Tensor, Tensor, DecoderState]]


@dataclass
class _Slot:
    """One delivery's way to the host, used again and again."""

    ready: torch.cuda.Event | None = None
    """Recorded once images and flag are on the host; None where they are at once."""
    numbers: Tensor = field(default_factory=lambda: torch.empty(0))
    """Pinned memory, as large as the largest delivery so far; or the images themselves."""
    have_nan: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.bool))
    shape: torch.Size = field(default_factory=torch.Size)

    def images(self) -> Tensor:
        """Wait for the images and give them. ValueError where they held NaN."""
        if self.ready is not None:
            self.ready.synchronize()
        check_images(self.have_nan)
        return self.numbers[: self.shape.numel()].view(self.shape)


class _HostLane:
    """Decodes at once, where the caller is."""

    def decode(
        self, images_of: _Images, latents: Tensor, state: DecoderState | None, slot: _Slot
    ) -> DecoderState:
        images, slot.have_nan, state = images_of(latents, state)
        slot.numbers, slot.shape = images.cpu().flatten(), images.shape
        return state

    def enter_thread(self) -> None:
        pass

    def join(self) -> None:
        pass


class _OnStream:
    """What is queued on a CUDA stream by now, for those who read its results on others."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream, self._done = stream, stream.record_event()

    def wait(self, tensors: Collection[Tensor]) -> None:
        """See `PendingPass.wait`. On the stream itself there is nothing to wait for."""
        reader = torch.cuda.current_stream(self._stream.device)
        if reader != self._stream:
            reader.wait_event(self._done)
            for tensor in tensors:
                tensor.record_stream(reader)


class _CudaLane:
    """Decodes on a second stream and copies to pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _second_stream(device)

    def decode(
        self, images_of: _Images, latents: Tensor, state: DecoderState | None, slot: _Slot
    ) -> DecoderState:
        # The caller's stream made the latents, and a state that comes from a snapshot.
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            self._claim(latents, state)
            images, have_nan, state = images_of(latents, state)
            state.pending = _OnStream(self._stream)
            self._copy(images, have_nan, slot)
        return state

    def _claim(self, latents: Tensor, state: DecoderState | None) -> None:
        # Memory made on another stream could be given away while this one still reads it. Apart
        # from `decode`, where the name of the last tensor would keep it alive.
        for tensor in (latents, *(state.tensors.values() if state else ())):
            tensor.record_stream(self._stream)

    def _copy(self, images: Tensor, have_nan: Tensor, slot: _Slot) -> None:
        if slot.ready is None:
            slot.ready = torch.cuda.Event(blocking=True)  # the thread sleeps instead of spinning
            slot.have_nan = torch.zeros((), dtype=torch.bool, pin_memory=True)
        if slot.numbers.numel() < images.numel() or slot.numbers.dtype != images.dtype:
            slot.numbers = torch.empty(images.numel(), dtype=images.dtype, pin_memory=True)
        slot.shape = images.shape
        slot.numbers[: images.numel()].copy_(images.flatten(), non_blocking=True)
        slot.have_nan.copy_(have_nan, non_blocking=True)
        slot.ready.record(self._stream)

    def enter_thread(self) -> None:
        """Make the card the thread's own: it begins on the first, and would wake that one up."""
        torch.cuda.set_device(self._stream.device)

    def join(self) -> None:
        """Make the caller's stream wait for this one; the host does not."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


@lru_cache(maxsize=64)
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: the allocator keeps what is freed for the stream that it was taken on."""
    return torch.cuda.Stream(device)
