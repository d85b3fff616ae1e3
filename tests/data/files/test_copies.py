"""Archives and large Parquet files are copied once to the cache: complete, for one state of the file, with room left on the disk."""

import gzip
import json
import os
import random
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llamahome.data.files.columnar import DecodedGroups
from llamahome.data.files.guarded_file import ReaderLimits
from llamahome.data.files.sources import Source, open_source
from llamahome.errors import DataError, MachineError

SPOOL = Path("data/training/processed/spool")
ROWS = [{"text": f"row {number} " + "x" * 50} for number in range(200)]


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_archive(rows: list[dict[str, str]] = ROWS) -> str:
    Path("a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return "a.jsonl.gz"


def write_parquet(rows: list[dict[str, str]] = ROWS) -> str:
    pq.write_table(pa.Table.from_pylist(rows), "a.parquet", row_group_size=10)
    return "a.parquet"


def copies() -> list[str]:
    return sorted(path.name for path in SPOOL.iterdir())


def texts(source: Source, numbers: list[int]) -> list[dict[str, str]]:
    return [source.row(number).value for number in numbers]


def test_an_archive_is_unpacked_once_and_its_rows_are_named_by_it() -> None:
    notes: list[str] = []
    source = open_source(write_archive(), say=notes.append)
    assert source.row(7).where == "a.jsonl.gz:8" and source.paths == ("a.jsonl.gz",)
    (copy,) = copies()
    assert len(notes) == 1 and "a.jsonl.gz" in notes[0]
    before = (SPOOL / copy).stat()
    assert open_source("a.jsonl.gz", say=notes.append).row(7).value == ROWS[7]
    assert (SPOOL / copy).stat() == before and len(notes) == 1


def test_consecutive_members_of_an_archive_are_all_read() -> None:
    one, two = (gzip.compress(json.dumps(row).encode() + b"\n") for row in ROWS[:2])
    Path("a.jsonl.gz").write_bytes(one + two)
    assert texts(open_source("a.jsonl.gz"), [0, 1]) == ROWS[:2]


def test_another_state_of_the_archive_replaces_the_copy_and_a_damaged_copy_is_made_again() -> None:
    open_source(write_archive())
    (first,) = copies()
    assert open_source(write_archive(ROWS[:3])).row(2).value == ROWS[2]
    (second,) = copies()
    assert second != first
    os.truncate(SPOOL / second, 50)
    assert len(open_source("a.jsonl.gz")) == 3
    assert second in copies()


def test_what_killed_processes_left_is_removed_and_what_others_write_stays() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    names = {process.pid: f"b.jsonl.gz-0123.{process.pid}.tmp", os.getppid(): f"b.jsonl.gz-0123.{os.getppid()}.tmp"}
    index = SPOOL.with_name("index")
    for folder in (SPOOL, index):
        folder.mkdir(parents=True)
        for name in names.values():
            (folder / name).write_bytes(b"half")
    open_source(write_archive(), limits=ReaderLimits(cached_file=0))
    for folder in (SPOOL, index):
        left = {path.name for path in folder.iterdir()}
        assert names[os.getppid()] in left and names[process.pid] not in left and len(left) > 1, folder


def test_without_room_nothing_is_left_and_the_disk_is_not_filled() -> None:
    with pytest.raises(MachineError) as caught:
        open_source(write_archive(), limits=ReaderLimits(free_disk=1 << 62))
    (problem,) = caught.value.problems
    assert problem.code == "machine.disk-full" and "gzip -dc a.jsonl.gz > a.jsonl" in str(problem.hint)
    assert [name for name in copies() if not name.endswith(".lock")] == []


def test_a_write_that_fails_in_the_middle_leaves_nothing() -> None:
    resource, signal = pytest.importorskip("resource"), pytest.importorskip("signal")
    path = write_archive()
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(MachineError) as caught:
            open_source(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert caught.value.problems[0].code == "machine.cache-not-writable"
    assert [name for name in copies() if not name.endswith(".lock")] == []
    assert len(open_source(path)) == len(ROWS)


def test_a_cache_that_cannot_be_written_is_reported_with_a_command_that_unpacks_elsewhere() -> None:
    Path("data").write_text("a file where the folder should be")
    with pytest.raises(MachineError) as caught:
        open_source(write_archive())
    assert caught.value.problems[0].code == "machine.cache-not-writable" and "gzip -dc" in str(caught.value.problems[0].hint)


def test_several_threads_make_one_copy() -> None:
    path, made = write_archive(), []
    threads = [threading.Thread(target=lambda: made.append(open_source(path).row(5).value)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [ROWS[5]] * 6
    assert len([name for name in copies() if not name.endswith(".lock")]) == 1


def test_a_parquet_file_is_read_in_place_in_order_and_copied_if_rows_are_read_in_no_order() -> None:
    source = open_source(write_parquet(), limits=ReaderLimits(decoded=2000))
    assert texts(source, list(range(200))) == ROWS and len(source.hashes()) == 200
    assert not SPOOL.exists()
    numbers = list(range(200))
    random.Random(0).shuffle(numbers)
    assert texts(source, numbers) == [ROWS[number] for number in numbers]
    assert len(copies()) == 1 and "as Arrow" in source.notes[0]
    os.utime("a.parquet", ns=(1, 1))
    with pytest.raises(DataError, match="changed while it was read"):
        source.row(3)


def test_a_parquet_file_that_fits_into_memory_is_never_copied() -> None:
    source = open_source(write_parquet())
    numbers = list(range(200)) * 2
    random.Random(0).shuffle(numbers)
    assert texts(source, numbers) == [ROWS[number] for number in numbers] and not SPOOL.exists()


def test_decoded_groups_are_bounded_over_all_files() -> None:
    decoded = DecodedGroups(2000)
    table = pa.Table.from_pylist(ROWS[:10])
    for group in range(20):
        assert decoded.get("a.parquet", group, lambda: table) is table
        assert decoded.size <= 2000 and decoded.size == sum(each.nbytes for each in decoded.groups.values())
    assert 0 < len(decoded.groups) < 20


def test_large_row_groups_are_copied_at_once_and_without_room_the_run_does_not_start() -> None:
    limits = ReaderLimits(row_group=100)
    assert texts(open_source(write_parquet(), limits=limits), [150, 3]) == [ROWS[150], ROWS[3]] and len(copies()) == 1
    with pytest.raises(MachineError, match="no room"):
        open_source(write_parquet(ROWS[:50]), limits=replace(limits, free_disk=1 << 62))


def test_without_room_for_a_copy_rows_in_no_order_are_read_in_place_and_a_note_says_so() -> None:
    source = open_source(write_parquet(), limits=ReaderLimits(decoded=2000, free_disk=1 << 62))
    numbers = list(range(200))
    random.Random(0).shuffle(numbers)
    assert texts(source, numbers) == [ROWS[number] for number in numbers]
    assert len(source.notes) == 1 or [note for note in source.notes if "a row group for each row" in note]
