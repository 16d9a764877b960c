"""VideoAlign on disk: the release converted once, offline, and what a converted folder says.

The release (Hugging Face id KwaiVGI/VideoReward) is a `model_config.json` and the state dict of a
Qwen2-VL-2B-Instruct under PEFT: its language model's linears carry a LoRA, the vision tower, the
three added tokens and the reward head are trained in full. A converted folder holds one safetensors
file, the LoRA merged, named as transformers names a `Qwen2VLModel` today, with the constants that
scores depend on in its metadata; beside it the base model's `config.json` and `tokenizer.json`.
"""

from __future__ import annotations

import math
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from rf_core.numbered import numbered
from rf_core.weights.files import WeightFile, read_json, read_weights
from rf_core.writing import whole_file

from ..run.config import from_dict, from_json, to_json
from .videoalign_network import Network
from .videoalign_text import REWARD_TOKENS, SCORES, load_tokenizer

WEIGHTS, BASE_FILES = "videoalign.safetensors", ("config.json", "tokenizer.json")
METADATA_KEY = "videoalign"
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "rm_head.weight"

_TENSOR = re.compile(
    r"(?P<module>.+?)"
    r"(?:\.(?P<part>base_layer|original_module|(?:lora_A|lora_B|modules_to_save)\.default))?"
    r"\.(?P<leaf>weight|bias)"
)


@dataclass(frozen=True, kw_only=True)
class VideoAlignConfig:
    """What scores depend on beside the weights; VQ, MQ and TA in this order."""

    means: tuple[float, float, float]
    """Taken off the head's output (`inference_config`)."""
    stds: tuple[float, float, float]
    """What the rest is divided by (`inference_config`)."""
    fps: float
    """Frames a second that the judge sees."""
    max_pixels: int
    """Of a frame, at most."""
    template: Literal["detailed_special"] = "detailed_special"
    """The questionnaire."""
    reward_token_ids: tuple[int, int, int]
    """Where the scores are read."""
    output_dim: int = 3
    """Rows of the head, a score each."""
    positions: Literal["sequential"] = "sequential"
    """Of tokens in the language model: 0, 1, 2 ... through text and video, no M-RoPE. The release's
    forward gives none, and transformers 4.45 then counts."""
    angles: Literal["bfloat16", "float32"] = "bfloat16"
    """What rotary frequencies are rounded to. The release casts the whole model, buffers too, in
    training (`bf16`) as in use, and 0.2 percent of an angle counts at position 2000."""

    def __post_init__(self) -> None:
        if not all(math.isfinite(mean) for mean in self.means):
            raise ValueError(f"means are {self.means}; give finite numbers")
        if not all(math.isfinite(std) and std > 0 for std in self.stds):
            raise ValueError(f"stds are {self.stds}; give positive numbers")
        if not (self.fps > 0 and self.max_pixels > 0):
            raise ValueError(f"fps {self.fps} and max_pixels {self.max_pixels} must be positive")
        if self.output_dim != len(SCORES):
            raise ValueError(f"output_dim is {self.output_dim}; this judge has {len(SCORES)}")


