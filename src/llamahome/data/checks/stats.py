"""`data stats`: lengths, what is learned, what each max_length would cut, what padding would waste, and a picture of the lengths.

All numbers come from one pass over the rows. Lengths are those of rows before they are cut unless stated otherwise. The picture needs the
extra `plots` (matplotlib).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamahome.config.schema import DataConfig
from llamahome.data.checks.compare import Side
from llamahome.data.checks.duplicates import repeats
from llamahome.data.checks.row_sizes import LENGTHS
from llamahome.errors import MachineError, Problem

PADDED_BATCH = 8
"""Rows per batch of the padding trainer that is used for comparison."""
_LONGEST = 5


@dataclass(frozen=True)
class Bin:
    """The rows whose length is at least `begin` and less than `end`."""

    begin: int
    end: int
    rows: int
    tokens: int


@dataclass(frozen=True)
class Cut:
    """What this data.max_length would cut."""

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
    """Statistics of a source. Lengths and counts are in tokens; the length of a pair is that of its longer answer with the prompt."""

    rows: int
    usable: int
    """Rows that a run does not refuse; all numbers below are about them."""
    tokens: int
    targets: int
    references: int
    """Tokens of answers that are not learned, because the model learns from answers of its own; then `targets` and the like are 0."""
    mean: float
    percentiles: dict[str, int]
    """The lengths that 50, 90, 95 and 99 % of the rows do not exceed, and the longest."""
    histogram: list[Bin]
    cuts: list[Cut]
    max_length: int
    epoch_examples: int
    epoch_tokens: int
    """In one epoch with this data.max_length, including held-out rows."""
    epoch_targets: int
    padded_batch: int
    padding: float
    """The share of positions that would be padding in batches of `padded_batch` random rows; llamahome does not pad."""
    duplicates: int
    languages: dict[str, int] | None
    """The number of rows of each language that is clear; None if languages were not identified."""
    longest: list[LongRow]


def stats_of(side: Side, data: DataConfig, *, languages: bool, learned: bool = True) -> Stats:
    """The statistics of these rows; token counts are 0 if the rows were not tokenized. `learned` is whether the rows' answers are."""
    facts, chosen = side.facts, np.flatnonzero(side.facts.usable)
    tokens, lengths, answers = facts.tokens[chosen], facts.needed[chosen], int(facts.targets[chosen].sum())
    others = tokens - lengths  # of pairs, the shorter answer with its prompt
    examples = example_lengths(np.concatenate((lengths, others[others > 0])), data)
    longest = chosen[np.argsort(-lengths, kind="stable")[:_LONGEST]]
    points = {"50%": 0.5, "90%": 0.9, "95%": 0.95, "99%": 0.99, "longest": 1.0}
    by_language = Counter(language for language in facts.languages[chosen].tolist() if language)
    return Stats(
        rows=len(facts),
        usable=len(chosen),
        tokens=int(tokens.sum()),
        targets=answers * learned,
        references=answers * (not learned),
        mean=float(tokens.mean()) if len(chosen) else 0.0,
        percentiles={name: int(np.quantile(lengths, share, method="inverted_cdf")) if len(chosen) else 0 for name, share in points.items()},
        histogram=histogram(lengths),
        cuts=[
            Cut(
                length,
                rows=int((lengths > length).sum()),
                tokens=int((np.maximum(lengths - length, 0) + np.maximum(others - length, 0)).sum()),
                targets=int(facts.beyond[chosen, number].sum()) * learned,
            )
            for number, length in enumerate(LENGTHS)
        ],
        max_length=data.max_length,
        epoch_examples=int((facts.kept_targets[chosen] > 0).sum()),
        epoch_tokens=int(facts.kept_tokens[chosen].sum()),
        epoch_targets=int(facts.kept_targets[chosen].sum()) * learned,
        padded_batch=PADDED_BATCH,
        padding=padding_share(examples, PADDED_BATCH),
        duplicates=len(repeats(facts.hashes, facts.usable)),
        languages=dict(by_language.most_common()) if languages else None,
        longest=[LongRow(side.place(int(n)).where, int(facts.needed[n]), int(facts.targets[n]) * learned) for n in longest],
    )


def example_lengths(lengths: NDArray[np.int64], data: DataConfig) -> NDArray[np.int64]:
    """The lengths of the examples that rows of these lengths give under data.max_length."""
    limit = data.max_length
    if data.on_overlong == "drop":
        return lengths[lengths <= limit]
    if data.on_overlong == "split":
        pieces = np.full(int((lengths // limit).sum()), limit, np.int64)
        rest = lengths % limit
        return np.concatenate((pieces, rest[rest > 0]))
    return np.minimum(lengths, limit)


def padding_share(lengths: NDArray[np.int64], batch: int) -> float:
    """The expected share of padding if `batch` random rows are padded to the longest of them.

    The k-th smallest of n lengths is the longest of a batch with probability C(k-1, batch-1) / C(n, batch): exact, not sampled.
    """
    count = len(lengths)
    if not count or not lengths.any():
        return 0.0
    batch = min(batch, count)
    ordered = np.sort(lengths)
    rank = np.arange(1, count + 1, dtype=np.float64)
    below = np.ones(count)
    """The probability that a whole batch is among the k smallest: the product of (k - i) / (n - i)."""
    for i in range(batch):
        below *= np.maximum(rank - i, 0) / (count - i)
    largest = float((np.diff(below, prepend=0.0) * ordered).sum())
    return 1 - float(ordered.mean()) / largest


def histogram(lengths: Sequence[int] | NDArray[np.int64]) -> list[Bin]:
    """Rows by length, in bins whose borders double every two bins: 0, 16, 24, 32, 48, 64, ..."""
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
    first = next(number for number, item in enumerate(bins) if item.rows)
    return bins[first:]


def require_plots() -> None:
    """Raise MachineError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        message = "matplotlib, which draws the picture, is not installed"
        raise MachineError(Problem(code="machine.no-matplotlib", message=message, where="--png", hint="pip install 'llamahome[plots]'"))


def write_histogram(bins: Sequence[Bin], path: Path, *, max_length: int, title: str) -> None:
    """Write a PNG: rows by length, and where data.max_length cuts. Raises MachineError if it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.bar([item.begin for item in bins], [item.rows for item in bins], width=[item.end - item.begin for item in bins], align="edge")
    axes.set_xscale("symlog", base=2, linthresh=16)
    borders = [item.begin for item in bins] + [bins[-1].end]
    shown = borders[:: max(1, len(borders) // 10)]
    axes.set_xticks(shown, [f"{border:,}" for border in shown])
    axes.axvline(max_length, color="black", linestyle="--", linewidth=1, label=f"data.max_length {max_length:,}")
    axes.set_xlabel("tokens")
    axes.set_ylabel("rows")
    axes.set_title(title)
    axes.legend()
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        message = f"cannot write the picture: {error.strerror}"
        raise MachineError(
            Problem(code="machine.cannot-write", message=message, where=str(path), hint="--png with another place")
        ) from error
