"""A whole run, from prompts to an MP4: what `python -m rf_core generate` does.

`plan` checks everything that can be wrong before anything large is loaded. `generate` streams: the
MP4 grows chunk by chunk and a snapshot lies beside it, so that a run that is stopped, or killed,
resumes to the very images an undisturbed run gives.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .attention import attention_backend, check_device
from .config import WAN_SIZE, CacheConfig, Grid, ModelConfig, SamplerConfig
from .decoders.decoder import Decoder, load_decoder
from .decoders.handoff import Handoff
from .fast.dispatch import Choice, choose_attention
from .fast.graphs import GraphedModel
from .fast.parallel import Process, Split, SpreadModel, SpreadStream
from .fast.quantise import quantise_linears
from .memory.offload import stream_layers
from .memory.placement import placed
from .memory.plan import Fit, OffloadMode
from .model import WanModel
from .prompts import ChunkClock, PromptTimeline, ResolvedEntry
from .state import Snapshot
from .stream import Chunk, Stream, latent_size
from .text import UMT5Encoder, encode_prompts, load_text_encoder
from .video import VideoFormat, VideoWriter, read_images, read_metadata, remux, to_uint8
from .weights.checkpoint import load_student, read_checkpoint
from .weights.lora import Lora

DEMO = Path(__file__).parent / "demo"


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where the weights lie; by default the bundled demo."""

    model: Path = DEMO / "student.safetensors"
    """Checkpoint of the student."""
    submodel: str | None = None
    """Network of a bundle; by default `generator_ema` goes before `generator`."""
    num_heads: int | None = None
    """Attention heads, for a checkpoint of unusual width that does not record them."""
    vae: Path = DEMO / "vae.safetensors"
    """Wan VAE, or TAEHV."""
    text_encoder: str = str(DEMO / "text_encoder.safetensors")
    """UMT5: a folder, a file or a hub id."""
    tokenizer: str | None = None
    """Folder or hub id of its tokenizer, where the encoder comes without one."""
    loras: tuple[Lora, ...] = ()
    """Adapters merged into the student."""

    def named(self) -> dict[str, Any]:
        """Names alone, for the record kept in videos and snapshots."""
        loras = [f"{lora.path.name}:{lora.strength:g}" for lora in self.loras]
        names = {"model": self.model.name, "submodel": self.submodel, "vae": self.vae.name}
        return {**names, "loras": loras}


