"""Distribution matching less beta times a reward, with the reward's own gradient."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import test_sequence as sequence
import tiny
import torch
import torch.distributed as dist
from processes import spawn
from test_redmd import CONFIG, LONG, SHAPE, backward, batch_of, gradients, networks, sample
from test_trainer import CONFIG as RUN
from test_trainer import trainer, weights
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from rf_core.decoders.decoder import TAEHVDecoder, load_decoder
from rf_core.decoders.taehv import TAEHV, TAEHVConfig
from rf_core.options import DEMO
from training.__main__ import main
from training.choices import RewardConfig
from training.objective.redmd import ReDMDConfig, generator_losses
from training.objective.rollout import Start, roll_out
from training.rewards.decoding import decode_with_gradient
from training.rewards.reward import LatentRewards, WeightedScore
from training.run.config import apply_overrides, from_json, to_json
from training.run.reward_tilt import RewardTilt
from training.stages.re_dmd import distil
from training.stages.recipes import DistilConfig, miniature
from training.stages.trainer import report_numbers

__all__ = ["networks"]
CPU = torch.device("cpu")
BETA = 0.7


def energy(x0: Tensor) -> Tensor:
    """A reward that sees all of a sample."""
    return x0.flatten(1).sin().sum(1)


class Energy:
    """`energy` as a `LatentReward` by autograd."""

    def __call__(self, x0: Tensor, numbers: list[int]) -> Tensor:
        return energy(x0)

    def gradients(self, x0: Tensor, numbers: list[int], mask: Tensor | None):
        with torch.enable_grad():
            x = x0.detach().requires_grad_(True)
            scores = energy(x)
            (slopes,) = torch.autograd.grad(scores.sum(), x)
        return scores.detach(), slopes if mask is None else slopes * mask

    def take_means(self) -> dict[str, float]:
        return {}


def tilt(windows: int = 1):
    return RewardTilt(Energy()).for_samples([[0, 1]] * windows)


def test_the_loss_is_matching_less_beta_times_the_reward_and_so_is_its_gradient(networks):
    batch, config = batch_of(SHAPE), replace(CONFIG, gradient_beta=BETA)
    (plain,) = generator_losses(networks, *batch, CONFIG)
    plain.backward()
    matching = gradients(networks.student)
    (loss,) = generator_losses(networks, *batch, config, tilt=tilt())
    loss.backward()
    found = gradients(networks.student)

    (rollout,) = roll_out(networks.student, batch[0].cond, batch[1], CONFIG.sampler, CONFIG.cache)
    reward = energy(rollout.latents).mean()
    assert float(loss.detach()) == pytest.approx(float((plain - BETA * reward).detach()), rel=1e-4)
    reward.backward()
    for total, one, other in zip(found, matching, gradients(networks.student), strict=True):
        torch.testing.assert_close(total, one - BETA * other, atol=1e-5, rtol=1e-3)


def test_of_several_windows_and_micro_batches_it_is_the_mean(networks):
    batch = batch_of((2, tiny.CONFIG.in_dim, 12, 4, 6), LONG)
    config = replace(LONG, gradient_beta=BETA)
    whole_tilt = RewardTilt(Energy())
    numbers = [[0, 1]] * 2
    backward(generator_losses(networks, *batch, config, tilt=whole_tilt.for_samples(numbers)))
    whole = gradients(networks.student)
    parts = RewardTilt(Energy())
    for b in range(2):
        one = parts.for_samples([[b]] * 2)
        backward(generator_losses(networks, *sample(batch, b), config, tilt=one))
    for first, second in zip(gradients(networks.student), whole, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-3)
    assert parts.log() == pytest.approx(whole_tilt.log(), rel=1e-4)
    assert 0 < parts.log()["share"] < 1


def test_an_anchor_and_a_start_image_are_seen_by_the_reward_and_not_moved(networks):
    seen = []

    class Noted(Energy):
        def gradients(self, x0, numbers, mask):
            scores, slopes = super().gradients(x0, numbers, mask)
            seen.append((x0, slopes))
            return scores, slopes

    prompts, draws, score_noises = batch_of((2, tiny.CONFIG.in_dim, 12, 4, 6), LONG)
    image = torch.full((2, tiny.CONFIG.in_dim, 3, 4, 6), 0.5)
    start = Start(latents=image, given_B=torch.tensor([True, False]))
    anchored = replace(networks, anchor=lambda frames: torch.full_like(frames[:, :, -1:], 7.0))
    config, noted = replace(LONG, gradient_beta=BETA), RewardTilt(Noted())
    given = prompts, replace(draws, start=start), score_noises
    backward(generator_losses(anchored, *given, config, tilt=noted.for_samples([[0, 1], [0, 1]])))
    (first, first_slopes), (second, second_slopes) = seen
    assert (first[0, :, :3] == 0.5).all() and not first_slopes[0, :, :3].any()
    assert first_slopes[1, :, :3].all() and first_slopes[0, :, 3:].all()
    assert (second[:, :, 0] == 7).all() and not second_slopes[:, :, 0].any()
    assert second_slopes[:, :, 1:].all()
    assert all(g.isfinite().all() for g in gradients(networks.student))


@pytest.mark.slow
def test_without_it_a_run_is_the_same_to_the_bit_and_with_it_the_log_says_how_hard_it_pulls():
    weighed = replace(RUN.redmd, weigh="none")
    runs = [
        trainer(RUN),
        trainer(replace(RUN, redmd=weighed), Energy()),
        trainer(replace(RUN, redmd=replace(weighed, gradient_beta=1e-3)), Energy()),
    ]
    plain, unweighed, tilted = ([run.step() for _ in range(2)] for run in runs)
    assert plain == unweighed and all(map(torch.equal, weights(runs[0]), weights(runs[1])))
    assert not all(map(torch.equal, weights(runs[0]), weights(runs[2])))
    assert not any("tilt" in name for name in report_numbers(plain[0]))
    numbers = report_numbers(tilted[0])
    assert (
        0 < numbers["tilt/share"] < 1 and numbers["tilt/norm"] > 0 < numbers["tilt/matching_norm"]
    )


TILTED = replace(
    RUN, micro_batch=1, redmd=replace(RUN.redmd, weigh="none", gradient_beta=1e-3), carry=2
)


@pytest.mark.slow
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path):
    whole, first, second = (trainer(TILTED, Energy()) for _ in range(3))
    expected = [whole.step() for _ in range(2)]
    first.step()
    first.save(tmp_path / "at1")
    second.load(tmp_path / "at1")
    assert second.step() == expected[1]
    assert all(map(torch.equal, weights(second), weights(whole)))


def run_rank(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world
    )
    torch.set_num_threads(1)
    run = trainer(TILTED, Energy())
    reports = [run.step() for _ in range(2)]
    options = StateDictOptions(full_state_dict=True)
    whole = get_model_state_dict(run.networks.student, options=options)
    if rank == 0:
        torch.save((reports, whole), folder / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    one = trainer(TILTED, Energy())
    expected = [one.step() for _ in range(2)]
    spawn(run_rank, (2, tmp_path), nprocs=2)
    reports, found = torch.load(tmp_path / "result.pt", weights_only=False)
    for first, second in zip(reports, expected, strict=True):
        assert first.generator_loss == pytest.approx(second.generator_loss, rel=1e-4)
        assert first.tilt == pytest.approx(second.tilt, rel=1e-4)
    for name, weight in one.networks.student.state_dict().items():
        torch.testing.assert_close(found[name], weight, atol=3e-4, rtol=1e-2)


@pytest.fixture(scope="module")
def decoder():
    return load_decoder(DEMO / "vae.safetensors", CPU, torch.float32, 3)


@pytest.mark.slow
@pytest.mark.parametrize("fixed", [0, 1, 3])
def test_the_decoder_is_differentiated_where_latents_are_free(decoder, fixed):
    """Against central differences in float64, recomputed and not, along a random direction."""
    exact = load_decoder(DEMO / "vae.safetensors", CPU, torch.float64, 3)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 7, 2, 3, generator=generator, dtype=torch.float64)
    seen = torch.randn(1, 25, 3, 16, 24, generator=generator, dtype=torch.float64)

    def reward(x: Tensor, recomputed: int | None = None) -> Tensor:
        images = decode_with_gradient(exact, x, fixed, recomputed)
        return (images.double() * seen).sum()

    found = []
    for recomputed in (None, 3, 2):
        x = latents.clone().requires_grad_(True)
        found.append(torch.autograd.grad(reward(x, recomputed), x)[0])
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[2], found[0], atol=1e-4, rtol=1e-4)
    assert not found[0][:, :, :fixed].any() and found[0][:, :, fixed:].any(dim=1).all()
    step = torch.randn(latents.shape, generator=generator, dtype=torch.float64)
    step[:, :, :fixed] = 0
    with torch.no_grad():
        near = [reward(latents + sign * 1e-2 * step) for sign in (1, -1)]
    slope = float((near[0] - near[1]) / 2e-2)
    assert float((found[0] * step).sum()) == pytest.approx(slope, rel=2e-2)
    whole, _ = decoder.decode(latents.float(), None)
    made = decode_with_gradient(decoder, latents.float(), fixed, 3)
    torch.testing.assert_close(made, whole, atol=1e-5, rtol=0)


class Redness:
    scores = ("redness", "words")
    differentiable = ("redness",)

    def __call__(self, videos, prompts):
        words = torch.tensor([float(len(each.split())) for each in prompts])
        return {"redness": videos[:, :, 0].mean((1, 2, 3)), "words": words}


@pytest.mark.slow
def test_a_taehv_is_differentiated_too():
    generator = torch.Generator().manual_seed(2)
    codec = TAEHV(TAEHVConfig(decoder_widths=(16, 8, 8, 8), encoder_width=8)).double()
    decoder = TAEHVDecoder(codec.requires_grad_(False))
    latents = torch.randn(1, 16, 5, 2, 2, generator=generator, dtype=torch.float64)
    whole, parts = (latents.clone().requires_grad_(True) for _ in range(2))
    images, _ = decoder.decode(whole, None)
    (expected,) = torch.autograd.grad(images.square().sum(), whole)
    made = decode_with_gradient(decoder, parts, 1, 2)
    (found,) = torch.autograd.grad(made.square().sum(), parts)
    torch.testing.assert_close(made, images)
    assert not found[:, :, :1].any() and expected[:, :, 1:].any()
    torch.testing.assert_close(found[:, :, 1:], expected[:, :, 1:])


def test_rewards_of_latents_have_the_gradient_of_what_they_score(decoder):
    parts = [
        WeightedScore(name="a", reward=Redness(), score="redness", share=2.0),
        WeightedScore(name="b", reward=Redness(), score="words", share=0.0),
    ]
    x0 = torch.randn(2, 16, 6, 2, 2, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 1, 6, 1, 1, dtype=torch.bool)
    mask[0, :, :3] = False
    rewards = LatentRewards(parts, decoder, ["one", "one two"], CPU)
    scores, slopes = rewards.gradients(x0, [0, 1], mask)
    torch.testing.assert_close(scores, rewards(x0, [0, 1]))
    assert rewards.take_means()["b.words"] == 1.5
    whole = x0.clone().requires_grad_(True)
    images = torch.cat([decoder.decode(each, None)[0] for each in whole.split(1)])
    (expected,) = torch.autograd.grad(2 * images[:, :, 0].mean((1, 2, 3)).sum(), whole)
    torch.testing.assert_close(slopes, expected * mask, atol=1e-6, rtol=1e-3)
    again = LatentRewards(parts, decoder, ["one", "one two"], CPU, recomputed_frames=3)
    torch.testing.assert_close(again.gradients(x0, [0, 1], mask)[1], slopes, atol=1e-6, rtol=1e-3)


SMALL = (
    *("run.updates=2", "run.critic_ratio=1", "run.redmd.batch=2", "run.micro_batch=2"),
    *("run.latents=[16, 6, 8, 8]", "data.limit=3", "output.validate_every=0"),
    *("output.tensorboard=false", "output.checkpoint_every=1"),
)
SOFT = ("reward.kind=soft_speed", "run.redmd.weigh=none", "run.redmd.gradient_beta=0.1")


def test_a_reward_without_a_gradient_is_refused_by_name_before_anything_is_read(write_mine):
    for settings, said in (
        (("run.redmd.gradient_beta=0.1",), r"the motion of reward\.kind tracker has no gradient"),
        (
            ("run.redmd.gradient_beta=0.1", "reward.kind=none"),
            r"gradient_beta is 0\.1, the worth of a reward that is not there; give reward\.kind",
        ),
        (
            (*SOFT, 'more_rewards=[{"kind": "tracker"}]'),
            r"the motion of reward\.kind tracker has no gradient.* share 0",
        ),
        (
            (*SOFT, "reward.kind=flow"),
            r"of reward\.kind flow has no.*soft_speed \(motion\), soft_flow \(motion\)",
        ),
        (("run.redmd.weigh=none",), r"weigh none and run\.redmd\.gradient_beta 0.*do nothing"),
        (("run.redmd.gradient_beta=-1",), r"gradient_beta is -1"),
    ):
        with pytest.raises(ValueError, match=said):
            apply_overrides(miniature(), settings)
    judged = apply_overrides(miniature(), [*SOFT, 'more_rewards=[{"kind":"tracker","share":0}]'])
    assert [each.is_differentiable for each in judged.rewards] == [True, False]
    write_mine("class Reward:\n    scores = ('a', 'b')\n    differentiable = ('b',)\n")
    of_mine = (RewardConfig(kind="mine:Reward", score=score) for score in "ab")
    assert [each.is_differentiable for each in of_mine] == [False, True]


def test_a_config_of_before_is_the_one_without_it():
    before = json.loads(to_json(miniature()))
    del before["run"]["redmd"]["gradient_beta"]
    assert from_json(DistilConfig, json.dumps(before)) == miniature()
    assert asdict(ReDMDConfig())["gradient_beta"] == 0


@pytest.mark.slow
def test_the_miniature_is_distilled_with_it_tried_counted_and_resumed(tmp_path, capsys):
    config = apply_overrides(miniature(), [*SMALL, *SOFT])
    whole = list(distil(config, tmp_path / "whole", CPU))
    assert all(each.tilt["norm"] > 0 and each.scores["soft_speed.motion"] > 0 for each in whole)
    begun = distil(config, tmp_path / "cut", CPU)
    next(begun)
    begun.close()
    assert list(distil(config, tmp_path / "cut", CPU, resume=True)) == whole[1:]
    words = [word for each in (*SMALL, *SOFT) for word in ("--set", each)]
    assert main(["re_dmd", "--out", str(tmp_path / "dry"), *words, "--dry-run"]) == 0
    assert main(["estimate", *words, "--device", "cpu"]) == 0
    assert "decoding for the reward's gradient" in capsys.readouterr().out


def sequence_rank(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    torch.save(stepped(world), folder / f"found{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def stepped(over: int | None = None) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and norms after an update of processes that share each sample's tokens."""
    redmd = replace(sequence.CONFIG.redmd, weigh="none", gradient_beta=1e-3)
    run = sequence.trainer(over, config=replace(sequence.CONFIG, redmd=redmd))
    run.reward = Energy()
    report = run.step()
    found = {n: sequence.whole(p) for n, p in run.networks.student.named_parameters()}
    return found, [report.generator_loss, report.generator_norm, *report.tilt.values()]


@pytest.mark.slow
def test_processes_that_share_a_sample_move_it_as_one_does(tmp_path):
    weights_alone, numbers_alone = stepped()
    spawn(sequence_rank, (2, tmp_path), nprocs=2)
    for rank in range(2):
        found, numbers = torch.load(tmp_path / f"found{rank}.pt", weights_only=True)
        assert numbers == pytest.approx(numbers_alone, rel=1e-4)
        for name, weight in weights_alone.items():
            torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-5)
