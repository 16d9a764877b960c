"""What every stage costs, counted before it begins: memory, operations, card hours and disk.

`operations`, `memory` (`estimate` for Re-DMD) and `disk` count; here the counts of a stage are put
together. Left out are rewards, validation, and the writing and reading of files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from rf_core.config import Grid, ModelConfig
from rf_core.decoders.vae import VAEConfig
from rf_core.memory.placement import decoder_config, text_sizes
from rf_core.options import DEMO
from rf_core.ranges import LARGEST_SIDE
from rf_core.weights.checkpoint import read_checkpoint

from ..choices import shape_of_clips
from ..data.embeddings import encoder_path
from ..data.latents import list_videos
from ..data.pairs import Pairs, PairsConfig, shards_of
from ..data.prompts import DataConfig
from ..run.distributed import check_shares
from ..run.machine import check_batches, check_placement
from ..run.networks import PlacementConfig
from ..run.sequence import check_sequence, own_grid
from . import disk, memory, operations
from .consistency import CONSISTENCY_PRESETS, ConsistencyConfig, paths_of
from .control import CONTROL_PRESETS, ControlRunConfig, base_path, check_layers
from .estimate import Sizes, estimate
from .latents import LATENTS_PRESETS, LatentsConfig
from .re_dmd import read_sizes
from .recipes import PRESETS, DistilConfig
from .regression import INIT_PRESETS, InitConfig, start_path
from .teacher import TEACHER_PRESETS, TeacherConfig, read_model_config
from .trajectories import PAIRS_PRESETS, teacher_path

TEXT = "text encoder, once"
RECIPES: Mapping[str, tuple[type, Mapping[str, Callable[[], Any]]]] = MappingProxyType(
    {
        "re_dmd": (DistilConfig, PRESETS),
        "teacher": (TeacherConfig, TEACHER_PRESETS),
        "ode_pairs": (PairsConfig, PAIRS_PRESETS),
        "ode_init": (InitConfig, INIT_PRESETS),
        "consistency": (ConsistencyConfig, CONSISTENCY_PRESETS),
        "control": (ControlRunConfig, CONTROL_PRESETS),
        "latents": (LatentsConfig, LATENTS_PRESETS),
    }
)
"""The stages that take time, with their configs and presets."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What is told in place of files that are not there."""

    sizes: Mapping[str, ModelConfig] = field(default_factory=dict)
    """Of networks: student, teacher, critic."""
    latents: tuple[int, int, int, int] | None = None
    """Shape of a clip, in place of a folder's."""
    clips: int | None = None
    """How many clips videos are cut into."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a stage takes."""

    memory: Mapping[str, int]
    """Bytes of one process, by what holds them."""
    operations: Mapping[str, int]
    """Of the whole stage, on all processes, by what does them."""
    unit: str
    """What it goes by: updates, or clips."""
    units: int
    """How many of them there are."""
    disk: Mapping[str, int]
    """Bytes on disk, by what lies there."""

    @property
    def total(self) -> int:
        """Operations in all."""
        return sum(self.operations.values())

    @property
    def each(self) -> float:
        """Operations of one update, or one clip, over all processes."""
        return (self.total - self.operations.get(TEXT, 0)) / self.units

    def card_hours(self, speed: float) -> float:
        """Hours of one card at `speed` operations a second."""
        return self.total / speed / 3600


def costs(config: Any, given: Given, processes: int) -> Costs:
    """Count a stage by its config.

    ValueError where its batch cannot be shared out over the processes, or where what it reads is
    neither there nor given.
    """
    _check_given(config.recipe, given)
    counted = {
        "re_dmd": _re_dmd,
        "teacher": _teacher,
        "ode_pairs": _pairs,
        "ode_init": _regression,
        "consistency": _consistency,
        "control": _control,
        "latents": _latents,
    }
    return counted[config.recipe](config, given, processes)  # type: ignore[operator]


_NETWORKS = {
    "re_dmd": ("student", "teacher", "critic"),
    "teacher": ("teacher",),
    "ode_pairs": ("teacher",),
    "ode_init": ("student",),
    "consistency": ("student", "teacher"),
    "control": ("teacher",),
    "latents": (),
}


def _check_given(recipe: str, given: Given) -> None:
    for name in given.sizes:
        if name not in _NETWORKS[recipe]:
            known = " and ".join(_NETWORKS[recipe]) or "no network"
            raise ValueError(f"--{name} is given, but {recipe} has {known}; leave it out")


