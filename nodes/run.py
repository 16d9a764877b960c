"""A run of the Streaming Sampler: chunks to a file, a preview and what the sockets carry."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from textwrap import shorten
from typing import Any
from uuid import uuid4

import torch
from einops import rearrange
from torch import Tensor

from ..rf_core.config import FPS, CacheConfig, SamplerConfig
from ..rf_core.decoders.decoder import DecoderState, back_chunks
from ..rf_core.decoders.handoff import Handoff
from ..rf_core.pace import Pace
from ..rf_core.prompts import ChunkClock, ResolvedEntry, clip_notes
from ..rf_core.scheduler import entered_at
from ..rf_core.source import Guides
from ..rf_core.state import Snapshot, cache_config_of
from ..rf_core.stream import Stream, split_chunks
from ..rf_core.video import RUN, VideoFormat, VideoWriter, remux, to_uint8
from . import host, reuse
from .decoders import StockTAEHVDecoder, StockWanDecoder
from .join import PreviousVideo, is_of_run
from .report import Report
from .source import Clip, Place, PlacedSource
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
    source: Clip | None = None
    """What guides the chunks that are generated."""
    previous: PreviousVideo | None = None
    """The video that the file begins with."""
    reuse_bytes: int = 0
    """RAM that chunks of earlier runs may take, and this one's; 0 takes over and keeps nothing."""
    fps: int = FPS
    """Images that a second of the file has."""
    node_id: str | None = None
    """The node that shows the images as they are made."""

    @property
    def clip_chunks(self) -> int:
        """Chunks that `start_latents` give."""
        return (
            0 if self.start_latents is None else len(split_chunks(self.start_latents, self.cache))
        )


@dataclass
class RunResult:
    """What a run has made so far."""

    latents: deque[Tensor] = field(default_factory=deque)
    images: deque[Tensor] = field(default_factory=deque)
    history: list[Tensor] = field(default_factory=list)
    """The first chunks' latents, as many as may be kept for a later run."""
    num_images: int = 0
    """Images in the file, those that it begins with included."""
    num_frames: int = 0
    """Latent frames, those of an earlier run included."""
    chunks: int = 0
    """Chunks handed on, counted from there."""
    reused: int = 0
    """Chunks that are taken over from an earlier run."""
    resumable: bool = False
    """Stopped, and a later run of the same request can go on."""
    run: str = field(default_factory=lambda: uuid4().hex)
    """Names the run in its file."""
    report: Report = field(default_factory=Report)
    decoder: DecoderState | None = None
    """What the decoder remembers after those chunks; None where that is not all."""
    stream: Stream | None = None
    """At its end."""
    place: Place = field(default_factory=Place)
    """In the source, after those chunks."""
    source_ended: bool = False
    """Whether the video ends with its source, before the length that was asked for."""
    path: Path | None = None
    """The file."""
    state: Path | None = None
    """Where its state is kept, for the case that no node takes it."""


def plan(request: Request) -> tuple[tuple[ResolvedEntry, ...], int]:
    """The prompts with their chunks, counted from where the run begins, and its chunks.

    Prompts past its end are left out, so that a long timeline can be tried in a short run;
    `prompt_notes` names them. ValueError for a timeline, or a state, that does not fit.
    """
    check_state(request)
    clock = clock_of(request)
    timeline = request.prompts.timeline
    total = timeline.num_chunks(request.length, UNITS[request.unit], clock)
    return tuple(entry for entry in _resolved(request, total) if entry.chunk < total), total


def check_state(request: Request) -> None:
    """ValueError where the state is of another video than is asked for."""
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


def prompt_notes(request: Request, made: int | None = None) -> list[str]:
    """The prompts that are not seen, or begin later than was asked for, a line for each.

    `made` is how many chunks there are, where the source has ended the video.
    """
    prompts, total = plan(request)
    end = total if made is None else made
    late = [entry for entry in _resolved(request, total) if entry.chunk >= end]
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
    return ChunkClock.of(
        request.cache,
        fresh=request.snapshot is None,
        clip_chunks=request.clip_chunks,
        fps=request.fps,
    )


