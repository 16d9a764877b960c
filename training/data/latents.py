"""Videos as latents: a shard each, encoded once, and the clips that networks learn from."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from rf_core.config import TEMPORAL_FACTOR
from rf_core.decoders.decoder import Decoder
from rf_core.numbered import numbered
from rf_core.video import images_at_rate
from rf_core.weights.files import parse_json, read_weights
from rf_core.writing import whole_file

from .clips import Buckets, Groups
from .embeddings import PromptEmbeds

SUFFIXES = {
    "videos": (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"),
    "pictures": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"),
}
_NOTE = "rf_latents"


@dataclass(frozen=True, kw_only=True)
class Video:
    """A video, or a picture, with what it shows."""

    name: str
    """Its path within its folder."""
    prompt: str


def list_videos(
    folder: Path, captions: Path | None, kind: Literal["videos", "pictures"] = "videos"
) -> list[Video]:
    """The videos, or pictures, of a folder and of those in it, by name, that have a caption.

    Captions are the rows of a CSV with the columns `file` and `prompt` or, without one,
    texts of the videos' names: `a/b.txt` of `a/b.mp4`. ValueError where there is none.
    """
    if not folder.is_dir():
        raise ValueError(f"{kind} is {folder}, which is not a folder")
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES[kind] and path.is_file()
    )
    told = _texts(folder, names) if captions is None else _table(captions)
    videos = [Video(name=name, prompt=told[name]) for name in names if told.get(name)]
    if not videos:
        hint = "a .txt of its name beside it" if captions is None else f"a row in {captions}"
        raise ValueError(
            f"{folder} holds {len(names)} {kind} ({', '.join(SUFFIXES[kind])}) and none has {hint}"
        )
    return videos


def _texts(folder: Path, names: Sequence[str]) -> dict[str, str]:
    paths = {name: (folder / name).with_suffix(".txt") for name in names}
    return {n: " ".join(p.read_text("utf-8").split()) for n, p in paths.items() if p.is_file()}


def _table(path: Path) -> dict[str, str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        return {row["file"]: " ".join(row["prompt"].split()) for row in rows}
    except (OSError, UnicodeError, csv.Error, KeyError, AttributeError) as error:
        raise ValueError(
            f"captions is {path}, which is no CSV with the columns file and prompt ({error!r})"
        ) from None


def cut(path: Path, *, height: int, width: int, fps: int, frames: int) -> Iterator[Tensor]:
    """A video's clips of so many latent frames, one after another, [T, 3, height, width]."""
    images, size = images_at_rate(path, width=width, height=height, fps=fps), clip_images(frames)
    while len(clip := list(islice(images, size))) == size:
        yield torch.stack(clip)


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """That of the sizes, heights and widths, for which the least of a picture is cropped."""

    def share_kept(size: tuple[int, int]) -> Fraction:
        ratio = Fraction(height * size[1], width * size[0])
        return min(ratio, 1 / ratio)

    return max(sizes, key=share_kept)


def clip_images(frames: int) -> int:
    """Images of a clip of so many latent frames, which begins a stream."""
    return TEMPORAL_FACTOR * (frames - 1) + 1


@torch.no_grad()
def encode_clips(clips: Iterator[Tensor], decoder: Decoder, device: torch.device) -> list[Tensor]:
    """Latents of each clip, float16 [C, F, h, w]."""
    return [decoder.encode(clip[None].to(device))[0].half().cpu() for clip in clips]


def latents_path(out: Path, number: int) -> Path:
    """The shard of a video."""
    return out / _shard_name(number)


def _shard_name(number: int) -> str:
    return f"latents-{number:06}.safetensors"


def shards_of_latents(folder: Path) -> list[Path]:
    """The shards that a folder holds."""
    return [path for _, path in numbered(folder, _shard_name)]