@dataclass(frozen=True, kw_only=True)
class Options:
    """One run. None takes the checkpoint's own setting, or else the published one."""

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
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
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
    """The same for the text encoder's; settled with `auto`."""
    keep_turned: bool = True
    """Whether the cache keeps turned keys, a third of its size; settled with `auto`."""
    crf: int = 18
    """Quality of the MP4: 0 is lossless, 51 the worst."""
    snapshot_every: int = 20
    """Chunks between two snapshots; 0 for none."""
    resume: bool = False
    """Go on with an output that was stopped."""
    overwrite: bool = False
    """Replace an output that is there."""

    @property
    def snapshot_path(self) -> Path:
        """Where the stream's state lies, beside the output."""
        return self.output.with_name(self.output.name + ".state.safetensors")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run with everything settled that can be settled without its weights."""

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
    fit: Fit | None = None
    """What was chosen to suit the memory; None where all was given."""

    @property
    def grid(self) -> Grid:
        """Tokens of a latent frame."""
        patch = self.model.patch_size
        return Grid.of_latents(*latent_size(self.height, self.width, patch), patch)

    @property
    def clock(self) -> ChunkClock:
        """Chunks to images and seconds, this run's cuts counted."""
        cuts = [p.chunk for p in self.prompts if p.chunk and p.switch.mode == "cut"]
        return ChunkClock(chunk_frames=self.cache.chunk_frames, cuts=tuple(cuts))

    def record(self) -> dict[str, Any]:
        """What made the video, as JSON: kept in its metadata and in snapshots."""
        options = self.options
        return {
            **options.files.named(),
            "seed": options.seed,
            "width": self.width,
            "height": self.height,
            "cache": asdict(self.cache),
            "sampler": asdict(self.sampler),
            "dtype": str(options.dtype).removeprefix("torch."),
            "attention": options.attention,
            "weights": options.weights,
            "crf": options.crf,
            "start": options.start and options.start.name,
            "prompts": [[p.chunk, str(p.switch), p.text] for p in self.prompts],
        }


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands after a chunk."""

    chunks: int
    """Chunks made, those before a resume included."""
    total: int | None
    """Chunks of the run; None when endless."""
    images: int
    """Images in the file."""
    chunk_images: int
    """Images of the last chunk."""
    network_seconds: float
    """Time the network took for the last chunk; 0 where it was given."""
    decode_seconds: float
    """Time decoding and writing took for the last chunk."""
    fps: float
    """Images a second since the run began."""
    seconds_left: float | None
    """Time left at that pace; None when endless."""


class Stopped(Exception):  # noqa: N818  # not an error
    """Raised inside a pass to end the run there."""


def plan(options: Options) -> Plan:
    """Settle and check a run. ValueError, one sentence, for whatever is wrong."""
    _check_values(options)
    _check_files(options)
    files = options.files
    checkpoint = read_checkpoint(files.model, submodel=files.submodel, num_heads=files.num_heads)
    cache = replace(checkpoint.cache or CacheConfig(), **options.cache)
    sampler = replace(checkpoint.sampler or SamplerConfig(), **options.sampler)
    native = checkpoint.size or WAN_SIZE
    height, width = options.height or native[0], options.width or native[1]
    latent_size(height, width, checkpoint.config.patch_size)
    VideoFormat(width=width, height=height, crf=options.crf)
    clock, total = ChunkClock(chunk_frames=cache.chunk_frames), options.chunks
    if options.seconds is not None:
        total = options.timeline.num_chunks_for_seconds(options.seconds, clock)
    if options.compile and cache.storage == "int8":
        raise ValueError("an int8 cache is not compiled; leave out --compile or --cache int8")
    settled = Plan(
        options=options,
        model=checkpoint.config,
        cache=cache,
        sampler=sampler,
        height=height,
        width=width,
        total=total,
        prompts=options.timeline.resolve(clock, total),
        snapshot=_snapshot_of(options),
    )
    _check_resume(settled)
    return placed(settled)


def load(settled: Plan) -> tuple[Stream, dict[str, Tensor]]:
    """The stream at its start, or at its snapshot, and the embedding of every prompt.

    The text encoder comes first and is released before student and decoder are loaded.
    """
    texts = [prompt.text for prompt in settled.prompts]
    embeds = encode_prompts(texts, lambda: open_text_encoder(settled.options))
    return open_stream(settled, *open_networks(settled), embeds), embeds


def attention_of(settled: Plan, model: ModelConfig) -> Choice:
    """The attention of a run, chosen once; `model` is what one process attends with."""
    options = settled.options
    return choose_attention(
        options.attention,
        model,
        settled.cache,
        settled.grid,
        batch=1,
        dtype=options.dtype,
        device=options.device,
    )


def split_of(settled: Plan, process: Process) -> Split:
    """How processes share a run out; ValueError where they cannot."""
    if settled.options.start is not None:
        raise ValueError("several processes make a stream from noise alone; leave out --start")
    return Split.of(process, settled.model, settled.grid, settled.cache)


def load_spread(settled: Plan, split: Split) -> tuple[Stream, dict[str, Tensor]]:
    """As `load`, in one of several processes; the first one decodes."""
    texts = [prompt.text for prompt in settled.prompts]
    embeds = encode_prompts(texts, lambda: open_text_encoder(settled.options))
    model, decoder = open_networks(settled)
    assert isinstance(model, WanModel), "graphs are of one process"
    own = None if split.rank else decoder
    return open_stream(settled, SpreadModel(model, split), own, embeds), embeds


def open_text_encoder(options: Options) -> UMT5Encoder:
    """The text encoder of a run, on its device."""
    files, streams = options.files, options.text_offload == "stream"
    encoder = load_text_encoder(
        files.text_encoder,
        device="cpu" if streams else options.device,
        dtype=options.dtype,
        tokenizer=files.tokenizer,
    )
    if streams:
        stream_layers(encoder.model.encoder, "block", options.device)
    return encoder


def open_networks(settled: Plan) -> tuple[WanModel | GraphedModel, Decoder]:
    """Student and decoder of a run, on its device."""
    options, files = settled.options, settled.options.files
    device, dtype = options.device, options.dtype
    model, _ = load_student(
        files.model,
        device="cpu" if options.offload == "stream" else device,
        dtype=dtype,
        submodel=files.submodel,
        num_heads=files.num_heads,
        loras=files.loras,
    )
    if options.weights == "fp8":
        quantise_linears(model)
    if options.offload == "stream":
        stream_layers(model, "blocks", device)
    assert options.group_frames != "auto", "plan() settles it"
    decoder = load_decoder(files.vae, device, dtype, options.group_frames)
    if options.compile:
        for block in model.blocks:
            block.compile()
    graphs = options.graphs
    if graphs == "auto":
        free = options.offload == "none" and not options.compile
        graphs = free and torch.device(device).type in ("cuda", "cpu")
    if not graphs:
        return model, decoder
    return GraphedModel(model, must=options.graphs is True), decoder


def open_stream(
    settled: Plan,
    model: WanModel | GraphedModel,
    decoder: Decoder | None,
    embeds: dict[str, Tensor],
) -> Stream:
    """The stream of a run around networks that may serve others, at its start or snapshot."""
    kind = SpreadStream if isinstance(model, SpreadModel) else Stream
    stream = kind(
        model,
        embeds[settled.prompts[0].text],
        height=settled.height,
        width=settled.width,
        decoder=decoder,
        seed=settled.options.seed,
        cache=settled.cache,
        sampler=settled.sampler,
        attention=attention_backend(attention_of(settled, model.config).name),
        keep_turned=settled.options.keep_turned,
    )
    if settled.snapshot is not None:
        stream.restore(settled.snapshot)
    return stream


def generate(
    settled: Plan,
    stream: Stream,
    embeds: dict[str, Tensor],
    report: Callable[[Progress], None] = lambda progress: None,
    stopped: Callable[[], bool] = lambda: False,
) -> bool:
    """Make the video; False when `stopped` ended it early, within one pass of the network.

    However it ends, the file is closed and plays.
    """
    options, begun = settled.options, stream.state.num_chunks
    pace = _Pace(settled.total, begun, options.device)

    def on_pass(kind: str, number: int) -> None:
        if stopped():
            raise Stopped

    with _open_writer(settled, begun) as writer, _handoff(settled, stream, writer) as handoff:
        written = writer.num_images
        try:
            for chunk in _chunks(settled, stream, embeds, pace, on_pass):
                images = _hand_on(chunk, stream, writer, handoff)
                done, written = chunk.index + 1, written + images
                if options.snapshot_every and done % options.snapshot_every == 0:
                    handoff.flush()
                    _save(settled, stream)
                report(pace.chunk_done(done, images, written))
        except Stopped:
            handoff.flush()
            _save(settled, stream)
            return False
    remux(options.output)
    options.snapshot_path.unlink(missing_ok=True)
    return True


def follow(
    settled: Plan, stream: Stream, embeds: dict[str, Tensor], stopped: Callable[[], bool]
) -> bool:
    """What `generate` asks of the network, in a process that another one writes the video for."""
    every, begun = settled.options.snapshot_every, stream.state.num_chunks
    pace = _Pace(settled.total, begun, settled.options.device)

    def on_pass(kind: str, number: int) -> None:
        if stopped():
            raise Stopped

    try:
        for chunk in _chunks(settled, stream, embeds, pace, on_pass):
            if every and (chunk.index + 1) % every == 0:
                stream.snapshot()  # which has to be asked for by all
    except Stopped:
        stream.snapshot()
        return False
    return True


def _handoff(settled: Plan, stream: Stream, writer: VideoWriter) -> Handoff:
    assert stream.decoder is not None
    device = settled.options.device
    return Handoff(stream.decoder, lambda images: writer.write(images[0]), device=device)


def _hand_on(chunk: Chunk, stream: Stream, writer: VideoWriter, handoff: Handoff) -> int:
    """Send a chunk to the file, and say how many images it has."""
    if chunk.images is not None:
        writer.write(to_uint8(chunk.images[0]).cpu())
        return chunk.images.shape[1]
    state, decoder = stream.state.decoder, stream.decoder
    assert decoder is not None
    stream.state.decoder = handoff.submit(chunk.latents, state)
    return decoder.images_of(chunk.latents.shape[2], first=state is None)


def _chunks(
    settled: Plan,
    stream: Stream,
    embeds: dict[str, Tensor],
    pace: _Pace,
    on_pass: Callable[[str, int], None],
) -> Iterator[Chunk]:
    state = stream.state
    if settled.options.start is not None and not state.num_chunks:
        yield from stream.start_from_images(_start_images(settled))
    switches = {prompt.chunk: prompt for prompt in settled.prompts if prompt.chunk}
    while settled.total is None or state.num_chunks < settled.total:
        index = state.num_chunks
        if index in switches and not state.chunk_open:
            stream.switch(embeds[switches[index].text], switches[index].switch)
        pace.network_begins()
        latents = stream.generate(on_pass)
        pace.network_ends()
        yield Chunk(index=index, latents=latents, images=None)


class _Pace:
    """Where the time goes, chunk by chunk."""

    def __init__(self, total: int | None, chunks: int, device: str) -> None:
        self._total, self._chunks, self._device = total, chunks, torch.device(device)
        self._began = self._marked = time.perf_counter()
        self._images = 0
        self._network_seconds = 0.0
        self._marks: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def network_begins(self) -> None:
        """The chunk's latents are asked for."""
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self._marks.append((begin, end))

    def network_ends(self) -> None:
        """The chunk's latents are made, or on a card on their way: nothing waits for them here."""
        if self._device.type != "cuda":
            self._network_seconds = time.perf_counter() - self._marked
            return
        self._marks[-1][1].record()
        while self._marks and self._marks[0][1].query():
            begin, end = self._marks.popleft()
            self._network_seconds = begin.elapsed_time(end) / 1e3

    def chunk_done(self, chunks: int, images: int, images_in_file: int) -> Progress:
        """The chunk is handed on. On a card the network's time is that of an earlier chunk."""
        now = time.perf_counter()
        decode_seconds = max(0.0, now - self._marked - self._network_seconds)
        self._marked, self._images = now, self._images + images
        left = None
        if self._total is not None:
            left = (self._total - chunks) * (now - self._began) / (chunks - self._chunks)
        network_seconds = self._network_seconds
        if self._device.type != "cuda":
            self._network_seconds = 0.0
        return Progress(
            chunks=chunks,
            total=self._total,
            images=images_in_file,
            chunk_images=images,
            network_seconds=network_seconds,
            decode_seconds=decode_seconds,
            fps=self._images / (now - self._began),
            seconds_left=left,
        )


