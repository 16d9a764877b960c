"""The pack in ComfyUI's own frontend, in headless Chromium."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from .browser import FIT, chromium, open_page
from .server import ROOT, Server

pytestmark = pytest.mark.skipif(chromium() is None, reason="chromium is not installed")

OPEN = """
async (workflow) => {
  const {app} = window.comfyAPI.app;
  await app.loadGraphData(workflow);
  const known = window.LiteGraph.registered_node_types;
  const missing = app.graph.nodes.filter((node) => !known[node.type]).map((node) => node.type);
  return [app.graph.nodes.length, missing];
}
"""
QUEUE = """
() => {
  const {api} = window.comfyAPI.api;
  window.seen = [];
  const start = performance.now();
  for (const kind of ["b_preview_with_metadata", "execution_error", "execution_success"])
    api.addEventListener(kind, ({detail}) =>
      window.seen.push([kind, performance.now() - start, detail.blob?.type ?? ""]));
  window.comfyAPI.app.app.queuePrompt(0);
}
"""
ENDED = "window.seen.some(([kind]) => kind.startsWith('execution_'))"
VIDEOS = (
    "() => [...document.querySelectorAll('video')].map((v) => [v.src, v.videoWidth, v.duration])"
)
SHOWN = """
() => Math.max(0, ...[...document.querySelectorAll("canvas")].map((c) => c.dataset.shown ?? 0))
"""
NODE = """
() => {
  const node = window.comfyAPI.app.app.graph.nodes.find((n) => n.type === "RFStreamingSampler");
  return [node.size[1], node.widgets.map((each) => each.name)];
}
"""
SEED = """
(seed) => {
  const node = window.comfyAPI.app.app.graph.nodes.find((n) => n.type === "RFStreamingSampler");
  node.widgets.find((each) => each.name === "seed").value = seed;
}
"""


def workflow(name: str) -> Any:
    """A workflow as the frontend saved it."""
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text())


def test_every_workflow_opens(server: Server) -> None:
    with open_page(server.address) as (page, errors):
        for path in sorted((ROOT / "workflows").glob("*.json")):
            saved = json.loads(path.read_text())
            count, missing = page.evaluate(OPEN, saved)
            page.wait_for_timeout(500)
            assert (count, missing) == (len(saved["nodes"]), []), path.name
            assert errors == [], path.name


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["canvas", "vue"])
def test_a_stream_is_shown_as_it_is_made_and_its_node_does_not_grow(
    server: Server, vue_nodes: bool, tmp_path: Path
) -> None:
    heights = []
    with open_page(server.address) as (page, errors):
        page.evaluate(
            "(on) => window.comfyAPI.app.app.extensionManager.setting"
            ".set('Comfy.VueNodes.Enabled', on)",
            vue_nodes,
        )
        page.wait_for_timeout(1000)
        page.evaluate(OPEN, workflow("prompt_switch"))
        page.evaluate(FIT)
        for run in range(3):
            page.evaluate(SEED, 100 + 10 * vue_nodes + run)  # nothing is cached
            page.evaluate(QUEUE)
            page.wait_for_function(f"({SHOWN})() > 3", timeout=180_000)  # they move
            page.screenshot(path=tmp_path / f"making-{run}.png")
            page.wait_for_function(ENDED, timeout=180_000)
            page.wait_for_selector("video", timeout=30_000)
            page.wait_for_timeout(20_000 if run == 1 else 3_000)
            height, widgets = page.evaluate(NODE)
            heights.append(height)
            assert "pictures" not in widgets and page.evaluate(SHOWN) == 0
            assert page.get_by_text("images, 12.").count() == 1  # and stays, told once
            assert page.evaluate("window.seen.at(-1)[0]") == "execution_success"
        ((address, width, seconds),) = page.evaluate(VIDEOS)
        picture = Path(os.environ.get("RF_SCREENSHOT", tmp_path / "end.png"))
        page.screenshot(path=picture)
        assert errors == []
    assert heights[0] == heights[1] == heights[2]
    assert "type=output" in address and width == 64 and 12 <= seconds < 13
