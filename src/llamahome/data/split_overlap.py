"""Finds rows that are in two splits, because a model that is measured on its training rows shows what it memorised.

Rows are compared by the hashes of their content, so rows of two kinds of files are never equal. Cost: one pass over the other files, whose
hashes are cached as those of any source.
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
"""Bytes (1 GiB, some seconds): a larger split is not compared."""


@dataclass(frozen=True)
class Overlap:
    """Rows of one source that are in another too."""

    count: int
    example: str = ""
    """Where one of them is, in both."""


def overlap(source: Source, hashes: NDArray[np.uint64], other: Source) -> Overlap:
    """How many rows of the source, whose hashes are `hashes`, are in the other; with an example."""
    other_hashes = other.hashes()
    count = count_shared(hashes, other_hashes)
    for begin in range(0, len(hashes) if count else 0, _BLOCK):
        shared = np.flatnonzero(np.isin(hashes[begin : begin + _BLOCK], other_hashes))
        if len(shared):
            number = begin + int(shared[0])
            same = int(np.flatnonzero(other_hashes == hashes[number])[0])
            return Overlap(count, f"{_place(source, number)} is {_place(other, same)}")
    return Overlap(count)


def overlaps_apart(source: Source, hashes: NDArray[np.uint64]) -> Iterator[tuple[str, str]]:
    """For each split that is left alone: its name, and a sentence about the rows it shares with the source, or why it was not compared."""
    for name, files in source.located.apart:
        size = sum(Path(path).stat().st_size for path in files)
        if size > _COMPARED:
            yield name, f"the split {name} was not compared with the rows to train on, because it is {show_bytes(size)}"
            continue
        try:
            other = open_source(files, wanted=EVERYTHING)
        except DataError as error:
            yield name, f"the split {name} was not compared with the rows to train on: {error.problems[0].message}"
            continue
        shared = overlap(source, hashes, other)
        other.close()
        if shared.count:
            yield name, f"{many(shared.count, 'row')} to train on in the split {name} too, for example {shared.example}"


def _place(source: Source, number: int) -> str:
    row = source.parsed(number)
    return row.where if isinstance(row, Row) else row.where or source.paths[source.file_of(number)]
