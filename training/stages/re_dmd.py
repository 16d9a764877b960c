"""The `re_dmd` stage: opens the files of a config, trains, and writes a student.

In the run's folder: `config.json`, `log.jsonl`, `update_N` (checkpoints to resume from),
`validation` and, at every checkpoint, `student.safetensors` or, of an adapter,
`lora.safetensors`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rf_core.decoders.decoder import Decoder, load_decoder
from rf_core.options import DEMO
from rf_core.weights.checkpoint import Companion, read_checkpoint

from ..choices import DATA_SET, check_starts, needs_pixels, open_reward, open_starts
from ..data.embeddings import PromptEmbeds, open_prompts
from ..data.prompts import check_prompt_files, count_prompts
from ..data.starts import StartedTexts, Starts
from ..objective.redmd import Networks
from ..rewards.reward import LatentRewards, Texts, image_anchor
from ..run.config import to_json
from ..run.distributed import Stopped, broadcast_from_rank_0, rank, world_size
from ..run.folder import (
    LORA,
    STUDENT,
    checkpoint_path,
    checkpoint_to_resume,
    create_run_folder,
    delete_old_checkpoints,
    is_saved,
    name_last_checkpoint_on_error,
)
from ..run.journal import Journal
from ..run.memory import costs
from ..run.networks import open_network, placement_dtype
from ..run.sequence import check_cache, check_sequence
from ..run.signals import StopRequest, stop_on_signal
from .estimate import Sizes
from .export import file_hash, student_companions, write_adapter, write_student
from .recipes import DistilConfig, recomputed_frames, student_path
from .supervised import video_size
from .trainer import Report, Trainer, drawn_prompts, report_numbers
from .validation import (
    Validation,
    is_due,
    log_validation,
    spread_prompts,
    validate,
    validation_folder,
    was_validated,
)

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Run:
    """A distillation with its files opened."""

    config: DistilConfig
    trainer: Trainer
    prompts: list[str]
    decoder: Decoder | None
    origin: dict[str, str]
    """Hashes of the files it began with."""
    companions: dict[str, Companion]
    """The VAE and the text encoder, as the student's file names them."""
    family: str
    """The student's."""
    started: float
    saved: float
    """When the last checkpoint was written, by the same clock; at first when it started."""
    out: Path


def distil(
    config: DistilConfig, out: Path, device: torch.device, *, resume: bool = False
) -> Iterator[Report]:
    """Run it, yielding a report an update.

    Raises:
        ValueError: a file is missing or `out` holds another run; before any weight is read.
        FloatingPointError: the run broke down; the last good checkpoint is named.
        Stopped: a signal asked for it; the run is saved.
    """
    files = check_files(config)
    _sizes_of(config, files)
    resumed = checkpoint_to_resume(config, out, resume)
    run = _open(config, files, out, device)
    if resumed is not None:
        run.trainer.load(resumed.checkpoint)
    create_run_folder(config, out)
    with (
        Journal(
            out,
            first_update=run.trainer.update,
            tensorboard=config.output.tensorboard,
            wandb=config.output.wandb,
            config=config,
        ) as journal,
        stop_on_signal() as stop,
    ):
        if resumed is not None:
            journal.write_changes(run.trainer.update, resumed.changes)
            done = was_validated(out, run.trainer.update)
            if _validation_is_due(run) and not done:  # it broke off, or failed
                log_validation(journal, run.trainer.update, _validate(run))
        while run.trainer.update < config.run.updates:
            yield _update(run, journal, stop)


def check_files(config: DistilConfig) -> dict[str, Path]:
    """Where the run's weights are, by name; ValueError for one that is not there."""
    f = config.files
    teacher = f.teacher or DEMO / "teacher.safetensors"
    found = {
        "student": student_path(config),
        "teacher": teacher,
        "critic": f.critic or teacher,
        "vae": f.vae or DEMO / "vae.safetensors",
    }
    for name, path in found.items():
        if not path.exists():
            raise ValueError(f"files.{name} is {path}, which is not there")
    check_prompt_files(config.data)
    if config.run.switch_share:
        config.run.check_prompts(count_prompts(config.data, DATA_SET))
    check_starts(
        config.starts,
        config.run.latents[0],
        config.run.sizes,
        config.run.redmd.cache.first_frames,
    )
    return found


