"""Files that are broken as a whole, each with the code, the line and the words of its error."""

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llamahome.data.files.sources import open_source
from llamahome.errors import DataError, Problem

ROWS = [{"text": f"row {number} " + "x" * 40} for number in range(30)]


def parquet(rows: list[dict[str, object]] = ROWS) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=10, compression="none", use_dictionary=False)
    return sink.getvalue()


def arrow(rows: list[dict[str, object]] = ROWS, *, stream: bool) -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :]


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FILES = [
    ("a.json", b'[{"a": 1}, {"a": 2}', "data.bad-json-array", "a.json:1", "not closed"),
    ("a.json", b'[\n{"a": 1},\n{"a": 2},\n', "data.bad-json-array", "a.json:3", "not closed"),
    ("a.json", b'[\n{"a": 1},\n{"a": "tor', "data.bad-json-array", "a.json:3", "breaks here: not valid JSON: unexpected end of data"),
    ("a.json", b'[\n{"a": 1},\n{"a": 2 "b"},\n{"a": 3}\n', "data.bad-json-array", "a.json:3", "breaks here: not valid JSON: expecting"),
    (
        "a.json",
        b'[{"a": 1},\n{"a": "torn},\n{"a": "b"}]',
        "data.bad-json-array",
        "a.json:2",
        "breaks here: not valid JSON: invalid control",
    ),
    ("a.json", b'[{"a": 1},\n{"a": 2}]\n[{"a": 3}]', "data.bad-json-array", "a.json:2", "something follows the end"),
    ("a.json", b'[{"a": 1},\n{"a": 2},\n]', "data.bad-json-array", "a.json:2", "there is a comma before the end"),
    ("a.json", b"[1, 2, 3]", "data.bad-json-array", "a.json:1", "not an object"),
    ("a.json", b'[{"a": 1}, "x"]', "data.bad-json-array", "a.json:1", "not an object"),
    ("a.json", b"[", "data.bad-json-array", "a.json:1", "not closed"),
    ("a.json", b'[{"a": 1}}]', "data.bad-json-array", "a.json:1", "something follows"),
    ("a.json", b'\n\n{\n "rows": [{"a": 1}]}', "data.bad-json-array", "a.json:3", "an object over several lines"),
    ("a.json", b"hello", "data.bad-json-array", "a.json:1", "neither an array nor objects"),
    ("a.json", '[{"a": 1}]'.encode("utf-16"), "data.not-utf8", "a.json:1", "UTF-16"),
    ("a.csv", "a,b\n".encode("utf-16"), "data.not-utf8", "a.csv:1", "UTF-16"),
    ("a.csv", b"a,a\n1,2\n", "data.bad-csv", "a.csv:1", "two columns are named a"),
    ("a.csv", b"\n\na,,c\n1,2,3\n", "data.bad-csv", "a.csv:3", "column 2 of 3 has no name"),
    ("a.csv", b'a,b\n1,2\n3,"x\n4,5\n6,7\n', "data.bad-csv", "a.csv:3", "opened here and never closed"),
    ("a.csv", b'a,b\n1,5" x\n3,"x\n4,5\n6,7\n', "data.bad-csv", "a.csv:3", "opened here and never closed"),
    ("a.csv", b'a,"b\n1,2\n', "data.bad-csv", "a.csv:1", "opened and not closed"),
    ("a.csv", b"a,caf\xe9\n1,2\n", "data.not-utf8", "a.csv:1", "0xe9"),
    ("a.csv", b"a,b\0\n1,2\n", "data.nul-byte", "a.csv:1", "NUL"),
    ("a.csv", b"a,b\r1,2\r", "data.bad-csv", "a.csv:1", "CR"),
    ("a.csv", b"x" * 70_000, "data.bad-csv", "a.csv:1", "64 KiB"),
    ("a.parquet", b"", "data.bad-parquet", "a.parquet", "not a whole Parquet file"),
    ("a.parquet", b"nonsense" * 9, "data.bad-parquet", "a.parquet", "not a whole Parquet file"),
    ("a.parquet", parquet()[:-30], "data.bad-parquet", "a.parquet", "not a whole Parquet file"),
    ("a.arrow", b"", "data.bad-arrow", "a.arrow", "too short"),
    ("a.arrow", b"nonsense" * 9, "data.bad-arrow", "a.arrow", "ends too early"),
    ("a.arrow", arrow(stream=True)[:-8], "data.bad-arrow", "a.arrow", "ends too early"),
    ("a.arrow", arrow(stream=False)[:-30], "data.bad-arrow", "a.arrow", "not a whole Arrow file"),
    ("a.jsonl.gz", gzip.compress(JSONL)[:-30], "data.bad-gzip", "a.jsonl.gz", "ends too early"),
    ("a.jsonl.gz", JSONL, "data.bad-gzip", "a.jsonl.gz", "cannot be unpacked"),
    ("a.jsonl.gz", flipped(gzip.compress(JSONL), 30), "data.bad-gzip", "a.jsonl.gz", "cannot be unpacked"),
    ("a.csv.zst", pa.compress(JSONL, "zstd", asbytes=True)[:-3], "data.bad-zst", "a.csv.zst", "ends too early"),
    ("a.csv.zst", JSONL, "data.bad-zst", "a.csv.zst", "cannot be unpacked"),
    ("a.jsonl.gz", b"", "data.empty-file", "a.jsonl.gz", "no rows"),
    ("a.txt", b"", "data.empty-file", "a.txt", "no rows"),
]


