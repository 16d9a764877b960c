"""What a LoRA file is: its kind, rank and layers, the models it fits, how it was made."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from .checks import dtype_name
from .containers import printable
from .files import CheckpointError, read_weights
from .layouts import is_lora, lora_module, lora_part, other_adapter
from .lora import fit_lora, read_lora

_KINDS = (
    ("dora", "DoRA"),
    ("mid", "LoCon"),
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("diff", "full differences"),
    ("down", "LoRA"),
)
"""Parts by how their names begin."""
_RANKED = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
"""Parts whose first axis is the rank."""
_LABEL, _VALUE = 40, 160  # characters of metadata that are shown


def is_adapter(path: str | Path) -> bool:
    """Whether a file or folder is an adapter's; CheckpointError where it cannot be read."""
    return is_lora(read_weights(path).tensors)


def describe_lora(path: str | Path, bases: Mapping[str, Mapping[str, Tensor]]) -> str:
    """What `inspect` prints of an adapter: a table of everything found.

    `bases` are the tensors of the models it may belong to, by the models' names; their shapes alone
    are read. CheckpointError where the file cannot be read or is no adapter.
    """
    file, tensors = read_weights(path), read_lora(path)
    dtypes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        dtypes[dtype_name(tensor.dtype)] += tensor.numel()
    rows = {
        "file": str(path),
        "layout": f"{file.container}, an adapter ({_kinds(tensors)})",
        "rank": _listed(_ranks(tensors)) or "none",
        "alpha": _listed(_alphas(tensors)) or "not recorded, so the rank",
        "layers": str(len({lora_module(lora_part(key)[0]) for key in tensors})),
        "fits": _fits(tensors, bases),
        "parameters": f"{sum(dtypes.values()):,}",
        "dtypes": ", ".join(f"{name} {count:,}" for name, count in dtypes.most_common()),
        "bytes": f"{sum(tensor.nbytes for tensor in file.tensors.values()):,}",
    }
    rows |= _metadata(file.metadata)
    width = max(map(len, rows))
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows.items())


def _kinds(tensors: Mapping[str, Tensor]) -> str:
    parts = {lora_part(key)[1] for key in tensors}
    found = [kind for start, kind in _KINDS if any(part.startswith(start) for part in parts)]
    others = {kind for key in tensors if (kind := other_adapter(key)[1])}
    return ", ".join([*found, *sorted(others)])


def _ranks(tensors: Mapping[str, Tensor]) -> set[float]:
    ranked = (each for key, each in tensors.items() if lora_part(key)[1] in _RANKED)
    return {float(each.shape[0]) for each in ranked if each.ndim}


def _alphas(tensors: Mapping[str, Tensor]) -> set[float]:
    alphas = (each for key, each in tensors.items() if lora_part(key)[1] == "alpha")
    return {float(each) for each in alphas if each.numel() == 1}


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in sorted(numbers))


def _fits(tensors: Mapping[str, Tensor], bases: Mapping[str, Mapping[str, Tensor]]) -> str:
    fitting, refusals = [], []
    for name, base in bases.items():
        try:
            fit = fit_lora(base, tensors)
        except CheckpointError as error:
            refusals.append(str(error))
        else:
            fitting.append(f"{name} ({fit.num_fitting} of {fit.num_layers} layers)")
    return ", ".join(fitting) or f"none of {', '.join(bases)}: {refusals[0]}"


def _metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """A row an entry, and one for each field of an entry that is a JSON object."""
    rows: dict[str, object] = {}
    for name, text in metadata.items():
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        if isinstance(value, dict):
            rows |= {f"{name}.{field}": each for field, each in value.items()}
        else:
            rows[name] = text
    return {printable(name, _LABEL): printable(str(rows[name]), _VALUE) for name in rows}
