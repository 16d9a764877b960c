"""The study of the claims: its arms and plan, what is run and stopped, and what is made of it."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rf_core.options import DEMO
from training.__main__ import main
from training.claims.arms import ARMS, STARTS, STUDIES, chosen_arms
from training.claims.plan import TRUE, Item, Setting, plan, reference_name, result_name
from training.claims.plots import GAIN, LOSS, NULL, pictures
from training.claims.report import report
from training.claims.results import (
    change,
    code_digest,
    difference,
    estimate,
    read_results,
    write_results,
)
from training.claims.rows import (
    REWARD_ROWS,
    SERIES,
    SINK_ROWS,
    collapse,
    curve,
    identity,
    speeds,
    windows_of,
)
from training.claims.runs import Runner
from training.claims.workers import log_path, run_items
from training.run.folder import checkpoints

ROOT = Path(__file__).parents[1]
DMD = ARMS["rewards: DMD, from student"]
PUBLISHED = ARMS["rewards: Re-DMD, as published, from student"]
SINK = ARMS["sinks: EMA 0.999, from student"]
TINY = ("--size", "tiny", "--start", "student")


def setting(folder: Path, **options) -> Setting:
    return Setting(out=folder / "out", runs=folder / "runs", size="tiny", **options)


def test_arms_of_a_start_are_runs_that_differ_and_evict_from_the_window(tmp_path):
    where = replace(setting(tmp_path), size="full")
    for study in STUDIES:
        for start in STARTS:
            arms = [arm for arm in ARMS.values() if (arm.study, arm.start) == (study, start)]
            configs = [where.arm_config(arm, 0) for arm in arms]
            assert len({repr(config) for config in configs}) == len(arms)
            for config in configs:
                assert config.run.latents[1] > config.run.redmd.cache.window_frames


def test_an_arm_is_compared_with_one_of_its_study_and_start():
    for arm in ARMS.values():
        if arm.against is not None:
            base = ARMS[f"{arm.study}: {arm.against}, from {arm.start}"]
            assert base.against is None
    assert all(any(arm.against for arm in ARMS.values() if arm.study == "sinks") for _ in STUDIES)


def test_sinks_share_a_window_and_so_a_cost(tmp_path):
    caches = [
        setting(tmp_path).arm_config(arm, 0).run.redmd.cache
        for arm in ARMS.values()
        if arm.study == "sinks"
    ]
    assert len(caches) == 10 and {cache.window_frames for cache in caches} == {9}
    assert {cache.accumulator for cache in caches} == {"float32"}
    assert any(cache.anchor_frames and cache.sink_frames and cache.decay < 1 for cache in caches)
    assert any(cache.memory_rates for cache in caches)


def test_the_plan_goes_by_what_decides():
    items = plan(list(ARMS.values()), seeds=2)
    names = [item.name for item in items]
    assert len(set(names)) == len(names)
    runs = [item for item in items if item.arm is not None]
    assert [item.kind for item in items][:4] == ["true", "decoded", "teacher", "unguided"]
    order = [(item.seed, not item.arm.first) for item in runs]
    assert order == sorted(order)
    firsts = {item.arm.start for item in runs if item.arm.name == DMD.name and item.seed == 0}
    assert firsts == {arm.start for arm in ARMS.values() if arm.study == "rewards"}
    for item in items:
        if item.needs is not None:
            assert names.index(item.needs) < names.index(item.name)


def test_no_arm_of_a_study_and_a_name_is_told():
    assert chosen_arms(["sinks"], ["static"])[0].settings
    with pytest.raises(ValueError, match="no arm is of all of --study 'sinks' --arm 'DMD'"):
        chosen_arms(["sinks"], ["DMD"])


def test_the_plan_says_what_is_there_and_what_is_to_come(tmp_path, capsys):
    where = setting(tmp_path)
    where.out.mkdir()
    name = result_name(DMD, 0)
    about = {"study": "rewards", "kind": "arm", "seconds": 120.0, "seconds_an_update": 2.5}
    write_results(where, {name: about})
    command = ["claims", "--out", str(where.out), "--runs", str(where.runs), *TINY, "--plan"]
    assert main([*command, "--study", "rewards"]) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if name in line]
    assert " T " in line and "120 s" in line and DMD.decides in line
    others = len(chosen_arms(["rewards"], starts=["student"])) - 1
    assert "2.50 s an update" in said and f"{2 * others} minutes for {others} of them" in said
    assert not where.runs.exists()


def test_networks_that_are_not_there_are_named(tmp_path, capsys):
    command = ["claims", "--out", str(tmp_path / "out"), "--networks", str(tmp_path)]
    assert main(command) == 1
    assert "which has no vae.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_results_of_another_setting_are_refused(tmp_path):
    where = setting(tmp_path)
    where.out.mkdir()
    write_results(where, {})
    assert read_results(where) == {}
    with pytest.raises(ValueError, match="choose another --out"):
        read_results(replace(where, size="full"))
    others = tmp_path / "elsewhere" / where.networks.name
    shutil.copytree(where.networks, others)
    path = others / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    other = replace(where, networks=others)
    with pytest.raises(ValueError, match="choose another --out"):
        read_results(other)
    assert other.start_path(STARTS["early init, guidance 3"]) != where.start_path(
        STARTS["early init, guidance 3"]
    )


@pytest.mark.slow
def test_what_fails_is_told_and_ends_no_other(tmp_path):
    where, made = setting(tmp_path), "early init, guidance 3"
    broken = replace(DMD, settings=("run.nonsense=1",))
    items = [
        Item(name="broken", decides="", kind="arm", start="student", arm=broken),
        Item(name="waits", decides="", kind="start", study="sinks", start=made),
        Item(name="whole", decides="", kind="true", study="sinks"),
    ]
    outcomes = {each.item.name: each for each in run_items(items, set(), where, 1, lambda: False)}
    assert set(outcomes) == {"broken", "whole"}
    assert "config.run has no field nonsense" in outcomes["broken"].error
    assert "Traceback" in log_path(where, items[0]).read_text()
    (video,) = outcomes["whole"].result["lasting"]
    assert video["right"] == [1.0] * 3 and len(video["looks"]) == 3


def strip() -> str:
    file = io.BytesIO()
    Image.new("RGB", (8, 4), "#123456").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def rewards(speeds, seed=None, flow=0.5):
    """A result of videos of those speeds."""
    names = ("first_frame_copy", "flicker", "softness", "area_error", "right")
    videos = [{"speed_along": s, "flow": flow} | dict.fromkeys(names, 0.5) for s in speeds]
    curve = {"0": videos, "40": [v | {"speed_along": v["speed_along"] - 0.3} for v in videos]}
    found = {"free": videos, "named": videos, "two": videos, "curve": curve}
    return found if seed is None else found | {"seed": seed, "strip": strip()}


def test_an_interval_holds_the_mean_and_narrows_with_prompts():
    rng = np.random.default_rng(0)
    few, many = (estimate(rng.normal(1.0, 0.5, (2, count))) for count in (8, 200))
    assert few.low < few.mean < few.high and 0.9 < many.mean < 1.1
    assert many.high - many.low < few.high - few.low
    assert not many.is_null and estimate(np.array([[-1.0, 1.0, 0.5, -0.5]])).is_null
    assert estimate(np.array([[np.nan, 2.0, 2.0]])).mean == 2.0


def test_differences_are_of_the_same_seed_and_prompt():
    results = {
        result_name(DMD, 0): rewards([0.2, 0.9], 0),
        result_name(DMD, 2): rewards([0.0, 0.0], 2),
        result_name(PUBLISHED, 0): rewards([0.3, 1.0], 0),
        result_name(PUBLISHED, 1): rewards([9.0, 9.0], 1),  # without a pair
    }
    found = difference(results, PUBLISHED, REWARD_ROWS["speed"])
    assert found.mean == pytest.approx(0.1) and found.low == pytest.approx(0.1)
    assert difference(results, DMD, REWARD_ROWS["speed"]) is None
    null = difference(results, PUBLISHED, REWARD_ROWS["flow"])
    assert null.is_null and null.signed.endswith("]")  # one seed excludes nothing


def test_speeds_that_are_all_alike_have_no_spread():
    spread = REWARD_ROWS["spread of speed"]
    assert spread(rewards([0.3, 0.9])) == pytest.approx([0.3, 0.3])
    assert spread(rewards([0.6, 0.6])) == pytest.approx([0.0, 0.0])
    failed = spread(rewards([0.3, 0.9, 0.0, -1.0]))
    assert failed[:2] == pytest.approx([0.3, 0.3]) and failed[2:] == [None, None]
    assert spread(rewards([0.0])) == [None]


def test_what_fails_is_not_taken_for_slow():
    moving = REWARD_ROWS["speed of what moves"]
    assert moving(rewards([0.3, 0.0, -1.0])) == [0.3, None, None]
    results = {
        result_name(DMD, 0): rewards([0.3, 0.5, 0.7], 0),
        result_name(PUBLISHED, 0): rewards([0.4, 0.6, 0.0], 0),  # faster, but for what fails
    }
    assert difference(results, PUBLISHED, moving).mean == pytest.approx(0.1)
    assert difference(results, PUBLISHED, REWARD_ROWS["speed"]).mean < 0
    marked = report(results, 2).split("| Re-DMD, as published less DMD |")[1].splitlines()[0]
    assert [" *" in cell for cell in marked.split("|")][:4] == [True, True, False, False]


def test_an_arm_that_is_compared_with_none_is_compared_with_what_it_began_as():
    results = {
        reference_name("rewards", "student"): rewards([0.3, 0.9]),
        result_name(DMD, 0): rewards([0.5, 0.9], 0),
    }
    assert change(results, DMD, REWARD_ROWS["speed"]).mean == pytest.approx(0.1)
    assert "| DMD less before | +0.100" in report(results, 2)
    assert change({}, DMD, REWARD_ROWS["speed"]) is None


def test_a_null_excludes_an_effect_only_where_seeds_and_videos_differ():
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.1, (3, 24))
    found = estimate(noise - noise.mean())
    assert found.is_null and float(found.signed.partition("< ")[2]) >= found.high
    assert "<" not in estimate((noise - noise.mean())[:1]).signed
    assert "<" not in estimate(np.zeros((3, 24))).signed
    assert estimate(np.full((2, 4), np.nan)).signed == ""


@pytest.mark.parametrize("seed_std", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("shape", [(2, 16), (3, 72)])
def test_intervals_hold_the_truth_as_often_as_they_say(seed_std, shape):
    rng = np.random.default_rng(0)
    seeds, prompts = shape
    held = 0
    for _ in range(400):
        values = rng.normal(0, seed_std, (seeds, 1)) + rng.normal(0, 0.05, (1, prompts))
        held += estimate(values + rng.normal(0, 0.05, shape)).is_null
    assert held >= 0.93 * 400


def test_a_switch_that_is_never_followed_counts_with_all_that_was_waited():
    result = {"switched": [{"delay": 10, "images": 240}, {"delay": None, "images": 240}]}
    assert SINK_ROWS["images to a switch"](result) == [10, 240]
    assert SINK_ROWS["switches followed"](result) == [1.0, 0.0]


def test_a_curve_is_of_what_all_seeds_have():
    point = [{"speed_along": 0.5}]
    curves = [{"curve": dict.fromkeys(keys, point)} for keys in (("0", "4"), ("0", "3", "4"))]
    assert curve(curves, speeds) == [(0, 0.5), (4, 0.5)]


def test_results_of_two_states_of_the_code_are_told():
    made = {name: {"code": name} for name in ("a", "b")}
    assert "2 states of the code: a, b" in report(made, 2)


def drawn(image) -> set[str]:
    return {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in image.getcolors(2**24)}


def test_a_gain_a_loss_and_a_null_are_told_apart_at_sight():
    base, flows = rewards([0.5] * 4, 0), {"gain": 0.9, "loss": 0.1, "null": 0.5}
    for kind, colour in (("gain", GAIN), ("loss", LOSS), ("null", NULL)):
        other = rewards([0.5] * 4, 0, flow=flows[kind])
        found = pictures({result_name(DMD, 0): base, result_name(PUBLISHED, 0): other})
        assert "boundary.png" in found and "sinks.png" not in found
        shown = drawn(found["rewards.png"]) & {GAIN, LOSS}
        assert shown == {colour} - {NULL}


def lasting(occluded=()):
    """A long video whose backdrop goes red, and which ends in nothing."""
    looks = [
        {
            "start_image": 48 * index,
            "backdrop": [0.2 + 0.02 * index, 0.2, 0.2],
            "jumps": 0,
            "things": [{"colour": "red", "shape": "circle", "shade": 1.0, "size": 16 - index}]
            if index < 4
            else [],
        }
        for index in range(5)
    ]
    occlusions = [{"latent_frames": frames, "same": same} for frames, same in occluded]
    found = {"right": [1.0, 1.0, 0.5, 0.5, 0.0], "speed": [0.5] * 5}
    found |= {"copy": [0.9, 0.5, 0.4, 0.3, 0.3]}
    return {"lasting": [found | {"looks": looks, "occlusions": occlusions}]}


def test_drift_goes_by_the_first_window():
    result = lasting([(2.5, True), (9, False), (9.5, True), (20, False)])
    away = 0.02 * np.arange(5)
    assert windows_of(result, SERIES["backdrop's brightness"])[0] == pytest.approx(away)
    tint = away * (2 / 3) ** 0.5
    assert windows_of(result, SERIES["backdrop's tint"])[0] == pytest.approx(tint)
    size = windows_of(result, SERIES["size"])[0]
    assert size[3] == pytest.approx(3 / 16) and np.isnan(size[4])
    assert windows_of(result, SERIES["thing lost"]).tolist() == [[0, 0, 0, 0, 1]]
    assert identity([result]) == [(1, 1), (0, 0), (0, 0), (1, 3)]
    assert SINK_ROWS["same, hidden for less than 6"](result) == [1.0]
    assert SINK_ROWS["same, hidden for longer"](result) == [pytest.approx(1 / 3)]
    assert collapse(result) == [48]
    results = {
        reference_name("sinks", TRUE): lasting(),
        result_name(SINK, 0): result | {"seed": 0, "switched": []},
    }
    assert "1 of 1: 48" in report(results, 2) and "1 of 3" in report(results, 2)
    assert pictures(results | {result_name(SINK, 0): result | {"seed": 0, "strip": strip()}})[
        "sinks.png"
    ]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Two sinks by the command, in a process of its own on a machine without PyAV."""
    folder = tmp_path_factory.mktemp("claims")
    (folder / "av.py").write_text("raise ImportError('there is no PyAV')")
    command = [sys.executable, "-m", "training", "claims", "--out", str(folder / "out"), *TINY]
    command += [
        "--runs",
        str(folder / "runs"),
        "--jobs",
        "2",
        "--arm",
        SINK.name,
        "--arm",
        DMD.name,
    ]
    paths = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return folder, done.stdout


