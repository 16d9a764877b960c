from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from rf_core.config import CacheConfig
from training.objective.redmd import ReDMDConfig
from training.objective.weights import WeightConfig
from training.run.config import apply_overrides, from_dict, from_json, to_json
from training.run.folder import CONFIG, read_config
from training.run.journal import read_journal
from training.stages.recipes import PRESETS, DistilConfig
from training.stages.regression import INIT_PRESETS, InitConfig
from training.stages.trajectories import PAIRS_PRESETS, PairsConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.999)


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    kind: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=Inner)
    steps: tuple[int, ...] = (1, 2)
    limit: int | None = None
    where: Path = Path("runs")
    fast: bool = False


SAVED = Path(__file__).parent / "data" / "saved" / "training_configs.json"  # of 26 November 2026


@pytest.mark.parametrize(
    ("recipe", "kind", "presets"),
    [
        ("ode_pairs", PairsConfig, PAIRS_PRESETS),
        ("ode_init", InitConfig, INIT_PRESETS),
        ("re_dmd", DistilConfig, PRESETS),
    ],
)
def test_configs_of_runs_that_were_begun_before_open_as_what_they_were(recipe, kind, presets):
    saved = json.loads(SAVED.read_text(encoding="utf-8"))[recipe]
    assert from_json(kind, json.dumps(saved)) == presets["wan"]()


def test_a_config_survives_json():
    config = ReDMDConfig(
        weights=WeightConfig(beta=0.5, baseline="batch", limit=2.0),
        cache=CacheConfig(decay=0.9, accumulator="float32"),
        window_chunks=3,
    )
    assert from_json(ReDMDConfig, to_json(config)) == config
    outer = Outer(name="x", limit=3, steps=(4,), where=Path("here"), fast=True)
    assert from_json(Outer, to_json(outer)) == outer


def test_settings_of_a_command_line_change_single_fields():
    config = apply_overrides(
        Outer(name="x"),
        ["inner.rate=2e-6", "kind=b", "steps=[5, 6, 7]", "limit=9", "fast=true", "name=plain text"],
    )
    assert config == Outer(
        name="plain text", kind="b", inner=Inner(rate=2e-6), steps=(5, 6, 7), limit=9, fast=True
    )
    assert apply_overrides(config, ["limit=null"]).limit is None
    assert apply_overrides(config, ["inner.rate=1"]).inner.rate == 1.0


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"name": "x", "stepz": [1]}, "no field stepz; did you mean steps"),
        ({"name": "x", "inner": {"rate": "fast"}}, "config.inner.rate is 'fast'; give a value of"),
        ({"name": "x", "inner": {"betas": [0.1]}}, "config.inner.betas has 1 values; give 2"),
        ({"name": "x", "inner": 3}, "config.inner is 3; give the fields of Inner"),
        ({"name": "x", "kind": "c"}, "choose one of 'a', 'b'"),
        ({"name": "x", "steps": 4}, "give a list"),
        ({"name": "x", "steps": [1, "two"]}, r"config.steps\[1\] is 'two'"),
        ({"name": "x", "fast": 1}, "config.fast is 1; give a value of type bool"),
        ({"name": "x", "limit": True}, "config.limit is True"),
        ({}, "name"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(data, said):
    with pytest.raises(ValueError, match=said):
        from_dict(Outer, data)


def test_impossible_values_are_refused_where_they_stand():
    with pytest.raises(ValueError, match=r"config\.weights: beta is -1"):
        apply_overrides(ReDMDConfig(), ["weights.beta=-1"])
    with pytest.raises(ValueError, match="no group of fields weight"):
        apply_overrides(ReDMDConfig(), ["weight.beta=1"])
    with pytest.raises(ValueError, match=r"field\.name=value"):
        apply_overrides(ReDMDConfig(), ["beta"])
    with pytest.raises(ValueError, match="not JSON"):
        from_json(ReDMDConfig, "{")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "1" * 5000, "{", "[]", "null", '{"run": []}', "\xff"]
)
def test_a_config_from_somebody_else_is_refused_in_a_sentence_that_names_it(tmp_path, text):
    (tmp_path / CONFIG).write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError) as caught:
        read_config(DistilConfig, tmp_path)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / CONFIG}: ")


@pytest.mark.parametrize("line", ["[" * 100_000, "1" * 5000, "[]", "{}", '{"update": []}', "\xff"])
def test_a_journal_s_line_that_is_none_is_left_out(tmp_path, line):
    lines = ['{"update": 0, "loss": 1.0}', line, '{"update": 1, "loss": 0.5}']
    (tmp_path / "log.jsonl").write_bytes("\n".join(lines).encode("latin1"))
    assert [each["update"] for each in read_journal(tmp_path / "log.jsonl")] == [0, 1]
