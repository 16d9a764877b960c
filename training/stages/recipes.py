"""Recipes: whole runs by name, each a function that gives its full config.

`miniature` distils the bundled demo: its teacher and student, its captions, its exact tracker as
the reward. `wan` is the published run. Both are one code; only numbers and files differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal

from rf_core.config import WAN_SIZE, CacheConfig
from rf_core.families import AUTO, check_family
from rf_core.options import DEMO
from rf_core.ranges import MANY, check_numbers
from rf_core.stream import latent_size

from ..choices import RewardConfig, differentiable_rewards
from ..data.prompts import DataConfig, wan_data
from ..data.starts import StartsConfig
from ..objective.redmd import ReDMDConfig
from ..objective.weights import WEIGHTING, WeightConfig
from ..run.lora import LoRAConfig
from ..run.networks import PlacementConfig
from ..run.optimise import RATES, OptimiserConfig
from ..run.sequence import check_sizes
from .trainer import RunConfig

Sink = Literal["ema", "static", "none"]


@dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """What a run begins with; None takes the bundled demo's."""

    student: Path | None = None
    """The student: best from `ode_init`, or one of any family that is not of Reward Forcing."""
    family: str = AUTO
    """Whose student it is, of `rf_core.families.FAMILIES`; `auto` for what its file tells."""
    teacher: Path | None = None
    """The bidirectional network whose distribution is matched."""
    critic: Path | None = None
    """Initial weights of the critic; None for the teacher's file."""
    vae: Path | None = None
    """Wan VAE or TAEHV, for rewards, anchors and validation."""

    def __post_init__(self) -> None:
        check_family(self.family)


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run leaves behind, and how often."""

    checkpoint_every: int = 50
    """Updates between checkpoints."""
    checkpoint_minutes: float = 30.0
    """The longest time between them, so that a run that is killed loses no more."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    validate_every: int = 50
    """Updates between validation videos of the averaged student; 0 for none. Each comes after a
    checkpoint of its own."""
    validation_prompts: int = 4
    """How many prompts are shown: the first and others from all over the list, the same in every
    run of it; a larger number adds to them. `prompts.json` beside the videos says which is which.
    """
    validation_chunks: int = 14
    """Their length, in chunks."""
    tensorboard: bool = True
    """Whether TensorBoard's files are written, where it is installed."""
    wandb: str | None = None
    """Project of Weights & Biases; None for none."""

    def __post_init__(self) -> None:
        counts = ("checkpoint_every", "keep", "validation_prompts", "validation_chunks")
        check_numbers(self, **dict.fromkeys(counts, (1, MANY)), validate_every=(0, MANY))
        check_numbers(self, checkpoint_minutes=(0, math.inf))


