"""Trajectories of a teacher on disk: what `ode_pairs` writes and `ode_init` reads.

Shards are safetensors with the config that made them, and functions of it and their number. A
trajectory's first point is its noise, which is recreated (`seeded_noise`); older shards hold it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rf_core.config import SamplerConfig
from rf_core.numbered import numbered
from rf_core.ranges import LARGEST_SIDE, MANY, check_each, check_numbers
from rf_core.weights.files import parse_json, read_weights
from rf_core.writing import whole_file

from ..objective.excerpts import KINDS, SAVED_FIELDS, ExcerptConfig, Excerpts
from ..run.config import difference, from_json, to_json
from ..run.networks import PlacementConfig
from .clips import Buckets, Conditions, Groups
from .prompts import DataConfig
from .seeded_noise import clip_noise, is_near, probe

NOTE = "ode_pairs"
_LATER, _PROBE = "later_points", "noise_probe"  # in place of `points`, where noise is not stored


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Which trajectories, and how they are made."""

    recipe = "ode_pairs"
    kind: Literal["clips", "excerpts"] = "clips"
    """Trajectories of what: `clips`, whole clips of a prompt (published); `excerpts`, three chunks
    with a clean past, so that a causal student sees all that each depends on."""
    source: Path | None = None
    """Folder of the clips that excerpts are cut from."""
    excerpts: ExcerptConfig = field(default_factory=ExcerptConfig)
    """How excerpts are drawn and augmented."""
    teacher: Path | None = None
    """The bidirectional network that generates them; None for the bundled demo's."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts and their encoder; `negative` is what guidance leads away from."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """How the teacher is held."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The student's schedule, at whose timesteps points are kept."""
    steps: int = 48
    """Euler steps (published); levels of the student that are not among them come on top."""
    shift: float = 8.0
    """Flow shift of the grid: published, by Wan's default. Others use the student's 5."""
    guidance: float = 6.0
    """Classifier-free guidance (published), as uncond + s (cond - uncond): 1 is none."""
    latents: tuple[int, int, int, int] = (16, 21, 60, 104)
    """One clip, or the three chunks of an excerpt: channels, frames, rows, columns."""
    clips: int = 16000
    """Trajectories (arXiv 2512.04678: 16k); prompts, or clips, come in turn, in shuffled order."""
    shard: int = 16
    """Clips in a file."""
    batch: int = 1
    """Clips integrated at a time."""
    stored: Literal["float16", "bfloat16"] = "float16"
    """The dtype of stored latents."""
    seed: int = 0
    """Of noise and of the order of prompts."""

    def __post_init__(self) -> None:
        counts = ("steps", "clips", "shard", "batch")
        check_numbers(self, **dict.fromkeys(counts, (1, MANY)), seed=(0, 2**63 - 1))
        # Below 1 the teacher would be led away from the prompt.
        check_numbers(self, shift=(0.01, 1000.0), guidance=(1, 1000.0))
        check_each(self, latents=(1, LARGEST_SIDE))
        if self.clips % self.shard:
            raise ValueError(
                f"clips is {self.clips}; give whole shards of {self.shard}, such as "
                f"{-(-self.clips // self.shard) * self.shard}"
            )
        if self.kind == "excerpts" and self.latents[1] % len(KINDS):
            raise ValueError(
                f"latents have {self.latents[1]} frames; excerpts are {len(KINDS)} chunks, so give "
                f"a multiple of {len(KINDS)}"
            )


MAY_DIFFER = (
    "teacher",
    "source",
    "clips",
    "batch",
    "data.cache",
    "data.encode_batch",
    "placement.checkpointing",
    "placement.compile",
    "placement.offload",
    "placement.reshard",
)
"""Fields that may change between runs into one folder: no trajectory depends on them. The teacher
is known by its weights and clips by their number, not by where they are."""


