from __future__ import annotations

import csv
import io
import json
import random
import string

import pytest

from rf_core.prompt_files import read_prompt_file, text_lines

DAMAGED = 2500
TABLE = [["id", "prompt"], ["1", 'an "inner" quote'], ["2", "one, two; three"], ["3", "圆 🔴"]]


def written(tmp_path, name: str, content: str | bytes):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(tmp_path, name: str, content: str | bytes, **options):
    return read_prompt_file(written(tmp_path, name, content), **options)


def saved(rows, **dialect) -> str:
    file = io.StringIO()
    csv.writer(file, **dialect).writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ("\ufeff# mine\r\nleft\r\nup\r\n", {2: "left", 3: "up"}),
        ("left\n\n  two\u2028half  \n  # no\nleft", {1: "left", 3: "two half", 5: "left"}),
        ("left\n\ufeff# joined\n\ufeffup", {1: "left", 3: "up"}),
        ("left\rup", {1: "left", 2: "up"}),
        ("圆 🔴\nup".encode("utf-16"), {1: "圆 🔴", 2: "up"}),
        ('say "hello\na # in it, and; more', {1: 'say "hello', 2: "a # in it, and; more"}),
    ],
)
def test_a_text_file_has_a_prompt_a_line_whatever_editor_saved_it(tmp_path, content, prompts):
    for name in ("p.txt", "p"):
        found = read(tmp_path, name, content)
        assert found.prompts == prompts and found.left_out is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["p.csv", "p.tsv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\r\n", "\n", "\r"])
def test_a_table_is_read_as_spreadsheets_save_it(tmp_path, name, encoding, delimiter, end):
    text = saved(TABLE, delimiter=delimiter, lineterminator=end)
    found = read(tmp_path, name, text.encode(encoding))
    assert found.prompts == {n: row[1] for n, row in enumerate(TABLE[1:], 2)}


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.csv", "\ufeffprompt,source\r\nleft,x\r\n", {2: "left"}),
        ("p.csv", " Prompt ,id\nleft,1\n\n,\nup,2,,\n", {2: "left", 5: "up"}),
        ("p.csv", 'id, prompt\n1, "left, then up"\n', {2: "left, then up"}),
        ("p.csv", 'prompt,id\n"two\nlines",1\nup,2\n', {2: "two lines", 3: "up"}),
        ("p.csv", 'prompt\nleft, up; down\n"a ""b"", c"\n', {2: "left, up; down", 3: 'a "b", c'}),
        ("p.CSV", "PROMPT\nleft\n", {2: "left"}),
        (
            "p.tsv",
            'id\tprompt\n1\t"hello world\n2\ta red circle\n3\tan "inner" quote\n4\ta blue square\n',
            {2: '"hello world', 3: "a red circle", 4: 'an "inner" quote', 5: "a blue square"},
        ),
        ("p.tsv", 'prompt\nscreen of 27"\n"a ""b"""\n', {2: 'screen of 27"', 3: 'a "b"'}),
        ("p.jsonl", '{"Prompt": " left "}\n\n{"id": 1, "prompt": "圆"}\n', {1: "left", 3: "圆"}),
    ],
)  # fmt: skip
def test_headers_blank_rows_and_quotes_are_what_their_writer_meant(
    tmp_path, name, content, prompts
):
    found = read(tmp_path, name, content)
    assert found.prompts == prompts and found.left_out is None


