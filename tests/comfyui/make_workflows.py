"""Draws the graphs of `graphs.py` in a real ComfyUI's own frontend and saves what it saves, each
with a moving picture of what the demo makes of it; then the blueprints and the English locale.

    COMFYUI_PATH=... python -m tests.comfyui.make_workflows [NAME ...]

Needs what the tests need (`make test-comfy`). Run it when a node's sockets or widgets have changed.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tomllib
from comfy_cli.workflow_to_api import convert_ui_to_api
from PIL import Image, ImageDraw

from .browser import OPEN, drawn, open_page, use_renderer
from .files import LORA, write_models, write_video
from .graphs import GRAPHS, SAMPLERS, Graph, runnable
from .layout import BORDER, GROUP_TITLE, TITLE, Drawn, Placed, arrange, box_around
from .locales import english
from .make_blueprints import make_blueprints
from .server import ROOT, Server
from .video import images_of

NOTE_WIDTH = 640
SIDE = 288
"""Pixels of a thumbnail's side: four demo videos side by side, enlarged alike."""
SIGHT_AT, SIGHT = (100, 90), (1700, 900)
"""Pixels that ComfyUI's own bars leave of a page of 1920x1080: where they begin, and how many."""
SMALLEST = 0.6
"""Scale below which the classic canvas leaves out texts, and all that a node shows."""
MAX_PICTURES = 40
PICTURE_SECONDS = 0.1

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
      widget.callback?.(value);  // what hangs on it, such as a preset's values
    }
    if (node.title) drawn.title = node.title;
    if (node.size) drawn.setSize([Math.max(node.size[0], drawn.computeSize()[0]),
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
  return [JSON.stringify(app.graph.serialize()),
          Object.fromEntries(Object.entries(made).map(([name, node]) => [name, node.id]))];
}
"""


class Drawing:
    """One graph on its way to a place for each node."""

    def __init__(self, graph: Graph, about: dict[str, Any]) -> None:
        self.graph = graph
        self.about = about
        self.places = {
            name: (500 * node.at[0], 700 * i) for i, (name, node) in enumerate(graph.nodes.items())
        }
        self.groups: list[dict[str, Any]] = []
        self.note_at, self.note_height = (-800.0, 0.0), 100.0
        self.drawn: dict[str, list[Drawn]] = {name: [] for name in graph.nodes}

    def draw(self, page: Any) -> tuple[dict[str, Any], dict[str, int]]:
        """Draw it as far as places are known: what is saved, and numbers of nodes."""
        nodes = {
            name: asdict(node) | {"pos": self.places[name]}
            for name, node in self.graph.nodes.items()
        }
        note = {
            "text": f"{self.graph.note}\n\n{self.graph.chinese}",
            "pos": self.note_at,
            "size": [NOTE_WIDTH, self.note_height],
        }
        graph = {"nodes": nodes, "links": self.graph.links, "groups": self.groups, "note": note}
        saved, numbers = page.evaluate(DRAW, graph | self.about)
        return json.loads(saved), numbers

    def measure(self, page: Any) -> None:
        """See how one renderer draws it."""
        saved, numbers = self.draw(page)
        page.evaluate(OPEN, saved)  # as an artist sees it
        seen = drawn(page)
        (note,) = [each for each in seen["nodes"].values() if each["type"] == "MarkdownNote"]
        self.note_height = math.ceil(
            max(self.note_height + seen["hidden"], note["box"][3] - note["box"][1] - TITLE)
        )
        for name, number in numbers.items():
            node = seen["nodes"][str(number)]
            (x, y), (left, top, right, bottom) = node["pos"], node["box"]
            sides = [
                {slot: (a - x, b - y) for slot, (a, b) in node[side].items()}
                for side in ("inputs", "outputs")
            ]
            size = (math.ceil(right - left - 0.01), math.ceil(bottom - top - TITLE - 0.01))
            self.drawn[name].append(Drawn(size=size, inputs=sides[0], outputs=sides[1]))

    def arrange(self) -> None:
        """Find the places."""
        placed = {
            name: Placed(
                type=node.type, column=node.at[0], top=node.at[1], drawn=tuple(self.drawn[name])
            )
            for name, node in self.graph.nodes.items()
        }
        self.places = arrange(placed, list(self.graph.links))
        top = -TITLE - GROUP_TITLE
        for title, (first, last) in self.graph.groups.items():
            inside = {
                name: place
                for name, place in self.places.items()
                if first <= placed[name].column <= last
            }
            left, _, right, bottom = box_around(inside, placed)
            size = (right - left + 2 * BORDER, bottom + BORDER - top)
            self.groups.append({"title": title, "pos": (left - BORDER, top), "size": size})
        self.note_at = (-BORDER, top - 2 * BORDER - self.note_height)
        if self.graph.note_beside:
            self.note_at = (-3 * BORDER - NOTE_WIDTH, 0)


def view_of(saved: dict[str, Any]) -> dict[str, Any]:
    """Where a workflow opens: all of it in sight, or its beginning where all would be too small."""
    boxes = [(*each["pos"], *each["size"]) for each in saved["nodes"]]
    boxes += [tuple(each["bounding"]) for each in saved["groups"]]
    left, top = (min(box[i] for box in boxes) for i in (0, 1))
    right, bottom = (max(box[i] + box[i + 2] for box in boxes) for i in (0, 1))
    top -= TITLE
    fitting = min(SIGHT[0] / (right - left), SIGHT[1] / (bottom - top))
    scale = min(max(fitting, SMALLEST), 1.0)
    x, y = (place / scale for place in SIGHT_AT)
    return {"scale": scale, "offset": [x - left, y - top]}


def app_of(saved: dict[str, Any], inputs: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """What a workflow shows in App Mode: inputs by node type and widget, the sampler's video."""
    number = {node["type"]: node["id"] for node in saved["nodes"]}
    return {
        "inputs": [[number[node], widget] for node, widget in inputs],
        "outputs": [number[kind] for kind in SAMPLERS if kind in number],
    }


def videos(server: Server, saved: dict[str, Any]) -> list[np.ndarray]:
    """What the demo makes of a workflow, one [T, H, W, 3] uint8 for each sampler."""
    prompt = runnable(convert_ui_to_api(saved, server.get("/object_info")), LORA)
    run = server.run(prompt)
    samplers = [n for n, each in prompt.items() if each["class_type"] in SAMPLERS]
    files = [file for node in sorted(samplers, key=int) for file in run.output(node)["images"]]
    return [images_of(server.output / each["subfolder"] / each["filename"]) for each in files]


def thumbnail(made: list[np.ndarray], graph: Graph, path: Path) -> None:
    """What moves in the template browser.

    An animated WebP under the one name that ComfyUI looks for, which ends in .jpg; browsers go by
    what an image contains.
    """
    if graph.compared:
        one, two, three, four = made
        made = [
            np.concatenate([np.concatenate([one, two], 2), np.concatenate([three, four], 2)], 1)
        ]
    shown = np.concatenate(made)
    chosen = np.linspace(0, len(shown) - 1, min(len(shown), MAX_PICTURES)).round().astype(int)
    pictures = [Image.fromarray(shown[i]).resize((SIDE, SIDE), Image.LANCZOS) for i in chosen]
    if any(node.type == "RFLoadModel" for node in graph.nodes.values()):
        for picture in pictures:
            draw = ImageDraw.Draw(picture)
            draw.rectangle((0, SIDE - 22, SIDE, SIDE), fill=(0, 0, 0))
            draw.text(
                (8, SIDE - 18), "shown: the demo model's video", fill=(255, 255, 255), font_size=13
            )
    first, *rest = pictures
    first.save(
        path,
        "WEBP",
        save_all=True,
        append_images=rest,
        duration=round(1000 * PICTURE_SECONDS),
        loop=0,
        quality=60,
        method=6,
    )


def main() -> None:
    """Draw and save all of them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with tempfile.TemporaryDirectory() as base:
        write_models(Path(base) / "models")
        write_video(Path(base) / "input")
        server = Server(Path(base))
        try:
            draw_all(server, project)
        finally:
            server.stop()


def draw_all(server: Server, project: dict[str, Any]) -> None:
    """Every workflow, or those named, with thumbnails; all blueprints; the English locale."""
    about = {
        "comfy": server.get("/system_stats")["system"]["comfyui_version"],
        "pack": {"name": project["name"], "version": project["version"]},
    }
    names = sys.argv[1:] or list(GRAPHS)
    graphs = {name: GRAPHS[name] for name in names}
    drawings = [Drawing(graph, about) for graph in graphs.values()]
    with open_page(server.address) as (page, errors):
        for vue_nodes in (True, False):
            use_renderer(page, vue_nodes)
            for each in drawings:
                each.measure(page)
        for each in drawings:
            each.arrange()
        workflows = [each.draw(page)[0] for each in drawings]
        for graph, saved in zip(graphs.values(), workflows, strict=True):
            saved["extra"]["ds"] = view_of(saved)
            if graph.app:
                saved["extra"]["linearData"] = app_of(saved, graph.app)
            graph.path.write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n")
        make_blueprints(page)
        if errors:
            raise SystemExit("\n".join(errors))
    for graph, saved in zip(graphs.values(), workflows, strict=True):
        thumbnail(videos(server, saved), graph, graph.path.with_suffix(".jpg"))
        print(graph.path.name, len(saved["nodes"]), "nodes")
    texts = json.dumps(english(server.get("/object_info")), indent=2, ensure_ascii=False)
    (ROOT / "locales" / "en" / "nodeDefs.json").write_text(texts + "\n")


if __name__ == "__main__":
    main()
