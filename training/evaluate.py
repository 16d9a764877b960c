"""Checkpoints compared on the same prompts and seeds: videos, measures, a table.

Each model streams every prompt with every seed through rf_core, as `python -m rf_core generate`
does, into OUT/NAME/PROMPT-SEED.mp4. Beside a finished video lies its JSON, written last: what
there is of them is done, and the same command makes what is missing. Started by torchrun,
processes share the prompts out; the one that finishes last collects the report.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from rf_core.attention import BACKENDS, attention_backend
from rf_core.checkpoint import load_student, read_checkpoint
from rf_core.decoder import Decoder, load_decoder
from rf_core.generate import DEMO, Files, Options, Plan, generate, plan
from rf_core.model import WanModel
from rf_core.prompts import PromptTimeline, Switch
from rf_core.stream import Stream
from rf_core.text import encode_prompts, load_text_encoder
from rf_core.video import read_images

from .flow_motion import FlowName, flow_estimator
from .metrics import FlowEstimator, measure, windows
from .study import format_standings, study_results, write_study
from .world.scenes import DIRECTIONS, SIZE, Wanted, all_captions, parse_caption
from .world.tracker import Track, score_tracks, sight, tracks_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_SECONDS = 5.0  # the paper's short videos
RESAMPLES = 2000  # of a bootstrap
VBENCH_FREE = (
    *("subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree"),
    *("aesthetic_quality", "imaging_quality"),
)
"""VBench's dimensions that take any prompt."""

_REPORT, _TABLE = "report.json", "report.md"
_SAMPLE = 1 << 20  # bytes read at either end of a file to know it again
_PICK_SEED = 0

Measured = dict[str, float | None]
"""Measures by name; None where a video has none."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of the report; its rows are the models."""

    title: str
    columns: tuple[str, ...]
    """Names of measures."""
    legend: str