def open_stream(request: Request, first: ResolvedEntry) -> tuple[Stream, bool]:
    """The stream at its start, or at the state it goes on from, and whether that has another prompt
    than the first."""
    embeds = request.prompts.embeds[first.text]
    stream = Stream(
        host.ComfyNetwork(request.model),
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
    if request.snapshot is None:
        return stream, False
    new = stream.state.prompt_embeds
    stream.restore(request.snapshot)
    stream.state.seed = request.seed
    return stream, not torch.equal(stream.state.prompt_embeds, new)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What is done with each chunk of a run; all are numbers of chunks from its beginning."""

    prompts: tuple[ResolvedEntry, ...]
    clock: ChunkClock
    """Cuts included."""
    total: int
    given: tuple[Tensor, ...] = ()
    """Latents of the first chunks, which are not generated: an earlier run's, or a start clip's."""
    reused: int = 0
    """Those of them that an earlier run made."""
    decoded: int = 0
    """The first that is decoded."""
    wanted: int = 0
    """The first whose images go to the IMAGE socket."""
    written: int = 0
    """The first whose images are not in the file already."""
    tail: reuse.DecoderTail | None = None
    """What is known of the decoder and the images after the reused ones."""

    def place_of(self, chunk: int) -> tuple[int, int]:
        """The image that a chunk begins with, and the one that its decoder's stream does."""
        return self.clock.images_before(chunk), self.clock.begun_with(chunk)

    def after(self, cached: reuse.CachedRun, count: int) -> RunPlan:
        """The same where the first chunks are an earlier run's."""
        return replace(self, given=cached.latents[:count], reused=count)

    def in_file(self, request: Request, tail: reuse.DecoderTail | None) -> RunPlan:
        """The same where the file holds the images of the reused chunks.

        Of them as many are decoded again as the decoder remembers, and as the IMAGE socket wants;
        none where what they leave is known.
        """
        assert request.decoder is not None
        if request.cache.rebuild == "reencoded":  # which needs the images of every chunk
            tail = None
        if tail is not None and tail.serves(request.keep_images):
            known = self.reused
            return replace(self, written=known, wanted=known, decoded=known, tail=tail)
        # A source that stops may end the video as early as here.
        stops = request.source is not None and request.source.at_end == "stop"
        images = self.clock.images_before(self.reused if stops else self.total)
        keep = request.keep_images
        first = 0 if keep < 0 else images - keep
        ends = (self.clock.images_before(number + 1) for number in range(self.total))
        wanted = next((number for number, end in enumerate(ends) if end > first), self.total)
        new = min(self.reused, wanted)
        back = back_chunks(request.decoder.memory_frames, request.cache.chunk_frames)
        scene = max((cut for cut in self.clock.cuts if cut <= new), default=0)
        decoded = 0 if request.cache.rebuild == "reencoded" else max(scene, new - back, 0)
        return replace(self, written=self.reused, wanted=wanted, decoded=decoded)


def _run_plan(request: Request) -> RunPlan:
    """A run that begins with nothing but its start clip."""
    prompts, total = plan(request)
    clip: tuple[Tensor, ...] = ()
    if request.start_latents is not None:
        clip = tuple(split_chunks(request.start_latents, request.cache))
    cuts = [entry.chunk for entry in prompts[1:] if entry.switch.mode == "cut"]
    clock = clock_of(request).with_cuts(*cuts)
    return RunPlan(prompts=prompts, clock=clock, total=total, given=clip)


def run(request: Request, result: RunResult) -> None:
    """Make the video; however it ends, the file plays, and `result` has what was made.

    What is made until a stop is kept for a later run to go on from.
    """
    run_plan = _run_plan(request)
    run_key = reuse.run_key_of(request, run_plan.prompts)
    cached, shared = reuse.find(run_key)
    if cached is not None:
        run_plan = run_plan.after(cached, min(shared, run_plan.total))
    first = run_plan.prompts[0]
    result.stream, differs = open_stream(request, first)
    if differs:
        result.stream.switch(request.prompts.embeds[first.text], first.switch)
    result.reused = run_plan.reused
    writer = _continued(request, run_plan, cached, result)
    if writer is not None:
        tail = cached.tail if cached and run_plan.reused == len(cached.latents) else None
        run_plan = run_plan.in_file(request, tail)
        result.images.extend(run_plan.tail.images if run_plan.tail else ())
    else:
        writer = _writer(request, result)
    deliver = partial(_deliver, request, writer, result, _numbers(run_plan))
    try:
        with writer or nullcontext(), _handoff(request, deliver) or nullcontext() as handoff:
            _make(request, run_plan, run_key, handoff, result)
    finally:
        _tidy(request, result)
    _end_source(request, run_plan, result)
    result.report.end()


def _end_source(request: Request, run_plan: RunPlan, result: RunResult) -> None:
    """Note where the run leaves its source; ValueError where that was over before it began."""
    if request.source is None:
        return
    place, (images, since) = request.source.place, run_plan.place_of(result.chunks)
    result.place = place.after(images, since)
    if not result.chunks:
        seconds = place.images / request.fps
        raise ValueError(
            f"the source ends before {seconds:.2f} s, where the state goes on; connect a longer "
            "one, or let source_end hold or loop it"
        )


def _continued(
    request: Request, run_plan: RunPlan, cached: reuse.CachedRun | None, result: RunResult
) -> VideoWriter | None:
    """The writer of a file that begins with an earlier run's images; None where they are gone."""
    if cached is None or cached.video is None or not is_of_run(cached.run, cached.video):
        return None
    before = 0 if request.previous is None else request.previous.num_images
    images = before + run_plan.clock.images_before(run_plan.reused)
    try:
        writer = _begun_with(request, cached.video, images, result)
    except (ValueError, OSError) as error:
        host.log(
            f"{cached.video.name} cannot be gone on from, and its images are made anew: {error}"
        )
        assert request.path is not None
        request.path.unlink(missing_ok=True)
        return None
    result.num_images = images
    return writer


def _make(
    request: Request,
    run_plan: RunPlan,
    run_key: reuse.RunKey | None,
    handoff: Handoff | None,
    result: RunResult,
) -> None:
    """Hand on chunk after chunk; what is made until the end, or a stop, is kept for a later run."""
    assert result.stream is not None
    passes = _passes(request, run_plan, result.stream)
    previews = request.decoder is None
    progress = host.Progress(
        request.model, max(1, sum(passes)), previews=previews, rate=request.fps
    )
    try:
        with closing(source) if (source := opened(request)) else nullcontext():
            guides = None if source is None else Guides(source)
            for latents in _chunks(request, run_plan, passes, progress, guides, result):
                _hand_on(latents, run_plan, request, handoff, result)
        _flush(handoff)
        reuse.store(run_key, request, result)
    except (Exception, host.Interrupted):
        with suppress(Exception):  # what stopped the run is to be raised
            _flush(handoff)
            result.resumable = reuse.store(run_key, request, result)
        raise


def opened(request: Request) -> PlacedSource | None:
    """The source of a run, with the decoder's twin; None without one."""
    if request.source is None:
        return None
    assert request.decoder is not None, "a source has an encoder"
    source = request.source.open(request.height, request.width, request.fps)
    source.attach(request.decoder)
    return source


def _passes(request: Request, run_plan: RunPlan, stream: Stream) -> list[int]:
    """Denoising passes of each chunk that is generated."""
    firsts = set(run_plan.clock.cuts)
    if stream.state.first_due:
        firsts.add(request.clip_chunks)
    generated = range(len(run_plan.given), run_plan.total)
    return [_num_passes(request, chunk in firsts) for chunk in generated]


def _num_passes(request: Request, is_first: bool) -> int:
    if request.source is None:
        return request.sampler.passes_of(is_first)
    return len(entered_at(request.source.strength, request.sampler, is_first=is_first)[0])


def _chunks(
    request: Request,
    run_plan: RunPlan,
    passes: Sequence[int],
    progress: Any,
    guides: Guides | None,
    result: RunResult,
) -> Iterator[Tensor]:
    """The latents of each chunk, given or generated, prompts changed on the way."""
    stream = result.stream
    assert stream is not None
    switches = {entry.chunk: entry for entry in run_plan.prompts[1:]}
    given, pace = len(run_plan.given), None
    for number in range(run_plan.total):
        if number in switches:
            entry = switches[number]
            stream.switch(request.prompts.embeds[entry.text], entry.switch)
        if number < given:
            known, is_start = run_plan.given[number], number < request.clip_chunks
            yield stream.replay(known, progress.on_pass, decode=False, is_start=is_start).latents
            continue
        pace = pace or Pace(
            run_plan.total,
            given,
            request.model.load_device,
            passes=[1 + count for count in passes],
            rate=request.fps,
        )
        guided: dict[str, Any] = {}
        if guides is not None:
            host.check_interrupt()
            guide = guides.next(stream, *run_plan.place_of(number))
            if guide is None:
                result.source_ended = True
                return
            assert request.source is not None
            guided = {"guide": guide, "strength": request.source.strength}
        pace.network_begins()
        latents = stream.generate(progress.on_pass, progress.on_prediction, **guided)
        pace.network_ends()
        yield latents
        images, until = run_plan.clock.images_of(number), run_plan.clock.images_before(number + 1)
        result.report.chunk(pace.chunk_done(result.chunks, images, until))


def _hand_on(
    latents: Tensor, run_plan: RunPlan, request: Request, handoff: Handoff | None, result: RunResult
) -> None:
    number = result.chunks
    known = run_plan.given[number] if number < run_plan.reused else latents.cpu()
    keep_last(result.latents, known, request.keep_latents, dim=2)
    if len(result.history) == number and known.nbytes * (number + 1) <= request.reuse_bytes:
        result.history.append(known)
    assert result.stream is not None
    state = result.stream.state
    if run_plan.tail is not None and number + 1 == run_plan.reused:
        result.decoder = state.decoder = run_plan.tail.decoder.to(request.decoder.device)
    elif handoff is not None and number >= run_plan.decoded:
        if number == run_plan.decoded > 0 and run_plan.tail is None:
            state.decoder = None  # it has not seen what lies between
        with host.deferred_interrupt():  # half a decode would leave a stream that cannot go on
            result.stream.hand_on(latents, handoff)
        result.decoder = (
            state.decoder if number + 1 >= min(run_plan.written, run_plan.wanted) else None
        )
    result.num_frames += latents.shape[2]
    result.chunks += 1


def _flush(handoff: Handoff | None) -> None:
    if handoff is not None:
        handoff.flush()


def _numbers(run_plan: RunPlan) -> Iterator[tuple[bool, bool]]:
    """Of one delivery after another, whether it is written, and whether it is wanted."""
    for number in count(run_plan.decoded):
        yield number >= run_plan.written, number >= run_plan.wanted


def _tidy(request: Request, result: RunResult) -> None:
    """Put the file's index in front; without, it plays as well. A file of nothing new goes."""
    if request.path is None or not request.path.exists():
        return
    if not result.chunks:
        request.path.unlink()
        return
    try:
        remux(request.path, _metadata(request, result))
    except Exception as error:
        host.log(f"{request.path.name} keeps its index in parts: {error}")


def _metadata(request: Request, result: RunResult) -> dict[str, str]:
    return request.metadata | {RUN: result.run}


def decodes_on_side_stream(request: Request) -> bool:
    """Whether the decoder may have a stream of its own on the network's card, see `Handoff`."""
    assert request.decoder is not None
    same = request.decoder.device == request.model.load_device
    return same and host.stays_on_cuda(request.decoder.vae.patcher)


def _handoff(request: Request, deliver: Callable[[Tensor], None]) -> Handoff | None:
    """Decodes and, in a thread of its own, encodes, so that the network does not wait for files."""
    if request.decoder is None:
        return None
    return Handoff(
        request.decoder,
        deliver,
        device=request.model.load_device,
        convert=lambda images: images[0].float(),
        side_stream=decodes_on_side_stream(request),
        threaded=True,
        first_alone=False,  # ComfyUI's decoders begin with a whole chunk
    )


def _deliver(
    request: Request,
    writer: VideoWriter | None,
    result: RunResult,
    numbers: Iterator[tuple[bool, bool]],
    images: Tensor,
) -> None:
    """A chunk's images [T, 3, H, W] go to the file and the IMAGE socket."""
    written, wanted = next(numbers)
    if writer is not None and written:
        writer.write(pixels := to_uint8(images))
        host.show_images(request.node_id, pixels, request.fps)
        result.num_images += len(images)
    if request.keep_images and wanted:
        keep_last(result.images, images.clone(), request.keep_images, dim=0)


def _writer(request: Request, result: RunResult) -> VideoWriter | None:
    if request.path is None:
        return None
    if (previous := request.previous) is not None:
        result.num_images = previous.num_images
        try:
            return _begun_with(request, previous.path, previous.num_images, result)
        except ValueError as error:
            request.path.unlink(missing_ok=True)
            raise ValueError(
                f"join is on, and {previous.path.name} cannot be gone on from without encoding it "
                "anew, as it was cut or re-encoded since: turn join off"
            ) from error
    format = VideoFormat(width=request.width, height=request.height, fps=request.fps)
    return VideoWriter(request.path, format, _metadata(request, result))


def _begun_with(request: Request, video: Path, num_images: int, result: RunResult) -> VideoWriter:
    """The writer of a run's file, which begins with the first images of another."""
    assert request.path is not None, "there is a video to write"
    format = VideoFormat(width=request.width, height=request.height, fps=request.fps)
    metadata = _metadata(request, result)
    return VideoWriter.continuing(video, request.path, num_images, format, metadata)


def keep_last(kept: deque[Tensor], new: Tensor, most: int, dim: int) -> None:
    """Append, and let go of what the last `most` frames do not need."""
    if most == 0:
        return
    kept.append(new)
    if most > 0:
        while sum(each.shape[dim] for each in kept) - kept[0].shape[dim] >= most:
            kept.popleft()


def images_of(result: RunResult, keep: int) -> Tensor | None:
    """The IMAGE of a run [T, H, W, 3], float32 on the CPU."""
    if not result.images:
        return None
    images = torch.cat(list(result.images))
    images = images if keep < 0 else images[-keep:]
    return rearrange(images, "t c h w -> t h w c").contiguous()


def latents_of(result: RunResult, keep: int) -> Tensor | None:
    """The last latents of a run [1, C, F, h, w], normalised."""
    if not result.latents:
        return None
    latents = torch.cat(list(result.latents), dim=2)
    return latents if keep < 0 else latents[:, :, -keep:]
