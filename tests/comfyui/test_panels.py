"""What the pack's scripts show on its nodes, in both renderers of ComfyUI's own frontend."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from .browser import chromium, drawn, open_page, settled, use_renderer
from .conftest import PACK
from .server import Server

pytestmark = pytest.mark.skipif(chromium() is None, reason="chromium is not installed")

RENDERERS = pytest.mark.parametrize("vue_nodes", [False, True], ids=["canvas", "vue"])
VALUES = ("window_frames", "sink_frames", "decay", "accumulator", "anchor_frames")

ADD = """
([types, widgets]) => {
  const {app} = window.comfyAPI.app;
  app.graph.clear();
  return types.map((type, i) => {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    node.pos = [450 * (i % 3), 330 * Math.floor(i / 3)];
    for (const [name, value] of Object.entries(widgets[i] ?? {})) {
      const widget = node.widgets.find((each) => each.name === name);
      widget.value = value;
      widget.callback?.(value, app.canvas, node);
    }
    return String(node.id);
  });
}
"""
"""Nodes of the types, each with its widgets as a user sets them; their numbers."""

SINKS = """
() => window.comfyAPI.app.app.graph.nodes.filter((node) => node.type === "RFSinkConfig")
  .map((node) => Object.fromEntries(node.widgets.map((w) => [w.name, [w.value, !!w.disabled]])))
"""
LOAD = "(graph) => window.comfyAPI.app.app.loadGraphData(graph)"
SAVE = "() => window.comfyAPI.app.app.graph.serialize()"
COPY = """
() => {
  const {canvas, graph} = window.comfyAPI.app.app;
  canvas.selectItems(graph.nodes);
  canvas.copyToClipboard();
  canvas.pasteFromClipboard();
}
"""
DRAWN = """
() => {
  const {canvas} = window.comfyAPI.app.app, texts = [];
  const {prototype} = CanvasRenderingContext2D, {fillText} = prototype;
  prototype.fillText = function (text, ...rest) {
    texts.push([String(text), this.globalAlpha]);
    return fillText.call(this, text, ...rest);
  };
  canvas.draw(true, true);
  prototype.fillText = fillText;
  return texts;
}
"""
"""The texts that the canvas draws, each with its opacity."""
PLACE = """
(name) => {
  const {canvas, graph} = window.comfyAPI.app.app, {scale, offset} = canvas.ds;
  const node = graph.nodes.find((each) => each.type === "RFSinkConfig");
  const frame = canvas.canvas.getBoundingClientRect();
  const widget = node.widgets.find((each) => each.name === name);
  const at = [node.pos[0] + node.size[0] - 25, node.pos[1] + widget.last_y + 10];
  return [0, 1].map((i) => [frame.x, frame.y][i] + (at[i] + offset[i]) * scale);
}
"""
"""Where on the page the canvas draws the arrow that takes a widget of a sink to its next value."""
PROMPT = "async () => (await window.comfyAPI.app.app.graphToPrompt()).output"


@contextmanager
def page_of(server: Server, vue_nodes: bool) -> Iterator[Any]:
    """A page in one of the two renderers, without errors to its end."""
    with open_page(server.address) as (page, errors):
        use_renderer(page, vue_nodes)
        yield page
        assert errors == []


def look(page: Any, path: Path) -> None:
    """A picture of the page, for whoever asks for one."""
    drawn(page)
    page.screenshot(path=Path(os.environ.get("RF_SCREENSHOTS", path.parent)) / path.name)


@pytest.fixture
def presets(pack: Any) -> dict[str, dict[str, Any]]:
    """What each preset of EMA-Sink Config sets, as the node uses it."""
    loaders = importlib.import_module(f"{PACK}.nodes.loaders")
    return {
        name: {value: getattr(each.cache, value) for value in VALUES}
        for name, each in loaders.PRESETS.items()
    }


def shown(values: dict[str, Any], disabled: bool) -> dict[str, list[Any]]:
    """A sink's widgets as the frontend holds them, but for the preset."""
    return {name: [value, disabled] for name, value in values.items()}


def sinks(page: Any) -> list[dict[str, list[Any]]]:
    """The widgets of all EMA-Sink Configs, but for their presets, once they change no more."""
    found = settled(page, lambda: page.evaluate(SINKS))
    return [{name: sink[name] for name in VALUES} for sink in found]


