"""One update of a run on random tensors, to know what it takes before anything is made for it.

Networks have the sizes of their files' headers or, where a file is not there yet, those of the
preset, and weights that mean nothing; clips and prompts are noise. Nothing is written.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from rf_core.config import WAN_1_3B, WAN_14B, Grid, ModelConfig, VaceConfig
from rf_core.control import MASK_CHANNELS
from rf_core.decoders.decoder import load_decoder
from rf_core.memory.plan import GB
from rf_core.options import DEMO
from rf_core.weights.checkpoint import read_checkpoint

from ..choices import DATA_SET, open_reward, shape_of_clips
from ..data.embeddings import MemoryEmbeds
from ..data.pairs import Pairs, PairsConfig, shards_of
from ..data.random_clips import COUNT, RandomClips, RandomContexts, RandomPairs
from ..objective.redmd import Networks
from ..rewards.reward import LatentRewards, image_anchor
from ..run.controlled import random_control
from ..run.distributed import all_gather, check_shares, process_group, world_size
from ..run.machine import check_batches, check_machine, num_processes
from ..run.memory import peak_bytes, reset_peak
from ..run.networks import PlacementConfig, placement_dtype, random_network
from ..run.optimise import TrainedNetwork
from ..run.options import begins_with_preset, config_from_args, print_rank_0
from ..run.sequence import check_sequence, own_grid
from .consistency import CONSISTENCY_PRESETS, ConsistencyConfig, ConsistencyTrainer
from .control import CONTROL_PRESETS, ControlRunConfig, ControlTrainer, check_layers
from .estimate import Sizes, estimate
from .memory import consistency_memory, control_memory, regression_memory, teacher_memory
from .recipes import DistilConfig, recomputed_frames, student_path
from .regression import INIT_PRESETS, InitTrainer, init_config
from .supervised import SupervisedConfig
from .teacher import TEACHER_PRESETS, Phase, TeacherConfig, TeacherTrainer
from .trainer import RunConfig, Trainer
from .trajectories import PAIRS_PRESETS

_TEACHER = DEMO / "teacher.safetensors"


class Stepping(Protocol):
    """A trainer, whatever it trains."""

    def step(self) -> Any:
        """One update."""
        ...


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is tried."""

    trainer: Stepping
    trained: Iterable[TrainedNetwork]
    counted: Mapping[str, int]
    """Bytes of one process by what holds them, as `estimate` counts them."""
    steps: int = 1
    """Updates, one of each kind that the run has; the slowest is told."""


@dataclass
class StandIns:
    """What stands for files that are not there; every one is noted."""

    preset: str | None
    """The preset that the config begins with; None for a file, which does not say sizes."""
    notes: list[str] = field(default_factory=list)

    def size(self, name: str, path: Path) -> ModelConfig:
        """The sizes of a network; ValueError where neither a file nor a preset gives them."""
        if path.exists():
            return read_checkpoint(path).config
        if self.preset == "wan":
            large = "14b" in path.name.lower()
            self._note(name, path, "Wan 2.1 14B" if large else "Wan 2.1 1.3B")
            return WAN_14B if large else WAN_1_3B
        self._note(name, path, "of the bundled demo's size")
        return read_checkpoint(_TEACHER).config

    def clips(self, folder: Path) -> tuple[int, int, int, int]:
        """The shape of clips' latents, [C, F, h, w]."""
        shape = shape_of_clips(folder)
        if shape is not None:
            return shape
        pairs = self._pairs("source", folder)
        return pairs.latents

    def pairs(self, folder: Path) -> PairsConfig:
        """How trajectories are made."""
        return Pairs.open(folder).config if shards_of(folder) else self._pairs("pairs", folder)

    def _pairs(self, name: str, folder: Path) -> PairsConfig:
        self._note(name, folder, f"those of ode_pairs --preset {self.preset}")
        return PAIRS_PRESETS[str(self.preset)]()

    def _note(self, name: str, path: Path, taken: str) -> None:
        if self.preset is None:
            raise ValueError(
                f"{name} is {path}, which is not there; a dry run takes its size from the preset, "
                "and the config is a file's: begin with --preset"
            )
        self.notes.append(f"{name} is {path}, which is not there: taken for {taken}")


def stand_ins(args: argparse.Namespace, presets: Iterable[str]) -> StandIns:
    """The stand-ins of a command line."""
    preset = args.preset or next(iter(presets))
    return StandIns(preset if begins_with_preset(args) else None)


