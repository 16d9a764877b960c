"""Students and adapters as files: what the engine, its nodes and ComfyUI's loaders open."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from rf_core.companions import companions_of
from rf_core.config import SPATIAL_FACTOR, CacheConfig, ModelConfig, SamplerConfig, VaceConfig
from rf_core.model import WanModel
from rf_core.options import DEMO
from rf_core.vace import Vace
from rf_core.weights.checkpoint import Companion, read_checkpoint, write_checkpoint
from rf_core.weights.files import WeightFile
from rf_core.weights.vace import fit_vace, read_vace, save_vace
from rf_core.writing import whole_file

from ..data.embeddings import encoder_path
from ..run.checkpointing import read_part
from ..run.controlled import TrainedControl
from ..run.distributed import rank
from ..run.lora import BASE, LoRAConfig, exported, merged
from .recipes import DistilConfig

PROVENANCE_KEY = "rf_provenance"
_VACE = "vace."
Weights = Literal["average", "student"]


def write_student(
    path: Path,
    student: WanModel,
    cache: CacheConfig | None,
    sampler: SamplerConfig | None,
    size: tuple[int, int],
    note: Mapping[str, Any],
    companions: Mapping[str, Companion] | None = None,
    family: str | None = None,
) -> None:
    """Write a student that may be sharded, or a teacher, which has no cache and no sampler.

    `family` is the one that its start was of; what it streams by is its own all the same.

    Every process calls this, the first one writes.
    """
    tensors = _full_state_dict(student)
    if rank() == 0:
        write_checkpoint(
            path,
            tensors,
            student.config,
            cache,
            sampler,
            size=size,
            family=family,
            provenance=note,
            companions=companions,
        )


def write_control(path: Path, network: TrainedControl, note: Mapping[str, Any]) -> None:
    """The same of a VACE alone, without its base."""
    tensors = _full_state_dict(network)
    if rank() == 0:
        _save_control(path, network.config, network.vace.config, tensors, note)


def _save_control(
    path: Path,
    base: ModelConfig,
    config: VaceConfig,
    tensors: Mapping[str, Tensor],
    note: Mapping[str, Any],
) -> None:
    own = {n.removeprefix(_VACE): each for n, each in tensors.items() if n.startswith(_VACE)}
    vace = Vace(base, config, device="meta")
    vace.load_state_dict(own, strict=True, assign=True)
    save_vace(path, vace, provenance=note)


def write_adapter(
    path: Path, student: WanModel, config: LoRAConfig, note: Mapping[str, Any]
) -> None:
    """The same of a student's adapter alone, under the names ComfyUI's loader maps."""
    tensors = _full_state_dict(student)
    if rank() == 0:
        _save_adapter(path, tensors, config, note)


def export(
    config: DistilConfig,
    student: Path,
    checkpoint: Path,
    out: Path,
    *,
    weights: Weights = "average",
    dtype: torch.dtype = torch.bfloat16,
    adapter: bool = False,
    note: Mapping[str, Any],
) -> None:
    """Write a checkpoint of a run as a student's safetensors, on one process.

    `student` is the file the run began with. An adapter is merged into it, or with `adapter`
    written by itself. ValueError where the run trained none.
    """
    part = "average" if weights == "average" else "generator.model"
    trained, lora = read_part(checkpoint, part), config.student_lora
    if adapter:
        if lora is None:
            raise ValueError(f"{checkpoint} is of a run without student_lora; export it whole")
        _save_adapter(out, trained, lora, note)
        return
    source = read_checkpoint(student, family=config.files.family)
    tensors = merged(source.merged(), trained, lora) if lora is not None else trained
    redmd, (*_, rows, columns) = config.run.redmd, config.run.latents
    write_checkpoint(
        out,
        {name: tensor.to(dtype) for name, tensor in tensors.items()},
        source.config,
        redmd.cache,
        redmd.sampler,
        size=(rows * SPATIAL_FACTOR, columns * SPATIAL_FACTOR),
        family=source.family,
        provenance=note,
        companions=student_companions(config),
    )


def trained_on(adapter: WeightFile) -> str | None:
    """The student that an adapter of ours was trained on, as `--model` names it; None of others."""
    try:
        student = json.loads(adapter.metadata[PROVENANCE_KEY])["config"]["files"]["student"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return "demo" if student is None else str(student)


def student_companions(config: DistilConfig) -> dict[str, Companion]:
    """The VAE and the text encoder of a run's student, as its file names them."""
    return companions_of(config.files.vae or DEMO / "vae.safetensors", encoder_path(config.data))


def export_supervised(
    saved: Path,
    checkpoint: Path,
    out: Path,
    *,
    weights: Weights = "average",
    dtype: torch.dtype = torch.bfloat16,
    update: int,
) -> None:
    """The same of `ode_init` and `teacher`, whose runs have all settings in the file they saved.

    `saved` is that file, `update` the checkpoint's.
    """
    part = "average" if weights == "average" else "student.model"
    found = read_checkpoint(saved)
    write_checkpoint(
        out,
        {name: tensor.to(dtype) for name, tensor in read_part(checkpoint, part).items()},
        found.config,
        found.cache,
        found.sampler,
        size=found.size,
        family=found.family,
        provenance={**found.provenance, "updates": update},
    )


def export_control(
    saved: Path,
    checkpoint: Path,
    out: Path,
    *,
    weights: Weights = "average",
    dtype: torch.dtype = torch.bfloat16,
    update: int,
) -> None:
    """The same of `control`, whose runs train a VACE."""
    part = "average" if weights == "average" else "student.model"
    tensors = {name: each.to(dtype) for name, each in read_part(checkpoint, part).items()}
    found = read_vace(saved)
    base = ModelConfig(**found.base)
    note = {**found.provenance, "updates": update}
    _save_control(out, base, fit_vace(found, base), tensors, note)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read in pieces; of a folder, of its files' names and sizes."""
    digest = hashlib.sha256()
    if path.is_dir():
        listing = sorted((each.name, each.stat().st_size) for each in path.iterdir())
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def _full_state_dict(student: WanModel) -> dict[str, Tensor]:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {name: t.detach() for name, t in get_model_state_dict(student, options=options).items()}


def _save_adapter(
    path: Path, tensors: Mapping[str, Tensor], config: LoRAConfig, note: Mapping[str, Any]
) -> None:
    plain = {name.replace(BASE, ""): tensor for name, tensor in tensors.items()}
    adapter = {name: t.contiguous() for name, t in exported(plain, config).items()}
    with whole_file(path) as part:
        save_file(adapter, part, {PROVENANCE_KEY: json.dumps(note)})
