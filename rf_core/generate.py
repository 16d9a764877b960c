"""A whole run, from prompts to an MP4: what `python -m rf_core generate` does.

`options.plan` has checked all that can be wrong, `load` opens the networks, `generate` streams: the
MP4 grows chunk by chunk and a snapshot lies beside it, so that a run that is stopped, or killed,
resumes to the very images an undisturbed run gives.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from . import source_input
from .attention import attention_backend
from .config import ModelConfig
from .control import ControlSource
from .decoders.decoder import Decoder, load_decoder
from .decoders.handoff import Handoff
from .fast.dispatch import Choice, choose_attention
from .fast.graphs import GraphedModel
from .fast.parallel import Process, SequenceParallelModel, SequenceParallelStream, Split
from .fast.quantise import quantise_linears
from .memory.offload import stream_layers
from .model import Network, WanModel
from .options import Options, Plan, most_start_images
from .pace import Pace, Progress
from .source import ChunkEncoder, EncodedSource, Guides, Reader, Source
from .stream import Chunk, Stream
from .text import UMT5Encoder, encode_prompts, load_text_encoder
from .vace import ControlledModel, Vace
from .video import RUN, VideoWriter, read_images, remux, to_uint8
from .weights.checkpoint import load_student
from .weights.vace import load_vace
from .writing import WriteError

_log = logging.getLogger(__name__)


class Stopped(Exception):  # noqa: N818  # not an error
    """Raised inside a pass to end the run there."""


def load(resolved: Plan) -> tuple[Stream, dict[str, Tensor]]:
    """The stream at its start, or at its snapshot, and the embedding of every prompt.

    The text encoder comes first and is released before student and decoder are loaded.
    """
    texts = [prompt.text for prompt in resolved.prompts]
    embeds = encode_prompts(texts, lambda: open_text_encoder(resolved.options))
    return open_stream(resolved, *open_networks(resolved), embeds), embeds


def attention_of(resolved: Plan, model: ModelConfig) -> Choice:
    """The attention of a run, chosen once; `model` is what one process attends with."""
    options = resolved.options
    return choose_attention(
        options.attention,
        model,
        resolved.cache,
        resolved.grid,
        batch=1,
        dtype=options.torch_dtype,
        device=options.device,
    )


def split_of(resolved: Plan, process: Process) -> Split:
    """How processes share a run out; ValueError where they cannot."""
    if resolved.options.start is not None:
        raise ValueError("several processes make a stream from noise alone; leave out --start")
    if resolved.options.source is not None:
        raise ValueError("several processes make a stream of its prompt alone; leave out --source")
    if resolved.options.files.control is not None:
        raise ValueError(
            "several processes make a stream of its prompts alone; leave out --control-model"
        )
    return Split.of(process, resolved.model, resolved.grid, resolved.cache)


def load_sequence_parallel(resolved: Plan, split: Split) -> tuple[Stream, dict[str, Tensor]]:
    """As `load`, in one of several processes; the first one decodes."""
    texts = [prompt.text for prompt in resolved.prompts]
    embeds = encode_prompts(texts, lambda: open_text_encoder(resolved.options))
    model, decoder = open_networks(resolved)
    assert isinstance(model, WanModel), "graphs are of one process"
    own = None if split.rank else decoder
    return open_stream(resolved, SequenceParallelModel(model, split), own, embeds), embeds


def open_text_encoder(options: Options) -> UMT5Encoder:
    """The text encoder of a run, on its device."""
    files, streams = options.files, options.text_offload == "stream"
    encoder = load_text_encoder(
        files.text_encoder,
        device="cpu" if streams else options.device,
        dtype=options.torch_dtype,
        tokenizer=files.tokenizer,
    )
    if streams:
        stream_layers(encoder.model.encoder, "block", options.device)
    return encoder


def open_networks(resolved: Plan) -> tuple[Network, Decoder]:
    """Student and decoder of a run, on its device."""
    options, files = resolved.options, resolved.options.files
    device, dtype = options.device, options.torch_dtype
    model = load_student(
        files.model,
        device="cpu" if options.offload == "stream" else device,
        dtype=dtype,
        submodel=files.submodel,
        num_heads=files.num_heads,
        family=files.family,
        loras=files.loras,
    )[0]  # the checkpoint would hold on to the weights that follow
    if options.weights == "fp8":
        quantise_linears(model)
    if options.offload == "stream":
        stream_layers(model, "blocks", device)
    network: WanModel | ControlledModel = model
    if files.control is not None:
        network = ControlledModel(model, _control_network(files.control, model, options))
    assert options.group_frames != "auto", "plan() resolves it"
    decoder = load_decoder(files.vae, device, dtype, options.group_frames)
    if options.compile:
        for block in model.blocks:
            block.compile()
    if not options.records_passes or (options.graphs == "auto" and options.offload == "stream"):
        return network, decoder
    return GraphedModel(network, must=options.graphs is True), decoder


def _control_network(path: Path, model: WanModel, options: Options) -> Vace:
    """A VACE beside the student, where and as that is kept."""
    streams, device = options.offload == "stream", options.device
    place = "cpu" if streams else device
    vace = load_vace(path, model.config, device=place, dtype=options.torch_dtype)
    if options.weights == "fp8":
        quantise_linears(vace)
    if streams:
        stream_layers(vace, "vace_blocks", device)
    if options.compile:
        for block in vace.vace_blocks:
            block.compile()
    return vace


def open_control(resolved: Plan, encoder: ChunkEncoder | None) -> ControlSource | None:
    """What controls a run's chunks, to be closed by the caller; None for nothing."""
    control, size = resolved.options.control, {"height": resolved.height, "width": resolved.width}
    if not control.given:
        return None
    assert encoder is not None, "a run has a decoder"
    return control.open(encoder, **size, fps=resolved.family.fps)