@dataclass(frozen=True, kw_only=True)
class Trajectories(Conditions):
    """Trajectories of N clips, or of the three chunks of N excerpts."""

    points: Tensor
    """Latents at the student's K timesteps, the highest first, [N, K, C, F, h, w]."""
    clean: Tensor
    """Clean latents at the end, [N, C, F, h, w]."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a shard, by name."""
        seen = self.excerpts.tensors() if self.excerpts else {}
        return {"points": self.points, "clean": self.clean, "embeds": self.embeds, **seen}


def shard_path(out: Path, number: int) -> Path:
    """The file of a shard."""
    return out / _shard_name(number)


def _shard_name(number: int) -> str:
    return f"pairs-{number:06}.safetensors"


def shards_of(folder: Path) -> list[Path]:
    """The shards of trajectories that a folder holds."""
    return [path for _, path in numbered(folder, _shard_name)]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What trajectories are made from."""

    teacher: str
    """The teacher's fingerprint."""
    clips: int | None = None
    """How many clips excerpts are cut from."""


def write_shard(
    path: Path, trajectories: Trajectories, config: PairsConfig, number: int, origin: Origin
) -> None:
    """Write a shard, which is whole once it exists."""
    note = {
        "config": json.loads(to_json(config)),
        "shard": number,
        "teacher": origin.teacher,
        "source": origin.clips,
        "prompts": trajectories.prompts,
        "numbers": trajectories.numbers,
        "torch": str(torch.__version__),
    }
    tensors = _without_noise(trajectories, config, number)
    with whole_file(path) as part:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, part, {NOTE: json.dumps(note)})


def _without_noise(
    trajectories: Trajectories, config: PairsConfig, number: int
) -> dict[str, Tensor]:
    """The tensors of a shard; a first point that is the clip's noise is left out."""
    tensors = trajectories.tensors()
    points = tensors["points"]
    clips = range(number * config.shard, number * config.shard + len(points))
    noise = torch.stack([clip_noise(config.seed, clip, config.latents) for clip in clips])
    if not torch.equal(points[:, 0], noise.to(points.dtype)):
        return tensors
    del tensors["points"]
    return tensors | {_LATER: points[:, 1:], _PROBE: torch.stack(list(map(probe, noise)))}