@RENDERERS
def test_a_sink_shows_what_its_preset_sets_and_frees_it_for_custom(
    server: Server, vue_nodes: bool, presets: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    name = "vue" if vue_nodes else "canvas"
    with page_of(server, vue_nodes) as page:
        page.evaluate(ADD, [["RFSinkConfig"] * 6, [{"preset": p} for p in (*presets, "Custom")]])
        fixed = [shown(values, True) for values in presets.values()]
        free = shown(next(iter(presets.values())), False)  # as a new node begins
        assert sinks(page) == [*fixed, free]
        look(page, tmp_path / f"sinks-{name}.png")
        if vue_nodes:
            seen = page.locator(".lg-node input").evaluate_all(
                "(all) => all.map((input) => [input.value, input.disabled])"
            )
            assert ["15", True] in seen and ["9", False] in seen
        else:
            seen = page.evaluate(DRAWN)
            assert ["15", 0.5] in seen and ["float32", 0.5] in seen and ["9", 1] in seen
        page.evaluate(COPY)
        assert sinks(page) == [*fixed, free] * 2
        for node in page.evaluate(PROMPT).values():
            preset = node["inputs"].pop("preset")
            assert preset == "Custom" or node["inputs"] == presets[preset]


@RENDERERS
def test_choosing_a_preset_by_hand_changes_what_its_sink_shows(
    server: Server, vue_nodes: bool, presets: dict[str, dict[str, Any]]
) -> None:
    with page_of(server, vue_nodes) as page:
        page.evaluate(ADD, [["RFSinkConfig"], []])
        drawn(page)
        if vue_nodes:
            page.locator(".lg-node [role=combobox]").first.click()
            page.get_by_role("option", name="Long").click()
        else:
            page.mouse.click(*page.evaluate(PLACE, "preset"))
        page.wait_for_function(f"({SINKS})()[0].preset[0] === 'Long'")
        if not vue_nodes:
            page.mouse.click(*page.evaluate(PLACE, "window_frames"))  # which is greyed
        assert sinks(page) == [shown(presets["Long"], True)]


@RENDERERS
def test_a_workflow_saved_with_other_values_opens_with_those_that_act(
    server: Server, vue_nodes: bool, presets: dict[str, dict[str, Any]]
) -> None:
    custom = {"window_frames": 21, "sink_frames": 6, "decay": 0.5, "accumulator": "float32"}
    custom |= {"anchor_frames": 2}
    with page_of(server, vue_nodes) as page:
        page.evaluate(ADD, [["RFSinkConfig"] * 2, [{"preset": "Custom"} | custom] * 2])
        saved = page.evaluate(SAVE)
        first = min(saved["nodes"], key=lambda node: node["id"])
        assert first["widgets_values"] == ["Custom", *custom.values()]
        first["widgets_values"][0] = "Long"  # as one without the script leaves it
        page.evaluate(LOAD, saved)
        assert sinks(page) == [shown(presets["Long"], True), shown(custom, False)]


@RENDERERS
def test_a_workflow_of_before_there_were_anchors_opens_unchanged(
    server: Server, vue_nodes: bool, presets: dict[str, dict[str, Any]]
) -> None:
    custom = {"window_frames": 21, "sink_frames": 6, "decay": 0.5, "accumulator": "float32"}
    with page_of(server, vue_nodes) as page:
        page.evaluate(ADD, [["RFSinkConfig"] * 2, [{"preset": "Custom"} | custom, {}]])
        saved = page.evaluate(SAVE)
        for node in saved["nodes"]:
            assert node["widgets_values"].pop() == 0
            del node["inputs"][-1]
        page.evaluate(LOAD, saved)
        anchorless = custom | {"anchor_frames": 0}
        assert sinks(page) == [shown(anchorless, False), shown(presets["Published"], True)]


@RENDERERS
def test_a_sink_whose_preset_is_linked_is_left_alone(
    server: Server, vue_nodes: bool, presets: dict[str, dict[str, Any]]
) -> None:
    link = """
    (on) => {
      const [sink, source] = ["RFSinkConfig", "PrimitiveNode"].map((type) =>
        window.comfyAPI.app.app.graph.nodes.find((node) => node.type === type));
      const slot = sink.inputs.findIndex((input) => input.name === "preset");
      on ? source.connect(0, sink, slot) : sink.disconnectInput(slot);
    }
    """
    long = presets["Long"]
    with page_of(server, vue_nodes) as page:
        page.evaluate(ADD, [["RFSinkConfig", "PrimitiveNode"], [{"preset": "Long"}]])
        assert sinks(page) == [shown(long, True)]
        page.evaluate(link, True)
        assert sinks(page) == [shown(long, False)]
        page.evaluate(LOAD, page.evaluate(SAVE))
        assert sinks(page) == [shown(long, False)]
        page.evaluate(link, False)
        assert sinks(page) == [shown(long, True)]


def test_the_presets_come_with_the_node_s_definition(
    server: Server, presets: dict[str, dict[str, Any]]
) -> None:
    about = server.get("/object_info/RFSinkConfig")["RFSinkConfig"]["input"]["required"]
    assert json.loads(json.dumps(about["preset"][1]["presets"])) == presets


RUN = """
() => new Promise((resolve) => {
  const {api} = window.comfyAPI.api;
  for (const kind of ["execution_error", "execution_success"])
    api.addEventListener(kind, () => resolve(kind), {once: true});
  window.comfyAPI.app.app.queuePrompt(0);
})
"""
LINK = """
([from, output, to, input]) => {
  const {graph} = window.comfyAPI.app.app;
  const [a, b] = [from, to].map((type) => graph.nodes.find((node) => node.type === type));
  const slots = [[a.outputs, output], [b.inputs, input]].map(([all, name]) =>
    all.findIndex((each) => each.name === name));
  a.connect(slots[0], b, slots[1]);
}
"""
BOXES = """
() => [...document.querySelectorAll("table tr")].map((row) =>
  [...row.cells].map((cell) => [cell.textContent, cell.getBoundingClientRect().x]))
"""
SCRIPT = (
    "0s: a blue square moves up quickly\n5s [recache]: a cyan circle moves right slowly\n"
    "+4s [blend 3 slerp]: a yellow square moves left\nc18 [cut]: a purple triangle moves down"
)


@RENDERERS
def test_a_schedule_shows_its_table_in_columns_to_stay(
    server: Server, vue_nodes: bool, tmp_path: Path
) -> None:
    name = "vue" if vue_nodes else "canvas"
    with page_of(server, vue_nodes) as page:
        types = ["RFLoadDemo", "RFPromptSchedule", "PreviewAny"]
        page.evaluate(ADD, [types, [{}, {"text": SCRIPT, "length": 16.0}]])
        page.evaluate(LINK, ["RFLoadDemo", "CLIP", "RFPromptSchedule", "clip"])
        page.evaluate(LINK, ["RFPromptSchedule", "table", "PreviewAny", "source"])
        for _ in range(2):  # the second time all is cached
            assert page.evaluate(RUN) == "execution_success"
            page.wait_for_selector("table tr")
            page.wait_for_timeout(2000)  # it stays
            look(page, tmp_path / f"schedule-{name}.png")
            rows = page.evaluate(BOXES)
            assert [row[0][0] for row in rows] == ["chunk", "0", "7", "12", "18"]
            modes = ["mode", "start", "recache", "blend 3 slerp", "cut"]
            assert [row[2][0] for row in rows] == modes
            for column in zip(*rows, strict=True):
                assert len({round(x) for _, x in column}) == 1
            assert all(a[1] < b[1] for row in rows for a, b in pairwise(row))


@RENDERERS
def test_what_a_node_tells_at_its_end_stays_on_it_once(
    server: Server, vue_nodes: bool, tmp_path: Path
) -> None:
    name = "vue" if vue_nodes else "canvas"
    with page_of(server, vue_nodes) as page:
        page.evaluate(ADD, [["RFModelInfo"], [{"model_name": "demo.safetensors"}]])
        for _ in range(2):
            assert page.evaluate(RUN) == "execution_success"
            page.get_by_text("layout").wait_for()
            page.wait_for_timeout(3000)  # it stays
            look(page, tmp_path / f"text-{name}.png")
            assert page.get_by_text("layout").count() == 1
            saved = page.evaluate(SAVE)["nodes"][0]
            assert saved["widgets_values"] == ["demo.safetensors"]


TELL = """
([width, text]) => {
  const {api} = window.comfyAPI.api, {graph} = window.comfyAPI.app.app, [node] = graph.nodes;
  if (width) node.setSize([width, node.size[1]]);
  api.dispatchCustomEvent("executed", {
    node: String(node.id), display_node: String(node.id), prompt_id: "1", output: {text: [text]}});
}
"""
ROOM = """
(all) => all.filter((each) => each.style.userSelect === "text")
  .map((each) => [each.scrollHeight, each.clientHeight])
"""
"""Of the boxes that hold what a node tells: the height of their content, and what of it is seen."""
LONG = (
    "reward_forcing_00012_.mp4: 812 images, 50.8 s at 16.0 images/s in branches main, take-two, "
    "evening and last-one; the log beside it, reward_forcing_00012_.jsonl, makes the same again"
)


@RENDERERS
@pytest.mark.parametrize("width", [440, 380])
def test_all_of_a_long_line_that_a_node_tells_is_seen_and_the_node_stays_as_high(
    server: Server, vue_nodes: bool, width: int, tmp_path: Path
) -> None:
    name = f"told-{width}-{'vue' if vue_nodes else 'canvas'}"
    with page_of(server, vue_nodes) as page:
        page.evaluate(ADD, [["RFStreamingSampler"], []])
        heights = set()
        for run in range(3):
            page.evaluate(TELL, [0 if run else width, LONG])
            ((content, seen),) = settled(page, lambda: page.locator("div").evaluate_all(ROOM))
            look(page, tmp_path / f"{name}.png")
            assert 0 < content <= seen
            (box,) = (node["box"] for node in drawn(page)["nodes"].values())
            heights.add(round(box[3] - box[1]))
        assert len(heights) == 1
        page.evaluate(TELL, [0, f"{LONG}; {LONG}"])  # another run tells more
        ((content, seen),) = settled(page, lambda: page.locator("div").evaluate_all(ROOM))
        assert 0 < content <= seen
