"""What the rows come to in figures: lengths, what is learned, what each max_length would cut, what padding would waste.

All of it is computed from the facts of one pass over the rows. Lengths are those of whole rows unless a line says otherwise.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamahome.config.schema import DataConfig
from llamahome.data.checks.compare import Side
from llamahome.data.checks.duplicates import repeats
from llamahome.data.checks.facts import LENGTHS

PADDED_BATCH = 8
"""Rows in a batch of the padded trainer that is compared with."""
_LONGEST = 5


@dataclass(frozen=True)
class Bin:
    """Rows of a length from `begin` up to, but not including, `end`."""

    begin: int
    end: int
    rows: int
    tokens: int


@dataclass(frozen=True)
class Cut:
    """What data.max_length would take away, were it this."""

    max_length: int
    rows: int
    tokens: int
    targets: int


@dataclass(frozen=True)
class LongRow:
    """One of the longest rows."""

    where: str
    tokens: int
    targets: int


@dataclass(frozen=True)
class Stats:
    """Figures of a source. Lengths and counts are in tokens."""

    rows: int
    usable: int
    """Rows that a run does not refuse; all further figures are of these."""
    tokens: int
    targets: int
    mean: float
    percentiles: dict[str, int]
    """Lengths that 50, 90, 95 and 99 % of the rows do not exceed, and the longest."""
    histogram: list[Bin]
    cuts: list[Cut]
    max_length: int
    epoch_examples: int
    epoch_tokens: int
    """In one pass over the rows with this data.max_length, held-out rows included."""
    epoch_targets: int
    padded_batch: int
    padding: float
    """Share of the positions that would be padding in batches of `padded_batch` random rows; here there is none."""
    duplicates: int
    languages: dict[str, int] | None
    """Rows of each language that is clear; None when it was not looked for."""
    longest: list[LongRow]

    def as_json(self) -> dict[str, Any]:
        """The object that `data stats --json` prints."""
        return asdict(self)


def stats_of(side: Side, data: DataConfig, *, languages: bool) -> Stats:
    """The figures of these rows; counts of tokens are 0 where none were counted."""
    facts, chosen = side.facts, np.flatnonzero(side.facts.usable)
    lengths, targets = facts.tokens[chosen], facts.targets[chosen]
    examples = example_lengths(lengths, data)
    longest = chosen[np.argsort(-lengths, kind="stable")[:_LONGEST]]
    points = {"50%": 0.5, "90%": 0.9, "95%": 0.95, "99%": 0.99, "longest": 1.0}
    found = Counter(language for language in facts.languages[chosen].tolist() if language)
    return Stats(
        rows=len(facts),
        usable=len(chosen),
        tokens=int(lengths.sum()),
        targets=int(targets.sum()),
        mean=float(lengths.mean()) if len(chosen) else 0.0,
        percentiles={name: int(np.quantile(lengths, share, method="inverted_cdf")) if len(chosen) else 0 for name, share in points.items()},
        histogram=histogram(lengths),
        cuts=[
            Cut(length, int((lengths > length).sum()), int(np.maximum(lengths - length, 0).sum()), int(facts.beyond[chosen, number].sum()))
            for number, length in enumerate(LENGTHS)
        ],
        max_length=data.max_length,
        epoch_examples=int((facts.kept_targets[chosen] > 0).sum()),
        epoch_tokens=int(facts.kept_tokens[chosen].sum()),
        epoch_targets=int(facts.kept_targets[chosen].sum()),
        padded_batch=PADDED_BATCH,
        padding=padding_share(examples, PADDED_BATCH),
        duplicates=len(repeats(facts.hashes, facts.usable)),
        languages=dict(found.most_common()) if languages else None,
        longest=[LongRow(side.place(int(n)).where, int(facts.tokens[n]), int(facts.targets[n])) for n in longest],
    )


def example_lengths(lengths: NDArray[np.int64], data: DataConfig) -> NDArray[np.int64]:
    """Lengths of the examples that rows of these lengths become under data.max_length."""
    limit = data.max_length
    if data.on_overlong == "drop":
        return lengths[lengths <= limit]
    if data.on_overlong == "split":
        pieces = np.full(int((lengths // limit).sum()), limit, np.int64)
        rest = lengths % limit
        return np.concatenate((pieces, rest[rest > 0]))
    return np.minimum(lengths, limit)


def padding_share(lengths: NDArray[np.int64], batch: int) -> float:
    """Expected share of padding when `batch` random rows are padded to the longest of them.

    The k-th smallest of n lengths is the longest of a batch with probability C(k-1, batch-1) / C(n, batch): exact, not sampled.
    """
    count = len(lengths)
    if not count or not lengths.any():
        return 0.0
    batch = min(batch, count)
    ordered = np.sort(lengths)
    rank = np.arange(1, count + 1, dtype=np.float64)
    below = np.ones(count)
    """Probability that all of a batch lie among the k smallest: the product of (k - i) / (n - i)."""
    for taken in range(batch):
        below *= np.maximum(rank - taken, 0) / (count - taken)
    largest = float((np.diff(below, prepend=0.0) * ordered).sum())
    return 1 - float(ordered.mean()) / largest


def histogram(lengths: Sequence[int] | NDArray[np.int64]) -> list[Bin]:
    """Rows by length, in stretches whose borders double in two steps: 0, 16, 24, 32, 48, 64, ..."""
    values = np.asarray(lengths, np.int64)
    if not len(values):
        return []
    borders = [0, 16]
    while borders[-1] <= values.max():
        borders.append(borders[-1] * 3 // 2 if borders[-1] & (borders[-1] - 1) == 0 else borders[-1] * 4 // 3)
    which = np.searchsorted(borders, values, side="right") - 1
    rows = np.bincount(which, minlength=len(borders) - 1)
    tokens = np.bincount(which, weights=values, minlength=len(borders) - 1)
    bins = [
        Bin(begin, end, int(count), int(total))
        for begin, end, count, total in zip(borders, borders[1:], rows.tolist(), tokens.tolist(), strict=False)
    ]
    first = next(number for number, found in enumerate(bins) if found.rows)
    return bins[first:]