def read_sizes(config: DistilConfig) -> Sizes:
    """The sizes of a run's networks, read from their files.

    ValueError where they cannot work together on the run's latents.
    """
    return _sizes_of(config, check_files(config))


def _sizes_of(config: DistilConfig, files: dict[str, Path]) -> Sizes:
    channels = config.run.latents[0]
    found = {name: read_checkpoint(files[name]).config for name in ("student", "teacher", "critic")}
    for name, size in found.items():
        if size.in_dim != channels:
            raise ValueError(f"run.latents has {channels} channels; files.{name} has {size.in_dim}")
        if size.text_dim != found["student"].text_dim:
            raise ValueError(
                f"files.{name} reads text of width {size.text_dim}, files.student of "
                f"{found['student'].text_dim}: they need one text encoder"
            )
    over = config.placement.sequence_over
    check_cache(over, config.run.redmd.cache, "run.redmd.cache")
    for name, size in found.items():
        for latents in config.run.sizes:
            check_sequence(over, size, latents, f"files.{name}")
    return Sizes(**found)


def _update(run: Run, journal: Journal, stop: StopRequest) -> Report:
    """One update. Its numbers and its checkpoint are there before anything else can fail."""
    trainer, output = run.trainer, run.config.output
    clock = time.perf_counter()
    try:
        with name_last_checkpoint_on_error(run.out, trainer.update):
            report = trainer.step(stop)
    except Stopped as stopped:
        if trainer.is_within_update or not is_saved(run.out, trainer.update):
            _checkpoint(run, journal)
        raise stopped.saved(run.out, trainer.update) from None
    journal.write(report.update, report_numbers(report) | costs(clock, trainer.uncond.device))
    validates = _validation_is_due(run)
    saves = trainer.update % output.checkpoint_every == 0 or validates or _is_last(run)
    if saves or _is_overdue(run):
        with name_last_checkpoint_on_error(run.out, trainer.update):
            _checkpoint(run, journal)
        run.saved = time.monotonic()
    if validates:
        log_validation(journal, trainer.update, _validate(run))
    return report


def _is_last(run: Run) -> bool:
    return run.trainer.update == run.config.run.updates


def _validation_is_due(run: Run) -> bool:
    return is_due(run.config.output.validate_every, run.trainer.update, run.config.run.updates)


def _is_overdue(run: Run) -> bool:
    minutes = (time.monotonic() - run.saved) / 60
    return broadcast_from_rank_0(minutes >= run.config.output.checkpoint_minutes)


def _checkpoint(run: Run, journal: Journal) -> None:
    trainer, config, out = run.trainer, run.config, run.out
    folder = checkpoint_path(out, trainer.update)
    trainer.save(folder)
    journal.write_checkpoint(trainer.update - 1, folder)
    note = provenance(config, trainer.update, run.origin)
    note["minutes_since_start_or_resume"] = round((time.monotonic() - run.started) / 60, 2)
    student, redmd = trainer.networks.student, config.run.redmd
    with trainer.averaged():
        if config.student_lora is not None:
            write_adapter(out / LORA, student, config.student_lora, note)
        else:
            size = video_size(config.run.latents)
            write_student(
                out / STUDENT,
                student,
                redmd.cache,
                redmd.sampler,
                size,
                note,
                run.companions,
                run.family,
            )
    delete_old_checkpoints(out, config.output.keep)


def origin_of(files: dict[str, Path]) -> dict[str, str]:
    """Hashes of what a student is made from: every byte is read, so once a run."""
    return {name: file_hash(files[name]) for name in ("teacher", "student")}


def provenance(config: DistilConfig, updates: int, origin: dict[str, str]) -> dict[str, Any]:
    """How a student is made, as plain JSON."""
    return {
        "command": "python -m training re_dmd",
        "config": json.loads(to_json(config)),
        "updates": updates,
        "processes": world_size(),
        "torch": str(torch.__version__),
        "made_from": origin,
    }


