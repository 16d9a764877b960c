from __future__ import annotations

import logging
import math

import pytest
import torch

from rf_core.attention import PLAIN, attention_backend, check_device, forced, sdpa
from rf_core.config import CacheConfig, Grid, ModelConfig
from rf_core.fast import dispatch
from rf_core.fast.dispatch import (
    TOLERANCE,
    Choice,
    Measured,
    choose_attention,
    fastest,
    measure,
    sampled_rows,
    stream_shapes,
)

QUERIES, KEYS = (1, 4, 2, 8), ((1, 4, 2, 8), (1, 12, 2, 8))
AWKWARD = (1, 468, 3, 32), (1, 14040, 3, 32)  # a published window's keys; no multiple of 128


def wrong(q, k, v):
    return sdpa(q, k, v) + 1


def absent(q, k, v):
    raise RuntimeError("no kernel image is available\nCUDA_LAUNCH_BLOCKING may help")


def broken(q, k, v):
    raise ImportError("undefined symbol")


def as_it_is(q, k, v):
    return sdpa(q, k, v)


def without_the_last_keys(q, k, v):
    return sdpa(q, k[:, :-88], v[:, :-88])


def without_a_scale(q, k, v):
    return sdpa(q * math.sqrt(q.shape[-1]), k, v)


def a_tenth_off_in_scale(q, k, v):
    return sdpa(0.9 * q, k, v)


def wrong_in_the_last_query(q, k, v):
    out = sdpa(q, k, v)
    out[:, -1] = 0
    return out


def wrong_in_one_head(q, k, v):
    out = sdpa(q, k, v)
    out[:, :, 1] *= 1 + 2 * TOLERANCE  # among three heads hardly more than the tolerance
    return out


def not_a_number_in_one_head(q, k, v):
    out = sdpa(q, k, v)
    out[:, 200, 1] = torch.nan  # a query that is not among those compared
    return out


def of_another_shape(q, k, v):
    return sdpa(q, k, v)[:, :-1]


def choose(candidates, monkeypatch, seconds):
    times = iter(seconds)
    monkeypatch.setattr(dispatch, "seconds_of", lambda call, device: (call(), next(times))[1])
    return fastest(candidates, QUERIES, KEYS, torch.float32, "cpu")


def test_the_fastest_at_the_full_window_is_chosen_and_all_times_are_told(monkeypatch):
    choice = choose({"sdpa": sdpa, "other": as_it_is}, monkeypatch, [1e-3, 9e-3, 2e-3, 1e-3])
    assert choice.name == "other" and choice.seconds == {"sdpa": 2e-3, "other": 1e-3}
    assert choice.errors.keys() == {"sdpa", "other"} and max(choice.errors.values()) < 1e-6


def test_what_cannot_run_or_computes_something_else_is_left_out_with_the_reason(monkeypatch):
    candidates = {"absent": absent, "broken": broken, "wrong": wrong, "sdpa": sdpa}
    choice = choose(candidates, monkeypatch, [5e-3] * 4)
    assert choice.seconds == {"sdpa": 5e-3}
    assert choice.left_out.keys() == {"absent", "broken", "wrong"}
    assert choice.left_out["absent"] == "did not run"
    assert choice.left_out["wrong"].startswith("is wrong by ")


def test_a_choice_says_in_a_line_what_it_knows():
    choice = Choice(
        name="flash",
        seconds={"sdpa": 2e-3, "flash": 1e-3},
        errors={"flash": 0.00234, "sdpa": 0.5},
        left_out={"cudnn": "is wrong by 7.7 %", "efficient": "did not run"},
    )
    assert str(choice) == (
        "attention flash (error 0.23 %; ms a layer: flash 1.00, sdpa 2.00; "
        "left out: cudnn is wrong by 7.7 %, efficient did not run)"
    )
    assert str(Choice(name="sdpa")) == "attention sdpa"


@pytest.mark.slow
@pytest.mark.parametrize(
    "planted",
    [
        without_the_last_keys,
        without_a_scale,
        a_tenth_off_in_scale,
        wrong_in_the_last_query,
        wrong_in_one_head,
        not_a_number_in_one_head,
        of_another_shape,
    ],
)
def test_a_backend_that_is_wrong_somewhere_is_refused(planted):
    queries, keys = AWKWARD
    choice = fastest({"planted": planted, "sdpa": sdpa}, queries, [keys], torch.bfloat16, "cpu")
    assert choice.name == "sdpa" and choice.left_out.keys() == {"planted"}


def test_one_key_of_a_chunk_is_missed():
    def without_one(q, k, v):
        return sdpa(q, k[:, 1:], v[:, 1:])

    shape = (1, 4680, 1, 32)
    found = measure("", without_one, (1, 468, 1, 32), shape, torch.bfloat16, "cpu")
    assert found.error is not None and found.error > TOLERANCE


def test_a_backend_that_is_wrong_only_while_the_window_grows_is_refused():
    def wrong_at_first(q, k, v):
        return wrong(q, k, v) if k.shape == KEYS[0] else sdpa(q, k, v)

    choice = fastest({"planted": wrong_at_first}, QUERIES, KEYS, torch.float32, "cpu")
    assert choice.left_out.keys() == {"planted"}


@pytest.mark.parametrize("length", [1, 127, 129, 468])
def test_an_honest_backend_in_half_precision_is_well_within_the_tolerance(length):
    queries, keys = (1, length, 2, 128), (1, 3 * length, 2, 128)
    found = measure("sdpa", sdpa, queries, keys, torch.bfloat16, "cpu")
    assert found.problem is None and found.seconds is not None and found.seconds > 0
    assert found.error is not None and 1e-4 < found.error < TOLERANCE / 2


