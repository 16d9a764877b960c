"""Families of causal Wan students: presets by which files stream as their authors run them.

They share one network and one naming of weights, and differ in what the cache keeps, where its keys
are placed and in the schedule. A family is data; what it needs are fields of `CacheConfig` and
`SamplerConfig`, which can be set without it, too. Numbers are those of each project's released
configuration and code, held by recorded outputs of that code (`rf_core verify`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from .config import FPS, PUBLISHED_STEPS, WAN_SIZE, CacheConfig, SamplerConfig

AUTO = "auto"
"""Stands for the family that a file tells."""
DEFAULT = "reward_forcing"

Layout = Literal["plain", "adapter", "flat_14b"]
"""What a file's keys and shapes show: a network alone or in a bundle, as nearly all are; a bundle
with an adapter beside its generator (PEFT); a network of 14B under `model.` in a safetensors."""

_APACHE = "code Apache-2.0"
_ONE_CLIP = CacheConfig(window_frames=21, sink_frames=0, decay=1.0)


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the students of one project stream."""

    title: str
    """Its name, as the project writes it."""
    source: str
    """Paper and code."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    size: tuple[int, int] = WAN_SIZE
    """Height and width in pixels that its authors stream at."""
    fps: int = FPS
    """Images a second that its authors write."""
    frames: int
    """Latent frames of its authors' videos, at most."""
    good_at: str
    """What to choose it for."""
    licence: str
    """Of code and weights, as far as the project says; non-commercial terms come first."""
    files: tuple[str, ...]
    """How its official files are called: of an entry all words are in the name, lower case."""
    layouts: tuple[Layout, ...] = ("plain",)
    """What its files may look like."""
    network: str | None = None
    """Which network of a bundle its files hold, where that tells it from its kin."""

    @property
    def is_restricted(self) -> bool:
        """Whether code or weights are not free for every use."""
        return any(term in self.licence for term in ("non-commercial", "academic"))


_CAUSAL_FORCING = Family(
    title="Causal-Forcing",
    source="arXiv 2602.02214, github.com/thu-ml/Causal-Forcing",
    cache=_ONE_CLIP,
    frames=21,
    good_at="one clip of 5 seconds, sharper",
    licence=_APACHE,
    files=("causal forcing",),
    network="generator",
)
_FRAMEWISE = replace(
    _CAUSAL_FORCING,
    title="Causal-Forcing, frame by frame",
    cache=replace(_ONE_CLIP, chunk_frames=1),
    good_at="quick answers, and a start from one picture",
    files=("causal forcing frame", "framewise"),
    network="generator_ema",
)
_LONGLIVE = Family(
    title="LongLive",
    source="arXiv 2509.22622, github.com/NVlabs/LongLive",
    cache=CacheConfig(
        window_frames=12, sink_frames=3, decay=1.0, positions="absolute", recache="joint"
    ),
    frames=240,
    good_at="minutes of video whose prompt changes",
    licence="code Apache-2.0 (one file of it CC-BY-NC-SA-4.0)",
    files=("longlive",),
    layouts=("adapter", "plain"),
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        DEFAULT: Family(
            title="Reward Forcing",
            source="arXiv 2512.04678",
            frames=120,
            good_at="endless video with motion; the sink stays fresh",
            licence=_APACHE,
            files=("reward forcing",),
        ),
        "self_forcing": Family(
            title="Self-Forcing",
            source="arXiv 2506.08009, github.com/guandeh17/Self-Forcing",
            cache=_ONE_CLIP,
            frames=21,
            good_at="one clip of 5 seconds",
            licence=f"weights CC-BY-NC-SA-4.0 (non-commercial); {_APACHE}",
            files=("self forcing",),
        ),
        "causal_forcing": _CAUSAL_FORCING,
        "causal_forcing_frame": _FRAMEWISE,
        "causal_forcing_2step": replace(
            _FRAMEWISE,
            title="Causal-Forcing++ in 2 steps",
            sampler=SamplerConfig(steps=(1000, 500), first_steps=PUBLISHED_STEPS),
            good_at="speed: 2 passes a frame",
            files=("causal forcing 2step", "framewise 2step"),
        ),
        "causal_forcing_1step": replace(
            _FRAMEWISE,
            title="Causal-Forcing++ in 1 step",
            sampler=SamplerConfig(steps=(1000,), first_steps=PUBLISHED_STEPS),
            good_at="speed: 1 pass a frame",
            files=("causal forcing 1step", "framewise 1step"),
        ),
        "longlive": _LONGLIVE,
        "longlive_infinity": replace(
            _LONGLIVE,
            title="LongLive infinity",
            cache=replace(_LONGLIVE.cache, positions="window"),
            frames=1050,
            good_at="as LongLive, without end",
            files=("longlive infinity",),
        ),
        "memrope": Family(
            title="MemRoPE",
            source="ECCV 2026, github.com/YoungRaeKimm/MemRoPE",
            cache=CacheConfig(window_frames=12, sink_frames=3, decay=1.0, memory_rates=(0.01, 0.1)),
            frames=14400,
            good_at="an hour from Self-Forcing's or LongLive's file, whose colours it remembers",
            licence=f"weights are Self-Forcing's (non-commercial) or LongLive's; {_APACHE}",
            files=("memrope",),
            layouts=("adapter", "plain"),
        ),
        "krea": Family(
            title="Krea Realtime 14B",
            source="github.com/krea-ai/realtime-video",
            cache=CacheConfig(
                window_frames=6, sink_frames=0, decay=1.0, rebuild="reencoded", blend_holds=True
            ),
            sampler=SamplerConfig(steps=(1000, 750, 500, 250, 0)),
            fps=24,
            frames=27,
            good_at="the look of 14B",
            licence="CC-BY-NC-SA-4.0 (non-commercial), code and weights",
            files=("krea",),
            layouts=("flat_14b",),
        ),
        "rolling_forcing": Family(
            title="Rolling Forcing",
            source="arXiv 2509.25161, github.com/TencentARC/RollingForcing",
            cache=CacheConfig(window_frames=24, sink_frames=3, decay=1.0),
            sampler=SamplerConfig(steps=(1000, 800, 600, 400, 200), rolling=True),
            frames=126,
            good_at="little drift: five chunks are denoised together",
            licence="academic use only, code and weights",
            files=("rolling forcing",),
        ),
    }
)


def check_family(name: str) -> None:
    """ValueError for a name that is neither a family's nor `auto`."""
    if name != AUTO:
        family_of(name)


def family_of(name: str) -> Family:
    """The family of that name; ValueError for none."""
    if name not in FAMILIES:
        raise ValueError(f"family is {name!r}; choose one of {', '.join((AUTO, *FAMILIES))}")
    return FAMILIES[name]
