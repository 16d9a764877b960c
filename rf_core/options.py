"""One run, resolved: what is asked for, checked, before anything large is loaded.

`Options` are what a user says, a `Plan` is what a run does. What is left to choose, `auto`, is
chosen by what the memory holds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch

from .attention import check_device
from .companions import OPTIONS, TEXT_ENCODER, VAE, belongs_with, check_vae
from .config import CacheConfig, Grid, ModelConfig, SamplerConfig, VaceConfig, recorded
from .control import ENCODINGS
from .control_inputs import ControlInputs
from .devices import preferred_dtype
from .families import AUTO, Family
from .memory.footprint import Sizes
from .memory.placement import decoder_config, free_bytes, text_sizes
from .memory.plan import Fit, OffloadMode, fit
from .prompts import ChunkClock, PromptTimeline, ResolvedEntry
from .ranges import LARGEST_SIDE, MANY, check_numbers, check_writable
from .source_input import SourceOptions
from .state import Snapshot
from .stream import NO_GUIDES, latent_size
from .video import RUN, VideoFormat, check_images, count_images, read_metadata
from .weights.checkpoint import read_checkpoint
from .weights.lora import Lora
from .weights.recognise import Told
from .weights.vace import fit_vace, read_vace

DEMO = Path(__file__).parent / "demo"
DEMO_CONTROL = DEMO / "control.safetensors"
"""The bundled control network, for the bundled student."""
SNAPSHOT_EVERY, SNAPSHOT_EVERY_CUDA = 20, 400
"""Chunks between snapshots; on a card one of 480x832 is 4.5 GB, which the network waits for."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where the weights lie; by default the bundled demo."""

    model: Path = DEMO / "student.safetensors"
    """Checkpoint of the student."""
    submodel: str | None = None
    """Network of a bundle; by default `generator_ema` goes before `generator`."""
    num_heads: int | None = None
    """Attention heads, for a checkpoint of unusual width that does not record them."""
    family: str = AUTO
    """Whose student it is, of `families.FAMILIES`; `auto`: what the file tells."""
    vae: Path = DEMO / "vae.safetensors"
    """Wan VAE, or TAEHV."""
    text_encoder: str = str(DEMO / "text_encoder.safetensors")
    """UMT5: a folder, a file or a hub id."""
    tokenizer: str | None = None
    """Folder or hub id of its tokenizer, where the encoder comes without one."""
    loras: tuple[Lora, ...] = ()
    """Adapters merged into the student."""
    control: Path | None = None
    """A VACE for the student, which follows `Options.control`."""

    def named(self) -> dict[str, Any]:
        """Names alone, for the record kept in videos and snapshots."""
        loras = [f"{lora.path.name}:{lora.strength:g}" for lora in self.loras]
        names = {"model": self.model.name, "submodel": self.submodel, "vae": self.vae.name}
        return {**names, "loras": loras, "control_model": self.control and self.control.name}


