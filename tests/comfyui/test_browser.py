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
TOLD = """
() => window.comfyAPI.app.app.graph.nodes.flatMap((node) =>
  (node.widgets ?? []).filter((each) => each.name === "result").map((each) => each.value))
"""
FITS = """
() => window.comfyAPI.app.app.graph.nodes.some((node) => {
  const video = node.widgets?.find((each) => each.name === "video-preview");
  return video && video.y + video.computedHeight <= node.size[1];
})
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
def test_a_queued_stream_previews_and_then_shows_its_video(
    server: Server, vue_nodes: bool, tmp_path: Path
) -> None:
    saved = workflow("prompt_switch")
    sampler = next(node for node in saved["nodes"] if node["type"] == "RFStreamingSampler")
    sampler["widgets_values"][4] = 1 + vue_nodes  # a seed of its own: nothing is cached
    with open_page(server.address) as (page, errors):
        page.evaluate(
            "(on) => window.comfyAPI.app.app.extensionManager.setting"
            ".set('Comfy.VueNodes.Enabled', on)",
            vue_nodes,
        )
        page.wait_for_timeout(1000)
        page.evaluate(OPEN, saved)
        page.evaluate(FIT)
        page.evaluate(QUEUE)
        page.wait_for_function(ENDED, timeout=180_000)
        page.wait_for_selector("video", timeout=30_000)
        page.wait_for_timeout(2000)
        seen, videos, told, fits = (
            page.evaluate(each) for each in ("window.seen", VIDEOS, TOLD, FITS)
        )
        picture = Path(os.environ.get("RF_SCREENSHOT", tmp_path / "end.png"))
        page.screenshot(path=picture)
        assert errors == []
    kinds = [kind for kind, _, _ in seen]
    assert kinds[-1] == "execution_success"
    previews = [kind for _, _, kind in seen[:-1]]
    assert len(previews) >= 17 * 4 and set(previews) == {"image/png"}
    ((address, width, seconds),) = videos
    assert "type=output" in address and width == 64 and 12 <= seconds < 13
    assert any("images, 12." in text for text in told)
    assert vue_nodes or fits
