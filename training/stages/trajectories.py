"""The teacher's ODE trajectories over whole clips: what `ode_init` teaches the causal student.

The bidirectional teacher walks a whole clip from noise to clean latents in small Euler steps
(CausVid, arXiv 2412.07772, sec. 4.2). Its end is kept, with the points where it passes the
student's own timesteps: these are levels of the grid, so that the points are exact. The published
code keeps grid steps 0, 12, 24, 36 of 48, which are the student's timesteps at shift 5 alone.

Shards are safetensors, and functions of the config and their number. Processes share them out, and
a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from rf_core.config import NUM_TRAIN_TIMESTEPS, WAN_SIZE, SamplerConfig
from rf_core.model import WanModel
from rf_core.numbered import numbered
from rf_core.options import DEMO
from rf_core.ranges import check_folder_writable, check_numbers
from rf_core.scheduler import sampling_timesteps, shift_sigma
from rf_core.stream import latent_size
from rf_core.weights.checkpoint import read_checkpoint
from rf_core.weights.files import parse_json, read_weights
from rf_core.writing import whole_file, write_text

from ..choices import DATA_SET
from ..data.embeddings import PromptEmbeds, open_prompts
from ..data.prompts import DataConfig, check_prompt_files, wan_data
from ..run.config import difference, from_json, to_json
from ..run.distributed import barrier, gathered, processes, rank, world_size
from ..run.draws import generator_of, prompt_numbers
from ..run.networks import PlacementConfig, open_network, placement_dtype
from ..run.options import add_config_arguments, config_of

CONFIG = "config.json"
_NOTE = "ode_pairs"
_STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_SAME_LEVEL = 1e-6  # of the grid and of the student: one is rounded to float32


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Which trajectories, and how they are made."""

    teacher: Path | None = None
    """The bidirectional network that is followed; None for the bundled demo's."""
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
    """One clip: channels, frames, rows, columns."""
    clips: int = 16000
    """Trajectories (arXiv 2512.04678: 16k); prompts are shown in turn, in shuffled order."""
    shard: int = 16
    """Clips in a file."""
    batch: int = 1
    """Clips followed at a time."""
    stored: Literal["float16", "bfloat16"] = "float16"
    """What latents are kept in."""
    seed: int = 0
    """Of noise and of the order of prompts."""

    def __post_init__(self) -> None:
        if min(self.steps, self.shard, self.batch, self.clips, *self.latents) < 1:
            raise ValueError(
                f"steps {self.steps}, latents {self.latents}, clips {self.clips}, shard "
                f"{self.shard} and batch {self.batch} must be 1 or more"
            )
        if self.clips % self.shard:
            raise ValueError(
                f"clips is {self.clips}; give whole shards of {self.shard}, such as "
                f"{-(-self.clips // self.shard) * self.shard}"
            )
        check_numbers(self, shift=(0.01, 1000.0), guidance=(-1000.0, 1000.0), seed=(0, 2**63 - 1))


