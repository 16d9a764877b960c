"""The prompt timeline: its language, its errors, its clock, and the way back to text."""

from __future__ import annotations

import json
import pickle
import random
import time
import unicodedata
from decimal import Decimal
from fractions import Fraction
from typing import Literal

import pytest

from rf_core.config import FPS, TEMPORAL_FACTOR, CacheConfig
from rf_core.prompts import (
    ChunkClock,
    Entry,
    PromptTimeline,
    ResolvedEntry,
    Switch,
    TimelineError,
    clip_notes,
    format_table,
    parse_timeline,
)

ISSUE = """\
0s: a panda walks
8s [recache]: it sits down
+4s [blend 3 slerp]: snow
c40 [cut]: a city at night
"""
CLOCK = ChunkClock()


def chunks(text: str, total: int | None = None, clock: ChunkClock = CLOCK) -> list[int]:
    return [entry.chunk for entry in parse_timeline(text).resolve(clock, total)]


def texts(text: str) -> list[str]:
    return [entry.text for entry in parse_timeline(text).entries]


def error_of(text: str) -> TimelineError:
    with pytest.raises(TimelineError) as caught:
        parse_timeline(text)
    return caught.value


# --- the clock ---------------------------------------------------------------------------------


def images_by_counting(clock: ChunkClock, chunk: int) -> int:
    total = 0
    for index in range(chunk):
        fresh = (index == 0 and clock.fresh) or index in clock.cuts
        total += TEMPORAL_FACTOR * (clock.chunk_frames - fresh) + fresh
    return total


CLOCKS = [
    ChunkClock(chunk_frames=frames, cuts=cuts, fresh=fresh)
    for fresh in (True, False)
    for frames in (1, 2, 3, 5)
    for cuts in ((), (1,), (4,), (1, 2, 3), (3, 11, 12, 30))
]


def test_published_chunks_are_nine_images_then_twelve() -> None:
    assert CacheConfig().chunk_frames == CLOCK.chunk_frames == 3
    assert [CLOCK.images_of(n) for n in range(3)] == [9, 12, 12]
    assert [CLOCK.images_before(n) for n in range(1, 50)] == [12 * n - 3 for n in range(1, 50)]


@pytest.mark.parametrize("clock", CLOCKS)
def test_images_before_a_chunk_match_counting_them(clock: ChunkClock) -> None:
    for chunk in range(40):
        assert clock.images_before(chunk) == images_by_counting(clock, chunk)
        assert clock.seconds(chunk) == images_by_counting(clock, chunk) / FPS


def test_a_chunk_that_is_cut_to_has_three_images_fewer_and_later_starts_move_up() -> None:
    cut = CLOCK.with_cuts(5)
    assert cut.images_of(5) == 9
    assert cut.images_before(5) == CLOCK.images_before(5)
    assert cut.images_before(6) == CLOCK.images_before(6) - 3


@pytest.mark.parametrize("clock", CLOCKS)
def test_every_image_lies_in_the_chunk_the_clock_names(clock: ChunkClock) -> None:
    owners = [chunk for chunk in range(45) for _ in range(clock.images_of(chunk))]
    assert [clock.chunk_at_image(image) for image in range(len(owners))] == owners


@pytest.mark.parametrize("clock", CLOCKS)
def test_the_nearest_chunk_is_the_one_with_the_closest_start_and_ties_go_later(
    clock: ChunkClock,
) -> None:
    quarters = [4 * images_by_counting(clock, n) for n in range(40)]
    for quarter in range(120):
        gaps = [abs(start - quarter) for start in quarters]
        nearest = max(n for n, gap in enumerate(gaps) if gap == min(gaps))
        assert clock.nearest_chunk(Fraction(quarter, 4)) == nearest


@pytest.mark.parametrize("clock", CLOCKS)
def test_chunks_for_a_length_are_the_fewest_that_fill_it(clock: ChunkClock) -> None:
    for seconds in (0.01, 0.5625, 0.57, 1, 1.3125, 2.5, 7, 9.0625):
        count = clock.num_chunks(seconds, "s")
        assert images_by_counting(clock, count) >= seconds * FPS
        assert images_by_counting(clock, count - 1) < seconds * FPS


def test_ten_seconds_are_fourteen_chunks() -> None:
    assert CLOCK.num_chunks(10, "s") == 14


@pytest.mark.parametrize(
    ("length", "unit", "chunks"),
    [
        *((0.4, "c", 1), (1.0, "c", 1), (1.4, "c", 2)),
        *((9, "f", 1), (9.5, "f", 2), (21, "f", 2)),
        *((0.5625, "s", 1), (0.6, "s", 2), (1.3125, "s", 2), (1.32, "s", 3)),
    ],
)
def test_a_run_ends_with_the_chunk_that_reaches_its_length_in_every_unit(
    length: float, unit: Literal["s", "f", "c"], chunks: int
) -> None:
    assert CLOCK.num_chunks(length, unit) == chunks
    assert parse_timeline("a").num_chunks(length, unit, CLOCK) == chunks


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_length_that_is_no_length_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        CLOCK.num_chunks(seconds, "s")


