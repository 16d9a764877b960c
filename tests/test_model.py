from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rf_core.attention import BACKENDS, attention_backend, available_backends, sdpa
from rf_core.config import Grid, ModelConfig, SamplerConfig
from rf_core.kernels.reference import add_gated
from rf_core.kv_cache import KVCache
from rf_core.layers import Residual
from rf_core.rope import apply_rope, axis_pairs, rope_table
from rf_core.scheduler import add_noise, flow_to_x0, sampling_timesteps, x0_to_flow


def latents(frames: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, frames, 4, 6, generator=torch.Generator().manual_seed(seed))


def cache_for(model) -> KVCache:
    sizes = model.config
    return KVCache.allocate(
        tiny.window(9, 3), num_layers=sizes.num_layers, batch=1, grid=Grid(height=2, width=3),
        num_heads=sizes.num_heads, head_dim=sizes.head_dim, dtype=torch.float32, device="cpu",
    )  # fmt: skip


def test_the_first_chunk_with_a_cache_equals_the_bidirectional_pass():
    model, t = tiny.model(), torch.full((1, 3), 500.0)
    prompt, cache = model.prompt_context(tiny.prompt()), cache_for(model)
    cache.advance()
    streamed = model(latents(), t, prompt, cache)
    torch.testing.assert_close(streamed, model(latents(), t, prompt))


def test_a_pass_under_autograd_equals_a_pass_at_inference_after_evictions():
    model, t = tiny.model(), torch.full((1, 3), 500.0)
    prompt, cache = model.prompt_context(tiny.prompt()), cache_for(model)
    with torch.no_grad():
        for n in range(4):
            cache.advance()
            model(latents(seed=n), torch.zeros(1, 3), prompt, cache)
        cache.advance()
        snapshot = cache.snapshot()
        expected = model(latents(seed=9), t, prompt, cache)
    found = model(latents(seed=9), t, prompt, snapshot)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_a_block_leaves_its_last_sum_to_the_norm_that_reads_it_where_nothing_is_recomputed():
    model, t = tiny.model(), torch.full((1, 3), 500.0)
    prompt = model.prompt_context(tiny.prompt())
    between = []

    def add(block, given, made):
        between.append(made)
        return add_gated(*made) if isinstance(made, Residual) else made

    with torch.no_grad():
        left = model(latents(), t, prompt)
        for block in model.blocks:
            block.register_forward_hook(add)
        assert torch.equal(model(latents(), t, prompt), left)
        assert all(isinstance(made, Residual) for made in between)
    between.clear()
    model(latents(), t, prompt)
    assert len(between) == 2 and all(isinstance(made, torch.Tensor) for made in between)


def test_recomputing_a_pass_after_the_cache_moved_on_gives_the_same_gradients():
    model, t = tiny.model(), torch.full((1, 3), 500.0)
    prompt = model.prompt_context(tiny.prompt())

    def gradients(recompute: bool) -> list[torch.Tensor]:
        model.requires_grad_(True).zero_grad()
        cache, losses = cache_for(model), []
        for n in range(5):
            cache.advance()
            snapshot, x = cache.snapshot(), latents(seed=n)
            args = (model, x, t, prompt, snapshot)
            losses.append(
                (checkpoint(_call, *args, use_reentrant=False) if recompute else _call(*args))
                .square()
                .mean()
            )
            with torch.no_grad():
                model(x, torch.zeros(1, 3), prompt, cache)
        sum(losses).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) > 20
    assert all(map(torch.equal, plain, recomputed))


def _call(model, *args):
    return model(*args)


def test_layers_come_from_the_namespace_that_is_given():
    class Counting:
        made = 0

        def __getattr__(self, name):
            def build(*args, **kwargs):
                Counting.made += 1
                return getattr(nn, name)(*args, **kwargs)

            return build

    from rf_core.model import WanModel

    built = WanModel(tiny.CONFIG, operations=Counting(), dtype=torch.bfloat16, device="meta")
    kinds = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Conv3d)
    assert Counting.made == sum(isinstance(module, kinds) for module in built.modules())
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in built.parameters())


def test_the_published_sizes_give_the_published_parameter_count():
    from rf_core.model import WanModel

    model = WanModel(ModelConfig(), device="meta")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.418e9, rel=1e-3)


def test_fresh_weights_are_finite_and_start_from_a_zero_flow():
    from rf_core.model import WanModel

    model = WanModel(tiny.CONFIG)
    model.initialise(torch.Generator().manual_seed(0))
    assert all(p.isfinite().all() for p in model.parameters())
    flow = model(latents(), torch.zeros(1, 3), model.prompt_context(tiny.prompt()))
    assert torch.equal(flow, torch.zeros_like(flow))


