"""Whether one model is better than another on the same rows: a paired bootstrap, an exact test, and a verdict in words.

Rows that share a prompt are one cluster, which is drawn as a whole. The difference is the sum of the differences of rows divided by the sum
of their weights: a row weighs 1 for a score, and as much as it has targets for the loss.

The interval holds the true difference in at least 95 of 100 cases; a difference is shown if the interval excludes 0. It is the hull of two
bootstrap intervals (percentiles moved outwards as far as Student's t is wider than the normal, and studentised), and it is extended to 0
unless a sign-flip test finds the difference too. Why so, and how often it is wrong: docs/decisions/0022-verdicts.md.
Sources: Hesterberg, arXiv 1411.5279; Efron and Tibshirani 1993, chapters 12 and 15. Legend: C clusters, R resamples.
"""

import hashlib
import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamahome.units import many

_RESAMPLES = 10_000
_MOST_DRAWS = 200_000_000
"""Draws of clusters over all resamples; beyond 20,000 clusters there are fewer resamples, whose percentiles then hardly change."""
_BLOCK = 4_000_000
"""Draws that are in memory at once."""
_LEVEL = 0.03
"""Share of wrong claims at which interval and test are computed, so that 200 comparisons hold less than 6 % of them nearly always."""
_ENUMERATED = 14
"""Up to this many clusters, every assignment of signs is tried."""
_FEWEST = 7
"""Fewer clusters can never be significant: 2 of the 2 ** 6 assignments of signs are already more than `_LEVEL`."""
_EPSILON = 1e-12

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Unit:
    """How a difference is shown."""

    name: str
    factor: float = 1.0
    decimals: int = 4
    higher_is_better: bool = True
    bound: float = math.inf
    """The greatest difference that is possible."""


POINTS = Unit("points", factor=100.0, decimals=1, bound=1.0)
NATS = Unit("nats per target", higher_is_better=False)
SCORE = Unit("")