@pytest.mark.parametrize("cuts", [(0,), (3, 2), (2, 2), (-1, 4)])
def test_cuts_that_are_not_rising_chunks_are_refused(cuts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rising"):
        ChunkClock(cuts=cuts)


def test_a_chunk_without_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 frame"):
        ChunkClock(chunk_frames=0)


def test_cuts_join_the_clock_sorted_and_once() -> None:
    assert ChunkClock(cuts=(7,)).with_cuts(3, 7, 9) == ChunkClock(cuts=(3, 7, 9))


# --- reading the language ----------------------------------------------------------------------


def test_the_example_of_the_language_reads_as_written() -> None:
    assert parse_timeline(ISSUE) == PromptTimeline(
        entries=(
            Entry(value=Decimal(0), unit="s", text="a panda walks"),
            Entry(value=Decimal(8), unit="s", text="it sits down"),
            Entry(
                value=Decimal(4),
                unit="s",
                text="snow",
                relative=True,
                switch=Switch(mode="blend", blend_chunks=3, interpolation="slerp"),
            ),
            Entry(value=Decimal(40), unit="c", text="a city at night", switch=Switch(mode="cut")),
        )
    )


@pytest.mark.parametrize(
    ("written", "value", "unit"),
    [
        ("8s", "8", "s"),
        ("8 s", "8", "s"),
        ("8S", "8", "s"),
        ("1.50s", "1.5", "s"),
        (".5s", "0.5", "s"),
        ("0:08", "8", "s"),
        ("2:03.25", "123.25", "s"),
        ("90:00", "5400", "s"),
        ("96f", "96", "f"),
        ("c40", "40", "c"),
        ("C 40", "40", "c"),
        ("40c", "40", "c"),
        ("00040 c", "40", "c"),
    ],
)
@pytest.mark.parametrize("sign", ["", "+", "+ "])
@pytest.mark.parametrize("tail", [":x", " : x", " [cut]:x", "[ CUT ] :\tx", "\uff1ax"])
def test_every_way_to_write_a_time_is_read(
    written: str, value: str, unit: str, sign: str, tail: str
) -> None:
    entry = parse_timeline(f"0s: a\n\t{sign}{written}{tail}").entries[1]
    assert (entry.value, entry.unit, entry.text) == (Decimal(value), unit, "x")
    assert entry.relative == bool(sign)
    assert entry.switch.mode == ("cut" if "[" in tail else "recache")


@pytest.mark.parametrize(
    ("written", "switch"),
    [
        ("soft", Switch(mode="soft")),
        ("recache", Switch()),
        ("cut", Switch(mode="cut")),
        ("blend 1", Switch(mode="blend", blend_chunks=1)),
        (" Blend  12\tLERP ", Switch(mode="blend", blend_chunks=12)),
        ("blend 3 slerp", Switch(mode="blend", blend_chunks=3, interpolation="slerp")),
    ],
)
def test_every_mode_is_read_and_written_back(written: str, switch: Switch) -> None:
    assert Switch.parse(written) == switch
    assert Switch.parse(str(switch)) == switch
    assert parse_timeline(f"0s: a\n1s [{written}]: b").entries[1].switch == switch


def test_prompts_keep_their_colons_brackets_bars_and_hashes() -> None:
    prompts = ["(cat:1.2), 16:9 [wide] | #1", "[cut]: scene two: 8s: later", '"quoted" {a|b}']
    timeline = "\n".join(f"{3 * at}s: {prompt}" for at, prompt in enumerate(prompts))
    assert texts(timeline) == prompts


def test_comments_blank_lines_bom_tabs_and_line_ends_do_not_matter() -> None:
    plain = parse_timeline("global: g\n0s: a panda walks\n8s [cut]: snow")
    noisy = "# head\n\nGLOBAL :\tg\n \t\n  # more\n0s:\ta panda\twalks  \n\n8s [cut]:  snow\n"
    for ending in ("\n", "\r\n", "\r"):
        assert parse_timeline("\ufeff" + noisy.replace("\n", ending)) == plain


def test_a_deeper_line_continues_the_entry_above() -> None:
    timeline = "0s:\n\ta panda\n  # comment\n\n  walks: slowly\n4s: it\n    sits\n\t8s: and sleeps"
    assert texts(timeline) == ["a panda walks: slowly", "it sits", "and sleeps"]


def test_a_line_as_deep_as_its_entry_does_not_continue_it() -> None:
    error = error_of("  0s: a panda\n  walks")
    assert (error.line, error.column) == (2, 3)
    for deeper in ("   walks", "\twalks"):
        assert texts(f"  0s: a panda\n{deeper}") == ["a panda walks"]


def test_a_deeper_line_continues_the_global_prefix_and_no_entry() -> None:
    for text in ("global: film\n  grain\n\n 0s: a\n 4s: b", "0s: a\nglobal: film\n\tgrain\n4s: b"):
        timeline = parse_timeline(text)
        assert timeline.global_prefix == "film grain"
        assert [entry.text for entry in timeline.entries] == ["a", "b"]


def test_the_global_prefix_goes_in_front_of_every_prompt() -> None:
    timeline = parse_timeline("0s: a\nglobal:  film  grain \n4s: b")
    assert timeline.global_prefix == "film grain"
    assert [entry.text for entry in timeline.resolve(CLOCK)] == ["film grain, a", "film grain, b"]
    assert [entry.text for entry in timeline.entries] == ["a", "b"]


@pytest.mark.parametrize(
    "prompt",
    [
        "a panda walks",
        "a sign reading: open [at night]",
        "16:9 aspect ratio, a panda",
        "80s style neon: a city",
        "3 cats: one black, one white",
        "10s of thousands of birds",
        "{red} panda",
        '"hello": says the panda',
        "熊猫在雪中行走",
        "12",
        "s: c: f:",
    ],
)
def test_a_prompt_without_a_time_is_one_entry_at_zero(prompt: str) -> None:
    assert parse_timeline(prompt) == PromptTimeline(
        entries=(Entry(value=Decimal(0), unit="s", text=prompt),)
    )


def test_lines_without_any_time_are_one_prompt() -> None:
    assert texts("a panda\n  walks,\n\nslowly") == ["a panda walks, slowly"]


# --- FizzNodes and equal parts -----------------------------------------------------------------

FIZZ = ['"0": "a, b: [c]"', '"12" :"it \\"sits\\"\\n | down"', '"96": "\\u96ea {x}"']


@pytest.mark.parametrize("opening", ["", "{", " {\n"])
@pytest.mark.parametrize("trailing", ["", ",", " ,\n"])
@pytest.mark.parametrize("gap", [",", ",\n", "\r\n , \r\n"])
def test_fizznodes_text_is_read_with_and_without_braces(
    opening: str, trailing: str, gap: str
) -> None:
    text = opening + gap.join(FIZZ) + trailing + ("}\n" if opening else "\n")
    entries = parse_timeline(text).entries
    assert [(entry.value, entry.unit) for entry in entries] == [(0, "f"), (12, "f"), (96, "f")]
    assert [entry.text for entry in entries] == ["a, b: [c]", 'it "sits" | down', "雪 {x}"]
    assert {entry.switch for entry in entries} == {Switch()}


def test_a_fizznodes_prompt_may_run_over_lines() -> None:
    assert texts('{"0": "a\n\tpanda", "12": "b"}') == ["a panda", "b"]


def test_what_json_writes_is_read() -> None:
    prompts = {str(24 * at): f'say "{at}" \\ {chr(0x1F43C)}' for at in range(50)}
    for text in (json.dumps(prompts), json.dumps(prompts, ensure_ascii=False, indent=2)):
        assert texts(text) == list(prompts.values())


def test_fizznodes_keys_are_video_frames() -> None:
    assert chunks('"0": "a", "9": "b", "93": "c"') == [0, 1, 8]


def test_a_global_line_may_stand_above_fizznodes_text_and_parts() -> None:
    for body in ('{"0": "a"}', "a | b"):
        timeline = parse_timeline(f"global: g\n{body}")
        assert timeline.resolve(CLOCK, 8)[0].text == "g, a"


def test_bars_share_the_video_in_equal_parts() -> None:
    assert texts("a: 1 |b\n| c ") == ["a: 1", "b", "c"]
    assert chunks("a | b | c", 30) == [0, 10, 20]
    assert chunks("a | b | c", 20) == [0, 7, 13]
    assert chunks("a | b | c | d", 4) == [0, 1, 2, 3]
    assert chunks("a | b", 3) == [0, 2]


def test_parts_always_fit_a_run_of_as_many_chunks() -> None:
    for frames in (1, 3):
        for parts in range(2, 30):
            text = " | ".join("x" * parts)
            clock = ChunkClock(chunk_frames=frames)
            assert chunks(text, parts, clock) == list(range(parts))


def test_a_part_knows_its_true_share_of_the_seconds() -> None:
    half = parse_timeline("a | b").resolve(CLOCK, 3)[1]
    assert (half.requested_seconds, half.seconds) == (33 / 16 / 2, 21 / 16)


# --- errors ------------------------------------------------------------------------------------

LIMITS = "write seconds as 8s or 0:08, video frames as 96f, chunks as c40"
AS_PROMPT = f"{LIMITS}, or put '0s:' in front if this is a prompt"
NO_PROMPT = "there is no prompt; write one, such as '0s: a panda walks'"
NO_TIME = (
    "this line has no time and colon in front; begin it as in '8s [cut]: prompt', or indent it to "
    "continue the entry above"
)
NO_COLON = (
    "no colon divides time and prompt here; write it as '8s: a prompt', or indent the line to "
    "continue the entry above"
)
UNFINISHED = "the mode is not closed by a bracket and a colon; write it as in '8s [cut]: prompt'"
NO_JSON = (
    'this is not read as JSON; write "12": "prompt" pairs, each but the last with a comma behind it'
)
ORDER = "does not come after the entries before it; put them in order"
MODES = "use soft, recache, blend K or cut"

ERRORS = [
    ("", 1, 1, NO_PROMPT),
    (" \n# only a comment\n", 1, 1, NO_PROMPT),
    ("global: film grain", 1, 1, NO_PROMPT),
    ("{ }", 1, 1, NO_PROMPT),
    ("0s: a\n 8x: b", 2, 2, f"'8x' has the unknown unit 'x'; {AS_PROMPT}"),
    ("global: g\n h\n0s: a\n8x: b", 4, 1, f"'8x' has the unknown unit 'x'; {AS_PROMPT}"),
    ("0s: a\n8sek: b", 2, 1, f"'8sek' has the unknown unit 'sek'; {AS_PROMPT}"),
    ("0s: a\n8: b", 2, 1, f"'8' has no unit; {AS_PROMPT}"),
    ("0s: a\n+8 [cut]: b", 2, 1, f"'+8' has no unit; {AS_PROMPT}"),
    ("4k: a panda", 1, 1, f"'4k' has the unknown unit 'k'; {AS_PROMPT}"),
    ("0s: a\n1,500s: b", 2, 1, f"'1,500s' is not a time; {AS_PROMPT}"),
    ("0s: a\n1:75: b", 2, 1, f"'1:75' is not a time; {AS_PROMPT}"),
    ("0s: a\n1:5: b", 2, 1, f"'1:5' is not a time; {AS_PROMPT}"),
    ("0s: a\n1:02:03:04 [cut]: b", 2, 1, f"'1:02:03:04' is not a time; {AS_PROMPT}"),
    ("0s: a\n-3s: b", 2, 1, "-3s is negative; times count from 0, the video's start"),
    ("0s: a\n-c4: b", 2, 1, "c-4 is negative; times count from 0, the video's start"),
    ("0s: a\n1.5f: b", 2, 1, "1.5f is not a whole number; only seconds have decimals"),
    ("0s: a\nc1.5: b", 2, 1, "c1.5 is not a whole number; only seconds have decimals"),
    ("0s: a\n2e9s: b", 2, 1, NO_TIME),
    (
        "0s: a\n2000000000s: b",
        2,
        1,
        "a time of 2.000e+9 is out of reach; stay below 1000000000",
    ),
    ("0s: a\n\n  4s:  \n8s: b", 3, 3, "the entry at 4s has no prompt; write one after its time"),
    ("0s: a\n8s it sits", 2, 1, NO_COLON),
    ("a panda\n8s: it sits", 1, 1, NO_TIME),
    ("8s\n: a | b", 1, 1, NO_COLON),
    ("0s: a\n8s [cut it sits", 2, 4, UNFINISHED),
    ("0s: a\n8s [blend 3] it sits", 2, 4, UNFINISHED),
    ("0s: a\n8s [fade]: b", 2, 5, f"unknown mode 'fade'; {MODES}"),
    ("0s: a\n8s []: b", 2, 5, f"unknown mode ''; {MODES}"),
    ("0s: a\n8s [cut 3]: b", 2, 5, "cut stands alone; remove '3'"),
    (
        "0s: a\n8s [blend 0]: b",
        2,
        5,
        "a blend over 0 chunks; it takes at least 1, as in blend 3",
    ),
    (
        "0s: a\n8s [blend]: b",
        2,
        5,
        "'blend' is no blend; write blend 3 or blend 3 slerp",
    ),
    (
        "0s: a\n8s [blend -2]: b",
        2,
        5,
        "'blend -2' is no blend; write blend 3 or blend 3 slerp",
    ),
    (
        "0s: a\n8s [blend 2 cubic]: b",
        2,
        5,
        "unknown interpolation 'cubic'; use lerp or slerp",
    ),
    ("3s: a", 1, 1, "the first entry is at 3s; put a prompt at 0s before it"),
    ("+0s: a", 1, 1, "+0s has no entry before it; let the first entry be at 0s"),
    (
        "# x\n0s [blend 3]: a",
        2,
        1,
        "the first entry has nothing to switch from; remove its [blend 3]",
    ),
    ("0s: a\n0f: b", 2, 1, f"0f {ORDER}"),
    ("0s: a\n4s: b\n3.9s: c", 3, 1, f"3.9s {ORDER}"),
    ("0s: a\n4s: b\n64f: c", 3, 1, f"64f {ORDER}"),
    ("0s: a\n4s: b\n+4s: c\n8s: d", 4, 1, f"8s {ORDER}"),
    ("0s: a\nc4: b\n9s: c\n4c: d", 4, 1, f"c4 {ORDER}"),
    ("0s: a\n+c0: b", 2, 1, "+c0 adds nothing; times rise from entry to entry"),
    (
        "global: a\n0s: b\n global: c",
        3,
        2,
        "global is given twice, first on line 1; join the two in one line",
    ),
    ("0s: a\nglobal: ", 2, 1, "global has no text; write some or remove the line"),
    ("a |\n | b", 2, 2, "the entry at part 2 has no prompt; write one after its time"),
    ('{"0": "a"', 1, 10, "the JSON's { is never closed; add }"),
    ('{"0" "a"}', 1, 2, NO_JSON),
    ('{"0": 5}', 1, 2, NO_JSON),
    ("{0: a}", 1, 2, NO_JSON),
    ('"0": "a",\n  "12": "b" "24": "c"', 2, 3, NO_JSON),
    ('"0": "a"}', 1, 1, NO_JSON),
    (
        '{"0": "a",\n\n "max_f": "b"}',
        3,
        2,
        "the key 'max_f' is not a video frame; write a number such as \"12\"",
    ),
    ('{"0": "\\q"}', 1, 2, "Invalid \\escape in this JSON pair; correct it"),
    ('{"0": "a", "-3": "b"}', 1, 12, "-3f is negative; times count from 0, the video's start"),
    ('{"0": "a", "12": " "}', 1, 12, "the entry at 12f has no prompt; write one after its time"),
    ('{"0": "a", "12": "b", "12": "c"}', 1, 23, f"12f {ORDER}"),
    ('{"12": "a"}', 1, 2, "the first entry is at 12f; put a prompt at 0s before it"),
]


@pytest.mark.parametrize(("text", "line", "column", "problem"), ERRORS)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_every_error_names_line_column_and_remedy(
    text: str, line: int, column: int, problem: str, ending: str
) -> None:
    error = error_of("\ufeff" + text.replace("\n", ending))
    assert str(error) == f"line {line}, column {column}: {problem}"
    assert (error.line, error.column, error.problem) == (line, column, problem)


RESOLVE_ERRORS = [
    (
        "0s: a\n 0.28s: b",
        None,
        "line 2, column 2: 0.28s is not a chunk later than 0s (line 1), which starts chunk 0; a "
        "prompt lasts at least one chunk, so move it to 0.5625s or later",
    ),
    (
        "0s: a\n8s: b\nc5: c",
        None,
        "line 3, column 1: c5 is not a chunk later than 8s (line 2), which starts chunk 11; a "
        "prompt lasts at least one chunk, so move it to 8.8125s or later",
    ),
    (
        "0s: a\n8s: b\n20s: c",
        14,
        "line 3, column 1: 20s is chunk 27, but the run ends after 14 chunks (10.3125 s); move "
        "the entry up or make the run longer",
    ),
    (
        "0s: a\nc14: c",
        14,
        "line 2, column 1: c14 is chunk 14, but the run ends after 14 chunks (10.3125 s); move "
        "the entry up or make the run longer",
    ),
    (
        "a | b",
        None,
        "line 1, column 1: equal parts need the video's length; set one, or write times",
    ),
    (
        "a | b | c",
        2,
        "line 1, column 1: 3 equal parts do not fit a run of 2 chunks; a prompt lasts at least "
        "one, so make the run longer",
    ),
]


@pytest.mark.parametrize(("text", "total", "message"), RESOLVE_ERRORS)
def test_an_entry_without_a_place_in_the_run_is_named(
    text: str, total: int | None, message: str
) -> None:
    with pytest.raises(TimelineError) as caught:
        parse_timeline(text).resolve(CLOCK, total)
    assert str(caught.value) == message


def test_an_empty_timeline_or_run_cannot_be_resolved() -> None:
    with pytest.raises(ValueError, match="timeline is empty"):
        PromptTimeline().resolve(CLOCK)
    with pytest.raises(ValueError, match="total_chunks is 0"):
        parse_timeline("a").resolve(CLOCK, 0)


def test_a_timeline_error_is_a_value_error_that_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(error_of("0s: a\n 8x: b")))
    assert isinstance(error, ValueError)
    assert (error.line, error.column, str(error)) == (2, 2, str(error_of("0s: a\n 8x: b")))


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"mode": "fade"}, "unknown mode 'fade'"),
        ({"mode": "blend"}, "at least 1"),
        ({"mode": "cut", "blend_chunks": 2}, "only blend does"),
        ({"mode": "soft", "interpolation": "slerp"}, "only blend does"),
        ({"mode": "blend", "blend_chunks": 2, "interpolation": "x"}, "unknown interpolation 'x'"),
    ],
)
def test_a_switch_that_contradicts_itself_is_refused(
    wrong: dict[str, object], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        Switch(**wrong)  # type: ignore[arg-type]


# --- resolving ---------------------------------------------------------------------------------


def test_times_go_to_the_nearest_chunk_and_ties_to_the_later() -> None:
    # Chunk 1 starts at image 9 and chunk 2 at image 21: image 15 is as near to both.
    assert chunks("0s: a\n14f: b") == [0, 1]
    assert chunks("0s: a\n15f: b") == [0, 2]
    assert chunks("0s: a\n0.9375s: b") == [0, 2]
    assert chunks("0s: a\n0.937499999999999999999999s: b") == [0, 1]


def test_the_example_resolves_to_the_published_clock() -> None:
    resolved = parse_timeline(ISSUE).resolve(CLOCK, 41)
    assert [entry.chunk for entry in resolved] == [0, 11, 16, 40]
    assert [entry.seconds for entry in resolved] == [0, 129 / 16, 189 / 16, 477 / 16]
    assert [entry.requested_seconds for entry in resolved] == [0, 8, 12, 477 / 16]


def test_relative_times_count_from_the_time_asked_for_so_roundings_do_not_add_up() -> None:
    relative = "0s: a" + "\n+1.1s: b" * 50
    absolute = "0s: a" + "".join(f"\n{Decimal('1.1') * n}s: b" for n in range(1, 51))
    assert chunks(relative) == chunks(absolute)


def test_relative_chunks_and_frames_count_from_the_entry_before() -> None:
    assert chunks("0s: a\n+c4: b\n8s: c\n+2c: d\n+24f: e") == [0, 4, 11, 13, 15]


def test_a_cut_moves_what_follows_by_three_images_and_nothing_before_it() -> None:
    body = "0s: a\n4s [{}]: b\n+c3: c\n20s: d"
    cut = parse_timeline(body.format("cut")).resolve(CLOCK)
    plain = parse_timeline(body.format("recache")).resolve(CLOCK)
    assert cut[1].seconds == plain[1].seconds
    assert cut[2].chunk == plain[2].chunk
    assert plain[2].seconds - cut[2].seconds == 3 / FPS
    assert (plain[3].chunk, cut[3].chunk) == (27, 27)
    assert plain[3].seconds - cut[3].seconds == 3 / FPS


def test_many_cuts_shift_the_chunk_a_time_falls_on() -> None:
    cuts = "0s: a" + "".join(f"\nc{n} [cut]: b" for n in range(1, 9))
    assert chunks(f"{cuts}\n9s: end")[-1] == 14
    assert chunks("0s: a\n9s: end")[-1] == 12


CLIP = ChunkClock(clip_chunks=3)
MODES = ["soft", "recache", "blend 2", "cut"]


@pytest.mark.parametrize("mode", MODES)
def test_the_last_change_within_a_start_clip_acts_after_it_in_its_own_mode(mode: str) -> None:
    text = f"0s: a\nc1 [cut]: b\nc2 [{mode}]: c\nc5: d"
    resolved = parse_timeline(text).resolve(CLIP)
    assert [(e.chunk, e.text, str(e.switch)) for e in resolved[1:]] == [
        (3, "c", mode),
        (5, "d", "recache"),
    ]
    assert [(e.text, e.chunk) for e in resolved[1].instead_of] == [("b", 3)]
    assert clip_notes(resolved) == [
        "ignored: 'b', asked for at 0.5625 s: 'c' begins at 2.0625 s, after the start clip",
        "note: 'c', asked for at 1.3125 s, begins at 2.0625 s, after the start clip",
    ]


def test_a_change_where_the_start_clip_ends_goes_before_those_within_it() -> None:
    resolved = parse_timeline("0s: a\nc2 [cut]: b\nc3 [soft]: c").resolve(CLIP)
    assert [(e.chunk, e.text) for e in resolved] == [(0, "a"), (3, "c")]
    (note,) = clip_notes(resolved)
    assert note.startswith("ignored: 'b', asked for at 1.3125 s: 'c' begins at 2.0625 s")


def test_only_a_cut_that_acts_after_a_start_clip_moves_what_follows() -> None:
    def ends(text: str) -> tuple[float, int]:
        timeline = parse_timeline(f"0s: a\n{text}\nc10: z")
        return timeline.resolve(CLIP)[-1].seconds, timeline.num_chunks(10, "s", CLIP)

    for acting in ("c1 [cut]: b", "c2 [cut]: b", "c3 [cut]: b", "c1 [cut]: b\nc2 [cut]: c"):
        assert ends(acting) == ends("c4 [cut]: b")
    for without in ("c1: b", "c1 [cut]: b\nc2: c", "c2 [cut]: b\nc3 [soft]: c"):
        assert ends(without) == ends("c4: b")


def test_times_within_a_start_clip_are_those_of_the_timeline_for_what_counts_from_them() -> None:
    assert chunks("0s: a\nc1: b\n+c4: c\n+2s: d", clock=CLIP) == [0, 3, 5, 8]
    assert chunks("a | b | c", total=6, clock=CLIP) == [0, 3, 4]


def test_a_video_that_ends_within_its_start_clip_is_refused() -> None:
    assert CLIP.num_chunks(3, "c") == 3
    for length, unit in ((2, "c"), (1.2, "s"), (20, "f")):
        with pytest.raises(
            ValueError, match=rf"length of {length} .*lasts 3 chunks, 2.0625 s; ask for"
        ):
            parse_timeline("a").num_chunks(length, unit, CLIP)
    with pytest.raises(TimelineError, match="c1 acts after the start clip, at chunk 3, but"):
        parse_timeline("0s: a\nc1: b").resolve(CLIP, 3)
    with pytest.raises(ValueError, match="from 3 on"):
        CLIP.with_cuts(2)


def test_cuts_the_clock_already_has_count_too() -> None:
    clock = ChunkClock(cuts=tuple(range(1, 9)))
    assert chunks("0s: a\n9s: end", clock=clock) == [0, 14]


def test_the_length_of_a_run_counts_the_cuts_of_its_timeline() -> None:
    cuts = parse_timeline("0s: a" + "".join(f"\nc{n} [cut]: b" for n in range(1, 9)))
    assert cuts.num_chunks(9, "s", CLOCK) == 15
    assert parse_timeline("a").num_chunks(9, "s", CLOCK) == 13
    assert parse_timeline("a | b").num_chunks(9, "s", CLOCK) == 13


def test_a_switch_may_come_while_a_blend_is_under_way() -> None:
    assert chunks("0s: a\nc4 [blend 9]: b\nc6 [blend 2]: c\nc7 [cut]: d", 8) == [0, 4, 6, 7]


def test_random_times_match_a_slow_count_of_images() -> None:
    rng = random.Random(5)
    for _ in range(40):
        frames = rng.choice([1, 2, 3, 4])
        slow, lines, image, expected = ChunkClock(chunk_frames=frames), ["0s: a"], 0, [0]
        for _ in range(rng.randrange(1, 6)):
            image += rng.randrange(4 * frames + 4, 60)
            gaps = [abs(images_by_counting(slow, n) - image) for n in range(image + 1)]
            nearest = max(n for n, gap in enumerate(gaps) if gap == min(gaps))
            cut = rng.random() < 0.4
            lines.append(f"{image / FPS}s [cut]: x" if cut else f"{image}f: x")
            slow = slow.with_cuts(nearest) if cut else slow
            expected.append(nearest)
        assert chunks("\n".join(lines), clock=ChunkClock(chunk_frames=frames)) == expected


# --- back to text, and appending ---------------------------------------------------------------

WORDS = [
    "panda",
    "8s:",
    "[cut]:",
    "a:b",
    "|",
    "#1",
    "{x}",
    '"q"',
    "雪",
    "🐼",
    "global:",
    "c4:",
    ",",
]
PLAIN_WORDS = ["panda", "a:b", "#1", "雪", "🐼", "(x:1.2)", "4k", "[wide]"]


def random_prompt(rng: random.Random, words: list[str]) -> str:
    return " ".join(rng.choice(words) for _ in range(rng.randrange(1, 6)))


def random_switch(rng: random.Random) -> Switch:
    mode = rng.choice(["soft", "recache", "cut", "blend"])
    if mode != "blend":
        return Switch(mode=mode)
    return Switch(
        mode="blend", blend_chunks=rng.randrange(1, 30), interpolation=rng.choice(["lerp", "slerp"])
    )


def random_timeline(rng: random.Random) -> PromptTimeline:
    prefix = random_prompt(rng, WORDS) if rng.random() < 0.5 else ""
    timeline = PromptTimeline(global_prefix=prefix)
    first = rng.choice(["s", "f", "c"])
    timeline = timeline.append(0, first, Switch(), random_prompt(rng, WORDS))
    seconds, chunk = 0.0, 0
    for _ in range(rng.randrange(1, 12)):  # a lone prompt that says ", 8s:" is refused
        unit, relative = rng.choice(["s", "f", "c"]), rng.random() < 0.4
        seconds, chunk = seconds + rng.randrange(2, 40), chunk + rng.randrange(2, 60)
        at = {"s": seconds + rng.choice([0, 0.1, 0.875]), "f": int(seconds * FPS), "c": chunk}[unit]
        prompt = random_prompt(rng, WORDS)
        # A relative step pushes the entries after it: step small, so that times keep rising.
        at = rng.choice([0.01, 1, 2.5]) if relative and unit == "s" else 1 if relative else at
        seconds, chunk = seconds + 4, chunk + 4
        timeline = timeline.append(at, unit, random_switch(rng), prompt, relative=relative)
    return timeline


def test_random_timelines_read_back_equal_to_what_was_written() -> None:
    rng = random.Random(0)
    for _ in range(500):
        timeline = random_timeline(rng)
        again = parse_timeline(timeline.to_text())
        assert again == timeline
        assert again.to_text() == timeline.to_text()


def test_random_parts_read_back_equal_to_what_was_written() -> None:
    rng = random.Random(1)
    for _ in range(200):
        parts = ["x" + random_prompt(rng, PLAIN_WORDS) for _ in range(rng.randrange(1, 9))]
        timeline = parse_timeline("global: g: h\n" + " |\n\t".join(parts))
        assert [entry.text for entry in timeline.entries] == parts
        assert parse_timeline(timeline.to_text()) == timeline


@pytest.mark.slow
def test_random_text_is_read_or_refused_with_a_place_in_it() -> None:
    rng = random.Random(2)
    pieces = [*WORDS, "\n", "\n", " ", "\t", "0s", "8s", "+4s", ":", "[", "]", "blend 3", "-", ".5"]
    pieces += ["\r\n", '"0":', '"a"', "{", "}", "c", "1:30", "\\", "\u2028", "\x00", "\ufeff"]
    outcomes = set()
    for _ in range(20000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 12)))
        try:
            timeline = parse_timeline(text)
        except TimelineError as error:
            outcomes.add("refused")
            lines = text.splitlines()
            assert 1 <= error.line <= len(lines)
            assert 1 <= error.column <= len(lines[error.line - 1]) + 1
        else:
            outcomes.add("read")
            assert timeline.entries and all(entry.text for entry in timeline.entries)
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize(
    "text",
    [ISSUE, "a panda", "a | b | c", "global: g\n" + ",\n".join(FIZZ), "0:00: a\n1:02.50 [soft]: b"],
)
def test_every_form_reads_back_from_its_text(text: str) -> None:
    timeline = parse_timeline(text)
    assert parse_timeline(timeline.to_text()) == timeline


