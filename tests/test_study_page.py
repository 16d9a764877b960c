"""The study's page in a real browser; for playwright, run it by a `.venv-comfy-*/bin/python`."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from rf_core.video import VideoFormat, VideoWriter, to_uint8
from training.evaluation.study import QUESTIONS, study_results, write_study

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")

PROMPT = 'a "panda" </script><script>window.broken = 1</script> & <b>snow</b>'
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
TIMES = "() => ['left', 'right'].map((id) => document.getElementById(id).currentTime)"
PLAYING = (
    "() => [...document.querySelectorAll('video')].every((v) => !v.paused && v.readyState > 2)"
)


@pytest.fixture(scope="module")
def page_path(tmp_path_factory) -> Path:
    """A study of three pairs of two models, whose videos are of one colour each."""
    folder = tmp_path_factory.mktemp("study")
    for name, brightness in (("secret-one", 0.2), ("secret-two", 0.8)):
        (folder / name).mkdir()
        for seed in range(3):
            path = folder / name / f"0000-{seed}.mp4"
            images = torch.full((12, 3, 32, 48), brightness)
            with VideoWriter(path, VideoFormat(width=48, height=32)) as writer:
                for _ in range(2):
                    writer.write(to_uint8(images))
            record = {"prompt_number": 0, "seed": seed, "prompt": PROMPT}
            path.with_suffix(".json").write_text(json.dumps(record), encoding="utf-8")
    write_study([folder / "secret-one", folder / "secret-two"], folder / "page.html", seed=3)
    return folder / "page.html"


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Iterator[Any]:
    profile = tmp_path_factory.mktemp("profile")
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=CHROMIUM,
            headless=True,
            args=list(FLAGS),
            viewport={"width": 1280, "height": 800},
        )
        yield context
        context.close()


@pytest.fixture
def page(context, page_path) -> Iterator[Any]:
    """The page as a new rater finds it; errors and requests fail the test."""
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: message.type == "error" and faults.append(message.text))
    outside = ("data:", "blob:", page_path.as_uri())
    page.on("request", lambda r: r.url.startswith(outside) or faults.append(f"request {r.url}"))
    page.goto(page_path.as_uri())
    page.evaluate("localStorage.clear()")
    page.reload()
    yield page
    page.close()
    assert not faults


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def count(page: Any) -> str:
    return page.inner_text("#count")


def brightness(page: Any, side: str) -> float:
    """The green of the middle pixel of a video that plays, in [0, 1]."""
    page.wait_for_function(PLAYING)
    return page.evaluate(
        """(id) => {
          const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
          context.drawImage(document.getElementById(id), 0, 0, 48, 32);
          return context.getImageData(24, 16, 1, 1).data[1] / 255;
        }""",
        side,
    )


def test_a_study_is_answered_by_keys_alone_and_its_csv_gives_the_results(page, page_path, tmp_path):
    key = json.loads(page_path.with_suffix(".key.json").read_text())
    press(page, "Enter")
    for number in (1, 2, 3):
        assert count(page) == f"{number} of 3"
        assert page.inner_text("#prompt") == PROMPT
        brighter = "right" if brightness(page, "right") > brightness(page, "left") else "left"
        assert key["pairs"][f"p{number}"][brighter] == "secret-two"
        press(page, "ArrowRight" if brighter == "right" else "ArrowLeft", "ArrowDown")
        press(page, "Enter")  # the third question is open: nothing happens
        assert count(page) == f"{number} of 3"
        press(page, "ArrowLeft" if brighter == "right" else "ArrowRight", "Enter")
    assert page.is_visible("#end")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "answers.csv")
    assert download.value.suggested_filename.startswith(f"study-{key['study']}-")
    rows = list(csv.DictReader((tmp_path / "answers.csv").open()))
    assert [(row["pair"], row["question"]) for row in rows] == [
        (f"p{number}", question) for number in (1, 2, 3) for question in QUESTIONS
    ]
    found = study_results([tmp_path / "answers.csv"], page_path.with_suffix(".key.json"))
    # The first model in order of names is the dark one.
    assert [(each.wins, each.losses, each.ties) for each in found] == [
        (0, 3, 0),
        (0, 0, 3),
        (3, 0, 0),
    ]


def test_both_videos_play_together_and_repeat(page):
    press(page, "Enter")
    page.wait_for_function(PLAYING)
    seen, apart = [], []
    for _ in range(50):
        left, right = page.evaluate(TIMES)
        seen.append(left)
        apart.append(abs(left - right))
        page.wait_for_timeout(50)
    assert max(seen) > 1
    assert any(later < earlier - 0.5 for earlier, later in pairwise(seen))
    assert sorted(apart)[len(apart) * 9 // 10] < 0.15


def test_space_pauses_both_and_r_goes_to_the_start(page):
    press(page, "Enter")
    page.wait_for_function(PLAYING)
    page.wait_for_timeout(300)
    press(page, " ")
    held = page.evaluate(TIMES)
    page.wait_for_timeout(200)
    assert page.evaluate(TIMES) == held
    assert min(held) > 0.1
    press(page, " ")
    page.wait_for_function(PLAYING)
    page.wait_for_timeout(500)
    press(page, "r")
    assert max(page.evaluate(TIMES)) < 0.4


def test_answers_outlive_the_page_and_can_be_changed_by_going_back(page):
    press(page, "Enter", "ArrowLeft", "ArrowLeft", "ArrowLeft", "Enter", "ArrowRight")
    page.reload()
    assert page.is_visible("#intro")
    page.click("#start")
    assert count(page) == "2 of 3"
    chosen = "[aria-checked=true]"
    assert page.locator(chosen).all_inner_texts() == ["Right"]
    assert page.locator(".question.current p").inner_text() == list(QUESTIONS.values())[1]
    press(page, "Backspace")
    assert count(page) == "1 of 3"
    assert page.locator(chosen).all_inner_texts() == ["Left"] * 3
    page.locator(".question").nth(1).get_by_text("Same").click()
    assert page.locator(chosen).all_inner_texts() == ["Left", "Same", "Left"]
    page.click("#next")
    page.click("#back")
    assert page.locator(chosen).all_inner_texts() == ["Left", "Same", "Left"]
    assert page.is_disabled("#back")


def test_the_end_leads_back_and_a_finished_study_opens_at_its_end(page):
    press(page, "Enter")
    for _ in range(3):
        press(page, "ArrowDown", "ArrowDown", "ArrowDown", "Enter")
    assert page.inner_text("#answered") == "3"
    page.click("#review")
    assert count(page) == "3 of 3"
    page.reload()
    press(page, "Enter")
    assert page.is_visible("#end")


def test_a_prompt_stays_text_whatever_it_holds(page):
    press(page, "Enter")
    assert page.inner_text("#prompt") == PROMPT
    assert page.evaluate("window.broken") is None
    assert page.locator("#prompt b").count() == 0
