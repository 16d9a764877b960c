"""Images on their way to the host: order, bounds and failures, with and without a thread."""

from __future__ import annotations

import queue
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from rf_core.decoders import handoff as handoff_module
from rf_core.decoders.decoder import DecoderState, WanDecoder
from rf_core.decoders.handoff import Handoff, _CudaLane, _HostLane, _Slot
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


class Behind:
    """As a second stream of a card: what it decodes is queued and done in order, once it may be.

    Until then a state holds other numbers. Threads stand for the streams that read it.
    """

    def __init__(self) -> None:
        self.may, self.queue, self.waited = threading.Event(), queue.Queue(), []
        self._true: dict[int, tuple[Tensor, Tensor]] = {}  # what is shown, and what will be there
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def decode(
        self, images_of: Any, latents: Tensor, state: DecoderState | None, slot: Any
    ) -> DecoderState:
        if state is not None:  # its own stream reads what is queued before, without a wait
            true = {key: self._true[id(shown)][1] for key, shown in state._tensors.items()}
            state = DecoderState(true, state.num_frames)
        after = _HostLane().decode(images_of, latents, state, slot)
        shown = {key: torch.full_like(past, 9e9) for key, past in after._tensors.items()}
        pairs = [(shown[key], past) for key, past in after._tensors.items()]
        self._true |= {id(pair[0]): pair for pair in pairs}
        pending = self.Queued(self.waited)
        self.queue.put((pending.done, pairs))
        return DecoderState(shown, after.num_frames, pending)

    @dataclass
    class Queued:
        waited: list[int]
        done: threading.Event = field(default_factory=threading.Event)

        def wait(self, tensors: Collection[Tensor]) -> None:
            self.waited.append(len(tensors))
            assert self.done.wait(SOON)

    def _work(self) -> None:
        assert self.may.wait(SOON)
        while job := self.queue.get():
            done, pairs = job
            for shown, past in pairs:
                shown.copy_(past)
            done.set()

    def join(self) -> None:
        self.may.set()
        self.queue.put(None)
        self._thread.join(SOON)


class Adding(Counter):
    """A decoder whose state is all it has seen."""

    kind = "adding"

    def decode(self, latents: Tensor, state: DecoderState | None) -> tuple[Tensor, DecoderState]:
        before = 0 if state is None else state.take("sum")
        done = 0 if state is None else state.num_frames
        return super().decode(latents, None)[0], DecoderState({"sum": latents + before}, done + 1)


def in_a_thread(run: Callable[[], Any], opening: threading.Event) -> Any:
    """What a reader gets who has to wait until `opening`."""
    found: list[Any] = []
    reader = threading.Thread(target=torch.no_grad()(lambda: found.append(run())))
    reader.start()
    reader.join(0.1)
    assert reader.is_alive() and not found
    opening.set()
    reader.join(SOON)
    return found[0]


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

    with Handoff(decoder, keep, threaded=threaded, convert=lambda images: images[0]) as handoff:
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


