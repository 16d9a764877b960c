"""The pack in ComfyUI's own frontend, in headless Chromium."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from .browser import FIT, OPEN, chromium, open_page, settled, use_renderer, wait_for_graph
from .graphs import GRAPHS
from .server import ROOT, Server

pytestmark = pytest.mark.skipif(chromium() is None, reason="chromium is not installed")

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

ADD = """
([type, x, y]) => {
  const node = window.LiteGraph.createNode(type);
  node.pos = [x, y];
  window.comfyAPI.app.app.graph.add(node);
}
"""
TITLES = """
() => {
  const brush = document.createElement("canvas").getContext("2d");
  brush.font = "14px Inter, Arial";
  return window.comfyAPI.app.app.graph.nodes.map((node) => [
    node.title, node.size[0], brush.measureText(node.title).width + 30 + 110]);
}
"""
"""Width, and what a title takes between its button and the badge of the pack."""


def ours(server: Server) -> list[str]:
    """The pack's nodes."""
    return [name for name in server.get("/object_info") if name.startswith("RF")]


def workflow(name: str) -> Any:
    """A workflow as the frontend saved it."""
    return json.loads(GRAPHS[name].path.read_text())


def test_every_workflow_opens(server: Server) -> None:
    with open_page(server.address) as (page, errors):
        for path in sorted((ROOT / "workflows").glob("*.json")):
            saved = json.loads(path.read_text())
            count, missing = page.evaluate(OPEN, saved)
            page.wait_for_timeout(500)
            assert (count, missing) == (len(saved["nodes"]), []), path.name
            assert errors == [], path.name


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["canvas", "vue"])
def test_a_stream_is_shown_as_it_is_made_and_its_node_does_not_grow_nor_stay_tall(
    server: Server, vue_nodes: bool, tmp_path: Path
) -> None:
    heights = []
    with open_page(server.address) as (page, errors):
        use_renderer(page, vue_nodes)
        page.evaluate(OPEN, workflow("prompt_switch"))
        page.evaluate(FIT)
        empty, *_ = settled(page, lambda: page.evaluate(NODE))
        for run in range(3):
            page.evaluate(SEED, 100 + 10 * vue_nodes + run)  # nothing is cached
            page.evaluate(QUEUE)
            page.wait_for_function(f"({SHOWN})() > 3")  # they move
            page.screenshot(path=tmp_path / f"making-{run}.png")
            page.wait_for_function(ENDED)
            page.wait_for_selector("video")
            page.wait_for_timeout(8_000 if run == 1 else 3_000)
            height, widgets = settled(page, lambda: page.evaluate(NODE))
            heights.append(height)
            assert "pictures" not in widgets and page.evaluate(SHOWN) == 0
            assert page.get_by_text("images, 12.").count() == 1  # and stays, told once
            assert page.evaluate("window.seen.at(-1)[0]") == "execution_success"
        page.wait_for_function("document.querySelector('video').readyState > 0")
        ((address, width, seconds),) = page.evaluate(VIDEOS)
        picture = Path(os.environ.get("RF_SCREENSHOT", tmp_path / "end.png"))
        page.screenshot(path=picture)
        page.reload()
        wait_for_graph(page)
        page.wait_for_timeout(3000)
        reloaded, *_ = settled(page, lambda: page.evaluate(NODE))
        assert errors == []
    assert heights[0] == heights[1] == heights[2] > reloaded == empty
    assert "type=output" in address and width == 64 and 12 <= seconds < 13


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["canvas", "vue"])
def test_cancel_leaves_the_video_as_far_as_it_came_on_its_node(
    server: Server, vue_nodes: bool, tmp_path: Path
) -> None:
    long = workflow("text_to_video_demo")
    (node,) = [node for node in long["nodes"] if node["type"] == "RFStreamingSampler"]
    values = node["widgets_values"]
    values[values.index(10.0)] = 120.0
    with open_page(server.address) as (page, errors):
        use_renderer(page, vue_nodes)
        page.evaluate(OPEN, long)
        page.evaluate(SEED, 300 + vue_nodes)
        page.evaluate(FIT)
        page.evaluate(QUEUE)
        page.wait_for_function(f"({SHOWN})() > 3")
        page.get_by_role("button", name="Cancel current run").first.click()
        page.wait_for_selector("video")
        text = page.get_by_text("stopped: ").inner_text()
        page.screenshot(path=Path(os.environ.get("RF_SCREENSHOT", tmp_path / "stopped.png")))
        assert f"run again with seed {300 + vue_nodes} to go on" in text
        page.wait_for_function("document.querySelector('video').readyState > 0")
        ((address, width, seconds),) = page.evaluate(VIDEOS)
        assert errors == []
    assert "type=output" in address and width == 64 and f"{seconds:.2f} s" in text


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["canvas", "vue"])
def test_a_node_that_is_added_is_wide_enough_for_its_title(
    server: Server, vue_nodes: bool, tmp_path: Path
) -> None:
    with open_page(server.address) as (page, errors):
        use_renderer(page, vue_nodes)
        page.evaluate(OPEN, {"nodes": [], "links": [], "version": 0.4})
        for i, name in enumerate(sorted(ours(server))):
            page.evaluate(ADD, [name, 300 * (i % 3), 700 * (i // 3)])
        page.evaluate(FIT)
        titles = settled(page, lambda: page.evaluate(TITLES))
        page.screenshot(path=tmp_path / "nodes.png")
        for title, width, needed in titles:
            assert width >= needed, title
        assert errors == []
