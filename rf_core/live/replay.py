"""A live session made again from its log, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..source import Source
from ..stream import OnPass, Stream
from .log import ActionEntry, ChunkEntry, Log, RewindEntry, digest_of, facts_of, source_of
from .maker import Encode, Maker, SetLora
from .record import Presenter, Recorder
from .transition import Branch, SessionState, branch_of


class ReplayMismatch(ValueError):  # noqa: N818  # what it is to the reader of a log
    """A chunk is not what it was."""


def replay_log(
    log: Log,
    stream: Stream,
    encode: Encode,
    *,
    set_lora: SetLora | None = None,
    clip: Tensor | None = None,
    source: Source | None = None,
    side_stream: bool | None = None,
    recorder: Recorder | None = None,
    on_chunk: Callable[[Branch, int, Tensor], None] = lambda branch, chunk, latents: None,
    on_pass: OnPass | None = None,
    exact: bool = True,
) -> list[Tensor]:
    """Do to a stream what a session did, branches included.

    The stream is as the session's was when it began, its LoRAs' strengths, its clip and its
    source, too.
    `on_chunk` gets each chunk's branch, number and latents [1, C, F, h, w], float32 on the CPU;
    `recorder` the images, as in the session. With `exact`, every chunk is compared with the digest
    in the log; without, a log whose commands were edited makes another video.

    Returns:
        list: clean latents [1, C, F, h, w] of the last line's chunks, as far as they are kept.

    Raises:
        ValueError: the stream is another one's, or the source.
        ReplayMismatch: a chunk is not what it was.
    """
    _require_same(log, facts_of(stream, clip))
    _check_source(log, source)
    header, presenter = log.header, Presenter(recorder=recorder)
    maker = Maker(
        stream,
        encode,
        prompt=header.prompt,
        presenter=presenter,
        set_lora=set_lora,
        loras=dict(header.loras),
        limits=header.limits,
        clip=clip,
        side_stream=side_stream,
        source=source,
        **strengths_of(log),
    )
    branch = SessionState.beginning(maker.chunk).branch
    try:
        with maker:
            maker.add_restore_point()
            for entry in log.entries:
                if isinstance(entry, ActionEntry):
                    maker.apply(entry.action)
                elif isinstance(entry, RewindEntry):
                    branch = branch_of(branch, maker.chunk, entry.branch, entry.chunk)
                    _rewind(maker, entry, on_pass)
                elif isinstance(entry, ChunkEntry):
                    latents = maker.make(branch, on_pass)
                    if exact and digest_of(latents) != entry.digest:
                        raise _mismatch(entry)
                    on_chunk(branch, entry.chunk, latents)
                    maker.add_restore_point()
    finally:
        presenter.close()
    return maker.history.latents()


def _rewind(maker: Maker, entry: RewindEntry, on_pass: OnPass | None) -> None:
    oldest = maker.history.oldest
    if oldest is None or entry.chunk < oldest:
        raise ValueError(
            f"the log goes back to chunk {entry.chunk}, further than its limits let it; raise "
            "max_bytes in its first line"
        )
    maker.rewind(maker.plan_rewind(entry.chunk), on_pass)


def _require_same(log: Log, facts: Mapping[str, Any]) -> None:
    for name, wanted in log.header.stream.items():
        if facts.get(name) != wanted:
            raise ValueError(
                f"the log's stream has {name} {wanted}, this one has {facts.get(name)}; replay it "
                "with what it was made with"
            )


def strengths_of(log: Log) -> dict[str, float]:
    """The strengths that a session's source began with, by `Maker`'s names; none without one."""
    source = log.header.source or {}
    return {name: source[name] for name in ("strength", "motion_strength") if name in source}


def _check_source(log: Log, source: Source | None) -> None:
    """ValueError where the session's source is not this one."""
    wanted = log.header.source or {}
    facts = {} if source is None else source_of(source, **strengths_of(log))
    for name in {**wanted, **facts}:
        if facts.get(name) != wanted.get(name):
            raise ValueError(
                f"the log's source has {name} {wanted.get(name)}, this one has {facts.get(name)}; "
                "replay it with the file and the settings that it was made with"
            )


def _mismatch(entry: ChunkEntry) -> ReplayMismatch:
    return ReplayMismatch(
        f"chunk {entry.chunk} is not what it was: the weights, the prompts' embeddings or the "
        "machine are others, or the log was edited"
    )