def _check_values(options: Options) -> None:
    if options.chunks is not None and options.seconds is not None:
        raise ValueError("both a length in chunks and one in seconds are given; give one")
    if options.chunks is not None and options.chunks < 1:
        raise ValueError(f"the length is {options.chunks} chunks; make at least 1")
    if options.snapshot_every < 0:
        raise ValueError(f"snapshot_every is {options.snapshot_every}; use 0 for no snapshots")
    if isinstance(options.group_frames, int) and options.group_frames < 1:
        raise ValueError(f"group_frames is {options.group_frames}; decode at least 1 at once")
    if not 0 <= options.seed < 2**64:
        raise ValueError(f"the seed is {options.seed}; use a whole number from 0 below 2**64")
    check_device(options.device, options.dtype, options.attention)
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
    if not output.parent.is_dir():
        raise ValueError(f"the output's folder {output.parent} does not exist; create it first")
    if output.exists() and not (options.overwrite or options.resume):
        raise ValueError(
            f"{output} exists; choose another name, --overwrite it, or --resume a stopped run"
        )
    if start is not None and not start.is_file():
        raise ValueError(f"there is no start picture or clip at {start}; check the path")
    encoder = Path(options.files.text_encoder)
    local = encoder.suffix or encoder.is_absolute()  # the rest may be a hub id
    wanted = {"model": options.files.model, "VAE": options.files.vae}
    for what, path in (wanted | {"text encoder": encoder} if local else wanted).items():
        if not path.exists():
            raise ValueError(f"there is no {what} at {path}; check the path")
    for lora in options.files.loras:
        if not lora.path.exists():
            raise ValueError(f"there is no LoRA at {lora.path}; check the path")


