"""CSV and TSV: the first record names the columns, each further one is a row of text cells, which stay as they stand.

Where records end is found by the quotes before each line end, in one pass; a file in which quotes stand elsewhere than around a field
is searched line by line instead. Fields follow RFC 4180. Cost of a row: one small parse by the standard library's csv.
"""

import csv
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from llamahome.data.files.cells import BadCell, canonical, row_value
from llamahome.data.files.header import Left, left_out, separator, separator_line, sign_name, tell_left
from llamahome.data.files.index import NO_LINES, Piece, Tell
from llamahome.data.files.jsonl import BOM
from llamahome.data.files.jsonrow import excerpt, read_text
from llamahome.data.files.quotes import QUOTE, find_records
from llamahome.data.files.stretches import Layout
from llamahome.data.files.watch import LONGEST_ROW, WatchedFile
from llamahome.data.records import Row
from llamahome.errors import DataError, Problem

_HEAD = 1 << 16
"""Bytes in which the names of the columns must end."""


@dataclass(frozen=True)
class Table:
    """What the first record says."""

    path: str
    delimiter: str
    columns: tuple[str, ...]
    begin: int
    """Offset after the first record."""
    line: int
    """Line there."""
    left: tuple[Left, ...] = ()
    """Columns that are left out."""


def table_layout(file: WatchedFile, tell: Tell, *, tabs: bool) -> Layout:
    """How to read the file as a table; raises DataError when its first record names no columns."""
    table = _read_header(file, tell, tabs=tabs)
    if table.delimiter != ("\t" if tabs else ","):
        tell(f"{file.path}: its columns are separated by {sign_name(table.delimiter)}")
    tell_left(file.path, table.columns, table.left, tell)
    reader = f"csv {table.delimiter!r}" + (f" without {[column.position for column in table.left]}" if table.left else "")
    return Layout(reader, partial(_scan, table), _record, partial(_parse, table), partial(_identity, table))


def _read_header(file: WatchedFile, tell: Tell, *, tabs: bool) -> Table:
    """The columns; a line `sep=;` before them is obeyed, otherwise the first records show what separates them."""
    head = file.read(0, min(_HEAD, file.size))
    begin = len(BOM) if head.startswith(BOM) else 0
    begin += len(head[begin:]) - len(head[begin:].lstrip(b"\r\n"))
    asked = None
    first = head.find(b"\n", begin) + 1
    if first and (asked := separator_line(head[begin:first].decode("utf-8", "replace"))):
        tell(f"{file.path}: its first line, sep={asked}, names the separator and is no row")
        begin = first
    end = begin
    while (end := head.find(b"\n", end) + 1) and head.count(QUOTE, begin, end) % 2:
        continue
    if not end and len(head) == _HEAD:
        raise DataError(_bad(file.path, 1, "the names of the columns do not end within 64 KiB", head[:200]))
    raw = _record(head[begin : end or len(head)])
    line = 1 + head.count(b"\n", 0, begin)
    text = read_text(raw, path=file.path, line=line)
    if isinstance(text, Problem):
        raise DataError(text)
    tested, whole = head[begin:].decode("utf-8", "replace"), len(head) == file.size
    delimiter = asked or separator(tested, usual="\t" if tabs else ",", whole=whole)
    cells = _split(file.path, line, text, delimiter) if text else []
    if isinstance(cells, Problem):
        raise DataError(cells)
    columns = [cell.strip() for cell in cells]
    left = left_out(columns, tested, delimiter, whole=whole) if text else ()
    _refuse_names(file.path, columns, left, line, raw)
    stop = end or len(head)
    return Table(file.path, delimiter, tuple(columns), stop, 1 + head.count(b"\n", 0, stop), left)


