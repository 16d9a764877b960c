"""Every workflow, opened in a real browser, converted, validated and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_cli.workflow_to_api import convert_ui_to_api

from training.world.tracker import score

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
