"""Images on their way to the host: order, bounds and failures, with and without a thread."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rf_core.decoders.decoder import DecoderState, WanDecoder
from rf_core.decoders.handoff import Handoff
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.video import to_uint8

BOTH = pytest.mark.parametrize("threaded", [False, True], ids=["at once", "threaded"])
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
DEPTH = 2
SOON = 10.0  # seconds


class Counter:
    """A decoder whose images all show how many chunks came before."""

    spatial_factor = temporal_factor = 1

    def images_of(self, latent_frames: int, first: bool) -> int:
        return latent_frames

    def decode(self, latents: Tensor, state: DecoderState | None) -> tuple[Tensor, DecoderState]:
        number = state.num_frames if state else 0
        images = latents.new_full((1, 1 + number % 2, 3, 2, 2), number / 255)
        return images, DecoderState({}, number + 1)

    def encode(self, images: Tensor) -> Tensor:
        raise NotImplementedError


class Delivered:
    """Keeps what it is given, once it may."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.numbers: list[int] = []
        self.counts: list[int] = []
        self.open = threading.Event()
        self.open.set()
        self.fail_at = fail_at

    def __call__(self, images: Tensor) -> None:
        assert self.open.wait(SOON)
        if len(self.numbers) == self.fail_at:
            raise OSError("the disk is full")
        self.numbers.append(int(images.flatten()[0]))
        self.counts.append(images.shape[1])


def submit(handoff: Handoff, chunks: int, state: DecoderState | None = None) -> DecoderState:
    for _ in range(chunks):
        state = handoff.submit(torch.zeros(1, 1, 1, 2, 2), state)
    assert state is not None
    return state


def wan_decoder(device: str = "cpu", dtype: torch.dtype = torch.float32) -> WanDecoder:
    torch.manual_seed(0)
    vae = WanVAE(VAEConfig(dim=4, num_res_blocks=1), device=device, dtype=dtype)
    return WanDecoder(vae.eval().requires_grad_(False))


def latents(chunk: int) -> Tensor:
    return torch.randn(1, 16, 3, 2, 3, generator=torch.Generator().manual_seed(chunk))


@BOTH
def test_every_chunk_is_delivered_once_and_in_order(threaded: bool) -> None:
    delivered = Delivered()
    with Handoff(Counter(), delivered, threaded=threaded) as handoff:
        state = submit(handoff, 7)
    assert delivered.numbers == [*range(7)] and state.num_frames == 7
    assert delivered.counts == [1, 2, 1, 2, 1, 2, 1]


@BOTH
@torch.no_grad()
def test_the_bytes_are_those_of_decoding_without_a_handoff(threaded: bool) -> None:
    decoder, done, expected = wan_decoder(), [], []
    state = twin = None
    with Handoff(decoder, lambda images: done.append(images.clone()), threaded=threaded) as handoff:
        for chunk in range(4):
            state = handoff.submit(latents(chunk), state)
            images, twin = decoder.decode(latents(chunk), twin)
            expected.append(to_uint8(images))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(done, expected, strict=True))
    assert all(torch.equal(state.tensors[key], twin.tensors[key]) for key in twin.tensors)


@BOTH
@torch.no_grad()
def test_images_are_delivered_in_the_form_that_is_asked_for(threaded: bool) -> None:
    decoder, done = wan_decoder(), []

    def keep(images: Tensor) -> None:
        done.append(images.clone())

    with Handoff(decoder, keep, threaded=threaded, form=lambda images: images[0]) as handoff:
        handoff.submit(latents(0), None)
    assert torch.equal(done[0], decoder.decode(latents(0), None)[0][0])


@BOTH
@torch.no_grad()
def test_a_stream_s_first_image_comes_before_the_others_are_decoded(threaded: bool) -> None:
    decoder, events = wan_decoder(), []
    decode = decoder.decode

    def watched(z: Tensor, state: DecoderState | None) -> tuple[Tensor, DecoderState]:
        events.append(("decode", z.shape[2]))
        return decode(z, state)

    decoder.decode = watched
    state, done = None, []

    def deliver(images: Tensor) -> None:
        events.append(("deliver", images.shape[1]))
        done.append(images.clone())

    with Handoff(decoder, deliver, depth=1, threaded=threaded, first_alone=True) as handoff:
        for chunk in range(2):
            state = handoff.submit(latents(chunk), state)
    assert events == [
        *(("decode", 1), ("deliver", 1), ("decode", 2), ("deliver", 8)),
        *(("decode", 3), ("deliver", 12)),
    ]
    whole, twin = decode(latents(0), None)
    expected = torch.cat([whole, decode(latents(1), twin)[0]], dim=1)
    apart = to_uint8(expected).int() - torch.cat(done, dim=1).int()
    assert apart.abs().max() <= 1  # rounding


@BOTH
def test_a_first_frame_is_told_apart_only_where_asked_for_or_on_a_second_stream(
    threaded: bool,
) -> None:
    delivered = Delivered()
    with Handoff(wan_decoder(), delivered, threaded=threaded) as handoff:
        handoff.submit(latents(0), None)
    assert delivered.counts == [9]
    delivered = Delivered()
    with Handoff(wan_decoder(), delivered, threaded=threaded, first_alone=True) as handoff:
        handoff.submit(latents(0)[:, :, :1], None)
    assert delivered.counts == [1]