@dataclass(frozen=True, kw_only=True)
class Options:
    """One run. None takes the checkpoint's own setting, or else its family's."""

    timeline: PromptTimeline
    """What the video shows, and when."""
    output: Path
    """The MP4 to write."""
    files: Files = field(default_factory=Files)
    chunks: int | None = None
    """Length in chunks. Without it and `seconds` the run goes on until it is stopped."""
    seconds: float | None = None
    """Length in seconds, rounded up to whole chunks."""
    height: int | None = None
    """Picture rows, in pixels."""
    width: int | None = None
    """Picture columns, in pixels."""
    seed: int = 0
    cache: dict[str, Any] = field(default_factory=dict)
    """Fields of CacheConfig in place of the checkpoint's."""
    sampler: dict[str, Any] = field(default_factory=dict)
    """Fields of SamplerConfig in place of the checkpoint's."""
    start: Path | None = None
    """A picture or clip to begin with; of a clip the last images, as many as the window holds."""
    source: SourceOptions | None = None
    """What the chunks are guided by; see `Stream.generate`."""
    control: ControlInputs = field(default_factory=ControlInputs)
    """What controls it beside its prompts."""
    device: str = "cpu"
    dtype: torch.dtype | Literal["auto"] = torch.float32
    """What networks compute in; `auto`: what suits them and the device, or what was begun with."""
    weights: Literal["exact", "fp8"] = "exact"
    """`fp8` holds the blocks' linear layers in 8 bits: an approximation, in half the memory."""
    attention: str = "sdpa"
    """Name of an attention backend, or `auto` for the fastest here."""
    compile: bool = False
    """Whether torch.compile takes the blocks; it takes time at the start."""
    graphs: bool | Literal["auto"] = False
    """Whether the network's passes run as CUDA graphs; `auto`: where they can."""
    group_frames: int | Literal["auto"] | None = None
    """Latent frames decoded at once; fewer take less memory. None: a whole chunk."""
    offload: OffloadMode | Literal["auto"] = "none"
    """`stream` where the student's layers stay in host memory and are copied ahead of use."""
    text_offload: OffloadMode = "none"
    """The same for the text encoder's; chosen with `auto`."""
    keeps_text: bool = False
    """Whether the text encoder stays while the stream runs, for prompts to come."""
    keep_rotated: bool = True
    """Whether the cache keeps rotated keys, a third of its size; chosen with `auto`."""
    crf: int = 18
    """Quality of the MP4: 0 is lossless, 51 the worst."""
    snapshot_every: int | None = None
    """Chunks between two snapshots; 0 for none, None for what is usual on the device."""
    resume: bool = False
    """Go on with an output that was stopped."""
    overwrite: bool = False
    """Replace an output that is there."""

    def saves_after(self, chunks: int) -> bool:
        """Whether a snapshot is due once so many chunks are made."""
        usual = SNAPSHOT_EVERY_CUDA if self.device.startswith("cuda") else SNAPSHOT_EVERY
        every = usual if self.snapshot_every is None else self.snapshot_every
        return every > 0 and chunks % every == 0

    @property
    def records_passes(self) -> bool:
        """Whether the network's passes are to be recorded, where memory and place allow it."""
        possible = torch.device(self.device).type in ("cuda", "cpu") and not self.compile
        return possible if self.graphs == "auto" else self.graphs

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype`, where nothing is left to choose."""
        assert self.dtype != "auto", "plan() resolves it"
        return self.dtype

    @property
    def snapshot_path(self) -> Path:
        """Where the stream's state lies, beside the output."""
        return self.output.with_name(self.output.name + ".state.safetensors")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run with everything resolved that can be without its weights."""

    options: Options
    model: ModelConfig
    cache: CacheConfig
    sampler: SamplerConfig
    height: int
    width: int
    total: int | None
    """Chunks of the run; None when endless."""
    prompts: tuple[ResolvedEntry, ...]
    """Each prompt with the chunk it starts at."""
    snapshot: Snapshot | None
    """The state to go on from."""
    run: str | None
    """Names the run in its video and its snapshots; None in those of earlier versions."""
    choice: str | None = None
    """Which network of the model's file is taken; None where there is but one."""
    fit: Fit | None = None
    """What was chosen to suit the memory; None where all was given."""
    clip_chunks: int = 0
    """Chunks that `start` gives."""
    source_images: int | None = None
    """Images that the source has, where it stops and the file tells."""
    cut_short: bool = False
    """Whether the source's end is that of a video that was to be longer."""
    told: Told
    """Whose student the model is, and how that is known."""
    vace: VaceConfig | None = None
    """The control network's; None without one."""

    @property
    def family(self) -> Family:
        """How its authors stream it."""
        return self.told.preset

    @property
    def format(self) -> VideoFormat:
        """The MP4's."""
        options, fps = self.options, self.family.fps
        return VideoFormat(width=self.width, height=self.height, crf=options.crf, fps=fps)

    @property
    def grid(self) -> Grid:
        """Tokens of a latent frame."""
        patch = self.model.patch_size
        return Grid.of_latents(*latent_size(self.height, self.width, patch), patch)

    @property
    def clock(self) -> ChunkClock:
        """Chunks to images and seconds, this run's cuts counted."""
        cuts = [p.chunk for p in self.prompts if p.chunk and p.switch.mode == "cut"]
        return ChunkClock.of(
            self.cache, cuts=tuple(cuts), clip_chunks=self.clip_chunks, fps=self.family.fps
        )

    def passes(self, begun: int) -> list[int]:
        """Of each chunk after the first `begun`, the network's passes; of a start clip's, one."""
        assert self.total is not None, "the run has an end"
        firsts = {self.clip_chunks, *self.clock.cuts}
        return [
            (0 if chunk < self.clip_chunks else self.sampler.passes_of(chunk in firsts)) + 1
            for chunk in range(begun, self.total)
        ]

    def record(self) -> dict[str, Any]:
        """What made the video, as JSON: kept in its metadata and in snapshots."""
        options = self.options
        return {
            **options.files.named(),
            "family": self.told.family,
            "seed": options.seed,
            "width": self.width,
            "height": self.height,
            "cache": recorded(self.cache),
            "sampler": recorded(self.sampler),
            "dtype": str(options.torch_dtype).removeprefix("torch."),
            "attention": options.attention,
            "weights": options.weights,
            "crf": options.crf,
            "start": options.start and options.start.name,
            "source": options.source and options.source.record(),
            "control": options.control.record(),
            "prompts": [[p.chunk, str(p.switch), p.text] for p in self.prompts],
        }

    @property
    def metadata(self) -> dict[str, str]:
        """What the finished video carries."""
        return {"title": self.prompts[0].text, "comment": json.dumps(self.record())}


def model_path(name: str) -> Path:
    """The student that a command line names: `demo` is the bundled one, all else a path."""
    return Files().model if name == "demo" else Path(name)


def control_path(name: str) -> Path:
    """The control network that a command line names: `demo` is the bundled one."""
    return DEMO_CONTROL if name == "demo" else Path(name)


def files_of_model(
    model: Path, vae: Path | None, text_encoder: str | None, submodel: str | None = None
) -> tuple[Path, str]:
    """VAE and text encoder of a student: what is given, or the demo's where it belongs with them.

    ValueError where something is neither.
    """
    if vae is not None and text_encoder is not None:
        return vae, text_encoder
    if not model.exists():
        raise ValueError(f"there is no model at {model}; check the path")
    companions = read_checkpoint(model, submodel=submodel).companions
    demo, given = Files(), {VAE: vae, TEXT_ENCODER: text_encoder}
    own: dict[str, str | Path] = {VAE: demo.vae, TEXT_ENCODER: demo.text_encoder}
    missing = [
        kind
        for kind, place in given.items()
        if place is None and not belongs_with(companions, kind, own[kind])
    ]
    if missing:
        names = [companions[kind].name for kind in missing if kind in companions]
        trained = f"; it was trained with {' and '.join(names)}" if names else ""
        raise ValueError(
            f"--model {model} needs its {' and '.join(OPTIONS[kind] for kind in missing)} as well "
            f"(README, 'With the official checkpoint', says where to get them){trained}"
        )
    return vae or demo.vae, text_encoder or demo.text_encoder


def plan(options: Options) -> Plan:
    """Settle and check a run. ValueError, one sentence, for whatever is wrong."""
    _check_values(options)
    _check_files(options)
    files = options.files
    checkpoint = read_checkpoint(
        files.model, submodel=files.submodel, num_heads=files.num_heads, family=files.family
    )
    check_vae(files.model, checkpoint.companions, files.vae)
    vace = None
    if files.control is not None:
        vace = fit_vace(read_vace(files.control), checkpoint.config)
    cache = replace(checkpoint.cache or checkpoint.preset.cache, **options.cache)
    sampler = replace(checkpoint.sampler or checkpoint.preset.sampler, **options.sampler)
    native, fps = checkpoint.size, checkpoint.preset.fps
    height = native[0] if options.height is None else options.height
    width = native[1] if options.width is None else options.width
    latent_size(height, width, checkpoint.config.patch_size)
    if options.control.given and sampler.rolling:
        raise ValueError(
            "a rolling sampler takes no control, for it begins chunks before their control is "
            "there; use a student that makes one chunk at a time"
        )
    if (number := len(options.control.references)) > cache.opening_frames:
        raise ValueError(
            f"{number} pictures are given as --reference, and they lie in the sink, which has "
            f"{cache.opening_frames} frames; give fewer, or a larger --sink"
        )
    VideoFormat(width=width, height=height, crf=options.crf)
    clip_chunks = 0 if options.start is None else _clip_chunks(options.start, cache)
    clock = ChunkClock.of(cache, clip_chunks=clip_chunks, fps=fps)
    source_images = _source_images(options, sampler, fps)
    total = None if options.chunks is None else clock.num_chunks(options.chunks, "c")
    if options.seconds is not None:
        total = options.timeline.num_chunks(options.seconds, "s", clock)
    wanted = total
    if source_images is not None and not options.keeps_text:  # a live one goes on by its prompt
        total = min(_guided_chunks(options, source_images, clock), wanted or MANY)
    if options.compile and cache.storage == "int8":
        raise ValueError("an int8 cache is not compiled; leave out --compile or --cache int8")
    snapshot = _snapshot_of(options)
    made = _made(options, snapshot)
    if options.dtype == "auto":
        options = replace(options, dtype=_dtype(options.device, checkpoint.config, made))
    resolved = Plan(
        options=options,
        model=checkpoint.config,
        cache=cache,
        sampler=sampler,
        height=height,
        width=width,
        total=total,
        prompts=options.timeline.resolve(clock, total),
        snapshot=snapshot,
        choice=checkpoint.choice,
        run=uuid4().hex if snapshot is None else snapshot.facts.get(RUN),
        clip_chunks=clip_chunks,
        source_images=source_images,
        cut_short=wanted is not None and total != wanted,
        told=checkpoint.told,
        vace=vace,
    )
    _check_resume(resolved, made)
    return _placed(resolved)


def most_start_images(cache: CacheConfig) -> int:
    """How many images of a clip a run begins with: what the window cannot hold would be forgotten
    at once."""
    clock = ChunkClock.of(cache)
    return clock.images_before(cache.window_frames // cache.chunk_frames)


def _clip_chunks(start: Path, cache: CacheConfig) -> int:
    # As `stream.start_clip` takes them: whole chunks, or one of a single picture.
    images = count_images(start, most_start_images(cache))
    return max(1, ChunkClock.of(cache).chunk_at_image(images))


def _source_images(options: Options, sampler: SamplerConfig, fps: int) -> int | None:
    source = options.source
    if source is None:
        return None
    if sampler.rolling:
        raise ValueError(NO_GUIDES)
    if options.resume and not source.is_file:
        raise ValueError(
            f"the source {source.name} cannot be read again, so what it guided is not gone on "
            "with; leave out --resume"
        )
    source.check()
    return source.length(fps)


def _guided_chunks(options: Options, images: int, clock: ChunkClock) -> int:
    """How many chunks a source of so many images fills."""
    parts = any(entry.unit == "part" for entry in options.timeline.entries)
    prompts = options.timeline.resolve(clock, clock.chunk_at_image(images) if parts else None)
    cuts = [each.chunk for each in prompts if each.switch.mode == "cut"]
    chunks = clock.with_cuts(*cuts).chunk_at_image(images)
    if chunks <= clock.clip_chunks:
        first = clock.images_before(clock.clip_chunks + 1)
        raise ValueError(
            f"the source has {images} images at {clock.fps} a second, and {first} are needed for "
            "its first chunk; give a longer one, or --source-end hold or loop"
        )
    return chunks


def _sizes_of(resolved: Plan) -> Sizes:
    """What the memory of a run depends on."""
    options = resolved.options
    return Sizes(
        model=resolved.model,
        height=resolved.height,
        width=resolved.width,
        cache=resolved.cache,
        keep_rotated=options.keep_rotated,
        linear_bytes=1 if options.weights == "fp8" else None,
        sampler=resolved.sampler,
        dtype=options.torch_dtype,
        decoder=decoder_config(options.files.vae),
        device=torch.device(options.device).type,
        text=text_sizes(options.files.text_encoder),
        keeps_text=options.keeps_text,
        graphs=options.records_passes,
        encodes=int(options.source is not None) + ENCODINGS * options.control.given,
        vace=resolved.vace,
    )


def _placed(resolved: Plan) -> Plan:
    """The run with nothing left to choose. ValueError where no choice fits the memory."""
    options = resolved.options
    group = None if options.group_frames == "auto" else options.group_frames
    mode = None if options.offload == "auto" else options.offload
    if options.group_frames != "auto" and mode is not None:
        return resolved
    if options.group_frames is None:
        group = resolved.cache.chunk_frames
    must = options.graphs is True
    chosen = fit(
        _sizes_of(resolved),
        free_bytes(options.device),
        group_frames=group,
        offload="none" if must else mode,
        must_record=must,
    )
    placed = dict(vars(chosen.placement))
    if placed.pop("unrecorded"):
        placed["graphs"] = False
    return replace(resolved, options=replace(options, **placed), fit=chosen)


def _check_values(options: Options) -> None:
    if options.chunks is not None and options.seconds is not None:
        raise ValueError("both a length in chunks and one in seconds are given; give one")
    counts = dict.fromkeys(("chunks", "group_frames"), (1, MANY))
    sides = dict.fromkeys(("height", "width"), (1, LARGEST_SIDE))
    check_numbers(
        options, **counts, **sides, seconds=(0, MANY), snapshot_every=(0, MANY), seed=(0, 2**64 - 1)
    )
    check_numbers(options.files, num_heads=(1, MANY))
    check_device(options.device, options.dtype, options.attention)
    options.control.check_model(options.files.control)
    if options.compile and options.graphs is True:
        raise ValueError("compiled blocks are not recorded; leave out --compile or --graphs on")
    if "stream" in (options.offload, options.text_offload) and "cuda" not in options.device:
        raise ValueError(
            f"weights are to be streamed to {options.device}, which shares the host's memory; "
            "leave out --offload stream"
        )


def _check_files(options: Options) -> None:
    output, start = options.output, options.start
    if output.suffix.lower() != ".mp4":
        raise ValueError(f"the output is {output}; its name must end in .mp4")
    if output.is_dir():
        raise ValueError(f"the output {output} is a folder; name a file")
    if output.exists() and not (options.overwrite or options.resume):
        raise ValueError(
            f"{output} exists; choose another name, --overwrite it, or --resume a stopped run"
        )
    check_writable(output)
    check_writable(options.snapshot_path)  # the longest name of those beside the output
    if start is not None and not start.is_file():
        raise ValueError(f"there is no start picture or clip at {start}; check the path")
    if start is not None:
        check_images(start)
    encoder = Path(options.files.text_encoder)
    local = encoder.suffix or encoder.is_absolute()  # the rest may be a hub id
    wanted = {"model": options.files.model, "VAE": options.files.vae}
    for what, path in (wanted | {"text encoder": encoder} if local else wanted).items():
        if not path.exists():
            raise ValueError(f"there is no {what} at {path}; check the path")
    options.control.check_files()
    if (control := options.files.control) is not None and not control.exists():
        raise ValueError(f"there is no control model at {control}; check the path")
    for lora in options.files.loras:
        if not lora.path.exists():
            raise ValueError(f"there is no LoRA at {lora.path}; check the path")


def _snapshot_of(options: Options) -> Snapshot | None:
    # A run that was killed before its first snapshot begins again: it makes the same images.
    path = options.snapshot_path
    if not (options.resume and path.exists()):
        return None
    snapshot = Snapshot.load(path)
    _check_pair(options.output, path, snapshot)
    return snapshot


def _check_pair(video: Path, path: Path, snapshot: Snapshot) -> None:
    """ValueError where a snapshot is not of the run that made the video beside it."""
    if not video.exists():
        raise ValueError(
            f"{video} is gone, and the snapshot beside it, {path.name}, holds none of its images; "
            "put it back, or begin again with --overwrite in place of --resume"
        )
    if read_metadata(video).get(RUN) != snapshot.facts.get(RUN):
        raise ValueError(
            f"{path} is of another run than {video}; put back the snapshot of this one, or delete "
            "that one, and --resume makes the video from its beginning"
        )


def _made(options: Options, snapshot: Snapshot | None) -> dict[str, Any] | None:
    """The record of the run that is gone on with."""
    if snapshot is not None:
        return snapshot.facts.get("run")
    return _record_in(options.output) if options.resume and options.output.exists() else None


def _dtype(device: str, model: ModelConfig, made: dict[str, Any] | None) -> torch.dtype:
    """What a run goes on in, or else what suits its network and device."""
    begun = made and getattr(torch, str(made.get("dtype")), None)
    return begun if isinstance(begun, torch.dtype) else preferred_dtype(device, model)


def _check_resume(resolved: Plan, made: dict[str, Any] | None) -> None:
    options, snapshot = resolved.options, resolved.snapshot
    if not options.resume or not (snapshot or options.output.exists()):
        return
    done, fixed = 0, 1
    if made is not None:  # before there was control, there was none
        made = {"control": None, "control_model": None} | made
    if snapshot is not None:
        done = snapshot.facts["num_chunks"]
        fixed = done + snapshot.facts["chunk_open"]  # chunks whose prompts cannot change
    if made is None:
        raise ValueError(f"{options.output} was not made by this command; --overwrite it instead")
    wanted = json.loads(json.dumps(resolved.record()))
    for name, value in wanted.items():
        before = made.get(name, value)  # older videos record fewer
        if name == "prompts":
            before, value = ([p for p in ps if p[0] < max(fixed, 1)] for ps in (before, value))
        if before != value:
            raise ValueError(
                f"{options.output} was begun with {name} {before}, now it is {value}; "
                "resume with what it was begun with, or --overwrite it"
            )
    if resolved.total is not None and resolved.total < done:
        raise ValueError(f"{options.output} has {done} chunks already; ask for more than {done}")


def _record_in(video: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(read_metadata(video)["comment"])
    except (ValueError, KeyError):
        return None
    return record if isinstance(record, dict) and "prompts" in record else None
