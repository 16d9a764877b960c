"""What stages cost, beside arithmetic of its own: Wan 1.3B written out, from its published sizes.

A pass is twice its parameters a token (modulation and text apart) and attention of every token to
every one it sees; card hours are at 400 TFLOP/s.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from rf_core.config import WAN_1_3B, WAN_14B
from rf_core.options import DEMO
from training.__main__ import main
from training.run.config import apply_overrides
from training.run.optimise import TrainedNetwork
from training.stages.consistency import wan_consistency
from training.stages.costs import Costs, Given, costs
from training.stages.estimate import saved_state_bytes
from training.stages.latents import wan_latents
from training.stages.recipes import wan
from training.stages.regression import wan_init
from training.stages.teacher import wan_teacher
from training.stages.trajectories import wan_pairs

DIM, FFN, LAYERS, TEXT = 1536, 8960, 30, 512
FRAME = 30 * 52  # tokens
CLIP = (16, 21, 60, 104)
PARAMETERS = 1.419e9
GIVEN = Given(sizes={"student": WAN_1_3B}, latents=CLIP)
TEACHER = replace(GIVEN, sizes={"teacher": WAN_1_3B})
BOTH = replace(GIVEN, sizes={"student": WAN_1_3B, "teacher": WAN_1_3B})
ALL = Given(sizes={"student": WAN_1_3B, "teacher": WAN_1_3B, "critic": WAN_1_3B})
SPEED = 400e12


def forward(frames: int, context: int = 0) -> float:
    """Operations of a pass over so many latent frames."""
    tokens, keys = frames * FRAME, (frames + context) * FRAME
    linears = 2 * tokens * (6 * DIM**2 + 2 * DIM * FFN)
    attention = 4 * tokens * (keys + TEXT) * DIM
    return LAYERS * (linears + attention)


EXCERPT = forward(3) + forward(3, 3) + forward(3, 6)
PAST = forward(3) + forward(3, 3) + forward(3)


def near(value: float):
    return pytest.approx(value, rel=0.01)


def hours(found: Costs) -> float:
    return found.card_hours(SPEED)


@pytest.mark.slow
def test_trajectories_take_300_card_hours_and_four_fifths_of_their_room():
    found = costs(wan_pairs(), TEACHER, 8)
    steps = 51  # 48 of the grid, and the student's levels that are not among them
    assert found.operations["guided steps"] == near(16000 * 2 * steps * forward(21))
    assert 280 < hours(found) < 340
    latents = 16 * 21 * 60 * 104 * 2  # float16
    assert found.disk["trajectories"] == 16000 * latents * 4  # three points and the end
    assert found.disk["16000 encoded prompts"] == 16000 * 60 * 4096 * 2
    unguided = costs(replace(wan_pairs(), guidance=1.0), TEACHER, 8)
    assert 2 * unguided.operations["guided steps"] == found.operations["guided steps"]


@pytest.mark.slow
def test_regression_sees_through_the_window_and_with_clean_pasts_takes_nearly_twice_that():
    found = costs(wan_init(), GIVEN, 8)
    chunks = [forward(3, min(before, 6)) for before in range(0, 21, 3)]
    assert found.total == near(3000 * 64 * 4 * sum(chunks))
    assert 84 <= hours(found) < 106
    clean = costs(replace(wan_init(), context="clean"), GIVEN, 8)
    assert clean.total == near(3000 * 64 * 4 * (sum(chunks) + sum(chunks[:-1])))
    whole = wan_init()
    whole = replace(whole, cache=replace(whole.cache, window_frames=21))
    assert hours(costs(whole, GIVEN, 8)) == near(
        3000 * 64 * 4 * sum(forward(3, n) for n in range(0, 21, 3)) / SPEED / 3600
    )


@pytest.mark.slow
def test_the_published_run_takes_56_card_hours_and_encodes_46_thousand_prompts():
    found = costs(wan(), ALL, 8)
    assert 54 < hours(found) < 58
    assert found.units == 120
    checkpoint = 4 * 5 * PARAMETERS  # two networks, a moment of each, the average
    assert found.disk["checkpoints: 3 kept and one in the making"] == near(4 * checkpoint)
    assert found.disk["46084 encoded prompts"] == 46084 * 60 * 4096 * 2
    assert found.operations["text encoder, once"] == near(46084 * 2 * 4.63e9 * TEXT)


@pytest.mark.slow
def test_teacher_and_consistency_take_what_their_passes_take():
    teacher = costs(wan_teacher(), TEACHER, 8)
    assert teacher.operations["excerpt"] == near(2000 * 64 * 4 * (PAST + EXCERPT))
    assert teacher.operations["whole"] == near(1000 * 64 * 4 * forward(21))
    found = costs(wan_consistency(), BOTH, 8)
    assert found.operations["teacher's step"] == near(3000 * 64 * (PAST + 2 * EXCERPT))
    assert found.operations["student's target"] == near(3000 * 64 * EXCERPT)
    assert found.operations["student's passes"] == near(3000 * 64 * 4 * (PAST + EXCERPT))
    for each in (teacher, found):
        checkpoint = 4 * 4 * PARAMETERS  # weights, two moments, the average
        assert each.disk["checkpoints: 3 kept and one in the making"] == near(4 * checkpoint)
        held = each.memory["weights, gradients, moments, average"]
        assert held == near(5 * 4 * PARAMETERS / 8)
    assert found.memory["teacher"] == near(2 * PARAMETERS / 8)


@pytest.mark.slow
def test_latents_are_counted_by_clips_and_take_the_vaes_memory():
    one, two = (costs(wan_latents(), Given(clips=clips), 1) for clips in (1, 2))
    small = replace(wan_latents(), size=(64, 64), buckets=(wan_latents().size,))
    assert costs(small, Given(clips=1), 1) == one  # as of the largest size
    assert two.total == 2 * one.total and two.disk["clips"] == 2 * 16 * 21 * 60 * 104 * 2
    assert 100e12 < one.total < 300e12  # an 81-image clip of 480x832
    assert one.memory["VAE"] == near(127e6 * 2)
    assert one.memory["a clip's images"] == 81 * 3 * 480 * 832 * 4


def test_only_what_is_drawn_of_the_files_that_are_there_is_counted(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(map(str, range(50))))
    config = apply_overrides(wan_pairs(), [f'data.prompts=["{path}"]', "clips=32"])
    config = replace(config, data=replace(config.data, text_encoder=None))
    assert "32 encoded prompts" in costs(config, TEACHER, 1).disk
    few = apply_overrides(config, ["clips=80"])
    assert "50 encoded prompts" in costs(few, TEACHER, 1).disk


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.999)])
@pytest.mark.parametrize("matrix_rate", [None, 1e-2])
def test_a_checkpoint_is_as_large_as_the_state_that_a_network_saves(betas, matrix_rate):

    optimiser = replace(wan_init().optimiser, betas=betas, matrix_rate=matrix_rate)
    trained = TrainedNetwork(tiny.model().requires_grad_(True), optimiser)
    state = trained.state()
    tensors = list(state["model"].values())
    tensors += [t for each in state["moments"].values() for t in each.values() if t.numel() > 1]
    saved = sum(t.nbytes for t in tensors)
    assert saved_state_bytes(tiny.CONFIG, optimiser, None, average=False) == pytest.approx(
        saved, rel=1e-3
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ode_pairs", "--critic", "14b"], "--critic is given, but ode_pairs has teacher"),
        (["latents", "--teacher", "14b"], "--teacher is given, but latents has no network"),
        (["teacher"], "source is runs/world/clips, which holds no clips yet; give the shape"),
        (["ode_init", "--latents", "16", "0", "8", "8"], "--latents are"),
        (["latents"], "videos is videos, which is not a folder"),
        (["re_dmd", "--tflops", "0"], "tflops is 0"),
        (["ode_init", "--latents", "16", "6", "8", "8", "--processes", "3"], "over 3 processes"),
    ],
)
def test_what_cannot_be_counted_is_refused_by_name(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--teacher", "1.3b"] if arguments[0] == "teacher" else []
    assert main(["estimate", *arguments, *given, "--device", "cpu"]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ode_pairs", "ode_init", "teacher", "consistency", "latents"])
def test_every_stage_of_the_miniature_is_counted_at_a_given_or_measured_speed(
    recipe, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    more = {
        "ode_pairs": ["--teacher", "1.3b", "--set", "kind=clips"],
        "latents": ["--clips", "5"],
    }.get(recipe, ["--latents", "16", "15", "8", "8"])
    command = ["estimate", recipe, "--device", "cpu", *more]
    assert main([*command, "--tflops", "2"]) == 0
    printed = capsys.readouterr().out
    assert "at 2.00 TFLOP/s a card (given)" in printed and "disk in all" in printed
    hours = float(re.search(r"([\d.]+) card hours", printed)[1])
    assert hours >= 0 and main(command) == 0
    assert "this machine's matrix products" in capsys.readouterr().out


def test_sizes_of_files_are_read_where_none_are_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(wan_init(), start=Path(DEMO / "teacher.safetensors"), updates=1, batch=1)
    small = costs(config, Given(latents=(16, 6, 8, 8)), 1)
    large = costs(config, Given(sizes={"student": WAN_14B}, latents=(16, 6, 8, 8)), 1)
    assert small.total < large.total / 1000
