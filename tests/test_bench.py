"""Benchmarks: what is measured and how it is put together. No time is ever asserted."""

from __future__ import annotations

import itertools
import json
import subprocess
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

from rf_core.__main__ import main
from rf_core.config import WAN_1_3B
from rf_core.decoders.decoder import TAEHVDecoder, WanDecoder
from rf_core.families import FAMILIES
from rf_core.fast import stopwatch
from rf_core.measure import bench as bench_module
from rf_core.measure import machine as machine_module
from rf_core.measure import workload as workload_module
from rf_core.measure.bench import (
    BenchOptions,
    bench,
    first_image,
    format_bench,
    network_streamed_fps,
    switch_costs,
)
from rf_core.measure.control import FORMS
from rf_core.measure.families import passes_of
from rf_core.measure.machine import format_machine, machine
from rf_core.measure.workload import WorkloadOptions, load_workload, prompt_tokens, randomise

SMALL = {"height": 16, "width": 16}


@pytest.mark.slow
def test_each_decoder_is_measured_on_top_of_the_network():
    result = bench(BenchOptions(chunks=14, decoder="both", **SMALL))
    assert list(result["decoders"]) == ["wan", "taehv"]
    for found in result["decoders"].values():
        assert result["network_fps"] >= found["fps"] >= found["host_fps"] > 0
        assert found["decode_seconds"]["p50"] <= found["decode_seconds"]["max"]
    assert json.loads(json.dumps(result)) == json.loads(json.dumps(result, allow_nan=False))
    text = format_bench(result)
    assert result["network_streamed_fps"] > 0
    for row in (
        "network, streamed",
        "+ wan decode",
        "+ taehv decode",
        "blend 3",
        "time growth",
        "first image",
    ):
        assert row in text


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_settings_are_measured(name):
    family = FAMILIES[name]
    settings = {"cache": family.cache, "sampler": family.sampler}
    result = bench(BenchOptions(chunks=3, decoder="wan", **settings, **SMALL))
    assert result["network_fps"] > 0 and result["switches"].keys() >= {"recache", "blend 3"}
    assert json.loads(json.dumps(result))["options"]["sampler"]["steps"]


