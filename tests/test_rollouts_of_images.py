"""Start images and sizes beside the other ways of a rollout: changes of prompt, drawn lengths, and
rollouts that go on in the next update."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from test_drawn import RUN, Watched
from test_long_tuning import SHORT, WINDOW, Windows
from test_trainer import Images, trainer, weights
from torch import Tensor

from training.data.starts import Starts, with_starts
from training.objective.redmd import Networks
from training.run.draws import draw_starts, shuffled_indices, switched_indices
from training.run.networks import PlacementConfig
from training.stages.re_dmd import needed_prompts
from training.stages.recipes import DistilConfig, miniature
from training.stages.trainer import RunConfig, Trainer, drawn_prompts

SIZES = ((4, 6), (6, 4), (8, 6))


class Seen(Windows):
    """Notes the latents of every window it scores, too."""

    def __init__(self) -> None:
        super().__init__()
        self.latents: list[Tensor] = []

    def __call__(self, x0: Tensor, numbers: list[int]) -> Tensor:
        self.latents.append(x0.clone())
        return super().__call__(x0, numbers)


def begins_from(latents: Tensor, drawn: list[int | None]) -> list[bool]:
    """Of each sample, whether its first chunk is the image that was drawn for it."""
    size = tuple(latents.shape[3:])
    return [
        number is not None and torch.equal(each[:, :3], Images().latents([number], size)[0])
        for each, number in zip(latents, drawn, strict=True)
    ]


def test_a_rollout_shows_its_image_s_caption_until_its_prompt_changes_to_one_of_the_run_s():
    reward, config = Windows(), replace(SHORT, switch_share=0.5, micro_batch=4)
    trainer(config, reward=reward, share=0.5).step()
    own = shuffled_indices(0, "generator", 0, range(4), 4, 6)
    changed = switched_indices(0, "generator", 0, range(4), own, 6, 0.5)
    drawn = draw_starts(0, "generator", 0, range(4), 0.5, 3)
    before = with_starts(own, drawn, 6)
    pairs = zip(own, changed, before, strict=True)
    after = [begun if old == new else new for old, new, begun in pairs]
    assert reward.batches == [before, after]
    started = {number for number in before if number >= 6}
    assert started and not started <= set(after)  # an image's rollout is among those that change


def test_a_rollout_that_goes_on_begins_from_its_image_once_and_keeps_the_caption():
    reward, config = Seen(), replace(WINDOW, carry=3, critic_ratio=1, micro_batch=4)
    run = trainer(config, reward=reward, share=0.5)
    for _ in range(6):
        run.step()
    for rollout in (0, 1):
        drawn = draw_starts(0, "generator", rollout, range(4), 0.5, 3)
        first, *later = (reward.latents[3 * rollout + part] for part in range(3))
        assert begins_from(first, drawn) == [number is not None for number in drawn]
        assert not any(begins for part in later for begins in begins_from(part, drawn))
        own = shuffled_indices(0, "generator", rollout, range(4), 4, 6)
        numbers = reward.batches[3 * rollout : 3 * rollout + 3]
        assert numbers == [with_starts(own, drawn, 6)] * 3


def test_a_rollout_that_goes_on_keeps_its_size():
    reward = Seen()
    config = replace(WINDOW, carry=2, critic_ratio=1, micro_batch=4, buckets=SIZES[1:])
    run = trainer(config, reward=reward, share=0.5)
    for _ in range(12):
        run.step()
    sizes = [tuple(latents.shape[3:]) for latents in reward.latents]
    assert sizes[::2] == sizes[1::2] and set(sizes) == set(SIZES)


def test_rollouts_of_a_drawn_length_begin_from_images_at_every_size():
    reward = Seen()
    config = replace(
        SHORT, random_length=True, critic_ratio=1, micro_batch=4, buckets=SIZES[1:], seed=1
    )
    run = trainer(config, reward=reward, share=1.0)
    sizes, windows = set(), set()
    for update in range(8):
        reward.latents.clear()
        run.step()
        drawn = draw_starts(1, "generator", update, range(4), 1.0, 3)
        first, *later = reward.latents
        assert all(begins_from(first, drawn))
        assert not any(begins for part in later for begins in begins_from(part, drawn))
        sizes.add(tuple(first.shape[3:]))
        windows.add(1 + len(later))
    assert sizes == set(SIZES) and windows == {1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2])
def test_carried_rollouts_of_several_sizes_are_resumed_bit_for_bit(tmp_path, at):
    config = replace(WINDOW, carry=3, switch_share=0.5, micro_batch=2, buckets=SIZES[1:])
    whole = trainer(config, share=0.5)
    reports = [whole.step() for _ in range(4)]
    first = trainer(config, share=0.5)
    for _ in range(at):
        first.step()
    first.save(tmp_path / "at")
    second = trainer(config, share=0.5)
    second.load(tmp_path / "at")
    assert [second.step() for _ in range(4 - at)] == reports[at:]
    assert all(map(torch.equal, weights(second), weights(whole)))


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("switch_share", [0.0, 0.5])
def test_a_run_encodes_no_prompt_that_a_start_image_s_caption_takes_the_place_of(
    share, switch_share
):
    latents = (tiny.CONFIG.in_dim, 12, 4, 6)
    config = replace(RUN, latents=latents, switch_share=switch_share)
    student, critic = (tiny.model().requires_grad_(True) for _ in range(2))
    networks = Networks(student=student, teacher=tiny.model(seed=1), critic=critic)
    own = Watched(tiny.prompt(batch=40))
    own.asked.clear()
    starts = Starts(source=Images(), share=share, own=own)
    run = Trainer(config, networks, own, tiny.prompt(9), starts=starts)
    for _ in range(config.updates):
        run.step()
    assert own.asked == set(drawn_prompts(config, 40, share))
    assert bool(own.asked) == (share < 1 or switch_share > 0)


def test_prompts_that_validation_shows_are_encoded_beside_those_that_rollouts_begin_with(tmp_path):
    config = miniature()
    starts = replace(config.starts, source=tmp_path, share=1.0)
    assert len(set(needed_prompts(config, 1000))) > 100
    every = needed_prompts(replace(config, starts=starts), 1000)
    assert len(every) == config.output.validation_prompts


def test_sizes_whose_tokens_are_shared_out_must_be_of_one_area():
    placement = PlacementConfig(sequence_over=2)
    DistilConfig(run=RunConfig(buckets=((104, 60),)), placement=placement)
    with pytest.raises(ValueError, match=r"run\.buckets has latents of 60x104, 80x80.* one area"):
        DistilConfig(run=RunConfig(buckets=((80, 80),)), placement=placement)
    DistilConfig(run=RunConfig(buckets=((80, 80),)))
