"""What the nodes that stream share: inputs, the request made of them, and what they give."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from comfy_api.latest import InputImpl, io, ui
from einops import rearrange

from ..rf_core.config import (
    NUM_TRAIN_TIMESTEPS,
    PUBLISHED_STEPS,
    SPATIAL_FACTOR,
    WAN_SIZE,
    CacheConfig,
    ModelConfig,
    SamplerConfig,
)
from ..rf_core.control import ENCODINGS
from ..rf_core.state import cache_config_of
from ..rf_core.stream import NO_CONTROL, NO_GUIDES, latent_size, start_latents
from . import host, reuse
from .control_input import ControlInput
from .decoders import decoder_of
from .inputs import checked, set_on_node
from .join import previous_video, with_video
from .names import ROOM, place
from .run import Request, RunResult, clock_of, images_of, latents_of
from .source import Clip
from .types import PRESET_VALUES, SINK_VALUES, RFControl, RFSink, RFState, State, Timeline

STATES = ["compact", "exact", "none"]
UNIT = SPATIAL_FACTOR * ModelConfig.patch_size[1]
"""Pixels that width and height are multiples of."""

Make = Callable[[Callable[[Any], None]], None]
"""Streams; what it is given loads the models again, see `host.loaded`."""

NO_LATENT = "keep_latents of {node} is 0: raise it to get LATENT"
NO_IMAGE = "keep_images of {node} is 0: raise it to get IMAGE"
NO_VAE = "connect a VAE to the vae input of {node} to get VIDEO and IMAGE"
NO_STATE = "keep_state of {node} is none: choose compact or exact to get a state"


def shared_inputs() -> dict[str, Any]:
    """The inputs that every node that streams has, by name."""
    inputs = [
        io.Model.Input("model", tooltip="From Load RF Model or Load RF Demo."),
        io.Int.Input(
            "width",
            default=WAN_SIZE[1],
            min=UNIT,
            max=4096,
            step=UNIT,
            tooltip="In pixels. The published student was trained at 832x480, the demo at 64x64.",
        ),
        io.Int.Input(
            "height",
            default=WAN_SIZE[0],
            min=UNIT,
            max=4096,
            step=UNIT,
            tooltip="In pixels. Memory and time follow width x height.",
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
            default=len(PUBLISHED_STEPS),
            min=1,
            max=16,
            tooltip="Denoising steps a chunk. 4 takes the model's own, also where it was trained "
            "for another number.",
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
    ]
    return {each.id: each for each in inputs}


def control_input() -> Any:
    """The input for what controls a stream; it came last and stands last."""
    return RFControl.Input(
        "control",
        optional=True,
        tooltip="From Control Video: what the video follows beside its prompt. Needs Load RF "
        "Control before the model input, and a VAE.",
    )


HIDDEN = [io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id]
"""What such a node gets beside its inputs: for the file's metadata, and its number."""


def video_outputs() -> list[Any]:
    """The sockets of what `outputs` gives."""
    return [
        io.Latent.Output(display_name="LATENT"),
        io.Video.Output(display_name="VIDEO"),
        io.Image.Output(display_name="IMAGE"),
        RFState.Output(display_name="state"),
    ]


def validate(node: type[io.ComfyNode], **given: Any) -> bool | str:
    """Whether what is set on a node is in order, or what is amiss."""
    given = set_on_node(**given)
    try:
        height, width = given.get("height", UNIT), given.get("width", UNIT)
        latent_size(height, width, ModelConfig.patch_size)
        checked(node, given)
        if "filename_prefix" in given:
            place(given["filename_prefix"], "filename_prefix", ROOM)
    except ValueError as error:
        return str(error)
    return True


