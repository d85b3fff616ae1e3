"""JSON files: one object a line (JSONL), or one array of objects in one line or many.

Line ends of JSONL are found in one pass, at the speed of the memory (benchmarks/index_speed.py); blank lines are no rows. In an array,
one pass over quotes, escapes and brackets finds where each element ends without parsing it; an element is parsed when its row is read.
An array that does not close is refused, with the line of its first broken element.
"""

import codecs
import shlex
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from llamahome.data.files.byte_ranges import RangeFormat
from llamahome.data.files.commands import move
from llamahome.data.files.guarded_file import GuardedFile
from llamahome.data.files.index import NO_LINES, RowStarts
from llamahome.data.files.jsonrow import excerpt, parse_row
from llamahome.data.records import Row, place_of
from llamahome.errors import DataError, Problem

_WHITE = b" \t\r\n"
_LOOK = 1 << 16
"""Bytes read at a time to see whether a line, or what follows an array, is blank."""
_QUOTE, _ESCAPE, _LINE = b'"\\\n'
_CURLY = ord("{")
"""With bit 32 set square brackets are curly ones."""


def lines_layout(file: GuardedFile) -> RangeFormat:
    """How to read the file as JSON lines."""
    return RangeFormat("jsonl", scan_lines, _line, partial(_parse_line, file.path))


def scan_lines(file: GuardedFile) -> Iterator[RowStarts]:
    """Offset and line number of each line that is not blank; line numbers are those of an editor."""
    line, carried = 1, True
    begin = len(codecs.BOM_UTF8) if file.head().startswith(codecs.BOM_UTF8) else 0
    for offset, block in file.blocks(begin):
        line_ends = np.flatnonzero(block == _LINE)
        begins, numbers = line_ends + 1, np.arange(line + 1, line + 1 + len(line_ends))
        if carried:
            begins, numbers = np.append(0, begins), np.append(line, numbers)
        line += len(line_ends)
        carried = len(begins) > 0 and int(begins[-1]) >= len(block)
        if carried:
            begins, numbers = begins[:-1], numbers[:-1]
        kept = _not_blank(file, offset, block, begins)
        yield begins[kept] + offset, numbers[kept]
    yield np.array([file.size]), NO_LINES


