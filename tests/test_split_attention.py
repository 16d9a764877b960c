from __future__ import annotations

import pytest
import torch
from torch import nn

from rf_core import split_attention
from rf_core.attention import BACKENDS, sdpa
from rf_core.config import Grid, ModelConfig
from rf_core.fast.dispatch import TOLERANCE, reference_attention
from rf_core.layers import Block, PromptKV
from rf_core.rope import rope_table
from rf_core.split_attention import TailSplit, attend_split, flash_lse, plan_split, split_tail

H100, RTX_4090, HEADS = 132, 128, 12


def drawn(queries: int, keys: int, *, batch: int = 2, heads: int = 3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = ((batch, n, heads, 16) for n in (queries, keys, keys))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def counted(calls: list):
    def attend(q, k, v):
        calls.append((q, k, v))
        return flash_lse(q, k, v)

    return attend


def test_a_chunk_at_480x832_fills_three_waves_of_an_h100_and_half_a_fourth():
    assert plan_split(1, 4680, HEADS, H100) == TailSplit(start=4224, parts=2)
    assert 4224 // 128 * HEADS == 3 * H100


@pytest.mark.parametrize("processors", [H100, RTX_4090, 82])
@pytest.mark.parametrize("heads", [3, 12, 40])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_split_takes_whole_waves_and_a_part_of_one(processors, heads, batch):
    plans = {n: plan_split(batch, n, heads, processors) for n in range(1, 9000, 129)}
    assert any(plans.values()) == (2 * batch * heads <= processors)  # a tile fits in twice
    for queries, split in plans.items():
        tiles, waves = -(-queries // 128), -(-queries // 128) * batch * heads // processors
        if split is None:
            continue
        first, rest = split.start // 128, tiles - split.start // 128
        assert 0 < split.start < queries and first * 128 == split.start
        assert first * batch * heads <= waves * processors
        assert split.parts > 1 and split.parts * rest * batch * heads <= processors


@pytest.mark.parametrize(
    ("batch", "queries", "processors"),
    [
        (1, 4224, H100),  # whole waves
        (2, 4680, H100),  # the last wave is more than half full
        (1, 1000, H100),  # less than a wave
        (1, 1, H100),
        (1, 4680, 0),  # no card
    ],
)
def test_where_nothing_is_gained_nothing_is_split(batch, queries, processors):
    assert plan_split(batch, queries, HEADS, processors) is None


LENGTHS = [  # queries, keys, the tail's start, parts
    (2, 5, 1, 2),
    (127, 130, 1, 3),
    (128, 257, 127, 2),
    (129, 258, 128, 2),
    (129, 7, 128, 5),
    (468, 1404, 384, 4),
]


@pytest.mark.parametrize(("queries", "keys", "start", "parts"), LENGTHS)
@pytest.mark.parametrize("batch", [1, 2])
def test_split_attention_is_plain_attention_to_rounding(queries, keys, start, parts, batch):
    q, k, v = drawn(queries, keys, batch=batch)
    found = attend_split(flash_lse, q, k, v, TailSplit(start=start, parts=parts))
    assert found.is_contiguous()
    torch.testing.assert_close(found, reference_attention(q, k, v).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("queries", "keys", "start", "parts"), LENGTHS)
def test_split_attention_in_half_precision_is_as_exact_as_plain_attention(
    queries, keys, start, parts
):
    q, k, v = drawn(queries, keys, dtype=torch.bfloat16)
    expected = reference_attention(q, k, v)
    found = attend_split(flash_lse, q, k, v, TailSplit(start=start, parts=parts))
    split, plain = ((x - expected).norm() / expected.norm() for x in (found, sdpa(q, k, v)))
    assert found.dtype == torch.bfloat16
    assert split < 1.3 * plain < TOLERANCE / 2


def test_parts_whose_sums_differ_by_orders_of_magnitude_are_merged_without_overflow():
    q, k, v = drawn(64, 128)
    k[:, :64] *= 60  # the exponentials of that part's scores overflow float32
    found = attend_split(flash_lse, q, k, v, TailSplit(start=32, parts=2))
    torch.testing.assert_close(found, reference_attention(q, k, v).float(), rtol=1e-5, atol=1e-4)


def test_parts_are_attended_to_at_once_and_lie_where_the_keys_do():
    calls: list = []
    window = torch.randn(1, 40, 3, 16)  # of which a growing cache shows the first 32
    q, k, v = torch.randn(1, 24, 3, 16), window[:, :32], window[:, 1:33]
    attend_split(counted(calls), q, k, v, TailSplit(start=16, parts=4))
    assert [call[0].shape[:2] for call in calls] == [(1, 16), (4, 8)]
    for given, seen in zip((k, v), calls[1][1:], strict=True):
        assert seen.data_ptr() == given.data_ptr() and seen.shape == (4, 8, 3, 16)


@pytest.fixture
def seven_processors(monkeypatch):
    """Blocks of 4 queries: 12 of 3 heads are a wave of two tiles and a tail of one."""
    monkeypatch.setattr(split_attention, "TILE", 4)
    monkeypatch.setattr(split_attention, "MIN_KEYS", 12)
    monkeypatch.setattr(split_attention, "processors_of", lambda device: 7)
    assert plan_split(1, 12, 3, 7) == TailSplit(start=8, parts=2)


def test_what_is_split_is_long_enough_without_gradients_and_needs_no_copy(seven_processors):
    calls: list = []
    attention = split_tail(counted(calls))

    def launches(q, k, v):
        calls.clear()
        torch.testing.assert_close(attention(q, k, v), sdpa(q, k, v))
        return len(calls)

    q, k, v = drawn(12, 16, batch=1)
    assert launches(q, k, v) == 2
    assert launches(q, k[:, 5:], v[:, 5:]) == 1  # too few keys
    assert launches(q.requires_grad_(), k, v) == 1
    with torch.no_grad():
        assert launches(q, k, v) == 2


def test_samples_whose_keys_lie_apart_are_attended_to_whole(seven_processors, monkeypatch):
    monkeypatch.setattr(split_attention, "processors_of", lambda device: 14)
    calls: list = []
    q, k, v = drawn(12, 20)
    for seen, launches in ((16, 1), (20, 2)):  # a window's beginning, and all of it
        calls.clear()
        split_tail(counted(calls))(q, k[:, :seen], v[:, :seen])
        assert len(calls) == launches


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_block_attends_split_in_one_graph(seven_processors):
    config = ModelConfig(dim=48, num_heads=3, ffn_dim=32, text_len=6)
    block, grid = Block(config, nn), Grid(height=2, width=3)
    for parameter in block.parameters():
        parameter.normal_(std=0.1)
    x, time = torch.randn(1, 12, 48), torch.randn(1, 2, 6, 48)
    prompt = PromptKV(*(torch.randn(1, 6, 3, 16) for _ in range(2)))
    given = (x, time, prompt, rope_table(2, grid, 16, "cpu"), None)
    calls: list = []
    plain = block(*given, split_tail(counted(calls)))
    assert len(calls) == 3  # the self-attention's two and the cross-attention's one
    block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(block(*given, split_tail(flash_lse)), plain)


@torch.no_grad()
def test_how_many_processors_there_are_breaks_no_graph():
    q, k, v = drawn(4, split_attention.MIN_KEYS, batch=1)
    compiled = torch.compile(BACKENDS["flash-split"], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), sdpa(q, k, v))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("name", ["cudnn-split", "flash-split"])
@torch.no_grad()
def test_on_a_card_a_split_is_recorded_and_right(name):
    q, k, v = (torch.randn(1, n, HEADS, 128, device="cuda").bfloat16() for n in (4680, 9360, 9360))
    attention, graph = BACKENDS[name], torch.cuda.CUDAGraph()
    attention(q, k, v)
    with torch.cuda.graph(graph):
        found = attention(q, k, v)
    graph.replay()
    expected = reference_attention(q[:, -600:], k, v)
    assert (found[:, -600:] - expected).norm() <= TOLERANCE * expected.norm()
