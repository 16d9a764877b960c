from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_generate import comment_of, images_of

import rf_core.batch as batch_module
from rf_core.__main__ import main
from rf_core.batch import Video, seed_of
from rf_core.fast.parallel import Process

ROOT = Path(__file__).parents[1]
TEXT = "a red circle moves right\n\n# not a prompt\nA  blue square, up!\na red circle moves right\n"
NAMES = {
    "00001_a-red-circle-moves-right.mp4",
    "00004_a-blue-square-up.mp4",
    "00005_a-red-circle-moves-right.mp4",
}


def arguments(folder: Path, prompts: Path, *more: str) -> list[str]:
    own = ("--prompts", str(prompts), "--output", str(folder), "--device", "cpu")
    length = () if "--seconds" in more else ("--chunks", "1")
    return ["generate", *own, *length, *more]


def prompt_file(folder: Path, text: str = TEXT) -> Path:
    path = folder / "prompts.txt"
    path.write_text(text, encoding="utf-8")
    return path


def manifest_of(folder: Path) -> list[dict]:
    texts = [path.read_text() for path in sorted(folder.glob("manifest-*.jsonl"))]
    return [json.loads(line) for text in texts for line in text.splitlines()]


@pytest.mark.slow
def test_a_copy_of_a_manifest_is_none(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "out")
    for name in ("manifest-0 (copy).jsonl", "manifest-0_old.jsonl", "manifest-00.jsonl"):
        (folder / name).write_text("mine")
    assert main(arguments(folder, prompt_file(tmp_path), "--seed", "7")) == 0
    assert (folder / "manifest-00.jsonl").read_text() == "mine"


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".mp4"}


def as_process(monkeypatch, rank: int, count: int) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", count), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder of the three videos of `TEXT`."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(arguments(folder / "out", prompt_file(folder), "--seed", "7")) == 0
    return folder / "out"


def test_each_line_becomes_a_video_named_by_its_number_with_all_it_was_made_with(finished):
    assert bytes_of(finished).keys() == NAMES
    entries = {entry["file"]: entry for entry in manifest_of(finished)}
    assert entries.keys() == NAMES
    entry = entries["00004_a-blue-square-up.mp4"]
    assert (entry["line"], entry["prompt"]) == (4, "A blue square, up!")
    assert (entry["base_seed"], entry["seed"]) == (7, seed_of(7, 4, 0))
    record = comment_of(finished / entry["file"])
    assert record["prompts"] == [[0, "recache", "A blue square, up!"]]
    shared = record.keys() & entry.keys()
    assert {"seed", "dtype", "crf", "cache", "sampler", "attention"} <= shared
    assert all(record[name] == entry[name] for name in shared)


def test_a_video_of_a_batch_is_the_one_its_prompt_and_seed_give_alone(finished, tmp_path):
    seed, output = str(seed_of(7, 5, 0)), tmp_path / "a.mp4"
    alone = ["generate", "--prompt", "a red circle moves right", "--device", "cpu"]
    assert main([*alone, "--chunks", "1", "--seed", seed, "--output", str(output)]) == 0
    expected = images_of(output)
    assert np.array_equal(images_of(finished / "00005_a-red-circle-moves-right.mp4"), expected)
    same_prompt = images_of(finished / "00001_a-red-circle-moves-right.mp4")
    assert not np.array_equal(same_prompt, expected)  # a duplicate has a seed of its own


