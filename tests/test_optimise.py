"""Muon beside AdamW, and rates that change over a run."""

from __future__ import annotations

import pytest
import tiny
import torch

from training.muon import Muon, orthogonalise
from training.run.optimise import OptimiserConfig, TrainedNetwork


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_scale(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    result = orthogonalise(matrices)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    along = torch.diagonal(u.mT @ result @ v.mT, dim1=1, dim2=2)
    assert along.min() > 0.5 and along.max() < 1.3


def test_muon_takes_the_blocks_matrices_and_adam_all_the_rest():
    model = tiny.model().requires_grad_(True)
    trained = TrainedNetwork(model, OptimiserConfig(rate=1e-3, matrix_rate=1e-2, weight_decay=0.5))
    adam, muon = (each.param_groups[0] for each in trained.optimisers)
    assert len(muon["params"]) == tiny.CONFIG.num_layers * 10
    assert all(matrix.ndim == 2 for matrix in muon["params"])
    assert len(muon["params"]) + len(adam["params"]) == len(list(model.parameters()))
    assert (adam["weight_decay"], muon["weight_decay"]) == (0.0, 0.5)
    (alone,) = TrainedNetwork(model, OptimiserConfig(rate=1e-3)).optimisers
    assert len(alone.param_groups[0]["params"]) == len(list(model.parameters()))


def test_muon_steps_alike_however_many_matrices_are_treated_at_once(monkeypatch):
    found = []
    for at_once in (1, 2**20):
        monkeypatch.setattr("training.muon.MAX_ENTRIES", at_once)
        torch.manual_seed(0)
        matrices = [torch.nn.Parameter(torch.randn(6, 8)) for _ in range(3)]
        optimiser = Muon(matrices, lr=0.1)
        for matrix in matrices:
            matrix.grad = torch.randn(6, 8)
        optimiser.step()
        found.append(torch.stack(matrices).detach())
    torch.testing.assert_close(*found)


def test_rates_are_constant_as_published_or_fall_by_a_cosine_after_a_rise():
    constant = OptimiserConfig(rate=1.0)
    assert {constant.rate_factor(update, 100) for update in range(100)} == {1.0}
    cosine = OptimiserConfig(rate=1.0, schedule="cosine", warmup=10)
    assert cosine.rate_factor(0, 100) == pytest.approx(0.1, rel=1e-2)
    assert cosine.rate_factor(50, 100) == pytest.approx(0.505)
    assert cosine.rate_factor(100, 100) == pytest.approx(0.01)
    rising = OptimiserConfig(rate=1.0, warmup=4)
    assert [rising.rate_factor(update, 9) for update in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_step_is_taken_at_its_rate_and_leaves_no_gradient():
    def moved(factor: float) -> torch.Tensor:
        model = tiny.model().requires_grad_(True)
        config = OptimiserConfig(rate=1e-3, matrix_rate=1e-2, weight_decay=0.0)
        trained, before = (
            TrainedNetwork(model, config),
            model.blocks[0].ffn[0].weight.detach().clone(),
        )
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        trained.step(factor)
        assert all(parameter.grad is None for parameter in model.parameters())
        return model.blocks[0].ffn[0].weight.detach() - before

    torch.testing.assert_close(moved(0.5), 0.5 * moved(1.0), atol=1e-6, rtol=1e-3)
    assert not moved(0.0).any()


@pytest.mark.parametrize("field", ["matrix_rate", "warmup"])
def test_impossible_numbers_are_refused_by_name(field):
    with pytest.raises(ValueError, match=f"{field} is -1"):
        OptimiserConfig(rate=1.0, **{field: -1})
