"""Which network of a file: bundles, prefixes, and averages before raw weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from . import layouts
from .files import CheckpointError, WeightFile, shorten


def split_adapters(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A bundle's networks, and the adapters beside them (`generator_lora.`, `critic_lora.`).

    A file of adapters alone is left whole: it is a LoRA.
    """
    beside = {key for key in tensors if layouts.is_beside(key)}
    if len(beside) == len(tensors):
        return dict(tensors), {}
    own = {key: tensor for key, tensor in tensors.items() if key not in beside}
    return own, {key: tensors[key] for key in tensors if key in beside}


def adapter_of(adapters: Mapping[str, Tensor], submodel: str) -> dict[str, Tensor]:
    """Of those beside a bundle's networks, the one that belongs to a network, without its name."""
    student = layouts.preference(submodel) is not None
    prefix = ("generator" if student else submodel) + "_lora."
    return {key[len(prefix) :]: t for key, t in adapters.items() if key.startswith(prefix)}


def take_submodel(
    file: WeightFile, wanted: str | None
) -> tuple[str, str, dict[str, Tensor], tuple[str, ...]]:
    """Its name, its prefix, its tensors under bare names, and all names that are there."""
    tensors = {layouts.unwrap(key): tensor for key, tensor in file.tensors.items()}
    prefixes = _find_networks(file.path, tensors)
    by_name = {layouts.submodel_name(prefix): prefix for prefix in prefixes}
    if len(by_name) > 1 and by_name.get(""):  # `model` beside an `ema` is a name
        by_name = {name or prefix[:-1]: prefix for name, prefix in by_name.items()}
    if len(by_name) < len(prefixes) or len(tensors) < len(file.tensors):
        raise CheckpointError(
            f"{file.path}: holds the same network under several prefixes "
            f"({shorten(prefixes)}); save one of them alone"
        )
    name = _choose(file.path, list(by_name), wanted)
    prefix = by_name[name]
    nested = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    own = {
        key[len(prefix) :]: tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix) and not key.startswith(nested)
    }
    return name, prefix, own, tuple(by_name)


def _find_networks(path: Path, keys: Mapping[str, Tensor]) -> list[str]:
    if layouts.is_lora(keys):
        raise CheckpointError(f"{path}: is a LoRA, not a model; give it with --lora {path}:1.0")
    if prefixes := layouts.wan_prefixes(keys):
        return prefixes
    kind = layouts.other_model(keys)
    raise CheckpointError(
        f"{path}: is {kind}, not a Wan text-to-video model; give the model's own file"
        if kind is not None
        else f"{path}: holds no Wan model; its tensors are named {shorten(list(keys))}"
    )


def _choose(path: Path, names: list[str], wanted: str | None) -> str:
    listed = ", ".join(name or "one without a name" for name in names)
    if wanted is not None:
        if wanted not in names:
            raise CheckpointError(
                f"{path}: has no sub-model {wanted!r}; it holds {listed}: choose one of those"
            )
        return wanted
    if len(names) == 1:
        return names[0]
    ranks = {name: rank for name in names if (rank := layouts.preference(name)) is not None}
    first = [name for name, rank in ranks.items() if rank == min(ranks.values())]
    if len(first) == 1:
        return first[0]
    raise CheckpointError(f"{path}: holds several networks ({listed}); say which is the student")


def prefix_on_disk(keys: Iterable[str], prefix: str) -> str:
    """What stands before the bare names in the file itself."""
    marker = prefix + "blocks."
    key = next(key for key in keys if layouts.unwrap(key).startswith(marker))
    return key[: key.index("blocks.")]
