"""What an evaluation found: means over prompts with their intervals, as JSON and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from .evaluate import Candidate, read_records
from .metric import PromptMetric

SPREAD = "motion_spread"  # of videos of one prompt: matching a guided teacher narrows it
RESAMPLES = 2000  # of a bootstrap


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
            *("motion", "mean_motion", SPREAD, "dynamic", "flicker", "first_frame_copy"),
            "sharpness_std",
        ),
        legend="motion: pixels an image, of the fastest 5 % of the pixels, and of all; "
        "motion spread: its standard deviation over the seeds of a prompt, of all pixels; dynamic: "
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
)


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


def collect(candidates: Sequence[Candidate]) -> dict[str, Any] | None:
    """The report as plain JSON; None while videos are missing."""
    records = {each.name: read_records(each) for each in candidates}
    if any(rows is None for rows in records.values()):
        return None
    evaluation = candidates[0].evaluation
    return {
        "prompts": len(evaluation.prompts),
        "seeds": evaluation.seeds,
        "measured_with": {each.name: each.measured_with for each in candidates},
        "models": {name: summary_of(rows or []) for name, rows in records.items()},
    }


def summary_of(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every measure of one model's records, as mean and interval."""
    names = list(dict.fromkeys(name for row in records for name in row["measures"]))
    found = {name: interval_of([fmean(v) for v in _by_prompt(records, name)]) for name in names}
    takes = [each for each in _by_prompt(records, "mean_motion") if len(each) > 1]
    found[SPREAD] = interval_of([stdev(each) for each in takes])
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


def format_report(report: Mapping[str, Any], metric: PromptMetric | None = None) -> str:
    """The report as Markdown tables, which also read well on a terminal."""
    models = report["models"]
    flows = {each["flow"] for each in report["measured_with"].values()}
    parts = [
        f"{report['prompts']} prompts, {report['seeds']} seeds each, motion by "
        f"{', '.join(sorted(flows))}; means with 95 % intervals, resampled over prompts"
    ]
    for table in (*TABLES, *_tables_of(metric)):
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


def _tables_of(metric: PromptMetric | None) -> list[Table]:
    if metric is None:
        return []
    return [Table(title=metric.title, columns=metric.columns, legend=metric.legend)]


def _by_prompt(records: Sequence[dict[str, Any]], name: str) -> list[list[float]]:
    """The values of the seeds of each prompt that has any."""
    values: dict[int, list[float]] = {}
    for row in records:
        value = row["measures"].get(name)
        if value is not None:
            values.setdefault(row["prompt_number"], []).append(value)
    return list(values.values())


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
