"""Checkpoints of the student: every published layout read, checked strictly, and one written.

Reading takes a network out of whatever holds it (bundles, prefixes, diffusers' names), finds its
sizes from the tensors and refuses what is not a text-to-video Wan with one clear sentence. Writing
gives a safetensors file that carries the cache and sampler settings it was trained for, and that
ComfyUI core 0.27 detects as causal: core takes the metadata `config`, and every key under its
`transformer` becomes a constructor argument there, so that holds `causal_ar` alone and our settings
stand under `reward_forcing`. Core reads bare keys (or `model.` and `model.diffusion_model.`), takes
128 channels a head, frequencies of 256, text of 512 tokens and patches of (1, 2, 2) as given, and
so runs the released sizes only.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import operations
from ..config import CacheConfig, ModelConfig, SamplerConfig, recorded
from ..families import AUTO, DEFAULT, Family, check_family, family_of
from ..fused_linear import fuse_projections
from ..layers import SelfAttention
from ..model import WanModel
from ..ranges import LARGEST_SIDE
from ..writing import whole_file
from . import layouts
from .checks import (
    count_layers,
    dtype_name,
    require_finite,
    require_keys,
    require_shapes,
    require_size,
    require_text_to_video,
    size_name,
    without_counters,
)
from .files import CheckpointError as CheckpointError
from .files import WeightFile, parse_json, read_weights, shorten
from .lora import Lora, apply_loras, merge_lora
from .recognise import Told, layout_of, recognise
from .submodels import adapter_of, prefix_on_disk, split_adapters, take_submodel

SETTINGS_KEY = "reward_forcing"
SETTINGS_FORMAT = 1
HEAD_DIM = 128  # of every released Wan; shapes do not show it
CAUSAL_CONFIG = {"transformer": {"causal_ar": True}}

_Config = TypeVar("_Config", ModelConfig, CacheConfig, SamplerConfig)


@dataclass(frozen=True, kw_only=True)
class Companion:
    """A file that a student belongs with."""

    name: str
    """Its name, without its folder."""
    fingerprint: str | None
    """What it is known by under any name; None for a folder or a hub id."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A text-to-video Wan as read from disk, under Wan's own names, and what was found about it."""

    path: Path
    """The file or folder."""
    tensors: dict[str, Tensor] = field(repr=False)
    """Bare key to tensor in the file's dtypes, memory-mapped where possible."""
    config: ModelConfig
    """Sizes, from the tensors; heads, text length and eps from metadata or Wan's convention."""
    told: Told
    """Whose student it is, and how that is known."""
    cache: CacheConfig | None
    """The cache it was trained for: what the file says, or else its family's. None for a
    bidirectional network (a teacher, a critic) that says so."""
    sampler: SamplerConfig | None
    """The few-step schedule it was trained for, alike."""
    size: tuple[int, int]
    """Height and width in pixels it was trained at: what the file says, or else its family's."""
    recorded: frozenset[str]
    """Which of `cache`, `sampler` and `size` the file says."""
    adapter: dict[str, Tensor] = field(repr=False)
    """A LoRA that the bundle has for the network (LongLive's), by its own names; mostly empty.
    `merged` has it in its place."""
    provenance: dict[str, Any]
    """Where it came from, as recorded by `write_checkpoint`."""
    companions: Mapping[str, Companion]
    """The VAE (`vae`) and the text encoder (`text_encoder`) it was trained with, where it says."""
    metadata: dict[str, str]
    """The safetensors header's free text."""
    container: str
    """Kind of file, and number of shards."""
    names: str
    """Whose key names the file used: `Wan`, or one of `layouts.KEY_NAMES`."""
    prefix: str
    """What stood before the bare names, sub-model included."""
    submodel: str
    """The sub-model taken; empty where the file holds one unnamed network."""
    submodels: tuple[str, ...]
    """All networks in the file."""
    dtypes: dict[str, int]
    """Parameters of each dtype in the file."""
    num_bytes: int
    """Bytes of the network's tensors in the file."""

    @property
    def family(self) -> str:
        """Whose student it is: a name in `families.FAMILIES`."""
        return self.told.family

    @property
    def family_from(self) -> str:
        """How that is known: by `choice`, `metadata`, `keys`, `name` or `nothing`."""
        return self.told.source

    @property
    def preset(self) -> Family:
        """How its family's students stream."""
        return self.told.preset

    def merged(self) -> dict[str, Tensor]:
        """The network's tensors, with the bundle's adapter in them: what that changes is float32.

        Of the adapter's own scale, alpha / rank, or 1 where it says none.
        """
        if not self.adapter:
            return dict(self.tensors)
        tensors, _, unmatched = merge_lora(self.tensors, self.adapter, 1.0)
        if unmatched:
            raise CheckpointError(
                f"{self.path}: has an adapter of {len(unmatched)} tensors that match nothing in "
                f"its network ({shorten(unmatched)}); the file is damaged"
            )
        return tensors

    @property
    def num_parameters(self) -> int:
        """Parameters of the network."""
        return sum(self.dtypes.values())

    @property
    def choice(self) -> str | None:
        """Which network of several is taken; None where there is but one."""
        others = [name or "one without a name" for name in self.submodels if name != self.submodel]
        if not others:
            return None
        average = ", an average over training, is" if layouts.is_average(self.submodel) else " is"
        taken = self.submodel or "the network without a name"
        return f"{taken}{average} taken (also there: {', '.join(others)})"

    @property
    def causal(self) -> bool:
        """Whether ComfyUI core takes the file for a causal Wan."""
        try:
            config = parse_json(self.path, self.metadata.get("config", "{}"))
        except CheckpointError:  # another program's key of the same name
            return False
        transformer = config.get("transformer")
        return isinstance(transformer, dict) and transformer.get("causal_ar") is True