def convert(
    release: Path,
    base: Path | str,
    out: Path,
    *,
    step: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write the release as a folder that `load_videoalign` reads.

    Args:
        release: the folder with `model_config.json` and `checkpoint-*/model.pth`.
        base: Qwen2-VL-2B-Instruct, of which the config and tokenizer are taken: a local folder, or
            its hub id, which is then downloaded without its weights.
        out: the folder to write; made if need be.
        step: the checkpoint's number; the latest by default (11352 in the release).
        dtype: of the weights written; LoRAs are merged in float32 before.

    Raises:
        ValueError: files are missing or damaged; tensors are missing, unknown or of another size
            than the base's; or the release asks for what this code does not do.
    """
    path, folder = _checkpoint(release, step), _base(base)
    tokenizer = load_tokenizer(folder)
    ids = [tokenizer.token_to_id(token) for token in REWARD_TOKENS]
    config, rank, scale = _read_settings(release / "model_config.json", ids)
    weights = _converted(path, read_weights(path).tensors, rank, scale, dtype)
    if EMBEDDING in weights and len(weights[EMBEDDING]) != tokenizer.get_vocab_size():
        raise ValueError(
            f"{path} knows {len(weights[EMBEDDING])} tokens, the tokenizer in {folder} "
            f"{tokenizer.get_vocab_size()}; give the base the release was trained from"
        )
    require_fit(path, weights, read_base_config(folder, weights))
    out.mkdir(parents=True, exist_ok=True)
    for name in BASE_FILES:
        shutil.copyfile(folder / name, out / name)
    with whole_file(out / WEIGHTS) as part:
        save_file(weights, part, metadata={"format": "pt", METADATA_KEY: to_json(config)})


def read_converted(folder: Path) -> tuple[WeightFile, VideoAlignConfig]:
    """Weights, memory-mapped, and constants that `convert` wrote; ValueError where they are not."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder} holds no {WEIGHTS}; convert the release into it first")
    file = read_weights(path)
    if METADATA_KEY not in file.metadata:
        raise ValueError(f"{path} carries no constants of VideoAlign; convert the release again")
    return file, from_json(VideoAlignConfig, file.metadata[METADATA_KEY])


def read_base_config(folder: Path, weights: Mapping[str, Tensor]) -> Any:
    """transformers' `Qwen2VLConfig` of a folder, its vocabulary as long as the weights' table.

    ValueError where the folder's is another model's, or the table is missing.
    """
    from transformers import Qwen2VLConfig

    values = read_json(folder / "config.json")
    if values.get("model_type") != Qwen2VLConfig.model_type:
        raise ValueError(
            f"{folder / 'config.json'} is of the kind {values.get('model_type')!r}; give "
            "Qwen2-VL-2B-Instruct's"
        )
    if EMBEDDING not in weights:
        raise ValueError(f"the weights lack {EMBEDDING}; this is no whole VideoAlign")
    config = Qwen2VLConfig.from_dict(values)
    config.text_config.vocab_size = len(weights[EMBEDDING])
    return config


def require_fit(path: Path, weights: Mapping[str, Tensor], config: Any) -> None:
    """ValueError that names a few tensors, unless the weights are the whole network's."""
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in Network(config).state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "of another size": sorted(
            f"{key} {list(found[key])}, not {list(expected[key])}"
            for key in expected.keys() & found.keys()
            if expected[key] != found[key]
        ),
    }
    if wrong := [f"{len(keys)} {kind} ({keys[0]})" for kind, keys in kinds.items() if keys]:
        raise ValueError(f"{path} does not fit the base's config: tensors {', '.join(wrong)}")


def _checkpoint(release: Path, step: int | None) -> Path:
    if not (release / "model_config.json").is_file():
        raise ValueError(f"{release} holds no model_config.json; give VideoReward's folder")
    found = dict(numbered(release, lambda step: f"checkpoint-{step}"))
    if not found:
        raise ValueError(f"{release} holds no folder checkpoint-*; download it again")
    if step is not None and step not in found:
        raise ValueError(f"{release} has no checkpoint {step}; it has {sorted(found)}")
    path = found[max(found) if step is None else step] / "model.pth"
    if not path.is_file():
        raise ValueError(f"{path} is not there; a checkpoint without its base cannot be converted")
    return path


def _base(base: Path | str) -> Path:
    folder = Path(base).expanduser()
    if not folder.is_dir():
        folder = _download(base)
    if missing := [name for name in BASE_FILES if not (folder / name).is_file()]:
        raise ValueError(f"{folder} holds no {missing[0]}; give Qwen2-VL-2B-Instruct's folder")
    return folder


