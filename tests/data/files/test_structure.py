"""The fast scans for rows agree with a full parser on any content, in blocks of any size, and report the line where a file breaks."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.data.files.guarded_file import ReaderLimits
from llamahome.data.files.sources import Source, open_source
from llamahome.data.records import Row
from llamahome.errors import DataError, Problem

NASTY = st.text(alphabet=st.sampled_from("ab\",;\t\\\n\r[]{}|é🙂'0 :"), max_size=12)
OBJECTS = st.dictionaries(
    NASTY, st.one_of(NASTY, st.integers(), st.none(), st.lists(NASTY, max_size=3), st.dictionaries(NASTY, NASTY, max_size=2))
)
BLOCKS = st.sampled_from([1, 2, 3, 7, 1 << 20])


def refused(path: Path) -> Problem:
    with pytest.raises(DataError) as caught:
        open_source(str(path))
    (problem,) = caught.value.problems
    return problem


def values(source: Source) -> list[dict[str, Any]]:
    return [source.row(number).value for number in range(len(source))]


@pytest.mark.medium
@settings(deadline=None, max_examples=150)
@given(st.lists(OBJECTS, min_size=1, max_size=6), st.sampled_from([None, 0, 2]), st.booleans(), BLOCKS)
def test_an_array_is_what_json_reads(
    tmp_path_factory, rows: list[dict[str, Any]], indent: int | None, ascii_only: bool, block: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(("\ufeff \n" + text + "\n").encode())
    source = open_source(str(path), limits=ReaderLimits(block=block))
    assert values(source) == rows
    lines = [source.row(number).line for number in range(len(source))]
    shown = path.read_bytes().split(b"\n")
    assert lines == sorted(lines) and lines[0] >= 2 and all(b"{" in shown[line - 1] for line in lines)
    assert indent is None or len(set(lines)) == len(rows)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(NASTY, min_size=2, max_size=2), max_size=6), st.sampled_from(",;\t"), st.sampled_from(["\n", "\r\n"]), BLOCKS)
def test_a_table_is_what_csv_reads(tmp_path_factory, cells: list[list[str]], delimiter: str, end: str, block: int) -> None:
    out = io.StringIO()
    quoting = csv.QUOTE_ALL if any("\r" in cell for row in cells for cell in row) else csv.QUOTE_MINIMAL  # csv.writer forgets a lone CR
    csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows([["a", "b c"], *cells])
    path = tmp_path_factory.mktemp("rows") / ("a.tsv" if delimiter == "\t" else "a.csv")
    path.write_bytes(out.getvalue().encode())
    if not cells:
        assert refused(path).code == "data.empty-file"
        return
    source = open_source(str(path), limits=ReaderLimits(block=block))
    assert values(source) == [dict(zip(("a", "b c"), row, strict=True)) for row in cells]
    before = [sum(cell.count("\n") for row in cells[:number] for cell in row) + number for number in range(len(cells))]
    assert [source.row(number).line for number in range(len(source))] == [count + 2 for count in before]


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=80), st.sampled_from(["jsonl", "json", "csv", "tsv", "txt"]), BLOCKS)
def test_any_bytes_end_in_rows_or_problems(tmp_path_factory, raw: bytes, kind: str, block: int) -> None:
    path = tmp_path_factory.mktemp("any") / f"a.{kind}"
    path.write_bytes((b"[" if kind == "json" else b"a,b\n" if kind == "csv" else b"") + raw)
    try:
        source = open_source(str(path), limits=ReaderLimits(block=block))
    except DataError as error:
        assert all(problem.code.startswith("data.") for problem in error.problems)
        return
    rows = list(source)
    assert len(source.hashes()) == len(rows) and all(isinstance(row, Row | Problem) for row in rows)


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet="ab\n\r é🙂", max_size=300), st.integers(8, 40), st.booleans())
def test_a_long_text_is_cut_and_nothing_of_it_is_lost(tmp_path_factory, text: str, longest: int, bom: bool) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    try:
        source = open_source(str(path), limits=ReaderLimits(text_row=longest))
        parts = [source.row(number) for number in range(len(source))]
    except DataError:
        assert not text.strip()
        return
    assert "".join("".join(row.value["text"] for row in parts).split()) == "".join(text.split())
    assert all(len(row.value["text"].rstrip().encode()) <= longest for row in parts)
    for row in parts:
        begin = text.encode().split(b"\n")[row.line - 1].decode()
        assert row.value["text"].split("\n")[0].rstrip("\r") in begin
    assert bool(source.notes) == (path.stat().st_size > longest)


def test_a_short_text_is_one_row_and_a_long_one_breaks_at_blank_lines(tmp_path: Path) -> None:
    limits = ReaderLimits(text_row=20)
    (tmp_path / "a.md").write_text("# one\n\ntwo\n\nthree three\n\nfour four")
    source = open_source(str(tmp_path / "a.md"), limits=limits)
    assert [(row.line, row.value["text"]) for row in source] == [(1, "# one\n\ntwo\n\n"), (5, "three three\n\n"), (7, "four four")]
    (tmp_path / "a.md").write_text("# one\n\ntwo\n")
    assert [row.value["text"] for row in open_source(str(tmp_path / "a.md"), limits=limits)] == ["# one\n\ntwo\n"]


def test_a_quote_within_plain_text_is_part_of_the_text(tmp_path: Path) -> None:
    """As in Python's csv: only a quote at the beginning of a field opens it."""
    path = tmp_path / "a.tsv"
    path.write_text('a\tb\n5" pipe\tone\n"x\n""y"\tsay "hi"\n\n7"\t"z\tz"\nlast\t8"\n')
    for block in (1, 4, 1 << 20):
        source = open_source(str(path), limits=ReaderLimits(block=block))
        assert [list(row.value.values()) for row in source] == [['5" pipe', "one"], ['x\n"y', 'say "hi"'], ['7"', "z\tz"], ["last", '8"']]
        assert [row.line for row in source] == [2, 3, 6, 7]


