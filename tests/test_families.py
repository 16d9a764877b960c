"""Families of students: whose a file is, and that it streams by that family's preset."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest
import test_generate
import tiny
import torch
from safetensors.torch import save_file
from test_generate import arguments, assert_same_images, images_of, stop_here
from test_live import Trial, latents_by_branch, stream_of
from torch import Tensor

from rf_core.__main__ import main
from rf_core.config import WAN_14B, CacheConfig, ModelConfig, SamplerConfig
from rf_core.families import AUTO, DEFAULT, FAMILIES, family_of
from rf_core.live import Prompt, Rewind
from rf_core.model import WanModel
from rf_core.options import DEMO
from rf_core.pace import Pace
from rf_core.prompts import ChunkClock
from rf_core.rolling import check_rolling
from rf_core.stream import Stream, split_chunks
from rf_core.weights.checkpoint import (
    CheckpointError,
    convert,
    describe,
    load_student,
    read_checkpoint,
    write_checkpoint,
)
from rf_core.weights.lora import Lora, apply_loras

weights = test_generate.weights

SMALL = ModelConfig(
    dim=128, ffn_dim=32, freq_dim=8, text_dim=12, in_dim=4, out_dim=4, num_heads=1, num_layers=2
)

FRAMEWISE = ("causal_forcing_frame", "causal_forcing_2step", "causal_forcing_1step")
RANK = 4


def weights_of(config: ModelConfig = SMALL, seed: int = 0) -> dict[str, Tensor]:
    """Random ones under Wan's own names."""
    generator = torch.Generator().manual_seed(seed)
    state = WanModel(config, device="meta").state_dict()
    return {key: torch.randn(each.shape, generator=generator) for key, each in state.items()}


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def linears(tensors: dict[str, Tensor]) -> list[str]:
    """Names of every linear layer of the blocks."""
    return [
        key.removesuffix(".weight")
        for key, tensor in tensors.items()
        if key.startswith("blocks.") and key.endswith(".weight") and tensor.ndim == 2
    ]


def peft_adapter(tensors: dict[str, Tensor], seed: int = 9) -> dict[str, Tensor]:
    """An adapter of them all, as PEFT names its state."""
    generator, adapter = torch.Generator().manual_seed(seed), {}
    for name in linears(tensors):
        rows, columns = tensors[f"{name}.weight"].shape
        for part, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
            key = f"base_model.model.{name}.lora_{part}.weight"
            adapter[key] = torch.randn(shape, generator=generator)
    return adapter


