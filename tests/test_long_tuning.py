"""Rollouts whose prompt changes, whose length is drawn, and that go on in the next update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from processes import spawn
from test_recipes import CPU, small, weights_of
from test_redmd import LONG, batch_of
from test_rollout import SAMPLER, draws_of, trainable
from test_trainer import CONFIG, REDMD, AfterCalls, Numbers, trainer, weights
from torch import Tensor

from rf_core.config import CacheConfig
from training.objective.carry import restore_samples, to_samples
from training.objective.redmd import Networks, critic_losses, generator_losses
from training.objective.rollout import PromptSwitch, RolloutState, roll_out
from training.run.distributed import Stopped
from training.run.draws import (
    draw_border,
    draw_rollout,
    draw_windows,
    shuffled_indices,
    switched_indices,
)
from training.run.networks import PlacementConfig
from training.stages import re_dmd
from training.stages.re_dmd import distil
from training.stages.recipes import DistilConfig
from training.stages.trainer import RunConfig, report_numbers

SHORT = replace(CONFIG, redmd=replace(REDMD, window_chunks=2))  # two windows of two chunks
WINDOW = replace(SHORT, latents=(tiny.CONFIG.in_dim, 6, 4, 6))  # one of them
OLD, NEW = tiny.prompt(0), tiny.prompt(5)
LAST = len(SAMPLER.steps) - 1
CACHES = [
    pytest.param(tiny.window(9, 3), id="published window"),
    pytest.param(tiny.window(8, 2), id="a sink that cuts a chunk"),
    pytest.param(tiny.window(6, 0), id="no sink"),
    pytest.param(tiny.window(9, 3, storage="int8"), id="int8"),
    pytest.param(tiny.window(9, 3, decay=1.0, positions="absolute", recache="joint"), id="joint"),
    pytest.param(tiny.window(12, 3, recache="joint"), id="joint, of a sink not yet averaged"),
    pytest.param(tiny.window(9, 2, memory_rates=(0.5,)), id="memory"),
    pytest.param(tiny.window(9, 2, anchor_frames=1), id="anchor"),
]


def streamed(seed: int, cache: CacheConfig, switch_at: int | None = None) -> Tensor:
    """Six chunks of a stream whose prompt may change, [1, C, F, h, w]."""
    stream = tiny.stream(cache=cache, sampler=SAMPLER, seed=seed, prompt_embeds=OLD)
    made = []
    for chunk in range(6):
        if chunk == switch_at:
            stream.switch(NEW, "recache")
        made.append(stream.generate())
    return torch.cat(made, dim=2)


def rolled(prompts: Tensor, seeds: list[int], cache: CacheConfig, **options: object) -> Tensor:
    """The same as a rollout of windows of two chunks."""
    options = {"window_chunks": 2, "supervised": False, **options}
    windows = roll_out(trainable(), prompts, draws_of(seeds, LAST), SAMPLER, cache, **options)
    return torch.cat([window.latents.detach() for window in windows], dim=2)


# Changes of prompt


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("window", [1, 2])
def test_a_rollout_whose_prompt_changes_is_what_a_stream_makes_at_a_recache(cache, window):
    switch = PromptSwitch(window=window, embeds=NEW, samples=torch.tensor([True]))
    found = rolled(OLD, [5], cache, switch=switch)
    exact = {"atol": 2e-5, "rtol": 1e-4}
    near = {"atol": 0.05, "rtol": 0.05}  # bits of rounding move an int8 by a step
    tolerance = near if cache.storage == "int8" else exact
    torch.testing.assert_close(found, streamed(5, cache, 2 * window), **tolerance)


@pytest.mark.parametrize("cache", CACHES[:2])
def test_a_sample_that_keeps_its_prompt_does_not_notice_its_neighbour_s_change(cache):
    switch = PromptSwitch(  # once frames have left the window: a recache of any changes something
        window=2, embeds=torch.cat([OLD, NEW]), samples=torch.tensor([False, True])
    )
    kept, changed = rolled(OLD.expand(2, -1, -1), [5, 6], cache, switch=switch).split(1)
    torch.testing.assert_close(kept, streamed(5, cache), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(changed, streamed(6, cache, 4), atol=2e-5, rtol=1e-4)


def test_gradients_pass_through_the_windows_after_a_change():
    model = trainable()
    switch = PromptSwitch(window=1, embeds=NEW, samples=torch.tensor([True]))
    draws = draws_of([5], 1, chunks=4)
    windows = roll_out(
        model, OLD, draws, SAMPLER, tiny.window(9, 3), window_chunks=2, switch=switch
    )
    for window in windows:
        model.zero_grad()
        window.latents.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_teacher_and_critic_score_each_window_under_its_own_prompt():
    student, teacher, critic = (tiny.model(seed=seed) for seed in range(3))
    plain, draws, score_noises = batch_of((2, tiny.CONFIG.in_dim, 12, 4, 6), LONG)
    switch = PromptSwitch(
        window=1, embeds=tiny.prompt(5, batch=2), samples=torch.tensor([True, True])
    )
    seen: list[tuple[str, Tensor]] = []

    class Watched(Networks):
        def predict_flow(self, network, noisy, timestep_BF, prompt_embeds):
            seen.append(("critic" if network is self.critic else "teacher", prompt_embeds))
            return super().predict_flow(network, noisy, timestep_BF, prompt_embeds)

    watched = Watched(student=student, teacher=teacher, critic=critic)
    prompts = replace(plain, switch=switch)
    for losses, scored in (
        (generator_losses, ["critic", "teacher", "teacher"]),
        (critic_losses, ["critic"]),
    ):
        seen.clear()
        assert len(list(losses(watched, prompts, draws, score_noises, LONG))) == 2
        conditions = [(who, p) for who, p in seen if p is not prompts.uncond]
        count = len(conditions) // 2
        assert [who for who, _ in seen] == scored * 2
        assert all(torch.equal(p, plain.cond) for _, p in conditions[:count])
        assert all(torch.equal(p, switch.embeds) for _, p in conditions[count:])


def test_who_changes_and_where_is_a_function_of_the_rollout_and_of_groups_that_share_a_prompt():
    numbers = shuffled_indices(0, "critic", 3, range(40), 40, 6, copies=2)
    after = switched_indices(0, "critic", 3, range(40), numbers, 6, 0.5, copies=2)
    changed = [old != new for old, new in zip(numbers, after, strict=True)]
    assert 8 < sum(changed) < 32 and set(after) == set(range(6))
    assert after[::2] == after[1::2]
    again = switched_indices(0, "critic", 3, [6, 7], numbers[6:8], 6, 0.5, copies=2)
    assert again == after[6:8]
    assert switched_indices(0, "critic", 3, range(40), numbers, 6, 0.0) == numbers
    every = switched_indices(0, "critic", 3, range(40), numbers, 6, 1.0)
    assert not any(old == new for old, new in zip(numbers, every, strict=True))
    assert {draw_border(0, "critic", rollout, 4) for rollout in range(40)} == {1, 2, 3}


class Windows(Numbers):
    """Notes the prompts of every batch it scores."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[int]] = []

    def __call__(self, x0: Tensor, numbers: list[int]) -> Tensor:
        self.batches.append(numbers)
        return super().__call__(x0, numbers)


