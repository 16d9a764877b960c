"""Chunks with a control: a VACE beside the student, in a stream."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from reference import ControlledReference
from test_vace import CHANNELS, context, vace
from torch import Tensor

from rf_core.config import ControlConfig
from rf_core.decoders.vae import VAEState
from rf_core.families import FAMILIES
from rf_core.fast.graphs import GraphedModel, TraceCapture
from rf_core.fast.parallel import SequenceParallelModel, Split
from rf_core.fast.quantise import quantise_linears
from rf_core.memory.offload import stream_layers
from rf_core.model import ControlTokens
from rf_core.state import Snapshot
from rf_core.stream import Stream, chunk_noise
from rf_core.vace import Control, ControlledModel

FORMS = [ControlConfig(past=past, clean=clean) for past in (True, False) for clean in (True, False)]
of_every_form = pytest.mark.parametrize(
    "form", FORMS, ids=[f"past {f.past}, clean {f.clean}" for f in FORMS]
)
DEEP = replace(tiny.CONFIG, num_layers=3)
LAYERS = (0, 2)


def controlled(form: ControlConfig | None = None, seed: int = 0) -> ControlledModel:
    return ControlledModel(tiny.model(DEEP, seed), vace(DEEP, LAYERS), form)


def stream_of(model: Any = None, form: ControlConfig | None = None, **options: Any) -> Stream:
    given = {"model": model or controlled(form), "cache": tiny.window(9, 3), **options}
    return tiny.stream(**given)


def control(chunk: int, frames: int = 3, strength: float = 1.0, batch: int = 1) -> Control:
    return Control(context=context(frames, chunk, batch), strength=strength)


def steered(stream: Stream, chunks: int, strength: float = 1.0) -> Tensor:
    """The next chunks, each by the control of its place."""
    made = []
    for _ in range(chunks):
        given = control(stream.state.num_chunks, stream.next_frames, strength)
        made.append(stream.step(control=given).latents)
    return torch.cat(made, dim=2)


def plain(stream: Stream, chunks: int) -> Tensor:
    return torch.cat([stream.step().latents for _ in range(chunks)], dim=2)


def reference_of(stream: Stream, controls: list[tuple[Tensor, float] | None]) -> Any:
    """The slow implementation, and the noise of so many chunks."""
    model, config, sampler = stream.model, stream.cache_config, stream.sampler
    weights = {**model.base.state_dict(), **model.vace.state_dict()}
    given = controls, model.control.past, model.control.clean
    found = ControlledReference(weights, model.config, config, sampler, LAYERS, *given)
    shape = (model.config.in_dim, config.chunk_frames, *stream.latent_size)
    seeds = [stream.state.seed + b for b in range(stream.batch)]
    draws = [chunk_noise(seeds, n, shape, len(sampler.steps)) for n in range(len(controls))]
    noise = torch.cat([d[0] for d in draws], 2)
    return found, (noise, [r for d in draws for r in d[1:]])


def near(made: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(made, wanted, atol=2e-5, rtol=1e-4)


@of_every_form
@pytest.mark.parametrize(
    ("cache", "batch"),
    [
        (tiny.window(9, 3), 1),
        (tiny.window(6, 0), 2),
        (tiny.window(8, 2), 1),
        (tiny.window(9, 2, anchor_frames=1), 1),
    ],
    ids=["published window", "no sink, batch 2", "a sink of two frames", "an anchor"],
)
def test_a_controlled_stream_equals_a_rollout_that_rebuilds_its_window(form, cache, batch):
    stream = stream_of(form=form, cache=cache, batch=batch)
    strengths = (1.0, 0.5, None, 0.0, 1.5, 1.0)
    controls = [
        None if strength is None else (context(3, n, batch), strength)
        for n, strength in enumerate(strengths)
    ]
    slow, noise = reference_of(stream, controls)
    made = [
        stream.step(control=each and Control(context=each[0], strength=each[1])).latents
        for each in controls
    ]
    near(torch.cat(made, 2), slow.stream(*noise, tiny.prompt().expand(batch, -1, -1)))


@of_every_form
def test_a_control_changes_the_chunk_and_how_later_ones_follow(form):
    made, without = steered(stream_of(form=form), 1), plain(stream_of(form=form), 1)
    assert (made - without).abs().max() > 0.05
    weak = steered(stream_of(form=form), 1, strength=0.1)
    assert (weak - without).abs().max() < (made - without).abs().max()


@of_every_form
def test_without_a_control_and_at_strength_0_a_stream_is_the_student_s_own_to_the_bit(form):
    student = tiny.stream(model=tiny.model(DEEP), cache=tiny.window(9, 3))
    wanted = plain(student, 5)
    assert torch.equal(plain(stream_of(form=form), 5), wanted)
    assert torch.equal(steered(stream_of(form=form), 5, strength=0), wanted)
    switched = plain(student, 1), student.switch(tiny.prompt(5)), plain(student, 2)
    stream = stream_of(form=form)
    steered(stream, 6, strength=0)
    stream.switch(tiny.prompt(5))
    assert torch.equal(steered(stream, 2, strength=0), switched[-1])


def test_where_the_vace_sees_no_past_the_cache_is_the_student_s():
    one, other = (stream_of(form=form).state.cache for form in (FORMS[0], FORMS[2]))
    assert [len(cache.k_NBWHD) for cache in (one, other)] == [5, 3]


def test_what_does_not_change_within_a_chunk_is_computed_once(monkeypatch):
    stream, calls = stream_of(), []
    embed = type(stream.model.vace).embed
    monkeypatch.setattr(
        type(stream.model.vace), "embed", lambda *given: calls.append(1) or embed(*given)
    )
    steered(stream, 3)
    stream.finish_clean_pass()
    assert len(calls) == 3


@of_every_form
@pytest.mark.parametrize("chunks", [1, 4])
def test_a_saved_stream_goes_on_to_the_bit(tmp_path, form, chunks):
    stream = stream_of(form=form)
    steered(stream, chunks, 0.7)
    stream.switch(tiny.prompt(5), "recache")
    stream.snapshot().save(tmp_path / "s.safetensors")
    again = Stream.from_snapshot(stream.model, Snapshot.load(tmp_path / "s.safetensors"))
    twin = stream.fork()
    wanted = steered(stream, 2)
    assert torch.equal(steered(again, 2), wanted)
    assert torch.equal(steered(twin, 2), wanted)


@of_every_form
def test_a_compact_snapshot_before_any_eviction_is_exact_to_rounding(form):
    stream = stream_of(form=form)
    steered(stream, 2, 0.7), plain(stream, 1)
    again = Stream.from_snapshot(stream.model, stream.snapshot(compact=True))
    near(steered(again, 1), steered(stream, 1))


@of_every_form
def test_a_recache_runs_the_past_again_with_its_control(form):
    """What it leaves is what the same chunks leave that were made under the new prompt."""
    stream, other = stream_of(form=form), stream_of(form=form, prompt_embeds=tiny.prompt(5))
    made = [stream.step(control=control(n, strength=0.5 + n / 4)).latents for n in range(3)]
    stream.switch(tiny.prompt(5), "recache")
    stream.step(control=control(3))
    for n, latents in enumerate(made):
        # The sink is not run again, so the first is kept under the old prompt.
        if n == 0:
            other.state.prompt_embeds = tiny.prompt()
        other.replay(latents, control=control(n, strength=0.5 + n / 4))
        other.finish_clean_pass()
        other.state.prompt_embeds = tiny.prompt(5)
    other.state.cache.advance()
    ours, theirs = stream.state.cache, other.state.cache
    for one, two in zip(ours.tensors().values(), theirs.tensors().values(), strict=True):
        near(one[:, :, : 6 * 6], two[:, :, : 6 * 6])


@pytest.mark.parametrize("mode", ["soft", "recache", "blend 2", "cut"])
def test_prompts_change_while_a_control_runs(mode):
    stream, other = stream_of(), stream_of()
    steered(stream, 4), steered(other, 4)
    stream.switch(tiny.prompt(5), mode)
    assert not torch.equal(steered(stream, 3), steered(other, 3))


def test_after_a_cut_nothing_of_the_control_before_is_left():
    stream, fresh = stream_of(), stream_of(prompt_embeds=tiny.prompt(5))
    steered(stream, 4)
    stream.switch(tiny.prompt(5), "cut")
    fresh.state.num_chunks = 4
    assert torch.equal(steered(stream, 4), steered(fresh, 4))


@of_every_form
def test_a_chunk_is_made_again_of_its_latents_and_its_control(form):
    stream, twin = stream_of(form=form), stream_of(form=form)
    for number in range(5):
        given = control(number, strength=0.8) if number != 2 else None
        twin.replay(stream.step(control=given).latents, control=given)
    assert torch.equal(steered(stream, 2), steered(twin, 2))


def test_a_stopped_chunk_leaves_the_stream_as_it_was():
    stream, twin = stream_of(), stream_of()
    steered(stream, 4), steered(twin, 4)

    def stop(kind: str, number: int) -> None:
        if (kind, number) == ("denoise", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream.step(stop, control=control(9))
    assert torch.equal(steered(stream, 2), steered(twin, 2))


@pytest.mark.parametrize(
    "cache",
    [
        tiny.window(9, 3, first_chunk_frames=1),
        tiny.window(9, 3, positions="absolute", recache="joint"),
        tiny.window(9, 3, recache="joint_new_sink"),
        tiny.window(8, 3, memory_rates=(0.01, 0.1)),
        tiny.window(6, 0, rebuild="first"),
        tiny.window(9, 3, accumulator="float32"),
        tiny.window(9, 2, anchor_frames=1),
    ],
    ids=["first chunk", "absolute", "new sink", "memories", "rebuilt", "float32", "anchor"],
)
@of_every_form
def test_every_family_s_window_takes_a_control(tmp_path, cache, form):
    stream = stream_of(form=form, cache=cache)
    steered(stream, 5)
    stream.switch(tiny.prompt(5), "recache")
    stream.snapshot().save(tmp_path / "s.safetensors")
    again = Stream.from_snapshot(stream.model, Snapshot.load(tmp_path / "s.safetensors"))
    wanted = steered(stream, 3)
    assert torch.equal(steered(again, 3), wanted)
    silent, student = stream_of(form=form, cache=cache), stream_of(tiny.model(DEEP), cache=cache)
    for each in (silent, student):
        steered(each, 5, 0) if each is silent else plain(each, 5)
        each.switch(tiny.prompt(5), "recache")
    assert torch.equal(steered(silent, 3, 0), plain(student, 3))


def test_a_rebuilt_context_is_made_anew_with_its_control():
    cache = tiny.window(6, 0, rebuild="first")
    stream = stream_of(form=ControlConfig(past=True, clean=True), cache=cache)
    steered(stream, 4)
    before = stream.state.first_control, stream.state.last_control
    assert [each.shape[2] for each in before] == [1, 5]
    assert torch.equal(before[1][:, :-1, -3:], context(3, 3))


class Pictures:
    """A decoder whose images are its latents' means, and whose latents are of its images."""

    spatial_factor, kind = 8, "pictures"

    def __init__(self):
        self.decoded: list[int] = []

    def decode(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        self.decoded.append(latents.shape[2])
        done = 0 if state is None else state.num_frames
        means = latents.mean(1).repeat_interleave(4, dim=1)[:, :, None, :, :]
        images = means.repeat_interleave(8, -1).repeat_interleave(8, -2).expand(-1, -1, 3, -1, -1)
        return images, VAEState({}, done + latents.shape[2])

    def encode(self, images: Tensor) -> Tensor:
        small = images[:, :, 0, ::8, ::8]
        return small[:, None].expand(-1, 4, -1, -1, -1).clone()


@of_every_form
def test_a_head_that_is_encoded_again_has_the_control_of_its_place(form, tmp_path):
    cache = tiny.window(6, 0, rebuild="reencoded")
    stream = stream_of(form=form, cache=cache, decoder=Pictures())
    kept = stream_of(form=form, cache=replace(cache, rebuild="first"))
    assert not torch.equal(steered(stream, 5), steered(kept, 5))
    stream.snapshot().save(tmp_path / "s.safetensors")
    saved = Snapshot.load(tmp_path / "s.safetensors")
    again = Stream.from_snapshot(stream.model, saved, decoder=Pictures())
    assert torch.equal(steered(again, 3), steered(stream, 3))
    if form.past or form.clean:
        assert torch.equal(stream._head()[:, 4:-1], context(3, 7)[:, :, :1])


@of_every_form
def test_a_cache_of_8_bits_is_close(form):
    exact = steered(stream_of(form=form), 5)
    made = steered(stream_of(form=form, cache=tiny.window(9, 3, storage="int8")), 5)
    assert 0 < float((made - exact).norm() / exact.norm()) < 0.05


def test_keys_rotated_in_every_pass_give_the_same_bits():
    assert torch.equal(steered(stream_of(keep_rotated=False), 5), steered(stream_of(), 5))


@of_every_form
def test_weights_that_are_streamed_from_the_host_give_the_same_bits(form):
    wanted = steered(stream_of(form=form), 5)
    model = controlled(form)
    stream_layers(model.base, "blocks", "cpu")
    stream_layers(model.vace, "vace_blocks", "cpu")
    assert torch.equal(steered(stream_of(model), 5), wanted)


def test_weights_of_8_bits_are_close():
    exact, model = steered(stream_of(), 4), controlled()
    quantise_linears(model.base)
    quantise_linears(model.vace)
    made = steered(stream_of(model), 4)
    assert 0 < float((made - exact).norm() / exact.norm()) < 0.3


def test_weights_of_the_student_may_change_between_chunks():
    model = controlled()
    stream = stream_of(model)
    steered(stream, 2)
    stream.forget_weights()
    model.base.blocks[0].ffn[0].weight.mul_(1.5)
    again = Stream.from_snapshot(model, stream.snapshot())
    assert torch.equal(steered(stream, 2), steered(again, 2))


class Traced(TraceCapture):
    patience = 0


@pytest.mark.slow
@pytest.mark.parametrize("form", [FORMS[0], FORMS[3]], ids=["past and clean", "neither"])
def test_recorded_passes_make_the_same_video(form):
    graphed = GraphedModel(controlled(form), Traced())
    for strength in (1.0, 0.3):  # the second by passes that the first has recorded
        made, wanted = stream_of(graphed), stream_of(form=form)
        for stream in (made, wanted):
            stream.latents = [steered(stream, 4, strength), plain(stream, 2), steered(stream, 2, 0)]
            stream.switch(tiny.prompt(5), "recache")
            stream.latents.append(steered(stream, 2))
        assert torch.equal(torch.cat(made.latents, 2), torch.cat(wanted.latents, 2))
        facts = [each.snapshot().facts for each in (made, wanted)]
        assert facts[0].get("control") == facts[1].get("control")


def test_a_guide_and_a_control_go_together():
    guide = torch.randn(1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(7))
    made = {
        (guided, strength): stream_of().step(
            guide=guide if guided else None, strength=0.5, control=control(0, strength=strength)
        )
        for guided in (True, False)
        for strength in (0, 1)
    }
    latents = [chunk.latents for chunk in made.values()]
    assert all(not torch.equal(a, b) for n, a in enumerate(latents) for b in latents[:n])
    same = stream_of().step(guide=guide, strength=1, control=control(0))
    assert torch.equal(same.latents, made[False, 1].latents)


def test_a_batch_equals_its_samples_made_alone():
    both = stream_of(batch=2)
    one, two = stream_of(), stream_of(seed=1)
    contexts = [context(3, n, 2) for n in range(4)]
    made = [both.step(control=Control(context=each)).latents for each in contexts]
    for sample, stream in enumerate((one, two)):
        alone = [
            stream.step(control=Control(context=each[sample : sample + 1])).latents
            for each in contexts
        ]
        near(torch.cat(made, 2)[sample : sample + 1], torch.cat(alone, 2))
    shared, each = stream_of(batch=2), stream_of(batch=2)
    given = context(3, 0)
    assert torch.equal(
        shared.step(control=Control(context=given)).latents,
        each.step(control=Control(context=given.expand(2, -1, -1, -1, -1))).latents,
    )


def test_a_control_that_does_not_fit_is_refused_before_anything_is_done():
    stream = stream_of()
    for shape in ((1, CHANNELS, 4, 4, 6), (1, 16, 3, 4, 6), (2, CHANNELS, 3, 4, 6), (1, 3)):
        with pytest.raises(ValueError, match="the control of shape"):
            stream.step(control=Control(context=torch.zeros(shape)))
    with pytest.raises(ValueError, match="not finite"):
        stream.step(control=Control(context=context() * float("nan")))
    for strength in (-1, 11, float("nan")):
        with pytest.raises(ValueError, match="strength"):
            control(0, strength=strength)
    with pytest.raises(ValueError, match="takes no control"):
        tiny.stream().step(control=control(0))
    rolling = FAMILIES["rolling_forcing"]
    options = {"cache": rolling.cache, "sampler": rolling.sampler}
    with pytest.raises(ValueError, match="rolling"):
        stream_of(**options).step(control=control(0))
    assert torch.equal(plain(stream, 1), plain(stream_of(), 1))
    assert torch.equal(
        plain(stream_of(**options), 4), plain(stream_of(tiny.model(DEEP), **options), 4)
    )


def test_several_processes_do_without_a_control():
    split = Split(rank=0, world_size=2, axis=-2, run=3)
    with pytest.raises(ValueError, match="runs in one process"):
        SequenceParallelModel(controlled(), split)


def test_a_snapshot_of_another_control_is_refused_by_name():
    stream = stream_of()
    steered(stream, 2)
    snapshot = stream.snapshot()
    with pytest.raises(ValueError, match="control's past"):
        Stream.from_snapshot(tiny.model(DEEP), snapshot)
    other = ControlledModel(tiny.model(DEEP), vace(DEEP, LAYERS, seed=6))
    with pytest.raises(ValueError, match="control's past"):
        Stream.from_snapshot(other, snapshot)
    alone = stream_of(form=FORMS[2])
    steered(alone, 2)
    with pytest.raises(ValueError, match="put the VACE beside it"):
        Stream.from_snapshot(tiny.model(DEEP), alone.snapshot())
    student = tiny.stream(model=tiny.model(DEEP), cache=tiny.window(9, 3))
    plain(student, 2)
    begun = Stream.from_snapshot(alone.model, student.snapshot())
    assert torch.isfinite(steered(begun, 4)).all()


def test_a_snapshot_with_a_control_of_another_length_is_refused(tmp_path: Path):
    stream = stream_of()
    steered(stream, 4)
    snapshot = stream.snapshot()
    short = {**snapshot.tensors, "last_control": snapshot.tensors["last_control"][:, :, 1:]}
    with pytest.raises(ValueError, match="a control of"):
        Stream.from_snapshot(stream.model, replace(snapshot, tensors=short))
    for value in (-1, 4, "1", True):
        facts = {**snapshot.facts, "reference_frames": value}
        with pytest.raises(ValueError, match="references"):
            Stream.from_snapshot(stream.model, replace(snapshot, facts=facts))


# References.


def references(frames: int = 2, strength: float = 1.0) -> Control:
    return control(70, frames, strength)


@of_every_form
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_references_are_a_hidden_chunk_in_front(form, frames):
    stream = stream_of(form=form)
    controls = [(context(3, n), 1.0) for n in range(6)]
    slow, noise = reference_of(stream, controls)
    slow.refer_to(context(frames, 70), tiny.prompt())
    stream.refer_to(references(frames))
    assert stream.state.num_chunks == 0 and stream.next_frames == 3 and stream.decodes_afresh
    near(steered(stream, 6), slow.stream(*noise, tiny.prompt()))


def test_references_change_the_video_and_last_until_a_cut():
    stream, without = stream_of(), stream_of()
    stream.refer_to(references())
    assert (steered(stream, 1) - steered(without, 1)).abs().max() > 0.01
    steered(stream, 3), steered(without, 3)
    for each in (stream, without):
        each.switch(tiny.prompt(5), "cut")
    assert torch.equal(steered(stream.fork(), 2), steered(without.fork(), 2))
    stream.refer_to(references())
    assert not torch.equal(steered(stream, 2), steered(without, 2))


@pytest.mark.parametrize("chunks", [0, 1, 4])
@pytest.mark.parametrize("compact", [True, False])
def test_a_stream_with_references_is_saved(tmp_path, chunks, compact):
    stream = stream_of(cache=tiny.window(12, 3))
    stream.refer_to(references())
    if chunks:
        steered(stream, chunks)
    stream.snapshot(compact=compact).save(tmp_path / "s.safetensors")
    again = Stream.from_snapshot(stream.model, Snapshot.load(tmp_path / "s.safetensors"))
    assert again.next_frames == 3
    made, wanted = steered(again, 2), steered(stream, 2)
    assert torch.equal(made, wanted) if not compact else made.shape == wanted.shape
    if compact and chunks < 4:
        near(made, wanted)


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_references_are_never_decoded(chunks):
    decoder, again = Pictures(), Pictures()
    stream = stream_of(decoder=decoder)
    stream.refer_to(references())
    steered(stream, chunks)
    assert decoder.decoded == [3] * chunks
    restored = Stream.from_snapshot(stream.model, stream.snapshot(compact=True), decoder=again)
    # As much of the video as a compact snapshot holds, from a whole chunk on.
    assert sum(again.decoded) == {1: 3, 2: 5, 5: 6}[chunks]
    assert restored.state.decoder.num_frames == sum(again.decoded)


def test_a_first_chunk_of_another_length_follows_references():
    stream = stream_of(cache=tiny.window(9, 3, first_chunk_frames=1))
    stream.refer_to(references())
    assert stream.next_frames == 1
    steered(stream, 1)
    assert stream.next_frames == 3


@pytest.mark.parametrize("recache", ["chunks", "joint", "joint_new_sink"])
@pytest.mark.parametrize("chunks", [0, 1, 5])
def test_a_recache_comes_after_references(tmp_path, recache, chunks):
    stream = stream_of(cache=tiny.window(9, 3, recache=recache))
    stream.refer_to(references())
    if chunks:
        steered(stream, chunks)
    stream.switch(tiny.prompt(5), "recache")
    steered(stream, 1)
    stream.snapshot().save(tmp_path / "s.safetensors")
    again = Stream.from_snapshot(stream.model, Snapshot.load(tmp_path / "s.safetensors"))
    assert torch.equal(steered(again, 3), steered(stream, 3))


def test_references_fill_the_anchor_first_where_they_never_fade():
    stream = stream_of(cache=tiny.window(9, 1, anchor_frames=2))
    stream.refer_to(references(3))
    steered(stream, 1)
    tokens = stream.state.cache.frame_tokens
    before = stream.state.cache.k_NBWHD[:, :, : 3 * tokens].clone()
    steered(stream, 4)
    after = stream.state.cache.k_NBWHD[:, :, : 3 * tokens]
    assert torch.equal(after[:, :, : 2 * tokens], before[:, :, : 2 * tokens])
    assert not torch.equal(after[:, :, 2 * tokens :], before[:, :, 2 * tokens :])
    with pytest.raises(ValueError, match=r"4 reference images .* 3 frames"):
        stream_of(cache=tiny.window(9, 1, anchor_frames=2)).refer_to(references(4))


def test_references_that_cannot_be_are_refused():
    stream = stream_of()
    steered(stream, 1)
    with pytest.raises(ValueError, match="before the first chunk"):
        stream.refer_to(references())
    stream = stream_of()
    with pytest.raises(ValueError, match=r"4 reference images .* 3 frames"):
        stream.refer_to(references(4))
    with pytest.raises(ValueError, match="references of shape"):
        stream.refer_to(Control(context=torch.zeros(1, CHANNELS, 1, 4, 4)))
    stream.refer_to(references())
    with pytest.raises(ValueError, match="before the first chunk"):
        stream.refer_to(references())
    with pytest.raises(ValueError, match="takes no control"):
        tiny.stream().refer_to(references())
    with pytest.raises(ValueError, match="0 frames"):
        stream_of(cache=tiny.window(6, 0)).refer_to(references())


def test_tokens_say_whether_anything_is_added():
    model = controlled()
    assert ControlTokens(*model.embed_control(context(), None, torch.float32)).strength_F is None