def request_of(
    node: type[io.ComfyNode],
    model: Any,
    prompts: Timeline,
    *,
    length: float,
    unit: str,
    width: int,
    height: int,
    seed: int,
    steps: int,
    vae: Any,
    sink: CacheConfig | None,
    start_image: Any,
    start_latent: Any,
    state: State | None,
    keep_images: int,
    keep_latents: int,
    filename_prefix: str,
    source: Clip | None,
    control: ControlInput | None,
    join: bool = False,
    reuse_memory: int = 0,
) -> Request:
    """What the inputs of a node ask for; of a start image, its latents are made by `with_start`."""
    _one_start(start_image, start_latent, state)
    snapshot = state.snapshot if state else None
    base, settings = host.student_of(model), host.settings_of(model)
    format, cache = base.latent_format, _cache(sink, state, settings)
    latent_size(height, width, base.diffusion_model.config.patch_size)
    decoder = decoder_of(vae, format) if vae is not None else None
    path = None
    if decoder is not None:
        path = host.output_file(filename_prefix, width, height, ".mp4")
    sampler = sampler_of(steps, host.schedule_of(model))
    if source is not None:
        _check_source(source, decoder, sampler)
        source.footage.reader(height, width, settings.family.fps, source.at_end, source.fit).close()
    if control is not None:
        _check_control(control, model, decoder, sampler, cache)
        control.check(height, width, settings.family.fps)
        control = control.placed(snapshot)
    elif snapshot is None or "control" not in snapshot.facts:
        model = host.without_control(model)
    return Request(
        model=model,
        prompts=prompts,
        length=length,
        unit=unit,
        width=width,
        height=height,
        seed=seed,
        sampler=sampler,
        cache=cache,
        fps=settings.family.fps,
        decoder=decoder,
        path=path,
        metadata=_metadata(node.hidden),
        start_latents=_latents(start_latent, format, cache),
        snapshot=snapshot,
        source=source and source.placed(snapshot),
        control=control,
        previous=previous_video(state.snapshot) if join and state and decoder else None,
        reuse_bytes=reuse_memory << 20,
        node_id=host.unique_id(node),
        keep_images=keep_images if decoder else 0,
        keep_latents=keep_latents,
    )


def with_start(request: Request, start_image: Any) -> Request:
    """The request with a start image's latents; before the student is loaded.

    To encode it, ComfyUI may unload a student that streams already.
    """
    if start_image is None:
        return request
    return replace(request, start_latents=_encoded(start_image, request))


def produce(request: Request, keep_state: str, result: RunResult, make: Make) -> Any:
    """Let `make` stream; the state it leaves. `result` says what there is, also after a stop."""
    host.reset_peak_memory(request.model.load_device)
    result.path = request.path
    try:
        return _with_memory(request, keep_state, result, make)
    except (Exception, host.Interrupted) as error:
        if result.chunks or isinstance(error, host.Interrupted):
            text = _stopped(request, result)
            host.log(text)
            if request.node_id is not None:
                host.send_ui_output(request.node_id, ui_output(result, text))
        raise


def _with_memory(request: Request, keep_state: str, result: RunResult, make: Make) -> Any:
    base = host.student_of(request.model)
    size = latent_size(request.height, request.width, base.diffusion_model.config.patch_size)
    further = host.control_layers(request.model)
    memory = base.stream_memory(1, size, request.cache, request.sampler, further)
    others = []
    if request.decoder is not None:
        others = [request.decoder.vae.patcher]
        chunk = request.cache.chunk_frames
        if request.decoder.device == request.model.load_device:
            memory += request.decoder.decode_bytes(request.height, request.width, chunk)
            streams = (request.source is not None) + ENCODINGS * (request.control is not None)
            memory += streams * request.decoder.encode_bytes(request.height, request.width)
    about = (
        f"a stream of {request.width}x{request.height} takes about {memory / 2**30:.1f} GiB beside "
        "the weights"
    )
    host.log(about)
    try:
        with host.loaded(request.model, others, memory) as load_again:
            make(load_again)
            if keep_state == "none" or result.stream is None:
                return None
            with host.deferred_interrupt():  # all is made
                return result.stream.snapshot(compact=keep_state == "compact")
    except Exception as error:
        if not host.out_of_memory(error):
            raise
    # Only now, as the error holds on to what the stream held.
    host.free_memory()
    kept = (
        f" What was made until then is in {result.path.name}."
        if result.path and result.chunks
        else ""
    )
    raise host.OutOfMemory(
        f"memory ran out: {about}, most of it in proportion to width x height and window "
        f"({request.cache.window_frames} frames). Half of each side takes a quarter; "
        "weight_dtype float8_e4m3fn halves the weights; TAEHV in place of the Wan VAE saves "
        f"most of the decoding.{kept}"
    )


