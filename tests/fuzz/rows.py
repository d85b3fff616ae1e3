"""Random bytes as data files, steered by which code they reach: reading them ends in rows or in told problems, never otherwise.

    python tests/fuzz/rows.py [--seconds 60] [--kind jsonl|json|csv|tsv|txt]

Needs `pip install atheris` (libFuzzer for Python). Begins with the files of tests/corpus. An input that breaks the property, or takes
longer than ten seconds, is kept as ./crash-* or ./timeout-* and ends the run with a status that is not 0.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["llamahome.data"]):
    from llamahome.data.files.sources import open_source
    from llamahome.data.prepare import first_format
    from llamahome.data.records import Conversation, Row
    from llamahome.data.rows.formats import FORMATS, understand
from llamahome.errors import DataError, Problem

CORPUS = Path(__file__).resolve().parents[1] / "corpus"
SLOW = 10
"""Seconds that one input may take."""


def read(path: Path) -> None:
    """Read the file as training would: each row becomes a conversation or a problem that can be printed."""
    try:
        source = open_source(str(path))
        rows = source.parsed_range(range(len(source)))
        assert [source.parsed(number) for number in range(len(source))] == rows
        assert len(source.hashes()) == len(rows)
        detected = first_format(source, "auto").name
    except DataError as error:
        show(error.problems)
        return
    show(tuple(row for row in rows if isinstance(row, Problem)))
    for name in (detected, *FORMATS):
        for row in rows:
            found = understand(row, name) if isinstance(row, Row) else row
            assert isinstance(found, Conversation | Problem)
            show((found,) if isinstance(found, Problem) else ())


def show(problems: tuple[Problem, ...]) -> None:
    """What is told must be something that a terminal can show."""
    for problem in problems:
        problem.render(level="error").encode("utf-8")


def main() -> None:
    """Fuzz until the time is over."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--kind", choices=("jsonl", "json", "csv", "tsv", "txt"), default="jsonl")
    given = parser.parse_args()
    kept = Path.cwd()
    folder = Path(tempfile.mkdtemp())
    seeds = folder / "seeds"
    seeds.mkdir()
    for seed in CORPUS.glob(f"*.{given.kind}"):
        shutil.copy(seed, seeds)
    os.chdir(folder)
    path = folder / f"rows.{given.kind}"

    def once(content: bytes) -> None:
        path.write_bytes(content)
        read(path)

    limits = [f"-max_total_time={given.seconds}", f"-timeout={SLOW}", "-max_len=4096", "-print_final_stats=1", f"-artifact_prefix={kept}/"]
    atheris.Setup([sys.argv[0], *limits, str(seeds)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
