"""A session of Live Stream on ComfyUI's models: its prompts and LoRAs, its files, when it ends."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..rf_core.live import (
    Autosave,
    Branch,
    Limits,
    Log,
    OscServer,
    Picture,
    Prompt,
    ReaderLagged,
    Schedule,
    Session,
    Stop,
    VideoRecorder,
    digest_of,
    replay_log,
)
from ..rf_core.prompts import ResolvedEntry
from ..rf_core.stream import GUIDE_STRENGTH
from ..rf_core.video import RUN, VideoFormat, header_of
from . import host, live_http
from .decoders import decoder_of
from .join import with_video
from .prompt import encode
from .run import (
    Request,
    RunResult,
    clock_of,
    decodes_on_side_stream,
    keep_last,
    open_stream,
    opened,
)
from .source import PlacedSource

_GRACE = 4  # chunks within which a page takes up the player


class Recording(VideoRecorder):
    """A session's files, and the last images for the IMAGE socket."""

    def __init__(self, request: Request, result: RunResult) -> None:
        format = VideoFormat(width=request.width, height=request.height, fps=request.fps)
        assert request.path is not None, "a live stream has a VAE"
        super().__init__(request.path, format, request.metadata | {RUN: result.run})
        self._kept: deque[Tensor] = deque()  # uint8 [T, H, W, 3], a chunk each
        self._keep, self._result = request.keep_images, result
        self.header = header_of(format)

    def begin(self, branch: str, parent: str | None, images: int) -> None:
        """See `VideoRecorder.begin`; what the IMAGE socket has goes back, too."""
        super().begin(branch, parent, images)
        for _ in range(self._result.num_images - images):
            if self._kept:
                self._kept[-1] = self._kept[-1][:-1]
                if not len(self._kept[-1]):
                    self._kept.pop()
        self._result.num_images, self._result.path = images, self.paths[branch]

    def write(self, images: Tensor) -> bytes:
        """See `Recorder.write`."""
        fragment = super().write(images)
        self._result.num_images += len(images)
        keep_last(self._kept, images.clone(), self._keep, dim=0)
        return fragment

    def end(self) -> None:
        """See `Recorder.end`."""
        super().end()
        kept = (rearrange(images, "t h w c -> t c h w").float() / 255 for images in self._kept)
        self._result.images = deque(kept)


