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

from rf_core.decoders.vae import WanVAE
from rf_core.decoders.vae_files import load_vae
from rf_core.model import WanModel
from rf_core.text import UMT5Encoder, load_text_encoder, save_text_encoder
from rf_core.weights.checkpoint import load_student, read_checkpoint, write_checkpoint
from rf_core.weights.files import read_weights
from rf_core.weights.vace import load_vace
from rf_core.writing import whole_file, write_text

from ..control_videos import VariantsConfig
from .clips import (
    ClipsConfig,
    num_images,
    scene_of,
    to_channels_last,
    write_clips,
)
from .controls import write_controls_of
from .evaluate import EulerConfig, EvaluateConfig, Report, Streams, evaluate
from .follow import FollowConfig, Student, line, measure
from .restyle import RestyleConfig, restyle_report
from .train_text import TextTrainConfig, train_text
from .train_vae import FILE_NAME as VAE_FILE_NAME
from .train_vae import PROVENANCE_KEY, latent_colours

_log = logging.getLogger(__name__)
COLOUR_SEED = 4  # of the scenes that colours of latents are fitted to
RECIPES = {"teacher": "teacher", "student": "ode_init"}


@dataclass(frozen=True)
class Files:
    """Files of the results: those of the world's own stages lie in `folder`."""

    folder: Path
    teacher_file: Path | None = None
    """None for `teacher.safetensors` in the folder."""
    student_file: Path | None = None
    """The same of the student."""

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
    def controls(self) -> Path:
        return self.folder / "controls"

    @property
    def teacher(self) -> Path:
        return self.teacher_file or self.folder / "teacher.safetensors"

    @property
    def student(self) -> Path:
        return self.student_file or self.folder / "student.safetensors"

    @property
    def report(self) -> Path:
        return self.folder / "evaluation.json"

    @property
    def restyle(self) -> Path:
        return self.folder / "restyle.json"


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


def make_controls(files: Files, config: VariantsConfig) -> None:
    """Encode control contexts of the training clips."""
    for count in write_controls_of(open_vae(files), config, files.clips, files.controls):
        _log.info("controls of %d clips", count)


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
    written = [
        path for path in (files.vae, files.text, files.teacher, files.student) if path.exists()
    ]
    report["made_by"] = provenance("evaluate", config, clock, written) | {"euler": asdict(euler)}
    write_text(path, json.dumps(report, indent=1))
    return report


def make_following(
    files: Files, control: Path, config: FollowConfig, out: Path
) -> dict[str, list[dict[str, float]]]:
    """Measure how the student follows a control, row by row; what `out` holds is kept."""
    base, settings = open_network(files.student), read_checkpoint(files.student)
    vace = load_vace(control, base.config, device="cpu", dtype=torch.float32)
    student = Student(base, vace, settings, open_encoder(files), open_vae(files))
    path, found = out / "following.json", {}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    for name, clips in measure(student, config, found, out):
        found[name] = clips
        write_text(path, json.dumps(found))
        _log.info("%s", line(name, clips))
    return found


def release(files: Files, demo: Path) -> dict[str, int]:
    """Copy the results to the demo's folder; returns the size of each in bytes.

    The two networks go in half precision, which keeps the whole below 16 MB; the VAE is given the
    colours of its latents, for previews.
    """
    demo.mkdir(parents=True, exist_ok=True)
    for path in (files.vae, files.text):
        (demo / path.name).write_bytes(path.read_bytes())
    scenes = [scene_of(COLOUR_SEED, index) for index in range(16)]
    colours = latent_colours(open_vae(files), scenes, num_images(EvaluateConfig.frames))
    add_metadata(demo / files.vae.name, {"latent_rgb": json.dumps(colours)})
    for name, path in (("teacher", files.teacher), ("student", files.student)):
        checkpoint = read_checkpoint(_require_file(path, name))
        tensors = {key: tensor.half() for key, tensor in checkpoint.tensors.items()}
        write_checkpoint(
            demo / f"{name}.safetensors",
            tensors,
            checkpoint.config,
            checkpoint.cache,
            checkpoint.sampler,
            size=checkpoint.size,
            provenance=checkpoint.provenance,
            companions=checkpoint.companions,
        )
    return {path.name: path.stat().st_size for path in sorted(demo.glob("*.safetensors"))}


def make_restyle_report(files: Files, config: RestyleConfig, path: Path) -> Report:
    """Measure the student on sources, and write the report."""
    clock = time.monotonic()
    report = restyle_report(open_streams(files), config)
    report["made_by"] = provenance("restyle", config, clock, (files.vae, files.text, files.student))
    write_text(path, json.dumps(report, indent=1))
    return report


def open_streams(files: Files) -> Streams:
    """The student with what it streams with."""
    settings = read_checkpoint(files.student)
    return Streams(
        open_network(files.student),
        open_encoder(files),
        open_vae(files),
        EvaluateConfig(),
        settings.cache,
        settings.sampler,
    )


def open_vae(files: Files, device: torch.device | str = "cpu") -> WanVAE:
    """The VAE; ValueError where it has not been made."""
    vae = load_vae(_require_file(files.vae, "vae"), device)
    return to_channels_last(vae) if torch.device(device).type == "cpu" else vae


def open_encoder(files: Files, device: torch.device | str = "cpu") -> UMT5Encoder:
    """The text encoder; ValueError where it has not been made."""
    path = _require_file(files.text, "text")
    return load_text_encoder(path, device=device, dtype=torch.float32)


def open_network(path: Path, device: torch.device | str = "cpu") -> WanModel:
    """A teacher or student in float32."""
    return load_student(_require_file(path, path.stem), device=device, dtype=torch.float32)[0]


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


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def add_metadata(path: Path, extra: dict[str, str]) -> None:
    """Add to a safetensors file's metadata."""
    file = read_weights(path)
    with whole_file(path) as part:
        save_file(file.tensors, part, file.metadata | extra)


def _require_file(path: Path, stage: str) -> Path:
    if not path.exists():
        recipe = f" {RECIPES[stage]}" if stage in RECIPES else f".world {stage}"
        raise ValueError(f"{path} is missing; run `python -m training{recipe}` first, or name it")
    return path
