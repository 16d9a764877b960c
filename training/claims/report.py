"""The claims' results as tables, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .arms import ARMS, BESIDE, STARTS, Arm, Study
from .plan import DECODED, TEACHER, TRUE, UNGUIDED
from .results import (
    Result,
    Results,
    change,
    difference,
    level,
    reference,
    results_of,
)
from .rows import (
    BINS,
    REWARD_ROWS,
    SINK_ROWS,
    Measure,
    Row,
    collapse,
    curve,
    gained,
    identity,
    speeds,
    spread,
    trains_on,
)

_INTERVALS = (
    "Means with 95 % intervals, by Student's t over training seeds and prompts; differences are "
    "paired, by seed, prompt and noise; `before` is what an arm began as. Where one holds 0, an "
    "effect of more than what follows `<` is excluded, either way. With one seed intervals are "
    "over prompts alone, and exclude nothing that another seed might show. So many intervals are "
    "here that one in twenty of those that leave out 0 would do so by chance. In a column marked * "
    "the arm is trained on what is measured."
)

_REWARDS = (
    "Speed in shape sizes a latent frame along the caption, where that leaves it open: of all "
    "videos, 0 where nothing is seen to move and less backwards, and of those that move as their "
    "caption says, with their spread as the mean distance from the mean; flow in pixels an image; "
    "shares of a caption's attributes that are right; mean SSIM with the first "
    "image; flicker as VBench has it, 1 for none; pixels of half coverage over those of shapes; "
    "distance of a shape's area from its outline's, relative."
)
_SINKS = (
    "In the last quarter of a long video: distance from the first window of the backdrop's "
    "brightness and tint in [0, 1], of the thing's shade and size (relative, where it is seen); "
    "speed; likeness to the first image (SSIM); share of the caption's attributes that are right; "
    "share of windows in which the first one's thing is gone. Then shares of occlusions, of so "
    "many latent frames, after which the thing is the same, and of windows with nothing right; how "
    "often a thing jumped to quite another place; and of switches of the prompt, those followed, "
    "images until it shows, and the old colour and the first picture at the end."
)


_BOUNDARY = (
    *("speed by update", "last less first", "its spread by update", "last less first"),
    "flow at the end",
)


def report(results: Results, planned: int) -> str:
    """All tables of what is there, of so many results that were planned."""
    parts = [f"# Claims: {len(results)} results of {planned}", _INTERVALS]
    if len(made := {str(result.get("code")) for result in results.values()}) > 1:
        parts.append(f"Made by {len(made)} states of the code: {', '.join(sorted(made))}.")
    parts += _rewards(results) + _boundary(results)
    parts += _sinks(results, "sinks", "Sinks that students were trained with, over long videos")
    parts += _sinks(results, "swaps", "The same sinks on a student that was not trained with them")
    return "\n\n".join(parts) + "\n"


def _there(results: Results, study: str, start: str | None = None) -> list[Arm]:
    return [
        arm
        for arm in ARMS.values()
        if arm.study == study and start in (None, arm.start) and results_of(results, arm)
    ]


def _rewards(results: Results) -> list[str]:
    parts = ["## Rewards", _REWARDS]
    for start in STARTS:
        arms = [*_there(results, "rewards", start), *_there(results, "boundary", start)]
        if arms:
            beside = _references(results, "rewards", (TRUE, DECODED, TEACHER, UNGUIDED, start))
            parts.append(f"### From {start}")
            parts.append(_levels(results, arms, beside, REWARD_ROWS))
            parts.append(_differences(results, arms, REWARD_ROWS))
    return parts if len(parts) > 2 else []


def _sinks(results: Results, study: Study, title: str) -> list[str]:
    arms = _there(results, study)
    if not arms:
        return []
    beside = _references(results, BESIDE.get(study, study), (TRUE, DECODED, "student"))
    return [
        f"## {title}",
        _SINKS,
        _levels(results, arms, beside, SINK_ROWS),
        _differences(results, arms, SINK_ROWS),
        _identities(results, arms, beside),
    ]


def _references(results: Results, study: str, names: Sequence[str]) -> dict[str, Result]:
    found = {name: reference(results, study, name) for name in names}
    return {name: result for name, result in found.items() if result is not None}


def _levels(
    results: Results, arms: Sequence[Arm], beside: Mapping[str, Result], rows: Mapping[str, Row]
) -> str:
    lines = [_line("", "seeds", *rows), _line(*["---"] * (len(rows) + 2))]
    for name, found in _by_name(results, arms, beside).items():
        lines.append(_line(name, len(found), *(_cell(found, row) for row in rows.values())))
    return "\n".join(lines)


def _by_name(
    results: Results, arms: Sequence[Arm], beside: Mapping[str, Result]
) -> dict[str, list[Result]]:
    found = {f"*{name}*": [result] for name, result in beside.items()}
    return found | {arm.name: results_of(results, arm) for arm in arms}


def _cell(found: Sequence[Result], row: Row) -> str:
    return str(level(found, row)) if all(row(result) for result in found) else ""


def _differences(results: Results, arms: Sequence[Arm], rows: Mapping[str, Row]) -> str:
    lines = []
    for arm in arms:
        less = difference if arm.against else change
        found = {name: less(results, arm, row) for name, row in rows.items()}
        if any(found.values()):
            cells = [
                (each.signed if each else "") + " *" * trains_on(arm, name)
                for name, each in found.items()
            ]
            lines.append(_line(f"{arm.name} less {arm.against or 'before'}", *cells))
    return "\n".join([_line("", *rows), _line(*["---"] * (len(rows) + 1)), *lines]) if lines else ""


def _identities(results: Results, arms: Sequence[Arm], beside: Mapping[str, Result]) -> str:
    spans = [f"{low} to {up - 1}" if up < 1000 else f"{low} and more" for low, up in BINS]
    lines = [
        "The same thing after an occlusion of so many latent frames; videos in which a window has "
        "nothing right, and the latent frames at which the first one begins.",
        "",
        _line("", *spans, "collapsed"),
        _line(*["---"] * (len(spans) + 2)),
    ]
    for name, found in _by_name(results, arms, beside).items():
        cells = [f"{same} of {of}" if of else "" for same, of in identity(found)]
        begun = sorted(frame for result in found for frame in collapse(result))
        videos = sum(len(result["lasting"]) for result in found)
        at = f": {', '.join(map(str, begun))}" if begun else ""
        lines.append(_line(name, *cells, f"{len(begun)} of {videos}{at}"))
    return "\n".join(lines)


def boundary_arms(results: Results) -> dict[Arm, str]:
    """Plain distribution matching, from every start and at every guidance, with what it is called
    beside the others."""
    plain = [arm for arm in _there(results, "rewards") if arm.against is None]
    return dict.fromkeys(plain, "guidance 3") | {a: a.name for a in _there(results, "boundary")}


def _boundary(results: Results) -> list[str]:
    arms = boundary_arms(results)
    if not arms:
        return []
    lines = [
        _line("start", "arm", "seeds", *_BOUNDARY),
        _line(*["---"] * (3 + len(_BOUNDARY))),
    ]
    for arm, name in arms.items():
        found = results_of(results, arm)
        flow = level(found, REWARD_ROWS["flow"])
        cells = [*_way(found, speeds), *_way(found, spread), flow]
        lines.append(_line(arm.start, name, len(found), *cells))
    return ["## Where distribution matching keeps motion", "\n".join(lines)]


def _way(found: Sequence[Result], measure: Measure) -> tuple[str, str]:
    points = ", ".join(f"{update}: {value:.3f}" for update, value in curve(found, measure))
    return points, level(found, gained(measure)).signed


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"
