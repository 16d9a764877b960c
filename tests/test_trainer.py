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
from training.objective.redmd import Networks, ReDMDConfig
from training.run.checkpointing import read_part
from training.run.distributed import Stopped, shard
from training.run.draws import draw_rollout, draw_score_noise, shuffled_indices
from training.run.optimise import OptimiserConfig
from training.run.signals import StopRequest
from training.stages.trainer import RunConfig, Trainer, report_numbers

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


def trainer(config: RunConfig = CONFIG, reward=None, shard_over: int | None = None) -> Trainer:
    student, teacher, critic = (tiny.model(seed=seed) for seed in (0, 1, 1))
    for network in (student.requires_grad_(True), teacher, critic.requires_grad_(True)):
        shard(network, "cpu", shard_over=shard_over)
    networks = Networks(student=student, teacher=teacher, critic=critic)
    return Trainer(config, networks, MemoryEmbeds(tiny.prompt(batch=6)), tiny.prompt(9), reward)


def weights(run: Trainer) -> list[torch.Tensor]:
    networks = (run.networks.student, run.networks.critic)
    trained = [p.detach().clone() for network in networks for p in network.parameters()]
    return [*trained, *(t.clone() for t in run.average.tensors.values())]


@pytest.mark.slow
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    whole = trainer()
    reports = [whole.step() for _ in range(4)]
    first = trainer()
    first.step()
    first.step()
    first.save(tmp_path / "at2")
    second = trainer()
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


def test_micro_batches_change_nothing_but_rounding():
    whole, parts = (trainer(replace(CONFIG, micro_batch=size)) for size in (REDMD.batch, 1))
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


def run_rank(rank: int, world: int, folder: Path, go_on: bool, shard_over: int | None) -> None:
    """One process of a run: two updates, or two more after a checkpoint, and its weights."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / f'meet{go_on}'}", rank=rank, world_size=world
    )
    torch.set_num_threads(1)
    run = trainer(replace(CONFIG, micro_batch=1), shard_over=shard_over)
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
@pytest.mark.parametrize("shard_over", [None, (1, 2)], ids=["sharded", "a copy a node"])
def test_two_processes_equal_one_and_either_goes_on_from_the_other_s_checkpoint(
    tmp_path, shard_over
):
    of_two, of_four = shard_over or (None, None)
    one = trainer(replace(CONFIG, micro_batch=1))
    expected = [one.step() for _ in range(4)]

    spawn(run_rank, (2, tmp_path, False, of_two), nprocs=2)
    reports, _ = torch.load(tmp_path / "resultFalse.pt", weights_only=False)
    for first, second in zip(reports, expected, strict=False):
        assert first.generator_loss == pytest.approx(second.generator_loss, rel=1e-4)
        assert first.critic_loss == pytest.approx(second.critic_loss, rel=1e-4)

    alone = trainer(replace(CONFIG, micro_batch=1))
    alone.load(tmp_path / "at2")
    average = read_part(tmp_path / "at2", "average")  # of chunks of two processes
    assert all(torch.equal(average[name], t) for name, t in alone.average.tensors.items())
    alone.step(), alone.step()
    spawn(run_rank, (4, tmp_path, True, of_four), nprocs=4)
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
