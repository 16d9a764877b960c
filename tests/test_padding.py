"""Padding counted against padding computed: the same attention, the same streams."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor

from rf_core import kernels
from rf_core.attention import sdpa
from rf_core.config import WAN_1_3B
from rf_core.kernels import reference
from rf_core.layers import CountedPromptKV, PromptKV
from rf_core.model import WanModel
from rf_core.padding import counted_rows, log_counts, num_real

TEXT_LEN = tiny.CONFIG.text_len
WAN = replace(tiny.CONFIG, text_len=WAN_1_3B.text_len)


class Whole(WanModel):
    """A network that computes padding in streams too."""

    def counted_prompt(self, prompt_embeds_BSD: Tensor):
        return self.prompt_context(prompt_embeds_BSD)


def whole() -> Whole:
    network = Whole(tiny.CONFIG)
    network.load_state_dict(tiny.model().state_dict())
    return network.eval().requires_grad_(False)


class Counting:
    """Plain attention that notes how many keys it was given."""

    def __init__(self) -> None:
        self.keys: set[int] = set()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys.add(k.shape[1])
        return sdpa(q, k, v)


def padded(*lengths: int, text_len: int = TEXT_LEN) -> Tensor:
    """Random prompts of given lengths, as a text encoder pads them, [B, text_len, D]."""
    embeds = torch.zeros(len(lengths), text_len, tiny.CONFIG.text_dim)
    for number, (row, length) in enumerate(zip(embeds, lengths, strict=True)):
        row[:length] = tiny.prompt(number, length)[0]
    return embeds


def on_a_card(model: WanModel, embeds: Tensor) -> tuple[CountedPromptKV, ...]:
    """What a card with the kernels makes of a prompt."""
    text_len = embeds.shape[1]
    bias = log_counts(num_real(embeds).clamp(max=text_len - 1), text_len, text_len)
    return tuple(CountedPromptKV(*layer, bias) for layer in model.prompt_context(embeds))


def attended(prompt: PromptKV | CountedPromptKV, q: Tensor) -> Tensor:
    attend = sdpa if isinstance(prompt, PromptKV) else reference.prompt_attention
    return attend(q, *prompt)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("length", [0, 1, 17, 64, 511, 512])
@torch.no_grad()
def test_counted_padding_is_attended_to_as_computed_padding(length, batch):
    model, embeds = tiny.model(WAN), padded(*(length, 40)[:batch], text_len=512)
    q = torch.randn(batch, 12, WAN.num_heads, WAN.head_dim)
    computed = model.prompt_context(embeds)
    wanted = sdpa(q.double(), *(each.double() for each in computed[0]))
    # Fewer sums round less: computed padding is no nearer.
    for prompt in (computed, model.counted_prompt(embeds), on_a_card(model, embeds)):
        within = 2e-6 if prompt is computed else 1e-6
        assert (attended(prompt[0], q) - wanted).norm() < within * wanted.norm()


@torch.no_grad()
def test_a_padding_key_that_counts_once_would_be_noticed():
    model, q = tiny.model(WAN), torch.randn(1, 12, WAN.num_heads, WAN.head_dim)
    (first, *_), embeds = model.counted_prompt(padded(17, text_len=512)), padded(17, text_len=512)
    wanted = attended(model.prompt_context(embeds)[0], q)
    once = attended(first._replace(bias_BS=torch.zeros_like(first.bias_BS)), q)
    assert (once - wanted).norm() > 0.1 * wanted.norm()


@pytest.mark.parametrize("length", range(TEXT_LEN + 1))
@torch.no_grad()
def test_a_network_of_any_prompt_computes_the_same_flow(length):
    model, embeds = tiny.model(), padded(length)
    x, at = torch.randn(1, 4, 3, 4, 6), torch.full((1, 3), 500.0)
    wanted = model(x, at, model.prompt_context(embeds))
    for prompt in (model.counted_prompt(embeds), on_a_card(model, embeds)):
        torch.testing.assert_close(model(x, at, prompt), wanted, rtol=1e-5, atol=1e-5)
    short = model.counted_prompt(embeds[:, :length])
    assert torch.equal(model(x, at, short), model(x, at, model.counted_prompt(embeds)))


def test_rows_of_zeros_amid_a_prompt_are_no_padding():
    embeds = padded(7, 3)
    embeds[0, 2:6] = 0
    embeds[1, 0] = 0
    assert num_real(embeds).tolist() == [7, 3]
    embeds[1, 9] = float("nan")  # which is to be seen, not counted away
    assert num_real(embeds).tolist() == [7, 10]


def test_every_key_s_counts_add_up_to_the_padded_prompt():
    for length in range(TEXT_LEN + 1):
        last = torch.tensor([length, 0]).clamp(max=TEXT_LEN - 1)
        counts = log_counts(last, TEXT_LEN, TEXT_LEN).exp()
        torch.testing.assert_close(counts.sum(1), torch.full((2,), float(TEXT_LEN)))
        assert torch.equal(counts[0, :length], torch.ones(length))
        assert counts[1, 0] == pytest.approx(TEXT_LEN) and not counts[1, 1:].any()


@pytest.mark.parametrize("lengths", [(0,), (3,), (3, 6), (6, 0), (9, 1), (10,), (10, 3)])
def test_on_a_cpu_rows_end_with_the_longest_prompt_s_first_padding(lengths):
    embeds = padded(*lengths)
    rows, bias = counted_rows(embeds)
    last = min(max(lengths), TEXT_LEN - 1)
    assert torch.equal(rows, embeds[:, : last + 1])
    counts = torch.ones(len(lengths), last + 1)
    counts[:, last] = TEXT_LEN - last
    torch.testing.assert_close(bias, counts.log())


def test_on_a_card_sizes_are_fixed_and_nothing_is_waited_for(monkeypatch):
    monkeypatch.setattr(kernels, "fused", lambda *_: True)
    embeds = torch.empty(2, TEXT_LEN, 24, dtype=torch.bfloat16, device="meta")
    rows, bias = counted_rows(embeds)  # of values that are not there
    assert (
        rows.shape == embeds.shape and bias.shape == (2, TEXT_LEN) and bias.dtype == torch.float32
    )


def test_where_no_attention_knows_counts_a_stream_computes_padding():
    model = WanModel(tiny.CONFIG, device="meta")
    prompt = model.counted_prompt(padded(3).to("meta"))
    assert {type(layer) for layer in prompt} == {PromptKV}


@pytest.mark.parametrize("runs", [True, False])
def test_on_a_card_without_its_kernel_attention_gets_the_whole_prompt(monkeypatch, runs):
    """As under torch.compile, which comes after the prompt was read."""
    model, counting = tiny.model(), Counting()
    prompt = on_a_card(model, padded(3))
    monkeypatch.setattr(kernels, "counts_keys", lambda *_: runs)
    x, at = torch.randn(1, 4, 3, 4, 6), torch.full((1, 3), 500.0)
    flow = model(x, at, prompt, attention=counting)
    torch.testing.assert_close(flow, model(x, at, model.prompt_context(padded(3))))
    assert counting.keys == ({18} if runs else {18, TEXT_LEN})


@pytest.mark.parametrize("grad", [True, False])
def test_training_computes_padding_with_gradients_and_without(grad):
    model, counting = tiny.model().requires_grad_(True), Counting()
    with torch.set_grad_enabled(grad):
        prompt = model.prompt_context(padded(3))
        model(torch.randn(1, 4, 3, 4, 6), torch.zeros(1, 3), prompt, attention=counting)
    assert counting.keys == {18, TEXT_LEN}


def latents(network: WanModel, batch: int = 1, attention=sdpa) -> Tensor:
    """A stream from a short prompt into a long one, by way of blends."""
    stream = tiny.stream(
        model=network,
        prompt_embeds=padded(*(3, 6)[:batch]),
        batch=batch,
        cache=tiny.window(6, 3),
        attention=attention,
    )
    made = [stream.generate()]
    for tokens, mode in ((8, "recache"), (1, "blend 2"), (10, "soft"), (0, "cut")):
        stream.switch(tiny.prompt(tokens, tokens), mode)
        made += [stream.generate() for _ in range(3)]
    return torch.cat(made, dim=2)


@pytest.mark.parametrize("batch", [1, 2])
def test_streams_that_count_padding_are_those_that_compute_it(batch):
    counting = Counting()
    made = latents(tiny.model(), batch, counting)
    assert counting.keys == {18, 36}  # the window's
    torch.testing.assert_close(made, latents(whole(), batch), rtol=1e-4, atol=1e-4)


def test_a_network_that_counts_no_padding_hands_whole_prompts_to_its_attention():
    stream = tiny.stream(model=whole(), prompt_embeds=padded(3), attention=(counting := Counting()))
    stream.generate()
    assert TEXT_LEN in counting.keys


def test_half_precision_keeps_counts_in_full():
    embeds = padded(17, text_len=512).bfloat16()
    _, bias = counted_rows(embeds)
    assert bias.dtype == torch.float32 and bias[0, -1].item() == pytest.approx(math.log(512 - 17))
    model = tiny.model(WAN).bfloat16()
    q = torch.randn(1, 12, WAN.num_heads, WAN.head_dim).bfloat16()
    with torch.no_grad():
        counted, computed = model.counted_prompt(embeds), model.prompt_context(embeds)
        found, wanted = attended(counted[0], q), attended(computed[0], q)
    assert (found - wanted).norm() < 0.01 * wanted.norm()
