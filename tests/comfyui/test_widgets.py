"""Every node at the extremes of its widgets, called as ComfyUI calls it, with the demo."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import PACK

PROMPTS = ("a red circle moves right", "a blue square moves up quickly")


def node(name: str) -> Any:
    """A node's class with nothing hidden, as ComfyUI hands it to a call."""
    (found,) = [
        each
        for each in importlib.import_module(f"{PACK}.nodes").NODES
        if each.GET_SCHEMA().node_id == name
    ]
    return found.PREPARE_CLASS_CLONE({"hidden_inputs": {}})


def extremes(name: str) -> dict[str, list[Any]]:
    """The values of each widget that a test must try: every option, or the ends of the range."""
    from comfy_api.latest import io

    found: dict[str, list[Any]] = {}
    for each in node(name).GET_SCHEMA().inputs:
        if isinstance(each, io.Combo.Input):
            found[each.id] = list(each.options)
        elif isinstance(each, io.Int.Input | io.Float.Input):
            found[each.id] = sorted({each.min, each.default, each.max})
    return found


def combinations(values: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """One of each, in all ways."""
    for each in product(*values.values()):
        yield dict(zip(values, each, strict=True))


@pytest.fixture(scope="module")
def loaded(pack: Any) -> Any:
    """The demo's MODEL, CLIP and VAE."""
    return node("RFLoadDemo").execute().result


@pytest.fixture(scope="module")
def prompts(loaded: Any) -> list[Any]:
    """Two CONDITIONINGs."""
    _, clip, _ = loaded
    return [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in PROMPTS]


@pytest.fixture
def sampled(loaded: Any, prompts: list[Any], tmp_path: Path) -> Any:
    """A Streaming Sampler's result with the shortest video."""
    import folder_paths

    model, _, vae = loaded
    before = folder_paths.get_output_directory(), folder_paths.get_temp_directory()
    folder_paths.set_output_directory(str(tmp_path / "output"))
    folder_paths.set_temp_directory(str(tmp_path / "temp"))
    least = {"width": 64, "height": 64, "length": 0.1, "unit": "chunks", "seed": 0, "steps": 1}

    def run(**changes: Any) -> Any:
        values = least | {"vae": vae} | changes
        assert node("RFStreamingSampler").validate_inputs(values["width"], values["height"]) is True
        return node("RFStreamingSampler").execute(model, values.pop("prompt", prompts[0]), **values)

    yield run
    folder_paths.set_output_directory(before[0])
    folder_paths.set_temp_directory(before[1])


def test_a_prompt_switch_does_what_each_of_its_widgets_says(prompts: list[Any]) -> None:
    switch, values = node("RFPromptSwitch"), extremes("RFPromptSwitch")
    first = values | {"at": [0.0], "mode": ["recache"]}
    for begun, then in product(combinations(first), combinations(values | {"at": [1.0, 1e6]})):
        (start,) = switch.execute(prompts[0], **begun).result
        (made,) = switch.execute(prompts[1], timeline=start, **then).result
        entry = made.timeline.entries[-1]
        asked = then["mode"]
        if asked == "blend":
            asked = f"blend {then['blend_chunks']} {then['interpolation']}"
        assert str(entry.switch) == asked.removesuffix(" lerp")
        assert (float(entry.value), entry.unit) == (then["at"], then["unit"][0])
        assert torch.equal(made.embeds["prompt 2"], prompts[1][0][0])


def test_the_first_prompt_switch_says_that_it_has_nothing_to_switch_from(
    prompts: list[Any],
) -> None:
    for values in combinations(extremes("RFPromptSwitch") | {"at": [0.0]}):
        if values["mode"] == "recache":
            continue
        with pytest.raises(ValueError, match=r"first Prompt Switch.*mode to recache"):
            node("RFPromptSwitch").execute(prompts[0], **values)


@pytest.mark.parametrize("mode", ["recache", "soft", "blend", "cut"])
@pytest.mark.parametrize("interpolation", ["lerp", "slerp"])
def test_every_mode_runs_to_a_video(
    sampled: Any, prompts: list[Any], mode: str, interpolation: str
) -> None:
    switch = node("RFPromptSwitch")
    rest = {"unit": "chunks", "blend_chunks": 1, "interpolation": interpolation}
    (start,) = switch.execute(prompts[0], at=0.0, mode="recache", **rest).result
    (both,) = switch.execute(prompts[1], at=1.0, mode=mode, timeline=start, **rest).result
    latent, _, images, _ = sampled(prompt=both, length=2.0).result
    cut = 3 if mode == "cut" else 0
    assert latent["samples"].shape[2] == 6 and len(images) == 9 + 12 - cut


def test_every_sink_is_a_sink_or_says_what_does_not_fit(pack: Any) -> None:
    sink, fitting = node("RFSinkConfig"), 0
    for values in combinations(extremes("RFSinkConfig")):
        verdict = sink.validate_inputs(**values)
        if verdict is True:
            (made,) = sink.execute(**values).result
            fitting += 1
            if values["preset"] == "Custom":
                asked = {key: value for key, value in values.items() if key != "preset"}
                assert asked == {key: getattr(made, key) for key in asked}
        else:
            assert values["preset"] == "Custom" and "window_frames" in verdict
            assert values["window_frames"] < values["anchor_frames"] + values["sink_frames"] + 3
    assert fitting > 4


def test_sinks_at_their_extremes_stream(sampled: Any) -> None:
    sink = node("RFSinkConfig")
    for window, kept, decay, accumulator, anchor in product(
        (3, 63), (0, 60), (0.0, 1.0), ("reference", "float32"), (0, 60)
    ):
        values = ("Custom", window, kept, decay, accumulator, anchor)
        if sink.validate_inputs(*values) is True:
            (config,) = sink.execute(*values).result
            latent = sampled(sink=config, length=2.0).result[0]["samples"]
            assert latent.isfinite().all()


def test_a_sink_without_an_anchor_is_what_it_was(pack: Any) -> None:
    values = {"preset": "Custom", "window_frames": 9, "sink_frames": 3, "decay": 0.5}
    values |= {"accumulator": "float32"}  # as workflows of before have it
    sink = node("RFSinkConfig")
    assert sink.validate_inputs(**values) is True
    assert sink.execute(**values).result == sink.execute(**values, anchor_frames=0).result
    values["window_frames"] = 5
    assert "window_frames 5 cannot hold 3 sink frames and" in sink.validate_inputs(**values)


def test_a_preset_sets_more_than_the_node_shows_and_else_leaves_the_model_its_own(
    sampled: Any,
) -> None:
    made = importlib.import_module(f"{PACK}.rf_core.state").cache_config_of

    def cache_of(sink: Any) -> Any:
        return made(sampled(sink=sink, length=1.0, keep_state="exact").result[3].snapshot)

    config = importlib.import_module(f"{PACK}.rf_core.config").CacheConfig
    sink = config(keep_key_norms=True, memory_rates=(0.01, 0.1))
    assert cache_of(sink) == sink
    assert cache_of(config(decay=0.5, anchor_frames=2)) == config(decay=0.5, anchor_frames=2)
    shown = {"window_frames": 9, "sink_frames": 3, "decay": 1.0, "accumulator": "reference"}
    (own_time,) = node("RFSinkConfig").execute(preset="Absolute", **shown).result
    assert cache_of(own_time) == config(decay=1.0, positions="absolute")


def test_linked_widgets_are_unknown_while_a_prompt_is_checked(pack: Any) -> None:
    for name in ("RFStreamingSampler", "RFSinkConfig", "RFPromptSchedule", "RFSaveState"):
        check = node(name).validate_inputs
        names = check.__code__.co_varnames[1 : check.__code__.co_argcount]
        assert check(**dict.fromkeys(names)) is True, name
    sink = dict.fromkeys(("window_frames", "sink_frames", "decay", "accumulator"))
    assert node("RFSinkConfig").validate_inputs(preset="Custom", **sink) is True
    sampler = node("RFStreamingSampler")
    assert "101" in sampler.validate_inputs(width=101, height=None)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((100, 60), r"100x60.*width.*height.*nearest is 96x64"),
        ((100, 64), r"100x64.*nearest is 96x64"),
        ((64, 60), r"64x60.*nearest is 64x64"),
        ((1, 1), r"1x1.*nearest is 16x16"),
    ],
)
def test_a_size_that_does_not_fit_is_answered_with_both_sides(
    pack: Any, size: tuple[int, int], message: str
) -> None:
    assert re.search(message, node("RFStreamingSampler").validate_inputs(*size))


