"""The stages, in order of what they are worth, and their settings. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SIZES = ("1.3b", "tiny")
DEADLINE = 520.0  # seconds, so that a machine lent for ten minutes has time to give results back


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The settings of every stage."""

    size: str = SIZES[0]
    """The network: Wan's 1.3B at its own picture size, or a tiny one that rehearses on a CPU."""
    published: Path | None = None
    """A checkout of the published code to race; None leaves that out."""

    @property
    def rehearsal(self) -> bool:
        """Whether nothing but the way is tried, in seconds."""
        return self.size == "tiny"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the measurement, a process of its own."""

    name: str
    cap: float
    """Seconds after which it is ended."""
    shows: str
    """What it is about, in a few words."""
    module: str | None = None
    """Under `stages`; by default of its own name."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that torch and its libraries read once, at their start."""


STAGES = (
    Stage(name="facts", cap=20, shows="versions, clocks, a copy, a product"),
    Stage(name="attention", cap=45, shows="every backend at every shape, against float32"),
    Stage(name="bench", cap=110, shows="images a second, first image, both decoders"),
    Stage(name="equality", cap=60, shows="recorded, fused, fp8 and handed on, against plain"),
    Stage(name="published", cap=45, shows="the published code, in turn with this"),
    Stage(name="vae", cap=40, shows="the decoder's fast paths and convolutions"),
    Stage(name="memory", cap=50, shows="the plan against the card; flat over 100 chunks"),
    Stage(name="fp8", cap=50, shows="images a second with fp8 weights"),
    Stage(name="kernels", cap=40, shows="fused kernels against float64"),
    Stage(name="profile", cap=60, shows="where a chunk's time goes"),
    Stage(
        name="published_flash",
        cap=45,
        shows="the same with torch's attention of old, which most have",
        module="published",
        environment={"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"},
    ),
    Stage(name="products", cap=30, shows="linear layers, GELU, fp8"),
    Stage(
        name="tests",
        cap=110,
        shows="the tests that need a card",
        environment={"OMP_NUM_THREADS": "1"},  # each worker would start a thread for every core
    ),
)


def chosen(names: str | None) -> tuple[Stage, ...]:
    """The stages of a list such as `facts,bench`, all without one; ValueError for another name."""
    if names is None:
        return STAGES
    known = {stage.name: stage for stage in STAGES}
    asked = [name.strip() for name in names.split(",")]
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"stage {unknown[0]!r} is unknown; the stages are {', '.join(known)}")
    return tuple(known[name] for name in asked)
