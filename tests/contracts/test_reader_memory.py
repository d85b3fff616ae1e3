"""No kind of file is loaded whole: to find the rows, hash them and read some takes a fraction of the file in memory."""

import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llamahome.data.files.guarded_file import ReaderLimits
from llamahome.data.files.sources import open_source

ROWS = [{"prompt": f"{number} " + "x" * 990, "completion": "y" * 1000} for number in range(2000)]
SIZE = 4_000_000
SMALL = ReaderLimits(
    block=1 << 16,
    batch=1 << 16,
    text_row=1 << 16,
    cached_file=0,
    buffered_numbers=1 << 10,
    decoded=1 << 19,
    row_group=1 << 20,
    copied_rows=50,
)
KINDS = ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet", "b.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst"]


def write(name: str) -> None:
    path, kind = Path(name), name.partition(".")[2]
    lines = "\n".join(json.dumps(row) for row in ROWS)
    if kind in ("jsonl", "txt"):
        path.write_text(lines)
    elif kind == "json":
        path.write_text("[" + lines.replace("\n", ",\n") + "]")
    elif kind == "csv":
        path.write_text("prompt,completion\n" + "".join(f'{row["prompt"]},"{row["completion"]}"\n' for row in ROWS))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=100 if name == "a.parquet" else 2000, use_dictionary=False)
    elif kind == "arrow":
        with pa.ipc.new_file(path, (table := pa.Table.from_pylist(ROWS)).schema) as writer:
            writer.write_table(table, max_chunksize=100)
    else:
        with pa.CompressedOutputStream(name, "gzip" if kind.endswith("gz") else "zstd") as stream:
            stream.write(lines.encode())


@pytest.mark.parametrize("name", KINDS)
def test_a_fraction_of_the_file_is_in_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(name)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        source = open_source(name, limits=SMALL)
        assert len(source) == len(source.hashes())
        for number in range(0, len(source), 7):
            source.row(number) if name != "a.txt" else source.parsed(number)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < SIZE / 4
    assert pa.total_allocated_bytes() - before < SIZE / 4
