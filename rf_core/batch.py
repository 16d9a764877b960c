"""Many videos from a file of prompts: what `python -m rf_core generate --prompts` does.

Each prompt has the number of its line in the file; a video's seed and name follow from the line,
its take and the base seed. A video is written under another name and renamed when it is whole: what
bears its name is done, and after a kill the same command makes the rest.

Started by torchrun, process r of n makes every n-th video of the list, from the r-th on. All are
equally long, so shares differ by one video at most, and no process has to hear of another: one
that is slow or dies holds nobody up. Each keeps a manifest of its own, a JSON line a video, written
before the video takes its name: every finished video is listed, with all it was made with.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from .digests import file_digest
from .fast.parallel import Process
from .generate import generate, open_networks, open_stream, open_text_encoder
from .numbered import numbered
from .options import Options, Plan, plan
from .pace import Progress
from .prompts import PromptTimeline, Switch
from .writing import write_text

_SLUG = 40  # characters of the prompt in a name
_SEED_BYTES = 6  # whole numbers below 2**53 survive every JSON reader


@dataclass(frozen=True, kw_only=True)
class Video:
    """One video of a batch."""

    line: int
    """The prompt's line in its file, or row of a table, from 1."""
    take: int
    """Which of the prompt's seeds, from 0."""
    prompt: str
    seed: int

    @property
    def name(self) -> str:
        """Its file, such as `00012_a-red-circle.mp4`; later takes end in their number."""
        words = "-".join(re.findall(r"[^\W_]+", self.prompt.lower()))[:_SLUG].strip("-")
        parts = (f"{self.line:05d}", words, str(self.take or ""))
        return "_".join(filter(None, parts)) + ".mp4"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The videos of a prompt file, and the settings they share."""

    base: Plan
    """A run of the first prompt; the others differ in prompt, seed and name alone."""
    folder: Path
    prompts: Mapping[int, str]
    """Prompts by their lines."""
    seeds: int = 1
    """Videos of each prompt."""

    @cached_property
    def videos(self) -> tuple[Video, ...]:
        """All of them, in the order of the file."""
        seed = self.base.options.seed
        return tuple(
            Video(line=line, take=take, prompt=prompt, seed=seed_of(seed, line, take))
            for line, prompt in self.prompts.items()
            for take in range(self.seeds)
        )

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What all videos are made with, as JSON has it."""
        options, record = self.base.options, self.base.record()
        named = ("model", "vae", "text_encoder")
        paths = [Path(getattr(options.files, name)) for name in named]
        digests = {f"{n}_file": file_digest(path) for n, path in zip(named, paths, strict=True)}
        digests["lora_files"] = " ".join(file_digest(lora.path) for lora in options.files.loras)
        if options.start is not None:
            digests["start_file"] = file_digest(options.start)
        shared = {k: v for k, v in record.items() if k not in ("seed", "prompts")}
        settings = {"base_seed": options.seed, **shared, **digests, "chunks": self.base.total}
        return dict(json.loads(json.dumps(settings)))

    def run(self, video: Video) -> Plan:
        """The run that makes a video, under the name of an unfinished one."""
        options = replace(
            self.base.options,
            timeline=_timeline(video.prompt),
            seed=video.seed,
            output=self.folder / f"{video.name}.partial",
        )
        prompts = options.timeline.resolve(self.base.clock, self.base.total)
        return replace(self.base, options=options, prompts=prompts)

    def entry(self, video: Video) -> dict[str, Any]:
        """A video's line in the manifest."""
        own = {"line": video.line, "take": video.take, "file": video.name}
        return {**own, "prompt": video.prompt, **self.settings, "seed": video.seed}


def plan_batch(options: Options, prompts: Mapping[int, str], seeds: int = 1) -> Batch:
    """Settle and check a batch; `options.output` is its folder, which is made if need be.

    ValueError, one sentence, for whatever is wrong, videos that are there and were made otherwise
    included.
    """
    folder = options.output
    _check_options(options, seeds)
    folder.mkdir(exist_ok=True)
    first = replace(
        options,
        timeline=_timeline(next(iter(prompts.values()))),
        output=folder / "any.mp4",
        snapshot_every=0,  # an unfinished video is begun again
        overwrite=True,
    )
    batch = Batch(base=plan(first), folder=folder, prompts=prompts, seeds=seeds)
    _check_folder(batch)
    return batch