def test_a_reward_sees_the_prompt_that_a_window_shows():
    reward, config = Windows(), replace(SHORT, switch_share=0.5, micro_batch=4)
    trainer(config, reward=reward).step()
    before = shuffled_indices(0, "generator", 0, range(4), 4, 6)
    after = switched_indices(0, "generator", 0, range(4), before, 6, 0.5)
    assert before != after
    assert reward.batches == [before, after]


# Lengths


def test_lengths_are_drawn_for_the_update_from_one_window_to_all():
    drawn = [draw_windows(0, "generator", update, 3) for update in range(60)]
    assert {1, 2, 3} == set(drawn) and all(drawn.count(n) > 10 for n in (1, 2, 3))
    config = replace(SHORT, random_length=True)
    assert {config.part("critic", n).windows for n in range(20)} == {1, 2}


def frames_of(windows: int, frames: int = 6) -> tuple[int, int, int, int]:
    channels, _, *size = SHORT.latents
    return channels, frames * windows, *size


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_an_update_of_a_drawn_length_is_that_of_a_run_of_this_length(windows):
    """Loss, gradient and rewards are means over the windows that there are."""
    drawn = replace(SHORT, latents=frames_of(3), random_length=True, critic_ratio=1)
    seed = next(
        seed
        for seed in range(100)
        if all(draw_windows(seed, role, 0, 3) == windows for role in ("generator", "critic"))
    )
    rewards = Windows(), Windows()
    lengthy = trainer(replace(drawn, seed=seed), reward=rewards[0])
    plain = replace(SHORT, latents=frames_of(windows), critic_ratio=1, seed=seed)
    fixed = trainer(plain, reward=rewards[1])
    first, second = (report_numbers(run.step()) for run in (lengthy, fixed))
    assert first == second
    assert all(map(torch.equal, weights(lengthy), weights(fixed)))
    assert rewards[0].batches == rewards[1].batches and len(rewards[0].batches) == 2 * windows


