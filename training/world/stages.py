"""The stages of making the demo model: what each reads, writes and records.

Every file says in its metadata how it was made: the stage's config, what it took, and the hashes
of the files it was made from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rf_core.config import CacheConfig, SamplerConfig
from rf_core.decoders.vae import WanVAE
from rf_core.decoders.vae_files import load_vae
from rf_core.model import WanModel
from rf_core.text import UMT5Encoder, load_text_encoder, save_text_encoder
from rf_core.weights.checkpoint import load_student, read_checkpoint, write_checkpoint
from rf_core.weights.files import read_weights
from rf_core.writing import whole_file, write_text

from .clips import (
    ClipsConfig,
    lay_out_channels_last,
    num_images,
    read_clips,
    scene_of,
    write_clips,
)
from .evaluate import (
    EvaluateConfig,
    Report,
    Streams,
    accuracy,
    accuracy_of,
    evaluate,
    evaluation_prompts,
)
from .ode_pairs import EulerConfig, PairsConfig, read_pairs, sample, write_pairs
from .scenes import SIZE
from .train_student import StudentConfig, train_student
from .train_teacher import TeacherConfig, Training, train_teacher
from .train_text import TextTrainConfig, train_text
from .train_vae import FILE_NAME as VAE_FILE_NAME
from .train_vae import PROVENANCE_KEY, latent_colours

_log = logging.getLogger(__name__)

PREVIEW = EvaluateConfig(single=16, double=6, chunks=5, seed=4)
"""What a network in training is tried on."""

MANY_STEPS = SamplerConfig(steps=tuple(range(1000, 0, -50)))
"""A schedule fine enough for the teacher to stream by, without guidance."""


@dataclass(frozen=True)
class Files:
    """Where the stages leave their results."""

    folder: Path

    @property
    def vae(self) -> Path:
        return self.folder / VAE_FILE_NAME

    @property
    def text(self) -> Path:
        return self.folder / "text_encoder.safetensors"

    @property
    def clips(self) -> Path:
        return self.folder / "clips"

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher.safetensors"

    @property
    def trajectories(self) -> Path:
        return self.folder / "trajectories"

    @property
    def student(self) -> Path:
        return self.folder / "student.safetensors"

    @property
    def report(self) -> Path:
        return self.folder / "evaluation.json"


def make_text(files: Files, config: TextTrainConfig) -> float:
    """Train and write the text encoder; returns the probe's accuracy."""
    clock = time.monotonic()
    encoder, accuracy = train_text(config)
    save_text_encoder(files.text, encoder)
    note = provenance("text", config, clock, []) | {"accuracy": accuracy}
    add_metadata(files.text, {PROVENANCE_KEY: json.dumps(note)})
    return accuracy


def make_clips(files: Files, config: ClipsConfig) -> None:
    """Encode the training clips."""
    vae = open_vae(files)
    for count in write_clips(vae, config, files.clips):
        _log.info("%d clips", count)


def make_teacher(files: Files, config: TeacherConfig, start: Path | None = None) -> None:
    """Train and write the teacher, anew or from a checkpoint; tries it at every checkpoint."""
    vae, encoder, clock = open_vae(files), open_encoder(files), time.monotonic()
    clips = read_clips(files.clips)
    _log.info("%d clips", len(clips.scenes))
    about = provenance("teacher", config, clock, [files.vae, files.text])
    if start:
        about["started_from"] = {"sha256": file_hash(start)} | read_checkpoint(start).provenance

    def checkpoint(training: Training) -> None:
        found = {
            "whole": preview(vae, encoder, training.average),
            "streamed": preview_stream(vae, encoder, training.average, MANY_STEPS),
        }
        note = about | progress(training, clock) | {"clips": len(clips.scenes), "preview": found}
        write_network(files.teacher, training.average, note)
        _log.info("%d steps, loss %.4f, %s", training.steps, training.loss, found)

    first = open_network(start) if start else None
    train_teacher(config, clips, encoder, checkpoint, first)


def preview(vae: WanVAE, encoder: UMT5Encoder, teacher: WanModel) -> dict[str, str]:
    """The teacher's accuracy on whole clips of a few captions."""
    prompts = evaluation_prompts(PREVIEW)
    latents = sample(teacher, encoder, prompts, EulerConfig(steps=16), PREVIEW.frames, PREVIEW.seed)
    return _counts(accuracy(vae, latents, prompts))


def preview_stream(
    vae: WanVAE, encoder: UMT5Encoder, student: WanModel, sampler: SamplerConfig
) -> dict[str, str]:
    """The accuracy of short streams of a few captions."""
    prompts = evaluation_prompts(PREVIEW)
    streams = Streams(student, encoder, vae, PREVIEW, sampler=sampler)
    return _counts(accuracy_of(streams.videos(prompts, PREVIEW.chunks), prompts))


def _counts(report: Report) -> dict[str, str]:
    return {name: f"{count['right']}/{count['of']}" for name, count in report["all"].items()}