def missing(batch: Batch, process: Process) -> list[Video]:
    """What is still to be made of a process's share."""
    share = batch.videos[process.rank :: process.world_size]
    return [video for video in share if not (batch.folder / video.name).exists()]


def make(
    batch: Batch,
    videos: Sequence[Video],
    process: Process,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Iterator[Path]:
    """Make videos and give each as it is done; the networks are loaded once."""
    if not videos:
        return
    embeds = _encode(batch, [video.prompt for video in videos])
    model, decoder = open_networks(batch.base)
    manifest = _Manifest(batch.folder, process.rank)
    for video in videos:
        run, path = batch.run(video), batch.folder / video.name
        generate(run, open_stream(run, model, decoder, embeds), embeds, report)
        manifest.add(batch.entry(video))
        run.options.output.replace(path)
        yield path


def seed_of(base: int, line: int, take: int) -> int:
    """The seed of one video: no two lines or takes share their noise, whatever the base."""
    digest = hashlib.blake2b(f"{base}/{line}/{take}".encode(), digest_size=_SEED_BYTES)
    return int.from_bytes(digest.digest(), "little")


class _Manifest:
    """What one process has made, a JSON line a video; the file is replaced whole, never torn."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / _manifest_name(rank)
        self._lines = _lines(self._path) if self._path.exists() else []
        self._listed = {entry["file"] for entry in _entries(folder)}

    def add(self, entry: dict[str, Any]) -> None:
        """List a video, unless a run that was killed right after has listed it before."""
        if entry["file"] in self._listed:
            return
        self._lines.append(json.dumps(entry))
        write_text(self._path, "\n".join(self._lines) + "\n")


def _entries(folder: Path) -> Iterator[dict[str, Any]]:
    for _, path in numbered(folder, _manifest_name):
        for line in _lines(path):
            yield json.loads(line)


def _manifest_name(rank: int) -> str:
    return f"manifest-{rank}.jsonl"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _check_options(options: Options, seeds: int) -> None:
    folder = options.output
    if options.chunks is None and options.seconds is None:
        raise ValueError("videos of a prompt file need a length; give --seconds or --chunks")
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; make at least 1 video of each prompt")
    if options.resume or options.overwrite:
        raise ValueError(
            "a folder of videos goes on by itself and nothing in it is replaced; leave out "
            "--resume and --overwrite"
        )
    if folder.suffix.lower() == ".mp4" or folder.is_file():
        raise ValueError(f"the output is {folder}; videos of a prompt file need a folder, name one")
    if not folder.absolute().parent.is_dir():
        raise ValueError(f"the folder {folder.parent} does not exist; create it first")


def _check_folder(batch: Batch) -> None:
    """ValueError where a video that is there, or listed, is not what would be made now."""
    # What is there is looked up first: other processes list a video before it takes its name.
    there = {path.name for path in batch.folder.glob("*.mp4")}
    entries = list(_entries(batch.folder))
    _check_entries(batch, entries)
    listed = {entry["file"] for entry in entries}
    for name in (video.name for video in batch.videos):
        if name in there and name not in listed:
            raise ValueError(
                f"{batch.folder / name} is in no manifest here; move it away or name another folder"
            )


def _check_entries(batch: Batch, entries: Iterable[dict[str, Any]]) -> None:
    videos = {(video.line, video.take): video for video in batch.videos}
    for before in entries:
        video = videos.get((before["line"], before["take"]))
        now = batch.settings if video is None else batch.entry(video)
        for name in now:
            if name != "file" and before.get(name) != now[name]:
                raise ValueError(
                    f"{batch.folder / before['file']} was made with {name} {before.get(name)}, now "
                    f"it is {now[name]}; go on with what the folder was begun with, or name "
                    "another folder"
                )


def _encode(batch: Batch, prompts: Sequence[str]) -> dict[str, Tensor]:
    # Without the zeros behind them, which the network pads again, thousands fit into memory.
    encoder = open_text_encoder(batch.base.options)
    return {text: _trimmed(encoder.encode([text]).cpu()) for text in dict.fromkeys(prompts)}


def _trimmed(embeds_1SD: Tensor) -> Tensor:
    used = embeds_1SD[0].abs().amax(1).nonzero()
    return embeds_1SD[:, : int(used[-1]) + 1].clone()


def _timeline(prompt: str) -> PromptTimeline:
    return PromptTimeline().append(0, "s", Switch(), prompt)
