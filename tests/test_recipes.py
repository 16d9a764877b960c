from __future__ import annotations

import pytest
import torch

from rf_core.checkpoint import load_student
from rf_core.generate import DEMO
from training.__main__ import main
from training.config import changed
from training.recipes import MiniatureConfig, distil

SETTINGS = [
    "run.updates=2",
    "run.critic_ratio=1",
    "run.redmd.batch=2",
    "run.micro_batch=2",
    "run.latents=[16, 6, 8, 8]",
    "two_things=1",
    "checkpoint_every=1",
]


def test_the_miniature_is_distilled_to_a_student_that_streams(tmp_path, capsys):
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    assert main(["re_dmd", "--out", str(tmp_path / "run"), *settings]) == 0
    printed = capsys.readouterr().out
    assert '"beta": 2.0' in printed and "update 1" in printed and "effective_share" in printed
    model, found = load_student(
        tmp_path / "run" / "student.safetensors", device="cpu", dtype=torch.float32
    )
    demo, _ = load_student(DEMO / "student.safetensors", device="cpu", dtype=torch.float32)
    assert found.causal and found.size == (64, 64)
    assert found.provenance["config"]["run"]["updates"] == 2
    change = model.blocks[0].ffn[0].weight.float() - demo.blocks[0].ffn[0].weight.float()
    assert 0 < change.abs().max() < 1e-3  # two small steps


def test_a_resumed_run_makes_the_same_student(tmp_path):
    config = changed(MiniatureConfig(), [*SETTINGS, "reward=none"])
    list(distil(config, DEMO, tmp_path / "whole", resume=False))
    begun = distil(config, DEMO, tmp_path / "cut", resume=False)
    next(begun)
    assert next(begun).update == 1  # the first checkpoint is written between the two
    begun.close()
    assert [report.update for report in distil(config, DEMO, tmp_path / "cut", resume=True)] == [1]
    whole, cut = (
        load_student(tmp_path / name / "student.safetensors", device="cpu", dtype=torch.float32)[
            0
        ].state_dict()
        for name in ("whole", "cut")
    )
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_folder_that_holds_another_run_is_refused(tmp_path):
    config = changed(MiniatureConfig(), [*SETTINGS, "run.updates=1", "reward=none"])
    list(distil(config, DEMO, tmp_path, resume=False))
    with pytest.raises(ValueError, match="holds a run at update 1; --resume"):
        next(distil(config, DEMO, tmp_path, resume=False))
    other = changed(config, ["run.seed=1"])
    with pytest.raises(ValueError, match="begun with another config"):
        next(distil(other, DEMO, tmp_path, resume=True))