def test_no_more_than_depth_chunks_are_on_their_way() -> None:
    delivered = Delivered()
    delivered.open.clear()
    with Handoff(Counter(), delivered, depth=DEPTH, threaded=True) as handoff:
        state = submit(handoff, DEPTH)
        late = threading.Thread(target=submit, args=(handoff, 1, state))
        late.start()
        late.join(0.2)
        assert late.is_alive() and delivered.numbers == []
        delivered.open.set()
        late.join(SOON)
        assert not late.is_alive()
    assert delivered.numbers == [*range(DEPTH + 1)]


def test_a_flush_waits_until_all_is_delivered() -> None:
    delivered = Delivered()
    delivered.open.clear()
    with Handoff(Counter(), delivered, threaded=True) as handoff:
        submit(handoff, DEPTH)
        opening = threading.Timer(0.1, delivered.open.set)
        opening.start()
        handoff.flush()
        assert delivered.numbers == [*range(DEPTH)]


@BOTH
def test_what_delivery_raises_comes_out_and_leaves_nothing_hanging(threaded: bool) -> None:
    delivered = Delivered(fail_at=1)
    with (
        pytest.raises(OSError, match="the disk is full"),
        Handoff(Counter(), delivered, depth=DEPTH, threaded=threaded) as handoff,
    ):
        submit(handoff, 3 * DEPTH)
    assert delivered.numbers == [0]
    assert "handoff" not in {thread.name for thread in threading.enumerate()}


@BOTH
def test_a_failure_after_the_last_chunk_comes_out_at_the_end(threaded: bool) -> None:
    with (
        pytest.raises(OSError, match="the disk is full"),
        Handoff(Counter(), Delivered(fail_at=0), threaded=threaded) as handoff,
    ):
        submit(handoff, 1)


@BOTH
def test_what_was_decoded_is_delivered_when_the_run_is_stopped(threaded: bool) -> None:
    delivered = Delivered()
    with (
        pytest.raises(KeyboardInterrupt),
        Handoff(Counter(), delivered, threaded=threaded) as handoff,
    ):
        submit(handoff, 2)
        raise KeyboardInterrupt
    assert delivered.numbers == [0, 1]
    assert "handoff" not in {thread.name for thread in threading.enumerate()}


@BOTH
def test_latents_that_do_not_fit_take_no_place(threaded: bool) -> None:
    delivered = []
    with Handoff(wan_decoder(), delivered.append, depth=1, threaded=threaded) as handoff:
        for _ in range(2):
            with pytest.raises(ValueError, match="batch, 16, frames"):
                handoff.submit(torch.zeros(1, 4, 3, 2, 2), None)
        handoff.submit(latents(0), None)
    assert len(delivered) == 1


@BOTH
def test_images_with_nan_are_refused_with_the_remedy(threaded: bool) -> None:
    with (
        pytest.raises(ValueError, match=r"NaN.*float16.*bfloat16 or float32"),
        Handoff(Counter(), Delivered(), threaded=threaded) as handoff,
    ):
        handoff._decoder.decode = lambda z, state: (z.new_full((1, 1, 3, 2, 2), torch.nan), None)
        handoff.submit(torch.zeros(1, 1, 1, 2, 2), None)


@BOTH
def test_images_are_made_without_gradients_whatever_the_caller_s_mode(threaded: bool) -> None:
    modes = []

    class Watched(Counter):
        def decode(self, *given: Any) -> tuple[Tensor, DecoderState]:
            modes.append(torch.is_grad_enabled())
            return super().decode(*given)

    with torch.enable_grad(), Handoff(Watched(), Delivered(), threaded=threaded) as handoff:
        submit(handoff, 2)
    assert modes == [False, False]


@BOTH
@torch.no_grad()
def test_a_handoff_takes_the_state_it_is_given(threaded: bool) -> None:
    with Handoff(wan_decoder(), lambda images: None, threaded=threaded) as handoff:
        state = handoff.submit(latents(0), None)
        pasts = [weakref.ref(tensor) for tensor in state.tensors.values()]
        handoff.submit(latents(1), state)
        assert {past() for past in pasts} == {None}
        with pytest.raises(ValueError, match=r"after 3 frames was taken from"):
            handoff.submit(latents(1), state)


def test_a_depth_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"depth is 0.*at least 1"):
        Handoff(Counter(), Delivered(), depth=0)


@CUDA
@torch.no_grad()
def test_on_cuda_a_stream_s_first_image_is_delivered_alone() -> None:
    delivered = Delivered()
    with Handoff(wan_decoder("cuda"), delivered, device="cuda") as handoff:
        handoff.submit(latents(0).cuda(), None)
    assert delivered.counts == [1, 8]


@CUDA
@pytest.mark.parametrize("form", [to_uint8, Tensor.float], ids=["bytes", "floats"])
@torch.no_grad()
def test_on_cuda_the_images_are_those_of_the_default_stream(
    form: Callable[[Tensor], Tensor],
) -> None:
    decoder, done, expected = wan_decoder("cuda", torch.bfloat16), [], []
    state = twin = None

    def keep(images: Tensor) -> None:
        done.append(images.clone())

    with Handoff(decoder, keep, device="cuda", form=form, first_alone=False) as handoff:
        for chunk in range(8):
            state = handoff.submit(latents(chunk).cuda(), state)
            images, twin = decoder.decode(latents(chunk).cuda(), twin)
            expected.append(form(images).cpu())
        handoff.flush()
        kept = {key: tensor.clone() for key, tensor in state.tensors.items()}
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(done, expected, strict=True))
    assert all(torch.equal(kept[key], twin.tensors[key]) for key in twin.tensors)
