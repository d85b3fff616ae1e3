"""Every kind of file passes the same checks: the same rows by number in any order, the same hashes, and a change is refused."""

import csv
import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llamahome.data.files.byte_ranges import digest
from llamahome.data.files.guarded_file import LIMITS, ReaderLimits
from llamahome.data.files.sources import Source, open_source
from llamahome.errors import DataError

Rows = list[dict[str, Any]]
TEXTS = ["plain", 'a "quoted", word', "two\nlines", "é 🙂 \\ \\\\", "", "00123", "[1, {", "tab\there", "]}", "\\", ' \\" ', "last"]


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows() -> Rows:
    return [{"prompt": text, "completion": f"{number} {text}"} for number, text in enumerate(TEXTS * 3)]


def jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def array(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def pretty(path: Path, rows: Rows) -> None:
    path.write_text("\n" + json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def table(path: Path, rows: Rows, *, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)


def tabs(path: Path, rows: Rows) -> None:
    table(path, rows, delimiter="\t")


def quoted(path: Path, rows: Rows) -> None:
    table(path, rows, quoting=csv.QUOTE_ALL)


def parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)


def arrow_file(path: Path, rows: Rows) -> None:
    with pa.ipc.new_file(path, (table := pa.Table.from_pylist(rows)).schema) as writer:
        writer.write_table(table, max_chunksize=7)


def arrow_stream(path: Path, rows: Rows) -> None:
    with pa.ipc.new_stream(path, (table := pa.Table.from_pylist(rows)).schema) as writer:
        writer.write_table(table, max_chunksize=7)


def packed(write: Callable[[Path, Rows], None], codec: str) -> Callable[[Path, Rows], None]:
    def write_packed(path: Path, rows: Rows) -> None:
        write(path, rows)
        raw = path.read_bytes()
        path.write_bytes(gzip.compress(raw) if codec == "gzip" else pa.compress(raw, "zstd", asbytes=True))

    return write_packed


KINDS: dict[str, Callable[[Path, Rows], None]] = {
    "a.jsonl": jsonl,
    "b.ndjson": jsonl,
    "a.json": array,
    "b.json": pretty,
    "a.csv": table,
    "b.csv": quoted,
    "a.tsv": tabs,
    "a.parquet": parquet,
    "a.arrow": arrow_file,
    "b.arrow": arrow_stream,
    "a.jsonl.gz": packed(jsonl, "gzip"),
    "a.jsonl.zst": packed(jsonl, "zstd"),
    "a.csv.gz": packed(table, "gzip"),
    "a.parquet.zst": packed(parquet, "zstd"),
    "a.json.gz": packed(pretty, "gzip"),
}
every_kind = pytest.mark.parametrize("name", KINDS)


CACHED = ReaderLimits(cached_file=0, buffered_numbers=8)
"""Even small files are cached, in small pieces."""


def opened(name: str, content: Rows, limits: ReaderLimits = LIMITS) -> Source:
    KINDS[name](Path(name), content)
    return open_source(name, limits=limits)


def values(source: Source, numbers: list[int]) -> Rows:
    return [source.row(number).value for number in numbers]


@every_kind
@pytest.mark.parametrize("block", [7, 64, 1 << 20])
def test_any_row_by_its_number_in_any_order(name: str, block: int) -> None:
    source = opened(name, rows(), ReaderLimits(block=block))
    numbers = list(range(len(source)))
    assert len(source) == len(rows())
    assert values(source, numbers) == rows()
    one_by_one = [source.row(number) for number in numbers]
    assert [row.index for row in one_by_one] == numbers
    assert source.parsed_range(range(3, len(numbers))) == one_by_one[3:] and source.parsed_range(range(0)) == []
    random.Random(0).shuffle(numbers)
    assert values(source, numbers) == [rows()[number] for number in numbers]
    source.close()
    assert values(source, numbers[:3]) == [rows()[number] for number in numbers[:3]]
    for outside in (-1, len(source)):
        with pytest.raises(IndexError):
            source.parsed(outside)


@every_kind
def test_hashes_are_of_the_content_and_the_same_each_time(name: str) -> None:
    source = opened(name, rows() + rows()[:2])
    hashes = source.hashes()
    assert hashes.dtype == np.uint64 and len(hashes) == len(source)
    assert hashes[0] == hashes[len(rows())] and hashes[1] == hashes[len(rows()) + 1]
    assert len(np.unique(hashes)) == len(rows())
    assert np.array_equal(open_source(name, limits=ReaderLimits(batch=50)).hashes(), hashes)
    assert hashes.tolist() == [int.from_bytes(digest(source_identity(source, number)), "big") for number in range(len(source))]


def source_identity(source: Source, number: int) -> bytes:
    value = json.dumps(source.row(number).value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return value.encode() if any(end in source.paths[0] for end in ("csv", "tsv", "parquet", "arrow")) else source.raw(number)


def test_a_table_hashes_alike_as_csv_tsv_parquet_and_arrow() -> None:
    hashes = [opened(name, rows()).hashes() for name in ("a.csv", "a.tsv", "a.parquet", "a.arrow", "b.arrow")]
    assert all(np.array_equal(one, hashes[0]) for one in hashes)


@every_kind
def test_a_file_that_changes_grows_shrinks_or_goes_is_refused(name: str) -> None:
    for change in ("touch", "grow", "cut", "gone"):
        source = opened(name, rows())
        source.row(0)
        if change == "touch":
            os.utime(name, ns=(1, 1))
        elif change == "grow":
            Path(name).write_bytes(Path(name).read_bytes() + b"\n")
        elif change == "cut":
            os.truncate(name, 10)
        else:
            Path(name).unlink()
        for read in (source.parsed, source.raw):
            with pytest.raises(DataError) as caught:
                read(len(source) - 1)
            assert [(problem.code, problem.where) for problem in caught.value.problems] == [("data.file-changed", name)]
        source.close()


@every_kind
def test_the_index_of_a_large_file_is_cached_and_used_only_if_it_is_undamaged(name: str) -> None:
    first = opened(name, rows(), CACHED)

    def again() -> Source:
        return open_source(name, limits=CACHED)

    expected, folder = first.hashes().copy(), Path("data/training/processed/index")
    kept = sorted(folder.iterdir())
    assert {path.suffix for path in kept} >= {".hashes"} and not [path for path in kept if path.suffix == ".tmp"]
    before = [path.stat().st_mtime_ns for path in kept]
    assert values(again(), [3, 0]) == [rows()[3], rows()[0]] and np.array_equal(again().hashes(), expected)
    assert [path.stat().st_mtime_ns for path in sorted(folder.iterdir())] == before
    for spoil in (lambda raw: raw[:-1], lambda raw: raw[:40] + bytes([raw[40] ^ 1]) + raw[41:], lambda raw: b"", lambda raw: raw + b"x"):
        for path in kept:
            path.write_bytes(spoil(path.read_bytes()) if path.stat().st_size > 40 else b"short")
        source = again()
        assert values(source, list(range(len(rows())))) == rows() and np.array_equal(source.hashes(), expected)
    for one, other in zip(kept, kept[1:] + kept[:1], strict=True):  # each file under the name of another
        other.write_bytes(one.read_bytes())
    assert np.array_equal(again().hashes(), expected)


@every_kind
def test_another_state_of_a_file_has_another_fingerprint_and_no_old_index(name: str) -> None:
    first = opened(name, rows(), CACHED)
    first.hashes()
    assert (
        open_source(name, limits=CACHED).fingerprint == open_source(os.path.abspath(name), limits=CACHED).fingerprint == first.fingerprint
    )
    changed = opened(name, rows()[1:], CACHED)
    assert changed.fingerprint != first.fingerprint
    assert values(changed, [0]) == [rows()[1]] and len(changed.hashes()) == len(rows()) - 1
    fingerprints = {path.name.rpartition(".")[0] for path in Path("data/training/processed/index").iterdir()}
    assert len(fingerprints) == 1


def test_an_index_that_cannot_be_cached_stays_in_memory_and_one_note_says_so() -> None:
    Path("data").write_text("a file where the folder should be")
    notes: list[str] = []
    for name in ("a.jsonl", "b.json", "a.csv", "a.parquet"):
        KINDS[name](Path(name), rows())
    source = open_source(["a.jsonl", "b.json", "a.csv", "a.parquet"], say=notes.append, limits=CACHED)
    assert len(source.hashes()) == 4 * len(rows()) and len(notes) == 1 and "the next start" in notes[0]
    assert values(source, [0, len(rows()) + 1]) == rows()[:2]
    source.close()
    assert values(source, [2]) == rows()[2:3]


def test_a_disk_that_fills_while_the_index_is_written_costs_only_the_cache() -> None:
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    jsonl(Path("a.jsonl"), rows())
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, limits[1]))
    try:
        source = open_source("a.jsonl", limits=ReaderLimits(cached_file=0, buffered_numbers=8, block=64))
        assert len(source.hashes()) == len(rows())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert values(source, list(range(len(rows())))) == rows() and len(source.notes) == 1
    assert [path.suffix for path in Path("data/training/processed/index").iterdir()] == [".lines"]