@pytest.mark.parametrize(("name", "raw", "code", "where", "words"), FILES, ids=[f"{number}-{case[0]}" for number, case in enumerate(FILES)])
def test_a_broken_file_is_reported_with_its_place(
    name: str, raw: bytes, code: str, where: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(raw)
    with pytest.raises(DataError) as caught:
        open_source(name)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == (code, where)
    assert words in problem.message and "\n" not in problem.message
    assert len(problem.message) < 300
    assert not list(Path().rglob("*.tmp"))


ROW_FILES = [
    ("a.json", b'[{"a": 1},\n\n {"a": 2, b},\n{"a": 3}]', 1, "data.bad-json", "a.json:3", "at column 10 of the element"),
    ("a.json", b'[{"a": 1}\n{"a": 2}, {"a": 3}]', 1, "data.bad-json-array", "a.json:2", "a comma is missing"),
    ("a.json", b'[{"a": 1},,{"a": 2}, {"a": 3}]', 1, "data.bad-json", "a.json:1 (row 2)", "expecting value"),
    ("a.json", b'[{"a": 1},\n["x"], {"a": 3}]', 1, "data.not-an-object", "a.json:2", "this is a list"),
    ("a.json", b'[{"a": 1},\n{"a":\n "caf\xe9"}, {"a": 3}]', 1, "data.not-utf8", "a.json:3", "byte 0xe9 at byte 6"),
    ("a.json", b'[{"a": 1},\n{"a":\n "x\0"}, {"a": 3}]', 1, "data.nul-byte", "a.json:3", "column 4"),
    ("a.csv", b"a,b\n1,2\n1,2,3\n5,6\n", 1, "data.bad-csv", "a.csv:3", "3 fields, the first line names 2 columns (a, b)"),
    ("a.csv", b"a,b\n1,2\n1\n5,6\n", 1, "data.bad-csv", "a.csv:3", "1 field, the first line names 2 columns"),
    ("a.csv", b'a,b\n1,"x\ny"\n1,"2"3\n5,6\n', 1, "data.bad-csv", "a.csv:4", "after the closing quote"),
    ("a.csv", b"a,b\n1,2\n1,caf\xe9\n5,6\n", 1, "data.not-utf8", "a.csv:3", "0xe9"),
    ("a.csv", b"a,b\n1,2\n1,\0\n5,6\n", 1, "data.nul-byte", "a.csv:3", "NUL"),
    ("a.csv", b"messages,b\n1,2\n[oops,3\n5,6\n", 1, "data.bad-csv", "a.csv:3", "a list that is not JSON"),
    ("a.tsv", b"a\tb\n1\t2\n1 2\n5\t6\n", 1, "data.bad-csv", "a.tsv:3", "1 field"),
    (
        "a.parquet",
        parquet([{"messages": "[]"}, {"messages": "[oops"}, {"messages": "[]"}]),
        1,
        "data.bad-parquet",
        "a.parquet:row 2",
        "JSON",
    ),
    ("a.txt", b"x\ny caf\xe9", 0, "data.not-utf8", "a.txt:2", "byte 0xe9 at byte 6"),
]


@pytest.mark.parametrize(
    ("name", "raw", "number", "code", "where", "words"), ROW_FILES, ids=[f"{number}-{case[0]}" for number, case in enumerate(ROW_FILES)]
)
def test_a_broken_row_is_reported_and_the_others_are_read(
    name: str, raw: bytes, number: int, code: str, where: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(raw)
    source = open_source(name)
    rows = list(source)
    bad = rows[number]
    assert isinstance(bad, Problem) and (bad.code, bad.where) == (code, where) and words in bad.message
    assert len(rows) == (1 if name == "a.txt" else 3) and sum(isinstance(row, Problem) for row in rows) == 1
    assert len(set(source.hashes().tolist())) >= 1


def test_a_row_group_that_cannot_be_decoded_is_reported_with_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=10, compression="zstd")
    raw = sink.getvalue()
    begin = pq.ParquetFile(io.BytesIO(raw)).metadata.row_group(1).column(0).dictionary_page_offset
    Path("a.parquet").write_bytes(raw[: begin + 12] + bytes(40) + raw[begin + 52 :])
    source = open_source("a.parquet")
    assert source.row(9).value == ROWS[9] and source.row(20).value == ROWS[20]
    with pytest.raises(DataError) as caught:
        source.row(15)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("data.bad-parquet", "a.parquet:row 11") and "rows 11 to 20" in problem.message


def test_two_columns_of_one_name_are_refused_in_parquet_too(tmp_path: Path) -> None:
    pq.write_table(pa.table([pa.array(["x"]), pa.array(["y"])], names=["a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="two columns are named a"):
        open_source(str(tmp_path / "a.parquet"))
