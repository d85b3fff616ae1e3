"""How many passes over the data, and how many rows a step takes, where nobody set them: pure functions of the rows.

Few rows need many passes before a model can repeat them; many rows over-fit after a few. What tells the two apart before training is the
number of targets that a pass learns. Found from a grid of runs: docs/decisions/0018-passes.md, measured by benchmarks/small_data.py.
"""

import math

_FEWEST_ROWS, _MOST_ROWS = 4, 32
"""Of a step."""
_ROWS_PER_ROOT = 2.5
_MOST_PASSES = 16
_TARGETS, _POWER = 32_000, 0.4
"""Passes are (32,000 / targets of a pass) ^ 0.4."""
_STEPS = 24
"""Updates that a run of few rows takes at least, where the number of passes is given and the batch size is free."""


def auto_batch_size(rows: int, *, epochs: float | None = None) -> int:
    """Rows per step for an epoch of `rows`: a power of two from 4 to 32 that grows with the square root of the rows.

    Where somebody set `epochs`, it is as much smaller as 24 updates need, down to one row.
    """
    size = 2 ** round(math.log2(max(1.0, math.sqrt(rows) / _ROWS_PER_ROOT)))
    size = min(_MOST_ROWS, max(_FEWEST_ROWS, size))
    while epochs is not None and size > 1 and rows * epochs < _STEPS * size:
        size //= 2
    return size


def auto_epochs(targets: float, *, rows: int, batch_size: int) -> int:
    """Passes over `rows` that have `targets` in all, in steps of `batch_size` rows: whole, from 1 to 16, fewer the more there are.

    A batch size that somebody set beyond that of the rule gets more passes: as many as the updates of the rule need, up to 16.
    """
    passes = (_TARGETS / max(1.0, targets)) ** _POWER
    larger = min(batch_size, rows) / min(auto_batch_size(rows), rows)
    return min(_MOST_PASSES, max(1, round(passes * max(1.0, math.sqrt(larger)))))