@dataclass(eq=False, kw_only=True)
class LiveRun:
    """A session on a node, over every run of the node in which it goes on."""

    request: Request
    result: RunResult
    clip: Any
    first: ResolvedEntry
    later: tuple[ResolvedEntry, ...]
    """Prompts that come by themselves."""
    limits: Limits
    rate: float | None
    max_seconds: float
    give_way: bool
    osc_port: int
    autosaves: bool
    differs: list[str] = field(default_factory=list)
    """From where on a replay is not what the log says."""
    session: Session = field(init=False)
    _models: _SessionModels = field(init=False)
    _source: PlacedSource | None = field(init=False, default=None)
    _room: live_http.Room = field(init=False)
    _open: ExitStack = field(init=False)
    _first: int = field(init=False)
    _until: int | None = field(init=False)

    def run(self, load: Callable[[Any], None]) -> None:
        """Stream until it is stopped, or gives way; `result` has what was made, however it ends."""
        if self.suspended:
            self._go_on(load)
        else:
            self._begin(load)
        session = self.session
        rules = _SessionRules(session, self.give_way, self.max_seconds)
        preview = _Preview(self._room, self._until)

        def on_pass(kind: str, number: int) -> None:
            rules.on_pass(kind, number)
            preview.show()

        try:
            session.run(on_pass, rules.on_idle, self._until)
        finally:
            self._sum_up(session.outbox.status.chunk - self._first, session.recent_latents)
            self._models.restore()
            if self._source is not None:
                self._source.close()
            if session.suspended:
                self._detach()
                _queue_again(self)
            else:
                self._open.close()
        if self.result.state is not None and not session.suspended:
            self.result.state.unlink(missing_ok=True)  # as the node gives it

    def attach(self, model: Any, clip: Any, vae: Any) -> None:
        """Let it go on, by `run`, with the models that ComfyUI has by now."""
        decoder = decoder_of(vae, host.student_of(model).latent_format)
        self.request = replace(self.request, model=model, decoder=decoder)
        self.clip = clip

    def _autosave(self, files: dict[str, Path], autosave: Autosave) -> None:
        # Compact, a few MB: what a killed server leaves, or a run whose outputs nobody gets.
        assert self.request.path is not None
        file = files[autosave.branch]
        try:
            self.result.state = self.result.state or host.free_state_path(self.request.path.stem)
            snapshot = with_video(autosave.snapshot, file, self.result.run, autosave.images)
            if self.request.source is not None and self._source is not None:
                place = self._source.place_after(autosave.images)
                snapshot = self.request.source.noted(snapshot, place)
            snapshot.save(self.result.state)
        except OSError as error:
            host.log(f"the state after {autosave.images} images is not kept: {error}")

    def _detach(self) -> None:
        # By the time it goes on, ComfyUI may have loaded the models' files again.
        self._models.detach()
        self.request = replace(self.request, model=None, decoder=None)
        self.result.stream = self.clip = None

    def abandon(self, why: str) -> None:
        """End it where it has given way."""
        self.session.abandon(why)
        self._open.close()

    def _begin(self, load: Callable[[Any], None]) -> None:
        request, recording = self.request, Recording(self.request, self.result)
        stream, differs = open_stream(request, self.first)
        self.result.stream = stream
        self._first = stream.state.num_chunks
        self._models = _SessionModels(request, self.clip, load)
        self._source = opened(request)
        self.session = session = Session(
            stream,
            self._models.encode,
            prompt=self.first.text,
            set_lora=self._models.set_lora,
            loras=host.strengths(request.model),
            recorder=recording,
            log=self.log_path,
            limits=self.limits,
            clip=request.start_latents,
            rate=self.rate,
            side_stream=decodes_on_side_stream(request),
            source=self._source,
            strength=GUIDE_STRENGTH if request.source is None else request.source.strength,
            on_autosave=partial(self._autosave, recording.paths) if self.autosaves else None,
        )
        if differs:
            session.submit(Prompt(text=self.first.text, mode=self.first.switch))
        for each in self.later:
            chunk = self._first + each.chunk
            session.submit(Schedule(chunk=chunk, text=each.text, mode=each.switch))
        self._until = None
        if self.max_seconds:
            self._until = self._first + clock_of(request).num_chunks(self.max_seconds, "s")
        device = request.model.load_device
        self._room = live_http.Room(
            inbox=session.inbox,
            outbox=session.outbox,
            screen=live_http.Screen(
                width=request.width,
                height=request.height,
                header=recording.header,
                fps=request.fps,
            ),
            facts=partial(_facts, recording.paths, self._until, self.limits, device),
        )
        with ExitStack() as exits:
            exits.enter_context(self._osc(session))
            exits.enter_context(live_http.open_room(self._room, request.node_id))
            self._open = exits.pop_all()

    def _go_on(self, load: Callable[[Any], None]) -> None:
        request = replace(self.request, snapshot=None)  # it goes on from where it was left
        self.result.stream, _ = open_stream(request, self.first)
        self._models.attach(request, self.clip, load)
        if self._source is not None:
            self._source.attach(request.decoder)
        self.session.resume(self.result.stream, host.strengths(request.model))
        live_http.announce(self._room, request.node_id)

    def replay(self, log: Log, load: Callable[[Any], None]) -> None:
        """Do once more what a log says."""
        request, recording = self.request, Recording(self.request, self.result)
        stream, _ = open_stream(request, self.first)
        self.result.stream = stream
        begin = stream.state.num_chunks
        models = _SessionModels(request, self.clip, load)
        self._source = opened(request)
        loras = host.strengths(request.model)
        for name, strength in log.header.loras:
            if name not in loras:
                raise ValueError(f"the log has a LoRA {name!r}; load it with Load RF LoRA")
            if loras[name] != strength:
                models.set_lora(name, strength)
        bar = host.progress_bar(log.num_chunks)
        digests = iter(log.digests)

        def on_chunk(branch: Branch, chunk: int, latents: Tensor) -> None:
            bar.update(1)
            self.result.chunks = chunk + 1 - begin
            if next(digests) != digest_of(latents) and not self.differs:
                self.differs.append(f"chunk {chunk} of {branch.name}")

        try:
            recent = replay_log(
                log,
                stream,
                models.encode,
                set_lora=models.set_lora,
                clip=request.start_latents,
                source=self._source,
                side_stream=decodes_on_side_stream(request),
                recorder=recording,
                on_chunk=on_chunk,
                on_pass=lambda kind, number: host.check_interrupt(),
                exact=False,
            )
            self._sum_up(self.result.chunks, recent)
        finally:
            models.restore()
            if self._source is not None:
                self._source.close()

    def _osc(self, session: Session) -> AbstractContextManager[Any]:
        if not self.osc_port:
            return nullcontext()
        return OscServer(session.submit, self.osc_port, chunk=lambda: session.outbox.status.chunk)

    @property
    def log_path(self) -> Path:
        """Where what is done to it is written."""
        assert self.request.path is not None
        return self.request.path.with_suffix(".jsonl")

    @property
    def suspended(self) -> bool:
        """Whether it has given way, and goes on in a later run of the node."""
        return hasattr(self, "session") and self.session.suspended

    def summary(self, replayed: bool) -> str:
        """What was made, in a line."""
        assert self.result.path is not None
        seconds = self.result.num_images / self.request.fps
        text = f"{self.result.path.name}: {self.result.num_images} images, {seconds:.2f} s"
        if self.suspended:
            text += "; lets another prompt through, and goes on after it by itself"
        elif not replayed:
            text += f"; {self.log_path.name} says what was done, and makes it again by replay"
        elif self.differs:
            text += (
                f"; replayed, and other images than the session's from {self.differs[0]} on: the "
                "log was edited, or the models are others"
            )
        else:
            text += "; replayed, the same latents to the bit"
        host.log(text)
        return text

    def source_notes(self) -> list[str]:
        """Where the source ended before the stream did."""
        if self._source is None or self._source.ended_at is None:
            return []
        seconds = self._source.ended_at / self.request.fps
        return [f"the source ends at {seconds:.2f} s; source_end hold or loop goes on in it"]

    def _sum_up(self, chunks: int, latents: list[Tensor]) -> None:
        self.result.chunks, self.result.latents = chunks, deque()
        self.result.num_frames = clock_of(self.request).frames_before(chunks)
        if self._source is not None:
            self.result.place = self._source.place_after(self.result.num_images)
        if self.request.keep_latents:
            self.result.latents.extend(latents)


