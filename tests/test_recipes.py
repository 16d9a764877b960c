from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_index import through_dataclass

from rf_core.options import DEMO
from rf_core.video import read_metadata
from rf_core.weights.checkpoint import load_student, read_checkpoint
from rf_core.weights.lora import Lora
from rf_core.writing import WriteError
from training.__main__ import main
from training.data.latents import Video, latents_path, write_latents
from training.run import checkpointing
from training.run.config import apply_overrides
from training.run.distributed import Stopped
from training.run.folder import checkpoints
from training.run.journal import read_journal
from training.run.optimise import TrainedNetwork
from training.run.signals import StopRequest
from training.stages import re_dmd, supervised
from training.stages.re_dmd import distil
from training.stages.recipes import PRESETS, DistilConfig, miniature, wan, with_sink
from training.stages.teacher import TeacherConfig, train_teacher
from training.world.scenes import all_captions

pytestmark = pytest.mark.slow

SETTINGS = [
    "run.updates=2",
    "run.critic_ratio=1",
    "run.redmd.batch=2",
    "run.micro_batch=2",
    "run.latents=[16, 6, 8, 8]",
    "data.limit=3",
    "output.checkpoint_every=1",
    "output.validate_every=0",
    "output.tensorboard=false",
]
CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


def small(*more: str) -> DistilConfig:
    return apply_overrides(miniature(), [*SETTINGS, *more])


def weights_of(path):
    return load_student(path, device="cpu", dtype=torch.float32)[0].state_dict()


def test_the_miniature_is_distilled_to_a_student_that_streams(tmp_path, capsys):
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    out = tmp_path / "run"
    validated = ["--set", "output.validate_every=2", "--set", "output.validation_chunks=2"]
    assert main(["re_dmd", "--out", str(out), *settings, *validated]) == 0
    printed = capsys.readouterr()
    assert '"effective_share": 0.4' in printed.out and "student.safetensors" in printed.out
    model, found = load_student(out / "student.safetensors", device="cpu", dtype=torch.float32)
    demo, _ = load_student(DEMO / "student.safetensors", device="cpu", dtype=torch.float32)
    assert found.causal and found.size == (64, 64)
    assert found.provenance["config"]["run"]["updates"] == 2
    change = model.blocks[0].ffn[0].weight.float() - demo.blocks[0].ffn[0].weight.float()
    assert 0 < change.abs().max() < 1e-3  # two small steps
    lines = read_journal(out / "log.jsonl")
    assert [line["update"] for line in lines] == [0, 1]
    assert 0 < lines[0]["reward/effective_share"] <= 1 and lines[1]["validation/motion"] > 0
    shown = out / "validation" / "update_000002"
    prompts = json.loads((shown / "prompts.json").read_text(encoding="utf-8"))
    assert sorted(prompts) == sorted(path.name for path in shown.glob("*.mp4"))
    titles = {path.name: read_metadata(path)["title"] for path in shown.glob("*.mp4")}
    assert titles == prompts and set(prompts.values()) == set(all_captions()[:3])
    assert [line["checkpoint"] for line in lines] == ["update_000001", "update_000002"]

    assert (
        main(["export", str(out), str(tmp_path / "again.safetensors"), "--dtype", "float32"]) == 0
    )
    again = weights_of(tmp_path / "again.safetensors")
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())
    assert read_checkpoint(tmp_path / "again.safetensors").cache == found.cache
    assert main(["export", str(out), str(tmp_path / "x.safetensors"), "--update", "7"]) == 1
    assert "holds no update 7; it has [1, 2]" in capsys.readouterr().err