def make_pairs(files: Files, config: PairsConfig) -> None:
    """Follow the teacher's ODE from noise to chunks."""
    teacher, encoder, clips = (
        open_network(files.teacher),
        open_encoder(files),
        read_clips(files.clips),
    )
    for count in write_pairs(teacher, encoder, clips, config, files.trajectories):
        _log.info("%d excerpts", count)


def make_student(files: Files, config: StudentConfig, start: Path | None = None) -> None:
    """Train and write the student, from the teacher or from a checkpoint of its own."""
    vae, encoder, clock = open_vae(files), open_encoder(files), time.monotonic()
    pairs = read_pairs(files.trajectories)
    counts = {"excerpts": len(pairs.excerpts)}
    _log.info("%s", counts)
    origin = start or files.teacher
    about = provenance("student", config, clock, [files.vae, files.text, origin])
    if start:
        about["started_from"] = {"sha256": file_hash(start)} | read_checkpoint(start).provenance

    def checkpoint(training: Training) -> None:
        found = preview_stream(vae, encoder, training.average, config.sampler)
        note = about | progress(training, clock) | counts | {"preview": found}
        write_network(files.student, training.average, note, config.cache, config.sampler)
        _log.info("%d steps, loss %.4f, %s", training.steps, training.loss, found)

    train_student(config, open_network(origin), pairs, encoder, checkpoint)


def make_report(files: Files, config: EvaluateConfig, euler: EulerConfig, path: Path) -> Report:
    """Evaluate the teacher and the student, as far as they are there, and write the report."""
    teacher = open_network(files.teacher) if files.teacher.exists() else None
    student = open_network(files.student) if files.student.exists() else None
    settings = read_checkpoint(files.student) if student else None
    clock = time.monotonic()
    report = evaluate(
        open_vae(files),
        open_encoder(files),
        teacher,
        student,
        euler,
        config,
        settings.cache if settings else None,
        settings.sampler if settings else None,
    )
    made = [path for path in (files.vae, files.text, files.teacher, files.student) if path.exists()]
    report["made_by"] = provenance("evaluate", config, clock, made) | {"euler": asdict(euler)}
    write_text(path, json.dumps(report, indent=1))
    return report


def release(files: Files, demo: Path) -> dict[str, int]:
    """Copy the results to the demo's folder; returns the size of each in bytes.

    The two networks go in half precision, which keeps the whole below 15 MB; the VAE is given the
    colours of its latents, for previews.
    """
    demo.mkdir(parents=True, exist_ok=True)
    for path in (files.vae, files.text):
        (demo / path.name).write_bytes(path.read_bytes())
    scenes = [scene_of(PREVIEW.seed, index) for index in range(16)]
    colours = latent_colours(open_vae(files), scenes, num_images(PREVIEW.frames))
    add_metadata(demo / files.vae.name, {"latent_rgb": json.dumps(colours)})
    for path in (files.teacher, files.student):
        made = read_checkpoint(path)
        tensors = {name: tensor.half() for name, tensor in made.tensors.items()}
        write_checkpoint(
            demo / path.name,
            tensors,
            made.config,
            made.cache,
            made.sampler,
            size=made.size,
            provenance=made.provenance,
        )
    return {path.name: path.stat().st_size for path in sorted(demo.glob("*.safetensors"))}


def open_vae(files: Files) -> WanVAE:
    """The VAE; ValueError where it has not been made."""
    return lay_out_channels_last(load_vae(_made(files.vae, "vae")))


def open_encoder(files: Files) -> UMT5Encoder:
    """The text encoder; ValueError where it has not been made."""
    path = _made(files.text, "text")
    return load_text_encoder(path, device="cpu", dtype=torch.float32)


def open_network(path: Path) -> WanModel:
    """A teacher or student in float32."""
    return load_student(_made(path, path.stem), device="cpu", dtype=torch.float32)[0]


def write_network(
    path: Path,
    network: WanModel,
    note: dict[str, Any],
    cache: CacheConfig | None = None,
    sampler: SamplerConfig | None = None,
) -> None:
    """Write a teacher (no cache) or a student."""
    tensors = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    size = (SIZE, SIZE)
    write_checkpoint(path, tensors, network.config, cache, sampler, size=size, provenance=note)


def provenance(stage: str, config: Any, clock: float, parents: Iterable[Path]) -> dict[str, Any]:
    """How a file is made, as plain JSON."""
    return {
        "command": f"python -m training.world {stage}",
        "config": asdict(config),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "minutes": round((time.monotonic() - clock) / 60, 2),
        "made_from": {path.name: file_hash(path) for path in parents},
    }


def progress(training: Training, clock: float) -> dict[str, Any]:
    """How far a training has come."""
    return {
        "steps": training.steps,
        "samples": training.samples,
        "loss": round(training.loss, 6),
        "minutes": round((time.monotonic() - clock) / 60, 2),
    }


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def add_metadata(path: Path, extra: dict[str, str]) -> None:
    """Add to a safetensors file's metadata."""
    file = read_weights(path)
    with whole_file(path) as part:
        save_file(file.tensors, part, file.metadata | extra)


def _made(path: Path, stage: str) -> Path:
    if not path.exists():
        raise ValueError(f"{path} is missing; run `python -m training.world {stage}` first")
    return path