def dry_teacher(args: argparse.Namespace) -> int:
    """Try an update of `teacher`."""
    found = stand_ins(args, TEACHER_PRESETS)
    config = _without_validation(config_from_args(args, TeacherConfig, TEACHER_PRESETS))

    kinds = tuple(dict.fromkeys(kind for phase in config.phases for kind in phase.kinds))
    phases, updates = (Phase(until=1.0, kinds=kinds),), max(len(kinds), config.updates)

    def make(device: torch.device) -> Trial:
        c = replace(config, phases=phases, updates=updates)
        if c.start is None and c.model is None:
            raise ValueError("neither start nor model is given; name a file, or give its sizes")
        size = c.model or found.size("start", c.start or _TEACHER)
        shape, text = found.clips(c.source), (size.text_len, size.text_dim)
        network = _network(size, c.placement, device, shape)
        uncond = torch.randn(1, *text)
        trainer = TeacherTrainer(c, network, RandomClips(shape, text), uncond, device)
        grid, trained = _own_grid(c, size, shape), [trainer.trained]
        counted = teacher_memory(c, size, grid, shape[1], world_size())
        return Trial(trainer=trainer, trained=trained, counted=counted, steps=len(kinds))

    return _try(args, config, found, make)


def dry_init(args: argparse.Namespace) -> int:
    """Try an update of `ode_init`."""
    found = stand_ins(args, INIT_PRESETS)
    config, _ = init_config(args)
    config = replace(_without_validation(config), pairs=args.pairs)

    def make(device: torch.device) -> Trial:
        size = found.size("start", config.start or _TEACHER)
        pairs_config, text = found.pairs(config.pairs), (size.text_len, size.text_dim)
        pairs = RandomPairs(made_with=pairs_config, text=text)
        network = _network(size, config.placement, device, pairs_config.latents)
        trainer = InitTrainer(config, network, pairs, device)
        grid = _own_grid(config, size, pairs_config.latents)
        counted = regression_memory(config, pairs_config, size, grid, world_size())
        return Trial(trainer=trainer, trained=[trainer.trained], counted=counted)

    return _try(args, config, found, make)


def dry_consistency(args: argparse.Namespace) -> int:
    """Try an update of `consistency`."""
    found = stand_ins(args, CONSISTENCY_PRESETS)
    config = config_from_args(args, ConsistencyConfig, CONSISTENCY_PRESETS)
    config = _without_validation(config)

    def make(device: torch.device) -> Trial:
        path = config.teacher or _TEACHER
        sizes = [found.size("teacher", path), found.size("start", config.start or path)]
        shape, text = found.clips(config.source), (sizes[1].text_len, sizes[1].text_dim)
        student = _network(sizes[1], config.placement, device, shape)
        teacher = _network(sizes[0], config.placement, device, shape, trained=False)
        source, uncond = RandomClips(shape, text), torch.randn(1, *text)
        trainer = ConsistencyTrainer(config, student, teacher, source, uncond, device)
        grid = _own_grid(config, sizes[1], shape)
        counted = consistency_memory(config, sizes[1], sizes[0], grid, world_size())
        return Trial(trainer=trainer, trained=[trainer.trained], counted=counted)

    return _try(args, config, found, make)


def dry_control(args: argparse.Namespace) -> int:
    """Try an update of `control`."""
    found = stand_ins(args, CONTROL_PRESETS)
    config = config_from_args(args, ControlRunConfig, CONTROL_PRESETS)
    config = _without_validation(config)

    def make(device: torch.device) -> Trial:
        size = found.size("base", config.base or _TEACHER)
        check_layers(config, size)
        channels, frames, rows, columns = found.clips(config.source)
        shape = (channels, min(frames, config.frames or frames), rows, columns)
        vace = VaceConfig(layers=config.layers, in_channels=2 * channels + MASK_CHANNELS)
        text = (size.text_len, size.text_dim)
        network = random_control(size, vace, config.placement, device)
        source, contexts = RandomClips(shape, text), RandomContexts((vace.in_channels, *shape[1:]))
        uncond = torch.randn(1, *text)
        trainer = ControlTrainer(config, network, source, contexts, uncond, device)
        grid = _own_grid(config, size, shape)
        counted = control_memory(config, size, grid, shape[1], world_size())
        return Trial(trainer=trainer, trained=[trainer.trained], counted=counted)

    return _try(args, config, found, make)


def dry_redmd(args: argparse.Namespace, config: DistilConfig, found: StandIns) -> int:
    """Try an update of `re_dmd`; a reward and its decoder take part where their files are there."""

    def make(device: torch.device) -> Trial:
        c, files = replace(config, run=of_largest(config.run)), config.files
        teacher = files.teacher or _TEACHER
        sizes = Sizes(
            student=found.size("files.student", student_path(c)),
            teacher=found.size("files.teacher", teacher),
            critic=found.size("files.critic", files.critic or teacher),
        )
        for latents in config.run.sizes:
            Grid.of_latents(*latents, sizes.student.patch_size)
        if c.starts.share:
            found.notes.append("without start images")
        prompts = DATA_SET.training_prompts()[:COUNT]
        text = (sizes.student.text_len, sizes.student.text_dim)
        embeds = MemoryEmbeds(torch.randn(len(prompts), *text))
        networks, reward = _redmd_networks(c, sizes, found, prompts, device)
        uncond = torch.randn(1, *text, device=device)
        trainer = Trainer(c.run, networks, embeds, uncond, reward, c.placement.sequence_over)
        counted = estimate(c, sizes, world_size()).memory
        return Trial(trainer=trainer, trained=trainer.trained.values(), counted=counted)

    return _try(args, config, found, make)


