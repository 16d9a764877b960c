"""The server these tests share.

They run in ComfyUI's own environment (`make test-comfy`); elsewhere none is collected.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .server import Server

DEMO = Path(__file__).parents[2] / "rf_core" / "demo"
collect_ignore_glob = [] if find_spec("aiohttp") and find_spec("comfy_cli") else ["test_*.py"]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for all tests."""
    from .files import write_changed, write_lora, write_plain_wan
    from .server import Server, comfy_root

    if comfy_root() is None:
        pytest.skip("there is no ComfyUI; set COMFYUI_PATH")
    base = tmp_path_factory.mktemp("comfy")
    models = base / "models"
    for folder in ("diffusion_models", "loras"):
        (models / folder).mkdir(parents=True)
    student, networks = DEMO / "student.safetensors", models / "diffusion_models"
    shutil.copy2(student, networks / "demo.safetensors")
    shutil.copy2(DEMO / "teacher.safetensors", networks / "teacher.safetensors")
    write_changed(student, networks / "other.safetensors", "blocks.0.modulation", 1.0)
    write_changed(student, networks / "broken.safetensors", "head.head.bias", math.nan)
    write_plain_wan(networks / "wan.safetensors")
    write_lora(student, models / "loras" / "style.safetensors")
    running = Server(base)  # as installed: what it shows must need no flag
    yield running
    running.stop()
