"""The bundled control, judged by the tracker: outlines followed, and the prompt's colours."""

from __future__ import annotations

import pytest
import torch

from rf_core.decoders.decoder import load_decoder
from rf_core.options import DEMO
from rf_core.stream import Stream
from rf_core.text import load_text_encoder
from rf_core.vace import Control, ControlledModel
from rf_core.weights.checkpoint import load_student
from rf_core.weights.vace import load_vace
from training.world.follow import (
    FollowConfig,
    contexts_of,
    followed,
    held_out,
    masked_clips,
    mean_of,
    other,
    path_of,
    rows,
)
from training.world.scenes import COLOURS, SIZE, Scene, Thing, colour_caption, render
from training.world.stages import Files, open_vae
from training.world.tracker import detect

THINGS = held_out(FollowConfig(clips=4))
CHUNKS = 5  # the window moves twice


@pytest.fixture(scope="module")
def context() -> torch.Tensor:
    return contexts_of(open_vae(Files(DEMO)), tuple(THINGS), "drawn", CHUNKS)


def streamed(context: torch.Tensor | None, colours: list[str]) -> torch.Tensor:
    """What the demo's student makes of a prompt that names a colour alone, [B, T, 3, H, W]."""
    base, settings = load_student(DEMO / "student.safetensors", device="cpu", dtype=torch.float32)
    control = DEMO / "control.safetensors"
    vace = load_vace(control, base.config, device="cpu", dtype=torch.float32)
    encoder = load_text_encoder(
        DEMO / "text_encoder.safetensors", device="cpu", dtype=torch.float32
    )
    stream = Stream(
        ControlledModel(base, vace),
        encoder.encode([f"a {colour} shape moves" for colour in colours]),
        height=SIZE,
        width=SIZE,
        decoder=load_decoder(DEMO / "vae.safetensors", torch.device("cpu"), torch.float32, 3),
        batch=len(colours),
        cache=settings.cache,
        sampler=settings.sampler,
    )
    parts = [None] * CHUNKS if context is None else context.split(stream.next_frames, dim=2)
    images = [
        stream.step(control=None if part is None else Control(context=part)).images
        for part in parts
    ]
    return torch.cat(images, dim=1)


def measured(video: torch.Tensor, colours: list[str]) -> list[dict[str, float]]:
    triples = zip(video, THINGS, colours, strict=True)
    return [followed(detect(each), thing, colour) for each, thing, colour in triples]


@pytest.mark.slow
def test_a_stream_follows_outlines_and_has_the_prompt_s_colours(context):
    colours = [other(COLOURS, thing.colour) for thing in THINGS]
    found = measured(streamed(context, colours), colours)
    for each in found:
        assert each["error"] < 2 and each["late_error"] < 2, found  # pixels; a shape has 16
        assert each["near"] > 0.95 and each["direction"] == 1 and each["speed_error"] < 0.05
        assert each["colour"] == 1
    assert mean_of(found, "shape")[0] >= 0.75


@pytest.mark.slow
def test_without_its_control_the_same_stream_goes_its_own_way():
    colours = [thing.colour for thing in THINGS]
    found = measured(streamed(None, colours), colours)
    assert mean_of(found, "error")[0] > 8 and mean_of(found, "near")[0] < 0.3


def test_the_tracker_s_measure_is_right_of_true_clips_and_of_others():
    thing = THINGS[0]
    true = followed(detect(render([Scene((thing,))], 33)[0]), thing, thing.colour)
    assert true["near"] == 1 and true["error"] < 0.3 and true["colour"] == 1
    later = followed(
        detect(render([Scene((thing,))], 33, start_image=9)[0]), thing, thing.colour, 9
    )
    assert later["near"] == 1 and later["error"] < 0.3
    wrong = followed(detect(render([Scene((thing,))], 33)[0]), thing, other(COLOURS, thing.colour))
    assert wrong["near"] == 0 and wrong["colour"] == 0 and wrong["error"] != wrong["error"]
    elsewhere = followed(
        detect(render([Scene((thing,))], 33, start_image=20)[0]), thing, thing.colour
    )
    assert elsewhere["near"] < 0.5 and elsewhere["direction"] == 1


def test_a_path_wraps_around_with_its_thing():
    thing = Thing(colour="red", shape="circle", direction="right", speed=1.0, position=(62.0, 8.0))
    assert path_of(thing, 3).tolist() == [[62, 8], [2, 8], [6, 8]]
    assert path_of(thing, 1, start_image=2).tolist() == [[6, 8]]


def test_rows_of_the_table_have_names_of_their_own():
    names = [row.name for row in rows()]
    assert len(set(names)) == len(names)
    assert {row.control for row in rows()} >= {rows()[0].control} and len(names) > 20


def test_a_masked_clip_keeps_one_half_and_shows_outlines_in_the_other():
    clip = masked_clips(FollowConfig(clips=2))[1]
    control = clip.control(9)
    left = control.mask[0, 0, 0] == 0
    assert left[: SIZE // 2].all() and not left[SIZE // 2 :].any()
    assert torch.equal(control.images[..., left], render([Scene((clip.kept,))], 9)[0][..., left])
    assert control.images[..., ~left].amax(dim=1).eq(control.images[..., ~left].amin(dim=1)).all()
    assert colour_caption(Scene((clip.kept, clip.made))).count("shape") == 2
    assert clip.kept.colour != clip.made.colour
