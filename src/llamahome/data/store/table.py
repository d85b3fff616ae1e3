"""The examples of many rows as a few flat arrays, in memory or mapped: any row in O(1); 5 bytes a token, 28 an example, 17 a row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamahome.data.records import Example

COLUMNS: Mapping[str, Any] = {
    "tokens": np.dtype("<i4"),
    "targets": np.dtype("|b1"),
    "offsets": np.dtype("<i8"),
    "rows": np.dtype("<i8"),
    "lines": np.dtype("<i8"),
    "files": np.dtype("<i4"),
    "firsts": np.dtype("<i8"),
    "outcomes": np.dtype("|u1"),
    "cut_tokens": np.dtype("<i4"),
    "cut_targets": np.dtype("<i4"),
}
"""Names and types of the arrays, in memory, on disk and between processes."""
CUMULATIVE = ("offsets", "firsts")
"""Columns that count up from 0 and have one element more than what they divide."""
OUTCOMES = ("whole", "truncated", "split", "dropped", "without_targets", "bad")
"""What can become of a row; the column `outcomes` holds the numbers of these words."""


@dataclass(frozen=True)
class RowRead:
    """What became of one row."""

    examples: Sequence[Example]
    """Those that teach something."""
    outcome: str
    cut_tokens: int = 0
    """Tokens of the row that max_length keeps out of its examples."""
    cut_targets: int = 0


@dataclass(frozen=True)
class ExampleTable:
    """Row r has the examples firsts[r] to firsts[r + 1] - 1, maybe none; example i is tokens[offsets[i]:offsets[i + 1]]."""

    tokens: NDArray[np.int32]
    targets: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    rows: NDArray[np.int64]
    """Zero-based row of each example in its file."""
    lines: NDArray[np.int64]
    files: NDArray[np.int32]
    """Number of its file in `paths`."""
    firsts: NDArray[np.int64]
    outcomes: NDArray[np.uint8]
    cut_tokens: NDArray[np.int32]
    cut_targets: NDArray[np.int32]
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_rows(self) -> int:
        """Rows, with those that have no example."""
        return len(self.outcomes)

    def example(self, number: int) -> Example:
        """Example `number`, as views into the table."""
        begin, end = int(self.offsets[number]), int(self.offsets[number + 1])
        path = self.paths[int(self.files[number])]
        return Example(path, int(self.rows[number]), int(self.lines[number]), self.tokens[begin:end], self.targets[begin:end])

    @property
    def threads(self) -> int:
        """One thread is enough to read what is there."""
        return 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.offsets)

    @cached_property
    def row_of(self) -> NDArray[np.int64]:
        """The row of the table that each example belongs to."""
        return np.repeat(np.arange(self.num_rows), np.diff(self.firsts))

    def columns(self) -> dict[str, NDArray[Any]]:
        """The arrays by name, in the types of COLUMNS."""
        return {name: np.ascontiguousarray(getattr(self, name), dtype) for name, dtype in COLUMNS.items()}

    def examples_of(self, rows: NDArray[np.int64]) -> "ExampleTable":
        """A table of these rows alone, in this order; a copy."""
        numbers = np.concatenate([np.empty(0, np.int64), *(np.arange(self.firsts[row], self.firsts[row + 1]) for row in rows)])
        begins, ends = self.offsets[numbers], self.offsets[numbers + 1]
        stretches = list(zip(begins.tolist(), ends.tolist(), strict=True))
        return ExampleTable(
            tokens=np.concatenate([np.empty(0, np.int32), *(self.tokens[begin:end] for begin, end in stretches)]),
            targets=np.concatenate([np.empty(0, np.bool_), *(self.targets[begin:end] for begin, end in stretches)]),
            offsets=counted_up(ends - begins),
            rows=self.rows[numbers],
            lines=self.lines[numbers],
            files=self.files[numbers],
            firsts=counted_up(self.firsts[rows + 1] - self.firsts[rows]),
            outcomes=self.outcomes[rows],
            cut_tokens=self.cut_tokens[rows],
            cut_targets=self.cut_targets[rows],
            paths=self.paths,
        )


def build_table(rows: Sequence[RowRead], paths: tuple[str, ...]) -> ExampleTable:
    """The table of these rows."""
    number_of = {path: number for number, path in enumerate(paths)}
    examples = [example for row in rows for example in row.examples]
    count, many = len(examples), len(rows)
    return ExampleTable(
        tokens=np.concatenate([np.empty(0, np.int32), *(example.tokens for example in examples)]),
        targets=np.concatenate([np.empty(0, np.bool_), *(example.targets for example in examples)]),
        offsets=counted_up(np.fromiter((len(example.tokens) for example in examples), np.int64, count)),
        rows=np.fromiter((example.row for example in examples), np.int64, count),
        lines=np.fromiter((example.line for example in examples), np.int64, count),
        files=np.fromiter((number_of[example.source] for example in examples), np.int32, count),
        firsts=counted_up(np.fromiter((len(row.examples) for row in rows), np.int64, many)),
        outcomes=np.fromiter((OUTCOMES.index(row.outcome) for row in rows), np.uint8, many),
        cut_tokens=np.fromiter((row.cut_tokens for row in rows), np.int32, many),
        cut_targets=np.fromiter((row.cut_targets for row in rows), np.int32, many),
        paths=paths,
    )


def join(tables: Sequence[ExampleTable]) -> ExampleTable:
    """One table of all rows, in order; the tables, of which there is at least one, name their files by the same `paths`."""
    columns: dict[str, NDArray[Any]] = {}
    for name in COLUMNS:
        parts = [getattr(table, name) for table in tables]
        columns[name] = counted_up(np.concatenate([np.diff(part) for part in parts])) if name in CUMULATIVE else np.concatenate(parts)
    return ExampleTable(**columns, paths=tables[0].paths)


def counted_up(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 and the running sums."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)))
