"""A live session that a source guides: its strength is steered, it goes back with it, and its log
makes it again with the same source alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_live import Trial, encode, latents_by_branch, of_kind, stream_of
from torch import Tensor

from rf_core.config import SamplerConfig
from rf_core.live import Cut, Refused, Rewind, Strength, read_command, read_log, replay_log
from rf_core.live.lines import LineContext, describe_command, read_line
from rf_core.prompts import Switch
from rf_core.source import BatchSource, strength_at
from rf_core.stream import GUIDE_STRENGTH, Stream

FOUR_STEPS = SamplerConfig()


def images(count: int = 60, seed: int = 3) -> Tensor:
    return torch.rand(count, 32, 48, 3, generator=torch.Generator().manual_seed(seed))


def source_for(stream: Stream, **options: Any) -> BatchSource:
    given: dict[str, Any] = {"images": images(), "at_end": "loop", **options}
    return BatchSource(encoder=stream.decoder, height=32, width=48, **given)


def guided(stream: Stream, source: BatchSource, strength: float, motion_strength: float = 0.0):
    """The next chunk, of a source that is read in order."""
    guide = source.latents(stream.next_frames, first=stream.decodes_afresh)
    now = strength_at(strength, motion_strength, source.motion)
    return stream.step(guide=guide, strength=now).latents


@pytest.mark.parametrize("motion_strength", [0.0, -0.2])
@pytest.mark.parametrize("decoder", ["wan", "taehv"])
def test_a_steered_source_that_goes_back_guides_to_the_bits_of_one_that_did_not(
    decoder: str, motion_strength: float, tmp_path: Path
) -> None:
    script = {
        1: [Strength(strength=0.7)],
        2: [Cut(text="p1")],
        4: [Rewind(chunk=3)],
        5: [Strength(strength=0.9)],
    }
    stream, log = stream_of(decoder, sampler=FOUR_STEPS), tmp_path / "log.jsonl"
    given = {"source": source_for(stream), "motion_strength": motion_strength, "log": log}
    trial = Trial(script, stream, **given)
    assert not of_kind(trial.run(7), Refused)
    plain = stream_of(decoder, sampler=FOUR_STEPS)
    source, expected = source_for(plain), []
    for chunk, strength in enumerate([GUIDE_STRENGTH, 0.7, 0.7, 0.7, 0.9, 0.9]):
        if chunk == 2:
            plain.switch(encode("p1"), Switch(mode="cut"))
        expected.append(guided(plain, source, strength, motion_strength))
    found = trial.session.recent_latents
    assert len(found) == 6
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert trial.session.outbox.status.strength == 0.9
    again = stream_of(decoder, sampler=FOUR_STEPS)
    made = latents_by_branch(log, again, source=source_for(again))
    assert torch.equal(made["branch-2"][-1], expected[-1])


def test_a_start_clip_is_passed_over_by_its_source() -> None:
    stream, clip = stream_of("wan", sampler=FOUR_STEPS), torch.zeros(1, 16, 3, 4, 6)
    trial = Trial({}, stream, source=source_for(stream), clip=clip)
    trial.run(2)
    plain = stream_of("wan", sampler=FOUR_STEPS)
    source = source_for(plain)
    source.latents(3, first=True)
    plain.start_from(clip)
    expected = [guided(plain, source, GUIDE_STRENGTH) for _ in range(2)]
    for ours, theirs in zip(trial.session.recent_latents[1:], expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_source_that_has_ended_leaves_the_rest_to_the_prompt() -> None:
    stream = stream_of("wan", sampler=FOUR_STEPS)
    trial = Trial({}, stream, source=source_for(stream, images=images(20), at_end="stop"))
    trial.run(3)
    plain = stream_of("wan", sampler=FOUR_STEPS)
    guided(plain, source_for(plain), GUIDE_STRENGTH)
    assert torch.equal(trial.session.recent_latents[1], plain.step().latents)


def test_a_log_is_replayed_with_its_own_source_alone(tmp_path: Path) -> None:
    stream, path = stream_of("wan", sampler=FOUR_STEPS), tmp_path / "log.jsonl"
    Trial({}, stream, source=source_for(stream), strength=0.5, log=path).run(2)
    header = json.loads(path.read_text().splitlines()[0])
    assert header["source"]["strength"] == 0.5 and len(header["source"]["digest"]) == 16

    def replayed(**options: Any) -> None:
        again, loras = stream_of("wan", sampler=FOUR_STEPS), lambda name, strength: None
        source = source_for(again, **options) if options.pop("any", True) else None
        replay_log(read_log(path), again, encode, set_lora=loras, source=source)

    replayed()
    with pytest.raises(ValueError, match=r"log's source has digest .*, this one has .*; replay"):
        replayed(images=images(seed=4))
    with pytest.raises(ValueError, match="the log's source has at_end loop, this one has hold"):
        replayed(at_end="hold")
    with pytest.raises(ValueError, match=r"the log's source has .*, this one has None"):
        replayed(any=False)


def test_a_strength_needs_a_source_and_one_that_can_be() -> None:
    events = Trial({0: [Strength(strength=0.5)]}).run(1)
    (refused,) = of_kind(events, Refused)
    assert refused.why == "there is no source for a strength; begin the stream with one"
    for given in (float("nan"), -1, 2, "0.5", True):
        with pytest.raises(ValueError, match=r"strength is .*; give a number from 0 to 1"):
            read_command({"do": "strength", "strength": given})
    with pytest.raises(ValueError, match="strength is 2; give a number from 0"):
        Trial({}, source=object(), strength=2)


def test_without_a_source_the_status_has_no_strength() -> None:
    trial = Trial({})
    trial.run(1)
    assert trial.session.outbox.status.strength is None


def test_a_strength_is_typed_as_it_is_told() -> None:
    now = LineContext(mode=Switch(), chunk=0)
    assert read_line("/strength 0.4", now) == Strength(strength=0.4)
    assert describe_command(Strength(strength=0.4)) == "strength 0.4"
    with pytest.raises(ValueError, match=r"strength is 'strong'; give a number such as 0.6"):
        read_line("/strength strong", now)
