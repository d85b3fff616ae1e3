"""Recognises a CSV file whose first line is a row and not the names of its columns, by what the other rows hold in the same columns.

Only rows that are in no format are asked about, so a table with unusual names that data.columns maps is never refused.
"""

import csv
import re
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from llamahome.data.files.commands import sibling
from llamahome.data.files.jsonrow import excerpt
from llamahome.data.files.kinds import ending
from llamahome.data.records import Row
from llamahome.data.rows.column_roles import COMPLETION, CONTEXT, PROMPT, WEAK_PROMPT, plain_name
from llamahome.data.rows.formats import KEYS
from llamahome.errors import Problem

_NUMBER = re.compile(r"-?\d+(?:[.,]\d+)?%?")
_KNOWN = {
    *PROMPT,
    *COMPLETION,
    *CONTEXT,
    *(name for names in WEAK_PROMPT for name in names),
    *(key for keys in KEYS.values() for key in keys),
}
_SENTENCE_WORDS = 5
_DELIMITERS = ",;\t|"


def is_table(row: Row) -> bool:
    """Whether the row is of a file whose first line names the columns."""
    return ending(row.source) in (".csv", ".tsv")


def no_header(rows: Sequence[Row]) -> Problem | None:
    """The problem of a table whose first line looks like its other rows; None if it may be names."""
    if not rows or not may_lack_names(rows[0]):
        return None
    names = list(rows[0].value)
    alike = [name for name in names if _is_like(name, [str(row.value.get(name) or "") for row in rows])]
    if not alike:
        return None
    path, line, delimiter = _delimited(rows)
    shown = ", ".join(f'"{name if len(name) <= 60 else name[:57] + "..."}"' for name in names[:6])
    command = _with_header(path, names, rows, delimiter) if delimiter is not None else None
    return Problem(
        code="data.no-header",
        message=f"the first line should name the columns, and looks like a row: {shown}",
        where=f"{path}:1" if delimiter is not None else path,
        excerpt=excerpt(line, 1) if delimiter is not None else None,
        hint=command or "write the names of the columns into a first line, for example prompt,completion",
    )


def may_lack_names(row: Row) -> bool:
    """Whether the row is of a table whose first line names no column that is known."""
    return is_table(row) and not any(plain_name(key) in _KNOWN for key in row.value)


def names_written_before(rows: Sequence[Row]) -> str | None:
    """The command that writes names before the first line of a table, which names no known column and may be a row; None if unclear."""
    if not may_lack_names(rows[0]):
        return None
    path, _, delimiter = _delimited(rows)
    return None if delimiter is None else _with_header(path, list(rows[0].value), rows, delimiter)


def _delimited(rows: Sequence[Row]) -> tuple[str, str, str | None]:
    """The file of the rows, its first line, and what separates the names in it; None if that is not known."""
    names, path = list(rows[0].value), rows[0].source
    line = _first_line(path)
    return path, line, next((one for one in _DELIMITERS if next(csv.reader([line], delimiter=one), []) == names), None)


def _is_like(name: str, cells: Sequence[str]) -> bool:
    """Whether the name of a column is of the same kind as its cells."""
    half = len(cells) / 2
    if name.strip() in {cell.strip() for cell in cells}:
        return True
    if _NUMBER.fullmatch(name.strip()):
        return sum(_NUMBER.fullmatch(cell.strip()) is not None for cell in cells) > half
    end = name.strip()[-1:]
    if end in tuple("?!.。？！"):
        return sum(cell.strip().endswith(end) for cell in cells) >= half
    is_sentence = len(name.split()) >= _SENTENCE_WORDS
    return is_sentence and sum(len(cell.split()) >= _SENTENCE_WORDS for cell in cells) > half


def _with_header(path: str, names: Sequence[str], rows: Sequence[Row], delimiter: str) -> str | None:
    """The command that writes a copy with names; only for a text, or a question and an answer, beside columns that count the rows."""
    columns = [[name, *(str(row.value.get(name) or "") for row in rows)] for name in names]
    texts = [position for position, cells in enumerate(columns) if not _counts(cells)]
    if not 0 < len(texts) <= 2 or any(_NUMBER.fullmatch(columns[position][0].strip()) for position in texts):
        return None
    wanted = dict(zip(texts, ("text",) if len(texts) == 1 else ("prompt", "completion"), strict=True))
    header = delimiter.join(wanted.get(position, f"number{position + 1}") for position in range(len(names)))
    escaped = header.replace("\t", "\\t") + "\\n"
    named = sibling(path, f"-named{Path(path).suffix}")
    return f"printf {shlex.quote(escaped)} | cat - {shlex.quote(path)} > {shlex.quote(str(named))}   names the columns in this order"


def _counts(cells: Sequence[str]) -> bool:
    """Whether each cell is the number after the one before."""
    numbers = [int(cell) for cell in cells if cell.strip().isdecimal()]
    return len(numbers) == len(cells) and all(after - before == 1 for before, after in pairwise(numbers))


def _first_line(path: str) -> str:
    """The first line of the file; empty if it is packed, is not UTF-8 or begins with a byte order mark."""
    try:
        with Path(path).open(encoding="utf-8", newline="\n") as file:
            line = file.readline(1 << 16).rstrip("\r\n")
    except (OSError, ValueError):
        return ""
    return "" if line.startswith("\ufeff") else line
