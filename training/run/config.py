"""Typed configs: to plain JSON and back, with overrides from a command line.

A run's config is one frozen dataclass of dataclasses. It is printed in full, saved with every
checkpoint, and read again strictly: an unknown field, a value of the wrong kind or an impossible
one is refused, by name, before anything is loaded.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
RECIPE = "recipe"
"""Class attribute of a recipe's config, and key of its JSON: the command that runs it."""


def to_json(config: Any) -> str:
    """The whole config, indented; `from_json` gives an equal one."""
    return json.dumps(asdict(config), indent=1, default=str)


def recipe_to_json(config: Any) -> str:
    """The same of a recipe's whole config, with the recipe's name."""
    return json.dumps({RECIPE: config.recipe, **json.loads(to_json(config))}, indent=1)


def from_json(kind: type[T], text: str) -> T:
    """A config of `kind` from JSON; ValueError that names the field for whatever does not fit.

    Where the text has the name of a recipe, it must be that of `kind`.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the config is not JSON: {error}") from None
    if isinstance(data, dict) and RECIPE in data:
        recipe, wanted = data.pop(RECIPE), getattr(kind, RECIPE, None)
        if recipe != wanted:
            raise ValueError(f"it is a config of the recipe {recipe}, not of {wanted}")
    return from_dict(kind, data)


def from_dict(kind: type[T], data: Any, at: str = "config") -> T:
    """A dataclass of `kind` from plain values. Missing fields take their defaults.

    `at` is the path of the value in the config, for messages. ValueError names a field that does
    not fit.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{at} is {data!r}; give the fields of {kind.__name__}")
    hints = get_type_hints(kind)
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    for name in data:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(sorted(known))}"
            raise ValueError(f"{at} has no field {name}{hint}")
    values = {name: _value(hints[name], value, f"{at}.{name}") for name, value in data.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from None
    except TypeError as error:  # a field without a default is missing
        raise ValueError(f"{at}: {str(error).partition(') ')[2] or error}") from None


def apply_overrides(config: T, settings: Sequence[str]) -> T:
    """The config with `path.to.field=value` settings; values are JSON, or plain text."""
    data = json.loads(to_json(config))
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"{setting!r} is not of the form field.name=value")
        *parents, name = path.strip().split(".")
        place = data
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                raise ValueError(f"{path}: there is no group of fields {parent}")
            place = place[parent]
        place[name] = _read(text)
    return from_dict(type(config), data)


def differences(before: Any, now: Any) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs differ, by path, each with its two plain values."""
    old, new = (_flat(json.loads(to_json(each))) for each in (before, now))
    both = {name: (old.get(name), new.get(name)) for name in (*old, *new)}
    return {name: (a, b) for name, (a, b) in both.items() if a != b}


def difference(before: Any, now: Any, may_differ: Sequence[str] = ()) -> str | None:
    """The first field in which two configs differ, as a message; None where they are equal.

    Fields named in `may_differ`, or in a group that is, are not compared.
    """
    for name, (old, new) in differences(before, now).items():
        if not is_named(name, may_differ):
            return f"{name} is {old!r} there and {new!r} here"
    return None


def is_named(field: str, names: Sequence[str]) -> bool:
    """Whether a field's path is among the names, or in a group that is."""
    return any(field == name or field.startswith(f"{name}.") for name in names)


def _flat(values: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping)
        found |= _flat(value, f"{at}{name}.") if inner else {f"{at}{name}": value}
    return found


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()


def _value(kind: Any, value: Any, at: str) -> Any:
    origin, options = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return from_dict(kind, value, at)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        (inner,) = (each for each in options if each is not type(None))
        return _value(inner, value, at)
    if origin is Literal:
        if value not in options:
            raise ValueError(f"{at} is {value!r}; choose one of {', '.join(map(repr, options))}")
        return value
    if origin is tuple:
        return _tuple(options, value, at)
    if kind is Path:
        return Path(_plain(str, value, at))
    return _plain(kind, value, at)


def _tuple(options: tuple[Any, ...], value: Any, at: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{at} is {value!r}; give a list")
    kinds = [options[0]] * len(value) if options[-1] is Ellipsis else list(options)
    if len(kinds) != len(value):
        raise ValueError(f"{at} has {len(value)} values; give {len(kinds)}")
    return tuple(
        _value(kind, each, f"{at}[{i}]")
        for i, (kind, each) in enumerate(zip(kinds, value, strict=True))
    )


def _plain(kind: type, value: Any, at: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < sys.float_info.max else math.inf
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{at} is {value!r}; give a value of type {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{at} is {value}; give a finite number")
    return value
