"""Where the records of a CSV file begin: after line ends outside quotes, found in blocks without reading the fields.

A line end is outside when an even number of quotes stands before it. That holds as long as each quote stands beside a delimiter, a line
end or another quote, which is checked for every one; from the first that does not (a quote within plain text) the rest is searched line by
line, which is slower.
"""

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from llamahome.data.files.index import Piece
from llamahome.data.files.watch import WatchedFile
from llamahome.errors import DataError, Problem

QUOTE = b'"'
_LINE, _RETURN = 10, 13
_BATCH = 4096
"""Records in a piece when lines are searched one by one."""


class _Scan:
    """What is carried from block to block."""

    def __init__(self, delimiter: bytes, line: int) -> None:
        self.inside = 0
        self.line = line
        """Line in which the next block begins."""
        self.opened = line
        """Line of the quote that is open."""
        self._before, self._closing = _LINE, False
        self._may_open = np.isin(np.arange(256), [delimiter[0], _LINE, QUOTE[0]])
        self._may_follow = np.isin(np.arange(256), [delimiter[0], _LINE, _RETURN, QUOTE[0]])

    def ends(self, block: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64], int | None]:
        """Where records end in this block, the lines after them, and the place from which quotes cannot be trusted."""
        breaks = np.flatnonzero(block == _LINE)
        lines = np.arange(self.line + 1, self.line + 1 + len(breaks))
        quotes = np.flatnonzero(block == QUOTE[0])
        stray = self._stray(block, quotes)
        outside = np.ones(len(breaks), np.bool_)
        if len(quotes) or self.inside:
            outside = (np.searchsorted(quotes, breaks) + self.inside) & 1 == 0
            self.inside = (self.inside + len(quotes)) & 1
            if self.inside and len(quotes):
                self.opened = self.line + int(np.searchsorted(breaks, quotes[-1]))
        if stray is not None:
            outside &= breaks < stray
        self.line += len(breaks)
        return breaks[outside] + 1, lines[outside], stray

    def _stray(self, block: NDArray[np.uint8], quotes: NDArray[np.int64]) -> int | None:
        """The first quote that is neither beside a delimiter, a line end nor another quote; -1: the last one of the block before."""
        if self._closing and not self._may_follow[block[0]]:
            return -1
        before, self._before, self._closing = self._before, int(block[-1]), False
        if not len(quotes):
            return None
        opening = (np.arange(len(quotes)) + self.inside) & 1 == 0
        previous = block[quotes - 1]
        if quotes[0] == 0:
            previous[0] = before
        following = block[np.minimum(quotes + 1, len(block) - 1)]
        self._closing = bool(quotes[-1] == len(block) - 1 and not opening[-1])
        wrong = np.flatnonzero(np.where(opening, ~self._may_open[previous], ~self._may_follow[following]))
        return int(quotes[wrong[0]]) if len(wrong) else None


def find_records(file: WatchedFile, *, delimiter: bytes, begin: int, line: int) -> Iterator[Piece]:
    """Start and line of each record from offset `begin` in `line` on; raises DataError for a quote that is never closed."""
    scan = _Scan(delimiter, line)
    start, start_line = begin, line
    for offset, block in file.blocks(begin):
        ends, lines, stray = scan.ends(block)
        begins, numbers = np.append(start, ends + offset), np.append(start_line, lines)
        yield _not_blank(file, offset, block, begins[:-1], numbers[:-1])
        start, start_line = int(begins[-1]), int(numbers[-1])
        if stray is not None:
            yield from _by_lines(file, delimiter, start, start_line)
            return
    if scan.inside:
        raise DataError(_never_closed(file, scan.opened))
    if start < file.size and file.read(start, min(file.size, start + 2)).strip(b"\r\n"):
        yield np.array([start]), np.array([start_line])


def _not_blank(file: WatchedFile, offset: int, block: NDArray[np.uint8], begins: NDArray[np.int64], lines: NDArray[np.int64]) -> Piece:
    """Without the records that are an empty line. The first of them may begin before this block."""
    inside = begins >= offset
    firsts = np.full(len(begins), ord("x"), np.uint8)
    firsts[inside] = block[begins[inside] - offset]
    kept = firsts != _LINE
    for number in np.flatnonzero(~inside | (firsts == _RETURN)).tolist():
        begin = int(begins[number])
        kept[number] = bool(file.read(begin, min(file.size, begin + 2)).strip(b"\r\n"))
    return begins[kept], lines[kept]


def _by_lines(file: WatchedFile, delimiter: bytes, begin: int, line: int) -> Iterator[Piece]:
    """The same by reading each line: only a quote at the beginning of a field opens it."""
    opening = re.compile(b"(?:^|" + re.escape(delimiter) + b')"')
    found: list[tuple[int, int]] = []
    inside, whole, opened = False, True, line
    for offset, raw in file.lines(begin):
        if whole and not inside and raw.strip(b"\r\n"):
            found.append((offset, line))
        before, inside = inside, _ends_inside(raw, inside, opening)
        opened = line if inside and not before else opened
        whole = raw.endswith(b"\n")
        line += whole
        if len(found) >= _BATCH:
            yield _piece(found)
            found = []
    if inside:
        raise DataError(_never_closed(file, opened))
    if found:
        yield _piece(found)


def _piece(found: list[tuple[int, int]]) -> Piece:
    starts, lines = zip(*found, strict=True)
    return np.array(starts, np.int64), np.array(lines, np.int64)


def _ends_inside(raw: bytes, inside: bool, opening: re.Pattern[bytes]) -> bool:
    """Whether a quoted field is open after this line."""
    at = 0
    while True:
        if inside:
            at = raw.find(QUOTE, at)
            if at < 0:
                return True
            if raw[at + 1 : at + 2] == QUOTE:
                at += 2
                continue
            inside, at = False, at + 1
        found = opening.search(raw, at)
        if found is None:
            return False
        inside, at = True, found.end()


def _never_closed(file: WatchedFile, line: int) -> Problem:
    return Problem(
        code="data.bad-csv",
        message="a quote is opened here and never closed, so that everything after it would be one field",
        where=f"{file.path}:{line}",
        hint=f"close it in line {line}; a field's own quotes are doubled",
    )