def test_families_are_measured_in_turn_beside_their_counted_work(capsys):
    arguments = ["bench", "--families", "--chunks", "1", "--rounds", "1", "--graphs", "off"]
    assert main([*arguments, "--device", "cpu", "--width", "16", "--height", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[-len(FAMILIES) :]}
    assert rows.keys() == FAMILIES.keys()
    passes = {name: " ".join(row[:7]) for name, row in rows.items()}
    # Frames; passes of the first chunk and of later ones; frames of a pass, and those it sees.
    assert passes["reward_forcing"] == "3 4 4 + 1 3 9"
    assert passes["causal_forcing_1step"] == "1 4 1 + 1 1 21"
    assert passes["krea"] == "3 5 5 + 1 3 6"
    assert passes["rolling_forcing"] == "3 5 1 + 1 15 21"
    assert rows["reward_forcing"][7] == "1.00"


def test_a_control_is_measured_in_turn_with_the_student_alone(tmp_path, capsys):
    small = ["--width", "16", "--height", "16", "--graphs", "off", "--device", "cpu"]
    arguments = ["bench", "--control", "--chunks", "1", "--rounds", "1", *small]
    assert main([*arguments, "--json", str(tmp_path / "c.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[-len(FORMS) :]] == list(FORMS)
    found = json.loads((tmp_path / "c.json").read_text())
    cache = {row["control"]: row["cache_bytes"] for row in found["control"]}
    assert cache["none"] == cache["chunk"] and cache["past"] > cache["none"]
    assert main(["bench", "--control", "--families", *small]) == 1
    assert main(["bench", "--control", "--family", "rolling_forcing", *small]) == 1
    assert "takes no control" in capsys.readouterr().err


@pytest.mark.parametrize("name", FAMILIES)
def test_the_documented_passes_and_work_of_a_family_are_those_counted(name):
    page = Path(__file__).parents[1] / "docs" / "families.md"
    speed = page.read_text(encoding="utf-8").partition("## Speed")[2]
    (line,) = (line for line in speed.splitlines() if line.startswith(f"| `{name}` |"))
    _, frames, first, later, _, frames_a_pass, attended, work, *_ = line.strip("| ").split(" | ")
    counted = passes_of(FAMILIES[name])
    assert later == f"{counted['passes']} + {counted['cache_passes']}"
    assert [int(each) for each in (frames, first, frames_a_pass, attended)] == [
        counted[key] for key in ("frames", "first_passes", "pass_frames", "attended_frames")
    ]
    assert float(work) == pytest.approx(counted["work"], abs=0.005)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--decoder", "wan"], "leave out --compile and --decoder"),
        (["--family", "krea"], "leave out --family and those of the cache"),
        (["--window", "12"], "leave out --family and those of the cache"),
        (["--rounds", "0"], "0 rounds measure nothing"),
        (["--baseline", "x"], "give one of --baseline and --families"),
    ],
)
def test_families_are_compared_with_settings_of_their_own(given, says, capsys):
    assert main(["bench", "--families", "--device", "cpu", *given]) == 1
    assert says in capsys.readouterr().err


def test_a_window_too_small_for_chunks_in_flight_is_refused_before_weights_are_drawn():
    rolling = FAMILIES["rolling_forcing"].sampler
    with pytest.raises(ValueError, match="raise it to 21"):
        BenchOptions(sampler=rolling, **SMALL)


def test_without_a_decoder_the_latents_are_what_comes_first():
    result = bench(BenchOptions(chunks=2, **SMALL))
    assert result["decoders"] == {}
    assert "first latents" in format_bench(result) and "s to the next latents" in format_bench(
        result
    )
    assert result["seconds_per_100_chunks"] is None  # too few for a slope


@pytest.mark.slow
def test_every_measurement_is_reported_as_it_is_taken():
    seen = []
    options = BenchOptions(chunks=3, decoder="taehv", **SMALL)
    result = bench(options, lambda name, value: seen.append((name, value)))
    after = ["memory", "network_streamed_fps", "switches", "taehv_streamed_fps"]
    assert [name for name, _ in seen] == ["first_image", *["chunk"] * 3, *after]
    assert seen[0][1] == result["first_image"] and seen[-2][1] == result["switches"]
    chunks = [value for name, value in seen if name == "chunk"]
    assert all(chunk.keys() == {"network", "taehv", "taehv_host"} for chunk in chunks)
    assert max(chunk["network"] for chunk in chunks[1:]) == result["network_seconds"]["max"]


def test_latents_that_are_not_finite_are_refused(monkeypatch):
    workload = load_workload(WorkloadOptions(**SMALL))
    workload.model.head.head.bias.fill_(float("nan"))
    monkeypatch.setattr(bench_module, "load_workload", lambda options: workload)
    with pytest.raises(ValueError, match="not finite; measure in a wider dtype"):
        bench(BenchOptions(chunks=2, **SMALL))


def test_a_switch_is_timed_until_it_is_over_and_leaves_the_stream_where_it_was(monkeypatch):
    stream, prompts = tiny.stream(), (tiny.prompt(0), tiny.prompt(1))
    for _ in range(4):
        stream.step()
    stream.finish_clean_pass()
    cache, ticks = stream.state.cache.clone(), itertools.count()
    # A clock that ticks once a lap: seconds are then laps.
    monkeypatch.setattr(bench_module.Stopwatch, "lap", lambda watch: float(next(ticks)))
    switch_costs(stream, prompts)
    assert stream.state.num_chunks == 4
    assert torch.equal(stream.state.cache.k_NBWHD, cache.k_NBWHD)
    now = stream.snapshot()
    counts = {
        mode: len(bench_module._switch_seconds(stream, now, mode, prompts[1]))
        for mode in ("plain", "soft", "recache", "blend 3", "cut")
    }
    assert counts == {"plain": 1, "soft": 1, "recache": 1, "blend 3": 4, "cut": 1}


def test_a_streamed_network_is_waited_for_at_the_end_alone_and_left_where_it_was(monkeypatch):
    stream, waits = tiny.stream(), []
    stream.step()
    stream.finish_clean_pass()
    cache = stream.state.cache.clone()
    monkeypatch.setattr(stopwatch, "wait_for_stream", lambda _: waits.append(made[0]))
    made, generate = [0], stream.generate

    def counting():
        made[0] += 1
        return generate()

    monkeypatch.setattr(stream, "generate", counting)
    assert network_streamed_fps(stream, 4) > 0
    assert waits == [2, 6]  # two chunks that are not counted, then four
    assert stream.state.num_chunks == 1
    assert torch.equal(stream.state.cache.k_NBWHD, cache.k_NBWHD)


def test_a_random_prompt_is_as_long_as_prompts_are_and_padded_with_zeros():
    prompts = load_workload(WorkloadOptions(**SMALL)).prompts
    assert prompt_tokens(WAN_1_3B) == 128
    tokens = prompt_tokens(workload_module.TINY)
    for embeds in prompts:
        assert embeds.shape[1] == workload_module.TINY.text_len > tokens
        assert embeds[:, :tokens].any(2).all() and not embeds[:, tokens:].any()


def test_every_mode_stands_beside_a_plain_chunk():
    stream = tiny.stream()
    stream.step()
    costs = switch_costs(stream, (tiny.prompt(0), tiny.prompt(1)))
    assert list(costs) == ["plain", "soft", "recache", "blend 3", "cut"]
    assert all(cost["slowest"] >= cost["first"] > 0 for cost in costs.values())


@pytest.mark.slow
def test_text_encoding_is_counted_apart_and_its_encoder_is_gone_before_the_stream(monkeypatch):
    asked = []

    class Encoder:
        def encode(self, prompts):
            asked.extend(prompts)
            return torch.zeros(1, 4, workload_module.TINY.text_dim)

    monkeypatch.setattr(workload_module, "load_text_encoder", lambda place, **options: Encoder())
    workload = load_workload(WorkloadOptions(text_encoder="somewhere", **SMALL))
    assert asked == list(workload_module.PROMPTS)
    first = first_image(workload)
    assert min(first["text_cold"], first["text_warm"], first["cold"], first["warm"]) > 0
    assert len(asked) == 2 + bench_module.REPEATS
    assert first_image(load_workload(WorkloadOptions(**SMALL)))["text_warm"] is None
    encoder, gone = weakref.ref(workload.encoder), []
    monkeypatch.setattr(bench_module, "load_workload", lambda options, one=[workload]: one.pop())
    del workload
    bench(BenchOptions(chunks=2, **SMALL), lambda *_: gone.append(encoder() is None))
    assert gone == [False, *[True] * 5]  # the first image comes before the stream


def test_compiling_is_counted_apart_and_meets_every_block(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *a, **k: compiled.append(self))
    workload = load_workload(WorkloadOptions(**SMALL))
    assert first_image(workload)["compile"] is None and not compiled
    assert first_image(workload, compiled=True)["compile"] >= 0
    assert compiled == list(workload.model.blocks)


def test_random_weights_are_narrow_and_gains_are_about_one():
    network = tiny.model()
    randomise(network)
    for name, parameter in network.named_parameters():
        gain = "norm" in name and name.endswith("weight")
        assert abs(float(parameter.mean()) - gain) < 0.02, name
        assert 0.005 < float(parameter.std()) < 0.04, name
    assert network.head.head.weight.abs().min() > 0


def test_random_weights_are_the_same_every_time():
    first, second = (load_workload(WorkloadOptions(**SMALL)) for _ in range(2))
    assert torch.equal(first.stream().generate(), second.stream().generate())


def test_growth_is_the_slope_of_a_line():
    assert bench_module.growth(3.0 + 0.25 * np.arange(20)) == pytest.approx(25)
    assert bench_module.growth(np.arange(9.0)) is None


def test_a_decoder_beside_the_stream_goes_on_from_chunk_to_chunk():
    workload = load_workload(WorkloadOptions(decoder="taehv", **SMALL))
    decoder, latents = workload.decoders["taehv"], torch.randn(1, 16, 6, 2, 2)
    whole, _ = decoder.decode(latents, None)
    beside = bench_module._beside(decoder)
    parts = [beside(part) for part in latents.split(3, dim=2)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_a_decoder_s_weights_are_read_and_must_be_of_the_kind_asked_for(tmp_path):
    drawn = load_workload(WorkloadOptions(decoder="taehv", **SMALL)).decoders["taehv"]
    weights = {key: (t + 1).contiguous() for key, t in drawn.codec.state_dict().items()}
    save_file(weights, path := tmp_path / "taehv.safetensors")
    both = load_workload(WorkloadOptions(decoder="both", vae=path, **SMALL)).decoders
    assert isinstance(both["wan"], WanDecoder) and isinstance(both["taehv"], TAEHVDecoder)
    for key, value in both["taehv"].codec.state_dict().items():
        assert torch.equal(value, weights[key])
    with pytest.raises(ValueError, match=r"of the kind taehv; asked for is wan"):
        load_workload(WorkloadOptions(decoder="wan", vae=path, **SMALL))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"size": "2b"}, "size '2b' is unknown; use one of demo, tiny"),
        ({"decoder": "jpeg"}, "decoder 'jpeg' is unknown; use one of none, wan"),
        ({"vae": Path("a.pth")}, "no decoder; ask for one of wan, taehv, both"),
        ({"chunks": 1}, "1 chunks leave nothing after the first"),
    ],
)
def test_what_cannot_be_measured_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        BenchOptions(**wrong)