def read_checkpoint(
    path: str | Path,
    *,
    submodel: str | None = None,
    num_heads: int | None = None,
    family: str = AUTO,
) -> Checkpoint:
    """Read and check a student without loading its weights.

    `submodel` picks a network of a bundle; by default an average over training (`generator_ema`,
    `ema`) goes before the weights themselves (`generator`, `model`).
    `num_heads` is for files of unusual width that do not record it. `family` is a name in
    `families.FAMILIES`, or `auto` for what the file tells; one that is chosen takes the place of
    settings that the file has for another. CheckpointError, one sentence, for every file that is
    not a complete text-to-video Wan; ValueError for a family that is none.
    """
    check_family(family)
    file = read_weights(path)
    own, adapters = split_adapters(file.tensors)
    file = replace(file, tensors=own)
    name, prefix, tensors, submodels = take_submodel(file, submodel)
    adapter = adapter_of(adapters, name)
    if named := layouts.key_names(tensors):
        tensors = {named.to_wan(key): tensor for key, tensor in tensors.items()}
    require_text_to_video(file.path, tensors)
    tensors = without_counters(tensors)
    require_keys(file.path, tensors)
    settings = settings_in(file)
    config = _find_sizes(file, tensors, settings, num_heads)
    require_shapes(file.path, tensors, config)
    on_disk = prefix_on_disk(file.tensors, prefix)
    told = recognise(
        file.path,
        chosen=family,
        recorded=_family_in(settings),
        layout=layout_of(file, on_disk, config, has_adapter=bool(adapter)),
        networks=submodels,
    )
    found = _schedule_in(file.path, settings, told)
    is_bidirectional = bool(settings) and family == AUTO and "cache" not in found
    preset = told.preset
    usual = {"cache": preset.cache, "sampler": preset.sampler, "size": preset.size}
    if is_bidirectional:
        usual |= {"cache": None, "sampler": None}
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[dtype_name(tensor.dtype)] += tensor.numel()
    return Checkpoint(
        path=file.path,
        tensors=tensors,
        config=config,
        told=told,
        **{**usual, **found},
        recorded=frozenset(found),
        adapter=adapter,
        provenance=_parse_provenance(file.path, settings.get("provenance") or {}),
        companions=_parse_companions(file.path, settings.get("companions") or {}),
        metadata=file.metadata,
        container=file.container,
        names=named.name if named else "Wan",
        prefix=on_disk,
        submodel=name,
        submodels=submodels,
        dtypes=dict(dtypes.most_common()),
        num_bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


def load_student(
    path: str | Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    submodel: str | None = None,
    num_heads: int | None = None,
    family: str = AUTO,
    expected: ModelConfig | None = None,
    loras: Sequence[Lora] = (),
    operations: Any = operations,
) -> tuple[WanModel, Checkpoint]:
    """A frozen student in eval mode, and the checkpoint it came from, now holding its weights.

    Loads strictly, LoRAs merged, without a second copy in memory. CheckpointError also where the
    sizes differ from `expected` or a weight is NaN or infinite in `dtype`.
    """
    checkpoint = read_checkpoint(path, submodel=submodel, num_heads=num_heads, family=family)
    if expected is not None:
        require_size(checkpoint.path, checkpoint.config, expected)
    merged = apply_loras(checkpoint.merged(), loras)
    tensors = {key: merged.pop(key).to(device=device, dtype=dtype) for key in list(merged)}
    require_finite(checkpoint.path, tensors)
    model = WanModel(checkpoint.config, operations=operations, device="meta")
    model.load_state_dict(tensors, strict=True, assign=True)
    for part in model.modules():
        if isinstance(part, SelfAttention):
            fuse_projections(part.q, part.k, part.v)
    model.eval().requires_grad_(False)
    return model, replace(checkpoint, tensors=dict(model.state_dict()), adapter={})


def write_checkpoint(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    cache: CacheConfig | None,
    sampler: SamplerConfig | None,
    *,
    size: tuple[int, int] | None = None,
    family: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    companions: Mapping[str, Companion] | None = None,
) -> None:
    """Write a network as safetensors with its settings, in full or not at all.

    With a cache the file is marked causal for ComfyUI core; without one it is a bidirectional
    network (a teacher, a critic) and is not. `size` is the height and width in pixels it is made
    for; `family` is one of `families.FAMILIES`, None for our own; `provenance` is free JSON on the
    weights' origin; `companions` are files that it belongs with.
    CheckpointError where tensors and config disagree or the file cannot be one of ours.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: checkpoints are written as .safetensors; change the name")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: its folder does not exist; create it first")
    if family is not None:
        family_of(family)
    require_keys(path, tensors)
    require_shapes(path, tensors, config)
    settings = {
        "format": SETTINGS_FORMAT,
        "model": asdict(config),
        "cache": recorded(cache) if cache else None,
        "sampler": recorded(sampler) if sampler else None,
        "size": size,
        **({} if family is None else {"family": family}),
        "provenance": dict(provenance or {}),
        "companions": {kind: asdict(each) for kind, each in (companions or {}).items()},
    }
    metadata = {"format": "pt", SETTINGS_KEY: json.dumps(settings)}
    if cache is not None:
        metadata["config"] = json.dumps(CAUSAL_CONFIG)
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with whole_file(path) as part:
        save_file(plain, part, metadata=metadata)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    submodel: str | None = None,
    num_heads: int | None = None,
    family: str = AUTO,
    cache: CacheConfig | None = None,
    sampler: SamplerConfig | None = None,
    loras: Sequence[Lora] = (),
) -> Checkpoint:
    """Write any readable student to `target` and read it back.

    `dtype` float32, bfloat16 or float16; None keeps each tensor's own. Settings not given are the
    source's own, or else its family's, which is recorded.
    """
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype}; convert to float32, bfloat16 or float16")
    if Path(source).resolve() == Path(target).resolve():
        raise ValueError(f"{target} is both source and target; give the result another name")
    checkpoint = read_checkpoint(source, submodel=submodel, num_heads=num_heads, family=family)
    merged = apply_loras(checkpoint.merged(), loras)
    tensors = {key: merged[key].to(dtype or t.dtype) for key, t in checkpoint.tensors.items()}
    require_finite(checkpoint.path, tensors)
    write_checkpoint(
        target,
        tensors,
        checkpoint.config,
        cache or checkpoint.cache or checkpoint.preset.cache,
        sampler or checkpoint.sampler or checkpoint.preset.sampler,
        size=checkpoint.size,
        family=checkpoint.family,
        provenance={
            **checkpoint.provenance,
            "source": checkpoint.path.name,
            "sub-model": checkpoint.submodel,
            "loras": [f"{lora.path.name}:{lora.strength:g}" for lora in loras],
        },
        companions=checkpoint.companions,
    )
    return read_checkpoint(target)


def describe(checkpoint: Checkpoint) -> str:
    """What `inspect` prints: a table of everything found."""
    c = checkpoint.config
    rows = {
        "file": str(checkpoint.path),
        "layout": f"{checkpoint.container}, {checkpoint.names} names"
        + (f", prefix {checkpoint.prefix!r} removed" if checkpoint.prefix else ""),
        "sub-model": checkpoint.choice or checkpoint.submodel or "without a name",
        **_describe_family(checkpoint),
        "network": size_name(c),
        "sizes": f"{c.num_layers} layers, width {c.dim} = {c.num_heads} heads x {c.head_dim}, "
        f"feed-forward {c.ffn_dim}",
        "latents": f"{c.in_dim} channels, patches {'x'.join(map(str, c.patch_size))}",
        "prompt": f"{c.text_len} tokens x {c.text_dim}",
        "parameters": f"{checkpoint.num_parameters:,}",
        "dtypes": ", ".join(f"{name} {count:,}" for name, count in checkpoint.dtypes.items()),
        "bytes": f"{checkpoint.num_bytes:,}",
        "cache": _describe_cache(checkpoint.cache) + _from(checkpoint, "cache"),
        "sampler": _describe_sampler(checkpoint.sampler) + _from(checkpoint, "sampler"),
        "picture": f"{checkpoint.size[1]}x{checkpoint.size[0]} pixels" + _from(checkpoint, "size"),
        "ComfyUI core": "detects it as causal" if checkpoint.causal else "not marked as causal",
        "fits": f"LoRAs of this size, a VAE of {c.in_dim} latent channels, a text encoder "
        f"{c.text_dim} wide",
    }
    if checkpoint.adapter:
        rows["adapter"] = "one beside the network, merged when it is loaded"
    rows |= {kind.replace("_", " "): each.name for kind, each in checkpoint.companions.items()}
    rows |= {name: str(value) for name, value in checkpoint.provenance.items() if value}
    width = max(map(len, rows))
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows.items())


def _describe_family(checkpoint: Checkpoint) -> dict[str, str]:
    if checkpoint.cache is None:
        return {}
    preset = checkpoint.preset
    return {
        "family": str(checkpoint.told),
        "good at": preset.good_at,
        "licence": preset.licence,
        "images": f"{preset.fps} a second",
    }


def _from(checkpoint: Checkpoint, name: str) -> str:
    """What is added to a setting that is not the file's own."""
    if name in checkpoint.recorded or getattr(checkpoint, name) is None:
        return ""
    return f" (not recorded; {checkpoint.preset.title}'s published settings)"


def _describe_cache(cache: CacheConfig | None) -> str:
    if cache is None:
        return "none: a bidirectional network, which does not stream"
    text = (
        f"window {cache.window_frames} frames, sink {cache.sink_frames}, chunk "
        f"{cache.chunk_frames}, decay {cache.decay} ({cache.accumulator})"
    )
    usual = CacheConfig()
    others = (
        *("anchor_frames", "keep_key_norms", "first_chunk_frames", "positions", "memory_rates"),
        *("recache", "rebuild"),
    )
    return text + "".join(
        f", {name} {value}"
        for name in others
        if (value := getattr(cache, name)) != getattr(usual, name)
    )


def _describe_sampler(sampler: SamplerConfig | None) -> str:
    if sampler is None:
        return "none"
    text = f"steps {', '.join(map(str, sampler.steps))}, shift {sampler.shift:g}"
    if sampler.first_steps:
        text += f", first chunk {', '.join(map(str, sampler.first_steps))}"
    return text + (", rolling" if sampler.rolling else "")


def _find_sizes(
    file: WeightFile,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    num_heads: int | None,
) -> ModelConfig:
    patch = tensors["patch_embedding.weight"]
    if patch.ndim != 5:
        raise CheckpointError(
            f"{file.path}: patch_embedding.weight has shape {list(patch.shape)} instead of five "
            "axes; the file is not a plain Wan model"
        )
    dim, recorded = patch.shape[0], _recorded_sizes(file, settings)
    sizes = {
        "dim": dim,
        "ffn_dim": tensors["blocks.0.ffn.0.bias"].numel(),
        "freq_dim": tensors["time_embedding.0.weight"].numel() // dim,
        "text_dim": tensors["text_embedding.0.weight"].numel() // dim,
        "in_dim": patch.shape[1],
        "out_dim": tensors["head.head.bias"].numel() // patch.shape[2:].numel(),
        "num_heads": num_heads or recorded.get("num_heads") or _usual_heads(file.path, dim),
        "num_layers": count_layers(tensors),
        "patch_size": tuple(patch.shape[2:]),
    }
    config = _parse(file.path, ModelConfig, {**recorded, **sizes})
    assert config is not None
    return config


def _usual_heads(path: Path, dim: int) -> int:
    if dim % HEAD_DIM:
        raise CheckpointError(
            f"{path}: is {dim} channels wide and does not record its number of attention heads "
            f"(released models have {HEAD_DIM} channels a head); give it as num_heads"
        )
    return dim // HEAD_DIM


def _recorded_sizes(file: WeightFile, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What shapes cannot show: from our metadata, or the config.json of Wan or diffusers."""
    known = {"num_heads": file.sidecar.get("num_attention_heads"), **file.sidecar}
    known |= settings.get("model") or {}
    return {
        name: known[name]
        for name in ("num_heads", "text_len", "eps")
        if known.get(name) is not None
    }


def _family_in(settings: Mapping[str, Any]) -> object:
    """What our metadata says; files from before families were known are Reward Forcing's."""
    return settings.get("family", DEFAULT) if settings else None


def _schedule_in(path: Path, settings: Mapping[str, Any], told: Told) -> dict[str, Any]:
    """Cache, sampler and size of our metadata, as far as it has them.

    Where another family is chosen, the size alone, which is the network's own.
    """
    found = {
        "cache": _parse(path, CacheConfig, settings.get("cache")),
        "sampler": _parse(path, SamplerConfig, settings.get("sampler")),
        "size": _parse_size(path, settings.get("size")),
    }
    if told.source == "choice" and told.family != _family_in(settings):
        del found["cache"], found["sampler"]
    return {name: value for name, value in found.items() if value is not None}


def settings_in(file: WeightFile) -> dict[str, Any]:
    """What our metadata says; empty without it. CheckpointError for another version's."""
    settings = parse_json(file.path, file.metadata.get(SETTINGS_KEY, "{}"))
    found = settings.get("format", SETTINGS_FORMAT)
    if found != SETTINGS_FORMAT:
        raise CheckpointError(
            f"{file.path}: has settings of format {found}, this version reads "
            f"{SETTINGS_FORMAT}; update Reward Forcing"
        )
    return settings


def _parse(path: Path, config: type[_Config], values: Mapping[str, Any] | None) -> _Config | None:
    if values is None:
        return None
    try:
        arguments: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return config(**arguments)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: has an unusable {config.__name__}: {error}") from error


def _parse_provenance(path: Path, values: object) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: has an unusable provenance; it is an object")
    return values


def _parse_companions(path: Path, values: object) -> dict[str, Companion]:
    match values:
        case dict() if all(_is_companion(each) for each in values.values()):
            return {str(kind): Companion(**each) for kind, each in values.items()}
    raise CheckpointError(
        f"{path}: has unusable companions; each is an object of a name and a fingerprint"
    )


def _is_companion(value: object) -> bool:
    match value:
        case {"name": str(), "fingerprint": str() | None, **others}:
            return not others
    return False


def _parse_size(path: Path, values: object) -> tuple[int, int] | None:
    match values:
        case None:
            return None
        case [int(height), int(width)] if min(height, width) > 0 and max(values) <= LARGEST_SIDE:
            return height, width
    raise CheckpointError(f"{path}: has an unusable size {values!r}; it is [height, width]")
