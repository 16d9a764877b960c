from __future__ import annotations

import json
import shutil

import pytest

import training.claims.ablations as claims
from training.claims.ablations import (
    ARMS,
    BASE,
    COMMON,
    ClaimsConfig,
    Measurer,
    result_path,
    run_claims,
)
from training.claims.report import motion_plot, read_results, report, strips
from training.run.config import apply_overrides
from training.stages.recipes import miniature

pytestmark = pytest.mark.slow

CONFIG = ClaimsConfig(free=2, named=1, double=1, chunks=3, long=1, long_chunks=10, between=1)
QUICK = (
    "run.updates=2",
    "run.critic_ratio=1",
    "run.redmd.batch=2",
    "run.micro_batch=2",
    "run.latents=[16, 12, 8, 8]",  # a chunk more than the window holds
    "data.limit=3",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("claims")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "COMMON", (*COMMON, *QUICK, "output.checkpoint_every=1"))
        arms = [ARMS[BASE], ARMS["DMD, static sink"]]
        done = list(run_claims(out, [0], arms, CONFIG))
        assert list(run_claims(out, [0], arms, CONFIG)) == []  # nothing is run twice
    assert done[:3] == ["true videos", "teacher", "student before"]
    return out


def test_every_arm_is_a_run_that_can_be_and_differs_from_the_others():
    configs = {
        name: apply_overrides(miniature(), [*COMMON, *arm.settings]) for name, arm in ARMS.items()
    }
    assert len({repr(config) for config in configs.values()}) == len(ARMS)
    for config in configs.values():
        chunks = config.run.latents[1] // config.run.redmd.cache.chunk_frames
        window = config.run.redmd.cache.window_frames // config.run.redmd.cache.chunk_frames
        assert chunks > window  # the sink is fed in training
    assert configs["tilted critic"].run.redmd.weigh == "critic"
    assert configs["Re-DMD, as published"].run.redmd.weights.beta == 2.0
    assert not configs["Re-DMD, as published"].run.redmd.weights.depends_on_batch


def test_results_are_of_each_video_and_of_the_way_there(finished):
    results = read_results(finished)
    assert list(results) == ["true videos", "teacher", "student before", BASE, "DMD, static sink"]
    (found,) = results["DMD, static sink"]
    assert sorted(map(int, found["curve"])) == [0, 1, 2]
    assert found["config"]["run"]["redmd"]["cache"]["decay"] == 1.0
    assert len(found["free"]) == 2 and found["free"][0]["flow"] > 0
    true = results["true videos"][0]
    assert all(each["right"] == 1.0 for group in ("free", "named", "two") for each in true[group])


def test_the_report_pairs_arms_with_the_base(finished):
    text = report(finished)
    rows = [line for line in text.splitlines() if line.startswith("| DMD, static sink | 1 |")]
    assert len(rows) == 1 and rows[0].count(";") == 6  # a difference in every column
    speeds = [each["speed_along"] for each in read_results(finished)[BASE][0]["free"]]
    assert f"| {BASE} | 1 | {sum(speeds) / 2:.3f} [" in text
    assert motion_plot(finished).count("<polyline") == 1


def test_strips_show_a_row_an_arm(finished):
    image = strips(finished, Measurer(CONFIG), "a red circle moves left", images=3)
    assert image.size == (3 * 64, 2 * 64)
    assert len({image.getpixel((x, 32)) for x in range(0, 192)}) > 1


def test_an_empty_folder_has_no_report(tmp_path):
    with pytest.raises(ValueError, match="holds no results"):
        read_results(tmp_path)
    result = result_path(tmp_path, BASE, 0)
    result.write_text(json.dumps({"arm": BASE}))
    assert list(read_results(tmp_path)) == [BASE]
    shutil.copy(result, result.with_stem(f"{result.stem} (copy)"))
    shutil.copy(result, result.with_stem(f"{result.stem}_backup"))
    (tmp_path / "notes.json").write_text("[]")
    assert len(read_results(tmp_path)[BASE]) == 1
