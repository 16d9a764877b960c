"""The miniature world's trainers, at sizes that take seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from training.world.excerpts import (
    ExcerptConfig,
    Excerpts,
    Prompts,
    draw_excerpts,
    pasts,
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
from training.world.train_student import (
    StudentConfig,
    draw_batch,
    regression_losses,
    train_student,
)
from training.world.train_teacher import (
    Draw,
    Phase,
    TeacherConfig,
    clip_loss,
    excerpt_loss,
    make_optimisers,
    new_model,
    train_teacher,
)
from transformers import UMT5Config, UMT5EncoderModel

from rf_core.config import CacheConfig, Grid, ModelConfig
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.kv_cache import KVCache
from rf_core.model import WanModel
from rf_core.scheduler import flow_to_x0, sampling_timesteps
from rf_core.text import BYTE_VOCAB_SIZE, UMT5Encoder, byte_ids
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
from training.world.scenes import parse_caption, place_all, render
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
PLAIN = ExcerptConfig(switch_share=0.0, context_noise=0.0, stale_sink_share=0.0)


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


def some_clips(count: int = 6) -> Clips:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(count, 16, 15, 8, 8, generator=generator).half()
    return Clips(latents=latents, scenes=[scene_of(0, index) for index in range(count)])


def some_excerpts(count: int = 4, config: ExcerptConfig = PLAIN) -> Excerpts:
    rows, others = list(range(count)), [5] * count
    return draw_excerpts(some_clips(), rows, others, np.random.default_rng(0), config)


def some_pairs(count: int = 4) -> Pairs:
    excerpts = some_excerpts(count)
    generator = torch.Generator().manual_seed(2)
    *points, clean = torch.randn(5, *excerpts.targets.shape, generator=generator)
    return Pairs(excerpts=excerpts, points=torch.stack(points), clean=clean)


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
    clips = replace(some_clips(), latents=torch.randn(1, 16, 1, 8, 8).expand(6, -1, 15, -1, -1))
    config = TeacherConfig(
        model=MICRO,
        budget=Budget(steps=30, warmup_steps=0),
        matrix_rate=2e-2,
        other_rate=2e-2,
        opening_batch=4,
        excerpt_batch=3,
        whole_batch=2,
        phases=(
            Phase(until=0.5, kinds=("opening",)),
            Phase(until=1, kinds=("excerpt", "excerpt", "whole")),
        ),
    )
    calls: list[int] = []
    trained = train_teacher(config, clips, encoder, lambda training: calls.append(training.steps))
    again = train_teacher(config, clips, encoder)

    def losses(model: WanModel) -> list[float]:
        torch.manual_seed(1)
        draw = Draw(config, clips)
        excerpt = excerpt_loss(model, encoder, draw.excerpts(), config, draw.rng)
        whole = clip_loss(model, encoder, *draw.clips("whole"), config, draw.rng)
        return [excerpt.item(), whole.item()]

    assert calls == [30] and trained.samples == 15 * 4 + 10 * 3 + 5 * 2
    before, after = losses(new_model(MICRO, 0)), losses(trained.model)
    assert all(b < 0.9 * a for a, b in zip(before, after, strict=True)), (before, after)
    assert after == losses(again.model)
    assert after != losses(trained.average)


def test_the_sampler_follows_the_flow_and_guidance_extrapolates(
    model: WanModel, encoder: UMT5Encoder
) -> None:
    noise = torch.randn(1, 16, 2, 8, 8)
    prompt, empty = (model.prompt_context(encoder.encode([text])) for text in ("a red", ""))

    def one_step(guidance: float) -> Tensor:
        return integrate(model, noise, prompt, empty, EulerConfig(steps=1, guidance=guidance))[0]

    full = torch.full((1, 2), 1000.0)
    conditional, plain = (noise - model(noise, full, context) for context in (prompt, empty))
    torch.testing.assert_close(one_step(1.0), conditional)
    torch.testing.assert_close(one_step(3.0), plain + 3 * (conditional - plain))


def test_trajectories_resume_and_lead_from_their_noise_to_their_chunks(
    model: WanModel, encoder: UMT5Encoder, tmp_path: Path
) -> None:
    clips = some_clips()
    config = PairsConfig(num_excerpts=5, shard=2, euler=EulerConfig(steps=2), excerpts=PLAIN)
    assert list(write_pairs(model, encoder, clips, config, tmp_path / "whole")) == [2, 4, 5]
    parts = write_pairs(model, encoder, clips, config, tmp_path / "parts")
    next(parts)
    parts.close()
    list(write_pairs(model, encoder, clips, config, tmp_path / "parts"))
    whole, again = read_pairs(tmp_path / "whole"), read_pairs(tmp_path / "parts")
    assert torch.equal(whole.points, again.points) and torch.equal(whole.clean, again.clean)
    assert whole.points.shape == (4, 3, 5, 16, 3, 8, 8) and len(whole.excerpts) == 5

    excerpts = whole.excerpts.rows(range(5))
    prompts = Prompts.read(model, encoder, excerpts)
    empty = model.prompt_context(encoder.encode([""] * 5))
    past = pasts(model, excerpts, prompts, PLAIN)[2]
    levels = (sampling_timesteps(config.sampler) / 1000).tolist()
    noise = whole.points[0, 2].float()
    led, points = integrate(model, noise, prompts.later, empty, config.euler, past, levels)
    close = {"atol": 1e-2, "rtol": 1e-2}
    torch.testing.assert_close(led, whole.clean[2].float(), **close)
    torch.testing.assert_close(torch.stack(points), whole.points[:, 2].float(), **close)
    assert torch.equal(points[0], noise)


def test_a_trajectory_through_given_levels_is_the_same_walk_with_more_steps(
    model: WanModel, encoder: UMT5Encoder
) -> None:
    config = EulerConfig(steps=2, shift=1.0, guidance=1.0)
    assert config.sigmas().tolist() == [1.0, 0.5, 0.0]
    assert config.sigmas([0.5, 0.75]).tolist() == [1.0, 0.75, 0.5, 0.0]
    noise = torch.randn(1, 16, 1, 8, 8)
    prompt = model.prompt_context(encoder.encode(["a red"]))
    end, (middle,) = integrate(model, noise, prompt, prompt, config, through=[0.5])
    half = noise - 0.5 * model(noise, torch.full((1, 1), 1000.0), prompt)
    torch.testing.assert_close(middle, half)
    torch.testing.assert_close(end, half - 0.5 * model(half, torch.full((1, 1), 500.0), prompt))


def test_an_excerpt_sees_exactly_what_a_stream_would(model: WanModel, encoder: UMT5Encoder) -> None:
    excerpts = replace(some_excerpts(), before=some_excerpts().second)
    prompts = Prompts.read(model, encoder, excerpts)
    cache = KVCache.allocate(
        CacheConfig(),
        num_layers=MICRO.num_layers,
        batch=4,
        grid=Grid(height=4, width=4),
        num_heads=MICRO.num_heads,
        head_dim=MICRO.head_dim,
        dtype=torch.float32,
        device="cpu",
    )
    timestep_BF = torch.full((4, 3), 625.0)
    for target, past in zip(excerpts.targets, pasts(model, excerpts, prompts, PLAIN), strict=True):
        noisy = torch.randn_like(target)
        cache.advance()
        streamed = model(noisy, timestep_BF, prompts.first, cache)
        torch.testing.assert_close(model(noisy, timestep_BF, prompts.first, past), streamed)
        model(target, torch.zeros(4, 3), prompts.first, cache)


def test_a_changed_prompt_shows_another_scene_and_keeps_the_past() -> None:
    clips, config = some_clips(), ExcerptConfig(switch_share=0.5)
    rng = np.random.default_rng(0)
    rows, others = [0] * 40, [3] * 40
    excerpts = draw_excerpts(clips, rows, others, rng, config)
    chunks = [clips.latents[:, :, start : start + 3].float() for start in range(0, 15, 3)]
    switched = 0
    for index in range(40):
        before = [torch.equal(excerpts.before[index], chunk[0]) for chunk in chunks]
        own = [torch.equal(excerpts.later[index], chunk[0]) for chunk in chunks]
        other = [torch.equal(excerpts.later[index], chunk[3]) for chunk in chunks]
        colours = [parse_caption(text)[0].colour for text in (excerpts.later_prompts[index],)]
        assert parse_caption(excerpts.prompts[index])[0].colour == clips.scenes[0][0].colour
        if any(own):
            assert own.index(True) == before.index(True) + 1
            assert excerpts.later_prompts[index] == excerpts.prompts[index]
        else:
            assert other.index(True) >= 1  # no opening follows anything
            assert colours == [clips.scenes[3][0].colour]
            switched += 1
    assert 10 < switched < 30


def test_a_stale_sink_and_context_noise_change_the_past_alone(
    model: WanModel, encoder: UMT5Encoder
) -> None:
    excerpts = some_excerpts()
    prompts = Prompts.read(model, encoder, excerpts)
    clean = pasts(model, excerpts, prompts, PLAIN)
    stale = pasts(model, excerpts, prompts, replace(PLAIN, stale_sink_share=1.0))
    noisy = pasts(model, excerpts, prompts, replace(PLAIN, context_noise=0.1))
    for layer in range(MICRO.num_layers):
        assert torch.equal(stale[1].chunks[0][layer][0], clean[1].chunks[0][layer][0])
        assert not torch.equal(stale[2].chunks[0][layer][0], clean[2].chunks[0][layer][0])
        assert torch.equal(stale[2].chunks[1][layer][0], clean[2].chunks[1][layer][0])
        assert not torch.equal(noisy[2].chunks[1][layer][0], clean[2].chunks[1][layer][0])


def test_the_regression_equals_one_written_out(model: WanModel, encoder: UMT5Encoder) -> None:
    config, pairs = StudentConfig(excerpts=PLAIN), some_pairs()
    rows = [2, 0, 3, 1]
    batch = draw_batch(pairs, rows, config, np.random.default_rng(0))
    prompts = Prompts.read(model, encoder, batch.excerpts)
    past_of = pasts(model, batch.excerpts, prompts, PLAIN)
    timesteps = sampling_timesteps(config.sampler).tolist()
    got = regression_losses(model, encoder, batch, config)
    for kind in range(3):
        errors = []
        for place, row in enumerate(rows):
            step = timesteps.index(float(batch.timestep[kind, place]))
            noisy = torch.zeros_like(batch.noisy[kind])
            noisy[place] = pairs.points[step, kind, row]
            timestep_BF = torch.full((4, 3), timesteps[step])
            prompt = (prompts.first, prompts.first, prompts.later)[kind]
            flow = model(noisy, timestep_BF, prompt, past_of[kind])
            x0 = flow_to_x0(flow, noisy, timestep_BF)
            errors.append((x0[place] - pairs.clean[kind, row]).square().mean())
        torch.testing.assert_close(got[kind], torch.stack(errors).mean())
    assert len(batch.timestep.unique()) == 4


def test_a_few_steps_of_the_student_lower_its_loss(encoder: UMT5Encoder) -> None:
    config = StudentConfig(
        batch=4, budget=Budget(steps=20, warmup_steps=0), matrix_rate=1e-2, other_rate=1e-2
    )
    teacher = lively(new_model(MICRO, 0))

    def losses(model: WanModel) -> list[float]:
        torch.manual_seed(1)
        batch = draw_batch(some_pairs(), [0, 1, 2, 3], config, np.random.default_rng(1))
        return regression_losses(model, encoder, batch, config).tolist()

    before = losses(teacher)
    trained = train_student(config, teacher, some_pairs(), encoder)
    after = losses(trained.model)
    assert all(b < 0.95 * a for a, b in zip(before, after, strict=True)), (before, after)
    assert trained.steps == 20


def test_gradients_reach_every_weight_and_the_past(encoder: UMT5Encoder) -> None:
    model = lively(new_model(MICRO, 0))
    config = StudentConfig()
    batch = draw_batch(some_pairs(), [0, 1], config, np.random.default_rng(0))
    excerpts = replace(batch.excerpts, before=batch.excerpts.before.requires_grad_(True))
    batch = replace(batch, excerpts=excerpts)
    regression_losses(model, encoder, batch, config).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert excerpts.before.grad is not None and excerpts.before.grad.abs().sum() > 0


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
