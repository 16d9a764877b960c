"""`generate --live` as somebody uses it: typed to, through a pipe, on a terminal, by OSC.

It runs on the bundled demo, at its own pace or as fast as it can; what it recorded is held against
`generate` with the same changes as a timeline, and against its replay by the bytes of the files.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from pythonosc.osc_message_builder import OscMessageBuilder
from safetensors.torch import save_file

from rf_core.__main__ import main
from rf_core.live import read_log
from rf_core.memory.footprint import footprint
from rf_core.memory.plan import Placement, phases
from rf_core.options import Files, Options, _sizes_of, plan
from rf_core.prompts import PromptTimeline, Switch
from rf_core.stream import Stream
from rf_core.weights.checkpoint import load_student, read_checkpoint
from rf_core.weights.lora import Lora
from rf_core.weights.strengths import Strengths, names_of

ROOT = Path(__file__).parents[1]
FIRST = "a red circle moves left"
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and terminals of POSIX")


def arguments(output: Path, *more: str, prompt: str = FIRST) -> list[str]:
    named = ["--prompt", prompt] if prompt else []
    return ["generate", *named, "--device", "cpu", "--output", str(output), *more]


def images_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


class Running:
    """`generate --live` in a process of its own."""

    def __init__(self, output: Path, *more: str, terminal: bool = False) -> None:
        command = [sys.executable, "-m", "rf_core", *arguments(output, "--live", *more)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._terminal = -1
        given: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        if terminal:
            self._terminal, inner = os.openpty()
            given = {"stdin": inner, "stdout": inner, "start_new_session": True}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.STDOUT, **given
        )
        if terminal:
            os.close(inner)
        self.told, self._news = "", threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        place = self._terminal if self._terminal >= 0 else self.process.stdout.fileno()
        while True:
            data = b""
            with suppress(OSError):  # a terminal whose other side is gone
                data = os.read(place, 4096)
            with self._news:
                self.told += data.decode("utf-8", "replace").replace("\r\n", "\n")
                self._news.notify_all()
            if not data:
                return

    def type(self, text: str) -> None:
        place = self._terminal if self._terminal >= 0 else self.process.stdin.fileno()
        assert self.process.poll() is None, f"it has ended:\n{self.told}"
        os.write(place, text.encode())

    def wait_for(self, pattern: str, times: int = 1) -> re.Match[str]:
        """The match, once something was told so often."""

        def found() -> list[re.Match[str]]:
            return list(re.finditer(pattern, self.told, re.MULTILINE))[times - 1 :]

        with self._news:
            matches = self._news.wait_for(found, timeout=60)
        assert matches, f"{pattern} was not told:\n{self.told}"
        return matches[0]

    def reach(self, chunk: int) -> None:
        """Wait until so many chunks are made."""
        pattern, at = r"^chunk (\d+) is next", -1
        while at < chunk:
            told = len(re.findall(pattern, self.told, re.MULTILINE))
            self.type("/status\n")
            at = int(self.wait_for(pattern, told + 1)[1])
            time.sleep(0.1)

    def ask(self, line: str, number: int) -> int:
        """Type a line that is a command of this number; the chunk that it is applied at."""
        self.type(line + "\n")
        self.wait_for(rf"^\[{number}\] received: ")
        return int(self.wait_for(rf"^\[{number}\] applied at chunk (\d+)$")[1])

    def end(self) -> int:
        if self.process.stdin is not None:
            self.process.stdin.close()
        return self.process.wait(timeout=60)


@contextmanager
def live(output: Path, *more: str, **options: Any) -> Iterator[Running]:
    running = Running(output, *more, **options)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def replayed(output: Path, *more: str) -> Path:
    """The folder that a replay of the log beside an output was made in."""
    folder = output.parent / "again"
    folder.mkdir()
    given = ("--replay", str(output.with_suffix(".jsonl")), *more)
    assert main(arguments(folder / output.name, *given, prompt="")) == 0
    return folder


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets lines wait in a pipe for a session in this process."""

    def pipe(text: str) -> None:
        reader, writer = os.pipe()
        os.write(writer, text.encode())
        os.close(writer)
        monkeypatch.setattr(sys, "stdin", os.fdopen(reader, encoding="utf-8"))

    return pipe


