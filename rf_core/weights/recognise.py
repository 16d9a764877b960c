"""Which family a student's file is of, and how that is known.

In order: what was chosen, the file's own metadata, its keys and shapes, its name. Most projects
publish the same keys of the same network, so that for a file without metadata the name is often
all there is; without a word in it Reward Forcing is assumed, and that is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from ..config import WAN_14B, ModelConfig
from ..families import AUTO, DEFAULT, FAMILIES, Family, Layout
from .files import CheckpointError, WeightFile

FamilyFrom = Literal["choice", "metadata", "keys", "name", "nothing"]

_SHOWN: Mapping[Layout, str] = MappingProxyType(
    {
        "adapter": "an adapter beside its generator",
        "flat_14b": "a network of 14B under `model.`",
    }
)
"""What layouts that tell a family look like."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """A family, and how it is known."""

    family: str
    """One of FAMILIES."""
    source: FamilyFrom
    because: str
    """The same for people, without the family."""

    @property
    def preset(self) -> Family:
        """How its students stream."""
        return FAMILIES[self.family]

    def __str__(self) -> str:
        return f"{self.preset.title}, {self.because}"


def recognise(
    path: Path,
    *,
    chosen: str = AUTO,
    recorded: object = None,
    layout: Layout = "plain",
    networks: Iterable[str] = (),
) -> Told:
    """The family of a file.

    `chosen` is what the user says, `recorded` what the file's metadata does, `networks` are those
    in the file. ValueError for a choice that is none, CheckpointError for a record that is none.
    """
    if chosen != AUTO:
        return Told(family=chosen, source="choice", because="as chosen")
    if recorded is not None:
        return _recorded(path, recorded)
    candidates = [name for name, each in FAMILIES.items() if layout in each.layouts]
    named = _named(path, candidates, set(networks))
    if layout in _SHOWN:
        because = f"by {_SHOWN[layout]}" + (" and its name" if named else "")
        return Told(family=named or candidates[0], source="keys", because=because)
    if named is not None:
        because = "by its file's name alone; choose the family where that is wrong"
        return Told(family=named, source="name", because=because)
    others = ", ".join(FAMILIES[name].title for name in candidates if name != DEFAULT)
    because = f"as no key and no name in it tells it from {others}; choose the family"
    return Told(family=DEFAULT, source="nothing", because=because)


def layout_of(file: WeightFile, prefix: str, config: ModelConfig, *, has_adapter: bool) -> Layout:
    """What a file looks like; `prefix` is what stands before the network's names in it."""
    if has_adapter:
        return "adapter"
    sizes = ("dim", "ffn_dim", "num_heads", "num_layers")
    is_14b = all(getattr(config, name) == getattr(WAN_14B, name) for name in sizes)
    flat = prefix == "model." and all(key.startswith(prefix) for key in file.tensors)
    return "flat_14b" if is_14b and flat and file.container.startswith("safetensors") else "plain"


def _recorded(path: Path, name: object) -> Told:
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(
            f"{path}: is of family {name!r}, which is none of {', '.join(FAMILIES)}; update Reward "
            "Forcing, or choose the family"
        )
    return Told(family=name, source="metadata", because="as the file's metadata says")


def _named(path: Path, candidates: list[str], networks: set[str]) -> str | None:
    """The family that a file's name has most of; the last, as the most special, of several."""
    found = _most(path.name, candidates)
    if found is None:
        return None
    # Some projects tell their students apart by the folder, or by which network is in the file.
    kin = [name for name in candidates if _is_kin(name, found)]
    found = _most(f"{path.parent.name}/{path.name}", kin) or found
    if found != kin[0] or FAMILIES[found].network in networks:
        return found
    return next((name for name in kin if FAMILIES[name].network in networks), found)


def _is_kin(name: str, other: str) -> bool:
    return FAMILIES[name].source == FAMILIES[other].source


def _most(text: str, names: Iterable[str]) -> str | None:
    scores = {name: _score(text.lower(), FAMILIES[name].files) for name in names}
    best = max(scores.values(), default=0)
    return [name for name, score in scores.items() if score == best][-1] if best else None


def _score(text: str, phrases: Iterable[str]) -> int:
    words = (phrase.split() for phrase in phrases)
    return max((sum(map(len, each)) for each in words if all(w in text for w in each)), default=0)