@dataclass(frozen=True, kw_only=True)
class DistilConfig:
    """A whole distillation."""

    recipe = "re_dmd"
    may_change: ClassVar = (
        *("run.updates", "run.micro_batch", "run.runaway", "output", "placement", "data.cache"),
        *(f"run.{who}.{what}" for who in ("generator", "critic") for what in RATES),
        *(f"run.redmd.weights.{name}" for name in WEIGHTING),
        "run.redmd.gradient_beta",
    )
    """As `SupervisedConfig.may_change`."""
    run: RunConfig = field(default_factory=RunConfig)
    """Sizes, rates and counts."""
    files: FilesConfig = field(default_factory=FilesConfig)
    """Weights to begin with."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts and their encoder."""
    starts: StartsConfig = field(default_factory=StartsConfig)
    """Rollouts that begin from an image."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The reward."""
    more_rewards: tuple[RewardConfig, ...] = ()
    """Others whose scores are added to it, each times its `share`; all are logged."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """How networks are held."""
    student_lora: LoRAConfig | None = None
    """Where given, the student is trained as an adapter."""
    critic_lora: LoRAConfig | None = None
    """The same for the critic."""
    anchor: bool = True
    """Whether a later window's first frame is encoded anew from its image, so that teacher and
    critic see a clip that begins as their clips do."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """Checkpoints, logs, videos."""

    @property
    def rewards(self) -> tuple[RewardConfig, ...]:
        """The reward and those added to it, as far as they are any."""
        return tuple(each for each in (self.reward, *self.more_rewards) if each.kind != "none")

    def __post_init__(self) -> None:
        over = self.placement.sequence_over
        if self.run.carry > 1 and (over or 1) > 1:
            raise ValueError(
                f"run.carry is {self.run.carry}, and placement.sequence_over {over}: processes "
                "that share a sample each have other heads of its cache, which is kept whole; "
                "choose one of them"
            )
        check_sizes(over, self.run.sizes, "run.buckets")
        if self.run.redmd.weigh == "critic" and not self.rewards:
            raise ValueError(
                "run.redmd.weigh is critic, which a reward weights; give reward.kind, or set "
                "run.redmd.weigh=generator"
            )
        self._check_gradient()
        if self.run.redmd.sampler.first_steps and 0 < self.starts.share < 1:
            raise ValueError(
                f"starts.share is {self.starts.share}, and run.redmd.sampler.first_steps are those "
                "of the first chunk that is generated, which would be another sample by sample; "
                "set the share to 1 or 0, or first_steps to []"
            )
        chunk = self.run.redmd.cache.first_frames
        if self.starts.share and self.run.window_frames <= chunk:
            raise ValueError(
                f"starts.share is {self.starts.share}, and a start image fills a chunk of {chunk} "
                "frames, all that is supervised at once: give run.latents more frames, or "
                "run.redmd.window_chunks more chunks"
            )

    def _check_gradient(self) -> None:
        beta, weigh = self.run.redmd.gradient_beta, self.run.redmd.weigh
        if not beta:
            if weigh == "none" and self.rewards:
                raise ValueError(
                    f"reward.kind is {self.rewards[0].kind}, run.redmd.weigh none and "
                    "run.redmd.gradient_beta 0, so that it would do nothing: give one of them, or "
                    "reward.kind=none"
                )
            return
        moving = [each for each in self.rewards if each.share]
        known = ", ".join(differentiable_rewards())
        if not moving:
            raise ValueError(
                f"run.redmd.gradient_beta is {beta}, the worth of a reward that is not there; give "
                f"reward.kind, of {known}, or set run.redmd.gradient_beta=0"
            )
        for each in moving:
            if not each.is_differentiable:
                raise ValueError(
                    f"run.redmd.gradient_beta is {beta}, and the {each.score} of reward.kind "
                    f"{each.kind} has no gradient; take one of {known} or a class that names it in "
                    "`differentiable`, give this one share 0, or set run.redmd.gradient_beta=0"
                )


def student_path(config: DistilConfig) -> Path:
    """The student that a run begins with, which may not be there."""
    return config.files.student or DEMO / "student.safetensors"


def recomputed_frames(config: DistilConfig) -> int | None:
    """Latent frames that are decoded again at a time for a reward's gradient; None to keep all."""
    return config.run.redmd.cache.chunk_frames if config.placement.checkpointing else None


def miniature() -> DistilConfig:
    """The bundled demo's student, in minutes on a laptop."""
    return DistilConfig(
        run=RunConfig(
            redmd=ReDMDConfig(
                cache=CacheConfig(accumulator="float32"),
                weights=WeightConfig(effective_share=0.4, mean_one=True),
            ),
            generator=OptimiserConfig(rate=2e-5),
            critic=OptimiserConfig(rate=4e-5),
            latents=(16, 15, 8, 8),  # the window evicts twice
            updates=80,
            micro_batch=8,
            ema_from=20,
        ),
        reward=RewardConfig(kind="tracker"),
        output=OutputConfig(checkpoint_every=20, validate_every=40, validation_chunks=7),
    )


def wan() -> DistilConfig:
    """The published run (arXiv 2512.04678); change the files to where yours are.

    Total batch 64 and 600 steps of the critic are the paper's; a run on fewer cards accumulates.
    """
    height, width = latent_size(*WAN_SIZE, (1, 2, 2))
    return DistilConfig(
        run=RunConfig(redmd=ReDMDConfig(batch=64), latents=(16, 21, height, width)),
        reward=RewardConfig(kind="videoalign", score="MQ", path=Path("videoalign")),
        placement=PlacementConfig(dtype="bfloat16", checkpointing=True),
        files=FilesConfig(
            student=Path("models/ode_init.safetensors"),
            teacher=Path("models/wan2.1_t2v_1.3B.safetensors"),
            vae=Path("models/Wan2.1_VAE.pth"),
        ),
        data=wan_data(),
        output=OutputConfig(validate_every=20),
    )


PRESETS: Mapping[str, Callable[[], DistilConfig]] = MappingProxyType(
    {"miniature": miniature, "wan": wan}
)


def with_sink(config: DistilConfig, sink: Sink) -> DistilConfig:
    """The same run with another sink: a moving average, the first frames as they are, or none."""
    cache = config.run.redmd.cache
    changes = {"ema": {}, "static": {"decay": 1.0}, "none": {"sink_frames": 0}}[sink]
    redmd = replace(config.run.redmd, cache=replace(cache, **changes))
    return replace(config, run=replace(config.run, redmd=redmd))