def test_the_demo_decodes_unless_told_otherwise():
    assert WorkloadOptions(size="demo").decoders == ("wan",)
    assert WorkloadOptions(size="demo", decoder="none").decoders == ()
    assert WorkloadOptions(size="1.3b").decoders == ()


def test_the_machine_is_named_with_its_clock_and_versions():
    facts = machine("cpu")
    assert facts["gpu"] is None and facts["versions"]["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    text = "\n".join(text for _, text in format_machine(facts))
    assert facts["cpu"] in text and "threads" in text and "flash-attn none" in text


@pytest.fixture
def card(monkeypatch):
    """A card that torch and nvidia-smi claim to see; gives what nvidia-smi was asked."""
    answer = "H, 550.1, 1980, 1980, 2619, 310.5, 700.00, 41"
    asked: list[list[str]] = []

    def run(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=answer + "\n")

    properties = types.SimpleNamespace(uuid="abc-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H")
    monkeypatch.setattr(machine_module.shutil, "which", lambda name: name)
    monkeypatch.setattr(machine_module.subprocess, "run", run)
    return asked


def test_a_card_s_clocks_come_from_nvidia_smi_by_its_uuid(card):
    facts = machine("cuda:1")
    assert facts["device"] == "H"
    assert facts["gpu"]["clocks.sm"] == "1980" and facts["gpu"]["power.draw"] == "310.5"
    assert card[0][1:3] == ["-i", "GPU-abc-1"]
    assert "clocks.max.sm 1980" in "\n".join(text for _, text in format_machine(facts))


def test_a_card_without_nvidia_smi_is_still_named(card, monkeypatch):
    monkeypatch.setattr(machine_module.shutil, "which", lambda name: None)
    facts = machine("cuda")
    assert facts["gpu"] is None and format_machine(facts)[0] == ("device", "H")


@pytest.mark.slow
def test_the_command_takes_every_flag_and_writes_json(tmp_path, capsys):
    path = tmp_path / "bench.json"
    small = ["--chunks", "2", "--width", "16", "--height", "16", "--device", "cpu"]
    assert main(["bench", *small, "--decoder", "taehv", "--window", "6", "--json", str(path)]) == 0
    assert "+ taehv decode" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["options"]["cache"]["window_frames"] == 6
    assert result["options"]["dtype"] == "float32"
    assert main(["bench", *small, "--vae", "x.pth"]) == 1
    assert "ask for one of" in capsys.readouterr().err
