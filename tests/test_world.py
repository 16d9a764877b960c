"""The miniature world: its captions, its pictures, its tracker, and its VAE's training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from rf_core.decoders.vae_files import load_vae
from training.world.budget import Budget
from training.world.scenes import (
    BACKGROUND,
    IMAGES_PER_FRAME,
    PALETTE,
    PLAIN,
    SHAPE_SIZE,
    SIZE,
    SPEED_RANGES,
    WORLDS,
    Attributes,
    Scene,
    Thing,
    all_captions,
    caption,
    parse_caption,
    render,
    sample_scene,
)
from training.world.tracker import NO_DIRECTION, drift, score, switch_delay, track
from training.world.train_vae import (
    ClipKind,
    VAETrainConfig,
    near_shapes,
    sample_batches,
    train_vae,
)

ATTRIBUTES = ("colour", "shape", "direction", "speed")
RED = Thing(colour="red", shape="circle", direction="right", speed=0.5, position=(20.0, 30.0))


def scenes_of(count: int, seed: int, world: str = PLAIN, **changes: float) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, replace(WORLDS[world], **changes)) for _ in range(count)]


def blurred_and_noisy(videos: Tensor) -> Tensor:
    line = torch.tensor([0.25, 0.5, 0.25])
    kernel = (line[:, None] * line).expand(3, 1, 3, 3)
    images = videos.flatten(0, 1)
    for _ in range(2):
        images = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="circular"), kernel, groups=3)
    noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))
    return (images.view_as(videos) + 0.05 * noise).clamp(0, 1)


def mistakes(videos: Tensor, scenes: list[Scene]) -> list[str]:
    found = []
    for video, scene in zip(videos, scenes, strict=True):
        scores = score(video, caption(scene))
        found += [f"{name}: {caption(scene)}" for name in ATTRIBUTES if scores[name] != 1.0]
    return found


# Captions


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_every_phrasing_of_a_scene_parses_back_to_it(share: float) -> None:
    rng = np.random.default_rng(3)
    for scene in scenes_of(60, seed=3, two_things_share=share):
        said = [(t.colour, t.shape, t.direction, t.speed_name) for t in scene.things]
        heard = parse_caption(caption(scene, rng))
        assert [(w.colour, w.shape, w.direction, w.speed_name) for w in heard] == said


def test_all_captions_are_distinct_and_cover_every_combination() -> None:
    captions = all_captions()
    assert len(set(captions)) == len(captions) == 6 * 3 * 4 * 3
    wanted = {parse_caption(text)[0] for text in captions}
    assert Attributes(colour="cyan", shape="square", direction="up", speed_name="slowly") in wanted
    assert len(wanted) == len(captions)


@pytest.mark.parametrize("text", ["", "a pink circle moves left", "a red circle moves left fast"])
def test_a_caption_of_unknown_words_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ValueError, match="known words: red, green") as error:
        parse_caption(text)
    assert repr(text) in str(error.value)


# Pictures


def test_scenes_keep_their_named_speeds_and_differ_in_colour() -> None:
    scenes = scenes_of(300, seed=0)
    for thing in (thing for scene in scenes for thing in scene.things):
        low, high = SPEED_RANGES[thing.speed_name]
        assert low <= thing.speed <= high
    pairs = [scene.things for scene in scenes if len(scene.things) == 2]
    assert 0.2 < len(pairs) / len(scenes) < 0.4
    assert all(first.colour != second.colour for first, second in pairs)


def test_the_same_seed_gives_the_same_video_and_another_seed_another() -> None:
    first, again, other = (render(scenes_of(3, seed=s), 5) for s in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_video_that_starts_later_is_the_tail_of_the_longer_one() -> None:
    scenes = scenes_of(4, seed=1)
    assert torch.equal(render(scenes, 6, start_image=9), render(scenes, 15)[:, 9:])


def test_a_shape_that_leaves_comes_back_on_the_other_side() -> None:
    # A shape size a latent frame: the world's width takes SIZE / SHAPE_SIZE latent frames.
    round_trip = SIZE // SHAPE_SIZE * IMAGES_PER_FRAME
    video = render([Scene((replace(RED, speed=1.0),))], round_trip + 1)[0]
    torch.testing.assert_close(video[round_trip], video[0])
    red = (video - torch.tensor(BACKGROUND)[:, None, None]).sum(dim=(1, 2, 3))
    torch.testing.assert_close(red, red[:1].expand_as(red), rtol=2e-3, atol=0)


def test_pictures_hold_the_background_and_palette_colours() -> None:
    image = render([Scene((RED,))], 1)[0, 0]
    torch.testing.assert_close(image[:, 30, 20], torch.tensor(PALETTE["red"]))
    torch.testing.assert_close(image[:, 0, 63], torch.tensor(BACKGROUND))


def test_the_later_of_two_shapes_is_drawn_on_top() -> None:
    blue = replace(RED, colour="blue", direction="up")
    image = render([Scene((RED, blue))], 1)[0, 0]
    torch.testing.assert_close(image[:, 30, 20], torch.tensor(PALETTE["blue"]))


# The tracker


@pytest.mark.parametrize("num_images", [12, 45])
@pytest.mark.parametrize("spoil", [lambda videos: videos, blurred_and_noisy])
def test_the_tracker_reads_every_attribute_of_true_videos(num_images: int, spoil) -> None:  # type: ignore[no-untyped-def]
    scenes = scenes_of(24, seed=11)
    assert not mistakes(spoil(render(scenes, num_images)), scenes)


def test_the_tracker_measures_speed_to_a_hundredth_of_a_size() -> None:
    scenes = scenes_of(16, seed=12, two_things_share=0.0)
    for video, scene in zip(render(scenes, 30), scenes, strict=True):
        measured = score(video, caption(scene))["measured_speed"]
        assert measured == pytest.approx(scene.things[0].speed, abs=0.01)


@pytest.mark.parametrize(
    ("attribute", "false"),
    [
        ("colour", "a green circle moves right"),
        ("colour", "a red circle moves right and a blue square moves up"),
        ("shape", "a red square moves right"),
        ("direction", "a red circle moves up"),
        ("speed", "a red circle moves right slowly"),
    ],
)
def test_a_false_caption_is_caught_by_the_attribute_that_lies(attribute: str, false: str) -> None:
    video = render([Scene((replace(RED, speed=1.0),))], 20)[0]
    assert score(video, "a red circle moves right quickly")[attribute] == 1.0
    assert score(video, false)[attribute] == 0.0


def test_one_wrong_word_leaves_the_other_attributes_right() -> None:
    video = render([Scene((RED,))], 20)[0]
    scores = score(video, "a green circle moves right")
    assert [scores[name] for name in ATTRIBUTES] == [0.0, 1.0, 1.0, 1.0]


def test_a_still_shape_has_no_direction_and_an_empty_video_no_track() -> None:
    video = render([Scene((RED,))], 1)[0].repeat(12, 1, 1, 1)
    assert [(seen.direction, seen.speed) for seen in track(video)] == [(NO_DIRECTION, 0.0)]
    assert track(torch.full_like(video, 0.08)) == []
    assert score(torch.full_like(video, 0.08), "a red circle moves up")["colour"] == 0.0


def test_a_shape_half_hidden_behind_another_keeps_its_track() -> None:
    blue = replace(RED, colour="blue", shape="square", direction="up", position=(44.0, 40.0))
    seen = {each.colour: each for each in track(render([Scene((RED, blue))], 40)[0])}
    assert seen["red"].shape == "circle"
    assert seen["red"].direction == "right"
    assert seen["red"].speed == pytest.approx(RED.speed, abs=0.03)


def test_the_tracker_refuses_pictures_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\).*64"):
        track(torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("late", [0, 7])
@pytest.mark.parametrize("change", [{"colour": "green"}, {"shape": "square"}, {"direction": "up"}])
def test_the_delay_of_a_switch_is_counted_from_the_prompt(
    late: int, change: dict[str, str]
) -> None:
    before = 20 + late
    position = (RED.position[0] + before * RED.velocity[0], RED.position[1])
    after = replace(RED, position=position, **change)
    video = torch.cat([render([Scene((RED,))], before)[0], render([Scene((after,))], 40)[0]])
    delay = switch_delay(video, 20, caption(Scene((after,))))
    assert delay is not None
    assert late - 2 <= delay <= late  # an opening with an old image or two may already pass
    assert switch_delay(video, 20, "a blue circle moves down") is None


def test_drift_is_small_in_true_videos_and_grows_with_what_goes_wrong() -> None:
    true = render([Scene((RED,))], 24)[0]
    early, late = drift(torch.cat([true[:12], blurred_and_noisy(true[None, 12:] * 0.8)[0]]), 12)
    assert (early.start_image, late.start_image) == (0, 12)
    assert early.palette_error < 1e-3
    assert early.background_error < 1e-3
    assert early.area_error < 0.1
    assert late.palette_error > 0.1
    assert late.background_error > 0.01
    assert late.softness > 2 * early.softness


# The VAE's training

TINY = VAETrainConfig(
    dim=4,
    dim_mult=(1, 1, 1, 1),
    clips=(ClipKind(size=16, images=5, share=1.0),),
    pixels_per_step=1,
    statistics_clips=1,
    statistics_images=5,
    budget=Budget(steps=2),
)


def test_training_crops_hold_a_shape() -> None:
    config = replace(TINY, clips=(ClipKind(size=32, images=5, share=1.0),), pixels_per_step=41_000)
    batch = next(sample_batches(config))
    assert batch.shape == (8, 5, 3, 32, 32)
    assert near_shapes(batch).amax(dim=(1, 2, 3, 4)).eq(1).all()


def test_a_trained_vae_loads_with_its_statistics_and_says_how_it_was_made(tmp_path: Path) -> None:
    path = train_vae(TINY, tmp_path)
    vae = load_vae(path)
    assert vae.config.dim == TINY.dim
    assert vae.config.latent_std != (1.0,) * vae.config.z_dim
    latents = vae.encode(torch.zeros(1, 3, 5, SIZE, SIZE))
    assert latents.shape == (1, 16, 2, SIZE // 8, SIZE // 8)
    with safe_open(path, framework="pt") as file:
        provenance = json.loads(file.metadata()["provenance"])
    assert provenance["steps"] == 2
    assert provenance["config"]["dim"] == TINY.dim


def test_the_same_seed_trains_the_same_vae(tmp_path: Path) -> None:
    first, again, other = (
        load_vae(train_vae(replace(TINY, seed=seed), tmp_path / name)).state_dict()
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