def _check_processes(placement: PlacementConfig, processes: int) -> int | None:
    """How many share a sample's tokens; ValueError where there are no whole groups of them."""
    check_placement(placement, processes)
    return placement.sequence_over


def _re_dmd(config: DistilConfig, given: Given, processes: int) -> Costs:
    over = _check_processes(config.placement, processes)
    check_shares(config.run.redmd.batch, config.run.micro_batch, processes, over)
    if len(given.sizes) == len(_NETWORKS["re_dmd"]):
        sizes = Sizes(**given.sizes)
    else:
        sizes = replace(read_sizes(config), **given.sizes)
    for name in _NETWORKS["re_dmd"]:
        for latents in config.run.sizes:
            check_sequence(over, getattr(sizes, name), latents, f"the {name}")
    found, updates = estimate(config, sizes, processes), config.run.updates
    prompts = disk.distilled_prompts(config)
    flops = {name: count * processes * updates for name, count in found.flops.items()}
    return Costs(
        memory=found.memory,
        operations=flops | _encoding(config.data, sizes.student, prompts),
        unit="update",
        units=updates,
        disk=disk.re_dmd_disk(config, sizes, prompts),
    )


def _teacher(config: TeacherConfig, given: Given, processes: int) -> Costs:
    over = _check_processes(config.placement, processes)
    check_batches(config.batches, config.micro_batch, processes, over)
    size = given.sizes.get("teacher") or read_model_config(config)
    shape = _clip_shape(config.source, given)
    check_sequence(over, size, shape, "the teacher")
    grid = Grid.of_latents(*shape[2:], size.patch_size)
    return Costs(
        memory=memory.teacher_memory(config, size, own_grid(grid, over), shape[1], processes),
        operations=operations.teacher_flops(config, size, grid, shape[1]),
        unit="update",
        units=config.updates,
        disk=disk.supervised_disk(config, size),
    )


def _pairs(config: PairsConfig, given: Given, processes: int) -> Costs:
    over = _check_processes(config.placement, processes)
    size = given.sizes.get("teacher") or read_checkpoint(teacher_path(config)).config
    check_sequence(over, size, config.latents, "the teacher")
    grid = Grid.of_latents(*config.latents[2:], size.patch_size)
    prompts = disk.trajectories_prompts(config)
    steps = {"guided steps": config.clips * operations.trajectory_flops(config, size, grid)}
    return Costs(
        memory=memory.pairs_memory(config, size, own_grid(grid, over), processes),
        operations=steps | _encoding(config.data, size, prompts),
        unit="clip",
        units=config.clips,
        disk=disk.pairs_disk(config, size, prompts),
    )


def _regression(config: InitConfig, given: Given, processes: int) -> Costs:
    over = _check_processes(config.placement, processes)
    check_batches(config.batches, config.micro_batch, processes, over)
    size = given.sizes.get("student") or read_checkpoint(start_path(config)).config
    if shards_of(config.pairs):
        pairs = Pairs.open(config.pairs).config
    else:
        pairs = PairsConfig(latents=_clip_shape(config.pairs, given, "pairs"))
    check_sequence(over, size, pairs.latents, "the student")
    grid = Grid.of_latents(*pairs.latents[2:], size.patch_size)
    one = operations.regression_flops(config, pairs, size, grid)
    return Costs(
        memory=memory.regression_memory(config, pairs, size, own_grid(grid, over), processes),
        operations={"student's passes": config.updates * config.batch * one},
        unit="update",
        units=config.updates,
        disk=disk.supervised_disk(config, size),
    )


def _consistency(config: ConsistencyConfig, given: Given, processes: int) -> Costs:
    over = _check_processes(config.placement, processes)
    check_batches(config.batches, config.micro_batch, processes, over)
    sizes = dict(given.sizes)
    if len(sizes) < len(_NETWORKS["consistency"]):
        files = paths_of(config)
        read = {"student": files["start"], "teacher": files["teacher"]}
        sizes = {name: read_checkpoint(path).config for name, path in read.items()} | sizes
    student, teacher = sizes["student"], sizes["teacher"]
    shape = _clip_shape(config.source, given)
    for name, size in sizes.items():
        check_sequence(over, size, shape, f"the {name}")
    grid = Grid.of_latents(*shape[2:], student.patch_size)
    own = own_grid(grid, over)
    one = operations.consistency_flops(config, student, teacher, grid)
    samples = config.updates * config.batch
    return Costs(
        memory=memory.consistency_memory(config, student, teacher, own, processes),
        operations={name: samples * count for name, count in one.items()},
        unit="update",
        units=config.updates,
        disk=disk.supervised_disk(config, student),
    )


