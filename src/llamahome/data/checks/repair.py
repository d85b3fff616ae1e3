"""Repairs of one row where nothing has to be guessed: stray bytes, misspelt roles and keys, control tokens in text, wrong encodings.

Each function takes a problem and returns the repaired row with a record of the change, or None if only a person knows what was meant.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llamahome.data.checks.repair_text import as_json, redecoded
from llamahome.data.files.encoding import codec_of
from llamahome.data.files.jsontext import without_repeats
from llamahome.data.rows.jsonpath import Steps, change_strings, leads, path_in, put, rename, show_path, value_at
from llamahome.data.rows.rendered import turn_mark
from llamahome.data.rows.row_error import nearest
from llamahome.data.rows.turns import MESSAGE_ROLES, SHAREGPT_ROLES
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.data.text.unrendered import turns_of
from llamahome.errors import Problem

_BOM = b"\xef\xbb\xbf"
_RENAME = re.compile(r'rename "(.*)" to "(.*)"')
_CONTEXT, _SHOWN = 20, 60
"""How many characters a line about a change shows before the change, and in all."""
_MAX_CONTROL_TOKENS = 1000
"""How many control tokens are split in one text; a row with more is not usable."""


@dataclass(frozen=True)
class Change:
    """One thing that was changed in a row."""

    what: str
    """The code of the finding that the change repairs."""
    path: str | None
    before: Any
    after: Any


def repair_bytes(raw: bytes, problem: Problem, encoding: str | None = None) -> tuple[bytes, Change] | None:
    """A line that is not valid JSON: without NUL bytes, byte order marks and repeated keys of equal value, or with JSON's own spelling.

    `encoding` is that of the file, if it is certain and not UTF-8.
    """
    repaired = raw
    if problem.code == "data.nul-byte":
        repaired = raw.replace(b"\0", b"")
    elif problem.code == "data.bad-json":
        stripped = raw.strip()
        while stripped.startswith(_BOM):
            repaired = stripped = stripped[len(_BOM) :].strip()
        if repaired == raw and (spelt := as_json(raw.decode("utf-8"))) is not None:
            repaired = spelt.encode("utf-8", "backslashreplace")
    elif problem.code == "data.not-utf8" and encoding is not None:
        repaired = _recoded(raw, encoding)
    elif problem.code == "data.repeated-key":
        value = without_repeats(raw.decode("utf-8"))
        repaired = raw if value is None else json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")
    if repaired == raw or not repaired.strip():
        return None
    before, after = (part.decode("utf-8", "backslashreplace") for part in (raw, repaired))
    return repaired, Change(problem.code, None, before, after)


def _recoded(raw: bytes, encoding: str) -> bytes:
    try:
        return raw.decode(codec_of(encoding)).encode("utf-8")
    except UnicodeDecodeError:
        return raw


def repair_value(value: dict[str, Any], problem: Problem, tokenizer: ChatTokenizer | None) -> tuple[dict[str, Any], list[Change]] | None:
    """A row that cannot be converted or tokenized, with its misspelt name corrected or its control tokens split."""
    if problem.code == "data.unknown-role":
        return _repair_role(value, problem)
    if problem.code == "data.missing-key":
        return _repair_key(value, problem)
    if problem.code == "data.control-token-in-text" and tokenizer is not None:
        return _all_strings(value, problem.code, lambda text: split_control_tokens(text, tokenizer))
    if problem.code == "data.rendered-chat" and tokenizer is not None:
        return _read_back(value, problem, tokenizer)
    return None


def repair_misread(value: dict[str, Any]) -> tuple[dict[str, Any], list[Change]] | None:
    """The row with its wrongly decoded strings corrected, where that is certain."""
    return _all_strings(value, "data.mojibake", lambda text: redecoded(text) or text)


def split_control_tokens(text: str, tokenizer: ChatTokenizer) -> str:
    """The text with a space after the first character of each control token, so that the model reads ordinary words."""
    for _ in range(_MAX_CONTROL_TOKENS):
        control = tokenizer.control_token_in(text)
        if control is None or len(control) < 2:
            break
        at = text.index(control) + 1
        text = f"{text[:at]} {text[at:]}"
    return text


def _read_back(value: dict[str, Any], problem: Problem, tokenizer: ChatTokenizer) -> tuple[dict[str, Any], list[Change]] | None:
    """The row with lists of turns instead of the columns that the tokenizer's own template rendered."""
    read = {key: turns for key, text in value.items() if isinstance(text, str) and turn_mark(text) and (turns := turns_of(text, tokenizer))}
    return ({**value, **read}, [Change(problem.code, key, value[key], turns) for key, turns in read.items()]) if read else None


def _repair_role(value: dict[str, Any], problem: Problem) -> tuple[dict[str, Any], list[Change]] | None:
    steps = path_in(problem.message, value)
    if steps is None:
        return None
    role = value_at(value, steps)
    near = nearest(role, SHAREGPT_ROLES if steps[-1] == "from" else MESSAGE_ROLES) if isinstance(role, str) else None
    return None if near is None else (put(value, steps, near), [Change(problem.code, show_path(steps), role, near)])


def _repair_key(value: dict[str, Any], problem: Problem) -> tuple[dict[str, Any], list[Change]] | None:
    match = _RENAME.fullmatch(problem.hint or "")
    if match is None:
        return None
    steps: Steps = (*(path_in(problem.message, value) or ()), match[1])
    if not leads(value, steps) or leads(value, (*steps[:-1], match[2])):
        return None
    return rename(value, steps, match[2]), [Change(problem.code, show_path(steps[:-1]) or None, match[1], match[2])]


def _all_strings(value: dict[str, Any], code: str, change: Callable[[str], str]) -> tuple[dict[str, Any], list[Change]] | None:
    changed, changes = change_strings(value, change)
    return (changed, [Change(code, show_path(steps), before, after) for steps, before, after in changes]) if changes else None


def show_change(entry: dict[str, Any]) -> str:
    """One entry of the record as a line of text: where, why, and the part that differs."""
    where = f"{entry['source']}:{entry['line']}" + (f": {entry['path']}" if entry["path"] else "")
    if entry["what"] == "dropped":
        return f"{where}: left out, {entry['code']}: {entry['why']}"
    texts = [json.dumps(entry[side], ensure_ascii=False) for side in ("before", "after")]
    same = next((at for at, (one, other) in enumerate(zip(*texts, strict=False)) if one != other), min(map(len, texts)))
    begin = max(0, same - _CONTEXT)
    parts = [f"{'...' if begin else ''}{text[begin:][:_SHOWN]}{'...' if len(text) > begin + _SHOWN else ''}" for text in texts]
    return f"{where}: mended, {entry['code']}: {parts[0]} -> {parts[1]}"
