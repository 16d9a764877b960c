"""A video that goes on in one file: what a state says about the one its run wrote.

A state carries the file's name within the output folder, how many of its images it stands after,
and which run wrote it. Names from a loaded state are not trusted: the file must lie there, and say
itself that this run made it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..rf_core.state import Snapshot
from ..rf_core.video import RUN, read_metadata
from . import host

VIDEO = "video"
"""Name under which a snapshot's facts say which video it is the end of."""


@dataclass(frozen=True, kw_only=True)
class PreviousVideo:
    """The video that a new one goes on from."""

    path: Path
    run: str
    """Which run made it."""
    num_images: int
    """How many of its images come before the new ones."""


def is_of_run(run: str, video: Path) -> bool:
    """Whether a file is there and was made by that run."""
    try:
        return read_metadata(video).get(RUN) == run
    except ValueError:  # gone, or no video
        return False


def with_video(snapshot: Snapshot, path: Path, run: str, num_images: int) -> Snapshot:
    """The snapshot, which now says that so many images of a file lead to it."""
    video = {"file": host.within_output(path).as_posix(), "run": run, "images": num_images}
    return replace(snapshot, facts=snapshot.facts | {VIDEO: video})


def previous_video(snapshot: Snapshot) -> PreviousVideo:
    """The video that a snapshot is the end of. ValueError says why there is none."""
    name, run, num_images = _video_facts(snapshot.facts.get(VIDEO))
    path = host.output_named(name)
    if path is None:
        raise ValueError(
            f"join is on, and {name!r}, which the state goes on from, is not in the output folder: "
            "put it back there, or turn join off"
        )
    if not is_of_run(run, path):
        raise ValueError(
            f"join is on, and {name} is another video than the one that the state goes on from: "
            "put that one back, or turn join off"
        )
    return PreviousVideo(path=path, run=run, num_images=num_images)


def _video_facts(video: Any) -> tuple[str, str, int]:
    kinds = {"file": str, "run": str, "images": int}
    known = isinstance(video, dict) and all(
        isinstance(video.get(name), kind) for name, kind in kinds.items()
    )
    if not known or video["images"] < 1:
        raise ValueError(
            "join is on, and the state does not say which video it goes on from, as it was made "
            "without a VAE or by an earlier version: turn join off"
        )
    return video["file"], video["run"], video["images"]
