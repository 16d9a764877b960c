"""The pack in the frontend's own search, help and Chinese: what brings an artist to its nodes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .browser import chromium, open_page, open_search, settled
from .server import ROOT, Server

DOCS = ROOT / "nodes" / "web" / "docs"
IN_SIGHT = 11
"""Results that the search box shows without scrolling, at the page's size."""
LISTED = 64
"""Results that it holds at most."""

# The frontend finds a term in a node's id, title and aliases, but ranks by id and title alone, then
# by how often a node is used: an alias puts a node on the list, after every id and title that
# holds the term. Hence the places that are no better than LISTED.
PLACES = [
    ("reward", "Load RF Model", IN_SIGHT),
    ("reward", "Streaming Sampler", LISTED),
    ("reward forcing", "Load RF Model", IN_SIGHT),
    ("self forcing", "Load RF Model", IN_SIGHT),
    ("prompt travel", "Prompt Schedule", 2),
    ("prompt travel", "Prompt Switch", 2),
    ("prompt schedule", "Prompt Schedule", 1),
    ("continue video", "Streaming Sampler", IN_SIGHT),
    ("continue video", "Load Stream State", IN_SIGHT),
    ("extend video", "Streaming Sampler", IN_SIGHT),
    ("extend video", "Load Stream State", IN_SIGHT),
    ("endless", "Streaming Sampler", 1),
    ("infinite video", "Streaming Sampler", 2),
    ("streaming", "Streaming Sampler", 1),
    ("real time", "Streaming Sampler", IN_SIGHT),
    ("real time", "Live Stream", IN_SIGHT),
    ("live", "Live Stream", IN_SIGHT),
    ("interactive video", "Live Stream", 1),
    ("video sampler", "Streaming Sampler", IN_SIGHT),
    ("attention sink", "EMA-Sink Config", 1),
    ("resume", "Load Stream State", 2),
    ("long video", "Streaming Sampler", LISTED),
    ("text to video", "Streaming Sampler", LISTED),
    ("wan", "Load RF Model", LISTED),
    ("wan", "Streaming Sampler", LISTED),
]
TERMS = sorted({term for term, _, _ in PLACES})
FOUND = """
() => [...document.querySelectorAll('[data-testid=result-item]')]
  .map((each) => each.innerText.split('\\n')[0])
"""
SHOW = """
(type) => {
  const {app} = window.comfyAPI.app;
  const node = window.LiteGraph.createNode(type);
  app.graph.clear();
  app.graph.add(node);
  node.pos = [500, 200];
  app.canvas.selectNode(node);
  const shown = (each) => each.label ?? each.localized_name ?? each.name;
  return {
    title: node.title,
    description: node.constructor.nodeData.description,
    inputs: node.inputs.map(shown),
    outputs: node.outputs.map(shown),
  };
}
"""

needs_browser = pytest.mark.skipif(chromium() is None, reason="chromium is not installed")


def chinese() -> dict[str, Any]:
    """The Chinese texts of the nodes."""
    path = ROOT / "locales" / "zh" / "nodeDefs.json"
    texts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return texts


@pytest.fixture(scope="module")
def found(server: Server) -> dict[str, list[str]]:
    """What the search box lists for each term, typed by hand after a double click."""
    with open_page(server.address) as (page, errors):
        page.evaluate("window.comfyAPI.app.app.graph.clear()")
        box = open_search(page)
        listed = {}
        for term in TERMS:
            box.fill("")
            page.keyboard.type(term)
            listed[term] = settled(page, lambda: page.evaluate(FOUND))
        assert errors == []
    return listed


@pytest.fixture(scope="module")
def in_library(server: Server) -> dict[str, list[str]]:
    """What the node library of the sidebar lists for each term."""
    with open_page(server.address) as (page, errors):
        page.keyboard.press("n")
        box = page.wait_for_selector("input[placeholder='Search...']:visible")
        listed = {}
        for term in TERMS:
            box.fill(term)
            listed[term] = settled(page, page.locator("[role=treeitem]").all_inner_texts)
        assert errors == []
    return listed


