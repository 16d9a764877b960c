from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from processes import spawn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from rf_core.config import SamplerConfig
from training.data.embeddings import MemoryEmbeds
from training.data.starts import Starts, with_starts
from training.objective.redmd import Networks, ReDMDConfig
from training.run.checkpointing import read_part
from training.run.distributed import Stopped, shard
from training.run.draws import (
    draw_rollout,
    draw_score_noise,
    draw_size,
    draw_starts,
    shuffled_indices,
)
from training.run.optimise import OptimiserConfig
from training.run.signals import StopRequest
from training.stages.trainer import RunConfig, Trainer, report_numbers

Buckets = tuple[tuple[int, int], ...]
REDMD = ReDMDConfig(cache=tiny.window(9, 3), sampler=SamplerConfig(steps=(1000, 500)), batch=4)
RATE = OptimiserConfig(rate=1e-3)
CONFIG = RunConfig(
    redmd=REDMD,
    generator=RATE,
    critic=RATE,
    latents=(tiny.CONFIG.in_dim, 12, 4, 6),
    critic_ratio=2,
    micro_batch=2,
    ema=0.5,
    ema_from=1,
)


class Images:
    """Three start images, each with a prompt of its own."""

    def rows(self, size: tuple[int, int]) -> range:
        return range(3)

    def latents(self, numbers: list[int], size: tuple[int, int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(number) for number in numbers]
        shape = (tiny.CONFIG.in_dim, 3, *size)
        return torch.stack([torch.randn(shape, generator=each) for each in generators])

    def prompt(self, number: int) -> str:
        return f"image {number}"

    def embeds(self, number: int) -> torch.Tensor:
        return tiny.prompt(100 + number)[0, :7]


def trainer(
    config: RunConfig = CONFIG, reward=None, shard_over: int | None = None, share: float = 0.0
) -> Trainer:
    student, teacher, critic = (tiny.model(seed=seed) for seed in (0, 1, 1))
    for network in (student.requires_grad_(True), teacher, critic.requires_grad_(True)):
        shard(network, "cpu", shard_over=shard_over)
    networks = Networks(student=student, teacher=teacher, critic=critic)
    prompts = MemoryEmbeds(tiny.prompt(batch=6))
    starts = Starts(source=Images(), share=share, own=prompts) if share else None
    return Trainer(config, networks, prompts, tiny.prompt(9), reward, starts=starts)


def weights(run: Trainer) -> list[torch.Tensor]:
    networks = (run.networks.student, run.networks.critic)
    trained = [p.detach().clone() for network in networks for p in network.parameters()]
    return [*trained, *(t.clone() for t in run.average.tensors.values())]


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, share):
    whole = trainer(share=share)
    reports = [whole.step() for _ in range(4)]
    first = trainer(share=share)
    first.step()
    first.step()
    first.save(tmp_path / "at2")
    second = trainer(share=share)
    second.load(tmp_path / "at2")
    assert second.update == 2
    assert [second.step() for _ in range(2)] == reports[2:]
    assert all(map(torch.equal, weights(second), weights(whole)))