@dataclass(frozen=True)
class Pairs:
    """A folder of trajectories, which are read on demand.

    Where they are of whole clips, it is a `ClipSource` of the clips that the teacher has made.
    """

    shards: tuple[Path, ...]
    """Its files."""
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path) -> Pairs:
        """Open a folder; ValueError where it holds no shards, or shards of different configs."""
        pairs = cls(tuple(shards_of(folder)))
        if not pairs.shards:
            raise ValueError(
                f"{folder} holds no trajectories; make some with `python -m training ode_pairs`"
            )
        for path in pairs.shards:
            check_shard(path, pairs.config, pairs.origin)
        return pairs

    def __len__(self) -> int:
        return len(self.shards) * self.config.shard

    @cached_property
    def config(self) -> PairsConfig:
        """The config that they were made with."""
        return from_json(PairsConfig, json.dumps(_note(self.shards[0])["config"]))

    @cached_property
    def origin(self) -> Origin:
        """The teacher and the clips that they were made from."""
        return _origin(_note(self.shards[0]))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """See `ClipSource`."""
        return self.config.latents

    @property
    def groups(self) -> Groups:
        """See `ClipSource`."""
        return (range(len(self)),)

    @property
    def origins(self) -> Sequence[int]:
        """See `ClipSource`: of prompts, or of the clips that excerpts are cut from."""
        return [number for path in self.shards for number in _note(path)["numbers"]]

    @property
    def buckets(self) -> Buckets:
        """See `ClipSource`."""
        _, _, rows, columns = self.shape
        return {(rows, columns): range(len(self))}

    def latents(self, rows: Sequence[int]) -> Tensor:
        """See `ClipSource`."""
        return torch.stack([self._row(row)[0]["clean"] for row in rows]).float()

    def captions(self, rows: Sequence[int], seeds: Sequence[int]) -> tuple[list[str], Tensor]:
        """See `ClipSource`; each has one prompt."""
        tensors, prompts, _ = zip(*map(self._row, rows), strict=True)
        return list(prompts), _stacked("embeds", tensors)

    def rows(self, numbers: Sequence[int]) -> Trajectories:
        """Some trajectories by their numbers, in their stored dtype."""
        rows, prompts, places = zip(*map(self._row, numbers), strict=True)
        rows = tuple(map(self._with_noise, numbers, rows))
        found = {name: _stacked(name, rows) for name in rows[0]}
        excerpts = {name: found.pop(name) for name in SAVED_FIELDS if name in found}
        return Trajectories(
            prompts=list(prompts),
            numbers=list(places),
            excerpts=Excerpts(**excerpts) if excerpts else None,
            **found,
        )

    def _row(self, number: int) -> tuple[dict[str, Tensor], str, int]:
        shard, place = divmod(number, self.config.shard)
        path = self.shards[shard]
        if path not in self._open:
            self._open[path] = (read_weights(path).tensors, _note(path))  # mapped, and read by rows
        tensors, note = self._open[path]
        points = (_LATER, _PROBE) if _LATER in tensors else ("points",)
        excerpts = SAVED_FIELDS if self.config.kind == "excerpts" else ()
        names = (*points, "clean", "embeds", *excerpts)
        try:
            rows = {name: tensors[name][place] for name in names}
            return rows, note["prompts"][place], note["numbers"][place]
        except (LookupError, TypeError) as error:
            raise ValueError(f"{path} is no whole shard of trajectories; make it again") from error

    def _with_noise(self, number: int, row: dict[str, Tensor]) -> dict[str, Tensor]:
        """A row with its first point, where that is not stored."""
        if _LATER not in row:
            return row
        shard, place = divmod(number, self.config.shard)
        path = self.shards[shard]
        _, note = self._open[path]
        clip = note["shard"] * self.config.shard + place
        noise = clip_noise(self.config.seed, clip, self.config.latents)
        if not is_near(noise, row[_PROBE]):
            raise ValueError(
                f"{path} was made with torch {note['torch']}, whose noise torch "
                f"{torch.__version__} does not draw here; use that version, or make it again"
            )
        rest = {name: tensor for name, tensor in row.items() if name not in (_LATER, _PROBE)}
        later = row[_LATER]
        return {"points": torch.cat([noise.to(later)[None], later]), **rest}


def _stacked(name: str, rows: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Prompts are padded with zeros to the longest."""
    found = [row[name] for row in rows]
    return pad_sequence(found, batch_first=True) if "embeds" in name else torch.stack(found)


def check_shard(path: Path, config: PairsConfig, origin: Origin) -> None:
    """ValueError, with the first difference, for a shard of another config, teacher or clips."""
    note = _note(path)
    mismatch = difference(from_json(PairsConfig, json.dumps(note["config"])), config, MAY_DIFFER)
    saved = _origin(note)
    if mismatch is None and saved.teacher != origin.teacher:
        mismatch = f"teacher's weights are {saved.teacher} there and {origin.teacher} here"
    if mismatch is None and saved.clips != origin.clips:
        mismatch = f"source holds {saved.clips} clips there and {origin.clips} here"
    if mismatch is not None:
        raise ValueError(f"{path} was made with another config: {mismatch}; choose another folder")


def _origin(note: Mapping[str, Any]) -> Origin:
    return Origin(teacher=str(note["teacher"]), clips=note.get("source"))  # older ones lack it


def _note(path: Path) -> dict[str, Any]:
    metadata = read_weights(path).metadata
    if NOTE not in metadata:
        raise ValueError(f"{path} is no shard of trajectories: its metadata lack {NOTE}")
    return parse_json(path, metadata[NOTE])