def _control(config: ControlRunConfig, given: Given, processes: int) -> Costs:
    _check_processes(config.placement, processes)
    check_batches(config.batches, config.micro_batch, processes)
    size = given.sizes.get("teacher") or read_checkpoint(base_path(config)).config
    check_layers(config, size)
    _, frames, *rest = _clip_shape(config.source, given)
    frames = min(frames, config.frames or frames)
    grid = Grid.of_latents(*rest, size.patch_size)
    one = operations.control_flops(config, size, grid, frames)
    samples = config.updates * config.batch
    return Costs(
        memory=memory.control_memory(config, size, grid, frames, processes),
        operations={name: samples * count for name, count in one.items()},
        unit="update",
        units=config.updates,
        disk=disk.supervised_disk(config, replace(size, num_layers=len(config.layers))),
    )


def _latents(config: LatentsConfig, given: Given, processes: int) -> Costs:
    path = config.vae or DEMO / "vae.safetensors"
    vae = decoder_config(path) if path.exists() else VAEConfig()
    if not isinstance(vae, VAEConfig):
        raise ValueError(f"vae is {path}, a TAEHV, which takes little; only a Wan VAE is counted")
    clips = given.clips
    if clips is None:
        videos = list_videos(config.videos, config.captions)
        clips = len(videos) * (config.clips_per_video or 1)
    return Costs(
        memory=memory.latents_memory(config, vae),
        operations={"VAE's encoder": clips * operations.encoding_flops(config, vae)},
        unit="clip",
        units=clips,
        disk=disk.latents_disk(config, vae.z_dim, vae.spatial_factor, clips),
    )


def _encoding(data: DataConfig, size: ModelConfig, prompts: int) -> dict[str, int]:
    if not prompts:
        return {}
    text = text_sizes(encoder_path(data))
    return {TEXT: prompts * operations.prompt_flops(text, size.text_len)}


def _clip_shape(folder: Path, given: Given, name: str = "source") -> tuple[int, int, int, int]:
    found = given.latents or shape_of_clips(folder)
    if found is None:
        raise ValueError(
            f"{name} is {folder}, which holds no clips yet; give the shape that they will have, "
            "such as --latents 16 21 60 104"
        )
    if not all(0 < side <= LARGEST_SIDE for side in found):
        raise ValueError(f"--latents are {found}; give channels, frames, rows and columns from 1")
    return found


def format_costs(found: Costs, processes: int, speed: float, source: str) -> str:
    """Lines for a terminal; `speed` is in operations a second, and `source` says whose."""
    hours = found.card_hours(speed)
    rows = [_row(name, f"{count / 1e9:.2f} GB") for name, count in found.memory.items()]
    rows.append(_row("a process takes about", f"{sum(found.memory.values()) / 1e9:.2f} GB"))
    rows += [_row(name, _flops(count)) for name, count in found.operations.items()]
    rows.append(_row(f"{found.units} {found.unit}s in all", _flops(found.total)))
    rows.append(_row(f"one {found.unit}", _flops(found.each)))
    if found.unit == "update":
        rows.append(_row("an update on a process", _flops(found.each / processes)))
    rows.append(_row(f"at {speed / 1e12:.2f} TFLOP/s a card ({source})", f"{hours:.1f} card hours"))
    rows.append(_row(f"over {processes} processes", f"{hours / processes:.1f} hours"))
    rows += [_row(f"disk: {name}", f"{count / 1e9:.2f} GB") for name, count in found.disk.items()]
    rows.append(_row("disk in all", f"{sum(found.disk.values()) / 1e9:.2f} GB"))
    return "\n".join(rows)


def _row(name: str, value: str) -> str:
    return f"{name:<46}{value:>18}"


def _flops(count: float) -> str:
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e12:.2f} TFLOP"


def matmul_speed(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations a second of large matrix products here."""
    side = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        (a @ b).flatten()[0].item()  # waits for the device
        count += 1
    return 2 * side**3 * count / (time.perf_counter() - began)