def _not_blank(file: GuardedFile, offset: int, block: NDArray[np.uint8], begins: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the lines are rows; only lines that begin with white space are read one by one."""
    first_bytes = block[begins]
    kept: NDArray[np.bool_] = first_bytes > 32
    for number in np.flatnonzero(~kept & (first_bytes != _LINE)).tolist():
        kept[number] = not bytes(first_bytes[number : number + 1]).isspace() or not _is_blank(file, offset + int(begins[number]))
    return kept


def _is_blank(file: GuardedFile, start: int) -> bool:
    while start < file.size:
        part = file.read(start, min(file.size, start + _LOOK))
        head, line_end, _ = part.partition(b"\n")
        if head.strip():
            return False
        if line_end:
            return True
        start += len(part)
    return True


def _line(raw: bytes) -> bytes:
    """The line without its end and without the blank lines that may follow."""
    return raw.partition(b"\n")[0]


def _parse_line(path: str, raw: bytes, line: int, number: int) -> Row | Problem:
    return parse_row(_line(raw), path=path, line=line, index=number)


class _ArrayScan:
    """The state carried from block to block: whether a string is open, an escape pending, the depth of brackets, the line."""

    def __init__(self) -> None:
        self.in_string = self.depth = 0
        self.escaped = False
        self.line = 1
        self.end = -1
        """Offset after the last element that ended; after the opening bracket before there is one."""
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
        quotes = (marks == _QUOTE) & ~self._escaped_marks(places, marks, len(block))
        strings = np.cumsum(quotes) + self.in_string
        brackets = np.flatnonzero((marks & 1 == 1) & (strings & 1 == 0))  # { } [ ] are odd, the other marks even
        line_ends = np.cumsum(marks == _LINE)
        steps = np.where(marks[brackets] | 32 == _CURLY, 1, -1)
        depths = self.depth + np.cumsum(steps)
        ended = (depths == 1) & (steps < 0)
        zero = np.flatnonzero(depths <= 0)
        if len(zero):
            self.closed = offset + int(places[brackets[zero[0]]]) + 1
            ended[zero[0] :] = False
        lines = self.line + line_ends[brackets[ended]]
        if len(places):
            self.in_string, self.line = int(strings[-1]) & 1, self.line + int(line_ends[-1])
            self.depth = int(depths[-1]) if len(depths) else self.depth
        return places[brackets[ended]] + 1 + offset, lines

    def _marks(self, block: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Where quotes, backslashes, brackets and line ends are; also some | and control characters, which do no harm."""
        size = len(block)
        if len(self._mask) < size:
            self._folded, self._near, self._mask = np.empty(size, np.uint8), np.empty(size, np.uint8), np.empty(size, np.bool_)
        folded, near, mask = self._folded[:size], self._near[:size], self._mask[:size]
        np.bitwise_or(block, 32, out=folded)
        np.subtract(folded, _CURLY, out=near)
        np.less_equal(near, 2, out=mask)  # [ \ ] and { | } in one comparison
        for mark in (_QUOTE, _LINE):
            np.equal(block, mark, out=near.view(np.bool_))
            mask |= near.view(np.bool_)
        return np.flatnonzero(mask)

    def _escaped_marks(self, places: NDArray[np.int64], marks: NDArray[np.uint8], size: int) -> NDArray[np.bool_]:
        """Which marks follow a backslash that is not escaped itself."""
        pending, self.escaped = self.escaped, False
        escaped = np.zeros(size + 1, np.bool_)
        escaped[0] = pending
        backslashes = places[marks == _ESCAPE]
        if len(backslashes):
            heads = np.where(np.diff(backslashes, prepend=-2) != 1, backslashes, 0)
            if pending and backslashes[0] == 0:
                heads[0] = 1  # the first of this run is escaped itself
            escaping = backslashes[(backslashes - np.maximum.accumulate(heads)) & 1 == 0]
            escaped[escaping + 1] = True
            self.escaped = bool(escaped[-1])
        return escaped[places]


def array_layout(file: GuardedFile) -> RangeFormat:
    """How to read the file as one array."""
    return RangeFormat("array", scan_array, _element, partial(_parse_element, file.path))


def scan_array(file: GuardedFile) -> Iterator[RowStarts]:
    """Where the range of each element begins (after the element before it) and its line; DataError if the array does not close."""
    scan = _ArrayScan()
    yield from _elements(file, scan)
    yield np.array([scan.end]), NO_LINES
    rest = file.read(scan.end, min(scan.closed or file.size, scan.end + file.limits.row))
    beyond = file.read(scan.closed, min(file.size, scan.closed + _LOOK)).strip(_WHITE) if scan.closed is not None else b""
    if scan.closed is None or rest.strip(_WHITE) != b"]" or beyond:
        raise DataError(_not_an_array(file, scan, rest, beyond))


def _elements(file: GuardedFile, scan: _ArrayScan) -> Iterator[RowStarts]:
    for offset, block in file.blocks():
        if scan.end < 0:
            bracket = block.tobytes().find(b"[")
            scan.end = offset + bracket + 1 if bracket >= 0 else -1
            scan.end_line += int((block[: bracket if bracket >= 0 else None] == _LINE).sum())
        ends, lines = scan.ends(offset, block)
        if len(ends):
            starts = np.append(scan.end, ends[:-1]), np.append(scan.end_line, lines[:-1])
            scan.end, scan.end_line = int(ends[-1]), int(lines[-1])
            yield starts


def _element(raw: bytes) -> bytes:
    """The element without the comma before it."""
    return raw.strip(_WHITE).removeprefix(b",").strip(_WHITE)


def _parse_element(path: str, raw: bytes, line: int, number: int) -> Row | Problem:
    element = _element(raw)
    before = raw[: raw.index(element)]
    line += before.count(b"\n")
    where = place_of(path, line, number)
    if number and b"," not in before:
        shown = excerpt(element[:200].decode("utf-8", "replace"), line)
        return Problem(code="data.bad-json-array", message="a comma is missing before this element", where=where, excerpt=shown)
    row = parse_row(element, path=path, line=line, index=number)
    if not isinstance(row, Problem):
        return row
    in_first_line = row.where == f"{path}:{line}"
    if in_first_line:
        row = replace(row, where=where)
    if row.code not in ("data.bad-json", "data.not-an-object"):
        return row
    message = f"{row.message} of the element" if in_first_line and "column" in row.message else row.message
    return replace(row, message=message, hint=None)  # the hint is for lines


def _not_an_array(file: GuardedFile, scan: _ArrayScan, rest: bytes, beyond: bytes) -> Problem:
    """Why the file is not an array: its first broken element, or what is wrong with its end."""
    left = rest.strip(_WHITE)
    torn = scan.closed is None and left.strip(_WHITE + b",")
    broken = _first_broken(file) or (_parse_element(file.path, rest, scan.end_line, 0) if torn else None)
    if isinstance(broken, Problem):
        hint = "the file is cut short: write or copy it again" if torn and "unexpected end" in broken.message else None
        return replace(broken, code="data.bad-json-array", message=f"the array breaks here: {broken.message}", hint=hint)
    line, hint = scan.end_line, None
    left = left.removesuffix(b"]").rstrip(_WHITE) if scan.closed is not None else left
    if beyond:
        message, left = "something follows the end of the array", beyond
        if beyond[:1] in b"[{":
            hint = f"lines that are JSON each are read from a .jsonl file: {move(file.path, file.path + 'l')}"
        line += rest.count(b"\n")
    elif left.strip(_WHITE + b","):
        message = "an element of the array is not an object"
    elif scan.closed is None:
        message, hint = "the array is not closed: ] is missing at the end of the file", f"printf ']' >> {shlex.quote(file.path)}"
        hint = "remove the last comma and write ]" if left else hint
    else:
        message, hint = "there is a comma before the end of the array", "remove that comma"
    shown = excerpt(left[:200].decode("utf-8", "replace"), line)
    return Problem(code="data.bad-json-array", message=message, where=f"{file.path}:{line}", excerpt=shown, hint=hint)


def _first_broken(file: GuardedFile) -> Problem | None:
    scan, number = _ArrayScan(), 0
    for starts, lines in _elements(file, scan):
        ends = np.append(starts[1:], scan.end)
        for begin, end, line in zip(starts.tolist(), ends.tolist(), lines.tolist(), strict=True):
            row = _parse_element(file.path, file.read(begin, min(end, begin + file.limits.row)), line, number)
            if isinstance(row, Problem):
                return row
            number += 1
    return None
