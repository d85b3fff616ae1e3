"""What a row has beside its question or its turns: a system text, tools, earlier turns, and what the question is about."""

from collections.abc import Iterable, Mapping
from typing import Any

from llamahome.data.files.jsonrow import kind
from llamahome.data.rows.row_error import RowError, content_of
from llamahome.data.rows.toolcalls import read_definitions
from llamahome.data.rows.turns import MESSAGE_ROLES, SHAREGPT_ROLES, joined_parts, opened, read_turns, turn_keys

Turns = tuple[dict[str, Any], ...]
_NO_TEXT = frozenset(("nan", "none", "null", "<na>", "n/a", "#n/a", "<noinput>", "noinput"))
"""What programs write into a cell that has no text."""


def system_turn(value: Mapping[str, Any], names: Mapping[str, str]) -> Turns:
    """The system turn that the row has beside its turns."""
    key = names.get("system", "system")
    if value.get(key) in (None, ""):
        return ()
    written = value[key]
    parts = written.get("parts") if isinstance(written, dict) else written
    if isinstance(parts, list):
        return ({"role": "system", "content": joined_parts(parts, path=key)},)
    return ({"role": "system", "content": content_of(value, key, path="")},)


def tools_of(value: Mapping[str, Any], names: Mapping[str, str]) -> tuple[dict[str, Any], ...]:
    """The tool definitions of the row; a table writes those of a row without tools as null, also in text."""
    for key in (names.get("tools", "tools"), "functions"):
        if value.get(key) and value[key] != "null":
            return read_definitions(value[key], path=key)
    return ()


def with_context(question: str, value: Mapping[str, Any], columns: Iterable[str]) -> str:
    """The question and, each after a blank line, the texts it is about, unless the question contains them or they say nan."""
    for column in columns:
        more = "" if value.get(column) in (None, "") else content_of(value, column, path="", may_be_empty=True)
        if more.strip() and more not in question and not is_no_text(more):
            question = f"{question}\n\n{more}"
    return question


def is_no_text(cell: object) -> bool:
    """Whether a cell is what pandas and other programs write for an empty one, such as nan; for a context, not for an answer."""
    return isinstance(cell, str) and cell.strip().lower() in _NO_TEXT


def one_system(first: Turns, turns: Turns, path: str) -> Turns:
    """No system turn, because the turns begin with one; a RowError if the two differ."""
    if first and turns[0] != first[0]:
        raise RowError("data.turn-order", f"the row has a system text beside {path}[0], a system turn that says something else")
    return ()


def history_turns(value: Mapping[str, Any], names: Mapping[str, str]) -> Turns:
    """The turns before the question: a list of pairs, or of turns."""
    key = names.get("history", "history")
    history = opened(value.get(key)) or []
    if not isinstance(history, list):
        raise RowError("data.wrong-type", f"{key} is {kind(history)}, not a list")
    if all(isinstance(turn, dict) for turn in history):
        roles = {**SHAREGPT_ROLES, **MESSAGE_ROLES}
        return read_turns(history, path=key, keys=turn_keys(history, ("role", "content")), roles=roles)[0] if history else ()
    turns: list[dict[str, Any]] = []
    for number, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("data.wrong-type", f"{key}[{number}] is {kind(pair)}, not a list of a question and an answer")
        for side, role in enumerate(("user", "assistant")):
            turns.append({"role": role, "content": content_of({side: pair[side]}, side, path=f"{key}[{number}]")})
    return tuple(turns)


def has_history(value: Mapping[str, Any], names: Mapping[str, str]) -> bool:
    """Whether the row has turns or pairs before its question; nothing is added to a prompt that data.columns sets."""
    if "prompt" in names and "history" not in names:
        return False
    history = opened(value.get(names.get("history", "history")))
    return isinstance(history, list) and bool(history) and all(isinstance(part, list | dict) for part in history)
