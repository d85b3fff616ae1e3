"""A JSON array of objects, in one line or many: each element is a row.

One pass over quotes, escapes and brackets finds where each element ends, without reading what is in it; what is between two ends is parsed
when the row is asked for. An array that does not close is refused, with the line of its first broken element.
"""

import shlex
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from llamahome.data.files.index import NO_LINES, Piece
from llamahome.data.files.jsonrow import excerpt, parse_row
from llamahome.data.files.stretches import Layout
from llamahome.data.files.watch import LONGEST_ROW, WatchedFile
from llamahome.data.records import Row, place_of
from llamahome.errors import DataError, Problem

_QUOTE, _ESCAPE, _LINE = 34, 92, 10
_WHITE = b" \t\r\n"
_OPENS = ord("{")
"""With bit 32 set the square brackets are the curly ones."""
_TAIL = 1 << 16


class _Scan:
    """What is carried from block to block: whether a string is open, an escape pending, how deep the brackets are, the line."""

    def __init__(self) -> None:
        self.inside = self.depth = 0
        self.escaped = False
        self.line = 1
        self.end = -1
        """Offset after the last element that ended; of the opening bracket before there is one."""
        self.end_line = 1
        self.closed: int | None = None
        """Offset after the bracket that closes the array."""
        self._folded, self._near, self._mask = np.empty(0, np.uint8), np.empty(0, np.uint8), np.empty(0, np.bool_)

    def ends(self, offset: int, block: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where elements of the array end in this block, and in which line."""
        if self.closed is not None:
            return NO_LINES, NO_LINES
        places = self._marks(block)
        marks = block[places]
        quotes = (marks == _QUOTE) & ~self._struck(places, marks, len(block))
        within = np.cumsum(quotes) + self.inside
        brackets = np.flatnonzero((marks & 1 == 1) & (within & 1 == 0))  # { } [ ] are odd, the other marks even
        breaks = np.cumsum(marks == _LINE)
        steps = np.where(marks[brackets] | 32 == _OPENS, 1, -1)
        depths = self.depth + np.cumsum(steps)
        ended = (depths == 1) & (steps < 0)
        zero = np.flatnonzero(depths <= 0)
        if len(zero):
            self.closed = offset + int(places[brackets[zero[0]]]) + 1
            ended[zero[0] :] = False
        lines = self.line + breaks[brackets[ended]]
        if len(places):
            self.inside, self.line = int(within[-1]) & 1, self.line + int(breaks[-1])
            self.depth = int(depths[-1]) if len(depths) else self.depth
        return places[brackets[ended]] + 1 + offset, lines

    def _marks(self, block: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Where quotes, backslashes, brackets and line ends stand, and some | and control characters, which do no harm."""
        size = len(block)
        if len(self._mask) < size:
            self._folded, self._near, self._mask = np.empty(size, np.uint8), np.empty(size, np.uint8), np.empty(size, np.bool_)
        folded, near, mask = self._folded[:size], self._near[:size], self._mask[:size]
        np.bitwise_or(block, 32, out=folded)
        np.subtract(folded, _OPENS, out=near)
        np.less_equal(near, 2, out=mask)  # [ \ ] and { | } in one comparison
        for mark in (_QUOTE, _LINE):
            np.equal(block, mark, out=near.view(np.bool_))
            mask |= near.view(np.bool_)
        return np.flatnonzero(mask)

    def _struck(self, places: NDArray[np.int64], marks: NDArray[np.uint8], size: int) -> NDArray[np.bool_]:
        """Which marks come right after a backslash that is not itself after one, and so mean nothing."""
        pending, self.escaped = self.escaped, False
        struck = np.zeros(size + 1, np.bool_)
        struck[0] = pending
        escapes = places[marks == _ESCAPE]
        if len(escapes):
            heads = np.where(np.diff(escapes, prepend=-2) != 1, escapes, 0)
            if pending and escapes[0] == 0:
                heads[0] = 1  # the first of this run is escaped itself
            escaping = escapes[(escapes - np.maximum.accumulate(heads)) & 1 == 0]
            struck[escaping + 1] = True
            self.escaped = bool(struck[-1])
        return struck[places]


def array_layout(file: WatchedFile) -> Layout:
    """How to read the file as one array."""
    return Layout("array", scan_array, _element, partial(_parse, file.path))


def scan_array(file: WatchedFile) -> Iterator[Piece]:
    """Where each element's stretch begins (after the element before it) and the line; raises DataError when the array does not close."""
    scan = _Scan()
    yield from _elements(file, scan)
    yield np.array([scan.end]), NO_LINES
    rest = file.read(scan.end, min(scan.closed or file.size, scan.end + LONGEST_ROW))
    beyond = file.read(scan.closed, min(file.size, scan.closed + _TAIL)).strip(_WHITE) if scan.closed is not None else b""
    if scan.closed is None or rest.strip(_WHITE) != b"]" or beyond:
        raise DataError(_refused(file, scan, rest, beyond))


def _elements(file: WatchedFile, scan: _Scan) -> Iterator[Piece]:
    for offset, block in file.blocks():
        if scan.end < 0:
            bracket = block.tobytes().find(b"[")
            scan.end = offset + bracket + 1 if bracket >= 0 else -1
            scan.end_line += int((block[: bracket if bracket >= 0 else None] == _LINE).sum())
        ends, lines = scan.ends(offset, block)
        if len(ends):
            piece = np.append(scan.end, ends[:-1]), np.append(scan.end_line, lines[:-1])
            scan.end, scan.end_line = int(ends[-1]), int(lines[-1])
            yield piece


def _element(stretch: bytes) -> bytes:
    """The element without the comma before it."""
    return stretch.strip(_WHITE).removeprefix(b",").strip(_WHITE)


def _parse(path: str, stretch: bytes, line: int, number: int) -> Row | Problem:
    element = _element(stretch)
    before = stretch[: stretch.index(element)]
    line += before.count(b"\n")
    if number and b"," not in before:
        shown = excerpt(element[:200].decode("utf-8", "replace"), line)
        where = place_of(path, line, number)
        return Problem(code="data.bad-json-array", message="a comma is missing before this element", where=where, excerpt=shown)
    found = parse_row(element, path=path, line=line, index=number)
    if not isinstance(found, Problem):
        return found
    first = found.where == f"{path}:{line}"
    if first:
        found = replace(found, where=place_of(path, line, number))
    if found.code not in ("data.bad-json", "data.not-an-object"):
        return found
    first = first and found.code == "data.bad-json"
    return replace(found, message=found.message + (" of the element" if first else ""), hint=None)  # its hints are for lines


def _refused(file: WatchedFile, scan: _Scan, rest: bytes, beyond: bytes) -> Problem:
    """Why the array is not one: its first broken element, or what is wrong with its end."""
    left = rest.strip(_WHITE)
    torn = scan.closed is None and left.strip(_WHITE + b",")
    broken = _first_broken(file) or (_parse(file.path, rest, scan.end_line, 0) if torn else None)
    if isinstance(broken, Problem):
        hint = "the file is cut short: write or copy it again" if torn and "unexpected end" in broken.message else None
        return replace(broken, code="data.bad-json-array", message=f"the array breaks here: {broken.message}", hint=hint)
    line, hint = scan.end_line, None
    left = left.removesuffix(b"]").rstrip(_WHITE) if scan.closed is not None else left
    if beyond:
        message, left = "something follows the end of the array", beyond
        if beyond[:1] in b"[{":
            hint = f"lines that are JSON each are read from a .jsonl file: mv {shlex.quote(file.path)} {shlex.quote(file.path + 'l')}"
        line += rest.count(b"\n")
    elif left.strip(_WHITE + b","):
        message = "an element of the array is not an object"
    elif scan.closed is None:
        message, hint = "the array is not closed: ] is missing at the end of the file", f"printf ']' >> {shlex.quote(file.path)}"
        hint = hint if not left else "remove the last comma and write ]"
    else:
        message, hint = "a comma stands before the end of the array", "remove that comma"
    shown = excerpt(left[:200].decode("utf-8", "replace"), line)
    return Problem(code="data.bad-json-array", message=message, where=f"{file.path}:{line}", excerpt=shown, hint=hint)


def _first_broken(file: WatchedFile) -> Problem | None:
    scan, number = _Scan(), 0
    for starts, lines in _elements(file, scan):
        ends = np.append(starts[1:], scan.end)
        for begin, end, line in zip(starts.tolist(), ends.tolist(), lines.tolist(), strict=True):
            found = _parse(file.path, file.read(begin, min(end, begin + LONGEST_ROW)), line, number)
            if isinstance(found, Problem):
                return found
            number += 1
    return None
