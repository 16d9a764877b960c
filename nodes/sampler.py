"""The Streaming Sampler: prompts to a video that is written while it is made."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from comfy_api.latest import InputImpl, io, ui
from einops import rearrange

from ..rf_core.config import (
    FPS,
    NUM_TRAIN_TIMESTEPS,
    SPATIAL_FACTOR,
    WAN_SIZE,
    CacheConfig,
    ModelConfig,
    SamplerConfig,
)
from ..rf_core.state import cache_config_of
from ..rf_core.stream import latent_size, start_clip
from . import host, reuse
from .border import spoken
from .decoders import decoder_of
from .ignored import doubtful, ignored
from .inputs import checked, set_on_node
from .join import VIDEO, ended, head_of
from .loaders import CATEGORY
from .names import ROOM, place
from .prompt import timeline_of
from .run import Made, Request, clock_of, images_of, latents_of, plan, prompt_notes, run
from .types import UNITS, RFSink, RFState, RFTimeline, State

STATES = ["compact", "exact", "none"]
UNIT = SPATIAL_FACTOR * ModelConfig.patch_size[1]
"""Pixels that width and height are multiples of."""

NO_LATENT = "keep_latents of Streaming Sampler is 0: raise it to get LATENT; -1 keeps all"
NO_IMAGE = "keep_images of Streaming Sampler is 0: raise it to get IMAGE; -1 keeps all"
NO_VAE = "connect a VAE to the vae input of Streaming Sampler to get VIDEO and IMAGE"
NO_STATE = "keep_state of Streaming Sampler is none: choose compact or exact to get a state"


class StreamingSampler(io.ComfyNode):
    """A MODEL and prompts to LATENT, VIDEO, IMAGE and state."""

    @classmethod
    def define_schema(cls) -> io.Schema:
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
                io.Model.Input("model", tooltip="From Load RF Model or Load RF Demo."),
                io.MultiType.Input(
                    "prompt",
                    types=[io.Conditioning, RFTimeline],
                    tooltip="One prompt, or a timeline of several.",
                ),
                io.Int.Input(
                    "width",
                    default=WAN_SIZE[1],
                    min=UNIT,
                    max=4096,
                    step=UNIT,
                    tooltip="In pixels. The published student was trained at 832x480, the demo at "
                    "64x64.",
                ),
                io.Int.Input(
                    "height",
                    default=WAN_SIZE[0],
                    min=UNIT,
                    max=4096,
                    step=UNIT,
                    tooltip="In pixels. Memory and time follow width x height.",
                ),
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
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The same seed gives the same video, whatever its length. To go on "
                    "from a state as if it had never stopped, keep the seed.",
                ),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=16,
                    tooltip="Denoising steps a chunk. The student was trained for 4.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Wan 2.1 VAE, or TAEHV for speed. Without one only LATENT and state "
                    "come out.",
                ),
                RFSink.Input("sink", optional=True, tooltip="From EMA-Sink Config."),
                io.Image.Input(
                    "start_image",
                    optional=True,
                    tooltip="A picture or clip to begin with; needs a VAE. Experimental: the "
                    "student was trained on text only.",
                ),
                io.Latent.Input(
                    "start_latent",
                    optional=True,
                    tooltip="Latents to begin with: their last frames that make whole chunks.",
                ),
                RFState.Input("state", optional=True, tooltip="Go on where another run ended."),
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
                io.Combo.Input(
                    "keep_state",
                    options=STATES,
                    default="compact",
                    optional=True,
                    advanced=True,
                    tooltip="compact: a few MB, the window is made again on going on, with a "
                    "difference you hardly see. exact: goes on bit for bit; takes the whole cache "
                    "(2.6 GB at 832x480).",
                ),
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
        given = set_on_node(width=width, height=height, filename_prefix=filename_prefix)
        try:
            latent_size(height or UNIT, width or UNIT, ModelConfig.patch_size)
            checked(cls, given)
            if filename_prefix is not None:
                place(filename_prefix, "filename_prefix", ROOM)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    @spoken
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
    ) -> io.NodeOutput:
        _one_start(start_image, start_latent, state)
        base, settings = host.student_of(model), host.settings_of(model)
        format, cache = base.latent_format, _cache(sink, state, settings)
        latent_size(height, width, base.diffusion_model.config.patch_size)
        decoder = decoder_of(vae, format) if vae is not None else None
        path = None
        if decoder is not None:
            path = host.output_file(filename_prefix, width, height, ".mp4")
        request = Request(
            model=model,
            prompts=timeline_of(prompt),
            length=length,
            unit=unit,
            width=width,
            height=height,
            seed=seed,
            sampler=sampler_of(steps, host.schedule_of(model)),
            cache=cache,
            decoder=decoder,
            path=path,
            metadata=_metadata(cls.hidden),
            start_latents=_latents(start_latent, format, cache),
            snapshot=state.snapshot if state else None,
            head=head_of(state.snapshot) if join and state and decoder else None,
            reuse_bytes=reuse_memory << 20,
            node_id=host.number_of(cls),
            keep_images=keep_images if decoder else 0,
            keep_latents=keep_latents,
        )
        plan(request)
        if start_image is not None:
            # Now: to encode it, ComfyUI may unload a student that streams already.
            request = replace(request, start_latents=_encoded(start_image, request))
        host.forget_peak(model.load_device)
        made = Made()
        try:
            snapshot = _run(request, keep_state, made)
        except (Exception, host.Interrupted) as error:
            if made.chunks or isinstance(error, host.Interrupted):
                _show(request, _stopped(request, made))
            raise
        peak = host.peak_memory(model.load_device)
        outputs = _outputs(request, made, snapshot, format)
        lines = [_told(request, made, peak), *_alone(request, join), *_other_decoder(request)]
        lines += [*doubtful(model, vae), *prompt_notes(request)]
        text = "\n".join([*lines, *ignored(model, request.prompts)])
        return io.NodeOutput(*outputs, ui=_shown(request, text))


def _shown(request: Request, text: str) -> dict[str, Any]:
    """Text and video as a node shows them."""
    shown: dict[str, Any] = {"text": (text,)}
    if request.path is not None and request.path.exists():
        place = host.within_output(request.path)
        folder = place.parent.as_posix() if place.parent.parts else ""
        saved = ui.SavedResult(place.name, folder, io.FolderType.output)
        shown |= ui.PreviewVideo([saved]).as_dict()
    return shown


def _show(request: Request, text: str) -> None:
    """Show a run that was stopped as one that ends is shown."""
    host.log(text)
    if request.node_id is not None:
        host.show(request.node_id, _shown(request, text))


def _run(request: Request, keep_state: str, made: Made) -> Any:
    """Make the video and the state it leaves; `made` says what there is, also after a stop."""
    base = host.student_of(request.model)
    size = latent_size(request.height, request.width, base.diffusion_model.config.patch_size)
    memory = base.stream_memory(1, size, request.cache)
    others = []
    if request.decoder is not None:
        others = [request.decoder.vae.patcher]
        chunk = request.cache.chunk_frames
        if request.decoder.device == request.model.load_device:
            memory += request.decoder.decode_bytes(request.height, request.width, chunk)
    about = (
        f"a stream of {request.width}x{request.height} takes about {memory / 2**30:.1f} GiB beside "
        "the weights"
    )
    host.log(about)
    try:
        with host.loaded(request.model, others, memory):
            run(request, made)
            if keep_state == "none" or made.stream is None:
                return None
            with host.held_interrupt():  # all is made
                return made.stream.snapshot(compact=keep_state == "compact")
    except Exception as error:
        if not host.out_of_memory(error):
            raise
    # Only now, as the error holds on to what the stream held.
    host.free_memory()
    kept = (
        f" What was made until then is in {request.path.name}."
        if request.path and made.chunks
        else ""
    )
    raise host.OutOfMemory(
        f"memory ran out: {about}, most of it in proportion to width x height and window "
        f"({request.cache.window_frames} frames). Half of each side takes a quarter; "
        "weight_dtype float8_e4m3fn halves the weights; TAEHV in place of the Wan VAE saves "
        f"most of the decoding.{kept}"
    )


def _outputs(request: Request, made: Any, snapshot: Any, format: Any) -> list[Any]:
    latents = latents_of(made, request.keep_latents)
    images = images_of(made, request.keep_images)
    state = None
    if snapshot is not None:
        name = host.settings_of(request.model).name
        if request.path is not None:
            snapshot = ended(snapshot, request.path, made.run, made.num_images)
        state = State(snapshot=snapshot, source={"model": name, "seed": request.seed})
    return [
        host.block(NO_LATENT) if latents is None else {"samples": format.process_out(latents)},
        InputImpl.VideoFromFile(str(request.path)) if request.path else host.block(NO_VAE),
        host.block(NO_IMAGE if request.decoder else NO_VAE) if images is None else images,
        host.block(NO_STATE) if state is None else state,
    ]


def _told(request: Request, made: Made, peak: int | None) -> str:
    clock, decoded = clock_of(request), request.path is not None
    if request.path is not None:
        what = f"{request.path.name}: {made.num_images} images, {made.num_images / FPS:.2f} s"
    else:
        seconds = clock.seconds(made.num_frames // clock.chunk_frames)
        what = f"{made.num_frames} latent frames, {seconds:.2f} s of video; no images without a VAE"
    if request.head is not None:
        what += f", the first {request.head.num_images / FPS:.2f} s of {request.head.path.name}"
    parts = [what, made.report.text(decoded)]
    if peak is not None:
        parts.append(f"peak memory {peak / 2**30:.1f} GiB")
    if made.reused:
        until = clock.seconds(made.reused)
        parts.append(
            f"the first {made.reused} chunks ({until:.2f} s) are re-used from an earlier run"
        )
    if request.reuse_bytes:
        parts.append(f"{reuse.num_bytes() / 2**20:.1f} MB kept for later runs")
    text = "; ".join(parts)
    host.log(text)
    return text


def _alone(request: Request, join: bool) -> list[str]:
    """What is to be known where a video that goes on is not one file."""
    if request.path is None or request.snapshot is None:
        return ["ignored: join, which needs a state and a vae"] if join else []
    told = "the file holds the new part alone"
    said = request.snapshot.facts.get(VIDEO)
    return [] if join else [f"{told}; turn on join to have all in one file" if said else told]


def _other_decoder(request: Request) -> list[str]:
    """What is to be known where another decoder goes on than the one before an exact state."""
    snapshot, decoder = request.snapshot, request.decoder
    if snapshot is None or decoder is None or snapshot.compact:
        return []
    if snapshot.facts["decoder_frames"] is None or snapshot.facts.get("decoder") == decoder.kind:
        return []
    return [
        "note: the state's images were decoded by another VAE; this one begins at its last ones"
    ]


def _stopped(request: Request, made: Made) -> str:
    clock = clock_of(request)
    if not made.chunks:
        text = "stopped before its first chunk was done"
    elif request.path is not None:
        seconds = made.num_images / FPS
        text = f"stopped: {request.path.name} keeps {made.num_images} images, {seconds:.2f} s"
    else:
        seconds = clock.seconds(made.chunks)
        text = f"stopped after {made.num_frames} latent frames, {seconds:.2f} s of video"
    return f"{text}; run again with seed {request.seed} to go on" if made.goes_on else text


def sampler_of(steps: int, trained: SamplerConfig) -> SamplerConfig:
    """The checkpoint's schedule, or one of as many even steps as are asked for."""
    if steps == len(trained.steps):
        return trained
    even = tuple(NUM_TRAIN_TIMESTEPS * (steps - i) // steps for i in range(steps))
    return replace(trained, steps=even)


def _one_start(image: Any, latent: Any, state: Any) -> None:
    given = {"start_image": image, "start_latent": latent, "state": state}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} are connected; a video begins in one way only")


