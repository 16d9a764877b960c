"""A blind study: people compare two models' videos of one prompt and seed, side by side.

`write_study` makes one page that holds its videos and asks for nothing from a network. It names
pairs and videos by their place in a shuffled order; which model made which stands in a key beside
the page, for whoever evaluates. `study_results` puts the key and the raters' answers together.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import math
import re
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from rf_core.video import remux
from rf_core.weights.files import read_json
from rf_core.writing import write_text

QUESTIONS = {
    "text_alignment": "Which video shows the text better?",
    "dynamics": "Which video has the better motion, lively and natural?",
    "visual_quality": "Which video looks better?",
}
ANSWERS = ("left", "right", "tie")

_TEMPLATE = Path(__file__).with_name("study.html")
_NAME = re.compile(r"([0-9]{4,})-([0-9]+)\.json")  # as an evaluation names its records
_COLUMNS = ("study", "rater", "pair", "question", "answer")
_Z = 1.959964  # 97.5 % of the normal distribution lie below


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A finished video of an evaluation."""

    path: Path
    """The MP4."""
    prompt_number: int
    """Place of the prompt in its file, from 0."""
    seed: int
    prompt: str


Clips = dict[tuple[int, int], Clip]
"""The videos of one model by prompt number and seed."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One pair of videos as it is shown."""

    left: str
    """The model on the left."""
    right: str
    prompt_number: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class PairwiseResult:
    """Answers of all raters to one question about one model against another."""

    first: str
    second: str
    question: str
    """A key of `QUESTIONS`."""
    wins: int
    """Answers for the first."""
    losses: int
    """Answers for the second."""
    ties: int
    raters: int

    @property
    def win_rate(self) -> float:
        """Share of the first's wins in the answers that are no ties; nan without any."""
        decided = self.wins + self.losses
        return self.wins / decided if decided else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the win rate. It assumes independent answers."""
        return wilson(self.wins, self.wins + self.losses)


def finished_clips(folder: Path) -> Clips:
    """The finished videos in an evaluation's folder of one model, by prompt number and seed."""
    clips: Clips = {}
    for path in sorted(folder.glob("*.json")):
        named = _NAME.fullmatch(path.name)
        if named is None:  # a copy, or another's file
            continue
        prompt = read_json(path).get("prompt")
        if not isinstance(prompt, str):
            raise ValueError(f"{path} is no record of a video; delete it")
        key = (int(named[1]), int(named[2]))
        clips[key] = Clip(
            path=path.with_suffix(".mp4"),
            prompt_number=key[0],
            seed=key[1],
            prompt=prompt,
        )
    return clips


def write_study(
    folders: Sequence[Path], page: Path, seed: int | None = None, max_pairs: int | None = None
) -> Path:
    """Write the page, and beside it its key, whose path is returned.

    Args:
        folders: of `python -m training evaluate`, one a model; their names are the models'.
        page: the HTML file; it holds all videos, a third larger than their files.
        seed: of the order of the pairs and of their sides; the key keeps it. By default that of
            the key that is there, so that answers to its page still count, or else a random one.
        max_pairs: pairs of videos of each two models, drawn at random; by default all there are.

    Raises:
        ValueError: less than two models, two of one name, nothing they have in common, a video
            that is missing.
    """
    clips = _by_model(folders)
    key = page.with_suffix(".key.json")
    seed = _seed_of(key) if seed is None else seed
    rng = np.random.default_rng(seed)
    comparisons = _comparisons(clips, rng, max_pairs)
    shown, videos = _page_data(comparisons, clips)
    data = {"pairs": shown, "questions": _questions(), "videos": videos}
    study = hashlib.blake2b(json.dumps(data).encode(), digest_size=5).hexdigest()
    # "<" would let a prompt end the script it stands in.
    text = json.dumps({"id": study, **data}).replace("<", "\\u003c")
    write_text(page, _TEMPLATE.read_text(encoding="utf-8").replace("__STUDY__", text))
    pairs = {row["id"]: asdict(each) for row, each in zip(shown, comparisons, strict=True)}
    study_key = {"study": study, "seed": seed, "models": sorted(clips), "pairs": pairs}
    write_text(key, json.dumps(study_key, indent=1))
    return key


def study_results(answers: Sequence[Path], key: Path) -> list[PairwiseResult]:
    """Count the answers of the raters' CSV files for every two models and every question.

    A file that is given twice counts once. ValueError for a file of another study, for one that
    is no answer sheet, and where a rater gives two answers to one question about a pair.
    """
    study_key = _read_key(key)
    recorded: dict[tuple[str, str, str], str] = {}
    for path in answers:
        _read_answers(path, study_key, recorded)
    if not recorded:
        raise ValueError("there are no answers; give the CSV files that the raters downloaded")
    votes: dict[tuple[str, str, str], Counter[str | None]] = {}
    raters: dict[tuple[str, str, str], set[str]] = {}
    for (rater, pair, question), answer in recorded.items():
        first, second, vote = _vote(study_key["pairs"][pair], answer)
        votes.setdefault((first, second, question), Counter())[vote] += 1
        raters.setdefault((first, second, question), set()).add(rater)
    return [
        PairwiseResult(
            first=first,
            second=second,
            question=question,
            wins=votes[first, second, question][first],
            losses=votes[first, second, question][second],
            ties=votes[first, second, question][None],
            raters=len(raters[first, second, question]),
        )
        for first, second in combinations(study_key["models"], 2)
        for question in QUESTIONS
        if (first, second, question) in votes
    ]


