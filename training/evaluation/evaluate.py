"""Videos of checkpoints on the same prompts and seeds, made and measured.

Each model streams every prompt with every seed through rf_core, as `python -m rf_core generate`
does, into OUT/NAME/PROMPT-SEED.mp4. A finished video has a JSON record beside it,
written last; only videos without one are made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rf_core.batch import file_digest
from rf_core.generate import generate, open_networks, open_stream, open_text_encoder
from rf_core.options import Files, Options, Plan, files_of_model, plan
from rf_core.prompts import PromptTimeline, Switch
from rf_core.ranges import MANY, check_numbers
from rf_core.text import encode_prompts
from rf_core.video import read_images
from rf_core.weights.checkpoint import read_checkpoint
from rf_core.weights.lora import Lora, fit_file, read_lora
from rf_core.writing import write_text

from ..measures.flow import FlowName, flow_estimator
from ..measures.metrics import FlowEstimator, measure, windows
from .metric import Measures, PromptMetric

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_SECONDS = 5.0  # the paper's short videos


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is compared, on what, and how."""

    models: Mapping[str, Path]
    """Checkpoints by the names they go by."""
    loras: Mapping[str, Sequence[Lora]] = field(default_factory=dict)
    """Adapters merged into the checkpoints of these names."""
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
    metric: PromptMetric | None = None
    """Measures whether videos keep their prompts, where it can."""

    def __post_init__(self) -> None:
        check_numbers(self, seeds=(1, MANY), window_images=(2, MANY))
        if not self.models or not self.prompts:
            raise ValueError("there is nothing to evaluate; give at least one model and prompt")

    @property
    def jobs(self) -> list[tuple[int, int]]:
        """All prompt numbers with all seeds."""
        return [(number, seed) for number in self.prompts for seed in range(self.seeds)]


@dataclass(frozen=True)
class Candidate:
    """One checkpoint under evaluation: its files, settings and networks."""

    name: str
    evaluation: Evaluation

    @property
    def folder(self) -> Path:
        """The folder of its videos."""
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
    def file_digests(self) -> dict[str, str]:
        """Hashes of its files, by which a record recognises them."""
        files = self.plan.options.files
        places = {"model": files.model, "vae": files.vae, "text_encoder": files.text_encoder}
        digests = {f"{name}_file": file_digest(Path(path)) for name, path in places.items()}
        if files.loras:  # records of before name none
            digests["lora_files"] = " ".join(file_digest(lora.path) for lora in files.loras)
        return digests

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
        """The settings that a video is made with, as plain JSON."""
        run = self.plan_of(number, seed)
        options = run.options
        settings = {
            **run.record(),
            **self.file_digests,
            "chunks": run.total,
            "dtype": self.evaluation.dtype,
            "attention": options.attention,
            "crf": options.crf,
        }
        return json.loads(json.dumps(settings))

    @cached_property
    def measured_with(self) -> dict[str, Any]:
        """Settings of the measurements, as records keep them."""
        evaluation, size = self.evaluation, (self.plan.height, self.plan.width)
        weights = evaluation.flow_weights
        settings = {
            "window_images": evaluation.window_images,
            "flow": evaluation.flow,
            "flow_file": weights and file_digest(weights),
        }
        if metric := evaluation.metric:
            settings[metric.name] = metric.supports(evaluation.prompts.values(), size)
        return settings


def check(evaluation: Evaluation) -> list[Candidate]:
    """The candidates, everything checked that can be before a network is loaded.

    ValueError for what is wrong, settings of finished videos that differ from these included.
    """
    candidates = [Candidate(name, evaluation) for name in evaluation.models]
    for candidate in candidates:
        run_plan = candidate.plan
        assert run_plan.total is not None
        _check_loras(run_plan.options.files)
        windows(run_plan.clock.images_before(run_plan.total), evaluation.window_images)
        for number, seed in evaluation.jobs:
            _check_settings(candidate, number, seed)
    return candidates


def missing_jobs(candidate: Candidate, share: slice) -> list[tuple[int, int]]:
    """Prompt numbers and seeds, of a share of the prompts, that are not yet measured."""
    mine = set(list(candidate.evaluation.prompts)[share])
    jobs = [job for job in candidate.evaluation.jobs if job[0] in mine]
    return [job for job in jobs if not _measured(candidate, *job)]


def make_videos(
    candidate: Candidate, jobs: Sequence[tuple[int, int]], estimate: FlowEstimator
) -> Iterator[Path]:
    """Generate and measure videos; yields each path when it is done.

    Finished videos, whose measures alone are of other settings, are only measured again. For the
    others networks are loaded; the text encoder comes first and is gone before.
    """
    todo = []
    for number, seed in jobs:
        if _record(candidate, number, seed) and candidate.video(number, seed).is_file():
            _measure_and_record(candidate, number, seed, estimate)
            yield candidate.video(number, seed)
        else:
            todo.append((number, seed))
    if todo:
        yield from _make(candidate, todo, estimate)