def test_errors_are_those_of_the_worst_head_of_the_worst_sample():
    def scaled(q, k, v):
        out = sdpa(q, k, v)
        out[1, :, 2] *= 1.5
        return out

    found = measure("scaled", scaled, (2, 9, 3, 8), (2, 11, 3, 8), torch.float32, "cpu")
    assert found.error == pytest.approx(0.5, rel=1e-5)


def test_what_did_not_run_says_so_in_a_line():
    found = measure("absent", absent, QUERIES, KEYS[0], torch.float32, "cpu")
    assert found == Measured(None, None, "did not run: no kernel image is available")
    found = measure("nan", not_a_number_in_one_head, *AWKWARD, torch.bfloat16, "cpu")
    assert found == Measured(None, None, "is not finite")


@pytest.mark.parametrize("length", [1, 2, 100, 256, 4680])
def test_the_first_and_the_last_queries_and_some_between_are_checked(length):
    rows = sampled_rows(length).tolist()
    assert rows == sorted(set(rows)) and len(rows) <= dispatch.ROWS
    assert rows[0] == 0 and rows[-1] == length - 1
    edge = min(length, 64)
    assert rows[:edge] == list(range(edge)) and rows[-edge:] == list(range(length - edge, length))
    assert max(b - a for a, b in zip([0, *rows], rows, strict=False)) <= length / 100 + 1


@pytest.mark.parametrize("size", [(480, 832), (256, 400)])
@pytest.mark.parametrize("cache", [CacheConfig(), CacheConfig(window_frames=11)])
def test_keys_are_those_of_a_prompt_and_of_every_step_of_a_growing_window(size, cache):
    grid = Grid(height=size[0] // 16, width=size[1] // 16)
    queries, *keys = stream_shapes(ModelConfig(), cache, grid, batch=2)
    assert queries == (2, 3 * grid.frame_tokens, 12, 128)
    frames = {9: (3, 6, 9), 11: (3, 6, 9, 11)}[cache.window_frames]
    assert keys == [(2, n, 12, 128) for n in (512, *(f * grid.frame_tokens for f in frames))]


def test_where_none_is_right_the_plain_mathematics_run_with_one_warning(caplog):
    choice = fastest({"wrong": wrong, "absent": absent}, QUERIES, KEYS, torch.float32, "cpu")
    assert choice.name == PLAIN and attention_backend(PLAIN) and not choice.seconds
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "wrong is wrong by" in record.getMessage() and "absent did not" in record.getMessage()


@pytest.fixture
def card(monkeypatch):
    """A card that computes on the CPU: what is asked of a place `cuda` is done there."""
    of = dispatch._Case.of
    monkeypatch.setattr(dispatch._Case, "of", lambda *args: of(*args[:-1], "cpu"))
    place = {"batch": 1, "dtype": torch.bfloat16, "device": "cuda"}
    model = ModelConfig(dim=64, num_heads=2, text_len=8)
    return lambda name: choose_attention.__wrapped__(
        name, model, CacheConfig(), Grid(height=2, width=3), **place
    )


def test_what_is_asked_for_by_name_is_measured_and_never_refused(card, monkeypatch):
    monkeypatch.setattr(dispatch, "BACKENDS", {"sage": wrong_in_one_head, "absent": absent})
    choice = card("sage")
    assert (
        choice.name == "sage" and choice.errors["sage"] > TOLERANCE and choice.seconds["sage"] > 0
    )
    choice = card("absent")
    assert choice.name == "absent" and choice.left_out["absent"].startswith(
        "did not run: no kernel"
    )


def test_auto_chooses_among_those_that_differ_by_rounding_alone(card):
    choice = card("auto")
    assert {"sdpa", "flash", "flash-split"} <= choice.errors.keys()
    assert "cudnn" in choice.left_out  # which no CPU has
    assert not {"sage", PLAIN} & {*choice.errors, *choice.left_out}


@pytest.mark.parametrize("name", ["auto", "flash2"])
def test_without_a_card_there_is_nothing_to_measure(name, monkeypatch):
    monkeypatch.setattr(dispatch, "_measured", absent)
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
    assert choice.errors[choice.name] <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "MATH"])
def test_a_forced_kernel_gives_what_torch_s_own_choice_does(backend):
    q, k, v = (torch.randn(1, n, 2, 16) for n in (5, 11, 11))
    attention = forced(getattr(torch.nn.attention.SDPBackend, backend))
    torch.testing.assert_close(attention(q, k, v), sdpa(q, k, v))
    whole = not torch.__version__.startswith("2.5.")  # which breaks the graph: speed alone
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=whole)
    torch.testing.assert_close(compiled(q, k, v), sdpa(q, k, v))


def test_a_card_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda", "cuda:1"):
        check_device(device, torch.bfloat16, "auto")
    with pytest.raises(ValueError, match=r"no cuda:2: cards are numbered from 0, and this has 2"):
        check_device("cuda:2", torch.bfloat16, "auto")


@pytest.mark.parametrize("name", ["cudnn", "cudnn-split", "flash-split"])
def test_kernels_of_cards_are_refused_where_they_do_not_run(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_device("cuda", torch.bfloat16, name)
    for device, dtype in (("cpu", torch.bfloat16), ("cuda", torch.float32)):
        with pytest.raises(ValueError, match=f"attention {name} runs on cuda in bfloat16"):
            check_device(device, dtype, name)
