"""CSV and TSV: the first record names the columns, each further record is a row of text cells, which stay as they are.

csv_records.py finds where records begin. The delimiter and the columns to leave out are tested on the first records: a delimiter must give
every record as many fields as there are names; a column without a name is left out if it is empty or counts the rows, as the index of
pandas does. Fields follow RFC 4180. Cost: 64 KiB for the header, and for a row one small parse by the standard library's csv.
"""

import codecs
import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from llamahome.data.files.byte_ranges import RangeFormat
from llamahome.data.files.commands import break_at_returns, lists_of_python, sibling
from llamahome.data.files.csv_dialects import other_dialect
from llamahome.data.files.csv_records import QUOTE, find_records
from llamahome.data.files.guarded_file import LONGEST_ROW, GuardedFile
from llamahome.data.files.index import NO_LINES, Notify, RowStarts
from llamahome.data.files.jsonrow import excerpt, read_text
from llamahome.data.files.table_values import BadValue, canonical, row_value
from llamahome.data.records import Row
from llamahome.errors import DataError, Problem

_DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "|", "\x01": "U+0001, as in Hive", "\x1f": "U+001F"}
_DELIMITERS |= {"^": "^", "~": "~", ":": "a colon"}
_RARE = "^~:"
"""Delimiters that are also common in text, so at least one record must confirm them."""
_TESTED = 50
"""Records."""
_SEP_LINE = re.compile(r'("?)sep=([\x01-\x7f])\1', re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(\.0)?")
_INDEX_NAME = re.compile(r"Unnamed: \d+(_level_\d+)?")
_COLUMN_NAME = re.compile(r"[\w. -]{1,60}")


@dataclass(frozen=True)
class _LeftOut:
    """A column that is left out."""

    position: int
    counts: bool
    """Whether it numbers the rows; otherwise it is empty."""

    def fits(self, cell: str) -> bool:
        """Whether a cell is of the kind for which the column was left out."""
        return not cell.strip() or (self.counts and _NUMBER.fullmatch(cell.strip()) is not None)


@dataclass(frozen=True)
class _Header:
    """What the first record says."""

    path: str
    delimiter: str
    columns: tuple[str, ...]
    end: int
    """Offset after the first record."""
    line: int
    """Line there."""
    left_out: tuple[_LeftOut, ...] = ()


def table_layout(file: GuardedFile, notify: Notify, *, tabs: bool) -> RangeFormat:
    """How to read the file as a table; raises DataError if its first record names no columns."""
    header = _read_header(file, notify, usual="\t" if tabs else ",")
    if header.delimiter != ("\t" if tabs else ","):
        notify(f"{file.path}: its columns are separated by {_name(header.delimiter)}")
    for column in header.left_out:
        name = header.columns[column.position]
        shown = f"column {column.position + 1}, {name!r}," if name else f"column {column.position + 1}"
        why = "it counts the rows, as the index of pandas does" if column.counts else "it has no name and is empty"
        notify(f"{file.path}: {shown} is left out: {why}")
    without = f" without {[column.position for column in header.left_out]}" if header.left_out else ""
    key = f"csv {header.delimiter!r}{without}"
    return RangeFormat(key, partial(_scan, header), _trim, partial(_parse, header), partial(_hashed, header))


def _read_header(file: GuardedFile, notify: Notify, *, usual: str) -> _Header:
    """The columns. The delimiter is that of a line `sep=;` before them, as Excel writes it, or else tested on the first records."""
    head = file.head()
    whole = len(head) == file.size
    begin = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    begin += len(head[begin:]) - len(head[begin:].lstrip(b"\r\n"))
    sep_line = _SEP_LINE.fullmatch(head[begin:].partition(b"\n")[0].decode("utf-8", "replace").rstrip("\r"))
    delimiter = sep_line[2] if sep_line and sep_line[2] not in '"\r\n' and b"\n" in head[begin:] else None
    if delimiter is not None:
        notify(f"{file.path}: its first line, sep={delimiter}, names the delimiter and is not a row")
        begin = head.find(b"\n", begin) + 1
    end = begin
    while (end := head.find(b"\n", end) + 1) and head.count(QUOTE, begin, end) % 2:
        continue
    if not end and not whole:
        raise DataError(_bad(file.path, 1, "the names of the columns do not end within 64 KiB", head[:200]))
    end = end or len(head)
    raw = _trim(head[begin:end])
    line = 1 + head.count(b"\n", 0, begin)
    text = read_text(raw, path=file.path, line=line)
    if isinstance(text, Problem):
        raise DataError(text)
    tested = head[begin:].decode("utf-8", "replace")
    delimiter = delimiter or _find_delimiter(tested, usual=usual, whole=whole)
    if not file.is_copy and (other := other_dialect(file.path, tested, delimiter, whole=whole)) is not None:
        raise DataError(_bad(file.path, line, f"the table is not written in the usual way: {other[0]}", raw, other[1]))
    cells = _split(file.path, line, text, delimiter) if text else []
    if isinstance(cells, Problem):
        raise DataError(cells)
    columns = tuple(cell.strip() for cell in cells)
    left_out = _find_left_out(columns, _records(tested, delimiter, whole=whole)) if text else ()
    _refuse_names(file.path, columns, left_out, line, raw)
    return _Header(file.path, delimiter, columns, end, 1 + head.count(b"\n", 0, end), left_out)


def _find_delimiter(head: str, *, usual: str, whole: bool) -> str:
    """The delimiter in the lines of `head`, the column names first; `usual` if the file's name is right or no other fits.

    Unless `head` is the `whole` file its last record is not tested.
    """
    outside_quotes = "".join(head.partition("\n")[0].split('"')[::2])
    if usual == "\t" and usual in outside_quotes:
        return usual
    candidates = [delimiter for delimiter in _DELIMITERS if delimiter in outside_quotes]
    for delimiter in candidates:
        records = _records(head, delimiter, whole=whole)
        rare = delimiter in _RARE and (len(records) < 2 or not all(map(_COLUMN_NAME.fullmatch, records[0])))
        if len({len(record) for record in records}) == 1 and not rare:
            return delimiter
    return next((delimiter for delimiter in candidates if delimiter in ",;\t" and usual == ","), usual)


def _records(head: str, delimiter: str, *, whole: bool) -> list[list[str]]:
    """The first records that are complete."""
    records: list[list[str]] = []
    before = csv.field_size_limit(1 << 26)
    try:
        for record in csv.reader((line + "\n" for line in head.split("\n")), delimiter=delimiter, strict=True):
            if record:
                records.append(record)
            if len(records) > _TESTED:
                return records[:-1]
    except csv.Error:
        return records  # those before the broken or cut one
    finally:
        csv.field_size_limit(before)
    return records if whole else records[:-1]


def _find_left_out(names: Sequence[str], records: Sequence[Sequence[str]]) -> tuple[_LeftOut, ...]:
    """Columns that are empty or number the rows: those without a name, or with the name that pandas gives an index it reads back."""
    tested = [record for record in records[1:] if len(record) == len(names)]
    left_out = []
    for position, name in enumerate(names):
        if name and not _INDEX_NAME.fullmatch(name):
            continue
        cells = [record[position].strip() for record in tested]
        if not name and not any(cells):
            left_out.append(_LeftOut(position, counts=False))
        elif cells and all(map(_NUMBER.fullmatch, cells)) and (position == 0 or _are_consecutive(cells)):
            left_out.append(_LeftOut(position, counts=True))
    return tuple(left_out) if len(left_out) < len(names) else ()


def _are_consecutive(cells: Sequence[str]) -> bool:
    return len(cells) > 1 and all(after - before == 1 for before, after in pairwise(map(float, cells)))


def _refuse_names(path: str, columns: Sequence[str], left_out: Sequence[_LeftOut], line: int, raw: bytes) -> None:
    """DataError if a column that is read has no name, or that of another column."""
    positions = {column.position for column in left_out}
    unnamed = [number for number, name in enumerate(columns, 1) if not name and number - 1 not in positions]
    repeated = sorted({name for name in columns if name and columns.count(name) > 1})
    if unnamed and raw:
        message = f"column {unnamed[0]} of {len(columns)} has no name"
        raise DataError(_bad(path, line, message, raw, "write a name for it in the first line"))
    if repeated:
        raise DataError(_bad(path, line, f"two columns are named {repeated[0]}", raw, "give each column a name of its own"))


def _scan(header: _Header, file: GuardedFile) -> Iterator[RowStarts]:
    """Offset and line of each record after the first."""
    yield from find_records(file, delimiter=header.delimiter.encode(), begin=header.end, line=header.line)
    yield np.array([file.size]), NO_LINES


def _trim(raw: bytes) -> bytes:
    """The record without its line end and the blank lines after it."""
    return raw.rstrip(b"\r\n")


def _parse(header: _Header, raw: bytes, line: int, number: int) -> Row | Problem:
    raw, path, columns = _trim(raw), header.path, header.columns
    text = read_text(raw, path=path, line=line)
    cells = text if isinstance(text, Problem) else _split(path, line, text, header.delimiter)
    if isinstance(cells, Problem):
        return cells
    if len(cells) != len(columns):
        count = "1 field" if len(cells) == 1 else f"{len(cells)} fields"
        names = ", ".join(name or "(no name)" for name in columns[:6]) + (", ..." if len(columns) > 6 else "")
        message = f"the row has {count}, the first line names {len(columns)} columns ({names})"
        hint = f'a field that holds {_name(header.delimiter)}, a quote or a line end must be in "quotes", with its own quotes doubled'
        return _bad(path, line, message, raw, hint)
    if len(cells) > 1 and cells[-1].strip() == columns[-1] and tuple(cell.strip("\ufeff \t") for cell in cells) == columns:
        hint = "remove this line; when files are joined only the first keeps its header"
        return _bad(path, line, "this line repeats the names of the columns and is not a row", raw, hint)
    values = dict(zip(columns, cells, strict=True))
    for column in header.left_out:
        cell = cells[column.position]
        if not column.fits(cell):
            message = f"column {column.position + 1} is left out as an index, but here it holds {cell[:60]!r}"
            return _bad(path, line, message, raw, "write a name for it in the first line")
        values.pop(columns[column.position], None)
    try:
        return Row(index=number, source=path, line=line, value=row_value(values))
    except BadValue as error:
        command = None if error.python_list is None else lists_of_python(path, error.python_list, header.delimiter)
        return _bad(path, line, str(error), raw, command)


def _split(path: str, line: int, text: str, delimiter: str) -> list[str] | Problem:
    """The fields of one record."""
    before = csv.field_size_limit(LONGEST_ROW)
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True))
    except csv.Error as error:
        what = str(error)
        hint: str | None = 'a field that holds a quote must be in "quotes", with its own quotes doubled: "say ""yes"""'
        if "expected after" in what:
            what = "there is text after the closing quote of a field"
        elif "unexpected end" in what:
            what = "a quote is opened and not closed"
        elif "new-line" in what:
            what = "there is a line end (CR) within a field without quotes"
            hint = break_at_returns(path, sibling(path, f"-lines{Path(path).suffix}")) if "\n" not in text else None
        return _bad(path, line, what, text.encode(), hint)
    finally:
        csv.field_size_limit(before)


def _hashed(header: _Header, raw: bytes) -> bytes:
    """The row as canonical JSON, so that a table has the same hashes as CSV and as Parquet; a bad row as it is."""
    row = _parse(header, raw, 1, 0)
    return canonical(row.value) if isinstance(row, Row) else _trim(raw)


def _name(delimiter: str) -> str:
    return _DELIMITERS.get(delimiter, delimiter)


def _bad(path: str, line: int, message: str, raw: bytes, hint: str | None = None) -> Problem:
    shown = excerpt(raw[:400].decode("utf-8", "replace"), line)
    return Problem(code="data.bad-csv", message=message, where=f"{path}:{line}", excerpt=shown, hint=hint)
