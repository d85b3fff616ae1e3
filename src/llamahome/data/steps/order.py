"""Maps a position in the data to a row number: a keyed permutation of the rows for each epoch, which is computed and never stored.

Invariant: in one epoch every row occurs exactly once; which row is at a position depends only on (position, number of rows, seed).
Cost: a few hundred integer operations for any position. A Feistel network (Luby and Rackoff, 1988) over the next even number
of bits permutes a range at most 16 times too large for tiny and 4 times for other sizes; walking its cycle until the result is a row number
keeps it a permutation (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). The round function is the finalizer of
SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) with the constants of Stafford's variant 13.

A run that went back to a checkpoint passes over the positions of the steps it went back from, as ranges (begin, end) of positions. Its own
position stays one integer, the number of rows consumed, so neither the number of steps nor the learning rate changes: later rows move up.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Ranges = tuple[tuple[int, int], ...]
"""In order, apart from each other."""

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 8
"""Four rounds give a strong pseudo-random permutation for large halves; small halves need more to look random."""
_MIN_BITS = 2
"""Bits of half a block for the smallest data sets."""


def rows_at(positions: NDArray[np.int64], *, num_rows: int, seed: int) -> NDArray[np.int64]:
    """The rows at `positions`, counted from the start of training; every epoch has an order of its own."""
    if num_rows < 1 or (len(positions) and int(positions.min()) < 0):
        raise ValueError(f"there are no such positions in {num_rows} rows")
    epochs = positions // num_rows
    return _permute((positions - epochs * num_rows).astype(np.uint64), num_rows=num_rows, keys=_round_keys(seed, epochs))


def mixed_seed(seed: int, purpose: int) -> int:
    """A seed for one purpose, derived from the seed of the run."""
    return _mix(_mix(seed + _GOLDEN & _MASK) ^ _mix(purpose * _GOLDEN & _MASK)) >> 1


def _permute(values: NDArray[np.uint64], *, num_rows: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The permuted values; keys have the shape [rounds, values]."""
    half = np.uint64(max(_MIN_BITS, ((num_rows - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    walking = np.arange(len(values))
    while len(walking):
        left, right = values[walking] >> half, values[walking] & low
        for key in keys:
            left, right = right, left ^ (_mix_array(right ^ key) & low)
        values[walking] = left << half | right
        outside = values[walking] >= num_rows
        walking, keys = walking[outside], keys[:, outside]
    return values.astype(np.int64)


def _round_keys(seed: int, epochs: NDArray[np.int64]) -> NDArray[np.uint64]:
    """[rounds, epochs]."""
    states = _mix_array(epochs.astype(np.uint64) + np.uint64(_mix(seed + _GOLDEN & _MASK)))
    return np.stack([_mix_array(states + np.uint64(number * _GOLDEN & _MASK)) for number in range(1, _ROUNDS + 1)])


def _mix(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def _mix_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


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
