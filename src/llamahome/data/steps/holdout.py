"""Which rows are held out for evaluation. A hash of their bytes decides, so that the choice is stable and duplicates stay together.

Rows need not be parsed. Memory: one byte per row and a few blocks; hashes are read in blocks, because they may be on disk. Hashes are
distributed evenly, so that the smallest ones are found below a threshold that is estimated from their number.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_SHARE, _MIN_ROWS, _MIN_SOURCE_ROWS, _MAX_ROWS = 0.02, 32, 320, 1000
"""The rule of eval_split auto, as documented in config/schema.py."""
_BLOCK = 1 << 20
"""Hashes that are read together (8 MiB)."""
_SORTED_BLOCK = 1 << 21
_RANGE = 2**64

Hashes = NDArray[np.uint64]


def held_out(hashes: Hashes, split: float | Literal["auto"]) -> NDArray[np.bool_]:
    """Which rows are held out. All rows with the same hash are treated alike, and at least one hash always stays for training.

    A share selects the hashes below a threshold, so that adding rows never moves a row to the other side; a count selects the smallest.
    """
    if not len(hashes) or split == 0:
        return np.zeros(len(hashes), np.bool_)
    if split == "auto":
        threshold = int(_SHARE * _RANGE)
        rows = sum(int(np.count_nonzero(block < np.uint64(threshold))) for _, block in _blocks(hashes))
        if rows < _MIN_ROWS and len(hashes) >= _MIN_SOURCE_ROWS:
            threshold = _threshold(hashes, _MIN_ROWS)
        elif rows > _MAX_ROWS:
            threshold = _threshold(hashes, _MAX_ROWS)
    else:
        threshold = int(split * _RANGE) if split < 1 else _threshold(hashes, int(split))
    largest = max(int(block.max()) for _, block in _blocks(hashes))
    held = np.empty(len(hashes), np.bool_)
    for begin, block in _blocks(hashes):  # the largest hash always stays for training
        held[begin : begin + len(block)] = block < np.uint64(min(threshold, largest))
    return held


def count_duplicates(hashes: Hashes) -> int:
    """The number of rows with the hash of an earlier row."""
    parts = -(-len(hashes) // _SORTED_BLOCK)
    borders = [number * _RANGE // parts for number in range(parts)] + [_RANGE]
    count = 0
    for low, high in pairwise(borders):
        some = np.sort(_select(hashes, lambda block, low=low, high=high: (block >= np.uint64(low)) & (block <= np.uint64(high - 1))))  # type: ignore[misc]
        count += int(np.count_nonzero(some[1:] == some[:-1]))
    return count


def count_shared(hashes: Hashes, others: Hashes) -> int:
    """The number of rows whose hash is among `others`."""
    known = np.append(np.sort(others), np.uint64(0))
    return (
        sum(int(np.count_nonzero(known[np.searchsorted(known[:-1], block)] == block)) for _, block in _blocks(hashes)) if len(others) else 0
    )


def _threshold(hashes: Hashes, rows: int) -> int:
    """The threshold below which there are the smallest hashes of `rows` rows, or slightly more if there are duplicates."""
    reach = min(1.0, 2 * rows / len(hashes) + 1e-6)
    while True:
        some = np.sort(_select(hashes, lambda block, reach=reach: block <= np.uint64(min(_RANGE - 1, int(reach * _RANGE)))))  # type: ignore[misc]
        if len(some) >= rows:
            return int(some[rows - 1]) + 1
        if reach >= 1:
            return _RANGE - 1
        reach = min(1.0, reach * 4)


def _select(hashes: Hashes, condition: Callable[[Hashes], NDArray[np.bool_]]) -> Hashes:
    return np.concatenate([np.empty(0, np.uint64), *(block[condition(block)] for _, block in _blocks(hashes))])


def _blocks(hashes: Hashes) -> Iterator[tuple[int, Hashes]]:
    for begin in range(0, len(hashes), _BLOCK):
        yield begin, hashes[begin : begin + _BLOCK]