@pytest.mark.slow
def test_the_whole_command_is_rehearsed_in_a_few_files(rehearsed):
    folder, said = rehearsed
    names = {path.name for path in (folder / "out").iterdir()}
    plots = {"rewards.png", "speeds.png", "sinks.png", "swaps.png", "boundary.png", "strips.png"}
    assert names <= {"results.json", "report.md", *plots} and "sinks.png" in names
    assert "11 of 11 to run" in said and "results of 11" in (folder / "out/report.md").read_text()
    results = read_results(setting(folder))
    found = results[result_name(DMD, 0)]
    assert sorted(found["curve"], key=int) == ["0", "1", "2"] and found["free"][0]["flow"] > 0
    assert found["training"]["generator_loss"]["mean"] > 0 and found["code"] == code_digest()
    assert found["config"]["run"]["redmd"]["batch"] == 2
    assert results[reference_name("rewards", TRUE)]["free"][0]["right"] == 1.0
    assert len(results[result_name(SINK, 0)]["lasting"][0]["looks"]) == 3
    assert results[result_name(SINK, 0)]["switched"][0]["after"]
    assert not checkpoints(setting(folder).folder(result_name(DMD, 0)))


@pytest.mark.slow
def test_what_is_stopped_goes_on_to_the_same_result(rehearsed, tmp_path):
    folder, _ = rehearsed
    where = setting(tmp_path)
    name = result_name(SINK, 0)
    (item,) = [item for item in plan([SINK], 1) if item.name == name]
    run = where.folder(name)
    (stopped,) = run_items([item], set(), where, 1, lambda: bool(checkpoints(run)))
    assert stopped.result is None and stopped.error is None
    (whole,) = run_items([item], set(), where, 1, lambda: False)
    taken = {"seconds", "seconds_an_update"}
    wanted = json.loads((folder / "out/results.json").read_text())[name]
    for each in (wanted, whole.result):
        assert each["config"]["files"]["teacher"] == str(DEMO / "teacher.safetensors")
    assert {k: v for k, v in json.loads(json.dumps(whole.result)).items() if k not in taken} == {
        k: v for k, v in wanted.items() if k not in taken
    }


