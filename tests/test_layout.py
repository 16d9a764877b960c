"""Which part may know which: the pack's side of what `lint-imports` checks for the rest."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def imports_of(path: Path) -> set[str]:
    """Top-level names that a file imports; relative ones keep their dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or "").partition(".")[0])
    return found


def test_one_file_of_the_pack_touches_comfyui_s_inside() -> None:
    inside = {"comfy", "comfy_execution", "folder_paths", "latent_preview", "server", "execution"}
    touching = {path.name for path in (ROOT / "nodes").glob("*.py") if imports_of(path) & inside}
    assert touching == {"host.py"}


def test_the_pack_imports_the_engine_relatively_and_no_trainer() -> None:
    for path in (ROOT / "nodes").glob("*.py"):
        names = imports_of(path)
        assert not names & {"rf_core", "training", "nodes", ".training", "..training"}, path.name


def test_nothing_is_registered_outside_comfyui() -> None:
    spec = importlib.util.spec_from_file_location(
        "pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    assert pack.__package__ and not {"comfy_entrypoint", "NODE_CLASS_MAPPINGS"} & set(vars(pack))


def test_what_is_promised_of_other_people_s_files_is_held_by_tests_that_exist() -> None:
    text = (ROOT / "docs" / "safety.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) == text.count("`tests/") > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"
