"""A page of ComfyUI's frontend in headless Chromium."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from .server import PATIENCE

T = TypeVar("T")

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

FIT = """
() => {
  const {app} = window.comfyAPI.app;
  app.extensionManager?.command?.execute?.("Comfy.Canvas.FitView");
  app.graph.setDirtyCanvas(true, true);
}
"""

FRAMES = """
() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))
"""
"""Until the page has drawn what it holds."""

STARTED = """
() => {
  const {workflow, spinner} = window.comfyAPI?.app?.app?.extensionManager ?? {};
  const known = Object.keys(window.LiteGraph?.registered_node_types ?? {}).length;
  return known > 100 && workflow?.activeWorkflow?.isLoaded && spinner === false;
}
"""
"""Whether the frontend has opened its own graph and has no more to do before its user's turn."""

BARE = """
() => {
  const canvas = document.querySelector("#graph-canvas");
  const {x, y, width, height} = canvas.getBoundingClientRect();
  return canvas.parentElement.contains(document.elementFromPoint(x + width / 2, y + height / 2));
}
"""
"""Whether a click into the middle of the graph reaches it: no splash, mask or dialog lies there."""

OPEN = """
async (workflow) => {
  const {app} = window.comfyAPI.app;
  await app.loadGraphData(workflow);
  const known = window.LiteGraph.registered_node_types;
  const missing = app.graph.nodes.filter((node) => !known[node.type]).map((node) => node.type);
  return [app.graph.nodes.length, missing];
}
"""
"""A workflow; how many nodes it has, and the types that are not known."""

DRAWN = """
() => {
  const {canvas, graph} = window.comfyAPI.app.app, [left, top] = canvas.ds.offset;
  const titled = ({pos: [x, y], size: [width, height]}) => [x, y - 30, x + width, y + height];
  const box = (node) => {
    const element = document.querySelector(`[data-node-id="${node.id}"]`);  // Nodes 2.0
    if (!element) return titled(node);
    const {x, y, width, height} = element.getBoundingClientRect(), {scale} = canvas.ds;
    const frame = canvas.canvas.getBoundingClientRect();
    const [l, t] = [(x - frame.x) / scale - left, (y - frame.y) / scale - top];
    return [l, t, l + width / scale, t + height / scale];
  };
  const notes = document.querySelectorAll(
    ".comfy-markdown, .comfy-markdown .tiptap, .comfy-markdown-content");
  return {
    nodes: Object.fromEntries(graph.nodes.map((node) => [node.id, {
      type: node.type, title: node.title, box: box(node), pos: [...node.pos],
      inputs: Object.fromEntries(node.inputs.map((s, i) => [s.name, [...node.getInputPos(i)]])),
      outputs: Object.fromEntries(node.outputs.map((s, i) => [s.name, [...node.getOutputPos(i)]])),
    }])),
    links: [...graph.links.values()].map((link) => {
      const [a, b] = [link.origin_id, link.target_id].map((id) => graph.getNodeById(id));
      return {
        from: a.id, to: b.id, middle: [...(link._pos ?? [])],
        ends: [[...a.getOutputPos(link.origin_slot)], [...b.getInputPos(link.target_slot)]],
      };
    }),
    groups: graph.groups.map(({title, pos: [x, y], size: [width, height]}) =>
      ({title, box: [x, y, x + width, y + height]})),
    hidden: Math.max(0, ...[...notes].map((each) => each.scrollHeight - each.clientHeight)),
  };
}
"""
"""Nodes, links and groups as drawn, in pixels of the graph; pixels of the note that are hidden."""


def use_renderer(page: Any, vue_nodes: bool) -> None:
    """The classic canvas, or Nodes 2.0."""
    page.evaluate(
        "(on) => window.comfyAPI.app.app.extensionManager.setting"
        ".set('Comfy.VueNodes.Enabled', on)",
        vue_nodes,
    )
    page.wait_for_function("(on) => window.LiteGraph.vueNodesMode === on", arg=vue_nodes)
    page.evaluate(FRAMES)


def chromium() -> str | None:
    """Where Debian's chromium is, or None."""
    return shutil.which("chromium")


def settled(page: Any, read: Callable[[], T]) -> T:
    """What `read` gives, once it gives the same for a second in which the page draws."""
    seen, quiet, end = read(), 0, time.monotonic() + PATIENCE
    while quiet < 4:
        assert time.monotonic() < end, f"the page does not rest: {seen}"
        page.wait_for_timeout(250)
        page.evaluate(FRAMES)
        now = read()
        quiet = quiet + 1 if now == seen else 0
        seen = now
    return seen


def drawn(page: Any) -> Any:
    """What `DRAWN` says, once no node moves or grows by as much as a pixel."""

    def boxes() -> list[list[int]]:
        nodes = page.evaluate(DRAWN)["nodes"].values()
        return [[round(side) for side in node["box"]] for node in nodes]

    page.evaluate(FIT)
    settled(page, boxes)
    return page.evaluate(DRAWN)


def wait_for_graph(page: Any) -> None:
    """Until the frontend has started, and nothing lies over its graph, which would replace ours.

    What greets a new user, once for each server, comes before the start is over and is sent away.
    """
    page.wait_for_function(STARTED)
    greeting, end = page.get_by_role("dialog"), time.monotonic() + PATIENCE
    while greeting.count():
        assert time.monotonic() < end, "what greets a new user does not go"
        page.keyboard.press("Escape")
        page.wait_for_timeout(250)
    page.wait_for_function(BARE)


def open_search(page: Any, x: float = 960, y: float = 300) -> Any:
    """The field of the search that a double click on the empty graph opens.

    ComfyUI takes presses 300 ms apart, as a busy page gives them, for two single clicks: again.
    """
    field, end = page.locator("input[role=combobox]:focus"), time.monotonic() + PATIENCE
    while not field.count():
        assert time.monotonic() < end, "no double click opens the search"
        page.keyboard.press("Escape")
        page.mouse.dblclick(x, y)
        page.wait_for_timeout(1500)
    return field


@contextmanager
def open_browsers(number: int, *flags: str) -> Iterator[list[Any]]:
    """Browsers that share nothing, with further flags."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, ExitStack() as ends:
        browsers = []
        for _ in range(number):
            profile = ends.enter_context(tempfile.TemporaryDirectory())
            browser = playwright.chromium.launch_persistent_context(
                Path(profile),
                executable_path=chromium(),
                headless=True,
                args=[*FLAGS, *flags],
                viewport={"width": 1920, "height": 1080},
            )
            browser.set_default_timeout(1000 * PATIENCE)
            ends.callback(browser.close)
            browsers.append(browser)
        yield browsers


def open_frontend(browser: Any, address: str) -> tuple[Any, list[str]]:
    """A page with the graph loaded, and the list of its errors, which grows."""
    errors: list[str] = []
    page = browser.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    wait_for_graph(page)
    return page, errors


@contextmanager
def open_page(address: str) -> Iterator[tuple[Any, list[str]]]:
    """The same in a browser of its own."""
    with open_browsers(1) as (browser,):
        yield open_frontend(browser, address)
