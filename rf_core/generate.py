"""A whole run, from prompts to an MP4: what `python -m rf_core generate` does.

`plan` checks everything that can be wrong before anything large is loaded. `generate` streams: the
MP4 grows chunk by chunk and a snapshot lies beside it, so that a run that is stopped, or killed,
resumes to the very images an undisturbed run gives.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .attention import attention_backend, check_device
from .checkpoint import load_student, read_checkpoint
from .config import WAN_SIZE, CacheConfig, SamplerConfig
from .decoder import load_decoder
from .lora import Lora
from .prompts import ChunkClock, PromptTimeline, ResolvedEntry
from .state import Snapshot
from .stream import Chunk, Stream, latent_size
from .text import encode_prompts, load_text_encoder
from .video import VideoFormat, VideoWriter, read_images, read_metadata, remux, to_uint8

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
    attention: str = "sdpa"
    """Name of an attention backend."""
    group_frames: int | None = None
    """Latent frames decoded at once; fewer take less memory. None: a whole chunk."""
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
    settled = Plan(
        options=options,
        cache=cache,
        sampler=sampler,
        height=height,
        width=width,
        total=total,
        prompts=options.timeline.resolve(clock, total),
        snapshot=_snapshot_of(options),
    )
    _check_resume(settled)
    return settled


def load(settled: Plan) -> tuple[Stream, dict[str, Tensor]]:
    """The stream at its start, or at its snapshot, and the embedding of every prompt.

    The text encoder comes first and is released before student and decoder are loaded.
    """
    options, files = settled.options, settled.options.files
    embeds = encode_prompts(
        [prompt.text for prompt in settled.prompts],
        lambda: load_text_encoder(
            files.text_encoder,
            device=options.device,
            dtype=options.dtype,
            tokenizer=files.tokenizer,
        ),
    )
    device, dtype = options.device, options.dtype
    model, _ = load_student(
        files.model,
        device=device,
        dtype=dtype,
        submodel=files.submodel,
        num_heads=files.num_heads,
        loras=files.loras,
    )
    decoder = load_decoder(files.vae, device, dtype, options.group_frames)
    stream = Stream(
        model,
        embeds[settled.prompts[0].text],
        height=settled.height,
        width=settled.width,
        decoder=decoder,
        seed=options.seed,
        cache=settled.cache,
        sampler=settled.sampler,
        attention=attention_backend(options.attention),
    )
    if settled.snapshot is not None:
        stream.restore(settled.snapshot)
    return stream, embeds


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

    with _open_writer(settled, begun) as writer:
        try:
            for chunk in _chunks(settled, stream, embeds, pace, on_pass):
                assert chunk.images is not None
                images = to_uint8(chunk.images[0]).cpu()
                writer.write(images)
                done = chunk.index + 1
                if options.snapshot_every and done % options.snapshot_every == 0:
                    _save(settled, stream)
                report(pace.chunk_done(done, len(images), writer.num_images))
        except Stopped:
            _save(settled, stream)
            return False
    remux(options.output)
    options.snapshot_path.unlink(missing_ok=True)
    return True


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
        latents = stream.generate(on_pass)
        pace.network_done()
        yield Chunk(index=index, latents=latents, images=stream.decode(latents))


class _Pace:
    """Where the time goes, chunk by chunk."""

    def __init__(self, total: int | None, chunks: int, device: str) -> None:
        self._total, self._chunks, self._device = total, chunks, torch.device(device)
        self._began = self._marked = time.perf_counter()
        self._images = 0
        self._network_seconds = 0.0

    def network_done(self) -> None:
        """The chunk's latents are made."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._network_seconds = time.perf_counter() - self._marked

    def chunk_done(self, chunks: int, images: int, images_in_file: int) -> Progress:
        """The chunk is written."""
        now = time.perf_counter()
        decode_seconds = now - self._marked - self._network_seconds
        self._marked, self._images = now, self._images + images
        left = None
        if self._total is not None:
            left = (self._total - chunks) * (now - self._began) / (chunks - self._chunks)
        network_seconds, self._network_seconds = self._network_seconds, 0.0
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
    if options.group_frames is not None and options.group_frames < 1:
        raise ValueError(f"group_frames is {options.group_frames}; decode at least 1 at once")
    if not 0 <= options.seed < 2**64:
        raise ValueError(f"the seed is {options.seed}; use a whole number from 0 below 2**64")
    check_device(options.device, options.dtype, options.attention)


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
        before = made[name]
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