def test_appending_gives_what_the_written_line_gives_and_changes_nothing_else() -> None:
    start = PromptTimeline(global_prefix="g").append(0, "s", Switch(), "a panda walks")
    longer = start.append(1.5, "s", Switch(mode="cut"), " it\nsits ", relative=True)
    assert len(start.entries) == 1
    assert longer == parse_timeline("global: g\n0s: a panda walks\n+1.5s [cut]: it sits")
    assert PromptTimeline(global_prefix=" g\n").global_prefix == "g"
    assert longer.append(40, "c", Switch(), "x").entries[-1].line == 3


@pytest.mark.parametrize(
    ("at", "unit", "text", "problem"),
    [
        (4, "s", "b", f"4s {ORDER}"),
        (64, "f", "b", f"64f {ORDER}"),
        (-4, "s", "b", "-4s is negative; times count from 0, the video's start"),
        (5.5, "c", "b", "c5.5 is not a whole number; only seconds have decimals"),
        (5, "s", " \n ", "the entry at 5s has no prompt; write one after its time"),
        (5, "m", "b", f"unknown unit 'm'; {LIMITS}"),
        (float("nan"), "s", "b", "a time of NaN is out of reach; stay below 1000000000"),
        (float("inf"), "s", "b", "a time of Infinity is out of reach; stay below 1000000000"),
    ],
)
def test_appending_checks_what_reading_checks(
    at: float, unit: str, text: str, problem: str
) -> None:
    with pytest.raises(TimelineError) as caught:
        parse_timeline("0s: a\n4s: b").append(at, unit, Switch(), text)  # type: ignore[arg-type]
    assert str(caught.value) == f"line 3, column 1: {problem}"


