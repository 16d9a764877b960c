"""The card's command: stages that end, stages that do not, and what a user reads of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rf_core import kernels
from rf_core.__main__ import main
from rf_core.measure.card import runner, table
from rf_core.measure.card.plan import STAGES, Setting, Stage, chosen
from rf_core.measure.card.record import Record, checks_of, read_json
from rf_core.measure.card.stages import kernels as kernel_stage
from rf_core.measure.card.stages import tests as suite_stage

ROOT = Path(__file__).parents[1]
TINY = Setting(size="tiny")
PRELUDE = """
import os, subprocess, sys, time
from pathlib import Path
from rf_core.measure.card.record import Record
record = Record(Path(sys.argv[1]))
"""


def script(monkeypatch, **bodies: str) -> list[Stage]:
    """Stages that run these lines in place of measurements; each has two seconds."""

    def command(stage: Stage, setting: Setting, path: Path) -> list[str]:
        return [sys.executable, "-c", PRELUDE + bodies[stage.name], str(path)]

    monkeypatch.setattr(runner, "_command", command)
    return [Stage(name=name, cap=2, shows="") for name in bodies]


def run(stages, out: Path, deadline: float = 60) -> tuple[int, dict]:
    code = runner.run(stages, TINY, out, deadline=deadline)
    return code, json.loads((out / "card.json").read_text())["stages"]


def test_the_runner_imports_no_torch():
    code = (
        "import sys, rf_core.__main__, rf_core.measure.card.runner; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_a_stage_past_its_cap_is_ended_with_all_it_started(monkeypatch, tmp_path):
    beat = tmp_path / "beat"
    stages = script(
        monkeypatch,
        slow="""
