"""Live Stream in ComfyUI's own frontend: what an artist does while it runs, in both renderers."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from rf_core.stream import GUIDE_STRENGTH

from .browser import FIT, chromium, open_browsers, open_frontend, use_renderer, wait_for_graph
from .files import LORA, VIDEO
from .prompts import demo_prompt
from .server import PATIENCE, Server

pytestmark = pytest.mark.skipif(chromium() is None, reason="chromium is not installed")

RENDERERS = pytest.mark.parametrize("vue_nodes", [False, True], ids=["canvas", "vue"])
TEXT = "a red square moves right"
SEEDS = count(1)  # what was made already is not made again
SPAN, PAST = 32, 0.66
"""Chunks on the strip, and how much of it lies before now."""

BUILD = """
([values, lora, video, control]) => {
  const {app} = window.comfyAPI.app;
  app.graph.clear();
  const add = (type) => {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    return node;
  };
  const [demo, live] = ["RFLoadDemo", "RFLiveStream"].map(add);
  const styled = lora && add("RFLoadLoRA"), clip = video && add("LoadVideo");
  const slot = (all, name) => all.findIndex((each) => each.name === name);
  const connect = (a, from, b, to) => a.connect(slot(a.outputs, from), b, slot(b.inputs, to));
  const set = (node, name, value) =>
    (node.widgets.find((each) => each.name === name).value = value);
  live.pos = [330, 0];
  if (lora) {
    styled.pos = [0, 330];
    connect(demo, "MODEL", styled, "model");
    set(styled, "lora_name", lora);
    set(styled, "strength_model", 0);
  }
  if (video) {
    clip.pos = [0, 330];
    connect(clip, "VIDEO", live, "source");
    set(clip, "file", video);
  }
  if (control) {
    const [network, given, file] = ["RFLoadControl", "RFControlVideo", "LoadVideo"].map(add);
    [network, given, file].forEach((node, i) => (node.pos = [-330 * (i + 1), 330]));
    connect(demo, "MODEL", network, "model");
    set(network, "control_name", "demo (bundled)");
    connect(file, "VIDEO", given, "control");
    set(file, "file", control);
    set(given, "at_end", "loop");
    connect(network, "MODEL", live, "model");
    connect(given, "control", live, "control");
  } else connect(styled || demo, "MODEL", live, "model");
  connect(demo, "CLIP", live, "clip");
  connect(demo, "VAE", live, "vae");
  for (const [name, value] of Object.entries(values)) set(live, name, value);
}
"""
"""Live Stream of the demo with these values, behind a LoRA, a video to follow as its source and one
as its control where they are named."""
QUEUE = "() => window.comfyAPI.app.app.queuePrompt(0)"
HEIGHT = """
() => window.comfyAPI.app.app.graph.nodes.find((n) => n.type === "RFLiveStream").size[1]
"""
SAVED = """
() => window.comfyAPI.app.app.graph.serialize().nodes
  .find((node) => node.type === "RFLiveStream")
"""
CANVAS = """
() => {
  const {app} = window.comfyAPI.app, {scale, offset} = app.canvas.ds;
  return [scale, ...offset, ...app.graph.nodes.flatMap((node) => [...node.pos])].map(Math.fround);
}
"""
"""Where the canvas and its nodes stand."""
KEPT = "() => JSON.parse(localStorage.getItem('rf.live') ?? '[]')"
PLAYED = "(video) => video.getVideoPlaybackQuality().totalVideoFrames"
WORDS = """
(view) => [...view.querySelectorAll("*")].filter((each) => each.checkVisibility()).flatMap((each) =>
  [
    each.title, each.placeholder, each.getAttribute("aria-label"),
    ...[...each.childNodes].filter(({nodeType}) => nodeType === 3).map(({data}) => data),
  ].filter(Boolean))
