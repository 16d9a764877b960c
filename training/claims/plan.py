"""The plan of the claims: what is run, in the order of what it decides, and what it costs.

First what everything stands beside, then of every start what its study is about, then the other
arms, then further seeds. A start that is to be made comes right before what needs it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from rf_core.config import Grid
from rf_core.digests import file_digest
from rf_core.options import DEMO
from rf_core.weights.checkpoint import read_checkpoint
from rf_core.writing import write_text

from ..run.config import apply_overrides
from ..stages.estimate import Sizes, update_operations
from ..stages.operations import regression_flops, trajectory_flops
from ..stages.recipes import DistilConfig, miniature
from ..stages.regression import InitConfig, miniature_init
from ..stages.trajectories import PairsConfig, miniature_pairs
from ..world.clips import captions, scene_of
from ..world.scenes import PLAIN
from ..world.stages import Files
from .arms import BESIDE, COMMON, STARTS, Arm, Start
from .lasting import LastingConfig
from .measures import MeasureConfig

TRUE, DECODED = "true videos", "true videos, decoded"
TEACHER, UNGUIDED = "the teacher's clips", "the teacher's clips, unguided"
PROMPTS, PROMPT_SEED = 512, 5
"""Captions that students of another world than the plain one are trained on."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is done of everything."""

    measure: MeasureConfig = field(default_factory=MeasureConfig)
    settings: tuple[str, ...] = ()
    """Of every arm, over its own."""
    pairs: tuple[str, ...] = ()
    """The same of the trajectories of a start."""
    init: tuple[str, ...] = ()
    """And of its regression."""


SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "full": Size(),
        "tiny": Size(
            measure=MeasureConfig(
                free=2,
                named=1,
                double=1,
                chunks=3,
                between=1,
                lasting=LastingConfig(
                    videos=1,
                    chunks=8,
                    window_images=24,
                    switches=1,
                    switch_after=4,
                    switch_chunks=5,
                ),
            ),
            settings=(
                *("run.updates=2", "run.critic_ratio=1", "run.redmd.batch=2", "run.micro_batch=2"),
                *("run.latents=[16, 12, 8, 8]", "data.limit=3", "output.checkpoint_every=1"),
            ),
            pairs=("clips=4", "shard=2", "batch=2", "steps=2", "data.limit=3"),
            init=("updates=2", "batch=2", "micro_batch=2", "checkpoint_every=1"),
        ),
    }
)
"""`tiny` rehearses the way in seconds, and its numbers say nothing."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where the claims are run, and on what."""

    out: Path
    """Results."""
    runs: Path
    """Checkpoints of what is not finished, and logs."""
    networks: Path = DEMO
    """Folder of vae, text_encoder, teacher and student."""
    world: str = PLAIN
    """Of `training.world.scenes.WORLDS`."""
    device: str = "cpu"
    size: str = "full"
    """Of `SIZES`."""
    keep_runs: bool = False
    """Whether checkpoints of what is finished are kept."""

    @property
    def files(self) -> Files:
        """The networks."""
        return Files(self.networks)

    @cached_property
    def networks_digest(self) -> str:
        """A short name for the four files."""
        files = (self.files.vae, self.files.text, self.files.teacher, self.files.student)
        every = "".join(map(file_digest, files)).encode()
        return f"{self.networks.name} {hashlib.blake2b(every, digest_size=4).hexdigest()}"

    def folder(self, name: str) -> Path:
        """Where a run is while it is not finished."""
        return self.runs / slug(f"{self.size} {self.world} {self.networks_digest}") / slug(name)

    def start_path(self, start: Start) -> Path:
        """The file that arms begin from, which may have to be made."""
        if start.pairs:
            return self.folder(f"start {start.made_as}") / "student.safetensors"
        return getattr(self.files, start.network)

    def files_of(self, arm: Arm) -> tuple[Path, Path]:
        """Files of the sizes of an arm's student, and of its teacher."""
        return getattr(self.files, STARTS[arm.start].network), self.files.teacher

    def arm_config(self, arm: Arm, seed: int) -> DistilConfig:
        """An arm's whole run."""
        start, files = STARTS[arm.start], self.files
        settings = [*COMMON, *start.settings, *arm.settings, f"run.seed={seed}"]
        settings += [*SIZES[self.size].settings, f"files.student={self.start_path(start)}"]
        settings += [f"files.{name}={getattr(files, name)}" for name in ("teacher", "vae")]
        settings += self._data()
        return apply_overrides(miniature(), settings)

    def pairs_config(self, start: Start) -> PairsConfig:
        """How a start's trajectories are made."""
        settings = [*start.pairs, *SIZES[self.size].pairs, f"teacher={self.files.teacher}"]
        return apply_overrides(miniature_pairs(), [*settings, *self._data()])

    def init_config(self, start: Start) -> InitConfig:
        """How the start is made of them."""
        settings = [*start.init, *SIZES[self.size].init, f"start={self.files.teacher}"]
        settings += [f"pairs={self.folder(f'pairs {start.made_as}')}", f"vae={self.files.vae}"]
        return apply_overrides(miniature_init(), settings)

    def _data(self) -> list[str]:
        settings = [f"data.text_encoder={self.files.text}"]
        if self.world != PLAIN:
            settings.append(f'data.prompts=["{self.runs / f"{self.world}.txt"}"]')
        return settings

    def write_prompts(self) -> None:
        """The captions of a world that the data set does not write itself."""
        if self.world != PLAIN:
            scenes = [scene_of(PROMPT_SEED, index, self.world) for index in range(PROMPTS)]
            text = "\n".join(dict.fromkeys(captions(scenes))) + "\n"
            write_text(self.runs / f"{self.world}.txt", text)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing to run."""

    name: str
    """Of its result."""
    decides: str
    kind: str
    """`true`, `decoded`, `teacher`, `unguided` or `start` of a study, to stand beside; `make` a
    start; or `arm`."""
    study: str = ""
    start: str | None = None
    arm: Arm | None = None
    seed: int = 0

    @property
    def needs(self) -> str | None:
        """The item that has to be done before."""
        return _make_name(STARTS[self.start]) if self._waits else None

    @property
    def _waits(self) -> bool:
        return self.start is not None and bool(STARTS[self.start].pairs) and self.kind != "make"


def slug(name: str) -> str:
    """A name as a file's."""
    return "".join(c if c.isalnum() else "_" for c in name.lower())