FREE = (
    "teacher",
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
is known by its weights, not by where they are."""


def miniature_pairs() -> PairsConfig:
    """The bundled demo's teacher, as its own student was taught, in minutes on a laptop."""
    return PairsConfig(
        steps=28,
        shift=12.0,
        guidance=2.5,
        latents=(16, 15, 8, 8),
        clips=256,
        batch=16,
    )


def wan_pairs() -> PairsConfig:
    """The published pairs; change the files to where yours are.

    About 340 GB. A teacher that fits a card is gathered once (`placement.reshard`); set it to true
    for the 14B.
    """
    height, width = latent_size(*WAN_SIZE, (1, 2, 2))
    return PairsConfig(
        teacher=Path("models/wan2.1_t2v_1.3B.safetensors"),
        latents=(16, 21, height, width),
        placement=PlacementConfig(dtype="bfloat16", reshard=False),
        data=wan_data(),
    )


PAIRS_PRESETS: Mapping[str, Callable[[], PairsConfig]] = MappingProxyType(
    {"miniature": miniature_pairs, "wan": wan_pairs}
)


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """Trajectories of N clips."""

    points: Tensor
    """Where they pass the student's K timesteps, the highest first, [N, K, C, F, h, w]."""
    clean: Tensor
    """Where they end, [N, C, F, h, w]."""
    embeds: Tensor
    """Their prompts, encoded and padded with zeros to the longest, [N, S, D]."""
    prompts: list[str]
    """The same as texts."""
    numbers: list[int]
    """Places of those among all prompts of the run that made them."""


def student_levels(sampler: SamplerConfig) -> list[float]:
    """The student's noise levels, high to low, as `sampling_timesteps` rounds them."""
    return (sampling_timesteps(sampler).double() / NUM_TRAIN_TIMESTEPS).tolist()


def euler_levels(config: PairsConfig) -> list[float]:
    """Noise levels from 1 to 0: the shifted grid, with the student's in place of their equals."""
    wanted = torch.tensor(student_levels(config.sampler), dtype=torch.float64)
    plain = torch.linspace(1, 0, config.steps + 1, dtype=torch.float64)
    grid = shift_sigma(plain, config.shift)
    apart = (grid[:, None] - wanted).abs().amin(dim=1) > _SAME_LEVEL
    return torch.cat([grid[apart], wanted]).sort(descending=True).values.tolist()


def integrate(
    flow: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    levels: Sequence[float],
    kept: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Follow `flow(x, level)` from noise [B, C, F, h, w] down `levels`, the last of which is 0.

    Returns where it was at each of `kept`, [B, K, C, F, h, w], and its end. `kept` are levels.
    """
    x, points = noise, {}
    for level, after in pairwise(levels):
        if level in kept:
            points[level] = x
        x = x + (after - level) * flow(x, level)
    return torch.stack([points[level] for level in kept], dim=1), x


@torch.no_grad()
def follow(
    teacher: WanModel,
    noise: Tensor,
    cond: Tensor,
    uncond: Tensor,
    config: PairsConfig,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The teacher's guided trajectories from noise [B, C, F, h, w]: points, and ends in float32.

    `cond` is [B, S, D], `uncond` [1 or B, S, D]; `dtype` is what the teacher computes in, by
    default that of its weights.
    """
    dtype = dtype or teacher.patch_embedding.weight.dtype
    prompt = teacher.prompt_context(cond.to(dtype))
    guided = config.guidance != 1
    plain = teacher.prompt_context(uncond.expand(len(noise), -1, -1).to(dtype)) if guided else None

    def flow(x: Tensor, level: float) -> Tensor:
        at = x.new_full((x.shape[0], x.shape[2]), level * NUM_TRAIN_TIMESTEPS)
        towards = teacher(x.to(dtype), at, prompt).float()
        if plain is None:
            return towards
        away = teacher(x.to(dtype), at, plain).float()
        return away + config.guidance * (towards - away)

    return integrate(flow, noise, euler_levels(config), student_levels(config.sampler))


def write_pairs(config: PairsConfig, out: Path, device: torch.device) -> Iterator[int]:
    """Make the shards that `out` lacks, yielding how many clips there are so far.

    Every process calls this together. ValueError, before any weight is read, where a file is
    missing, or where `out` holds shards of another config or teacher.
    """
    path, dtype = teacher_path(config), placement_dtype(config.placement)
    maker = fingerprint(path)
    _check_folder(config, maker, out)
    missing = _missing(config, out)
    done = config.clips - len(missing) * config.shard
    yield done
    if not missing:
        return
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / CONFIG, to_json(config) + "\n")
    barrier()
    prompts, embeds, uncond = open_prompts(config.data, DATA_SET, out / "embeddings", device, dtype)
    offload = config.placement.offload != "none"
    teacher = open_network(path, config.placement, device, trained=False, offload=offload)
    for first in range(0, len(missing), world_size()):
        # Sharded networks run in step: a process without a shard left makes another's along.
        place = first + rank()
        number = missing[min(place, len(missing) - 1)]
        made = make_shard(teacher, prompts, embeds, uncond.to(device), config, number, dtype)
        if place < len(missing):
            write_shard(shard_path(out, number), made, config, number, maker)
        done += config.shard * min(world_size(), len(missing) - first)
        yield done
    barrier()


def make_shard(
    teacher: WanModel,
    prompts: Sequence[str],
    embeds: PromptEmbeds,
    uncond: Tensor,
    config: PairsConfig,
    number: int,
    dtype: torch.dtype | None = None,
) -> Trajectories:
    """The trajectories of one shard; `uncond` is [1, S, D] on the teacher's device."""
    clips = range(number * config.shard, (number + 1) * config.shard)
    numbers = prompt_numbers(config.seed, "generator", 0, clips, 1, len(prompts))
    noise = [
        torch.randn(config.latents, generator=generator_of(config.seed, _NOTE, clip))
        for clip in clips
    ]
    cond, parts = embeds.embeds(numbers), []
    for x, prompt in zip(
        torch.stack(noise).split(config.batch), cond.split(config.batch), strict=True
    ):
        parts.append(follow(teacher, x.to(uncond.device), prompt.to(uncond), uncond, config, dtype))
    points, clean = (torch.cat(each).cpu() for each in zip(*parts, strict=True))
    return Trajectories(
        points=_stored(points, config),
        clean=_stored(clean, config),
        embeds=cond.cpu(),
        prompts=[prompts[each] for each in numbers],
        numbers=numbers,
    )


def _stored(latents: Tensor, config: PairsConfig) -> Tensor:
    kept = latents.to(_STORED[config.stored])
    if not kept.isfinite().all():
        raise FloatingPointError(
            f"the teacher's latents are not finite in {config.stored}: they reach "
            f"{float(latents.abs().max()):.4g}; check teacher and guidance, or set stored=bfloat16"
        )
    return kept


def shard_path(out: Path, number: int) -> Path:
    """The file of a shard."""
    return out / _shard_name(number)


def _shard_name(number: int) -> str:
    return f"pairs-{number:06}.safetensors"


def write_shard(
    path: Path, made: Trajectories, config: PairsConfig, number: int, teacher: str
) -> None:
    """Write a shard, which is whole once it exists; `teacher` is its maker's `fingerprint`."""
    note = {
        "config": json.loads(to_json(config)),
        "shard": number,
        "teacher": teacher,
        "prompts": made.prompts,
        "numbers": made.numbers,
    }
    tensors = {name: getattr(made, name).contiguous() for name in ("points", "clean", "embeds")}
    with whole_file(path) as part:
        save_file(tensors, part, {_NOTE: json.dumps(note)})


@dataclass(frozen=True)
class Pairs:
    """A folder of trajectories, read as they are asked for."""

    shards: tuple[Path, ...]
    """Its files."""
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path) -> Pairs:
        """The shards that are there; ValueError for none, or for some that do not belong."""
        pairs = cls(tuple(path for _, path in numbered(folder, _shard_name)))
        if not pairs.shards:
            raise ValueError(
                f"{folder} holds no trajectories; make some with `python -m training ode_pairs`"
            )
        for path in pairs.shards:
            _refuse_other(path, pairs.config, pairs.teacher)
        return pairs

    def __len__(self) -> int:
        return len(self.shards) * self.config.shard

    @cached_property
    def config(self) -> PairsConfig:
        """What they were made with."""
        return from_json(PairsConfig, json.dumps(_note(self.shards[0])["config"]))

    @cached_property
    def teacher(self) -> str:
        """The teacher's fingerprint."""
        return str(_note(self.shards[0])["teacher"])

    def rows(self, numbers: Sequence[int]) -> Trajectories:
        """Some of them, as stored."""
        found = [self._row(*divmod(number, self.config.shard)) for number in numbers]
        return Trajectories(
            points=torch.cat([each["points"] for each, _ in found]),
            clean=torch.cat([each["clean"] for each, _ in found]),
            embeds=pad_sequence([each["embeds"][0] for each, _ in found], batch_first=True),
            prompts=[text for _, (text, _) in found],
            numbers=[place for _, (_, place) in found],
        )

    def _row(self, shard: int, place: int) -> tuple[dict[str, Tensor], tuple[str, int]]:
        path = self.shards[shard]
        if path not in self._open:
            self._open[path] = (read_weights(path).tensors, _note(path))  # mapped, and read by rows
        tensors, note = self._open[path]
        try:
            rows = {
                name: tensors[name][place : place + 1] for name in ("points", "clean", "embeds")
            }
            return rows, (note["prompts"][place], note["numbers"][place])
        except (LookupError, TypeError) as error:
            raise ValueError(f"{path} is no whole shard of trajectories; make it again") from error