# Rollouts that go on


@pytest.mark.parametrize("cache", CACHES)
def test_a_rollout_that_was_put_away_between_two_windows_goes_on_bit_for_bit(cache):
    model, draws = trainable(), draws_of([5, 6], 1)
    prompts = torch.cat([OLD, NEW])
    options = {"window_chunks": 2, "supervised": False}
    whole = list(roll_out(model, prompts, draws, SAMPLER, cache, **options))
    samples: Sequence[dict[str, Tensor]] = []
    for number in range(3):
        state = RolloutState.begin(model, draws.noise, cache)
        if samples:
            restore_samples(state, samples)
        part = slice(6 * number, 6 * number + 6)
        own = replace(draws, noise=draws.noise[:, :, part], renoise=draws.renoise[:, :, :, part])
        (window,) = roll_out(model, prompts, own, SAMPLER, cache, state=state, **options)
        assert torch.equal(window.latents, whole[number].latents)
        assert torch.equal(window.past, whole[number].past)
        assert window.num_evictions == whole[number].num_evictions
        samples = to_samples(state)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("counts", torch.tensor([99, 3, 0, 0]), r"cannot hold \[99, 3, 0, 0\]"),
        ("counts", torch.tensor([6.0, 3.0, 0.0, 0.0]), "cannot hold"),
        ("counts", torch.tensor(6), "cannot hold 6"),
        ("last_latents", torch.zeros(4, 6, 2, 6), r"are \[4, 6, 2, 6\]"),
        ("last_latents", torch.zeros(4, 2, 4, 6), "3 frames or more"),
        ("k", torch.zeros(2), "k is"),
        ("more", torch.zeros(2), "more"),
    ],
)
def test_a_rollout_that_is_damaged_is_refused_before_it_is_gone_on_with(name, value, said):
    cache, draws = tiny.window(9, 3), draws_of([5, 6], 1, chunks=2)
    state = RolloutState.begin(trainable(), draws.noise, cache)
    list(roll_out(trainable(), OLD.expand(2, -1, -1), draws, SAMPLER, cache, state=state))
    good = to_samples(state)
    with pytest.raises(ValueError, match=said):
        restore_samples(state, [{**each, name: value} for each in good])
    with pytest.raises(ValueError, match="of different sizes"):
        restore_samples(state, [{**good[0], "k": torch.zeros(2)}, good[1]])
    with pytest.raises(ValueError, match="lacks counts"):
        restore_samples(state, [{"last_latents": good[0]["last_latents"]}])


def test_a_carried_rollout_keeps_its_prompts_and_begins_anew_with_others():
    reward, config = Windows(), replace(WINDOW, carry=3, critic_ratio=1, micro_batch=4)
    run = trainer(config, reward=reward)
    for _ in range(6):
        run.step()
    first, second = (shuffled_indices(0, "generator", n, range(4), 4, 6) for n in (0, 1))
    assert first != second
    assert reward.batches == [first] * 3 + [second] * 3


def test_a_carried_rollout_changes_its_prompt_once_and_stays_with_it():
    reward = Windows()
    config = replace(WINDOW, carry=4, critic_ratio=1, micro_batch=4, switch_share=0.5)
    run = trainer(config, reward=reward)
    for _ in range(8):
        run.step()
    expected = []
    for rollout in range(2):
        before = shuffled_indices(0, "generator", rollout, range(4), 4, 6)
        after = switched_indices(0, "generator", rollout, range(4), before, 6, 0.5)
        border = draw_border(0, "generator", rollout, 4)
        expected += [before] * border + [after] * (4 - border)
    assert reward.batches == expected


@pytest.mark.parametrize("seed", [0, 1])  # the prompts change with the third window, the second
def test_a_carried_rollout_is_one_long_one_while_the_student_stands_still(seed):
    still = replace(CONFIG.generator, rate=1e-12)
    seen: list[Tensor] = []

    class Keeping(Numbers):
        def __call__(self, x0: Tensor, numbers: list[int]) -> Tensor:
            seen.append(x0.clone())
            return super().__call__(x0, numbers)

    config = replace(
        WINDOW, carry=3, critic_ratio=1, micro_batch=4, generator=still, switch_share=1.0, seed=seed
    )
    run = trainer(config, reward=Keeping())
    run.step(), run.step(), run.step()
    before = shuffled_indices(seed, "generator", 0, range(4), 4, 6)
    after = switched_indices(seed, "generator", 0, range(4), before, 6, 1.0)
    old, new = (tiny.prompt(batch=6)[numbers] for numbers in (before, after))
    border, state = draw_border(seed, "generator", 0, 3), None
    change = PromptSwitch(window=0, embeds=new, samples=torch.tensor([True] * 4))
    for number, found in enumerate(seen):
        own = draw_rollout(seed, "generator", number, range(4), config.latents, REDMD.sampler)
        state = state or RolloutState.begin(tiny.model(), own.noise, REDMD.cache)
        prompts = old if number < border else new
        switch = change if number == border else None
        (window,) = roll_out(
            tiny.model(), prompts, own, REDMD.sampler, REDMD.cache, state=state, switch=switch
        )
        torch.testing.assert_close(found, window.latents, atol=1e-5, rtol=1e-4)