@pytest.mark.slow
def test_two_processes_share_the_videos_out_and_make_what_one_makes(
    finished, tmp_path, monkeypatch, capsys
):
    prompts = prompt_file(tmp_path)
    for rank, made in ((1, 1), (0, 2)):
        as_process(monkeypatch, rank, 2)
        assert main(arguments(tmp_path / "out", prompts, "--seed", "7")) == 0
        assert f"process {rank} of 2: {made} videos to make, 0 are there" in capsys.readouterr().out
    assert bytes_of(tmp_path / "out") == bytes_of(finished)
    assert len(manifest_of(tmp_path / "out")) == 3
    assert len(list((tmp_path / "out").glob("manifest-*.jsonl"))) == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_batch_goes_on_without_repeating_or_skipping_a_video(
    finished, tmp_path, monkeypatch, capsys
):
    prompts, out = prompt_file(tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "rf_core", *arguments(out, prompts, "--seed", "7")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        assert any("1/3" in line for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    made = {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    assert 1 <= len(made) < 3
    (out / "00005_a-red-circle-moves-right.mp4.partial").write_text("cut short")
    assert main(arguments(out, prompts, "--seed", "7")) == 0
    assert f"{3 - len(made)} videos to make" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    assert bytes_of(out) == bytes_of(finished)
    assert sorted(e["file"] for e in manifest_of(out)) == sorted(NAMES)
    assert not list(out.glob("*.part*"))

    monkeypatch.setattr(batch_module, "open_networks", lambda resolved: pytest.fail("loaded"))
    assert main(arguments(out, prompts, "--seed", "7")) == 0


def test_a_kill_between_the_manifest_and_the_name_lists_the_video_once(finished, tmp_path):
    prompts, out = prompt_file(tmp_path, "a red circle moves right"), tmp_path / "out"
    assert main(arguments(out, prompts, "--seed", "7")) == 0
    (video,) = out.glob("*.mp4")
    video.rename(f"{video}.partial")
    assert main(arguments(out, prompts, "--seed", "7")) == 0
    assert video.read_bytes() == (finished / video.name).read_bytes()
    assert len(manifest_of(out)) == 1


@pytest.mark.slow
def test_more_seeds_add_takes_and_more_lines_add_videos_to_what_is_there(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(out, prompt_file(tmp_path, "one"))) == 0
    first = bytes_of(out)
    assert main(arguments(out, prompt_file(tmp_path, "one\ntwo"), "--seeds", "2")) == 0
    assert "3 videos to make, 1 are there" in capsys.readouterr().out
    now = bytes_of(out)
    assert now.keys() == {
        "00001_one.mp4",
        "00001_one_1.mp4",
        "00002_two.mp4",
        "00002_two_1.mp4",
    }
    assert now["00001_one.mp4"] == first["00001_one.mp4"] != now["00001_one_1.mp4"]
    assert len({entry["seed"] for entry in manifest_of(out)}) == 4


OTHERWISE = [
    (["--seed", "8"], "base_seed 7, now it is 8"),
    (["--crf", "30", "--seed", "7"], "crf 18, now it is 30"),
    (["--steps", "1000,500", "--seed", "7"], "sampler"),
    (["--seconds", "2", "--seed", "7"], "chunks 1, now it is 3"),
]


@pytest.mark.parametrize(("more", "message"), OTHERWISE, ids=[m for _, m in OTHERWISE])
def test_other_settings_in_the_same_folder_are_refused_by_name(
    more, message, finished, tmp_path, capsys
):
    before = bytes_of(finished)
    assert main(arguments(finished, prompt_file(tmp_path), *more)) == 1
    assert message in capsys.readouterr().err
    elsewhere = prompt_file(tmp_path, "\n" * 8 + "a line the folder has not seen")
    assert main(arguments(finished, elsewhere, *more)) == 1
    assert message in capsys.readouterr().err
    assert bytes_of(finished) == before


def test_a_changed_line_another_model_and_a_stranger_s_file_are_refused(
    finished, tmp_path, capsys, monkeypatch
):
    prompts = prompt_file(tmp_path, TEXT.replace("up!", "down!"))
    assert main(arguments(finished, prompts, "--seed", "7")) == 1
    assert "prompt A blue square, up!, now it is A blue square, down!" in capsys.readouterr().err
    monkeypatch.setattr(batch_module, "file_digest", lambda path: "another of the same name")
    assert main(arguments(finished, prompt_file(tmp_path), "--seed", "7")) == 1
    assert "model_file" in capsys.readouterr().err
    monkeypatch.undo()
    out = tmp_path / "out"
    out.mkdir()
    (out / "00001_a-red-circle-moves-right.mp4").write_text("mine")
    assert main(arguments(out, prompt_file(tmp_path))) == 1
    assert "in no manifest" in capsys.readouterr().err


WRONG = [
    (["--seeds", "0"], "seeds is 0"),
    (["--prompt", "x"], "leave out --prompt"),
    (["--resume"], "goes on by itself"),
    (["--overwrite"], "goes on by itself"),
    (["--width", "50"], "nearest is 48x64"),
    (["--output", "x.mp4"], "need a folder"),
    (["--output", "nowhere/x"], "nowhere does not exist"),
    (["--prompts", "none.txt"], "no file of prompts at none.txt"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[" ".join(w) for w, _ in WRONG])
def test_a_bad_option_gets_one_clear_sentence_before_anything_is_loaded(
    wrong, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(batch_module, "open_networks", lambda resolved: pytest.fail("loaded"))
    assert main(arguments(tmp_path / "out", prompt_file(tmp_path), *wrong)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error


def test_a_batch_needs_a_length_and_a_folder_and_a_single_video_takes_no_seeds(tmp_path, capsys):
    prompts = str(prompt_file(tmp_path))
    assert main(["generate", "--prompts", prompts, "--output", str(tmp_path / "o")]) == 1
    assert "need a length" in capsys.readouterr().err
    assert main(["generate", "--prompts", prompts, "--chunks", "1"]) == 1
    assert "--output FOLDER" in capsys.readouterr().err
    assert main(["generate", "--prompt", "x", "--seeds", "2"]) == 1
    assert "--seeds is for --prompts" in capsys.readouterr().err


def test_a_table_of_prompts_makes_a_video_a_row_and_says_which_have_none(tmp_path, capsys):
    table, out = tmp_path / "p.csv", tmp_path / "videos"
    table.write_bytes("\ufeffid;Prompt\r\n1;\r\n2;a red circle moves left\r\n".encode())
    assert main(arguments(out, table)) == 0
    assert [path.name for path in out.glob("*.mp4")] == ["00003_a-red-circle-moves-left.mp4"]
    assert "1 of 2 rows has no prompt and is left out (row 2)" in capsys.readouterr().out


def test_names_are_short_and_safe_whatever_the_prompt():
    def name(prompt: str, take: int = 0) -> str:
        return Video(line=12, take=take, prompt=prompt, seed=0).name

    assert name("A red circle", 3) == "00012_a-red-circle_3.mp4"
    assert name("../../etc: a|b*?") == "00012_etc-a-b.mp4"
    assert name("!!!") == "00012.mp4"
    assert name("红色的圆") == "00012_红色的圆.mp4"
    assert len(name("word " * 100)) < 60


def test_seeds_differ_over_lines_takes_and_bases_and_survive_json():
    seeds = [seed_of(b, n, t) for b in range(3) for n in range(1, 40) for t in range(3)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**53
    assert seed_of(0, 1, 0) == 3592057780131  # never to change: folders are gone on with


def test_each_process_takes_the_card_of_its_number(monkeypatch):
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    second = Process.of({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert (second.rank, second.world_size) == (5, 8)
    assert second.own_device("cuda") == "cuda:1" and chosen == [1]
    assert second.own_device("cpu") == "cpu"
    assert Process.of({}).own_device("cuda:1") == "cuda:1" and chosen == [1, 1]
    assert Process.of({}).own_device("cuda") == "cuda" and chosen == [1, 1]
    with pytest.raises(ValueError, match="one card for 8 processes"):
        second.own_device("cuda:0")
    with pytest.raises(ValueError, match="--nproc-per-node 2"):
        Process(rank=2, world_size=3, local_rank=2).own_device("cuda")


def test_processes_without_a_share_of_anything_are_refused(monkeypatch, capsys):
    as_process(monkeypatch, 0, 2)
    assert main(["generate", "--prompt", "x", "--chunks", "1", "--device", "cpu"]) == 1
    assert "2 processes would make the same video" in capsys.readouterr().err