def test_a_row_beyond_64_mib_is_reported_and_not_read(tmp_path: Path) -> None:
    limits = ReaderLimits(row=40)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}' + "\n" * 60 + '{"text": "' + "y" * 60 + '"}\n{"text": "z"}\n')
    first, large, last = open_source(str(tmp_path / "a.jsonl"), limits=limits)
    assert isinstance(first, Row) and isinstance(last, Row) and isinstance(large, Problem)
    assert large.code == "data.row-too-large" and large.where == f"{tmp_path / 'a.jsonl'}:61"
    assert len(open_source(str(tmp_path / "a.jsonl"), limits=limits).hashes()) == 3


def test_semicolons_separate_if_the_first_line_has_no_comma_and_a_note_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt;"comple,tion"\nx, y;00123\n')
    source = open_source(str(tmp_path / "a.csv"))
    assert source.row(0).value == {"prompt": "x, y", "comple,tion": "00123"} and "a semicolon" in source.notes[0]


def test_a_column_of_turns_may_hold_json_and_no_other_column_is_read_as_json(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["messages", "text"], [json.dumps(turns), json.dumps(turns)], ["plain", "[1"], ["[{'role': 'user'}]", ""]]
        )
    first, second, third = open_source(str(tmp_path / "a.csv"))
    assert first.value == {"messages": turns, "text": json.dumps(turns)} and second.value == {"messages": "plain", "text": "[1"}
    assert isinstance(third, Problem) and third.code == "data.bad-csv" and "json.dumps" in third.message


def test_a_field_of_any_length_is_read_and_the_limit_of_csv_stays_what_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(open_source(str(tmp_path / "a.csv")).row(0).value["text"]) == 200_000
    assert csv.field_size_limit() == before