def test_many_files_of_all_kinds_are_one_source_with_few_of_them_open() -> None:
    Path("all").mkdir()
    for name, write in KINDS.items():
        write(Path("all") / name, rows())
    source = open_source("all", limits=ReaderLimits(open_files=2, cached_file=0))
    assert [Path(path).name for path in source.paths] == sorted(KINDS) and len(source) == len(KINDS) * len(rows())
    numbers = list(range(len(source)))
    assert [row.value for row in source.parsed_range(range(5, len(source)))] == (len(KINDS) * rows())[5:]
    random.Random(1).shuffle(numbers)
    descriptors = Path("/proc/self/fd")
    before = len(os.listdir(descriptors)) if descriptors.is_dir() else 0
    assert values(source, numbers[:150]) == [rows()[number % len(rows())] for number in numbers[:150]]
    assert not before or len(os.listdir(descriptors)) <= before + 10
    assert [source.file_of(number) for number in (0, len(rows()), len(source) - 1)] == [0, 1, len(KINDS) - 1]
    assert len(source.hashes()) == len(source)


LINES = {"a.jsonl": 1, "a.json": 0, "b.json": 4, "a.csv": 1, "a.tsv": 1}


@pytest.mark.parametrize("name", LINES)
def test_a_row_knows_its_line(name: str) -> None:
    simple = [{"prompt": f"p{number}", "completion": "c"} for number in range(5)]
    source = opened(name, simple)
    first = {"b.json": 3, "a.csv": 2, "a.tsv": 2}.get(name, 1)
    assert [source.row(number).line for number in range(5)] == [first + number * LINES[name] for number in range(5)]
    assert source.row(1).where == ("a.json:1 (row 2)" if name == "a.json" else f"{name}:{first + LINES[name]}")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.parquet.zst"])
