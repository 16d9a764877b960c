"""Counted work against the numbers in the paper's notes, and against torch's own counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rf_core import kernels
from rf_core.attention import sdpa
from rf_core.config import WAN_1_3B, WAN_SIZE, CacheConfig, Grid, SamplerConfig
from rf_core.decoders.taehv import TAEHV, TAEHVConfig
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.families import FAMILIES
from rf_core.kv_cache import KVCache
from rf_core.measure import counts
from rf_core.measure.counts import Work, cache_bytes, chunk_work, num_parameters, pass_work, total
from rf_core.memory.footprint import Sizes, footprint
from rf_core.model import WanModel

PUBLISHED = Grid.of_latents(WAN_SIZE[0] // 8, WAN_SIZE[1] // 8, WAN_1_3B.patch_size)
GRID = Grid(height=2, width=3)


def by_hand(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, bias_BS: Tensor | None = None
) -> Tensor:
    """Attention as two products, which every FLOP counter knows."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    bias = 0 if bias_BS is None else bias_BS[:, None, None]
    return ((q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v).transpose(1, 2)


def test_a_pass_of_the_published_student_takes_24_tflop_in_the_known_parts():
    parts = pass_work(WAN_1_3B, CacheConfig(), PUBLISHED)
    tera = {kind: work.flops / 1e12 for kind, work in parts.items()}
    assert tera[counts.SELF_PRODUCTS] == pytest.approx(12.1, abs=0.05)
    assert tera[counts.FEED_FORWARD] == pytest.approx(7.7, abs=0.05)
    assert tera[counts.SELF_LINEARS] == pytest.approx(2.65, abs=0.005)
    cross = tera[counts.CROSS_PRODUCTS] + tera[counts.CROSS_LINEARS]
    assert cross == pytest.approx(1.8, abs=0.05)
    assert total(parts).flops / 1e12 == pytest.approx(24.3, abs=0.05)


def test_a_chunk_of_the_published_student_takes_121_tflop():
    parts = chunk_work(WAN_1_3B, CacheConfig(), SamplerConfig(), PUBLISHED)
    assert total(parts).flops / 1e12 == pytest.approx(121, abs=0.5)


def test_the_published_cache_takes_2_59_gb_and_rotated_keys_half_as_much_again():
    lean, kept = (
        cache_bytes(WAN_1_3B, CacheConfig(), PUBLISHED, keep_rotated=keep) for keep in (False, True)
    )
    assert lean * 60 / 61 / 1e9 == pytest.approx(2.59, abs=0.005)  # and a 61st, rotated
    assert kept / lean == pytest.approx(90 / 61)


@pytest.mark.parametrize(
    "more",
    [{}, {"memory_rates": (0.01, 0.1)}, {"anchor_frames": 1}],
    ids=["sink", "memories", "anchor"],
)
@pytest.mark.parametrize("keep_rotated", [True, False])
@pytest.mark.parametrize("accumulator", ["reference", "float32"])
def test_a_cache_takes_what_is_counted(accumulator, keep_rotated, more):
    sizes = tiny.CONFIG
    config = tiny.window(8, 2, chunk=2, accumulator=accumulator, **more)
    cache = KVCache.allocate(
        config,
        num_layers=sizes.num_layers,
        batch=1,
        grid=GRID,
        num_heads=sizes.num_heads,
        head_dim=sizes.head_dim,
        dtype=torch.bfloat16,
        device="cpu",
        keep_rotated=keep_rotated,
    )
    assert cache.nbytes == cache_bytes(sizes, config, GRID, 2, keep_rotated)


@pytest.mark.parametrize("config", [tiny.CONFIG, WAN_1_3B], ids=["tiny", "1.3b"])
def test_parameters_are_those_of_the_network(config):
    network = WanModel(config, device="meta")
    assert num_parameters(config) == sum(p.numel() for p in network.parameters())


def test_the_published_student_has_1_418_billion_parameters():
    assert num_parameters(WAN_1_3B) / 1e9 == pytest.approx(1.418, abs=0.0015)


@pytest.mark.parametrize(("tokens", "keys"), [(10, None), (3, 4)])
@pytest.mark.parametrize("frames", [2, 4, 7])
def test_counted_products_are_those_torch_counts(monkeypatch, frames, tokens, keys):
    monkeypatch.setattr(kernels, "prompt_attention", by_hand)
    model, config = tiny.model(), tiny.window(7, 3, chunk=2)
    x = torch.randn(1, tiny.CONFIG.in_dim, 2, 2 * GRID.height, 2 * GRID.width)
    cache = KVCache.allocate(
        config,
        num_layers=tiny.CONFIG.num_layers,
        batch=1,
        grid=GRID,
        num_heads=tiny.CONFIG.num_heads,
        head_dim=tiny.CONFIG.head_dim,
        dtype=torch.float32,
        device="cpu",
    )
    cache.num_frames = frames - 2
    cache.advance()
    prompt = model.counted_prompt(tiny.prompt(tokens=tokens))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x, torch.full((1, 2), 500.0), prompt, cache, by_hand)
    parts = pass_work(tiny.CONFIG, config, GRID, 4, context_frames=frames - 2, prompt_keys=keys)
    assert total(parts).flops == counter.get_total_flops()


def test_a_full_window_is_the_default_context():
    config = tiny.window(7, 3, chunk=2)
    assert pass_work(tiny.CONFIG, config, GRID) == pass_work(
        tiny.CONFIG, config, GRID, context_frames=5
    )


def test_bytes_follow_the_element_size_and_operations_do_not():
    half, whole = (
        total(chunk_work(tiny.CONFIG, CacheConfig(), SamplerConfig(), GRID, size))
        for size in (2, 4)
    )
    assert whole == Work(half.flops, 2 * half.bytes)