def _download(base: Path | str) -> Path:
    if not (isinstance(base, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", base)):
        raise ValueError(f"{base} is neither a folder nor a hub id; give Qwen2-VL-2B-Instruct")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, allow_patterns=list(BASE_FILES)))
    except OSError as error:  # what hub errors are, network errors too
        raise ValueError(f"{base} could not be downloaded ({error}); give a folder") from error


def _read_settings(path: Path, token_ids: list[int]) -> tuple[VideoAlignConfig, int, float]:
    """The constants, and rank and scale of the LoRA, from the release's groups of settings."""
    settings = read_json(path)
    try:
        data, model = settings["data_config"], settings["model_config"]
        lora, norm = settings["peft_lora_config"], settings["inference_config"]
        rank, alpha = int(lora["lora_r"]), float(lora["lora_alpha"])
        values = {
            "means": [norm[f"{name}_mean"] for name in SCORES],
            "stds": [norm[f"{name}_std"] for name in SCORES],
            "fps": data["fps"],
            "max_pixels": data["max_frame_pixels"],
            "template": data["prompt_template_type"],
            "output_dim": model["output_dim"],
            "reward_token_ids": token_ids,
        }
        known = [
            (data.get("sample_type", "uniform"), "uniform", "sample_type"),
            (data.get("num_frames"), None, "num_frames"),
            (model["use_special_tokens"], True, "use_special_tokens"),
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} lacks {error}; it is not VideoReward's") from error
    for found, expected, name in known:
        if found != expected:
            raise ValueError(f"{path}: {name} is {found!r}; only {expected!r} can be converted")
    root = math.sqrt(rank) if lora.get("use_rslora") else rank
    return from_dict(VideoAlignConfig, values, str(path)), rank, alpha / root


def _converted(
    path: Path, tensors: Mapping[str, Tensor], rank: int, scale: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Weights by today's names, PEFT's parts made one; without the tied output embedding."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key)
        if match is None or ".lora_" in match["module"]:
            raise ValueError(f"{path} holds {key}, which PEFT's LoRA does not name so")
        if (name := _name(path, match["module"])) is not None:
            parts[f"{name}.{match['leaf']}"][match["part"] or "plain"] = tensor
    weights = {}
    for name, found in parts.items():
        weights[name] = _merge_parts(path, name, found, rank, scale).to(dtype).contiguous()
    return weights


def _name(path: Path, module: str) -> str | None:
    """transformers 4.45's name of a module in today's; None for the output embedding."""
    bare = module.removeprefix("base_model.model.")
    if bare == "lm_head":
        return None
    if bare == "rm_head":
        return bare
    for old, new in (("model.", "model.language_model."), ("visual.", "model.visual.")):
        if bare.startswith(old):
            return new + bare.removeprefix(old)
    raise ValueError(f"{path} holds {module}, which is no part of a Qwen2-VL of transformers 4.45")


def _merge_parts(
    path: Path, name: str, parts: dict[str, Tensor], rank: int, scale: float
) -> Tensor:
    """One weight of its parts: plain, trained in full, or W + scale B A."""
    match sorted(parts):
        case ["plain"] | ["base_layer"]:
            (weight,) = parts.values()
            return weight
        case ["modules_to_save.default"] | ["modules_to_save.default", "original_module"]:
            return parts["modules_to_save.default"]
        case ["base_layer", "lora_A.default", "lora_B.default"]:
            weight, down, up = (parts[key].float() for key in sorted(parts))
            if (*up.shape, *down.shape) != (len(weight), rank, rank, weight.shape[-1]):
                raise ValueError(
                    f"{path}: the LoRA of {name} {list(weight.shape)} has A {list(down.shape)} and "
                    f"B {list(up.shape)}, which rank {rank} does not give"
                )
            return weight + scale * (up @ down)
    raise ValueError(f"{path} has only {', '.join(sorted(parts))} of {name}; download it again")
