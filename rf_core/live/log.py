"""The log of a live session: JSON lines, with all that its chunks depend on.

The first line is the header: what the stream was. Each line after it is an entry: an action that
took hold before a chunk, a rewind, or a chunk with the digest of its latents. Every line is on its
way to the disk before anything follows from it, so a log that was cut off is good up to there.
`replay` makes the same chunks again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from ..config import CacheConfig, SamplerConfig, recorded
from ..ranges import MANY
from ..source import Source
from ..stream import Stream
from .commands import Command, Decay, Lora, Prompt, Rewind, Strength, read_command
from .history import Limits
from .transition import MAIN, Action

FORMAT = "reward-forcing-live-1"
_LONGEST_LINE = 200_000  # characters; a prompt of the longest, escaped, is a third of that
_MAX_LORAS = 1000


@dataclass(frozen=True, kw_only=True)
class LogHeader:
    """The first line: what a session begins with."""

    stream: dict[str, Any]
    """Facts of the stream: seed, size, cache, sampler, chunks it has already, digest of weights."""
    prompt: str
    loras: tuple[tuple[str, float], ...] = ()
    limits: Limits = field(default_factory=Limits)
    source: dict[str, Any] | None = None
    """What guides it, as its maker describes it, and the strength; see `Session`."""


@dataclass(frozen=True, kw_only=True)
class ActionEntry:
    """An action took hold."""

    number: int
    """Of its command."""
    chunk: int
    """The next one."""
    action: Action


@dataclass(frozen=True, kw_only=True)
class RewindEntry:
    """The stream went back and goes on in a branch."""

    number: int
    chunk: int
    """The next one."""
    branch: str


@dataclass(frozen=True, kw_only=True)
class ChunkEntry:
    """A chunk was made."""

    chunk: int
    digest: str
    """Of its latents; see `digest_of`."""


@dataclass(frozen=True, kw_only=True)
class EndEntry:
    """The session ended in order."""

    chunk: int
    """The first that is not made."""


LogEntry = ActionEntry | RewindEntry | ChunkEntry | EndEntry


@dataclass(frozen=True, kw_only=True)
class Log:
    """A session's log, read."""

    header: LogHeader
    entries: tuple[LogEntry, ...]

    @property
    def texts(self) -> list[str]:
        """Every prompt, once."""
        actions = [entry.action for entry in self.entries if isinstance(entry, ActionEntry)]
        later = [action.text for action in actions if isinstance(action, Prompt)]
        return list(dict.fromkeys([self.header.prompt, *later]))

    @property
    def configs(self) -> tuple[CacheConfig, SamplerConfig]:
        """What the stream was; ValueError where it says nothing that can be."""
        facts = self.header.stream
        try:
            cache, sampler = dict(facts["cache"]), dict(facts["sampler"])
            sampler["steps"] = tuple(sampler["steps"])
            numbers = [facts[name] for name in ("width", "height", "seed")]
            if not all(type(number) is int for number in numbers):
                raise TypeError("its size and seed are no whole numbers")
            return CacheConfig(**cache), SamplerConfig(**sampler)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the log does not say what its stream was ({error})") from error

    @property
    def digests(self) -> list[str]:
        """The digest of each chunk, on every branch, in order."""
        return [entry.digest for entry in self.entries if isinstance(entry, ChunkEntry)]

    @property
    def num_chunks(self) -> int:
        """Chunks that were made, on every branch."""
        return len(self.digests)


def facts_of(stream: Stream, clip: Tensor | None = None) -> dict[str, Any]:
    """What a stream's chunks depend on besides its log; `clip` is what it begins with."""
    facts = {
        "seed": stream.state.seed,
        "width": stream.width,
        "height": stream.height,
        "chunk": stream.state.num_chunks,
        "cache": recorded(stream.cache_config),
        "sampler": recorded(stream.sampler),
        "dtype": str(stream.dtype),
        "clip": None if clip is None else digest_of(clip.cpu()),
        "decoder": None if stream.decoder is None else stream.decoder.kind,
        "fingerprint": stream.model.fingerprint(),
    }
    return json.loads(json.dumps(facts))


def source_of(source: Source, strength: float, motion_strength: float = 0.0) -> dict[str, Any]:
    """What a header says of a source, and of the strength that it begins with."""
    given = {"strength": strength, "motion_strength": motion_strength}
    facts: dict[str, Any] = json.loads(json.dumps({**source.facts, **given}))
    return facts


def digest_of(latents: Tensor) -> str:
    """A hash of latents on the CPU, 16 hexadecimal digits."""
    data = latents.contiguous().numpy().tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


class LogWriter:
    """Writes a log, over a file of the same name; OSError where it cannot."""

    def __init__(self, path: Path | str, header: LogHeader) -> None:
        self._file = Path(path).open("w", encoding="ascii", newline="\n")  # noqa: SIM115  # kept
        self._line(
            {
                "format": FORMAT,
                "stream": header.stream,
                "prompt": header.prompt,
                "loras": dict(header.loras),
                "limits": asdict(header.limits),
            }
            | ({} if header.source is None else {"source": header.source})
        )

    def write(self, entry: LogEntry) -> None:
        """Append a line; it is with the system when this returns."""
        self._line(_plain(entry))

    def close(self) -> None:
        """Close the file; more than once does no harm."""
        self._file.close()

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _line(self, facts: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(facts) + "\n")
        self._file.flush()


