from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import av
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from rf_core import devices
from rf_core import generate as generate_module
from rf_core.__main__ import main
from rf_core.config import CacheConfig, ModelConfig
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.decoders.vae_files import vae_metadata
from rf_core.state import Snapshot
from rf_core.stream import Stream
from rf_core.text import UMT5Encoder, byte_ids, save_text_encoder
from rf_core.weights.checkpoint import write_checkpoint

ROOT = Path(__file__).parents[1]
MODEL = ModelConfig(
    dim=48, ffn_dim=64, freq_dim=32, text_dim=16, text_len=24, num_heads=2, num_layers=2
)  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder with a tiny student, VAE and text encoder of random weights."""
    return write_weights(tmp_path_factory.mktemp("weights"))


def write_weights(folder: Path) -> Path:
    from transformers import UMT5Config, UMT5EncoderModel

    student = tiny.model(MODEL)
    write_checkpoint(
        folder / "student.safetensors",
        student.state_dict(),
        MODEL,
        CacheConfig(decay=0.9),
        tiny.TWO_STEPS,
        size=(32, 48),
    )
    torch.manual_seed(0)
    config = VAEConfig(dim=4, num_res_blocks=1)
    vae = WanVAE(config)
    metadata = vae_metadata(config)
    save_file(vae.state_dict(), folder / "vae.safetensors", metadata=metadata)
    umt5 = UMT5Config(
        vocab_size=260, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    encoder = UMT5Encoder(UMT5EncoderModel(umt5), byte_ids, text_len=24)
    save_text_encoder(folder / "text.safetensors", encoder)
    return folder


def arguments(weights: Path, output: Path, *more: str) -> list[str]:
    return [
        "generate",
        *("--model", str(weights / "student.safetensors")),
        *("--vae", str(weights / "vae.safetensors")),
        *("--text-encoder", str(weights / "text.safetensors")),
        *("--device", "cpu", "--output", str(output)),
        *more,
    ]


def images_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def assert_same_images(found: np.ndarray, expected: np.ndarray) -> None:
    """To the bit; else by how much, and from where on."""
    assert found.shape == expected.shape
    off = np.abs(found.astype(int) - expected)
    places = np.argwhere(off)
    assert not len(places), (
        f"{len(places)} of {off.size} numbers differ, by {off.max()} at most; the first is at "
        f"{places[0]}, in images {np.unique(places[:, 0])}"
    )


def comment_of(path: Path) -> dict:
    with av.open(str(path)) as file:
        return json.loads(file.metadata["comment"])


def test_a_prompt_becomes_a_video_of_the_length_asked_for(weights, tmp_path, capsys):
    output = tmp_path / "a.mp4"
    assert (
        main(arguments(weights, output, "--prompt", "a cat", "--seconds", "2", "--seed", "5")) == 0
    )
    images = images_of(output)
    assert images.shape == (9 + 12 * 2, 32, 48, 3)
    record = comment_of(output)
    assert (record["seed"], record["cache"]["decay"]) == (5, 0.9)
    assert record["prompts"] == [[0, "recache", "a cat"]]
    out = capsys.readouterr().out
    assert "chunk 3/3" in out and "network" in out and "decode" in out and "2.06 s" in out
    assert not list(tmp_path.glob("*.state*"))


def test_an_average_in_the_models_file_is_taken_and_told(weights, tmp_path, capsys):
    raw = load_file(weights / "student.safetensors")
    both = {"model": {key: tensor * 0.5 for key, tensor in raw.items()}, "ema": raw}
    torch.save(both, tmp_path / "both.pt")
    common = ("--prompt", "a cat", "--seconds", "0.5", "--model", str(tmp_path / "both.pt"))
    common += ("--num-heads", "2", "--width", "48", "--height", "32")
    for name, more in (("ema", ()), ("model", ("--submodel", "model"))):
        given = arguments(weights, tmp_path / f"{name}.mp4", *common, *more)
        assert main(given) == 0
    out = capsys.readouterr().out
    assert "model: ema, an average over training, is taken (also there: model)" in out
    assert "model: model is taken (also there: ema)" in out
    assert not np.array_equal(*(images_of(tmp_path / f"{n}.mp4") for n in ("ema", "model")))


def test_a_timeline_is_printed_resolved_and_a_cut_makes_a_short_chunk(weights, tmp_path, capsys):
    timeline = tmp_path / "t.txt"
    timeline.write_text("0s: a cat\nc2 [soft]: a dog\nc3 [cut]: a city\n", encoding="utf-8")
    output = tmp_path / "a.mp4"
    assert main(arguments(weights, output, "--timeline", str(timeline), "--chunks", "4")) == 0
    assert len(images_of(output)) == 9 + 12 + 12 + 9
    assert "1.31" in capsys.readouterr().out.splitlines()[2]


def test_the_same_seed_gives_the_same_video_and_another_seed_another(weights, tmp_path):
    videos = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        output = tmp_path / f"{name}.mp4"
        main(arguments(weights, output, "--prompt", "x", "--chunks", "1", "--seed", seed))
        videos.append(images_of(output))
    assert np.array_equal(videos[0], videos[1])
    assert not np.array_equal(videos[0], videos[2])


def test_window_and_steps_on_the_command_line_go_before_the_checkpoints_own(weights, tmp_path):
    output = tmp_path / "a.mp4"
    more = ("--window", "6", "--sink", "0", "--steps", "1000,600,300", "--shift", "3")
    assert main(arguments(weights, output, "--prompt", "x", "--chunks", "1", *more)) == 0
    record = comment_of(output)
    assert (record["cache"]["window_frames"], record["cache"]["sink_frames"]) == (6, 0)
    assert (record["sampler"]["steps"], record["sampler"]["shift"]) == ([1000, 600, 300], 3.0)
    assert record["cache"]["decay"] == 0.9


def test_an_anchor_on_the_command_line_is_recorded_and_one_that_is_none_is_not(weights, tmp_path):
    for more, found in (((), None), (("--sink", "2", "--anchor", "1"), 1)):
        output = tmp_path / f"{found}.mp4"
        assert main(arguments(weights, output, "--prompt", "x", "--chunks", "1", *more)) == 0
        assert comment_of(output)["cache"].get("anchor_frames") == found


def test_a_picture_and_a_clip_stand_at_the_head_of_the_video(weights, tmp_path):
    first, second = tmp_path / "first.mp4", tmp_path / "second.mp4"
    main(arguments(weights, first, "--prompt", "x", "--chunks", "2"))
    more = ("--prompt", "x", "--chunks", "3", "--start", str(first))
    assert main(arguments(weights, second, *more)) == 0
    assert len(images_of(second)) == 9 + 12 * 2

    picture, third = tmp_path / "picture.png", tmp_path / "third.mp4"
    with av.open(str(picture), "w", format="image2") as file:
        stream = file.add_stream("png", width=60, height=40)
        stream.pix_fmt = "rgb24"
        frame = av.VideoFrame.from_ndarray(np.full((40, 60, 3), 128, np.uint8), format="rgb24")
        file.mux([*stream.encode(frame), *stream.encode()])
    more = ("--prompt", "x", "--chunks", "2", "--start", str(picture))
    assert main(arguments(weights, third, *more)) == 0
    assert len(images_of(third)) == 9 + 12


@pytest.fixture(scope="module")
def clip(weights, tmp_path_factory) -> Path:
    """A clip of three chunks, which the window holds."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    assert main(arguments(weights, path, "--prompt", "x", "--chunks", "3", "--seed", "5")) == 0
    return path


