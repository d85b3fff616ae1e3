"""What can be mended in one row without guessing: stray bytes, misspelt roles and keys, control tokens in text, misread text.

Each function takes what is wrong and returns the mended row with a record of the change, or None when only a person knows what was meant.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llamahome.data.checks.mojibake import repaired
from llamahome.data.checks.spelling import as_json
from llamahome.data.files.encoding import codec_of
from llamahome.data.files.jsontext import without_repeats
from llamahome.data.rows.fault import nearest
from llamahome.data.rows.formats import MESSAGE_ROLES, SHAREGPT_ROLES
from llamahome.data.rows.jsonpath import Steps, change_strings, leads, path_in, put, rename, show_path, value_at
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.errors import Problem

_BOM = b"\xef\xbb\xbf"
_RENAME = re.compile(r'rename "(.*)" to "(.*)"')
_AROUND, _SHOWN = 20, 60
"""Characters before a change, and in all, that a line about it shows."""
_MOST = 1000
"""Control tokens that are taken apart in one text; more are left, and the row is not usable."""


@dataclass(frozen=True)
class Change:
    """One thing that was changed in a row."""

    what: str
    """Code of the finding that it mends."""
    path: str | None
    before: Any
    after: Any


def mend_bytes(raw: bytes, problem: Problem, encoding: str | None = None) -> tuple[bytes, Change] | None:
    """A line that is not JSON, without its NUL bytes, the byte order mark before it, or keys that say the same twice, or as JSON spells it.

    `encoding` is that of the file where it is certain and not UTF-8.
    """
    mended = raw
    if problem.code == "data.nul-byte":
        mended = raw.replace(b"\0", b"")
    elif problem.code == "data.bad-json":
        stripped = raw.strip()
        while stripped.startswith(_BOM):
            mended = stripped = stripped[len(_BOM) :].strip()
        if mended == raw and (spelt := as_json(raw.decode("utf-8"))) is not None:
            mended = spelt.encode("utf-8", "backslashreplace")
    elif problem.code == "data.not-utf8" and encoding is not None:
        mended = _recoded(raw, encoding)
    elif problem.code == "data.repeated-key":
        value = without_repeats(raw.decode("utf-8"))
        mended = raw if value is None else json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")
    if mended == raw or not mended.strip():
        return None
    before, after = (part.decode("utf-8", "backslashreplace") for part in (raw, mended))
    return mended, Change(problem.code, None, before, after)


def _recoded(raw: bytes, encoding: str) -> bytes:
    try:
        return raw.decode(codec_of(encoding)).encode("utf-8")
    except UnicodeDecodeError:
        return raw


def mend_value(value: dict[str, Any], problem: Problem, tokenizer: ChatTokenizer | None) -> tuple[dict[str, Any], list[Change]] | None:
    """A row that cannot be understood or tokenized, with the name that was meant or its control tokens taken apart."""
    if problem.code == "data.unknown-role":
        return _mend_role(value, problem)
    if problem.code == "data.missing-key":
        return _mend_key(value, problem)
    if problem.code == "data.control-token-in-text" and tokenizer is not None:
        return _all_strings(value, problem.code, lambda text: apart(text, tokenizer))
    return None


def mend_misread(value: dict[str, Any]) -> tuple[dict[str, Any], list[Change]] | None:
    """The row with its misread strings as they were, where that is certain."""
    return _all_strings(value, "data.mojibake", lambda text: repaired(text) or text)


def apart(text: str, tokenizer: ChatTokenizer) -> str:
    """The text with a blank after the first character of each control token, so that the model reads words."""
    for _ in range(_MOST):
        control = tokenizer.control_token_in(text)
        if control is None or len(control) < 2:
            break
        at = text.index(control) + 1
        text = f"{text[:at]} {text[at:]}"
    return text


def _mend_role(value: dict[str, Any], problem: Problem) -> tuple[dict[str, Any], list[Change]] | None:
    steps = path_in(problem.message, value)
    if steps is None:
        return None
    role = value_at(value, steps)
    near = nearest(role, SHAREGPT_ROLES if steps[-1] == "from" else MESSAGE_ROLES) if isinstance(role, str) else None
    return None if near is None else (put(value, steps, near), [Change(problem.code, show_path(steps), role, near)])


def _mend_key(value: dict[str, Any], problem: Problem) -> tuple[dict[str, Any], list[Change]] | None:
    found = _RENAME.fullmatch(problem.hint or "")
    if found is None:
        return None
    steps: Steps = (*(path_in(problem.message, value) or ()), found[1])
    if not leads(value, steps) or leads(value, (*steps[:-1], found[2])):
        return None
    return rename(value, steps, found[2]), [Change(problem.code, show_path(steps[:-1]) or None, found[1], found[2])]


def _all_strings(value: dict[str, Any], code: str, change: Callable[[str], str]) -> tuple[dict[str, Any], list[Change]] | None:
    mended, changes = change_strings(value, change)
    return (mended, [Change(code, show_path(steps), before, after) for steps, before, after in changes]) if changes else None


def show_change(entry: dict[str, Any]) -> str:
    """One entry of the record in one line: where, why, and the part that differs."""
    where = f"{entry['source']}:{entry['line']}" + (f": {entry['path']}" if entry["path"] else "")
    if entry["what"] == "dropped":
        return f"{where}: left out, {entry['code']}: {entry['why']}"
    texts = [json.dumps(entry[side], ensure_ascii=False) for side in ("before", "after")]
    same = next((at for at, (one, other) in enumerate(zip(*texts, strict=False)) if one != other), min(map(len, texts)))
    begin = max(0, same - _AROUND)
    parts = [f"{'...' if begin else ''}{text[begin:][:_SHOWN]}{'...' if len(text) > begin + _SHOWN else ''}" for text in texts]
    return f"{where}: mended, {entry['code']}: {parts[0]} -> {parts[1]}"
