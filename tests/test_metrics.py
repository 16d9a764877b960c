"""Measures of videos, against videos whose motion, copies and drift are known."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from training.measures.flow import flow_estimator
from training.measures.metrics import (
    LucasKanadeConfig,
    drift,
    first_frame_copy,
    flicker,
    flow,
    image_statistics,
    is_dynamic,
    lucas_kanade,
    measure,
    motion,
)
from training.rewards.flow_motion import FlowMotionReward
from training.world.scenes import IMAGES_PER_FRAME, SHAPE_SIZE, Scene, render, scene_of_caption


def waves(num_images: int, height: int, width: int, speed: tuple[float, float]) -> Tensor:
    """A texture of sine waves that moves by `speed` (x, y) pixels an image, drawn exactly."""
    generator = torch.Generator().manual_seed(0)
    length, angle, phase = (
        low + (high - low) * torch.rand(24, 3, 1, 1, 1, generator=generator)
        for low, high in ((6, 40), (0, math.tau), (0, math.tau))
    )
    time = torch.arange(num_images)[:, None, None]
    x = torch.arange(width) - speed[0] * time
    y = torch.arange(height)[:, None] - speed[1] * time
    wave = torch.sin(math.tau / length * (x * angle.cos() + y * angle.sin()) + phase)
    return (0.5 + 0.05 * wave.sum(dim=0)).clamp(0, 1).transpose(0, 1)


def shapes(caption: str, speed: float, num_images: int = 17) -> Tensor:
    """A video of the miniature world whose things move by `speed` pixels an image."""
    scene = scene_of_caption(caption, np.random.default_rng(0))
    sizes = speed * IMAGES_PER_FRAME / SHAPE_SIZE
    return render([Scene(tuple(replace(t, speed=sizes) for t in scene.things))], num_images)[0]


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (33, 57), (90, 120)])
@pytest.mark.parametrize("speed", [(0.25, 0.0), (0.5, -0.3), (1.0, 1.0), (-2.5, 1.0), (5.0, -3.0)])
def test_flow_finds_the_speed_of_a_texture_to_a_tenth_of_a_pixel(size, speed):
    found = flow(waves(3, *size, speed))
    assert found.shape == (2, 2, *size)
    border = math.ceil(max(map(abs, speed))) + 3
    inner = found[:, :, border:-border, border:-border]
    error = (inner - torch.tensor(speed)[:, None, None]).norm(dim=1)
    assert error.mean() < 0.1
    assert error.max() < 0.3


def test_motion_is_the_true_speed_and_its_mean_the_same_where_everything_moves():
    for speed in (0.25, 1.0, 4.0):
        found = motion(waves(4, 64, 64, (0.0, speed)))
        assert found["motion"] == pytest.approx(speed, abs=0.08)
        assert found["mean_motion"] == pytest.approx(speed, rel=0.05)


def test_a_still_video_does_not_move_whatever_it_shows():
    noise = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    for still in (noise, waves(1, 40, 56, (0, 0)), torch.zeros(1, 3, 40, 56)):
        assert max(motion(still.expand(4, -1, -1, -1)).values()) < 1e-5


def test_a_plain_picture_beside_a_moving_thing_is_not_seen_to_move():
    video = shapes("a red circle moves right", 2.0)
    seen = flow(video[:2])[0].norm(dim=0)
    from_thing = (video[0] - video[0, :, :1, :1]).abs().sum(0) > 0.05
    far = torch.nn.functional.max_pool2d(from_thing[None].float(), 41, 1, 20)[0] == 0
    assert far.sum() > 100
    assert seen[far].max() < 0.02
    assert seen[from_thing].median() == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize("caption", ["a red circle moves left", "a blue square moves down"])
def test_motion_grows_with_the_speed_of_a_small_thing_and_is_near_it(caption):
    speeds = (0.0, 0.8, 1.6, 3.2, 4.8)
    found = [motion(shapes(caption, speed, 9)) for speed in speeds]
    for name in ("motion", "mean_motion"):
        values = [each[name] for each in found]
        assert values == sorted(set(values))
    for speed, each in zip(speeds, found, strict=True):
        assert each["motion"] == pytest.approx(speed, abs=0.4)


def test_motion_is_the_mean_of_the_fastest_twentieth_of_the_pixels():
    speeds = torch.arange(400.0).reshape(1, 20, 20)

    def known(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([0.6 * speeds, 0.8 * speeds], dim=1).expand(len(first), -1, -1, -1)

    found = motion(torch.zeros(12, 3, 20, 20), known)
    assert found["motion"] == pytest.approx(speeds.flatten()[-20:].mean().item())
    assert found["mean_motion"] == pytest.approx(speeds.mean().item())


def test_long_videos_are_measured_in_groups_to_the_same_numbers():
    video = torch.cat(
        [waves(5, 24, 24, (2, 0)), waves(6, 24, 24, (0, 1)), waves(8, 24, 24, (1, 1))]
    )
    pairs = torch.cat([lucas_kanade(video[i : i + 1], video[i + 1 : i + 2]) for i in range(18)])
    torch.testing.assert_close(flow(video), pairs, rtol=0, atol=1e-4)
    mean = (video[1:] - video[:-1]).abs().mean()
    assert flicker(video) == pytest.approx(1 - float(mean), abs=1e-6)


def test_dynamic_follows_the_limit_and_the_share_of_vbench():
    def moving(speeds: list[float]) -> Tensor:
        """Images whose brightness says how fast `told` finds the pair that begins there."""
        return torch.tensor(speeds)[:, None, None, None].expand(-1, 3, 256, 300) / 100

    def told(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([100 * first[:, :1], torch.zeros_like(first[:, :1])], dim=1)

    still, fast, slower = 0.0, 6.1, 5.9
    assert is_dynamic(moving([fast] * 2 + [still] * 6), told, fps=8)
    assert not is_dynamic(moving([fast] + [still] * 7), told, fps=8)
    assert not is_dynamic(moving([slower] * 8), told, fps=8)
    # Of 16 images a second every other one is looked at.
    assert is_dynamic(moving([fast, still] * 2 + [still] * 12), told, fps=16)
    assert not is_dynamic(moving([still, fast] * 8), told, fps=16)
    # Below 8 images a second the limit grows with the time between them.
    assert not is_dynamic(moving([11.9] * 8), told, fps=4)
    assert is_dynamic(moving([12.1] * 8), told, fps=4)


def test_flicker_is_vbenchs_on_bytes():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 8, 9), generator=generator)
    difference = (images[1:] - images[:-1]).abs().double().mean()
    expected = (255.0 - float(difference)) / 255.0
    assert flicker(images / 255) == pytest.approx(expected, abs=1e-6)
    assert flicker(images[:1].expand(5, -1, -1, -1) / 255) == 1.0


def test_a_frozen_video_copies_its_first_image_and_a_new_scene_does_not():
    still = waves(1, 32, 40, (0, 0)).expand(8, -1, -1, -1)
    noise = torch.rand(4, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    assert first_frame_copy(still) == pytest.approx(1.0)
    assert abs(first_frame_copy(torch.cat([still[:4], noise]))) < 0.1
    # Only the second half counts: what happens before is not seen.
    assert first_frame_copy(torch.cat([still[:1], noise[:3], still[4:]])) == pytest.approx(1.0)


def test_similarity_to_the_first_image_is_the_published_ssim():
    video = torch.rand(2, 3, 14, 13, generator=torch.Generator().manual_seed(0))
    luma = torch.einsum("tchw,c->thw", video, torch.tensor([0.299, 0.587, 0.114])).double().numpy()
    offset = np.arange(-5, 6)
    kernel = np.exp(-(offset**2) / (2 * 1.5**2))
    weights = np.outer(kernel, kernel) / kernel.sum() ** 2
    values = []
    for row in range(4):
        for column in range(3):
            x, y = luma[:, row : row + 11, column : column + 11]
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            vxy = (weights * (x - mx) * (y - my)).sum()
            top = (2 * mx * my + 1e-4) * (2 * vxy + 9e-4)
            values.append(top / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert first_frame_copy(video) == pytest.approx(float(np.mean(values)), abs=1e-5)


def test_a_look_gives_colour_contrast_and_saturation_in_per_cent():
    image = torch.zeros(10, 3, 8, 8)
    image[:, 0] = 0.5
    image[:, 1, :, 4:] = 1.0
    found = image_statistics(image)
    assert (found.red, found.green, found.blue) == pytest.approx((50, 50, 0))
    assert found.contrast == pytest.approx(58.7 / 2, abs=1e-3)
    assert found.saturation == pytest.approx((50 + 100) / 2)
    # Half of the green step, 58.7 in luma, falls on each of the two columns beside it.
    assert found.sharpness == pytest.approx(58.7 / 2 * 2 / 8, abs=1e-3)


def test_drift_compares_the_first_window_with_the_last_and_tells_what_changed():
    texture = waves(1, 32, 32, (0, 0)).expand(40, -1, -1, -1)
    same = drift(texture, 10)
    assert same.early == same.late
    assert max(same.sharpness_std, same.colour_shift) < 1e-6
    gain = torch.linspace(1, 0.4, 40)[:, None, None, None]
    faded = drift(texture * gain, 10)
    assert faded.late.contrast < 0.7 * faded.early.contrast
    assert faded.late.saturation < 0.7 * faded.early.saturation
    assert faded.sharpness_std > 0.3
    early, late = (torch.tensor([x.red, x.green, x.blue]) for x in (faded.early, faded.late))
    assert faded.colour_shift == pytest.approx(float((late - early).norm()), rel=1e-5)
    assert faded.late == image_statistics((texture * gain)[30:])


@pytest.mark.slow
def test_drift_spreads_the_sharpness_of_all_whole_windows():
    texture = waves(1, 32, 32, (0, 0)).expand(10, -1, -1, -1)
    video = torch.cat([0.5 + strength * (texture - 0.5) for strength in (1.0, 0.5, 0.9)])
    video = torch.cat([video, torch.zeros(9, 3, 32, 32)])  # no whole window: left out
    each = [image_statistics(video[at : at + 10]).sharpness for at in (0, 10, 20)]
    assert drift(video, 10).sharpness_std == pytest.approx(np.std(each))


@pytest.mark.parametrize("window", [0, -3, 5])
def test_drift_refuses_windows_of_which_a_video_does_not_hold_two(window):
    with pytest.raises(ValueError, match=f"9 images does not hold two windows of {window}.*1 to 4"):
        drift(torch.zeros(9, 3, 8, 8), window)


def test_every_measure_comes_by_name_and_is_a_number():
    found = measure(shapes("a green triangle moves up", 2.0), 8)
    assert {"motion", "dynamic", "flicker", "first_frame_copy", "sharpness_std"} <= set(found)
    assert all(math.isfinite(value) for value in found.values())
    assert found["dynamic"] == 1.0


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (4, 1, 8, 8), (3, 8, 8)])
def test_what_is_no_video_is_refused_with_its_shape(shape):
    video = torch.zeros(shape)
    for measured in (flow, motion, flicker, first_frame_copy, is_dynamic):
        with pytest.raises(ValueError, match=r"give \[T, 3, H, W\] of at least two images"):
            measured(video)


def test_impossible_settings_of_the_flow_are_refused():
    with pytest.raises(ValueError, match="must be positive"):
        LucasKanadeConfig(stiffness=0.0)
    with pytest.raises(ValueError, match="at least 1 and 2"):
        LucasKanadeConfig(iterations=0)


def test_the_motion_reward_scores_each_video_by_itself():
    videos = torch.stack([shapes("a red circle moves left", speed, 5) for speed in (3.0, 0.0, 1.0)])
    scores = FlowMotionReward()(videos, ["a", "b", "c"])
    expected = [motion(video) for video in videos]
    for name in ("motion", "mean_motion"):
        assert scores[name].shape == (3,)
        assert scores[name].tolist() == pytest.approx([each[name] for each in expected])
    assert scores["motion"].argsort().tolist() == [1, 2, 0]


def test_the_motion_reward_asks_for_a_prompt_a_video():
    with pytest.raises(ValueError):
        FlowMotionReward()(torch.zeros(2, 3, 3, 16, 16), ["only one"])


def test_flow_estimators_are_chosen_by_name_and_refuse_what_does_not_fit(tmp_path):
    assert flow_estimator("lucas_kanade") is lucas_kanade
    with pytest.raises(ValueError, match="choose one of lucas_kanade, raft_small, raft_large"):
        flow_estimator("farneback")
    with pytest.raises(ValueError, match="has no weights"):
        flow_estimator("lucas_kanade", tmp_path / "x.pth")
    with pytest.raises(ValueError, match="weights of raft_large are None"):
        flow_estimator("raft_large")


def test_raft_without_torchvision_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    (tmp_path / "raft.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"needs torchvision.*--flow lucas_kanade"):
        flow_estimator("raft_small", tmp_path / "raft.pth")


def test_raft_reads_its_weights_from_a_file_and_keeps_the_size(tmp_path):
    optical_flow = pytest.importorskip("torchvision.models.optical_flow")
    torch.manual_seed(0)
    network = optical_flow.raft_small(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "raft.pth")
    estimate = flow_estimator("raft_small", tmp_path / "raft.pth")
    video = waves(3, 130, 141, (1, 0))
    found = flow(video, estimate)
    assert found.shape == (2, 2, 130, 141)
    padded = torch.nn.functional.pad(2 * video - 1, (0, 3, 0, 6), mode="replicate")
    with torch.no_grad():
        expected = network(padded[:-1], padded[1:], num_flow_updates=20)[-1]
    torch.testing.assert_close(found, expected[:, :, :130, :141])
    assert flow(waves(2, 64, 64, (1, 0)), estimate).shape == (1, 2, 64, 64)
    with pytest.raises(ValueError, match="does not hold the weights of torchvision's raft_large"):
        flow_estimator("raft_large", tmp_path / "raft.pth")