_suspended: dict[Any, LiveRun] = {}  # by the run of the node that they go on in
_times: Counter[str] = Counter()


@contextmanager
def resumed() -> Iterator[LiveRun | None]:
    """The session that gave way, and goes on with the node's run that begins, or ends where that
    fails; None where the run is a session's first.
    """
    live = _suspended.pop(host.running(), None)
    try:
        yield live
    except BaseException as error:
        if live is not None and live.suspended:
            live.abandon(f"it could not go on: {error}")
        raise


def times_given_way(node_id: str) -> int:
    """How often a node has: what ComfyUI keeps of such a run is not its result."""
    return _times[node_id]


def _queue_again(live: LiveRun) -> None:
    """Queue the prompt that runs once more, for the session to go on with, or to end with."""
    running = host.running()
    assert running is not None, "it gives way to prompts of a queue"
    again = running._replace(prompt_id=host.requeue())
    _times[running.node_id] += 1
    _suspended[again] = live

    def gone() -> None:
        if _suspended.pop(again, None) is not None:
            live.abandon("the prompt that was to go on with it is no longer in the queue")

    host.on_dequeued(again.prompt_id, gone)


class _SessionModels:
    """Prompts and strengths for a session, with ComfyUI's models."""

    def __init__(self, request: Request, clip: Any, load: Callable[[Any], None]) -> None:
        self.attach(request, clip, load)

    def attach(self, request: Request, clip: Any, load: Callable[[Any], None]) -> None:
        """Go on with other models."""
        self._clip, self._load = clip, load
        self._embeds, self._original = request.prompts.embeds, request.model
        self._model = self._original
        self._strengths = host.strengths(request.model)

    def detach(self) -> None:
        """Hold no model, until `attach`."""
        self._clip = self._load = self._original = self._model = None

    def encode(self, text: str) -> Tensor:
        """See `Encode`."""
        if text not in self._embeds:
            embeds = encode(self._clip, text)
            self._load(self._model)  # as the text encoder may have taken its place
            return embeds
        return self._embeds[text]

    def set_lora(self, name: str, strength: float) -> None:
        """See `SetLora`."""
        self._strengths[name] = strength
        model = host.with_strengths(self._original, self._strengths)
        self._load(model)
        self._model = model

    def restore(self) -> None:
        """Let the MODEL be loaded as it was."""
        if self._model is not self._original:
            self._load(self._original)


