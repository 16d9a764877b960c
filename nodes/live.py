"""Live Stream: a stream that is steered while it runs, from the node, a page or a program."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io
from einops import rearrange
from torch import Tensor

from ..rf_core.config import FPS, CacheConfig
from ..rf_core.live import (
    MOST_COMING,
    Behind,
    Branch,
    Limits,
    Log,
    OscServer,
    Picture,
    Prompt,
    Schedule,
    Session,
    Stop,
    VideoRecorder,
    mark_of,
    read_log,
    replay_log,
)
from ..rf_core.prompts import PromptTimeline, ResolvedEntry, Switch
from ..rf_core.video import RUN, VideoFormat, header_of
from . import host, live_http
from .border import spoken
from .ignored import doubtful, ignored
from .loaders import CATEGORY
from .prompt import encode
from .run import Made, Request, check_state, clock_of, keep_last, open_stream
from .streaming import (
    other_decoder,
    outputs,
    produce,
    request_of,
    shared_inputs,
    shown,
    validate,
    with_start,
)
from .types import RFState, RFTimeline, State, Timeline

PACES: dict[str, float | None] = {"real time": FPS, "as fast as possible": None}
"""How fast a live stream is made, in images a second."""
_GRACE = 4  # chunks within which a page takes up the player
_FIRST = "a blue square moves up quickly"


class LiveStream(io.ComfyNode):
    """MODEL, CLIP and VAE to a stream that takes commands; then LATENT, VIDEO, IMAGE and state."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        shared = shared_inputs()
        return io.Schema(
            node_id="RFLiveStream",
            display_name="Live Stream",
            category=CATEGORY,
            description="Plays the video while it is made, and takes another prompt, a LoRA's "
            "strength, pause, cut and rewind at the next chunk. Runs until it is stopped; then the "
            "nodes behind it work on what was made.",
            search_aliases=[
                CATEGORY,
                "live",
                "real-time video",
                "interactive video",
                "streaming",
                "vj",
                "steer",
            ],
            inputs=[
                shared["model"],
                io.Clip.Input("clip", tooltip="Reads the prompts, also those given while it runs."),
                io.Vae.Input("vae", tooltip="Wan 2.1 VAE, or TAEHV for speed: live wants speed."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default=_FIRST,
                    tooltip="The prompt it begins with, where no timeline is connected.",
                ),
                shared["width"],
                shared["height"],
                shared["seed"],
                shared["steps"],
                io.Float.Input(
                    "max_seconds",
                    default=600.0,
                    min=0.0,
                    max=1e6,
                    step=10,
                    round=False,
                    tooltip="It ends by itself after so many seconds of video, or of a pause. 0: "
                    "it runs until it is stopped.",
                ),
                io.Combo.Input(
                    "pace",
                    options=list(PACES),
                    default="real time",
                    tooltip="real time: 16 images a second at most, so that what you see is what "
                    "is made. as fast as possible: the player skips what it cannot show.",
                ),
                RFTimeline.Input(
                    "timeline",
                    optional=True,
                    tooltip="From Prompt Schedule or Prompt Switch: its first prompt begins, the "
                    "others come by themselves, and can be moved while it runs.",
                ),
                shared["sink"],
                shared["start_image"],
                shared["start_latent"],
                shared["state"],
                io.Int.Input(
                    "keep_images",
                    default=81,
                    min=0,
                    max=100_000,
                    optional=True,
                    tooltip="How many of the last images go to IMAGE. At 832x480 a second takes "
                    "77 MB of RAM.",
                ),
                io.Int.Input(
                    "keep_latents",
                    default=81,
                    min=0,
                    max=100_000,
                    optional=True,
                    advanced=True,
                    tooltip="How many of the last latent frames go to LATENT, of those that can be "
                    "gone back to.",
                ),
                shared["keep_state"],
                io.String.Input(
                    "filename_prefix",
                    default="video/reward_forcing_live",
                    optional=True,
                    tooltip="Where in the output folder the MP4 is written, its branches beside "
                    "it, and what was done to it as .jsonl.",
                ),
                io.Int.Input(
                    "rewind_memory",
                    default=4096,
                    min=0,
                    max=1 << 20,
                    optional=True,
                    advanced=True,
                    tooltip="RAM in MB for the past that can be gone back to. A snapshot takes 2.6 "
                    "GB at 832x480 and makes going back short; without room for one, going back "
                    "takes a step a chunk from the beginning.",
                ),
                io.Boolean.Input(
                    "give_way",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="End, with all that is made, as soon as another prompt waits in the "
                    "queue. Connect the state to go on later.",
                ),
                io.Int.Input(
                    "osc_port",
                    default=0,
                    min=0,
                    max=65535,
                    optional=True,
                    advanced=True,
                    tooltip="UDP port of this machine that takes OSC: /prompt, /mode, /lora/NAME, "
                    "/pause, /rewind and others. 0: none. Needs the package python-osc.",
                ),
                io.String.Input(
                    "replay",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="A log in the output folder, such as "
                    "video/reward_forcing_live_00001_.jsonl: what it says is done once more, to "
                    "the same images, with its own size and seed.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="LATENT"),
                io.Video.Output(display_name="VIDEO"),
                io.Image.Output(display_name="IMAGE"),
                RFState.Output(display_name="state"),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls,
        width: int | None = None,
        height: int | None = None,
        filename_prefix: str | None = None,
    ) -> bool | str:
        return validate(cls, width=width, height=height, filename_prefix=filename_prefix)

    @classmethod
    @spoken
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        text: str,
        width: int,
        height: int,
        seed: int,
        steps: int,
        max_seconds: float,
        pace: str,
        timeline: Timeline | None = None,
        sink: CacheConfig | None = None,
        start_image: Any = None,
        start_latent: Any = None,
        state: State | None = None,
        keep_images: int = 81,
        keep_latents: int = 81,
        keep_state: str = "compact",
        filename_prefix: str = "video/reward_forcing_live",
        rewind_memory: int = 4096,
        give_way: bool = False,
        osc_port: int = 0,
        replay: str = "",
    ) -> io.NodeOutput:
        log = _log_named(replay) if replay.strip() else None
        prompts = timeline or _single(clip, text)
        request = request_of(
            cls,
            model,
            prompts,
            length=max_seconds,
            unit="seconds",
            width=width,
            height=height,
            seed=seed,
            steps=steps,
            vae=vae,
            sink=sink,
            start_image=start_image,
            start_latent=start_latent,
            state=state,
            keep_images=keep_images,
            keep_latents=keep_latents,
            filename_prefix=filename_prefix,
        )
        if log is not None:
            request = _as_logged(request, clip, log)
        check_state(request)
        first, later = _course(request, log)
        request, made = with_start(request, start_image), Made()
        live = Live(
            request=request,
            made=made,
            clip=clip,
            first=first,
            later=later,
            limits=Limits(max_bytes=rewind_memory << 20),
            rate=PACES[pace],
            max_seconds=max_seconds,
            give_way=give_way,
            osc_port=osc_port,
        )
        make = live.run if log is None else partial(live.replay, log)
        snapshot = produce(request, keep_state, made, make)
        lines = [live.told(log is not None), *other_decoder(request), *doubtful(model, vae)]
        if timeline is not None and log is None and text.strip() not in ("", _FIRST):
            lines.append("ignored: text, as a timeline is connected")
        said = "\n".join([*lines, *ignored(model, request.prompts)])
        return io.NodeOutput(*outputs(cls, request, made, snapshot), ui=shown(made, said))


def _single(clip: Any, text: str) -> Timeline:
    text = Prompt(text=text).text
    timeline = PromptTimeline().append(0, "s", Switch(), text)
    return Timeline(timeline=timeline, embeds={text: encode(clip, text)})


def _course(request: Request, log: Log | None) -> tuple[ResolvedEntry, tuple[ResolvedEntry, ...]]:
    """The prompt that a session begins with, and those that come by themselves."""
    total = clock_of(request).num_chunks(request.length, "s") if request.length else None
    timeline = request.prompts.timeline
    parts = any(entry.unit == "part" for entry in timeline.entries)
    if parts and total is None:
        raise ValueError("equal parts share a length: set max_seconds, or give each prompt a time")
    first, *later = timeline.resolve(clock_of(request), total if parts else None)
    if log is None and len(later) > MOST_COMING:
        raise ValueError(
            f"the timeline has {len(later) + 1} prompts; a live stream takes {MOST_COMING + 1}"
        )
    return first, tuple(later)


def _log_named(name: str) -> Log:
    path = host.output_named(name.strip())
    if path is None:
        raise ValueError(
            f"replay {name.strip()!r} is no log in the output folder; give a name such as "
            "video/reward_forcing_live_00001_.jsonl"
        )
    return read_log(path)


def _as_logged(request: Request, clip: Any, log: Log) -> Request:
    """The request with the size, the seed and the rules that a log tells."""
    facts, (cache, sampler) = log.start.stream, log.rules
    return replace(
        request,
        width=facts["width"],
        height=facts["height"],
        seed=facts["seed"],
        cache=cache,
        sampler=sampler,
        prompts=_single(clip, log.start.prompt),
    )


class Recording(VideoRecorder):
    """A session's files, and the last images for the IMAGE socket."""

    def __init__(self, request: Request, made: Made) -> None:
        format = VideoFormat(width=request.width, height=request.height)
        assert request.path is not None, "a live stream has a VAE"
        super().__init__(request.path, format, request.metadata | {RUN: made.run})
        self._kept: deque[Tensor] = deque()  # uint8 [T, H, W, 3], a chunk each
        self._keep, self._made = request.keep_images, made
        self.header = header_of(format)

    def begin(self, branch: str, parent: str | None, images: int) -> None:
        """See `VideoRecorder.begin`; what the IMAGE socket has goes back, too."""
        super().begin(branch, parent, images)
        for _ in range(self._made.num_images - images):
            if self._kept:
                self._kept[-1] = self._kept[-1][:-1]
                if not len(self._kept[-1]):
                    self._kept.pop()
        self._made.num_images, self._made.path = images, self.paths[branch]

    def write(self, images: Tensor) -> bytes:
        """See `Recorder.write`."""
        fragment = super().write(images)
        self._made.num_images += len(images)
        keep_last(self._kept, images.clone(), self._keep, dim=0)
        return fragment

    def end(self) -> None:
        """See `Recorder.end`."""
        super().end()
        kept = (rearrange(images, "t h w c -> t c h w").float() / 255 for images in self._kept)
        self._made.images = deque(kept)


@dataclass(frozen=True, kw_only=True)
class Live:
    """A session on a node."""

    request: Request
    made: Made
    clip: Any
    first: ResolvedEntry
    later: tuple[ResolvedEntry, ...]
    """Prompts that come by themselves."""
    limits: Limits
    rate: float | None
    max_seconds: float
    give_way: bool
    osc_port: int
    differs: list[str] = field(default_factory=list)
    """From where on a replay is not what the log says."""

    def run(self, load: Callable[[Any], None]) -> None:
        """Stream until it is stopped; however it ends, `made` says what there is."""
        request, recording = self.request, Recording(self.request, self.made)
        stream, differs = open_stream(request, self.first)
        self.made.stream = stream
        begin = stream.state.num_chunks
        hands = _Hands(request, self.clip, load)
        session = Session(
            stream,
            hands.encode,
            prompt=self.first.text,
            set_lora=hands.set_lora,
            loras=host.strengths(request.model),
            recorder=recording,
            log=self.log_path,
            limits=self.limits,
            clip=request.start_latents,
            rate=self.rate,
            beside=_beside(request),
        )
        if differs:
            session.submit(Prompt(text=self.first.text, mode=self.first.switch))
        for each in self.later:
            session.submit(Schedule(chunk=begin + each.chunk, text=each.text, mode=each.switch))
        until = None
        if self.max_seconds:
            until = begin + clock_of(request).num_chunks(self.max_seconds, "s")
        room = live_http.Room(
            inbox=session.inbox,
            outbox=session.outbox,
            screen=live_http.Screen(
                width=request.width, height=request.height, header=recording.header
            ),
            facts=partial(_facts, recording.paths, until, self.limits, request.model.load_device),
        )
        manners = _Manners(session, self.give_way, self.max_seconds)
        preview = _Preview(room, until)

        def on_pass(kind: str, number: int) -> None:
            manners.on_pass(kind, number)
            preview.show()

        try:
            with self._osc(session), live_http.opened(room, request.node_id):
                session.run(on_pass, manners.on_idle, until)
        finally:
            self._sum_up(session.outbox.status.chunk - begin, session.recent_latents)
            hands.put_back()

    def replay(self, log: Log, load: Callable[[Any], None]) -> None:
        """Do once more what a log says."""
        request, recording = self.request, Recording(self.request, self.made)
        stream, _ = open_stream(request, self.first)
        self.made.stream = stream
        begin = stream.state.num_chunks
        hands = _Hands(request, self.clip, load)
        loras = host.strengths(request.model)
        for name, strength in log.start.loras:
            if name not in loras:
                raise ValueError(f"the log has a LoRA {name!r}; load it with Load RF LoRA")
            if loras[name] != strength:
                hands.set_lora(name, strength)
        bar = host.progress_bar(log.num_chunks)
        marks = iter(log.marks)

        def on_chunk(branch: Branch, chunk: int, latents: Tensor) -> None:
            bar.update(1)
            self.made.chunks = chunk + 1 - begin
            if next(marks) != mark_of(latents) and not self.differs:
                self.differs.append(f"chunk {chunk} of {branch.name}")

        try:
            recent = replay_log(
                log,
                stream,
                hands.encode,
                set_lora=hands.set_lora,
                clip=request.start_latents,
                beside=_beside(request),
                recorder=recording,
                on_chunk=on_chunk,
                on_pass=lambda kind, number: host.check_interrupt(),
                exact=False,
            )
            self._sum_up(self.made.chunks, recent)
        finally:
            hands.put_back()

    def _osc(self, session: Session) -> AbstractContextManager[Any]:
        if not self.osc_port:
            return nullcontext()
        return OscServer(session.submit, self.osc_port, chunk=lambda: session.outbox.status.chunk)

    @property
    def log_path(self) -> Path:
        """Where what is done to it is written."""
        assert self.request.path is not None
        return self.request.path.with_suffix(".jsonl")

    def told(self, replayed: bool) -> str:
        """What was made, in a line."""
        assert self.made.path is not None
        seconds = self.made.num_images / FPS
        text = f"{self.made.path.name}: {self.made.num_images} images, {seconds:.2f} s"
        if not replayed:
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

    def _sum_up(self, chunks: int, latents: list[Tensor]) -> None:
        self.made.chunks, self.made.latents = chunks, deque()
        self.made.num_frames = chunks * self.request.cache.chunk_frames
        if self.request.keep_latents:
            self.made.latents.extend(latents)


class _Hands:
    """Prompts and strengths for a session, with ComfyUI's models."""

    def __init__(self, request: Request, clip: Any, load: Callable[[Any], None]) -> None:
        self._clip, self._load = clip, load
        self._embeds, self._original = request.prompts.embeds, request.model
        self._model = self._original
        self._strengths = host.strengths(request.model)

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
        self._model = host.with_strengths(self._model, self._strengths)
        self._load(self._model)

    def put_back(self) -> None:
        """Let the MODEL be loaded as it was."""
        if self._model is not self._original:
            self._load(self._original)


class _Manners:
    """Ends a session where ComfyUI, or its own length, asks for it."""

    def __init__(self, session: Session, give_way: bool, max_seconds: float) -> None:
        self._session, self._give_way = session, give_way
        self._longest = max_seconds or float("inf")
        self._paused_at: float | None = None

    def on_pass(self, kind: str, number: int) -> None:
        """Before every pass."""
        host.check_interrupt()
        self._paused_at = None
        if self._give_way and host.others_wait():
            self._stop()

    def on_idle(self) -> None:
        """Some times a second in a pause, and between two chunks."""
        self.on_pass("idle", 0) if not self._session.outbox.status.paused else self._in_pause()

    def _in_pause(self) -> None:
        host.check_interrupt()
        now = time.monotonic()
        self._paused_at = self._paused_at or now
        late = now - self._paused_at > self._longest
        if late or (self._give_way and host.others_wait()):
            self._stop()

    def _stop(self) -> None:
        if not self._session.inbox.stop_wanted:
            self._session.submit(Stop())


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
        except Behind:
            self._pictures, chunks = self._room.outbox.reader(), []
        if not chunks:
            return
        images, done = chunks[-1].images, chunks[-1].chunk + 1
        alone = not self._room.seen and done > _GRACE and images is not None
        picture = host.preview_of(images[-1]) if alone else None
        self._bar.update_absolute(done, max(self._until or 0, done), picture)


def _beside(request: Request) -> bool:
    assert request.decoder is not None
    same = request.decoder.device == request.model.load_device
    return same and host.stays_on_cuda(request.decoder.vae.patcher)


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