def teacher_path(config: PairsConfig) -> Path:
    """Where the teacher is; ValueError where it, or a file of prompts, is not there."""
    path = config.teacher or DEMO / "teacher.safetensors"
    if not path.exists():
        raise ValueError(f"teacher is {path}, which is not there")
    check_prompt_files(config.data)
    return path


def fingerprint(path: Path) -> str:
    """A network's file in few letters, the same for every dtype it may be stored in."""
    weight = read_checkpoint(path).tensors["blocks.0.modulation"]
    data = weight.to(torch.bfloat16).float().numpy().tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _check_folder(config: PairsConfig, teacher: str, out: Path) -> None:
    for _, path in numbered(out, _shard_name):
        _refuse_other(path, config, teacher)


def _refuse_other(path: Path, config: PairsConfig, teacher: str) -> None:
    note = _note(path)
    made_with = from_json(PairsConfig, json.dumps(note["config"]))
    apart = difference(made_with, config, FREE)
    if apart is None and note["teacher"] != teacher:
        apart = f"teacher's weights are {note['teacher']} there and {teacher} here"
    if apart is not None:
        raise ValueError(f"{path} was made with another config: {apart}; choose another folder")


def _note(path: Path) -> dict[str, Any]:
    metadata = read_weights(path).metadata
    if _NOTE not in metadata:
        raise ValueError(f"{path} is no shard of trajectories: its metadata lack {_NOTE}")
    return parse_json(path, metadata[_NOTE])


def _missing(config: PairsConfig, out: Path) -> list[int]:
    shards = range(config.clips // config.shard)
    here = torch.tensor([not shard_path(out, number).exists() for number in shards])
    # All take the first process' word: another may see its files late.
    agreed = gathered(here)[: len(shards)]
    return agreed.nonzero().flatten().tolist()


def add_pairs_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ode_pairs`."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the trajectories")
    add_config_arguments(parser, PAIRS_PRESETS)


def run_pairs(args: argparse.Namespace) -> int:
    """Make the teacher's trajectories, or those that are missing."""
    config = config_of(args, PairsConfig, PAIRS_PRESETS)
    check_folder_writable(args.out)
    with processes(args.device) as device:
        first = rank() == 0
        if first:
            print(to_json(config), flush=True)  # noqa: T201
        with tqdm(total=config.clips, unit="clip", disable=not first) as bar:
            for done in write_pairs(config, args.out, device):
                bar.update(done - bar.n)
    if first:
        print(f"{args.out}: {config.clips} trajectories")  # noqa: T201
    return 0