READS = {
    "tensors": lambda decoder, state: state.tensors,
    "a copy": lambda decoder, state: state.to("cpu").tensors,
    "a fork": lambda decoder, state: state.fork().tensors,
    "a fork's fork, decoded from": lambda decoder, state: (
        decoder.decode(latents(2), state.fork().fork())[1].tensors
    ),
    "the state, decoded from": lambda decoder, state: decoder.decode(latents(2), state)[1].tensors,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@torch.no_grad()
def test_who_reads_a_state_waits_until_it_is_made_and_the_next_chunk_does_not(
    read: Callable[..., Any],
) -> None:
    decoder, lane = wan_decoder(), Behind()
    with Handoff(decoder, lambda images: None) as handoff:
        handoff._lane = lane
        state = handoff.submit(latents(0), None)
        state = handoff.submit(latents(1), state)
        state.nbytes, state.fork()
        assert not lane.waited
        found = in_a_thread(lambda: read(decoder, state), lane.may)
    twin = None
    for chunk in range(2):
        _, twin = decoder.decode(latents(chunk), twin)
    expected = read(decoder, twin)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_snapshot_waits_for_the_decoder_s_state_and_a_clone_of_the_stream_s_does_not() -> None:
    lane, stream = Behind(), tiny.stream(decoder=Adding())
    made = []
    with Handoff(stream.decoder, lambda images: None) as handoff:
        handoff._lane = lane
        for _ in range(3):
            made.append(stream.generate())
            stream.state.decoder = handoff.submit(made[-1], stream.state.decoder)
        clone = stream.state.clone()
        assert not lane.waited
        snapshot = in_a_thread(stream.snapshot, lane.may)
    assert torch.equal(snapshot.tensors["decoder.sum"], sum(made))
    assert torch.equal(clone.decoder.tensors["sum"], sum(made))


def test_on_two_streams_who_reads_waits_for_what_is_read_and_the_next_chunk_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[tuple[str, str, str]] = []
    queued: dict[str, int] = defaultdict(int)

    class Stream:
        device = torch.device("cpu")

        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            log.append((self.name, "waits for", other.name))

        def record_event(self) -> str:
            queued[self.name] += 1
            return f"{self.name} {queued[self.name]}"

        def wait_event(self, event: str) -> None:
            log.append((self.name, "waits for", event))

    network, second = Stream("network"), Stream("second")
    current = [network]

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(handoff_module, "_second_stream", lambda device: second)
    monkeypatch.setattr(_CudaLane, "_copy", lambda *_: None)
    monkeypatch.setattr(
        Tensor, "record_stream", lambda _, stream: log.append((stream.name, "keeps", "memory"))
    )
    lane, decoder, state = _CudaLane(torch.device("cpu")), Adding(), None

    def images_of(z: Tensor, state: DecoderState | None) -> tuple[Tensor, Tensor, DecoderState]:
        images, state = decoder.decode(z, state)
        return images, torch.zeros(()), state

    for _ in range(2):
        state = lane.decode(images_of, torch.ones(1, 1, 1, 2, 2), state, _Slot())
    fork = state.fork()
    behind, kept = ("second", "waits for", "network"), ("second", "keeps", "memory")
    assert log == [behind, kept, behind, kept, kept]  # latents; latents and the state
    log.clear()
    state = lane.decode(images_of, torch.ones(1, 1, 1, 2, 2), state, _Slot())
    log.clear()
    assert fork.tensors["sum"].unique().tolist() == [2]
    assert state.tensors["sum"].unique().tolist() == [3]
    kept = ("network", "keeps", "memory")
    waits = [("network", "waits for", f"second {number}") for number in (2, 3)]
    assert log == [waits[0], kept, waits[1], kept]


@CUDA
@torch.no_grad()
def test_on_cuda_who_reads_a_state_on_another_stream_waits_for_it_there() -> None:
    decoder, reading = wan_decoder("cuda"), torch.cuda.Stream()
    decode = decoder.decode

    def slow(z: Tensor, state: DecoderState | None) -> tuple[Tensor, DecoderState]:
        torch.cuda._sleep(200_000_000)  # clock cycles: about a tenth of a second
        return decode(z, state)

    state = twin = None
    for chunk in range(2):
        _, twin = decode(latents(chunk).cuda(), twin)
    expected = {key: past.cpu() for key, past in twin.fork().tensors.items()}
    after = decode(latents(2).cuda(), twin)[1].to("cpu").tensors
    chunks = [latents(chunk).cuda() for chunk in range(3)]
    decoder.decode = slow
    with Handoff(
        decoder, lambda images: None, device="cuda", depth=8, first_alone=False
    ) as handoff:
        for chunk in chunks[:2]:
            state = handoff.submit(chunk, state)
        forks = [state.fork(), state.fork()]
        handoff.submit(chunks[2], state)
        with torch.cuda.stream(reading):
            found = forks[0].to("cpu").tensors
            on = decode(chunks[2], forks[1])[1].to("cpu").tensors
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(torch.equal(on[key], after[key]) for key in after)


@CUDA
@torch.no_grad()
def test_on_cuda_a_fork_s_memory_is_not_given_away_while_another_stream_reads_it() -> None:
    decoder, reading = wan_decoder("cuda"), torch.cuda.Stream()
    with Handoff(decoder, lambda images: None, device="cuda", first_alone=False) as handoff:
        state = handoff.submit(latents(0).cuda(), None)
        handoff.flush()
        expected = state.to("cpu").tensors
        with torch.cuda.stream(reading):
            pasts = list(state.tensors.values())
            torch.cuda._sleep(200_000_000)
            found = [past.clone() for past in pasts]
        del pasts, state
        with torch.cuda.stream(handoff._lane._stream):  # takes what is free there, and overwrites
            for past in expected.values():
                for _ in range(4):
                    torch.full_like(past, 9e9, device="cuda")
        reading.synchronize()
    assert all(map(torch.equal, (past.cpu() for past in found), expected.values()))


@CUDA
@torch.no_grad()
def test_on_cuda_a_stream_s_first_image_is_delivered_alone() -> None:
    delivered = Delivered()
    with Handoff(wan_decoder("cuda"), delivered, device="cuda") as handoff:
        handoff.submit(latents(0).cuda(), None)
    assert delivered.counts == [1, 8]


@CUDA
@pytest.mark.parametrize("convert", [to_uint8, Tensor.float], ids=["bytes", "floats"])
@torch.no_grad()
def test_on_cuda_the_images_are_those_of_the_default_stream(
    convert: Callable[[Tensor], Tensor],
) -> None:
    decoder, done, expected = wan_decoder("cuda", torch.bfloat16), [], []
    state = twin = None

    def keep(images: Tensor) -> None:
        done.append(images.clone())

    with Handoff(decoder, keep, device="cuda", convert=convert, first_alone=False) as handoff:
        for chunk in range(8):
            state = handoff.submit(latents(chunk).cuda(), state)
            images, twin = decoder.decode(latents(chunk).cuda(), twin)
            expected.append(convert(images).cpu())
        kept = {key: tensor.clone() for key, tensor in state.tensors.items()}
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(done, expected, strict=True))
    assert all(torch.equal(kept[key], twin.tensors[key]) for key in twin.tensors)