def open_stream(
    resolved: Plan,
    model: Network,
    decoder: Decoder | None,
    embeds: dict[str, Tensor],
) -> Stream:
    """The stream of a run around networks that may serve others, at its start or snapshot."""
    kind = SequenceParallelStream if isinstance(model, SequenceParallelModel) else Stream
    stream = kind(
        model,
        embeds[resolved.prompts[0].text],
        height=resolved.height,
        width=resolved.width,
        decoder=decoder,
        seed=resolved.options.seed,
        cache=resolved.cache,
        sampler=resolved.sampler,
        attention=attention_backend(attention_of(resolved, model.config).name),
        keep_rotated=resolved.options.keep_rotated,
    )
    if resolved.snapshot is not None:
        stream.restore(resolved.snapshot)
    return stream


def open_reader(resolved: Plan) -> Reader | None:
    """The images of a run's source; None without one. ValueError where there are none."""
    if resolved.options.source is None:
        return None
    size = {"height": resolved.height, "width": resolved.width, "fps": resolved.family.fps}
    return source_input.open_reader(resolved.options.source, **size)


def open_source(
    resolved: Plan, decoder: Decoder | None, reader: Reader | None = None
) -> EncodedSource | None:
    """A run's source around what `open_reader` has opened, or opens; None without one."""
    options, reader = resolved.options.source, reader or open_reader(resolved)
    if options is None or reader is None:
        return None
    assert decoder is not None, "a process that follows has no source"
    return EncodedSource(reader, decoder, options.facts)


def generate(
    resolved: Plan,
    stream: Stream,
    embeds: dict[str, Tensor],
    report: Callable[[Progress], None] = lambda progress: None,
    stopped: Callable[[], bool] = lambda: False,
    reader: Reader | None = None,
) -> int | None:
    """Make the video; None once it is finished. `reader` is what `open_reader` has opened.

    Where `stopped` ended it early, within one pass of the network, how many chunks lead to the
    snapshot it can go on from; 0 without one. However it ends, the file is closed and plays.
    """
    options, begun = resolved.options, stream.state.num_chunks
    pace = _pace(resolved, begun)

    def on_pass(kind: str, number: int) -> None:
        if stopped():
            raise Stopped

    writer, finished = _open_writer(resolved, begun), False
    saver, source = _Saver(resolved, begun, writer), open_source(resolved, stream.decoder, reader)
    try:
        with writer, source or nullcontext(), _handoff(resolved, stream, writer) as handoff:
            written = writer.num_images
            try:
                for chunk in _chunks(resolved, stream, embeds, pace, on_pass, source):
                    images = _hand_on(chunk, stream, writer, handoff)
                    done, written = chunk.index + 1, written + images
                    given = stream.state.num_chunks > done  # of a start clip, all is there at once
                    if options.saves_after(done) and not given:
                        handoff.flush()
                        saver.save(stream)
                    report(pace.chunk_done(done, images, written))
                finished = True
            except Stopped:
                handoff.flush()
                saver.save(stream)
    finally:
        _index(writer, options.output, resolved.metadata if finished else _metadata(resolved))
    if not finished:
        return saver.chunks
    options.snapshot_path.unlink(missing_ok=True)
    return None


def _index(writer: VideoWriter, path: Path, metadata: dict[str, str]) -> None:
    """Put the file's index in front; without, it plays as well."""
    if not writer.num_images:
        return
    try:
        remux(path, metadata)
    except Exception as error:  # a full disk; what ended the run is to be raised, not this
        _log.warning("%s keeps its index in parts: %s", path, error)


def follow(
    resolved: Plan, stream: Stream, embeds: dict[str, Tensor], stopped: Callable[[], bool]
) -> bool:
    """What `generate` asks of the network, in a process that another one writes the video for."""
    pace = _pace(resolved, stream.state.num_chunks)

    def on_pass(kind: str, number: int) -> None:
        if stopped():
            raise Stopped

    try:
        for chunk in _chunks(resolved, stream, embeds, pace, on_pass):
            if resolved.options.saves_after(chunk.index + 1):
                stream.snapshot()  # which has to be asked for by all
    except Stopped:
        stream.snapshot()
        return False
    return True


def _pace(resolved: Plan, begun: int) -> Pace:
    return Pace(
        resolved.total,
        begun,
        resolved.options.device,
        passes=() if resolved.total is None else resolved.passes(begun),
        rate=resolved.family.fps,
    )


