from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from rf_core.config import SamplerConfig
from rf_core.scheduler import add_noise, flow_to_x0
from training.objective.redmd import (
    Networks,
    Prompts,
    ReDMDConfig,
    ScoreNoise,
    critic_losses,
    generator_losses,
    num_windows,
    rollout_latents,
)
from training.objective.rollout import RolloutDraws, Start, random_draws, roll_out
from training.objective.weights import WeightConfig, sample_weights
from training.run.draws import draw_score_noise
from training.world.reward import TrackerReward
from training.world.scenes import render, scene_of_caption

CONFIG = ReDMDConfig(cache=tiny.window(9, 3), sampler=SamplerConfig(steps=(1000, 500)), batch=2)
SHAPE = (2, tiny.CONFIG.in_dim, 15, 4, 6)  # five chunks: two evictions


@pytest.fixture
def networks() -> Networks:
    student, teacher, critic = (tiny.model(seed=seed) for seed in (0, 1, 2))
    return Networks(
        student=student.requires_grad_(True), teacher=teacher, critic=critic.requires_grad_(True)
    )


@pytest.fixture
def batch():
    return batch_of(SHAPE)


def batch_of(shape, config: ReDMDConfig = CONFIG):
    prompts = Prompts(cond=tiny.prompt(batch=2), uncond=tiny.prompt(7))
    draws = random_draws(shape, config.sampler, torch.Generator().manual_seed(0))
    windows = num_windows(shape[2], config)
    window = (shape[1], shape[2] // windows, *shape[3:])
    score_noises = [
        draw_score_noise(0, "generator", 0, range(2), window, config, index)
        for index in range(windows)
    ]
    return prompts, draws, score_noises


def sample(batch, b: int):
    prompts, draws, score_noises = batch
    one = slice(b, b + 1)
    return (
        Prompts(cond=prompts.cond[one], uncond=prompts.uncond),
        RolloutDraws(
            noise=draws.noise[one], renoise=draws.renoise[:, one], exit_step=draws.exit_step
        ),
        [ScoreNoise(noise=n.noise[one], timestep_B=n.timestep_B[one]) for n in score_noises],
    )


def backward(losses) -> float:
    total = 0.0
    for loss in losses:
        loss.backward()
        total += float(loss.detach())
    return total


def gradients(model) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def rewards(x0: torch.Tensor) -> torch.Tensor:
    return x0.flatten(1).mean(1)


def published(x0: torch.Tensor, window: int) -> torch.Tensor:
    return sample_weights(rewards(x0), WeightConfig()).weights


def test_the_generator_s_gradient_is_the_weighed_direction_through_the_rollout(networks, batch):
    student, teacher, critic = networks.student, networks.teacher, networks.critic
    prompts, draws, (score_noise,) = batch
    backward(generator_losses(networks, *batch, CONFIG, published))
    found = gradients(student)

    (rollout,) = roll_out(student, prompts.cond, draws, CONFIG.sampler, CONFIG.cache)
    x0 = rollout.latents
    at = score_noise.timestep_B[:, None].expand(-1, SHAPE[2])
    noisy = add_noise(x0.detach(), score_noise.noise, at)

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
    for losses, model in (
        (generator_losses, networks.student),
        (critic_losses, networks.critic),
    ):
        backward(losses(networks, *batch, CONFIG, published))
        whole = gradients(model)
        for b in range(2):
            backward(losses(networks, *sample(batch, b), CONFIG, published))
        for first, second in zip(gradients(model), whole, strict=True):
            torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-3)


def test_each_loss_moves_its_own_network_alone(networks, batch):
    backward(generator_losses(networks, *batch, CONFIG, published))
    assert gradients(networks.student)
    assert not gradients(networks.critic) and not gradients(networks.teacher)
    backward(critic_losses(networks, *batch, CONFIG))
    assert gradients(networks.critic) and not gradients(networks.student)


def test_a_weigher_of_ones_is_plain_distribution_matching(networks, batch):
    def ones(x0, window):
        return torch.ones(len(x0))

    plain = backward(generator_losses(networks, *batch, CONFIG))
    assert plain == backward(generator_losses(networks, *batch, CONFIG, ones))
    assert plain != backward(generator_losses(networks, *batch, CONFIG, published))


def test_a_critic_learns_what_a_fixed_student_makes(networks, batch):
    optimiser = torch.optim.Adam(networks.critic.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        losses.append(backward(critic_losses(networks, *batch, CONFIG)))
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]


LONG = replace(CONFIG, window_chunks=2)


def test_a_long_rollout_is_judged_window_by_window_as_shorter_clips(networks):
    """The losses of windows are those of clips that begin where the windows do."""
    prompts, draws, score_noises = batch_of((2, tiny.CONFIG.in_dim, 18, 4, 6), LONG)
    assert len(score_noises) == 3
    losses = [
        float(loss.detach()) for loss in critic_losses(networks, prompts, draws, score_noises, LONG)
    ]
    made = roll_out(
        networks.student, prompts.cond, draws, LONG.sampler, LONG.cache, supervised=False
    )
    (rollout,) = made
    for index, score_noise in enumerate(score_noises):
        x0 = rollout.latents[:, :, 6 * index : 6 * index + 6]
        noisy, at = score_noise.apply(x0)
        flow = networks.predict_flow(networks.critic, noisy, at, prompts.cond)
        expected = (flow - (score_noise.noise - x0)).square().flatten(1).mean(1).sum() / (2 * 3)
        assert losses[index] == pytest.approx(float(expected.detach()), rel=1e-4)


