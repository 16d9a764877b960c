"""Every workflow, opened in a real browser, converted, validated and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comfy_cli.workflow_to_api import convert_ui_to_api

from .browser import chromium, open_page
from .server import ROOT, Server
from .test_server import video_of
from .video import images_of

FILES = sorted((ROOT / "workflows").glob("*.json"))
OPEN = """
async (workflow) => {
  const {app} = window.comfyAPI.app;
  await app.loadGraphData(workflow);
  const known = window.LiteGraph.registered_node_types;
  return app.graph.nodes.filter((node) => !known[node.type]).map((node) => node.type);
}
"""


def runnable(prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with the demo in place of files that would be downloaded, and short videos."""
    loaders = {
        "RFLoadModel": 0,
        "CLIPLoader": 1,
        "VAELoader": 2,
    }
    swapped = {
        node: loaders[each["class_type"]]
        for node, each in prompt.items()
        if each["class_type"] in loaders
    }
    result: dict[str, Any] = {}
    for node, each in prompt.items():
        if node in swapped:
            continue
        inputs = {}
        for name, value in each["inputs"].items():
            linked = isinstance(value, list) and value[0] in swapped
            inputs[name] = ["demo", swapped[value[0]]] if linked else value
        if each["class_type"] == "RFStreamingSampler":
            inputs |= {"width": 64, "height": 64}
            if not isinstance(inputs["prompt"], list):
                raise AssertionError("a sampler without a prompt")
        result[node] = each | {"inputs": inputs}
    if swapped:
        result["demo"] = {"class_type": "RFLoadDemo", "inputs": {}}
    return result


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_converts_validates_and_runs_to_a_video(server: Server, path: Path) -> None:
    workflow = json.loads(path.read_text())
    prompt = runnable(convert_ui_to_api(workflow, server.get("/object_info")))
    run = server.run(prompt)
    assert run.error is None, run.error and run.error["exception_message"]
    videos = [
        video_of(server, run.output(node))
        for node, each in prompt.items()
        if each["class_type"] == "RFStreamingSampler"
    ]
    assert videos
    for video in videos:
        images = images_of(video)
        assert len(images) >= 9 and images.std() > 5  # something is to be seen


def test_comfyui_lists_every_workflow_as_a_template(server: Server) -> None:
    listed = server.get("/api/workflow_templates")["ComfyUI-RewardForcing"]
    assert sorted(listed) == [path.stem for path in FILES]
    for path in FILES:
        assert path.with_suffix(".jpg").stat().st_size < 200_000
        assert server.get(f"/api/workflow_templates/ComfyUI-RewardForcing/{path.name}")


@pytest.mark.skipif(chromium() is None, reason="chromium is not installed")
def test_every_workflow_opens_in_the_browser(server: Server) -> None:
    with open_page(server.address) as (page, errors):
        for path in FILES:
            missing = page.evaluate(OPEN, json.loads(path.read_text()))
            page.wait_for_timeout(500)
            assert missing == [], path.name
            assert errors == [], path.name
