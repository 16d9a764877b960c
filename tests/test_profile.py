"""Where a chunk's time goes: borders, kinds, counted work beside them. No time is asserted."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import tiny
import torch

from rf_core import kernels
from rf_core.__main__ import main
from rf_core.families import FAMILIES
from rf_core.fast.quantise import quantise_linears
from rf_core.measure import counts
from rf_core.measure import profile as profile_module
from rf_core.measure.counts import Work
from rf_core.measure.profile import (
    REST,
    DeviceTime,
    ProfileOptions,
    Timeline,
    busy_and_idle,
    costliest_events,
    counted,
    device_events,
    instrumented,
    kind_of,
    prompt_keys,
    with_counts,
)
from rf_core.measure.workload import WorkloadOptions, load_workload

PASSES = len(tiny.TWO_STEPS.steps)  # a stream's first step runs no clean pass


class Tally:
    """Borders that count what begins inside what."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.parents: set[tuple[str, str]] = set()
        self.open: list[str] = []

    def begin(self, kind: str) -> None:
        self.counts[kind] += 1
        self.parents.add((self.open[-1] if self.open else "", kind))
        self.open.append(kind)

    def end(self) -> None:
        self.open.pop()


def test_a_span_belongs_to_the_innermost_kind(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(profile_module.time, "perf_counter", lambda: next(now))
    line = Timeline("cpu")
    line.begin("block")  # 0
    line.begin("linear")  # 1
    line.end()  # 3
    line.begin("norm")  # 6
    line.end()  # 10
    line.end()  # 15
    assert line.seconds() == {"block": 1 + 3 + 5, "linear": 2, "norm": 4}


def test_borders_leave_latents_alone_and_come_off_again():
    plain, watched = tiny.stream(), tiny.stream()
    attention, tally = watched.attention, Tally()
    with instrumented(watched, tally):
        torch.testing.assert_close(watched.step().latents, plain.step().latents, rtol=0, atol=0)
    seen = tally.counts.total()
    assert seen and not tally.open
    assert torch.equal(watched.step().latents, plain.step().latents)
    assert tally.counts.total() == seen and watched.attention is attention
    assert "advance" not in vars(watched.state.cache)
    assert kernels.modulated_norm.__module__ == "rf_core.kernels"


def test_the_kinds_of_a_chunk_are_counted_as_often_as_they_run():
    stream, tally = tiny.stream(), Tally()
    with instrumented(stream, tally):
        stream.step()
    layers = PASSES * tiny.CONFIG.num_layers
    assert tally.counts[counts.SELF_PRODUCTS] == tally.counts[counts.CROSS_PRODUCTS] == layers
    assert tally.counts[counts.SELF_LINEARS] == 4 * layers
    assert tally.counts[counts.CROSS_LINEARS] == tally.counts[counts.FEED_FORWARD] == 2 * layers
    assert (counts.FEED_FORWARD, counts.ELEMENTWISE) in tally.parents  # GELU, where it is alone
    assert tally.counts[counts.NORMS] == 3 * layers + PASSES  # and the head's
    # Self-attention and cross-attention, and in them three steps.
    assert tally.counts[counts.HEADS] == 5 * layers and tally.counts[counts.EVICTION] == 1


@pytest.mark.parametrize(("tokens", "keys"), [(10, 10), (9, 10), (3, 4), (0, 1)])
def test_of_a_prompt_the_keys_that_are_computed_with_are_counted(tokens, keys):
    assert prompt_keys(tiny.stream(prompt_embeds=tiny.prompt(tokens=tokens))) == keys


def test_every_layer_with_weights_has_a_kind_in_fp8_the_same():
    quantise_linears(eight := tiny.model())
    for (name, module), packed in zip(tiny.model().named_modules(), eight.modules(), strict=True):
        if any(True for _ in module.parameters(recurse=False)):
            assert kind_of(name, module) is not None, name
        assert kind_of(name, packed) == kind_of(name, module)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_that_is_counted_is_timed(name):
    family = FAMILIES[name]
    options = WorkloadOptions(height=16, width=16, cache=family.cache, sampler=family.sampler)
    workload = load_workload(options)
    stream, tally = workload.stream(), Tally()
    with instrumented(stream, tally):
        stream.step()
    assert counted(stream, workload).keys() == tally.counts.keys()


def test_at_best_the_scarcer_of_products_and_bytes_decides():
    work = {"linear": Work(100, 10), "norm": Work(0, 40), "unseen": Work(1, 1)}
    rows = {
        row["kind"]: row for row in with_counts({"linear": 1.0, "norm": 9.0}, work, Work(10, 4))
    }
    assert list(rows) == ["norm", "linear", "unseen"]  # by time
    assert rows["linear"]["seconds_at_best"] == 10 and rows["norm"]["seconds_at_best"] == 10
    assert rows["unseen"]["seconds"] is None


def test_the_command_writes_a_trace_and_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profile_module, "rates", lambda device, dtype: Work(10**9, 10**9))
    trace, path = tmp_path / "new" / "trace.json", tmp_path / "profile.json"
    small = ["--chunks", "2", "--width", "16", "--height", "16", "--device", "cpu"]
    assert main(["profile", *small, "--trace", str(trace), "--json", str(path)]) == 0
    out = capsys.readouterr().out
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {counts.HEADS, counts.FEED_FORWARD, "aten::addmm"} <= names
    result = json.loads(path.read_text())
    assert {counts.SELF_PRODUCTS, counts.NORMS, REST} <= {row["kind"] for row in result["kinds"]}
    assert "aten::addmm" in out and "ms at best" in out and counts.EVICTION in out


