"""Every workflow, opened in a real browser, converted, validated and run."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_cli.workflow_to_api import convert_ui_to_api

from training.world.tracker import score

from .conftest import PACK
from .graphs import DEMO_NEXT, DEMO_PROMPT, PANDA, PANDA_SITS
from .server import ROOT, Server
from .test_server import video_of
from .video import images_of

FILES = sorted((ROOT / "workflows").glob("*.json"))


STANDS_FOR = {PANDA: DEMO_PROMPT, PANDA_SITS: DEMO_NEXT}
"""Prompts that the demo knows in place of those it does not."""
LONGEST = 16.0
"""Seconds of video made for a test."""


def runnable(prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with the demo in place of files that would be downloaded, and short videos."""
    loaders = {"RFLoadModel": 0, "CLIPLoader": 1, "VAELoader": 2}
    swapped = {
        node: loaders[each["class_type"]]
        for node, each in prompt.items()
        if each["class_type"] in loaders
    }
    result: dict[str, Any] = {}
    for node, each in prompt.items():
        if node in swapped:
            continue
        inputs = dict(each["inputs"])
        for name, value in inputs.items():
            if isinstance(value, list) and value[0] in swapped:
                inputs[name] = ["demo", swapped[value[0]]]
            if name == "text" and isinstance(value, str):
                for text, ours in STANDS_FOR.items():
                    inputs[name] = inputs[name].replace(text, ours)
        if each["class_type"] == "RFStreamingSampler":
            inputs |= {"width": 64, "height": 64, "length": min(inputs["length"], LONGEST)}
        result[node] = each | {"inputs": inputs}
    if swapped:
        result["demo"] = {"class_type": "RFLoadDemo", "inputs": {}}
    return result


def last_prompt(prompt: dict[str, Any], node: str) -> str:
    """What a sampler's video ends with."""
    inputs = prompt[node]["inputs"]
    if "text" in inputs:
        return str(inputs["text"]).splitlines()[-1].rpartition(": ")[2]
    source = inputs["conditioning" if "conditioning" in inputs else "prompt"]
    return last_prompt(prompt, source[0])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_converts_validates_and_runs_to_a_video_of_its_prompt(
    server: Server, path: Path
) -> None:
    workflow = json.loads(path.read_text())
    prompt = runnable(convert_ui_to_api(workflow, server.get("/object_info")))
    run = server.run(prompt)
    assert run.error is None, run.error and run.error["exception_message"]
    samplers = [n for n, each in prompt.items() if each["class_type"] == "RFStreamingSampler"]
    assert samplers
    for node in samplers:
        images = images_of(video_of(server, run.output(node)))
        assert len(images) >= 9 and images.std() > 5  # something is to be seen
        if path.stem == "lora":  # random weights: the style is nobody's
            continue
        shown = torch.from_numpy(images[-48:]).permute(0, 3, 1, 2) / 255
        scores = score(shown, last_prompt(prompt, node))
        names = ["colour", "shape", "direction", *(["speed"] if len(images) >= 48 else [])]
        followed = {name: scores[name] for name in names}
        assert set(followed.values()) == {1.0}, followed


def test_comfyui_lists_every_workflow_as_a_template(server: Server) -> None:
    listed = server.get("/api/workflow_templates")["ComfyUI-RewardForcing"]
    assert sorted(listed) == [path.stem for path in FILES]
    for path in FILES:
        assert path.with_suffix(".jpg").stat().st_size < 200_000
        assert server.get(f"/api/workflow_templates/ComfyUI-RewardForcing/{path.name}")


class OpenedError(Exception):
    """A loader was about to read a file."""


def offered(node: Any) -> dict[str, list[Any]]:
    """What each combo of a node offers now."""
    found = {}
    for name, (kind, *about) in node.INPUT_TYPES()["required"].items():
        options = kind if isinstance(kind, list) else about[0].get("options") if about else None
        if options is not None:
            found[name] = list(options)
    return found


@pytest.fixture
def loader(pack: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Nodes by type, over model folders that are empty; what they would read is raised."""
    import folder_paths

    spec = importlib.util.spec_from_file_location(
        "stock", Path(folder_paths.base_path) / "nodes.py"
    )
    assert spec is not None and spec.loader is not None
    stock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stock)
    empty = {
        name: ([str(tmp_path / name)], endings)
        for name, (_, endings) in folder_paths.folder_names_and_paths.items()
    }
    for name in empty:
        (tmp_path / name).mkdir()
    plain = folder_paths.get_full_path_or_raise

    def opened(*asked: str) -> None:
        raise OpenedError(plain(*asked))

    monkeypatch.setattr(folder_paths, "folder_names_and_paths", empty)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", opened)
    ours = {
        each.GET_SCHEMA().node_id: each for each in importlib.import_module(f"{PACK}.nodes").NODES
    }
    return (stock.NODE_CLASS_MAPPINGS | ours).__getitem__


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_it_offers_to_download_is_what_its_loaders_then_read(
    loader: Any, path: Path, tmp_path: Path
) -> None:
    for each in json.loads(path.read_text())["nodes"]:
        for model in each["properties"].get("models", []):
            file = tmp_path / model["directory"] / model["name"]
            assert file.parent.is_dir(), "ComfyUI has no such folder of models"
            file.touch()
            node = loader(each["type"])
            combos = offered(node)
            (widget,) = [name for name, names in combos.items() if model["name"] in names]
            assert model["name"] in each["widgets_values"]
            values = {name: names[0] for name, names in combos.items()} | {widget: model["name"]}
            with pytest.raises(OpenedError) as read:
                getattr(node(), node.FUNCTION)(**values)
            assert Path(str(read.value)) == file
            file.unlink()
