"""The faster forms of the decoders' steps, each against its definition."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rf_core import kernels
from rf_core.decoders import codec as codec_module
from rf_core.decoders import vae as vae_module
from rf_core.decoders.codec import (
    Codec,
    FastPaths,
    convolve_in_phases,
    convolve_upsampled,
    put_channels_last,
)
from rf_core.decoders.decoder import WanDecoder
from rf_core.decoders.taehv import TAEHV, TAEHVConfig
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.memory.live_bytes import peak_bytes

ON_A_CARD = FastPaths.on(torch.device("cuda"))
FORMS = [field.name for field in fields(FastPaths)]
LAYOUTS = (torch.contiguous_format, torch.channels_last)
HALVES = (torch.bfloat16, torch.float16)


def small_vae(**place: Any) -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(VAEConfig(dim=12, num_res_blocks=1), **place).eval().requires_grad_(False)


def small_taehv() -> TAEHV:
    torch.manual_seed(0)
    config = TAEHVConfig(decoder_widths=(32, 16, 16, 16), encoder_width=16)
    return TAEHV(config).eval().requires_grad_(False)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def streamed(codec: Codec, fast_paths: FastPaths) -> Tensor:
    codec.fast_paths, state, made = fast_paths, None, []
    for chunk in range(2):
        latents = random(1, 16, 3, 4, 5, seed=chunk).to(next(codec.parameters()))
        pixels, state = codec.decode_chunk(latents, state)
        made.append(pixels)
    return torch.cat(made, dim=2)


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("make", [small_vae, small_taehv], ids=["wan", "taehv"])
@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_a_stream_is_the_same_in_every_form(make, name: str) -> None:
    codec = make()
    got = streamed(codec, replace(FastPaths(), **{name: True}))
    torch.testing.assert_close(got, streamed(codec, FastPaths()), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
@pytest.mark.parametrize("make", [small_vae, small_taehv], ids=["wan", "taehv"])
@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_on_a_card_every_form_is_as_near_to_exact_as_the_definition(make, name: str) -> None:
    exact = streamed(make().double(), FastPaths())
    codec = make().to("cuda", torch.bfloat16)
    put_channels_last(codec)
    plain, got = (
        error(streamed(codec, fast_paths).cpu(), exact)
        for fast_paths in (FastPaths(), replace(FastPaths(), **{name: True}))
    )
    assert 0 < got < 1.5 * plain < 0.1


def test_a_codec_takes_the_forms_of_the_device_or_those_it_was_given() -> None:
    codec, x = small_vae(), torch.zeros(1)
    assert codec.fast_paths_for(x) == FastPaths.on(torch.device("cpu")) != ON_A_CARD
    codec.fast_paths = FastPaths(fill_inputs=True)
    assert codec.fast_paths_for(x) == codec.fast_paths_for(x.to("meta")) == codec.fast_paths


def test_meta_tensors_take_the_fast_paths_of_a_card_and_other_devices_none() -> None:
    assert FastPaths.on(torch.device("meta")) == ON_A_CARD != FastPaths()
    assert FastPaths.on(torch.device("mps")) == FastPaths()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["planes", "last"])
@torch.no_grad()
def test_four_phases_are_the_convolution_of_doubled_pixels(layout, bias: bool) -> None:
    conv = nn.Conv2d(5, 6, 3, padding=1, bias=bias)
    x = random(2, 5, 3, 7).contiguous(memory_format=layout)
    got = convolve_in_phases(conv, x)
    expected = conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert got.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype)[6:])
@torch.no_grad()
def test_folded_taps_are_summed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    weight = random(6, 5, 3, 3).to(dtype)
    kernels = codec_module._phase_kernels(weight)
    assert kernels.dtype == dtype
    assert torch.equal(kernels, codec_module._phase_kernels(weight.float()).to(dtype))


@torch.no_grad()
def test_folding_in_half_precision_costs_no_more_than_rounding_weights_does() -> None:
    conv, x = nn.Conv2d(64, 32, 3, padding=1).bfloat16(), random(1, 64, 12, 9).bfloat16()
    exact = F.conv2d(
        F.interpolate(x.double(), scale_factor=2), conv.weight.double(), conv.bias.double(), 1, 1
    )
    folded, plain = convolve_in_phases(conv, x), convolve_upsampled(conv, x, FastPaths())
    assert 0 < error(folded, exact) < 2 * error(plain, exact) < 0.01


@torch.no_grad()
def test_what_3d_convolutions_read_is_filled_up_with_zeros_and_its_past_is_not(monkeypatch) -> None:
    vae = WanVAE(VAEConfig(dim=48, num_res_blocks=1), dtype=torch.bfloat16)
    put_channels_last(vae)
    latents, taken = random(1, 16, 2, 2, 3).bfloat16(), []
    plain = vae.decode_chunk(latents, None)
    run = vae_module._convolve_with
    monkeypatch.setattr(
        vae_module,
        "_convolve_with",
        lambda conv, x, bias: (taken.append(x.shape[1]), run(conv, x, bias))[1],
    )
    vae.fast_paths = FastPaths(fill_inputs=True)
    filled = vae.decode_chunk(latents, None)
    # Of 48 channels two blocks and the head, of 96 two and the first half of one; none takes 48.
    assert (taken.count(64), taken.count(128), taken.count(48)) == (5, 5, 0)
    torch.testing.assert_close(filled[0], plain[0], atol=0.02, rtol=0.02)
    for key, past in plain[1].tensors.items():
        assert filled[1].tensors[key].shape == past.shape
        assert filled[1].tensors[key].stride() == past.stride()


@pytest.mark.parametrize(
    ("channels", "dtype", "taken"),
    [
        (96, torch.bfloat16, 128),
        (96, torch.float32, 96),  # which cuDNN takes in fours
        (128, torch.bfloat16, 128),
        (16, torch.bfloat16, 16),  # four times the work is no gain
    ],
)
def test_inputs_are_filled_where_it_is_little_and_helps(channels: int, dtype, taken: int) -> None:
    conv, x = nn.Conv3d(channels, 3, 3), torch.empty(1, channels, 1, 1, 1, dtype=dtype)
    assert vae_module.channels_for(conv, x, ON_A_CARD) == taken


class Hosted:
    """A namespace of layers that are not torch's own classes, as ComfyUI's."""

    Conv2d, Conv3d = (type(c.__name__, (c,), {}) for c in (nn.Conv2d, nn.Conv3d))


@torch.no_grad()
def test_a_host_s_layers_run_as_themselves_in_every_form(monkeypatch) -> None:
    vae = small_vae(operations=Hosted)
    monkeypatch.delattr(vae_module, "_convolve_with")
    monkeypatch.delattr(codec_module, "convolve_in_phases")
    assert streamed(vae, ON_A_CARD).isfinite().all()


def test_with_gradients_a_card_takes_forms_that_have_them(monkeypatch) -> None:
    monkeypatch.delattr(codec_module, "convolve_in_phases")
    vae, latents = small_vae(device="meta"), torch.empty(1, 16, 2, 2, 3, device="meta")
    assert vae.decode(latents.requires_grad_()).requires_grad
    with torch.no_grad(), pytest.raises(NameError, match="convolve_in_phases"):
        vae.decode(latents)


class Convolutions(TorchDispatchMode):
    """Notes the outputs of every 3x3x3 convolution, and whether it has a bias; and every sum."""

    def __init__(self) -> None:
        super().__init__()
        self.biased: list[int] = []
        self.unbiased: list[int] = []
        self.sums = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and args[1].shape[2:] == (3, 3, 3):
            (self.unbiased if args[2] is None else self.biased).append(args[1].shape[0])
        if func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor):
            self.sums += args[0].ndim == 5 and args[0].shape[1] == args[1].shape[1]
        return func(*args, **(kwargs or {}))


def as_fused(monkeypatch) -> list[str]:
    """Take a card's fused paths on `meta`; their kernels do nothing, and are noted."""
    ran: list[str] = []
    monkeypatch.setattr(vae_module, "fused", lambda *_: True)
    for name in ("causal_norm_silu", "add_in_place"):
        monkeypatch.setattr(kernels, name, lambda *_, name=name: ran.append(name))
    return ran


