"""q, k and v as one product: where their weights lie together, and only there."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

from rf_core.config import CacheConfig
from rf_core.fast.graphs import GraphedModel, TraceCapture
from rf_core.fast.quantise import quantise_linears
from rf_core.fused_linear import fuse_projections, fused_linear
from rf_core.kernels import availability, onednn
from rf_core.kernels.reference import FP8, Rows, quantise_rows
from rf_core.layers import SelfAttention
from rf_core.measure import counts
from rf_core.measure.profile import instrumented
from rf_core.memory.offload import stream_layers
from rf_core.model import WanModel
from rf_core.operations import Linear
from rf_core.weights.checkpoint import load_student, write_checkpoint

LEAST = 100_000  # multiplications: more than q's of a tiny stream's chunk, less than all three's


@pytest.fixture(autouse=True)
def joint_products(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the weights that oneDNN is given."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(availability, "onednn_multiplies", lambda: True)
    monkeypatch.setattr(availability, "_MIN_FOR_ONEDNN", LEAST)
    made, product = [], onednn.linear

    def spy(x, weight, bias, *, gelu):
        made.append(tuple(weight.shape))
        return product(x, weight, bias, gelu=gelu)

    monkeypatch.setattr(onednn, "linear", spy)
    return made


def three(width: int = 48) -> list[Linear]:
    torch.manual_seed(0)
    return [Linear(width, width).requires_grad_(False) for _ in range(3)]


def together() -> list[Linear]:
    fuse_projections(*(layers := three()))
    return layers


def tokens(number: int = 18) -> torch.Tensor:
    return torch.randn(1, number, 48, generator=torch.Generator().manual_seed(1))


def laid_out(model: WanModel) -> WanModel:
    for part in model.modules():
        if isinstance(part, SelfAttention):
            fuse_projections(part.q, part.k, part.v)
    return model


def latents_of(model, chunks: int = 5) -> torch.Tensor:
    stream = tiny.stream(model=model, cache=tiny.window(9, 3))
    return torch.cat([stream.generate().clone() for _ in range(chunks)], dim=2)


@torch.no_grad()
def test_layers_that_lie_together_are_one_product(joint_products):
    wanted = [layer(tokens()) for layer in three()]
    found = fused_linear(tokens(), *together())
    torch.testing.assert_close(found, tuple(wanted), atol=1e-6, rtol=1e-6)
    assert joint_products == [(144, 48)]


def test_laying_together_changes_place_alone():
    layers, before = together(), three()
    for layer, old in zip(layers, before, strict=True):
        assert layer.state_dict().keys() == old.state_dict().keys()
        assert torch.equal(layer.weight, old.weight) and torch.equal(layer.bias, old.bias)
        assert isinstance(layer.weight, nn.Parameter) and not layer.weight.requires_grad
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1


@torch.no_grad()
def test_a_change_in_place_is_seen():
    layers = together()
    layers[1].weight.mul_(3)
    layers[2].bias.add_(1)
    layers[0].load_state_dict(three()[2].state_dict())
    found = fused_linear(tokens(), *layers)
    assert found is not None
    wanted = tuple(layer(tokens()) for layer in layers)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def cast(layers):
    layers[1].double().float()


def cast_all(layers):
    for layer in layers:
        layer.double().float()


def change_dtype(layers):
    layers[2].bfloat16()


def replace_a_bias(layers):
    layers[1].bias.data = layers[1].bias.data.clone()


def take_a_bias(layers):
    layers[2].bias = None


def take_all_biases(layers):
    for layer in layers:
        layer.bias = None


def load_others(layers):
    layers[2].load_state_dict(three()[0].state_dict(), assign=True)


def swap(layers):
    layers[0], layers[1] = layers[1], layers[0]


def turn(layers):
    layers[1].weight.data = layers[1].weight.data.t()


def reinterpret(layers):
    layers[2].weight.data = layers[2].weight.data.view(torch.int32)


def copy_one(layers):
    layers[0] = copy.deepcopy(layers[0])


def be_a_host(layers):
    layers[1].__class__ = type("Linear", (nn.Linear,), {})


def listen(layers):
    layers[1].register_forward_hook(lambda *_: None)


def listen_before(layers):
    layers[0].register_forward_pre_hook(lambda *_: None)


def put_a_plain_tensor(layers):
    weight = layers[2].weight.data
    del layers[2].weight
    layers[2].weight = weight


PARTED = [cast, cast_all, change_dtype, replace_a_bias, take_a_bias, load_others, swap, turn]
PARTED += [
    take_all_biases,
    reinterpret,
    copy_one,
    be_a_host,
    listen,
    listen_before,
    put_a_plain_tensor,
]


@torch.no_grad()
@pytest.mark.parametrize("part", PARTED)
def test_layers_that_are_parted_run_one_by_one(part):
    layers = together()
    assert fused_linear(tokens(), *layers) is not None
    part(layers)
    assert fused_linear(tokens(), *layers) is None


@torch.no_grad()
def test_neighbours_by_chance_are_not_read_as_one():
    memory = np.zeros((3, 48 * 48), dtype=np.float32)
    layers = together()
    for layer, place in zip(layers, memory, strict=True):
        layer.weight.data = torch.from_numpy(place).view(48, 48)
    assert layers[1].weight.data_ptr() == layers[0].weight.data_ptr() + layers[0].weight.nbytes
    assert fused_linear(tokens(), *layers) is None


@torch.no_grad()
def test_what_gains_nothing_by_one_product_has_none(monkeypatch):
    layers, x = together(), tokens()
    assert fused_linear(tokens(6), *layers) is None
    assert fused_linear(x.double(), *layers) is None
    assert fused_linear(Rows(*quantise_rows(x, FP8), x.dtype), *layers) is None
    with torch.enable_grad():
        assert fused_linear(x, *layers) is None
    monkeypatch.setattr(availability, "onednn_multiplies", lambda: False)
    assert fused_linear(x, *layers) is None


@pytest.mark.parametrize("why", ["another dtype", "wide", "no bias", "no oneDNN", "a host's"])
def test_weights_stay_where_no_product_would_be_joint(monkeypatch, why):
    layers = three(width=400 if why == "wide" else 48)
    if why == "another dtype":
        layers = [layer.bfloat16() for layer in layers]
    elif why == "no bias":
        take_a_bias(layers)
    elif why == "no oneDNN":
        monkeypatch.setattr(availability, "onednn_multiplies", lambda: False)
    elif why == "a host's":
        be_a_host(layers)
    places = [layer.weight.data_ptr() for layer in layers]
    fuse_projections(*layers)
    assert places == [layer.weight.data_ptr() for layer in layers]


def test_a_stream_of_joint_products_is_the_stream_of_single_ones(joint_products):
    single = latents_of(tiny.model())
    assert not joint_products
    torch.testing.assert_close(latents_of(laid_out(tiny.model())), single, atol=1e-4, rtol=1e-4)
    assert set(joint_products) == {(144, 48)}


def test_a_block_without_a_cache_has_the_same_result(joint_products):
    given = torch.randn(1, 4, 3, 4, 6), torch.full((1, 3), 500.0)
    found, wanted = (
        model(*given, model.prompt_context(tiny.prompt()))
        for model in (laid_out(tiny.model()), tiny.model())
    )
    assert not joint_products  # under autograd
    assert torch.equal(found, wanted)
    with torch.no_grad():
        model = laid_out(tiny.model())
        found = model(*given, model.prompt_context(tiny.prompt()))
    assert joint_products
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_joint_products_are_recorded_to_the_bit(joint_products):
    replayed = []

    class Capture(TraceCapture):
        patience = 0

        def __call__(self, run):
            replay = super().__call__(run)
            return lambda: (replayed.append(1), replay())[1]

    model = laid_out(tiny.model())
    made = latents_of(GraphedModel(model, Capture()))
    assert replayed and joint_products
    assert torch.equal(made, latents_of(model))


@pytest.mark.slow
@pytest.mark.parametrize("change", ["fp8", "streamed", "compiled", "cast"])
def test_whoever_changes_a_network_gets_what_it_gets_of_weights_apart(joint_products, change):
    def changed(model: WanModel) -> WanModel:
        if change == "fp8":
            quantise_linears(model)
        elif change == "streamed":
            stream_layers(model, "blocks", "cpu")
        elif change == "compiled":
            for block in model.blocks:
                block.compile(backend="eager")
        else:
            model.double().float()
        return model

    found, wanted = (latents_of(changed(m), 2) for m in (laid_out(tiny.model()), tiny.model()))
    assert torch.equal(found, wanted) and not joint_products


def test_one_product_is_timed_as_the_layers_it_stands_for():
    seen = []
    borders = SimpleNamespace(begin=seen.append, end=lambda: None)
    stream = tiny.stream(model=laid_out(tiny.model()))
    with instrumented(stream, borders):
        stream.step()
    products = len(tiny.TWO_STEPS.steps) * tiny.CONFIG.num_layers * 2  # one of three, and o's
    assert seen.count(counts.SELF_LINEARS) == products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_is_loaded_with_its_weights_together_where_that_counts(tmp_path, dtype):
    path, again = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    write_checkpoint(path, tiny.model().state_dict(), tiny.CONFIG, CacheConfig(), tiny.TWO_STEPS)
    model, checkpoint = load_student(path, device="cpu", dtype=dtype)
    attn = model.blocks[1].self_attn
    joint = attn.q.weight.untyped_storage().data_ptr() == attn.v.weight.untyped_storage().data_ptr()
    assert joint == (dtype == torch.float32)
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == {
        name: t.data_ptr() for name, t in checkpoint.tensors.items()
    }
    write_checkpoint(again, model.state_dict(), tiny.CONFIG, CacheConfig(), tiny.TWO_STEPS)
    for name, tensor in load_file(again).items():
        assert torch.equal(tensor, load_file(path)[name].to(dtype))
