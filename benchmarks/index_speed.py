"""Measures how fast the rows of a file are indexed and hashed: prints one JSON object.

    python benchmarks/index_speed.py [--mb 500] [--kind jsonl|json|csv]

Writes a file of chats to a temporary folder, reads it once so that it is in the page cache, and measures: indexing (the best of three),
opening the file with an existing index, hashing, and reading random rows. The folder is removed.
"""

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from llamahome.data.files.sources import open_source

_READ = 20_000
_TEXT = "the model reads every row of the file in an order that is computed and answers with a sentence about it"


def write(path: Path, size: int) -> int:
    """Write rows of about 700 bytes until the file has `size` bytes; return their number."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(_TEXT.split(), k=rng.randint(20, 200))) for _ in range(2000)]
    count = 0
    with path.open("w", encoding="utf-8") as file:
        file.write({".json": "[", ".csv": "prompt,completion\n"}.get(path.suffix, ""))
        while file.tell() < size:
            lines = []
            for number in range(len(texts)):
                question, answer = texts[number], texts[rng.randrange(len(texts))] + '\n"so it is."'
                if path.suffix == ".csv":
                    quoted = answer.replace('"', '""')
                    lines.append(f'{question},"{quoted}"\n')
                else:
                    row = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
                    lines.append(json.dumps(row) + "\n")
            if path.suffix == ".json":
                lines = [("" if count + number == 0 else ",") + line for number, line in enumerate(lines)]
            file.writelines(lines)
            count += len(lines)
        file.write("]" if path.suffix == ".json" else "")
    return count


def timed(work: Callable[[], object]) -> float:
    """Seconds of one run of `work`."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measures how fast the rows of a file are indexed and hashed.")
    parser.add_argument("--mb", type=int, default=500)
    parser.add_argument("--kind", choices=("jsonl", "json", "csv"), default="jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the index is written below the working directory
        path = Path(f"rows.{options.kind}")
        rows = write(path, options.mb * 10**6)
        megabytes = path.stat().st_size / 1e6
        timed(lambda: _read_through(path))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        indexing = min(timed(lambda: _index(path)) for _ in range(3))
        reopening = timed(lambda: open_source(str(path)))
        source = open_source(str(path))
        assert len(source) == rows
        hashing = timed(source.hashes)
        numbers = [random.Random(1).randrange(rows) for _ in range(_READ)]
        reading = timed(lambda: [source.row(number) for number in numbers])
        index_bytes = sum(file.stat().st_size for file in Path("data/training/processed/index").iterdir())
        result = {
            "kind": options.kind,
            "megabytes": round(megabytes),
            "rows": rows,
            "index_mb_per_s": round(megabytes / indexing),
            "start_from_kept_index_ms": round(reopening * 1e3, 1),
            "hash_mb_per_s": round(megabytes / hashing),
            "random_row_us": round(reading / _READ * 1e6, 1),
            "kept_bytes_per_row": round(index_bytes / rows, 1),
            "memory_grown_mb": round(
                (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (1 << 20 if sys.platform == "darwin" else 1e3)
            ),
        }
        os.chdir("/")
    print(json.dumps(result))


def _index(path: Path) -> None:
    shutil.rmtree("data", ignore_errors=True)
    open_source(str(path))


def _read_through(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            continue


if __name__ == "__main__":
    main()
