"""The study's page and key, and what raters' answers add up to; the page itself is tried by
test_study_page.py."""

from __future__ import annotations

import base64
import csv
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from rf_core.video import VideoFormat, VideoWriter, read_images, read_metadata, to_uint8
from training.evaluation.study import (
    QUESTIONS,
    finished_clips,
    format_study_results,
    study_results,
    wilson,
    write_study,
)

LEVELS = {"alpha-model": 0.2, "beta-model": 0.5, "gamma-model": 0.8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Three models with four videos each, whose grey level says which model made them."""
    folder = tmp_path_factory.mktemp("models")
    for name, level in LEVELS.items():
        (folder / name).mkdir()
        for number, seed in ((0, 0), (0, 1), (3, 0), (3, 1)):
            add_video(folder / name, number, seed, level)
    return [folder / name for name in LEVELS]


def add_video(folder: Path, number: int, seed: int, level: float, prompt: str = "") -> None:
    path = folder / f"{number:04d}-{seed}.mp4"
    metadata = {"title": "x", "comment": json.dumps({"model": f"{folder.name}.safetensors"})}
    with VideoWriter(path, VideoFormat(width=16, height=16), metadata) as writer:
        writer.write(to_uint8(torch.full((2, 3, 16, 16), level)))
    record = {
        "prompt_number": number,
        "seed": seed,
        "prompt": prompt or f"prompt {number} </script>",
    }
    path.with_suffix(".json").write_text(json.dumps(record), encoding="utf-8")


def test_a_copy_of_a_record_is_none(folders, tmp_path):
    folder = shutil.copytree(folders[0], tmp_path / "copied")
    before = finished_clips(folder)
    for name in ("0000-0 (copy)", "0000-0_backup", "notes"):
        shutil.copy(folder / "0000-0.json", folder / f"{name}.json")
    assert finished_clips(folder) == before


def read_page(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script id="study" type="application/json">(.*?)</script>', text, re.S)
    return json.loads(found[1])


def model_of(uri: str, folder: Path) -> str:
    """The model that made an embedded video, by its grey level."""
    head, data = uri.split(",")
    assert head == "data:video/mp4;base64"
    (folder / "video.mp4").write_bytes(base64.b64decode(data))
    level = float(read_images(folder / "video.mp4", width=16, height=16).mean())
    return min(LEVELS, key=lambda name: abs(LEVELS[name] - level))


def answer_sheet(path: Path, page: Path, votes: dict[str, str | None], rater: str = "r1") -> Path:
    """A CSV of one rater who, on each question, always votes for a model (None for a tie)."""
    key = json.loads(page.with_suffix(".key.json").read_text())
    rows = [["study", "rater", "pair", "question", "answer"]]
    for name, pair in key["pairs"].items():
        for question, model in votes.items():
            side = {pair["left"]: "left", pair["right"]: "right"}.get(model, "tie")
            rows.append([key["study"], rater, name, question, side])
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def page(folders, tmp_path) -> Path:
    """A study of the first two models."""
    write_study(folders[:2], tmp_path / "page.html", seed=1)
    return tmp_path / "page.html"


def test_the_key_says_which_model_made_the_video_on_either_side(folders, tmp_path):
    key_path = write_study(folders, tmp_path / "page.html", seed=1)
    key, data = json.loads(key_path.read_text()), read_page(tmp_path / "page.html")
    assert key["study"] == data["id"]
    assert [pair["id"] for pair in data["pairs"]] == list(key["pairs"])
    for pair in data["pairs"]:
        about = key["pairs"][pair["id"]]
        for side in ("left", "right"):
            assert model_of(data["videos"][pair[side]], tmp_path) == about[side]
        assert about["left"] != about["right"]
        assert pair["prompt"] == f"prompt {about['prompt_number']} </script>"
    shown = Counter(
        (*sorted((each["left"], each["right"])), each["prompt_number"], each["seed"])
        for each in key["pairs"].values()
    )
    assert len(shown) == 3 * 4 and set(shown.values()) == {1}
    assert len(data["videos"]) == 3 * 4  # each once, though it is shown in two pairs


def test_the_page_tells_nothing_of_the_models_and_fetches_nothing(page, tmp_path):
    text, data = page.read_text(encoding="utf-8"), read_page(page)
    for uri in data["videos"].values():
        raw = base64.b64decode(uri.split(",")[1])
        (tmp_path / "video.mp4").write_bytes(raw)
        assert not any(name.encode() in raw for name in LEVELS)
        assert read_metadata(tmp_path / "video.mp4") == {}
    assert not any(name in text for name in LEVELS)
    assert not re.search(r"https?://|url\(|@import|<link[^>]+href=\"(?!data:)|src=\"", text)
    assert "default-src 'none'" in text


def test_a_prompt_cannot_end_the_script_it_stands_in(page):
    assert page.read_text(encoding="utf-8").count("</script>") == 2


def test_a_seed_gives_the_same_page_and_another_one_another_order(folders, tmp_path):
    pages = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_study(folders, tmp_path / f"{name}.html", seed=seed)
        pages.append((tmp_path / f"{name}.html").read_text(encoding="utf-8"))
    assert pages[0] == pages[1]
    orders = [json.loads((tmp_path / f"{n}.key.json").read_text())["pairs"] for n in "ac"]
    assert list(orders[0].values()) != list(orders[1].values())


def test_without_a_seed_nobody_knows_the_order_but_the_key(folders, tmp_path):
    keys = [json.loads(write_study(folders, tmp_path / f"{n}.html").read_text()) for n in "ab"]
    assert keys[0]["seed"] != keys[1]["seed"] and min(key["seed"] for key in keys) > 2**64
    assert keys[0]["pairs"] != keys[1]["pairs"]
    write_study(folders, tmp_path / "again.html", seed=keys[0]["seed"])
    again = json.loads((tmp_path / "again.key.json").read_text())
    assert again == keys[0]
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "a.html").read_bytes()


def test_a_study_that_is_written_again_still_counts_the_answers_to_its_page(folders, tmp_path):
    page = tmp_path / "page.html"
    key = write_study(folders, page)
    before = page.read_bytes(), key.read_bytes()
    assert write_study(folders, page) == key
    assert before == (page.read_bytes(), key.read_bytes())
    write_study(folders, page, seed=json.loads(before[1])["seed"] + 1)
    assert page.read_bytes() != before[0]


def test_either_model_is_on_the_left_in_half_of_the_pairs_and_leads_at_random(folders, tmp_path):
    first = Counter()
    for seed in range(8):
        key = write_study(folders[:2], tmp_path / "page.html", seed=seed)
        pairs = list(json.loads(key.read_text())["pairs"].values())
        assert Counter(pair["left"] for pair in pairs) == {"alpha-model": 2, "beta-model": 2}
        first[pairs[0]["left"]] += 1
    assert len(first) == 2


def test_fewer_pairs_can_be_asked_for(folders, tmp_path):
    key = write_study(folders, tmp_path / "page.html", max_pairs=2)
    pairs = json.loads(key.read_text())["pairs"].values()
    two = Counter(frozenset((pair["left"], pair["right"])) for pair in pairs)
    assert len(two) == 3 and set(two.values()) == {2}
    with pytest.raises(ValueError, match="give 1 or more"):
        write_study(folders, tmp_path / "page.html", max_pairs=0)


def test_only_prompts_and_seeds_that_both_have_are_compared(folders, tmp_path):
    (tmp_path / "late").mkdir()
    add_video(tmp_path / "late", 3, 1, 0.5, "prompt 3 </script>")
    add_video(tmp_path / "late", 9, 0, 0.5)
    key = write_study([folders[0], tmp_path / "late"], tmp_path / "page.html")
    (pair,) = json.loads(key.read_text())["pairs"].values()
    assert (pair["prompt_number"], pair["seed"]) == (3, 1)


def test_studies_that_would_compare_nothing_or_the_wrong_things_are_refused(folders, tmp_path):
    page = tmp_path / "page.html"
    with pytest.raises(ValueError, match="two models or more"):
        write_study(folders[:1], page)
    (tmp_path / "alpha-model").mkdir()
    with pytest.raises(ValueError, match="a name of its own"):
        write_study([folders[0], tmp_path / "alpha-model"], page)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="no finished video of one prompt and seed"):
        write_study([folders[0], tmp_path / "other"], page)
    add_video(tmp_path / "other", 0, 0, 0.5, "a different prompt")
    with pytest.raises(ValueError, match=r"prompt 0 is .* and 'a different prompt' for other"):
        write_study([folders[0], tmp_path / "other"], page)
    add_video(tmp_path / "other", 0, 0, 0.5, "prompt 0 </script>")
    (tmp_path / "other" / "0000-0.mp4").unlink()
    with pytest.raises(ValueError, match=r"0000-0.mp4 is gone"):
        write_study([folders[0], tmp_path / "other"], page)
    assert not page.exists()


def test_answers_of_several_raters_are_pooled_by_model_whatever_the_side(page, tmp_path):
    alpha, beta = "alpha-model", "beta-model"
    questions = list(QUESTIONS)
    sheets = [
        answer_sheet(
            tmp_path / "1.csv", page, dict(zip(questions, (alpha, None, beta), strict=True)), "r1"
        ),
        answer_sheet(
            tmp_path / "2.csv", page, dict(zip(questions, (alpha, beta, alpha), strict=True)), "r2"
        ),
    ]
    found = study_results(sheets, page.with_suffix(".key.json"))
    assert [(s.first, s.second, s.question) for s in found] == [(alpha, beta, q) for q in questions]
    assert [(s.wins, s.losses, s.ties, s.raters) for s in found] == [
        (8, 0, 0, 2),
        (0, 4, 4, 2),
        (4, 4, 0, 2),
    ]
    assert [s.win_rate for s in found] == [1.0, 0.0, 0.5]
    assert found[2].interval == wilson(4, 8)


def test_three_models_give_three_pairs_of_standings(folders, tmp_path):
    page = tmp_path / "page.html"
    key = write_study(folders, page)
    sheet = answer_sheet(tmp_path / "1.csv", page, {"dynamics": "beta-model"})
    found = study_results([sheet], key)
    assert [(s.first[0], s.second[0], s.wins, s.losses, s.ties) for s in found] == [
        ("a", "b", 0, 4, 0),
        ("a", "g", 0, 0, 4),
        ("b", "g", 4, 0, 0),
    ]


def test_a_sheet_given_twice_counts_once_and_one_that_contradicts_it_is_refused(page, tmp_path):
    key = page.with_suffix(".key.json")
    sheet = answer_sheet(tmp_path / "1.csv", page, {"dynamics": "alpha-model"})
    assert study_results([sheet, sheet], key) == study_results([sheet], key)
    changed = answer_sheet(tmp_path / "2.csv", page, {"dynamics": "beta-model"})
    with pytest.raises(ValueError, match=r"rater r1 answers dynamics of pair p1 .* newest file"):
        study_results([sheet, changed], key)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("study,rater", "study,who", "lacks columns"),
        ("p1,dynamics,", "p99,dynamics,", "line 2: the study has no pair 'p99'"),
        ("dynamics", "beauty", "line 2: the study has no question 'beauty'"),
        ("p2,dynamics,tie", "p2,dynamics,both", "line 3: the study has no answer 'both'"),
        ("STUDY", "0000000000", "line 2: this is study 0000000000, the key is of"),
    ],
)
def test_sheets_that_do_not_fit_the_study_are_refused_by_line(page, tmp_path, old, new, message):
    sheet = answer_sheet(tmp_path / "1.csv", page, {"dynamics": None})
    study = json.loads(page.with_suffix(".key.json").read_text())["study"]
    text = sheet.read_text()
    sheet.write_text(text.replace(study if old == "STUDY" else old, new))
    assert sheet.read_text() != text
    with pytest.raises(ValueError, match=message):
        study_results([sheet], page.with_suffix(".key.json"))


def test_a_key_that_is_none_and_no_answers_at_all_are_refused(page, tmp_path):
    sheet = answer_sheet(tmp_path / "1.csv", page, {})
    with pytest.raises(ValueError, match="no answers"):
        study_results([sheet], page.with_suffix(".key.json"))
    for text in ("{", "[]", '{"study": 1}'):
        (tmp_path / "key.json").write_text(text)
        with pytest.raises(ValueError, match="not the key of a study"):
            study_results([sheet], tmp_path / "key.json")


def test_intervals_are_wilsons():
    # Newcombe 1998, table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_table_leaves_the_rate_open_where_all_are_ties(page, tmp_path):
    sheet = answer_sheet(
        tmp_path / "1.csv", page, {"dynamics": None, "visual_quality": "alpha-model"}
    )
    found = study_results([sheet], page.with_suffix(".key.json"))
    assert math.isnan(found[0].win_rate)
    ties, wins = format_study_results(found).splitlines()[2:]
    assert ties == "| alpha-model | beta-model | dynamics | 0 | 0 | 4 | - | 1 |"
    assert wins == (
        "| alpha-model | beta-model | visual quality | 4 | 0 | 0 | 1.000 [0.510, 1.000] | 1 |"
    )