def result_name(arm: Arm, seed: int) -> str:
    """Of an arm's result."""
    return f"{arm.key}, seed {seed}"


def reference_name(study: str, what: str) -> str:
    """Of what arms of a study stand beside: `TRUE`, `DECODED`, `TEACHER`,
    `UNGUIDED`, or a start."""
    return f"{study}: {what}"


def plan(arms: Sequence[Arm], seeds: int) -> list[Item]:
    """Everything that arms and seeds ask for, in order."""
    order = sorted(
        (seed, not arm.first, index)
        for index, arm in enumerate(arms)
        for seed in range(seeds if arm.trains else 1)
    )
    runs = [_arm_item(arms[index], seed) for seed, _, index in order]
    return list(_with_starts([*_references(arms), *runs]))


def _arm_item(arm: Arm, seed: int) -> Item:
    return Item(
        name=result_name(arm, seed),
        decides=arm.decides,
        kind="arm",
        study=arm.study,
        start=arm.start,
        arm=arm,
        seed=seed,
    )


def _references(arms: Iterable[Arm]) -> Iterator[Item]:
    for study, starts in _starts_of(arms).items():
        if study in BESIDE:
            continue
        name = reference_name(study, TRUE)
        yield Item(name=name, decides="the tracker's own error", kind="true", study=study)
        name = reference_name(study, DECODED)
        yield Item(name=name, decides="what the VAE loses", kind="decoded", study=study)
        if study == "rewards":
            name = reference_name(study, TEACHER)
            yield Item(name=name, decides="what is matched", kind="teacher", study=study)
            name = reference_name(study, UNGUIDED)
            yield Item(name=name, decides="what guidance does", kind="unguided", study=study)
        for start in starts:
            yield Item(
                name=reference_name(study, start),
                decides=STARTS[start].decides,
                kind="start",
                study=study,
                start=start,
            )


def _starts_of(arms: Iterable[Arm]) -> dict[str, dict[str, None]]:
    found: dict[str, dict[str, None]] = {}
    for arm in arms:
        found.setdefault(arm.study, {})[arm.start] = None
    return found


def _with_starts(items: Iterable[Item]) -> Iterator[Item]:
    made = set()
    for item in items:
        if item.needs and item.needs not in made:
            made.add(item.needs)
            assert item.start is not None
            start = STARTS[item.start]
            yield Item(
                name=item.needs, decides="a start of arms below", kind="make", start=start.name
            )
        yield item


def _make_name(start: Start) -> str:
    return f"make {start.made_as}"


def training_operations(item: Item, setting: Setting) -> int:
    """Operations that training takes, a multiply-add as two; judging comes on top."""
    if item.arm is not None and item.arm.trains:
        student, teacher = (read_checkpoint(p).config for p in setting.files_of(item.arm))
        sizes = Sizes(student=student, teacher=teacher, critic=teacher)
        config = setting.arm_config(item.arm, item.seed)
        return config.run.updates * update_operations(config, sizes)
    if item.kind == "make":
        assert item.start is not None
        return _making_operations(STARTS[item.start], setting)
    return 0


def _making_operations(start: Start, setting: Setting) -> int:
    pairs, init = setting.pairs_config(start), setting.init_config(start)
    size = read_checkpoint(setting.files.teacher).config
    grid = Grid.of_latents(*pairs.latents[2:], size.patch_size)
    sampled = pairs.clips * trajectory_flops(pairs, size, grid)
    return sampled + init.updates * init.batch * regression_flops(init, pairs, size, grid)