@pytest.mark.slow
def test_a_start_is_made_before_what_needs_it_and_once(tmp_path):
    where, start = setting(tmp_path), "early init, guidance 3"
    items = [
        Item(name="waits", decides="", kind="start", study="sinks", start=start),
        Item(name=f"make {start}", decides="", kind="make", start=start),
    ]
    outcomes = list(run_items(items, set(), where, 2, lambda: False))
    assert [each.item.name for each in outcomes] == [f"make {start}", "waits"]
    assert outcomes[1].result["lasting"][0]["looks"]
    path = where.start_path(STARTS[start])
    made = path.read_bytes()
    again = Runner(replace(where, out=tmp_path / "elsewhere")).run(items[1])
    assert path.read_bytes() == made and again["config"] == outcomes[0].result["config"]


@pytest.mark.slow
def test_a_sink_is_also_tried_on_a_student_that_was_not_trained_with_it(tmp_path):
    arms = chosen_arms(["swaps"])
    assert [arm.name for arm in arms] == [arm.name for arm in chosen_arms(["sinks"])]
    assert [item.name for item in plan(arms, 3)] == [result_name(arm, 0) for arm in arms]
    where = setting(tmp_path)
    results = {
        item.name: Runner(where).run(item)
        for item in plan([arm for arm in arms if arm.name in ("no sink", "EMA 0.999")], 1)
    }
    kept, none = (results[result_name(arm, 0)]["lasting"] for arm in arms[:2])
    assert kept != none and not where.runs.exists()
    assert "was not trained with" in report(results, 2) and "swaps.png" in pictures(results)


@pytest.mark.slow
def test_no_time_is_a_report_of_what_is_there(tmp_path, capsys):
    command = ["claims", "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"), *TINY]
    assert main([*command, "--minutes", "0", "--arm", DMD.name]) == 0
    assert "0 results of 6" in (tmp_path / "out/report.md").read_text()
