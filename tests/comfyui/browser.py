"""A page of ComfyUI's frontend in headless Chromium."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

BOX = """
() => {
  const {canvas, graph} = window.comfyAPI.app.app;
  const boxes = [...graph.nodes, ...graph.groups].map((each) => each.boundingRect ?? each.bounding);
  const [left, top] = [0, 1].map((i) => Math.min(...boxes.map((box) => box[i])));
  const [right, bottom] = [0, 1].map((i) => Math.max(...boxes.map((box) => box[i] + box[i + 2])));
  const {scale, offset} = canvas.ds, frame = canvas.canvas.getBoundingClientRect();
  return {
    x: Math.max(0, frame.x + (left + offset[0]) * scale - 8),
    y: Math.max(0, frame.y + (top + offset[1]) * scale - 8),
    width: (right - left) * scale + 16,
    height: (bottom - top) * scale + 16,
  };
}
"""
"""Where on the page the graph lies."""


def chromium() -> str | None:
    """Where Debian's chromium is, or None."""
    return shutil.which("chromium")


@contextmanager
def open_page(address: str) -> Iterator[tuple[Any, list[str]]]:
    """A page with the graph loaded, and the list of its errors, which grows."""
    from playwright.sync_api import sync_playwright

    errors: list[str] = []
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        browser = playwright.chromium.launch_persistent_context(
            Path(profile),
            executable_path=chromium(),
            headless=True,
            args=list(FLAGS),
            viewport={"width": 1920, "height": 1080},
        )
        page = browser.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.wait_for_function("window.comfyAPI?.app?.app?.graph !== undefined", timeout=120_000)
        page.wait_for_function(
            "Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100",
            timeout=120_000,
        )
        page.wait_for_function(  # its own empty graph, which would replace ours
            "window.comfyAPI.app.app.extensionManager?.workflow?.activeWorkflow?.isLoaded",
            timeout=120_000,
        )
        page.wait_for_timeout(1000)
        page.keyboard.press("Escape")  # the template browser greets a new user
        try:
            yield page, errors
        finally:
            browser.close()
