"""Every workflow, opened in a real browser, converted, validated and run."""

from __future__ import annotations

import importlib
import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from comfy_cli.workflow_to_api import convert_ui_to_api
from PIL import Image, ImageSequence

from training.world.tracker import score

from .conftest import PACK
from .files import LORA
from .graphs import GRAPHS, OWN_LORA, SAMPLERS, SHOWN, runnable
from .server import ROOT, Server
from .test_server import video_of
from .video import images_of

FILES = sorted((ROOT / "workflows").glob("*.json"))


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
    prompt = runnable(convert_ui_to_api(workflow, server.get("/object_info")), LORA)
    run = server.run(prompt)
    assert run.error is None, run.error and run.error["exception_message"]
    samplers = [n for n, each in prompt.items() if each["class_type"] in SAMPLERS]
    assert samplers
    for node in samplers:
        images = images_of(video_of(server, run.output(node)))
        assert len(images) >= 9 and images.std() > 5  # something is to be seen
        if path == GRAPHS["lora"].path:  # random weights: the style is nobody's
            continue
        shown = torch.from_numpy(images[-48:]).permute(0, 3, 1, 2) / 255
        seen = last_prompt(prompt, node)
        scores = score(shown, SHOWN.get(seen, seen))
        names = ["colour", "shape", "direction", *(["speed"] if len(images) >= 48 else [])]
        followed = {name: scores[name] for name in names}
        assert set(followed.values()) == {1.0}, followed


def test_comfyui_lists_every_workflow_as_a_template_the_demo_first_by_name(server: Server) -> None:
    assert [path.stem for path in FILES] == [graph.title for graph in GRAPHS.values()]
    listed = server.get("/api/workflow_templates")["ComfyUI-RewardForcing"]
    assert sorted(listed) == [path.stem for path in FILES]
    for path in FILES:
        assert server.get(f"/api/workflow_templates/ComfyUI-RewardForcing/{quote(path.name)}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_template_opens_where_it_begins_and_large_enough_to_be_read(path: Path) -> None:
    workflow = json.loads(path.read_text())
    scale, (x, y) = (workflow["extra"]["ds"][name] for name in ("scale", "offset"))
    assert 0.6 <= scale <= 1  # below, the classic canvas leaves out texts and pictures
    corners = [
        ((node["pos"][0] + x) * scale, (node["pos"][1] + y) * scale) for node in workflow["nodes"]
    ]
    for axis, (least, most) in enumerate([(60, 200), (60, 200)]):
        assert least <= min(corner[axis] for corner in corners) <= most


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_template_is_shown_as_a_small_moving_picture(path: Path) -> None:
    file = path.with_suffix(".jpg")
    assert file.stat().st_size < 150_000
    with Image.open(file) as image:
        frames = [
            np.asarray(frame.convert("RGB"), float) for frame in ImageSequence.Iterator(image)
        ]
    moved = [np.abs(a - b).mean() for a, b in pairwise(frames)]
    assert len(frames) > 20 and np.mean(moved) > 1


def test_the_lora_template_says_what_to_choose_where_it_is_chosen(server: Server) -> None:
    workflow = json.loads(GRAPHS["lora"].path.read_text())
    (loader,) = [each for each in workflow["nodes"] if OWN_LORA in str(each["widgets_values"])]
    assert "LoRA" in loader["title"]
    prompt = runnable(convert_ui_to_api(workflow, server.get("/object_info")), OWN_LORA)
    assert OWN_LORA in server.refusal(prompt)


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
    plain = folder_paths.get_full_path

    def opened(*asked: str) -> None:
        raise OpenedError(plain(*asked))

    monkeypatch.setattr(folder_paths, "folder_names_and_paths", empty)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    for name in ("get_full_path", "get_full_path_or_raise"):
        monkeypatch.setattr(folder_paths, name, opened)
    ours = {
        each.GET_SCHEMA().node_id: each for each in importlib.import_module(f"{PACK}.nodes").NODES
    }
    return (stock.NODE_CLASS_MAPPINGS | ours).__getitem__


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_it_offers_to_download_is_what_its_loaders_then_read(
    loader: Any, demo: Any, path: Path, tmp_path: Path
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
            if each["type"] == "RFLoadControl":
                values["model"] = demo.load_model()
            with pytest.raises(OpenedError) as read:
                getattr(node(), node.FUNCTION)(**values)
            assert Path(str(read.value)) == file
            file.unlink()
