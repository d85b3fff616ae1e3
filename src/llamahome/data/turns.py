"""The turns of a chat as a row writes them, checked one by one: keys, roles, types, contents, order.

A Finding carries what is wrong up to formats.understand, which adds the place; it never leaves data/.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from llamahome.data.jsonrow import excerpt, kind
from llamahome.data.records import Row
from llamahome.errors import Problem

_UNREAD = ("tool_calls", "function_call", "reasoning_content", "thinking", "audio", "images")
"""Keys of a turn that carry text or meaning which this version would lose; refused rather than dropped."""
_WEIGHTS = ("weight", "train")


class Finding(Exception):
    """What is wrong with a row, before its place is known."""

    def __init__(self, code: str, message: str, *, hint: str | None = None, part: object = None) -> None:
        super().__init__(message)
        self.code, self.message, self.hint, self.part = code, message, hint, part


def problem_at(row: Row, finding: Finding) -> Problem:
    """The finding as a Problem at the row's file and line, with the offending part as excerpt."""
    part = row.value if finding.part is None else finding.part
    shown = excerpt(json.dumps(part, ensure_ascii=False), row.line)
    return Problem(code=finding.code, message=finding.message, where=row.where, excerpt=shown, hint=finding.hint)


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


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` is most likely a misspelling of."""
    lowered = {str(name).lower(): str(name) for name in known}
    found = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.7)
    return lowered[found[0]] if found else None


def read_turns(
    value: object, *, path: str, keys: tuple[str, str], roles: Mapping[str, str]
) -> tuple[tuple[dict[str, Any], ...], frozenset[int]]:
    """The turns as role and content, and the numbers of those with weight 0; raises Finding."""
    if not isinstance(value, list):
        raise Finding("data.wrong-type", f"{path} is {kind(value)}, not a list of turns")
    if not value:
        raise Finding("data.no-turns", f"{path} is an empty list", hint="remove the row")
    turns, silent = [], set()
    for number, turn in enumerate(value):
        here = f"{path}[{number}]"
        if not isinstance(turn, dict):
            raise Finding("data.wrong-type", f'{here} is {kind(turn)}, not an object with "{keys[0]}" and "{keys[1]}"')
        role = _role(turn, key=keys[0], path=here, roles=roles)
        for key in _UNREAD:
            if turn.get(key):
                raise Finding("data.tool-calls", f"{here}.{key} is not rendered by this version", part=turn, hint=f'remove "{key}"')
        turns.append({"role": role, "content": content_of(turn, keys[1], path=here, may_be_empty=role == "system")})
        if not _weight(turn, path=here):
            silent.add(number)
    return tuple(turns), frozenset(silent)


def check_order(turns: tuple[dict[str, Any], ...], *, path: str) -> None:
    """Finding for an order that is surely wrong: a later system turn, two answers in a row, a tool result that nobody asked for."""
    for number, turn in enumerate(turns):
        before = turns[number - 1]["role"] if number else None
        here = f"{path}[{number}]" if path else f"turn {number}"
        if turn["role"] == "system" and number:
            raise Finding("data.turn-order", f"{here} is a system turn after turn {number - 1}; only the first may be one", part=turn)
        if turn["role"] == "assistant" and before == "assistant":
            raise Finding(
                "data.turn-order", f"{here} is an assistant turn right after another", part=turn, hint="join the two into one turn"
            )
        if turn["role"] == "tool" and before not in ("assistant", "tool"):
            raise Finding("data.turn-order", f"{here} is a tool result that follows no assistant turn", part=turn)


def _role(turn: dict[str, Any], *, key: str, path: str, roles: Mapping[str, str]) -> str:
    role = required(turn, key, path=path)
    if not isinstance(role, str):
        raise Finding("data.wrong-type", f"{path}.{key} is {kind(role)}, not a string", part=turn)
    if role in roles:
        return roles[role]
    near = nearest(role, roles)
    hint = f'write "{near}" instead of "{role}"' if near else None
    raise Finding("data.unknown-role", f'{path}.{key} is "{role}", not one of {", ".join(roles)}', part=turn, hint=hint)


def _weight(turn: dict[str, Any], *, path: str) -> bool:
    for key in _WEIGHTS:
        weight = turn.get(key)
        if weight is not None and weight not in (0, 1):
            raise Finding("data.wrong-type", f"{path}.{key} is {json.dumps(weight)}; a turn is learned (1) or not (0)", part=turn)
        if weight is not None and not weight:
            return False
    return True
