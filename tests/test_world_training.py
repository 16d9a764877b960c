"""The miniature world's trainers, at sizes that take seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from rf_core.config import ModelConfig
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.model import WanModel
from rf_core.text import BYTE_VOCAB_SIZE, UMT5Encoder, byte_ids
from training.world.budget import Budget, Periodic, run
from training.world.clips import (
    CaptionedClips,
    Clips,
    ClipsConfig,
    read_clips,
    scene_of,
    write_clips,
)
from training.world.evaluate import (
    EulerConfig,
    EvaluateConfig,
    accuracy_of,
    evaluate,
    evaluation_prompts,
    format_report,
    sample,
    switch_prompts,
)
from training.world.scenes import WORLDS, World, parse_caption, render, scene_of_caption
from training.world.train_text import (
    ATTRIBUTES,
    TextTrainConfig,
    TokenProbe,
    new_encoder,
    probe_accuracy,
    random_caption,
    token_labels,
    train_text,
)

MICRO = ModelConfig(
    dim=24, ffn_dim=48, freq_dim=16, text_dim=8, text_len=96, num_heads=2, num_layers=2
)
MICRO_VAE = VAEConfig(dim=2, dim_mult=(1, 1, 1, 1), num_res_blocks=1)


@pytest.fixture(scope="module")
def encoder() -> UMT5Encoder:
    torch.manual_seed(0)
    sizes = UMT5Config(
        vocab_size=BYTE_VOCAB_SIZE, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
    )
    model = UMT5EncoderModel(sizes).eval().requires_grad_(False)
    return UMT5Encoder(model, byte_ids, text_len=96)


@pytest.fixture
def model() -> WanModel:
    return tiny.model(MICRO)


def test_every_token_of_a_clause_is_labelled_with_its_own_clause() -> None:
    text = "a red circle moves left slowly and a blue square drifts up"
    labels = token_labels(text, 96)
    first, second = text.index("left"), text.index("up")
    names = {
        name: [values[labels[name][at]] for at in (first, second)]
        for name, values in ATTRIBUTES.items()
    }
    assert names == {
        "colour": ["red", "blue"],
        "shape": ["circle", "square"],
        "direction": ["left", "up"],
        "speed_name": ["slowly", None],
        "bounces": [False, False],
    }
    assert [labels["clause"][at] for at in (first, second)] == [0, 1]
    between, past_end = text.index(" and ") + 2, len(text)
    of_clauses = labels.keys() - {"wall"}
    assert {labels[name][at] for name in of_clauses for at in (between, past_end)} == {-100}
    assert [labels["wall"][at] for at in (first, between, past_end)] == [0, 0, -100]


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_every_random_caption_parses_and_fits_the_text_length(world: World) -> None:
    rng = np.random.default_rng(0)
    prompts = [random_caption(rng, world) for _ in range(300)]
    assert {len(parse_caption(prompt)) for prompt in prompts} == {1, 2}
    assert max(len(byte_ids(prompt)) for prompt in prompts) <= TextTrainConfig().text_len


def test_training_the_text_encoder_makes_facts_readable_and_is_repeatable() -> None:
    config = TextTrainConfig(
        dim=16,
        num_layers=1,
        num_heads=2,
        ffn_dim=32,
        batch=8,
        learning_rate=1e-2,
        budget=Budget(steps=30, warmup_steps=0),
    )
    torch.manual_seed(0)
    chance = probe_accuracy(new_encoder(config), TokenProbe(config.dim), seed=1, num_captions=32)
    encoder, trained = train_text(config)
    again, _ = train_text(config)
    assert trained > chance + 0.05
    assert torch.equal(encoder.encode(["a red circle"]), again.encode(["a red circle"]))


def test_a_budget_ends_by_steps_or_minutes_and_lays_the_cosine_over_both() -> None:
    assert Budget(steps=10).spent(5, 1e9) == 0.5
    assert Budget(steps=10, minutes=1).spent(1, 30) == 0.5
    budget = Budget(steps=100, warmup_steps=10)
    assert budget.learning_rate(0, 0.0) == pytest.approx(0.1)
    assert budget.learning_rate(50, 0.5) == pytest.approx(0.505)
    assert budget.learning_rate(100, 1.0) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="would never end"):
        Budget()


def test_a_run_takes_every_step_and_leaves_no_gradient() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimiser = torch.optim.SGD([weight], lr=0.1)
    for _ in run(Budget(steps=3, warmup_steps=0), [optimiser]):
        weight.grad = torch.ones(1)
    assert weight.grad is None
    rates = [0.1 * Budget(steps=3, warmup_steps=0).learning_rate(i, i / 3) for i in range(3)]
    assert weight.item() == pytest.approx(1 - sum(rates))


def test_every_says_yes_once_a_period() -> None:
    now = [0.0]
    due = Periodic(1.0, clock=lambda: now[0])
    answers = []
    for now[0] in (30.0, 61.0, 62.0, 121.5):
        answers.append(due())
    assert answers == [False, True, False, True]


def test_clips_are_the_same_however_often_a_run_is_cut_off(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = WanVAE(MICRO_VAE).eval().requires_grad_(False)
    config = ClipsConfig(num_clips=5, frames=2, shard_clips=2)
    assert list(write_clips(vae, config, tmp_path / "whole")) == [2, 4, 5]
    parts = write_clips(vae, config, tmp_path / "parts")
    next(parts)
    parts.close()
    assert len(read_clips(tmp_path / "parts").scenes) == 2
    list(write_clips(vae, config, tmp_path / "parts"))
    whole, again = read_clips(tmp_path / "whole"), read_clips(tmp_path / "parts")
    assert whole.latents.shape == (5, 16, 2, 8, 8)
    assert torch.equal(whole.latents, again.latents) and whole.scenes == again.scenes
    with pytest.raises(ValueError, match="world clips"):
        read_clips(tmp_path)


def test_the_sampler_follows_the_flow_and_guidance_extrapolates(
    model: WanModel, encoder: UMT5Encoder
) -> None:
    noise = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    prompt, empty = (model.prompt_context(encoder.encode([text])) for text in ("a red", ""))

    def one_step(guidance: float) -> Tensor:
        return sample(model, encoder, ["a red"], EulerConfig(steps=1, guidance=guidance), 2, seed=3)

    full = torch.full((1, 2), 1000.0)
    conditional, plain = (noise - model(noise, full, context) for context in (prompt, empty))
    torch.testing.assert_close(one_step(1.0), conditional)
    torch.testing.assert_close(one_step(3.0), plain + 3 * (conditional - plain))


def test_captions_are_worded_by_their_seeds_and_clips_told_apart_by_their_things(
    encoder: UMT5Encoder,
) -> None:
    latents = torch.randn(12, 16, 9, 8, 8).half()
    scenes = [scene_of(0, index) for index in range(12)]
    clips = CaptionedClips(Clips(latents=latents, scenes=scenes), encoder)
    assert len(clips) == 12 and clips.shape == (16, 9, 8, 8)
    one, two = clips.groups
    assert sorted([*one, *two]) == list(range(12)) and {len(scenes[row].things) for row in two} == {
        2
    }
    texts, embeds = clips.captions([3, 3, 3, 3, 3, 3], [0, 0, 1, 2, 3, 4])
    assert texts[0] == texts[1] and len(set(texts)) > 1
    assert torch.equal(embeds, encoder.encode(texts))
    assert {parse_caption(text)[0].colour for text in texts} == {scenes[3].things[0].colour}
    assert torch.equal(clips.latents([5, 2]), latents[[5, 2]].float())


def test_true_videos_are_scored_right_and_counted_by_kind() -> None:
    config = EvaluateConfig(single=6, double=3)
    prompts = evaluation_prompts(config)
    assert [len(parse_caption(prompt)) for prompt in prompts] == [1] * 6 + [2] * 3
    rng = np.random.default_rng(0)
    videos = [render([scene_of_caption(prompt, rng)], 29)[0] for prompt in prompts]
    report = accuracy_of(videos, prompts)
    for name in ("colour", "shape", "direction"):
        assert report["one"][name] == {"right": 6, "of": 6}
    named = sum(" slowly" in prompt or " quickly" in prompt for prompt in prompts)
    assert report["all"]["speed"]["of"] == named
    shuffled = accuracy_of(videos[::-1], prompts)
    assert shuffled["all"]["colour"]["right"] < report["all"]["colour"]["right"]


def test_switches_change_colour_shape_and_direction() -> None:
    for before, after in zip(*switch_prompts(EvaluateConfig(switches=5)), strict=True):
        (a,), (b,) = parse_caption(before), parse_caption(after)
        assert a.colour != b.colour and a.shape != b.shape and a.direction != b.direction


def test_an_evaluation_of_untrained_networks_runs_through_and_is_json(
    model: WanModel, encoder: UMT5Encoder
) -> None:
    torch.manual_seed(0)
    vae = WanVAE(MICRO_VAE).eval().requires_grad_(False)
    config = EvaluateConfig(
        single=2,
        double=1,
        frames=3,
        chunks=2,
        drift_videos=1,
        drift_chunks=3,
        drift_window=4,
        switches=1,
        switch_after=1,
        switch_chunks=4,
        batch=2,
    )
    report = evaluate(vae, encoder, model, model, EulerConfig(steps=4), config)
    assert json.loads(json.dumps(report)).keys() == {
        "true",
        "teacher",
        "student",
        "drift",
        "switch",
    }
    assert report["student"]["all"]["colour"]["of"] == 3
    assert set(report["switch"]) == {"soft", "recache", "blend 3", "cut"}
    text = format_report(report)
    assert "tracker on true videos" in text and "recache" in text


def test_samples_do_not_depend_on_the_batch(model: WanModel, encoder: UMT5Encoder) -> None:
    prompts = ["a red circle", "a blue square", "a green circle"]
    whole, parts = (
        sample(model, encoder, prompts, EulerConfig(steps=4), 2, seed=0, batch=batch)
        for batch in (3, 2)
    )
    torch.testing.assert_close(whole, parts)