def _snapshot_of(options: Options) -> Snapshot | None:
    # A run that was killed before its first snapshot begins again: it makes the same images.
    path = options.snapshot_path
    return Snapshot.load(path) if options.resume and path.exists() else None


def _check_resume(settled: Plan) -> None:
    options, snapshot = settled.options, settled.snapshot
    if not options.resume or not (snapshot or options.output.exists()):
        return
    if snapshot is not None:
        made, done = snapshot.facts.get("run"), snapshot.facts["num_chunks"]
        fixed = done + snapshot.facts["chunk_open"]  # chunks whose prompts cannot change
    else:
        made, done, fixed = _record_in(options.output), 0, 1
    if made is None:
        raise ValueError(f"{options.output} was not made by this command; --overwrite it instead")
    wanted = json.loads(json.dumps(settled.record()))
    for name, value in wanted.items():
        before = made.get(name, value)  # older videos record fewer
        if name == "prompts":
            before, value = ([p for p in ps if p[0] < max(fixed, 1)] for ps in (before, value))
        if before != value:
            raise ValueError(
                f"{options.output} was begun with {name} {before}, now it is {value}; "
                "resume with what it was begun with, or --overwrite it"
            )
    if settled.total is not None and settled.total < done:
        raise ValueError(f"{options.output} has {done} chunks already; ask for more than {done}")


def _record_in(video: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(read_metadata(video)["comment"])
    except (ValueError, KeyError):
        return None
    return record if isinstance(record, dict) and "prompts" in record else None


def _open_writer(settled: Plan, chunks: int) -> VideoWriter:
    options = settled.options
    format = VideoFormat(width=settled.width, height=settled.height, crf=options.crf)
    if chunks:
        return VideoWriter.resume(options.output, settled.clock.images_before(chunks), format)
    metadata = {"title": settled.prompts[0].text, "comment": json.dumps(settled.record())}
    return VideoWriter(options.output, format, metadata)


def _start_images(settled: Plan) -> Tensor:
    # What the window cannot hold would be forgotten at once.
    most = settled.clock.images_before(settled.cache.window_frames // settled.cache.chunk_frames)
    size = {"width": settled.width, "height": settled.height}
    assert settled.options.start is not None
    return read_images(settled.options.start, num_images=most, last=True, **size)


def _save(settled: Plan, stream: Stream) -> None:
    snapshot = stream.snapshot()
    snapshot.facts["run"] = settled.record()
    snapshot.save(settled.options.snapshot_path)
