"""The miniature world's trainers, at sizes that take seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from rf_core.config import CacheConfig, ModelConfig
from rf_core.kv_cache import KVCache
from rf_core.model import PromptContext, WanModel
from rf_core.scheduler import flow_to_x0
from rf_core.text import BYTE_VOCAB_SIZE, UMT5Encoder, byte_ids
from rf_core.vae import VAEConfig, WanVAE
from training.world.budget import Budget, Every, run
from training.world.clips import Clips, ClipsConfig, read_clips, scene_of, write_clips
from training.world.evaluate import (
    EvaluateConfig,
    accuracy_of,
    evaluate,
    evaluation_prompts,
    format_report,
    switch_prompts,
)
from training.world.muon import orthogonalise
from training.world.ode_pairs import (
    EulerConfig,
    Pairs,
    PairsConfig,
    integrate,
    read_pairs,
    sample,
    write_pairs,
)
from training.world.scenes import caption, parse_caption, place_all, render
from training.world.train_student import (
    Batch,
    StudentConfig,
    draw_batch,
    new_cache,
    predict,
    regression_loss,
    train_student,
)
from training.world.train_teacher import (
    Phase,
    TeacherConfig,
    flow_loss,
    make_optimisers,
    new_model,
    train_teacher,
)
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
CACHE = CacheConfig(window_frames=3, sink_frames=1, chunk_frames=1, decay=0.9)


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
    return lively(new_model(MICRO, 0)).requires_grad_(False)


def lively(model: WanModel) -> WanModel:
    """A network whose head is not zero, so that all of it shows in the output."""
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return model


def some_pairs(count: int = 4, frames: int = 4) -> Pairs:
    generator = torch.Generator().manual_seed(frames)
    noise, clean = (torch.randn(count, 16, frames, 8, 8, generator=generator) for _ in range(2))
    prompts = [caption(scene_of(0, index)) for index in range(count)]
    return Pairs(noise=noise, clean=clean, captions=prompts)


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
    }
    assert [labels["clause"][at] for at in (first, second)] == [0, 1]
    between, past_end = text.index(" and ") + 2, len(text)
    assert {labels[name][at] for name in labels for at in (between, past_end)} == {-100}


def test_every_random_caption_parses_and_fits_the_text_length() -> None:
    rng = np.random.default_rng(0)
    prompts = [random_caption(rng) for _ in range(300)]
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
    due = Every(1.0, clock=lambda: now[0])
    answers = []
    for now[0] in (30.0, 61.0, 62.0, 121.5):
        answers.append(due())
    assert answers == [False, True, False, True]


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_scale(
    shape: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    result = orthogonalise(matrices)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    along = torch.diagonal(u.mT @ result @ v.mT, dim1=1, dim2=2)
    assert along.min() > 0.5 and along.max() < 1.3


def test_muon_takes_the_blocks_matrices_and_adam_all_the_rest() -> None:
    model = new_model(MICRO, 0)
    muon, adam = make_optimisers(model, 1e-3, 1e-3, 0.0)
    matrices = muon.param_groups[0]["params"]
    others = adam.param_groups[0]["params"]
    assert len(matrices) == MICRO.num_layers * 10
    assert all(matrix.ndim == 2 for matrix in matrices)
    assert len(matrices) + len(others) == len(list(model.parameters()))


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


def test_a_few_steps_of_the_teacher_lower_its_loss_and_repeat_exactly(
    encoder: UMT5Encoder,
) -> None:
    clips = Clips(
        latents=torch.randn(1, 16, 1, 8, 8).expand(8, -1, 3, -1, -1).half(),
        scenes=[scene_of(0, index) for index in range(8)],
    )
    config = TeacherConfig(
        model=MICRO,
        budget=Budget(steps=30, warmup_steps=0),
        matrix_rate=2e-2,
        other_rate=2e-2,
        phases=(Phase(until=0.5, frames=2, batch=4), Phase(until=1, frames=3, batch=4)),
    )
    calls: list[int] = []
    trained = train_teacher(config, clips, encoder, lambda training: calls.append(training.steps))
    again = train_teacher(config, clips, encoder)
    prompts = encoder.encode(["a red circle moves left"] * 8)

    def loss(model: WanModel) -> float:
        torch.manual_seed(1)
        return flow_loss(model, clips.latents.float(), prompts, 5.0).item()

    assert calls == [30] and trained.samples == 120
    assert loss(trained.model) < 0.9 * loss(new_model(MICRO, 0))
    assert loss(trained.model) == loss(again.model)
    assert loss(trained.average) != loss(trained.model)


def test_the_sampler_follows_the_flow_and_guidance_extrapolates(
    model: WanModel, encoder: UMT5Encoder
) -> None:
    noise = torch.randn(1, 16, 2, 8, 8)
    prompt, empty = (model.prompt_context(encoder.encode([text])) for text in ("a red", ""))

    def one_step(guidance: float) -> Tensor:
        return integrate(model, noise, prompt, empty, EulerConfig(steps=1, guidance=guidance))

    full = torch.full((1, 2), 1000.0)
    conditional, plain = (noise - model(noise, full, context) for context in (prompt, empty))
    torch.testing.assert_close(one_step(1.0), conditional)
    torch.testing.assert_close(one_step(3.0), plain + 3 * (conditional - plain))


def test_trajectories_resume_and_lead_from_their_noise_to_their_clips(
    model: WanModel, encoder: UMT5Encoder, tmp_path: Path
) -> None:
    config = PairsConfig(num_trajectories=5, shard=2, frames=2, euler=EulerConfig(steps=2))
    assert list(write_pairs(model, encoder, config, tmp_path / "whole")) == [2, 4, 5]
    parts = write_pairs(model, encoder, config, tmp_path / "parts")
    next(parts)
    parts.close()
    list(write_pairs(model, encoder, config, tmp_path / "parts"))
    whole, again = read_pairs(tmp_path / "whole"), read_pairs(tmp_path / "parts")
    assert torch.equal(whole.noise, again.noise) and torch.equal(whole.clean, again.clean)
    assert whole.captions == [caption(scene_of(config.seed, index)) for index in range(5)]

    prompt, empty = (
        model.prompt_context(encoder.encode(texts)) for texts in (whole.captions, [""] * 5)
    )
    led = integrate(model, whole.noise.float(), prompt, empty, config.euler)
    torch.testing.assert_close(led, whole.clean.float(), atol=1e-2, rtol=1e-2)


def test_a_chunk_is_trained_on_exactly_what_a_stream_would_compute(
    model: WanModel, encoder: UMT5Encoder
) -> None:
    latents = torch.randn(2, 16, 5, 8, 8)
    prompt = model.prompt_context(encoder.encode(["a red circle", "a blue square"]))
    cache = new_cache(model, latents, CACHE)
    for index in range(5):
        clean, noisy = latents[:, :, index : index + 1], torch.randn(2, 16, 1, 8, 8)
        timestep_BF = torch.tensor([[1000.0], [625.0]])
        cache.advance()
        trained = predict(model, noisy, timestep_BF, prompt, cache)
        streamed = flow_to_x0(model(noisy, timestep_BF, prompt, cache), noisy, timestep_BF)
        assert torch.equal(trained, streamed)
        model(clean, torch.zeros(2, 1), prompt, cache)
    assert cache.num_evictions == 2


def test_the_regression_equals_a_rollout_written_out(model: WanModel, encoder: UMT5Encoder) -> None:
    """Inputs by timestep, guesses, the past of the next chunk: the slow, obvious way."""
    config = StudentConfig(cache=CACHE)
    batch = draw_batch(some_pairs(), [0, 1, 2, 3], encoder, config, np.random.default_rng(0))
    prompt = model.prompt_context(batch.prompt_embeds)
    last = len(batch.timesteps) - 1
    results = []
    for own_past in (False, True):
        torch.manual_seed(0)
        cache, losses = new_cache(model, batch.clean, CACHE), []
        for index in range(4):
            cache.advance()
            clean = batch.clean[:, :, index : index + 1]
            past = clean.clone()
            if index:
                fresh = [torch.randn_like(clean) for _ in range(2)]
                errors = []
                for row in range(4):
                    x0 = _slow_prediction(model, batch, prompt, cache, fresh, index, row)
                    errors.append((x0 - clean[row]).square().mean())
                    if own_past and batch.step[index, row] == last:
                        past[row] = x0
                losses.append(torch.stack(errors).mean())
            model(past, torch.zeros(4, 1), prompt, cache)
        torch.manual_seed(0)
        got = regression_loss(model, batch, CACHE, own_past)
        torch.testing.assert_close(got, torch.stack(losses).mean())
        results.append(got.item())
    assert results[0] != results[1]


def _slow_prediction(
    model: WanModel,
    batch: Batch,
    prompt: PromptContext,
    cache: KVCache,
    fresh: list[Tensor],
    index: int,
    row: int,
) -> Tensor:
    frame = slice(index, index + 1)
    noise, clean = batch.noise[:, :, frame], batch.clean[:, :, frame]
    step = int(batch.step[index, row])

    def x0_of(noisy: Tensor, timestep: Tensor) -> Tensor:
        timestep_BF = timestep.expand(4, 1)
        return flow_to_x0(model(noisy, timestep_BF, prompt, cache), noisy, timestep_BF)

    x = noise
    if step:
        before, now = batch.timesteps[step - 1], batch.timesteps[step]
        earlier = (1 - before / 1000) * clean + before / 1000 * fresh[0] if step > 1 else noise
        signal = x0_of(earlier, before) if batch.guessed[index, row] else clean
        x = (1 - now / 1000) * signal + now / 1000 * fresh[1]
    return x0_of(x, batch.timesteps[step])[row]


def test_a_few_steps_of_the_student_lower_its_loss(encoder: UMT5Encoder) -> None:
    clips, openings = some_pairs(), some_pairs(frames=1)
    config = StudentConfig(
        cache=CACHE,
        batch=4,
        openings=4,
        budget=Budget(steps=20, warmup_steps=0),
        matrix_rate=1e-2,
        other_rate=1e-2,
        own_past_from=0.5,
    )
    teacher = lively(new_model(MICRO, 0))

    def losses(model: WanModel) -> list[float]:
        torch.manual_seed(1)
        rng = np.random.default_rng(1)
        batches = [
            draw_batch(pairs, [0, 1, 2, 3], encoder, config, rng) for pairs in (clips, openings)
        ]
        return [regression_loss(model, batch, CACHE).item() for batch in batches]

    before = losses(teacher)
    trained = train_student(config, teacher, clips, openings, encoder)
    after = losses(trained.model)
    assert all(b < 0.95 * a for a, b in zip(before, after, strict=True)), (before, after)
    assert trained.steps == 20


def test_gradients_reach_every_weight_and_never_the_past(encoder: UMT5Encoder) -> None:
    model = lively(new_model(MICRO, 0))
    config = StudentConfig(cache=CACHE)
    batch = draw_batch(some_pairs(), [0, 1], encoder, config, np.random.default_rng(0))
    regression_loss(model, batch, CACHE).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

    past = batch.clean.clone().requires_grad_(True)
    cache = new_cache(model, past, CACHE)
    prompt = model.prompt_context(batch.prompt_embeds)
    cache.advance()
    with torch.no_grad():
        model(past[:, :, :1], torch.zeros(2, 1), prompt, cache)
    cache.advance()
    predict(model, past[:, :, 1:2], torch.full((2, 1), 500.0), prompt, cache).sum().backward()
    assert past.grad is not None
    assert past.grad[:, :, 1].abs().sum() > 0 and past.grad[:, :, 0].abs().sum() == 0


def test_true_videos_are_scored_right_and_counted_by_kind() -> None:
    config = EvaluateConfig(single=6, double=3)
    prompts = evaluation_prompts(config)
    assert [len(parse_caption(prompt)) for prompt in prompts] == [1] * 6 + [2] * 3
    rng = np.random.default_rng(0)
    videos = [render([place_all(parse_caption(prompt), rng)], 29)[0] for prompt in prompts]
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