@pytest.mark.parametrize("length", [0.0, 0.1, 10.0, 1e6])
def test_a_schedule_shows_its_table_for_any_length(loaded: Any, length: float) -> None:
    schedule = node("RFPromptSchedule")
    for text in ("0s: a red circle\n1s [blend 2 slerp]: a blue square", "a red circle", '"0": "a"'):
        assert schedule.validate_inputs(text) is True
        timeline, table = schedule.execute(loaded[1], text, length).result
        assert len(timeline.embeds) == len(table.splitlines()) - 1


@pytest.mark.parametrize("steps", [1, 16])
@pytest.mark.parametrize("seed", [0, 0xFFFFFFFFFFFFFFFF])
def test_steps_and_seeds_at_their_ends_stream(sampled: Any, steps: int, seed: int) -> None:
    assert sampled(steps=steps, seed=seed).result[0]["samples"].isfinite().all()


def test_the_smallest_size_streams(sampled: Any) -> None:
    assert sampled(width=16, height=16).result[2].shape == (9, 16, 16, 3)


@pytest.mark.parametrize("unit", ["seconds", "frames", "chunks"])
def test_a_video_ends_with_the_chunk_that_reaches_its_length(sampled: Any, unit: str) -> None:
    to_two = {"seconds": 0.6, "frames": 9.5, "chunks": 1.4}[unit]
    for length, chunks in ((0.1, 1), (to_two, 2)):
        assert sampled(length=length, unit=unit).result[0]["samples"].shape[2] == 3 * chunks


