"""The exact account: where each way of training rests, to stated tolerances."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from training.claims import exact
from training.claims.exact import ARMS, BETA, TEACHER, TILTED, Mixture, direction, run_exact

pytestmark = pytest.mark.slow
POSITIVE = ("DMD", "weights exp(beta r)", "shuffled weights", "best of 2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("exact")
    found = run_exact(out)
    assert json.loads((out / "exact.json").read_text()) == found
    picture, table = (out / "exact.svg").read_text(), (out / "exact.md").read_text()
    assert picture.count("<polyline") == 2 * len(ARMS) and all(arm in table for arm in ARMS)
    return found


def end(run: dict[str, Any], student: str, arm: str) -> dict[str, float]:
    last: dict[str, float] = run["curves"][student][arm][-1]
    return last


def test_noised_and_tilted_mixtures_are_what_quadrature_says():
    x = np.linspace(-2, 4, 4001)
    density = TEACHER.density(x)
    assert np.trapezoid(density, x) == pytest.approx(1, abs=1e-9)
    tilted = density * np.exp(BETA * x)
    np.testing.assert_allclose(TILTED.density(x), tilted / np.trapezoid(tilted, x), atol=1e-9)
    assert TILTED.mean == pytest.approx(np.trapezoid(x * TILTED.density(x), x))
    slopes = np.gradient(np.log(TILTED.noised(0.2).density(x)), x)
    np.testing.assert_allclose(TILTED.noised(0.2).score(x)[5:-5], slopes[5:-5], atol=1e-2)
    points = Mixture(np.array([1.0]), np.array([0.7]), np.array([0.0])).noised(0.3)
    assert (points.means[0], points.stds[0]) == pytest.approx((0.7 * 0.7, 0.3))


def test_the_direction_is_between_what_critic_and_teacher_take_the_clean_samples_for():
    """Against the posterior mean of a Gaussian."""
    fake = Mixture(np.ones(1), np.array([0.2]), np.array([0.4]))
    real = Mixture(np.ones(1), np.array([0.9]), np.array([0.5]))
    x, sigma = np.array([0.1, 1.3]), 0.3

    def clean(each: Mixture) -> np.ndarray:
        mean, variance = each.means[0], each.stds[0] ** 2
        gain = 0.7 * variance / (0.49 * variance + sigma**2)
        return mean + gain * (0.7 * x - 0.7 * mean)

    np.testing.assert_allclose(direction(x, fake, real, [sigma]), clean(fake) - clean(real))


def test_the_teacher_is_exactly_a_fixed_point_of_every_positive_weight(run):
    for arm in POSITIVE:
        assert run["residuals"][arm]["at the teacher"] < 1e-12
        assert run["residuals"][arm]["at the tilted teacher"] > 0.9
    assert run["residuals"]["tilted critic"]["at the tilted teacher"] < 1e-12
    assert run["residuals"]["minus beta gradient"]["at the tilted teacher"] < 0.02
    for arm in ("tilted critic", "minus beta gradient"):
        assert run["residuals"][arm]["at the teacher"] > 0.9


def test_the_gradient_s_fixed_point_is_the_tilted_teacher_as_noise_vanishes():
    arm = ARMS["minus beta gradient"]
    found = [exact.residual(arm, TILTED, sigma) for sigma in (0.04, 0.02, 0.01, 0.005)]
    for larger, smaller in pairwise(found):
        assert 3 < larger / smaller < 5  # as the square of the noise


def test_with_unlimited_capacity_only_the_tilt_and_the_gradient_move_the_optimum(run):
    for arm in POSITIVE:
        found = end(run, "unlimited", arm)
        assert found["mean_speed"] == pytest.approx(TEACHER.mean, abs=0.002)
        assert found["kl_to_teacher"] < 0.01 and found["kl_to_tilted"] > 0.25
    tilted, gradient = (
        end(run, "unlimited", arm) for arm in ("tilted critic", "minus beta gradient")
    )
    assert tilted["mean_speed"] == pytest.approx(TILTED.mean, abs=0.002)
    assert gradient["mean_speed"] == pytest.approx(TILTED.mean, abs=0.025)
    assert tilted["kl_to_tilted"] < 0.003 and gradient["kl_to_tilted"] < 0.01
    assert min(tilted["kl_to_teacher"], gradient["kl_to_teacher"]) > 0.2


def test_a_weight_moves_how_fast_the_teacher_is_reached(run):
    early = {arm: run["curves"]["unlimited"][arm][2]["mean_speed"] for arm in POSITIVE}
    assert early["best of 2"] > early["DMD"] + 0.03


def test_with_limited_capacity_a_weight_moves_the_optimum_too_and_a_shuffled_one_does_not(run):
    speeds = {arm: end(run, "one Gaussian", arm)["mean_speed"] for arm in ARMS}
    assert speeds["DMD"] == pytest.approx(TEACHER.mean, abs=0.002)
    assert speeds["shuffled weights"] == pytest.approx(speeds["DMD"], abs=0.03)
    assert speeds["weights exp(beta r)"] == pytest.approx(0.843, abs=0.01)
    assert speeds["best of 2"] == pytest.approx(0.982, abs=0.01)
    assert speeds["minus beta gradient"] > speeds["tilted critic"] > speeds["weights exp(beta r)"]


def test_the_more_noise_scores_are_compared_at_the_more_a_unit_of_beta_tilts(run):
    speeds = [each["mean_speed"] for each in run["gradient_by_noise"].values()]
    assert speeds == sorted(speeds) and speeds[0] == pytest.approx(TILTED.mean, abs=0.01)
    assert speeds[-1] > TILTED.mean + 0.3


def test_it_is_the_same_every_time(run):
    again = exact.train(exact.Particles(), ARMS["shuffled weights"])
    assert again == run["curves"]["unlimited"]["shuffled weights"]
