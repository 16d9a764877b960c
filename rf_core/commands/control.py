"""Arguments of what controls a video beside its prompts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from ..source import AtEnd

CONTROL = """A VACE beside the student follows a control video (depth, pose, outlines), makes the
part of it anew that a mask is white on, and takes up what reference pictures show. Image n of the
control is of image n of the video."""


def add_control(group: argparse._ArgumentGroup) -> None:
    """`--control-model` and what it follows."""
    add = group.add_argument
    text = "a VACE for the student, official, of ComfyUI or of diffusers; demo: the bundled one"
    add("--control-model", metavar="FILE", help=text)
    add("--control", type=Path, metavar="VIDEO", help="a video, or a picture that holds for all")
    text = "white is made anew, black kept; of another size it is fitted as the video is"
    add("--control-mask", type=Path, metavar="VIDEO", help=text)
    text = "a picture of what is to appear, a frame of the window each; any number of times"
    add("--reference", type=Path, action="append", default=[], metavar="PICTURE", help=text)
    add("--control-strength", type=float, metavar="X", help="of its hints, 0 to 10 (default: 1)")
    add("--control-start", type=float, metavar="S", help="acts from then on, in seconds")
    add("--control-end", type=float, metavar="S", help="acts until then, in seconds")
    text = "after the last image of the control: stop, hold it, loop (default: stop)"
    add("--control-finish", choices=get_args(AtEnd), help=text)
