"""The miniature world: its captions, its pictures, its tracker, and its VAE's training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from rf_core.decoders.vae_files import load_vae
from training.world.budget import Budget
from training.world.memory import LONGEST, measure
from training.world.metric import caption_measures
from training.world.scenes import (
    BACKGROUND,
    COLOURS,
    IMAGES_PER_FRAME,
    LIT,
    PALETTE,
    PLAIN,
    SHAPE_SIZE,
    SIZE,
    SPEED_RANGES,
    WORLDS,
    Attributes,
    Backdrop,
    Scene,
    Thing,
    Wall,
    all_captions,
    caption,
    names_wall,
    parse_caption,
    render,
    sample_backdrop,
    sample_scene,
    scene_of_caption,
)
from training.world.tracker import MIN_AREA, NO_DIRECTION, detect, drift, score, switch_delay, track
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


def test_a_shape_that_is_doubled_for_a_while_keeps_its_track() -> None:
    video = render([Scene((RED,))], 40)[0]
    other = render([Scene((replace(RED, position=(50.0, 55.0)),))], 40)[0]
    video[:12] = torch.maximum(video[:12], other[:12])
    (seen,) = track(video)
    assert (seen.shape, seen.direction) == ("circle", "right")
    assert seen.size == pytest.approx(16, rel=0.02) and seen.fit > 0.95


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


# The rich world


RICH = WORLDS["rich"]


def test_captions_of_the_plain_world_are_captions_of_the_rich_one() -> None:
    for text in all_captions():
        scene = scene_of_caption(text, np.random.default_rng(0), RICH)
        assert caption(scene) == text and parse_caption(text) == [scene.things[0].named]


def test_every_phrasing_of_a_rich_scene_parses_back_to_what_it_names() -> None:
    rng, scenes = np.random.default_rng(3), scenes_of(200, 3, "rich")
    texts = [caption(scene, rng) for scene in scenes]
    for text, scene in zip(texts, scenes, strict=True):
        assert parse_caption(text) == [thing.named for thing in scene.things]
        assert names_wall(text) == (scene.wall is not None)
    words = " ".join(texts)
    assert all(each in words for each in ("a shape ", "a red shape", "a circle", "bounces", "wall"))


def test_a_backdrop_is_darker_than_every_thing_and_differs_between_scenes() -> None:
    scenes = scenes_of(200, 1, "rich")
    backdrops = torch.stack([scene.backdrop.draw() for scene in scenes])
    assert backdrops.min() >= 0 and backdrops.max() < LIT
    things = [max(PALETTE[t.colour]) * t.shade for scene in scenes for t in scene.things]
    assert min(things) > LIT
    assert len({scene.backdrop for scene in scenes}) > 100
    assert any(scene.backdrop == Backdrop() for scene in scenes)  # the plain world's is among them


def test_the_single_world_is_the_rich_one_with_a_thing_that_never_bounces() -> None:
    scenes = scenes_of(100, 4, "single")
    assert all(len(scene.things) == 1 and not scene.things[0].bounces for scene in scenes)
    assert 20 < sum(scene.wall is not None for scene in scenes) < 60
    assert len({scene.backdrop for scene in scenes}) == 100
    assert len({scene.things[0].shade for scene in scenes}) == 100


def test_speeds_that_a_caption_leaves_open_are_slow_or_quick() -> None:
    things = [thing for scene in scenes_of(200, 2, "rich") for thing in scene.things]
    free = [thing.speed for thing in things if thing.speed_name is None]
    slow, quick = SPEED_RANGES["slowly"], SPEED_RANGES["quickly"]
    low, high = (sum(a <= speed <= b for speed in free) for a, b in (slow, quick))
    assert low + high == len(free) and min(low, high) > len(free) / 3


@pytest.mark.parametrize("spoil", [lambda videos: videos, blurred_and_noisy])
def test_the_tracker_reads_every_attribute_of_rich_videos(spoil) -> None:  # type: ignore[no-untyped-def]
    scenes = scenes_of(40, 5, "rich")
    videos = spoil(render(scenes, 57))
    assert not mistakes(videos, scenes)
    for video, scene in zip(videos, scenes, strict=True):
        seen = {each.colour: each for each in track(video)}
        for thing in scene.things:
            assert seen[thing.colour].shade == pytest.approx(thing.shade, abs=0.08)
            assert seen[thing.colour].size == pytest.approx(thing.size, rel=0.1)


def test_a_thing_that_bounces_stays_in_the_picture_and_turns_around() -> None:
    thing = replace(RED, bounces=True, speed=1.0)
    time = torch.arange(60)
    x, y = thing.centres(time).T
    assert x.min() >= 8 and x.max() <= SIZE - 8 and y.eq(30).all()
    assert {float(step) for step in x.diff().sign()} == {1.0, -1.0}
    video = render([Scene((thing,))], 60)[0]
    assert score(video, "a red circle bounces right quickly")["direction"] == 1.0
    assert score(video, "a red circle bounces right quickly")["speed"] == 1.0
    assert score(video, "a red circle bounces up")["direction"] == 0.0
    assert score(video, "a red circle moves right")["direction"] == 0.0


def test_a_thing_rests_behind_a_wall_for_as_long_as_it_says() -> None:
    wall = Wall(axis=0, start=30, width=20, rest=10)
    time = torch.arange(300)
    x = RED.centres(time, wall)[:, 0]
    still = x.diff().abs() < 1e-9
    runs = "".join("x" if each else " " for each in still).split()
    assert {len(run) for run in runs} <= {9, 10}  # steps between the images that show it still
    assert (x[1:][still] - 40).abs().max() < 1e-9  # its middle
    moving = RED.centres(time)[:, 0]
    assert torch.equal(x[:10], moving[:10])  # not there yet


def test_a_wall_hides_what_passes_and_a_later_part_is_the_tail_of_the_whole() -> None:
    scene = Scene((RED,), wall=Wall(axis=0, start=28, width=24, rest=12))
    video = render([scene], 80)
    assert torch.equal(video[:, 33:], render([scene], 47, start_image=33))
    shown = detect(video[0]).area[:, COLOURS.index("red")] > MIN_AREA
    assert shown[0] and not shown.all() and shown[-1]


def test_a_thing_that_turns_another_colour_is_seen_to() -> None:
    video = render([Scene((replace(RED, turns=(20, "blue")),))], 60)[0]
    assert [each.colour for each in track(video[:20])] == ["red"]
    assert [each.colour for each in track(video[20:])] == ["blue"]
    assert switch_delay(video, 15, "a blue circle moves right") == pytest.approx(5, abs=2)


def test_speed_along_a_caption_that_leaves_things_open() -> None:
    video = render([Scene((RED,))], 40)[0]
    for text in ("a shape moves right", "a circle moves right", "a red shape moves right"):
        found = caption_measures(video, text)
        assert found["speed_along"] == pytest.approx(RED.speed, abs=0.02)
        assert [found[name] for name in ("colour", "shape", "direction")] == [1.0] * 3
    assert caption_measures(video, "a blue shape moves right")["speed_along"] == 0.0
    assert caption_measures(video, "a square moves left")["shape"] == 0.0
    both = caption_measures(video, "a red shape moves right and a shape moves left")
    assert both["speed_along"] == pytest.approx(RED.speed / 2, abs=0.02)
    bouncing = render([Scene((replace(RED, bounces=True),))], 60)[0]
    found = caption_measures(bouncing, "a red circle bounces left")
    assert found["speed_along"] == pytest.approx(RED.speed, abs=0.02)


# What a video keeps


def walled(count: int, seed: int) -> list[Scene]:
    return scenes_of(count, seed, "rich", two_things_share=0.0, wall_share=1.0)


def test_what_comes_out_from_behind_a_wall_is_known_again() -> None:
    scenes, found = walled(12, 6), []
    for video, scene in zip(render(scenes, 240), scenes, strict=True):
        seen = measure(video, 57).occlusions
        thing, wall = scene.things[0], scene.wall
        assert seen and wall is not None
        hidden = (wall.width - thing.size) / (thing.speed * SHAPE_SIZE) + wall.rest / 4
        assert all(hidden - 0.5 < each.latent_frames < hidden + 1.5 for each in seen)
        found += seen
    assert len(found) > 50
    assert sum(each.is_same for each in found) >= 0.97 * len(found)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"colour": "green"}, "same_colour"),
        ({"shape": "square"}, "same_shape"),
        ({"shade": 0.7}, None),
        ({"size": 20.0}, None),
    ],
)
def test_what_changes_behind_a_wall_is_noticed(change: dict[str, Any], name: str | None) -> None:
    wall = Wall(axis=0, start=30, width=26, rest=4)
    red = replace(RED, position=(62.0, 30.0))
    before, after = Scene((red,), wall=wall), Scene((replace(red, **change),), wall=wall)
    shown = detect(render([before], 60)[0]).area.amax(dim=1) > MIN_AREA
    hidden = int((~shown).nonzero()[5])
    video = torch.cat([render([before], hidden)[0], render([after], 50, start_image=hidden)[0]])
    occlusion = measure(video, 30).occlusions[0]
    assert not occlusion.is_same
    if name is not None:
        assert not getattr(occlusion, name)


def behind_a_wall() -> tuple[Tensor, int]:
    """A red circle that goes behind a wall five times, and the image of its first hiding."""
    video = render([Scene((RED,), wall=Wall(axis=0, start=30, width=26, rest=4))], 240)[0]
    found = measure(video, 60).occlusions
    assert len(found) == 5 and all(each.is_same for each in found)
    return video, found[0].start_image


def test_what_never_comes_out_from_behind_a_wall_is_lost() -> None:
    video, hidden = behind_a_wall()
    kept = video[hidden : hidden + 1].expand(100, -1, -1, -1)
    (lost,) = measure(torch.cat([video[:hidden], kept]), 50).occlusions
    assert not lost.is_same and lost.latent_frames == LONGEST
    assert measure(torch.cat([video[:hidden], kept[:40]]), 40).occlusions == ()  # who knows


def test_what_goes_out_of_sight_without_a_wall_is_no_occlusion() -> None:
    video = render([Scene((RED,))], 120)[0]
    empty = torch.tensor(BACKGROUND)[:, None, None].expand(20, 3, SIZE, SIZE)
    assert measure(torch.cat([video[:40], empty, video[60:]]), 30).occlusions == ()
    video, hidden = behind_a_wall()
    assert hidden > 24
    gone = torch.cat([video[:10], video[hidden : hidden + 1].expand(8, -1, -1, -1), video[18:]])
    assert len(measure(gone, 60).occlusions) == 5  # it was nowhere near the wall


def test_a_ghost_hides_no_occlusion_and_neither_does_another_thing() -> None:
    video, hidden = behind_a_wall()
    ghost, other = (
        render([Scene((replace(RED, colour=colour, position=(5.0, 55.0), speed=0.0),))], 240)[0]
        for colour in ("green", "blue")
    )
    flashed, doubled = video.clone(), video.clone()
    flashed[hidden + 4 : hidden + 6, :, 46:, :14] = ghost[:2, :, 46:, :14]
    doubled[:, :, 46:, :14] = other[:, :, 46:, :14]
    for spoilt in (flashed, doubled):
        found = measure(spoilt, 60).occlusions
        assert [each.is_same for each in found] == [True] * 5


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_view_that_a_video_s_end_cuts_off_tells_nothing(cut: str) -> None:
    video, hidden = behind_a_wall()
    part = video[hidden - 4 :] if cut == "before" else video[: hidden + 24]
    shown = detect(part).area.amax(dim=1) >= MIN_AREA
    assert 3 <= int(shown.int().argmin() if cut == "before" else shown.flip(0).int().argmin()) < 16
    assert len(measure(part, 10).occlusions) == (4 if cut == "before" else 0)


def test_two_of_one_colour_are_no_shape_and_so_wrong() -> None:
    rng = np.random.default_rng(0)
    for _ in range(12):
        x, y = rng.uniform(0, SIZE, 2).tolist()
        twice = tuple(replace(RED, position=(x, y + off)) for off in (0, 28))
        video = render([Scene(twice)], 48)[0]
        (seen,) = track(video)
        assert (seen.shape, seen.direction, seen.speed) == ("none", "none", 0.0)
        found = caption_measures(video, "a red circle moves right")
        assert not any(found[name] for name in ("colour", "shape", "direction", "speed_along"))


def test_two_things_whose_colours_are_open_are_told_by_what_is_said_of_them() -> None:
    big = replace(RED, colour="blue", shape="square", direction="left", size=20.0)
    scene = Scene((replace(RED, size=12.0), replace(big, position=(20.0, 55.0))))
    video = render([scene], 48)[0]
    for text in (
        "a circle moves right and a square moves left",
        "a shape moves right and a square moves left",
    ):
        assert all(score(video, text)[name] == 1.0 for name in ATTRIBUTES)
        assert all(
            score(video, " and ".join(text.split(" and ")[::-1]))[name] for name in ATTRIBUTES
        )


def test_a_thing_that_bounces_begins_as_its_caption_says() -> None:
    for scene in scenes_of(60, 8, "rich", bounce_share=1.0, wall_share=0.0):
        for thing in scene.things:
            first, later = thing.centres(torch.tensor([0.0, 0.01]))
            assert torch.allclose(first, torch.tensor(thing.position, dtype=torch.float64))
            step = (later - first)[thing.axis]
            assert step * thing.velocity[thing.axis] > 0


def test_more_things_than_fit_are_refused() -> None:
    text = " and ".join(
        f"a {colour} circle moves left" for colour in ("red", "green", "blue", "cyan")
    )
    with pytest.raises(ValueError, match="4 things find no places"):
        scene_of_caption(text, np.random.default_rng(0))


def test_a_backdrop_that_grows_bright_is_still_told() -> None:
    levels = torch.linspace(0.2, 0.9, 60)[:, None, None, None]
    video = (levels * torch.tensor([0.7, 1.0, 0.75])[:, None, None]).expand(60, 3, SIZE, SIZE)
    found = [max(look.backdrop) for look in measure(video, 12).windows]
    assert found == pytest.approx([0.26, 0.38, 0.5, 0.62, 0.74], abs=0.1)


def test_windows_tell_the_backdrop_and_how_it_drifts() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        backdrop = sample_backdrop(rng, RICH)
        video = render([Scene((RED,), backdrop)], 24)[0]
        for look in measure(video, 12).windows:
            expected = torch.tensor(backdrop.colour)
            assert (torch.tensor(look.backdrop) - expected).abs().max() < 0.02
            assert look.slope[backdrop.axis] == pytest.approx(backdrop.slope, abs=0.15)
    warmer = (video[12:] + torch.tensor([0.05, 0.0, 0.0])[:, None, None]).clamp(0, 1)
    early, late = measure(torch.cat([video[:12], warmer]), 12).windows
    assert late.backdrop[0] - early.backdrop[0] == pytest.approx(0.05, abs=0.01)


def test_a_video_that_falls_back_to_its_opening_jumps() -> None:
    video = render([Scene((RED,))], 60)[0]
    smooth = measure(video, 60).windows[0].jumps
    assert (smooth, measure(torch.cat([video[:24], video[:24]]), 48).windows[0].jumps) == (0, 1)
    again = measure(torch.cat([video[:24], video[:24]]), 24).windows
    assert [look.jumps for look in again] == [0, 1]  # between two windows
    scene = walled(1, 3)[0]
    assert measure(render([scene], 120)[0], 120).windows[0].jumps == 0


def test_a_video_without_anything_is_measured_too() -> None:
    empty = measure(torch.zeros(24, 3, SIZE, SIZE), 12)
    assert [look.tracks for look in empty.windows] == [(), ()] and empty.occlusions == ()
    full = measure(torch.ones(24, 3, SIZE, SIZE), 12)
    assert (full.windows[0].wall, max(full.windows[0].backdrop)) == (1, 1)


def test_windows_longer_than_the_video_are_refused() -> None:
    with pytest.raises(ValueError, match="windows of 30 images do not fit a video of 24"):
        measure(torch.zeros(24, 3, SIZE, SIZE), 30)


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
