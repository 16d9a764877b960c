"""Carrying out one item of the plan: a start made, or something trained and measured.

What is stopped goes on the next time where it was, bit for bit; a result is there whole or not at
all.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from rf_core.model import WanModel
from rf_core.weights.checkpoint import load_student

from ..run.config import to_json
from ..run.folder import STUDENT, checkpoints
from ..run.journal import read_journal
from ..stages.export import export
from ..stages.re_dmd import distil
from ..stages.recipes import DistilConfig, student_path
from ..stages.regression import init_student
from ..stages.trajectories import write_pairs
from ..world.stages import open_network
from .arms import LASTING, STARTS, Arm, Start
from .measures import Found, Measurer, Played
from .plan import SIZES, Item, Setting
from .results import code_digest

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runner:
    """Carries out items, on networks that are opened once."""

    setting: Setting

    @cached_property
    def measurer(self) -> Measurer:
        """Of the setting's size."""
        s = self.setting
        measure = SIZES[s.size].measure
        return Measurer(config=measure, files=s.files, device=self.device, world=s.world)

    @property
    def device(self) -> torch.device:
        """Where networks are."""
        return torch.device(self.setting.device)

    def run(self, item: Item) -> Found:
        """The item's result; errors of its stages pass through, and so does `Stopped`."""
        began = time.monotonic()
        found = self._carry_out(item)
        about = {"study": item.study, "kind": item.kind, "start": item.start, "code": code_digest()}
        if item.arm is not None:
            about |= {"arm": item.arm.name, "seed": item.seed}
        return about | found | {"seconds": round(time.monotonic() - began, 2)}

    def _carry_out(self, item: Item) -> Found:
        if item.arm is not None:
            return self._arm(item.arm, item.seed, item.name)
        if item.kind == "make":
            assert item.start is not None
            return self._make(STARTS[item.start])
        lasts = item.study in LASTING
        if item.kind in ("true", "decoded"):
            decoded = item.kind == "decoded"
            measure = self.measurer.true_lasting if lasts else self.measurer.true
            return measure(decoded=decoded)
        if item.kind in ("teacher", "unguided"):
            return self.measurer.teacher(guided=item.kind == "teacher")
        assert item.start is not None
        network = open_network(self.setting.start_path(STARTS[item.start]), self.device)
        played = Played(student=network)
        return self.measurer.lasting(played) if lasts else self.measurer.played(played)

    def _make(self, start: Start) -> Found:
        pairs, init = self.setting.pairs_config(start), self.setting.init_config(start)
        out = self.setting.start_path(start).parent
        if (out / STUDENT).exists() and not checkpoints(out):  # made, for results elsewhere
            return {"config": _config(init)}
        for count in write_pairs(pairs, init.pairs, self.device):
            _log.info("%d trajectories", count)
        for report in init_student(init, out, self.device, resume=bool(checkpoints(out))):
            _log.info("update %d", report.update)
        for _, folder in checkpoints(out):
            shutil.rmtree(folder)
        return {"config": _config(init)}

    def _arm(self, arm: Arm, seed: int, name: str) -> Found:
        config = self.setting.arm_config(arm, seed)
        folder = self.setting.folder(name)
        found: Found = {"config": _config(config)}
        if arm.trains:
            seconds = list(_timed(config, folder, self.device))
            *_, (_, last) = checkpoints(folder)
            student = _averaged(config, last, self.device)
            found["training"] = _numbers(folder)
            if seconds:
                found["seconds_an_update"] = round(median(seconds), 3)
        else:
            student = open_network(student_path(config), self.device)
        redmd = config.run.redmd
        played = Played(student=student, cache=redmd.cache, sampler=redmd.sampler)
        if arm.study in LASTING:
            found |= self.measurer.lasting(played)
        else:
            found |= self.measurer.played(played)
            found["curve"] = self._curve(config, folder)
        found["strip"] = self.measurer.strip(played)
        if arm.trains and not self.setting.keep_runs:
            shutil.rmtree(folder)
        return found

    def _curve(self, config: DistilConfig, folder: Path) -> dict[str, list[Found]]:
        """A few captions' measures at the start and as often as is saved, of averaged weights; what
        was saved because the run was stopped does not count."""
        redmd, points = config.run.redmd, {0: open_network(student_path(config), self.device)}
        every, last = config.output.checkpoint_every, config.run.updates
        points |= {
            update: _averaged(config, path, self.device)
            for update, path in checkpoints(folder)
            if update % every == 0 or update == last
        }
        return {
            str(update): self.measurer.point(
                Played(student=each, cache=redmd.cache, sampler=redmd.sampler)
            )
            for update, each in points.items()
        }


def _timed(config: Any, folder: Path, device: torch.device) -> Iterator[float]:
    """Train, yielding the seconds of every update."""
    clock = time.perf_counter()
    for report in distil(config, folder, device, resume=bool(checkpoints(folder))):
        _log.info("update %d", report.update)
        yield time.perf_counter() - clock
        clock = time.perf_counter()


def _numbers(folder: Path) -> Found:
    """Every number of a run's log but of time and memory: first, on average, and last."""
    rows: dict[str, list[float]] = {}
    for update in read_journal(folder / "log.jsonl"):
        for name, value in update.items():
            if isinstance(value, float) and name != "seconds" and not name.startswith("memory/"):
                rows.setdefault(name, []).append(value)
    return {
        name: {"first": values[0], "mean": fmean(values), "last": values[-1]}
        for name, values in rows.items()
    }


def _averaged(config: DistilConfig, checkpoint: Path, device: torch.device) -> WanModel:
    """A checkpoint's averaged weights, an adapter merged into what it was trained beside."""
    path = checkpoint.parent / "average.safetensors"
    export(config, student_path(config), checkpoint, path, dtype=torch.float32, note={})
    return load_student(path, device=device, dtype=torch.float32)[0]


def _config(config: Any) -> Any:
    return json.loads(to_json(config))