@pytest.mark.slow
def test_prompts_and_a_branch_through_a_pipe_are_what_a_timeline_makes_and_replay_to_the_byte(
    tmp_path: Path,
) -> None:
    output = tmp_path / "take.mp4"
    with live(output, "--chunks", "16") as running:
        running.wait_for("type a prompt")
        running.reach(2)
        square = running.ask("a blue square", 1)
        running.type("/mode blend 2\n/nonsense\n")
        running.wait_for("there is no /nonsense")
        running.reach(square + 1)
        circle = running.ask("a green circle", 2)
        running.reach(circle + 2)
        running.wait_for(r"^prompt: a green circle\nmode of the prompts that follow: blend 2")
        assert running.ask(f"/rewind {circle} night", 3) == circle
        running.wait_for(rf"^branch night begins at chunk {circle}$")
        coming = running.ask("/schedule 14 a red star", 4)
        assert running.end() == 0
        running.wait_for(rf"^\[4\] comes now, at chunk {coming}$")
        running.wait_for(r"^ended at chunk 16\n.*take.mp4: .* s of video\n.*take-night.mp4: 11.8")
    folder = replayed(output)
    for name in ("take.mp4", "take-night.mp4"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name
    timeline, whole = tmp_path / "t.txt", tmp_path / "whole.mp4"
    for name, last in (
        ("take.mp4", f"c{circle} [blend 2]: a green circle\n"),
        ("take-night.mp4", "c14 [blend 2]: a red star\n"),
    ):
        timeline.write_text(f"0s: {FIRST}\nc{square}: a blue square\n{last}")
        more = ("--timeline", str(timeline), "--chunks", "16", "--overwrite")
        assert main(arguments(whole, *more, prompt="")) == 0
        made = images_of(tmp_path / name)
        assert np.array_equal(made, images_of(whole)[: len(made)]), name


@pytest.mark.slow
@posix
def test_on_a_terminal_a_typed_line_takes_hold_ctrl_d_ends_nothing_and_ctrl_c_keeps_it(
    tmp_path: Path,
) -> None:
    output = tmp_path / "take.mp4"
    with live(output, terminal=True) as running:
        running.wait_for("without end, Ctrl-C stops")
        running.wait_for("type a prompt and press Enter, or /help")
        running.ask("a blue square", 1)
        running.type("\x04")
        running.wait_for("this ends nothing; /stop, or Ctrl-C, ends the session")
        running.type("/help\n")
        running.wait_for(r"^  /rewind CHUNK \[NAME\]  go back")
        running.ask("/pause", 2)
        chunk = running.ask("/resume", 3)
        assert running.ask("a green circle", 4) >= chunk
        running.process.send_signal(signal.SIGINT)
        assert running.end() == 130
        running.wait_for(r"^ended at chunk \d+\n.*take.mp4: .* s of video\n.*take.jsonl: its log")
        assert "Traceback" not in running.told and "Error" not in running.told
    made = images_of(output)
    assert len(made) == 12 * read_log(tmp_path / "take.jsonl").num_chunks - 3
    data = output.read_bytes()
    assert b"moof" not in data and data.index(b"moov") < data.index(b"mdat")


@pytest.mark.slow
@posix
def test_ctrl_c_ends_a_pause(tmp_path: Path) -> None:
    with live(tmp_path / "take.mp4") as running:
        running.ask("/pause", 1)
        running.process.send_signal(signal.SIGINT)
        assert running.end() == 130
        running.wait_for(r"^\[2\] applied at chunk")


@pytest.mark.slow
@posix
def test_a_second_ctrl_c_ends_the_pass_and_what_is_made_is_whole_and_replays(
    piped: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make = Stream.generate

    def impatient(stream: Stream, *given: Any, **named: Any) -> Any:
        if stream.state.num_chunks == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second one did not end the pass")
        return make(stream, *given, **named)

    output = tmp_path / "take.mp4"
    piped("a blue square\n")
    monkeypatch.setattr(Stream, "generate", impatient)
    assert main(arguments(output, "--live", "--pace", "max")) == 130
    monkeypatch.undo()
    captured = capsys.readouterr()
    assert captured.err == "stopped\n" and "ended at chunk 2: KeyboardInterrupt" in captured.out
    assert len(images_of(output)) == 21
    assert (replayed(output) / "take.mp4").read_bytes() == output.read_bytes()


@pytest.mark.slow
@posix
def test_of_a_session_that_is_killed_the_file_plays_and_the_log_makes_it_again(
    tmp_path: Path,
) -> None:
    output = tmp_path / "take.mp4"
    with live(output, "--pace", "max") as running:
        running.reach(2)
        running.ask("a blue square", 1)
        chunk = running.ask("/rewind -1", 2)
        while running.ask("/decay 0.5", int(running.told.count("] received")) + 1) < chunk + 4:
            pass
        running.process.kill()
        running.process.wait()
    names = ("take.mp4", "take-branch-2.mp4")
    folder = replayed(output)
    assert (folder / names[0]).read_bytes() == (tmp_path / names[0]).read_bytes()
    killed, whole = (images_of(place / names[1]) for place in (tmp_path, folder))
    assert 12 * chunk < len(killed) <= len(whole)
    assert np.array_equal(whole[: len(killed)], killed)


def sent(address: str, *words: Any) -> bytes:
    builder = OscMessageBuilder(address=address)
    for word in words:
        builder.add_arg(word)
    return builder.build().dgram


@pytest.mark.slow
def test_osc_steers_it_and_random_datagrams_do_nothing(tmp_path: Path) -> None:
    output, draw = tmp_path / "take.mp4", random.Random(0)
    with live(output, "--osc", "0") as running, socket.socket(type=socket.SOCK_DGRAM) as sender:
        port = int(running.wait_for(r"^OSC on 127.0.0.1:(\d+)$")[1])
        sender.connect(("127.0.0.1", port))
        sender.send(sent("/prompt", "a blue square", "cut"))
        begun = int(running.wait_for(r"^\[1\] applied at chunk (\d+)$")[1])
        running.wait_for(r"^\[1\] received: prompt \[cut\] a blue square$")
        good = [sent("/prompt", "snow"), sent("/rewind", 3), sent("/lora/ink", 0.5)]
        for number in range(2000):
            data = bytearray(draw.randbytes(draw.randrange(200)))
            if number % 2:
                data = bytearray(draw.choice(good))
                data[1] = draw.choice([0, 9, 65, 200, 255])  # of another address
            sender.send(data)
            time.sleep(0.0005)  # what the system has no room for, it drops
        sender.send(sent("/mode", "soft"))
        sender.send(sent("/prompt", "a green circle"))
        after = running.wait_for(r"^\[(\d+)\] received: prompt \[soft\] a green circle$")
        chunk = int(running.wait_for(rf"^\[{after[1]}\] applied at chunk (\d+)$")[1])
        assert chunk >= begun
        sender.send(sent("/stop"))
        assert running.end() == 0
        assert "Traceback" not in running.told
        assert 1 <= running.told.count("an OSC message is refused") < 60
    assert len(images_of(output)) > 0


# Lines that wait in a pipe when the session begins.


def test_a_pause_that_nothing_can_end_any_more_is_ended_and_the_length_is_reached(
    piped: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    piped("/pause")
    assert main(arguments(tmp_path / "a.mp4", "--live", "--chunks", "3", "--pace", "max")) == 0
    out = capsys.readouterr().out
    assert "[1] received: pause\n" in out and "nothing else can resume it" in out
    assert len(images_of(tmp_path / "a.mp4")) == 33


@pytest.mark.slow
def test_a_timeline_is_what_is_to_come_and_its_prompts_can_be_moved_and_dropped(
    piped: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timeline = tmp_path / "t.txt"
    timeline.write_text("0s: a red circle\nc3 [cut]: a blue square\nc5: a green star\n")
    piped("/move 1 4\n/drop 2\n")
    more = ("--live", "--timeline", str(timeline), "--chunks", "7", "--pace", "max")
    assert main(arguments(tmp_path / "a.mp4", *more, prompt="")) == 0
    assert "[1] comes now, at chunk 4\n" in capsys.readouterr().out
    assert read_log(tmp_path / "a.jsonl").texts == ["a red circle", "a blue square"]
    assert len(images_of(tmp_path / "a.mp4")) == 9 + 12 * 3 + 9 + 12 * 2


def test_what_is_no_line_of_text_is_refused_and_the_rest_is_read(
    piped: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    piped("a\0b\n" + "\x1b[2J\n" + "x" * 20_000 + "\n/mode soft\nlast")
    assert main(arguments(tmp_path / "a.mp4", "--live", "--chunks", "2")) == 0
    out = capsys.readouterr().out
    assert out.count("not taken: text h") == 2 and "\x1b" not in out and "\0" not in out
    assert "[2] received: prompt [soft] last\n" in out


@pytest.mark.slow
def test_a_start_picture_stands_at_the_head_and_is_replayed(
    piped: Callable[[str], None], tmp_path: Path
) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    start = ("--start", str(tmp_path / "red.png"))
    piped("a blue square\n")
    assert main(arguments(tmp_path / "a.mp4", "--live", "--chunks", "4", *start)) == 0
    assert len(images_of(tmp_path / "a.mp4")) == 45
    folder = replayed(tmp_path / "a.mp4", *start)
    assert (folder / "a.mp4").read_bytes() == (tmp_path / "a.mp4").read_bytes()


# LoRAs.


@pytest.fixture(scope="module")
def ink(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the demo's student, and one of other weights that begins with the same names."""
    path = tmp_path_factory.mktemp("loras") / "ink.safetensors"
    config = read_checkpoint(Files().model).config
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in ("blocks.0.self_attn.q", "blocks.0.cross_attn.k", "blocks.1.ffn.0"):
        out = config.ffn_dim if layer.endswith("ffn.0") else config.dim
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(
            4, config.dim, generator=draw
        )
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = 0.1 * torch.randn(
            out, 4, generator=draw
        )
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_strength_that_is_set_is_to_the_bit_what_is_loaded_so(
    ink: Path, dtype: torch.dtype, tmp_path: Path
) -> None:
    def loaded(*strengths: float) -> Any:
        loras = tuple(Lora(path=ink, strength=each) for each in strengths)
        return load_student(Files().model, device="cpu", dtype=dtype, loras=loras)[0], loras

    model, loras = loaded(0.3, -1.0)
    named = names_of(loras)
    assert list(named) == ["ink", "ink-2"]
    strengths = Strengths(model, read_checkpoint(Files().model).tensors, named)
    places = {name: each.data_ptr() for name, each in model.state_dict().items()}
    for first, second in ((0.6, -1.0), (0.6, 0.0), (-2.5, 0.7), (0.3, 0.7)):
        strengths("ink", first)
        strengths("ink-2", second)
        expected = loaded(first, second)[0].state_dict()
        for name, found in model.state_dict().items():
            assert torch.equal(found, expected[name]), name
    assert places == {name: each.data_ptr() for name, each in model.state_dict().items()}


def test_a_strength_that_overflows_is_refused_and_changes_nothing(ink: Path) -> None:
    lora = Lora(path=ink, strength=0.5)
    model, _ = load_student(Files().model, device="cpu", dtype=torch.float16, loras=(lora,))
    before = {name: each.clone() for name, each in model.state_dict().items()}
    strengths = Strengths(model, read_checkpoint(Files().model).tensors, {"ink": lora})
    with pytest.raises(ValueError, match="overflows float16; take a smaller one"):
        strengths("ink", 1e8)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


@pytest.mark.slow
def test_a_live_strength_is_in_the_picture_and_in_the_replay(
    piped: Callable[[str], None], ink: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = ("--lora", f"{ink}:0.0")
    piped("/lora ink 0.9\n/lora none 1\n/status\n")
    output = tmp_path / "a.mp4"
    assert main(arguments(output, "--live", "--chunks", "4", "--pace", "max", *lora)) == 0
    out = capsys.readouterr().out
    assert "[2] refused: there is no LoRA 'none' to set; there is ink\n" in out
    folder = replayed(output, "--lora", str(ink))  # its strength is the log's
    assert (folder / "a.mp4").read_bytes() == output.read_bytes()
    plain = tmp_path / "plain.mp4"
    assert main(arguments(plain, "--chunks", "4")) == 0
    assert not np.array_equal(images_of(plain), images_of(output))
    capsys.readouterr()
    log = str(output.with_suffix(".jsonl"))
    assert main(arguments(tmp_path / "b.mp4", "--replay", log, prompt="")) == 1
    assert "the log's LoRAs are ink, given are none; give the same" in capsys.readouterr().err


def test_weights_in_8_bits_keep_the_strength_they_have_and_say_so(
    piped: Callable[[str], None], ink: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    piped("/lora ink 0.9\n")
    more = ("--live", "--chunks", "3", "--lora", str(ink), "--weights", "fp8")
    assert main(arguments(tmp_path / "a.mp4", *more)) == 0
    assert "[1] refused: the strength of ink is merged into fp8 weights" in capsys.readouterr().out


# What it is asked for, and where it writes.


@pytest.fixture
def log(piped: Callable[[str], None], tmp_path: Path) -> Path:
    piped("a blue square\n")
    assert main(arguments(tmp_path / "take.mp4", "--live", "--chunks", "4", "--pace", "max")) == 0
    return tmp_path / "take.jsonl"


@pytest.mark.slow
def test_an_edited_log_is_refused_for_what_it_is_and_makes_another_video_where_that_is_wanted(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.write_text(log.read_text().replace("a blue square", "a green circle"))
    given = arguments(tmp_path / "other.mp4", "--replay", str(log), prompt="")
    assert main(given) == 1
    error = capsys.readouterr().err
    assert "is not what it was" in error and "--edited" in error and error.count("\n") == 1
    assert main([*given, "--overwrite", "--edited"]) == 0
    assert not np.array_equal(images_of(tmp_path / "other.mp4"), images_of(tmp_path / "take.mp4"))


@pytest.mark.parametrize(
    "more, why",
    [
        (("--osc", "9000"), "--osc is for --live; leave it out"),
        (("--pace", "max"), "--pace is for --live; leave it out"),
        (("--edited",), "--edited is for --replay; leave it out"),
        (("--live", "--resume"), "--resume is not for --live, whose log makes it again"),
        (("--live", "--snapshot-every", "3"), "--snapshot-every is not for --live"),
        (("--live", "--seeds", "2"), "--seeds is not for --live, which makes one video"),
        (("--live", "--parallel", "context"), "is of one process; leave out --parallel"),
        (("--replay", "LOG"), "--prompt is not for --replay: the log holds it; leave it out"),
        (("--live", "--replay", "LOG"), "--replay is not for --live"),
    ],
)
def test_an_option_that_says_nothing_there_is_refused(
    more: tuple[str, ...], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "a.mp4", *more)) == 1
    assert why in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--seed=1", "--width=64", "--window=9", "--chunks=3"])
def test_what_the_log_holds_is_not_given_again(
    option: str, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--replay", str(log), option)
    assert main(arguments(tmp_path / "a.mp4", *more, prompt="")) == 1
    assert "the log holds it; leave it out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_log_that_is_damaged_or_of_another_kind_is_a_sentence(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *rest = log.read_text().splitlines()
    start, broken = json.loads(first), tmp_path / "broken.jsonl"
    changes: list[tuple[str, Any, str]] = [
        ("width", "64", "no whole numbers"),
        ("seed", None, "no whole numbers"),
        ("width", 10**9, "width is 1000000000"),
        ("cache", {"window": 9}, "does not say what its stream was"),
        ("sampler", {}, "does not say what its stream was"),
        ("dtype", "torch.save", "has dtype torch.save, this one has torch.float32"),
        ("chunk", 3, "begins within a video"),
        ("fingerprint", "0", "replay it with what it was made with"),
        ("decoder", "taehv", "replay it with what it was made with"),
    ]
    for number, (name, value, why) in enumerate(changes):
        lines = [json.dumps({**start, "stream": {**start["stream"], name: value}})]
        broken.write_text("\n".join([*lines, *(rest if name != "chunk" else [])]) + "\n")
        more = ("--replay", str(broken))
        assert main(arguments(tmp_path / f"{number}.mp4", *more, prompt="")) == 1
        error = capsys.readouterr().err
        assert why in error and error.count("\n") == 1, error


def test_files_of_another_take_are_not_written_over_unasked(
    piped: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("take.jsonl", "take-night.mp4"):
        (tmp_path / name).write_bytes(b"mine")
        more = ("--live", "--chunks", "1")
        assert main(arguments(tmp_path / "take.mp4", *more)) == 1
        assert f"{name} exists, where a branch or the log of take.mp4" in capsys.readouterr().err
        piped("")
        assert main(arguments(tmp_path / "take.mp4", *more, "--overwrite")) == 0
        (tmp_path / "take.mp4").unlink()
        (tmp_path / "take.jsonl").unlink()
    assert (tmp_path / "take-night.mp4").read_bytes() == b"mine"


@pytest.mark.slow
def test_on_a_card_a_text_encoder_that_stays_is_counted_with_the_stream() -> None:
    timeline = PromptTimeline().append(0, "s", Switch(), "x")
    options = Options(timeline=timeline, output=Path("a.mp4"), keeps_text=True)
    parts = footprint(_sizes_of(plan(options)))
    for text_offload in ("none", "stream"):
        counted = phases(parts, Placement(group_frames=3, text_offload=text_offload))
        named = {name: phase["text encoder"] for name, phase in counted.items()}
        assert named["generate"] == named["decode"] == named["text"] > 0
