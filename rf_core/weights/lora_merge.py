"""What one adapter makes of one weight, in float32: each family as its makers define it.

LoRA is W + alpha / rank * (up @ down) (arXiv 2106.09685), with a core between the two where a
convolution was decomposed (LoCon). LoHa multiplies two such products element by element, LoKr takes
the Kronecker product of two factors (LyCORIS, arXiv 2309.14859). DoRA sets the length of every row,
or column, of the changed weight (arXiv 2402.09353).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a file holds for one tensor of a model."""

    parts: dict[str, Tensor]
    """By their names in `layouts`; of any floating type."""
    alpha: float | None = None
    """Divided by the rank it scales the adapter; None is the rank."""


def change(weight: Tensor, adapter: Adapter) -> Tensor:
    """What is added to a weight of any shape at strength 1, float32.

    KeyError where a part is missing, RuntimeError or IndexError where shapes do not fit.
    """
    parts = {name: part.float() for name, part in adapter.parts.items()}
    changes = [
        _shaped(weight, family(parts, adapter.alpha).flatten(1))
        for family, names in _FAMILIES
        if names & parts.keys()
    ]
    if "diff" in parts:
        changes.append(_difference(weight, parts["diff"]))
    if not changes:
        raise KeyError("down")
    total = torch.stack(changes).sum(0) if len(changes) > 1 else changes[0]
    return _resized(weight.float(), total, parts["dora"]) if "dora" in parts else total


def merge(weight: Tensor, adapter: Adapter, strength: float) -> Tensor:
    """A weight with an adapter in it, float32."""
    return weight.float() + strength * change(weight, adapter)


def scale(alpha: float | None, rank: int) -> float:
    """What an adapter of that rank is multiplied by."""
    return 1.0 if alpha is None else alpha / rank


def _shaped(weight: Tensor, rows: Tensor) -> Tensor:
    if rows.shape != (weight.shape[0], math.prod(weight.shape[1:])):  # not merely as many
        raise RuntimeError("an adapter of another shape")
    return rows.view(weight.shape)


def _lora(parts: Parts, alpha: float | None) -> Tensor:
    up, down = parts["up"].flatten(1), parts["down"].flatten(1)
    factor = scale(alpha, down.shape[0])
    if "mid" in parts:
        return factor * torch.einsum("mn...,om,ni->oi...", parts["mid"], up, down)
    return factor * (up @ down)


def _loha(parts: Parts, alpha: float | None) -> Tensor:
    cores = bool({"hada_t1", "hada_t2"} & parts.keys())
    one, two = (_product(parts, f"hada_w{i}", f"hada_t{i}" if cores else "") for i in (1, 2))
    if one.shape != two.shape:
        raise RuntimeError("the factors of a LoHa differ in shape")
    return scale(alpha, parts["hada_w1_b"].shape[0]) * (one * two)


def _lokr(parts: Parts, alpha: float | None) -> Tensor:
    one, two = (_factor(parts, f"lokr_w{i}") for i in (1, 2))
    ranks = [parts[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in parts]
    factor = scale(alpha, ranks[-1]) if ranks else 1.0  # both whole: alpha says nothing
    one = one.reshape(*one.shape, *[1] * (two.ndim - one.ndim))
    return factor * torch.kron(one, two)


def _factor(parts: Parts, name: str) -> Tensor:
    if name in parts:
        return parts[name]
    core = "lokr_t2" if name == "lokr_w2" and "lokr_t2" in parts else ""
    return _product(parts, name, core)


def _product(parts: Parts, name: str, core: str) -> Tensor:
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    return torch.einsum("ij...,ip,jr->pr...", parts[core], a, b) if core else a @ b


def _difference(weight: Tensor, difference: Tensor) -> Tensor:
    if difference.squeeze().shape != weight.squeeze().shape:
        raise RuntimeError("a difference of another shape")
    return difference.view(weight.shape)


def _resized(weight: Tensor, total: Tensor, length: Tensor) -> Tensor:
    # One length a row as PEFT and LyCORIS's wd_on_output have it, or one a column.
    changed = weight + total
    axis = 0 if length.shape[0] == weight.shape[0] else 1
    others = [a for a in range(weight.ndim) if a != axis]
    norm = changed.norm(dim=others, keepdim=True)
    return changed * (length.view(norm.shape) / norm) - weight


_FAMILIES = (
    (_lora, frozenset({"down", "up", "mid"})),
    (_loha, frozenset(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))),
    (
        _lokr,
        frozenset(f"lokr_{name}" for name in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")),
    ),
)
