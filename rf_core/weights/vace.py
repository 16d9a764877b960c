"""Files of a VACE: every published layout read, checked against a base, and one written.

Published files hold the whole network, base included, in one file or in shards: the VACE's part
alone is read. Names are the official ones, with ComfyUI's or a trainer's prefix, or diffusers'.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import operations
from ..config import SPATIAL_FACTOR, WAN_1_3B, WAN_14B, ModelConfig, VaceConfig
from ..fused_linear import fuse_projections
from ..layers import SelfAttention
from ..ranges import MAX_LAYERS
from ..vace import Vace
from ..writing import whole_file
from . import layouts
from .checkpoint import SETTINGS_FORMAT, SETTINGS_KEY, settings_in
from .checks import dtype_name, require_finite, require_names, size_name
from .files import CheckpointError, WeightFile, read_weights, shorten

_PART = re.compile(r"^((?:.*\.)?)(?=vace_(?:blocks\.\d+|patch_embedding)\.)")
_LAYERS = "vace_layers"  # in the config.json of a published folder
_SHARED = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "patch_size")
"""Sizes of a base that its VACE depends on."""


@dataclass(frozen=True, kw_only=True)
class VaceFile:
    """A VACE as it lies on disk, under official names; its weights are not read yet."""

    path: Path
    tensors: dict[str, Tensor] = field(repr=False)
    """Bare name to tensor, memory-mapped where possible."""
    dim: int
    """Width, in channels."""
    ffn_dim: int
    """Hidden width of the feed-forward layers."""
    blocks: int
    """How many it has."""
    in_channels: int
    """Channels of the control."""
    layers: tuple[int, ...] | None
    """The base's blocks that get hints; None where the file does not say."""
    base: dict[str, Any]
    """The base's sizes, where one of ours says them."""
    has_base: bool
    """Whether the base lies in the file too; it is not read."""
    container: str
    """Kind of file, and number of shards."""
    names: str
    """Whose names the file uses: `Wan` or `diffusers`."""
    prefix: str
    """What stood before the bare names."""
    provenance: dict[str, Any]
    """Where it came from, as recorded by `save_vace`."""

    @property
    def size(self) -> str:
        """For which Wan it is, as far as its widths tell."""
        for name, config in (("1.3B", WAN_1_3B), ("14B", WAN_14B)):
            if (self.dim, self.ffn_dim) == (config.dim, config.ffn_dim):
                return f"Wan 2.1 {name}"
        return f"a Wan of width {self.dim}"


def read_vace(path: str | Path) -> VaceFile:
    """Find the VACE in a file, a folder or an index, without loading its weights.

    CheckpointError, one sentence, for a file without one, a damaged one, and one in numbers that
    are not supported.
    """
    file = read_weights(path)
    prefix, tensors = _own_part(file)
    has_base = len(tensors) < len(file.tensors)
    names = "Wan"
    if any(".attn1." in key for key in tensors):
        tensors = {layouts.DIFFUSERS.to_wan(key): tensor for key, tensor in tensors.items()}
        names = layouts.DIFFUSERS.name
    _require_floats(file.path, tensors)
    settings = settings_in(file)
    blocks = len({key.split(".")[1] for key in tensors if key.startswith("vace_blocks.")})
    patch = _named(file.path, tensors, "vace_patch_embedding.weight", 5)
    up = _named(file.path, tensors, "vace_blocks.0.ffn.0.weight", 2)
    return VaceFile(
        path=file.path,
        tensors=tensors,
        dim=patch.shape[0],
        ffn_dim=up.shape[0],
        blocks=blocks,
        in_channels=patch.shape[1],
        layers=_layers(file, settings),
        base=_object(file.path, settings, "model"),
        has_base=has_base,
        container=file.container,
        names=names,
        prefix=prefix,
        provenance=_object(file.path, settings, "provenance"),
    )