@torch.no_grad()
def test_on_a_card_no_residual_block_takes_a_pass_for_a_bias_or_a_shortcut(monkeypatch) -> None:
    vae, latents = small_vae(device="meta"), torch.empty(1, 16, 3, 4, 6, device="meta")
    _, state = vae.decode_chunk(latents, None)
    with Convolutions() as plain:
        vae.decode_chunk(latents, state.fork())
    ran = as_fused(monkeypatch)
    with Convolutions() as found:
        vae.decode_chunk(latents, state)
    blocks = [m for m in vae.decoder.modules() if isinstance(m, vae_module.ResidualBlock)]
    assert len(found.unbiased) == 2 * len(blocks) and len(found.biased) == 2  # its two ends
    assert plain.unbiased == [] and plain.sums - found.sums >= len(blocks)
    # Two norms a block and the head's; a sum for attention and for each of three doublings.
    assert sorted(ran) == ["add_in_place"] * 4 + ["causal_norm_silu"] * (2 * len(blocks) + 1)


@pytest.mark.slow
@pytest.mark.parametrize("group", [3, 1])
def test_what_is_planned_for_a_card_without_fused_kernels_is_enough_with_them(
    monkeypatch, group: int
) -> None:
    vae = WanVAE(VAEConfig(), device="meta", dtype=torch.bfloat16).requires_grad_(False)
    put_channels_last(vae)
    decoder, latents = WanDecoder(vae, group), torch.empty(1, 16, 3, 60, 104, device="meta")

    def two_chunks() -> None:
        decoder.decode(latents, decoder.decode(latents, None)[1])

    planned = peak_bytes(two_chunks, "meta")
    as_fused(monkeypatch)
    assert 0.5 * planned < peak_bytes(two_chunks, "meta") <= planned