def test_a_resumed_run_makes_the_same_student_and_one_log(tmp_path):
    config = small("reward.kind=none")
    list(distil(config, tmp_path / "whole", CPU))
    begun = distil(config, tmp_path / "cut", CPU)
    next(begun)
    begun.close()
    # As after a kill in the second update: its line is there, its checkpoint is not.
    with (tmp_path / "cut" / "log.jsonl").open("a") as log:
        log.write(json.dumps({"update": 1, "generator_loss": 9.0}) + '\n{"update"')
    assert [r.update for r in distil(config, tmp_path / "cut", CPU, resume=True)] == [1]
    whole, cut = (weights_of(tmp_path / name / "student.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    logs = [read_journal(tmp_path / name / "log.jsonl") for name in ("whole", "cut")]
    for first, second in zip(*logs, strict=True):
        costs = {"seconds": 0, "memory/peak_gb": 0}
        assert first | costs == second | costs


def test_a_folder_that_holds_another_run_is_refused(tmp_path):
    config = small("run.updates=1", "reward.kind=none")
    list(distil(config, tmp_path, CPU))
    with pytest.raises(ValueError, match="holds a run at update 1; --resume"):
        next(distil(config, tmp_path, CPU))
    with pytest.raises(ValueError, match=r"run\.seed is 0 there and 1 here.*choose another"):
        next(distil(apply_overrides(config, ["run.seed=1"]), tmp_path, CPU, resume=True))


def test_a_folder_belongs_to_one_recipe(tmp_path, capsys):
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    run, pairs = tmp_path / "run", tmp_path / "pairs"
    assert main(["re_dmd", "--out", str(run), *settings, "--set", "reward.kind=none"]) == 0
    small = ("kind=clips", "source=null", "clips=2", "shard=2", "batch=2", "steps=2")
    small += ("latents=[16, 6, 8, 8]", "data.limit=2")
    of_pairs = [part for setting in small for part in ("--set", setting)]
    assert main(["ode_pairs", "--out", str(pairs), *of_pairs]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    for name, out, command in (
        ("ode_pairs", run, ["ode_pairs", *of_pairs]),
        ("re_dmd", pairs, ["re_dmd", *settings]),
        ("ode_init", run, ["ode_init", "--pairs", str(pairs)]),
        ("teacher", pairs, ["teacher", "--resume", "--preset", "miniature"]),
    ):
        assert main([*command, "--out", str(out)]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"{out} belongs to a run that is none of {name}; choose another folder" in error
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    config = pairs / "config.json"
    assert main(["re_dmd", "--out", str(tmp_path / "new"), "--config", str(config)]) == 1
    assert "it is a config of the recipe ode_pairs, not of re_dmd" in capsys.readouterr().err


def test_length_rates_and_outputs_may_change_on_resume_and_the_journal_says_from_where(
    tmp_path, capsys
):
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    run = ["re_dmd", "--out", str(tmp_path), "--resume"]
    assert main([*run, *settings, "--set", "reward.kind=none"]) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert main(run) == 0  # with its own config, and there is nothing to do
    assert json.loads((tmp_path / "config.json").read_text()) == config
    more = ("run.updates=3", "run.generator.rate=1e-6", "output.keep=5", "run.micro_batch=1")
    assert main([*run, *(part for setting in more for part in ("--set", setting))]) == 0
    lines = read_journal(tmp_path / "log.jsonl")
    assert [line["update"] for line in lines] == [0, 1, 2]
    assert lines[2]["changed"] == {
        "run.updates": [2, 3],
        "run.generator.rate": [2e-5, 1e-6],
        "run.micro_batch": [2, 1],
        "output.keep": [3, 5],
    }
    capsys.readouterr()
    assert main([*run, "--set", "run.latents=[16, 9, 8, 8]"]) == 1
    error = capsys.readouterr().err
    assert "run.latents is [16, 6, 8, 8] there and [16, 9, 8, 8] here" in error
    assert "What may change: run.updates" in error
    assert main([*run, "--preset", "miniature"]) == 1  # a preset that is asked for is meant
    assert "--resume without --preset and --config" in capsys.readouterr().err


def test_a_run_encodes_what_it_draws_and_the_rest_when_it_is_made_longer(tmp_path):
    texts = tmp_path / "prompts.txt"
    texts.write_text("\n".join(f"a red circle moves left, take {number}" for number in range(40)))
    files = ["--set", f'data.prompts=["{texts}"]', "--set", "data.limit=null"]
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    rest = ["--set", "reward.kind=none", "--set", f"data.cache={tmp_path / 'shared'}"]
    run = ["re_dmd", "--out", str(tmp_path / "run"), "--resume"]
    assert main([*run, *settings, *files, *rest]) == 0

    def held() -> int:
        return sum(len(load_file(path)) for path in (tmp_path / "shared").iterdir())

    before = held()
    assert before <= 1 + 2 * 2 * 2  # the negative prompt; two updates of either network, two each
    assert main([*run, "--set", "run.updates=4"]) == 0
    assert before < held() <= 1 + 4 * 2 * 2


def test_a_run_that_breaks_down_names_a_checkpoint_that_a_whole_update_followed(
    tmp_path, monkeypatch
):
    config = small("reward.kind=none", "run.updates=9")
    run, step = distil(config, tmp_path, CPU), TrainedNetwork.step
    calls = iter(range(9))

    def breaks_at_the_end(trained: TrainedNetwork, factor: float) -> float:
        norm = step(trained, factor)
        if next(calls) == 5:  # the generator's third step
            with torch.no_grad():
                trained.others[0].fill_(torch.nan)
        return norm

    monkeypatch.setattr(TrainedNetwork, "step", breaks_at_the_end)
    assert [next(run).update, next(run).update] == [0, 1]
    said = r"generator's weights .* after update 3; lower generator\.rate; the last good .*0002$"
    with pytest.raises(FloatingPointError, match=said):
        next(run)
    assert [update for update, _ in checkpoints(tmp_path)] == [1, 2]


def test_an_update_outlives_a_validation_that_fails_which_is_made_up_for(tmp_path, monkeypatch):
    config = small("reward.kind=none", "output.validate_every=1", "output.validation_chunks=1")
    config = apply_overrides(config, ["output.validation_prompts=1", "output.checkpoint_every=50"])

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("while decoding")

    with monkeypatch.context() as patch:
        patch.setattr(re_dmd, "validate", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            next(distil(config, tmp_path, CPU))
    assert [update for update, _ in checkpoints(tmp_path)] == [1]
    (line,) = read_journal(tmp_path / "log.jsonl")
    assert line["update"] == 0 and "validation/motion" not in line
    assert [report.update for report in distil(config, tmp_path, CPU, resume=True)] == [1]
    assert all("validation/motion" in line for line in read_journal(tmp_path / "log.jsonl"))


def test_a_checkpoint_says_how_much_room_it_takes_where_there_is_too_little(tmp_path, monkeypatch):
    run = distil(small("reward.kind=none"), tmp_path, CPU)
    next(run)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(WriteError, match=r"update_000002 takes 0\.0\d GB, and 0\.00 GB are free"):
        next(run)
    assert not list(tmp_path.glob("*.partial"))


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    config = small("run.updates=3", "reward.kind=none", "output.keep=1")
    list(distil(config, tmp_path, CPU))
    assert [path.name for path in sorted(tmp_path.glob("update_*"))] == ["update_000003"]


def beside(checkpoint: Path) -> dict[str, Path]:
    """What people and machines leave beside a run's checkpoints."""
    out = checkpoint.parent
    copies = ("update_000001_backup", "update_000001 (copy)", "update_000001.bak", "update_1e3")
    copies += ("update_1", "update_0000009", "my update_000007", "update_000001.partial")
    for name in copies:
        shutil.copytree(checkpoint, out / name)
    (out / "update_000002").write_text("a note")
    (out / "update_000003").mkdir()
    (out / "update_000003" / "__0_0.distcp").write_text("half a copy")
    (out / "update_000009").symlink_to(checkpoint)
    (out / "update_000008").mkdir()
    return {path.name: path for path in out.iterdir() if path != checkpoint}


def test_what_lies_beside_a_run_s_checkpoints_is_neither_read_nor_counted_nor_deleted(tmp_path):
    config = small("run.updates=3", "reward.kind=none", "output.keep=1")
    out = tmp_path / "run"
    run = distil(config, out, CPU)
    next(run)
    strange = beside(out / "update_000001").keys()
    assert [update for update, _ in checkpoints(out)] == [1]
    assert [report.update for report in run] == [1, 2]
    assert checkpoints(out) == [(3, out / "update_000003")]
    assert (out / "update_000002.other").read_text() == "a note"
    assert (out / "update_000003.other" / "__0_0.distcp").read_text() == "half a copy"
    left = {path.name.removesuffix(".other") for path in out.iterdir()}
    assert left == {*strange, "update_000003", "log.jsonl", "config.json", "student.safetensors"}
    assert list(distil(config, out, CPU, resume=True)) == []
    assert main(["export", str(out), str(tmp_path / "a.safetensors")]) == 0
    assert read_checkpoint(tmp_path / "a.safetensors").provenance["updates"] == 3


def test_a_checkpoint_that_finds_no_room_is_one_sentence_and_the_old_one_stays(tmp_path):
    resource = pytest.importorskip("resource")
    config, limit = small("run.updates=2", "reward.kind=none"), resource.RLIMIT_FSIZE
    before = resource.getrlimit(limit)
    run = distil(config, tmp_path, CPU)
    next(run)
    resource.setrlimit(limit, (100_000, before[1]))
    try:
        with pytest.raises(WriteError, match=r"update_000002 could not be written .*--resume"):
            next(run)
    finally:
        resource.setrlimit(limit, before)
    assert [path.name for path in sorted(tmp_path.glob("update_*"))] == ["update_000001"]
    assert [report.update for report in distil(config, tmp_path, CPU, resume=True)] == [1]


def test_a_checkpoint_that_was_half_deleted_is_none(tmp_path, monkeypatch):
    list(distil(small("run.updates=1", "reward.kind=none"), tmp_path, CPU))
    ((_, folder),) = checkpoints(tmp_path)
    monkeypatch.setattr(shutil, "rmtree", lambda path: None)  # as after a kill
    checkpointing.delete(folder)
    assert folder.exists() and checkpoints(tmp_path) == []


def test_weights_of_a_run_without_checkpoints_are_not_taken_for_those_of_a_new_one(tmp_path):
    config = small("run.updates=1", "reward.kind=none")
    list(distil(config, tmp_path, CPU))
    shutil.rmtree(tmp_path / "update_000001")
    with pytest.raises(ValueError, match=r"holds student\.safetensors and no checkpoint"):
        next(distil(apply_overrides(config, ["run.seed=1"]), tmp_path, CPU))


def test_a_checkpoint_is_written_after_some_time_as_well(tmp_path):
    config = small("output.checkpoint_every=50", "output.checkpoint_minutes=0")
    next(distil(config, tmp_path, CPU))
    assert [update for update, _ in checkpoints(tmp_path)] == [1]


def test_on_cards_a_process_that_breaks_down_says_why_and_leaves_the_others_no_wait(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BREAKS_DOWN, str(tmp_path / "meet")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "error: the reward is NaN")


BREAKS_DOWN = """
import os, sys, torch
from unittest.mock import patch
import torch.distributed as dist
from training.run.distributed import process_group

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
begin = dist.init_process_group
def on_the_cpu(backend):
    begin("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
with (
    patch("torch.cuda.set_device"),
    patch.object(dist, "init_process_group", on_the_cpu),
    patch.object(dist, "destroy_process_group", lambda: print("waits")),
    process_group("cuda"),
):
    raise ValueError("the reward is NaN")
"""


def test_a_long_run_is_supervised_by_windows_with_anchors(tmp_path):
    config = small("run.updates=1", "run.latents=[16, 12, 8, 8]", "run.redmd.window_chunks=2")
    (report,) = distil(config, tmp_path, CPU)
    assert config.run.windows == 2 and report.generator_loss > 0
    assert report.rewards is not None and len(report.rewards.weights) == 2


def test_adapters_are_trained_alone_and_merge_to_what_they_streamed_as(tmp_path):
    config = small("run.updates=2", 'student_lora={"rank": 4}', 'critic_lora={"rank": 4}')
    list(distil(config, tmp_path, CPU))
    demo = weights_of(DEMO / "student.safetensors")
    by_engine, _ = load_student(
        DEMO / "student.safetensors",
        device="cpu",
        dtype=torch.float32,
        loras=[Lora(path=tmp_path / "lora.safetensors")],
    )
    out = tmp_path / "merged.safetensors"
    assert main(["export", str(tmp_path), str(out), "--dtype", "float32"]) == 0
    exported = weights_of(out)
    changed_names = set()
    for name, weight in by_engine.state_dict().items():
        torch.testing.assert_close(weight, exported[name], atol=1e-6, rtol=1e-5)
        if not torch.equal(weight, demo[name]):
            changed_names.add(name.split(".", 2)[2])
    assert "self_attn.q.weight" in changed_names and "ffn.2.weight" in changed_names
    assert not any("norm" in name or "modulation" in name for name in changed_names)
    alone = tmp_path / "alone.safetensors"
    assert main(["export", str(tmp_path), str(alone), "--adapter"]) == 0
    assert alone.exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["run.latents=[8, 6, 8, 8]"], "run.latents has 8 channels; files.student has 16"),
        (["run.latents=[16, 6, 7, 8]"], "latents of 7x8 are not tiled"),
        (["files.student=nowhere.safetensors"], "files.student is nowhere.safetensors"),
        (['data.prompts=["none.txt"]'], "data.prompts names none.txt"),
        (["placement.dtype=bfloat16"], "start the run with `torchrun"),
        (["output.wandb=x"], "wandb is not installed"),
        (['student_lora={"targets": "nothing"}'], "match no layer"),
        (["reward.score=beauty"], "tracker gives motion, caption"),
        (["run.runaway=1e-6"], "lower critic.rate; no checkpoint is good"),
    ],
)
def test_what_cannot_run_is_refused_in_one_sentence(tmp_path, capsys, settings, said):
    every = [part for s in [*SETTINGS, *settings] for part in ("--set", s)]
    assert main(["re_dmd", "--out", str(tmp_path / "run"), *every]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error


def test_presets_are_the_published_numbers_and_survive_json():
    for preset in PRESETS.values():
        assert apply_overrides(preset(), []) == preset()
    published = wan()
    assert published.run.latents == (16, 21, 60, 104) and published.run.updates == 600 // 5
    assert published.run.generator.rate == 2e-6 and published.run.critic.rate == 4e-7
    assert (
        published.run.redmd.weights.beta == 2.0 and not published.run.redmd.weights.depends_on_batch
    )
    with pytest.raises(ValueError, match=r"give reward\.path"):
        apply_overrides(published, ["reward.path=null"])


def test_sinks_are_three_caches():
    caches = {
        sink: with_sink(miniature(), sink).run.redmd.cache for sink in ("ema", "static", "none")
    }
    assert caches["ema"].decay == 0.999 and caches["static"].decay == 1.0
    assert caches["none"].sink_frames == 0 and caches["none"].window_frames == 9


def test_a_checkpoint_with_code_in_its_index_is_neither_exported_nor_gone_on_from(tmp_path, capsys):
    run = tmp_path / "run"
    list(distil(small("run.updates=1", "reward.kind=none"), run, CPU))
    folder = run / "update_000001"
    assert (
        checkpointing.read_part(folder, "average").keys()
        == weights_of(DEMO / "student.safetensors").keys()
    )
    with pytest.raises(ValueError, match="holds no nonsense"):
        checkpointing.read_part(folder, "nonsense")
    (folder / ".metadata").write_bytes(through_dataclass(tmp_path / "sprung"))
    settings = (*SETTINGS, "run.updates=1", "reward.kind=none")
    on = [part for setting in settings for part in ("--set", setting)]
    for command in (
        ["export", str(run), str(tmp_path / "a.safetensors")],
        ["re_dmd", "--out", str(run), "--resume", *on],
    ):
        capsys.readouterr()
        assert main(command) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {folder}") and "field, which is refused" in error
    assert not (tmp_path / "sprung").exists()


def command(*arguments: str, processes: int | None = None) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    begin = [sys.executable, *(launcher if processes else [])]
    settings = [part for setting in [*SETTINGS, "run.updates=3"] for part in ("--set", setting)]
    return [*begin, "-m", "training", "re_dmd", "--device", "cpu", *settings, *arguments]


def run(arguments: list[str]) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("processes", [None, 2])
def test_a_signal_saves_the_run_says_so_and_it_goes_on_bit_for_bit(tmp_path, processes):
    cut, log = tmp_path / "cut", tmp_path / "victim.log"
    slow = ("--set", "run.critic_ratio=4", "--set", "run.updates=40", "--set", "run.micro_batch=1")
    victim = subprocess.Popen(
        command("--out", str(cut), *slow, processes=processes),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    while not (cut / "update_000002").exists():
        assert victim.poll() is None, log.read_text()[-2000:]
        time.sleep(0.05)
    victim.send_signal(signal.SIGTERM)
    code = victim.wait(60)
    said = log.read_text()
    assert said.count("stopped by SIGTERM: ") == 1 and "--resume goes on from there" in said
    if processes is None:
        assert code == 143 and "Traceback" not in said
    update, _ = checkpoints(cut)[-1]
    shorter = ("--set", f"run.updates={update + 1}")
    run(command("--out", str(cut), "--resume", *slow, *shorter))
    config = small("run.critic_ratio=4", "run.micro_batch=1", f"run.updates={update + 1}")
    list(distil(config, tmp_path / "whole", CPU))
    first, second = (weights_of(tmp_path / n / "student.safetensors") for n in ("whole", "cut"))
    for name, weight in first.items():
        if processes is None:
            assert torch.equal(weight, second[name])
        else:
            torch.testing.assert_close(weight, second[name], atol=1e-4, rtol=1e-3)


class FromTheStart(StopRequest):
    """A signal that came before the first micro-batch."""

    number = signal.SIGTERM


@pytest.mark.parametrize("stage", [re_dmd, supervised])
def test_what_a_stop_says_is_saved_is_there_and_is_not_written_again(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "stop_on_signal", lambda: nullcontext(FromTheStart()))
    clip = Video(name="a.mp4", prompt="light")
    write_latents(latents_path(tmp_path / "clips", 0), [torch.randn(16, 9, 8, 8).half()], clip, "")
    teach = TeacherConfig(
        source=tmp_path / "clips",
        start=DEMO / "teacher.safetensors",
        updates=2,
        batch=1,
        opening_batch=1,
        tensorboard=False,
    )
    out, written = tmp_path / "run", []
    save = checkpointing.save
    monkeypatch.setattr(
        checkpointing, "save", lambda state, at: (written.append(at.name), save(state, at))
    )
    for resume in (False, True):
        run = (
            distil(small("reward.kind=none"), out, CPU, resume=resume)
            if stage is re_dmd
            else train_teacher(teach, out, CPU, resume=resume)
        )
        with pytest.raises(Stopped, match="is saved in update 0"):
            next(run)
        assert [update for update, _ in checkpoints(out)] == [0]
    assert written == ["update_000000"]
    assert read_journal(out / "log.jsonl") == []  # there is no update that it belongs to


def test_what_all_processes_meet_is_told_once(tmp_path):
    (tmp_path / "student.safetensors").write_text("no weights")
    done = subprocess.run(
        command("--out", str(tmp_path), "--set", "run.micro_batch=1", processes=2),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.count("holds student.safetensors and no checkpoint") == 1


def test_a_killed_run_goes_on_bit_for_bit_and_two_processes_come_to_the_same(tmp_path):
    whole, cut, two = (tmp_path / name for name in ("whole", "cut", "two"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = tmp_path / "victim.log"
    victim = subprocess.Popen(
        command("--out", str(cut)),
        cwd=ROOT,
        env=environment,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    while not (cut / "update_000001").exists():
        assert victim.poll() is None, log.read_text()[-2000:]
        time.sleep(0.05)
    victim.kill()
    victim.wait()
    assert not (cut / "update_000003").exists()
    run(command("--out", str(cut), "--resume"))
    list(distil(small("run.updates=3"), whole, CPU))
    first, second = (weights_of(path / "student.safetensors") for path in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)

    shown = ("output.validate_every=1", "output.validation_prompts=1", "output.validation_chunks=1")
    others = [part for each in ("run.micro_batch=1", *shown) for part in ("--set", each)]
    run(command("--out", str(two), *others, processes=2))
    assert len(list(two.glob("validation/*/00.mp4"))) == 3
    third = weights_of(two / "student.safetensors")
    for name, weight in first.items():
        torch.testing.assert_close(third[name], weight, atol=2e-4, rtol=1e-2)