CARRIED = replace(WINDOW, carry=3, switch_share=0.5, micro_batch=2)


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 3])  # within a rollout of both, and where the critic's ends
def test_a_resumed_run_with_carried_rollouts_goes_on_bit_for_bit(tmp_path, at):
    whole = trainer(CARRIED)
    reports = [whole.step() for _ in range(5)]
    first = trainer(CARRIED)
    for _ in range(at):
        first.step()
    first.save(tmp_path / "at")
    second = trainer(CARRIED)
    second.load(tmp_path / "at")
    assert [second.step() for _ in range(5 - at)] == reports[at:]
    assert all(map(torch.equal, weights(second), weights(whole)))


@pytest.mark.slow
@pytest.mark.parametrize("calls", [1, 3, 5, 7])  # an update is six micro-batches
def test_a_stop_between_two_micro_batches_leaves_carried_rollouts_where_they_stood(tmp_path, calls):
    whole = trainer(CARRIED)
    reports = [whole.step() for _ in range(3)]
    first, stop, made = trainer(CARRIED), AfterCalls(calls), []
    with pytest.raises(Stopped):
        while True:
            made.append(first.step(stop))
    first.save(tmp_path / "cut")
    second = trainer(CARRIED)
    second.load(tmp_path / "cut")
    assert [second.step() for _ in range(3 - len(made))] == reports[len(made) :]
    assert all(map(torch.equal, weights(second), weights(whole)))


def test_a_checkpoint_without_its_carried_rollouts_is_refused(tmp_path):
    plain = trainer(WINDOW)
    plain.step()
    plain.save(tmp_path / "at1")
    with pytest.raises(ValueError, match=r"at1 holds no carried\.generator\.0"):
        trainer(replace(WINDOW, carry=2)).load(tmp_path / "at1")
    carried = trainer(replace(WINDOW, carry=2))
    carried.step()
    carried.save(tmp_path / "carried")
    wider = replace(WINDOW, carry=2, redmd=replace(WINDOW.redmd, cache=tiny.window(12, 3)))
    with pytest.raises(ValueError, match=r"carried cannot be resumed from: [kv] is .* here"):
        trainer(wider).load(tmp_path / "carried")


SPREAD = {
    "switch": replace(SHORT, switch_share=0.5, random_length=True, micro_batch=1),
    "carry": replace(CARRIED, carry=4, micro_batch=1),
}


def run_rank(rank: int, folder: Path, name: str) -> None:
    """One of two processes that go on from one's checkpoint for an update, and leave theirs."""
    meet = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    torch.set_num_threads(1)
    run = trainer(SPREAD[name])
    run.load(folder / "at1")
    report = run.step()
    run.save(folder / "at2")
    if rank == 0:
        torch.save(report, folder / "report.pt")
    dist.barrier()  # none goes while another may still be at work with it
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SPREAD))
def test_two_processes_go_on_from_one_s_checkpoint_and_one_from_theirs(tmp_path, name):
    one = trainer(SPREAD[name])
    one.step()
    one.save(tmp_path / "at1")
    spawn(run_rank, (tmp_path, name), nprocs=2)
    two = torch.load(tmp_path / "report.pt", weights_only=False)
    alone = trainer(replace(SPREAD[name], micro_batch=2))  # which may change on resume
    alone.load(tmp_path / "at2")
    for found in (two, alone.step()):
        expected = one.step()
        assert found.generator_loss == pytest.approx(expected.generator_loss, rel=1e-3)
        assert found.critic_loss == pytest.approx(expected.critic_loss, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["run.carry=2", "run.switch_share=0.5"],
        ["run.latents=[16, 12, 8, 8]", "run.random_length=true", "run.switch_share=1"],
    ],
    ids=["carried", "of drawn lengths"],
)
def test_the_miniature_tunes_long_with_rewards_and_anchors_and_resumes_bit_for_bit(
    tmp_path, settings
):
    config = small("run.updates=3", "run.redmd.window_chunks=2", *settings)
    list(distil(config, tmp_path / "whole", CPU))
    for kept in (1, 2):
        begun = distil(config, tmp_path / f"cut{kept}", CPU)
        for _ in range(kept):
            next(begun)
        begun.close()
        list(distil(config, tmp_path / f"cut{kept}", CPU, resume=True))
    whole, *cut = (
        weights_of(tmp_path / name / "student.safetensors") for name in ("whole", "cut1", "cut2")
    )
    assert all(torch.equal(each[name], weight) for each in cut for name, weight in whole.items())


