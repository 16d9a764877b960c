"""What the stages found, as a table short enough to be pasted. No torch here."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from ..table import format_table
from .record import Check, checks_of

MAX_LINES = 100
_WIDTH = 110  # characters of a line
_STAGE_LINES = 4  # of a stage, at most
_MACHINE_LINES = 2  # of a fact of the machine
_WRONG = 3  # wrong checks of a stage that are named
_INDENT = 24  # columns before what a stage says
_GB = 1e9

Found = dict[str, Any]


def format_card(card: Found, names: Sequence[str]) -> str:
    """The whole table; `names` are the stages that were asked for."""
    stages: dict[str, Found] = card["stages"]
    parts = [
        [part for line in _head(card, stages) for part in _wrapped(line, 10, _MACHINE_LINES)],
        *(
            [part for line in lines for part in _wrapped(line, 0, 1)]
            for lines in (_speed(stages), _attention(stages), _memory(stages))
        ),
        [line for name in names for line in _stage(name, stages)],
    ]
    lines = [line for part in parts if part for line in (*part, "")][:-1]
    assert len(lines) <= MAX_LINES, "every part has a bound"
    return "\n".join(line[:_WIDTH] for line in lines)


def stage_verdict(found: Found) -> str:
    """Right, wrong by how much, or not run and why: one line."""
    if found.get("late"):
        return "not run: the time was up before it"
    if why := found.get("not_run"):
        return f"not run: {why}"
    checks = checks_of(found)
    wrong = [check for check in checks if not check.right]
    parts = []
    if problem := found.get("failed"):
        parts.append(f"FAILED: {problem}")
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        parts.append(f"WRONG: {_off(wrong[0])}{more}")
    elif checks:
        nearest = max(checks, key=lambda check: check.error / check.limit if check.limit else 0.0)
        parts.append(f"right: {len(checks)} checks, the nearest {_off(nearest)}")
    if (cap := found.get("killed_after")) is not None:
        parts.append(f"stopped at its cap of {cap:.0f} s")
    return "; ".join(parts) or "measured"


def _off(check: Check) -> str:
    return f"{check.what} {check.error:.3g} (limit {check.limit:g})"


def _head(card: Found, stages: dict[str, Found]) -> Iterator[str]:
    facts = _measured(stages, "facts")
    machine = facts.get("machine", {})
    yield f"ComfyUI-RewardForcing, {card['size']}, {card['date']}, {card['seconds']:.0f} s"
    if "device" in machine:
        seen = facts.get("card")
        more = ""
        if seen:
            more = (
                f", {seen['memory_bytes'] / _GB:.1f} GB ({seen['free_bytes'] / _GB:.1f} free), "
                f"{seen['processors']} processors, capability {seen['capability']}"
            )
        yield f"device    {machine['device']}{more}"
        yield f"CPU       {machine['cpu']}, {machine['threads']} threads"
        found = (f"{n} {number}" for n, number in machine["versions"].items() if number)
        yield f"versions  {', '.join(found)}"


def _speed(stages: dict[str, Found]) -> Iterator[str]:
    bench = _measured(stages, "bench").get("result")
    rows = []
    if bench:
        rows += _network("network", bench)
        for name, found in bench["decoders"].items():
            rows.append((f"{name}: decode", f"{found['decode_fps']:.1f}"))
            rows.append((f"{name}: end to end", f"{found['streamed_fps']:.1f}"))
    if fp8 := _measured(stages, "fp8").get("result"):
        rows += _network("network, fp8", fp8)
    for name, what in (
        ("published", "published network"),
        ("published_flash", "published network, torch's attention of old"),
    ):
        if fps := _measured(stages, name).get("fps"):
            rows.append((what, f"{fps['published']:.1f} (this beside it {fps['ours']:.1f})"))
    if rows:
        yield from format_table(("images a second", ""), rows)
        if bench:
            first = bench["first_image"]
            yield f"first image after {1e3 * first['warm']:.0f} ms, cold {1e3 * first['cold']:.0f}"
            if gpu := bench["machine"]["gpu"]:
                clock, power = (
                    f"{gpu[now]} of {gpu[most]}"
                    for now, most in (
                        ("clocks.sm", "clocks.max.sm"),
                        ("power.draw", "power.limit"),
                    )
                )
                yield f"under load {clock} MHz, {power} W"


def _network(what: str, bench: Found) -> list[tuple[str, str]]:
    """Waited for after every chunk, and as a run drives it."""
    return [
        (what, f"{bench['network_fps']:.1f}"),
        (f"{what}, streamed", f"{bench['network_streamed_fps']:.1f}"),
    ]


def _attention(stages: dict[str, Found]) -> Iterator[str]:
    found = _measured(stages, "attention")
    rows = found.get("rows", [])
    if not rows:
        return
    first = [row for row in rows if all(row[n] == rows[0][n] for n in ("queries", "keys"))]
    yield f"attention, {rows[0]['queries']} queries, {rows[0]['keys']} keys, captured"
    lines = []
    for row in sorted(first, key=lambda row: row.get("captured_seconds") or 1e9):
        if row["problem"]:
            lines.append((row["backend"], "", "", row["problem"].partition(":")[0]))
            continue
        seconds = f"{1e3 * row['captured_seconds']:.3f} ms"
        lines.append(
            (row["backend"], seconds, f"{row['tflops']:.0f}", f"{float(row['error']):.1e}")
        )
    yield from format_table(("backend", "a layer", "TFLOP/s", "off by"), lines)
    if "chosen" in found:
        yield f"chosen: {found['chosen']['name']}"


def _memory(stages: dict[str, Found]) -> Iterator[str]:
    rows = [row for row in _measured(stages, "memory").get("rows", []) if "reserved" in row]
    if rows:
        columns = ("allocated", "peak", "reserved", "needed")
        lines = [(row["decoder"], *(f"{row[c] / _GB:.2f}" for c in columns)) for row in rows]
        head = ("memory, GB: decoder", "allocated", "planned", "reserved", "planned")
        yield from format_table(head, lines)


def _stage(name: str, stages: dict[str, Found]) -> list[str]:
    """Its verdict, what is wrong, what it says, until its lines are full."""
    found = stages.get(name, {"not_run": "stopped before it"})
    seconds = f"{found['seconds']:.0f} s" if "seconds" in found else ""
    wrong = [check for check in checks_of(found) if not check.right]
    more = [_off(check) for check in wrong[1:_WRONG]]
    if name not in ("bench", "attention", "memory"):  # whose figures stand above
        more += found.get("said", [])
    lines: list[str] = []
    for line in (
        f"{name:<16} {seconds:>5}  {stage_verdict(found)}",
        *(f"{'':<{_INDENT}}{text}" for text in more),
    ):
        if left := _STAGE_LINES - len(lines):
            lines += _wrapped(line, _INDENT, left)
    return lines


def _wrapped(line: str, indent: int, most: int) -> list[str]:
    """The line in at most so many, those after the first set in; a sign stands for what is cut."""
    return textwrap.wrap(
        line,
        _WIDTH,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
        max_lines=most,
        placeholder=" ...",
    )


def _measured(stages: dict[str, Found], name: str) -> Found:
    found: Found = stages.get(name, {}).get("measured", {})
    return found
