"""A run trains its student at the steps and through the window that the student's file has."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from rf_core.config import CacheConfig, SamplerConfig
from rf_core.options import DEMO
from rf_core.weights.checkpoint import load_student, write_checkpoint
from tests import tiny
from training.__main__ import _config, _parser, main
from training.run.config import apply_overrides, to_json
from training.stages.recipes import miniature
from training.stages.schedule import notes_on_schedule, schedule_of, with_schedule_of_student

OTHER = SamplerConfig(steps=(1000, 500), shift=8.0)
WINDOW = CacheConfig(window_frames=6, sink_frames=0, decay=0.5)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "ode_init.safetensors"
    model, found = load_student(DEMO / "student.safetensors", device="cpu", dtype=torch.float32)
    write_checkpoint(path, model.state_dict(), found.config, WINDOW, OTHER, size=(64, 64))
    return path


def read(*arguments: str):
    return _config(_parser().parse_args(["re_dmd", "--device", "cpu", *arguments]))


def test_a_run_from_a_preset_takes_the_steps_and_the_window_of_its_student(student, tmp_path):
    config, notes = read("--out", str(tmp_path / "run"), "--set", f"files.student={student}")
    redmd = config.run.redmd
    assert redmd.sampler == OTHER and redmd.cache.window_frames == 6
    # How the sink is kept is the run's.
    assert redmd.cache.sink_frames == 0 and redmd.cache.decay == 0.999
    assert redmd.cache.accumulator == "float32"
    assert f"sampler.shift is 8.0, as {student} says" in notes
    assert not any("warning" in each for each in notes)


def test_what_is_set_is_trained_and_said(student, tmp_path):
    settings = [f"files.student={student}", "run.redmd.sampler.shift=3", "run.redmd.cache.decay=1"]
    config, notes = read("--out", str(tmp_path / "run"), *(f"--set={each}" for each in settings))
    assert config.run.redmd.sampler == replace(OTHER, shift=3.0)
    assert (
        f"warning: {student} was made for sampler.shift 8.0; this run trains it at 3.0, as it is "
        "told" in notes
    )
    _, notes = read("--out", str(tmp_path / "run"), "--sink", "none")
    assert [each for each in notes if "sink_frames 3; this run trains it at 0" in each]


def test_a_config_file_is_taken_as_it_stands_and_what_differs_is_said(student, tmp_path):
    path, config = tmp_path / "c.json", apply_overrides(miniature(), [f"files.student={student}"])
    path.write_text(to_json(config))
    found, notes = read("--out", str(tmp_path / "run"), "--config", str(path))
    assert found == config and len([each for each in notes if "warning" in each]) == 4


def test_a_student_of_the_presets_own_schedule_and_one_that_has_none_say_nothing(tmp_path):
    assert read("--out", str(tmp_path / "run"))[1] == []
    config = replace(
        miniature(), files=replace(miniature().files, student=DEMO / "teacher.safetensors")
    )
    assert with_schedule_of_student(config) == config
    assert notes_on_schedule(schedule_of(config), DEMO / "teacher.safetensors") == []


def test_a_window_that_the_runs_latents_do_not_fit_is_named_with_its_file(tmp_path, capsys):
    path = tmp_path / "five.safetensors"
    model, found = load_student(DEMO / "student.safetensors", device="cpu", dtype=torch.float32)
    write_checkpoint(path, model.state_dict(), found.config, tiny.window(8, 0, chunk=4), OTHER)
    command = ["re_dmd", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main([*command, "--set", f"files.student={path}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} streams through") and "15" in error


def test_the_run_prints_what_it_took(student, tmp_path, capsys):
    settings = ("run.updates=1", "run.critic_ratio=1", "run.redmd.batch=2", "run.micro_batch=2")
    more = ("run.latents=[16,6,8,8]", "data.limit=2", "output.validate_every=0", "reward.kind=none")
    on = [f"--set={each}" for each in (*settings, *more, f"files.student={student}")]
    out = tmp_path / "run"
    assert main(["re_dmd", "--device", "cpu", "--out", str(out), *on]) == 0
    assert f"sampler.steps is (1000, 500), as {student} says" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    sampler = config["run"]["redmd"]["sampler"]
    assert (sampler["steps"], sampler["shift"]) == ([1000, 500], 8.0)
    # A run that goes on is what it was.
    again = ["--out", str(out), "--resume", "--set=run.updates=2"]
    assert read(*again)[0].run.redmd.sampler == OTHER
