"""Rows are found by number and line; missing and empty files and broken lines are reported."""

import gzip
import json
import lzma
import os
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.data.files.guarded_file import ReaderLimits
from llamahome.data.files.jsonrow import parse_row
from llamahome.data.files.locate import locate
from llamahome.data.files.sources import open_source
from llamahome.data.records import Row
from llamahome.errors import DataError, Problem


def fails(path: str | Path) -> Problem:
    with pytest.raises(DataError) as caught:
        open_source(str(path))
    (problem,) = caught.value.problems
    return problem


@settings(deadline=None, max_examples=80)
@given(st.lists(st.sampled_from(["row", "", " \t", "\r"]), max_size=30), st.booleans(), st.booleans(), st.integers(1, 40))
def test_rows_and_lines_are_those_of_a_plain_reading(tmp_path_factory, kinds: list[str], bom: bool, ends: bool, chunk: int) -> None:
    lines = [
        json.dumps({"n": number, "text": "é\u2028" * (number % 3)}, ensure_ascii=False) if k == "row" else k
        for number, k in enumerate(kinds)
    ]
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + ("\n".join(lines) + ("\n" if ends else "")).encode())
    expected = [(at, json.loads(line)) for at, line in enumerate(lines, start=1) if line.strip()]
    if not expected:
        assert fails(path).code == "data.empty-file"
        return
    source = open_source(str(path), limits=ReaderLimits(block=chunk))
    assert len(source) == len(expected)
    for number in reversed(range(len(source))):
        row = source.row(number)
        assert (row.index, row.line, row.value) == (number, *expected[number])
    with pytest.raises(IndexError):
        source.row(len(source))
    source.close()


def test_a_folder_is_its_sorted_data_files_and_unread_files_are_listed(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/c.jsonl", "a/d.xlsx", ".hidden/e.jsonl", ".f.jsonl", ".gitattributes", "README.md", "LICENSE", "state.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n" + json.dumps({"text": "two"}))
    (tmp_path / "config.json").write_text('{\n  "a": 1\n}')
    (tmp_path / "info.json").write_text('{\n  "a": 1\n}')
    source = open_source(str(tmp_path))
    assert [Path(path).name for path in source.paths] == ["c.jsonl", "b.jsonl"]
    assert [row.value["text"] for row in source if isinstance(row, Row)] == ["a/c.jsonl", "two", "b.jsonl", "two"]
    assert [(source.row(n).index, source.file_of(n)) for n in range(4)] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    ignored = [".f.jsonl", "LICENSE", "README.md", "d.xlsx", "config.json", "info.json", "state.json"]
    assert sorted(Path(path).name for path in source.ignored) == sorted(ignored)


def test_text_in_a_folder_is_read_if_there_is_nothing_else(tmp_path: Path) -> None:
    for name in ("b.md", "a.txt"):
        (tmp_path / name).write_text(name)
    assert [row.value["text"] for row in open_source(str(tmp_path)) if isinstance(row, Row)] == ["a.txt", "b.md"]
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}'))
    assert [Path(name).name for name in locate(str(tmp_path)).files] == ["c.jsonl.gz"]


