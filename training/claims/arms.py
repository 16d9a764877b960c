"""The arms of the claims, as data: what is trained, from where, and what it is compared with.

An arm is the miniature's recipe (`re_dmd --preset miniature`) with the settings below, in the words
of `--set`. Arms of a study that share a start differ by their settings and nothing else: the same
prompts, the same noise, the same number of updates. But for best of n, which has n videos of each
of n times fewer prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, get_args

Study = Literal["rewards", "sinks", "boundary", "swaps"]
STUDIES: tuple[Study, ...] = get_args(Study)
LASTING: tuple[Study, ...] = ("sinks", "swaps")
"""Those of long videos."""
BESIDE: Mapping[Study, Study] = MappingProxyType({"boundary": "rewards", "swaps": "sinks"})
"""Studies whose arms stand beside what is measured for another's."""
Motion = Literal["speed", "flow"]

COMMON = (
    "run.updates=40",
    "run.generator.rate=5e-5",
    "run.critic.rate=1e-4",
    "run.ema=0.9",
    "run.ema_from=10",
    "output.checkpoint_every=10",
    "output.checkpoint_minutes=1000",
    "output.keep=1000",
    "output.validate_every=0",
    "output.tensorboard=false",
)
"""Of every arm; the miniature's rollouts of 15 latent frames evict twice from a window of 9."""
NO_REWARD = ("reward.kind=none",)
NORMALISED = ("run.redmd.weights.effective_share=0.4", "run.redmd.weights.mean_one=true")
AS_PUBLISHED = ("run.redmd.weights.effective_share=null", "run.redmd.weights.mean_one=false")
_CACHE = "run.redmd.cache"
_LONG = ("run.updates=20", "run.latents=[16, 30, 8, 8]", "run.redmd.window_chunks=5")
"""Of the sinks' arms: rollouts of two of the teacher's clips, in which seven chunks leave."""
SPEED_BETA, FLOW_BETA = 0.25, 1.0
"""What a shape size a latent frame of speed, and a pixel an image of flow, are worth in the
generator's loss: about the same share of the gradients (`tilt/share`) at first."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A network that arms begin from: a file, or what a short regression makes of the teacher."""

    name: str
    decides: str
    """What it is there to tell."""
    network: Literal["student", "teacher"] = "teacher"
    """The file of the networks' folder that it is, or is made of."""
    pairs: tuple[str, ...] = ()
    """Settings of `ode_pairs`, on the miniature's; none where nothing is made."""
    init: tuple[str, ...] = ()
    """Those of `ode_init` on these pairs."""
    settings: tuple[str, ...] = ()
    """Of every arm from it, before its own."""
    like: str | None = None
    """The start whose file it is; None for one of its own."""

    @property
    def made_as(self) -> str:
        """The start that its file is made as."""
        return self.like or self.name


def _published_init(guidance: int) -> Start:
    return Start(
        name=f"early init, guidance {guidance}",
        decides="a start made as published, in few updates",
        pairs=(
            *('kind="clips"', "source=null", "latents=[16, 15, 8, 8]", "clips=256"),
            f"guidance={guidance}",
        ),
        init=(
            *("updates=150", "validate_every=0", "checkpoint_every=50", "tensorboard=false"),
            'context="noisy"',
        ),
    )


_STARTS = (
    Start(name="student", decides="a start that knows the world", network="student"),
    Start(name="teacher", decides="a start that was never made causal"),
    _published_init(3),
    _published_init(6),
    replace(
        _published_init(3),
        name="early init, guidance 3, as an adapter",
        decides="a student that may not become the teacher",
        settings=('student_lora={"rank": 2, "alpha": 2}', "run.generator.rate=1e-3"),
        like="early init, guidance 3",
    ),
)
STARTS: Mapping[str, Start] = MappingProxyType({start.name: start for start in _STARTS})


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training."""

    name: str
    study: Study
    start: str
    """A key of `STARTS`."""
    settings: tuple[str, ...]
    """Beside `COMMON`, on the miniature's recipe."""
    against: str | None
    """The arm of its study and start that it is compared with; None for the one others are."""
    decides: str
    """The question that it answers."""
    first: bool = field(default=False, compare=False)
    """Whether the study is about it, and so is run before the others."""
    trains: bool = True
    """Whether its start is trained with its settings, or streams with them as it is."""
    trained_on: Motion | None = None
    """The measure of motion that it is trained on, and so is not judged by."""

    @property
    def key(self) -> str:
        """Its name among all arms."""
        return f"{self.study}: {self.name}, from {self.start}"