class _SessionRules:
    """Ends a session, or lets it give way, where ComfyUI or its own length asks for it."""

    def __init__(self, session: Session, give_way: bool, max_seconds: float) -> None:
        self._session, self._give_way = session, give_way
        self._longest = max_seconds or float("inf")
        self._paused_at: float | None = None

    def on_pass(self, kind: str, number: int) -> None:
        """Before every pass."""
        host.check_interrupt()
        self._paused_at = None
        self._let_through()

    def on_idle(self) -> None:
        """Some times a second in a pause, and between two chunks."""
        self.on_pass("idle", 0) if not self._session.outbox.status.paused else self._in_pause()

    def _in_pause(self) -> None:
        host.check_interrupt()
        now = time.monotonic()
        self._paused_at = self._paused_at or now
        if now - self._paused_at > self._longest and not self._session.inbox.stop_wanted:
            self._session.submit(Stop())
        self._let_through()

    def _let_through(self) -> None:
        ours = {each.prompt_id for each in _suspended}  # they wait for this one to end
        if self._give_way and host.other_prompts_wait(ours):
            self._session.suspend()


class _Preview:
    """ComfyUI's own picture of a node that runs, for pages that the player is absent from."""

    def __init__(self, room: live_http.Room, until: int | None) -> None:
        self._room, self._until = room, until
        self._pictures = room.outbox.reader()
        self._bar = host.progress_bar(until or 1)

    def show(self) -> None:
        """The newest chunk's last image, where nobody watched; how far it is, to everybody."""
        try:
            chunks = [each for each in self._pictures.read(0) if isinstance(each, Picture)]
        except ReaderLagged:
            self._pictures, chunks = self._room.outbox.reader(), []
        if not chunks:
            return
        images, done = chunks[-1].images, chunks[-1].chunk + 1
        alone = not self._room.seen and done > _GRACE and images is not None
        picture = host.preview_of(images[-1]) if alone else None
        self._bar.update_absolute(done, max(self._until or 0, done), picture)


def _facts(
    paths: dict[str, Path], until: int | None, limits: Limits, device: torch.device
) -> dict[str, Any]:
    """What a node knows of its session, see `live_http.Room.facts`."""
    return {
        "files": {branch: path.name for branch, path in dict(paths).items()},
        "until": until,
        "history_limit": limits.max_bytes,
        "memory": {"ram": host.process_memory(), "device": host.device_memory(device)},
    }
