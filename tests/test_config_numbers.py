"""Every number of every recipe's config: what it may be, and that all else is refused by name."""

from __future__ import annotations

import copy
import json
import math
import re
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from fnmatch import fnmatch
from itertools import pairwise
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from training.run.config import from_dict, to_json
from training.stages.consistency import CONSISTENCY_PRESETS, ConsistencyConfig
from training.stages.control import CONTROL_PRESETS, ControlRunConfig
from training.stages.latents import LATENTS_PRESETS, LatentsConfig
from training.stages.recipes import PRESETS, DistilConfig
from training.stages.regression import INIT_PRESETS, InitConfig
from training.stages.teacher import TEACHER_PRESETS, TeacherConfig
from training.stages.trajectories import PAIRS_PRESETS, PairsConfig

RECIPES: dict[str, tuple[Any, Any]] = {
    "re_dmd": (DistilConfig, PRESETS),
    "teacher": (TeacherConfig, TEACHER_PRESETS),
    "ode_init": (InitConfig, INIT_PRESETS),
    "ode_pairs": (PairsConfig, PAIRS_PRESETS),
    "consistency": (ConsistencyConfig, CONSISTENCY_PRESETS),
    "control": (ControlRunConfig, CONTROL_PRESETS),
    "latents": (LatentsConfig, LATENTS_PRESETS),
}
HUGE = 1e30
ALLOWED = {
    ("*seed", 0): "the first of all seeds",
    ("*optimiser.betas.*", 0): "no moment",
    ("*generator.betas.*", 0): "no moment",
    ("*critic.betas.*", 0): "no moment",
    ("*.weight_decay", 0): "none",
    ("*.warmup", 0): "the full rate at once",
    ("*ema", 0): "no averaging",
    ("*ema_from", 0): "averaging from the first update on",
    ("*cache.sink_frames", 0): "no sink",
    ("*cache.anchor_frames", 0): "no anchor",
    ("run.redmd.sampler.steps.3", 0): "a last pass, over the noise that the table ends with",
    ("run.redmd.sampler.first_steps.1", 0): "the same of a first chunk",
    ("*sampler.clean_timestep", 0): "the clean pass as it is published",
    ("*cache.decay", 0): "the sink is what left the window last",
    ("model.eps", 0): "a norm as it is written",
    ("*excerpts.*", 0): "none of it",
    ("*prompt_dropout", 0): "no prompt is dropped",
    ("layers.0", 0): "the first hint is the first block's",
    ("colours_alone", 0): "no caption names a colour alone",
    ("run.redmd.guidance", 0): "none: the prompt's own score",
    ("run.redmd.weights.beta", 0): "no reward",
    ("run.redmd.gradient_beta", 0): "no gradient of a reward",
    ("starts.share", 0): "no rollout begins from an image",
    ("reward.share", 0): "a score that is told and moves nothing",
    ("reward.share", -1): "less of it is better",
    ("run.redmd.weights.limit", HUGE): "no limit that a score reaches",
    ("run.switch_share", 0): "no prompt changes",
    ("run.runaway", HUGE): "no loss that is finite stops the run",
    ("*validate_every", 0): "no validation",
    ("validation_prompts", 0): "no videos",
    ("validation_clips", 0): "none is held out",
    ("output.checkpoint_minutes", 0): "a checkpoint after every update",
    ("output.checkpoint_minutes", HUGE): "checkpoints by their count of updates alone",
}
"""What the extreme values mean that are no mistake, by the field's path and the value."""
FILLED = {"first_steps": [1000, 500]}
"""Lists in place of empty ones."""


def numbers_of(kind: Any, plain: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all numbers in a plain config; what is None there is filled in, in place."""
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (each for each in get_args(kind) if each is not type(None))
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        for each in fields(kind):
            (inner,) = [a for a in get_args(hints[each.name]) if is_dataclass(a)] or [None]
            if plain[each.name] is None and inner is not None:
                plain[each.name] = json.loads(to_json(inner()))
            if not plain[each.name] and each.name in FILLED:
                plain[each.name] = list(FILLED[each.name])
            yield from numbers_of(hints[each.name], plain[each.name], (*at, each.name))
    elif get_origin(kind) is tuple:
        inner = get_args(kind)
        for place, value in enumerate(plain):
            yield from numbers_of(
                inner[0] if inner[-1] is Ellipsis else inner[place], value, (*at, place)
            )
    elif kind in (int, float):
        yield at


def every_number() -> Iterator[Any]:
    for recipe, (kind, presets) in RECIPES.items():
        for preset, make in presets.items():
            plain = json.loads(to_json(make()))
            for path in numbers_of(kind, plain):
                name = ".".join(map(str, path))
                yield pytest.param(kind, plain, path, id=f"{recipe}-{preset}-{name}")


def changed(plain: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    result = copy.deepcopy(plain)
    place = result
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return result


@pytest.mark.parametrize(("kind", "plain", "path"), list(every_number()))
@pytest.mark.parametrize("value", [-1, 0, math.nan, math.inf, HUGE, 10**30])
def test_a_number_is_refused_by_its_path_or_its_meaning_is_known(kind, plain, path, value):
    name = ".".join(map(str, path))
    try:
        from_dict(kind, changed(plain, path, value))
    except ValueError as error:
        # In a list, one whole is checked as one: phases, of which each has its `until`.
        listed = [each for each, inner in pairwise(path) if isinstance(inner, int)]
        *groups, field = listed or path
        group = ".".join(["config", *(path[: path.index(field)] if listed else groups)])
        found = str(error).replace("config: sampler.", "config.sampler.", 1)
        assert found.startswith(group)
        assert re.search(rf"\b{field}\b", found.removeprefix(group))
    else:
        assert any(fnmatch(name, at) and float(value) == known for at, known in ALLOWED), (
            f"{name}={value} is taken in silence"
        )


def test_each_line_of_what_is_allowed_is_of_a_number_that_exists_and_is_taken():
    every = [each.values for each in every_number()]
    for at, value in ALLOWED:
        found = [e for e in every if fnmatch(".".join(map(str, e[2])), at)]
        assert found, at
        for kind, plain, path in found:
            from_dict(kind, changed(plain, path, value))


def test_the_walk_finds_numbers_in_groups_lists_and_fields_that_are_not_given():
    found = {each.id for each in every_number()}
    assert "re_dmd-wan-run.generator.betas.1" in found
    assert "re_dmd-wan-student_lora.rank" in found
    assert "teacher-wan-model.eps" in found
    assert "ode_init-wan-first_step_share" in found
    assert "teacher-miniature-phases.0.until" in found
