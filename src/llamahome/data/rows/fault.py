"""What is wrong with a row before its place is known, and how the keys of a row are read so that a fault names what is there instead.

A Finding is raised where a row is understood and caught where its file and line are known; it never leaves data/.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from llamahome.data.files.jsonrow import excerpt, kind
from llamahome.data.records import Row
from llamahome.errors import Problem


class Finding(Exception):
    """What is wrong with a row, before its place is known."""

    def __init__(self, code: str, message: str, *, hint: str | None = None, part: object = None) -> None:
        super().__init__(message)
        self.code, self.message, self.hint, self.part = code, message, hint, part


def problem_at(row: Row, finding: Finding) -> Problem:
    """The finding as a Problem at the row's file and line, with the offending part as excerpt."""
    part = row.value if finding.part is None else finding.part
    try:
        shown = excerpt(json.dumps(part, ensure_ascii=False), row.line)
    except RecursionError:
        shown = None
    message = finding.message.replace("\n", "\\n")  # a template of data.columns may have line ends
    return Problem(code=finding.code, message=message, where=row.where, excerpt=shown, hint=finding.hint)


def required(value: Mapping[Any, Any], key: Any, *, path: str) -> Any:
    """value[key]; a Finding with the nearest key when it is not there."""
    if key in value:
        return value[key]
    here = f"{path} has" if path else "the row has"
    near = nearest(str(key), value)
    hint = f'rename "{near}" to "{key}"' if near else None
    keys = ", ".join(f'"{name}"' for name in list(value)[:8]) or "no keys at all"
    message = f'{here} no "{key}" but "{near}"' if near else f'{here} no "{key}"; it has {keys}'
    raise Finding("data.missing-key", message, hint=hint, part=value)


def content_of(value: Mapping[Any, Any], key: Any, *, path: str, may_be_empty: bool = False) -> str:
    """The string value[key]; a Finding when it is missing, null, not a string, or empty."""
    content = required(value, key, path=path)
    name = f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}".lstrip(".")
    if content is None:
        raise Finding("data.null-content", f"{name} is null", part=value, hint="write the text, or remove the row")
    if not isinstance(content, str):
        raise Finding("data.wrong-type", f"{name} is {kind(content)}, not a string", part=value, hint="write the text itself as a string")
    if not content.strip() and not may_be_empty:
        what = "empty" if not content else "only white space"
        raise Finding("data.empty-content", f"{name} is {what}", part=value, hint="write the text, or remove the row")
    return content


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.75) -> str | None:
    """The known word that `word` is most likely a misspelling of; "context" and "text" share 0.73 of their letters and are two words."""
    lowered = {str(name).lower(): str(name) for name in known}
    found = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=cutoff)
    return lowered[found[0]] if found else None