def _redmd_networks(
    config: DistilConfig,
    sizes: Sizes,
    found: StandIns,
    prompts: Sequence[str],
    device: torch.device,
) -> tuple[Networks, LatentRewards | None]:
    p, vae = config.placement, config.files.vae or DEMO / "vae.safetensors"
    decoder = None
    if vae.exists():
        group = config.run.redmd.cache.chunk_frames
        decoder = load_decoder(vae, device, placement_dtype(p), group)
    anchored = config.anchor and config.run.rollout_windows > 1 and decoder is not None
    latents = config.run.latents
    networks = Networks(
        student=_network(sizes.student, p, device, latents, lora=config.student_lora),
        teacher=_network(sizes.teacher, p, device, latents, trained=False),
        critic=_network(sizes.critic, p, device, latents, lora=config.critic_lora),
        anchor=image_anchor(decoder) if anchored else None,
        dtype=placement_dtype(p),
    )
    parts = [
        open_reward(each, device)
        for each in config.rewards
        if decoder is not None and (each.path is None or each.path.exists())
    ]
    if len(parts) < len(config.rewards):
        found.notes.append("without a reward or its decoder, whose files are not there")
    if not parts or decoder is None:
        return networks, None
    return networks, LatentRewards(parts, decoder, prompts, device, recomputed_frames(config))


def _network(
    size: ModelConfig,
    placement: PlacementConfig,
    device: torch.device,
    latents: Sequence[int],
    *,
    trained: bool = True,
    lora: Any = None,
) -> Any:
    placement_dtype(placement)  # refuses what needs a process group, where there is none
    check_sequence(placement.sequence_over, size, latents, "a network")
    offload = placement.offload == "all" if trained else placement.offload != "none"
    return random_network(
        size, placement, device, trained=trained, offload=offload, lora=lora, latents=latents
    )


def of_largest(run: RunConfig) -> RunConfig:
    """The same run with the largest of its sizes alone."""
    return replace(run, latents=(*run.latents[:2], *run.largest_size), buckets=())


def _without_validation(config: Any) -> Any:
    return replace(config, validate_every=0, validation_clips=0)


def _own_grid(config: SupervisedConfig, size: ModelConfig, latents: Sequence[int]) -> Grid:
    whole = Grid.of_latents(*latents[2:], size.patch_size)
    return own_grid(whole, config.placement.sequence_over)


def _try(
    args: argparse.Namespace,
    config: Any,
    found: StandIns,
    make: Callable[[torch.device], Trial],
) -> int:
    """Make it, take its steps and say what they took, on all processes."""
    check_machine(config.placement)
    over = config.placement.sequence_over
    if isinstance(config, DistilConfig):
        check_shares(config.run.redmd.batch, config.run.micro_batch, num_processes(), over)
    else:
        check_batches(config.batches, config.micro_batch, num_processes(), over)
    with process_group(args.device) as device:
        before = peak_bytes(device)
        trial = make(device)
        for note in found.notes:
            print_rank_0(f"dry run: {note}")
        for each in trial.trained:
            each.state()  # moments are there in every update but the first
        if config.placement.compile is not None:
            trial.trainer.step()
        reset_peak(device)
        seconds = max(_seconds(trial.trainer, device) for _ in range(trial.steps))
        peaks = all_gather(torch.tensor([peak_bytes(device)])).tolist()
        print_rank_0(_told(seconds, peaks, before, sum(trial.counted.values()), device))
    return 0


def _seconds(trainer: Stepping, device: torch.device) -> float:
    """Of an update, its work on the card included."""
    began = time.perf_counter()
    trainer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _told(
    seconds: float, peaks: Sequence[int], before: int, counted: int, device: torch.device
) -> str:
    """What a dry run says: bytes of each process, and those held before anything was made."""
    each = ", ".join(f"{peak / GB:.2f}" for peak in peaks)
    of = "a card's memory that torch has allocated"
    if device.type != "cuda":
        of = f"a process' resident memory, {before / GB:.2f} GB of it Python and its libraries"
    return (
        f"dry run: an update took {seconds:.2f} s\n"
        f"dry run: the peak is {max(peaks) / GB:.2f} GB ({of}; by process: {each}); the estimate "
        f"is {counted / GB:.2f} GB\n"
        "dry run: nothing was written"
    )
