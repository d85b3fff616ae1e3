"""Rows that stand in two splits: to train on one and measure on the other measures what was learned by heart.

Rows are compared by the hashes of their content, so those of two kinds of files are never equal. Cost: one pass over the other files,
whose hashes are kept as those of any source.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamahome.data.files.sources import Source, open_source
from llamahome.data.files.splits import EVERYTHING
from llamahome.data.records import Row
from llamahome.data.steps.holdout import count_shared
from llamahome.errors import DataError
from llamahome.units import many, show_bytes

_BLOCK = 1 << 20
_COMPARED = 1 << 30
"""Bytes of another split that are read to compare it (1 GiB: seconds)."""


@dataclass(frozen=True)
class Overlap:
    """Rows of one source that stand in another too."""

    count: int
    example: str = ""
    """Places of one of them, in both."""


def overlap(source: Source, hashes: NDArray[np.uint64], other: Source) -> Overlap:
    """How many rows of the source, whose hashes these are, stand in the other; with an example."""
    theirs = other.hashes()
    count = count_shared(hashes, theirs)
    for begin in range(0, len(hashes) if count else 0, _BLOCK):
        shared = np.flatnonzero(np.isin(hashes[begin : begin + _BLOCK], theirs))
        if len(shared):
            number = begin + int(shared[0])
            return Overlap(count, f"{_place(source, number)} is {_place(other, int(np.flatnonzero(theirs == hashes[number])[0]))}")
    return Overlap(count)


def overlaps_apart(source: Source, hashes: NDArray[np.uint64]) -> Iterator[tuple[str, str]]:
    """Of each split that is left alone: its name, and in words which rows it shares with the source, or why nobody looked."""
    for name, files in source.located.apart:
        size = sum(Path(path).stat().st_size for path in files)
        if size > _COMPARED:
            yield name, f"rows to train on were not sought in the split {name}, which is {show_bytes(size)}"
            continue
        try:
            other = open_source(files, wanted=EVERYTHING)
        except DataError as error:
            yield name, f"rows to train on were not sought in the split {name}: {error.problems[0].message}"
            continue
        found = overlap(source, hashes, other)
        other.close()
        if found.count:
            yield name, f"{many(found.count, 'row')} to train on in the split {name} too, for example {found.example}"


def _place(source: Source, number: int) -> str:
    row = source.parsed(number)
    return row.where if isinstance(row, Row) else row.where or source.paths[source.file_of(number)]
