from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from rf_core import devices
from rf_core.__main__ import main
from rf_core.config import WAN_1_3B
from rf_core.options import Files
from rf_core.weights.checkpoint import read_checkpoint


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A CPU that says of itself what a test wants it to."""
    fake = SimpleNamespace()
    monkeypatch.setattr(torch, "cpu", fake)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    devices.cpu_facts.cache_clear()
    yield fake
    devices.cpu_facts.cache_clear()


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "amx_tile", "bf16"])
def test_a_cpu_with_instructions_for_bfloat16_computes_large_networks_in_it(cpu, name):
    cpu.get_capabilities = lambda: {"avx2": True, name: True}
    assert devices.preferred_dtype("cpu", WAN_1_3B) == torch.bfloat16


def test_a_cpu_without_them_computes_in_float32(cpu):
    cpu.get_capabilities = lambda: {"avx512_f": True, "avx512_bf16": False, "amx_tile": False}
    assert devices.preferred_dtype("cpu", WAN_1_3B) == torch.float32


@pytest.mark.parametrize("name", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_older_torch_tells_by_other_names(cpu, name):
    setattr(cpu, name, lambda: True)
    assert devices.multiplies_bfloat16()


def test_where_torch_cannot_tell_or_has_no_library_for_it_nothing_is_taken_for_granted(
    cpu, monkeypatch
):
    assert not devices.multiplies_bfloat16()
    devices.cpu_facts.cache_clear()
    cpu.get_capabilities = lambda: {"avx512_bf16": True}
    assert devices.multiplies_bfloat16()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not devices.multiplies_bfloat16()


def test_the_demo_stays_in_float32_on_every_cpu_and_cards_compute_in_bfloat16(monkeypatch):
    demo = read_checkpoint(Files().model).config
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda: True)
    assert devices.preferred_dtype("cpu", demo) == torch.float32
    assert devices.preferred_dtype("cuda:1", demo) == torch.bfloat16
    assert devices.preferred_dtype("mps", WAN_1_3B) == torch.float32


@pytest.mark.slow
def test_a_plan_counts_what_a_run_would_compute_in(monkeypatch, capsys):
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda: True)

    def told(*more: str) -> str:
        sizes = ("--size", "tiny", "--width", "64", "--height", "64", "--decoder", "none")
        assert main(["plan", *sizes, "--device", "cpu", "--available", "64GB", *more]) == 0
        return capsys.readouterr().out

    assert told() == told("--dtype", "float32") != told("--dtype", "bfloat16")
    monkeypatch.setattr(devices, "MIN_BFLOAT16_DIM", 1)
    assert told() == told("--dtype", "bfloat16")
