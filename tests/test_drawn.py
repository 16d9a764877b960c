"""Which prompts a run draws, beside those that its updates are seen to draw."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import tiny
import torch

from training.data.embeddings import MemoryEmbeds
from training.objective.redmd import Networks, ReDMDConfig
from training.objective.weights import WeightConfig
from training.run.draws import first_indices, shuffled_indices
from training.stages.recipes import wan
from training.stages.trainer import RunConfig, Trainer, drawn_prompts, prompt_draws

RUN = RunConfig(
    redmd=ReDMDConfig(cache=tiny.window(6, 3), sampler=tiny.TWO_STEPS, batch=4, window_chunks=2),
    latents=(tiny.CONFIG.in_dim, 6, 4, 6),
    updates=2,
    critic_ratio=2,
)


LONG = (("switch_share", 0.5), ("latents", (tiny.CONFIG.in_dim, 12, 4, 6)))


class Watched(MemoryEmbeds):
    """Remembers what it was asked for."""

    asked: ClassVar[set[int]] = set()

    def embeds(self, numbers):
        self.asked.update(numbers)
        return super().embeds(numbers)


@pytest.mark.parametrize("long", [(), LONG, (*LONG, ("carry", 2))])
@pytest.mark.parametrize("copies", [1, 2, 4])
@pytest.mark.parametrize("count", [3, 40])
def test_what_a_run_draws_is_what_it_is_seen_to_draw(copies, count, long):
    config = replace(
        RUN, redmd=replace(RUN.redmd, weights=WeightConfig(best_of=copies)), **dict(long)
    )
    student, critic = (tiny.model().requires_grad_(True) for _ in range(2))
    networks = Networks(student=student, teacher=tiny.model(seed=1), critic=critic)
    prompts = Watched(tiny.prompt(batch=count))
    prompts.asked.clear()
    run = Trainer(config, networks, prompts, tiny.prompt(9))
    for _ in range(config.updates):
        run.step()
    drawn = drawn_prompts(config, count)
    assert prompts.asked <= set(drawn) and len(drawn) <= sum(prompt_draws(config).values())
    if not long:  # which changes prompts in updates to come, too
        assert prompts.asked == set(drawn)


def test_a_longer_run_draws_what_a_shorter_one_does_and_the_published_one_46k():
    assert sum(prompt_draws(wan().run).values()) == 120 * 64 + 600 * 64
    short, long = (set(drawn_prompts(replace(RUN, updates=n), 1000)) for n in (2, 5))
    assert short < long and len(long) == pytest.approx(5 * 4 * 3, abs=3)  # both roles' meet


def test_first_indices_are_those_of_samples_in_turn():
    drawn = shuffled_indices(7, "generator", 0, range(30), 1, 20)
    assert first_indices(7, "generator", 12, 20) == drawn[:12]
    assert sorted(first_indices(7, "generator", 30, 20)) == sorted(set(drawn)) == list(range(20))
    assert torch.tensor(drawn[:20]).unique().numel() == 20
