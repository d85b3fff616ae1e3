"""Where the records of a CSV file begin: after line ends outside quotes, found in blocks without parsing the fields.

A line end is outside quotes if an even number of quotes is before it. That is true as long as each quote is next to a delimiter, a line
end or another quote, which is checked for every quote. After the first that is not (a quote within plain text) the rest of the file is
scanned line by line, which is slower.
"""

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from llamahome.data.files.guarded_file import GuardedFile
from llamahome.data.files.index import RowStarts
from llamahome.errors import DataError, Problem

QUOTE = b'"'
_LINE, _RETURN = b"\n\r"
_BATCH = 4096
"""Records that are yielded together when lines are scanned one by one."""


class _Scan:
    """The state carried from block to block."""

    def __init__(self, delimiter: bytes, line: int) -> None:
        self.in_quotes = 0
        self.line = line
        """Line in which the next block begins."""
        self.opened = line
        """Line of the quote that is open."""
        self._before, self._closing = _LINE, False
        self._may_open = np.isin(np.arange(256), [delimiter[0], _LINE, QUOTE[0]])
        self._may_follow = np.isin(np.arange(256), [delimiter[0], _LINE, _RETURN, QUOTE[0]])

    def ends(self, block: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64], int | None]:
        """Where records end in this block, the lines after them, and the first quote within plain text, if there is one."""
        line_ends = np.flatnonzero(block == _LINE)
        lines = np.arange(self.line + 1, self.line + 1 + len(line_ends))
        quotes = np.flatnonzero(block == QUOTE[0])
        stray = self._stray(block, quotes)
        outside = np.ones(len(line_ends), np.bool_)
        if len(quotes) or self.in_quotes:
            outside = (np.searchsorted(quotes, line_ends) + self.in_quotes) & 1 == 0
            self.in_quotes = (self.in_quotes + len(quotes)) & 1
            if self.in_quotes and len(quotes):
                self.opened = self.line + int(np.searchsorted(line_ends, quotes[-1]))
        if stray is not None:
            outside &= line_ends < stray
        self.line += len(line_ends)
        return line_ends[outside] + 1, lines[outside], stray

    def _stray(self, block: NDArray[np.uint8], quotes: NDArray[np.int64]) -> int | None:
        """The first quote that is not next to a delimiter, a line end or another quote; -1 if it is the last byte of the block before."""
        if self._closing and not self._may_follow[block[0]]:
            return -1
        before, self._before, self._closing = self._before, int(block[-1]), False
        if not len(quotes):
            return None
        opening = (np.arange(len(quotes)) + self.in_quotes) & 1 == 0
        previous = block[quotes - 1]
        if quotes[0] == 0:
            previous[0] = before
        following = block[np.minimum(quotes + 1, len(block) - 1)]
        self._closing = bool(quotes[-1] == len(block) - 1 and not opening[-1])
        wrong = np.flatnonzero(np.where(opening, ~self._may_open[previous], ~self._may_follow[following]))
        return int(quotes[wrong[0]]) if len(wrong) else None


def find_records(file: GuardedFile, *, delimiter: bytes, begin: int, line: int) -> Iterator[RowStarts]:
    """Offset and line of each record from offset `begin` in `line` on; raises DataError for a quote that is never closed."""
    scan = _Scan(delimiter, line)
    start, start_line = begin, line
    for offset, block in file.blocks(begin):
        ends, lines, stray = scan.ends(block)
        begins, numbers = np.append(start, ends + offset), np.append(start_line, lines)
        yield _not_blank(file, offset, block, begins[:-1], numbers[:-1])
        start, start_line = int(begins[-1]), int(numbers[-1])
        if stray is not None:
            yield from _find_by_lines(file, delimiter, start, start_line)
            return
    if scan.in_quotes:
        raise DataError(_never_closed(file, scan.opened))
    if start < file.size and _holds_text(file, start):
        yield np.array([start]), np.array([start_line])


def _not_blank(file: GuardedFile, offset: int, block: NDArray[np.uint8], begins: NDArray[np.int64], lines: NDArray[np.int64]) -> RowStarts:
    """The records that are not an empty line. The first of them may begin before this block."""
    inside = begins >= offset
    first_bytes = np.full(len(begins), ord("x"), np.uint8)
    first_bytes[inside] = block[begins[inside] - offset]
    kept = first_bytes != _LINE
    for number in np.flatnonzero(~inside | (first_bytes == _RETURN)).tolist():
        kept[number] = _holds_text(file, int(begins[number]))
    return begins[kept], lines[kept]


def _holds_text(file: GuardedFile, begin: int) -> bool:
    return bool(file.read(begin, min(file.size, begin + 2)).strip(b"\r\n"))


def _find_by_lines(file: GuardedFile, delimiter: bytes, begin: int, line: int) -> Iterator[RowStarts]:
    """The same by reading each line: only a quote at the beginning of a field opens it."""
    opening = re.compile(b"(?:^|" + re.escape(delimiter) + b')"')
    starts: list[int] = []
    lines: list[int] = []
    in_quotes, whole, opened = False, True, line
    for offset, raw in file.lines(begin):
        if whole and not in_quotes and raw.strip(b"\r\n"):
            starts.append(offset)
            lines.append(line)
        before, in_quotes = in_quotes, _ends_in_quotes(raw, in_quotes, opening)
        opened = line if in_quotes and not before else opened
        whole = raw.endswith(b"\n")
        line += whole
        if len(starts) >= _BATCH:
            yield np.array(starts, np.int64), np.array(lines, np.int64)
            starts, lines = [], []
    if in_quotes:
        raise DataError(_never_closed(file, opened))
    yield np.array(starts, np.int64), np.array(lines, np.int64)


def _ends_in_quotes(raw: bytes, in_quotes: bool, opening: re.Pattern[bytes]) -> bool:
    """Whether a quoted field is open after this line."""
    at = 0
    while True:
        if in_quotes:
            at = raw.find(QUOTE, at)
            if at < 0:
                return True
            if raw[at + 1 : at + 2] == QUOTE:
                at += 2
                continue
            in_quotes, at = False, at + 1
        match = opening.search(raw, at)
        if match is None:
            return False
        in_quotes, at = True, match.end()


def _never_closed(file: GuardedFile, line: int) -> Problem:
    return Problem(
        code="data.bad-csv",
        message="a quote is opened here and never closed, so everything after it would be one field",
        where=f"{file.path}:{line}",
        hint=f"close it in line {line}; double a field's own quotes",
    )
