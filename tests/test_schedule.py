"""A run trains its student at the steps and through the window that the student's file has."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from test_families import bundle

from rf_core.config import CacheConfig, SamplerConfig
from rf_core.families import FAMILIES
from rf_core.options import DEMO
from rf_core.stream import Stream
from rf_core.weights.checkpoint import load_student, read_checkpoint, write_checkpoint
from tests import tiny
from training.__main__ import _config, _parser, main
from training.run.config import apply_overrides, to_json
from training.stages.recipes import FilesConfig, miniature
from training.stages.regression import InitConfig
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


# Students of other families

ROLLED_OUT = [name for name in FAMILIES if name not in ("krea", "rolling_forcing")]
SHORT = ("run.updates=1", "run.critic_ratio=1", "run.redmd.batch=2", "run.micro_batch=2")
SHORT += ("run.latents=[16,6,8,8]", "data.limit=2", "output.validation_prompts=1")
SHORT += ("output.validate_every=1", "output.validation_chunks=2", "output.tensorboard=false")


def named(path, name: str):
    """The demo's student as one that streams by a family's preset and says so."""
    model, found = load_student(DEMO / "student.safetensors", device="cpu", dtype=torch.float32)
    preset = FAMILIES[name]
    weights = model.state_dict()
    write_checkpoint(path, weights, found.config, preset.cache, preset.sampler, family=name)
    return path


@pytest.mark.parametrize("name", ROLLED_OUT)
def test_a_run_takes_all_of_its_student_s_family_but_what_is_set(tmp_path, name):
    path, preset = named(tmp_path / "student.safetensors", name), FAMILIES[name]
    command = ["--out", str(tmp_path / "run"), "--set", f"files.student={path}"]
    config, notes = read(*command)
    cache = replace(preset.cache, accumulator="float32")  # the run's own
    assert (config.run.redmd.cache, config.run.redmd.sampler) == (cache, preset.sampler)
    assert not any("warning" in each for each in notes)
    frames = config.run.redmd.window_chunks * cache.chunk_frames
    assert frames == 21  # as teacher and critic see in the preset
    config, _ = read(*command, "--set", "run.redmd.cache.decay=0.9")
    assert config.run.redmd.cache == replace(cache, decay=0.9)


def test_a_family_that_is_named_stands_for_a_file_that_does_not_tell_in_one_line(tmp_path):
    command = ["--out", str(tmp_path / "run"), "--set", "files.family=longlive"]
    config, notes = read(*command)
    assert config.run.redmd.cache == replace(FAMILIES["longlive"].cache, accumulator="float32")
    (line,) = notes
    student = DEMO / "student.safetensors"
    assert line.startswith(f"{student} is LongLive's, as chosen (files.family), so the run has")
    for part in ("cache.window_frames 12", "cache.positions absolute", "cache.decay 1.0"):
        assert part in line


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("self_forcing_dmd.pt", "is Self-Forcing's, by its file's name alone; .* cache.window_fra"),
        ("renamed.pt", "is taken for Reward Forcing's, as no key and no name in it tells it from"),
    ],
)
def test_what_is_assumed_of_a_file_without_metadata_is_said(tmp_path, file, said):
    path = bundle(tmp_path / file, "model.", "generator_ema")
    config, notes = read("--out", str(tmp_path / "run"), "--set", f"files.student={path}")
    (line,) = notes
    assert re.search(said, line) and "(files.family)" in line
    window = 21 if "self" in file else miniature().run.redmd.cache.window_frames
    assert config.run.redmd.cache.window_frames == window


def test_a_family_that_is_none_is_refused_by_its_name(tmp_path):
    said = "family is 'wan'; choose one of auto, reward_forcing, "
    with pytest.raises(ValueError, match=said):
        FilesConfig(family="wan")
    with pytest.raises(ValueError, match=said):
        InitConfig(family="wan")
    with pytest.raises(ValueError, match=f"config.files: {said}"):
        read("--out", str(tmp_path / "run"), "--set", "files.family=wan")


@pytest.mark.parametrize(
    ("name", "field"),
    [("krea", "cache.rebuild is 'reencoded'"), ("rolling_forcing", "sampler.rolling is on")],
)
def test_a_student_that_cannot_be_rolled_out_is_refused_by_the_field(tmp_path, capsys, name, field):
    path = named(tmp_path / "student.safetensors", name)
    command = ["re_dmd", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main([*command, "--set", f"files.student={path}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} streams through") and field in error
    settings = {"krea": "run.redmd.cache.rebuild=never"}
    settings["rolling_forcing"] = "run.redmd.sampler.rolling=false"
    config, notes = read(*command[3:], "--set", f"files.student={path}", "--set", settings[name])
    assert config.run.redmd.cache.rebuild == "never"
    assert any("warning" in each for each in notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROLLED_OUT[1:])
def test_a_distilled_student_of_a_family_streams_as_it_was_trained(tmp_path, name):
    path, out = named(tmp_path / "student.safetensors", name), tmp_path / "run"
    on = [f"--set={each}" for each in (*SHORT, f"files.student={path}")]
    assert main(["re_dmd", "--device", "cpu", "--out", str(out), *on]) == 0
    exported = tmp_path / "exported.safetensors"
    assert main(["export", str(out), str(exported), "--dtype", "float32"]) == 0
    for file in (out / "student.safetensors", exported):
        model, found = load_student(file, device="cpu", dtype=torch.float32)
        assert (found.family, found.family_from) == (name, "metadata")
        preset = FAMILIES[name]
        assert found.cache == replace(preset.cache, accumulator="float32")
        assert found.sampler == preset.sampler and found.size == (64, 64)
        stream = Stream(
            model,
            torch.zeros(1, 1, found.config.text_dim),
            height=64,
            width=64,
            cache=found.cache,
            sampler=found.sampler,
        )
        assert stream.step().latents.isfinite().all()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    settings = ("clips=2", "shard=2", "batch=2", "steps=2", "kind=clips", "latents=[16,6,8,8]")
    on = [f"--set={each}" for each in settings]
    assert main(["ode_pairs", "--device", "cpu", "--out", str(folder), *on]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["longlive", "causal_forcing_frame"])
def test_the_regression_begins_with_a_student_of_a_family_and_keeps_its_window(
    tmp_path, pairs, capsys, name
):
    path, out = named(tmp_path / "start.safetensors", name), tmp_path / "run"
    settings = ("updates=1", "batch=2", "micro_batch=2", "validate_every=0", f"start={path}")
    on = [f"--set={each}" for each in (*settings, "tensorboard=false")]
    command = ["ode_init", "--device", "cpu", "--out", str(out), "--pairs", str(pairs), *on]
    assert main(command) == 0
    assert (
        f"cache.window_frames is {FAMILIES[name].cache.window_frames}, as"
        in capsys.readouterr().out
    )
    found = read_checkpoint(out / "student.safetensors")
    assert (found.cache, found.family) == (FAMILIES[name].cache, name)