def load_vace(
    path: str | Path,
    base: ModelConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    operations: Any = operations,
) -> Vace:
    """A frozen VACE in eval mode for a base of given sizes.

    Loads strictly. CheckpointError also where it is made for other sizes, reads another control
    than this base's latents give, or has a weight that is NaN or infinite in `dtype`.
    """
    file = read_vace(path)
    config = fit_vace(file, base)
    part = file.tensors
    tensors = {key: part.pop(key).to(device=device, dtype=dtype) for key in list(part)}
    require_finite(file.path, tensors)
    vace = Vace(base, config, operations=operations, device="meta")
    vace.load_state_dict(tensors, strict=True, assign=True)
    for each in vace.modules():
        if isinstance(each, SelfAttention):
            fuse_projections(each.q, each.k, each.v)
    return vace.eval().requires_grad_(False)


def fit_vace(file: VaceFile, base: ModelConfig) -> VaceConfig:
    """How a VACE goes with a base; CheckpointError where it does not."""
    made = {"dim": file.dim, "ffn_dim": file.ffn_dim}
    made |= {name: value for name, value in file.base.items() if name in _SHARED}
    needed = json.loads(json.dumps(asdict(base)))
    if other := [
        f"{n} {value}, not {needed[n]}" for n, value in made.items() if value != needed[n]
    ]:
        raise CheckpointError(
            f"{file.path}: is a VACE for {file.size}, and the student is {size_name(base)} "
            f"({', '.join(other)}); give the VACE of the student's size"
        )
    if file.in_channels != (wanted := context_channels(base)):
        raise CheckpointError(
            f"{file.path}: reads controls of {file.in_channels} channels, and two latents of "
            f"{base.in_dim} and a mask of {SPATIAL_FACTOR}x{SPATIAL_FACTOR} make {wanted}; give "
            "another VACE"
        )
    try:
        layers = {} if file.layers is None else {"layers": file.layers}
        spread = VaceConfig.spread(file.blocks, base.num_layers, in_channels=wanted)
        config = VaceConfig(**{**asdict(spread), **layers})
        shapes = Vace(base, config, device="meta").state_dict()
    except ValueError as error:
        raise CheckpointError(f"{file.path}: does not go with this student: {error}") from error
    require_names(file.path, file.tensors, shapes.keys(), "VACE")
    wrong = [
        f"{key} is {list(file.tensors[key].shape)} instead of {list(tensor.shape)}"
        for key, tensor in shapes.items()
        if file.tensors[key].shape != tensor.shape
    ]
    if wrong:
        raise CheckpointError(
            f"{file.path}: {len(wrong)} of its shapes are no VACE's of {size_name(base)} "
            f"({shorten(wrong)}); the file is damaged"
        )
    return config


def context_channels(base: ModelConfig) -> int:
    """Of a control: two latents, and a mask whose pixels are packed as the VAE packs pictures."""
    return 2 * base.in_dim + SPATIAL_FACTOR**2


