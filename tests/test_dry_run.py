"""A dry run: what an update takes, before anything is made for it and without leaving anything."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from rf_core.config import WAN_1_3B, WAN_14B
from training.__main__ import main
from training.run.config import to_json
from training.run.networks import PlacementConfig, random_network
from training.stages.dry_run import StandIns, of_largest
from training.stages.recipes import miniature
from training.stages.regression import INIT_PRESETS
from training.stages.trajectories import wan_pairs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SMALL = ("batch=2", "micro_batch=1")
COMMANDS = {
    "teacher": (["teacher"], (*SMALL, "opening_batch=2")),
    "ode_init": (["ode_init", "--pairs", "pairs"], SMALL),
    "consistency": (["consistency"], SMALL),
    "control": (["control"], SMALL),
    "re_dmd": (
        ["re_dmd"],
        ("run.redmd.batch=2", "run.micro_batch=1", "run.critic_ratio=1"),
    ),
}
PEAK = re.compile(r"the peak is (.+?) GB .*by process: (.+)\); the estimate is (.+?) GB")


def words(name: str, *settings: str) -> list[str]:
    command, small = COMMANDS[name]
    found = [word for each in (*small, *settings) for word in ("--set", each)]
    return [*command, "--out", "run", "--device", "cpu", "--dry-run", *found]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_recipe_says_what_an_update_takes_and_leaves_nothing(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(words(name)) == 0
    said = capsys.readouterr().out
    peak, each, counted = PEAK.search(said).groups()
    assert float(peak) == float(each) > float(counted) > 0
    assert float(re.search(r"an update took (.+) s", said)[1]) > 0
    assert ("which is not there: taken for those of ode_pairs --preset miniature" in said) == (
        name != "re_dmd"
    )
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_several_sizes_is_one_of_the_largest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told = []
    for settings in (["run.buckets=[[4, 4], [16, 16]]"], ["run.latents=[16, 15, 16, 16]"]):
        assert main(words("re_dmd", "reward.kind=none", *settings)) == 0
        told.append(PEAK.search(capsys.readouterr().out)[3])
    assert told[0] == told[1]
    several = replace(miniature().run, buckets=((4, 4), (16, 16)))
    assert of_largest(several) == replace(several, latents=(16, 15, 16, 16), buckets=())


@pytest.mark.parametrize("name", ["ode_init", "re_dmd"])
def test_processes_share_a_dry_run_and_each_is_told(name, tmp_path):
    begin = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*begin, "-m", "training", *words(name)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak, each, _ = PEAK.search(done.stdout).groups()
    assert len(each.split(", ")) == 2 and peak == max(each.split(", "))
    assert done.stdout.count("an update took") == 1 and not list(tmp_path.iterdir())


def test_files_that_are_not_there_have_the_preset_s_sizes_and_are_named():
    found = StandIns("wan")
    assert found.size("files.teacher", Path("models/wan14b")) == WAN_14B
    assert found.size("start", Path("models/wan2.1_t2v_1.3B.safetensors")) == WAN_1_3B
    assert found.clips(Path("nowhere")) == wan_pairs().latents
    assert len(found.notes) == 3 and "files.teacher is models/wan14b" in found.notes[0]


def test_a_config_of_a_file_does_not_say_the_size_of_what_is_not_there(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(to_json(INIT_PRESETS["miniature"]()))
    assert main([*words("ode_init"), "--config", str(config)]) == 1
    assert "pairs is pairs, which is not there; a dry run takes" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [config] and json.loads(config.read_text())


def test_a_batch_that_cannot_be_shared_out_is_refused_as_in_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words("consistency", "batch=3", "micro_batch=2")) == 1
    assert "a batch of 3 cannot be shared out" in capsys.readouterr().err


def test_a_random_network_has_all_its_weights_and_they_are_trained():
    network = random_network(tiny.CONFIG, PlacementConfig(), torch.device("cpu"), trained=True)
    assert all(p.requires_grad and p.isfinite().all() for p in network.parameters())
    assert not any(p.is_meta for p in network.parameters())
