"""Checkpoints compared on the same prompts and seeds: videos, measures, a table.

Each model streams every prompt with every seed through rf_core, as `python -m rf_core generate`
does, into OUT/NAME/PROMPT-SEED.mp4. Beside a finished video lies its JSON, written last: what
there is of them is done, and the same command makes what is missing. Started by torchrun,
processes share the prompts out; the one that finishes last collects the report.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from rf_core.arguments import argument
from rf_core.attention import BACKENDS
from rf_core.devices import make_current
from rf_core.options import model_path
from rf_core.ranges import check_folder_writable
from rf_core.weights.files import read_weights
from rf_core.weights.layouts import is_lora
from rf_core.weights.lora import Lora, parse_lora_argument
from rf_core.writing import write_text

from ..choices import DATA_SET, METRIC
from ..data.prompts import DataConfig, read_prompts
from ..evaluation.evaluate import (
    DEFAULT_SECONDS,
    DTYPES,
    Candidate,
    Evaluation,
    check,
    make_videos,
    missing_jobs,
    open_flow_estimator,
)
from ..evaluation.report import collect, format_report
from ..evaluation.study import format_study_results, study_results, write_study
from ..evaluation.vbench_scores import vbench_scores
from ..measures.flow import FlowName
from .export import trained_on

_REPORT, _TABLE = "report.json", "report.md"
_PICK_SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m training evaluate`."""
    add = parser.add_argument
    parser.description = __doc__
    model = "a checkpoint, or demo (the default) for the bundled student; may be repeated"
    add("--model", action="append", default=[], metavar="[NAME=]FILE", help=model)
    lora = "an adapter, merged into the model of that name; may be repeated"
    add("--lora", action="append", default=[], metavar="[NAME=]FILE[:STRENGTH]", help=lora)
    add("--prompts", type=Path, metavar="FILE", help="TXT, CSV, TSV, JSONL (default: the demo's)")
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
        print(format_study_results(study_results(args.study_results, args.key)))  # noqa: T201
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
    text = format_report(report, METRIC)
    write_text(args.out / _REPORT, json.dumps(report, indent=1))
    write_text(args.out / _TABLE, text + "\n")
    print(text)  # noqa: T201
    if args.study:
        folders = [each.folder for each in candidates]
        args.study.parent.mkdir(parents=True, exist_ok=True)
        key = write_study(folders, args.study, args.study_seed, args.study_pairs)
        print(f"study: {args.study}; its key, not for raters: {key}")  # noqa: T201
    return 0


def pick_prompts(prompts: Sequence[str], limit: int | None) -> dict[int, str]:
    """Prompts by number: all, or so many, drawn alike every time; more begin with the fewer."""
    if limit is not None and limit < 1:
        raise ValueError(f"{limit} prompts are asked for; evaluate on at least 1")
    order = np.random.default_rng(_PICK_SEED).permutation(len(prompts))[:limit]
    return {int(number): prompts[number] for number in sorted(order)}


def prompt_share(environment: Mapping[str, str]) -> slice:
    """This process's share of the prompts, by torchrun's RANK and WORLD_SIZE."""
    rank, count = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    return slice(rank, None, count)


def local_device(device: str, environment: Mapping[str, str]) -> str:
    """The card of this process: torchrun's LOCAL_RANK, unless one is named."""
    local = environment.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None else device


def _make_all(candidates: Sequence[Candidate]) -> None:
    evaluation = candidates[0].evaluation
    estimate = open_flow_estimator(evaluation)
    for candidate in candidates:
        jobs = missing_jobs(candidate, prompt_share(os.environ))
        for done, path in enumerate(make_videos(candidate, jobs, estimate), start=1):
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
    if args.study:
        check_folder_writable(args.study.parent)


def _evaluation(args: argparse.Namespace) -> Evaluation:
    if args.out is None:
        raise ValueError("videos and measures need a folder; give --out DIR")
    prompts = DATA_SET.evaluation_prompts()
    if args.prompts is not None:
        prompts = read_prompts(DataConfig(prompts=(args.prompts,)))
    models = _models(args.model or ["demo"])
    loras = _loras(args.lora, models)
    _require_bases(models)
    device = local_device(args.device, os.environ)
    make_current(device)
    return Evaluation(
        models=models,
        loras=loras,
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
        metric=METRIC,
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
        models[name] = model_path(path)
    return models


def _loras(given: Sequence[str], models: Mapping[str, Path]) -> dict[str, list[Lora]]:
    """Adapters by the names of the models they are merged into, in the order given."""
    loras: dict[str, list[Lora]] = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not equals and len(models) > 1:
            raise ValueError(
                f"--lora {text} does not say which of {', '.join(models)} it is for; write "
                f"--lora NAME={text}"
            )
        if not equals:
            (name,), file = models, text
        if name not in models:
            raise ValueError(
                f"--lora {text} is for a model called {name}, which is not given; name its base: "
                f"--model {name}=BASE"
            )
        loras.setdefault(name, []).append(parse_lora_argument(file))
    return loras


def _require_bases(models: Mapping[str, Path]) -> None:
    """ValueError for an adapter in a model's place."""
    for name, path in models.items():
        if path.exists() and is_lora((file := read_weights(path)).tensors):
            base = trained_on(file) or "BASE"
            raise ValueError(
                f"{path} is an adapter, and a model is its base; give both: "
                f"--model {name}={base} --lora {name}={path}"
            )


@argument
def _size(text: str) -> tuple[int, int]:
    height, x, width = text.lower().partition("x")
    if not (x and height.isdecimal() and width.isdecimal()):
        raise ValueError(f"{text!r} is no size; write it as 480x832")
    return int(height), int(width)


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
    add("--study-seed", type=int, metavar="N", help="of order and sides (default: a random one)")
    add("--study-pairs", type=int, metavar="N", help="pairs of each two models (default: all)")
    add("--study-results", type=Path, nargs="+", metavar="CSV", help="what raters answered")
    add("--key", type=Path, metavar="FILE", help="the study's .key.json, for --study-results")
