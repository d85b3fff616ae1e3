"""Which rows are set aside for evaluation: by a hash of their bytes, so that the choice is stable and duplicates stay together.

Nothing needs to be parsed. Memory: a byte a row and a few blocks, whatever the number of rows; hashes are read in blocks, for they may
lie on disk. Hashes are spread evenly, so that the smallest of them are found below a threshold that is guessed from their number.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_SHARE, _LEAST, _FROM, _MOST = 0.02, 32, 320, 1000
"""The rule of eval_split auto, as its text in config/schema.py says it."""
_BLOCK = 1 << 20
"""Hashes looked at together (8 MiB)."""
_SORTED_TOGETHER = 1 << 21
_RANGE = 2**64

Hashes = NDArray[np.uint64]


def held_out(hashes: Hashes, split: float | Literal["auto"]) -> NDArray[np.bool_]:
    """Which rows are held out. All rows of one hash go the same way, and at least one hash always stays for training.

    A share takes the hashes below a threshold, so that a row never changes sides when others are added; a count takes the smallest hashes.
    """
    if not len(hashes) or split == 0:
        return np.zeros(len(hashes), np.bool_)
    if split == "auto":
        limit = int(_SHARE * _RANGE)
        rows = sum(int(np.count_nonzero(block < np.uint64(limit))) for _, block in _blocks(hashes))
        if rows < _LEAST and len(hashes) >= _FROM:
            limit = _limit_of(hashes, _LEAST)
        elif rows > _MOST:
            limit = _limit_of(hashes, _MOST)
    else:
        limit = int(split * _RANGE) if split < 1 else _limit_of(hashes, int(split))
    largest = max(int(block.max()) for _, block in _blocks(hashes))
    chosen = np.empty(len(hashes), np.bool_)
    for begin, block in _blocks(hashes):  # the largest hash of all stays for training, whatever the limit
        chosen[begin : begin + len(block)] = block < np.uint64(min(limit, largest))
    return chosen


def count_duplicates(hashes: Hashes) -> int:
    """Rows that have the hash of an earlier one."""
    parts = -(-len(hashes) // _SORTED_TOGETHER)
    borders = [number * _RANGE // parts for number in range(parts)] + [_RANGE]
    found = 0
    for low, high in pairwise(borders):
        some = np.sort(_select(hashes, lambda block, low=low, high=high: (block >= np.uint64(low)) & (block <= np.uint64(high - 1))))  # type: ignore[misc]
        found += int(np.count_nonzero(some[1:] == some[:-1]))
    return found


def count_shared(hashes: Hashes, others: Hashes) -> int:
    """Rows whose hash is among `others`."""
    known = np.append(np.sort(others), np.uint64(0))
    return (
        sum(int(np.count_nonzero(known[np.searchsorted(known[:-1], block)] == block)) for _, block in _blocks(hashes)) if len(others) else 0
    )


def _limit_of(hashes: Hashes, rows: int) -> int:
    """The threshold below which the smallest hashes lie that are of `rows` rows or, with duplicates, just more."""
    reach = min(1.0, 2 * rows / len(hashes) + 1e-6)
    while True:
        some = np.sort(_select(hashes, lambda block, reach=reach: block <= np.uint64(min(_RANGE - 1, int(reach * _RANGE)))))  # type: ignore[misc]
        if len(some) >= rows:
            return int(some[rows - 1]) + 1
        if reach >= 1:
            return _RANGE - 1
        reach = min(1.0, reach * 4)


def _select(hashes: Hashes, wanted: Callable[[Hashes], NDArray[np.bool_]]) -> Hashes:
    return np.concatenate([np.empty(0, np.uint64), *(block[wanted(block)] for _, block in _blocks(hashes))])


def _blocks(hashes: Hashes) -> Iterator[tuple[int, Hashes]]:
    for begin in range(0, len(hashes), _BLOCK):
        yield begin, hashes[begin : begin + _BLOCK]
