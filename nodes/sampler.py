"""The Streaming Sampler: prompts to a video that is written while it is made."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..rf_core.config import CacheConfig
from ..rf_core.source import AtEnd
from ..rf_core.stream import GUIDE_STRENGTH
from ..rf_core.video import Fit
from .border import checked_execute
from .ignored import doubtful, ignored
from .join import VIDEO
from .loaders import CATEGORY
from .prompt import timeline_of
from .run import Request, RunResult, plan, prompt_notes, run
from .source import clip_of, idle_inputs, place_notes, source_inputs
from .streaming import (
    HIDDEN,
    other_decoder,
    outputs,
    produce,
    request_of,
    shared_inputs,
    summary,
    ui_output,
    validate,
    video_outputs,
    with_start,
)
from .types import UNITS, RFTimeline, State


class StreamingSampler(io.ComfyNode):
    """A MODEL and prompts to LATENT, VIDEO, IMAGE and state."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        shared = shared_inputs()
        return io.Schema(
            node_id="RFStreamingSampler",
            display_name="Streaming Sampler",
            category=CATEGORY,
            description="Makes a video of any length chunk by chunk, following prompts in time. "
            "With a VAE, images are decoded and written to an MP4 as they are made.",
            search_aliases=[
                CATEGORY,
                "wan video sampler",
                "long video",
                "endless",
                "infinite video",
                "continue video",
                "extend video",
                "real-time video",
                "text to video",
                "autoregressive",
            ],
            inputs=[
                shared["model"],
                io.MultiType.Input(
                    "prompt",
                    types=[io.Conditioning, RFTimeline],
                    tooltip="One prompt, or a timeline of several.",
                ),
                shared["width"],
                shared["height"],
                io.Float.Input(
                    "length",
                    default=10.0,
                    min=0.1,
                    max=1e6,
                    step=0.5,
                    round=False,
                    tooltip="How long this run goes on, in the unit below.",
                ),
                io.Combo.Input(
                    "unit",
                    options=list(UNITS),
                    default="seconds",
                    tooltip="16 frames make a second; a chunk is 12 frames. The video ends with "
                    "the chunk that reaches the length.",
                ),
                shared["seed"],
                shared["steps"],
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Wan 2.1 VAE, or TAEHV for speed. Without one only LATENT and state "
                    "come out.",
                ),
                shared["sink"],
                shared["start_image"],
                shared["start_latent"],
                shared["state"],
                io.Int.Input(
                    "keep_images",
                    default=81,
                    min=-1,
                    max=100_000,
                    optional=True,
                    tooltip="How many of the last images go to IMAGE; -1 for all. At 832x480 a "
                    "second takes 77 MB of RAM, a minute 4.6 GB: use VIDEO for long ones.",
                ),
                io.Int.Input(
                    "keep_latents",
                    default=-1,
                    min=-1,
                    max=100_000,
                    optional=True,
                    advanced=True,
                    tooltip="How many of the last latent frames go to LATENT; -1 for all. At "
                    "832x480 a minute takes 96 MB of RAM.",
                ),
                shared["keep_state"],
                io.String.Input(
                    "filename_prefix",
                    default="video/reward_forcing",
                    optional=True,
                    tooltip="Where in the output folder the MP4 is written.",
                ),
                io.Boolean.Input(
                    "join",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="With a state: the MP4, and VIDEO, begin with the video that the state "
                    "goes on from, so that one file holds all of it. IMAGE and LATENT are of the "
                    "new part.",
                ),
                io.Int.Input(
                    "reuse_memory",
                    default=1024,
                    min=0,
                    max=65536,
                    optional=True,
                    advanced=True,
                    tooltip="RAM in MB that runs may keep, so that another end, another length or "
                    "Cancel does not make the beginning again. A minute at 832x480 takes 96. 0 "
                    "keeps nothing, and makes all of it anew.",
                ),
                *source_inputs("the video ends with it"),
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
    @checked_execute
    def execute(
        cls,
        model: Any,
        prompt: Any,
        width: int,
        height: int,
        length: float,
        unit: str,
        seed: int,
        steps: int,
        vae: Any = None,
        sink: CacheConfig | None = None,
        start_image: Any = None,
        start_latent: Any = None,
        state: State | None = None,
        keep_images: int = 81,
        keep_latents: int = -1,
        keep_state: str = "compact",
        filename_prefix: str = "video/reward_forcing",
        join: bool = False,
        reuse_memory: int = 1024,
        source: Any = None,
        strength: float = GUIDE_STRENGTH,
        source_end: AtEnd = "stop",
        source_fit: Fit = "crop",
    ) -> io.NodeOutput:
        how = (strength, source_end, source_fit)
        request = request_of(
            cls,
            model,
            timeline_of(prompt),
            length=length,
            unit=unit,
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
            join=join,
            reuse_memory=reuse_memory,
        )
        plan(request)
        request, result = with_start(request, start_image), RunResult()
        snapshot = produce(request, keep_state, result, lambda load: run(request, result))
        lines = [summary(request, result), *_alone(request, join), *other_decoder(request)]
        lines += idle_inputs(*how) if request.source is None else _of_source(request, result)
        made = result.chunks if result.source_ended else None
        lines += [*doubtful(model, vae), *prompt_notes(request, made)]
        text = "\n".join([*lines, *ignored(model, request.prompts)])
        return io.NodeOutput(*outputs(cls, request, result, snapshot), ui=ui_output(result, text))


def _of_source(request: Request, result: RunResult) -> list[str]:
    """Where a run begins in its source, and where that ends before the length is reached."""
    clip = request.source
    assert clip is not None, "there is one"
    lines = place_notes(clip, request.snapshot, request.fps)
    if result.source_ended:
        seconds = result.place.images / request.fps
        lines.append(
            f"the source ends at {seconds:.2f} s, and the video with it; source_end hold or loop "
            "goes on"
        )
    if clip.strength == 1:
        lines.append("ignored: what the source shows, as strength 1 is the prompt alone")
    return lines


def _alone(request: Request, join: bool) -> list[str]:
    """What is to be known where a video that goes on is not one file."""
    if request.path is None or request.snapshot is None:
        return ["ignored: join, which needs a state and a vae"] if join else []
    note = "the file holds the new part alone"
    video = request.snapshot.facts.get(VIDEO)
    return [] if join else [f"{note}; turn on join to have all in one file" if video else note]
