"""Has the real frontend make the groups of `blueprints.py` out of the pack's workflows."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from .blueprints import BLUEPRINTS
from .graphs import GRAPHS
from .server import ROOT

MAKE = """
async ([name, workflow, blueprint]) => {
  const {app} = window.comfyAPI.app;
  await app.loadGraphData(workflow);
  const {graph} = app;
  for (const each of [...graph.nodes].filter((node) => node.type === "MarkdownNote"))
    graph.remove(each);
  for (const each of [...graph.groups]) graph.remove(each);
  const of = (nodes, type) => nodes.filter((node) => node.type === type)[0];
  const find = (slots, slot) => {
    const at = slots.findIndex((each) => each.name === slot);
    if (at < 0) throw new Error(`no ${slot} among ${slots.map((each) => each.name)}`);
    return at;
  };
  for (const [from, output, to, input] of blueprint.links) {
    if (!of(graph.nodes, from)) graph.add(LiteGraph.createNode(from));
    const [a, b] = [of(graph.nodes, from), of(graph.nodes, to)];
    a.pos = [b.pos[0] - a.size[0] - 60, b.pos[1] + 300];
    a.connect(find(a.outputs, output), b, find(b.inputs, input));
  }
  const {subgraph, node} = graph.convertToSubgraph(new Set(graph.nodes));
  for (const [type, input] of blueprint.inputs) {
    const inside = of(subgraph.nodes, type), slot = inside.inputs[find(inside.inputs, input)];
    subgraph.addInput(input, String(slot.type)).connect(slot, inside);
  }
  for (const [type, output] of blueprint.outputs) {
    const inside = of(subgraph.nodes, type), slot = inside.outputs[find(inside.outputs, output)];
    subgraph.addOutput(output, String(slot.type)).connect(slot, inside);
  }
  subgraph.name = node.title = name;
  node.pos = [0, 0];
  node.setSize(node.computeSize());
  return JSON.stringify(graph.serialize());
}
"""


def make_blueprints(page: Any) -> None:
    """Make and save all of them."""
    for name, blueprint in BLUEPRINTS.items():
        workflow = json.loads(GRAPHS[blueprint.workflow].path.read_text())
        saved = json.loads(page.evaluate(MAKE, [name, workflow, asdict(blueprint)]))
        (inside,) = saved["definitions"]["subgraphs"]
        inside |= {"category": "Reward Forcing", "description": blueprint.description}
        path = ROOT / "subgraphs" / f"{name}.json"
        path.write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n")
        print(path.name, len(inside["nodes"]), "nodes")