def test_rows_without_a_prompt_are_left_out_and_named(tmp_path):
    rows = ['{"prompt": null}', '{"prompt": "a"}', '{"prompt": " "}']
    found = read(tmp_path, "p.jsonl", "\n".join(rows))
    assert found.prompts == {2: "a"}
    assert found.left_out == (
        f"{found.path}: 2 of 3 lines have no prompt and are left out (lines 1, 3)"
    )
    found = read(tmp_path, "p.csv", "id,prompt\n1,a\n2\n3,\n" + "4, \n" * 5 + "5,b\n")
    assert found.prompts == {2: "a", 10: "b"}
    assert found.left_out is not None
    assert "7 of 9 rows have no prompt and are left out (rows 3, 4, 5, 6, 7 and 2 more)" in (
        found.left_out
    )
    one = read(tmp_path, "q.csv", "id,prompt\n1,a\n2,\n").left_out
    assert one is not None and "1 of 2 rows has no prompt and is left out (row 3)" in one


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.csv", "id,text\n1,a\n", "row 1: no column 'prompt'; it has id, text; write 'prompt'"),
        ("p.csv", "a red circle\nup\n", "row 1: no column 'prompt'; it has a red circle;"),
        ("p.csv", "prompt,prompt\na,b\n", "row 1: 2 columns are called 'prompt'"),
        ("p.csv", "prompt,id\na,1\nleft, then up,2\n", "row 3: 3 cells below a header of 2"),
        ("p.csv", 'id,prompt\n1,a\n2,"b\n3,c\n', "row 3: a quotation mark opens a cell"),
        ("p.csv", 'id,prompt\n1,"a" b\n', "row 2: a quotation mark opens a cell"),
        ("p.csv", 'id,prompt\n1,"' + "a" * 200_000, "row 2: a quotation mark opens a cell"),
        ("p.csv", "", "row 1: no column 'prompt'"),
        ("p.csv", "id,prompt\n", "holds no prompts"),
        ("p.csv", "id,prompt\n1,\n2,\n", "holds no prompts; all 2 rows are empty"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2: not a JSON object with the field"),
        ("p.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("p.jsonl", "[" * 100_000, "line 1: not a JSON object"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 12}\n', "line 2: the prompt is 12, which"),
        ("p.jsonl", '{"prompt": ["a"]}\n', "line 1: the prompt is .* which is no text"),
        ("p.jsonl", '{"prompt": "\\ud800"}\n', "line 1: the prompt has a character"),
        ("p.jsonl", '{"prompt": "a\\u0000"}\n', "line 1: the prompt has a character"),
        ("p.txt", "\n# none\n", "holds no prompts; write one a line"),
        ("p.txt", b"caf\xe9", "not a text file in UTF-8"),
        ("p.txt", b"a\x00b", "not a text file in UTF-8"),
        ("p.txt", "a cat".encode("utf-16-le"), "not a text file in UTF-8"),
        ("p.txt", b"\xff\xfe\x00", "not a text file in UTF-8"),
        ("p.json", '["a"]', "is no file of prompts: save it as .txt"),
        ("p.xlsx", b"PK\x03\x04", "is no file of prompts: save it as .txt"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_its_row(tmp_path, name, content, said):
    with pytest.raises(ValueError, match=said) as refused:
        read(tmp_path, name, content)
    assert str(tmp_path / name) in str(refused.value)


def test_no_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no file of prompts at"):
        read_prompt_file(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="is a folder; name a file of prompts"):
        read_prompt_file(tmp_path)
    with pytest.raises(ValueError, match="is a folder; name a timeline"):
        list(text_lines(tmp_path, "timeline"))


def test_another_column_can_be_named(tmp_path):
    table = "Prompt,Caption\na,b\n"
    assert read(tmp_path, "p.csv", table, column="caption").prompts == {2: "b"}
    lines = json.dumps({"caption": "c"})
    assert read(tmp_path, "p.jsonl", lines, column="caption").prompts == {1: "c"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [20261126])
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".jsonl"])
def test_damaged_files_give_prompts_or_one_sentence(tmp_path, suffix, seed):
    rng = random.Random(f"{seed}{suffix}")
    jsonl = "\n".join(json.dumps({"prompt": row[1]}) for row in TABLE)
    sources = [jsonl, saved(TABLE), saved(TABLE, delimiter="\t"), "\ufeff# a\nleft\nup"]
    read_well = 0
    for _ in range(DAMAGED):
        text = rng.choice(sources)
        data = bytearray(text.encode(rng.choice(("utf-8", "utf-8-sig", "utf-16"))))
        for _ in range(rng.randrange(4)):
            place = rng.randrange(len(data) + 1)
            piece = rng.choice([*string.punctuation, "\n", "\t", "\r", "\0", "\ufeff", "null"])
            data[place : place + rng.choice((0, 1, 9))] = piece.encode() * rng.choice((1, 1, 3))
        path = written(tmp_path, f"p{suffix}", bytes(data))
        try:
            found = read_prompt_file(path)
        except ValueError as error:
            assert type(error) is ValueError and str(path) in str(error), bytes(data)
            assert "\n" not in str(error).replace("\\n", ""), bytes(data)
        else:
            read_well += 1
            assert all(text == " ".join(text.split()) != "" for text in found.prompts.values())
    assert 0 < read_well < DAMAGED
