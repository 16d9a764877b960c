"""Templates as they are drawn in the browser, in both renderers, before and after a run."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from .browser import FIT, OPEN, chromium, drawn, open_page, use_renderer
from .graphs import GRAPHS, Graph
from .layout import RESULTS, Box, behind, curve
from .server import Server
from .test_browser import ENDED, QUEUE

pytestmark = pytest.mark.skipif(chromium() is None, reason="chromium is not installed")

RUN = ("prompt_switch", "continue_from_state", "prompt_schedule")
"""Templates that are run here: all kinds of nodes that show something."""


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes have a pixel in common."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def within(inner: Box, outer: Box) -> bool:
    """Whether a box lies in another."""
    return (
        outer[0] <= inner[0]
        and outer[1] <= inner[1]
        and inner[2] <= outer[2]
        and inner[3] <= outer[3]
    )


def finished(seen: dict[str, Any]) -> dict[str, Any]:
    """What is seen, with the room that results may take at most."""
    nodes = {}
    for number, node in seen["nodes"].items():
        left, top, right, bottom = node["box"]
        grown = [left, top, right, bottom + RESULTS.get(node["type"], 0)]
        nodes[number] = node | {"box": grown}
    return seen | {"nodes": nodes}


def faults(seen: dict[str, Any]) -> list[str]:
    """What covers what, or is out of its place."""
    found = []
    nodes, groups = seen["nodes"], seen["groups"]
    for one, other in combinations(nodes.values(), 2):
        if overlap(one["box"], other["box"]):
            found.append(f"{one['title']} and {other['title']} overlap")
    for node in nodes.values():
        apart = all(not overlap(node["box"], group["box"]) for group in groups)
        if not any(within(node["box"], group["box"]) for group in groups) and not (
            node["type"] == "MarkdownNote" and apart
        ):
            found.append(f"{node['title']} leaves its group")
    for link in seen["links"]:
        (start, _), (end, _) = link["ends"]
        if end < start:
            found.append(f"a link to {nodes[str(link['to'])]['title']} runs backwards")
        points = list(curve(*link["ends"]))
        for number, node in nodes.items():
            ends = (str(link["from"]), str(link["to"]))
            if number not in ends and behind(points, tuple(node["box"]), 0):
                names = " to ".join(nodes[each]["title"] for each in ends)
                found.append(f"a link from {names} runs behind {node['title']}")
    return found


def loaded(graph: Graph) -> Any:
    """A template as saved."""
    return json.loads(graph.path.read_text())


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["canvas", "vue"])
def test_nothing_is_covered_in_any_template_with_room_for_its_results(
    server: Server, vue_nodes: bool
) -> None:
    with open_page(server.address) as (page, errors):
        use_renderer(page, vue_nodes)
        for name, graph in GRAPHS.items():
            page.evaluate(OPEN, loaded(graph))
            seen = drawn(page)
            assert len(seen["nodes"]) == len(graph.nodes) + 1
            assert seen["hidden"] == 0, f"{name}: its note scrolls"
            for link in seen["links"]:  # ours is the curve that is drawn
                middle = list(curve(*link["ends"]))[23]
                assert link["middle"] == pytest.approx(middle, abs=2), name
            assert faults(finished(seen)) == [], name
        assert errors == []


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["canvas", "vue"])
def test_after_a_run_nothing_is_covered(server: Server, vue_nodes: bool, tmp_path: Path) -> None:
    with open_page(server.address) as (page, errors):
        use_renderer(page, vue_nodes)
        for name in RUN:
            page.evaluate(OPEN, loaded(GRAPHS[name]))
            page.evaluate(FIT)
            page.evaluate(QUEUE)
            page.wait_for_function(ENDED)
            samplers = sum(n.type == "RFStreamingSampler" for n in GRAPHS[name].nodes.values())
            page.wait_for_function(
                "(n) => [...document.querySelectorAll('video')].filter((v) => v.videoWidth)"
                ".length === n",
                arg=samplers,
            )
            seen = drawn(page)
            page.screenshot(path=tmp_path / f"{name}.png")
            assert faults(seen) == [], name
            for node in seen["nodes"].values():  # as much as was planned, or less
                if node["type"] == "RFStreamingSampler":
                    assert node["box"][3] - node["box"][1] > 700
        assert errors == []