def test_the_first_frame_of_a_later_window_is_an_anchor_that_is_not_supervised(networks):
    seen = []

    def anchor(frames):
        seen.append(frames)
        return torch.full_like(frames[:, :, -1:], 7.0)

    batch = batch_of((2, tiny.CONFIG.in_dim, 12, 4, 6), LONG)
    anchored = replace(networks, anchor=anchor)
    first, second = rollout_latents(anchored, *batch[:2], LONG)
    plain = list(rollout_latents(networks, *batch[:2], LONG))
    assert torch.equal(first, plain[0]) and torch.equal(second[:, :, 1:], plain[1][:, :, 1:])
    assert (second[:, :, 0] == 7).all()
    torch.testing.assert_close(seen[0], torch.cat([plain[0][:, :, -3:], plain[1][:, :, :1]], 2))

    backward(generator_losses(anchored, *batch, LONG))
    assert all(g.isfinite().all() for g in gradients(networks.student))


def test_the_chunk_of_a_start_image_is_seen_by_all_and_moves_only_what_follows_it(networks, batch):
    """Against the plain loss, whose direction is zeroed there and averaged over the rest."""
    prompts, draws, score_noises = batch
    image = torch.full((2, tiny.CONFIG.in_dim, 3, 4, 6), 0.5)
    start = Start(latents=image, given_B=torch.tensor([True, False]))
    started = prompts, replace(draws, start=start), score_noises
    (seen,) = rollout_latents(networks, *started[:2], CONFIG)
    assert (seen[0, :, :3] == 0.5).all() and not (seen[1, :, :3] == 0.5).any()

    backward(generator_losses(networks, *started, CONFIG))
    found = gradients(networks.student)
    (rollout,) = roll_out(networks.student, prompts.cond, started[1], CONFIG.sampler, CONFIG.cache)
    x0 = rollout.latents
    noisy, at = score_noises[0].apply(x0.detach())
    with torch.no_grad():
        fake = networks.predict_x0(networks.critic, noisy, at, prompts.cond)
        cond = networks.predict_x0(networks.teacher, noisy, at, prompts.cond)
        uncond = networks.predict_x0(networks.teacher, noisy, at, prompts.uncond)
    real = cond + 3 * (cond - uncond)
    loss = 0
    for b, first in ((0, 3), (1, 0)):
        g = (fake[b] - real[b]) / (x0[b].detach() - real[b]).abs().mean()
        loss = loss + (x0[b] * g)[:, first:].mean() / 2
    networks.student.zero_grad()
    loss.backward()
    for first, second in zip(found, gradients(networks.student), strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-3)


def test_weights_are_published_unless_asked_otherwise():
    scores = torch.tensor([0.0, 1.0, 2.0])
    torch.testing.assert_close(sample_weights(scores, WeightConfig()).weights, (2 * scores).exp())
    tamed = sample_weights(
        scores, WeightConfig(baseline="batch", unit="batch", limit=0.5, mean_one=True)
    )
    assert tamed.weights.mean() == pytest.approx(1.0)
    ratio = float(tamed.weights[2] / tamed.weights[0])
    assert ratio == pytest.approx(math.exp(2.0), rel=1e-4)
    assert tamed.effective_share > sample_weights(scores, WeightConfig()).effective_share
    assert sample_weights(scores, WeightConfig(beta=0.0)).effective_share == 1.0


def test_the_tracker_rewards_measured_speed_and_what_the_caption_says():
    rng = np.random.default_rng(0)
    texts = ["a red circle moves left quickly", "a red circle moves left slowly"]
    scenes = [scene_of_caption(text, rng) for text in texts]
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
        sample_weights(torch.tensor([0.0, math.nan]), WeightConfig())
    with pytest.raises(ValueError, match=r"effective_share is 1\.5"):
        WeightConfig(effective_share=1.5)
    with pytest.raises(ValueError, match=r"whole groups of weights\.best_of 3"):
        ReDMDConfig(weights=WeightConfig(best_of=3))
    with pytest.raises(ValueError, match="27 frames; give whole chunks of 3, at most 7"):
        num_windows(27, ReDMDConfig())


@pytest.mark.parametrize("sign", [1, -1])
def test_beta_is_found_for_an_effective_share_of_the_batch(sign):
    scores = torch.randn(16, generator=torch.Generator().manual_seed(0))
    for share in (0.3, 0.5, 0.9):
        found = sample_weights(scores, WeightConfig(effective_share=share, mean_one=True), sign)
        assert found.effective_share == pytest.approx(share, abs=1e-3)
        assert found.weights.mean() == pytest.approx(1.0)
        assert found.weights.argmax() == (sign * scores).argmax()
    alike = sample_weights(torch.ones(4), WeightConfig(effective_share=0.5))
    assert alike.effective_share == 1.0


def test_only_the_best_of_each_group_counts_and_for_all_of_it():
    scores = torch.tensor([0.0, 2.0, 5.0, 4.0])
    config = WeightConfig(best_of=2)
    assert sample_weights(scores, config).weights.tolist() == [0.0, 2.0, 2.0, 0.0]
    assert sample_weights(scores, config, -1).weights.tolist() == [2.0, 0.0, 0.0, 2.0]


def test_shuffled_weights_are_the_same_weights_of_other_samples():
    scores = torch.tensor([0.0, 1.0, 2.0])
    plain, control = (
        sample_weights(scores, WeightConfig(shuffled=s)).weights for s in (False, True)
    )
    assert torch.equal(plain.sort().values, control.sort().values)
    assert not torch.equal(plain, control)
