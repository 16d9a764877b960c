"""VBench's scores of an evaluation's videos: run here, or read where it ran elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

from .evaluate import Candidate

VBENCH_ANY_PROMPT = (
    *("subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree"),
    *("aesthetic_quality", "imaging_quality"),
)
"""VBench's dimensions that take any prompt."""


def vbench_scores(candidate: Candidate) -> dict[str, float]:
    """VBench's averages by dimension: read where it has run on these videos, else computed.

    By the package `vbench`: all dimensions where every prompt is one of its own, else those that
    take any. ValueError, which says how to go on, without the package.
    """
    scores = _vbench_results(candidate)
    if scores:
        return scores
    folder, results = link_for_vbench(candidate), candidate.folder / "vbench_results"
    try:
        import vbench
    except ImportError:
        raise ValueError(
            "--vbench needs the package vbench, which is not installed here and wants older "
            "packages than this project: install it in an environment of its own, run there "
            f"`vbench evaluate --videos_path {folder} --output_path {results} --mode custom_input "
            f"--dimension {' '.join(VBENCH_ANY_PROMPT)}`, then this command again"
        ) from None
    info = Path(vbench.__file__).with_name("VBench_full_info.json")
    known = {each["prompt_en"] for each in json.loads(info.read_text(encoding="utf-8"))}
    own = known.issuperset(candidate.evaluation.prompts.values())
    benchmark = vbench.VBench(torch.device(candidate.evaluation.device), str(info), str(results))
    benchmark.evaluate(
        videos_path=str(folder),
        name=candidate.name,
        dimension_list=None if own else list(VBENCH_ANY_PROMPT),
        mode="vbench_standard" if own else "custom_input",
    )
    return _vbench_results(candidate)


def link_for_vbench(candidate: Candidate) -> Path:
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


def _vbench_results(candidate: Candidate) -> dict[str, float]:
    """Averages by dimension of results that are not older than any of the videos."""
    newest = max(candidate.video(*job).stat().st_mtime for job in candidate.evaluation.jobs)
    scores: dict[str, float] = {}
    for path in sorted((candidate.folder / "vbench_results").glob("*_eval_results.json")):
        if path.stat().st_mtime >= newest:
            found = json.loads(path.read_text(encoding="utf-8"))
            scores |= {dimension: float(score[0]) for dimension, score in found.items()}
    return scores