beat = "import pathlib, time\\nwhile True: pathlib.Path('OUT').touch(); time.sleep(0.05)"
subprocess.Popen([sys.executable, "-c", beat])
record.check("a thing", 0.5, 1)
time.sleep(60)
""".replace("OUT", str(beat)),
        after="record.end()",
    )
    code, found = run(stages, tmp_path)
    assert code == 1 and found["slow"]["killed_after"] == 2
    assert found["after"]["ended"] and not found["after"].get("killed_after")
    last = beat.stat().st_mtime_ns
    time.sleep(0.3)
    assert beat.stat().st_mtime_ns == last
    text = (tmp_path / "table.txt").read_text()
    assert "right: 1 checks, the nearest a thing 0.5 (limit 1); stopped at its cap of 2 s" in text


def test_what_breaks_is_named_and_the_next_stage_runs(monkeypatch, tmp_path):
    stages = script(
        monkeypatch,
        broken="record.note('seen', 1); raise SystemExit(3)",
        wrong="record.check('flow', 0.3, 0.05); record.end()",
        absent="record.end('the package x is not installed')",
    )
    code, found = run(stages, tmp_path)
    assert code == 0  # each ended by itself
    assert found["broken"]["measured"] == {"seen": 1}
    assert table.stage_verdict(found["broken"]) == "FAILED: its process ended with code 3"
    assert table.stage_verdict(found["wrong"]) == "WRONG: flow 0.3 (limit 0.05)"
    assert table.stage_verdict(found["absent"]) == "not run: the package x is not installed"


def test_a_stage_that_cannot_start_in_time_is_named(monkeypatch, tmp_path):
    stages = script(monkeypatch, first="time.sleep(60)", second="record.end()")
    code, found = run(stages, tmp_path, deadline=0.5)
    assert code == 1 and found["first"]["killed_after"] == pytest.approx(0.5, abs=0.1)
    assert table.stage_verdict(found["second"]) == "not run: the time was up before it"


def test_what_was_found_is_on_disk_before_the_stage_has_ended(monkeypatch, tmp_path):
    seen = {}
    stages = script(monkeypatch, long="record.note('a', 1); time.sleep(60)")
    clock = time.sleep

    def look(seconds: float) -> None:
        clock(seconds)
        if (tmp_path / "card.json").exists():
            seen.update(json.loads((tmp_path / "card.json").read_text())["stages"])

    monkeypatch.setattr(runner.time, "sleep", look)
    run(stages, tmp_path)
    assert seen["long"]["measured"] == {"a": 1} and "seconds" not in seen["long"]


def test_ctrl_c_leaves_what_was_found(monkeypatch, tmp_path):
    stages = script(monkeypatch, one="record.end()", two="time.sleep(60)", three="record.end()")
    clock = time.sleep

    def press(seconds: float) -> None:
        clock(seconds)
        if "one" in json.loads((tmp_path / "card.json").read_text())["stages"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(runner.time, "sleep", press)
    code, found = run(stages, tmp_path)
    assert code == 130 and list(found) == ["one"]
    assert "three" in (tmp_path / "table.txt").read_text()


def test_a_number_that_is_none_is_wrong_and_stays_json(tmp_path):
    record = Record(tmp_path / "a.json")
    assert not record.check("flow", float("nan"), 0.1)
    assert not record.check("images", float("inf"), 0.1)
    record.note("seconds", {"p50": float("nan"), "count": 3})
    found = read_json(tmp_path / "a.json")
    assert [check.right for check in checks_of(found)] == [False, False]
    assert "WRONG: flow nan" in table.stage_verdict(found)
    assert found["measured"]["seconds"] == {"p50": "nan", "count": 3}


def test_the_table_has_at_most_a_hundred_lines_however_much_goes_wrong():
    wrong = [{"what": f"check {n} " + "x" * 200, "error": 1, "limit": 0} for n in range(40)]
    said = ["y" * 300] * 40
    found = {"checks": wrong, "said": said, "seconds": 3.0, "measured": {}, "ended": True}
    row = {"queries": 4680, "keys": 14040, "problem": "no kernel " * 40, "error": None}
    attention = {**found, "measured": {"rows": [{**row, "backend": f"b{n}"} for n in range(9)]}}
    gpu = {"clocks.sm": "1875", "clocks.max.sm": "1980", "power.draw": "648", "power.limit": "700"}
    text = "w" * 300
    machine = {"device": text, "cpu": text, "threads": 2, "gpu": gpu, "versions": {"torch": text}}
    decoder = {"decode_fps": 90.0, "streamed_fps": 30.0}
    bench = {"network_fps": 49.0, "network_streamed_fps": 51.0, "machine": machine}
    bench |= {"decoders": {"wan": decoder, "taehv": decoder}}
    bench |= {"first_image": {"warm": 0.1, "cold": 9.0}}
    reserved = dict.fromkeys(("allocated", "peak", "reserved", "needed"), 1e9)
    fps = {"ours": 49.0, "published": 20.0}
    stages = {stage.name: found for stage in STAGES} | {"attention": attention}
    for name, measured in {
        "facts": {"machine": machine},
        "bench": {"result": bench},
        "fp8": {"result": bench},
        "published": {"fps": fps},
        "published_flash": {"fps": fps},
        "memory": {"rows": [{"decoder": d, **reserved} for d in ("none", "taehv", "wan")]},
    }.items():
        stages[name] = {**found, "measured": measured}
    card = {"size": "1.3b", "date": "today", "seconds": 500.0, "stages": stages}
    lines = table.format_card(card, [stage.name for stage in STAGES]).splitlines()
    assert len(lines) <= table.MAX_LINES and max(map(len, lines)) <= 110
    assert all(any(line.startswith(stage.name) for line in lines) for stage in STAGES)


def test_what_is_too_long_for_a_line_goes_on_in_the_next_and_a_cut_is_marked():
    sentence = "; ".join(f"without form{n} +{n}.0 ms" for n in range(6))
    found = {"said": [sentence, "z " * 400], "seconds": 3.0, "ended": True}
    versions = {"torch": "2.11", "x": "1" * 90, "y": "2" * 90, "z": "3" * 90}
    machine = {"device": "H", "cpu": "C", "threads": 2, "versions": versions}
    stages = {"vae": found, "facts": {"measured": {"machine": machine}}}
    card = {"size": "1.3b", "date": "today", "seconds": 5.0, "stages": stages}
    text = table.format_card(card, ["vae"])
    assert sentence in " ".join(text.split())
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110 and lines[-1].endswith("z ...")
    assert "x 111" in " ".join(text.split()) and lines[lines.index("") - 1].endswith(
        " ..."
    )  # of the versions


def test_the_speed_of_a_run_stands_beside_the_clock_and_power_it_was_made_with():
    gpu = {"clocks.sm": "1875", "clocks.max.sm": "1980", "power.draw": "648", "power.limit": "700"}
    bench = {"network_fps": 49.13, "network_streamed_fps": 51.87, "decoders": {}}
    bench |= {"first_image": {"warm": 0.1, "cold": 9.0}, "machine": {"gpu": gpu}}
    stages = {"bench": {"measured": {"result": bench}}, "fp8": {"measured": {"result": bench}}}
    card = {"size": "1.3b", "date": "today", "seconds": 5.0, "stages": stages}
    text = table.format_card(card, ["bench", "fp8"])
    assert re.search(r"^network, streamed +51.9$", text, re.M)
    assert re.search(r"^network, fp8, streamed +51.9$", text, re.M)
    assert "under load 1875 of 1980 MHz, 648 of 700 W" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "facts,speed"], "stage 'speed' is unknown; the stages are facts, attention"),
        (["--published", "nowhere"], "there is no folder nowhere; --published names a checkout"),
    ],
)
def test_a_slip_of_the_pen_is_told_in_a_sentence(arguments, says, tmp_path, capsys):
    assert main(["card", str(tmp_path), *arguments]) == 1
    assert says in capsys.readouterr().err


def test_stages_are_chosen_in_the_order_given():
    assert [stage.name for stage in chosen("bench, facts")] == ["bench", "facts"]
    assert chosen(None) == STAGES and len({stage.name for stage in STAGES}) == len(STAGES)


@pytest.mark.slow
def test_a_real_stage_ends_and_says_what_it_measured(tmp_path, capsys):
    assert main(["card", str(tmp_path), "--size", "tiny", "--only", "facts,published"]) == 0
    stages = json.loads((tmp_path / "card.json").read_text())["stages"]
    assert stages["facts"]["measured"]["rates"]["flops"] > 0
    assert "--published DIR" in table.stage_verdict(stages["published"])
    out = capsys.readouterr().out
    assert "TFLOP/s of a product" in out and (tmp_path / "log.txt").exists()


def test_every_fused_kernel_is_compared():
    assert {case.name for case in kernel_stage.cases(TINY)} == set(kernels.__all__)


def test_the_files_of_tests_are_there_and_need_no_pyav():
    for name in suite_stage.FILES:
        source = (ROOT / "tests" / f"{name}.py").read_text()
        assert not re.search(r"import av\b", source) and "is_available()" in source, name
