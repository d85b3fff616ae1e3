"""How many passes over the data, and how many rows a step takes, where nobody set them: pure functions of the rows.

A row with a short answer (a fact, a label) must be seen about twelve times before a small model says it by itself, however many rows there
are. Rows with long answers teach their manner in one or two passes, and over-fit after more, unless they are so few that they are to be
learned by heart. Found from a grid of runs: docs/decisions/0018-passes.md, measured by benchmarks/small_data.py.
"""

import math

_FEWEST_ROWS, _MOST_ROWS = 4, 32
"""Of a step."""
_ROWS_PER_ROOT = 2.5
_PASSES, _MOST_PASSES = 12, 24
_SHORT = 16
"""Targets of a row up to which its answer is short."""
_STEEP = 3.5
"""Passes fall with this power of the length of longer answers."""
_BY_HEART, _MANY = 5, 100
"""Up to 5 rows the length of answers does not matter; from 100 on it matters fully, and passes fall with the fourth root of the rows."""
_STEPS = 24
"""Updates that a run of few rows takes at least, where the number of passes is given and the batch size is free."""


def auto_batch_size(rows: int, *, epochs: float | None = None) -> int:
    """Rows per step for an epoch of `rows`: a power of two from 4 to 32 that grows with the square root of the rows.

    Where somebody set `epochs`, it is as much smaller as 24 updates need, down to one row.
    """
    size = 1 << round(math.log2(max(1.0, math.sqrt(rows) / _ROWS_PER_ROOT)))
    size = min(_MOST_ROWS, max(_FEWEST_ROWS, size))
    while epochs is not None and size > 1 and rows * epochs < _STEPS * size:
        size //= 2
    return size


def auto_epochs(rows: int, targets_per_row: float, *, batch_size: int) -> int:
    """Passes over `rows` in steps of `batch_size` rows: whole, from 1 to 24, fewer the more rows there are and the longer their answers.

    A batch size that somebody set beyond that of the rule gets more passes, by the square root of what it is larger.
    """
    matters = min(1.0, max(0.0, math.log(rows / _BY_HEART) / math.log(_MANY / _BY_HEART)))
    length = math.pow(min(1.0, _SHORT / max(1.0, targets_per_row)), _STEEP * matters)
    passes = _PASSES * length * math.pow(min(1.0, _MANY / rows), 0.25)
    larger = min(batch_size, rows) / min(auto_batch_size(rows), rows)
    return min(_MOST_PASSES, max(1, round(passes * math.sqrt(max(1.0, larger)))))