def test_links_are_followed_and_a_circle_of_them_ends(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.jsonl").write_text('{"text": "x"}')
    (tmp_path / "elsewhere/up").symlink_to(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    assert len(open_source(str(tmp_path / "data"))) == 1


def test_several_paths_are_read_in_their_order_and_a_file_named_twice_once(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    notes: list[str] = []
    paths = [str(tmp_path / name) for name in ("c.jsonl", "[ab].jsonl", "b.jsonl")]
    source = open_source(paths, say=notes.append)
    assert [row.value["text"] for row in source if isinstance(row, Row)] == ["c", "a", "b"]
    assert notes == source.notes == [f"{paths[2]} is named twice and read once"]


def test_everything_wrong_with_the_paths_is_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[{]")
    (tmp_path / "b.csv").write_text("a,a\n1,2\n")
    with pytest.raises(DataError) as caught:
        open_source([str(tmp_path / "a.json"), str(tmp_path / "b.csv")])
    assert [problem.code for problem in caught.value.problems] == ["data.bad-json-array", "data.bad-csv"]
    with pytest.raises(DataError) as caught:
        open_source([str(tmp_path / "none.json"), str(tmp_path / "b.csv"), str(tmp_path / "*.xyz")])
    assert [problem.code for problem in caught.value.problems] == ["data.not-found", "data.not-found"]


def test_a_glob_is_the_files_that_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("part-1.jsonl", "part-2.jsonl", "other.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}')
    source = open_source(str(tmp_path / "part-*.jsonl"))
    assert [Path(path).name for path in source.paths] == ["part-1.jsonl", "part-2.jsonl"]
    monkeypatch.chdir(tmp_path)
    assert open_source("part-[2].jsonl").paths == ("part-2.jsonl",)
    assert fails("part-*.json").code == "data.not-found"


def test_more_files_than_may_be_open_stay_readable(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"text": str(number)}))
    source = open_source(str(tmp_path), limits=ReaderLimits(open_files=2))
    for number in (4, 0, 3, 1, 2, 4, 0):
        assert source.row(number).value["text"] == str(number)
    assert len(source._open) == 2


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n')
    source = open_source(str(path))
    path.write_text('{"text": "x"}\n{"text": "y"}\n')
    with pytest.raises(DataError, match="changed while it was read"):
        source.row(0)


def test_a_missing_path_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "docstrings.jsonl").write_text("{}")
    problem = fails(tmp_path / "docstring.jsonl")
    assert problem.code == "data.not-found" and str(tmp_path / "docstrings.jsonl") in str(problem.hint)
    assert "docstrings.jsonl" in str(fails(tmp_path / "zzz").hint)
    deeper = fails(tmp_path / "no" / "such" / "file.jsonl")
    assert deeper.code == "data.not-found" and str(tmp_path / "no") in deeper.message


def test_an_empty_file_or_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    assert fails(tmp_path / "none").code == "data.empty-folder"
    (tmp_path / "none" / "notes.xlsx").write_text("a,b\n")
    problem = fails(tmp_path / "none")
    assert problem.code == "data.empty-folder" and "notes.xlsx" in problem.message and "read_excel" in str(problem.hint)
    for content in ("", "\n \n\r\n"):
        (tmp_path / "e.jsonl").write_text(content)
        assert fails(tmp_path / "e.jsonl").code == "data.empty-file"


@pytest.mark.parametrize("name", ["a.xlsx", "a.tar.gz", "a.zip", "a.jsonl.xz", "a.pdf"])
def test_other_kinds_of_files_are_refused_with_a_command_that_converts_them(name: str, tmp_path: Path) -> None:
    content = {".gz": gzip.compress(b"x"), ".xz": lzma.compress(b"x")}.get(Path(name).suffix, b"x")
    (tmp_path / name).write_bytes(content)
    if name == "a.zip":
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("rows.jsonl", "{}")
    problem = fails(tmp_path / name)
    assert problem.code == "data.unsupported-file" and ".jsonl" in problem.message
    assert any(word in str(problem.hint) for word in ("python3 -c", "tar -xf", "zipfile -e", "xz", "cp "))


def test_the_command_that_extracts_rows_from_an_object_works(tmp_path: Path) -> None:
    (tmp_path / "a b.json").write_text('{\n  "version": "1",\n  "rows": [{"text": "x"}, {"text": "y"}]\n}')
    assert os.system(str(fails(tmp_path / "a b.json").hint)) == 0
    assert [row.value["text"] for row in open_source(str(tmp_path / "a b-rows.json")) if isinstance(row, Row)] == ["x", "y"]


def test_a_json_file_of_one_object_a_line_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "x"}\n{"text": "y"}\n')
    assert len(open_source(str(tmp_path / "a.json"))) == 2


def test_utf16_and_pipes_are_reported(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}', encoding="utf-16")
    problem = fails(tmp_path / "a.jsonl")
    assert problem.code == "data.not-utf8" and "iconv -f UTF-16" in str(problem.hint)
    os.mkfifo(tmp_path / "b.jsonl")
    assert fails(tmp_path / "b.jsonl").code == "data.unsupported-file"
    (tmp_path / "c.jsonl").symlink_to("gone")
    dangling = fails(tmp_path / "c.jsonl")
    assert dangling.code == "data.not-found" and str(tmp_path / "gone") in dangling.message and dangling.hint


def test_an_empty_path_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    for path in ("", " "):
        with pytest.raises(DataError) as caught:
            open_source(path)
        assert caught.value.problems[0].code == "data.not-found" and "llamahome data sample" in str(caught.value.problems[0].hint)
    sample = tmp_path / "data/training/raw/docstrings.jsonl"
    sample.parent.mkdir(parents=True)
    sample.write_text('{"text": "x"}\n')
    with pytest.raises(DataError) as caught:
        open_source("")
    assert caught.value.problems[0].hint == "data/training/raw/docstrings.jsonl is there", "it would not be written again"


def test_a_file_named_twice_is_read_once_and_a_note_says_so(tmp_path: Path) -> None:
    path, notes = str(tmp_path / "a.jsonl"), []
    Path(path).write_text('{"text": "x"}\n')
    assert len(open_source((path, path), say=notes.append)) == 1 and notes == [f"{path} is named twice and read once"]


def test_rows_of_one_line_have_their_number_in_the_place(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"a": 2}, {"a": nul}]')
    source = open_source(str(path))
    bad = source.parsed(2)
    assert [source.row(number).where for number in (0, 1)] == [f"{path}:1", f"{path}:1 (row 2)"]
    assert isinstance(bad, Problem) and bad.where == f"{path}:1 (row 3)"


