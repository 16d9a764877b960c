from __future__ import annotations

import pytest
import torch

from rf_core.attention import check_device, sdpa
from rf_core.config import CacheConfig, Grid, ModelConfig
from rf_core.fast import dispatch
from rf_core.fast.dispatch import choose_attention, fastest

QUERIES, KEYS = (1, 4, 2, 8), (1, 12, 2, 8)


def wrong(q, k, v):
    return sdpa(q, k, v) + 1


def absent(q, k, v):
    raise RuntimeError("no kernel image is available")


def broken(q, k, v):
    raise ImportError("undefined symbol")


def as_it_is(q, k, v):
    return sdpa(q, k, v)


def choose(candidates, monkeypatch, seconds):
    times = iter(seconds)
    monkeypatch.setattr(dispatch, "seconds_of", lambda call, device: (call(), next(times))[1])
    return fastest(candidates, QUERIES, KEYS, torch.float32, "cpu")


def test_the_fastest_is_chosen_and_all_times_are_told(monkeypatch):
    choice = choose({"sdpa": sdpa, "other": as_it_is}, monkeypatch, [2e-3, 1e-3])
    assert choice.name == "other" and choice.seconds == {"sdpa": 2e-3, "other": 1e-3}
    assert str(choice) == "attention other (other 1.00 ms, sdpa 2.00 ms a layer)"


def test_what_cannot_run_or_computes_something_else_is_left_out(monkeypatch):
    candidates = {"absent": absent, "broken": broken, "wrong": wrong, "sdpa": sdpa}
    assert choose(candidates, monkeypatch, [5e-3]).seconds == {"sdpa": 5e-3}
    assert choose({"absent": absent}, monkeypatch, []).name == "sdpa"


@pytest.mark.parametrize("name", ["auto", "flash2"])
def test_without_a_card_there_is_nothing_to_measure(name, monkeypatch):
    monkeypatch.setattr(dispatch, "fastest", absent)
    choice = choose_attention(
        name,
        ModelConfig(),
        CacheConfig(),
        Grid(height=30, width=52),
        batch=1,
        dtype=torch.bfloat16,
        device="cpu",
    )
    assert choice.name == ("sdpa" if name == "auto" else name) and not choice.seconds


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_on_a_card_exact_backends_are_measured():
    grid, place = Grid(height=30, width=52), {"dtype": torch.bfloat16, "device": "cuda"}
    choice = choose_attention("auto", ModelConfig(), CacheConfig(), grid, batch=1, **place)
    assert "sage" not in choice.seconds and choice.seconds[choice.name] > 0


def test_a_card_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda", "cuda:1"):
        check_device(device, torch.bfloat16, "auto")
    with pytest.raises(ValueError, match=r"no cuda:2: cards are numbered from 0, and this has 2"):
        check_device("cuda:2", torch.bfloat16, "auto")
