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

BARE = """
#graph-canvas-container > *:not(canvas), .graph-canvas-container > *:not(canvas),
.side-tool-bar-container, .actionbar-container, .minimap-main-container, .p-buttongroup,
.workflow-tabs-container { visibility: hidden !important; }
"""


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
        try:
            yield page, errors
        finally:
            browser.close()