BROKEN = [
    (b'{"messages": [{"role": "user", "content": "What is', "data.bad-json", "unexpected end of data at column 50"),
    (b'{"a": 1', "data.bad-json", "unexpected end of data at column 7"),
    (b'{"a": 1,}', "data.bad-json", "at column"),
    (b'{"a": 1} {"b": 2}', "data.bad-json", "extra data at column 10"),
    (b"{'a': 1}", "data.bad-json", "property name enclosed in double quotes at column 2"),
    (b"[NaN]", "data.bad-json", "NaN is not a JSON value"),
    (b'{"a": tru}', "data.bad-json", "expecting value at column 7"),
    (b'{"a": "x\ty"}', "data.bad-json", "control character"),
    (b"hello", "data.bad-json", "expecting value at column 1"),
    (b"[", "data.bad-json", "unexpected end"),
    (b"[" * 100_000, "data.bad-json", "nested too deeply"),
    (b'{"a": ' + b"1" * 5000 + b"}", "data.bad-json", "too many digits"),
    (b"[1, 2]", "data.not-an-object", "this is a list"),
    (b'"text"', "data.not-an-object", "this is a string"),
    (b"null", "data.not-an-object", "this is null"),
    (b"true", "data.not-an-object", "this is true or false"),
    (b"3.5", "data.not-an-object", "this is a number"),
    (b'{"a": "caf\xe9"}', "data.not-utf8", "byte 0xe9 at byte 11"),
    (b'{"a": "x\0y"}', "data.nul-byte", "NUL byte at column 9"),
    (b'{"a": "\\ud83d"}', "data.lone-surrogate", "surrogate"),
]


@pytest.mark.parametrize(("raw", "code", "words"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_line_is_reported_with_its_place(raw: bytes, code: str, words: str) -> None:
    problem = parse_row(raw, path="dir/mine.jsonl", line=37, index=36)
    assert isinstance(problem, Problem)
    assert (problem.code, problem.where) == (code, "dir/mine.jsonl:37")
    assert words in problem.message
    assert problem.excerpt is not None and problem.excerpt.startswith("37 | ") and len(problem.excerpt) < 120


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60))
def test_any_bytes_give_a_row_or_a_problem(raw: bytes) -> None:
    parsed = parse_row(raw, path="a.jsonl", line=1, index=0)
    assert isinstance(parsed, Row | Problem)
    if isinstance(parsed, Problem):
        parsed.render().encode("utf-8")


def test_the_record_of_a_cleaned_copy_is_not_data(tmp_path: Path) -> None:
    (tmp_path / "clean.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    (tmp_path / "clean.jsonl.changes.jsonl").write_text('{"what": "mended"}\n', encoding="utf-8")
    source = open_source(str(tmp_path))
    assert [Path(path).name for path in source.paths] == ["clean.jsonl"]
    assert [Path(path).name for path in source.ignored] == ["clean.jsonl.changes.jsonl"]
