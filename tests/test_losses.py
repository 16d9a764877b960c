from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from training.__main__ import main
from training.objective.losses import (
    critic_loss,
    effective_samples,
    generator_loss,
    guided,
    matching_direction,
    matching_timesteps,
    reward_weights,
)

GOLDEN = Path(__file__).parent / "parity" / "golden"
SHAPE = (3, 4, 6, 5, 7)


def randn(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_verify_passes_on_the_golden_losses(capsys):
    assert main(["verify", str(GOLDEN)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("loss", "grad_x", "critic_loss", "rf_core verify"))


def test_verify_fails_on_a_changed_file(tmp_path, capsys):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tmp_path / "redmd_losses.safetensors"
    shutil.copy(GOLDEN / path.name, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["fake"] = tensors["fake"] + 0.01
    save_file(tensors, path, metadata)
    assert main(["verify", str(tmp_path)]) == 1
    assert "FAIL redmd_losses.safetensors grad_x" in capsys.readouterr().out


def test_the_generator_s_gradient_is_the_direction_per_element():
    x0, fake, real = (randn(seed) for seed in (1, 2, 3))
    x0.requires_grad_(True)
    direction = matching_direction(x0, fake, real)
    for b in range(SHAPE[0]):
        expected = (fake[b] - real[b]) / (x0[b] - real[b]).abs().mean()
        torch.testing.assert_close(direction[b], expected)
    (gradient,) = torch.autograd.grad(generator_loss(x0, direction).sum(), x0)
    torch.testing.assert_close(gradient, direction / x0[0].numel())


def test_a_mask_leaves_out_what_it_does_not_count():
    x0, fake, real = (randn(seed) for seed in (1, 2, 3))
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[:, :, 2:] = True
    direction = matching_direction(x0, fake, real)
    loss = generator_loss(x0, direction, mask)
    expected = 0.5 * direction[:, :, 2:].flatten(1).square().mean(1)
    torch.testing.assert_close(loss, expected)


def test_a_sample_that_is_the_teacher_s_own_gives_no_gradient():
    x0 = randn(1)
    assert torch.equal(matching_direction(x0, x0, x0), torch.zeros(SHAPE))


def test_the_critic_learns_the_flow_of_what_was_generated():
    flow, generated, noise = (randn(seed) for seed in (1, 2, 3))
    expected = torch.stack(
        [((flow[b] - (noise[b] - generated[b])) ** 2).mean() for b in range(SHAPE[0])]
    )
    torch.testing.assert_close(critic_loss(flow, generated, noise), expected)
    assert critic_loss(noise - generated, generated, noise).abs().max() == 0


def test_guidance_is_the_published_form():
    cond, uncond = randn(1), randn(2)
    assert torch.equal(guided(cond, uncond, 0.0), cond)
    torch.testing.assert_close(guided(cond, uncond, 3.0), 4 * cond - 3 * uncond)


def test_rewards_weigh_exponentially_and_the_effective_size_says_how_many_count():
    rewards = torch.tensor([0.0, 1.0, -1.0, 0.5])
    weights = reward_weights(rewards, 2.0)
    torch.testing.assert_close(weights, torch.tensor([math.exp(2 * r) for r in rewards.tolist()]))
    assert effective_samples(reward_weights(rewards, 0.0)) == 4
    assert effective_samples(reward_weights(rewards * 10, 2.0)) == pytest.approx(1.0, rel=1e-3)


def test_timesteps_are_shifted_toward_noise_and_kept_within_bounds():
    generator = torch.Generator().manual_seed(0)
    t = matching_timesteps(20_000, 5.0, (20.0, 980.0), generator)
    assert t.min() >= 20 and t.max() == 980
    median = 5 * 0.5 / (1 + 4 * 0.5) * 1000
    assert t.median() == pytest.approx(median, rel=0.02)
    plain = matching_timesteps(20_000, 1.0, (0.0, 1000.0), generator)
    assert plain.mean() == pytest.approx(500, rel=0.02)
