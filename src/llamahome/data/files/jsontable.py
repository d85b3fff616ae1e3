"""Recognises a JSON file that holds a whole table in one value, as pandas writes it, and suggests a command that makes rows of it.

    list     {"prompt": ["a", "b"], "completion": ["c", "d"]}             DataFrame.to_dict("list")
    columns  {"prompt": {"0": "a", "1": "b"}, "completion": {...}}        DataFrame.to_json()
    index    {"0": {"prompt": "a", "completion": "c"}, "1": {...}}        to_json(orient="index")
    keyed    {"x7": {"prompt": "a", "completion": "c"}, "x9": {...}, ...} rows by a name of each
    split    {"columns": ["prompt", ...], "index": [0, 1], "data": [["a", "c"], ...]}
    table    {"schema": {...}, "data": [{"index": 0, "prompt": "a", ...}, ...]}
    values   [["a", "c"], ["b", "d"]]

Cost: one parse of a file that is a single value of at most 64 MiB; of other files only the beginning is read.
"""

import codecs
import re
from typing import Any

from llamahome.data.files.commands import run_python, sibling
from llamahome.data.files.guarded_file import GuardedFile
from llamahome.data.files.jsonrow import excerpt
from llamahome.data.files.jsontext import json_or_none
from llamahome.errors import DataError, Problem

_SPLIT = {"columns", "index", "data", "index_names", "column_names"}
"""The last two are of to_dict("tight")."""
_NUMBER = re.compile(r"-?\d+")
_ROWS = {
    "list": "[dict(zip(t,r)) for r in zip(*t.values())]",
    "columns": "[{k:c.get(i) for k,c in t.items()} for i in dict.fromkeys(i for c in t.values() for i in c)]",
    "index": "list(t.values())",
    "keyed": "list(t.values())",
    "split": "[dict(zip(t['columns'],r)) for r in t['data']]",
    "table": "t['data']",
}
"""Python code for the rows of each shape; `t` is the value."""
_DESCRIPTION = {
    "list": "one object of columns, each a list, as DataFrame.to_dict('list') of pandas writes it",
    "columns": "one object of columns, each an object by row, as DataFrame.to_json() of pandas writes it",
    "index": "one object of rows by their index, as DataFrame.to_json(orient='index') of pandas writes it",
    "keyed": "one object of rows, each under a name of its own",
    "split": "a table in columns, index and data, as DataFrame.to_json(orient='split') of pandas writes it",
    "table": "a table with its schema, as DataFrame.to_json(orient='table') of pandas writes it",
    "values": "rows without the names of their columns, as DataFrame.to_json(orient='values') of pandas writes it",
}


def refuse_table(file: GuardedFile, head: bytes) -> None:
    """DataError if the whole file is one JSON value that holds a table."""
    begin = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if begin[:1] != b"{" and not (begin[:1] == b"[" and begin[1:].lstrip()[:1] == b"["):
        return
    if file.size > file.limits.row or not _may_be_one_value(begin):
        return
    shape = shape_of(json_or_none(file.read(0, file.size)))
    if shape is not None:
        raise DataError(_problem(file, shape, begin))


def _may_be_one_value(begin: bytes) -> bool:
    """Whether no object in a line of its own follows the first line, so that a file of rows is not parsed whole."""
    first, _, rest = begin.partition(b"\n")
    return rest.lstrip()[:1] != b"{" or json_or_none(first) is None


def shape_of(value: object) -> str | None:
    """Which of the shapes of a table the value has; None for a row or anything else."""
    if isinstance(value, list):
        lengths = {len(row) if isinstance(row, list) and row else 0 for row in value}
        equal = len(lengths) == 1 and lengths != {0}
        return "values" if equal and not any(isinstance(cell, dict) for row in value for cell in row) else None
    if not isinstance(value, dict) or not value:
        return None
    if isinstance(value.get("schema"), dict) and "fields" in value["schema"] and _all(value.get("data"), dict):
        return "table"
    if isinstance(value.get("columns"), list) and _all(value.get("data"), list) and set(value) <= _SPLIT:
        return "split" if all(len(row) == len(value["columns"]) for row in value["data"]) else None
    parts = list(value.values())
    if all(isinstance(part, list) and part for part in parts):
        equal = len({len(part) for part in parts}) == 1
        turns = any(_all(part, dict) for part in parts)  # then the value is a row of its own
        return "list" if equal and not turns and any(isinstance(part[0], str | list) for part in parts) else None
    if all(isinstance(part, dict) and part for part in parts):
        if all(_NUMBER.fullmatch(key) for key in value):
            return "index"
        if len({frozenset(part) for part in parts}) == 1 and all(_NUMBER.fullmatch(key) for key in parts[0]):
            return "columns"
        alike = len(parts) > 2 and len({frozenset(part) for part in parts}) == 1 and len(parts[0]) > 1
        return "keyed" if alike and all(isinstance(cell, str) for cell in list(parts[0].values())[:1]) else None
    return None


def _all(value: object, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, kind) for part in value)


def rows_of(value: Any, shape: str) -> list[dict[str, Any]] | None:
    """The rows of the table; None if its columns have no names."""
    if shape == "list":
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if shape == "columns":
        order = dict.fromkeys(number for column in value.values() for number in column)
        return [{name: column.get(number) for name, column in value.items()} for number in order]
    if shape == "split":
        return [dict(zip(value["columns"], row, strict=True)) for row in value["data"]]
    if shape in ("index", "keyed"):
        return list(value.values())
    return list(value["data"]) if shape == "table" else None


def _problem(file: GuardedFile, shape: str, begin: bytes) -> Problem:
    hint = None
    if shape in _ROWS and not file.is_copy:
        code = f"import json,sys; t=json.load(open(sys.argv[1],encoding='utf-8-sig')); json.dump({_ROWS[shape]},sys.stdout)"
        hint = run_python(code, file.path, output=sibling(file.path, "-rows.json"))
    shown = excerpt(begin[:400].decode("utf-8", "replace"), 1)
    message = f"the file holds {_DESCRIPTION[shape]}; a row is one object"
    return Problem(code="data.whole-table", message=message, where=f"{file.path}:1", excerpt=shown, hint=hint)
