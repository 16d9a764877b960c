"""The groups that ComfyUI's node library offers, and the demo as an app."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .blueprints import BLUEPRINTS
from .browser import chromium, open_search
from .files import LORA
from .graphs import GRAPHS, runnable
from .server import ROOT, Server
from .test_panels import LOAD, RENDERERS, RUN, page_of

NAMES = sorted(BLUEPRINTS)
DEMO = "Text to Video Demo (Reward Forcing)"

needs_browser = pytest.mark.skipif(chromium() is None, reason="chromium is not installed")

GROUP = """
() => {
  const {nodes} = window.comfyAPI.app.app.graph;
  return nodes.map((node) => [node.title, node.widgets.map((each) => [each.name, each.value])]);
}
"""
PROMPT = "async () => (await window.comfyAPI.app.app.graphToPrompt()).output"


def search(page: Any, name: str) -> None:
    """The search, once it knows a group: groups come some seconds after the page."""
    found = "(name) => document.body.innerText.includes(name)"
    for _ in range(10):
        open_search(page, 900, 400)
        page.keyboard.type(name)
        page.wait_for_timeout(1500)
        if page.evaluate(found, name):
            return
        page.keyboard.press("Escape")
        page.wait_for_timeout(2000)
    raise AssertionError(f"{name} is not found")


def add(page: Any, name: str) -> None:
    """A group out of the search, as a user adds it."""
    page.evaluate("() => window.comfyAPI.app.app.graph.clear()")
    page.wait_for_timeout(500)
    search(page, name)
    page.keyboard.press("Enter")
    page.wait_for_timeout(1000)
    page.mouse.click(900, 400)  # where it is put
    page.wait_for_function(f"({GROUP})().length === 1")


def test_comfyui_offers_every_group(server: Server) -> None:
    assert sorted(path.stem for path in (ROOT / "subgraphs").glob("*.json")) == NAMES
    offered = server.get("/global_subgraphs").values()
    ours = [each for each in offered if each["info"]["node_pack"].endswith("RewardForcing")]
    assert sorted(each["name"] for each in ours) == NAMES


@needs_browser
@RENDERERS
def test_every_group_is_found_and_added_with_its_widgets(server: Server, vue_nodes: bool) -> None:
    with page_of(server, vue_nodes) as page:
        for name, blueprint in BLUEPRINTS.items():
            add(page, name)
            ((title, widgets),) = page.evaluate(GROUP)
            assert title == name
            shown = [widget for _, widget in blueprint.inputs if widget != "video"]
            assert [each for each, _ in widgets] == shown
            assert dict(widgets)["length"] == 10.0


@needs_browser
@RENDERERS
def test_the_demo_group_runs_with_what_is_set_on_it(server: Server, vue_nodes: bool) -> None:
    change = """
    (values) => {
      const {app} = window.comfyAPI.app, [node] = app.graph.nodes;
      for (const [name, value] of Object.entries(values))
        node.widgets.find((each) => each.name === name).value = value;
    }
    """
    values = {"text": "a red circle moves left", "length": 1.0, "seed": 7 + vue_nodes}
    with page_of(server, vue_nodes) as page:
        add(page, DEMO)
        page.evaluate(change, values)
        prompt = page.evaluate(PROMPT)
        (sampler,) = [n for n in prompt.values() if n["class_type"] == "RFStreamingSampler"]
        assert {name: sampler["inputs"][name] for name in ("length", "seed")} == {
            name: values[name] for name in ("length", "seed")
        }
        assert values["text"] in [node["inputs"].get("text") for node in prompt.values()]
        assert page.evaluate(RUN) == "execution_success"


@needs_browser
def test_the_groups_of_the_published_weights_run(server: Server) -> None:
    with page_of(server, False) as page:
        add(page, "Text to Video (Reward Forcing)")
        prompt = runnable(page.evaluate(PROMPT), LORA)
    assert server.run(prompt).error is None


@needs_browser
def test_the_demo_opens_as_an_app_and_runs(server: Server) -> None:
    workflow = json.loads(GRAPHS["text_to_video_demo"].path.read_text())
    workflow["extra"]["linearMode"] = True  # as the button for it does
    with page_of(server, True) as page:
        page.evaluate(LOAD, workflow)
        page.wait_for_timeout(2000)
        page.keyboard.press("Escape")  # a tour greets a new user
        for name in ("text", "length", "seed"):
            page.get_by_text(name, exact=True).last.wait_for()
        assert not page.get_by_text("keep_latents", exact=True).last.is_visible()
        page.get_by_role("button", name="Run", exact=True).first.click()
        page.wait_for_selector("video:visible")
