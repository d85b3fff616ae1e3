"""Rows that are byte ranges of a file: JSONL lines, elements of a JSON array, CSV records, parts of a text.

A format gives functions that find where its rows begin and that parse the bytes of one. Cost of a row: one stat, one pread and one parse.
Memory: the row index of the file, memory-mapped from the cache if the file is large.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llamahome.data.files.guarded_file import GuardedFile
from llamahome.data.files.index import ArrayCache, Notify, RowIndex, RowStarts
from llamahome.data.records import Row
from llamahome.errors import Problem
from llamahome.units import show_bytes


@dataclass(frozen=True)
class RangeFormat:
    """How the rows of a format are found in a file and parsed."""

    key: str
    """Name and settings; part of the name of everything that is cached."""
    scan: Callable[[GuardedFile], Iterator[RowStarts]]
    """One pass over the file that yields where its rows begin."""
    trim: Callable[[bytes], bytes]
    """The row's own bytes within its range, for example without the line end."""
    parse: Callable[[bytes, int, int], Row | Problem]
    """The row from the bytes of its range, its line and its number."""
    hashed: Callable[[bytes], bytes] | None = None
    """The bytes that are hashed, if they are not the trimmed ones."""


class ByteRangeRows:
    """The rows of one file."""

    def __init__(self, file: GuardedFile, layout: RangeFormat, notify: Notify) -> None:
        self._file, self._layout = file, layout
        self._cache = ArrayCache(file, layout.key, notify)
        self._loaded: RowIndex | None = None
        self._count = len(self._index())

    def __len__(self) -> int:
        return self._count

    def parsed(self, number: int) -> Row | Problem:
        """Row `number`, or what is wrong with it."""
        raw, line = self._read(number), self._index().line(number)
        return self._too_large(number, line) if raw is None else self._layout.parse(raw, line, number)

    def parsed_range(self, numbers: range) -> list[Row | Problem]:
        """Consecutive rows; their bytes are read some MiB at a time."""
        rows: list[Row | Problem] = []
        for first, content, bounds in self._batches(numbers):
            if content is None:
                rows.append(self.parsed(first))
                continue
            lines = self._index().lines[first : first + len(bounds) - 1].tolist() or range(first + 1, first + len(bounds))
            parse = self._layout.parse
            rows += [parse(content[a:b], line, at) for at, ((a, b), line) in enumerate(zip(pairwise(bounds), lines, strict=True), first)]
        return rows

    def raw(self, number: int) -> bytes:
        """The row's bytes as they are in the file; the first 64 MiB of a longer row."""
        raw = self._read(number)
        if raw is None:
            start = int(self._index().starts[number])
            return self._file.read(start, start + self._file.limits.row)
        return self._layout.trim(raw)

    def hashes(self) -> NDArray[np.uint64]:
        """64 bits of BLAKE2b of each row, from the cache or computed in one pass over the file."""
        return self._cache.hashes(self._count, self._digests)

    def close(self) -> None:
        """Close the file and its maps; a later read opens them again."""
        self._file.close()
        if self._cache.load_index() is not None:
            self._loaded = None

    def _index(self) -> RowIndex:
        if self._loaded is None:
            self._loaded = self._cache.load_index()
        if self._loaded is None:
            self._loaded = self._cache.build_index(self._layout.scan(self._file))
        return self._loaded

    def _read(self, number: int) -> bytes | None:
        """The bytes of row `number`; None if they are too many to be a row."""
        starts, longest = self._index().starts, self._file.limits.row
        begin, end = int(starts[number]), int(starts[number + 1])
        if end - begin <= longest:
            return self._file.read(begin, end)
        head = self._layout.trim(self._file.read(begin, begin + longest + 1))
        return head if len(head) <= longest else None

    def _too_large(self, number: int, line: int) -> Problem:
        size = int(self._index().starts[number + 1]) - int(self._index().starts[number])
        return Problem(
            code="data.row-too-large",
            message=f"the row has {show_bytes(size)}; a row may have {show_bytes(self._file.limits.row)}",
            where=f"{self._file.path}:{line}",
            hint=f"break line {line} into rows; look at it with: sed -n {line}p '{self._file.path}' | head -c 500",
        )

    def _digests(self) -> Iterator[bytes]:
        """Digests of the rows, some thousand joined at a time."""
        hashed = self._layout.hashed or self._layout.trim
        for first, content, bounds in self._batches(range(self._count)):
            if content is None:
                yield digest(self.raw(first))
            else:
                yield b"".join([digest(hashed(content[a:b])) for a, b in pairwise(bounds)])

    def _batches(self, numbers: range) -> Iterator[tuple[int, bytes | None, list[int]]]:
        """These rows some MiB at a time: number of the first row, bytes, bounds of each row in them. None for a row that is too long."""
        starts, first, limits = self._index().starts, numbers.start, self._file.limits
        while first < numbers.stop:
            begin = int(starts[first])
            after = min(numbers.stop, max(first + 1, int(np.searchsorted(starts, begin + limits.batch, side="right")) - 1))
            if int(starts[after]) - begin > limits.row:
                yield first, None, []
                first += 1
                continue
            yield first, self._file.read(begin, int(starts[after])), (starts[first : after + 1] - begin).tolist()
            first = after


def digest(content: bytes) -> bytes:
    """64 bits of BLAKE2b of the content without the white space around it."""
    return hashlib.blake2b(content.strip(), digest_size=8).digest()