def _validate(run: Run) -> Validation:
    config, trainer = run.config, run.trainer
    if run.decoder is None:
        return Validation()
    shown = spread_prompts(config.output.validation_prompts, len(run.prompts))
    with trainer.averaged():
        return validate(
            trainer.networks,
            config.run.redmd,
            trainer.prompts.embeds(shown).to(trainer.uncond),
            [run.prompts[number] for number in shown],
            run.decoder,
            config.output.validation_chunks,
            video_size(config.run.latents),
            validation_folder(run.out, trainer.update),
        )


def _open(config: DistilConfig, files: dict[str, Path], out: Path, device: torch.device) -> Run:
    started = time.monotonic()
    dtype = placement_dtype(config.placement)
    prompts, embeds, uncond = open_prompts(
        config.data, DATA_SET, out / "embeddings", device, dtype, partial(needed_prompts, config)
    )
    decoder = None
    if _needs_pixels(config):  # as a stream decodes: a clip at once would take 27 GB
        group = config.run.redmd.cache.chunk_frames
        decoder = load_decoder(files["vae"], device, dtype, group)
    texts: Texts = prompts
    starts = _open_starts(config, decoder, embeds, out, device)
    if starts is not None:
        texts = StartedTexts(prompts, starts.source)
    networks = _open_networks(config, files, device, decoder)
    reward = _open_rewards(config, decoder, texts, device)
    over = config.placement.sequence_over
    trainer = Trainer(config.run, networks, embeds, uncond.to(device), reward, over, starts)
    return Run(
        config=config,
        trainer=trainer,
        prompts=prompts,
        decoder=decoder,
        origin=origin_of(files) if rank() == 0 else {},  # the first process writes
        companions=student_companions(config) if rank() == 0 else {},
        family=read_checkpoint(files["student"], family=config.files.family).family,
        started=started,
        saved=started,
        out=out,
    )


def needed_prompts(config: DistilConfig, num_prompts: int) -> list[int]:
    """The numbers of the prompts that a distillation encodes, of so many."""
    shown = config.output.validation_prompts if config.output.validate_every else 0
    drawn = drawn_prompts(config.run, num_prompts, config.starts.share)
    return [*spread_prompts(shown, num_prompts), *drawn]


def _open_starts(
    config: DistilConfig,
    decoder: Decoder | None,
    own: PromptEmbeds,
    out: Path,
    device: torch.device,
) -> Starts | None:
    """Before the networks, which leave a text encoder no room."""
    source = open_starts(
        config.starts,
        config.data,
        decoder,
        config.run.redmd.cache,
        out / "embeddings",
        device,
        placement_dtype(config.placement),
    )
    return None if source is None else Starts(source=source, share=config.starts.share, own=own)


def _open_networks(
    config: DistilConfig, files: dict[str, Path], device: torch.device, decoder: Decoder | None
) -> Networks:
    p = config.placement
    opened = partial(open_network, placement=p, device=device, latents=config.run.latents)
    trained = partial(opened, trained=True, offload=p.offload == "all", seed=config.run.seed)
    return Networks(
        student=trained(files["student"], lora=config.student_lora),
        teacher=opened(files["teacher"], trained=False, offload=p.offload != "none"),
        critic=trained(files["critic"], lora=config.critic_lora),
        anchor=image_anchor(decoder) if config.anchor and config.run.rollout_windows > 1 else None,
        dtype=placement_dtype(p),
    )


def _open_rewards(
    config: DistilConfig, decoder: Decoder | None, prompts: Texts, device: torch.device
) -> LatentRewards | None:
    if not config.rewards:
        return None
    parts = [open_reward(each, device) for each in config.rewards]
    assert decoder is not None
    return LatentRewards(parts, decoder, prompts, device, recomputed_frames(config))


def _needs_pixels(config: DistilConfig) -> bool:
    anchored = config.anchor and config.run.rollout_windows > 1
    shown = bool(config.rewards) or bool(config.output.validate_every)
    return anchored or shown or needs_pixels(config.starts)