def test_a_half_written_checkpoint_is_never_taken_for_one(tmp_path, monkeypatch):
    import torch.distributed.checkpoint as dcp

    run = trainer()
    monkeypatch.setattr(dcp, "save", lambda *a, checkpoint_id, **k: checkpoint_id.mkdir())
    monkeypatch.setattr("pathlib.Path.rename", lambda *a: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        run.save(tmp_path / "at0")
    with pytest.raises(ValueError, match="no checkpoint"):
        run.load(tmp_path / "at0")


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_micro_batches_change_nothing_but_rounding(share):
    whole, parts = (
        trainer(replace(CONFIG, micro_batch=size), share=share) for size in (REDMD.batch, 1)
    )
    first, second = whole.step(), parts.step()
    assert first.generator_loss == pytest.approx(second.generator_loss, rel=1e-4)
    assert first.critic_loss == pytest.approx(second.critic_loss, rel=1e-4)
    assert first.generator_norm == pytest.approx(second.generator_norm, rel=1e-3)


def test_the_average_is_the_student_until_averaging_begins_and_then_follows_it():
    run = trainer()
    run.step()
    assert all(map(torch.equal, run.average.tensors.values(), run.networks.student.parameters()))
    before = [p.clone() for p in run.average.tensors.values()]
    run.step()
    for old, average, current in zip(
        before, run.average.tensors.values(), run.networks.student.parameters(), strict=True
    ):
        torch.testing.assert_close(average, 0.5 * old + 0.5 * current)


class Numbers:
    """Rewards a sample by its prompt's number."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, x0: torch.Tensor, numbers: list[int]) -> torch.Tensor:
        self.seen += numbers
        return torch.tensor([float(n) for n in numbers]) / 10

    def take_means(self) -> dict[str, float]:
        return {"numbers": sum(self.seen) / 40}


def test_rewards_reach_the_log_and_see_their_prompts():
    reward = Numbers()
    report = trainer(reward=reward).step()
    expected = shuffled_indices(0, "generator", 0, range(4), 4, 6)
    assert reward.seen == expected
    assert report_numbers(report)["reward/numbers"] == pytest.approx(sum(expected) / 40)
    assert report.rewards.mean_score == pytest.approx(sum(expected) / 40)
    assert 0 < report.rewards.effective_share < 1


def test_a_share_of_the_rollouts_begins_from_images_and_sees_their_prompts():
    reward = Numbers()
    trainer(reward=reward, share=0.5).step()
    own = shuffled_indices(0, "generator", 0, range(4), 4, 6)
    drawn = draw_starts(0, "generator", 0, range(4), 0.5, 3)
    assert reward.seen == [n if d is None else 6 + d for n, d in zip(own, drawn, strict=True)]
    assert None in drawn and set(drawn) != {None}


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_batch_has_the_images_and_the_prompts_that_were_drawn_for_it(share):
    own = MemoryEmbeds(tiny.prompt(batch=6))
    starts = Starts(source=Images(), share=share, own=own)
    drawn = [2, 0, 1] if share == 1 else [2, None, 1]
    numbers = with_starts([5, 4, 3], drawn, 6)
    embeds = starts.embeds(numbers)
    assert torch.equal(embeds[0, :7], Images().embeds(2)) and not embeds[0, 7:].any()
    assert torch.equal(embeds[1], own.tensor[4]) == (share < 1)
    start = starts.start(drawn, (4, 3, 4, 6))
    assert torch.equal(start.latents[[0, 2]], Images().latents([2, 1], (4, 6)))
    given = start.given_B
    assert given is None if share == 1 else given.tolist() == [True, False, True]


def test_which_rollouts_begin_from_an_image_does_not_depend_on_how_they_are_shared_out():
    whole = draw_starts(0, "critic", 3, range(1000), 0.25, 50)
    assert draw_starts(0, "critic", 3, range(500, 1000), 0.25, 50) == whole[500:]
    assert sum(each is not None for each in whole) == pytest.approx(250, abs=50)
    assert {each for each in whole if each is not None} == set(range(50))
    pairs = draw_starts(0, "critic", 3, range(40), 0.5, 50, copies=2)
    assert pairs[::2] == pairs[1::2] and len(set(pairs)) > 2  # of a group, all begin alike


def test_an_update_has_samples_of_one_size_and_runs_see_all_sizes():
    config = replace(CONFIG, buckets=((6, 4), (8, 6)))

    class Sizes(Numbers):
        def __call__(self, x0: torch.Tensor, numbers: list[int]) -> torch.Tensor:
            self.sizes.append(tuple(x0.shape[3:]))
            return super().__call__(x0, numbers)

    reward = Sizes()
    reward.sizes = []
    run = trainer(config, reward)
    for _ in range(8):
        reward.sizes.clear()
        run.step()
        assert reward.sizes == [draw_size(0, "generator", run.update - 1, config.sizes)] * 2
    assert {draw_size(0, "generator", update, config.sizes) for update in range(8)} == {
        *config.sizes
    }


def test_a_runaway_critic_and_a_nan_stop_the_run():
    with pytest.raises(FloatingPointError, match=r"critic's loss is .* lower critic\.rate"):
        trainer(replace(CONFIG, runaway=1e-6)).step()
    run = trainer()
    with torch.no_grad():
        run.networks.teacher.head.head.bias.fill_(torch.nan)
    before = weights(run)[0]
    run.step()  # a teacher that says nothing gives no direction, as published
    assert torch.isfinite(before).all() and all(w.isfinite().all() for w in weights(run))
    with torch.no_grad():
        run.networks.student.head.head.bias.fill_(torch.nan)
    with pytest.raises(
        FloatingPointError, match=r"student's weights are not finite: lower generator\.rate"
    ):
        run.step()


def test_a_critic_that_cannot_follow_a_student_is_not_blamed_for_it():
    run = trainer()
    with torch.no_grad():
        run.networks.student.head.head.weight.mul_(1e4)
    with pytest.raises(FloatingPointError, match=r"critic's loss .*spread.*lower generator\.rate"):
        run.step()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    run = trainer()
    run.step()
    with torch.no_grad():
        run.networks.critic.head.head.bias[0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"critic's weights are not .* update 1; lower"):
        run.save(tmp_path / "at1")
    assert not list(tmp_path.iterdir())


class AfterCalls(StopRequest):
    """A signal that comes before the nth micro-batch."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def agreed(self) -> int:
        self.calls -= 1
        self.number = signal.SIGTERM if self.calls < 0 else 0
        return self.number


@pytest.mark.slow
@pytest.mark.parametrize("calls", [0, 1, 3, 4, 5, 6])  # an update is two of the critic, one more
def test_a_run_that_is_stopped_between_two_micro_batches_goes_on_bit_for_bit(tmp_path, calls):
    whole = trainer()
    reports = [whole.step() for _ in range(3)]
    first, stop = trainer(), AfterCalls(calls)
    made = []
    with pytest.raises(Stopped) as stopped:
        while True:
            made.append(first.step(stop))
    first.save(tmp_path / "cut")
    second = trainer()
    second.load(tmp_path / "cut")
    assert stopped.value.code == 143 and made == reports[: calls // 6]
    assert [second.step() for _ in range(3 - len(made))] == reports[len(made) :]
    assert all(map(torch.equal, weights(second), weights(whole)))


def run_rank(
    rank: int,
    world: int,
    folder: Path,
    go_on: bool,
    shard_over: int | None,
    share: float,
    buckets: Buckets,
) -> None:
    """One process of a run: two updates, or two more after a checkpoint, and its weights."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / f'meet{go_on}'}", rank=rank, world_size=world
    )
    torch.set_num_threads(1)
    config = replace(CONFIG, micro_batch=1, buckets=buckets)
    run = trainer(config, shard_over=shard_over, share=share)
    if shard_over is not None:
        parameter = next(run.networks.student.parameters())
        assert parameter.to_local().shape[0] == -(-parameter.shape[0] // shard_over)
    if go_on:
        run.load(folder / "at2")
    reports = [run.step() for _ in range(2)]
    if not go_on:
        run.save(folder / "at2")
    whole = get_model_state_dict(
        run.networks.student, options=StateDictOptions(full_state_dict=True)
    )
    if rank == 0:
        torch.save((reports, whole), folder / f"result{go_on}.pt")
    dist.barrier()  # none goes while another may still be at work with it
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shard_over", "share", "buckets"),
    [
        pytest.param(None, 0.0, (), id="sharded"),
        pytest.param((1, 2), 0.0, (), id="a copy a node"),
        pytest.param(None, 0.5, (), id="start images"),
        pytest.param(None, 0.5, ((6, 4), (8, 6)), id="start images of several sizes"),
    ],
)
def test_two_processes_equal_one_and_either_goes_on_from_the_other_s_checkpoint(
    tmp_path, shard_over, share, buckets
):
    of_two, of_four = shard_over or (None, None)
    config = replace(CONFIG, micro_batch=1, buckets=buckets)
    one = trainer(config, share=share)
    expected = [one.step() for _ in range(4)]

    spawn(run_rank, (2, tmp_path, False, of_two, share, buckets), nprocs=2)
    reports, _ = torch.load(tmp_path / "resultFalse.pt", weights_only=False)
    for first, second in zip(reports, expected, strict=False):
        assert first.generator_loss == pytest.approx(second.generator_loss, rel=1e-4)
        assert first.critic_loss == pytest.approx(second.critic_loss, rel=1e-4)

    alone = trainer(config, share=share)
    alone.load(tmp_path / "at2")
    average = read_part(tmp_path / "at2", "average")  # of chunks of two processes
    assert all(torch.equal(average[name], t) for name, t in alone.average.tensors.items())
    alone.step(), alone.step()
    spawn(run_rank, (4, tmp_path, True, of_four, share, buckets), nprocs=4)
    _, four = torch.load(tmp_path / "resultTrue.pt", weights_only=False)
    for name, weight in one.networks.student.state_dict().items():
        for other in (alone.networks.student.state_dict()[name], four[name]):
            torch.testing.assert_close(other, weight, atol=3e-4, rtol=1e-2)


def test_draws_do_not_depend_on_how_samples_are_shared_out():
    shape = CONFIG.latents
    whole = draw_rollout(0, "critic", 3, range(4), shape, REDMD.sampler)
    part = draw_rollout(0, "critic", 3, [2, 3], shape, REDMD.sampler)
    assert torch.equal(whole.noise[2:], part.noise)
    assert torch.equal(whole.renoise[:, 2:], part.renoise) and whole.exit_step == part.exit_step
    judged = draw_score_noise(0, "critic", 3, range(4), shape, REDMD)
    assert torch.equal(
        judged.noise[2:], draw_score_noise(0, "critic", 3, [2, 3], shape, REDMD).noise
    )
    other = draw_rollout(0, "generator", 3, range(4), shape, REDMD.sampler)
    assert not torch.equal(whole.noise, other.noise)


def test_every_prompt_is_seen_once_an_epoch_in_an_order_of_its_own():
    epochs = [
        [
            n
            for update in range(3)
            for n in shuffled_indices(0, "critic", e * 3 + update, range(2), 2, 6)
        ]
        for e in range(3)
    ]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_impossible_runs_are_refused():
    with pytest.raises(ValueError, match="whole chunks"):
        replace(CONFIG, latents=(4, 13, 4, 6))
    with pytest.raises(ValueError, match="batch of 4 cannot be shared out in micro-batches of 3"):
        trainer(replace(CONFIG, micro_batch=3))
    with pytest.raises(ValueError, match="ema is 1"):
        replace(CONFIG, ema=1.0)