@pytest.mark.parametrize("with_vae", [True, False])
@pytest.mark.parametrize("keep_state", ["compact", "exact", "none"])
def test_each_output_is_there_or_says_which_input_to_change(
    sampled: Any, with_vae: bool, keep_state: str
) -> None:
    from comfy_execution.graph_utils import ExecutionBlocker

    ends = extremes("RFStreamingSampler")
    keeps = {key: [0, *ends[key]] for key in ("keep_images", "keep_latents")}
    for keep in combinations(keeps):
        changes = {} if with_vae else {"vae": None}
        outputs = sampled(keep_state=keep_state, **keep, **changes).result
        absent = {
            "keep_latents": keep["keep_latents"] == 0,
            "vae input": not with_vae,
            "keep_images" if with_vae else "vae input ": not with_vae or keep["keep_images"] == 0,
            "keep_state": keep_state == "none",
        }
        for output, (name, missing) in zip(outputs, absent.items(), strict=True):
            assert isinstance(output, ExecutionBlocker) == missing
            assert output is not None
            if missing:
                assert name.strip() in output.message and output.message.count(".") == 0


@pytest.mark.parametrize("name", ["", " ", "a/b", "a\\b", "..", "/", "x" * 300, "a:b", "a\nb"])
def test_a_state_name_that_is_no_file_name_is_refused(pack: Any, name: str) -> None:
    assert "file name" in node("RFSaveState").validate_inputs(name)


@pytest.mark.parametrize("name", ["stream", "a b", "água 水", "x" * 200])
def test_a_state_is_saved_and_loaded_under_any_file_name(sampled: Any, name: str) -> None:
    (*_, state) = sampled().result
    assert node("RFSaveState").validate_inputs(name) is True
    for expected in (f"{name}.safetensors", f"{name}_2.safetensors"):
        node("RFSaveState").execute(state, name)
        assert node("RFLoadState").validate_inputs(expected) is True
        (again,) = node("RFLoadState").execute(expected).result
        assert again.snapshot.facts["num_chunks"] == 1
    assert "save one first" in node("RFLoadState").validate_inputs("none.safetensors")


def test_a_run_tells_its_file_length_and_pace_on_the_node_and_in_the_log(
    sampled: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pace = r"network [\d.]+ fps, decode [\d.]+ fps, end to end [\d.]+ fps"
    with caplog.at_level("INFO"):
        made = sampled(length=2.0, seed=5)
    (text,) = made.ui["text"]
    told = rf"reward_forcing_\d+_\.mp4: 21 images, 1\.31 s; {pace}; [\d.]+ MB kept for later runs"
    assert re.fullmatch(told, text)
    assert text in caplog.text and "chunk 1/2" not in caplog.text  # over in a moment
    rates = [float(each) for each in re.findall(r"([\d.]+) fps", text)]
    assert rates[2] <= min(rates[:2])  # as rounded


def test_without_a_vae_it_tells_that_latents_were_made(sampled: Any) -> None:
    (text,) = sampled(length=2.0, vae=None).ui["text"]
    assert re.match(r"6 latent frames, 1\.31 s of video; no images without a VAE; network", text)
    assert "decode" not in text and "end to end" in text


def test_a_long_run_writes_a_line_to_the_log_every_few_seconds(
    sampled: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    report = importlib.import_module(f"{PACK}.nodes.report")
    for least, lines in ((0.0, 4), (1e9, 0)):
        monkeypatch.setattr(report, "LINE_SECONDS", least)
        caplog.clear()
        with caplog.at_level("INFO"):
            sampled(length=4.0, seed=int(lines) + 6)
        said = [each for each in caplog.messages if re.search(r"chunk \d/4, .*all .* s left", each)]
        assert len(said) == lines


def test_peak_memory_is_told_where_it_is_known(
    sampled: Any, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "memory" not in sampled(seed=9).ui["text"][0]
    monkeypatch.setattr(host, "peak_memory", lambda _: 3 << 29)
    assert "peak memory 1.5 GiB" in sampled(seed=10).ui["text"][0]
