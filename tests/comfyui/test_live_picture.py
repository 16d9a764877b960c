"""What is asked for on the panel is in the picture, from the chunk told on, in every file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from training.world.tracker import score

from .browser import chromium
from .server import Server
from .test_live_browser import RENDERERS, TEXT, Live, live, wait_until
from .video import images_of

pytestmark = pytest.mark.skipif(chromium() is None, reason="chromium is not installed")

GREEN, YELLOW = "a green circle moves left", "a yellow triangle moves down"
SETTLED = 2
"""Chunks after which a prompt is followed in all that the tracker sees."""


def apply(session: Live, text: str) -> int:
    """Type a prompt; the chunk from which it holds."""
    session.type(text)
    session.page.keyboard.press("Control+Enter")
    return session.told(text)


def begins(chunk: int) -> int:
    """The first image of a chunk."""
    return 12 * chunk - 3 if chunk else 0


def follows(images: np.ndarray, text: str) -> bool:
    """Whether the tracker sees what a prompt says, in all of its attributes."""
    shown = torch.from_numpy(images[-48:]).permute(0, 3, 1, 2) / 255
    scores = score(shown, text)
    return {scores[name] for name in ("colour", "shape", "direction")} == {1.0}


@RENDERERS
def test_the_picture_follows_from_the_chunk_that_was_told_on_in_every_branch(
    server: Server, vue_nodes: bool
) -> None:
    with live(server, vue_nodes) as session:
        session.wait_for_chunk(5)
        green = apply(session, GREEN)
        session.wait_for_chunk(green + SETTLED + 5)
        session.page.mouse.click(*session.place_of(4))
        form = session.view.locator(".rf-popover")
        form.get_by_label("new branch").fill("yellow")
        form.get_by_role("button", name="Rewind").click()
        assert session.told("rewind to chunk 4 as yellow") == 4
        left = images_in(session, server, "main")
        yellow = apply(session, YELLOW)
        session.wait_for_chunk(yellow + SETTLED + 5)
        files = {each["name"]: each["file"] for each in session.status["branches"]}
        session.click("Stop")
        session.click("Stop?")
        wait_until(lambda: not server.get("/queue")["queue_running"])
        main, other = (images_of(server.output / "video" / files[n]) for n in ("main", "yellow"))
    assert follows(main[: begins(green)], TEXT) and follows(main, GREEN)
    assert len(main) >= begins(green + SETTLED + 5) and np.array_equal(main, left)
    assert np.array_equal(other[: begins(4)], main[: begins(4)])
    assert follows(other[: begins(yellow)], TEXT) and follows(other, YELLOW)
    # Not before: the chunks until then are what they would have been without.
    same = min(begins(green), begins(yellow))
    assert np.array_equal(other[:same], main[:same])


def images_in(session: Live, server: Server, branch: str) -> np.ndarray:
    """The file of a branch that was left, once it is closed."""
    named = {each["name"]: each["file"] for each in session.status["branches"]}
    path: Path = server.output / "video" / named[branch]
    wait_until(lambda: len([each for each in session.status["branches"] if each["file"]]) == 2)
    return images_of(path)
