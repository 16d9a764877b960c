"""What a source keeps of itself in the miniature world, measured where the answer is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rf_core.options import DEMO
from training.world.restyle import (
    MEASURES,
    RestyleConfig,
    format_restyle,
    measures,
    restyle_pairs,
    restyle_report,
)
from training.world.scenes import Scene, place_all, render
from training.world.stages import Files, open_streams

CONFIG = RestyleConfig()


def test_prompts_name_another_look_and_half_of_them_another_direction() -> None:
    pairs = restyle_pairs(CONFIG)
    assert len(pairs) == 48 and {pair.source.speed_name for pair in pairs} == {"slowly", "quickly"}
    for pair in pairs:
        source, same, other = pair.source, pair.agreeing, pair.contrary
        assert source.colour != same.colour and source.shape != same.shape
        assert (same.colour, same.shape) == (other.colour, other.shape)
        assert same.direction == source.direction != other.direction
        assert pair.prompt("contrary").endswith(f"moves {other.direction}")


def test_a_video_has_the_prompts_look_and_the_sources_motion_where_it_does() -> None:
    pair = restyle_pairs(CONFIG)[1]
    look = {"colour": pair.agreeing.colour, "shape": pair.agreeing.shape}
    restyled = measures(
        render([Scene((replace(pair.source, **look),))], 45)[0], pair.source, pair.agreeing
    )
    assert [restyled[name] for name in MEASURES] == [1] * 5 and restyled["distance"] < 0.1
    itself = measures(render([Scene((pair.source,))], 45)[0], pair.source, pair.agreeing)
    assert [itself[name] for name in MEASURES] == [0, 0, 1, 1, 1]
    x, y = pair.source.position
    apart = replace(pair.source, position=(x + 8, y + 8), speed=2 * pair.source.speed)
    elsewhere = measures(render([Scene((apart,))], 45)[0], pair.source, pair.agreeing)
    assert [elsewhere[name] for name in MEASURES] == [0, 0, 1, 0, 0]
    empty = measures(render([place_all([], None)], 9)[0] * 0, pair.source, pair.agreeing)
    assert not any(empty[name] for name in MEASURES)


@pytest.mark.slow
def test_the_demo_keeps_a_source_at_0_and_its_prompt_at_1(tmp_path: Path) -> None:
    config = RestyleConfig(pairs=2, chunks=3, strengths=((0.0, 0.0), (1.0, 0.0), (0.4, -0.2)))
    report = restyle_report(open_streams(Files(DEMO)), config)
    rows = {row["strength"]: row["contrary"]["all"] for row in report["rows"]}
    assert all(rows[0.0][name] == 1 for name in ("direction", "speed", "place"))
    assert rows[0.0]["colour"] == 0 == rows[1.0]["place"]
    assert rows[1.0]["colour"] == rows[1.0]["shape"] == 1
    assert "0.40 -0.20" in format_restyle(report)