@dataclass(frozen=True)
class Difference:
    """Model minus base."""

    mean: float
    low: float | None
    """The interval; None if one cluster is all there is."""
    high: float | None
    verdict: str
    rows: int

    def as_json(self) -> dict[str, Any]:
        """The object that `train-eval --json` prints."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "verdict": self.verdict}


def compare(
    model: Sequence[float],
    base: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None = None,
    weights: Sequence[float] | None = None,
    unit: Unit = POINTS,
    resamples: int = _RESAMPLES,
) -> Difference:
    """Compare the values of two models row by row; `clusters` names the cluster of each row. The same values give the same result."""
    differences = np.asarray(model, np.float64) - np.asarray(base, np.float64)
    rows = len(differences)
    weight = np.ones(rows) if weights is None else np.asarray(weights, np.float64)
    if not rows or not weight.sum():
        return Difference(0.0, None, None, "no difference can be shown: there are no rows to compare", 0)
    names = range(rows) if clusters is None else clusters
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(name, len(numbers)) for name in names])
    sums, sizes = (np.bincount(index, weights=values).astype(np.float64) for values in (differences * weight, weight))
    mean = float(sums.sum() / sizes.sum())
    better = int(np.count_nonzero(differences > 0 if unit.higher_is_better else differences < 0))
    worse = int(np.count_nonzero(differences)) - better
    if len(sums) == 1:
        why = "all rows share one prompt" if rows > 1 else "one row is too few"
        return Difference(mean, None, None, f"no difference can be shown: {why}", rows)
    low, high = _interval(sums, sizes, unit.bound, resamples)
    return Difference(mean, low, high, _verdict(low, high, unit, better=better, worse=worse, rows=rows), rows)


def _verdict(low: float, high: float, unit: Unit, *, better: int, worse: int, rows: int) -> str:
    shown = [f"{value * unit.factor:+.{unit.decimals}f}" for value in (low, high)]
    interval = f"95 % interval {shown[0]} to {shown[1]} {unit.name}".rstrip()
    if not better and not worse:
        return f"no difference can be shown: all {rows:,} rows are equal" if rows > 1 else "no difference can be shown"
    if low > 0 or high < 0:
        gains = (low > 0) == unit.higher_is_better
        count, word = (better, "better") if gains else (worse, "worse")
        return f"{word} on {count:,} of {many(rows, 'row')}, {interval}"
    return f"no difference can be shown: better on {better:,} and worse on {worse:,} of {many(rows, 'row')}, {interval}"


def _interval(sums_C: Floats, sizes_C: Floats, bound: float, resamples: int) -> tuple[float, float]:
    """Low and high of the difference; they have one sign only if the difference is significant."""
    mean, error = _ratio(sums_C, sizes_C)
    count = len(sums_C)
    generator = _seeded(sums_C, sizes_C)
    t = _student(1 - _LEVEL / 2, count - 1)
    if count < _FEWEST:
        ends = [(mean - t * error, mean + t * error)]
    else:
        means_R, errors_R = _resample(sums_C, sizes_C, generator, resamples)
        tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * t)
        ends = [(float(np.quantile(means_R, tail)), float(np.quantile(means_R, 1 - tail)))]
        usable = errors_R > _EPSILON * max(1.0, abs(mean))
        if error and usable.mean() > 1 - _LEVEL / 4:  # otherwise many resamples hold no variation, and their t is no number
            t_R = (means_R[usable] - mean) / errors_R[usable]
            lower, upper = np.quantile(t_R, [_LEVEL / 2, 1 - _LEVEL / 2])
            ends.append((mean - float(upper) * error, mean - float(lower) * error))
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    if _sign_flip(sums_C, generator, resamples) > _LEVEL:
        low, high = min(low, 0.0), max(high, 0.0)
    return max(low, -bound), min(high, bound)


def _ratio(sums: Floats, sizes: Floats) -> tuple[Any, Any]:
    """The difference and its standard error, over the last axis."""
    count, total = sums.shape[-1], sizes.sum(axis=-1)
    mean = sums.sum(axis=-1) / total
    left = sums - np.expand_dims(mean, -1) * sizes
    return mean, np.sqrt((left**2).sum(axis=-1) * count / (count - 1)) / total


def _resample(sums_C: Floats, sizes_C: Floats, generator: np.random.Generator, most: int) -> tuple[Floats, Floats]:
    """The difference and its standard error in each resample."""
    count = len(sums_C)
    resamples = min(most, max(1_000, _MOST_DRAWS // count))
    block = max(1, _BLOCK // count)
    parts = []
    for begin in range(0, resamples, block):
        drawn = generator.integers(0, count, (min(block, resamples - begin), count))
        parts.append(_ratio(sums_C[drawn], sizes_C[drawn]))
    return np.concatenate([mean for mean, _ in parts]), np.concatenate([error for _, error in parts])


def _sign_flip(sums_C: Floats, generator: np.random.Generator, most: int) -> float:
    """The p value of the difference if each cluster had as well gone the other way: exact for few clusters, otherwise by chance."""
    moved = sums_C[sums_C != 0]
    found = abs(moved.sum()) * (1 - 1e-9)
    if len(moved) <= _ENUMERATED:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(moved))))
        return float((np.abs(signs @ moved) >= found).mean()) if len(moved) else 1.0
    assignments = min(most, max(1_000, _MOST_DRAWS // len(moved)))
    block, reached = max(1, _BLOCK // len(moved)), 0
    for begin in range(0, assignments, block):
        signs = generator.integers(0, 2, (min(block, assignments - begin), len(moved))) * 2.0 - 1.0
        reached += int(np.count_nonzero(np.abs(signs @ moved) >= found))
    return (1 + reached) / (1 + assignments)


def _seeded(sums_C: Floats, sizes_C: Floats) -> np.random.Generator:
    """A generator that depends on the values only."""
    digest = hashlib.sha256(sums_C.astype("<f8").tobytes() + sizes_C.astype("<f8").tobytes()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def _student(probability: float, freedom: int) -> float:
    """The quantile of Student's t, by integration over theta = atan(t / sqrt(freedom)); accurate to 1e-4 for the probabilities here."""
    if freedom > 1_000:
        z = NormalDist().inv_cdf(probability)
        return z + (z**3 + z) / (4 * freedom)
    theta = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(theta) ** (freedom - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp((2 * probability - 1) * area[-1], area, theta)))
