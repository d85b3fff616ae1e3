"""One JSON object a line. Blank lines are no rows, but line numbers stay those that an editor shows.

Cost: one pass over the bytes for the line ends, at the speed of the memory. Measured: benchmarks/index_speed.py.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from llamahome.data.files.index import NO_LINES, Piece
from llamahome.data.files.jsonrow import parse_row
from llamahome.data.files.stretches import Layout
from llamahome.data.files.watch import WatchedFile
from llamahome.data.records import Row
from llamahome.errors import Problem

BOM = b"\xef\xbb\xbf"
_WHITE = np.array([9, 10, 11, 12, 13, 32], np.uint8)
_LOOK = 1 << 16
"""Bytes of a line read at a time to see whether it is blank."""


def lines_layout(file: WatchedFile) -> Layout:
    """How to read the file as lines of JSON."""
    return Layout("jsonl", scan_lines, _line, partial(_parse, file.path))


def scan_lines(file: WatchedFile) -> Iterator[Piece]:
    """Start and line of each line that holds more than white space."""
    line, carried = 1, True
    begin = len(BOM) if file.read(0, min(len(BOM), file.size)) == BOM else 0
    for offset, block in file.blocks(begin):
        breaks = np.flatnonzero(block == 10)
        begins, numbers = breaks + 1, np.arange(line + 1, line + 1 + len(breaks))
        if carried:
            begins, numbers = np.append(0, begins), np.append(line, numbers)
        line += len(breaks)
        carried = len(begins) > 0 and int(begins[-1]) >= len(block)
        if carried:
            begins, numbers = begins[:-1], numbers[:-1]
        kept = _hold_something(file, offset, block, begins)
        yield begins[kept] + offset, numbers[kept]
    yield np.array([file.size]), NO_LINES


def _hold_something(file: WatchedFile, offset: int, block: NDArray[np.uint8], begins: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the lines are rows; only those that begin with white space are looked at one by one."""
    firsts = block[begins]
    kept: NDArray[np.bool_] = firsts > 32
    for number in np.flatnonzero(~kept & (firsts != 10)).tolist():
        kept[number] = firsts[number] not in _WHITE or not _is_blank(file, offset + int(begins[number]))
    return kept


def _is_blank(file: WatchedFile, start: int) -> bool:
    while start < file.size:
        part = file.read(start, min(file.size, start + _LOOK))
        head, ended, _ = part.partition(b"\n")
        if head.strip():
            return False
        if ended:
            return True
        start += len(part)
    return True


def _line(stretch: bytes) -> bytes:
    """The line without its end; a stretch may go on with blank lines."""
    end = stretch.find(b"\n")
    return stretch[:end] if end >= 0 else stretch


def _parse(path: str, stretch: bytes, line: int, number: int) -> Row | Problem:
    return parse_row(_line(stretch), path=path, line=line, index=number)
