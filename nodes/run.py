"""A run of the Streaming Sampler: chunks to a file, a preview and what the sockets carry."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any
from uuid import uuid4

import torch
from einops import rearrange
from torch import Tensor

from ..rf_core.config import CacheConfig, SamplerConfig
from ..rf_core.decoders.handoff import Handoff
from ..rf_core.pace import Pace
from ..rf_core.prompts import ChunkClock, ResolvedEntry, clip_notes
from ..rf_core.state import Snapshot, cache_config_of
from ..rf_core.stream import Chunk, Stream
from ..rf_core.video import RUN, VideoFormat, VideoWriter, remux, to_uint8
from . import host, reuse
from .decoders import StockTAEHVDecoder, StockWanDecoder
from .join import Head
from .report import Report
from .types import UNITS, Timeline


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a run is asked to make."""

    model: Any
    """The MODEL."""
    prompts: Timeline
    length: float
    """In `unit`s."""
    unit: str
    """seconds, frames or chunks."""
    width: int
    height: int
    seed: int
    sampler: SamplerConfig
    cache: CacheConfig
    decoder: StockWanDecoder | StockTAEHVDecoder | None
    path: Path | None
    """The MP4 to write; None without a decoder."""
    metadata: dict[str, str]
    """Kept in the file."""
    start_latents: Tensor | None
    """Normalised latents [1, C, F, h, w] the video begins with."""
    snapshot: Snapshot | None
    """The state it goes on from."""
    keep_images: int
    """Last images for the IMAGE socket; -1 for all."""
    keep_latents: int
    """Last latent frames for the LATENT socket; -1 for all."""
    head: Head | None = None
    """The video that the file begins with."""
    node_id: str | None = None
    """The node that shows the images as they are made."""

    @property
    def clip_chunks(self) -> int:
        """Chunks that `start_latents` give."""
        frames = 0 if self.start_latents is None else self.start_latents.shape[2]
        return int(frames // self.cache.chunk_frames)


@dataclass
class Made:
    """What a run has made so far."""

    latents: deque[Tensor] = field(default_factory=deque)
    images: deque[Tensor] = field(default_factory=deque)
    num_images: int = 0
    """Images in the file, those that it begins with included."""
    num_frames: int = 0
    """Latent frames, those of an earlier run included."""
    before: int = 0
    """Chunks of the stream when the run began."""
    chunks: int = 0
    """Chunks handed on, counted from there."""
    reused: int = 0
    """Those of them that were taken over from an earlier run."""
    goes_on: bool = False
    """Stopped, and a later run of the same request can go on."""
    run: str = field(default_factory=lambda: uuid4().hex)
    """Names the run in its file."""
    report: Report = field(default_factory=Report)
    stream: Stream | None = None
    """At its end."""


def plan(request: Request) -> tuple[tuple[ResolvedEntry, ...], int]:
    """The prompts with their chunks, counted from where the run begins, and its chunks.

    Prompts past its end are left out, so that a long timeline can be tried in a short run;
    `prompt_notes` names them. ValueError for a timeline, or a state, that does not fit.
    """
    if request.snapshot is not None:
        facts = request.snapshot.facts
        size = f"{facts['width']}x{facts['height']}"
        if size != f"{request.width}x{request.height}":
            raise ValueError(
                f"the state is of a video of {size}, this one is {request.width}x{request.height}; "
                f"set width and height to {size}"
            )
        if cache_config_of(request.snapshot) != request.cache:
            raise ValueError(
                "the state was made with another window, sink or decay than EMA-Sink Config asks "
                "for; disconnect it and the state's own are used"
            )
    clock = clock_of(request)
    timeline = request.prompts.timeline
    total = timeline.num_chunks(request.length, UNITS[request.unit], clock)
    return tuple(entry for entry in _resolved(request, total) if entry.chunk < total), total


def prompt_notes(request: Request) -> list[str]:
    """The prompts that are not seen, or begin later than was asked for, a line for each."""
    prompts, total = plan(request)
    late = [entry for entry in _resolved(request, total) if entry.chunk >= total]
    return clip_notes(prompts) + [
        f"ignored: {shorten(each.text, 40, placeholder='...')!r}, at {each.requested_seconds:g} "
        "s: the video ends before; make it longer to see it"
        for entry in late
        for each in (*entry.instead_of, entry)
    ]


def _resolved(request: Request, total: int) -> tuple[ResolvedEntry, ...]:
    if total < 1:
        raise ValueError(
            f"length is {request.length:g} {request.unit}; a video has 1 chunk or more"
        )
    timeline = request.prompts.timeline
    parts = any(entry.unit == "part" for entry in timeline.entries)
    return timeline.resolve(clock_of(request), total if parts else None)


def clock_of(request: Request) -> ChunkClock:
    """Where the chunks of a run lie, cuts aside."""
    return ChunkClock(
        chunk_frames=request.cache.chunk_frames,
        fresh=request.snapshot is None,
        clip_chunks=request.clip_chunks,
    )


def open_stream(request: Request, first: ResolvedEntry) -> Stream:
    """The stream at its start, or at the state it goes on from."""
    embeds = request.prompts.embeds[first.text]
    stream = Stream(
        host.Hosted(request.model),
        embeds,
        height=request.height,
        width=request.width,
        decoder=request.decoder,
        seed=request.seed,
        cache=request.cache,
        sampler=request.sampler,
        device=request.model.load_device,
        dtype=host.student_of(request.model).get_dtype_inference(),
    )
    if request.snapshot is not None:
        new = stream.state.prompt_embeds
        stream.restore(request.snapshot)
        stream.state.seed = request.seed
        if not torch.equal(stream.state.prompt_embeds, new):
            stream.switch(embeds, first.switch)
    return stream


def chunks(
    request: Request,
    stream: Stream,
    prompts: tuple[ResolvedEntry, ...],
    numbers: range,
    progress: Any,
    pace: Pace,
) -> Iterator[Chunk]:
    """The chunks of a run, prompts changed on the way; images only of those it begins with."""
    if request.start_latents is not None and not numbers.start:
        yield from stream.start_from(request.start_latents)
    given = 0 if numbers.start else request.clip_chunks
    progress.given(given)
    switches = {entry.chunk: entry for entry in prompts[1:]}
    for number in range(numbers.start + given, numbers.stop):
        if number in switches:
            entry = switches[number]
            stream.switch(request.prompts.embeds[entry.text], entry.switch)
        index = stream.state.num_chunks
        pace.network_begins()
        latents = stream.generate(progress.on_pass, progress.on_guess)
        pace.network_ends()
        yield Chunk(index=index, latents=latents, images=None)


def run(request: Request, made: Made) -> None:
    """Make the video; however it ends, the file is closed and plays, and `made` says what it holds.

    What is made until a stop is kept for a later run to go on from.
    """
    prompts, total = plan(request)
    stream, writer = _begin(request, prompts, total, made)
    made.stream = stream
    take = partial(_take, request, writer, made)
    try:
        with writer or nullcontext(), _handoff(request, take) or nullcontext() as handoff:
            _make(request, prompts, range(made.chunks, total), take, handoff, made)
    finally:
        _tidy(request, made)
    made.report.end()


def _begin(
    request: Request, prompts: tuple[ResolvedEntry, ...], total: int, made: Made
) -> tuple[Stream, VideoWriter | None]:
    """The stream and the file, at their start or where an earlier run stood."""
    kept = reuse.find(request, prompts, total)
    if kept is not None:
        stream = open_stream(request, prompts[0])
        made.before = stream.state.num_chunks
        try:
            with host.held_interrupt():
                metadata = _metadata(request, made)
                return stream, reuse.resume(request, kept, stream, made, metadata)
        except Exception as error:
            host.log(f"the run begins anew, as an earlier one cannot be gone on from: {error}")
        reuse.forget(kept.key)
        del stream  # before there is another
        if request.path is not None:
            request.path.unlink(missing_ok=True)
    stream = open_stream(request, prompts[0])
    made.before = stream.state.num_chunks
    return stream, _writer(request, made)


def _make(
    request: Request,
    prompts: tuple[ResolvedEntry, ...],
    numbers: range,
    take: Callable[[Tensor], None],
    handoff: Handoff | None,
    made: Made,
) -> None:
    """Hand on chunk after chunk; what is made until the end, or a stop, is kept for a later run."""
    stream, total = made.stream, numbers.stop
    assert stream is not None
    steps, previews = len(request.sampler.steps), request.decoder is None
    progress = host.Progress(request.model, len(numbers), steps, previews=previews)
    pace = Pace(total, made.chunks, request.model.load_device)
    cuts = [entry.chunk for entry in prompts[1:] if entry.switch.mode == "cut"]
    clock = clock_of(request).with_cuts(*cuts)
    made.num_frames = made.chunks * clock.chunk_frames
    ends = {entry.chunk for entry in prompts[1:]} | {total}
    try:
        for chunk in chunks(request, stream, prompts, numbers, progress, pace):
            _hand_on(chunk, request, take, handoff, made)
            if made.chunks in ends:
                _flush(handoff)
                reuse.keep(request, prompts, stream, made)
            number = made.chunks - 1
            done = pace.chunk_done(
                made.chunks, clock.images_of(number), clock.images_before(number + 1)
            )
            made.report.chunk(done)
    except (Exception, host.Interrupted):
        with suppress(Exception):  # it is what stopped the run that is told
            _flush(handoff)
            made.goes_on = reuse.keep(request, prompts, stream, made, begun=True)
        raise


def _hand_on(
    chunk: Chunk,
    request: Request,
    take: Callable[[Tensor], None],
    handoff: Handoff | None,
    made: Made,
) -> None:
    made.num_frames += chunk.latents.shape[2]
    _keep(made.latents, chunk.latents.cpu(), request.keep_latents, dim=2)
    if chunk.images is not None:
        take(chunk.images[0].float().cpu())
    elif handoff is not None:
        assert made.stream is not None
        state = made.stream.state
        with host.held_interrupt():  # half a decode would leave a stream that cannot go on
            state.decoder = handoff.submit(chunk.latents, state.decoder)
    made.chunks += 1


def _flush(handoff: Handoff | None) -> None:
    if handoff is not None:
        handoff.flush()


def _tidy(request: Request, made: Made) -> None:
    """Put the file's index in front; without, it plays as well. A file of nothing new goes."""
    if request.path is None or not request.path.exists():
        return
    if not made.chunks:
        request.path.unlink()
        return
    try:
        remux(request.path, _metadata(request, made))
    except Exception as error:
        host.log(f"{request.path.name} keeps its index in parts: {error}")


def _metadata(request: Request, made: Made) -> dict[str, str]:
    return request.metadata | {RUN: made.run}


def _handoff(request: Request, take: Callable[[Tensor], None]) -> Handoff | None:
    """Decodes and, in a thread of its own, encodes, so that the network does not wait for files."""
    if request.decoder is None:
        return None
    return Handoff(
        request.decoder,
        take,
        device=request.model.load_device,
        form=lambda images: images[0].float(),
        beside=request.decoder.device == request.model.load_device
        and host.stays_on_cuda(request.decoder.vae.patcher),
        threaded=True,
        first_alone=False,  # ComfyUI's decoders begin with a whole chunk
    )


def _take(request: Request, writer: VideoWriter | None, made: Made, images: Tensor) -> None:
    """A chunk's images [T, 3, H, W] go to the file and the IMAGE socket."""
    if writer is not None:
        writer.write(shown := to_uint8(images))
        host.show_images(request.node_id, shown)
    if request.keep_images:
        _keep(made.images, images.clone(), request.keep_images, dim=0)
    made.num_images += len(images)


def _writer(request: Request, made: Made) -> VideoWriter | None:
    if request.path is None:
        return None
    if (head := request.head) is not None:
        made.num_images = head.num_images
        try:
            return reuse.continued(request, head.path, head.num_images, _metadata(request, made))
        except ValueError as error:
            request.path.unlink(missing_ok=True)
            raise ValueError(
                f"join is on, and {head.path.name} cannot be gone on from without encoding it "
                "anew, as it was cut or re-encoded since: turn join off"
            ) from error
    format = VideoFormat(width=request.width, height=request.height)
    return VideoWriter(request.path, format, _metadata(request, made))


def _keep(kept: deque[Tensor], new: Tensor, most: int, dim: int) -> None:
    """Append, and let go of what the last `most` frames do not need."""
    if most == 0:
        return
    kept.append(new)
    if most > 0:
        while sum(each.shape[dim] for each in kept) - kept[0].shape[dim] >= most:
            kept.popleft()


def images_of(made: Made, keep: int) -> Tensor | None:
    """The IMAGE of a run [T, H, W, 3], float32 on the CPU."""
    if not made.images:
        return None
    images = torch.cat(list(made.images))
    images = images if keep < 0 else images[-keep:]
    return rearrange(images, "t c h w -> t h w c").contiguous()


def latents_of(made: Made, keep: int) -> Tensor | None:
    """The last latents of a run [1, C, F, h, w], normalised."""
    if not made.latents:
        return None
    latents = torch.cat(list(made.latents), dim=2)
    return latents if keep < 0 else latents[:, :, -keep:]
