"""AdamW without a first moment beside torch's AdamW with beta1 = 0."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from training.run import checkpointing
from training.run.momentless import MomentlessAdamW
from training.run.optimise import OptimiserConfig, TrainedNetwork

CONFIG = OptimiserConfig(rate=1e-3)


def step(trained: TrainedNetwork, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained.others:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    trained.step()


def with_torchs_adamw() -> TrainedNetwork:
    trained = TrainedNetwork(tiny.model().requires_grad_(True), CONFIG)
    trained.optimisers = [torch.optim.AdamW(trained.others, lr=CONFIG.rate, betas=CONFIG.betas)]
    return trained


def weights(trained: TrainedNetwork) -> torch.Tensor:
    return torch.cat([each.detach().flatten() for each in trained.others])


@pytest.mark.parametrize("entries", [1, 1000, 2**26])
def test_steps_are_adamws_to_the_bit_however_many_weights_are_stepped_at_once(monkeypatch, entries):
    monkeypatch.setattr("training.run.momentless.MAX_ENTRIES", entries)
    ours, theirs = TrainedNetwork(tiny.model().requires_grad_(True), CONFIG), with_torchs_adamw()
    for seed in range(5):
        step(ours, seed)
        step(theirs, seed)
        assert torch.equal(weights(ours), weights(theirs))


def test_a_weight_without_a_gradient_stays_and_keeps_its_own_count():
    still, moved = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimiser = MomentlessAdamW([still, moved], lr=0.1)
    moved.grad = torch.ones(3)
    optimiser.step()
    assert torch.equal(still, torch.ones(3)) and not torch.equal(moved, torch.ones(3))
    assert still not in optimiser.state and optimiser.state[moved]["step"] == 1


def test_the_published_betas_keep_no_first_moment_and_others_do():
    def kept(config: OptimiserConfig) -> set[str]:
        trained = TrainedNetwork(tiny.model().requires_grad_(True), config)
        return {name for each in trained.state()["moments"].values() for name in each}

    assert kept(CONFIG) == {"step", "exp_avg_sq"}
    assert "exp_avg" in kept(OptimiserConfig(rate=1e-3, betas=(0.9, 0.999)))


def test_a_checkpoint_with_first_moments_is_resumed_from(tmp_path: Path):
    before = with_torchs_adamw()
    for seed in range(3):
        step(before, seed)
    checkpointing.save({"student": before.state()}, tmp_path / "old")
    after = TrainedNetwork(tiny.model(seed=1).requires_grad_(True), CONFIG)
    state = {"student": after.state()}
    checkpointing.load(state, tmp_path / "old")
    after.load(state["student"])
    assert torch.equal(weights(after), weights(before))
    for seed in range(3, 5):
        step(before, seed)
        step(after, seed)
    assert torch.equal(weights(after), weights(before))