def save_vace(path: str | Path, vace: Vace, *, provenance: Mapping[str, Any] | None = None) -> None:
    """Write a VACE alone as safetensors, in full or not at all, with what `load_vace` needs.

    `provenance` is free JSON on the weights' origin. CheckpointError for a name that is none.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: a VACE is written as .safetensors; change the name")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: its folder does not exist; create it first")
    settings = {
        "format": SETTINGS_FORMAT,
        "model": asdict(vace.base_config),
        "vace": asdict(vace.config),
        "provenance": dict(provenance or {}),
    }
    plain = {key: each.detach().cpu().contiguous() for key, each in vace.state_dict().items()}
    with whole_file(path) as part:
        save_file(plain, part, metadata={"format": "pt", SETTINGS_KEY: json.dumps(settings)})


def is_vace(path: str | Path) -> bool:
    """Whether a file or folder has a VACE in it; CheckpointError where it cannot be read."""
    return any(_PART.match(layouts.unwrap(key)) for key in read_weights(path).tensors)


def describe_vace(file: VaceFile) -> str:
    """What `inspect` prints of a VACE: a table of everything found."""
    dtypes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        dtypes[dtype_name(tensor.dtype)] += tensor.numel()
    rows = {
        "file": str(file.path),
        "layout": f"{file.container}, {file.names} names"
        + (f", prefix {file.prefix!r} removed" if file.prefix else ""),
        "network": "VACE: control beside a student"
        + (", with its base, which is not used" if file.has_base else ""),
        "sizes": f"{file.blocks} blocks, width {file.dim}, feed-forward {file.ffn_dim}",
        "control": f"{file.in_channels} channels",
        "layers": "at even distances (not recorded)"
        if file.layers is None
        else ", ".join(map(str, file.layers)),
        "parameters": f"{sum(dtypes.values()):,}",
        "dtypes": ", ".join(f"{name} {count:,}" for name, count in dtypes.most_common()),
        "bytes": f"{sum(tensor.nbytes for tensor in file.tensors.values()):,}",
        "fits": f"students of {file.size}",
    }
    rows |= {name: str(value) for name, value in file.provenance.items() if value}
    width = max(map(len, rows))
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows.items())


def _own_part(file: WeightFile) -> tuple[str, dict[str, Tensor]]:
    """The prefix of the VACE's names, and its tensors without it."""
    unwrapped = {layouts.unwrap(key): tensor for key, tensor in file.tensors.items()}
    found = {key: match[1] for key in unwrapped if (match := _PART.match(key))}
    prefixes = sorted(set(found.values()))
    if not prefixes:
        raise CheckpointError(
            f"{file.path}: holds no VACE; its tensors are named {shorten(list(file.tensors))}: "
            "give a file such as Wan2.1-VACE-1.3B's"
        )
    if layouts.is_lora(found):
        raise CheckpointError(f"{file.path}: is a LoRA of a VACE, not a VACE; give the network")
    if len(prefixes) > 1 or len(unwrapped) < len(file.tensors):
        raise CheckpointError(
            f"{file.path}: holds a VACE under several prefixes ({shorten(prefixes)}); save one of "
            "them alone"
        )
    (prefix,) = prefixes
    return prefix, {key[len(prefix) :]: unwrapped[key] for key in found}


def _require_floats(path: Path, tensors: Mapping[str, Tensor]) -> None:
    if (quantised := layouts.quantised(tensors, list(tensors))) is not None:
        raise CheckpointError(
            f"{path}: has quantised weights ({quantised}), which are not supported; use the bf16 "
            "or fp16 file, or plain fp8"
        )
    if odd := [key for key, tensor in tensors.items() if tensor.dtype not in layouts.FLOATS]:
        raise CheckpointError(
            f"{path}: {odd[0]} is made of {dtype_name(tensors[odd[0]].dtype)}, which no weight "
            "is; use the bf16 or fp16 file"
        )


def _named(path: Path, tensors: Mapping[str, Tensor], name: str, axes: int) -> Tensor:
    found = tensors.get(name)
    if found is None or found.ndim != axes or 0 in found.shape:
        raise CheckpointError(
            f"{path}: is no complete VACE: {name} is "
            f"{'missing' if found is None else list(found.shape)}; use another file"
        )
    return found


def _object(path: Path, settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = settings.get(name) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: has an unusable {name}; it is an object")
    return value


def _layers(file: WeightFile, settings: Mapping[str, Any]) -> tuple[int, ...] | None:
    """As our metadata or the config.json of a published folder has them."""
    recorded = settings.get("vace")
    value = recorded.get("layers") if isinstance(recorded, dict) else file.sidecar.get(_LAYERS)
    match value:
        case None:
            return None
        case [*layers] if len(layers) <= MAX_LAYERS and all(type(each) is int for each in layers):
            return tuple(layers)
    raise CheckpointError(f"{file.path}: has unusable layers; they are a list of whole numbers")
