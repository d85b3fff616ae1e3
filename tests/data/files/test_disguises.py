"""A file that is not what its name says is reported as what it is, and the hint's command makes a file that is read."""

import bz2
import gzip
import io
import json
import lzma
import sqlite3
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llamahome.data.files.sources import open_source
from llamahome.errors import DataError, Problem
from llamahome.lfs import is_pointer

ROWS = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(20)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"3f" * 32 + b"\nsize 48211\n"
TABLE = pa.Table.from_pylist(ROWS)


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(TABLE, sink)
    return sink.getvalue()


def arrow() -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return sink.getvalue()


def zipped(*names: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name in names:
            archive.writestr(name, TEXT)
    return sink.getvalue()


def tarred(content: bytes = TEXT) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        info = tarfile.TarInfo("rows.jsonl")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def database(folder: Path) -> bytes:
    place = folder / "made.db"
    with sqlite3.connect(place) as base:
        base.execute('create table "my rows" (prompt, completion)')
        base.executemany('insert into "my rows" values (:prompt, :completion)', ROWS)
    base.close()
    content = place.read_bytes()
    place.unlink()
    return content


def zstd() -> bytes:
    return bytes(pa.compress(TEXT, "zstd", asbytes=True))


REAL = {
    "gzip": gzip.compress(TEXT),
    "zstd": zstd(),
    "bzip2": bz2.compress(TEXT),
    "xz": lzma.compress(TEXT),
    "zip": zipped("rows.jsonl"),
    "tar": tarred(),
    "Parquet": parquet(),
    "Arrow": arrow(),
}


def refusal(path: Path) -> Problem:
    with pytest.raises(DataError) as raised:
        open_source(str(path))
    (problem,) = raised.value.problems
    return problem


def mended(folder: Path, command: str) -> list[dict[str, object]]:
    """The rows that are there once the command was typed in the folder."""
    before = set(folder.rglob("*"))
    subprocess.run(command, shell=True, cwd=folder, check=True, capture_output=True)
    (made,) = [path for path in folder.rglob("*") if path not in before and path.is_file() and "processed" not in path.parts]
    source = open_source(str(made))
    return [source.row(number).value for number in range(len(source))]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", [*REAL, "SQLite"])
@pytest.mark.parametrize("name", ["it's rows.jsonl", "rows.csv", "rows.json", "rows.txt", "rows"])
def test_another_kind_under_the_name_of_a_text_is_reported_and_the_hint_makes_rows(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / name).write_bytes(REAL[kind] if kind in REAL else database(tmp_path))
    problem = refusal(Path(name))
    assert problem.code == "data.other-kind" and kind in problem.message
    assert problem.hint is not None
    if name.endswith(".jsonl") or kind in ("Parquet", "Arrow", "SQLite", "zip", "tar"):
        assert mended(tmp_path, problem.hint) == ROWS


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
@pytest.mark.parametrize("kind", ["Parquet", "Arrow", "gzip"])
def test_another_kind_under_the_name_of_a_table_is_reported(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / name).write_bytes(REAL[kind])
    if name.endswith(kind.lower()):
        assert len(open_source(name)) == len(ROWS)
        return
    problem = refusal(Path(name))
    assert kind in problem.message
    if kind != "gzip":
        assert mended(tmp_path, str(problem.hint)) == ROWS


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet", "rows.arrow"])
def test_text_under_another_name_is_reported_and_the_hint_makes_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(TEXT)
    problem = refusal(Path(name))
    assert "it is text" in problem.message
    assert mended(tmp_path, str(problem.hint)) == ROWS


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.md", "a.parquet", "a.arrow", "a.jsonl.gz", "a.csv.zst", "a"]
)
def test_a_git_lfs_pointer_is_reported_instead_of_any_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(POINTER)
    assert is_pointer(name)
    for path in (Path(name), tmp_path / name):
        problem = refusal(path)
        assert problem.code == "data.lfs-pointer" and "git lfs pull" in str(problem.hint)


def test_text_that_begins_like_another_kind_is_read(tmp_path: Path) -> None:
    for begin in (
        "PAR1 is a mark",
        "ORCs are many",
        "BZh is one",
        "ARROW1",
        "GGUF",
        "version https://git-lfs.github.com/spec/v1 is a line",
    ):
        (tmp_path / "a.txt").write_text(begin + "\n")
        assert open_source("a.txt").row(0).value == {"text": begin + "\n"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonlines", TEXT),
        ("rows.dat", TEXT),
        ("rows.log", json.dumps(ROWS).encode()),
        ("rows.psv", b"prompt|completion\na|b\nc|d\n"),
        ("rows.tab", b"prompt\tcompletion\na\tb\nc\td\n"),
        ("rows.feather", arrow()),
        ("rows.bin", parquet()),
        ("rows.archive", gzip.compress(TEXT)),
        ("rows.dat.gz", gzip.compress(TEXT)),
        ("rows.packed", bz2.compress(TEXT)),
    ],
)
def test_the_hint_for_an_unread_name_keeps_rows_as_rows(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "rows.jsonl").write_text("not to be written over")
    hint = str(refusal(tmp_path / name).hint)
    before = {*tmp_path.iterdir()}
    subprocess.run(hint.split("   ")[0], shell=True, check=True, cwd=tmp_path)
    (made,) = {*tmp_path.iterdir()} - before
    rows = [getattr(row, "value", row) for row in open_source(str(made))]
    assert {*rows[0]} == {"prompt", "completion"} and len(rows) > 1
    assert (tmp_path / "rows.jsonl").read_text() == "not to be written over"


@pytest.mark.parametrize("name", ["rows.pkl", "rows.npy", "rows.html", "rows.docx"])
def test_no_hint_makes_a_text_of_a_file_that_is_not_text(tmp_path: Path, name: str) -> None:
    inside = {
        "rows.pkl": b"\x80\x04\x95ab",
        "rows.npy": b"\x93NUMPY\x01\0",
        "rows.html": b"<p>Hello</p>\n",
        "rows.docx": zipped("word/document.xml"),
    }
    (tmp_path / name).write_bytes(inside[name])
    assert refusal(tmp_path / name).hint is None


def test_an_arrow_stream_is_recognised_under_any_name(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    (tmp_path / "rows.jsonl").write_bytes(sink.getvalue())
    problem = refusal(tmp_path / "rows.jsonl")
    assert problem.code == "data.other-kind" and "Arrow" in problem.message
    subprocess.run(str(problem.hint), shell=True, check=True, cwd=tmp_path)
    assert len(open_source(str(tmp_path / "rows.arrow"))) == len(ROWS)


def test_json_lines_under_the_name_of_a_text_are_learned_as_text_and_a_note_says_so(tmp_path: Path) -> None:
    notes: list[str] = []
    for name, text in (("rows.txt", TEXT), ("prose.txt", b"{braces} are no rows\n" + TEXT)):
        (tmp_path / name).write_bytes(text)
        assert len(open_source(str(tmp_path / name), say=notes.append)) == 1
    (note,) = notes
    assert "rows.txt: the lines are JSON objects" in note
    subprocess.run(note.rpartition(": ")[2], shell=True, check=True, cwd=tmp_path)
    assert len(open_source(str(tmp_path / "rows.jsonl"))) == len(ROWS)
