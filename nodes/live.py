"""Live Stream: a stream that is steered while it runs, from the node, a page or a program."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from comfy_api.latest import io

from ..rf_core.config import CacheConfig
from ..rf_core.live import MAX_COMING, Limits, Log, Prompt, read_log
from ..rf_core.prompts import PromptTimeline, ResolvedEntry, Switch
from ..rf_core.source import AtEnd
from ..rf_core.stream import GUIDE_STRENGTH
from ..rf_core.video import Fit
from . import host
from .border import checked_execute
from .ignored import doubtful, ignored
from .live_run import LiveRun, resumed, times_given_way
from .loaders import CATEGORY
from .prompt import encode
from .run import Request, RunResult, check_state, clock_of
from .source import Clip, clip_of, idle_inputs, place_notes, source_inputs
from .streaming import (
    HIDDEN,
    other_decoder,
    outputs,
    produce,
    request_of,
    shared_inputs,
    ui_output,
    validate,
    video_outputs,
    with_start,
)
from .types import RFTimeline, State, Timeline

REAL_TIME = "real time"
PACES = [REAL_TIME, "as fast as possible"]
"""How fast a live stream is made: no faster than it plays, or as it can."""
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
                    tooltip="Let other prompts that wait in the queue through, and go on after "
                    "them by itself: this run ends, and waits as a new one at the queue's end. "
                    "Take that out of the queue to end the stream.",
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
                *source_inputs("the prompt alone goes on"),
            ],
            outputs=video_outputs(),
            hidden=HIDDEN,
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
    def fingerprint_inputs(cls, **inputs: Any) -> int:
        running = host.running()
        return 0 if running is None else times_given_way(running.node_id)

    @classmethod
    @checked_execute
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
        source: Any = None,
        strength: float = GUIDE_STRENGTH,
        source_end: AtEnd = "stop",
        source_fit: Fit = "crop",
    ) -> io.NodeOutput:
        how = (strength, source_end, source_fit)
        log = _log_named(replay) if replay.strip() else None

        def begun() -> LiveRun:
            if log is not None:
                prompts = _single(clip, log.header.prompt)
            else:
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
                source=clip_of(source, *how),
            )
            if log is not None:
                request = _as_logged(request, log)
            check_state(request)
            first, later = _prompts(request, log)
            return LiveRun(
                request=with_start(request, start_image),
                result=RunResult(),
                clip=clip,
                first=first,
                later=later,
                limits=Limits(max_bytes=rewind_memory << 20),
                rate=request.fps if pace == REAL_TIME else None,
                max_seconds=max_seconds,
                give_way=give_way,
                osc_port=osc_port,
                autosaves=keep_state != "none",
            )

        with resumed() as suspended:
            if suspended is not None:
                suspended.attach(model, clip, vae)
            live = suspended or begun()
            make = live.run if log is None else partial(live.replay, log)
            request, result = live.request, live.result
            snapshot = produce(request, keep_state, result, make)
        lines = [live.summary(log is not None), *other_decoder(request)]
        if request.source is None:
            lines += idle_inputs(*how)
        else:
            lines += place_notes(request.source, request.snapshot, request.fps)
            lines += live.source_notes()
        lines += doubtful(model, vae)
        if timeline is not None and log is None and text.strip() not in ("", _FIRST):
            lines.append("ignored: text, as a timeline is connected")
        text = "\n".join([*lines, *ignored(model, request.prompts)])
        if live.suspended:
            blocked = [host.block(None)] * len(video_outputs())
            ui = {"text": (text,), "suspended": (True,)}  # the video is in the player still
            return io.NodeOutput(*blocked, ui=ui)
        return io.NodeOutput(*outputs(cls, request, result, snapshot), ui=ui_output(result, text))


def _single(clip: Any, text: str) -> Timeline:
    text = Prompt(text=text).text
    timeline = PromptTimeline().append(0, "s", Switch(), text)
    return Timeline(timeline=timeline, embeds={text: encode(clip, text)})


def _prompts(request: Request, log: Log | None) -> tuple[ResolvedEntry, tuple[ResolvedEntry, ...]]:
    """The prompt that a session begins with, and those that come by themselves."""
    total = clock_of(request).num_chunks(request.length, "s") if request.length else None
    timeline = request.prompts.timeline
    parts = any(entry.unit == "part" for entry in timeline.entries)
    if parts and total is None:
        raise ValueError("equal parts share a length: set max_seconds, or give each prompt a time")
    first, *later = timeline.resolve(clock_of(request), total if parts else None)
    if log is None and len(later) > MAX_COMING:
        raise ValueError(
            f"the timeline has {len(later) + 1} prompts; a live stream takes {MAX_COMING + 1}"
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


def _as_logged(request: Request, log: Log) -> Request:
    """The request with the size, the seed and the settings that a log has."""
    facts, (cache, sampler) = log.header.stream, log.configs
    return replace(
        request,
        source=_source_as_logged(request, log.header.source),
        width=facts["width"],
        height=facts["height"],
        seed=facts["seed"],
        cache=cache,
        sampler=sampler,
    )


def _source_as_logged(request: Request, facts: dict[str, Any] | None) -> Clip | None:
    """The source with the strength, the end and the fit that a log has."""
    source = request.source
    if facts is None and source is None:
        return None
    if facts is None:
        raise ValueError("the log's session had no source; disconnect source to replay it")
    if source is None:
        raise ValueError("the log's session had a source; connect the same one to replay it")
    if facts.get("digest") != source.footage.digest:
        raise ValueError("the log's session had another source; connect that one to replay it")
    how = {"at_end": facts.get("at_end"), "fit": facts.get("fit"), "strength": facts["strength"]}
    return replace(source, **how)