def test_the_first_appended_entry_must_be_a_plain_one_at_zero() -> None:
    for at, switch in ((1, Switch()), (0, Switch(mode="cut"))):
        with pytest.raises(TimelineError, match="the first entry"):
            PromptTimeline().append(at, "s", switch, "a")


def test_equal_parts_cannot_be_appended_to() -> None:
    with pytest.raises(TimelineError, match="equal parts take no times"):
        parse_timeline("a | b").append(4, "s", Switch(), "c")


# --- the table ---------------------------------------------------------------------------------


def test_the_table_shows_chunk_seconds_mode_and_prompt() -> None:
    assert format_table(parse_timeline(ISSUE).resolve(CLOCK)) == (
        "chunk  seconds   starts  mode           prompt\n"
        "    0     0.00  0:00.00  start          a panda walks\n"
        "   11     8.06  0:08.06  recache        it sits down\n"
        "   16    11.81  0:11.81  blend 3 slerp  snow\n"
        "   40    29.81  0:29.81  cut            a city at night"
    )


def columns(text: str) -> int:
    marks = sum(unicodedata.combining(character) > 0 for character in text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - marks


@pytest.mark.parametrize("width", [60, 61, 100])
def test_long_prompts_of_any_script_are_cut_to_the_width(width: int) -> None:
    prompts = ["panda " * 50, "熊猫在雪中行走" * 20, "e\u0301" * 200, "x" + "雪" * 100]
    text = "\n".join(f"{9 * at}s: {prompt}" for at, prompt in enumerate(prompts))
    for row in format_table(parse_timeline(text).resolve(CLOCK), width).split("\n")[1:]:
        assert row.endswith("…")
        assert width - 2 <= columns(row) <= width


def test_prompts_that_fit_are_shown_whole() -> None:
    row = format_table(parse_timeline("0s: 雪雪雪").resolve(CLOCK), width=40).split("\n")[1]
    assert row.endswith("雪雪雪")


def test_minutes_never_show_sixty_seconds() -> None:
    late = ResolvedEntry(chunk=1, seconds=59.999, requested_seconds=0, switch=Switch(), text="a")
    assert " 1:00.00 " in format_table([late])
    hours = ResolvedEntry(
        chunk=9, seconds=36000.0625, requested_seconds=0, switch=Switch(), text="a"
    )
    assert " 600:00.06 " in format_table([hours])


# --- size --------------------------------------------------------------------------------------


def test_huge_timelines_are_read_and_resolved_quickly() -> None:
    start = time.process_time()
    timed = "0s: a" + "".join(f"\n+2s [cut]: {'b' * 50}" for _ in range(2000))
    assert len(chunks(timed)) == 2001
    assert len(texts(", ".join(f'"{24 * n}": "{"b" * 50}"' for n in range(3000)))) == 3000
    assert len(texts(" | ".join(["b" * 50] * 3000))) == 3000
    assert len(texts("word " * 60_000)[0]) == 299_999
    assert time.process_time() - start < 8


@pytest.mark.parametrize(
    "text",
    [
        " " * 200_000 + "x",
        "\n" * 200_000 + "x",
        "0s: a\n+" + " " * 200_000 + "x:",
        "1" * 200_000,
        "1:" * 100_000,
        "0s: a\n1" + " " * 200_000 + "[cut",
        "0s: a\n8s [" + "x" * 200_000,
        '{"0": "' + "x" * 200_000,
        '{"0": "' + '\\"' * 100_000 + "}",
        '{"' + "[" * 100_000 + "}",
        "0s: a\n" + "9" * 200_000 + "s: b",
        "0s: a\n8s [blend " + "9" * 200_000 + "]: b",
        '{"0": "a", "' + "9" * 200_000 + '": "b"}',
        "|" * 100_000,
    ],
)
def test_hostile_text_is_read_or_refused_quickly(text: str) -> None:
    start = time.process_time()
    try:
        parse_timeline(text)
    except TimelineError as error:
        assert error.line >= 1
    assert time.process_time() - start < 2