def test_the_place_names_the_row_if_the_format_has_no_lines(name: str) -> None:
    source = opened(name, rows())
    assert source.row(16).where == f"{name}:row 17" and source.row(16).line == 17


@every_kind
def test_a_file_without_rows_is_reported(name: str) -> None:
    empty = {"jsonl": b"\n \n", "ndjson": b"\r\n", "json": b" [\n] ", "csv": b"a,b\n\n", "tsv": b"a\tb"}
    kind = name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    if kind in empty:
        raw = empty[kind]
    else:
        KINDS[f"a.{kind}"](Path("full"), rows())
        none = (pa.ipc.open_file("full").read_all() if kind == "arrow" else pq.read_table("full")).slice(0, 0)
        sink = pa.BufferOutputStream()
        if kind == "parquet":
            pq.write_table(none, sink)
        else:
            pa.ipc.new_file(sink, none.schema).close()
        raw = sink.getvalue().to_pybytes()
    raw = gzip.compress(raw) if name.endswith(".gz") else pa.compress(raw, "zstd", asbytes=True) if name.endswith(".zst") else raw
    Path(name).write_bytes(raw)
    with pytest.raises(DataError) as caught:
        open_source(name)
    assert [(problem.code, problem.where) for problem in caught.value.problems] == [("data.empty-file", name)]