TABLES = (
    Table(
        title="motion and stability",
        columns=(
            *("motion", "mean_motion", "dynamic", "flicker", "first_frame_copy", "sharpness_std"),
        ),
        legend="motion: pixels an image, of the fastest 5 % of the pixels, and of all; dynamic: "
        "share that counts as moving by VBench's rule; flicker: as VBench has it, 1 for none; "
        "first frame copy: SSIM of the second half with the first image; sharpness std: drift over "
        "windows, by sharpness in place of VBench's imaging quality, not the paper's number",
    ),
    Table(
        title="drift, first to last window",
        columns=(
            *("contrast_early", "contrast_late", "saturation_early", "saturation_late"),
            *("sharpness_early", "sharpness_late", "colour_shift"),
        ),
        legend="per cent of the full range",
    ),
    Table(
        title="captions, by the exact tracker",
        columns=("colour", "shape", "direction", "speed", "measured_speed", "speed_along"),
        legend="shares that are right, speed of the captions that name one; then shape sizes a "
        "latent frame, in all and along the caption's direction",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is compared, on what, and how."""

    models: Mapping[str, Path]
    """Checkpoints by the names they go by."""
    out: Path
    """Folder of videos, measures and the report."""
    prompts: Mapping[int, str]
    """What the videos show, by the prompts' places in their file."""
    seeds: int = 1
    """Videos of each prompt, of seeds 0 and on."""
    chunks: int | None = None
    """Length in chunks; without it and `seconds`, `DEFAULT_SECONDS`."""
    seconds: float | None = None
    """Length in seconds, rounded up to whole chunks."""
    size: tuple[int, int] | None = None
    """Height and width in pixels; None for each checkpoint's own."""
    vae: Path | None = None
    """Wan VAE or TAEHV; None for the demo's."""
    text_encoder: str | None = None
    """UMT5; None for the demo's."""
    tokenizer: str | None = None
    """Its tokenizer, where the encoder comes without one."""
    device: str = "cpu"
    dtype: str = "float32"
    """A key of `DTYPES`."""
    attention: str = "sdpa"
    """Name of an attention backend."""
    window_images: int = 32
    """Images of a window of drift: 2 s, as VBench-Long cuts videos."""
    flow: FlowName = "lucas_kanade"
    """Optical flow that motion is measured by."""
    flow_weights: Path | None = None
    """RAFT's weights."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}; make at least 1 video of each prompt")
        if not self.models or not self.prompts:
            raise ValueError("there is nothing to evaluate; give at least one model and prompt")

    @property
    def jobs(self) -> list[tuple[int, int]]:
        """All prompt numbers with all seeds."""
        return [(number, seed) for number in self.prompts for seed in range(self.seeds)]

    @property
    def captions(self) -> bool:
        """Whether every prompt is a caption of the miniature world."""
        return all(map(_is_caption, self.prompts.values()))


@dataclass(frozen=True)
class Candidate:
    """One checkpoint under evaluation: its files, settings and networks."""

    name: str
    evaluation: Evaluation

    @property
    def folder(self) -> Path:
        """Where its videos go."""
        return self.evaluation.out / self.name

    @cached_property
    def plan(self) -> Plan:
        """A run of its first prompt, checked; the others differ in prompt and seed alone."""
        evaluation = self.evaluation
        height, width = evaluation.size or (None, None)
        length = evaluation.seconds
        if length is None and evaluation.chunks is None:
            length = DEFAULT_SECONDS
        files = _files(evaluation, self.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        return plan(
            Options(
                timeline=_timeline(next(iter(evaluation.prompts.values()))),
                output=self.folder / "any.mp4",
                files=files,
                chunks=evaluation.chunks,
                seconds=length,
                height=height,
                width=width,
                device=evaluation.device,
                dtype=DTYPES[evaluation.dtype],
                attention=evaluation.attention,
                snapshot_every=0,
                overwrite=True,
            )
        )

    @cached_property
    def marks(self) -> dict[str, str]:
        """What its files are known again by."""
        files = self.plan.options.files
        places = {"model": files.model, "vae": files.vae, "text_encoder": files.text_encoder}
        return {f"{name}_file": file_mark(Path(path)) for name, path in places.items()}

    def plan_of(self, number: int, seed: int) -> Plan:
        """The run that makes one video."""
        timeline = _timeline(self.evaluation.prompts[number])
        options = replace(
            self.plan.options, timeline=timeline, seed=seed, output=self.video(number, seed)
        )
        prompts = timeline.resolve(self.plan.clock, self.plan.total)
        return replace(self.plan, options=options, prompts=prompts)

    def video(self, number: int, seed: int) -> Path:
        """The MP4 of a prompt and seed."""
        return self.folder / f"{number:04d}-{seed}.mp4"

    def settings(self, number: int, seed: int) -> dict[str, Any]:
        """What a video was made with, as JSON has it."""
        run = self.plan_of(number, seed)
        options = run.options
        settings = {
            **run.record(),
            **self.marks,
            "chunks": run.total,
            "dtype": self.evaluation.dtype,
            "attention": options.attention,
            "crf": options.crf,
        }
        return json.loads(json.dumps(settings))

    @cached_property
    def measuring(self) -> dict[str, Any]:
        """What its videos are measured with."""
        evaluation, size = self.evaluation, (self.plan.height, self.plan.width)
        weights = evaluation.flow_weights
        return {
            "window_images": evaluation.window_images,
            "flow": evaluation.flow,
            "flow_file": weights and file_mark(weights),
            "tracker": evaluation.captions and size == (SIZE, SIZE),
        }


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over prompts, with what resampling the prompts says of it."""

    mean: float
    low: float | None
    """2.5 % of resampled means lie below; None for a single prompt."""
    high: float | None
    prompts: int

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def check(evaluation: Evaluation) -> list[Candidate]:
    """The candidates, everything checked that can be before a network is loaded.

    ValueError for what is wrong, settings of finished videos that differ from these included.
    """
    candidates = [Candidate(name, evaluation) for name in evaluation.models]
    for candidate in candidates:
        settled = candidate.plan
        assert settled.total is not None
        windows(settled.clock.images_before(settled.total), evaluation.window_images)
        for number, seed in evaluation.jobs:
            _check_settings(candidate, number, seed)
    return candidates


def missing(candidate: Candidate, share: slice) -> list[tuple[int, int]]:
    """What is to be made or measured of a share of the prompts, as prompt numbers and seeds."""
    mine = set(list(candidate.evaluation.prompts)[share])
    jobs = [job for job in candidate.evaluation.jobs if job[0] in mine]
    return [job for job in jobs if not _measured(candidate, *job)]


def make(
    candidate: Candidate, jobs: Sequence[tuple[int, int]], estimate: FlowEstimator
) -> Iterator[Path]:
    """Make and measure videos, and give each as it is done.

    Finished videos, whose measures alone are of other settings, are only measured again. For the
    others networks are loaded; the text encoder comes first and is gone before.
    """
    todo = []
    for number, seed in jobs:
        if _record(candidate, number, seed) and candidate.video(number, seed).is_file():
            _finish(candidate, number, seed, estimate)
            yield candidate.video(number, seed)
        else:
            todo.append((number, seed))
    if todo:
        yield from _make(candidate, todo, estimate)


def collect(candidates: Sequence[Candidate]) -> dict[str, Any] | None:
    """The report as plain JSON; None while videos are missing."""
    records = {each.name: _records(each) for each in candidates}
    if any(rows is None for rows in records.values()):
        return None
    evaluation = candidates[0].evaluation
    return {
        "prompts": len(evaluation.prompts),
        "seeds": evaluation.seeds,
        "measured_with": {each.name: each.measuring for each in candidates},
        "models": {name: summary_of(rows or []) for name, rows in records.items()},
    }


def summary_of(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every measure of one model's records, as mean and interval."""
    names = list(dict.fromkeys(name for row in records for name in row["measures"]))
    found = {name: interval_of(_by_prompt(records, name)) for name in names}
    return {name: vars(each) for name, each in found.items() if each is not None}


def interval_of(values: Sequence[float]) -> Interval | None:
    """Mean and 95 % interval of one value a prompt, by the percentile bootstrap; None of nothing.

    The same values give the same interval.
    """
    if not values:
        return None
    known = np.array(values, dtype=np.float64)
    low = high = None
    if len(known) > 1:
        rng = np.random.default_rng(0)
        rows = rng.integers(len(known), size=(RESAMPLES, len(known)))
        low, high = np.quantile(known[rows].mean(axis=1), (0.025, 0.975)).tolist()
    return Interval(mean=float(known.mean()), low=low, high=high, prompts=len(known))


def caption_measures(video: Tensor, caption: str) -> Measured:
    """How a video [T, 3, SIZE, SIZE] of the miniature world keeps its caption.

    `colour`, `shape`, `direction`, `speed` are 1 or 0, as `training.world.tracker.score` has them;
    `speed` is None where the caption names none, `measured_speed` where nothing shows.
    `speed_along` is in shape sizes a latent frame along the caption's direction, over its things:
    negative against it, 0 for one that does not show or moves sideways.
    """
    wanted = parse_caption(caption)
    tracks = tracks_of(sight(video))
    found: Measured = dict(score_tracks(tracks, wanted))
    if not any(each.speed_name for each in wanted):
        found["speed"] = None
    found["measured_speed"] = _finite(found["measured_speed"])
    along = [_speed_along(tracks, each) for each in wanted]
    return found | {"speed_along": sum(along) / len(along)}


def format_report(report: Mapping[str, Any]) -> str:
    """The report as Markdown tables, which also read well on a terminal."""
    models = report["models"]
    flows = {each["flow"] for each in report["measured_with"].values()}
    parts = [
        f"{report['prompts']} prompts, {report['seeds']} seeds each, motion by "
        f"{', '.join(sorted(flows))}; means with 95 % intervals, resampled over prompts"
    ]
    for table in TABLES:
        shown = [name for name in table.columns if any(name in model for model in models.values())]
        if shown:
            rows = {name: _cells(model, shown) for name, model in models.items()}
            parts += [_markdown(table.title, shown, rows), f"({table.legend})"]
    if "vbench" in report:
        scores = report["vbench"]
        shown = sorted(set().union(*scores.values()))
        rows = {
            name: [f"{each[column]:.4f}" if column in each else "-" for column in shown]
            for name, each in scores.items()
        }
        parts.append(_markdown("VBench", shown, rows))
    return "\n\n".join(parts)


def vbench_scores(candidate: Candidate) -> dict[str, float]:
    """VBench's averages by dimension, read where it has run since the videos were made, else made.

    By the package `vbench`: all dimensions where every prompt is one of its own, else those that
    take any. ValueError, which says how to go on, without the package.
    """
    scores = _vbench_results(candidate)
    if scores:
        return scores
    folder, results = lay_out_for_vbench(candidate), candidate.folder / "vbench_results"
    try:
        import vbench
    except ImportError:
        raise ValueError(
            "--vbench needs the package vbench, which is not installed here and wants older "
            "packages than this project: install it in an environment of its own, run there "
            f"`vbench evaluate --videos_path {folder} --output_path {results} --mode custom_input "
            f"--dimension {' '.join(VBENCH_FREE)}`, then this command again"
        ) from None
    info = Path(vbench.__file__).with_name("VBench_full_info.json")
    known = {each["prompt_en"] for each in json.loads(info.read_text(encoding="utf-8"))}
    own = known.issuperset(candidate.evaluation.prompts.values())
    judge = vbench.VBench(torch.device(candidate.evaluation.device), str(info), str(results))
    judge.evaluate(
        videos_path=str(folder),
        name=candidate.name,
        dimension_list=None if own else list(VBENCH_FREE),
        mode="vbench_standard" if own else "custom_input",
    )
    return _vbench_results(candidate)


def lay_out_for_vbench(candidate: Candidate) -> Path:
    """A folder of the videos as VBench names them, `PROMPT-INDEX.mp4`; links where they can be.

    ValueError for a prompt that cannot be a file's name.
    """
    folder = candidate.folder / "vbench"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, seed in candidate.evaluation.jobs:
        prompt, video = candidate.evaluation.prompts[number], candidate.video(number, seed)
        target = folder / f"{prompt}-{seed}.mp4"
        if "/" in prompt or len(target.name.encode()) > 255:
            raise ValueError(
                f"prompt {number} ({prompt[:40]!r}...) cannot name a file, as VBench wants it: it "
                "has a / or more than 240 bytes; leave it out"
            )
        try:
            os.link(video, target)
        except OSError:
            shutil.copyfile(video, target)
    return folder


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line, each once.

    Empty lines and those with # in front do not count. ValueError for a file without prompts, or
    one that is not in UTF-8.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise ValueError(f"there are no prompts at {path}; check the path") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8") from None
    prompts = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return prompts


def pick_prompts(prompts: Sequence[str], most: int | None) -> dict[int, str]:
    """Prompts by number: all, or so many, drawn alike every time; more begin with the fewer."""
    if most is not None and most < 1:
        raise ValueError(f"{most} prompts are asked for; evaluate on at least 1")
    order = np.random.default_rng(_PICK_SEED).permutation(len(prompts))[:most]
    return {int(number): prompts[number] for number in sorted(order)}


def file_mark(path: Path) -> str:
    """A short name for what is in a file or folder: sizes, and both ends of every file."""
    digest = hashlib.blake2b(digest_size=8)
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    for each in files:
        if not each.is_file():  # a hub id
            return str(path)
        size = each.stat().st_size
        digest.update(f"{each.name if path.is_dir() else ''}/{size}".encode())
        with each.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def share_of(environment: Mapping[str, str]) -> slice:
    """This process's share of the prompts, by torchrun's RANK and WORLD_SIZE."""
    rank, count = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    return slice(rank, None, count)


def device_of(device: str, environment: Mapping[str, str]) -> str:
    """The card of this process: torchrun's LOCAL_RANK, unless one is named."""
    local = environment.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None else device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m training evaluate`."""
    add = parser.add_argument
    parser.description = __doc__
    add("--model", action="append", default=[], metavar="[NAME=]FILE", help="may be repeated")
    add("--prompts", type=Path, metavar="FILE", help="one a line (default: the demo's captions)")
    add("--num-prompts", type=int, metavar="N", help="draw so many of them (default: all)")
    add("--out", type=Path, metavar="DIR", help="folder of videos and measures")
    add("--seeds", type=int, default=1, metavar="N", help="videos of each prompt (default: 1)")
    add("--seconds", type=float, metavar="S", help=f"length (default: {DEFAULT_SECONDS:g})")
    add("--chunks", type=int, metavar="N", help="length in chunks")
    add("--size", type=_size, metavar="HxW", help="in pixels (default: the model's own)")
    _add_machine(parser.add_argument_group("weights and machine"))
    _add_measures(parser.add_argument_group("measures"))
    _add_study(parser.add_argument_group("a blind study by people"))


def run(args: argparse.Namespace) -> int:
    """Evaluate, or put the answers of a study together; 0 when it went well."""
    if args.study_results:
        if args.key is None:
            raise ValueError("--study-results needs the --key that lies beside the study's page")
        print(format_standings(study_results(args.study_results, args.key)))  # noqa: T201
        return 0
    evaluation = _evaluation(args)
    _check_extras(args, evaluation)
    candidates = check(evaluation)
    try:
        _make_all(candidates)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", flush=True)  # noqa: T201
        return 130
    report = collect(candidates)
    if report is None:
        print("other processes are still at work; the last one collects the report")  # noqa: T201
        return 0
    if args.vbench:
        report["vbench"] = {each.name: vbench_scores(each) for each in candidates}
    text = format_report(report)
    _write_whole(args.out / _REPORT, json.dumps(report, indent=1))
    _write_whole(args.out / _TABLE, text + "\n")
    print(text)  # noqa: T201
    if args.study:
        folders = [each.folder for each in candidates]
        key = write_study(folders, args.study, args.study_seed, args.study_pairs)
        print(f"study: {args.study}; its key, not for raters: {key}")  # noqa: T201
    return 0


def _make_all(candidates: Sequence[Candidate]) -> None:
    evaluation = candidates[0].evaluation
    device = _measuring_device(evaluation.device)
    estimate = flow_estimator(evaluation.flow, evaluation.flow_weights, device)
    for candidate in candidates:
        jobs = missing(candidate, share_of(os.environ))
        for done, path in enumerate(make(candidate, jobs, estimate), start=1):
            print(f"{candidate.name} {done}/{len(jobs)}: {path}", flush=True)  # noqa: T201


def _check_extras(args: argparse.Namespace, evaluation: Evaluation) -> None:
    """What would otherwise fail only after all videos are made."""
    if args.vbench and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "--vbench runs in one process; make the videos first, then give the same command with "
            "--vbench without torchrun"
        )
    if args.study and len(evaluation.models) < 2:
        raise ValueError("--study compares models; give --model twice or more")
    if args.study and not args.study.absolute().parent.is_dir():
        raise ValueError(f"the folder of {args.study} does not exist; create it first")


def _measuring_device(device: str) -> str:
    return device if device.startswith("cuda") else "cpu"


def _make(
    candidate: Candidate, jobs: Sequence[tuple[int, int]], estimate: FlowEstimator
) -> Iterator[Path]:
    options = candidate.plan.options
    embeds = encode_prompts(
        [candidate.evaluation.prompts[number] for number, _ in jobs],
        lambda: load_text_encoder(
            options.files.text_encoder,
            device=options.device,
            dtype=options.dtype,
            tokenizer=options.files.tokenizer,
        ),
    )
    model, _ = load_student(options.files.model, device=options.device, dtype=options.dtype)
    decoder = load_decoder(options.files.vae, options.device, options.dtype, None)
    for number, seed in jobs:
        run = candidate.plan_of(number, seed)
        generate(run, _stream(run, model, decoder, embeds), embeds)
        _finish(candidate, number, seed, estimate)
        yield candidate.video(number, seed)


def _stream(run: Plan, model: WanModel, decoder: Decoder, embeds: dict[str, Tensor]) -> Stream:
    return Stream(
        model,
        embeds[run.prompts[0].text],
        height=run.height,
        width=run.width,
        decoder=decoder,
        seed=run.options.seed,
        cache=run.cache,
        sampler=run.sampler,
        attention=attention_backend(run.options.attention),
    )


def _finish(candidate: Candidate, number: int, seed: int, estimate: FlowEstimator) -> None:
    """Measure a video and write its record, which marks it as done."""
    settled, path = candidate.plan, candidate.video(number, seed)
    prompt = candidate.evaluation.prompts[number]
    video = read_images(path, width=settled.width, height=settled.height)[0]
    measuring = candidate.measuring
    on_device = video.to(_measuring_device(settled.options.device))
    measures: Measured = dict(measure(on_device, measuring["window_images"], estimate))
    if measuring["tracker"]:
        measures |= caption_measures(video, prompt)
    record = {
        "prompt_number": number,
        "seed": seed,
        "prompt": prompt,
        "images": len(video),
        "made_with": candidate.settings(number, seed),
        "measured_with": measuring,
        "measures": measures,
    }
    _write_whole(path.with_suffix(".json"), json.dumps(record, indent=1))


def _record(candidate: Candidate, number: int, seed: int) -> dict[str, Any] | None:
    path = candidate.video(number, seed).with_suffix(".json")
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is no record of a video ({error}); delete it") from None
    return record


def _records(candidate: Candidate) -> list[dict[str, Any]] | None:
    jobs = candidate.evaluation.jobs
    found = [_record(candidate, *job) for job in jobs if _measured(candidate, *job)]
    return found if len(found) == len(jobs) else None  # type: ignore[return-value]


def _measured(candidate: Candidate, number: int, seed: int) -> bool:
    record = _record(candidate, number, seed)
    return record is not None and record["measured_with"] == candidate.measuring


def _check_settings(candidate: Candidate, number: int, seed: int) -> None:
    record = _record(candidate, number, seed)
    if record is None:
        return
    before, now = record["made_with"], candidate.settings(number, seed)
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(
                f"{candidate.video(number, seed)} was made with {name} {before.get(name)}, now it "
                f"is {value}; evaluate into another --out, or delete {candidate.folder}"
            )


def _vbench_results(candidate: Candidate) -> dict[str, float]:
    """Averages by dimension of results that are not older than any of the videos."""
    newest = max(candidate.video(*job).stat().st_mtime for job in candidate.evaluation.jobs)
    scores: dict[str, float] = {}
    for path in sorted((candidate.folder / "vbench_results").glob("*_eval_results.json")):
        if path.stat().st_mtime >= newest:
            found = json.loads(path.read_text(encoding="utf-8"))
            scores |= {dimension: float(score[0]) for dimension, score in found.items()}
    return scores


def _by_prompt(records: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Means over the seeds of each prompt that has a value."""
    values: dict[int, list[float]] = {}
    for row in records:
        value = row["measures"].get(name)
        if value is not None:
            values.setdefault(row["prompt_number"], []).append(value)
    return [sum(each) / len(each) for each in values.values()]


def _cells(model: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    return [str(Interval(**model[name])) if name in model else "-" for name in columns]


def _markdown(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    table = [[title, *(name.replace("_", " ") for name in columns)]]
    table += [[name, *cells] for name, cells in rows.items()]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [_line(row, widths) for row in table]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
    return "| " + " | ".join(cells) + " |"


def _speed_along(tracks: Sequence[Track], wanted: Wanted) -> float:
    x, y = DIRECTIONS[wanted.direction]
    for seen in tracks:
        if seen.colour == wanted.colour:
            seen_x, seen_y = DIRECTIONS.get(seen.direction, (0, 0))
            return seen.speed * (x * seen_x + y * seen_y)
    return 0.0


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _is_caption(prompt: str) -> bool:
    try:
        return bool(parse_caption(prompt))
    except ValueError:
        return False


def _timeline(prompt: str) -> PromptTimeline:
    return PromptTimeline().append(0, "s", Switch(), prompt)


def _files(evaluation: Evaluation, name: str) -> Files:
    model = evaluation.models[name]
    if not model.exists():
        raise ValueError(f"there is no model at {model}; check the path")
    if evaluation.vae is None or evaluation.text_encoder is None:
        _require_miniature(model)
    demo = Files()
    return Files(
        model=model,
        vae=evaluation.vae or demo.vae,
        text_encoder=evaluation.text_encoder or demo.text_encoder,
        tokenizer=evaluation.tokenizer,
    )


def _require_miniature(model: Path) -> None:
    """The demo's VAE fits any Wan in shape, so the text tells whether a model belongs to it."""
    theirs, demo = (read_checkpoint(path).config for path in (model, Files().model))
    if (theirs.text_dim, theirs.text_len) != (demo.text_dim, demo.text_len):
        raise ValueError(
            f"{model} is not of the demo's miniature world, as it reads prompts of "
            f"{theirs.text_len} x {theirs.text_dim}; give its --vae and --text-encoder"
        )


def _evaluation(args: argparse.Namespace) -> Evaluation:
    if args.out is None:
        raise ValueError("videos and measures need a folder; give --out DIR")
    prompts = all_captions() if args.prompts is None else read_prompts(args.prompts)
    device = device_of(args.device, os.environ)
    return Evaluation(
        models=_models(args.model or [str(DEMO / "student.safetensors")]),
        out=args.out,
        prompts=pick_prompts(prompts, args.num_prompts),
        seeds=args.seeds,
        chunks=args.chunks,
        seconds=args.seconds,
        size=args.size,
        vae=args.vae,
        text_encoder=args.text_encoder,
        tokenizer=args.tokenizer,
        device=device,
        dtype=args.dtype or ("bfloat16" if device.startswith("cuda") else "float32"),
        attention=args.attention,
        window_images=args.window_images,
        flow=args.flow,
        flow_weights=args.flow_weights,
    )


def _models(given: Sequence[str]) -> dict[str, Path]:
    models: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = Path(text).stem, text
        if name in models:
            raise ValueError(
                f"two models are called {name}; name them: --model before=FILE --model after=FILE"
            )
        if not name or "/" in name or "\\" in name or name.startswith("."):
            raise ValueError(f"{name!r} cannot be a model's name: it becomes a folder's")
        models[name] = Path(path)
    return models


def _size(text: str) -> tuple[int, int]:
    height, x, width = text.lower().partition("x")
    if not (x and height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 480x832")
    return int(height), int(width)


def _write_whole(path: Path, text: str) -> None:
    """Write a file that is never seen half written, whoever else writes it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _add_machine(parser: argparse._ArgumentGroup) -> None:
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--vae", type=Path, metavar="FILE", help="Wan VAE or TAEHV (default: the demo's)")
    add("--text-encoder", metavar="PLACE", help="UMT5 (default: the demo's)")
    add("--tokenizer", metavar="PLACE", help="its tokenizer, where the encoder has none")
    add("--device", default=device, help=f"default: {device}")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, else float32")
    add("--attention", choices=BACKENDS, default="sdpa", help="default: sdpa")


def _add_measures(parser: argparse._ArgumentGroup) -> None:
    add = parser.add_argument
    add("--window-images", type=int, default=32, metavar="N", help="of a window of drift")
    add("--flow", choices=get_args(FlowName), default="lucas_kanade", help="what motion is read by")
    add("--flow-weights", type=Path, metavar="FILE", help="torchvision's weights of RAFT")
    add("--vbench", action="store_true", help="VBench's scores too, by the package vbench")


def _add_study(parser: argparse._ArgumentGroup) -> None:
    add = parser.add_argument
    add("--study", type=Path, metavar="PAGE.html", help="write a page that compares the models")
    add("--study-seed", type=int, default=0, metavar="N", help="of order and sides; keep it secret")
    add("--study-pairs", type=int, metavar="N", help="pairs of each two models (default: all)")
    add("--study-results", type=Path, nargs="+", metavar="CSV", help="what raters answered")
    add("--key", type=Path, metavar="FILE", help="the study's .key.json, for --study-results")
