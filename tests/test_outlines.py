"""Outlines of the miniature world as control videos, and the contexts that are made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from einops import rearrange

from rf_core.control import GREY, context_of
from rf_core.decoders.decoder import load_decoder
from rf_core.options import DEMO
from training.control_videos import VariantsConfig
from training.data.controls import read_controls
from training.world.clips import CaptionedClips, ClipsConfig, read_clips, scene_of, write_clips
from training.world.controls import (
    control_videos,
    encode_controls,
    write_controls_of,
)
from training.world.outlines import draw_outlines, sobel
from training.world.scenes import (
    BACKGROUND,
    SIZE,
    Backdrop,
    Scene,
    Thing,
    colour_caption,
    coverage,
    render,
)
from training.world.stages import Files, open_vae

SCENES = [scene_of(9, index) for index in range(24)]
IMAGES = 9


def thing(**changes) -> Thing:
    given = {"colour": "red", "shape": "square", "direction": "right", "speed": 0.5}
    return Thing(**{**given, "position": (20.0, 30.0), **changes})


def pixels_of(video: torch.Tensor) -> torch.Tensor:
    return rearrange(video, "t c h w -> t h w c")


def test_outlines_are_white_lines_on_black_where_shapes_have_their_edges():
    (video,) = draw_outlines([Scene((thing(),))], 1)
    assert video.shape == (1, SIZE, SIZE, 3) and video.dtype == torch.float32
    assert (video == video[..., :1]).all() and video.min() >= 0 and video.max() == 1
    line = video[0, ..., 0]
    assert line[30, 11:13].eq(1).all() and line[30, 27:29].eq(1).all()  # left and right sides
    assert line[21:23, 20].eq(1).all() and line[37:39, 20].eq(1).all()  # top and bottom
    assert line[30, 20] == 0 and line[0].max() == 0  # inside, and outside


def test_outlines_move_with_the_clip_and_wrap_around_with_it():
    scenes = [
        Scene((thing(position=(60.0, 2.0), shape=shape),)) for shape in ("circle", "triangle")
    ]
    whole, later = draw_outlines(scenes, 13), draw_outlines(scenes, 5, start_image=8)
    assert torch.equal(whole[:, 8:], later)
    shown = (render(scenes, 13) - torch.tensor(BACKGROUND)[:, None, None]).abs().amax(dim=2) > 0.3
    assert (whole[..., 0] > 0.9).any() and not (whole[..., 0][shown.logical_not()] == 1).all()
    assert shown[0, 0, :, 0].any() and shown[0, 0, :, -1].any()  # on both sides of the seam
    assert whole[0, 0, :, 0].max() > 0 and whole[0, 0, :, -1].max() > 0


def test_a_thing_hides_the_lines_of_what_it_covers():
    behind, before = thing(), thing(colour="blue", shape="circle", position=(24.0, 30.0))
    (video,) = draw_outlines([Scene((behind, before))], 1)
    offset = torch.arange(SIZE) + 0.5
    inside = coverage("circle", offset - 24, (offset - 30)[:, None]) == 1
    deep = -torch.nn.functional.max_pool2d(-inside[None].float(), 5, 1, 2)[0] == 1
    assert video[0, deep].max() == 0


@pytest.mark.parametrize("number", range(6))
def test_an_edge_filter_over_the_clip_finds_about_the_same(number):
    scene = SCENES[number]
    drawn = draw_outlines([scene], IMAGES)[0]
    found = sobel(pixels_of(render([scene], IMAGES)[0]))
    assert found.shape == drawn.shape
    both = torch.stack([drawn.flatten(), found.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.95
    assert (drawn - found).abs().mean() < 0.01


def test_a_colour_caption_names_colours_alone():
    assert colour_caption(Scene((thing(),))) == "a red shape moves"
    two = Scene((thing(), thing(colour="cyan", shape="circle")))
    assert colour_caption(two) == "a red shape moves and a cyan shape moves"


def test_control_videos_are_outlines_and_then_masked_ones_or_nothing():
    kinds = set()
    for index, scene in enumerate(SCENES):
        rng = np.random.default_rng(index)
        whole, other = control_videos(scene, 3, VariantsConfig(), rng)
        assert whole.mask.min() == 1 and whole.images.shape == (IMAGES, 3, SIZE, SIZE)
        kept = (other.mask == 0).expand_as(other.images)
        true = render([scene], IMAGES)[0]
        assert torch.equal(other.images[kept], true[kept])
        made = other.images[~kept]
        kinds.add((bool(kept.any()), bool((made == GREY).all())))
    assert kinds == {(True, False), (True, True), (False, True)}


def test_shares_that_are_more_than_all_are_refused():
    with pytest.raises(ValueError, match=r"masked is 0.9 and erased 0.2"):
        VariantsConfig(masked=0.9, erased=0.2)


def test_contexts_are_those_that_a_stream_makes_of_the_same_videos():
    videos = list(control_videos(SCENES[1], 3, VariantsConfig(masked=1, erased=0), _rng()))
    parts = encode_controls(open_vae(Files(DEMO)), videos)
    decoder = load_decoder(DEMO / "vae.safetensors", torch.device("cpu"), torch.float32, 3)
    for number, video in enumerate(videos):
        made = torch.cat([each[number] for each in parts])
        expected = context_of(video.images, decoder, video.mask)[0]
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six clips of three frames, in two shards, with their controls."""
    folder, vae = tmp_path_factory.mktemp("world"), open_vae(Files(DEMO))
    clips = ClipsConfig(num_clips=6, frames=3, shard_clips=4)
    assert list(write_clips(vae, clips, folder / "clips")) == [4, 6]
    made = write_controls_of(vae, VariantsConfig(), folder / "clips", folder / "controls")
    assert list(made) == [4, 6]
    return folder


