"""Runs of the command line, and live sessions, that are controlled beside their prompts."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_control import reader
from test_generate import (
    MODEL,
    arguments,
    assert_same_images,
    comment_of,
    images_of,
    stop_here,
    write_weights,
)
from test_live import Script, Trial, encode, latents_by_branch, stream_of
from torch import Tensor

from rf_core.__main__ import main
from rf_core.config import ModelConfig, VaceConfig
from rf_core.control import ControlSource
from rf_core.live import ControlStrength, Cut, Limits, Refused, Rewind
from rf_core.vace import ControlledModel, Vace
from rf_core.video import VideoFormat, VideoWriter, to_uint8
from rf_core.weights.vace import save_vace

SIZE = {"width": 48, "height": 32}
PROMPT = ("--prompt", "a cat", "--chunks", "5")


def vace(config: ModelConfig) -> Vace:
    layers = VaceConfig(layers=(0,), in_channels=2 * config.in_dim + 64)
    return tiny.randomise(Vace(config, layers), 5)


def moving(count: int, seed: int = 0) -> Tensor:
    """Images [T, 3, H, W] of a bar that moves."""
    images = torch.zeros(count, 3, SIZE["height"], SIZE["width"])
    for number, image in enumerate(images):
        at = (3 * number + 5 * seed) % (SIZE["width"] - 8)
        image[seed % 3, :, at : at + 8] = 1
    return images


def write(path: Path, images: Tensor) -> Path:
    with VideoWriter(path, VideoFormat(width=images.shape[3], height=images.shape[2])) as file:
        file.write(to_uint8(images))
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of the tests of `generate`."""
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def files(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A control network, control videos, a mask and pictures."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("control")
    save_vace(folder / "control.safetensors", vace(MODEL))
    write(folder / "depth.mp4", moving(60))
    write(folder / "short.mp4", moving(25))
    mask = torch.zeros(60, 3, SIZE["height"], SIZE["width"])
    mask[..., :24] = 1
    write(folder / "mask.mp4", mask)
    write(folder / "tall.mp4", mask.transpose(2, 3))
    for name, colour in (("a", (255, 0, 0)), ("b", (0, 0, 255))):
        Image.new("RGB", (20, 30), colour).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def run(weights: Path, files: Path, tmp_path: Path) -> Any:
    """Runs `generate` with a control network, and gives the video's images."""

    def made(name: str, *more: str, network: str = "control.safetensors") -> np.ndarray:
        control = ("--control-model", str(files / network))
        given = [str(files / each) if (files / each).is_file() else each for each in more]
        output = tmp_path / f"{name}.mp4"
        assert main(arguments(weights, output, *control, *given)) == 0
        return images_of(output)

    return made


@pytest.fixture
def plain(weights: Path, tmp_path: Path) -> np.ndarray:
    """The video of the prompt alone."""
    output = tmp_path / "plain.mp4"
    assert main(arguments(weights, output, *PROMPT)) == 0
    return images_of(output)


def test_a_control_changes_the_video_and_is_recorded(run, plain, tmp_path) -> None:
    made = run("a", *PROMPT, "--control", "depth.mp4", "--control-mask", "mask.mp4")
    assert made.shape == plain.shape
    assert np.abs(made.astype(int) - plain).mean() > 1
    record = comment_of(tmp_path / "a.mp4")
    assert record["control_model"] == "control.safetensors"
    assert record["control"]["video"] == "depth.mp4"
    assert record["control"]["mask"] == "mask.mp4"


def test_strength_0_is_the_prompt_alone_to_the_bit(run, plain) -> None:
    made = run("a", *PROMPT, "--control", "depth.mp4", "--control-strength", "0")
    assert_same_images(made, plain)


def test_it_acts_between_its_start_and_its_end(run, plain) -> None:
    times = ("--control-start", "1.3", "--control-end", "2.1")  # the chunk of images 21 to 32
    made = run("a", *PROMPT, "--control", "depth.mp4", *times)
    assert_same_images(made[:21], plain[:21])
    assert not np.array_equal(made[21:33], plain[21:33])


def test_a_control_that_ends_leaves_the_rest_to_the_prompt_or_goes_on(run) -> None:
    ends = {how: run(how, *PROMPT, "--control", "short.mp4", "--control-finish", how)
            for how in ("stop", "hold", "loop")}  # fmt: skip
    for how in ("hold", "loop"):
        assert_same_images(ends[how][:21], ends["stop"][:21])
        assert not np.array_equal(ends[how][21:], ends["stop"][21:])


def test_references_change_the_video_and_each_counts(run, plain) -> None:
    one = run("a", *PROMPT, "--reference", "a.png")
    two = run("b", *PROMPT, "--reference", "a.png", "--reference", "b.png")
    assert one.shape == two.shape == plain.shape
    assert not np.array_equal(one, plain) and not np.array_equal(one, two)


@pytest.mark.parametrize(
    "timeline", ["0s: a cat\nc3 [recache]: a dog\n", "0s: a cat\nc2 [cut]: a dog\n"]
)
@pytest.mark.parametrize("reference", [(), ("--reference", "a.png")], ids=["video", "both"])
def test_a_stopped_run_resumes_to_the_very_same_images(
    run,
    weights,
    files,
    tmp_path,
    monkeypatch,
    timeline,
    reference,
) -> None:
    (tmp_path / "t.txt").write_text(timeline, encoding="utf-8")
    more = ("--timeline", str(tmp_path / "t.txt"), "--control", str(files / "depth.mp4"))
    more += ("--control-mask", str(files / "mask.mp4"), "--snapshot-every", "1")
    more += tuple(str(files / each) if each.endswith("png") else each for each in reference)
    expected = run("whole", *more, "--chunks", "5")
    control = ("--control-model", str(files / "control.safetensors"))
    output = tmp_path / "a.mp4"
    stop_here(monkeypatch, weights, output, signal.SIGINT, 4, *more, *control, "--chunks", "5")
    assert_same_images(run("a", *more, "--chunks", "5", "--resume"), expected)


def test_a_run_is_resumed_with_the_control_that_it_was_begun_with(
    weights,
    files,
    tmp_path,
    monkeypatch,
    capsys,
) -> None:
    more = ("--prompt", "a cat", "--chunks", "5", "--snapshot-every", "1")
    control = ("--control-model", str(files / "control.safetensors"))
    video = ("--control", str(files / "depth.mp4"))
    stop_here(monkeypatch, weights, tmp_path / "a.mp4", signal.SIGINT, 3, *more, *control, *video)
    capsys.readouterr()
    for other in ((), (*control, *video, "--control-strength", "0.5")):
        assert main(arguments(weights, tmp_path / "a.mp4", *more, *other, "--resume")) == 1
        assert "was begun with control" in capsys.readouterr().err


NETWORK = ("--control-model", "control.safetensors")
VIDEO = ("--control", "depth.mp4")
PICTURE = ("--reference", "a.png")
REFUSED = {
    "a control without a network": (VIDEO, "give --control-model FILE"),
    "a network without a control": (NETWORK, "nothing to follow"),
    "a mask without a video": (
        (*NETWORK, *PICTURE, "--control-mask", "mask.mp4"),
        "give --control too",
    ),
    "a strength without a control": (("--control-strength", "2"), "--control-strength is for"),
    "too strong": ((*VIDEO, "--control-strength", "11"), "--control-strength is 11"),
    "an end before the start": (
        (*VIDEO, "--control-start", "2", "--control-end", "1"),
        "control ends at 1 s and starts at 2 s",
    ),
    "no such video": ((*NETWORK, "--control", "gone.mp4"), "there is no control video at gone"),
    "no such picture": ((*NETWORK, "--reference", "x.png"), "there is no reference picture at x"),
    "no such network": ((*PICTURE, "--control-model", "x.pt"), "there is no control model at x.pt"),
    "a network that is none": ((*PICTURE, "--control-model", "depth.mp4"), "depth.mp4"),
    "no video": ((*NETWORK, "--control", "control.safetensors"), "is not a picture or video"),
    "more references than the sink has frames": (
        (*NETWORK, *PICTURE * 4),
        "4 pictures are given as --reference",
    ),
    "a batch": ((*NETWORK, *VIDEO, "--prompts", "p.txt"), "a control is of one video"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence_before_weights_are_read(
    weights,
    files,
    tmp_path,
    monkeypatch,
    capsys,
    case,
) -> None:
    from rf_core import generate

    monkeypatch.setattr(generate, "open_networks", lambda *given: pytest.fail("weights are read"))
    (files / "p.txt").write_text("a cat\n", encoding="utf-8")
    more, said = REFUSED[case]
    given = [str(files / each) if (files / each).is_file() else each for each in more]
    prompt = () if "--prompts" in given else ("--prompt", "a cat")
    assert main(arguments(weights, tmp_path / "a.mp4", *prompt, *given)) == 1
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_a_mask_of_another_shape_is_told_of(run, caplog) -> None:
    run("a", "--prompt", "a cat", "--chunks", "1", "--control", "depth.mp4",
        "--control-mask", "tall.mp4")  # fmt: skip
    assert any("the mask is 32x48 and the control video 48x32" in m for m in caplog.messages)


@pytest.mark.parametrize("more", [("--weights", "fp8"), ("--graphs", "on")], ids=["fp8", "graphs"])
def test_it_works_with_weights_in_8_bits_and_with_recorded_passes(run, more) -> None:
    made = run("a", "--prompt", "a cat", "--chunks", "3", "--control", "depth.mp4", *more)
    assert len(made) == 33


def controlled(references: Tensor | None = None) -> tuple[Any, ControlSource]:
    """A stream of the live tests with a control network, and what controls it."""
    stream = stream_of("wan")
    network = ControlledModel(stream.model, vace(stream.model.config))
    stream = type(stream)(
        network,
        stream.state.prompt_embeds,
        height=stream.height,
        width=stream.width,
        decoder=stream.decoder,
        cache=stream.cache_config,
        sampler=stream.sampler,
    )
    size = {"height": stream.height, "width": stream.width}
    images = torch.rand(300, 3, *size.values(), generator=torch.Generator().manual_seed(3))
    facts = {"digest": "x"}
    control = ControlSource(
        stream.decoder, reader(images), **size, references=references, facts=lambda: facts
    )
    return stream, control


STRENGTHS = {2: 0.4, 5: 2.0}
SCRIPT: Script = {
    2: [ControlStrength(strength=0.4)],
    5: [Cut(text="p2"), ControlStrength(strength=2.0)],
    8: [Rewind(chunk=7)],
}
REFERENCE = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("reference", [None, REFERENCE], ids=["video", "both"])
@pytest.mark.parametrize("away", [(), (3, 7)], ids=["there", "away"])
def test_a_live_session_is_controlled_and_steered_goes_back_and_is_made_again_of_its_log(
    reference: Tensor | None, away: tuple[int, ...], tmp_path: Path
) -> None:
    stream, control = controlled(reference)
    options = {"control": control, "control_strength": 0.8, "log": tmp_path / "log.jsonl"}
    leave = {at: lambda: controlled(reference)[0] for at in away}
    trial = Trial(dict(SCRIPT), stream, leave, limits=Limits(every=3), **options)
    trial.run(11)
    made = trial.session.recent_latents
    assert trial.session.outbox.status.control_strength == 2.0

    direct, again = controlled(reference)
    images, since, strength, wanted = 0, 0, 0.8, []
    for chunk in range(len(made)):
        strength = STRENGTHS.get(chunk, strength)
        if chunk == 5:
            direct.switch(encode("p2"), "cut")
            since = images
        step = again.next(direct, images, since, strength=strength)
        done = direct.step(control=step)
        images += done.images.shape[1]
        wanted.append(done.latents)
    assert torch.equal(torch.cat(made, 2), torch.cat(wanted, 2))

    stream, control = controlled(reference)
    branches = latents_by_branch(tmp_path / "log.jsonl", stream, control=control)
    last = branches["main"][:7] + branches["branch-2"]
    assert torch.equal(torch.cat(last, 2), torch.cat(wanted, 2))


def test_a_log_is_not_replayed_with_another_control(tmp_path: Path) -> None:
    stream, control = controlled()
    Trial({}, stream, control=control, log=tmp_path / "log.jsonl").run(1)
    other = controlled()[0]
    with pytest.raises(ValueError, match="the log's control has digest x, this one has None"):
        latents_by_branch(tmp_path / "log.jsonl", other)


def test_without_a_control_a_strength_for_it_is_refused() -> None:
    events = Trial({1: [ControlStrength(strength=1.0)]}).run(2)
    (refused,) = (each for each in events if isinstance(each, Refused))
    assert refused.why == "there is no control for a strength; begin the stream with one"