def test_the_weights_of_all_layers_are_read_once_a_pass():
    parts = pass_work(tiny.CONFIG, CacheConfig(), GRID, 1)
    linears = [work for kind, work in parts.items() if kind.startswith("linears")]
    block = sum(
        p.numel()
        for name, p in WanModel(tiny.CONFIG, device="meta").named_parameters()
        if p.ndim > 1 and not name.endswith("modulation")
    )
    text = tiny.CONFIG.text_dim * tiny.CONFIG.dim + tiny.CONFIG.dim**2
    prompt_kv = 2 * tiny.CONFIG.num_layers * tiny.CONFIG.dim**2  # these are the prompt's, not ours
    assert sum(work.bytes for work in linears) > block - text - prompt_kv


def test_every_sum_is_made_by_a_norm_and_gelu_moves_nothing_of_its_own():
    parts = pass_work(tiny.CONFIG, tiny.window(9, 3), GRID, 4)
    row = 3 * GRID.frame_tokens * tiny.CONFIG.dim * 4
    # Three norms a layer and the head's, of which all but the first read and write two rows each.
    norms = 3 * tiny.CONFIG.num_layers + 1
    assert parts[counts.NORMS] == Work(0, (4 * norms - 2) * row)
    assert parts[counts.ELEMENTWISE] == Work()


def test_an_eviction_moves_the_kept_frames_and_feeds_the_sink():
    frame = 2 * tiny.CONFIG.num_layers * GRID.frame_tokens * tiny.CONFIG.dim * 4
    for config, moved in (
        # Sink read, leaving read, sink written; three moved; the context's keys rotated.
        (CacheConfig(), 3 + 3 + 3 + 2 * 3 + 6),
        (CacheConfig(decay=1.0), 2 * 3 + 6),
        (CacheConfig(sink_frames=0), 2 * 6 + 6),
        (CacheConfig(window_frames=6), 3 + 3 + 3 + 3),
    ):
        parts = chunk_work(tiny.CONFIG, config, SamplerConfig(), GRID, 4)
        assert parts[counts.EVICTION] == Work(0, moved * frame)


def test_another_schedule_changes_the_number_of_passes():
    cache, one = CacheConfig(), SamplerConfig(steps=(1000,))
    parts = chunk_work(tiny.CONFIG, cache, one, GRID)
    single = pass_work(tiny.CONFIG, cache, GRID)
    assert parts[counts.NORMS] == single[counts.NORMS].times(2)


@pytest.mark.parametrize(
    ("codec", "tera", "state_giga"),
    [
        (WanVAE(VAEConfig(), device="meta", dtype=torch.bfloat16), 38.8, 1.89),
        (TAEHV(TAEHVConfig(), device="meta", dtype=torch.bfloat16), 1.3, 0.07),
    ],
    ids=["wan", "taehv"],
)
def test_decoding_a_published_chunk_takes_the_known_work(codec, tera, state_giga):
    shape = (1, 16, 3, WAN_SIZE[0] // 8, WAN_SIZE[1] // 8)
    work = counts.decoder_work(codec, shape)
    assert work.flops / 1e12 == pytest.approx(tera, abs=0.051)
    _, state = codec.decode_chunk(torch.empty(shape, device="meta", dtype=torch.bfloat16), None)
    assert state.nbytes / 1e9 == pytest.approx(state_giga, abs=0.005)
    images = 3 * 12 * WAN_SIZE[0] * WAN_SIZE[1] * 2
    assert work.bytes > sum(p.nbytes for p in codec.decoder.parameters()) + images


def test_decoder_work_grows_with_the_picture():
    vae = WanVAE(replace(VAEConfig(), dim=8, num_res_blocks=1))
    small, large = (counts.decoder_work(vae, (1, 16, 3, side, side)).flops for side in (32, 64))
    assert large > 4 * small  # four times the convolutions, sixteen times the attention


@pytest.mark.parametrize("name", FAMILIES)
def test_the_counted_passes_of_a_chunk_are_those_of_a_familys_stream(name):
    family, model = FAMILIES[name], tiny.model()
    begun: list[bool] = []
    seen: list[tuple[int, int]] = []
    model.blocks[0].register_forward_pre_hook(lambda *_: begun.append(True))

    def attend(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        if begun:  # the first layer's; a clean pass ends before the last one's
            begun.clear()
            seen.append((q_BLHD.shape[1], k_BSHD.shape[1]))
        return sdpa(q_BLHD, k_BSHD, v_BSHD)

    stream = tiny.stream(model=model, cache=family.cache, sampler=family.sampler, attention=attend)
    for _ in range(family.cache.window_frames // family.cache.chunk_frames + 2):
        seen.clear()
        stream.generate()
        stream.finish_clean_pass()
    assert seen == [
        (each.frames * GRID.frame_tokens, (each.frames + each.context_frames) * GRID.frame_tokens)
        for each in counts.chunk_passes(family.cache, family.sampler)
        for _ in range(each.count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_host_is_told_at_no_cost_is_near_what_is_counted(name):
    family = FAMILIES[name]
    sizes = Sizes(
        model=WAN_1_3B,
        height=WAN_SIZE[0],
        width=WAN_SIZE[1],
        cache=family.cache,
        sampler=family.sampler,
        batch=1,
        dtype=torch.bfloat16,
        device="cuda",
    )
    parts = footprint(sizes)
    told = counts.stream_bytes(WAN_1_3B, family.cache, family.sampler, PUBLISHED)
    assert told == pytest.approx(parts.cache + parts.prompt + parts.network, rel=0.05)