def read_log(path: Path | str) -> Log:
    """The log in a file; a last line that was cut off is left out.

    Raises:
        ValueError: no such file, or a line that no session wrote.
    """
    path = Path(path)
    lines = _lines(path)
    try:
        number, first = next(lines)
    except StopIteration:
        raise ValueError(f"{path} holds no whole line of a live session; take another") from None
    header = _checked(path, number, first, _header)
    entries: list[LogEntry] = []
    chunk, names = header.stream["chunk"], {MAIN}
    for number, facts in lines:
        entry = _checked(path, number, facts, _entry)
        chunk = _checked(path, number, entry, partial(_follows, chunk, names))
        entries.append(entry)
    return Log(header=header, entries=tuple(entries))


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The number and the JSON of each whole line."""
    if not path.is_file():
        raise ValueError(f"there is no log at {path}; check the path")
    with path.open("rb") as file:
        for number in range(1, MANY):
            line = file.readline(_LONGEST_LINE + 1)
            if not line.endswith(b"\n"):
                if len(line) > _LONGEST_LINE:
                    raise _damaged(path, number, f"it has more than {_LONGEST_LINE} characters")
                return  # the end, or what was written when the session was killed
            yield number, _checked(path, number, line, json.loads)


def _checked(path: Path, number: int, given: Any, read: Any) -> Any:
    try:
        return read(given)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _damaged(
            path, number, str(error).splitlines()[0][:200] if str(error) else ""
        ) from error


def _damaged(path: Path, number: int, what: str) -> ValueError:
    return ValueError(
        f"line {number} of {path} is none that a live session writes ({what}); take a whole "
        "log, or remove it and those after it"
    )


def _plain(entry: LogEntry) -> dict[str, Any]:
    if isinstance(entry, ActionEntry):
        return {"number": entry.number, "chunk": entry.chunk, "done": entry.action.as_dict()}
    if isinstance(entry, RewindEntry):
        return {"number": entry.number, "back": entry.chunk, "branch": entry.branch}
    if isinstance(entry, ChunkEntry):
        return {"made": entry.chunk, "mark": entry.digest}
    return {"end": entry.chunk}


def _header(facts: Any) -> LogHeader:
    _require(isinstance(facts, dict), "it is no object")
    _require(facts.get("format") == FORMAT, f"its format is not {FORMAT}")
    stream, loras, limits = facts["stream"], facts["loras"], facts["limits"]
    _require(all(isinstance(each, dict) for each in (stream, loras, limits)), "a part is no object")
    _count(stream["chunk"])
    prompt = Prompt(text=facts["prompt"]).text
    _require(len(loras) <= _MAX_LORAS, f"it has {len(loras)} LoRAs")
    for name, strength in loras.items():
        Lora(name=name, strength=strength)
    _require(limits.keys() == {each.name for each in fields(Limits)}, "its limits are others")
    source = facts.get("source")
    if source is not None:
        _require(isinstance(source, dict), "its source is no object")
        Strength(strength=source["strength"])
        Strength(strength=abs(source["motion_strength"]))
    return LogHeader(
        stream=stream,
        prompt=prompt,
        loras=tuple(loras.items()),
        limits=Limits(**limits),
        source=source,
    )


def _entry(facts: Any) -> LogEntry:
    _require(isinstance(facts, dict), "it is no object")
    keys = facts.keys()
    if keys == {"made", "mark"}:
        _require(isinstance(facts["mark"], str), "its mark is no text")
        return ChunkEntry(chunk=_count(facts["made"]), digest=facts["mark"])
    if keys == {"end"}:
        return EndEntry(chunk=_count(facts["end"]))
    if keys == {"number", "back", "branch"}:
        asked = Rewind(chunk=facts["back"], branch=facts["branch"])
        _require(asked.branch is not None, "its branch has no name")
        number = _count(facts["number"])
        return RewindEntry(number=number, chunk=asked.chunk, branch=str(asked.branch))
    _require(keys == {"number", "chunk", "done"}, "its fields are others")
    command: Command = read_command(facts["done"])
    done = isinstance(command, (Prompt, Lora, Decay, Strength))
    _require(done, f"{command.do} is not done to a stream")
    assert isinstance(command, (Prompt, Lora, Decay, Strength))
    return ActionEntry(number=_count(facts["number"]), chunk=_count(facts["chunk"]), action=command)


def _follows(chunk: int, names: set[str], entry: LogEntry) -> int:
    """The next chunk after an entry, where `chunk` is the next before it."""
    if isinstance(entry, RewindEntry):
        _require(entry.chunk <= chunk, f"chunk {entry.chunk} is not made")
        _require(entry.branch.lower() not in names, f"a branch {entry.branch} is there already")
        names.add(entry.branch.lower())
        return entry.chunk
    _require(entry.chunk == chunk, f"chunk {entry.chunk} comes where {chunk} is next")
    return chunk + isinstance(entry, ChunkEntry)


def _count(value: Any) -> int:
    _require(type(value) is int and 0 <= value <= MANY, "a number is none that counts")
    return int(value)


def _require(sound: bool, what: str) -> None:
    if not sound:
        raise ValueError(what)
