"""The error for a row whose place in a file is not known yet, and functions that read keys and name what is there instead.

A RowError is raised where a row is understood and caught where its file and line are known; it never leaves data/.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llamahome.data.files.jsonrow import excerpt, kind
from llamahome.data.records import Row
from llamahome.errors import Problem

_COLUMN = re.compile(r"[^\[.\s]+")
"""The column with which a message begins: of `messages[1] has no "content"`."""


class RowError(Exception):
    """What is wrong with a row; `part` is the offending part of it (None: the whole row)."""

    def __init__(self, code: str, message: str, *, hint: str | None = None, part: object = None) -> None:
        super().__init__(message)
        self.code, self.message, self.hint, self.part = code, message, hint, part


def problem_at(row: Row, error: RowError) -> Problem:
    """The error as a Problem at the row's file and line, with the offending part as excerpt."""
    part = row.value if error.part is None else error.part
    try:
        shown = excerpt(json.dumps(part, ensure_ascii=False), row.line)
    except RecursionError:
        shown = None
    column = _COLUMN.match(error.message)
    if error.code in ("data.null-content", "data.missing-key") and column is not None and column[0] in row.not_text:
        message = f"column {column[0]} holds bytes that are not UTF-8 text"
        return Problem(code="data.not-utf8", message=message, where=row.where, excerpt=shown, hint="write the column as text")
    message = error.message.replace("\n", "\\n")  # a template of data.columns may have line ends
    return Problem(code=error.code, message=message, where=row.where, excerpt=shown, hint=error.hint)


def required(value: Mapping[Any, Any], key: Any, *, path: str) -> Any:
    """value[key]; a RowError with the nearest key if it is missing."""
    if key in value:
        return value[key]
    here = f"{path} has" if path else "the row has"
    near = nearest(str(key), value)
    hint = f'rename "{near}" to "{key}"' if near else None
    keys = ", ".join(f'"{name}"' for name in list(value)[:8]) or "no keys at all"
    message = f'{here} no "{key}" but "{near}"' if near else f'{here} no "{key}"; it has {keys}'
    raise RowError("data.missing-key", message, hint=hint, part=value)


def content_of(value: Mapping[Any, Any], key: Any, *, path: str, may_be_empty: bool = False) -> str:
    """The string value[key]; a RowError if it is missing, null, not a string, or empty."""
    content = required(value, key, path=path)
    name = f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}".lstrip(".")
    if content is None:
        raise RowError("data.null-content", f"{name} is null", part=value, hint="write the text, or remove the row")
    if not isinstance(content, str):
        raise RowError("data.wrong-type", f"{name} is {kind(content)}, not a string", part=value, hint="write the text itself as a string")
    if not content.strip() and not may_be_empty:
        what = "empty" if not content else "only white space"
        raise RowError("data.empty-content", f"{name} is {what}", part=value, hint="write the text, or remove the row")
    return content


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.75) -> str | None:
    """The known word of which `word` is most likely a misspelling; "context" and "text", which share 0.73 of their letters, are not."""
    by_lower = {str(name).lower(): str(name) for name in known}
    matches = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[matches[0]] if matches else None