@pytest.fixture(scope="module")
def in_chinese(
    server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, dict[str, Any]]]:
    """What nodes and their Info tabs say with the frontend in Chinese."""
    pictures = Path(os.environ.get("RF_SCREENSHOTS", tmp_path_factory.mktemp("zh")))
    server.post("/settings/Comfy.Locale", "zh")
    said = {}
    with open_page(server.address) as (page, errors):
        for name, texts in chinese().items():
            said[name] = page.evaluate(SHOW, name)
            if not said.keys() - {name}:  # the tab stays open from then on
                page.get_by_test_id("info-button").click()
            page.wait_for_selector(f"h1:text-is('{texts['display_name']}')")
            said[name]["help"] = page.locator("h1").locator("..").inner_text()
            page.screenshot(path=pictures / f"{name}.png")
        assert errors == []
    yield said
    server.post("/settings/Comfy.Locale", "en")


@needs_browser
@pytest.mark.parametrize(("term", "title", "place"), PLACES)
def test_the_search_box_finds_it(
    found: dict[str, list[str]], term: str, title: str, place: int
) -> None:
    assert title in found[term][:place]


@needs_browser
@pytest.mark.parametrize(("term", "title", "place"), PLACES)
def test_the_node_library_finds_it(
    in_library: dict[str, list[str]], term: str, title: str, place: int
) -> None:
    assert title in in_library[term]


@needs_browser
@pytest.mark.parametrize("name", chinese())
def test_a_node_and_its_help_are_chinese_when_the_frontend_is(
    in_chinese: dict[str, dict[str, Any]], name: str
) -> None:
    texts, said = chinese()[name], in_chinese[name]
    assert (said["title"], said["description"]) == (texts["display_name"], texts["description"])
    named = {each["name"] for each in texts.get("inputs", {}).values()}
    assert set(said["inputs"]) == named
    assert said["outputs"] == [each["name"] for each in texts["outputs"].values()]
    page = (DOCS / name / "zh.md").read_text(encoding="utf-8")
    assert page.splitlines()[-1].split("`")[0] in said["help"]


@pytest.mark.parametrize("name", chinese())
def test_a_chinese_page_calls_inputs_as_the_node_shows_them(name: str) -> None:
    texts = chinese()[name]
    english, page = (
        (DOCS / each).read_text(encoding="utf-8") for each in (f"{name}.md", f"{name}/zh.md")
    )
    assert page.startswith(f"# {texts['display_name']}\n")
    for key in set(re.findall("`([a-z_]+)`", english)) & set(texts.get("inputs", {})):
        assert f"`{texts['inputs'][key]['name']}`" in page
    for pattern in (r"(?m)^\|", "(?m)^ {4}"):  # rows, and lines of examples
        assert len(re.findall(pattern, page)) == len(re.findall(pattern, english))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_text_holds_what_the_frontend_takes_for_its_own_syntax(language: str) -> None:
    path = ROOT / "locales" / language / "nodeDefs.json"
    for name, texts in json.loads(path.read_text(encoding="utf-8")).items():
        for key in ("display_name", "description"):  # messages: "|" is for plurals, "{" for values
            assert not set("|{}@") & set(texts[key]), name


def test_every_word_of_the_live_view_has_a_chinese_one_and_none_is_left_over() -> None:
    web = ROOT / "nodes" / "web"
    scripts = [web / "live.js", *sorted((web / "live").glob("*.js"))]
    string = r'"(?:[^"\\]|\\.)*"'
    said = [
        json.loads(word)
        for path in scripts
        for word in re.findall(rf"\bt\(\s*({string})", path.read_text(encoding="utf-8"))
    ]
    table = (web / "live" / "words_zh.js").read_text(encoding="utf-8")
    rows = re.findall(rf"(?m)^  ({string}):\s+({string}),$", table)
    chinese = {json.loads(word): json.loads(other) for word, other in rows}
    assert len(rows) == len(chinese) and set(said) == set(chinese)
    for word, other in chinese.items():
        assert sorted(re.findall(r"\{\w+\}", word)) == sorted(re.findall(r"\{\w+\}", other))