"""
"""All that a view says to its reader."""
SAME = re.compile(rf"{TEXT}|recache|soft|blend|cut|main|Ctrl-Enter|fps|MB|GB|reward_forcing\S*")
"""What is called the same in each language."""
PIXELS = """
(image) => {
  const canvas = new OffscreenCanvas(64, 64), context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, 64, 64).data.join();
}
"""
COUNT = """
() => {
  const {api} = window.comfyAPI.api, {queuePrompt} = api;
  window.queued = 0;
  api.queuePrompt = function (...given) {
    window.queued += 1;
    return queuePrompt.apply(this, given);
  };
}
"""


def wait_until(is_so: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """What it says once it says something true."""
    end = time.monotonic() + seconds
    while not (said := is_so()):
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.1)
    return said


@dataclass
class Live:
    """A session on a page."""

    server: Server
    page: Any

    @property
    def kept(self) -> dict[str, Any]:
        """What the browser remembers of it."""
        return self.page.evaluate(KEPT)[-1]

    @property
    def status(self) -> dict[str, Any]:
        """Where it stands."""
        kept = self.kept
        return self.server.get(f"/rf/live/{kept['session']}?token={kept['token']}")

    @property
    def view(self) -> Any:
        """Player, panel and the rest."""
        return self.page.locator(".rf-live")

    @property
    def last(self) -> str:
        """The last command and what became of it."""
        rows = [row for row in self.view.locator(".rf-log li").all_inner_texts() if row.strip()]
        return rows[-1] if rows else ""

    def click(self, name: str) -> None:
        """Press a button of the view."""
        self.view.get_by_role("button", name=name, exact=True).click()

    def type(self, text: str) -> None:
        """Write into the prompt box."""
        self.view.locator(".rf-text").fill(text)

    def told(self, said: str) -> int:
        """The chunk from which the last command holds, once it does."""
        last = wait_until(lambda: said in self.last and re.search(r"from chunk (\d+)", self.last))
        return int(last[1])

    def wait_for_chunk(self, chunk: int) -> None:
        """Until it stands there or later."""
        wait_until(lambda: self.status["chunk"] >= chunk)

    @property
    def played(self) -> int:
        """Pictures that were shown so far."""
        return int(self.view.locator(".rf-screen > video").evaluate(PLAYED))

    def wait_for_pictures(self) -> None:
        """Until they move."""
        before = self.played
        wait_until(lambda: self.played > before)

    def wait_for_still(self) -> None:
        """Until they stand: what is ready is played first."""

        def stands() -> bool:
            before = self.played
            self.page.wait_for_timeout(2000)
            return self.played == before

        wait_until(stands)

    def stop(self) -> None:
        """Press Stop, which asks for some seconds whether that was meant."""
        for _ in range(10):
            self.click("Stop")
            assert not self.status["ended"]
            sure = self.view.get_by_role("button", name="Stop?", exact=True)
            if sure.evaluate_all("(all) => all.map((each) => each.click()).length"):
                return
        raise AssertionError("it is not stopped")

    @property
    def track(self) -> tuple[float, float, float]:
        """Of the strip: where chunk 0 begins, the pixels of a chunk, and how far down it is."""
        box = self.view.locator(".rf-track").bounding_box()
        first = max(0, math.ceil(self.status["chunk"] - PAST * SPAN))
        step = box["width"] / SPAN
        return box["x"] - first * step, step, box["y"] + box["height"] / 2

    def place_of(self, chunk: int) -> tuple[float, float]:
        """The middle of a chunk on the strip."""
        x, step, y = self.track
        return x + step * (chunk + 0.5), y

    def look(self, name: str, path: Path) -> None:
        """A picture of the page, for whoever asks for one."""
        folder = Path(os.environ.get("RF_SCREENSHOTS", path))
        self.page.screenshot(path=folder / f"{name}.png")


@contextmanager
def live(
    server: Server,
    vue_nodes: bool,
    browser: Any = None,
    lora: str | None = None,
    video: str | None = None,
    more: dict[str, Any] | None = None,
    control: str | None = None,
) -> Iterator[Live]:
    """A stream that runs on a page, ended and without errors at the end; `more` is set on it."""
    with nullcontext([browser]) if browser else open_browsers(1) as (first,):
        page, errors = open_frontend(first, server.address)
        use_renderer(page, vue_nodes)
        values = {"text": TEXT, "width": 64, "height": 64, "seed": next(SEEDS)}
        page.evaluate(BUILD, [values | (more or {}), lora, video, control])
        page.evaluate(FIT)
        page.wait_for_timeout(1000)
        page.evaluate(COUNT)
        try:
            page.evaluate(QUEUE)
            session = Live(server, page)
            page.wait_for_selector(".rf-live")
            session.wait_for_chunk(3)
            page.evaluate(FIT)
            page.wait_for_timeout(1000)
            yield session
        finally:
            server.post("/interrupt")
            wait_until(lambda: not server.get("/queue")["queue_running"])
        assert errors == []


@RENDERERS
def test_a_prompt_is_typed_and_applied_and_its_chunk_is_told(
    server: Server, vue_nodes: bool, tmp_path: Path
) -> None:
    with live(server, vue_nodes) as session:
        page, box = session.page, session.view.locator(".rf-text")
        session.wait_for_pictures()
        box.click()
        page.keyboard.type("a yellow circle 1 moves upp")
        page.keyboard.press("Backspace")
        assert session.status["prompt"] == TEXT  # a 1 in a text is no key
        page.keyboard.press("Control+Enter")
        chunk = session.told("a yellow circle 1 moves up")
        assert session.status["prompt"] == "a yellow circle 1 moves up"
        past = session.status["past"][-1]
        assert (past["chunk"], past["text"]) == (chunk, "a yellow circle 1 moves up")
        session.look(f"prompt-{'vue' if vue_nodes else 'canvas'}", tmp_path)

        page.keyboard.press("Escape")
        session.click("Cut")
        session.told("cut")
        page.keyboard.press("Delete")  # the focus is on a button of the view
        page.keyboard.press("Backspace")
        page.keyboard.press("Control+Enter")
        page.wait_for_timeout(500)
        assert page.evaluate("window.comfyAPI.app.app.graph.nodes.length") == 2
        assert page.evaluate("window.queued") == 1


@RENDERERS
def test_slots_keep_prompts_and_play_them_on_the_keys_1_to_9(
    server: Server, vue_nodes: bool
) -> None:
    with live(server, vue_nodes) as session:
        page = session.page
        for key, text in (("1", "a blue triangle <b>moves</b> down"), ("2", "a cyan circle")):
            session.type(text)
            session.view.locator(".rf-where").click()  # the focus leaves the box for the view
            page.keyboard.press(f"Shift+Digit{key}")
        session.type("")
        session.view.locator("select").select_option("blend")
        session.view.locator(".rf-where").click()
        page.keyboard.press("Digit1")
        session.told("a blue triangle <b>moves</b> down")
        assert session.status["past"][-1]["mode"] == "blend 3"
        session.view.get_by_role("button", name="2 a cyan circle").click()
        session.told("a cyan circle")
        assert session.status["prompt"] == "a cyan circle"
        assert session.view.locator("b").count() == 0  # text stays text


@RENDERERS
def test_pause_stops_the_picture_and_what_happens_on_it_stays_off_the_canvas(
    server: Server, vue_nodes: bool, tmp_path: Path
) -> None:
    with live(server, vue_nodes) as session:
        page = session.page
        session.click("Pause")
        wait_until(lambda: session.status["paused"])
        session.wait_for_still()
        session.look(f"paused-{'vue' if vue_nodes else 'canvas'}", tmp_path)
        chunk, where = session.status["chunk"], page.evaluate(CANVAS)
        slider = session.view.get_by_label("sink decay")
        before = float(slider.input_value())
        box = slider.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.wheel(0, 300)
        page.mouse.wheel(0, -500)
        page.mouse.down()
        page.mouse.move(box["x"] + 5, box["y"] + 3, steps=4)
        page.mouse.up()
        picture = session.view.locator(".rf-where").bounding_box()
        page.mouse.move(picture["x"] + 4, picture["y"] + 4)
        page.mouse.down()
        page.mouse.move(picture["x"] + 90, picture["y"] + 90, steps=4)
        page.mouse.up()
        page.wait_for_timeout(500)
        assert page.evaluate(CANVAS) == where
        session.told("sink decay")
        assert session.status["decay"] < before and session.status["chunk"] == chunk
        session.click("Resume")
        session.wait_for_chunk(chunk + 1)
        session.wait_for_pictures()


def test_a_slider_sets_the_strength_of_its_lora(server: Server, tmp_path: Path) -> None:
    name = LORA.removesuffix(".safetensors")
    with live(server, False, lora=LORA) as session:
        assert session.status["loras"] == {name: 0}
        slider = session.view.get_by_label(name)
        assert slider.input_value() == "0"
        box = slider.bounding_box()
        session.page.mouse.click(box["x"] + 0.7 * box["width"], box["y"] + box["height"] / 2)
        strength = float(slider.input_value())
        assert strength > 0.5
        chunk = session.told(f"{name} {strength:.2f}")
        row = slider.locator("..")
        assert row.locator("output").inner_text() == f"{strength:.2f}"
        assert row.locator(".rf-told").inner_text() == f"from chunk {chunk}"
        assert session.status["loras"] == {name: strength}
        took = {"chunk": chunk, "do": "lora", "name": name, "strength": strength}
        assert session.status["past"][-1] == took
        session.look("lora", tmp_path)


@RENDERERS
def test_a_slider_sets_the_strength_of_the_source(
    server: Server, vue_nodes: bool, tmp_path: Path
) -> None:
    looped = {"source_end": "loop", "text": "a red circle moves up quickly"}
    with live(server, vue_nodes, video=VIDEO, more=looped) as session:
        slider = session.view.get_by_label("source strength")
        assert session.status["strength"] == float(slider.input_value()) == GUIDE_STRENGTH
        box = slider.bounding_box()
        session.page.mouse.click(box["x"] + 0.7 * box["width"], box["y"] + box["height"] / 2)
        strength = float(slider.input_value())
        assert strength > 0.5
        chunk = session.told(f"source strength {strength:.2f}")
        took = {"chunk": chunk, "do": "strength", "strength": strength}
        assert session.status["past"][-1] == took
        (tick,) = session.view.locator(".rf-tick").all()
        assert f"source strength {strength:.2f}" in tick.get_attribute("title")
        session.look(f"source-{vue_nodes}", tmp_path)
    with live(server, vue_nodes) as session:
        assert session.status["strength"] is None
        assert session.view.get_by_label("source strength").count() == 0


def test_a_slider_sets_the_strength_of_the_control(server: Server, tmp_path: Path) -> None:
    with live(server, True, more={"text": "a red shape moves"}, control=VIDEO) as session:
        slider = session.view.get_by_label("control strength")
        assert session.status["control_strength"] == float(slider.input_value()) == 1
        box = slider.bounding_box()
        session.page.mouse.click(box["x"] + 0.2 * box["width"], box["y"] + box["height"] / 2)
        strength = float(slider.input_value())
        assert strength < 0.6
        chunk = session.told(f"control strength {strength:.2f}")
        took = {"chunk": chunk, "do": "control_strength", "strength": strength}
        assert session.status["past"][-1] == took
        session.look("control", tmp_path)


def test_a_browser_without_media_source_shows_moving_pictures(
    server: Server, tmp_path: Path
) -> None:
    with open_browsers(1) as (browser,):
        browser.add_init_script("delete window.MediaSource; delete window.ManagedMediaSource")
        with live(server, False, browser) as session:
            image = session.view.locator(".rf-screen img")
            image.wait_for()
            assert session.view.locator("video").count() == 0
            wait_until(lambda: image.evaluate("(image) => image.naturalWidth") == 64)
            before = image.evaluate(PIXELS)
            wait_until(lambda: image.evaluate(PIXELS) != before)
            session.look("mjpeg", tmp_path)


@RENDERERS
def test_a_click_on_the_past_goes_back_there_into_a_branch(
    server: Server, vue_nodes: bool, tmp_path: Path
) -> None:
    with live(server, vue_nodes) as session:
        session.wait_for_chunk(8)
        session.page.mouse.click(*session.place_of(3))
        form = session.view.locator(".rf-popover")
        assert "Rewind to chunk 3 · 2.1 s" in form.inner_text()
        form.get_by_label("new branch").fill("take-two")
        session.look(f"rewind-{'vue' if vue_nodes else 'canvas'}", tmp_path)
        form.get_by_role("button", name="Rewind").click()
        assert session.told("rewind to chunk 3 as take-two") == 3
        branch = {"name": "take-two", "parent": "main", "begins": 3, "ended": None}
        assert session.status["branch"] == branch
        assert session.view.locator(".rf-flag").inner_text() == "take-two"
        main = session.status["branches"][0]
        assert main["ended"] >= 8
        line = session.view.locator(".rf-line")  # the way that was left
        assert f"main, to chunk {main['ended']} · " in line.get_attribute("title")
        box = line.bounding_box()
        x, step, _ = session.track
        assert box["x"] + box["width"] == pytest.approx(x + step * main["ended"], abs=1)
        session.look(f"left-{'vue' if vue_nodes else 'canvas'}", tmp_path)
        session.wait_for_pictures()


@RENDERERS
def test_a_coming_change_is_scheduled_moved_and_dropped_on_the_strip(
    server: Server, vue_nodes: bool, tmp_path: Path
) -> None:
    with live(server, vue_nodes) as session:
        page, name = session.page, "vue" if vue_nodes else "canvas"
        session.click("Pause")
        wait_until(lambda: session.status["paused"])
        page.wait_for_timeout(500)
        now = session.status["chunk"]
        for ahead, text in ((4, "a green square moves left"), (14, "a purple circle")):
            page.mouse.click(*session.place_of(now + ahead))
            form = session.view.locator(".rf-popover")
            form.locator("textarea").fill(text)
            form.locator("textarea").press("Control+Enter")
            session.told(text)
        coming = [(each["chunk"], each["text"]) for each in session.status["coming"]]
        assert coming == [(now + 4, "a green square moves left"), (now + 14, "a purple circle")]
        page.mouse.move(*session.place_of(now + 4))
        page.mouse.down()
        page.mouse.move(*session.place_of(now + 2), steps=5)
        session.look(f"moving-{name}", tmp_path)
        page.mouse.up()
        session.told(f"to chunk {now + 2}")
        pill = session.view.get_by_role("group", name=re.compile("a purple circle, coming"))
        pill.get_by_title("drop it").click()
        session.told("drop #")
        coming = [(each["chunk"], each["text"]) for each in session.status["coming"]]
        assert coming == [(now + 2, "a green square moves left")]
        session.click("Resume")
        wait_until(lambda: session.status["prompt"] == "a green square moves left")
        past = session.status["past"][-1]
        assert (past["chunk"], past["text"]) == (now + 2, "a green square moves left")


@RENDERERS
def test_a_page_that_is_loaded_again_finds_its_stream_and_plays_on(
    server: Server, vue_nodes: bool, tmp_path: Path
) -> None:
    with live(server, vue_nodes) as session:
        kept, page = session.kept, session.page
        session.type("a yellow circle moves up")
        session.click("Apply")
        session.told("a yellow circle moves up")
        page.wait_for_timeout(2000)  # the frontend saves its draft
        page.reload()
        wait_for_graph(page)
        page.wait_for_selector(".rf-live")
        page.wait_for_timeout(3000)
        page.evaluate(FIT)
        assert session.kept["session"] == kept["session"]
        session.wait_for_pictures()
        session.look(f"reloaded-{'vue' if vue_nodes else 'canvas'}", tmp_path)
        session.type("a blue triangle moves down")
        session.click("Apply")
        session.told("a blue triangle moves down")


@RENDERERS
def test_stop_leaves_text_and_video_on_a_node_of_its_usual_height(
    server: Server, vue_nodes: bool, tmp_path: Path
) -> None:
    name = "vue" if vue_nodes else "canvas"
    with live(server, vue_nodes) as session:
        page, alive = session.page, session.page.evaluate(HEIGHT)
        saved = page.evaluate(SAVED)
        session.stop()
        page.wait_for_selector(".rf-live", state="detached")
        page.wait_for_selector("video")
        page.wait_for_timeout(3000)
        session.look(f"stopped-{name}", tmp_path)
        after = page.evaluate(SAVED)
        assert after["size"] == saved["size"] and saved["size"][1] < alive
        assert after["widgets_values"] == saved["widgets_values"]
        assert page.get_by_text(re.compile("reward_forcing_live.* images, ")).count() == 1
        ((address, width),) = page.locator("video").evaluate_all(
            "(all) => all.map((video) => [video.src, video.videoWidth])"
        )
        assert "type=output" in address and width == 64
        assert page.evaluate(KEPT) == []
        page.reload()
        wait_for_graph(page)
        page.wait_for_timeout(2000)
        assert page.locator(".rf-live").count() == 0


@RENDERERS
def test_while_another_prompt_runs_the_view_says_so_and_then_plays_on(
    server: Server, vue_nodes: bool, tmp_path: Path
) -> None:
    with live(server, vue_nodes, more={"give_way": True}) as session:
        badge, next_ = (session.view.locator(f".rf-{name}") for name in ("badge", "next"))
        key, other = session.kept["session"], demo_prompt(length=60, seed=next(SEEDS))
        assert "prompt_id" in server.post("/prompt", {"prompt": other})
        wait_until(lambda: badge.inner_text() == "Another prompt runs")
        wait_until(lambda: next_.inner_text() == "Goes on by itself after the other prompt.")
        session.look(f"gave-way-{'vue' if vue_nodes else 'canvas'}", tmp_path)
        session.type("a green circle moves left")
        session.click("Apply")
        wait_until(lambda: badge.inner_text() == "Live")
        assert session.told("a green circle moves left") > 0
        assert session.kept["session"] == key and session.page.locator(".rf-live").count() == 1
        session.wait_for_pictures()
        session.stop()
        wait_until(lambda: session.page.locator(".rf-live").count() == 0)


def test_a_run_that_is_done_before_its_stream_says_so_is_forgotten(server: Server) -> None:
    with live(server, False) as session:
        done = {"node": session.kept["node"], "output": {}}
        publish = "(done) => window.comfyAPI.api.api.dispatchCustomEvent('executed', done)"
        session.page.evaluate(publish, done)
        session.page.wait_for_selector(".rf-live", state="detached")
        assert session.page.evaluate(KEPT) == []


def test_two_browsers_play_one_stream_and_both_steer_it(server: Server, tmp_path: Path) -> None:
    with open_browsers(2) as (one, two), live(server, False, one) as session:
        session.page.evaluate("() => (navigator.clipboard.writeText = () => Promise.reject())")
        kept = session.kept
        session.click("Link")
        link = session.view.locator(".rf-popover input").input_value()
        assert link.endswith(f"live.html#session={kept['session']}&token={kept['token']}")
        session.click("Done")
        errors: list[str] = []
        other = two.new_page()
        other.on("pageerror", lambda error: errors.append(str(error)))
        other.goto(link)
        other.wait_for_selector(".rf-badge[data-kind=on]")
        second = Live(server, other)
        other.wait_for_timeout(3000)
        session.wait_for_pictures()
        second.wait_for_pictures()
        second.type("a yellow circle moves up")
        second.view.locator(".rf-text").press("Control+Enter")
        chunk = second.told("a yellow circle moves up")
        assert session.told("a yellow circle moves up") == chunk  # both are told of both
        session.type("a blue triangle moves down")
        session.click("Apply")
        chunk = session.told("a blue triangle moves down")
        assert second.told("a blue triangle moves down") == chunk
        second.look("watch-page", tmp_path)
        other.set_viewport_size({"width": 390, "height": 844})
        other.wait_for_timeout(500)
        second.look("watch-phone", tmp_path)
        other.goto(f"{link}&view=video")
        other.wait_for_timeout(3000)
        second.wait_for_pictures()
        assert not other.locator(".rf-panel").is_visible()
        second.look("watch-video", tmp_path)
        assert errors == []


def test_a_wrong_token_shows_a_sentence(server: Server, tmp_path: Path) -> None:
    with live(server, False) as session:
        page, link = session.page, f"{server.address}/extensions/ComfyUI-RewardForcing/live.html"
        other = page.context.new_page()
        other.goto(f"{link}#session={session.kept['session']}&token=wrong")
        other.wait_for_selector(".rf-badge[data-kind=over]")
        assert "token" in other.locator(".rf-badge").inner_text()
        assert not other.locator(".rf-steer").is_visible()
        Live(server, other).look("wrong", tmp_path)
        other.goto(link)
        assert "names no session" in other.locator(".rf-sentence").inner_text()


def not_chinese(view: Any) -> list[str]:
    """What a view says in English."""
    words = {SAME.sub("", each) for each in view.evaluate(WORDS)}
    return sorted(w for w in words if re.search("[a-z]{2}", w) and not re.search("[一-鿿]", w))


def test_the_view_speaks_chinese_where_the_frontend_does(server: Server, tmp_path: Path) -> None:
    server.post("/settings/Comfy.Locale", "zh")
    try:
        with live(server, False) as session:
            kept, page = session.kept, session.page
            assert not_chinese(session.view) == []
            session.click("重新开始")
            wait_until(lambda: re.search(r"重新开始\s+从块 \d+ 起", session.last))
            page.mouse.click(*session.place_of(2))
            form = session.view.locator(".rf-popover")
            assert re.search(r"回退到块 2 · 1\.\d s", form.inner_text())
            assert not_chinese(session.view) == []
            session.look("zh", tmp_path)

            other = page.context.new_page()  # the page by itself goes by the browser's language
            other.add_init_script("Object.defineProperty(navigator, 'language', {value: 'zh-CN'})")
            link = f"{server.address}/extensions/ComfyUI-RewardForcing/live.html"
            other.goto(f"{link}#session={kept['session']}&token={kept['token']}")
            other.wait_for_selector(".rf-badge[data-kind=on]")
            second = Live(server, other)
            assert other.title() == "实时视频流" and not_chinese(second.view) == []
            second.look("zh-page", tmp_path)
    finally:
        server.post("/settings/Comfy.Locale", "en")