def test_contexts_of_clips_are_read_by_their_numbers(folder):
    clips = CaptionedClips(read_clips(folder / "clips"), None)
    contexts = read_controls(folder / "controls", clips)
    assert contexts.shape == (96, 3, 8, 8)
    draws = [torch.Generator().manual_seed(seed) for seed in range(8)]
    of_five = contexts.of([5] * 8, draws)
    assert of_five.shape == (8, 96, 3, 8, 8)
    assert len({each.sum().item() for each in of_five}) == 2  # outlines, and the other one
    again = [torch.Generator().manual_seed(seed) for seed in range(8)]
    assert torch.equal(contexts.of([5] * 8, again), of_five)


def test_controls_are_of_their_clips_whatever_the_world(tmp_path, monkeypatch):
    vae, config, seen = open_vae(Files(DEMO)), ClipsConfig(num_clips=2, frames=3, world="rich"), []
    list(write_clips(vae, config, tmp_path / "clips"))

    def noted(scene, *rest):
        seen.append(scene)
        return control_videos(scene, *rest)

    monkeypatch.setattr("training.world.controls.control_videos", noted)
    list(write_controls_of(vae, VariantsConfig(), tmp_path / "clips", tmp_path / "controls"))
    assert seen == read_clips(tmp_path / "clips").scenes
    assert any(scene.backdrop != Backdrop() for scene in seen)


def test_contexts_that_are_there_are_not_made_again(folder):
    before = {path: path.stat().st_mtime_ns for path in (folder / "controls").iterdir()}
    vae, config = open_vae(Files(DEMO)), VariantsConfig()
    list(write_controls_of(vae, config, folder / "clips", folder / "controls"))
    assert {p: p.stat().st_mtime_ns for p in (folder / "controls").iterdir()} == before


def test_controls_of_other_clips_are_refused(folder, tmp_path):
    clips = read_clips(folder / "clips")
    more = CaptionedClips(type(clips)(latents=clips.latents[[0] * 9], scenes=clips.scenes), None)
    more.clips.scenes.extend(clips.scenes[:3])
    with pytest.raises(ValueError, match="controls 6 clips of 9"):
        read_controls(folder / "controls", more)
    short = CaptionedClips(
        type(clips)(latents=clips.latents[:, :, :2], scenes=clips.scenes[:6]), None
    )
    with pytest.raises(ValueError, match=r"frames, rows and columns \(3, 8, 8\); the clips have"):
        read_controls(folder / "controls", short)
    with pytest.raises(ValueError, match="holds no control contexts"):
        read_controls(tmp_path, short)
    with pytest.raises(ValueError, match=r"holds no clips; run `python -m training.world clips`"):
        list(write_controls_of(open_vae(Files(DEMO)), VariantsConfig(), tmp_path, tmp_path))
