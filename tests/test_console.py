from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import training.__main__ as training
import training.world.__main__ as world
from rf_core import __main__ as engine
from rf_core.console import forgiving_console
from rf_core.video import read_metadata

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PROMPT = "红色的圆 🔴 moves left"


def command(prompt: str, output: Path) -> list[str]:
    own = ["--prompt", prompt, "--chunks", "1", "--device", "cpu", "--output", str(output)]
    return [sys.executable, "-m", "rf_core", "generate", *own]


def in_a_process(encoding: str, arguments: list[str], monkeypatch) -> tuple[int, bytes, bytes]:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True)
    return done.returncode, done.stdout, done.stderr


def in_this_one(encoding: str, arguments: list[str], monkeypatch) -> tuple[int, bytes, bytes]:
    """With the streams that Python opens for `PYTHONIOENCODING`."""
    name, _, errors = encoding.partition(":")
    out = io.TextIOWrapper(io.BytesIO(), encoding=name, errors=errors or "strict")
    log = io.TextIOWrapper(io.BytesIO(), encoding=name, errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", log)
    code = engine.main(arguments[3:])
    out.flush(), log.flush()
    return code, out.buffer.getvalue(), log.buffer.getvalue()


@pytest.mark.parametrize(
    ("encoding", "run"),
    [("cp1252", in_a_process), ("ascii", in_this_one), ("cp1252:strict", in_this_one)],
    ids=["cp1252", "ascii", "cp1252:strict"],
)
def test_a_console_that_lacks_the_prompt_s_characters_gets_escapes_and_the_video_is_made(
    tmp_path, encoding, run, monkeypatch
):
    output = tmp_path / "圆.mp4"
    code, out, errors = run(encoding, command(PROMPT, output), monkeypatch)
    assert (code, errors) == (0, b"")
    assert rb"\u7ea2\u8272\u7684\u5706 \U0001f534 moves left" in out
    assert read_metadata(output)["title"] == PROMPT


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_reader_that_is_gone_does_not_end_the_run(tmp_path):
    output, (reader, writer) = tmp_path / "a.mp4", os.pipe()
    os.close(reader)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command("x", output), cwd=ROOT, env=environment, stdout=writer, stderr=writer
    )
    os.close(writer)
    assert done.returncode == 0
    assert read_metadata(output)["title"] == "x"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's full disk")
def test_a_full_disk_behind_stdout_does_not_end_the_run(tmp_path):
    output = tmp_path / "a.mp4"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(command("x", output), cwd=ROOT, env=environment, stdout=full)
    assert done.returncode == 0
    assert read_metadata(output)["title"] == "x"


def test_an_encodable_text_is_written_as_it_is_and_the_streams_come_back(monkeypatch):
    plain, log = (io.TextIOWrapper(io.BytesIO(), encoding="cp1252") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", plain)
    monkeypatch.setattr(sys, "stderr", log)
    with forgiving_console():
        sys.stdout.write("fünf ")
        sys.stdout.write("fünf 圆\n")
        logging.StreamHandler().handle(logging.makeLogRecord({"msg": "圆"}))
        sys.stdout.reconfigure(line_buffering=True)  # what a stream has is still there
    assert (sys.stdout, sys.stderr) == (plain, log)
    log.flush()
    assert plain.buffer.getvalue().decode("cp1252") == "fünf fünf \\u5706\n"
    assert log.buffer.getvalue() == b"\\u5706\n"


def test_a_process_without_a_console_runs(monkeypatch, tmp_path):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert engine.main(command("x", tmp_path / "a.mp4")[3:]) == 0
    assert (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (engine.main, ["inspect", "圆.pth"]),
        (training.main, ["export", "圆", "a.safetensors"]),
        (training.main, ["estimate", "--set", "data.prompts=圆"]),
        (world.main, ["release", "--out", "圆"]),
        (world.main, ["evaluate", "--student", "圆.safetensors"]),
    ],
)
def test_no_command_ends_by_what_it_prints(main, arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(arguments) == 1
    sys.stderr.flush()
    assert b"\\u5706" in sys.stderr.buffer.getvalue()


def test_a_stop_while_torch_is_opened_is_one_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopping:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "rf_core.commands":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "rf_core.commands", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Stopping(), *sys.meta_path])
    assert engine.main(["generate"]) == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize(
    ("more", "said"),
    [({}, "done\ntorn down\n"), ({"RANK": "0"}, "done\n")],
    ids=["alone", "under torchrun"],
)
def test_a_process_of_torchrun_ends_without_the_interpreter_s_teardown(more, said):
    script = (
        "import atexit; from rf_core.console import exit_process\n"
        "atexit.register(print, 'torn down'); print('done'); exit_process(3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "RANK"} | more,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, said, "")
