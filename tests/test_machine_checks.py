"""What the machine lacks is named by the command, before any weight is read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from training.__main__ import main
from training.run import machine

RE_DMD, TEACHER, INIT, CONSISTENCY, PAIRS = (
    ["re_dmd"],
    ["teacher"],
    ["ode_init", "--pairs", "none"],
    ["consistency"],
    ["ode_pairs"],
)
ALL = (RE_DMD, TEACHER, INIT, CONSISTENCY, PAIRS)


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("a weight is read, or a group begun")

    monkeypatch.setattr(torch.nn.Module, "load_state_dict", refused)
    monkeypatch.setattr(torch.distributed, "init_process_group", refused)


def error_of(capsys, command, tmp_path: Path, *settings: str) -> str:
    assert main([*command, "--out", str(tmp_path / "run"), "--device", "cpu", *settings]) == 1
    assert not (tmp_path / "run").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize("command", ALL)
def test_a_backend_that_torch_compile_does_not_have_is_refused(command, tmp_path, capsys):
    error = error_of(capsys, command, tmp_path, "--set", "placement.compile=foo")
    assert error.startswith("error: placement.compile is 'foo'") and "inductor" in error


def test_every_backend_of_torch_compile_is_taken():
    for backend in torch._dynamo.list_backends(exclude_tags=()):
        machine.check_machine(machine.PlacementConfig(compile=backend))


@pytest.mark.parametrize(
    ("command", "field"),
    [(RE_DMD, "output.wandb"), (TEACHER, "wandb"), (INIT, "wandb"), (CONSISTENCY, "wandb")],
)
def test_wandb_that_is_not_installed_is_refused(command, field, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    error = error_of(capsys, command, tmp_path, "--set", f"{field}=mine")
    assert "wandb is 'mine', but wandb is not installed" in error


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        (RE_DMD, ["run.redmd.batch=8", "run.micro_batch=8"]),
        (TEACHER, ["batch=8", "opening_batch=9"]),
        (TEACHER, ["batch=9", "opening_batch=8"]),
        (INIT, ["batch=8"]),
        (CONSISTENCY, ["batch=8"]),
    ],
)
def test_a_batch_that_the_processes_cannot_share_is_refused_before_a_group_exists(
    command, settings, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "3")
    error = error_of(capsys, command, tmp_path, *(f"--set={each}" for each in settings))
    assert "a batch of 8 cannot be shared out" in error and "over 3 processes" in error


def test_a_reward_whose_folder_is_missing_is_refused(tmp_path, capsys):
    kind = ["--set", "reward.kind=videoalign", "--set", "reward.score=MQ"]
    error = error_of(capsys, RE_DMD, tmp_path, *kind, "--set", f"reward.path={tmp_path / 'no'}")
    assert "reward.path is" in error and "which is no folder" in error
    error = error_of(capsys, RE_DMD, tmp_path, *kind, "--set", f"reward.path={tmp_path}")
    assert "convert the release" in error


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["reward.kind=none", "run.redmd.weigh=critic"], "run.redmd.weigh is critic"),
        (["reward.score=beauty"], "reward.score is 'beauty'; tracker gives motion, caption"),
        (["reward.kind=none", "reward.score=beauty"], "reward.score is 'beauty'; a reward gives"),
        (["reward.kind=flow", "reward.score=MQ"], "reward.score is 'MQ'; flow gives motion"),
    ],
)
def test_a_reward_that_cannot_weigh_is_refused(settings, named, tmp_path, capsys):
    assert named in error_of(capsys, RE_DMD, tmp_path, *(f"--set={each}" for each in settings))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
@pytest.mark.parametrize("command", ALL)
def test_a_card_that_is_not_there_is_refused(command, tmp_path, capsys):
    assert main([*command, "--out", str(tmp_path / "run"), "--device", "cuda"]) == 1
    assert "device cuda is asked for, but this PyTorch sees no CUDA card" in capsys.readouterr().err


@pytest.mark.parametrize("processes", ["0", "-1"])
def test_an_estimate_for_no_processes_is_refused(processes, capsys):
    assert main(["estimate", "--processes", processes, "--device", "cpu"]) == 1
    assert f"processes is {processes}; give a number from 1" in capsys.readouterr().err


def test_an_estimate_for_processes_that_cannot_share_the_batch_is_refused(capsys):
    assert main(["estimate", "--processes", "3", "--device", "cpu"]) == 1
    assert "over 3 processes" in capsys.readouterr().err