def open_flow_estimator(evaluation: Evaluation) -> FlowEstimator:
    """The optical flow that motion is measured by."""
    device = _measuring_device(evaluation.device)
    return flow_estimator(evaluation.flow, evaluation.flow_weights, device)


def read_records(candidate: Candidate) -> list[dict[str, Any]] | None:
    """The records of all videos, in the order of `jobs`; None while some are missing."""
    jobs = candidate.evaluation.jobs
    found = [_record(candidate, *job) for job in jobs if _measured(candidate, *job)]
    return found if len(found) == len(jobs) else None  # type: ignore[return-value]


def _measuring_device(device: str) -> str:
    return device if device.startswith("cuda") else "cpu"


def _make(
    candidate: Candidate, jobs: Sequence[tuple[int, int]], estimate: FlowEstimator
) -> Iterator[Path]:
    options = candidate.plan.options
    embeds = encode_prompts(
        [candidate.evaluation.prompts[number] for number, _ in jobs],
        lambda: open_text_encoder(options),
    )
    model, decoder = open_networks(candidate.plan)
    for number, seed in jobs:
        run = candidate.plan_of(number, seed)
        # A record that outlived its video would pass for one of half a video after a kill.
        candidate.video(number, seed).with_suffix(".json").unlink(missing_ok=True)
        generate(run, open_stream(run, model, decoder, embeds), embeds)
        _measure_and_record(candidate, number, seed, estimate)
        yield candidate.video(number, seed)


def _measure_and_record(
    candidate: Candidate, number: int, seed: int, estimate: FlowEstimator
) -> None:
    """Measure a video and write its record, which marks it as done."""
    run_plan, path = candidate.plan, candidate.video(number, seed)
    prompt = candidate.evaluation.prompts[number]
    video = read_images(path, width=run_plan.width, height=run_plan.height)[0]
    measured_with, metric = candidate.measured_with, candidate.evaluation.metric
    on_device = video.to(_measuring_device(run_plan.options.device))
    measures: Measures = dict(measure(on_device, measured_with["window_images"], estimate))
    if metric and measured_with[metric.name]:
        measures |= metric(video, prompt)
    record = {
        "prompt_number": number,
        "seed": seed,
        "prompt": prompt,
        "images": len(video),
        "made_with": candidate.settings(number, seed),
        "measured_with": measured_with,
        "measures": measures,
    }
    write_text(path.with_suffix(".json"), json.dumps(record, indent=1))


def _record(candidate: Candidate, number: int, seed: int) -> dict[str, Any] | None:
    path = candidate.video(number, seed).with_suffix(".json")
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no record of a video ({error}); delete it") from None
    return record


def _measured(candidate: Candidate, number: int, seed: int) -> bool:
    record = _record(candidate, number, seed)
    return record is not None and record["measured_with"] == candidate.measured_with


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


def _check_loras(files: Files) -> None:
    """ValueError for an adapter that does not fit its base; the shapes of that alone are read."""
    base = read_checkpoint(files.model).tensors if files.loras else {}
    for lora in files.loras:
        fit_file(base, read_lora(lora.path), lora.path)


def _timeline(prompt: str) -> PromptTimeline:
    return PromptTimeline().append(0, "s", Switch(), prompt)


def _files(evaluation: Evaluation, name: str) -> Files:
    model = evaluation.models[name]
    if not model.exists():
        raise ValueError(f"there is no model at {model}; check the path")
    demo = Files()
    vae, text_encoder = evaluation.vae, evaluation.text_encoder
    if read_checkpoint(model).companions:
        vae, text_encoder = files_of_model(model, vae, text_encoder)
    elif vae is None or text_encoder is None:
        _require_miniature(model)
    return Files(
        model=model,
        vae=vae or demo.vae,
        text_encoder=text_encoder or demo.text_encoder,
        tokenizer=evaluation.tokenizer,
        loras=tuple(evaluation.loras.get(name, ())),
    )


def _require_miniature(model: Path) -> None:
    """The demo's VAE fits any Wan in shape, so the text tells whether a model belongs to it."""
    theirs, demo = (read_checkpoint(path).config for path in (model, Files().model))
    if (theirs.text_dim, theirs.text_len) != (demo.text_dim, demo.text_len):
        raise ValueError(
            f"{model} is not of the demo's miniature world, as it reads prompts of "
            f"{theirs.text_len} x {theirs.text_dim}; give its --vae and --text-encoder"
        )
