"""A row of little bars for a series of numbers, as wide as asked."""

import itertools
import math
from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = "_.-=+*#@"


def sparkline(values: Sequence[float], *, width: int, unicode: bool = True) -> str:
    """At most `width` bars, each the mean of its share of `values`; numbers that are not finite are left out."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    size = max(map(abs, finite)) or 1.0
    finite = [value / size for value in finite]  # a diverged loss must not overflow the sums
    columns = min(width, len(finite))
    edges = [round(column * len(finite) / columns) for column in range(columns + 1)]
    means = [sum(finite[start:end]) / (end - start) for start, end in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    bars = _BARS if unicode else _PLAIN_BARS
    if high == low:
        return bars[3] * columns
    return "".join(bars[min(7, int(8 * ((mean - low) / (high - low))))] for mean in means)
