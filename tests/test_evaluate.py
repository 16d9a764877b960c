"""Checkpoints compared: videos, records, the report, and going on after a stop."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

from rf_core.__main__ import main as rf_core
from rf_core.config import CacheConfig, ModelConfig
from rf_core.options import DEMO
from rf_core.video import VideoFormat, VideoWriter, read_images, to_uint8
from rf_core.weights.checkpoint import read_checkpoint, write_checkpoint
from training.evaluation import evaluate
from training.evaluation.evaluate import file_digest
from training.evaluation.report import interval_of, summary_of
from training.evaluation.vbench_scores import VBENCH_ANY_PROMPT
from training.measures.metrics import measure
from training.stages.evaluation import (
    add_arguments,
    local_device,
    pick_prompts,
    prompt_share,
    run,
)
from training.world.metric import caption_measures
from training.world.scenes import all_captions, parse_caption, place_all, render, scene_of_caption

RED, BLUE = "a red circle moves left quickly", "a blue square moves down"
SHORT = ("--chunks", "2", "--window-images", "8", "--device", "cpu")


def command(*more: str | Path) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(each) for each in (*SHORT, *more)]))


def write_model(path: Path, seed: int, text_dim: int, text_len: int) -> Path:
    """A student of random weights."""
    sizes = {"dim": 24, "ffn_dim": 32, "freq_dim": 16, "num_heads": 2, "num_layers": 1}
    config = ModelConfig(text_dim=text_dim, text_len=text_len, **sizes)
    weights = tiny.model(config, seed).state_dict()
    write_checkpoint(path, weights, config, CacheConfig(), tiny.TWO_STEPS, size=(64, 64))
    return path


@pytest.fixture
def world(tmp_path) -> tuple[str | Path, ...]:
    """Arguments for two models and two prompts, into `tmp_path / "out"`."""
    (tmp_path / "prompts.txt").write_text(f"# two\n{RED}\n\n{BLUE}\n{RED}\n", encoding="utf-8")
    demo = read_checkpoint(DEMO / "student.safetensors").config
    paths = [
        write_model(tmp_path / f"{name}.safetensors", seed, demo.text_dim, demo.text_len)
        for seed, name in enumerate(("first", "second"))
    ]
    where = ("--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out")
    return ("--model", paths[0], "--model", f"second={paths[1]}", *where)


@pytest.fixture
def drawn(monkeypatch) -> list[tuple[str, int, int]]:
    """Videos come from the world's own drawing in place of a network; gives what was drawn."""
    made: list[tuple[str, int, int]] = []

    def draw(candidate: Any, jobs: Sequence[tuple[int, int]], estimate: Any) -> Iterator[Path]:
        for number, seed in jobs:
            path = candidate.video(number, seed)
            wanted = parse_caption(candidate.evaluation.prompts[number])
            scene = place_all(wanted, np.random.default_rng([number, seed]))
            with VideoWriter(path, VideoFormat(width=64, height=64)) as writer:
                writer.write(to_uint8(render([scene], 21)[0]))
            made.append((candidate.name, number, seed))
            evaluate._measure_and_record(candidate, number, seed, estimate)
            yield path

    def change(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """A stand-in for optical flow that costs nothing."""
        return 100 * (second - first)[:, :2]

    monkeypatch.setattr(evaluate, "_make", draw)
    monkeypatch.setattr(evaluate, "flow_estimator", lambda *chosen: change)
    return made


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


@pytest.mark.slow
def test_the_videos_are_those_the_command_line_generates_and_the_measures_theirs(tmp_path, capsys):
    model, out = DEMO / "student.safetensors", tmp_path / "out"
    short = ("--chunks", "1", "--window-images", "4", "--num-prompts", "1", "--seeds", "2")
    assert command(*short, "--model", f"demo={model}", "--out", out) == 0
    ((number, prompt),) = pick_prompts(all_captions(), 1).items()
    more = ("--chunks", "1", "--device", "cpu", "--seed", "1", "--output", str(tmp_path / "a.mp4"))
    assert rf_core(["generate", "--prompt", prompt, *more]) == 0
    ours = out / "demo" / f"{number:04d}-1.mp4"
    images = read_images(ours, width=64, height=64)[0]
    assert torch.equal(images, read_images(tmp_path / "a.mp4", width=64, height=64)[0])
    record = json.loads(ours.with_suffix(".json").read_text())
    assert record["measures"] == measure(images, 4) | caption_measures(images, prompt)
    assert (record["prompt"], record["seed"], record["images"]) == (prompt, 1, 9)
    assert not [path for path in out.rglob("*") if path.suffix not in (".mp4", ".json", ".md", "")]
    told = capsys.readouterr().out
    assert f"demo 2/2: {ours}" in told
    assert (out / "report.md").read_text().strip() in told


def test_models_stand_in_rows_with_the_mean_over_prompts(world, drawn, tmp_path, capsys):
    assert command(*world, "--seeds", "2") == 0
    assert len(drawn) == len(set(drawn)) == 2 * 2 * 2
    report = report_of(tmp_path / "out")
    assert (report["prompts"], report["seeds"]) == (2, 2)
    rows = [json.loads(p.read_text()) for p in sorted((tmp_path / "out" / "first").glob("*.json"))]
    motion = np.mean([row["measures"]["motion"] for row in rows])
    found = report["models"]["first"]["motion"]
    assert found["mean"] == pytest.approx(motion)
    assert found["low"] < found["mean"] < found["high"]
    assert found["prompts"] == 2
    assert report["models"]["second"]["colour"]["mean"] == 1.0
    assert report["models"]["second"]["speed"]["prompts"] == 1  # the other names none
    lines = capsys.readouterr().out.splitlines()
    (head,) = (line for line in lines if line.startswith("| motion and stability"))
    assert [cell.strip() for cell in head.split("|")][2:4] == ["motion", "mean motion"]
    assert sum(line.startswith("| first ") for line in lines) == 3
    cell = f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
    assert any(line.startswith("| first ") and cell in line for line in lines)


def test_a_finished_evaluation_makes_nothing_again(world, drawn, tmp_path):
    command(*world)
    before = (tmp_path / "out" / "report.json").read_bytes()
    drawn.clear()
    assert command(*world) == 0
    assert not drawn
    assert (tmp_path / "out" / "report.json").read_bytes() == before


@pytest.mark.slow
def test_more_seeds_are_added_to_what_is_there(world, drawn, tmp_path):
    command(*world)
    assert report_of(tmp_path / "out")["seeds"] == 1
    drawn.clear()
    command(*world, "--seeds", "2")
    assert sorted(drawn) == [(name, number, 1) for name in ("first", "second") for number in (0, 1)]


@pytest.mark.slow
def test_a_stopped_evaluation_goes_on_to_the_report_of_an_undisturbed_one(
    world, drawn, tmp_path, monkeypatch, capsys
):
    command(*world)
    whole = (tmp_path / "out" / "report.json").read_bytes()
    shutil.rmtree(tmp_path / "out")
    drawn.clear()
    measured = evaluate.measure

    def stopping(*arguments: Any) -> dict[str, float]:
        if len(drawn) == 2:  # its video is made, its record is not
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(evaluate, "measure", stopping)
    assert command(*world) == 130
    assert "goes on from here" in capsys.readouterr().out
    assert len(list((tmp_path / "out").rglob("*.mp4"))) == 2
    assert len(list((tmp_path / "out").rglob("*.json"))) == 1
    monkeypatch.setattr(evaluate, "measure", measured)
    assert command(*world) == 0
    assert len(drawn) == 2 + 3  # the second is made again
    assert (tmp_path / "out" / "report.json").read_bytes() == whole


def test_a_record_is_never_half_written(world, drawn, tmp_path, monkeypatch):
    out, write = tmp_path / "out", Path.write_text
    records: list[Path] = []

    def cut_off(path: Path, text: str, **options: Any) -> int:
        write(path, text[: len(text) // 2], **options)
        records.extend(out.rglob("*.json"))  # that a kill here would leave
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", cut_off)
        with pytest.raises(OSError, match="no space"):
            command(*world)
    assert not records + list(out.rglob("*.json"))
    assert command(*world) == 0


@pytest.mark.slow
def test_a_record_that_is_written_again_leaves_its_readers_the_old_one(world, drawn, tmp_path):
    command(*world)
    record, held = tmp_path / "out" / "first" / "0000-0.json", tmp_path / "held.json"
    os.link(record, held)  # as a reader holds the file it has opened
    before = held.read_bytes()
    assert command(*world, "--window-images", "10") == 0
    assert record.read_bytes() != before
    assert held.read_bytes() == before


@pytest.mark.parametrize(
    "more, named",
    [
        (("--chunks", "3"), "chunks 2, now it is 3"),
        (("--size", "64x80"), "width 64, now it is 80"),
        (("--dtype", "bfloat16"), "dtype float32, now it is bfloat16"),
    ],
)
def test_other_settings_are_refused_by_name(world, drawn, tmp_path, more, named):
    command(*world)
    drawn.clear()
    with pytest.raises(ValueError, match=f"0000-0.mp4 was made with {named}; .*another --out"):
        command(*world, *more)
    assert not drawn


def test_other_weights_and_other_prompts_are_refused_by_name(world, drawn, tmp_path):
    command(*world)
    (tmp_path / "prompts.txt").write_text(f"{RED}\na cyan circle moves up\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"0001-0.mp4 was made with prompts .*blue.*cyan"):
        command(*world)
    (tmp_path / "prompts.txt").write_text(f"{RED}\n{BLUE}\n", encoding="utf-8")
    shutil.copyfile(tmp_path / "second.safetensors", tmp_path / "first.safetensors")
    with pytest.raises(ValueError, match="was made with model_file"):
        command(*world)


def test_a_change_of_the_measures_alone_measures_the_same_videos_again(world, drawn, tmp_path):
    command(*world)
    before = report_of(tmp_path / "out")
    drawn.clear()
    assert command(*world, "--window-images", "10") == 0
    assert not drawn
    after = report_of(tmp_path / "out")
    assert after["measured_with"]["first"]["window_images"] == 10
    names = ("sharpness_std", "motion")
    found = [[each["models"]["first"][name]["mean"] for name in names] for each in (before, after)]
    assert found[0][0] != found[1][0]
    assert found[0][1] == found[1][1]


def test_processes_share_the_prompts_and_the_last_collects(
    world, drawn, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert command(*world) == 0
    assert {number for _, number, _ in drawn} == {1}
    assert "other processes are still at work" in capsys.readouterr().out
    assert not (tmp_path / "out" / "report.json").exists()
    monkeypatch.setenv("RANK", "0")
    assert command(*world) == 0
    assert len(drawn) == len(set(drawn)) == 4
    assert report_of(tmp_path / "out")["models"]["first"]["motion"]["prompts"] == 2


def test_every_prompt_belongs_to_one_process_and_cuda_to_one_card_each():
    parts = [range(10)[prompt_share({"RANK": str(r), "WORLD_SIZE": "4"})] for r in range(4)]
    assert sorted(number for part in parts for number in part) == list(range(10))
    assert range(10)[prompt_share({})] == range(10)
    assert local_device("cuda", {"LOCAL_RANK": "3"}) == "cuda:3"
    assert [local_device(d, {"LOCAL_RANK": "3"}) for d in ("cuda:1", "cpu")] == ["cuda:1", "cpu"]
    assert local_device("cuda", {}) == "cuda"


def test_videos_too_short_for_two_windows_are_refused_before_any_is_made(world, drawn):
    with pytest.raises(ValueError, match="21 images does not hold two windows of 11"):
        command(*world, "--window-images", "11")
    assert not drawn


def test_a_model_of_another_world_needs_its_own_vae_and_text_encoder(tmp_path):
    path = write_model(tmp_path / "other.safetensors", 0, text_dim=16, text_len=24)
    with pytest.raises(ValueError, match="reads prompts of 24 x 16; give its --vae and --text"):
        command("--model", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        ((), "give --out DIR"),
        (("--out", "OUT", "--model", "a.pt", "--model", "b/a.pt"), "two models are called a"),
        (("--out", "OUT", "--model", "a/b=c.pt"), "cannot be a model's name"),
        (("--out", "OUT", "--model", "missing.pt"), "no model at missing.pt"),
        (("--out", "OUT", "--seeds", "0"), "seeds is 0; give a number from 1"),
        (("--out", "OUT", "--num-prompts", "0"), "at least 1"),
        (("--out", "OUT", "--prompts", "none.txt"), "no file of prompts at none.txt"),
        (("--out", "OUT", "--study", "OUT/page.html"), "give --model twice"),
        (("--out", "OUT", "--size", "60x64"), "does not fit the model"),
        (("--study-results", "a.csv"), "needs the --key"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_a_sentence(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        command(*(each.replace("OUT", str(tmp_path)) for each in more))


def write_adapter(path: Path, seed: int = 0, width: int = 24, student: str | None = None) -> Path:
    """An adapter of one layer, as `re_dmd` leaves it of a run that began with `student`."""
    generator = torch.Generator().manual_seed(seed)
    layer = "diffusion_model.blocks.0.self_attn.q"
    tensors = {
        f"{layer}.lora_A.weight": torch.randn(2, width, generator=generator),
        f"{layer}.lora_B.weight": torch.randn(width, 2, generator=generator),
        f"{layer}.alpha": torch.tensor(2.0),
    }
    note = {"command": "python -m training re_dmd", "config": {"files": {"student": student}}}
    save_file(tensors, path, {"rf_provenance": json.dumps(note)})
    return path


def test_an_adapter_is_judged_on_its_base_as_if_it_were_merged(world, tmp_path):
    adapter, base = write_adapter(tmp_path / "lora.safetensors"), tmp_path / "first.safetensors"
    merged, out = tmp_path / "merged.safetensors", tmp_path / "out"
    assert rf_core(["convert", str(base), str(merged), "--lora", f"{adapter}:0.5"]) == 0
    models = ("--model", base, "--model", f"adapted={base}", "--model", merged)
    short = ("--num-prompts", "1", "--chunks", "1", "--window-images", "4")
    assert command(*world[4:], *models, *short, "--lora", f"adapted={adapter}:0.5") == 0
    plain, adapted, expected = (
        read_images(next((out / name).glob("*.mp4")), width=64, height=64)[0]
        for name in ("first", "adapted", "merged")
    )
    assert torch.equal(adapted, expected)
    assert not torch.equal(adapted, plain)
    assert sorted(report_of(out)["models"]) == ["adapted", "first", "merged"]


def test_one_model_needs_no_name_for_its_adapter_and_another_adapter_is_another_evaluation(
    world, drawn, tmp_path
):
    base, adapter = tmp_path / "first.safetensors", write_adapter(tmp_path / "lora.safetensors")
    adapted = (*world[4:], "--model", base, "--lora", adapter)
    assert command(*adapted) == 0
    record = json.loads((tmp_path / "out" / "first" / "0000-0.json").read_text())
    assert record["made_with"]["loras"] == ["lora.safetensors:1"]
    write_adapter(adapter, seed=1)
    with pytest.raises(ValueError, match=r"was made with lora_files .*another --out"):
        command(*adapted)
    with pytest.raises(ValueError, match=r"was made with loras .*another --out"):
        command(*adapted[:-2])


def test_an_adapter_of_another_size_is_refused_before_any_video_is_made(world, drawn, tmp_path):
    adapter = write_adapter(tmp_path / "lora.safetensors", width=16)
    with pytest.raises(ValueError, match=r"lora.safetensors: holds an adapter .*of another shape"):
        command(*world, "--lora", f"second={adapter}")
    assert not drawn


@pytest.mark.parametrize(
    "more, said",
    [
        (("--lora", "x.safetensors"), "does not say which of first, second it is for; write"),
        (("--lora", "after=x.safetensors"), "a model called after, .*its base: --model after=BASE"),
        (("--lora", "first=missing.safetensors"), "there is no LoRA at missing.safetensors"),
        (("--lora", "first=x.safetensors:much"), "is not `file:strength`"),
    ],
)
def test_an_adapter_without_its_base_or_file_is_refused_in_a_sentence(world, drawn, more, said):
    with pytest.raises(ValueError, match=said):
        command(*world, *more)
    assert not drawn


@pytest.mark.parametrize("student, base", [(None, "demo"), ("runs/init/student.safetensors",) * 2])
def test_an_adapter_in_a_models_place_is_refused_with_what_to_write(tmp_path, student, base):
    adapter = write_adapter(tmp_path / "lora.safetensors", student=student)
    with pytest.raises(ValueError) as refused:
        command("--model", f"after={adapter}", "--out", tmp_path / "out")
    assert f"--model after={base} --lora after={adapter}" in str(refused.value)


def test_demo_is_the_bundled_student_under_any_name(drawn, tmp_path):
    models = ("--model", "demo", "--model", "x=demo", "--num-prompts", "1")
    assert command(*models, "--out", tmp_path / "out") == 0
    (record,) = (tmp_path / "out" / "x").glob("*.json")
    made_with = json.loads(record.read_text())["made_with"]
    assert made_with["model_file"] == file_digest(DEMO / "student.safetensors")
    assert sorted(report_of(tmp_path / "out")["models"]) == ["demo", "x"]


def test_more_prompts_are_the_fewer_ones_and_others_under_the_same_numbers():
    every = all_captions()
    few, more = pick_prompts(every, 12), pick_prompts(every, 40)
    assert len(few) == 12 and few.items() <= more.items()
    assert pick_prompts(every, None) == dict(enumerate(every))
    assert all(every[number] == prompt for number, prompt in few.items())
    assert len({prompt.split()[1] for prompt in few.values()}) > 3  # not just the first colour


def test_the_interval_is_the_bootstraps():
    values = np.random.default_rng(1).normal(5.0, 2.0, 200)
    found = interval_of(values.tolist())
    error = values.std() / math.sqrt(200)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.15 * error)
    assert interval_of(values.tolist()) == found
    assert str(interval_of([2.0])) == "2.000"
    assert interval_of([]) is None


def test_every_prompt_counts_once_however_many_of_its_videos_have_a_value():
    values = [(0, 1.0), (0, 3.0), (0, 5.0), (1, 9.0), (1, None), (2, None)]
    rows = [{"prompt_number": n, "measures": {"speed": v, "empty": None}} for n, v in values]
    assert summary_of(rows)["speed"]["mean"] == (3.0 + 9.0) / 2
    assert summary_of(rows)["speed"]["prompts"] == 2
    assert "empty" not in summary_of(rows)


def test_how_much_motion_differs_is_of_the_seeds_of_one_prompt():
    values = [(0, 1.0), (0, 3.0), (1, 9.0), (1, 9.0), (2, 50.0)]
    rows = [{"prompt_number": n, "measures": {"mean_motion": v}} for n, v in values]
    found = summary_of(rows)["motion_spread"]
    assert found["mean"] == pytest.approx(2**0.5 / 2) and found["prompts"] == 2
    assert "motion_spread" not in summary_of(rows[3:])


def test_captions_are_judged_by_the_tracker_and_speed_along_them_has_a_sign():
    scene = scene_of_caption(RED, np.random.default_rng(0))
    video, speed = render([scene], 21)[0], scene.things[0].speed
    right = caption_measures(video, RED)
    assert [right[name] for name in ("colour", "shape", "direction", "speed")] == [1.0] * 4
    assert right["measured_speed"] == pytest.approx(speed, abs=0.05)
    assert right["speed_along"] == pytest.approx(speed, abs=0.05)
    assert caption_measures(video, "a red circle moves right")["speed_along"] == pytest.approx(
        -speed, abs=0.05
    )
    assert caption_measures(video, "a red circle moves up")["speed_along"] == 0.0
    assert caption_measures(video, "a cyan circle moves left")["speed_along"] == 0.0
    assert caption_measures(video, "a red circle moves left")["speed"] is None
    both = caption_measures(video, f"{RED} and a cyan square moves up slowly")
    assert both["speed_along"] == pytest.approx(speed / 2, abs=0.05)
    dark = caption_measures(torch.zeros(21, 3, 64, 64), RED)
    assert (dark["measured_speed"], dark["speed_along"], dark["speed"]) == (None, 0.0, 0.0)


def test_a_file_is_known_by_its_size_and_both_its_ends(tmp_path):
    path = tmp_path / "weights"
    whole = bytes(3 << 20)
    marks = []
    for data in (whole, b"x" + whole[1:], whole[:-1] + b"x", whole + b"\0", whole):
        path.write_bytes(data)
        marks.append(file_digest(path))
    assert len(set(marks)) == 4 and marks[0] == marks[-1]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_bytes(b"1")
    before = file_digest(folder)
    (folder / "a").rename(folder / "b")
    assert file_digest(folder) != before


def fake_vbench(folder: Path, prompts: Sequence[str]) -> tuple[types.ModuleType, list[Any]]:
    """The package `vbench` as far as it is called, and its calls."""
    calls: list[Any] = []
    (folder / "VBench_full_info.json").write_text(json.dumps([{"prompt_en": p} for p in prompts]))

    class VBench:
        def __init__(self, device: torch.device, full_info_dir: str, output_path: str) -> None:
            assert full_info_dir == str(folder / "VBench_full_info.json")
            self.out = Path(output_path)

        def evaluate(self, videos_path: str, name: str, dimension_list: Any, mode: str) -> None:
            names = sorted(path.name for path in Path(videos_path).iterdir())
            calls.append((names, dimension_list, mode))
            self.out.mkdir(exist_ok=True)
            result = {"imaging_quality": [0.7 + len(calls) / 100, [{"video_path": "x"}]]}
            (self.out / f"{name}_eval_results.json").write_text(json.dumps(result))

    module = types.ModuleType("vbench")
    module.__file__, module.VBench = str(folder / "__init__.py"), VBench
    return module, calls


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False])
def test_vbench_is_given_its_own_file_names_and_read_into_the_report(
    world, drawn, tmp_path, monkeypatch, capsys, own
):
    (tmp_path / "package").mkdir()
    module, calls = fake_vbench(tmp_path / "package", [RED, BLUE] if own else [RED])
    monkeypatch.setitem(sys.modules, "vbench", module)
    assert command(*world, "--seeds", "2", "--vbench") == 0
    files = sorted(f"{prompt}-{seed}.mp4" for prompt in (RED, BLUE) for seed in (0, 1))
    expected = (None, "vbench_standard") if own else (list(VBENCH_ANY_PROMPT), "custom_input")
    assert calls == [(files, *expected)] * 2
    link = tmp_path / "out" / "first" / "vbench" / f"{BLUE}-1.mp4"
    assert link.read_bytes() == (tmp_path / "out" / "first" / "0001-1.mp4").read_bytes()
    scores = report_of(tmp_path / "out")["vbench"]
    assert scores == {"first": {"imaging_quality": 0.71}, "second": {"imaging_quality": 0.72}}
    assert "imaging quality" in capsys.readouterr().out
    command(*world, "--seeds", "2", "--vbench")
    assert len(calls) == 2  # results that are there are read
    os.utime(tmp_path / "out" / "first" / "0000-0.mp4", (4e9, 4e9))
    command(*world, "--seeds", "2", "--vbench")
    assert len(calls) == 3  # those older than a video are not


def test_without_vbench_the_videos_are_laid_out_and_the_way_on_is_told(
    world, drawn, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "vbench", None)
    with pytest.raises(ValueError, match=r"package vbench, which is not installed.*--videos_path"):
        command(*world, "--vbench")
    folder = tmp_path / "out" / "first" / "vbench"
    assert len(list(folder.glob("*.mp4"))) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process"):
        command(*world, "--vbench")


def test_a_study_is_written_from_the_evaluation_and_its_answers_are_read(
    world, drawn, tmp_path, capsys
):
    page = tmp_path / "page.html"
    assert command(*world, "--study", page, "--study-pairs", "1") == 0
    key = tmp_path / "page.key.json"
    assert f"its key, not for raters: {key}" in capsys.readouterr().out
    about = json.loads(key.read_text())
    assert len(about["pairs"]) == 1
    rows = "".join(f"{about['study']},me,{pair},dynamics,tie\n" for pair in about["pairs"])
    (tmp_path / "me.csv").write_text(f"study,rater,pair,question,answer\n{rows}")
    assert command("--study-results", tmp_path / "me.csv", "--key", key) == 0
    assert "| first | second | dynamics | 0 | 0 | 1 | - | 1 |" in capsys.readouterr().out
