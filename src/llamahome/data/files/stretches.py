"""Rows that are stretches of bytes in a file: JSONL lines, elements of a JSON array, CSV records, parts of a text.

A format gives three functions: where its rows begin, what of a stretch is the row, and what the row says. Cost of a row: one stat, one
pread and one parse. Memory: the index of the file, mapped from the cache when the file is large.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llamahome.data.files.index import Piece, RowIndex, Shelf, Tell
from llamahome.data.files.watch import LONGEST_ROW, WatchedFile
from llamahome.data.records import Row
from llamahome.errors import Problem
from llamahome.units import show_bytes

_TOGETHER = 1 << 22
"""Bytes of rows that are read at once, where rows follow each other."""


@dataclass(frozen=True)
class Layout:
    """How the rows of a format lie in a file."""

    reader: str
    """Name and settings; part of the key of everything cached."""
    scan: Callable[[WatchedFile], Iterator[Piece]]
    """One pass over the file: starts and lines of its rows, in pieces."""
    trim: Callable[[bytes], bytes]
    """The row's own bytes within its stretch."""
    parse: Callable[[bytes, int, int], Row | Problem]
    """The row from its stretch, line and number."""
    identity: Callable[[bytes], bytes] | None = None
    """What is hashed of a stretch, where it is not its trimmed bytes."""


class StretchRows:
    """The rows of one file."""

    def __init__(self, file: WatchedFile, layout: Layout, tell: Tell) -> None:
        self._file, self._layout = file, layout
        self._shelf = Shelf(file, layout.reader, tell)
        self._kept: RowIndex | None = None
        self._count = len(self._index())

    def __len__(self) -> int:
        return self._count

    def parsed(self, number: int) -> Row | Problem:
        """Row `number`, or what is wrong with it."""
        index = self._index()
        stretch, line = self._stretch(number), index.line(number)
        if stretch is None:
            return self._too_large(number, line)
        return self._layout.parse(stretch, line, number)

    def parsed_range(self, numbers: range) -> list[Row | Problem]:
        """Rows that follow each other; their bytes are read together, some MiB at a time."""
        found: list[Row | Problem] = []
        for begin, content, cuts in self._together(numbers):
            if content is None:
                found.append(self.parsed(begin))
                continue
            lines = self._index().lines[begin : begin + len(cuts) - 1].tolist() or range(begin + 1, begin + len(cuts))
            parse = self._layout.parse
            found += [parse(content[a:b], line, at) for at, ((a, b), line) in enumerate(zip(pairwise(cuts), lines, strict=True), begin)]
        return found

    def raw(self, number: int) -> bytes:
        """The row's bytes as they stand in the file; the first 64 MiB of one that is longer."""
        stretch = self._stretch(number)
        if stretch is None:
            start = int(self._index().starts[number])
            return self._file.read(start, start + LONGEST_ROW)
        return self._layout.trim(stretch)

    def hashes(self) -> NDArray[np.uint64]:
        """64 bits of BLAKE2b of each row, from the cache when they are there, otherwise in one pass over the file."""
        found = self._shelf.load("hashes")
        if found is None or len(found) != self._count:
            self._file.check()
            with self._shelf.keep("hashes") as writer:
                for digests in self._digests():
                    writer.append(np.frombuffer(digests, ">u8").astype(np.uint64).view(np.int64))
                found = writer.finish()
        return found.view(np.uint64)

    def close(self) -> None:
        """Give the file and its maps back; a later read takes them again."""
        self._file.close()
        if self._shelf.load_index() is not None:
            self._kept = None

    def _index(self) -> RowIndex:
        if self._kept is None:
            self._kept = self._shelf.load_index()
        if self._kept is None:
            self._kept = self._shelf.build_index(self._layout.scan(self._file))
        return self._kept

    def _stretch(self, number: int) -> bytes | None:
        """The bytes of row `number`; None when they are too many to be a row."""
        starts = self._index().starts
        begin, end = int(starts[number]), int(starts[number + 1])
        if end - begin <= LONGEST_ROW:
            return self._file.read(begin, end)
        head = self._layout.trim(self._file.read(begin, begin + LONGEST_ROW + 1))
        return head if len(head) <= LONGEST_ROW else None

    def _too_large(self, number: int, line: int) -> Problem:
        size = int(self._index().starts[number + 1]) - int(self._index().starts[number])
        return Problem(
            code="data.row-too-large",
            message=f"the row has {show_bytes(size)}; a row may have {show_bytes(LONGEST_ROW)}",
            where=f"{self._file.path}:{line}",
            hint=f"break line {line} into rows; look at it with: sed -n {line}p '{self._file.path}' | head -c 500",
        )

    def _digests(self) -> Iterator[bytes]:
        """Digests of the rows, joined, some thousand at a time."""
        identity = self._layout.identity or self._layout.trim
        for begin, content, cuts in self._together(range(self._count)):
            if content is None:
                yield digest(self.raw(begin))
            else:
                yield b"".join([digest(identity(content[a:b])) for a, b in pairwise(cuts)])

    def _together(self, numbers: range) -> Iterator[tuple[int, bytes | None, list[int]]]:
        """Bytes of these rows, some MiB at a time: the first row, and where each begins and ends in them. One too long: None."""
        starts, begin = self._index().starts, numbers.start
        while begin < numbers.stop:
            first = int(starts[begin])
            end = min(numbers.stop, max(begin + 1, int(np.searchsorted(starts, first + _TOGETHER, side="right")) - 1))
            if int(starts[end]) - first > LONGEST_ROW:
                yield begin, None, []
                begin += 1
                continue
            yield begin, self._file.read(first, int(starts[end])), (starts[begin : end + 1] - first).tolist()
            begin = end


def digest(content: bytes) -> bytes:
    """64 bits of BLAKE2b, without white space around the content."""
    return hashlib.blake2b(content.strip(), digest_size=8).digest()