def with_adapter(tensors: dict[str, Tensor], adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + B A, as the rank is the alpha."""
    merged = dict(tensors)
    for name in linears(tensors):
        down, up = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        merged[f"{name}.weight"] = tensors[f"{name}.weight"] + up @ down
    return merged


def bundle(path: Path, prefix: str = "model.", *networks: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: below(prefix, weights_of()) for name in networks}, path)
    return path


# Presets


@pytest.mark.parametrize("name", FAMILIES)
def test_a_preset_streams_from_its_first_chunk_into_its_full_window(name: str) -> None:
    family = family_of(name)
    chunks = family.cache.window_frames // family.cache.chunk_frames + 2
    stream = tiny.stream(cache=family.cache, sampler=family.sampler)
    for _ in range(chunks):
        assert stream.step().latents.isfinite().all()
    if family.sampler.rolling:
        check_rolling(family.cache, family.sampler)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"first_steps": (1000, 500)}, "first_steps are"),
        ({"steps": (1000, 900, 800, 700, 600, 500, 400)}, "7 chunks of 3 frames are denoised"),
    ],
)
def test_a_rolling_schedule_that_cannot_be_is_refused_by_name(change: Any, said: str) -> None:
    family = FAMILIES["rolling_forcing"]
    with pytest.raises(ValueError, match=said):
        check_rolling(family.cache, replace(family.sampler, **change))


def test_an_unknown_family_is_refused_with_all_that_there_are() -> None:
    with pytest.raises(ValueError, match="family is 'wan'; choose one of auto, reward_forcing, "):
        family_of("wan")


# Recognition


@pytest.mark.parametrize(
    ("name", "prefix", "networks", "family"),
    [
        ("rewardforcing.pt", "model.", ("generator_ema",), "reward_forcing"),
        ("self_forcing_dmd.pt", "model.", ("generator_ema",), "self_forcing"),
        ("Self-Forcing.pt", "model.", ("generator", "generator_ema"), "self_forcing"),
        ("chunkwise/causal_forcing.pt", "model.", ("generator",), "causal_forcing"),
        (
            "framewise/causal_forcing.pt",
            "model._fsdp_wrapped_module.",
            ("generator_ema",),
            "causal_forcing_frame",
        ),
        ("causal_forcing.pt", "model.", ("generator_ema",), "causal_forcing_frame"),
        ("causal-forcing++/framewise-2step.pt", "model.", ("generator_ema",), FRAMEWISE[1]),
        ("causal-forcing++/framewise-1step.pt", "model.", ("generator_ema",), FRAMEWISE[2]),
        ("causal_forcing_frame_2step.pt", "model.", ("generator_ema",), FRAMEWISE[1]),
        ("longlive_base.pt", "model.", ("generator",), "longlive"),
        ("longlive_infinity.pt", "model.", ("generator",), "longlive_infinity"),
        ("LongLive-1.3B-Infinity.pt", "model.", ("generator",), "longlive_infinity"),
        ("memrope.pt", "model.", ("generator_ema",), "memrope"),
        ("rolling_forcing_dmd.pt", "_fsdp_wrapped_module.", ("generator_ema",), "rolling_forcing"),
    ],
)
def test_an_official_file_is_known_by_its_name_which_is_said(
    tmp_path: Path, name: str, prefix: str, networks: tuple[str, ...], family: str
) -> None:
    found = read_checkpoint(bundle(tmp_path / "models" / name, prefix, *networks))
    preset = FAMILIES[family]
    assert (found.family, found.family_from) == (family, "name")
    assert (found.cache, found.sampler, found.size) == (preset.cache, preset.sampler, preset.size)
    assert not found.recorded
    assert f"{preset.title}, by its file's name alone" in describe(found)


def test_a_file_that_tells_nothing_is_assumed_to_be_ours_and_asks(tmp_path: Path) -> None:
    found = read_checkpoint(bundle(tmp_path / "model.pt", "model.", "generator_ema"))
    assert (found.family, found.family_from) == (DEFAULT, "nothing")
    assert (found.cache, found.sampler) == (CacheConfig(), SamplerConfig())
    (row,) = [line for line in describe(found).splitlines() if line.startswith("family ")]
    for word in ("Reward Forcing", "no key and no name", "Self-Forcing", "choose the family"):
        assert word in row
    assert "Krea" not in row  # whose network is another


@pytest.mark.parametrize("name", ["model.pt", "longlive.pt", "longlive_infinity.pt", "memrope.pt"])
def test_an_adapter_beside_the_generator_tells_longlive_and_is_merged_exactly(
    tmp_path: Path, name: str
) -> None:
    base, critic = weights_of(), weights_of(seed=1)
    adapter = peft_adapter(base)
    file = {
        "generator": below("model.", base),
        "generator_lora": adapter,
        "critic_lora": peft_adapter(critic, seed=5),
        "step": 7,
    }
    torch.save(file, tmp_path / name)
    found = read_checkpoint(tmp_path / name)
    expected = {"model.pt": "longlive", "longlive.pt": "longlive"}.get(name, name[:-3])
    assert (found.family, found.family_from) == (expected, "keys")
    assert "an adapter beside its generator" in describe(found)
    student, _ = load_student(tmp_path / name, device="cpu", dtype=torch.float32)
    state = student.state_dict()
    for key, tensor in with_adapter(base, adapter).items():
        assert torch.equal(state[key], tensor), key
    converted = convert(tmp_path / name, tmp_path / "out.safetensors")
    assert (converted.family, converted.family_from) == (expected, "metadata")
    assert converted.cache == FAMILIES[expected].cache
    for key, tensor in with_adapter(base, adapter).items():
        assert torch.equal(converted.tensors[key], tensor), key


def test_longlives_two_files_are_a_student_and_a_lora(tmp_path: Path) -> None:
    base = weights_of()
    adapter = peft_adapter(base)
    torch.save({"generator": below("model.", base)}, tmp_path / "longlive_base.pt")
    torch.save({"generator_lora": adapter, "critic_lora": adapter}, tmp_path / "lora.pt")
    found = read_checkpoint(tmp_path / "longlive_base.pt")
    merged = apply_loras(found.merged(), [Lora(path=tmp_path / "lora.pt")])
    for key, tensor in with_adapter(base, adapter).items():
        assert torch.equal(merged[key], tensor), key
    with pytest.raises(CheckpointError, match="is a LoRA, not a model; give it with --lora"):
        read_checkpoint(tmp_path / "lora.pt")


def test_an_adapter_for_other_layers_is_refused_when_it_is_merged(tmp_path: Path) -> None:
    base = weights_of()
    adapter = {key.replace("blocks.1.", "blocks.7."): t for key, t in peft_adapter(base).items()}
    file = {"generator": below("model.", base), "generator_lora": adapter}
    torch.save(file, tmp_path / "bundle.pt")
    with pytest.raises(CheckpointError, match=r"bundle\.pt: has an adapter .* match nothing"):
        load_student(tmp_path / "bundle.pt", device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "prefix", "expected"),
    [
        ("diffusion.safetensors", "model.", ("krea", "keys")),
        ("krea-realtime-video-14b.safetensors", "model.", ("krea", "keys")),
        ("wan_14b.safetensors", "", (DEFAULT, "nothing")),
    ],
)
def test_a_flat_14b_is_kreas(
    tmp_path: Path, name: str, prefix: str, expected: tuple[str, str], monkeypatch: Any
) -> None:
    # Sizes of 14B take 56 GB: those that tell are read from shapes, of tensors without memory.
    shapes = WanModel(WAN_14B, device="meta").state_dict()
    file = below(prefix, {key: torch.empty_like(t, device="meta") for key, t in shapes.items()})
    path = tmp_path / name
    path.touch()
    monkeypatch.setattr(
        "rf_core.weights.files.read_file", lambda path: ("safetensors", dict(file), {})
    )
    found = read_checkpoint(path)
    assert (found.family, found.family_from) == expected
    assert found.cache == FAMILIES[expected[0]].cache


def test_a_small_file_is_not_kreas_whatever_it_is_called(tmp_path: Path) -> None:
    save_file(below("model.", weights_of()), tmp_path / "krea.safetensors")
    assert read_checkpoint(tmp_path / "krea.safetensors").family == DEFAULT


def test_what_is_chosen_goes_before_all_that_a_file_tells(tmp_path: Path) -> None:
    path = bundle(tmp_path / "self_forcing.pt", "model.", "generator_ema")
    found = read_checkpoint(path, family="causal_forcing_2step")
    assert (found.family, found.family_from) == ("causal_forcing_2step", "choice")
    assert found.sampler == FAMILIES["causal_forcing_2step"].sampler
    with pytest.raises(ValueError, match="family is 'causal'; choose one of auto"):
        read_checkpoint(path, family="causal")


def written(path: Path, **options: Any) -> Path:
    cache, sampler = CacheConfig(window_frames=7, sink_frames=2), SamplerConfig(steps=(1000, 500))
    write_checkpoint(path, weights_of(), SMALL, cache, sampler, **options)
    return path


def test_recorded_settings_go_before_the_familys_and_not_before_another_that_is_chosen(
    tmp_path: Path,
) -> None:
    path = written(tmp_path / "longlive.safetensors", family="self_forcing")
    found = read_checkpoint(path)
    assert (found.family, found.family_from) == ("self_forcing", "metadata")
    assert (found.cache.window_frames, found.sampler.steps) == (7, (1000, 500))
    assert found.recorded == {"cache", "sampler"} and found.size == (480, 832)
    assert read_checkpoint(path, family="self_forcing").cache == found.cache
    other = read_checkpoint(path, family="memrope")
    assert (other.cache, other.recorded) == (FAMILIES["memrope"].cache, frozenset())
    demo = read_checkpoint(DEMO / "student.safetensors", family="memrope")
    assert (demo.cache, demo.size) == (FAMILIES["memrope"].cache, (64, 64))


def test_our_files_without_a_family_are_reward_forcings(tmp_path: Path) -> None:
    found = read_checkpoint(written(tmp_path / "longlive.safetensors"))
    assert (found.family, found.family_from) == (DEFAULT, "metadata")
    assert found.cache.window_frames == 7


@pytest.mark.parametrize("name", ["dreaming", 3, "", ["krea"]])
def test_a_recorded_family_that_is_none_is_one_clear_sentence(tmp_path: Path, name: Any) -> None:
    path = tmp_path / "a.safetensors"
    settings = {"format": 1, "cache": None, "sampler": None, "family": name}
    save_file(weights_of(), path, metadata={"reward_forcing": json.dumps(settings)})
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert f"is of family {name!r}" in str(caught.value) and "\n" not in str(caught.value)
    assert read_checkpoint(path, family="krea").family == "krea"


def test_only_a_known_family_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="family is 'dreaming'"):
        written(tmp_path / "a.safetensors", family="dreaming")


# The command line


def test_inspect_says_the_family_how_it_is_known_and_its_licence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bundle(tmp_path / "rolling_forcing_dmd.pt", "model.", "generator_ema")
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    for words in ("Rolling Forcing, by its file's name", "academic use only", "window 24 frames"):
        assert words in out
    assert "steps 1000, 800, 600, 400, 200" in out and "rolling" in out
    assert main(["inspect", str(path), "--family", "krea"]) == 0
    assert "CC-BY-NC-SA-4.0 (non-commercial)" in (out := capsys.readouterr().out)
    assert "Krea Realtime 14B, as chosen" in out and "24 a second" in out


def test_convert_records_the_family_and_what_is_given_beside_it(tmp_path: Path) -> None:
    path, target = bundle(tmp_path / "x.pt", "model.", "generator"), tmp_path / "y.safetensors"
    given = ["--family", "longlive", "--window", "15"]
    assert main(["convert", str(path), str(target), *given]) == 0
    found = read_checkpoint(target)
    assert (found.family, found.family_from) == ("longlive", "metadata")
    assert found.cache == replace(FAMILIES["longlive"].cache, window_frames=15)
    assert found.sampler == FAMILIES["longlive"].sampler


def comment_of(path: Path) -> dict[str, Any]:
    with av.open(str(path)) as file:
        return json.loads(file.metadata["comment"])


def test_kreas_video_has_24_images_a_second_in_the_file_and_in_every_time(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, timeline = tmp_path / "a.mp4", tmp_path / "t.txt"
    timeline.write_text("0s: a cat\n1s [soft]: a dog\n", encoding="utf-8")
    more = ("--timeline", str(timeline), "--seconds", "1.5", "--family", "krea")
    assert main(arguments(weights, output, *more)) == 0
    out = capsys.readouterr().out
    assert "licence: CC-BY-NC-SA-4.0 (non-commercial)" in out and "at 24 images/s" in out
    record, images = comment_of(output), len(images_of(output))
    assert images == 9 + 12 * 3  # the fewest chunks that make 1.5 s of 24
    assert f"{images / 24:.2f} s of video" in out
    assert record["prompts"][1] == [2, "soft", "a dog"]  # which begins at 21 / 24 s
    assert record["family"] == "krea" and record["cache"]["rebuild"] == "reencoded"
    with av.open(str(output)) as file:
        assert file.streams.video[0].average_rate == 24


def test_a_free_familys_run_prints_no_licence_and_what_is_given_wins(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.mp4"
    more = ("--prompt", "x", "--chunks", "2", "--family", "longlive", "--window", "15")
    assert main(arguments(weights, output, *more, "--steps", "1000")) == 0
    record = comment_of(output)
    assert (record["cache"]["window_frames"], record["cache"]["recache"]) == (15, "joint")
    assert record["sampler"] == {"steps": [1000], "shift": 5.0}
    out = capsys.readouterr().out
    assert "licence" not in out and "family: LongLive, as chosen" in out


def test_bench_and_plan_take_a_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--size", "1.3b", "--device", "cpu", "--available", "64GB"]
    caches = []
    for family in (AUTO, "self_forcing"):
        assert main(["plan", *sizes, "--family", family]) == 0
        caches.append(capsys.readouterr().out)
    assert caches[0] != caches[1]
    record = tmp_path / "b.json"
    fast = ["--chunks", "2", "--dtype", "float32", "--device", "cpu", "--graphs", "off"]
    assert main(["bench", *fast, "--family", "longlive", "--json", str(record)]) == 0


# First chunks of their own length, and frame by frame


@pytest.mark.parametrize("cuts", [(), (1,), (2, 5)])
@pytest.mark.parametrize(("chunk", "first"), [(3, 1), (3, 2), (3, None), (1, None)])
def test_the_clock_counts_the_images_that_a_stream_makes(
    chunk: int, first: int | None, cuts: tuple[int, ...]
) -> None:
    cache = CacheConfig(
        window_frames=9, sink_frames=0, chunk_frames=chunk, first_chunk_frames=first
    )
    clock = ChunkClock.of(cache, cuts=cuts)
    stream, made, frames = stream_of("taehv", cache=cache), 0, 0
    for number in range(7):
        if number in cuts:
            stream.switch(tiny.prompt(number), "cut")
        assert (clock.images_before(number), clock.frames_before(number)) == (made, frames)
        assert stream.state.num_chunks == number
        step = stream.step()
        made += step.images.shape[1]
        frames += step.latents.shape[2]
        assert clock.images_of(number) == step.images.shape[1]
        assert clock.chunk_at_image(made - 1) == number
    assert clock.num_chunks(made, "f") == 7 and clock.num_chunks(made + 1, "f") == 8


@pytest.mark.parametrize("first", [0, 4])
def test_a_clock_refuses_a_first_chunk_that_is_none(first: int) -> None:
    with pytest.raises(ValueError, match=rf"first_chunk_frames is {first}; .* 1 to 3 frames"):
        ChunkClock(first_chunk_frames=first)


def test_times_follow_the_images_a_second() -> None:
    clock = ChunkClock(fps=24)
    assert clock.seconds(2) == 21 / 24
    assert (clock.num_chunks(1, "s"), ChunkClock().num_chunks(1, "s")) == (3, 2)


@pytest.mark.parametrize("family", FRAMEWISE)
def test_frame_by_frame_a_run_has_the_length_asked_for_and_resumes_to_the_same_images(
    weights: Path, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    timeline, whole = tmp_path / "t.txt", tmp_path / "whole.mp4"
    text = "0s: a cat\n0.5s [blend 2]: a dog\n1s [cut]: a city\n"
    timeline.write_text(text, encoding="utf-8")
    more = ("--timeline", str(timeline), "--seconds", "1.5", "--family", family)
    assert main(arguments(weights, whole, *more)) == 0
    out = capsys.readouterr().out
    expected, chunks = images_of(whole), len([x for x in out.splitlines() if "left" in x])
    assert len(expected) == 4 * chunks - 2 * 3 >= 24  # two starts, of which one is a cut
    output = tmp_path / "a.mp4"
    stopped = (*more, "--snapshot-every", "1")
    assert stop_here(monkeypatch, weights, output, signal.SIGINT, 4, *stopped) == 130
    assert_same_images(images_of(output), expected[: len(images_of(output))])
    assert main(arguments(weights, output, *more, "--resume")) == 0
    assert_same_images(images_of(output), expected)


def framewise(decoder: str | None = None, **options: Any) -> Stream:
    preset = FAMILIES["causal_forcing_2step"]
    cache = replace(preset.cache, window_frames=6)
    return stream_of(decoder, **{"cache": cache, "sampler": preset.sampler, **options})


def test_one_latent_frame_at_a_time_decodes_to_the_images_of_all_at_once() -> None:
    stream = framewise("wan")
    stream.decoder.codec.double()
    steps = [stream.step() for _ in range(5)]
    assert [each.images.shape[1] for each in steps] == [1, 4, 4, 4, 4]
    latents = torch.cat([each.latents for each in steps], dim=2)
    images, _ = stream.decoder.decode(latents, None)
    torch.testing.assert_close(torch.cat([each.images for each in steps], dim=1), images)


def test_frame_by_frame_a_restored_stream_goes_on_as_if_it_had_not_stopped() -> None:
    for mode in ("soft", "recache", "blend 2", "cut"):
        stream = framewise("taehv")
        for _ in range(7):
            stream.step()
        stream.switch(tiny.prompt(3), mode)
        stream.step()
        twin = framewise("taehv")
        twin.restore(stream.snapshot())
        for _ in range(3):
            own, other = stream.step(), twin.step()
            assert torch.equal(own.latents, other.latents)
            assert torch.equal(own.images, other.images)


def test_frame_by_frame_a_live_session_rewinds_and_its_log_makes_it_again(tmp_path: Path) -> None:
    clip = torch.randn(1, 4, 2, 4, 6, generator=torch.Generator().manual_seed(2))
    script = {3: [Prompt(text="p1")], 6: [Rewind(chunk=1)], 9: [Prompt(text="p2")]}
    trial = Trial(script, framewise(), log=tmp_path / "log.jsonl", clip=clip)
    trial.run(12)
    made = latents_by_branch(tmp_path / "log.jsonl", framewise(), clip=clip)
    assert len(made) == 2 and all(each.shape[2] == 1 for line in made.values() for each in line)


@pytest.mark.parametrize("family", [*FRAMEWISE, "reward_forcing", "rolling_forcing"])
def test_the_passes_of_a_chunk_are_as_many_as_are_counted(family: str) -> None:
    preset, counts = FAMILIES[family], []
    stream = tiny.stream(cache=preset.cache, sampler=preset.sampler)
    for chunk in range(5):
        if chunk == 3:
            stream.switch(tiny.prompt(2), "cut")
        kinds: list[str] = []
        stream.step(lambda kind, number, kinds=kinds: kinds.append(kind))
        counts.append(kinds.count("denoise"))
    assert counts == [preset.sampler.passes_of(chunk in (0, 3)) for chunk in range(5)]


def test_a_start_clips_chunks_leave_the_first_steps_to_the_first_that_is_made() -> None:
    latents = torch.randn(1, 4, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    begun, given = framewise(), framewise()
    begun.start_from(latents)
    for part in split_chunks(latents, given.cache_config):
        given.replay(part, is_start=True)
    assert torch.equal(begun.step().latents, given.step().latents)


def test_the_time_left_counts_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((0.0, 0.0, 5.0, 7.0))
    monkeypatch.setattr("rf_core.pace.time.perf_counter", lambda: next(now))
    pace = Pace(4, 0, "cpu", passes=[5, 2, 2, 2])
    pace.network_begins()
    assert pace.chunk_done(1, 1, 1).seconds_left == 6  # a second a pass
    assert pace.chunk_done(2, 4, 5).seconds_left == 4


def test_a_first_chunk_of_its_own_length_comes_from_a_clip_in_a_session_too(
    tmp_path: Path,
) -> None:
    latents = torch.randn(1, 4, 7, 4, 6)
    cache = CacheConfig(window_frames=9, sink_frames=0, first_chunk_frames=1)
    assert [part.shape[2] for part in split_chunks(latents, cache)] == [1, 3, 3]
    trial = Trial({}, stream_of(cache=cache), log=tmp_path / "log.jsonl", clip=latents)
    trial.run(4)
    made = latents_by_branch(tmp_path / "log.jsonl", stream_of(cache=cache), clip=latents)
    assert [each.shape[2] for each in made["main"]] == [1, *[3] * 6]