def _refuse_names(path: str, columns: list[str], left: tuple[Left, ...], line: int, raw: bytes) -> None:
    """DataError when a column that is read has no name, or that of another."""
    positions = {column.position for column in left}
    empty = [number for number, name in enumerate(columns, 1) if not name and number - 1 not in positions]
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if empty and raw:
        message = f"column {empty[0]} of {len(columns)} has no name"
        raise DataError(_bad(path, line, message, raw, "write a name for it in the first line"))
    if twice:
        raise DataError(_bad(path, line, f"two columns are named {twice[0]}", raw, "give each column a name of its own"))


def _scan(table: Table, file: WatchedFile) -> Iterator[Piece]:
    """Start and line of each record after the first."""
    yield from find_records(file, delimiter=table.delimiter.encode(), begin=table.begin, line=table.line)
    yield np.array([file.size]), NO_LINES


def _record(stretch: bytes) -> bytes:
    """The record without its line end and the blank lines after it."""
    return stretch.rstrip(b"\r\n")


def _parse(table: Table, stretch: bytes, line: int, number: int) -> Row | Problem:
    raw = _record(stretch)
    text = read_text(raw, path=table.path, line=line)
    cells = text if isinstance(text, Problem) else _split(table.path, line, text, table.delimiter)
    if isinstance(cells, Problem):
        return cells
    if len(cells) != len(table.columns):
        count = "1 field" if len(cells) == 1 else f"{len(cells)} fields"
        shown = [name or "(no name)" for name in table.columns[:6]]
        names = ", ".join(shown) + (", ..." if len(table.columns) > 6 else "")
        message = f"the row has {count}, the first line names {len(table.columns)} columns ({names})"
        sign = sign_name(table.delimiter)
        return _bad(
            table.path, line, message, raw, f'a field that holds {sign}, a quote or a line end stands in "quotes", its quotes doubled'
        )
    if len(cells) > 1 and cells[-1].strip() == table.columns[-1] and [cell.strip("\ufeff \t") for cell in cells] == [*table.columns]:
        hint = "remove this line; files that were joined keep the names of the first alone"
        return _bad(table.path, line, "the names of the columns stand here again, which is no row", raw, hint)
    values = dict(zip(table.columns, cells, strict=True))
    for column in table.left:
        if not column.fits(cells[column.position]):
            message = f"column {column.position + 1} is left out as an index, but here it holds {cells[column.position][:60]!r}"
            return _bad(table.path, line, message, raw, "write a name for it in the first line")
        values.pop(table.columns[column.position], None)
    try:
        return Row(index=number, source=table.path, line=line, value=row_value(values))
    except BadCell as error:
        return _bad(table.path, line, str(error), raw)


def _split(path: str, line: int, text: str, delimiter: str) -> list[str] | Problem:
    """The fields of one record."""
    before = csv.field_size_limit(LONGEST_ROW)
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True))
    except csv.Error as error:
        what = str(error)
        if "expected after" in what:
            what = "text stands after the closing quote of a field"
        elif "unexpected end" in what:
            what = "a quote is opened and not closed"
        elif "new-line" in what:
            what = "a line end (CR) stands within a field without quotes"
            target = Path(path).with_name(f"{Path(path).stem}-lines{Path(path).suffix}")
            hint = f"tr '\\r' '\\n' < {shlex.quote(path)} > {shlex.quote(str(target))}"
            return _bad(path, line, what, text.encode(), hint if "\n" not in text else None)
        return _bad(path, line, what, text.encode(), 'a field that holds a quote stands in "quotes", its own quotes doubled: "say ""yes"""')
    finally:
        csv.field_size_limit(before)


def _identity(table: Table, stretch: bytes) -> bytes:
    """The row in one spelling, so that a table hashes alike as CSV and as Parquet; a bad row as it stands."""
    found = _parse(table, stretch, 1, 0)
    return canonical(found.value) if isinstance(found, Row) else _record(stretch)


def _bad(path: str, line: int, message: str, raw: bytes, hint: str | None = None) -> Problem:
    shown = excerpt(raw[:400].decode("utf-8", "replace"), line)
    return Problem(code="data.bad-csv", message=message, where=f"{path}:{line}", excerpt=shown, hint=hint)