def _handoff(resolved: Plan, stream: Stream, writer: VideoWriter) -> Handoff:
    assert stream.decoder is not None
    device = resolved.options.device
    return Handoff(stream.decoder, lambda images: writer.write(images[0]), device=device)


def _hand_on(chunk: Chunk, stream: Stream, writer: VideoWriter, handoff: Handoff) -> int:
    """Send a chunk to the file, and say how many images it has."""
    if chunk.images is not None:
        writer.write(to_uint8(chunk.images[0]).cpu())
        return chunk.images.shape[1]
    first, decoder = stream.state.decoder is None, stream.decoder
    assert decoder is not None
    stream.hand_on(chunk.latents, handoff)
    return decoder.images_of(chunk.latents.shape[2], first)


def _chunks(
    resolved: Plan,
    stream: Stream,
    embeds: dict[str, Tensor],
    pace: Pace,
    on_pass: Callable[[str, int], None],
    source: Source | None = None,
) -> Iterator[Chunk]:
    control = open_control(resolved, stream.decoder)
    with closing(control) if control else nullcontext():
        yield from _steered_chunks(resolved, stream, embeds, pace, on_pass, source, control)


def _steered_chunks(
    resolved: Plan,
    stream: Stream,
    embeds: dict[str, Tensor],
    pace: Pace,
    on_pass: Callable[[str, int], None],
    source: Source | None,
    control: ControlSource | None,
) -> Iterator[Chunk]:
    state, clock = stream.state, resolved.clock
    guided, strength = _guided(resolved, source), resolved.options.control.strength
    if control is not None:
        control.refer(stream, strength=strength)
    if resolved.options.start is not None and not state.num_chunks:
        yield from stream.start_from_images(start_images(resolved))
    switches = {prompt.chunk: prompt for prompt in resolved.prompts if prompt.chunk}
    while resolved.total is None or state.num_chunks < resolved.total:
        index = state.num_chunks
        if index in switches and not state.chunk_open:
            stream.switch(embeds[switches[index].text], switches[index].switch)
        place = clock.images_before(index), clock.begun_with(index)
        pace.network_begins()
        given = guided(stream, *place)
        if given and given["guide"] is None:
            return  # the source has ended, and stops the video
        if control is not None:
            given["control"] = control.next(stream, *place, strength=strength)
        latents = stream.generate(on_pass, **given)
        pace.network_ends()
        yield Chunk(index=index, latents=latents, images=None)


def _guided(resolved: Plan, source: Source | None) -> Callable[[Stream, int, int], dict[str, Any]]:
    """What `Stream.generate` takes of a source for the chunk that begins with an image."""
    options = resolved.options.source
    if source is None or options is None:
        return lambda stream, images, since: {}
    guides, strength = Guides(source, options.motion_strength), options.strength

    def guided(stream: Stream, images: int, since: int) -> dict[str, Any]:
        guide = guides.next(stream, images, since)
        return {"guide": guide, "strength": guides.strength(strength)}

    return guided


def _open_writer(resolved: Plan, chunks: int) -> VideoWriter:
    options = resolved.options
    if chunks:
        return VideoWriter.resume(
            options.output, resolved.clock.images_before(chunks), resolved.format
        )
    return VideoWriter(
        options.output, resolved.format, _metadata(resolved), [options.snapshot_path]
    )


def _metadata(resolved: Plan) -> dict[str, str]:
    """What an unfinished video carries."""
    return resolved.metadata | ({} if resolved.run is None else {RUN: resolved.run})


def start_images(resolved: Plan) -> Tensor:
    """What a run begins with, images [1, T, 3, H, W]."""
    most = most_start_images(resolved.cache)
    size = {"width": resolved.width, "height": resolved.height}
    assert resolved.options.start is not None
    return read_images(resolved.options.start, num_images=most, last=True, **size)


class _Saver:
    """Snapshots of a run, which goes on where one cannot be written."""

    def __init__(self, resolved: Plan, begun: int, writer: VideoWriter) -> None:
        self._plan, self._writer, self._warned = resolved, writer, False
        self.chunks = begun
        """Chunks that lead to the snapshot that is there; 0 without one."""

    def save(self, stream: Stream) -> None:
        """Replace the snapshot; all images up to it must be in the file."""
        snapshot = stream.snapshot()  # of several processes, all ask for it
        if not self._writer.num_images:
            return  # before the first chunk the file is still that of another run, or none
        self._writer.sync()  # or a power cut could leave a snapshot of images that are gone
        snapshot.facts.update({"run": self._plan.record(), RUN: self._plan.run})
        try:
            snapshot.save(self._plan.options.snapshot_path)
            self.chunks = stream.state.num_chunks
        except WriteError as error:
            self._warn(error)

    def _warn(self, error: WriteError) -> None:
        if not self._warned:
            where = f"from chunk {self.chunks} on" if self.chunks else "from its beginning"
            _log.warning(
                "no snapshot can be written (%s); the video itself goes on, but a run that is "
                "stopped would make it again %s, until there is room",
                error,
                where,
            )
        self._warned = True
