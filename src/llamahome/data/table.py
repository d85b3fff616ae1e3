"""Examples as a few flat arrays: any of them in O(1), 5 bytes a token and 40 a row, and a fingerprint of what they teach."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llamahome.data.records import Example


@dataclass(frozen=True)
class ExampleTable:
    """Examples laid end to end; example i is tokens[offsets[i]:offsets[i + 1]]."""

    tokens: NDArray[np.int32]
    targets: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    rows: NDArray[np.int64]
    """Zero-based row of each example in its file."""
    lines: NDArray[np.int64]
    sources: NDArray[np.int32]
    """Number of its file in `paths`."""
    hashes: NDArray[np.uint64]
    """Of the content of its row; equal for duplicates."""
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, number: int) -> Example:
        """Example `number`, as views into the table."""
        begin, end = int(self.offsets[number]), int(self.offsets[number + 1])
        path = self.paths[int(self.sources[number])]
        return Example(path, int(self.rows[number]), int(self.lines[number]), self.tokens[begin:end], self.targets[begin:end])

    def num_tokens(self, number: int) -> int:
        """Length of example `number`."""
        return int(self.offsets[number + 1] - self.offsets[number])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over tokens, targets and offsets: equal exactly when the same examples come in the same order."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.targets, self.offsets):
            digest.update(len(array).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).view(np.uint8).data)
        return digest.hexdigest()

    def select(self, numbers: NDArray[np.int64]) -> "ExampleTable":
        """A table of these examples alone, in this order."""
        lengths = self.lengths[numbers]
        offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))
        places = np.arange(int(offsets[-1])) + np.repeat(self.offsets[:-1][numbers] - offsets[:-1], lengths)
        return ExampleTable(
            tokens=self.tokens[places],
            targets=self.targets[places],
            offsets=offsets,
            rows=self.rows[numbers],
            lines=self.lines[numbers],
            sources=self.sources[numbers],
            hashes=self.hashes[numbers],
            paths=self.paths,
        )


def build_table(examples: Sequence[Example], hashes: Iterable[int], paths: tuple[str, ...]) -> ExampleTable:
    """The table of these examples; `hashes` holds the content hash of each one's row."""
    number_of = {path: number for number, path in enumerate(paths)}
    lengths = np.fromiter((len(example.tokens) for example in examples), np.int64, len(examples))
    return ExampleTable(
        tokens=np.concatenate([np.empty(0, np.int32), *(example.tokens for example in examples)]),
        targets=np.concatenate([np.empty(0, np.bool_), *(example.targets for example in examples)]),
        offsets=np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths))),
        rows=np.fromiter((example.row for example in examples), np.int64, len(examples)),
        lines=np.fromiter((example.line for example in examples), np.int64, len(examples)),
        sources=np.fromiter((number_of[example.source] for example in examples), np.int32, len(examples)),
        hashes=np.fromiter(hashes, np.uint64, len(examples)),
        paths=paths,
    )


def join(tables: Sequence[ExampleTable], paths: tuple[str, ...]) -> ExampleTable:
    """One table of all examples, in order; every table names its sources by the same `paths`."""
    if not tables:
        return build_table([], [], paths)
    ends = np.cumsum([0, *(len(table.tokens) for table in tables)])
    offsets = [np.zeros(1, np.int64), *(table.offsets[1:] + end for table, end in zip(tables, ends[:-1], strict=True))]
    return ExampleTable(
        tokens=np.concatenate([table.tokens for table in tables]),
        targets=np.concatenate([table.targets for table in tables]),
        offsets=np.concatenate(offsets),
        rows=np.concatenate([table.rows for table in tables]),
        lines=np.concatenate([table.lines for table in tables]),
        sources=np.concatenate([table.sources for table in tables]),
        hashes=np.concatenate([table.hashes for table in tables]),
        paths=paths,
    )
