"""Draws the graphs of `graphs.py` in a running ComfyUI's own frontend and saves what it saves,
with a picture of each for the template browser; and writes the English locale.

    python tests/comfyui/make_workflows.py http://127.0.0.1:8188

Needs Debian's chromium and playwright. Run it when a node's sockets or widgets have changed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from browser import BOX, FIT, open_page
from graphs import GRAPHS, Graph
from PIL import Image, ImageOps

from locales import english

ROOT = Path(__file__).parents[2]
COLUMN = 440
NOTE_HEIGHT = 200
PICTURE = (960, 540)

DRAW = """
async (graph) => {
  const {app} = window.comfyAPI.app;
  const {LiteGraph} = window;
  app.graph.clear();
  const made = {};
  for (const [name, node] of Object.entries(graph.nodes)) {
    const drawn = LiteGraph.createNode(node.type);
    if (!drawn) throw new Error(`no node ${node.type}`);
    app.graph.add(drawn);
    drawn.pos = node.pos;
    for (const [key, value] of Object.entries(node.widgets)) {
      const widget = drawn.widgets.find((each) => each.name === key);
      if (!widget) throw new Error(`${node.type} has no widget ${key}`);
      widget.value = value;
    }
    if (node.title) drawn.title = node.title;
    if (node.size) drawn.setSize([Math.max(node.size[0], drawn.size[0]),
                                  Math.max(node.size[1], drawn.computeSize()[1])]);
    if (node.models.length) drawn.properties.models = node.models;
    drawn.properties.cnr_id = node.type.startsWith("RF") ? graph.pack.name : "comfy-core";
    drawn.properties.ver = node.type.startsWith("RF") ? graph.pack.version : graph.comfy;
    made[name] = drawn;
  }
  for (const [from, to] of graph.links) {
    const [a, output] = from.split("."), [b, input] = to.split(".");
    const slot = made[a].outputs.findIndex((each) => each.name === output);
    const end = made[b].inputs.findIndex((each) => each.name === input);
    if (slot < 0 || end < 0) throw new Error(`${from} -> ${to} does not fit`);
    made[a].connect(slot, made[b], end);
  }
  for (const group of graph.groups) {
    const drawn = new LiteGraph.LGraphGroup(group.title);
    drawn.pos = group.pos;
    drawn.size = group.size;
    app.graph.add(drawn);
  }
  const note = LiteGraph.createNode("MarkdownNote");
  app.graph.add(note);
  note.pos = graph.note.pos;
  note.setSize(graph.note.size);
  note.widgets[0].value = graph.note.text;
  app.graph.setDirtyCanvas(true, true);
  return JSON.stringify(app.graph.serialize());
}
"""


def drawing(graph: Graph, comfy: str, pack: dict[str, str]) -> dict[str, object]:
    """A graph with every place in pixels."""
    nodes = {
        name: asdict(node) | {"pos": [COLUMN * node.at[0], node.at[1]]}
        for name, node in graph.nodes.items()
    }
    heights = [node.at[1] + (node.size or (0, 220))[1] for node in graph.nodes.values()]
    bottom = max(heights) + 40
    groups = [
        {
            "title": title,
            "pos": [COLUMN * first - 20, -60],
            "size": [COLUMN * (last - first + 1) - 20, bottom + 40],
        }
        for title, (first, last) in graph.groups.items()
    ]
    note = {"text": graph.note, "pos": [-20, -80 - NOTE_HEIGHT - 20], "size": [620, NOTE_HEIGHT]}
    return {
        "nodes": nodes,
        "links": graph.links,
        "groups": groups,
        "note": note,
        "comfy": comfy,
        "pack": pack,
    }


def picture(page: Any, path: Path) -> None:
    """The whole graph as a small JPEG."""
    page.keyboard.press("Escape")
    page.evaluate(FIT)
    page.wait_for_timeout(800)
    page.screenshot(path=path.with_suffix(".png"), clip=page.evaluate(BOX))
    with Image.open(path.with_suffix(".png")) as image:
        ImageOps.contain(image.convert("RGB"), PICTURE).save(path, quality=80)
    path.with_suffix(".png").unlink()


def main(address: str) -> None:
    """Draw and save all of them."""
    project = (ROOT / "pyproject.toml").read_text()
    version = next(
        line.split('"')[1] for line in project.splitlines() if line.startswith("version")
    )
    with open_page(address) as (page, errors):
        comfy = page.evaluate("fetch('/system_stats').then(r => r.json())")["system"]
        page.add_style_tag(content=".minimap-main-container { display: none !important; }")
        for name, graph in GRAPHS.items():
            pack = {"name": "comfyui-rewardforcing", "version": version}
            saved = json.loads(page.evaluate(DRAW, drawing(graph, comfy["comfyui_version"], pack)))
            path = ROOT / "workflows" / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n")
            picture(page, path.with_suffix(".jpg"))
            print(path.name, len(saved["nodes"]), "nodes")
        info = page.evaluate("fetch('/object_info').then(r => r.json())")
        english_file = ROOT / "locales" / "en" / "nodeDefs.json"
        english_file.parent.mkdir(parents=True, exist_ok=True)
        english_file.write_text(json.dumps(english(info), indent=2, ensure_ascii=False) + "\n")
        if errors:
            raise SystemExit("\n".join(errors))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8188")
