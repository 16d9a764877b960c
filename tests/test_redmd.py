from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from rf_core.config import SamplerConfig
from rf_core.scheduler import add_noise, flow_to_x0
from training.redmd import (
    Noising,
    Prompts,
    ReDMDConfig,
    critic_update,
    draw_noising,
    generator_update,
)
from training.rewards import TrackerReward, WeightConfig, weigh
from training.rollout import Draws, draw
from training.world.scenes import parse_caption, place_all, render

CONFIG = ReDMDConfig(cache=tiny.window(9, 3), sampler=SamplerConfig(steps=(1000, 500)), batch=2)
SHAPE = (2, tiny.CONFIG.in_dim, 15, 4, 6)  # five chunks: two evictions


@pytest.fixture
def networks():
    student, teacher, critic = (tiny.model(seed=seed) for seed in (0, 1, 2))
    return student.requires_grad_(True), teacher, critic.requires_grad_(True)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    prompts = Prompts(cond=tiny.prompt(batch=2), uncond=tiny.prompt(7))
    draws = draw(SHAPE, CONFIG.sampler, generator)
    return prompts, draws, draw_noising(draws.noise, CONFIG, generator)


def sample(batch, b: int):
    prompts, draws, noising = batch
    one = slice(b, b + 1)
    return (
        Prompts(cond=prompts.cond[one], uncond=prompts.uncond),
        Draws(noise=draws.noise[one], renoise=draws.renoise[:, one], exit_step=draws.exit_step),
        Noising(noise=noising.noise[one], timestep_B=noising.timestep_B[one]),
    )


def gradients(model) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def rewards(x0: torch.Tensor) -> torch.Tensor:
    return x0.flatten(1).mean(1)


def test_the_generator_s_gradient_is_the_weighed_direction_through_the_rollout(networks, batch):
    student, teacher, critic = networks
    prompts, _, noising = batch
    update = generator_update(*networks, *batch, CONFIG, rewards)
    update.loss.backward()
    found = gradients(student)

    update = generator_update(*networks, *batch, CONFIG)
    x0 = update.rollout.latents
    at = noising.timestep_B[:, None].expand(-1, SHAPE[2])
    noisy = add_noise(x0.detach(), noising.noise, at)

    def guess(model, embeds):
        with torch.no_grad():
            flow = model(noisy, at, model.prompt_context(embeds.expand(2, -1, -1)))
        return flow_to_x0(flow, noisy, at)

    cond = guess(teacher, prompts.cond)
    real = cond + 3 * (cond - guess(teacher, prompts.uncond))
    fake = guess(critic, prompts.cond)
    loss = 0
    for b in range(2):
        g = (fake[b] - real[b]) / (x0[b].detach() - real[b]).abs().mean()
        weight = math.exp(2 * float(x0[b].detach().mean()))
        loss = loss + weight * (x0[b] * g).sum() / x0[b].numel() / 2
    student.zero_grad()
    loss.backward()
    for first, second in zip(found, gradients(student), strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-3)


def test_accumulated_micro_batches_equal_the_full_batch(networks, batch):
    student, _, critic = networks
    generator_update(*networks, *batch, CONFIG, rewards).loss.backward()
    critic_update(student, critic, *batch, CONFIG).backward()
    whole = gradients(student), gradients(critic)
    for b in range(2):
        generator_update(*networks, *sample(batch, b), CONFIG, rewards).loss.backward()
        critic_update(student, critic, *sample(batch, b), CONFIG).backward()
    for model, expected in zip((student, critic), whole, strict=True):
        for first, second in zip(gradients(model), expected, strict=True):
            torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-3)


def test_each_loss_moves_its_own_network_alone(networks, batch):
    student, teacher, critic = networks
    generator_update(*networks, *batch, CONFIG, rewards).loss.backward()
    assert gradients(student) and not gradients(critic) and not gradients(teacher)
    critic_update(student, critic, *batch, CONFIG).backward()
    assert gradients(critic) and not gradients(student)


def test_without_a_judge_it_is_plain_distribution_matching(networks, batch):
    plain = generator_update(*networks, *batch, CONFIG)
    nought = replace(CONFIG, weights=WeightConfig(beta=0.0))
    assert plain.weighed is None
    assert torch.equal(plain.loss, generator_update(*networks, *batch, nought, rewards).loss)


def test_a_critic_learns_what_a_fixed_student_makes(networks, batch):
    student, _, critic = networks
    optimiser = torch.optim.Adam(critic.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = critic_update(student, critic, *batch, CONFIG)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


def test_weights_are_published_unless_asked_otherwise():
    scores = torch.tensor([0.0, 1.0, 2.0])
    torch.testing.assert_close(weigh(scores, WeightConfig()).weights, (2 * scores).exp())
    tamed = weigh(scores, WeightConfig(baseline="batch", unit="batch", limit=0.5, mean_one=True))
    assert tamed.weights.mean() == pytest.approx(1.0)
    ratio = float(tamed.weights[2] / tamed.weights[0])
    assert ratio == pytest.approx(math.exp(2.0), rel=1e-4)
    assert tamed.effective_share > weigh(scores, WeightConfig()).effective_share
    assert weigh(scores, WeightConfig(beta=0.0)).effective_share == 1.0


def test_the_tracker_rewards_measured_speed_and_what_the_caption_says():
    rng = np.random.default_rng(0)
    texts = ["a red circle moves left quickly", "a red circle moves left slowly"]
    scenes = [place_all(parse_caption(text), rng) for text in texts]
    videos = render(scenes, 57)
    found = TrackerReward()(videos, texts)
    assert found["motion"][0] > 2 * found["motion"][1] > 0
    assert found["caption"].tolist() == [1.0, 1.0]
    swapped = TrackerReward()(videos, [texts[0], "a blue circle moves left slowly"])
    assert swapped["caption"].tolist() == [1.0, 0.75]
    nothing = TrackerReward()(torch.zeros_like(videos), texts)
    assert nothing["motion"].tolist() == [0.0, 0.0] and nothing["caption"].tolist() == [0.0, 0.0]


def test_impossible_settings_and_scores_are_refused():
    with pytest.raises(ValueError, match="beta is -1"):
        WeightConfig(beta=-1.0)
    with pytest.raises(ValueError, match="limit is 0"):
        WeightConfig(limit=0.0)
    with pytest.raises(ValueError, match="bounds"):
        ReDMDConfig(bounds=(900.0, 20.0))
    with pytest.raises(ValueError, match="finite"):
        weigh(torch.tensor([0.0, math.nan]), WeightConfig())
