"""What the Comfy registry would take in and hand out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .server import ROOT, comfy_root, copy_pack

COMFY = Path(sys.executable).with_name("comfy")
MAX_ICON_PIXELS = 400
"""A side of the icon, by the registry's specification."""
FRONTEND = "comfyui-frontend-package"
"""The registry reads a range of frontends off this dependency, and takes it out."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack in a repository of its own, its tests with it."""
    folder = tmp_path_factory.mktemp("clone")
    copy_pack(folder, without=())
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """pyproject.toml."""
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def comfy_node(folder: Path, command: str) -> str:
    """What `comfy node COMMAND` prints."""
    done = subprocess.run(
        [COMFY, "--skip-prompt", "node", command], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_registry_s_own_check_has_nothing_to_say(clone: Path) -> None:
    said = comfy_node(clone, "validate")
    assert "All validation checks passed" in said
    assert "warning" not in said.lower()


def test_the_metadata_is_what_the_registry_shows(project: dict[str, Any]) -> None:
    about, comfy = project["project"], project["tool"]["comfy"]
    assert "comfy" not in about["name"] and re.fullmatch("[a-z](-?[a-z0-9])*", about["name"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", about["version"])
    assert about["description"] and comfy["DisplayName"]
    kinds = {each.split(" :: ")[0] for each in about["classifiers"]}
    assert kinds == {"Operating System", "Environment"}  # of a system, of an accelerator
    (frontend,) = (each for each in about["dependencies"] if each.startswith(FRONTEND))
    for versions in (frontend.removeprefix(FRONTEND), comfy["requires-comfyui"]):
        assert re.fullmatch(r">=\d+\.\d+\.\d+", versions)


def test_the_addresses_are_of_one_repository_and_the_icon_is_in_it(project: dict[str, Any]) -> None:
    comfy, urls = project["tool"]["comfy"], project["project"]["urls"]
    repository = re.fullmatch("https://github.com/([^/]+/[^/]+)", urls["Repository"])
    assert repository is not None
    start = f"https://raw.githubusercontent.com/{repository[1]}/main/"
    assert comfy["Icon"].startswith(start)
    with Image.open(ROOT / comfy["Icon"].removeprefix(start)) as icon:
        assert max(icon.size) <= MAX_ICON_PIXELS
    published = comfy["PublisherId"] != ""
    assert published == ("OWNER" not in repository[1])  # filled in together


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
        "nodes/web/docs/RFStreamingSampler/zh.md",
        "rf_core/demo/student.safetensors",
        "workflows/01 Demo, no downloads.json",
        "requirements.txt",
    ):
        assert needed in names
    assert not any(name.endswith((".gif", ".mp4", ".png")) for name in names)


def test_requirements_are_the_project_s_with_lower_bounds_alone(project: dict[str, Any]) -> None:
    wanted = {each for each in project["project"]["dependencies"] if not each.startswith(FRONTEND)}
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert {line for line in lines if line and not line.startswith("#")} == wanted
    assert all(
        ">=" in each and not set("<,=").intersection(each.replace(">=", "")) for each in wanted
    )


def test_workflows_name_the_pack_as_the_registry_does(project: dict[str, Any]) -> None:
    saved = [path.read_text(encoding="utf-8") for path in (ROOT / "workflows").glob("*.json")]
    nodes = [node for text in saved for node in json.loads(text)["nodes"]]
    names = {n["properties"]["cnr_id"] for n in nodes if n["type"].startswith("RF")}
    assert names == {project["project"]["name"]}


IMPORT = """
import importlib.util, sys
comfy, pack = sys.argv[1:]
sys.path.insert(0, comfy)
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import nodes, server, comfy_api.latest
before = set(sys.modules)
spec = importlib.util.spec_from_file_location(
    "rf_pack", f"{pack}/__init__.py", submodule_search_locations=[pack])
sys.modules["rf_pack"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def test_a_start_of_comfyui_imports_nothing_for_it_but_its_own_modules() -> None:
    command = [sys.executable, "-c", IMPORT, str(comfy_root()), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=comfy_root())
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['rf_pack']"