def _reward_arms(start: str) -> tuple[Arm, ...]:
    def arm(name: str, settings: tuple[str, ...], decides: str, **options: bool) -> Arm:
        return Arm(
            name=name,
            study="rewards",
            start=start,
            settings=settings,
            against="DMD",
            decides=decides,
            trained_on="speed",
            **options,
        )

    def gradient(motion: Motion, beta: float, *reward: str) -> Arm:
        return Arm(
            name=f"minus the gradient of {motion}",
            study="rewards",
            start=start,
            settings=('run.redmd.weigh="none"', f"run.redmd.gradient_beta={beta}", *reward),
            against="DMD",
            decides="does the form that theory asks for move motion?",
            first=motion == "speed",
            trained_on=motion,
        )

    return (
        Arm(
            name="DMD",
            study="rewards",
            start=start,
            settings=NO_REWARD,
            against=None,
            decides="is motion lost?",
            first=True,
        ),
        arm("Re-DMD, as published", AS_PUBLISHED, "does it come back?", first=True),
        arm("Re-DMD, normalised", NORMALISED, "was it the weights' spread?"),
        arm(
            "Re-DMD, shuffled rewards",
            (*NORMALISED, "run.redmd.weights.shuffled=true"),
            "what do weights do by themselves?",
        ),
        arm(
            "tilted critic",
            (*NORMALISED, 'run.redmd.weigh="critic"'),
            "does a weight that moves the optimum move motion?",
        ),
        arm("best of 2", ("run.redmd.weights.best_of=2",), "does choosing do what weighing does?"),
        gradient("speed", SPEED_BETA, 'reward.kind="soft_speed"'),
        gradient("flow", FLOW_BETA, 'reward.kind="soft_flow"', 'reward.score="mean_motion"'),
    )


def _sink_arm(name: str, decides: str, *cache: str, first: bool = False) -> Arm:
    return Arm(
        name=name,
        study="sinks",
        start="student",
        settings=(*NO_REWARD, *_LONG, *(f"{_CACHE}.{setting}" for setting in cache)),
        against=None if name == "EMA 0.999" else "EMA 0.999",
        decides=decides,
        first=first,
    )


_SINK_ARMS = (
    _sink_arm("EMA 0.999", "what does the published sink keep?", "decay=0.999", first=True),
    _sink_arm("no sink", "what is lost without any?", "sink_frames=0", first=True),
    _sink_arm("static", "what do first frames, kept as they are, copy?", "decay=1.0"),
    _sink_arm("static, at its own time", "LongLive's form", "decay=1.0", 'positions="absolute"'),
    _sink_arm("EMA 0.99", "does it follow the stream?", "decay=0.99"),
    _sink_arm("EMA 0.9", "the same, faster", "decay=0.9"),
    _sink_arm("EMA 0.5", "the same, fastest", "decay=0.5"),
    _sink_arm(
        "EMA 0.9, key norms kept", "was it the keys' length?", "decay=0.9", "keep_key_norms=true"
    ),
    _sink_arm(
        "two EMAs beside a static frame",
        "MemRoPE's form",
        *("sink_frames=1", "decay=1.0", "memory_rates=[0.01, 0.1]"),
    ),
    _sink_arm(
        "a static frame beside EMA 0.9",
        "Steady-Forcing's form",
        *("anchor_frames=1", "sink_frames=2", "decay=0.9"),
    ),
)
"""All of a window of 9 latent frames, and so of one cost."""
_SWAPS = tuple(
    replace(
        arm,
        study="swaps",
        trains=False,
        decides="what does a student that was not trained with it make of it?",
    )
    for arm in _SINK_ARMS
)


def _boundary_arm(start: str, name: str, *settings: str) -> Arm:
    return Arm(
        name=name,
        study="boundary",
        start=start,
        settings=(*NO_REWARD, *settings),
        against=None,
        decides="where does DMD lose motion?",
        first=True,
    )


def _boundary_arms(start: str) -> tuple[Arm, ...]:
    def guided(scale: int) -> str:
        return f"run.redmd.guidance={scale}"

    fast = ("run.generator.rate=2e-4", "run.critic.rate=4e-4")
    return (
        _boundary_arm(start, "guidance 6", guided(6)),
        _boundary_arm(start, "guidance 0", guided(0)),
        _boundary_arm(start, "guidance 3, 4 times the rate", *fast),
        _boundary_arm(start, "guidance 1", guided(1)),
    )


REWARD_STARTS = ("student", "early init, guidance 3", "early init, guidance 3, as an adapter")
_ARMS = (
    *(arm for start in REWARD_STARTS for arm in _reward_arms(start)),
    *_SINK_ARMS,
    *_SWAPS,
    *(arm for start in STARTS for arm in _boundary_arms(start)),
    *(_boundary_arm(start, "guidance 3") for start in STARTS if start not in REWARD_STARTS),
)
"""Guidance 3 from the other starts is DMD of the rewards."""
ARMS: Mapping[str, Arm] = MappingProxyType({arm.key: arm for arm in _ARMS})
NAMES = tuple(dict.fromkeys(arm.name for arm in _ARMS))


def chosen_arms(
    studies: Sequence[str] = (), names: Sequence[str] = (), starts: Sequence[str] = ()
) -> tuple[Arm, ...]:
    """The arms of some studies, names and starts, where any are named; ValueError for none."""
    found = tuple(
        arm
        for arm in _ARMS
        if (not studies or arm.study in studies)
        and (not names or arm.name in names)
        and (not starts or arm.start in starts)
    )
    if not found:
        asked = {"study": studies, "arm": names, "start": starts}
        said = " ".join(f"--{name} {each!r}" for name, every in asked.items() for each in every)
        raise ValueError(f"no arm is of all of {said}; --plan names every arm")
    return found