def ui_output(result: RunResult, text: str) -> dict[str, Any]:
    """Text and video as a node shows them."""
    kinds: dict[str, Any] = {"text": (text,)}
    if result.path is not None and result.path.exists():
        file = host.within_output(result.path)
        folder = file.parent.as_posix() if file.parent.parts else ""
        saved = ui.SavedResult(file.name, folder, io.FolderType.output)
        kinds |= ui.PreviewVideo([saved]).as_dict()
    return kinds


def outputs(
    node: type[io.ComfyNode], request: Request, result: RunResult, snapshot: Any
) -> list[Any]:
    """LATENT, VIDEO, IMAGE and state of what was made."""
    format = host.student_of(request.model).latent_format
    latents = latents_of(result, request.keep_latents)
    images = images_of(result, request.keep_images)
    state = None
    if snapshot is not None:
        source = {"model": host.settings_of(request.model).name, "seed": request.seed}
        if result.path is not None:
            snapshot = with_video(snapshot, result.path, result.run, result.num_images)
        if request.source is not None:
            snapshot = request.source.noted(snapshot, result.place)
        if request.control is not None:
            snapshot = request.control.noted(snapshot, result.control_place)
        state = State(snapshot=snapshot, source=source)

    def block(why: str) -> Any:
        return host.block(why.format(node=node.define_schema().display_name))

    return [
        block(NO_LATENT) if latents is None else {"samples": format.process_out(latents)},
        InputImpl.VideoFromFile(str(result.path)) if result.path else block(NO_VAE),
        block(NO_IMAGE if request.decoder else NO_VAE) if images is None else images,
        block(NO_STATE) if state is None else state,
    ]


def summary(request: Request, result: RunResult) -> str:
    """What was made, and how fast, in a line."""
    peak = host.peak_memory(request.model.load_device)
    clock, decoded = clock_of(request), result.path is not None
    if result.path is not None:
        seconds = result.num_images / request.fps
        what = f"{result.path.name}: {result.num_images} images, {seconds:.2f} s"
    else:
        seconds = clock.seconds(result.chunks)
        what = (
            f"{result.num_frames} latent frames, {seconds:.2f} s of video; no images without a VAE"
        )
    if request.previous is not None:
        seconds = request.previous.num_images / request.fps
        what += f", the first {seconds:.2f} s of {request.previous.path.name}"
    parts = [what, result.report.text(decoded)]
    if peak is not None:
        parts.append(f"peak memory {peak / 2**30:.1f} GiB")
    if result.reused:
        until = clock.seconds(result.reused)
        parts.append(
            f"the first {result.reused} chunks ({until:.2f} s) are re-used from an earlier run"
        )
    if request.reuse_bytes:
        parts.append(f"{reuse.num_bytes() / 2**20:.1f} MB kept for later runs")
    text = "; ".join(parts)
    host.log(text)
    return text


def other_decoder(request: Request) -> list[str]:
    """What is to be known where another decoder goes on than the one before an exact state."""
    snapshot, decoder = request.snapshot, request.decoder
    if snapshot is None or decoder is None or snapshot.compact:
        return []
    if snapshot.facts["decoder_frames"] is None or snapshot.facts.get("decoder") == decoder.kind:
        return []
    return [
        "note: the state's images were decoded by another VAE; this one begins at its last ones"
    ]


def _stopped(request: Request, result: RunResult) -> str:
    clock = clock_of(request)
    if not result.chunks:
        text = "stopped before its first chunk was done"
    elif result.path is not None:
        seconds = result.num_images / request.fps
        text = f"stopped: {result.path.name} keeps {result.num_images} images, {seconds:.2f} s"
    else:
        seconds = clock.seconds(result.chunks)
        text = f"stopped after {result.num_frames} latent frames, {seconds:.2f} s of video"
    if result.state is not None and result.state.exists():
        return f"{text}; Load Stream State has where it ended, as {result.state.name}"
    return f"{text}; run again with seed {request.seed} to go on" if result.resumable else text


