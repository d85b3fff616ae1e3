"""Converts cells of CSV, Parquet and Arrow tables to the values that JSON would hold.

Text stays as it is: 00123 is not a number, and an empty cell is not null. Only a column that a format reads as a list may hold JSON.
"""

import ast
import json
import math
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from llamahome.data.files.jsontext import LoneSurrogate, RepeatedKey, from_json

JSON_COLUMNS = frozenset(("messages", "conversations", "history", "tools", "chosen", "rejected"))
"""Columns in which a text that begins with [ or { is read as JSON, because tables have no other way to write a list of turns."""
_PYTHON_LISTS = ("[{'", "{'r", "{'f")
_CANONICAL = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))


class BadValue(Exception):
    """A cell that should hold JSON and does not."""

    def __init__(self, message: str, *, python_list: str | None = None) -> None:
        super().__init__(message)
        self.python_list = python_list
        """The column, if the cell is a list that Python can read."""


def row_value(cells: dict[str, Any]) -> dict[str, Any]:
    """The row of these cells; raises BadValue."""
    return {str(name): _json_or_text(str(name), plain(value)) for name, value in cells.items()}


def canonical(value: dict[str, Any]) -> bytes:
    """The row as JSON with sorted keys and no spaces, which is what is hashed."""
    return _CANONICAL.encode(value).encode("utf-8", "surrogatepass")


def plain(value: Any) -> Any:
    """The value in JSON types. Null fields of a struct are left out, because a table must name every field in every row."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): part for key, part in zip(value, map(plain, value.values()), strict=True) if part is not None}
    if isinstance(value, list):
        if value and all(isinstance(part, tuple) and len(part) == 2 for part in value):  # an Arrow map
            return {str(key): plain(part) for key, part in value}
        return [plain(part) for part in value]
    return _as_text(value)


def _as_text(value: Any) -> str | None:
    """Dates and exact numbers as text, bytes as the UTF-8 text they are; null for other bytes, such as pictures."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal | timedelta):
        return str(value)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    return str(value)


def holds_other_bytes(value: Any) -> bool:
    """Whether a value of Python, as Arrow makes it, has bytes in it that are not UTF-8 text."""
    if isinstance(value, bytes):
        return _as_text(value) is None
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(map(holds_other_bytes, parts))


def _json_or_text(name: str, value: Any) -> Any:
    if name not in JSON_COLUMNS or not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return from_json(value)
    except (RepeatedKey, LoneSurrogate) as error:
        raise BadValue(f"column {name} holds JSON that cannot be used: {error}") from error
    except ValueError as error:
        python = value.lstrip()[:3] in _PYTHON_LISTS
        why = "; it is Python's notation: write it with json.dumps" if python else f" ({error})"
        column = name if python and _is_python(value) else None
        raise BadValue(f"column {name} holds a list that is not JSON{why}", python_list=column) from error


def _is_python(text: str) -> bool:
    try:
        return isinstance(ast.literal_eval(text), list)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return False