# Refusals, and what has not changed


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        (
            tiny.window(9, 3, recache="joint_new_sink"),
            r"switch_share is 0\.5, and redmd\.cache\.recache joint_new_sink, .* set it to joint",
        ),
        (
            CacheConfig(first_chunk_frames=1),
            r"latents have 12 frames; give whole chunks of 3 after a first one of 1",
        ),
    ],
)
def test_a_cache_that_rollouts_of_several_windows_cannot_have_is_refused_by_name(cache, said):
    with pytest.raises(ValueError, match=said):
        replace(SHORT, switch_share=0.5, redmd=replace(SHORT.redmd, cache=cache))


def test_a_first_chunk_of_another_length_goes_with_rollouts_of_one_window():
    cache = CacheConfig(first_chunk_frames=1)
    one = replace(SHORT, latents=frames_of(1, 4), redmd=replace(SHORT.redmd, cache=cache))
    assert one.windows == 1
    said = r"first_chunk_frames is 1, and a rollout has 2 windows, .* set it to null"
    for longer in ({"latents": frames_of(1, 10)}, {"carry": 2}):
        with pytest.raises(ValueError, match=said):
            replace(one, **longer)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"switch_share": 1.5}, "switch_share is 1.5; give a number from 0 to 1"),
        ({"carry": 0}, "carry is 0"),
        (
            {"switch_share": 0.5},
            r"switch_share is 0\.5, .* one window; give latents of twice 6 .* carry=2",
        ),
        ({"random_length": True}, "random_length is on, and a rollout is one window; give latents"),
        ({"random_length": True, "carry": 2}, "carry is 2, and random_length is on"),
    ],
)
def test_lengths_and_changes_that_cannot_be_are_refused_by_name(settings, said):
    with pytest.raises(ValueError, match=said):
        replace(WINDOW, **settings)


def test_a_single_prompt_that_is_to_change_is_refused_before_any_weight_is_read(
    tmp_path, monkeypatch
):
    one = tiny.prompt()
    monkeypatch.setattr(tiny, "prompt", lambda *args, **options: one)
    said = r"run\.switch_share is 0\.5, and there is one prompt; give more in data\.prompts"
    with pytest.raises(ValueError, match=said):
        trainer(replace(SHORT, switch_share=0.5))
    monkeypatch.setattr(re_dmd, "read_checkpoint", lambda path: pytest.fail(f"{path} was read"))
    long = ("run.latents=[16, 12, 8, 8]", "run.redmd.window_chunks=2", "run.switch_share=0.5")
    (tmp_path / "prompts.txt").write_text("a red circle moves left\n" * 2)
    for only in ("data.limit=1", f'data.prompts=["{tmp_path / "prompts.txt"}"]'):
        with pytest.raises(ValueError, match=said):
            next(distil(small(*long, only), tmp_path / "run", CPU))


@pytest.mark.parametrize(
    ("config", "losses"),
    [
        (CONFIG, [(0.15760231, 4.94829512), (0.14685986, 3.49519414)]),
        (SHORT, [(0.19925351, 5.00142449), (0.27422690, 3.28806815)]),
    ],
    ids=["one window", "two windows"],
)
def test_runs_without_any_of_this_are_what_they_were(config: RunConfig, losses):
    """Losses recorded of the code before (27 November 2026), the second with a reward."""
    run = trainer(config, reward=None if config is CONFIG else Numbers())
    for expected in losses:
        report = run.step()
        assert (report.generator_loss, report.critic_loss) == pytest.approx(expected, rel=1e-4)


def test_a_carried_cache_is_not_shared_out_by_heads():
    placement = PlacementConfig(sequence_over=2)
    with pytest.raises(ValueError, match=r"run.carry is 2, and placement.sequence_over 2"):
        DistilConfig(run=replace(RunConfig(), carry=2), placement=placement)