def started(weights, clip, output, change, *more) -> int:
    """A video of six chunks that starts with the clip, with changes of prompt."""
    timeline = output.with_suffix(".txt")
    timeline.write_text(f"0s: a cat\n{change}\n", encoding="utf-8")
    given = ("--timeline", str(timeline), "--start", str(clip), "--chunks", "6")
    return main(arguments(weights, output, *given, *more))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["soft", "recache", "blend 2", "cut"])
def test_a_change_within_the_start_clip_acts_after_it_and_is_told(
    mode, weights, clip, tmp_path, capsys
):
    def video(name, change):
        assert started(weights, clip, tmp_path / name, change) == 0
        return images_of(tmp_path / name)

    plain = video("plain.mp4", "")
    assert len(plain) == 9 + 12 * 5
    capsys.readouterr()
    after = video("after.mp4", f"c3 [{mode}]: a dog")
    assert "the start clip" not in capsys.readouterr().out
    for change in (
        f"c1 [{mode}]: a dog",
        f"c2 [{mode}]: a dog",
        f"c1 [cut]: b\nc2 [{mode}]: a dog",
    ):
        shown = video("within.mp4", change)
        assert "note: 'a dog', asked for at " in (told := capsys.readouterr().out)
        assert "ignored: 'b'" in told or "cut]: b" not in change
        assert np.array_equal(shown, after)
        assert np.array_equal(shown[:33], plain[:33])  # all of the clip
        assert len(shown) == len(plain) - 3 * (mode == "cut")
        assert not np.array_equal(shown[33:42], plain[33:42])
        (tmp_path / "within.mp4").unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "mode"),
    [(1, "soft"), (2, "recache"), (1, "blend 2"), (2, "cut"), (3, "cut"), (4, "blend 2")],
)
def test_a_run_from_a_clip_that_ends_after_any_chunk_resumes_to_the_very_same_images(
    at, mode, weights, clip, tmp_path, monkeypatch
):
    output, change = tmp_path / "a.mp4", f"c{at} [{mode}]: a dog"
    assert started(weights, clip, output, change) == 0
    expected, hand_on = images_of(output), generate_module._hand_on
    for last in range(6):

        def ends(chunk, *given, last=last):
            images = hand_on(chunk, *given)
            if chunk.index == last:
                raise OSError("the end")
            return images

        monkeypatch.setattr(generate_module, "_hand_on", ends)
        often = ("--snapshot-every", "1")
        assert started(weights, clip, output, change, *often, "--overwrite") == 1
        monkeypatch.undo()
        assert started(weights, clip, output, change, *often, "--resume") == 0
        assert_same_images(images_of(output), expected)


