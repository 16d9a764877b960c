"""Streamed layers give what resident ones give, and fetch each layer when they may."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import Tensor, nn

from rf_core.config import ModelConfig
from rf_core.layers import Block
from rf_core.memory.offload import (
    NUM_SLOTS,
    PlainSlots,
    StreamedLayers,
    packed_bytes,
    stream_layers,
)

DEEP = ModelConfig(**{**vars(tiny.CONFIG), "num_layers": 5})


class Recorder(PlainSlots):
    """Notes what is asked for, and in which order."""

    def __init__(self, size: int) -> None:
        super().__init__(size, "cpu")
        self.calls: list[tuple[str, int]] = []

    def load(self, slot: int, source: Tensor) -> None:
        self.calls.append(("load", slot))
        super().load(slot, source)

    def wait(self, slot: int) -> None:
        self.calls.append(("wait", slot))

    def release(self, slot: int) -> None:
        self.calls.append(("release", slot))


class Late(PlainSlots):
    """Copies no earlier than it must, and ruins a slot as soon as it is released."""

    def __init__(self, size: int) -> None:
        super().__init__(size, "cpu")
        self.waiting: dict[int, Tensor] = {}

    def load(self, slot: int, source: Tensor) -> None:
        self.buffers[slot].fill_(255)  # NaN in every float type
        self.waiting[slot] = source

    def wait(self, slot: int) -> None:
        if slot in self.waiting:
            super().load(slot, self.waiting.pop(slot))


def streamed(model, slots=PlainSlots):
    twin = copy.deepcopy(model)
    layers = list(twin.blocks)
    size = max(map(packed_bytes, layers))
    made = slots(size, "cpu") if slots is PlainSlots else slots(size)
    twin.blocks = StreamedLayers(layers, made, pin=False)
    return twin


def latents_of(model) -> list[Tensor]:
    """Chunks past an eviction, under prompts changed in three ways."""
    stream = tiny.stream(model=model, cache=tiny.window(6, 3), seed=3)
    made = [stream.generate()]
    for number, mode in enumerate(("soft", "recache", "cut"), 1):
        stream.switch(tiny.prompt(number), mode)
        made += [stream.generate(), stream.generate()]
    return made


@pytest.mark.parametrize("slots", [PlainSlots, Late, Recorder])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_a_stream_with_streamed_weights_is_the_same_to_the_bit(slots, layers):
    config = ModelConfig(**{**vars(tiny.CONFIG), "num_layers": layers})
    model = tiny.model(config)
    for ours, expected in zip(latents_of(streamed(model, slots)), latents_of(model), strict=True):
        assert torch.equal(ours, expected)


def test_two_streams_in_turn_share_streamed_weights():
    model = tiny.model(DEEP)
    twin = streamed(model, Late)
    a, b = (tiny.stream(model=twin, seed=seed) for seed in (1, 2))
    made = [s.generate() for s in (a, b, a, b)]
    for seed, ours in ((1, made[::2]), (2, made[1::2])):
        expected = tiny.stream(model=model, seed=seed)
        assert all(torch.equal(latents, expected.generate()) for latents in ours)


def test_the_next_layer_is_fetched_before_this_one_is_used_and_never_over_it():
    layers = streamed(tiny.model(DEEP), Recorder).blocks
    calls = layers._slots.calls
    for _ in layers:
        calls.append(("use", -1))
    first, second = [("load", 0), ("load", 1)], [("use", -1)]
    assert calls[:4] == [*first, ("wait", 0), *second]
    busy = None
    for call, slot in calls:
        assert not (call == "load" and slot == busy), "a slot in use was overwritten"
        busy = slot if call == "wait" else None if call == "release" else busy
    assert [call for call, _ in calls].count("load") == len(layers) + 1  # the next pass begins


def test_every_pass_after_the_first_copies_each_layer_once():
    layers = streamed(tiny.model(DEEP), Recorder).blocks
    list(map(id, layers))
    calls = layers._slots.calls
    calls.clear()
    list(map(id, layers))
    assert [call for call, _ in calls].count("load") == len(layers)


def test_as_many_layers_as_slots_are_copied_once_for_all():
    layers = streamed(tiny.model(), Recorder).blocks
    assert len(layers) == NUM_SLOTS
    for _ in range(3):
        list(map(id, layers))
    assert [call for call, _ in layers._slots.calls].count("load") == NUM_SLOTS


def test_weights_are_on_the_device_in_their_turn_and_on_the_host_after_it():
    model = tiny.model(DEEP)
    layers = streamed(model).blocks
    buffers = [buffer.untyped_storage().data_ptr() for buffer in layers._slots.buffers]
    places = []
    for layer in layers:
        places.append({p.untyped_storage().data_ptr() for p in layer.parameters()})
    assert all(len(place) == 1 and place <= set(buffers) for place in places)
    assert [places[i] != places[i + 1] for i in range(4)] == [True] * 4
    for name, expected in model.blocks.state_dict().items():
        own = layers.state_dict()[name]
        assert torch.equal(own, expected)
        assert own.untyped_storage().data_ptr() not in buffers


def test_layers_are_not_reached_out_of_their_turn():
    model = tiny.model()
    stream_layers(model, "blocks", "cpu")
    with pytest.raises(TypeError, match="go through layers with for"):
        model.blocks[0]


def test_a_pass_that_fails_leaves_nothing_behind():
    model = tiny.model(DEEP)
    twin = streamed(model, Late)
    with pytest.raises(KeyError):
        for number, _ in enumerate(twin.blocks):
            if number == 2:
                raise KeyError
    assert torch.equal(latents_of(twin)[0], latents_of(model)[0])
    for name, expected in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], expected), name


def test_layers_of_unequal_size_and_type_share_the_slots():
    torch.manual_seed(0)
    layers = [nn.Linear(7, 7).bfloat16(), nn.Sequential(nn.Linear(7, 90), nn.Linear(90, 7))]
    layers += [nn.BatchNorm1d(7).eval(), nn.Linear(7, 7, bias=False).half()]
    for layer in layers:
        layer.requires_grad_(False)
    x = torch.randn(3, 7)
    expected = [layer(x.to(next(layer.parameters()).dtype)) for layer in layers]
    slots = Late(max(map(packed_bytes, layers)))
    for layer, wanted in zip(StreamedLayers(layers, slots, pin=False), expected, strict=True):
        assert torch.equal(layer(x.to(next(layer.parameters()).dtype)), wanted)


def test_a_network_is_put_on_the_device_but_for_the_layers_that_are_streamed():
    model = tiny.model(DEEP)
    expected = latents_of(copy.deepcopy(model))
    stream_layers(model, "blocks", "cpu")
    assert isinstance(model.blocks, StreamedLayers) and len(model.blocks) == 5
    assert all(torch.equal(a, b) for a, b in zip(latents_of(model), expected, strict=True))


def test_a_text_encoder_with_streamed_layers_reads_the_same():
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=4, num_heads=2, dropout_rate=0.0
    )
    model = UMT5EncoderModel(config).eval().requires_grad_(False)
    ids = torch.arange(12)[None] % 50
    expected = model(input_ids=ids).last_hidden_state
    stream_layers(model.encoder, "block", "cpu")
    assert torch.equal(model(input_ids=ids).last_hidden_state, expected)
    assert model.shared.weight is model.encoder.embed_tokens.weight


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_on_a_card_streamed_weights_give_the_same_to_the_bit_and_take_two_layers():
    wide = ModelConfig(**{**vars(DEEP), "dim": 768, "ffn_dim": 3072, "num_heads": 6})
    model = tiny.model(wide)
    twin = copy.deepcopy(model)
    expected = [latents.cpu() for latents in latents_of(model.cuda())]
    del model
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    stream_layers(twin, "blocks", "cuda")
    outside = sum(p.nbytes for n, p in twin.named_parameters() if not n.startswith("blocks"))
    held = torch.cuda.memory_allocated() - before
    assert held < outside + (NUM_SLOTS + 0.5) * packed_bytes(twin.blocks[0])
    for _ in range(3):
        for ours, wanted in zip(latents_of(twin), expected, strict=True):
            assert torch.equal(ours.cpu(), wanted)


def test_denoising_and_clean_passes_use_every_layer_in_its_turn(monkeypatch):
    model = streamed(tiny.model(DEEP))
    places = {buffer.untyped_storage().data_ptr() for buffer in model.blocks._slots.buffers}
    seen = []
    for name in ("forward", "write_cache"):
        run = getattr(Block, name)

        def noting(block, *args, run=run):
            seen.append({p.untyped_storage().data_ptr() for p in block.parameters()} <= places)
            return run(block, *args)

        monkeypatch.setattr(Block, name, noting)
    stream = tiny.stream(model=model)
    stream.generate()
    stream.finish_clean_pass()
    passes = len(tiny.TWO_STEPS.steps) + 1
    assert seen == [True] * passes * DEEP.num_layers
