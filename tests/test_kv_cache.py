from __future__ import annotations

import pytest
import tiny
import torch

from rf_core.config import CacheConfig, Grid
from rf_core.kv_cache import KeyValues, KVCache, match_frames
from rf_core.rope import apply_rope, rope_table

GRID = Grid(height=1, width=2)
TOKENS = GRID.frame_tokens


def cache_of(
    config: CacheConfig, dtype: torch.dtype = torch.float32, keep_rotated: bool = True
) -> KVCache:
    return KVCache.allocate(
        config, num_layers=2, batch=1, grid=GRID, num_heads=1, head_dim=4,
        dtype=dtype, device="cpu", keep_rotated=keep_rotated,
    )  # fmt: skip


def chunk(number: float, frames: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((1, frames * TOKENS, 1, 4), number, dtype=dtype)


def extend(
    cache: KeyValues, layer: int, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the network does in a layer."""
    start = cache.context_frames * TOKENS
    table = rope_table(9, GRID, k.shape[-1]).tokens(start, start + k.shape[1])
    return cache.layer(layer).extend(k, apply_rope(k, table), v)


def write(cache: KVCache, number: float) -> None:
    cache.advance()
    for layer in range(2):
        kv = chunk(number, cache.slot_frames, cache.k_NBWHD.dtype)
        extend(cache, layer, kv, -kv)


def frames_of(cache: KVCache, layer: int = 0) -> list[float]:
    return cache.k_NBWHD[layer, 0, : cache.num_frames * TOKENS : TOKENS, 0, 0].tolist()


def test_a_window_grows_then_lets_the_oldest_chunk_leave_into_the_sink():
    cache = cache_of(tiny.window(9, 3))
    seen = []
    for number in (8, 16, 32, 64):
        write(cache, number)
        seen.append(frames_of(cache))
    assert seen[0] == [8] * 3
    assert seen[2] == [8] * 3 + [16] * 3 + [32] * 3
    assert seen[3] == [0.75 * 8 + 0.25 * 16] * 3 + [32] * 3 + [64] * 3
    assert torch.equal(cache.v_NBWHD, -cache.k_NBWHD)
    assert frames_of(cache, layer=1) == seen[3]


def test_a_second_pass_overwrites_the_slot_and_updates_no_sink():
    cache = cache_of(tiny.window(9, 3))
    for number in (1, 2, 3, 4):
        write(cache, number)
    before = frames_of(cache)
    for _ in range(3):
        extend(cache, 0, chunk(9), chunk(9))
    assert frames_of(cache) == before[:6] + [9] * 3


def test_extend_returns_the_window_without_copying_it():
    cache = cache_of(tiny.window(9, 3))
    write(cache, 1)
    cache.advance()
    k, v = extend(cache, 0, chunk(2), chunk(2))
    assert k.shape == v.shape == (1, 6 * TOKENS, 1, 4)
    assert k.data_ptr() == cache.rotated_NBWHD.data_ptr()
    assert v.data_ptr() == cache.v_NBWHD.data_ptr()


@pytest.mark.parametrize("keep_rotated", [True, False], ids=["kept", "rotated each pass"])
def test_attention_reads_every_key_rotated_to_its_present_place(keep_rotated):
    cache = cache_of(tiny.window(9, 3), keep_rotated=keep_rotated)
    table = rope_table(9, GRID, 4)
    for number in (1, 2, 3, 4, 5):
        cache.advance()
        for layer in range(2):
            k = torch.randn(1, 3 * TOKENS, 1, 4, generator=torch.Generator().manual_seed(number))
            rotated, v = extend(cache, layer, k, -k)
            stop = rotated.shape[1]
            expected = apply_rope(cache.k_NBWHD[layer, :, :stop], table.tokens(0, stop))
            torch.testing.assert_close(rotated, expected, atol=1e-6, rtol=1e-6)
            assert torch.equal(v, cache.v_NBWHD[layer, :, :stop])
    assert cache.num_evictions == 2


def test_rotated_keys_take_a_third_of_the_memory_and_can_be_done_without():
    kept, lean = (cache_of(tiny.window(9, 3), keep_rotated=keep) for keep in (True, False))
    assert kept.nbytes == 3 * kept.k_NBWHD.nbytes
    assert lean.nbytes == 2 * kept.k_NBWHD.nbytes + kept.k_NBWHD[0].nbytes


@pytest.mark.parametrize("accumulator", ["reference", "float32"])
def test_an_anchor_stays_and_the_sink_begins_with_the_frames_after_it(accumulator):
    config = tiny.window(9, 2, anchor_frames=2, accumulator=accumulator)
    cache = cache_of(config, torch.bfloat16)
    for number in (8, 16, 32, 64):
        write(cache, number)
    # The sink began as 8 and 16; 16, 16 and 32 have left into it.
    assert frames_of(cache) == [8, 8, 10, 18, 32, 32, 64, 64, 64]
    assert torch.equal(cache.v_NBWHD, -cache.k_NBWHD)


def test_memories_take_the_places_behind_anchor_and_sink():
    cache = cache_of(tiny.window(9, 1, anchor_frames=1, memory_rates=(0.5,)))
    for number in (8, 16, 32, 64):
        write(cache, number)
    # Of the chunk of 8 one is anchor, one sink, one in the place of the memory; 16s leave.
    assert frames_of(cache) == [8, 10, 16, 32, 32, 32, 64, 64, 64]


def test_without_a_sink_the_oldest_chunk_is_forgotten():
    cache = cache_of(tiny.window(6, 0))
    for number in (1, 2, 3):
        write(cache, number)
    assert frames_of(cache) == [2] * 3 + [3] * 3


def test_a_decay_of_one_is_a_static_sink_and_of_zero_the_chunk_that_left():
    for decay, expected in ((1.0, 1), (0.0, 3)):
        cache = cache_of(tiny.window(9, 3, decay=decay))
        for number in (1, 2, 3, 4, 5):
            write(cache, number)
        assert frames_of(cache)[:3] == [expected] * 3


def test_frames_are_averaged_where_sink_and_evicted_chunk_differ_in_length():
    x = torch.arange(1.0, 4.0).repeat_interleave(TOKENS)[None, :, None, None]
    for frames, expected in ((1, [2]), (2, [1.5, 2.5]), (3, [1, 2, 3]), (6, [1, 1, 2, 2, 3, 3])):
        assert match_frames(x, frames, TOKENS).flatten()[::TOKENS].tolist() == expected


def test_in_bfloat16_the_reference_accumulator_rounds_each_product_as_published():
    cache = cache_of(tiny.window(9, 3, decay=0.999), torch.bfloat16)
    for number in (1, 0, 0, 0, 0, 0):
        write(cache, number)
    # 0.999 rounds back to 1 in bfloat16: the published sink never decays.
    assert frames_of(cache)[:3] == [1] * 3


@pytest.mark.parametrize("accumulator", ["reference", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_can_be_given_back_the_length_that_averaging_takes(accumulator, dtype):
    generator = torch.Generator().manual_seed(0)
    chunks = torch.randn(8, 1, 3 * TOKENS, 1, 4, generator=generator).to(dtype)
    sinks = {}
    for keep in (False, True):
        config = tiny.window(9, 3, decay=0.5, accumulator=accumulator, keep_key_norms=keep)
        cache = cache_of(config, dtype)
        for kv in chunks:
            cache.advance()
            extend(cache, 0, kv, kv)
        sinks[keep] = [t[0, 0, : 3 * TOKENS, 0].float() for t in (cache.k_NBWHD, cache.v_NBWHD)]
    lengths = chunks[0, 0, :, 0].float().norm(dim=1)
    for evicted in chunks[1:6]:
        lengths = 0.5 * lengths + 0.5 * evicted[0, :, 0].float().norm(dim=1)
    torch.testing.assert_close(sinks[True][0].norm(dim=1), lengths, rtol=0.02, atol=0.01)
    assert (sinks[False][0].norm(dim=1) < 0.9 * lengths).all()
    assert torch.equal(sinks[True][1], sinks[False][1])  # values are left alone


def test_the_float32_accumulator_really_decays_in_bfloat16():
    cache = cache_of(tiny.window(9, 3, decay=0.999, accumulator="float32"), torch.bfloat16)
    for number in [1] + [0] * 22:
        write(cache, number)
    assert cache.num_evictions == 20
    assert cache.exact_sink is not None
    torch.testing.assert_close(
        cache.exact_sink, torch.full_like(cache.exact_sink, 0.999**20) * _signs()
    )
    assert frames_of(cache)[0] == float(torch.tensor(0.999**20).bfloat16())


def _signs() -> torch.Tensor:
    return torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1, 1, 1)


def test_in_float32_both_accumulators_are_the_same():
    caches = [cache_of(tiny.window(9, 3, accumulator=a)) for a in ("reference", "float32")]
    for cache in caches:
        assert cache.exact_sink is None
        for number in (1, 2, 3, 4, 5):
            write(cache, number)
    assert torch.equal(caches[0].k_NBWHD, caches[1].k_NBWHD)


def test_a_snapshot_passes_gradients_and_ignores_what_comes_later():
    cache = cache_of(tiny.window(9, 3))
    for number in (1, 2, 3):
        write(cache, number)
    cache.advance()
    snapshot = cache.snapshot()
    slot = chunk(7).requires_grad_()
    expected = extend(snapshot, 0, slot, slot)[0].detach().clone()
    assert torch.equal(expected, extend(cache, 0, chunk(7), chunk(7))[0])
    write(cache, 9)
    k, v = extend(snapshot, 0, slot, slot)
    assert torch.equal(k, expected)
    (k.sum() + v.sum()).backward()
    (own,) = torch.autograd.grad(extend(snapshot, 0, slot, slot)[0][:, -6:].sum(), slot)
    torch.testing.assert_close(slot.grad, own + 1)


def test_writing_to_a_cache_under_autograd_is_a_mistake_that_is_named():
    cache = cache_of(tiny.window(9, 3))
    cache.advance()
    with pytest.raises(AssertionError, match="snapshot"):
        extend(cache, 0, chunk(1).requires_grad_(), chunk(1))


def test_a_chunk_larger_than_the_room_beside_the_sink_is_refused():
    cache = cache_of(tiny.window(9, 3))
    cache.advance()
    with pytest.raises(ValueError, match="7 latent frames does not fit the 6 frames"):
        cache.advance(7)
    with pytest.raises(ValueError, match="10 latent frames does not fit the 9 frames"):
        cache_of(tiny.window(9, 3)).advance(10)


def test_a_clone_is_independent_and_equal():
    cache = cache_of(tiny.window(9, 3, accumulator="float32"), torch.bfloat16)
    for number in (1, 2, 3, 4):
        write(cache, number)
    twin = cache.clone()
    write(cache, 5)
    write(twin, 5)
    assert frames_of(cache) == frames_of(twin)
    write(twin, 6)
    assert frames_of(cache) != frames_of(twin)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window_frames": 5}, "cannot hold 3 sink frames"),
        ({"sink_frames": -1}, "give a number from 0 to 1024"),
        ({"anchor_frames": -1}, "anchor_frames is -1; give a number from 0 to 1024"),
        ({"anchor_frames": 4}, "cannot hold 3 sink frames, 4 of anchor_frames and a chunk of 3"),
        ({"chunk_frames": 0}, "give a number from 1 to 1024"),
        ({"decay": 1.5}, "between 0 and 1"),
        ({"decay": float("nan")}, "between 0 and 1"),
        ({"accumulator": "float64"}, "'reference' or 'float32'"),
    ],
)
def test_impossible_settings_are_refused_with_a_remedy(wrong, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig(**wrong)
