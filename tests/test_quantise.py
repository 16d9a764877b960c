"""Eight bits: rows, linear layers and the cache, each against what it approximates."""

from __future__ import annotations

import copy
import logging
import os
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import test_kernels
import tiny
import torch
from safetensors.torch import save_file
from test_graphs import Recorder
from torch import Tensor, nn

from rf_core import fp8, kernels, layers
from rf_core.config import WAN_1_3B, CacheConfig, Grid
from rf_core.fast.graphs import GraphedModel
from rf_core.fast.quantise import quantise_linears
from rf_core.fp8 import FP8, Fp8Linear, reference_product, scaled_product
from rf_core.kernels import availability, quantise_rows, reference
from rf_core.kv_cache import KVCache
from rf_core.kv_int8 import Int8KVCache
from rf_core.measure import counts
from rf_core.memory.offload import stream_layers
from rf_core.model import WanModel
from rf_core.rope import apply_rope, rope_table
from rf_core.stream import Stream
from rf_core.weights.checkpoint import load_student, write_checkpoint
from rf_core.weights.lora import Lora

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
GRID = Grid(height=1, width=2)
TOKENS, LAYERS, HEADS, HEAD_DIM = GRID.frame_tokens, 2, 2, 8
WINDOWS = (tiny.window(9, 3), tiny.window(6, 0), tiny.window(7, 2), tiny.window(9, 5, chunk=2))

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="no kernel is tested here: triton is not installed"
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_target = pytest.mark.parametrize("target", [FP8, torch.int8], ids=["fp8", "int8"])
each_device = pytest.mark.parametrize("device", ["cpu", "cuda"])
each_window = pytest.mark.parametrize("config", WINDOWS, ids=["9 3", "6 0", "7 2", "9 5"])


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def must_multiply_fp8(device: str) -> None:
    """Skip where there is no such product, and say why."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA card")
    if device == "cuda" and not availability.multiplies_fp8(torch.device("cuda", 0)):
        pytest.skip("this card does not multiply fp8")
    if device == "cpu":  # where the network does without: torch 2.11 has one scale a tensor alone
        eye, one = torch.eye(16).to(FP8), torch.ones(16, 1)
        try:
            torch._scaled_mm(eye, eye.t(), one, one.t(), out_dtype=torch.float32)
        except (RuntimeError, NotImplementedError) as error:
            pytest.skip(f"torch {torch.__version__} has no such product on the CPU: {error}")


def linear(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)
    for number, parameter in enumerate(layer.parameters()):
        parameter.copy_(random(*parameter.shape, seed=10 + number))
    return layer


def plain_rows(x: Tensor, target: torch.dtype) -> tuple[Tensor, Tensor]:
    """The definition, one row at a time."""
    part = 1 / 448 if target == FP8 else 1 / 127
    scales = torch.stack([row.abs().max() * part for row in x.float()])
    rows = torch.stack([row * (1 / scale) for row, scale in zip(x.float(), scales, strict=True)])
    return (rows.round() if target == torch.int8 else rows).to(target), scales[:, None]


# Rows


@each_target
@each_dtype
def test_every_row_is_counted_in_parts_of_its_own_largest_magnitude(dtype, target):
    x = random(7, 13, dtype=dtype) * torch.logspace(-3, 3, 7)[:, None].to(dtype)
    for got, wanted in zip(quantise_rows(x, target), plain_rows(x, target), strict=True):
        assert torch.equal(got.float(), wanted.float())


@each_target
def test_the_largest_of_a_row_is_the_largest_number_of_eight_bits_whatever_it_was(target):
    every = torch.arange(2**15, dtype=torch.int16).view(torch.bfloat16).float()[:, None]
    x = torch.cat([every, random(100_000, 1).exp()])
    values, scale = quantise_rows(x, target)
    largest = 448.0 if target == FP8 else 127.0
    normal = x.isfinite() & (x >= largest * torch.finfo(torch.float32).tiny)
    assert normal.sum() > 130_000 and (values.float()[normal] == largest).all()
    assert (values.float()[x.isfinite()] <= largest).all()
    torch.testing.assert_close(largest * scale[normal], x[normal], rtol=3e-7, atol=0)


@each_target
def test_leading_axes_are_rows_too(target):
    x = random(2, 3, 4, 5)
    values, scale = quantise_rows(x, target)
    flat_values, flat_scale = quantise_rows(x.reshape(-1, 5), target)
    assert (values.shape, scale.shape) == ((2, 3, 4, 5), (2, 3, 4, 1))
    assert torch.equal(values.float().reshape(-1, 5), flat_values.float())
    assert torch.equal(scale.reshape(-1, 1), flat_scale)


@each_target
def test_a_row_of_zeros_stays_one_and_the_least_number_does_no_harm(target):
    x = torch.zeros(2, 6)
    x[1] = 1e-44
    values, scale = quantise_rows(x, target)
    assert torch.equal(values[0].float() * scale[0], torch.zeros(6))
    assert torch.isfinite(values.float() * scale).all()


def test_an_outlier_costs_its_own_row_alone():
    x = random(3, 64)
    calm = quantise_rows(x, torch.int8)
    x[1, 5] = 1e4
    values, scale = quantise_rows(x, torch.int8)
    error = (values * scale - x).abs()
    assert torch.equal(values[::2], calm[0][::2])
    assert (error <= scale * 0.501).all()
    assert error[1].max() > 100 * error[0].max()
    assert values[1, 5] == 127


def test_in_fp8_small_numbers_beside_an_outlier_keep_their_digits():
    x = random(1, 64)
    x[0, 5] = 300.0
    values, scale = quantise_rows(x, FP8)
    large = x.abs() > 300 / 448 * 2**-6  # above the format's subnormal numbers
    assert ((values.float() * scale - x).abs() <= x.abs() * 2**-4)[large].all()


@each_target
def test_what_is_no_number_stays_visible(target):
    x = random(3, 8)
    x[1, 2] = float("nan")
    values, scale = quantise_rows(x, target)
    made = values.float() * scale
    assert made[1].isnan().all()
    assert made[::2].isfinite().all()


@pytest.fixture
def fp8_rounds_as_on_a_card(monkeypatch) -> None:
    """The interpreter loses the carry where rounding reaches the next power of two."""
    if DEVICE == "cuda":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    assert os.environ.get("TRITON_INTERPRET") == "1", "conftest.py sets it"
    convert = interpreter._convert_float

    def nearest(data, source, target, mode):
        if (source, target) != (tl.float32, tl.float8e4nv):
            return convert(data, source, target, mode)
        return torch.tensor(data).to(FP8).view(torch.uint8).numpy().reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", nearest)


@pytest.fixture
def round_as_a_card_does(monkeypatch) -> None:
    if DEVICE == "cpu":
        test_kernels.round_as_a_card_does(monkeypatch)


@needs_triton
@pytest.mark.usefixtures("fp8_rounds_as_on_a_card")
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # NaN to int8
@each_target
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("channels", [13, 128, 2500])
def test_the_kernel_rounds_bit_for_bit_as_the_definition(channels, dtype, target):
    from rf_core.kernels import triton_quantise

    x = (random(2, 5, channels) * torch.logspace(-6, 3, 5)[:, None]).to(DEVICE, dtype)
    x[0, 1] = 0
    x[1, 2, 3] = float("nan")
    got = triton_quantise.quantise_rows(x, target)
    wanted = reference.quantise_rows(x, target)
    assert torch.equal(got[1].nan_to_num(-1), wanted[1].nan_to_num(-1))
    known = wanted[1].isfinite().expand_as(x)
    assert torch.equal(got[0].float()[known], wanted[0].float()[known])


@needs_triton
@pytest.mark.usefixtures("fp8_rounds_as_on_a_card", "round_as_a_card_does")
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@each_dtype
@pytest.mark.parametrize("channels", [13, 128, 1100])
def test_rows_of_gelu_are_those_of_the_rounded_gelu(channels, dtype):
    from rf_core.kernels import triton_quantise

    x = (random(2, 300, channels) * 3).to(DEVICE, dtype)
    x[0, 1, 2] = float("nan")
    x[0, 2] = 0
    values, scale = triton_quantise.quantise_rows(x, FP8, after_gelu=True)
    wanted, wanted_scale = reference.quantise_rows(x, FP8, after_gelu=True)
    plain = reference.quantise_rows(reference.gelu(x), FP8)
    assert all(map(torch.equal, map(number, plain), map(number, (wanted, wanted_scale))))
    assert scale[0, 1].isnan().all() and (values[0, 2].float() == 0).all()
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(scale, wanted_scale, rtol=2 * ulp + 4e-7, atol=0, equal_nan=True)
    # The exponential's last bit may carry a number over the border to the next one of eight bits.
    differing = (number(values) != number(wanted)).float().mean()
    assert differing < (1e-2 if dtype == torch.bfloat16 else 1e-3)
    torch.testing.assert_close(number(values), number(wanted), rtol=2**-3, atol=2**-9)


def number(x: Tensor) -> Tensor:
    return x.float().nan_to_num(-1)


@pytest.mark.slow
@needs_triton
@pytest.mark.usefixtures("fp8_rounds_as_on_a_card", "round_as_a_card_does")
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("channels", [24, 1536])
def test_a_norm_that_makes_rows_rounds_its_own_result_bit_for_bit(channels, dtype):
    from rf_core.kernels import triton_norms

    x, y = (random(2, 6, channels, seed=seed).to(DEVICE, dtype) for seed in (0, 1))
    x[0, 1, 3] = float("inf")
    parts = random(2, 3, 6, channels, seed=2).to(DEVICE, dtype).split(1, dim=2)
    shift, scale, gate = parts[:3]
    weight, bias = (random(channels, seed=seed).to(DEVICE, dtype) for seed in (3, 4))
    for where in (triton_norms, reference):
        for name, given in (
            ("modulated_norm", (x, shift, scale)),
            ("modulated_after_residual", (x, y, gate, shift, scale)),
            ("affine_after_residual", (x, y, None, weight, bias)),
        ):
            plain, made = (getattr(where, name)(*given, 1e-6, rows=rows) for rows in (False, True))
            if name != "modulated_norm":
                assert torch.equal(number(plain[0]), number(made[0]))
                plain, made = plain[1], made[1]
            values, unit = reference.quantise_rows(plain, FP8)
            assert made.dtype == dtype and made.values.dtype == FP8
            assert not unit.isfinite().all()
            known = unit.isfinite().expand_as(plain)
            found, expected = (rows.float()[known] for rows in (made.values, values))
            if DEVICE == "cuda" and dtype == torch.float32 and where is triton_norms:
                # Stored in 8 bits a row is laid out otherwise, and summed in another order: what is
                # rounded to half precision after it hides that.
                torch.testing.assert_close(made.scale, unit, rtol=1e-6, atol=0, equal_nan=True)
                assert (found != expected).float().mean() < 0.01
            else:
                assert torch.equal(number(made.scale), number(unit))
                assert torch.equal(found, expected)


def compile_for_cards() -> None:
    """The kernels to machine code of cards that multiply fp8; run in a process of its own."""
    import triton
    from test_kernels import argument_type
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rf_core.kernels import triton_norms, triton_quantise

    def compiled(kernel, capability: int, constants: dict, **kinds: str) -> str:
        named = {n: kinds.get(n) or argument_type(n, constants) for n in kernel.arg_names}
        made = triton.compile(
            ASTSource(kernel, named, constants),
            target=GPUTarget("cuda", capability, 32),
            options={"enable_fp_fusion": False},
        )
        assert made.asm["cubin"]
        # Once a row. Triton 3.1 flushes subnormals.
        assert len(re.findall(r"div\.rn(\.ftz)?\.f32", made.asm["ptx"])) == 1
        return made.asm["ptx"]

    tile, row = triton_quantise.tile_sizes(1536), {"C": 1536, "BLOCK": 2048}
    for capability in (89, 90):
        for values, rounds, gelu in (("*fp8e4nv", 0, 0), ("*fp8e4nv", 0, 1), ("*i8", 1, 0)):
            constants = tile | {"ROUND": bool(rounds), "GELU": bool(gelu)}
            kinds = {"values_ptr": values, "scale_ptr": "*fp32"}
            ptx = compiled(triton_quantise._quantise_rows, capability, constants, **kinds)
            # Adding and taking away 1.5 * 2^23 must not be optimised to nothing.
            assert ("0f4B400000" in ptx and "0fCB400000" in ptx) == rounds
        constants = row | {"ADD": True, "GATED": True, "ROWS": True}
        kinds = {"out_ptr": "*fp8e4nv", "unit_ptr": "*fp32"}
        assert "e4m3x2" in compiled(triton_norms._norm, capability, constants, **kinds)


@pytest.mark.slow
@needs_triton
def test_the_kernels_compile_for_cards_that_multiply_fp8(tmp_path):
    root = Path(__file__).parents[1]
    places = os.pathsep.join(map(str, (root, root / "tests")))
    environment = {"PYTHONPATH": places, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", "import test_quantise; test_quantise.compile_for_cards()"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# Linear layers


@pytest.mark.parametrize(("capability", "able"), [((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_a_card_that_does_not_multiply_fp8_is_named_once(monkeypatch, caplog, capability, able):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(availability, "_multiply_one", lambda device: None)
    availability.multiplies_fp8.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert availability.multiplies_fp8(torch.device("cuda:0")) == able
    availability.multiplies_fp8.cache_clear()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (not able)
    assert all("(8, 6); products of fp8 need (8, 9)" in text for text in said)


def test_a_torch_that_has_no_product_of_rows_for_a_card_costs_speed_alone(monkeypatch, caplog):
    """As for Ada before torch 2.7."""

    def refuse(device: torch.device) -> None:
        raise RuntimeError("rowwise scaling is for compute capability 9.0")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(availability, "_multiply_one", refuse)
    availability.multiplies_fp8.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not availability.multiplies_fp8(torch.device("cuda:0"))
    availability.multiplies_fp8.cache_clear()
    (record,) = caplog.records
    assert "rowwise scaling is for" in record.getMessage()


@pytest.mark.parametrize(
    ("inputs", "dtype", "native"),
    [(48, torch.bfloat16, True), (48, torch.float32, False), (40, torch.bfloat16, False)],
)
def test_products_of_fp8_are_for_bfloat16_and_sizes_that_cards_take(
    monkeypatch, inputs, dtype, native
):
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda device: True)
    layer = Fp8Linear(linear(inputs, 64, dtype))
    assert not layer._is_native(torch.device("cpu"), dtype)
    assert layer._is_native(torch.device("cuda", 0), dtype) == native


@each_device
@each_dtype
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(48, 64, True), (13, 7, False)])
def test_a_layer_multiplies_the_rounded_rows(inputs, outputs, bias, dtype, device):
    if device == "cuda":
        must_multiply_fp8(device)
    layer = linear(inputs, outputs, dtype, bias).to(device)
    x = random(2, 5, inputs, dtype=dtype).to(device)
    y = Fp8Linear(layer)(x)
    rows, weight = (
        (values.double() * scale.double()).to(device)
        for values, scale in (
            plain_rows(x.flatten(0, 1).cpu(), FP8),
            plain_rows(layer.weight.cpu(), FP8),
        )
    )
    wanted = (rows @ weight.T + (layer.bias.double() if bias else 0)).unflatten(0, (2, 5))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), wanted, rtol=torch.finfo(dtype).eps, atol=summed(y))
    error = (y.double() - layer.double()(x.double())).norm() / wanted.norm()
    assert 0.01 < error < 0.06


def summed(y: Tensor) -> float:
    """How far sums may be off: on cards fp8 is added up with some 14 bits."""
    native = y.is_cuda and y.dtype != torch.float32
    return float(y.abs().max()) * 2**-12 if native else 1e-4


@pytest.mark.parametrize("tokens", [1, 6, 4680])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        ("cuda", torch.bfloat16),
        ("cuda", torch.float16),
    ],
)
def test_torchs_own_product_of_fp8_is_the_one_defined(device, dtype, bias, tokens):
    must_multiply_fp8(device)
    x, layer = random(tokens, 48).to(device), linear(48, 64, dtype, bias).to(device)
    parts = (*quantise_rows(x, FP8), *quantise_rows(layer.weight, FP8), layer.bias, dtype)
    got, wanted = (product(*parts) for product in (scaled_product, reference_product))
    assert got.dtype == wanted.dtype == dtype
    made = torch.bfloat16 if dtype == torch.float16 else dtype
    torch.testing.assert_close(
        got, wanted, rtol=2 * torch.finfo(made).eps, atol=summed(got.to(made))
    )


def test_all_linear_layers_of_the_blocks_are_replaced_and_no_other_ones():
    model, plain = tiny.model(), tiny.model()
    quantise_linears(model)
    kinds = {name: type(part) for name, part in model.named_modules()}
    for name, part in plain.named_modules():
        if isinstance(part, nn.Linear):
            wanted = Fp8Linear if name.startswith("blocks.") else nn.Linear
            assert issubclass(kinds[name], wanted)
    old, new = plain.blocks[0].ffn[0], model.blocks[0].ffn[0]
    assert (new.weight.dtype, new.weight.shape) == (FP8, old.weight.shape)
    assert new.weight.nbytes == old.weight.nbytes // 4
    assert new.weight_scale.shape == (tiny.CONFIG.ffn_dim, 1)


def stream_of(model: WanModel, **options) -> Stream:
    return tiny.stream(model=model, **options)


def latents_of(stream: Stream, chunks: int = 6) -> Tensor:
    return torch.stack([stream.generate() for _ in range(chunks)])


def fp8_model(dtype: torch.dtype = torch.float32) -> WanModel:
    model = tiny.model().to(dtype)
    quantise_linears(model)
    return model


def error(made: Tensor, wanted: Tensor) -> float:
    return float((made - wanted).norm() / wanted.norm())


@each_device
@each_dtype
def test_a_stream_of_fp8_layers_stays_near_the_exact_one(dtype, device):
    if device == "cuda":
        must_multiply_fp8(device)
    made = latents_of(stream_of(fp8_model(dtype).to(device)))
    assert 0.001 < error(made.cpu(), latents_of(stream_of(tiny.model()))) < 0.05


@pytest.mark.parametrize("storage", ["exact", "int8"])
def test_on_a_card_recorded_passes_of_fp8_layers_make_the_video_that_launches_make(storage):
    must_multiply_fp8("cuda")
    network, cache = fp8_model(torch.bfloat16).cuda(), tiny.window(9, 3, storage=storage)
    made = latents_of(stream_of(GraphedModel(network), cache=cache))
    torch.testing.assert_close(made, latents_of(stream_of(network, cache=cache)))


def test_rows_are_made_once_for_all_that_read_them(monkeypatch):
    """The very numbers that layers make which round what comes to them themselves."""
    rounded = []

    def counted(x: Tensor, *given, **options) -> tuple[Tensor, Tensor]:
        rounded.append(x.shape)
        return quantise(x, *given, **options)

    quantise = reference.quantise_rows
    monkeypatch.setattr(reference, "quantise_rows", counted)
    made, counts = [], []
    for apart in (False, True):
        if apart:
            monkeypatch.setattr(layers, "takes_rows", lambda *_: False)
        model = fp8_model()
        rounded.clear()
        latents, context = random(1, 4, 3, 4, 6), model.prompt_context(tiny.prompt())
        counts.append(-len(rounded))
        made.append(model(latents, torch.full((1, 3), 500.0), context))
        counts[-1] += len(rounded)
    assert torch.equal(*made)
    # q k v, o, cross q, cross o, up, down; apart q, k and v are three.
    assert counts == [6 * tiny.CONFIG.num_layers, 8 * tiny.CONFIG.num_layers]


@pytest.mark.slow
@needs_triton
@pytest.mark.usefixtures("fp8_rounds_as_on_a_card", "round_as_a_card_does")
@each_dtype
def test_a_pass_of_fp8_layers_through_the_kernels_is_that_of_the_definitions(monkeypatch, dtype):
    model = fp8_model(dtype).to(DEVICE)

    @torch.no_grad()
    def flow() -> Tensor:
        x, t = random(1, 4, 3, 4, 6, dtype=dtype).to(DEVICE), torch.full((1, 3), 500.0)
        context = model.prompt_context(tiny.prompt().to(DEVICE, dtype))
        return model(x, t.to(DEVICE), context).float()

    with availability.unfused():
        wanted = flow()
    asked = set()

    def through(*tensors: Tensor) -> bool:
        asked.add(sys._getframe(1).f_code.co_name)
        return True

    monkeypatch.setattr(kernels, "fused", through)
    monkeypatch.setattr(kernels, "multiplies_fp8", lambda device: True)
    made = flow()
    assert {"quantise_rows", "modulated_after_residual", "affine_after_residual"} <= asked
    assert error(made, wanted) < (0.005 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("able", [True, False])
def test_rows_are_left_to_the_layers_on_a_card_whose_kernels_cannot_make_them(monkeypatch, able):
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda device: able)
    layer = Fp8Linear(linear(16, 16, torch.float32))
    assert fp8.takes_rows(layer) and not fp8.takes_rows(nn.Linear(16, 16))
    assert fp8._rounds(torch.device("cuda", 0)) == able


def test_quantised_layers_are_streamed_from_host_memory_bit_for_bit():
    wanted = latents_of(stream_of(fp8_model()), 3)
    model = fp8_model()
    stream_layers(model, "blocks", "cpu")
    assert torch.equal(latents_of(stream_of(model), 3), wanted)


def test_adapters_are_merged_before_weights_are_quantised(tmp_path):
    write_checkpoint(
        tmp_path / "student.safetensors", tiny.model().state_dict(), tiny.CONFIG, None, None
    )
    down, up = random(2, 48, seed=1), random(48, 2, seed=2)
    name = "diffusion_model.blocks.0.self_attn.q"
    adapter = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(adapter, tmp_path / "lora.safetensors")
    lora = Lora(path=tmp_path / "lora.safetensors", strength=0.5)
    model, _ = load_student(
        tmp_path / "student.safetensors", device="cpu", dtype=torch.float32, loras=[lora]
    )
    quantise_linears(model)
    layer = model.blocks[0].self_attn.q
    merged = tiny.model().blocks[0].self_attn.q.weight + 0.5 * (up @ down)
    for got, wanted in zip(
        (layer.weight, layer.weight_scale), quantise_rows(merged, FP8), strict=True
    ):
        torch.testing.assert_close(got.float(), wanted.float())


def test_what_cannot_be_quantised_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="'int4' are unknown; use one of fp8"):
        quantise_linears(tiny.model(), "int4")
    with pytest.raises(ValueError, match="they are quantised, or a host's own"):
        quantise_linears(fp8_model())
    with pytest.raises(ValueError, match="freeze them first"):
        quantise_linears(tiny.model().requires_grad_(True))
    streamed = tiny.model()
    stream_layers(streamed, "blocks", "cpu")
    with pytest.raises(ValueError, match="streamed from host memory already"):
        quantise_linears(streamed)


def test_casting_a_quantised_network_or_training_through_it_is_a_mistake_that_is_named():
    layer = Fp8Linear(linear(8, 8, torch.float32))
    with pytest.raises(AssertionError, match="no gradients"):
        layer(random(2, 8).requires_grad_())
    with pytest.raises(AssertionError, match="after its dtype is chosen"):
        layer.to(torch.bfloat16)(random(2, 8, dtype=torch.bfloat16))


# The cache


def cache_of(
    kind: type[KVCache], config: CacheConfig, dtype: torch.dtype = torch.float32, batch: int = 1
) -> KVCache:
    return kind.allocate(
        config, num_layers=LAYERS, batch=batch, grid=GRID, num_heads=HEADS, head_dim=HEAD_DIM,
        dtype=dtype, device="cpu",
    )  # fmt: skip


def write(cache: KVCache, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A chunk as the network writes it; every layer's window, copied."""
    cache.advance(k.shape[1] // TOKENS)
    start = cache.context_frames * TOKENS
    table = rope_table(cache.config.window_frames, GRID, HEAD_DIM)
    rotated = apply_rope(k, table.tokens(start, start + k.shape[1]))
    windows = (cache.layer(layer).extend(k, rotated, v) for layer in range(LAYERS))
    return [(rotated.clone(), v.clone()) for rotated, v in windows]


def chunk(config: CacheConfig, seed: int, dtype: torch.dtype, batch: int = 1) -> Tensor:
    return random(batch, config.chunk_frames * TOKENS, HEADS, HEAD_DIM, dtype=dtype, seed=seed)


@each_window
@each_dtype
def test_the_window_is_read_to_within_half_a_step_whatever_has_left_it(dtype, config):
    exact, packed = (cache_of(kind, config, dtype, batch=2) for kind in (KVCache, Int8KVCache))
    for number in range(8):
        k, v = chunk(config, number, dtype, 2), chunk(config, 100 + number, dtype, 2)
        for (rotated, value), (rotated8, value8) in zip(
            write(exact, k, v), write(packed, k, v), strict=True
        ):
            assert value8.shape == value.shape
            ulp = torch.finfo(dtype).eps * 4
            torch.testing.assert_close(value8, value, rtol=ulp, atol=4.5 / 254 + ulp)
            # a pair of keys that is rotated mixes the errors of both
            torch.testing.assert_close(rotated8, rotated, rtol=2 * ulp, atol=1.5 * 4.5 / 254 + ulp)
            assert torch.equal(value8[:, -v.shape[1] :], v)  # the chunk at hand
    assert packed.num_evictions == exact.num_evictions > 2


@each_dtype
def test_while_only_the_sink_is_seen_nothing_is_rounded(dtype):
    config = tiny.window(9, 3)
    exact, packed = (cache_of(kind, config, dtype) for kind in (KVCache, Int8KVCache))
    for number in range(2):
        k, v = chunk(config, number, dtype), chunk(config, 100 + number, dtype)
        for seen, seen8 in zip(write(exact, k, v), write(packed, k, v), strict=True):
            torch.testing.assert_close(seen8, seen, rtol=1e-6, atol=1e-6)
            assert torch.equal(seen8[1], seen[1])


@pytest.mark.parametrize("accumulator", ["reference", "float32"])
@pytest.mark.parametrize("keep_key_norms", [True, False])
@each_dtype
def test_the_sink_is_bit_for_bit_that_of_the_exact_cache_where_rows_fit_eight_bits(
    dtype, keep_key_norms, accumulator
):
    options = {"decay": 0.9, "accumulator": accumulator, "keep_key_norms": keep_key_norms}
    config = tiny.window(9, 3, **options)
    exact, packed = (cache_of(kind, config, dtype) for kind in (KVCache, Int8KVCache))
    for number in range(9):
        k = chunk(config, number, torch.float32).mul(20).round().clamp(-126, 126)
        k[..., 0] = 127  # whole numbers, counted in ones
        k = k.to(dtype)
        for seen, seen8 in zip(write(exact, k, -k), write(packed, k, -k), strict=True):
            assert torch.equal(seen8[1], seen[1])
    sink = packed.sink_2NBSHD.to(dtype)
    assert torch.equal(sink[0], exact.k_NBWHD[:, :, : 3 * TOKENS])
    assert torch.equal(sink[1], exact.v_NBWHD[:, :, : 3 * TOKENS])
    if exact.exact_sink is not None:
        assert torch.equal(packed.sink_2NBSHD, exact.exact_sink)


def test_the_sink_goes_on_moving_by_less_than_a_step_of_eight_bits():
    config = tiny.window(9, 3, decay=0.999)
    cache = cache_of(Int8KVCache, config)
    for number in [1.0] + [0.0] * 22:
        k = torch.full((1, 3 * TOKENS, HEADS, HEAD_DIM), number)
        write(cache, k, k)
    assert cache.num_evictions == 20
    torch.testing.assert_close(
        cache.sink_2NBSHD, torch.full_like(cache.sink_2NBSHD, 0.999**20), rtol=1e-5, atol=0
    )


def test_what_is_kept_is_rounded_once_and_then_moved_as_it_is():
    config = tiny.window(12, 3)
    cache = cache_of(Int8KVCache, config)
    places = []
    for number in range(7):
        write(cache, chunk(config, number, torch.float32), chunk(config, number, torch.float32))
        wanted, scale = quantise_rows(chunk(config, 3, torch.float32), torch.int8)
        for place in range(3):
            at = slice(place * 3 * TOKENS, (place + 1) * 3 * TOKENS)
            if torch.equal(cache.k_NBWHD[1, :, at], wanted):
                assert torch.equal(cache.scale_2NBRH1[:, 1, :, at], torch.stack([scale, scale]))
                places.append((number, place))
    assert places == [(3, 2), (4, 1), (5, 0)]


def test_passes_under_autograd_see_what_the_window_shows():
    config = tiny.window(9, 3)
    cache = cache_of(Int8KVCache, config)
    for number in range(4):
        write(cache, chunk(config, number, torch.float32), chunk(config, 9, torch.float32))
    cache.advance()
    snapshot, slot = cache.snapshot(), chunk(config, 7, torch.float32)
    for layer in range(LAYERS):
        for kept, seen in zip(
            snapshot.layer(layer).extend(slot, slot, slot),
            cache.layer(layer).extend(slot, slot, slot),
            strict=True,
        ):
            assert torch.equal(kept, seen)


@pytest.mark.parametrize("accumulator", ["reference", "float32"])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_the_cache_takes_what_is_counted(element_bytes, accumulator):
    sizes, config = tiny.CONFIG, tiny.window(6, 2, chunk=2, accumulator=accumulator)
    cache = Int8KVCache.allocate(
        config, num_layers=sizes.num_layers, batch=1, grid=GRID, num_heads=sizes.num_heads,
        head_dim=sizes.head_dim, dtype={2: torch.bfloat16, 4: torch.float32}[element_bytes],
        device="cpu",
    )  # fmt: skip
    assert cache.nbytes == counts.int8_cache_bytes(sizes, config, GRID, element_bytes)


def test_the_published_window_takes_half_the_memory():
    published = Grid(height=30, width=52)
    arguments = WAN_1_3B, CacheConfig(), published
    assert counts.int8_cache_bytes(*arguments) / 1e9 == pytest.approx(1.88, abs=0.01)
    assert counts.int8_cache_bytes(*arguments) < 0.49 * counts.cache_bytes(*arguments)


def test_a_cache_of_another_form_is_refused_and_what_it_lacks_named():
    config = tiny.window(6, 0)  # without a sink both have the same shape
    exact, packed = (cache_of(kind, config) for kind in (KVCache, Int8KVCache))
    for mine, other in ((exact, packed), (packed, exact)):
        with pytest.raises(ValueError, match="one cache has scale, sink, the other has not"):
            mine.check(other.tensors(), evicted_frames=0)


def int8_model(model: WanModel | None = None) -> WanModel:
    """A network whose streams keep keys and values in int8."""
    model = model or tiny.model()
    sizes = model.config
    model.new_cache = partial(
        Int8KVCache.allocate,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        head_dim=sizes.head_dim,
    )
    return model


@each_dtype
def test_a_stream_with_an_int8_cache_stays_near_the_exact_one(dtype):
    options = {"cache": tiny.window(9, 3), "dtype": dtype}
    made, wanted = (
        latents_of(stream_of(model.to(dtype), **options)) for model in (int8_model(), tiny.model())
    )
    assert torch.equal(made[:2], wanted[:2]) or dtype == torch.float32
    assert 0 < error(made[2:], wanted[2:]) < 0.01


def switched(stream: Stream) -> Tensor:
    parts = [latents_of(stream, 2)]
    stream.switch(tiny.prompt(3), "recache")
    return torch.cat([*parts, latents_of(stream, 3)])


@pytest.mark.parametrize("accumulator", ["reference", "float32"])
@each_dtype
def test_a_restored_stream_and_a_fork_go_on_bit_for_bit(dtype, accumulator, tmp_path):
    options = {"cache": tiny.window(9, 3, accumulator=accumulator)}
    stream = stream_of(int8_model().to(dtype), **options)
    latents_of(stream, 5)
    snapshot, fork = stream.snapshot(), stream.fork()
    snapshot.save(tmp_path / "state.safetensors")
    ahead = switched(stream)
    assert torch.equal(switched(fork), ahead)
    loaded = type(snapshot).load(tmp_path / "state.safetensors")
    again = Stream.from_snapshot(int8_model().to(dtype), loaded)
    assert torch.equal(switched(again), ahead)
    stream.restore(snapshot)
    assert torch.equal(switched(stream), ahead)


def test_a_fork_has_a_scratch_and_a_sink_of_its_own():
    stream = stream_of(int8_model(), cache=tiny.window(9, 3))
    latents_of(stream, 4)
    wanted, fork = copy.deepcopy(stream.state.cache.tensors()), stream.fork()
    latents_of(fork, 3)
    assert all(torch.equal(stream.state.cache.tensors()[name], wanted[name]) for name in wanted)
    assert fork.state.cache.scratch_3BWHD.data_ptr() != stream.state.cache.scratch_3BWHD.data_ptr()
    assert fork.state.cache.rotated_NBWHD.data_ptr() == fork.state.cache.scratch_3BWHD[1].data_ptr()


def test_a_chunk_that_was_stopped_within_is_made_again_the_same():
    streams = [stream_of(int8_model(), cache=tiny.window(9, 3)) for _ in range(2)]
    for stream in streams:
        latents_of(stream, 4)

    def stop(kind: str, number: int) -> None:
        if (kind, number) == ("denoise", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streams[0].generate(stop)
    assert torch.equal(*(latents_of(stream, 2) for stream in streams))


def test_captured_passes_of_both_approximations_replay_what_plain_ones_make():
    recorder = Recorder()
    model = GraphedModel(int8_model(fp8_model()), recorder)
    made = latents_of(stream_of(model, cache=tiny.window(9, 3)), 7)
    plain = stream_of(int8_model(fp8_model()), cache=tiny.window(9, 3))
    assert torch.equal(made, latents_of(plain, 7))
    assert recorder.replayed > recorder.captured