def test_latents_that_patches_do_not_tile_are_refused():
    with pytest.raises(ValueError, match="multiple of 16 and 16 pixels"):
        Grid.of_latents(5, 6, (1, 2, 2))


@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "sdpa"])
def test_other_attention_backends_agree_with_sdpa_where_they_can_run(name):
    if name not in available_backends() or not torch.cuda.is_available():
        pytest.skip(f"{name} needs its package and a CUDA card")
    q, k, v = (torch.randn(1, n, 2, 64, device="cuda").bfloat16() for n in (48, 144, 144))
    found, expected = attention_backend(name)(q, k, v), sdpa(q, k, v)
    torch.testing.assert_close(found, expected, atol=0.1 if name == "sage" else 0.02, rtol=0.1)


def test_sdpa_equals_a_written_out_softmax():
    q, k, v = (torch.randn(2, n, 3, 8) for n in (5, 11, 11))
    scores = torch.einsum("blhd,bshd->bhls", q, k) / 8**0.5
    expected = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v)
    torch.testing.assert_close(sdpa(q, k, v), expected)


def test_an_unknown_or_missing_backend_is_named_with_what_is_there():
    with pytest.raises(ValueError, match="choose one of sdpa"):
        attention_backend("xformers")
    for name in set(BACKENDS) - set(available_backends()):
        with pytest.raises(ValueError, match="not installed"):
            attention_backend(name)


def test_rotary_positions_split_a_head_as_wan_does():
    assert axis_pairs(128) == (22, 21, 21)
    assert [2 * n for n in axis_pairs(48)] == [48 - 4 * (48 // 6), 16, 16]


def test_attention_depends_on_relative_positions_alone():
    grid = Grid(height=1, width=1)
    table = rope_table(300, grid, 48)
    assert table.cos_LP.dtype == torch.float32
    q, k = torch.randn(1, 1, 1, 48), torch.randn(1, 1, 1, 48)

    def score(i: int, j: int) -> torch.Tensor:
        rotated = (apply_rope(q, table.tokens(i, i + 1)), apply_rope(k, table.tokens(j, j + 1)))
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(7, 3), score(290, 286), atol=1e-4, rtol=1e-4)
    assert (score(7, 3) - score(7, 4)).abs() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_forms_of_the_rotation_are_the_same_to_rounding(dtype):
    table = rope_table(3, Grid(height=2, width=3), 48)
    x = torch.randn(2, 18, 4, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    halves = apply_rope(x, table._replace(unit_LP=None))
    torch.testing.assert_close(apply_rope(x, table), halves, atol=1e-6, rtol=1e-2)
    expected = x[1, 7, 2].double()
    cos, sin = table.cos_LP[7].double(), table.sin_LP[7].double()
    real, imaginary = expected[0::2], expected[1::2]
    torch.testing.assert_close(
        halves[1, 7, 2, 0::2].double(), real * cos - imaginary * sin, atol=1e-2, rtol=1e-2
    )
    torch.testing.assert_close(
        halves[1, 7, 2, 1::2].double(), real * sin + imaginary * cos, atol=1e-2, rtol=1e-2
    )


def test_the_published_steps_are_warped_to_the_published_timesteps():
    found = sampling_timesteps(SamplerConfig())
    torch.testing.assert_close(found, torch.tensor([1000, 937.5, 2500 / 3, 625]))


def test_flow_and_clean_sample_lead_back_and_forth():
    x0, noise, t = latents(), latents(seed=1), torch.tensor([[1000.0, 500.0, 20.0]])
    noisy = add_noise(x0, noise, t)
    torch.testing.assert_close(x0_to_flow(x0, noisy, t), noise - x0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(flow_to_x0(noise - x0, noisy, t), x0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": ()}, "at least one"),
        ({"steps": (1000, 1000)}, "must fall"),
        ({"steps": (500, 1000)}, "must fall"),
        ({"steps": (1200,)}, r"leave \(0, 1000\]"),
        ({"shift": 0}, "shift is 0; give a number from"),
    ],
)
def test_impossible_steps_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"num_heads": 7}, {"freq_dim": 31}, {"patch_size": (2, 2, 2)}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError):
        ModelConfig(**wrong)


@pytest.mark.slow
def test_a_compiled_network_does_not_make_the_rotary_table_in_every_pass():
    graphs, model = [], tiny.model()

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    plain = tiny.stream().generate()
    model.compile(backend=backend)
    torch.testing.assert_close(tiny.stream(model=model).generate(), plain)
    assert graphs and not any("arange" in code for code in graphs)
    torch._dynamo.reset()
