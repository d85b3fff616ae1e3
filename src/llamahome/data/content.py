"""Measures how many targets a row has, and which share of them is its own: the rule of `training.epochs: auto` needs both.

Rows of one style, format or template repeat each other: a sequence of three targets in one answer also stands in other answers.
Only targets are counted, so the measure depends on the rows and the tokenizer. More rows share more, so at most 100 rows are compared.
Cost: one sort.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llamahome.data.store.table import ExampleTable

_BITS = 21
"""Bits of one token in the key of three tokens: enough for two million tokens, more than any vocabulary has."""
_COMPARED_ROWS = 100
"""The rule was fitted to measurements on this many rows."""


@dataclass(frozen=True)
class Content:
    """Two figures of an average row."""

    targets: float
    """Number of targets."""
    own: float
    """Share of the targets of the first 100 rows that no other of these answers has after the same two targets; 1 for one row."""


def content_of(table: ExampleTable) -> Content:
    """The content of the rows of `table`, which has at least one row. Equal answers count as one: copied rows do not look like a style."""
    targets = float(np.count_nonzero(table.targets)) / table.num_rows
    table = table.examples_of(np.arange(min(_COMPARED_ROWS, table.num_rows)))
    places = np.flatnonzero(table.targets)
    if not len(places):
        return Content(targets, 1.0)
    examples = np.searchsorted(table.offsets, places, side="right") - 1
    rows = table.row_of[examples]
    keys = _threes(table.tokens[places].astype(np.int64), places, examples)
    answers = _numbers_of_answers(table.tokens[places], rows, table.num_rows)[rows]
    by_key = np.lexsort((answers, keys))
    begins = np.flatnonzero(np.diff(keys[by_key], prepend=-1))
    ends = np.append(begins[1:], len(keys)) - 1
    alone = answers[by_key[begins]] == answers[by_key[ends]]
    return Content(targets, float(np.sum((ends - begins + 1)[alone])) / len(places))


def _threes(tokens: NDArray[np.int64], places: NDArray[np.int64], examples: NDArray[np.int64]) -> NDArray[np.int64]:
    """A key for each target and the two targets directly before it; the bits of a missing one are zero."""
    keys, follows = tokens + 1, np.ones(len(tokens), np.bool_)
    for back in (1, 2):
        follows[back:] &= (places[back:] - places[:-back] == back) & (examples[back:] == examples[:-back])
        follows[:back] = False
        keys[back:] |= np.where(follows[back:], tokens[:-back] + 1, 0) << (_BITS * back)
    return keys


def _numbers_of_answers(tokens: NDArray[np.int32], rows: NDArray[np.int64], many: int) -> NDArray[np.int64]:
    """For each row, the first row that has the same targets."""
    begins = np.searchsorted(rows, np.arange(many + 1))
    first: dict[bytes, int] = {}
    answers = (tokens[begin:end].tobytes() for begin, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True))
    return np.fromiter((first.setdefault(answer, number) for number, answer in enumerate(answers)), np.int64, many)