def test_what_cannot_be_profiled_is_refused(tmp_path, capsys):
    assert main(["profile", "--chunks", "0", "--device", "cpu"]) == 1
    assert "chunks is 0; give a number from 1" in capsys.readouterr().err
    assert main(["profile", "--decoder", "both", "--device", "cpu"]) == 1
    assert "ask for wan or taehv" in capsys.readouterr().err
    with pytest.raises(ValueError, match="cannot be timed on mps; use cpu or cuda"):
        ProfileOptions(device="mps", trace=tmp_path)


def test_the_device_s_rates_are_of_its_own_work():
    rate = profile_module.rates("cpu", torch.float32)
    assert rate.flops > 0 and rate.bytes > 0


@pytest.mark.parametrize("size", [(16, 16), (32, 48)])
def test_counted_work_is_of_the_stream_s_own_sizes(size):
    workload = load_workload(WorkloadOptions(height=size[0], width=size[1]))
    stream = workload.stream()
    parts = counted(stream, workload)
    tokens = 3 * (size[0] // 16) * (size[1] // 16)
    config = workload.model.config
    assert parts[counts.FEED_FORWARD].flops == (
        5 * config.num_layers * 4 * tokens * config.dim * config.ffn_dim
    )


def event(name: str, ts: float, dur: float) -> dict[str, object]:
    return {"name": name, "ts": ts, "dur": dur}


EVENTS = [
    event("norm", 8e6, 2e6),  # after a gap of two seconds
    event("product", 1e6, 3e6),
    event("product", 2e6, 4e6),  # on another stream, beside the first
    event("norm", 3e6, 1e6),  # within both
    event("Memcpy DtoH (Device -> Pinned)", 0.0, 7e6),
    event("Memset (Device)", 10e6, 1e6),
]


def test_a_card_is_idle_where_nothing_runs_but_copies_to_the_host():
    found = busy_and_idle(EVENTS)
    assert found == DeviceTime(span=10.0, busy=8.0, to_host=7.0) and found.idle == 2
    assert busy_and_idle(EVENTS[4:5]) is busy_and_idle([]) is None


def test_kernels_are_added_up_by_name():
    assert costliest_events(EVENTS[:4], 1) == [{"name": "product", "calls": 2, "seconds": 7.0}]
    assert [row["calls"] for row in costliest_events(EVENTS, 9)] == [2, 1, 2, 1]


def test_of_a_trace_only_what_a_card_does_is_kept(monkeypatch):
    assert device_events(lambda: torch.ones(4).sum(), "cpu") == []
    monkeypatch.setattr(profile_module, "_ON_DEVICE", ("cpu_op",))
    names = {found["name"] for found in device_events(lambda: torch.ones(4).sum(), "cpu")}
    assert "aten::sum" in names
