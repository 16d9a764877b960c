"""What a measurement was taken on: the device, its clocks, and the versions that matter.

Everything here is JSON can hold, and None where the machine does not say.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("triton", "numpy", "transformers", "flash-attn", "flash-attn-3", "sageattention")
_GPU_FACTS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)
"""What is asked of nvidia-smi: MHz, W and degrees Celsius."""


def machine(device: str) -> dict[str, Any]:
    """The device's name, clocks and software. Clocks are read now: ask right after the work."""
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "cpu_mhz": _cpu_mhz(),
        "gpu": _gpu(device) if cuda else None,
        "versions": _versions(),
    }


def format_machine(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts as rows of a name and a text."""
    mhz = "MHz unknown" if facts["cpu_mhz"] is None else f"{facts['cpu_mhz']:.0f} MHz"
    rows = [("device", facts["device"])]
    if facts["gpu"] is not None:
        rows.append(("nvidia-smi", ", ".join(f"{k} {v}" for k, v in facts["gpu"].items())))
    rows.append(("CPU", f"{facts['cpu']}, {mhz}, {facts['threads']} threads"))
    found = (f"{name} {number or 'none'}" for name, number in facts["versions"].items())
    return [*rows, ("versions", ", ".join(found))]


def _versions() -> dict[str, str | None]:
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "CUDA": torch.version.cuda,
        "cuDNN": None if cudnn is None else str(cudnn),
        **{name: _installed(name) for name in _PACKAGES},
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    names = _cpu_facts("model name")
    return names[0] if names else f"{platform.machine()} CPU"


def _cpu_mhz() -> float | None:
    clocks = sorted(float(mhz) for mhz in _cpu_facts("cpu MHz"))
    return clocks[-1] if clocks else None


def _cpu_facts(field: str) -> list[str]:
    info = Path("/proc/cpuinfo")  # Linux alone has it
    lines = info.read_text().splitlines() if info.exists() else []
    pairs = (line.partition(":") for line in lines)
    return [value.strip() for name, _, value in pairs if name.strip() == field]


def _gpu(device: str) -> dict[str, str] | None:
    if shutil.which("nvidia-smi") is None:
        return None
    # By its UUID: nvidia-smi counts cards otherwise than a process that sees some of them.
    card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = f"--query-gpu={','.join(_GPU_FACTS)}"
    command = ["nvidia-smi", "-i", card, query, "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    values = [value.strip() for value in answer.stdout.split(",")]
    if answer.returncode or len(values) != len(_GPU_FACTS):
        return None
    return dict(zip(_GPU_FACTS, values, strict=True))
