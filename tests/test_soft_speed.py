"""Differentiable motion: it agrees with the exact measures, has a useful gradient, and pays for
motion alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rf_core.options import DEMO
from training.rewards.flow_motion import SoftFlowReward
from training.world.clips import decode_latents, encode_scenes
from training.world.scenes import Thing, caption, render, sample_scene
from training.world.soft_speed import SoftSpeedReward, soft_speed
from training.world.stages import Files, open_vae
from training.world.tracker import score

RED = Thing(colour="red", shape="circle", direction="right", speed=0.5, position=(20.0, 30.0))
CAPTION = "a red circle moves right"


def scenes(count: int, two: float = 0.3) -> list:
    rng = np.random.default_rng(21)
    return [sample_scene(rng, two) for _ in range(count)]


def errors(videos: Tensor, texts: list[str]) -> Tensor:
    measured = [
        score(video, text)["measured_speed"] for video, text in zip(videos, texts, strict=True)
    ]
    return (SoftSpeedReward()(videos, texts)["motion"] - torch.tensor(measured)).abs()


@pytest.mark.slow
def test_it_agrees_with_the_exact_tracker_on_true_videos_to_a_hundredth_of_a_size():
    chosen = scenes(24)
    texts = [caption(scene) for scene in chosen]
    assert errors(render(chosen, 57), texts).max() < 0.01
    assert errors(render(chosen, 21), texts).max() < 0.03  # a slow thing hardly leaves its place


@pytest.mark.slow
def test_it_agrees_through_the_decoder():
    chosen, vae = scenes(8), open_vae(Files(DEMO))
    videos = decode_latents(vae, encode_scenes(vae, chosen, 15))
    assert errors(videos, [caption(scene) for scene in chosen]).max() < 0.02


def test_a_colour_that_no_caption_names_is_looked_for_and_a_named_one_is_all_that_counts():
    other = replace(RED, colour="blue", direction="up", speed=1.0, position=(50.0, 10.0))
    video = render([(RED, other)], 29)[0]
    for text, expected in (
        (CAPTION, 0.5),
        ("a blue circle moves up", 1.0),
        ("a red circle moves right and a shape moves up", 0.75),
        ("a shape moves", 0.78),  # each as often as it is seen
        ("a green circle moves up", 0.0),
    ):
        assert float(soft_speed(video, text)) == pytest.approx(expected, abs=0.02)


def test_no_backdrop_is_assumed():
    video = render([(RED,)], 29)[0]
    mask = (video - video.median(dim=0).values).abs().amax(dim=1, keepdim=True) > 0.02
    at = torch.arange(64) / 64
    bands = 0.1 + 0.25 * at * (1 + 0.3 * (at[:, None] * 40).sin())
    backdrop = torch.stack([0.4 * bands, bands, 0.8 * bands])
    shown = torch.where(mask, video, backdrop)
    assert float(soft_speed(shown, CAPTION)) == pytest.approx(0.5, abs=0.03)


def test_what_is_no_motion_pays_nothing():
    def speed(video: Tensor) -> float:
        return float(soft_speed(video, CAPTION))

    true = render([(RED,)], 29)[0]
    still = true[:1].expand(29, -1, -1, -1)
    elsewhere = render([(replace(RED, position=(52.0, 62.0)),)], 1)[0].expand(29, -1, -1, -1)
    dark, odd = torch.full_like(true, 0.08), (torch.arange(29) % 2 == 1)[:, None, None, None]
    noise = torch.rand(true.shape, generator=torch.Generator().manual_seed(0))
    for video in (
        still,
        dark,
        torch.where(odd, elsewhere, still),  # it jumps to and fro
        torch.where(odd, dark, still),  # it flashes
        torch.maximum(elsewhere, still),  # there are two
        torch.where(odd, torch.maximum(elsewhere, still), still),
        noise,
    ):
        assert speed(video) < 0.05
    assert speed(true) > 0.45


def slope(found: Tensor, step: Tensor) -> float:
    return float((found * step).sum())


def along_speed(measure: Callable[[Tensor], Tensor], scene: list, images: int) -> float:
    """The gradient along a change of the things' speed, where edges are as soft as decoded ones."""

    def shown(change: float) -> Tensor:
        moved = tuple(replace(thing, speed=thing.speed + change) for thing in scene)
        return F.avg_pool2d(render([moved], images)[0], 3, 1, 1)

    video = shown(0.0).requires_grad_(True)
    (found,) = torch.autograd.grad(measure(video), video)
    assert found.isfinite().all()
    return slope(found, (shown(0.01) - shown(-0.01)) / 0.02)


def test_its_gradient_is_that_of_the_speed():
    found = [
        along_speed(partial(soft_speed, caption=caption(scene)), scene, 17)
        for scene in scenes(8, two=0.0)
    ]
    assert np.mean(found) == pytest.approx(1.0, abs=0.15)
    assert min(found) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("score_name", SoftFlowReward.differentiable)
def test_the_gradient_of_soft_flow_grows_with_speed_and_is_what_differences_say(score_name):
    def measure(video: Tensor) -> Tensor:
        return SoftFlowReward()(video[None], [""])[score_name][0]

    chosen = scenes(6, two=0.0)
    assert min(along_speed(measure, scene, 9) for scene in chosen) > 0
    for seed, scene in enumerate(chosen[:3]):
        video = F.avg_pool2d(render([scene], 9)[0], 3, 1, 1).requires_grad_(True)
        (found,) = torch.autograd.grad(measure(video), video)
        noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(seed))
        step = found / found.norm() + 0.1 * noise / noise.norm()
        with torch.no_grad():
            near = [measure(video + sign * 0.05 * step) for sign in (1, -1)]
        assert slope(found, step) == pytest.approx(float((near[0] - near[1]) / 0.1), rel=0.3)


def test_nothing_seen_has_a_gradient_that_is_finite():
    for video in (torch.zeros(9, 3, 64, 64), torch.full((9, 3, 64, 64), 0.5)):
        video.requires_grad_(True)
        for found in (soft_speed(video, CAPTION), SoftFlowReward()(video[None], [""])["motion"][0]):
            (gradient,) = torch.autograd.grad(found, video)
            assert gradient.isfinite().all() and float(found.detach()) == pytest.approx(0, abs=0.01)


def test_a_video_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"soft_speed reads \[T, 3, 64, 64\] of 5 images or more"):
        soft_speed(torch.zeros(4, 3, 64, 64), CAPTION)