def write_latents(path: Path, clips: Sequence[Tensor], video: Video, problem: str) -> None:
    """Write a video's shard, which is whole once it exists; it may hold no clip."""
    latents = torch.stack(list(clips)) if clips else torch.zeros(0)
    note = {"file": video.name, "prompt": video.prompt, "problem": problem}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        save_file({"latents": latents}, part, {_NOTE: json.dumps(note)})


def check_shard_is_of(path: Path, video: Video) -> None:
    """ValueError where a shard is of another video, or of another caption of it."""
    note = _note(path)
    if (note["file"], note["prompt"]) != (video.name, video.prompt):
        raise ValueError(
            f"{path} is of {note['file']}, and the video there is {video.name} now, or its "
            "caption has changed; choose another folder"
        )


def video_of_shard(path: Path) -> str:
    """The video that a shard is of, its path within its folder."""
    return _note(path)["file"]


def _note(path: Path) -> dict[str, str]:
    metadata = read_weights(path).metadata
    if _NOTE not in metadata:
        raise ValueError(f"{path} is no shard of latents: its metadata lack {_NOTE}")
    note = parse_json(path, metadata[_NOTE])
    return {name: str(note.get(name, "")) for name in ("file", "prompt", "problem")}


VideoClip = tuple[Tensor, int, int]
"""Its video's latents, its place in them, and its prompt's number."""


def read_video_clips(folder: Path) -> tuple[tuple[VideoClip, ...], tuple[str, ...]]:
    """A folder's clips, and its prompts. ValueError where there are none, or of several lengths."""
    clips: list[VideoClip] = []
    prompts: dict[str, int] = {}
    for path in shards_of_latents(folder):
        latents, note = read_weights(path).tensors["latents"], _note(path)
        if len(latents):
            number = prompts.setdefault(note["prompt"], len(prompts))
            clips += [(latents, place, number) for place in range(len(latents))]
    if not clips:
        raise ValueError(f"{folder} holds no clip: all of its videos were left out")
    shapes = sorted({tuple(latents.shape[1:3]) for latents, _, _ in clips})
    if len(shapes) > 1:
        raise ValueError(
            f"{folder} holds clips of {len(shapes)} kinds, of channels and latent frames "
            f"{', '.join(map(str, shapes))}; they may differ in height and width alone"
        )
    return tuple(clips), tuple(prompts)


@dataclass(frozen=True)
class VideoClips:
    """A folder of latents as a `ClipSource`: tensors are mapped, and read as they are asked for."""

    clips: tuple[VideoClip, ...]
    """As `read_video_clips` gives them, and the next."""
    prompts: tuple[str, ...]
    embeds: PromptEmbeds

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """See `ClipSource`."""
        channels, frames = self.clips[0][0].shape[1:3]
        return channels, frames, *max(self.buckets, key=lambda size: len(self.buckets[size]))

    @property
    def groups(self) -> Groups:
        """See `ClipSource`."""
        return (range(len(self)),)

    @property
    def origins(self) -> Sequence[int]:
        """See `ClipSource`: the prompt's, as a video has one."""
        return [number for _, _, number in self.clips]

    @cached_property
    def buckets(self) -> Buckets:
        """See `ClipSource`; in order of size."""
        found: dict[tuple[int, int], list[int]] = {}
        for number, (latents, _, _) in enumerate(self.clips):
            rows, columns = latents.shape[3:]
            found.setdefault((rows, columns), []).append(number)
        return dict(sorted(found.items()))

    def latents(self, rows: Sequence[int]) -> Tensor:
        """See `ClipSource`."""
        return torch.stack([latents[place] for latents, place, _ in self._of(rows)]).float()

    def captions(self, rows: Sequence[int], seeds: Sequence[int]) -> tuple[list[str], Tensor]:
        """See `ClipSource`; a video has one."""
        numbers = [number for _, _, number in self._of(rows)]
        return [self.prompts[number] for number in numbers], self.embeds.embeds(numbers)

    def _of(self, rows: Sequence[int]) -> list[tuple[Tensor, int, int]]:
        return [self.clips[row] for row in rows]
