"""Positions of the order that a run passes over: the rows of steps that it went back from.

The position of a run stays one integer, the number of rows consumed. Ranges (begin, end) of positions that are passed over make the n-th
consumed row another one, so neither the number of steps nor the learning rate changes: later rows move up. Pure arithmetic.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Ranges = tuple[tuple[int, int], ...]
"""In order, apart from each other."""


def joined(ranges: Iterable[Sequence[int]]) -> Ranges:
    """The same positions as few ranges in order."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted((begin, end) for begin, end in ranges if begin < end):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return tuple(merged)


def positions_of(consumed: NDArray[np.int64], passed: Ranges) -> NDArray[np.int64]:
    """The positions in the order of the rows with these numbers, counted as they are consumed."""
    if not passed:
        return consumed
    lengths = np.array([end - begin for begin, end in passed], np.int64)
    before = np.concatenate([[0], np.cumsum(lengths)])
    starts = np.array([begin for begin, _ in passed], np.int64) - before[:-1]
    shifted: NDArray[np.int64] = consumed + before[np.searchsorted(starts, consumed, side="right")]
    return shifted


def pass_over(passed: Ranges, steps: Iterable[tuple[int, int]]) -> Ranges:
    """`passed` and the positions of `steps`, each (begin, end) counted as its rows were consumed."""
    more = [positions_of(np.arange(begin, end, dtype=np.int64), passed).tolist() for begin, end in steps]
    return joined([*passed, *((position, position + 1) for positions in more for position in positions)])