def _cache(sink: CacheConfig | None, state: State | None, settings: host.Settings) -> CacheConfig:
    """What the user chose, else what the state was made with, else the checkpoint's."""
    if sink is None and state is not None:
        return cache_config_of(state.snapshot)
    return sink or settings.cache


def _latents(start: Any, format: Any, cache: CacheConfig) -> Any:
    if start is None:
        return None
    samples = start["samples"]
    frames = samples.shape[2] if samples.ndim == 5 else 0
    frames -= frames % cache.chunk_frames
    if not frames:
        raise ValueError(
            f"start_latent has shape {list(samples.shape)}; a video's latents are [1, 16, frames, "
            f"height/8, width/8] with at least {cache.chunk_frames} frames"
        )
    return format.process_in(samples[:1, :, -frames:].float())


def _encoded(start: Any, request: Request) -> Any:
    if request.decoder is None:
        raise ValueError("a start image needs a VAE: connect one, or give a start_latent")
    images = rearrange(start[..., :3], "t h w c -> t c h w")
    clip = host.resize(images, request.width, request.height)[None]
    return request.decoder.encode(start_clip(clip, request.decoder, request.cache.chunk_frames))


def _metadata(hidden: Any) -> dict[str, str]:
    kept = {}
    if hidden.prompt is not None:
        kept["prompt"] = json.dumps(hidden.prompt)
    for name, value in (hidden.extra_pnginfo or {}).items():
        kept[name] = json.dumps(value)
    return kept