def sampler_of(steps: int, trained: SamplerConfig) -> SamplerConfig:
    """The checkpoint's schedule, or one of as many even steps as are asked for.

    The input's default asks for none: it is in every workflow, whatever model is loaded in it.
    """
    if steps in (len(PUBLISHED_STEPS), len(trained.steps)):
        return trained
    even = tuple(NUM_TRAIN_TIMESTEPS * (steps - i) // steps for i in range(steps))
    return replace(trained, steps=even)


def _one_start(image: Any, latent: Any, state: Any) -> None:
    given = {"start_image": image, "start_latent": latent, "state": state}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} are connected; a video begins in one way only")


def _check_source(source: Clip, decoder: Any, sampler: SamplerConfig) -> None:
    if decoder is None:
        raise ValueError("a source needs a VAE: connect one to the vae input, or disconnect source")
    if sampler.rolling:
        raise ValueError(f"a source is connected, and {NO_GUIDES}, or disconnect source")


def _check_control(
    control: ControlInput, model: Any, decoder: Any, sampler: SamplerConfig, cache: CacheConfig
) -> None:
    if host.control_of(model) is None:
        raise ValueError(
            "control is connected, and the model has no network that follows it: put Load RF "
            "Control between the model's loader and this node"
        )
    if decoder is None:
        raise ValueError("a control needs a VAE: connect one to the vae input")
    if sampler.rolling:
        raise ValueError(f"control is connected, and {NO_CONTROL}")
    if (number := control.num_references) > cache.opening_frames:
        raise ValueError(
            f"reference has {number} pictures, and they lie in the sink, which has "
            f"{cache.opening_frames} frames; connect fewer, or raise sink_frames of EMA-Sink Config"
        )


def control_notes(request: Request, model: Any) -> list[str]:
    """What is to be known of a control, or of its network that has none, a line each."""
    if request.control is not None:
        return request.control.notes(request.snapshot, request.fps)
    unused = host.control_of(model) is not None
    return ["ignored: the network of Load RF Control, as control is not connected"] * unused


def _cache(sink: CacheConfig | None, state: State | None, settings: host.Settings) -> CacheConfig:
    """What the user chose of the sink, else what the state was made with, else the checkpoint's."""
    if sink is None and state is not None:
        return cache_config_of(state.snapshot)
    if sink is None:
        return settings.cache
    usual, values = CacheConfig(), {name: getattr(sink, name) for name in SINK_VALUES}
    for name in PRESET_VALUES:
        if (value := getattr(sink, name)) != getattr(usual, name):
            values[name] = value
    return replace(settings.cache, **values)


def _latents(start: Any, format: Any, cache: CacheConfig) -> Any:
    if start is None:
        return None
    samples = start["samples"]
    frames = samples.shape[2] if samples.ndim == 5 else 0
    least = cache.first_frames
    frames -= (frames - least) % cache.chunk_frames
    if frames < least:
        raise ValueError(
            f"start_latent has shape {list(samples.shape)}; a video's latents are [1, 16, frames, "
            f"height/8, width/8] with at least {least} frames"
        )
    return format.process_in(samples[:1, :, -frames:].float())


def _encoded(start: Any, request: Request) -> Any:
    if request.decoder is None:
        raise ValueError("a start image needs a VAE: connect one, or give a start_latent")
    images = rearrange(start[..., :3], "t h w c -> t c h w")
    clip = host.resize(images, request.width, request.height)[None]
    return start_latents(clip, request.decoder, request.cache)


def _metadata(hidden: Any) -> dict[str, str]:
    kept = {}
    if hidden.prompt is not None:
        kept["prompt"] = json.dumps(hidden.prompt)
    for name, value in (hidden.extra_pnginfo or {}).items():
        kept[name] = json.dumps(value)
    return kept
