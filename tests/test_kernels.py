"""Fused kernels against their definitions: compiled where there is a card, else interpreted."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":  # before triton is first imported, which may be by torch
    os.environ.setdefault("TRITON_INTERPRET", "1")

import tiny  # noqa: E402

from rf_core import kernels, kv_cache  # noqa: E402
from rf_core.config import CacheConfig, Grid  # noqa: E402
from rf_core.decoders import vae as vae_module  # noqa: E402
from rf_core.decoders.codec import FastPaths, put_channels_last  # noqa: E402
from rf_core.decoders.decoder import WanDecoder  # noqa: E402
from rf_core.decoders.vae import VAEConfig, WanVAE  # noqa: E402
from rf_core.kernels import availability, reference  # noqa: E402
from rf_core.model import WanModel  # noqa: E402
from rf_core.padding import log_counts  # noqa: E402
from rf_core.rope import Rope, apply_rope, rope_table  # noqa: E402

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="no kernel is tested here: triton is not installed"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = ((2, 12), (12, 128))  # heads and their channels: a width that is no power of two, and Wan's
FRAMES, TOKENS, BATCH, LAYERS, EPS = 3, 6, 2, 2, 1e-6
ROOT = Path(__file__).parents[1]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_size = pytest.mark.parametrize(("heads", "head_dim"), SIZES)


@pytest.fixture(scope="module")
def triton_kernels() -> Iterator[SimpleNamespace]:
    from rf_core.kernels import (
        triton_attention,
        triton_channels,
        triton_heads,
        triton_norms,
        triton_prompt,
        triton_sink,
    )

    modules = (
        triton_attention,
        triton_channels,
        triton_heads,
        triton_norms,
        triton_prompt,
        triton_sink,
    )
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            message = "triton was imported before TRITON_INTERPRET=1 was set: set it in conftest.py"
            assert interprets(triton_norms), message
            round_as_a_card_does(patch)
            multiply_as_a_card_does(patch)
        yield SimpleNamespace(**{m.__name__.rpartition("_")[2]: m for m in modules})


def interprets(module: ModuleType) -> bool:
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return all(isinstance(fn, InterpretedFunction) for fn in (module._norm, tl.sum))


def round_as_a_card_does(patch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts float32 to bfloat16 off; cards round to the nearest, ties to even."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def nearest(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        rounded = torch.tensor(data).bfloat16().view(torch.int16)
        return rounded.numpy().view("uint16").reshape(data.shape)

    patch.setattr(interpreter, "_convert_float", nearest)


def multiply_as_a_card_does(patch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies bfloat16 as if its bits were integers; cards as float32."""
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def in_float32(builder, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (builder.cast_impl(each, tl.float32) for each in (a, b))
        return multiply(builder, a, b, *rest)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", in_float32)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def exact(*tensors: Tensor) -> list[Tensor]:
    return [tensor.float() for tensor in tensors]


def assert_rounded(got: Tensor, in_float32: Tensor) -> None:
    """Half a unit in the last place from what float32 arithmetic gives, up to that one's noise."""
    half = torch.finfo(got.dtype).eps / 2 if got.dtype != torch.float32 else 1e-5
    torch.testing.assert_close(got.float(), in_float32, rtol=half, atol=1e-5)


def modulation(channels: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Three vectors a frame, as slices of the six that a block computes."""
    return random(BATCH, FRAMES, 6, channels, dtype=dtype, seed=1).split(1, dim=2)[:3]


def projected(channels: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys and values, as slices of one product."""
    return random(BATCH, TOKENS, 3 * channels, dtype=dtype, seed=2).split(channels, dim=2)


def table(head_dim: int, frames: int = FRAMES) -> Rope:
    return rope_table(frames, Grid(height=1, width=TOKENS // FRAMES), head_dim, DEVICE)


def windows(count: int, heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Windows of three chunks in every layer, [N, B, W, H, D]."""
    shape = (LAYERS, BATCH, 3 * TOKENS, heads, head_dim)
    return [random(*shape, dtype=dtype, seed=seed) for seed in range(count)]


def sinks_and_evicted(owned: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The first chunk of each window and the second."""
    sinks = tuple(window[:, :, :TOKENS] for window in owned)
    return sinks, tuple(window[:, :, TOKENS : 2 * TOKENS] for window in owned)


@needs_triton
@each_dtype
@each_size
def test_the_modulated_norm_is_rounded_once(triton_kernels, dtype, heads, head_dim):
    x = random(BATCH, TOKENS, heads * head_dim, dtype=dtype) * 3 + 1
    shift, scale, _ = modulation(heads * head_dim, dtype)
    got = triton_kernels.norms.modulated_norm(x, shift, scale, EPS)
    assert_rounded(got, reference.modulated_norm(*exact(x, shift, scale), EPS))


@needs_triton
@pytest.mark.parametrize("gated", [True, False])
@each_dtype
@each_size
def test_the_norm_after_a_residual_is_that_of_the_stored_residual(
    triton_kernels, dtype, heads, head_dim, gated
):
    channels = heads * head_dim
    x, y = (random(BATCH, TOKENS, channels, dtype=dtype, seed=seed) for seed in (3, 4))
    shift, scale, gate = modulation(channels, dtype)
    gate = gate if gated else None
    weight, bias = (random(channels, dtype=dtype, seed=seed) for seed in (5, 6))
    norms = triton_kernels.norms

    residual, modulated = norms.modulated_after_residual(x, y, gate, shift, scale, EPS)
    same, affine = norms.affine_after_residual(x, y, gate, weight, bias, EPS)

    gate32 = None if gate is None else gate.float()
    assert_rounded(residual, reference.add_gated(*exact(x, y), gate32))
    assert torch.equal(same, residual)
    stored = residual.float()
    assert_rounded(modulated, reference.modulated_norm(stored, *exact(shift, scale), EPS))
    assert_rounded(affine, F.layer_norm(stored, (channels,), *exact(weight, bias), EPS))


@needs_triton
@pytest.mark.parametrize("rotated", [True, False])
@each_dtype
@each_size
def test_queries_are_normed_and_rotated_from_a_slice_of_the_projection(
    triton_kernels, dtype, heads, head_dim, rotated
):
    q, _, _ = projected(heads * head_dim, dtype)
    weight = random(heads * head_dim, dtype=dtype, seed=7)
    rope = table(head_dim, 2 * FRAMES).tokens(TOKENS, 2 * TOKENS) if rotated else None
    got = triton_kernels.heads.norm_rotate(q, weight, heads, EPS, rope)
    assert got.shape == (BATCH, TOKENS, heads, head_dim)
    assert_rounded(got, reference.norm_rotate(*exact(q, weight), heads, EPS, rope))


@needs_triton
@each_dtype
@each_size
def test_keys_and_values_go_to_their_slots_and_nowhere_else(triton_kernels, dtype, heads, head_dim):
    _, k, v = projected(heads * head_dim, dtype)
    weight = random(heads * head_dim, dtype=dtype, seed=7)
    rope = table(head_dim, 2 * FRAMES).tokens(TOKENS, 2 * TOKENS)
    owned = windows(3, heads, head_dim, dtype)
    before = [window.clone() for window in owned]
    slots = [window[1, :, TOKENS : 2 * TOKENS] for window in owned]

    triton_kernels.heads.write_keys_values(k, v, weight, EPS, rope, *slots)

    assert_rounded(slots[0], reference.norm_rotate(*exact(k, weight), heads, EPS))
    assert_rounded(slots[1], apply_rope(slots[0].float(), rope))
    assert torch.equal(slots[2].flatten(2), v)
    for old, slot in zip(before, slots, strict=True):
        old[1, :, TOKENS : 2 * TOKENS] = slot
    assert all(map(torch.equal, before, owned))


@needs_triton
@each_dtype
@each_size
def test_parts_of_attention_are_merged_in_float32_and_rounded_once(
    triton_kernels, dtype, heads, head_dim
):
    rows = random(BATCH, 3, heads, TOKENS, head_dim, dtype=dtype)  # as some kernels leave them
    parts, lse = rows.transpose(2, 3), 50 * random(BATCH, 3, heads, TOKENS)
    got = triton_kernels.attention.merge_parts(parts, lse)
    assert got.is_contiguous()
    assert_rounded(got, reference.merge_parts(*exact(parts), lse))


@needs_triton
@each_dtype
@each_size
def test_the_context_of_all_layers_is_rotated_at_once(triton_kernels, dtype, heads, head_dim):
    k, rotated = windows(2, heads, head_dim, dtype)
    slot = rotated[:, :, 2 * TOKENS :].clone()
    rope = table(head_dim, 3 * FRAMES)
    triton_kernels.heads.rotate_context(k[:, :, : 2 * TOKENS], rope, rotated[:, :, : 2 * TOKENS])
    for layer in range(LAYERS):
        wanted = apply_rope(k[layer].float(), rope)[:, : 2 * TOKENS]
        assert_rounded(rotated[layer, :, : 2 * TOKENS], wanted)
    assert torch.equal(rotated[:, :, 2 * TOKENS :], slot)


@needs_triton
def test_an_empty_context_is_rotated_by_doing_nothing(triton_kernels):
    k, rotated = windows(2, 2, 12, torch.float32)
    before = rotated.clone()
    triton_kernels.heads.rotate_context(k[:, :, :0], table(12), rotated[:, :, :0])
    assert torch.equal(rotated, before)


@pytest.mark.parametrize("fused", [pytest.param(True, marks=needs_triton), False])
@pytest.mark.parametrize("decay", [0.999, 0.9, 1.0])
@each_dtype
def test_the_sink_absorbs_bit_for_bit_as_the_cache_does(request, dtype, decay, fused):
    step = request.getfixturevalue("triton_kernels").sink if fused else reference
    owned = windows(2, 12, 128, dtype)
    config = CacheConfig(decay=decay)
    wanted = [window.clone() for window in owned]
    for which, window in enumerate(wanted):
        for layer in window:
            sink, evicted = layer[:, :TOKENS], layer[:, TOKENS : 2 * TOKENS]
            sink.copy_(
                kv_cache.update_sink(sink, evicted, config, TOKENS // FRAMES, keys=which == 0)
            )
    sinks, evicted = sinks_and_evicted(owned)
    step.update_sink(sinks, evicted, decay)
    assert all(map(torch.equal, owned, wanted))


@pytest.mark.parametrize("fused", [pytest.param(True, marks=needs_triton), False])
@each_dtype
@pytest.mark.parametrize("others", [0, TOKENS], ids=["alone", "beside anchor and memories"])
def test_an_exact_sink_is_kept_in_float32_and_copied_rounded(request, dtype, fused, others):
    step = request.getfixturevalue("triton_kernels").sink if fused else reference
    owned = windows(2, 2, 12, dtype)
    sinks, evicted = sinks_and_evicted(owned)
    head = F.pad(torch.stack(exact(*sinks)) + 1e-4, (0, 0, 0, 0, others, others), value=7.0)
    accumulator = head[:, :, :, others : others + TOKENS]
    wanted = 0.999 * accumulator + (1 - 0.999) * torch.stack(exact(*evicted))
    step.update_sink(sinks, evicted, 0.999, accumulator)
    assert torch.equal(accumulator, wanted)
    assert all(map(torch.equal, sinks, wanted.to(dtype)))
    assert (head[:, :, :, :others] == 7).all() and (head[:, :, :, others + TOKENS :] == 7).all()


LAYOUTS = (torch.contiguous_format, torch.channels_last_3d)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("summands", ["", "bias", "residual", "bias and residual"])
@pytest.mark.parametrize("out_layout", LAYOUTS, ids=["planes", "last"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["planes", "last"])
@pytest.mark.parametrize("channels", [6, 96])
@each_dtype
def test_normed_channels_follow_the_past_frames_in_any_layout(
    triton_kernels, dtype, channels, layout, out_layout, summands
):
    x, bias, residual = summed(channels, layout, out_layout, dtype, summands)
    gamma = random(channels, 1, 1, 1, dtype=dtype, seed=8)
    past = random(BATCH, channels, 2, 5, 11, dtype=dtype, seed=9)
    wider = torch.zeros(BATCH, channels + 2, 5, 5, 11, device=DEVICE, dtype=dtype)
    wider = wider.contiguous(memory_format=out_layout)
    padded = wider[:, :channels]  # as a convolution that reads more channels has it
    padded[:, :, :2] = past
    before, total = x.clone(), in_float32(x, bias, residual)

    triton_kernels.channels.causal_norm_silu(x, gamma, padded, bias, residual)

    assert torch.equal(padded[:, :, :2], past) and not wider[:, channels:].any()
    if residual is None:
        assert torch.equal(x, before)
    else:
        assert_rounded(x, total)
        total = x.float()
    assert_rounded(padded[:, :, 2:], F.silu(reference.channel_norm(total, gamma.float())))


@needs_triton
@pytest.mark.parametrize("summands", ["", "bias", "residual", "bias and residual"])
@pytest.mark.parametrize("other_layout", LAYOUTS, ids=["planes", "last"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["planes", "last"])
@each_dtype
def test_a_sum_is_rounded_once_and_written_over_its_first_summand(
    triton_kernels, dtype, layout, other_layout, summands
):
    x, bias, residual = summed(6, layout, other_layout, dtype, summands)
    total = in_float32(x, bias, residual)
    triton_kernels.channels.add_in_place(x, bias, residual)
    assert_rounded(x, total)


def summed(
    channels: int,
    layout: torch.memory_format,
    other_layout: torch.memory_format,
    dtype: torch.dtype,
    summands: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A tensor in one layout, and what is to be added to it."""
    shape = (BATCH, channels, 3, 5, 11)
    x = random(*shape, dtype=dtype).contiguous(memory_format=layout)
    bias = random(channels, dtype=dtype, seed=10) if "bias" in summands else None
    residual = random(*shape, dtype=dtype, seed=11).contiguous(memory_format=other_layout)
    return x, bias, residual if "residual" in summands else None


def in_float32(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Their sum, in the kernel's order."""
    total = x.float()
    if bias is not None:
        total = total + bias.float().view(-1, 1, 1, 1)
    return total if residual is None else total + residual.float()


def prompt_of(lengths: tuple[int, ...], text_len: int, heads: int, head_dim: int, dtype):
    """Keys, values and counts of prompts of several lengths; what counts for nothing is NaN."""
    shape = (len(lengths), text_len, heads, head_dim)
    k, v = (random(*shape, dtype=dtype, seed=seed) for seed in (11, 12))
    last = torch.tensor(lengths, device=DEVICE).clamp(max=text_len - 1)
    bias = log_counts(last, text_len, text_len)
    for unseen in (k, v):
        unseen[bias == -torch.inf] = torch.nan
    return k, v, bias


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("tokens", [6, 130])  # fewer than a tile has, and more
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 12), (3, 128), (4, 40)])  # a program a head
@each_dtype
def test_the_prompt_is_attended_to_as_often_as_its_keys_count(
    triton_kernels, dtype, heads, head_dim, tokens
):
    lengths, text_len = (0, 17, 31, 32, 77, 95, 96), 96
    k, v, bias = prompt_of(lengths, text_len, heads, head_dim, dtype)
    wide = random(len(lengths), tokens, 3, heads, head_dim, dtype=dtype, seed=13)
    q = wide[:, :, 1]  # a slice of a wider projection
    got = triton_kernels.prompt.prompt_attention(q, k, v, bias)
    wanted = reference.prompt_attention(
        *(each.double().nan_to_num() for each in (q, k, v)), bias.double()
    )
    # Shares are rounded to the values' precision before they are multiplied, as in any attention.
    within = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for one, other in zip(got.double(), wanted, strict=True):
        assert (one - other).norm() < within * other.norm()
    assert got.shape == q.shape and got.dtype == dtype


@needs_triton
def test_a_prompt_in_the_place_of_a_longer_one_leaves_nothing_of_it(triton_kernels):
    attend = triton_kernels.prompt.prompt_attention
    q = random(1, TOKENS, 2, 24)
    alone = prompt_of((5,), 40, 2, 24, torch.float32)
    place = prompt_of((39,), 40, 2, 24, torch.float32)
    attend(q, *place)
    for there, new in zip(place, alone, strict=True):
        there.copy_(new)
    assert torch.equal(attend(q, *place), attend(q, *alone))


def test_heads_wider_than_a_tile_are_left_to_the_definition(monkeypatch):
    monkeypatch.setattr(kernels, "fused", lambda *_: True)
    k, v, bias = prompt_of((3,), 8, 1, 2 * kernels.WIDEST_HEAD, torch.float32)
    k, v, q = k.nan_to_num(), v.nan_to_num(), random(1, TOKENS, 1, 2 * kernels.WIDEST_HEAD)
    expected = reference.prompt_attention(q, k, v, bias)
    assert torch.equal(kernels.prompt_attention(q, k, v, bias), expected)


def test_the_definitions_are_the_textbook_s():
    x, y = (random(BATCH, TOKENS, 24, seed=seed).double() for seed in (3, 4))
    shift, scale, gate = (t.double() for t in modulation(24, torch.float32))
    each = [t.repeat_interleave(TOKENS // FRAMES, dim=1).squeeze(2) for t in (shift, scale, gate)]
    summed = x + y * each[2]
    normed = (summed - summed.mean(2, keepdim=True)) / (
        summed.var(2, correction=0, keepdim=True) + EPS
    ).sqrt()
    residual, modulated = reference.modulated_after_residual(x, y, gate, shift, scale, EPS)
    torch.testing.assert_close(residual, summed)
    torch.testing.assert_close(modulated, normed * each[1] + each[0])

    q, k, v = (random(1, 5, 2, 6, seed=seed).double() for seed in (5, 6, 7))
    counts = torch.tensor([[1, 3, 0, 1, 2]], device=DEVICE)
    again = [each[:, [0, 1, 1, 1, 3, 4, 4]] for each in (k, v)]
    scores = torch.einsum("blhd,bshd->bhls", q, again[0]) / 6**0.5
    attended = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), again[1])
    found = reference.prompt_attention(q, k, v, counts.double().log())
    torch.testing.assert_close(found, attended)

    clip, gamma = random(1, 6, 2, 3, 4).double(), random(6, 1, 1, 1).double()
    scaled = clip / clip.square().mean(1, keepdim=True).sqrt() * gamma
    padded = torch.zeros(1, 6, 4, 3, 4, device=DEVICE).double()
    reference.causal_norm_silu(clip, gamma, padded)
    torch.testing.assert_close(padded[:, :, 2:], scaled / (1 + (-scaled).exp()))
    assert not padded[:, :, :2].any()

    bias, residual = random(6, seed=1).double(), random(1, 6, 2, 3, 4, seed=2).double()
    summed = clip + bias.view(-1, 1, 1, 1) + residual
    for normed, given in ((clip + bias.view(-1, 1, 1, 1), None), (summed, residual)):
        scaled = normed / normed.square().mean(1, keepdim=True).sqrt() * gamma
        reference.causal_norm_silu(clip, gamma, padded, bias, given)
        torch.testing.assert_close(padded[:, :, 2:], scaled / (1 + (-scaled).exp()))
    torch.testing.assert_close(clip, summed)


def arguments() -> dict[str, tuple]:
    """What each public function takes, in small."""
    x, y, _ = projected(24, torch.float32)
    after = (x.contiguous(), y.contiguous())
    shift, scale, gate = modulation(24, torch.float32)
    weight, bias, rope = random(24, seed=7), random(24, seed=8), table(12)
    k, rotated, v = windows(3, 2, 12, torch.float32)
    slots = [window[0, :, :TOKENS] for window in (k, rotated, v)]
    clip, padded = random(1, 6, 2, 3, 4), random(1, 6, 4, 3, 4)
    return {
        "modulated_norm": (after[0], shift, scale, EPS),
        "modulated_after_residual": (*after, gate, shift, scale, EPS),
        "affine_after_residual": (*after, None, weight, bias, EPS),
        "norm_rotate": (x, weight, 2, EPS, rope),
        "write_keys_values": (x, y, weight, EPS, rope, *slots),
        "rotate": (random(BATCH, TOKENS, 2, 12), table(12)),
        "rotate_context": (k, table(12, 3 * FRAMES), rotated),
        "update_sink": (*sinks_and_evicted([k, v]), 0.9),
        "prompt_attention": (
            random(BATCH, TOKENS, 2, 12),
            *(each.nan_to_num() for each in prompt_of((3, 10), 10, 2, 12, torch.float32)[:2]),
            prompt_of((3, 10), 10, 2, 12, torch.float32)[2],
        ),
        "quantise_rows": (after[0], torch.int8),
        "causal_norm_silu": (clip, random(6, 1, 1, 1), padded, random(6), clip * 2),
        "add_in_place": (clip, random(6), clip * 2),
        "merge_parts": (random(BATCH, 3, TOKENS, 2, 12), random(BATCH, 3, 2, TOKENS)),
        "linear_gelu": (after[0], random(48, 24), random(48, seed=8)),
    }


def run(name: str) -> list[Tensor]:
    """Everything a function returns and, after it, all it was given."""
    given = arguments()[name]
    result = getattr(kernels, name)(*given)
    return [leaf for leaf in tree_leaves((result, given)) if isinstance(leaf, Tensor)]


@needs_triton
@pytest.mark.parametrize("name", kernels.__all__)
def test_either_implementation_is_reached_and_gives_the_same(triton_kernels, monkeypatch, name):
    with availability.unfused():
        wanted = run(name)
    for question in ("fused", "in_product"):
        monkeypatch.setattr(kernels, question, lambda *_: True)
    monkeypatch.delattr(reference, name)
    other_gelu = name == "linear_gelu" and DEVICE == "cpu"  # by the error function
    tolerance = 1e-3 if other_gelu else 1e-5
    torch.testing.assert_close(run(name), wanted, rtol=tolerance, atol=tolerance)


class Seen(TorchDispatchMode):
    """Which operations were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gelu_is_left_to_the_product_in_half_precision_alone(dtype):
    def called() -> bool:
        with FakeTensorMode(), Seen() as seen:
            place = {"device": "cuda", "dtype": dtype}
            x, weight, bias = (torch.empty(*n, **place) for n in ((2, 3, 16), (32, 16), (32,)))
            assert kernels.linear_gelu(x, weight, bias).shape == (2, 3, 32)
        alone = "aten::gelu" in seen.names
        assert alone != ("aten::_addmm_activation" in seen.names)
        return not alone

    assert not called()  # gradients
    with torch.no_grad():
        assert called() == (dtype != torch.float32)
        with availability.unfused():
            assert not called()


@pytest.mark.skipif(DEVICE == "cpu", reason="on a CPU torch's product has the other form of GELU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_on_a_card_gelu_in_the_product_is_no_further_from_exact_than_after_it(dtype):
    given = random(300, 256), random(512, 256) / 16, random(512, seed=8)
    given = [t.to(dtype) for t in given]
    exactly = reference.linear_gelu(*(t.double() for t in given))
    within, after = (f(*given).double() for f in (kernels.linear_gelu, reference.linear_gelu))
    assert (within - exactly).norm() <= 1.05 * (after - exactly).norm()


@torch.no_grad()
def test_a_feed_forward_layer_that_is_watched_or_a_host_s_is_called_as_a_module(monkeypatch):
    x, joined = random(1, 6, 48).cpu(), []

    def spy(*given: Tensor) -> Tensor:
        joined.append(given)
        return reference.linear_gelu(*given)

    monkeypatch.setattr(kernels, "linear_gelu", spy)
    (block, _), wanted = tiny.model().blocks, tiny.model().blocks[0].ffn(x)
    assert torch.equal(block._fed_forward(x), wanted) and len(joined) == 1
    for part in (block.ffn, block.ffn[0], block.ffn[1]):
        for listen in (part.register_forward_hook, part.register_forward_pre_hook):
            heard = []
            handle = listen(lambda *_, heard=heard: heard.append(1))
            assert torch.equal(block._fed_forward(x), wanted) and heard and len(joined) == 1
            handle.remove()
    assert torch.equal(hosted().blocks[0]._fed_forward(x), wanted) and len(joined) == 1
    handle = block.ffn[2].register_forward_hook(lambda *_: heard.append(2))
    assert torch.equal(block._fed_forward(x), wanted) and heard[-1] == 2 and len(joined) == 2


class Host(SimpleNamespace):
    """A namespace of layers that are not torch's own classes, as ComfyUI's."""

    Linear, LayerNorm, RMSNorm, Conv3d = (
        type(layer.__name__, (layer,), {})
        for layer in (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Conv3d)
    )


def hosted() -> WanModel:
    network = WanModel(tiny.CONFIG, operations=Host)
    network.load_state_dict(tiny.model().state_dict())
    return network.eval().requires_grad_(False)


def streamed(model=tiny.model, **options) -> Tensor:
    """Latents past an eviction and a change of prompt."""
    stream = tiny.stream(model=model().to(DEVICE), height=16, width=32, **options)
    made = [stream.generate() for _ in range(3)]
    stream.switch(tiny.prompt(7), "recache")
    return torch.cat([*made, stream.generate()], dim=2)


DECODING = {"_activate", "_convolve_for_norm", "causal_norm_silu", "add_in_place"}


@torch.no_grad()
def decoded(layout: Callable[[nn.Module], None] = put_channels_last) -> Tensor:
    """Two chunks of images, decoded as on a card."""
    torch.manual_seed(0)
    plain = {"latent_mean": (0.0,) * 4, "latent_std": (1.0,) * 4}
    vae = WanVAE(VAEConfig(dim=8, z_dim=4, num_res_blocks=1, **plain)).to(DEVICE)
    vae.fast_paths = FastPaths.on(torch.device("cuda"))
    layout(vae)
    decoder, state, made = WanDecoder(vae.eval()), None, []
    for chunk in range(2):
        images, state = decoder.decode(random(1, 4, 3, 2, 2, seed=chunk), state)
        made.append(images)
    return torch.cat(made, dim=1)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (
            lambda: streamed(cache=tiny.window(6, 3)),
            {"modulated_after_residual", "norm_rotate", "write_keys_values", "update_sink"},
        ),
        (
            lambda: streamed(
                cache=tiny.window(6, 2, chunk=2, accumulator="float32"), keep_rotated=False
            ),
            {"modulated_after_residual", "norm_rotate", "update_sink"},
        ),
        (
            lambda: streamed(cache=tiny.window(6, 3), prompt_embeds=tiny.prompt(tokens=3)),
            {"prompt_attention"},
        ),
        (lambda: streamed(cache=tiny.window(6, 3, storage="int8")), {"quantise_rows"}),
        (lambda: streamed(hosted, cache=tiny.window(6, 3)), {"modulated_norm"}),
        (decoded, DECODING),
        (lambda: decoded(layout=nn.Module.eval), DECODING),
    ],
    ids=[
        *("published", "float32 sink, keys rotated again", "a short prompt"),
        *("int8", "a host's layers"),
        *("decoder", "decoder, in planes"),
    ],
)
def test_whole_streams_through_the_kernels_are_those_of_the_definitions(
    triton_kernels, monkeypatch, run, expected
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with availability.unfused():
        wanted = run()
    asked = set()

    def through(*tensors: Tensor) -> bool:
        asked.add(sys._getframe(1).f_code.co_name)
        return not torch.is_grad_enabled()

    for module in (kernels, vae_module):
        monkeypatch.setattr(module, "fused", through)
    made = run()
    assert (made - wanted).norm() < 1e-5 * wanted.norm()
    assert expected <= asked


def on_a_card(*dtypes: torch.dtype) -> list[Tensor]:
    with FakeTensorMode():
        return [torch.empty(2, 3, device="cuda", dtype=dtype) for dtype in dtypes]


def test_kernels_take_tensors_of_one_dtype_on_a_capable_card_without_gradients(monkeypatch):
    monkeypatch.setattr(availability, "triton_runs_on", lambda device: True)
    with torch.no_grad():
        assert availability.fused(*on_a_card(torch.bfloat16, torch.bfloat16))
        assert not availability.fused(*on_a_card(torch.bfloat16, torch.float32))
        assert not availability.fused(*on_a_card(torch.float64))
        assert not availability.fused(torch.empty(2, 3))
    assert not availability.fused(*on_a_card(torch.bfloat16))
    monkeypatch.setattr(availability, "triton_runs_on", lambda device: False)
    with torch.no_grad():
        assert not availability.fused(*on_a_card(torch.bfloat16))


def test_a_comparison_switches_every_kernel_off_and_on_again(monkeypatch):
    for name in ("triton_runs_on", "kitchen_runs_on"):
        monkeypatch.setattr(availability, name, lambda device: True)
    (x,) = on_a_card(torch.bfloat16)
    with torch.no_grad():
        with pytest.raises(KeyError), availability.unfused():
            with availability.unfused():
                assert not availability.fused(x) and not availability.in_kitchen(x)
            assert not availability.fused(x) and not availability.in_kitchen(x)
            raise KeyError
        assert availability.fused(x) and availability.in_kitchen(x)


@pytest.mark.parametrize(
    ("package", "capability", "reason"),
    [
        (None, (9, 0), "triton is not installed"),
        (object(), (7, 5), r"compute capability is \(7, 5\)"),
        (object(), (9, 0), "no C compiler"),
    ],
)
def test_what_keeps_the_kernels_off_is_said_once(monkeypatch, caplog, package, capability, reason):
    def fail(device: torch.device) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(availability, "find_spec", lambda name: package)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(availability, "_compile_one", fail)
    availability.triton_runs_on.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not availability.triton_runs_on(torch.device("cuda:0"))
    availability.triton_runs_on.cache_clear()
    (record,) = caplog.records
    assert re.search(reason, record.getMessage())


def compile_for_a_card() -> None:
    """Every kernel to machine code of an H100, which needs no card; run in a process of its own."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rf_core.kernels import (
        triton_attention,
        triton_channels,
        triton_heads,
        triton_norms,
        triton_prompt,
        triton_sink,
    )

    row = {"C": 24, "BLOCK": 32}
    plane = {"C": 96, "BLOCK": 128, "POSITIONS": 32, "x_c": 1, "residual_c": 1}
    plane |= {"BIASED": True, "ADD": True}
    flags = {"ADD": True, "GATED": True, "ROWS": False}
    for kernel, constants in (
        (triton_norms._norm, row | flags),
        (triton_heads._norm_rotate, row | {"PAIRS": 6, "ROTATE": True}),
        (triton_heads._write_keys_values, row | {"PAIRS": 6}),
        (triton_heads._rotate_context, row | {"PAIRS": 6}),
        (triton_sink._update_sink, row | {"EXACT": True}),
        (triton_channels._causal_norm_silu, plane | {"LEAST": 1e-12, "out_c": 1}),
        (triton_channels._add_in_place, plane),
        (triton_attention._merge_parts, {"N": 2, "H": 12, "D": 128, "ROWS": 16, "COLUMNS": 128}),
    ):
        signature = {n: argument_type(n, constants) for n in kernel.arg_names}
        source = ASTSource(kernel, signature, constants)
        compiled = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}
        )
        assert compiled.asm["cubin"] and "fma.rn.f32" not in compiled.asm["ptx"], kernel
    compile_prompt_attention(triton_prompt)


def compile_prompt_attention(module: ModuleType) -> None:
    """At a Wan's sizes and the demo's, with products in tensor cores where they are there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = module._prompt_attention
    for dtype, capability, product in (
        (torch.bfloat16, 80, "mma.sync"),
        (torch.bfloat16, 90, "wgmma"),
        (torch.float32, 90, "fma.rn.f32"),  # and no TF32
    ):
        sizes = module.tile_sizes(dtype)
        tile = {name: sizes.pop(name) for name in ("ROWS", "KEYS")}
        for head_dim, block in ((128, 128), (40, 64)):
            constants = {"MAX_KEYS": 512, "D": head_dim, "BLOCK": block, **tile}
            signature = {name: argument_type(name, constants, dtype) for name in kernel.arg_names}
            target = GPUTarget("cuda", capability, 32)
            source = ASTSource(kernel, signature, constants)
            compiled = triton.compile(source, target=target, options=dict(sizes))
            assert compiled.asm["cubin"] and product in compiled.asm["ptx"], (dtype, capability)
            assert "tf32" not in compiled.asm["ptx"]
            assert compiled.metadata.shared <= 99 * 1024, "what the smallest of these cards has"


def argument_type(
    name: str, constants: dict[str, object], dtype: torch.dtype = torch.bfloat16
) -> str:
    if name in constants:
        return "constexpr"
    if name.endswith("_ptr"):
        singles = ("cos_ptr", "sin_ptr", "k_exact_ptr", "v_exact_ptr", "lse_ptr", "bias_ptr")
        return "*fp32" if dtype == torch.float32 or name in singles else "*bf16"
    numbers = ("eps", "kept", "taken", "root", "inverse_largest", "least_unit", "scale")
    return "fp32" if name in numbers else "i32"


@pytest.mark.slow
@needs_triton
def test_every_kernel_compiles_for_a_card_and_rounds_products_before_adding(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import test_kernels; test_kernels.compile_for_a_card()"],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("on_triton", [False, True])
@pytest.mark.parametrize("backend", [{}, {"available": False}, {"available": True}])
def test_comfy_kitchen_stands_in_where_its_cuda_kernels_run_and_triton_does_not(
    monkeypatch, on_triton: bool, backend: dict[str, bool]
) -> None:
    package = ModuleType("comfy_kitchen")
    package.list_backends = lambda: {
        "cuda": backend | {"capabilities": ["adaln", "apply_rope1", "quantize_mxfp8"]}
    }
    monkeypatch.setitem(sys.modules, "comfy_kitchen", package)
    monkeypatch.setattr(availability, "find_spec", lambda name: package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(availability, "triton_runs_on", lambda device: on_triton)
    availability.kitchen_runs_on.cache_clear()
    stands_in = backend.get("available", False) and not on_triton
    with torch.no_grad():
        half, single = on_a_card(torch.bfloat16, torch.float32)
        assert availability.in_kitchen(half) == stands_in
        assert not availability.in_kitchen(single)
    assert not availability.in_kitchen(half)  # gradients
    availability.kitchen_runs_on.cache_clear()


def large() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 48, 160), (640, 160), (640,)
    return tuple(torch.randn(shape, generator=generator) / 4 for shape in shapes)


@pytest.fixture
def by_onednn(monkeypatch):
    if not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(availability, "onednn_multiplies", lambda: True)
    monkeypatch.setattr(availability, "_MIN_FOR_ONEDNN", 0)


@torch.no_grad()
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_a_linear_layer_by_onednn_is_the_product_it_stands_for(by_onednn, gelu, biased, strided):
    x, weight, bias = large()
    if strided:
        x = x.transpose(0, 1)
    assert availability.in_onednn(x, weight)
    product = reference.linear_gelu if gelu else reference.linear
    made = product(x, weight, bias if biased else None)
    exact = F.linear(x.double(), weight.double(), bias.double() if biased else None)
    exact = F.gelu(exact, approximate="tanh") if gelu else exact
    torch.testing.assert_close(made.double(), exact, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_onednn_makes_large_float32_products_where_mkl_knows_no_avx512(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    availability.onednn_multiplies.cache_clear()
    x, weight, _ = large()

    def made(capability: str, name: str | None, x=x, weight=weight) -> bool:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(availability, "cpu_facts", lambda: {"cpu_name": name})
        availability.onednn_multiplies.cache_clear()
        return availability.in_onednn(x, weight)

    try:
        assert made("AVX512", "AMD EPYC")
        assert not made("AVX2", "AMD EPYC")
        assert not made("AVX512", "Intel Xeon Gold")
        assert not made("AVX512", None)  # a torch that cannot tell
        assert not made("AVX512", "AMD EPYC", x[:, :2])
        assert not made("AVX512", "AMD EPYC", x.bfloat16(), weight.bfloat16())
        with torch.enable_grad():
            assert not made("AVX512", "AMD EPYC")
    finally:
        availability.onednn_multiplies.cache_clear()
