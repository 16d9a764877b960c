"""What the Comfy registry would take in and hand out."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .server import ROOT, copy_pack

COMFY = Path(sys.executable).with_name("comfy")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack in a repository of its own."""
    folder = tmp_path_factory.mktemp("clone")
    copy_pack(folder)
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def comfy_node(folder: Path, command: str) -> str:
    """What `comfy node COMMAND` prints."""
    done = subprocess.run(
        [COMFY, "--skip-prompt", "node", command], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_metadata_is_valid(clone: Path) -> None:
    assert "passed" in comfy_node(clone, "validate")


def test_the_package_holds_what_runs_and_nothing_else(clone: Path) -> None:
    comfy_node(clone, "pack")
    with zipfile.ZipFile(clone / "node.zip") as package:
        names = set(package.namelist())
    top = {name.split("/")[0] for name in names}
    assert not top & {"tests", "training", "docs", ".ci", "Makefile"}
    assert {"__init__.py", "nodes", "rf_core", "workflows", "locales", "README.md"} <= top
    for needed in (
        "nodes/web/reward_forcing.js",
        "nodes/web/docs/RFStreamingSampler.md",
        "rf_core/demo/student.safetensors",
        "workflows/01 Demo, no downloads.json",
        "requirements.txt",
    ):
        assert needed in names
    assert not any(name.endswith((".gif", ".mp4", ".png")) for name in names)


def test_requirements_are_the_project_s_with_lower_bounds_alone() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = set(project["project"]["dependencies"])
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert {line for line in lines if line and not line.startswith("#")} == wanted
    assert all(
        ">=" in each and not set("<,=").intersection(each.replace(">=", "")) for each in wanted
    )