def test_a_video_shorter_than_its_start_clip_is_refused(weights, clip, tmp_path, capsys):
    for length in (("--chunks", "2"), ("--seconds", "1")):
        more = ("--prompt", "x", "--start", str(clip), *length)
        assert main(arguments(weights, tmp_path / "a.mp4", *more)) == 1
        assert "the start clip alone lasts 3 chunks" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="names that Windows does not allow")
def test_a_colon_in_a_relative_name_is_part_of_it(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = Path("take:1.mp4")
    more = ("--prompt", "x", "--chunks", "2", "--start", "shot:1.mp4")
    assert main(arguments(weights, Path("shot:1.mp4"), "--prompt", "x", "--chunks", "1")) == 0
    assert main(arguments(weights, output, *more)) == 0
    assert len(images_of(output.absolute())) == 9 + 12
    assert main(arguments(weights, output, *more, "--resume")) == 0
    Path("p.txt").write_text("x")
    batch = ("--prompts", "p.txt", "--chunks", "1")
    assert main(arguments(weights, Path("run:1"), *batch)) == 0
    assert len(images_of(tmp_path / "run:1" / "00001_x.mp4")) == 9


@pytest.mark.parametrize("name", ["text.png", "animated.webp", "cut.jpg"])
def test_a_start_that_cannot_be_read_is_named_before_anything_is_loaded(
    name, weights, tmp_path, capsys, monkeypatch
):
    pil = pytest.importorskip("PIL.Image")
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    first, second = map(pil.fromarray, noise)
    first.save(tmp_path / "a.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:1000])
    first.save(tmp_path / "animated.webp", save_all=True, append_images=[second])
    (tmp_path / "text.png").write_text("a red circle\n")
    monkeypatch.setattr("rf_core.commands.generate.load", lambda plan: pytest.fail("loaded"))
    more = ("--prompt", "x", "--chunks", "2", "--start", str(tmp_path / name))
    assert main(arguments(weights, tmp_path / "a.mp4", *more)) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / name} ") and error.count("\n") == 1


def run_and_stop(weights, output, number, lines, *more) -> subprocess.Popen:
    """Start a long run, send it a signal after some lines of progress, wait for its end."""
    command = [sys.executable, "-m", "rf_core", *arguments(weights, output, *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    seen = 0
    while seen < lines:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        seen += line.startswith("chunk ") and "fps" in line
    process.send_signal(number)
    process.communicate(timeout=60)
    return process


def stop_here(monkeypatch, weights, output, number, chunks, *more) -> int:
    """The same in this process, where what is tested is what comes after: quicker to start."""
    make = Stream.generate

    def stopping(stream, *given, **named):
        if stream.state.num_chunks == chunks:
            signal.raise_signal(number)
        return make(stream, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "generate", stopping)
        return main(arguments(weights, output, *more))


def length_of(path: Path) -> float:
    """Seconds that the file's index tells, as players and editors read it; nan for none."""
    with av.open(str(path)) as file:
        return math.nan if file.duration is None else file.duration / av.time_base


def is_indexed(path: Path) -> bool:
    """Whether the index is in front, and tells the length of what is there."""
    data = path.read_bytes()
    told = length_of(path) == pytest.approx(len(images_of(path)) / 16, abs=0.01)
    return told and b"moof" not in data and data.index(b"moov") < data.index(b"mdat")


TIMELINE = "0s: a cat\nc4 [blend 3]: a dog\nc9 [recache]: a bird\nc12 [cut]: a city\n"


@pytest.fixture(scope="module")
def undisturbed(weights, tmp_path_factory) -> tuple[Path, np.ndarray]:
    folder = tmp_path_factory.mktemp("whole")
    timeline, output = folder / "t.txt", folder / "whole.mp4"
    timeline.write_text(TIMELINE, encoding="utf-8")
    assert main(arguments(weights, output, "--timeline", str(timeline), "--chunks", "14")) == 0
    return timeline, images_of(output)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_run_plays_and_resumes_to_the_very_same_images(weights, undisturbed, tmp_path):
    timeline, expected = undisturbed
    output = tmp_path / "a.mp4"
    more = ("--timeline", str(timeline), "--chunks", "14", "--snapshot-every", "2")
    run_and_stop(weights, output, signal.SIGKILL, 5, *more)
    cut = images_of(output)
    assert 9 + 12 * 4 <= len(cut) < len(expected)
    assert np.array_equal(cut, expected[: len(cut)])
    assert main(arguments(weights, output, *more, "--resume")) == 0
    assert_same_images(images_of(output), expected)
    assert not list(tmp_path.glob("*.state*"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to a child")
def test_ctrl_c_closes_the_file_and_resume_goes_on_from_the_pass_it_hit(
    weights, undisturbed, tmp_path
):
    timeline, expected = undisturbed
    output = tmp_path / "a.mp4"
    more = ("--timeline", str(timeline), "--chunks", "14", "--snapshot-every", "0")
    process = run_and_stop(weights, output, signal.SIGINT, 5, *more)
    assert process.returncode == 130
    assert len(images_of(output)) < len(expected)
    assert main(arguments(weights, output, *more, "--resume")) == 0
    assert_same_images(images_of(output), expected)


@pytest.mark.slow
def test_a_run_without_a_length_goes_on_until_it_is_stopped(weights, tmp_path):
    output = tmp_path / "a.mp4"
    began = time.monotonic()
    process = run_and_stop(weights, output, signal.SIGTERM, 4, "--prompt", "x")
    assert process.returncode == 130
    assert len(images_of(output)) >= 9 + 12 * 3
    assert time.monotonic() - began < 60


def test_resume_refuses_another_seed_and_a_changed_past_but_takes_a_new_future(
    weights, tmp_path, monkeypatch, capsys
):
    timeline, output = tmp_path / "t.txt", tmp_path / "a.mp4"
    timeline.write_text(TIMELINE, encoding="utf-8")
    more = ("--timeline", str(timeline), "--snapshot-every", "3")
    stop_here(monkeypatch, weights, output, signal.SIGINT, 8, *more, "--chunks", "50")
    assert main(arguments(weights, output, *more, "--chunks", "14", "--resume", "--seed", "9")) == 1
    assert "seed 0, now it is 9" in capsys.readouterr().err
    timeline.write_text(TIMELINE.replace("a dog", "a fox"), encoding="utf-8")
    assert main(arguments(weights, output, *more, "--chunks", "14", "--resume")) == 1
    assert "prompts" in capsys.readouterr().err
    timeline.write_text(TIMELINE.replace("a city", "a sea"), encoding="utf-8")
    assert main(arguments(weights, output, *more, "--chunks", "14", "--resume")) == 0


@pytest.fixture
def native(monkeypatch) -> None:
    """A CPU that multiplies bfloat16, and a tiny network large enough for it."""
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(devices, "MIN_BFLOAT16_DIM", MODEL.dim)


def test_on_a_cpu_that_multiplies_bfloat16_it_is_the_default_and_told(
    weights, tmp_path, native, capsys
):
    told = "computing in bfloat16, which this CPU multiplies"
    for name, more in {"a": (), "b": ("--dtype", "bfloat16"), "c": ("--dtype", "float32")}.items():
        output = tmp_path / f"{name}.mp4"
        assert main(arguments(weights, output, "--prompt", "x", "--chunks", "1", *more)) == 0
        assert (told in capsys.readouterr().out) is (name == "a")
        assert comment_of(output)["dtype"] == ("float32" if name == "c" else "bfloat16")
    assert_same_images(images_of(tmp_path / "a.mp4"), images_of(tmp_path / "b.mp4"))
    assert not np.array_equal(images_of(tmp_path / "a.mp4"), images_of(tmp_path / "c.mp4"))


def test_a_run_goes_on_in_the_dtype_it_was_begun_in_and_in_no_other(
    weights, tmp_path, request, capsys
):
    output = tmp_path / "a.mp4"
    more = ("--prompt", "x", "--snapshot-every", "1")
    assert main(arguments(weights, output, *more, "--chunks", "1")) == 0
    request.getfixturevalue("native")  # as after an upgrade, or on another machine
    assert main(arguments(weights, output, *more, "--chunks", "2", "--resume")) == 0
    assert "bfloat16" not in capsys.readouterr().out
    assert comment_of(output)["dtype"] == "float32"
    again = (*more, "--chunks", "3", "--resume", "--dtype", "bfloat16")
    assert main(arguments(weights, output, *again)) == 1
    assert "was begun with dtype float32, now it is bfloat16" in capsys.readouterr().err


def test_resume_refuses_a_file_that_is_not_its_own_or_was_begun_otherwise(
    weights, tmp_path, capsys
):
    output = tmp_path / "a.mp4"
    output.write_text("mine")
    more = ("--prompt", "x", "--chunks", "1")
    assert main(arguments(weights, output, *more, "--resume")) == 1
    assert "not made by this command" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert main(arguments(weights, output, *more, "--overwrite")) == 0
    before = images_of(output)
    assert main(arguments(weights, output, *more, "--resume", "--seed", "4")) == 1
    assert "seed 0, now it is 4" in capsys.readouterr().err
    assert main(arguments(weights, output, "--prompt", "x", "--chunks", "2", "--resume")) == 0
    assert_same_images(images_of(output)[: len(before)], before)


WRONG = [
    (["--prompt", "x", "--chunks", "0"], "chunks is 0; give a number from 1"),
    (["--prompt", "x", "--chunks", "2", "--seconds", "2"], "give one"),
    (["--prompt", "x", "--seconds", "-3"], "-3"),
    (["--prompt", "  "], "prompt is empty"),
    (["--prompt", "a \udcff b"], "has a character that is no text"),
    ([], "--prompt TEXT or --timeline FILE"),
    (["--prompt", "x", "--width", "50"], "nearest is 48x32"),
    (["--prompt", "x", "--sink", "7"], "cannot hold 7 sink frames"),
    (["--prompt", "x", "--anchor", "4"], "3 sink frames, 4 of anchor_frames and a chunk of 3"),
    (["--prompt", "x", "--decay", "2"], "between 0 and 1"),
    (["--prompt", "x", "--steps", "500,750"], "must fall"),
    (["--prompt", "x", "--width", "0"], "width is 0; give a number from 1 to 16384"),
    (["--prompt", "x", "--height", "0"], "height is 0; give a number from 1 to 16384"),
    (["--prompt", "x", "--width", "1" + "0" * 30], "give a number from 1 to 16384"),
    (["--prompt", "x", "--shift", "nan"], "shift is nan; give a number from 0.01"),
    (["--prompt", "x", "--shift", "inf"], "shift is inf; give a number from 0.01"),
    (["--prompt", "x", "--seconds", "nan"], "seconds is nan; give a number from 0"),
    (["--prompt", "x", "--seconds", "1e308"], "give a number from 0 to 1000000000"),
    (["--prompt", "x", "--window", "1" + "0" * 30], "window_frames is 1.*; give a number"),
    (["--prompt", "x", "--decay", "nan"], "decay is nan"),
    (["--prompt", "x", "--num-heads", "0"], "num_heads is 0; give a number from 1"),
    (["--prompt", "x", "--device", "gpu"], "device 'gpu' is unknown; use cpu"),
    (["--prompt", "x", "--device", "meta"], "nothing here was written for device meta"),
    (["--prompt", "x", "--device", "xpu"], "nothing here was written for device xpu"),
    (["--prompt", "x", "--attention", "flash2"], "flash_attn|runs on cuda"),
    (["--prompt", "x", "--crf", "99"], "crf is 99"),
    (["--prompt", "x", "--seed", "-1"], "seed is -1"),
    (["--prompt", "x", "--snapshot-every", "-1"], "snapshot_every is -1"),
    (["--prompt", "x", "--group-frames", "0"], "group_frames is 0"),
    (["--prompt", "x", "--start", "none.png"], "no start picture or clip"),
    (["--timeline", "none.txt"], "no timeline at none.txt"),
    (["--prompt", "x", "--lora", "none.safetensors:0.5"], "no LoRA at none.safetensors"),
    (["--prompt", "x", "--model", "none.safetensors"], "no model at none.safetensors"),
    (["--prompt", "x", "--vae", "none.pth"], "no VAE at none.pth"),
    (["--prompt", "x", "--text-encoder", "no.pth"], "no text encoder at no.pth"),
    (["--prompt", "x", "--output", "x.avi"], "must end in .mp4"),
    (["--prompt", "x", "--output", "a" * 245 + ".mp4"], "cannot be written: File name too long"),
    (["--prompt", "x", "--output", "nowhere/x.mp4"], "nowhere does not exist"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[ascii(" ".join(w)) for w, _ in WRONG])
def test_a_bad_option_gets_one_clear_sentence_before_anything_is_loaded(
    wrong, message, weights, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("rf_core.commands.generate.load", lambda plan: pytest.fail("loaded"))
    assert main(arguments(weights, tmp_path / "a.mp4", *wrong)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error


def test_a_timeline_error_names_the_file_line_and_column(weights, tmp_path, capsys):
    timeline = tmp_path / "t.txt"
    timeline.write_text("0s: a cat\n8s [fade]: a dog\n", encoding="utf-8")
    assert main(arguments(weights, tmp_path / "a.mp4", "--timeline", str(timeline))) == 1
    assert "t.txt: line 2, column" in capsys.readouterr().err


def test_an_output_that_is_there_is_not_touched_unasked(weights, tmp_path, capsys):
    output = tmp_path / "a.mp4"
    output.write_text("mine")
    more = ("--prompt", "x", "--chunks", "1")
    assert main(arguments(weights, output, *more)) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert main(arguments(weights, output, *more, "--overwrite")) == 0


def test_a_model_without_its_vae_and_text_encoder_is_refused(weights, capsys):
    model = str(weights / "student.safetensors")
    assert main(["generate", "--prompt", "x", "--model", model]) == 1
    assert "--vae and --text-encoder" in capsys.readouterr().err
    assert main(["generate", "--prompt", "x", "--model", "m.safetensors"]) == 1
    assert "there is no model at m.safetensors" in capsys.readouterr().err


def test_inspect_and_convert_show_what_a_file_holds(weights, tmp_path, capsys):
    target = tmp_path / "b.safetensors"
    source = str(weights / "student.safetensors")
    assert main(["inspect", source]) == 0
    assert "0.9" in capsys.readouterr().out
    given = ("--decay", "0.5", "--sink", "2", "--anchor", "1")
    assert main(["convert", source, str(target), "--dtype", "bfloat16", *given]) == 0
    told = capsys.readouterr().out
    assert "sink 2" in told and "decay 0.5" in told and "anchor_frames 1" in told
    assert target.stat().st_size < Path(source).stat().st_size
    assert main(["inspect", str(tmp_path / "none.safetensors")]) == 1


def test_bench_prints_flat_memory_and_time_and_writes_json(tmp_path, capsys):
    path = tmp_path / "b.json"
    more = ["--chunks", "20", "--width", "32", "--height", "32", "--device", "cpu"]
    assert main(["bench", *more, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "time growth" in out and "memory growth" in out
    result = json.loads(path.read_text())
    assert result["network_seconds"]["p50"] > 0
    assert result["snapshot"]["compact_bytes"] < result["snapshot"]["exact_bytes"]
    assert main(["bench", "--chunks", "1", "--device", "cpu"]) == 1


unix = pytest.mark.skipif(sys.platform == "win32", reason="sends signals to a child")


@pytest.mark.slow
@unix
def test_an_overwritten_run_that_is_killed_at_once_goes_on_as_itself_and_names_its_own_seed(
    weights, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "a.mp4"
    first = ("--prompt", "x", "--chunks", "50", "--seed", "1")
    stop_here(monkeypatch, weights, output, signal.SIGINT, 3, *first)
    assert list(tmp_path.glob("*.state.safetensors"))
    second = ("--prompt", "x", "--seed", "2", "--snapshot-every", "0")
    run_and_stop(weights, output, signal.SIGKILL, 2, *second, "--overwrite")
    assert not list(tmp_path.glob("*.state.safetensors"))
    assert main(arguments(weights, output, *first, "--resume")) == 1
    assert "was begun with seed 2, now it is 1" in capsys.readouterr().err
    assert main(arguments(weights, output, *second, "--chunks", "3", "--resume")) == 0
    undisturbed = tmp_path / "b.mp4"
    main(arguments(weights, undisturbed, *second, "--chunks", "3"))
    assert output.read_bytes() == undisturbed.read_bytes()


@unix
def test_a_run_that_overwrites_and_is_stopped_before_its_first_chunk_leaves_the_old_one_whole(
    weights, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "a.mp4"
    first = ("--prompt", "x", "--seed", "1")
    stop_here(monkeypatch, weights, output, signal.SIGINT, 3, *first)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 2

    def stopped_at_once(*arguments):
        return generate_module.generate(*arguments[:4], stopped=lambda: True)

    monkeypatch.setattr("rf_core.commands.generate.generate", stopped_at_once)
    again = ("--prompt", "x", "--seed", "2", "--overwrite")
    assert main(arguments(weights, output, *again)) == 130
    assert "stopped; nothing was written" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    assert main(arguments(weights, output, *first, "--chunks", "9", "--resume")) == 0


@unix
def test_a_snapshot_of_another_run_is_refused_for_what_it_is(
    weights, tmp_path, monkeypatch, capsys
):
    more, output = ("--prompt", "x"), tmp_path / "a.mp4"
    stop_here(monkeypatch, weights, output, signal.SIGINT, 2, *more)
    (snapshot,) = tmp_path.glob("*.state.safetensors")
    kept = snapshot.read_bytes()
    stop_here(monkeypatch, weights, output, signal.SIGINT, 2, *more, "--overwrite")
    snapshot.write_bytes(kept)  # as from a copy of the folder
    again = arguments(weights, output, *more, "--chunks", "4", "--resume")
    assert main(again) == 1
    error = capsys.readouterr().err
    assert "is of another run than" in error and "delete" in error
    snapshot.unlink()
    assert main(again) == 0

    snapshot.write_bytes(kept)
    output.unlink()
    assert main(again) == 1
    assert "is gone" in capsys.readouterr().err
    assert main([each for each in again if each != "--resume"]) == 0
    assert not snapshot.exists()


@unix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_stopped_endless_run_has_its_length_in_its_index_and_goes_on(
    weights, tmp_path, monkeypatch, number
):
    output = tmp_path / "a.mp4"
    assert stop_here(monkeypatch, weights, output, number, 4, "--prompt", "x") == 130
    assert is_indexed(output)
    chunks = str((len(images_of(output)) + 3) // 12 + 2)
    more = ("--prompt", "x", "--chunks", chunks)
    assert main(arguments(weights, output, *more, "--resume")) == 0
    whole = tmp_path / "b.mp4"
    main(arguments(weights, whole, *more))
    assert output.read_bytes() == whole.read_bytes()


@unix
def test_a_second_ctrl_c_ends_the_pass_and_the_file_has_its_index(weights, tmp_path, monkeypatch):
    output = tmp_path / "a.mp4"
    make = Stream.generate

    def impatient(stream, *arguments):
        if stream.state.num_chunks == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second one did not end the pass")
        return make(stream, *arguments)

    monkeypatch.setattr(Stream, "generate", impatient)
    more = ("--prompt", "x", "--snapshot-every", "1")
    assert main(arguments(weights, output, *more)) == 130
    assert is_indexed(output) and len(images_of(output)) == 9 + 12
    monkeypatch.undo()
    assert main(arguments(weights, output, *more, "--chunks", "4", "--resume")) == 0


def test_an_error_in_the_middle_leaves_a_file_with_its_index_that_goes_on(
    weights, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "a.mp4"
    make = Stream.generate

    def failing(stream, *arguments):
        if stream.state.num_chunks == 3:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate")
        return make(stream, *arguments)

    monkeypatch.setattr(Stream, "generate", failing)
    more = ("--prompt", "x", "--chunks", "5", "--snapshot-every", "2")
    assert main(arguments(weights, output, *more)) == 1
    assert "out of memory" in capsys.readouterr().err
    assert is_indexed(output) and len(images_of(output)) == 9 + 12 * 2
    monkeypatch.undo()
    assert main(arguments(weights, output, *more, "--resume")) == 0
    assert len(images_of(output)) == 9 + 12 * 4


@unix
def test_a_stopped_batch_leaves_its_unfinished_video_with_an_index(weights, tmp_path, monkeypatch):
    prompts, folder = tmp_path / "p.txt", tmp_path / "out"
    prompts.write_text("a cat\n")
    make = Stream.generate

    def terminated(stream, *arguments):
        if stream.state.num_chunks == 2:
            signal.raise_signal(signal.SIGTERM)
        return make(stream, *arguments)

    monkeypatch.setattr(Stream, "generate", terminated)
    more = ("--prompts", str(prompts), "--chunks", "4")
    assert main(arguments(weights, folder, *more)) == 130
    (partial,) = folder.glob("*.partial")
    assert is_indexed(partial)
    monkeypatch.undo()
    assert main(arguments(weights, folder, *more)) == 0
    assert [path.name for path in folder.glob("*.mp4*")] == ["00001_a-cat.mp4"]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk on which no file grows further."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Disk:
    """Knows what of each file a power cut would leave: what was there when it was last synced."""

    def __init__(self, monkeypatch) -> None:
        self.kept: dict[int, int] = {}
        sync = os.fsync

        def synced(number: int) -> None:
            sync(number)
            self.kept[os.fstat(number).st_ino] = os.fstat(number).st_size

        monkeypatch.setattr(os, "fsync", synced)

    def left_of(self, path: Path) -> bytes:
        return path.read_bytes()[: self.kept.get(path.stat().st_ino, 0)]


def test_a_power_cut_leaves_no_snapshot_without_the_images_that_lead_to_it(
    weights, tmp_path, monkeypatch
):
    disk, cut, output = Disk(monkeypatch), tmp_path / "cut.mp4", tmp_path / "a.mp4"
    replace, found = Path.replace, []

    def replaced(part, path):
        if ".state." in path.name:
            assert disk.left_of(part) == part.read_bytes()
            cut.write_bytes(disk.left_of(output))
            found.append((len(images_of(cut)), Snapshot.load(part).facts["num_chunks"]))
        replace(part, path)
        disk.kept.pop(tmp_path.stat().st_ino, None)  # the new name is not there before the next

    monkeypatch.setattr(Path, "replace", replaced)
    more = ("--prompt", "x", "--chunks", "4", "--snapshot-every", "1")
    assert main(arguments(weights, output, *more)) == 0
    assert found == [(9 + 12 * later, 1 + later) for later in range(4)]
    assert tmp_path.stat().st_ino in disk.kept


def test_a_snapshot_that_finds_no_room_is_told_once_and_the_video_goes_on(
    weights, tmp_path, caplog, capsys
):
    output, more = tmp_path / "a.mp4", ("--prompt", "x", "--chunks", "6", "--snapshot-every", "1")
    with files_of_at_most(60_000):
        assert main(arguments(weights, output, *more)) == 0
    assert len(images_of(output)) == 9 + 12 * 5
    (told,) = [each.getMessage() for each in caplog.records if "no snapshot" in each.getMessage()]
    assert "File too large" in told and "from its beginning" in told
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_stop_without_room_keeps_the_old_snapshot_and_says_where_it_goes_on(
    weights, tmp_path, monkeypatch, capsys
):
    output, make = tmp_path / "a.mp4", Stream.generate
    more = ("--prompt", "x", "--snapshot-every", "2")

    def stopped_on_a_full_disk(stream, *arguments):
        if stream.state.num_chunks == 3:
            full.enter_context(files_of_at_most(60_000))
            signal.raise_signal(signal.SIGINT)
        return make(stream, *arguments)

    monkeypatch.setattr(Stream, "generate", stopped_on_a_full_disk)
    with ExitStack() as full:
        assert main(arguments(weights, output, *more)) == 130
    assert "--resume goes on from chunk 2" in capsys.readouterr().out
    assert is_indexed(output) and len(images_of(output)) == 9 + 12 * 2
    monkeypatch.undo()
    assert main(arguments(weights, output, *more, "--chunks", "5", "--resume")) == 0
    whole = tmp_path / "b.mp4"
    main(arguments(weights, whole, *more, "--chunks", "5"))
    assert output.read_bytes() == whole.read_bytes()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_on_a_full_disk_the_video_ends_with_one_sentence_plays_and_goes_on(
    weights, small_disk, tmp_path, capsys
):
    output = small_disk / "a.mp4"
    more = ("--prompt", "x", "--chunks", "6", "--crf", "0", "--snapshot-every", "0")
    main(arguments(weights, whole := tmp_path / "whole.mp4", *more))
    ballast = small_disk / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(1024)):
            pass
    os.truncate(ballast, ballast.stat().st_size - whole.stat().st_size // 2)
    assert main(arguments(weights, output, *more)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {output} could not be written further (No space left")
    part, images = images_of(output), images_of(whole)
    assert 9 <= len(part) < len(images) and np.array_equal(part, images[: len(part)])
    ballast.unlink()
    assert main(arguments(weights, output, *more, "--resume")) == 0
    assert_same_images(images_of(output), images)


def test_a_disk_that_is_full_from_the_first_leaves_the_old_video(weights, tmp_path, capsys):
    output, more = tmp_path / "a.mp4", ("--prompt", "x", "--chunks", "1")
    main(arguments(weights, output, *more))
    before = output.read_bytes()
    with files_of_at_most(100):
        assert main(arguments(weights, output, *more, "--overwrite")) == 1
    assert "a.mp4 could not be written (File too large)" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