def format_study_results(results: Sequence[PairwiseResult]) -> str:
    """A Markdown table of `study_results`."""
    lines = [
        "| model | against | question | wins | losses | ties | win rate [95 %] | raters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in results:
        low, high = each.interval
        rate = "-" if math.isnan(each.win_rate) else f"{each.win_rate:.3f} [{low:.3f}, {high:.3f}]"
        question = each.question.replace("_", " ")
        lines.append(
            f"| {each.first} | {each.second} | {question} | {each.wins} | {each.losses} "
            f"| {each.ties} | {rate} | {each.raters} |"
        )
    return "\n".join(lines)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927); (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    share, z2 = successes / trials, _Z**2
    middle = share + z2 / (2 * trials)
    reach = _Z * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    low, high = ((middle + side * reach) / (1 + z2 / trials) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)


def _seed_of(key: Path) -> int:
    """Of the study whose key is there, or a new one: as long as nobody finds it by trying."""
    found = read_json(key).get("seed")
    return found if isinstance(found, int) else secrets.randbits(128)


def _by_model(folders: Sequence[Path]) -> dict[str, Clips]:
    clips = {folder.name: finished_clips(folder) for folder in folders}
    if len(clips) < 2 or len(clips) < len(folders):
        raise ValueError(
            f"the study compares {', '.join(folder.name for folder in folders) or 'nothing'}; "
            "give two models or more, each with a name of its own"
        )
    return clips


def _comparisons(
    clips: dict[str, Clips], rng: np.random.Generator, max_pairs: int | None
) -> list[Comparison]:
    """Pairs in the order they are shown; of two models either is on the left in half of theirs."""
    if max_pairs is not None and max_pairs < 1:
        raise ValueError(
            f"the study would have {max_pairs} pairs of each two models; give 1 or more"
        )
    found = []
    for pair in combinations(sorted(clips), 2):
        common = _common(*pair, clips)
        chosen = [common[i] for i in rng.permutation(len(common))[:max_pairs]]
        for turn, (number, seed) in enumerate(chosen, start=int(rng.integers(2))):
            left, right = pair if turn % 2 else pair[::-1]
            found.append(Comparison(left=left, right=right, prompt_number=number, seed=seed))
    return [found[i] for i in rng.permutation(len(found))]


def _common(first: str, second: str, clips: dict[str, Clips]) -> list[tuple[int, int]]:
    mine, other = clips[first], clips[second]
    common = sorted(mine.keys() & other.keys())
    if not common:
        raise ValueError(
            f"{first} and {second} have no finished video of one prompt and seed; evaluate both "
            "on the same prompts"
        )
    for key in common:
        if mine[key].prompt != other[key].prompt:
            raise ValueError(
                f"prompt {key[0]} is {mine[key].prompt!r} for {first} and {other[key].prompt!r} "
                f"for {second}; evaluate both on the same prompts"
            )
    return common


def _page_data(
    comparisons: Sequence[Comparison], clips: dict[str, Clips]
) -> tuple[list[dict[str, str]], dict[str, str]]:
    """The pairs as the page knows them, and each video once; names follow the shuffled order."""
    names: dict[Path, str] = {}
    shown = []
    for place, each in enumerate(comparisons, start=1):
        row = {"id": f"p{place}"}
        for side in ("left", "right"):
            clip = clips[getattr(each, side)][each.prompt_number, each.seed]
            row[side] = names.setdefault(clip.path, f"v{len(names) + 1}")
            row["prompt"] = clip.prompt
        shown.append(row)
    return shown, {name: _data_uri(path) for path, name in names.items()}


def _questions() -> list[dict[str, str]]:
    return [{"id": name, "text": text} for name, text in QUESTIONS.items()]


def _data_uri(path: Path) -> str:
    """A video without its metadata, which names the model that made it."""
    if not path.is_file():
        raise ValueError(f"{path} is gone; evaluate again, or leave its prompt out of the study")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "video.mp4"
        shutil.copyfile(path, copy)
        remux(copy, metadata={})
        return "data:video/mp4;base64," + base64.b64encode(copy.read_bytes()).decode()


def _read_key(key: Path) -> dict[str, Any]:
    try:
        study_key: dict[str, Any] = json.loads(key.read_text(encoding="utf-8"))
        if not {"study", "models", "pairs"} <= set(study_key):
            raise ValueError("it lacks study, models or pairs")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{key} is not the key of a study ({error}); give the .key.json beside its page"
        ) from None
    return study_key


def _read_answers(
    path: Path, study_key: dict[str, Any], recorded: dict[tuple[str, str, str], str]
) -> None:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if not set(_COLUMNS) <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} lacks columns; an answer sheet has {', '.join(_COLUMNS)}")
        for row in reader:
            _record_answer(f"{path}, line {reader.line_num}", row, study_key, recorded)


def _record_answer(
    where: str,
    row: dict[str, str],
    study_key: dict[str, Any],
    recorded: dict[tuple[str, str, str], str],
) -> None:
    if row["study"] != study_key["study"]:
        raise ValueError(
            f"{where}: this is study {row['study']}, the key is of {study_key['study']}; "
            "give the key that was written with the page"
        )
    known = {"pair": study_key["pairs"], "question": QUESTIONS, "answer": ANSWERS}
    for column, values in known.items():
        if row[column] not in values:
            raise ValueError(
                f"{where}: the study has no {column} {row[column]!r}; give the file as downloaded"
            )
    at = (row["rater"], row["pair"], row["question"])
    if recorded.setdefault(at, row["answer"]) != row["answer"]:
        raise ValueError(
            f"{where}: rater {at[0]} answers {at[2]} of pair {at[1]} with {row['answer']}, and in "
            f"another place with {recorded[at]}; give the rater's newest file alone"
        )


def _vote(pair: dict[str, str], answer: str) -> tuple[str, str, str | None]:
    """The two models in order of their names, and the one an answer is for, None for a tie."""
    first, second = sorted((pair["left"], pair["right"]))
    return first, second, pair.get(answer)
