from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import training.__main__ as training
import training.world.__main__ as world
from rf_core import attention, commands
from rf_core.__main__ import main
from rf_core.attention import check_device
from rf_core.config import CacheConfig, ModelConfig, SamplerConfig
from rf_core.measure.bench import BenchOptions
from rf_core.memory.footprint import Sizes
from rf_core.ranges import check_folder_writable, check_numbers, check_writable
from training.data.prompts import DataConfig
from training.run.config import from_dict, from_json
from training.stages.recipes import DistilConfig, OutputConfig

NAN, INF = float("nan"), float("inf")
NOBODY_WRITES = Path("/proc")  # not even root, whom permissions do not hold


@pytest.mark.parametrize("value", [NAN, INF, -INF, 0, -1, 10**30, 1.01])
def test_a_number_outside_its_range_is_named_with_the_range(value):
    with pytest.raises(ValueError, match=r"x is .*; give a number from 0.5 to 1$"):
        check_numbers(SimpleNamespace(x=value), x=(0.5, 1))


@pytest.mark.parametrize("value", [None, "auto", 0.5, 1])
def test_both_ends_of_a_range_and_what_is_not_asked_for_pass(value):
    check_numbers(SimpleNamespace(x=value), x=(0.5, 1))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SamplerConfig(shift=NAN), "shift is nan"),
        (lambda: CacheConfig(window_frames=1025), "window_frames is 1025; give .* from 1 to 1024"),
        (lambda: from_dict(CacheConfig, {"window_frames": 10**9}), "window_frames is 1000000000"),
        (lambda: Sizes(model=ModelConfig(), height=0, width=64), "height is 0"),
        (lambda: Sizes(model=ModelConfig(), height=64, width=64, batch=0), "batch is 0"),
        (lambda: BenchOptions(width=0), "width is 0"),
        (lambda: OutputConfig(checkpoint_every=0), "checkpoint_every is 0"),
        (lambda: OutputConfig(checkpoint_minutes=NAN), "checkpoint_minutes is nan"),
        (lambda: DataConfig(encode_batch=0), "encode_batch is 0"),
        (lambda: DataConfig(limit=-1), "limit is -1"),
        (lambda: from_dict(DistilConfig, {"run": {"runaway": NAN}}), "config.run.runaway is nan"),
        (
            lambda: from_dict(DistilConfig, {"run": {"runaway": 10**400}}),
            "config.run.runaway is inf",
        ),
        (
            lambda: from_json(DistilConfig, '{"run": {"redmd": {"shift": -1}}}'),
            "config.run.redmd: shift is -1.0; give a number from 0.01",
        ),
        (
            lambda: from_json(DistilConfig, '{"run": {"redmd": {"guidance": NaN}}}'),
            "config.run.redmd.guidance is nan; give a finite number",
        ),
        (lambda: from_dict(DistilConfig, {"run": {"generator": {"rate": -1.0}}}), "rate is -1.0"),
        (lambda: from_dict(DistilConfig, {"run": {"seed": -1}}), "config.run: seed is -1"),
    ],
)
def test_settings_are_checked_where_they_are_kept(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--size", "demo", "--batch", "0", "--available", "1GB"],
        ["plan", "--size", "demo", "--device", "foo"],
        ["plan", "--size", "demo", "--device", "cuda:99"],
        ["bench", "--width", "0"],
        ["profile", "--height", "-16"],
        ["inspect", "a.pth", "--num-heads", "0"],
        ["convert", "a.pth", "nowhere/b.safetensors"],
        ["bench", "--json", "nowhere/b.json"],
        ["generate", "--device", "mps", "--prompt", "x"],
    ],
)
def test_other_commands_give_one_sentence_too(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("device", ["meta", "xpu", "mps", "cuda:99", "foo"])
def test_the_trainer_refuses_a_device_before_anything_is_loaded(device, capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert training.main(["re_dmd", "--out", "x", "--device", device]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and device in error and error.count("\n") == 1


def test_mps_is_suggested_where_it_is_and_said_to_be_untried(monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match="cuda:1 or mps"):
        attention.device_kind("foo")
    check_device("mps", "auto", "auto")
    assert "nothing here was ever run on mps" in caplog.text


def typed(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from typed(each)
        elif action.type not in (None, int, float, str, Path):
            yield action


@pytest.mark.parametrize("parsers", [commands, training, world])
def test_every_reader_of_an_argument_says_itself_what_is_wrong(parsers):
    for action in typed(parsers._parser()):
        for text in (
            "",
            "foo",
            "x.safetensors:0,8",
            "1000 750",
            "1,",
            "1/",
            "3/2",
            "0x",
            "x.pt:nan",
        ):
            try:
                action.type(text)
            except argparse.ArgumentTypeError as error:
                assert ";" in str(error), (action.dest, text)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--lora", "x.safetensors:0,8"], "--lora 'x.safetensors:0,8' is not `file:strength`"),
        (["--steps", "1000 750"], "steps are '1000 750'; give whole numbers with commas"),
        (
            ["--group-frames", "foo"],
            "group_frames is 'foo'; give a whole number of frames, or auto",
        ),
    ],
)
def test_the_command_line_shows_what_the_reader_says(given, said, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--prompt", "x", *given])
    assert said in capsys.readouterr().err


def test_a_place_that_takes_a_file_is_left_as_it_was(tmp_path):
    (tmp_path / "a").write_text("mine")
    check_writable(tmp_path / "a")
    check_writable(tmp_path / "b")
    check_folder_writable(tmp_path / "new" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "mine"


@pytest.mark.skipif(not NOBODY_WRITES.is_dir(), reason="Linux's folder of processes")
def test_a_place_that_takes_no_file_is_named_before_anything_is_loaded(
    tmp_path, capsys, monkeypatch
):
    with pytest.raises(ValueError, match=r"/proc/a\.mp4 cannot be written: "):
        check_writable(NOBODY_WRITES / "a.mp4")
    with pytest.raises(ValueError, match="nothing can be made in /proc/run: "):
        check_folder_writable(NOBODY_WRITES / "run")
    monkeypatch.setattr("rf_core.commands.generate.load", lambda plan: pytest.fail("loaded"))
    output = ["--output", str(NOBODY_WRITES / "a.mp4")]
    assert main(["generate", "--prompt", "x", "--device", "cpu", *output]) == 1
    assert "/proc/a.mp4 cannot be written" in capsys.readouterr().err
    assert training.main(["re_dmd", "--out", "/proc/run", "--device", "cpu"]) == 1
    assert "nothing can be made in /proc/run" in capsys.readouterr().err


def test_folders_files_and_long_names_in_the_wrong_place_are_refused(tmp_path):
    (tmp_path / "file").touch()
    for path, said in (
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "none" / "a.mp4", "none does not exist; create it first"),
        (tmp_path / ("a" * 300), "cannot be written: "),
    ):
        with pytest.raises(ValueError, match=said):
            check_writable(path)
    with pytest.raises(ValueError, match="file is a file; name a folder"):
        check_folder_writable(tmp_path / "file")
